"""Export beyond test_golden.py: ids without tokens, beginnings, checkpoints of others, refusals, nothing half-made."""
import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tinylm import export
from tinylm.core import END_OF_TEXT, InputError
from tinylm.data import fables
from tinylm.generate import start_ids
from tinylm.model import ModelConfig, TransformerLM
from tinylm.tokenizer import Tokenizer, train_bpe
from tinylm.train import PRESETS, load_run, save_checkpoint

SIZES = dict(vocab_size=400, context_length=48, d_model=48, num_layers=3, num_heads=4, d_ff=80)
IDS = torch.randint(380, (2, 48), generator=torch.Generator().manual_seed(0))
TEXTS = ["", "Once upon a time", "  two  spaces, naïve 🦊\n\n it's 12345", "<|endoftext|>\nThe fox<|endoftext|>",
         "\x00\xa0 a\r\n", *fables(20, seed=3)]


def make_run(folder: Path, tokenizer: Tokenizer, **fields) -> Path:
    "A run of random weights, its norms' gains included, as `train` would leave it."
    config = replace(PRESETS["debug"], **{**SIZES, **fields})
    model = TransformerLM(config, seed=4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ln" in name or "_norm" in name:
                weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    folder.mkdir(parents=True)
    tokenizer.save(folder / "tokenizer")
    save_checkpoint(model, torch.optim.SGD(model.parameters()), 1, folder / "checkpoints/step-00000001")
    described = vars(config) | {"data": {"fingerprint": tokenizer.fingerprint}}
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    text = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    text.write_text("".join(f"{story}\n{END_OF_TEXT}\n" for story in fables(200, seed=0)), encoding="utf-8")
    return Tokenizer(*train_bpe(text, 380, [END_OF_TEXT]), [END_OF_TEXT])  # smaller than the model's vocabulary


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", tokenizer)


@pytest.fixture(scope="module")
def model(run):
    return load_run(run)[0]


@torch.inference_mode()
def assert_same_logits(theirs, ours, ids=IDS) -> None:
    torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-5, rtol=1e-5)


def contents(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def assert_begins_as_ours(theirs, tokenizer: Tokenizer) -> None:
    "The same ids but for the beginning: one `<|endoftext|>` before each text, so that a prompt is that of start_ids."
    end = tokenizer.special_tokens[END_OF_TEXT]
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        assert theirs(text)["input_ids"] == [end, *tokenizer.encode(text)]
    assert theirs("\nOnce upon")["input_ids"] == start_ids(tokenizer, "Once upon")


def test_hugging_face_begins_and_ends_as_we_do(run, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = export.to_hf(run, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.dtype == torch.float32 and theirs.config.tie_word_embeddings is False
    assert_begins_as_ours(their_tokenizer, tokenizer)
    alone = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert_begins_as_ours(alone, tokenizer)
    for text in TEXTS:
        assert their_tokenizer.decode(tokenizer.encode(text)) == text
    end = tokenizer.special_tokens[END_OF_TEXT]
    assert their_tokenizer.eos_token_id == their_tokenizer.bos_token_id == end
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == theirs.config.bos_token_id == end
    assert Tokenizer.load(folder).fingerprint == tokenizer.fingerprint
    assert export.from_hf(folder).config == ModelConfig(**SIZES)


TODAY = [{"num_kv_heads": 2, "rope_theta": 500.0}, {"num_kv_heads": 1, "tie_embeddings": True},
         {"qk_norm": True, "num_kv_heads": 2, "tie_embeddings": True}]


@pytest.mark.parametrize("fields", TODAY, ids=str)
def test_what_todays_models_have_is_said_to_hugging_face(tokenizer, tmp_path, fields):
    transformers = pytest.importorskip("transformers")
    run = make_run(tmp_path / "run", tokenizer, **fields)
    folder, model = export.to_hf(run, tmp_path / "hf"), load_run(run)[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if "qk_norm" in fields else "LlamaForCausalLM")
    assert_same_logits(theirs, model)
    back = export.from_hf(folder)
    assert back.config == ModelConfig(**SIZES, **fields)
    assert all(torch.equal(w, back.state_dict()[name]) for name, w in model.state_dict().items())


def test_what_todays_models_have_is_said_to_gguf_and_llama2c(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    run = make_run(tmp_path / "run", tokenizer, num_kv_heads=1, tie_embeddings=True)
    model, file = load_run(run)[0], str(export.to_gguf(run, tmp_path / "model.gguf"))
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    theirs = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf"))
    read = load_gguf_checkpoint(file, return_tensors=True, model_to_load=theirs)
    assert theirs.load_state_dict(read["tensors"], strict=False).missing_keys == ["lm_head.weight"]
    assert theirs.config.tie_word_embeddings and theirs.config.num_key_value_heads == 1
    assert_same_logits(theirs, model)
    raw = export.to_llama2c(run, tmp_path / "model.bin").read_bytes()
    assert struct.unpack("<7i", raw[:28]) == (48, 80, 3, 4, 1, 400, 48)
    tables = 2 * 48 * 6  # of cosines and sines, which newer readers skip
    assert len(raw) == 28 + 4 * (tables + sum(p.numel() for p in model.parameters()))


# --- the way in


def llama_folder(folder: Path, family: str = "Llama", **settings) -> Path:
    "A folder that transformers wrote, in bfloat16 and in several files."
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=120, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40, rms_norm_eps=1e-3,
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}} | settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.bfloat16().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("llama") / "hf")


def assert_read(folder: Path, theta: float = 777) -> None:
    transformers = pytest.importorskip("transformers")
    ours, ids = export.from_hf(folder), torch.randint(120, (3, 40), generator=torch.Generator().manual_seed(2))
    assert_same_logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ours, ids)
    assert ours.config.rope_theta == theta and ours.config.context_length == 40


