"""The model beyond its chapter: equal to Hugging Face's Llama and Qwen3, its start, refusals, RoPE's layouts."""
import json
from copy import deepcopy
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.testing import assert_close

from tinylm import core
from tinylm.checkpoint import load_checkpoint, save_checkpoint
from tinylm.core import InputError
from tinylm.generate import KVCache, generate
from tinylm.layers import RMSNorm
from tinylm.model import ModelConfig, TransformerLM, num_parameters
from tinylm.optim import AdamW
from tinylm.rope import RotaryPositionalEmbedding, apply_rope
from tinylm.train import PRESETS

SMALL = ModelConfig(vocab_size=61, context_length=24, d_model=32, num_layers=3, num_heads=4, d_ff=72)
SHAPES = [
    SMALL,
    replace(SMALL, num_heads=1, rope_theta=500.0),
    replace(SMALL, num_heads=16, d_ff=40, num_layers=1),  # heads of two features: a single pair each
    replace(SMALL, d_model=96, num_heads=6, context_length=64),
    replace(SMALL, num_kv_heads=2),
    replace(SMALL, num_kv_heads=1, tie_embeddings=True),
    replace(SMALL, qk_norm=True),
    replace(SMALL, qk_norm=True, num_kv_heads=2, tie_embeddings=True),
]
NAMES = ("small", "one head", "pairs", "wide", "grouped", "one key, tied", "normed queries", "all three")
TODAY = [{"num_kv_heads": 2}, {"num_kv_heads": 1}, {"tie_embeddings": True}, {"qk_norm": True},
         {"num_kv_heads": 2, "tie_embeddings": True, "qk_norm": True}]
VARIANTS = [{}, {"norm": "post"}, {"norm": "none"}, {"use_rope": False}, {"ffn": "silu"}, *TODAY]


def random_ids(config: ModelConfig, batch: int = 3, length: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, config.vocab_size, (batch, length or config.context_length), generator=generator)


def shaken(config: ModelConfig, seed: int = 0) -> TransformerLM:
    "A model whose gains are not all one, as after training."
    model = TransformerLM(config, seed=seed)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return model.eval()


