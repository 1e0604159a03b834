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
from tinylm.export import _reordered, _translate
from tinylm.layers import RMSNorm
from tinylm.model import ModelConfig, TransformerLM
from tinylm.optim import AdamW
from tinylm.rope import RotaryPositionalEmbedding, apply_rope
from tinylm.train import PRESETS

SMALL = ModelConfig(vocab_size=61, context_length=24, d_model=32, num_layers=3, num_heads=4, d_ff=72)
IDS = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(5))
TODAY = [{"num_kv_heads": 2}, {"num_kv_heads": 1, "tie_embeddings": True}, {"qk_norm": True},
         {"num_kv_heads": 2, "tie_embeddings": True, "qk_norm": True}]
SHAPES = [{}, {"num_heads": 1, "rope_theta": 500.0}, {"num_heads": 16, "d_ff": 40, "num_layers": 1},
          {"d_model": 96, "num_heads": 6, "context_length": 64}, *TODAY]  # 16 heads: a single pair each
VARIANTS = [{}, {"norm": "post"}, {"norm": "none"}, {"use_rope": False}, {"ffn": "silu"}, *TODAY]


def shaken(**change) -> TransformerLM:
    "A model in 64 bits whose gains are not all one, as after training."
    model = TransformerLM(replace(SMALL, **change))
    for module in model.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return model.double()


def theirs(tensors: dict, config: ModelConfig) -> dict:
    "Tensors by the names and in the order of transformers, as to_hf writes them; test_golden.py spells both out."
    return {_translate(name): tensor for name, tensor in _reordered(tensors, config).items()}


def as_hf(model: TransformerLM):
    "Put the weights into transformers' own Llama, or its Qwen3 where queries and keys are normalized."
    transformers = pytest.importorskip("transformers")
    c, family = model.config, "Qwen3" if model.config.qk_norm else "Llama"
    config = getattr(transformers, f"{family}Config")(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, head_dim=c.d_model // c.num_heads,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, rms_norm_eps=1e-5,
        num_key_value_heads=c.num_kv_heads or c.num_heads, tie_word_embeddings=c.tie_embeddings,
        max_position_embeddings=c.context_length,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta})
    hf = getattr(transformers, f"{family}ForCausalLM")(config)
    missing, unexpected = hf.load_state_dict(theirs(model.state_dict(), c), strict=False)
    assert not unexpected and missing == ["lm_head.weight"] * c.tie_embeddings
    return hf.double()