def changed(llama: Path, folder: Path, **fields) -> Path:
    "A copy of the folder with other fields in its config; None takes a field out."
    shutil.copytree(llama, folder)
    described = json.loads((folder / "config.json").read_text(encoding="utf-8")) | fields
    described = {name: value for name, value in described.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


@pytest.mark.parametrize("theta, fields", [
    (5e5, {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}),  # fault: read as 10,000
    (300, {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "rope_theta": 5e5}),
    (5e5, {"rope_parameters": None, "rope_theta": 5e5}), (10_000, {"rope_parameters": None}),
    (5e5, {"rope_scaling": {"type": "default"}, "rope_theta": 5e5}),
], ids=str)
def test_the_base_is_read_as_transformers_reads_it(llama, tmp_path, theta, fields):
    assert_read(changed(llama, tmp_path / "hf", **fields), theta)


def test_the_weights_are_the_file_else_those_of_the_index_and_nothing_else(llama, run, model, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "several")
    shutil.copy(next(folder.glob("*.safetensors")), folder / "model_backup.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "zzz.safetensors")
    assert_read(folder)
    folder = export.to_hf(run, tmp_path / "hf")
    zeros = {name: torch.zeros_like(weight) for name, weight in load_file(folder / "model.safetensors").items()}
    for name in ("model_backup.safetensors", "model-00001-of-00001.safetensors"):
        save_file(zeros, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(zeros, name)}))
    assert torch.equal(export.from_hf(folder).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("settings", [
    {"tie_word_embeddings": True}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1, "tie_word_embeddings": True},
    {"family": "Qwen3", "head_dim": 8, "num_key_value_heads": 2},
], ids=str)
def test_what_todays_models_have_is_read(tmp_path, settings):
    folder = llama_folder(tmp_path / "hf", **settings)
    tied = settings.get("tie_word_embeddings", False)
    assert tied != any("lm_head.weight" in load_file(file) for file in folder.glob("*.safetensors"))
    assert_read(folder)
    config = export.from_hf(folder).config
    assert (config.tie_embeddings, config.qk_norm) == (tied, "family" in settings)
    assert config.num_kv_heads == settings.get("num_key_value_heads")