def theirs(name: str, tensor: torch.Tensor, config: ModelConfig) -> tuple[str, torch.Tensor]:
    "Name a tensor as transformers does, and order its rows for pairs (i, i + K/2) instead of (2i, 2i + 1)."
    if any(part in name for part in ("q_proj", "k_proj", "q_norm", "k_norm")):  # head by head
        heads = tensor.unflatten(0, (-1, config.d_model // config.num_heads // 2, 2))
        tensor = heads.transpose(1, 2).reshape(tensor.shape)
    for ours, other in {
        "token_embeddings": "model.embed_tokens", "layers.": "model.layers.", "ln_final": "model.norm",
        "attn.output_proj": "self_attn.o_proj", "attn.": "self_attn.",
        "ln1": "input_layernorm", "ln2": "post_attention_layernorm",
        "ffn.w1": "mlp.gate_proj", "ffn.w2": "mlp.down_proj", "ffn.w3": "mlp.up_proj",
    }.items():  # fmt: skip
        name = name.replace(ours, other) if other not in name else name
    return name, tensor.clone()


def as_hf(model: TransformerLM):
    "Put the weights into transformers' own Llama, or its Qwen3 where queries and keys are normalized."
    transformers = pytest.importorskip("transformers")
    c, family = model.config, "Qwen3" if model.config.qk_norm else "Llama"
    config = getattr(transformers, f"{family}Config")(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, head_dim=c.d_model // c.num_heads,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, rms_norm_eps=1e-5,
        num_key_value_heads=c.num_kv_heads or c.num_heads, tie_word_embeddings=c.tie_embeddings,
        max_position_embeddings=c.context_length,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
    )
    hf = getattr(transformers, f"{family}ForCausalLM")(config)
    state = dict(theirs(*item, c) for item in model.state_dict().items())
    missing, unexpected = hf.load_state_dict(state, strict=False)
    assert not unexpected and missing == ["lm_head.weight"] * c.tie_embeddings
    return hf.eval()


@pytest.mark.parametrize("config", SHAPES, ids=NAMES)
def test_logits_and_gradients_equal_transformers_in_64_bits(config):
    model, ids = shaken(config), random_ids(config)
    hf = as_hf(model).double()
    ours, expected = model.double()(ids), hf(ids).logits
    assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    # transformers computes its angles and its norms in 32 bits, whatever the model's type. Give it our tables and
    # PyTorch's norm: all else must agree to the last digits.
    rope = model.layers[0].attn.rope
    tables = [torch.cat([table, table], -1)[None].double() for table in (rope.cos, rope.sin)]
    hf.model.rotary_emb.forward = lambda *args, **kwargs: tables
    for norm in (module for module in hf.modules() if type(module).__name__.endswith("RMSNorm")):
        norm.forward = lambda x, norm=norm: F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    expected = hf(ids).logits
    assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    ours.square().mean().backward()
    expected.square().mean().backward()
    gradients = {name: p.grad for name, p in hf.named_parameters()}
    assert len(gradients) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        name, gradient = theirs(name, p.grad, config)
        assert_close(gradient, gradients[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("change", TODAY, ids=str)
@torch.no_grad()
def test_generation_with_caches_tells_what_the_whole_model_would(monkeypatch, change):
    model, ids = shaken(replace(SMALL, **change), seed=3), random_ids(SMALL, length=4).tolist()
    for is_fast in (True, False):
        monkeypatch.setattr(core, "FAST", is_fast)
        told = generate(model, ids, 18, temperature=0)
        assert all(len(cache.keys[0]) == (change.get("num_kv_heads") or 4) for cache in filled_caches(model, ids))
        for prompt, new in zip(ids, told, strict=True):
            text = torch.tensor(prompt + new)
            assert_close(model(text[None])[0, 3:-1].argmax(-1), text[4:])


def filled_caches(model, ids):
    caches = [KVCache(24) for _ in model.layers]
    model(torch.tensor(ids), torch.arange(len(ids[0])), caches)
    return caches


@pytest.mark.parametrize("change", TODAY, ids=str)
def test_table_of_parameters_counts_the_real_ones(change):
    config = replace(SMALL, **change)
    assert num_parameters(config) == sum(p.numel() for p in TransformerLM(config).parameters())


def test_a_tied_head_is_no_parameter_of_its_own(tmp_path):
    tied = TransformerLM(replace(SMALL, tie_embeddings=True), seed=2)
    assert "lm_head.weight" not in tied.state_dict()
    assert tied.lm_head.weight is tied.token_embeddings.weight
    optimizer = AdamW(tied.parameters(), lr=1e-3)
    save_checkpoint(tied, optimizer, 5, tmp_path / "step")  # safetensors refuses tensors that share memory
    other = TransformerLM(replace(SMALL, tie_embeddings=True), seed=3)
    assert load_checkpoint(tmp_path / "step", other, AdamW(other.parameters(), lr=1e-3)) == 5
    assert other.lm_head.weight is other.token_embeddings.weight and other.lm_head.weight.equal(tied.lm_head.weight)
    copy = deepcopy(tied).double()
    assert copy.lm_head.weight is copy.token_embeddings.weight and copy.lm_head.weight.dtype == torch.float64


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_every_variant_is_the_same_as_taught(monkeypatch, change):
    model, ids, outcomes = shaken(replace(SMALL, **change)).double(), random_ids(SMALL), []
    for is_fast in (True, False):
        monkeypatch.setattr(core, "FAST", is_fast)
        model.zero_grad()
        logits = model(ids)
        logits.square().mean().backward()
        outcomes.append([logits, *(p.grad.clone() for p in model.parameters())])
    assert_close(*outcomes, rtol=1e-9, atol=1e-11)


def test_start_depends_on_seed_and_name_alone():
    torch.manual_seed(1)
    state = TransformerLM(SMALL, seed=7).state_dict()
    before = torch.random.get_rng_state()
    again = TransformerLM(SMALL, seed=7).state_dict()
    assert torch.random.get_rng_state().equal(before), "building a model must leave the global generator alone"
    assert all(tensor.equal(again[name]) for name, tensor in state.items())
    assert not state["layers.0.attn.q_proj.weight"].equal(state["layers.0.attn.k_proj.weight"])
    assert not state["layers.0.attn.q_proj.weight"].equal(state["layers.1.attn.q_proj.weight"])


@pytest.mark.parametrize("change", [
    {"num_heads": 5}, {"num_heads": 32}, {"d_ff": 0}, {"num_layers": -1}, {"norm": "layer"}, {"ffn": "relu"},
    {"rope_theta": 0.0}, {"rope_theta": float("nan")},
    {"num_kv_heads": 0}, {"num_kv_heads": 3}, {"num_kv_heads": 8}, {"num_kv_heads": -2},
], ids=str)  # fmt: skip
def test_impossible_shapes_are_refused_in_one_line(change):
    with pytest.raises(InputError) as caught:
        replace(SMALL, **change)
    assert next(iter(change)) in str(caught.value) and "\n" not in str(caught.value)


def test_too_long_a_text_is_refused_and_nope_takes_it():
    ids = random_ids(SMALL, length=25)
    with pytest.raises(ValueError, match="25 tokens"):
        TransformerLM(SMALL)(ids)
    assert TransformerLM(replace(SMALL, use_rope=False))(ids).shape == (3, 25, 61)
    longer = TransformerLM(replace(SMALL, context_length=48))
    longer.load_state_dict(TransformerLM(SMALL, seed=3).state_dict())  # the tables are no part of a checkpoint
    assert_close(longer(ids[:, :24]), TransformerLM(SMALL, seed=3)(ids[:, :24]))


@pytest.mark.parametrize("shape, positions", [((3, 9, 8), (9,)), ((3, 9, 8), (3, 9)), ((3, 2, 9, 8), (9,)),
                                              ((3, 2, 9, 8), (3, 9)), ((3, 2, 9, 8), (3, 2, 9)), ((9, 8), (9,))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rope_lines_positions_up_with_the_leading_axes(shape, positions, dtype):
    rope, x = RotaryPositionalEmbedding(10_000.0, 8, 32), torch.randn(shape).to(dtype)
    at = torch.randint(0, 32, positions)
    rotated = rope(x, at)
    assert rotated.dtype == dtype and rotated.shape == x.shape
    heads = at[:, None] if len(positions) == 2 and len(shape) == 4 else at
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape[:-1])).reshape(-1, len(shape) - 1).tolist():
        m = heads.expand(shape[:-1])[tuple(index)]
        assert_close(rotated[tuple(index)], apply_rope(x[tuple(index)], rope.cos[m], rope.sin[m]), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("view", [lambda t: t[..., ::2], lambda t: t[..., 1:9], lambda t: t.transpose(0, 1)[..., :8]])
def test_rope_takes_any_memory_layout(view):
    rope, x = RotaryPositionalEmbedding(10_000.0, 8, 32), view(torch.randn(5, 5, 16))
    x.requires_grad_()
    expected = apply_rope(x, rope.cos[: x.shape[-2]], rope.sin[: x.shape[-2]])
    assert_close(rope(x), expected)
    ours, theirs = (torch.autograd.grad(y.square().mul(torch.arange(8)).sum(), x)[0] for y in (rope(x), expected))
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["debug", "laptop"])
def test_chapter_shows_the_presets_of_training(name):  # it comes before them, so it writes their sizes down
    cells = json.loads((ROOT / "nbs" / "03_model.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} = ModelConfig(")]
    preset = PRESETS[name]
    shown = eval(line.partition(" = ")[2], {"ModelConfig": ModelConfig})
    assert shown == ModelConfig(**{field.name: getattr(preset, field.name) for field in fields(ModelConfig)})
    assert f'("{name}", {name}, {preset.batch_size})' in text