@pytest.mark.parametrize("change", SHAPES, ids=str)
def test_logits_and_gradients_equal_transformers_in_64_bits(change):
    model = shaken(**change)
    hf = as_hf(model)
    ours = model(IDS)
    assert_close(ours, hf(IDS).logits, rtol=1e-5, atol=1e-5)
    # transformers computes its angles and its norms in 32 bits, whatever the model's type. Give it our tables and
    # PyTorch's norm: all else must agree to the last digits.
    rope = model.layers[0].attn.rope
    tables = [torch.cat([table, table], -1)[None, :24] for table in (rope.cos, rope.sin)]
    hf.model.rotary_emb.forward = lambda *args, **kwargs: tables
    for norm in (module for module in hf.modules() if type(module).__name__.endswith("RMSNorm")):
        norm.forward = lambda x, norm=norm: F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    expected = hf(IDS).logits
    assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    ours.square().mean().backward()
    expected.square().mean().backward()
    gradients = theirs({name: p.grad for name, p in model.named_parameters()}, model.config)
    assert_close(gradients, {name: p.grad for name, p in hf.named_parameters()}, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_every_variant_is_the_same_as_taught(monkeypatch, change):
    model, outcomes = shaken(**change), []
    for is_fast in (True, False):
        monkeypatch.setattr(core, "FAST", is_fast)
        logits = model(IDS)
        outcomes.append([logits, *torch.autograd.grad(logits.square().mean(), model.parameters())])
    assert_close(*outcomes, rtol=1e-9, atol=1e-11)


def test_a_tied_head_is_no_parameter_of_its_own(tmp_path):
    tied, other = (TransformerLM(replace(SMALL, tie_embeddings=True), seed) for seed in (2, 3))
    assert "lm_head.weight" not in tied.state_dict()
    save_checkpoint(tied, AdamW(tied.parameters(), lr=1e-3), 5, tmp_path / "step")  # safetensors refuses shared memory
    assert load_checkpoint(tmp_path / "step", other, AdamW(other.parameters(), lr=1e-3)) == 5
    assert other.lm_head.weight is other.token_embeddings.weight and other.lm_head.weight.equal(tied.lm_head.weight)
    copy = deepcopy(tied).double()
    assert copy.lm_head.weight is copy.token_embeddings.weight and copy.lm_head.weight.dtype == torch.float64


def test_start_depends_on_seed_and_name_alone():
    before = torch.random.get_rng_state()
    state, again = (TransformerLM(SMALL, seed=7).state_dict() for _ in range(2))
    assert torch.random.get_rng_state().equal(before), "building a model must leave the global generator alone"
    assert all(tensor.equal(again[name]) for name, tensor in state.items())
    for other in ("layers.0.attn.k_proj.weight", "layers.1.attn.q_proj.weight"):
        assert not state["layers.0.attn.q_proj.weight"].equal(state[other])


@pytest.mark.parametrize("change", [
    {"num_heads": 5}, {"num_heads": 32}, {"d_ff": 0}, {"num_layers": -1}, {"norm": "layer"}, {"ffn": "relu"},
    {"rope_theta": 0.0}, {"rope_theta": float("nan")}, {"num_kv_heads": 0}, {"num_kv_heads": 3}, {"num_kv_heads": 8},
], ids=str)  # fmt: skip
def test_impossible_shapes_are_refused_in_one_line(change):
    with pytest.raises(InputError) as caught:
        replace(SMALL, **change)
    assert next(iter(change)) in str(caught.value) and "\n" not in str(caught.value)


def test_too_long_a_text_is_refused_and_nope_takes_it():
    longer_ids = torch.cat([IDS, IDS[:, :1]], 1)
    with pytest.raises(ValueError, match="25 tokens"):
        TransformerLM(SMALL)(longer_ids)
    assert TransformerLM(replace(SMALL, use_rope=False))(longer_ids).shape == (3, 25, 61)
    longer = TransformerLM(replace(SMALL, context_length=48))
    longer.load_state_dict(TransformerLM(SMALL, seed=3).state_dict())  # the tables are no part of a checkpoint
    assert_close(longer(IDS), TransformerLM(SMALL, seed=3)(IDS))


@pytest.mark.parametrize("shape, positions", [((3, 9, 8), (9,)), ((3, 9, 8), (3, 9)), ((3, 2, 9, 8), (9,)),
                                              ((3, 2, 9, 8), (3, 9)), ((3, 2, 9, 8), (3, 2, 9)), ((9, 8), (9,))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rope_lines_positions_up_with_the_leading_axes(shape, positions, dtype):
    rope, x = RotaryPositionalEmbedding(10_000.0, 8, 32), torch.randn(shape).to(dtype)
    at = torch.randint(0, 32, positions)
    rows = (at[:, None] if len(positions) == 2 and len(shape) == 4 else at).expand(shape[:-1])
    assert_close(rope(x, at), apply_rope(x, rope.cos[rows], rope.sin[rows]), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("view", [lambda t: t[..., ::2], lambda t: t[..., 1:9], lambda t: t.transpose(0, 1)[..., :8]])
def test_rope_takes_any_memory_layout(view):
    rope, x = RotaryPositionalEmbedding(10_000.0, 8, 32), view(torch.randn(5, 5, 16)).requires_grad_()
    values = rope(x), apply_rope(x, rope.cos[: x.shape[-2]], rope.sin[: x.shape[-2]])
    assert_close(*([y, *torch.autograd.grad(y.square().mul(torch.arange(8)).sum(), x)] for y in values))


@pytest.mark.parametrize("name", ["debug", "laptop"])
def test_chapter_shows_the_presets_of_training(name):  # it comes before them, so it writes their sizes down
    cells = json.loads((ROOT / "nbs" / "03_model.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} = ModelConfig(")]
    preset, shown = PRESETS[name], eval(line.partition(" = ")[2], {"ModelConfig": ModelConfig})
    assert shown == ModelConfig(**{field.name: getattr(preset, field.name) for field in fields(ModelConfig)})
    assert f'("{name}", {name}, {preset.batch_size})' in text