def test_what_is_stored_besides_is_passed_over(tmp_path):
    "A tied head, and the frequencies that old files hold."
    folder = llama_folder(tmp_path / "hf", tie_word_embeddings=True)
    before, index = export.from_hf(folder).state_dict(), folder / "model.safetensors.index.json"
    idle = {"lm_head.weight": torch.zeros(120, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(idle, folder / "idle.safetensors")
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"] | dict.fromkeys(idle, "idle.safetensors")
    index.write_text(json.dumps({"weight_map": names}), encoding="utf-8")
    after = export.from_hf(folder).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(w, after[name]) for name, w in before.items())


REFUSED = [
    ({"model_type": "mistral"}, "model_type"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"), ({"head_dim": 16}, "head_dim"),
    ({"num_key_value_heads": 2}, r"k_proj.weight has shape \[32, 32\]; expected \[16, 32\]"),
    ({"num_key_value_heads": 3}, "num_kv_heads is 3"), ({"use_sliding_window": True}, "use_sliding_window"),
    ({"hidden_size": None}, "damaged .*hidden_size"), ({"num_hidden_layers": "two"}, "config.json: damaged"),
    ({"rope_parameters": [1]}, "config.json: damaged"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "type is .linear."),
    ({"vocab_size": 121}, r"lm_head.weight has shape \[120, 32\]; expected \[121, 32\]"),
    ({"num_hidden_layers": 3}, r"layers.2.\S+ has shape None"),
    ({"num_hidden_layers": 1}, r"layers.1.\S+ has.*expected None"),
]


@pytest.mark.parametrize("change, word", REFUSED, ids=str)
def test_what_we_cannot_compute_is_refused(llama, tmp_path, change, word):
    with pytest.raises(InputError, match=word) as caught:
        export.from_hf(changed(llama, tmp_path / "hf", **change))
    assert "\n" not in str(caught.value)


DAMAGED = {"missing": None, "cut off": lambda raw: raw[: len(raw) // 2], "a list": lambda raw: b"[1, 2]"}


@pytest.mark.parametrize("how", DAMAGED)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "*.safetensors"])
def test_a_damaged_file_is_named_in_one_line(llama, tmp_path, name, how):
    folder = shutil.copytree(llama, tmp_path / "hf")
    file = sorted(folder.glob(name))[0]
    damaged = DAMAGED[how] and DAMAGED[how](file.read_bytes())
    file.unlink()
    if damaged is not None:
        file.write_bytes(damaged)
    with pytest.raises(InputError, match=file.name) as caught:
        export.from_hf(folder)
    assert "\n" not in str(caught.value)


# --- tiktoken


def test_tiktoken_gives_the_same_ids_of_scrambled_words_and_reads_its_file(tokenizer, tmp_path, monkeypatch):
    load = pytest.importorskip("tiktoken.load")
    encoding = export.to_tiktoken(tokenizer, tmp_path / "v.tiktoken")
    draw = np.random.default_rng(0)
    words = [token.decode("utf-8", "replace") for token in tokenizer.vocab.values()]
    for text in ["".join(draw.choice(words, 50)) for _ in range(200)]:
        assert encoding.encode(text, allowed_special="all") == tokenizer.encode(text)
    assert encoding.n_vocab == tokenizer.vocab_size
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    ranks = load.load_tiktoken_bpe(str(tmp_path / "v.tiktoken"))
    assert ranks == {token: i for i, token in tokenizer.vocab.items() if i not in tokenizer.special_tokens.values()}


def test_tiktoken_refuses_ids_in_another_order():
    vocab = {i: bytes([i]) for i in range(256)} | {257: b"ab", 256: b"abc"}
    with pytest.raises(InputError, match="order"):
        export.to_tiktoken(Tokenizer(vocab, [(b"a", b"b"), (b"ab", b"c")]))


# --- llama2.c (test_golden.py computes the logits from the file, with the arithmetic of run.c)


def test_llama2c_vocabulary_merges_as_we_do(run, tokenizer, tmp_path):
    export.to_llama2c(run, tmp_path / "model.bin")
    raw, at, entries = (tmp_path / "tokenizer.bin").read_bytes(), 4, []
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at)
        entries.append((score, raw[at + 8 : at + 8 + length]))
        at += 8 + length
    assert [token for _, token in entries[:380]] == [tokenizer.vocab[i] for i in range(380)]
    assert len(entries) == 400 and all(token and score == -1e10 for score, token in entries[380:])  # run.c wants bytes
    assert struct.unpack_from("<i", raw)[0] == max(len(token) for _, token in entries)
    ids = {token: i for i, (_, token) in reversed(list(enumerate(entries)))}

    def encode(pretoken: bytes) -> list[int]:  # as run.c: join the two neighbors whose joined bytes score highest
        tokens = [bytes([b]) for b in pretoken]
        while True:
            joined = [a + b for a, b in zip(tokens, tokens[1:], strict=False)]
            pairs = [(entries[ids[ab]][0], -i) for i, ab in enumerate(joined) if ab in ids]
            if not pairs or max(pairs)[0] <= -1e10:
                return [ids[token] for token in tokens]
            i = -max(pairs)[1]
            tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]

    for word in (" grandmother", "Once", " upon", " hedgehog", "\n\n", " naïve"):
        assert encode(word.encode()) == tokenizer.encode(word)
    assert entries[tokenizer.special_tokens[END_OF_TEXT]] == (-1e10, END_OF_TEXT.encode())  # never made by merging


