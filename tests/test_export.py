"""Export: each format read by its real reader, what cannot be said refused, nothing half-written."""
import ast
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHAPTERS, ROOT
from safetensors.torch import load_file, save_file

from tinylm import cli, export
from tinylm.data import END_OF_TEXT, InputError, fables
from tinylm.generate import generate, start_ids
from tinylm.model import ModelConfig, TransformerLM
from tinylm.tokenizer import Tokenizer, train_bpe
from tinylm.train import PRESETS, load_run, save_checkpoint

SIZES = dict(vocab_size=400, context_length=48, d_model=48, num_layers=3, num_heads=4, d_ff=80)
TEXTS = ["", "Once upon a time", "  two  spaces, naïve 🦊\n\n it's 12345", "<|endoftext|>\nThe fox<|endoftext|>",
         "\x00\xa0 a\r\n", *fables(20, seed=3)]


def make_run(folder: Path, tokenizer: Tokenizer, **fields) -> Path:
    "A run of random weights, its norms' gains included, as `train` would leave it."
    config = replace(PRESETS["debug"], **{**SIZES, **fields})
    model = TransformerLM(config, seed=4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ln" in name:
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


@pytest.fixture(scope="module")
def ids():
    return torch.randint(380, (2, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def logits(model, ids):
    with torch.inference_mode():
        return model(ids)


def contents(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_hugging_face_gives_ids_logits_and_greedy_text(run, tokenizer, model, ids, logits, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = export.to_hf(run, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.dtype == torch.float32 and theirs.config.tie_word_embeddings is False
    for text in TEXTS:
        assert their_tokenizer(text)["input_ids"] == tokenizer.encode(text)
        assert their_tokenizer.decode(tokenizer.encode(text)) == text
    assert their_tokenizer.eos_token_id == theirs.config.eos_token_id == tokenizer.special_tokens[END_OF_TEXT]
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, logits, atol=1e-5, rtol=1e-5)
        prompt = start_ids(tokenizer, "Once")
        written = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert written[0].tolist()[len(prompt):] == generate(model, prompt, 30, temperature=0)


def test_hugging_face_takes_another_theta_and_a_tokenizer_without_special_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    plain = Tokenizer({i: bytes([i]) for i in range(256)}, [])
    run = make_run(tmp_path / "run", plain, vocab_size=256, rope_theta=500.0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export.to_hf(run, tmp_path / "hf"))
    ids = torch.arange(48)[None]
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, load_run(run)[0](ids), atol=1e-5, rtol=1e-5)
    assert theirs.config.eos_token_id is None


# --- the way in


def llama_folder(folder: Path, **settings) -> Path:
    "A folder that transformers wrote, in bfloat16 and in several files."
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=120, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40, rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 777.0},
        **settings)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("llama") / "hf")


def assert_same_logits(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(120, (3, 40), generator=torch.Generator().manual_seed(2))
    ours = export.from_hf(folder)
    assert ours.config.rope_theta == 777 and ours.config.context_length == 40
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_folder_of_others_gives_the_same_logits(llama):
    assert_same_logits(llama)


def test_a_head_tied_to_the_embedding_is_filled_with_it(tmp_path):
    folder = llama_folder(tmp_path / "hf", tie_word_embeddings=True)
    assert not any("lm_head.weight" in load_file(file) for file in folder.glob("*.safetensors"))
    assert_same_logits(folder)
    model = export.from_hf(folder)
    assert torch.equal(model.lm_head.weight, model.token_embeddings.weight)
    assert model.lm_head.weight.data_ptr() != model.token_embeddings.weight.data_ptr()
    for file in folder.glob("*.safetensors"):
        if "model.embed_tokens.weight" in load_file(file):
            file.unlink()
    with pytest.raises(InputError, match="model.embed_tokens.weight has shape None"):
        export.from_hf(folder)


def test_out_and_in_again_is_bit_equal(run, model, tmp_path):
    back = export.from_hf(export.to_hf(run, tmp_path / "hf"))
    assert back.config == ModelConfig(**SIZES)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, back.state_dict()[name]), name


REFUSED = [
    ({"model_type": "mistral"}, "model_type"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"), ({"head_dim": 16}, "head_dim"),
    ({"num_key_value_heads": 2}, "num_key_value_heads is 2.*only be built for 4: query heads share keys"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
    ({"hidden_size": None}, "not the description"), ({"vocab_size": 121}, "lm_head.weight has shape"),
    ({"num_hidden_layers": 3}, "model.layers.2"), ({"num_hidden_layers": 1}, "model.layers.1"),
]


@pytest.mark.parametrize("change, word", REFUSED, ids=str)
def test_what_we_cannot_compute_is_refused(llama, tmp_path, change, word):
    folder = shutil.copytree(llama, tmp_path / "hf")
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(described | change), encoding="utf-8")
    with pytest.raises(InputError, match=word):
        export.from_hf(folder)


def test_damaged_folders_are_refused(llama, tmp_path):
    with pytest.raises(InputError, match="config.json"):
        export.from_hf(tmp_path)
    for text in ("", "[]", "{}", "{"):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="config.json"):
            export.from_hf(tmp_path)
    shutil.copy(llama / "config.json", tmp_path)
    with pytest.raises(InputError, match="no .safetensors"):
        export.from_hf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345678 no tensors")
    with pytest.raises(InputError, match="not whole"):
        export.from_hf(tmp_path)


def test_a_checkpoint_with_stored_frequencies_loads(run, model, tmp_path):
    folder = export.to_hf(run, tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(weights, folder / "model.safetensors")
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del described["rope_parameters"], described["head_dim"]  # as version 4 wrote it
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    assert torch.equal(export.from_hf(folder).layers[2].attn.q_proj.weight, model.layers[2].attn.q_proj.weight)


# --- tiktoken


def test_tiktoken_gives_the_same_ids(tokenizer):
    pytest.importorskip("tiktoken")
    encoding = export.to_tiktoken(tokenizer)
    draw = np.random.default_rng(0)
    words = [token.decode("utf-8", "replace") for token in tokenizer.vocab.values()]
    for text in TEXTS + ["".join(draw.choice(words, 50)) for _ in range(200)]:
        assert encoding.encode(text, allowed_special="all") == tokenizer.encode(text)
        assert encoding.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert encoding.n_vocab == tokenizer.vocab_size


def test_the_tiktoken_file_is_read_by_tiktoken(run, tokenizer, tmp_path, monkeypatch):
    load = pytest.importorskip("tiktoken.load")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    ranks = load.load_tiktoken_bpe(str(export.to_tiktoken_file(run, tmp_path / "v.tiktoken")))
    assert ranks == {token: i for i, token in tokenizer.vocab.items() if i not in tokenizer.special_tokens.values()}


def test_tiktoken_refuses_ids_in_another_order():
    vocab = {i: bytes([i]) for i in range(256)} | {257: b"ab", 256: b"abc"}
    with pytest.raises(InputError, match="order"):
        export.to_tiktoken(Tokenizer(vocab, [(b"a", b"b"), (b"ab", b"c")]))


# --- llama2.c: a reader written from the published layout, which knows nothing of tinylm


class Llama2C:
    "What run.c does: map the file, then compute one token after the other, in float32."

    def __init__(self, path: Path):
        raw = path.read_bytes()
        sizes = struct.unpack_from("<7i", raw)
        self.dim, self.hidden, self.layers, self.heads, self.kv_heads, vocab, self.context = sizes
        self.shared, self.vocab = vocab > 0, abs(vocab)
        self.floats, self.at = np.frombuffer(raw, "<f4", offset=28), 0
        d, f, n, size = self.dim, self.hidden, self.layers, self.dim // self.heads
        self.embedding, self.att_norm = self.take(self.vocab, d), self.take(n, d)
        self.wq, self.wk, self.wv, self.wo = (self.take(n, d, d) for _ in range(4))
        self.ffn_norm, self.w1, self.w2 = self.take(n, d), self.take(n, f, d), self.take(n, d, f)
        self.w3, self.final_norm = self.take(n, f, d), self.take(d)
        self.cos, self.sin = (self.take(self.context, size // 2) for _ in range(2))
        self.head = self.embedding if self.shared else self.take(self.vocab, d)
        assert self.at == len(self.floats), "bytes are left over"
        self.keys, self.values = np.zeros((2, n, self.context, self.heads, size), np.float32)

    def take(self, *shape: int) -> np.ndarray:
        self.at += math.prod(shape)
        return self.floats[self.at - math.prod(shape):self.at].reshape(shape)

    def norm(self, x, weight):
        return weight * x / np.sqrt((x * x).mean(dtype=np.float32) + np.float32(1e-5))

    def turn(self, x, pos):
        size = self.dim // self.heads
        angle = pos * 10000.0 ** (-np.arange(0, size, 2) / size)
        z = x.reshape(self.heads, size // 2, 2).astype(np.float64) @ [1, 1j] * np.exp(1j * angle)
        return np.stack([z.real, z.imag], -1).reshape(self.heads, size).astype(np.float32)

    def forward(self, token: int, pos: int) -> np.ndarray:
        x = self.embedding[token].copy()
        for n in range(self.layers):
            y = self.norm(x, self.att_norm[n])
            q = self.turn(self.wq[n] @ y, pos)
            self.keys[n, pos] = self.turn(self.wk[n] @ y, pos)
            self.values[n, pos] = (self.wv[n] @ y).reshape(self.heads, -1)
            score = np.einsum("hk,thk->ht", q, self.keys[n, :pos + 1]) / np.sqrt(np.float32(q.shape[1]))
            weight = np.exp(score - score.max(1, keepdims=True))
            weight /= weight.sum(1, keepdims=True)
            x += self.wo[n] @ np.einsum("ht,thk->hk", weight, self.values[n, :pos + 1]).ravel()
            y = self.norm(x, self.ffn_norm[n])
            a = self.w1[n] @ y
            x += self.w2[n] @ (a / (1 + np.exp(-a)) * (self.w3[n] @ y))
        return self.head @ self.norm(x, self.final_norm)


def read_vocabulary(path: Path, vocab_size: int) -> tuple[int, list[tuple[float, bytes]]]:
    raw, at, entries = path.read_bytes(), 4, []
    for _ in range(vocab_size):
        score, length = struct.unpack_from("<fi", raw, at)
        entries.append((score, raw[at + 8:at + 8 + length]))
        at += 8 + length
    assert at == len(raw)
    return struct.unpack_from("<i", raw)[0], entries


@pytest.fixture(scope="module")
def llama2c(run, tmp_path_factory) -> Path:
    return export.to_llama2c(run, tmp_path_factory.mktemp("llama2c") / "model.bin")


def test_llama2c_weights_are_bit_exact_and_its_arithmetic_gives_our_logits(llama2c, model, ids, logits):
    read = Llama2C(llama2c)
    assert (read.dim, read.hidden, read.layers, read.heads, read.kv_heads) == (48, 80, 3, 4, 4)
    assert (read.vocab, read.context, read.shared) == (400, 48, False)
    for array, ours in [(read.embedding, "token_embeddings"), (read.final_norm, "ln_final"), (read.head, "lm_head")]:
        assert np.array_equal(array, getattr(model, ours).weight.detach())
    for n, layer in enumerate(model.layers):
        for array, module in [(read.att_norm, layer.ln1), (read.wq, layer.attn.q_proj), (read.wk, layer.attn.k_proj),
                              (read.wv, layer.attn.v_proj), (read.wo, layer.attn.output_proj),
                              (read.ffn_norm, layer.ln2), (read.w1, layer.ffn.w1), (read.w2, layer.ffn.w2),
                              (read.w3, layer.ffn.w3)]:
            assert np.array_equal(array[n], module.weight.detach())
    angles = np.arange(48)[:, None] * 10000.0 ** (-np.arange(0, 12, 2) / 12)
    np.testing.assert_allclose(read.cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(read.sin, np.sin(angles), atol=1e-6)
    found = np.stack([read.forward(int(i), pos) for pos, i in enumerate(ids[0])])
    np.testing.assert_allclose(found, logits[0], atol=1e-5, rtol=1e-5)


def test_llama2c_vocabulary_merges_as_we_do(llama2c, tokenizer):
    longest, entries = read_vocabulary(llama2c.with_name("tokenizer.bin"), 400)
    assert [token for _, token in entries[:380]] == [tokenizer.vocab[i] for i in range(380)]
    assert all(token and score == -1e10 for score, token in entries[380:])  # run.c cannot read a token without bytes
    assert longest == max(len(token) for _, token in entries)
    ids = {token: i for i, (_, token) in reversed(list(enumerate(entries)))}

    def encode(pretoken: bytes) -> list[int]:  # as run.c: join the two neighbors whose joined bytes score highest
        tokens = [bytes([b]) for b in pretoken]
        while True:
            joined = [a + b for a, b in zip(tokens, tokens[1:], strict=False)]
            pairs = [(entries[ids[ab]][0], -i) for i, ab in enumerate(joined) if ab in ids]
            if not pairs or max(pairs)[0] <= -1e10:
                return [ids[token] for token in tokens]
            i = -max(pairs)[1]
            tokens[i:i + 2] = [tokens[i] + tokens[i + 1]]

    for word in (" grandmother", "Once", " upon", " hedgehog", "\n\n", " naïve"):
        assert encode(word.encode()) == tokenizer.encode(word)
    assert entries[tokenizer.special_tokens[END_OF_TEXT]] == (-1e10, END_OF_TEXT.encode())  # never made by merging


def test_llama2c_refuses_another_base(tokenizer, tmp_path):
    run = make_run(tmp_path / "run", tokenizer, rope_theta=500.0)
    with pytest.raises(InputError, match="rope_theta is 500"):
        export.to_llama2c(run, tmp_path / "model.bin")
    assert contents(tmp_path) == contents(run) | {run}


# --- GGUF


@pytest.fixture(scope="module")
def gguf_file(run, tmp_path_factory) -> Path:
    pytest.importorskip("gguf")
    return export.to_gguf(run, tmp_path_factory.mktemp("gguf") / "model.gguf")


def test_gguf_says_what_llama_cpp_expects(gguf_file, model, tokenizer):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(gguf_file)

    def field(key):
        return reader.get_field(key).contents()

    sizes = {"context_length": 48, "embedding_length": 48, "block_count": 3, "feed_forward_length": 80,
             "vocab_size": 400, "attention.head_count": 4, "attention.head_count_kv": 4,
             "rope.dimension_count": 12, "rope.freq_base": 1e4}
    assert field("general.architecture") == "llama" and {key: field(f"llama.{key}") for key in sizes} == sizes
    assert field("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)  # llama.cpp's converter: from Hugging Face's names
    expected = {}
    for name, weight in model.state_dict().items():
        expected[names.get_name(export._translate(name, export._HF), (".weight",))] = weight.numpy()
    assert {tensor.name for tensor in reader.tensors} == set(expected)
    for tensor in reader.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tuple(tensor.shape)[::-1] == expected[tensor.name].shape
        assert np.array_equal(tensor.data, expected[tensor.name])
    kinds = field("tokenizer.ggml.token_type")
    end = tokenizer.special_tokens[END_OF_TEXT]
    assert (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")) == ("gpt2", "gpt-2")
    assert len(field("tokenizer.ggml.tokens")) == len(kinds) == 400 and len(set(field("tokenizer.ggml.tokens"))) == 400
    kind = gguf.TokenType
    assert (kinds[0], kinds[end], kinds[399]) == (kind.NORMAL, kind.CONTROL, kind.UNUSED)
    assert field("tokenizer.ggml.bos_token_id") == field("tokenizer.ggml.eos_token_id") == end
    assert field("tokenizer.ggml.add_bos_token") is False


def test_gguf_read_by_transformers_gives_logits_and_ids(gguf_file, tokenizer, ids, logits):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    config = transformers.AutoConfig.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    theirs = transformers.LlamaForCausalLM(config)
    theirs.load_state_dict(load_gguf_checkpoint(str(gguf_file), return_tensors=True, model_to_load=theirs)["tensors"])
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, logits, atol=1e-5, rtol=1e-5)
    theirs = transformers.AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)


# --- ONNX


def test_onnx_takes_a_model_that_is_no_llama(tokenizer, tmp_path):
    onnxruntime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    run = make_run(tmp_path / "run", tokenizer, norm="post", use_rope=False, ffn="silu", num_layers=1)
    session = onnxruntime.InferenceSession(export.to_onnx(run, tmp_path / "model.onnx"))
    model, rows = load_run(run)[0], torch.arange(96).view(2, 48)
    for ids in (rows, rows[:1, :1], rows.view(4, 24)):
        with torch.inference_mode():
            expected = model(ids).numpy()
        np.testing.assert_allclose(session.run(None, {"token_ids": ids.numpy()})[0], expected, atol=1e-5, rtol=1e-5)


# --- what cannot be said, and what fails

WRITERS = {"hf": export.to_hf, "llama2c": export.to_llama2c, "gguf": export.to_gguf}
VARIANTS = [({"norm": "post"}, "norm is 'post'"), ({"norm": "none"}, "norm is 'none'"),
            ({"use_rope": False}, "use_rope is False"), ({"ffn": "silu"}, "ffn is 'silu'")]


@pytest.mark.parametrize("fields, words", VARIANTS, ids=str)
def test_a_variant_that_is_no_llama_is_refused_with_the_reason(tokenizer, tmp_path, fields, words):
    run = make_run(tmp_path / "run", tokenizer, **fields)
    before = contents(tmp_path)
    for write in WRITERS.values():
        with pytest.raises(InputError, match=f"{words}: a Llama"):
            write(run, tmp_path / "out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", [*WRITERS, "tiktoken", "onnx"])
def test_what_exists_is_never_overwritten(run, tmp_path, name):
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="is there already"):
        {**WRITERS, "tiktoken": export.to_tiktoken_file, "onnx": export.to_onnx}[name](run, tmp_path / "out")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine" and len(contents(tmp_path)) == 1


def test_a_second_vocabulary_is_refused_too(run, tmp_path):
    (tmp_path / "tokenizer.bin").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="tokenizer.bin is there already"):
        export.to_llama2c(run, tmp_path / "model.bin")
    assert contents(tmp_path) == {tmp_path / "tokenizer.bin"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_left_of_an_export_that_fails(run, tmp_path, monkeypatch, name, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(os, "fsync", fail)  # the last step, when all is written
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        WRITERS[name](run, tmp_path / "new/out")
    assert isinstance(error, KeyboardInterrupt) or "No space left" in str(caught.value)
    assert contents(tmp_path) <= {tmp_path / "new"}


@pytest.mark.parametrize("name, package", [("tiktoken", "tiktoken"), ("gguf", "gguf"), ("onnx", "onnxscript")])
def test_a_missing_package_is_named(run, tokenizer, tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)  # so that importing it fails
    with pytest.raises(InputError, match=f"pip install {package}"):
        if name == "tiktoken":
            export.to_tiktoken(tokenizer)
        else:
            {"gguf": export.to_gguf, "onnx": export.to_onnx}[name](run, tmp_path / "out")
    assert contents(tmp_path) == set()


# --- the command


def complaint(capfd, *argv) -> str:
    capfd.readouterr()
    assert cli.main(["export", *map(str, argv)]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("tinylm: ")
    return line


MADE = {"hf": "hf/model.safetensors", "tiktoken": "vocabulary.tiktoken", "llama2c": "llama2c/model.bin",
        "gguf": "model.gguf", "onnx": "model.onnx"}


@pytest.mark.parametrize("name", cli._PLACES)
def test_the_command_writes_each_format(run, tmp_path, capfd, name):
    for package in {"hf": ["transformers"], "tiktoken": ["tiktoken"], "gguf": ["gguf"],
                    "onnx": ["onnxscript", "onnxruntime"]}.get(name, []):
        pytest.importorskip(package)
    own = shutil.copytree(run, tmp_path / "run")
    assert cli.main(["export", str(own), "--format", name]) == 0
    made, said = own / "export" / MADE[name], capfd.readouterr().out
    assert made.is_file() and "To read it" in said and f"export/{MADE[name].split('/')[0]}" in said.replace(os.sep, "/")
    if name in ("hf", "tiktoken", "onnx"):  # the other two are read by a program
        exec(said.split("To read it:")[1].strip())
    assert name != "llama2c" or made.with_name("tokenizer.bin").is_file()


def test_the_command_writes_where_it_is_told(run, tmp_path):
    assert cli.main(["export", str(run), "--out", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere/config.json").is_file() and not (run / "export").exists()


def test_the_command_complains_in_one_line(run, tokenizer, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "tinylm train" in complaint(capfd)
    assert "no/run" in complaint(capfd, "no/run")
    assert "hf, tiktoken, llama2c, gguf, onnx" in complaint(capfd, run, "--format", "zip")
    assert "is there already" in complaint(capfd, run, "--out", tmp_path)
    post = make_run(tmp_path / "post", tokenizer, norm="post")
    assert "norm is 'post'" in complaint(capfd, post, "--format", "gguf")
    assert cli.main(["export", "--help"]) == 0 and "usage: tinylm export [RUN]" in capfd.readouterr().out


@pytest.mark.skipif(not os.environ.get("LLAMA2C"), reason="LLAMA2C names no llama2.c binary (`run`) to test with")
def test_the_real_llama2c_writes_our_greedy_text(llama2c, tokenizer, model):
    argv = [os.environ["LLAMA2C"], llama2c, "-z", llama2c.with_name("tokenizer.bin"), "-t", "0", "-n", "40"]
    done = subprocess.run(argv, capture_output=True, check=True)
    ids = generate(model, [1], 40, temperature=0, stop_id=1)
    expected = b"".join(tokenizer.vocab.get(i, b"[PAD%d]" % i) for i in ids)
    assert done.stdout.rstrip() == expected.replace(b"\x00", b"").rstrip()


# --- the chapters open with what tinylm itself needs


GUARDED = re.compile(r"^%pip install .*", re.MULTILINE)


def imported(notebook: dict) -> set[str]:
    "Packages that a chapter imports outside of any `try` or `if`."
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    nodes = [node for source in sources for node in ast.parse(re.sub("(?m)^[%!].*", "", source)).body]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_imports_what_tinylm_needs_or_installs_the_rest(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    needs = re.search("^requirements = (.*)", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.MULTILINE)[1]
    needs += " ".join(GUARDED.findall("\n".join("".join(cell["source"]) for cell in notebook["cells"])))
    brought = {"tinylm", "IPython", *re.findall(r"[A-Za-z]\w*", needs)}  # a notebook never comes without IPython
    assert imported(notebook) <= brought, "put it into requirements, behind `try`, or into a line of %pip"