# --- GGUF


def test_gguf_says_what_llama_cpp_expects_and_begins_as_we_do(run, tokenizer, tmp_path):
    gguf, transformers = pytest.importorskip("gguf"), pytest.importorskip("transformers")
    reader = gguf.GGUFReader(export.to_gguf(run, tmp_path / "model.gguf"))
    end, kind = tokenizer.special_tokens[END_OF_TEXT], gguf.TokenType
    expected = {
        "general.architecture": "llama", "llama.rope.freq_base": 1e4,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5), "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.bos_token_id": end, "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.add_bos_token": True}
    assert {key: reader.get_field(key).contents() for key in expected} == expected
    kinds, tokens = (reader.get_field(f"tokenizer.ggml.{name}").contents() for name in ("token_type", "tokens"))
    assert (kinds[0], kinds[end], kinds[399]) == (kind.NORMAL, kind.CONTROL, kind.UNUSED)
    assert len(kinds) == len(tokens) == len(set(tokens)) == 400
    assert_begins_as_ours(transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf"), tokenizer)


# --- ONNX


def test_onnx_takes_a_model_that_is_no_llama(tokenizer, tmp_path):
    onnxruntime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    run = make_run(tmp_path / "run", tokenizer, norm="post", ffn="silu", num_layers=1, **TODAY[2])
    session = onnxruntime.InferenceSession(export.to_onnx(run, tmp_path / "model.onnx"))
    model, rows = load_run(run)[0], torch.arange(96).view(2, 48)
    for ids in (rows, rows[:1, :1], rows.view(4, 24)):
        with torch.inference_mode():
            expected = model(ids).numpy()
        np.testing.assert_allclose(session.run(None, {"token_ids": ids.numpy()})[0], expected, atol=1e-5, rtol=1e-5)


# --- what cannot be said, and what fails

WRITERS = {"hf": export.to_hf, "llama2c": export.to_llama2c, "gguf": export.to_gguf, "onnx": export.to_onnx,
           "tiktoken": lambda run, out: export.to_tiktoken(load_run(run)[1], out)}


LLAMAS = "hf llama2c gguf"


@pytest.mark.parametrize("fields, words, formats", [
    ({"norm": "post"}, "norm is 'post'", LLAMAS), ({"norm": "none"}, "norm is 'none'", LLAMAS),
    ({"use_rope": False}, "use_rope is False", LLAMAS), ({"ffn": "silu"}, "ffn is 'silu'", LLAMAS),
    ({"qk_norm": True}, "qk_norm is True", "llama2c gguf"), ({"rope_theta": 500.0}, "rope_theta is 500", "llama2c"),
], ids=str)
def test_a_variant_that_a_format_cannot_express_is_refused_with_the_reason(tokenizer, tmp_path, fields, words, formats):
    run = make_run(tmp_path / "run", tokenizer, **fields)
    before = contents(tmp_path)
    for name in formats.split():
        with pytest.raises(InputError, match=words):
            WRITERS[name](run, tmp_path / "out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", WRITERS)
def test_what_exists_is_never_overwritten(run, tmp_path, name):
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="is there already"):
        WRITERS[name](run, tmp_path / "out")
    (tmp_path / "tokenizer.bin").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="tokenizer.bin is there already"):
        export.to_llama2c(run, tmp_path / "new.bin")
    assert [path.read_text(encoding="utf-8") for path in contents(tmp_path)] == ["mine"] * 2


@pytest.mark.parametrize("name", ["hf", "llama2c", "gguf"])
def test_nothing_is_left_of_an_export_that_fails(run, tmp_path, monkeypatch, name):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)  # the last step, when all is written
    with pytest.raises(InputError, match="No space left"):
        WRITERS[name](run, tmp_path / "new/out")
    assert contents(tmp_path) == {tmp_path / "new"}
