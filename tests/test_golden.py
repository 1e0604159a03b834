"""What must never move, whatever is rewritten: ids, logits, losses, restarts, exports, stories, names of records.

Each number here was computed once by tinylm 0.1.0 (CPU, float32) and is compared with what the code gives now. Only
names that are promised to users are used, so that no test has to follow a change of the inside.
"""
import gzip
import hashlib
import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout
from dataclasses import asdict, fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config

from tinylm import cli, export
from tinylm.ablations import run_name
from tinylm.data import InputError, fable_logprob, fables
from tinylm.generate import generate
from tinylm.model import ModelConfig, TransformerLM
from tinylm.optim import AdamW
from tinylm.rope import RotaryPositionalEmbedding
from tinylm.tokenizer import PRETOKEN_PATTERN, Tokenizer, train_bpe
from tinylm.train import PRESETS, TrainConfig, load_checkpoint, load_run, prepare, train

ROOT = Path(__file__).resolve().parents[1]
TINYSTORIES = ROOT.parent / "shared/data/tinystories/valid_v2.txt.gz"
END = "<|endoftext|>"
CLOCK = {"seconds", "tokens_per_second"}
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
TINYLM = [sys.executable, "-m", "tinylm.cli"]
NASTY = """It's a fox's life, isn't it? They'll see; we've seen, I'm sure, you're right, he'd go.
  Two  spaces,\tand tabs\t\tand\r\n\r\nlines   \n\n\n Números 123 4567 ¾ ² Ⅷ, ça va? Straße, naïve, e\u0301te\u0301.
日本語のテキスト、中文文本。 한국어 텍스트 שלום עולם مرحبا بالعالم Привет, мир! สวัสดี नमस्ते
👩\u200d🚀👨\u200d👩\u200d👧 🏳️\u200d🌈 🦊🦊🦊 \u200b\ufeff\u00a0\u3000\x00\x01\x7f\x85 ''' '''s 'S 'LL "quoted" --- ...
aaaaaaaaaaaaaaaa ababababab the the the then they them there other mother brother<|endoftext|> <|endof text|>
"""


def sha(thing) -> str:
    return hashlib.sha256(thing if isinstance(thing, bytes) else repr(thing).encode()).hexdigest()


def told(stories) -> str:
    "Documents as a corpus holds them."
    return "".join(f"{story}\n{END}\n" for story in stories)


def tinylm(*argv, code=0) -> str:
    "Run the command in this process; returns what it printed."
    with redirect_stdout(io.StringIO()) as said:
        assert cli.main(list(map(str, argv))) == code
    return said.getvalue()


def flags(config: TrainConfig) -> list[str]:
    "Spell a config as flags."
    plain = asdict(TrainConfig())
    return [part for k, v in asdict(config).items() if v != plain[k] for part in (f"--{k}", str(v))]


def log(run) -> list[dict]:
    "The lines of a log that are whole, without what depends on the clock."
    path = Path(run) / "metrics.jsonl"
    *whole, _ = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in whole]


def losses(run, key="train_loss") -> list[float]:
    return [row[key] for row in log(run) if row.get(key) is not None]


def newest(run) -> Path:
    return sorted((Path(run) / "checkpoints").glob("step-*"))[-1]


# --- tokenizer

TEXTS = {  # vocabulary, SHA-256 of the merges, SHA-256 of the ids
    "fables": (2000, "145bf6100e830f4f6e55869d1d02b3b43f0842eddd2119eacd5f442dc8bc5b7e",
               "298f101bce9cb947f864d225cfc1d1f0629bc60acb37ea642cb74974f683c481"),
    "tinystories": (4000, "4882c5db9f26657d211fdd3d835789f99cc849b8b74bffbe66e1677a0a902bca",
                    "b9fdd4c874a4424e5d894e217a4ffc6ec762263480033f69b027afdbddf8752f"),
    "nasty": (400, "47bd863c90d4954c6c582f26465f73a6f37fad7fd4b865a1425ced4dff05a996",
              "7cb429f03442b4057ed7925673d9314bf1dcb85c5755f21737113df8f6ac1aa7"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_merges_and_ids(name, tmp_path):
    "Pinned, and equal to those of tokenizers and tiktoken, from the file that Tokenizer.save writes."
    tokenizers, tiktoken = pytest.importorskip("tokenizers"), pytest.importorskip("tiktoken")
    if name == "tinystories" and not TINYSTORIES.is_file():
        pytest.skip("real TinyStories are not at hand (../shared/data/tinystories/valid_v2.txt.gz)")
    text = {"fables": lambda: told(fables(2000, 0)), "nasty": lambda: NASTY * 3,
            "tinystories": lambda: gzip.open(TINYSTORIES, "rt", encoding="utf-8", newline="").read()}[name]()
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8", newline="")
    vocab_size, merges_sha, ids_sha = TEXTS[name]
    vocab, merges = train_bpe(tmp_path / "corpus.txt", vocab_size, [END])
    assert sha([(bytes(a), bytes(b)) for a, b in merges]) == merges_sha
    tokenizer = Tokenizer(vocab, merges, [END])
    part = text[:300_000]
    ids = list(map(int, tokenizer.encode(part)))
    assert sha(ids) == ids_sha and tokenizer.decode(ids) == part
    assert list(tokenizer.encode_iterable(re.findall(r"(?s).{1,7}", part))) == ids
    tokenizer.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(part, add_special_tokens=False).ids == ids
    ranks = {token: i for i, token in vocab.items() if token != END.encode()}
    special = {END: next(i for i, token in vocab.items() if token == END.encode())}
    theirs = tiktoken.Encoding("test", pat_str=PRETOKEN_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    assert theirs.encode(part, allowed_special="all") == ids
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    tokenizer.encode_file(tmp_path / "corpus.txt", tmp_path / "corpus.bin")
    assert np.fromfile(tmp_path / "corpus.bin", "<u2")[: len(ids) - 9].tolist() == ids[:-9]


def test_the_tokenizer_needs_no_torch():
    code = "import sys, tinylm.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=ENV).returncode == 0


# --- model


def test_logits_and_gradients_are_those_of_llama():
    transformers = pytest.importorskip("transformers")
    c = ModelConfig(vocab_size=61, context_length=24, d_model=32, num_layers=3, num_heads=4, d_ff=72, rope_theta=500.0)
    model = TransformerLM(c, seed=1)
    start = model.layers[2].attn.k_proj.weight[0, :3].tolist()
    assert start == pytest.approx([-0.018276764, 0.0021131071, -0.02832314], rel=1e-5)
    for name, p in model.named_parameters():
        if "ln" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4,
        rms_norm_eps=1e-5, max_position_embeddings=24, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
    names = {"token_embeddings": "model.embed_tokens", "layers.": "model.layers.", "ln_final": "model.norm",
             "attn.output_proj": "self_attn.o_proj", "attn.": "self_attn.", "ln1": "input_layernorm",
             "ln2": "post_attention_layernorm", "ffn.w1": "mlp.gate_proj", "ffn.w2": "mlp.down_proj",
             "ffn.w3": "mlp.up_proj"}

    def theirs(tensors):
        renamed = {}
        for name, tensor in tensors:
            if "q_proj" in name or "k_proj" in name:  # from pairs (2i, 2i + 1) to pairs (i, i + K/2)
                tensor = tensor.unflatten(0, (4, -1, 2)).transpose(1, 2).reshape(tensor.shape)
            for ours, other in names.items():
                name = name if other in name else name.replace(ours, other)
            renamed[name] = tensor
        return renamed

    llama.load_state_dict(theirs(model.state_dict().items()))
    ids = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(5))
    ours, expected = model(ids), llama(ids).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    ours.square().mean().backward()
    expected.square().mean().backward()
    gradients = theirs((name, p.grad) for name, p in model.named_parameters())
    expected = {name: p.grad for name, p in llama.named_parameters()}
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


# --- training

LOSSES = {
    "debug": [7.513362, 7.427937, 7.273335, 6.971623, 6.596725, 6.218967, 5.966289, 5.742059, 5.599468, 5.421810,
              5.256703, 5.169709, 5.014742, 4.936825, 4.785566, 4.601530, 4.730930, 4.428893, 4.426794, 4.277784],
    "laptop": [7.544340, 7.519978, 7.484893, 7.392502, 7.315605, 7.190935, 7.058155, 6.915151, 6.746054, 6.550010,
               6.329659, 6.142950, 5.957310, 5.755691, 5.577686, 5.309865, 5.316610, 5.002709, 4.894365, 4.751325],
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def debug(data_dir, tmp_path_factory):
    "The first 20 steps of the debug preset, on Fables."
    return first_steps("debug", data_dir, tmp_path_factory.mktemp("debug"), log_every=1)


def first_steps(preset, data_dir, folder, **changes):
    config = replace(PRESETS[preset], data_dir=data_dir, run_dir=str(folder / "run"), device="cpu", max_steps=20)
    return train(replace(config, **changes))


def test_first_losses_of_debug(debug):
    np.testing.assert_allclose(losses(debug), LOSSES["debug"], rtol=0, atol=2e-4)


def test_first_losses_of_laptop(data_dir, tmp_path):
    run = first_steps("laptop", data_dir, tmp_path, log_every=1, eval_windows=8)
    np.testing.assert_allclose(losses(run), LOSSES["laptop"], rtol=0, atol=2e-4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A config of 400 quick steps whose data are prepared."
    folder = tmp_path_factory.mktemp("tiny")
    return replace(tiny_config(folder), num_layers=2, cosine_cycle_iters=400, eval_every=100, checkpoint_every=50,
                   run_dir=str(folder / "straight"))


@pytest.fixture(scope="module")
def straight(tiny):
    return train(tiny)


def bits(run):
    return log(run), *((newest(run) / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer"))


def test_killed_is_never_stopped_and_a_flipped_bit_is_noticed(tiny, straight, tmp_path):
    run = tmp_path / "run"
    argv = [*TINYLM, "train", *flags(replace(tiny, run_dir=str(run)))]
    child = subprocess.Popen(argv, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and len(losses(run)) < 33:
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -9, "the run ended before it was killed"
    tinylm("train", "--resume", run)
    assert bits(run) == bits(straight)
    path = newest(run) / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-100] + bytes([raw[-100] ^ 4]) + raw[-99:])
    model = TransformerLM(tiny)
    with pytest.raises(InputError):
        load_checkpoint(newest(run), model, AdamW(model.parameters()))
    tinylm("train", "--resume", run)  # from the checkpoint before
    assert bits(run) == bits(straight)


def test_one_process_is_two_is_fsdp(tiny, tmp_path):
    short = replace(tiny, max_steps=24, log_every=1, eval_every=12)
    alone = train(replace(short, run_dir=str(tmp_path / "alone")))
    for name in ("ddp", "fsdp"):
        argv = [*flags(replace(short, run_dir=str(tmp_path / name))), *(["--fsdp"] if name == "fsdp" else [])]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tinylm.cli", "train"]
        subprocess.run([sys.executable, *launch, *argv], env=ENV, check=True, timeout=120, capture_output=True)
        for key in ("train_loss", "val_loss", "grad_norm"):
            np.testing.assert_allclose(losses(tmp_path / name, key), losses(alone, key), rtol=0, atol=1e-5)
        weights = load_run(tmp_path / name)[0].state_dict()
        for k, value in load_run(alone)[0].state_dict().items():
            torch.testing.assert_close(weights[k], value, rtol=0, atol=1e-4)


def test_the_command_of_the_source(tmp_path):
    "Unchanged but for the text, down to the config that is saved; its steps are for another machine."
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(4, 9))) for _ in range(9000)]
    (tmp_path / "corpus.txt").write_text(told(" ".join(draw.choices(words, k=200)) for _ in range(400)), "utf-8")
    source = ("--lr 8e-4 --batch_size 64 --context_length 256 --vocab_size 10000 --num_layers 4 --num_heads 16 "
              "--d_ff 1344 --rope_theta 10000.0 --d_model 512 --beta1 0.9 --beta2 0.999 --weight_decay 0.0001 "
              "--warmup_iters 2000 --cosine_cycle_iters 20000 --max_l2_norm 1").split()
    argv = [*TINYLM, "train", *source, "--corpus", "corpus.txt", "--run_dir", "run"]
    child, end = subprocess.Popen(argv, cwd=tmp_path, env=ENV), time.monotonic() + 100
    while child.poll() is None and not (tmp_path / "run/config.json").exists() and time.monotonic() < end:
        time.sleep(0.05)
    child.kill()
    child.wait()
    saved = json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))
    for flag, value in zip(source[::2], source[1::2], strict=True):
        assert saved[flag[2:]] == float(value)
    assert saved["norm"] == "pre" and saved["use_rope"] is True and saved["ffn"] == "swiglu" and saved["seed"] == 0


# --- stories and exports

STORY = (' upon a small lived in the forest. "I.\n\nOn a green bag. "What a deep"and a little village by the edge and '
         'then said a green island. "What and')


def test_the_story_of_a_seed(debug):
    model, tokenizer, _ = load_run(debug)
    prompts = [list(tokenizer.encode(f"{END}\n{text}")) for text in ("Once", "The little fox")]
    stop = prompts[0][0]
    texts = [generate(model, ids, 40, temperature=0.7, top_k=20, top_p=0.9, stop_id=stop, seed=i)
             for i, ids in enumerate(prompts)]
    assert tokenizer.decode(texts[0]) == STORY
    assert generate(model, prompts, 40, temperature=0.7, top_k=20, top_p=0.9, stop_id=stop, seed=0) == texts
    settings = "--max_new_tokens 40 --temperature 0.7 --top_k 20 --top_p 0.9 --seed 0".split()
    assert f"Once{STORY}".rstrip() in tinylm("generate", debug, "Once", *settings)


@pytest.fixture(scope="module")
def expected(debug):
    "A model with its tokenizer, ids of two stories, their logits, and 20 tokens written greedily after a prompt."
    model, tokenizer, _ = load_run(debug)
    ids = torch.tensor([tokenizer.encode(f"{END}\n{story}")[:100] for story in fables(2, 5)])
    with torch.inference_mode():
        return model, tokenizer, ids, model(ids), generate(model, ids[0, :5].tolist(), 20, temperature=0)


def assert_same_ids(encode, tokenizer):
    for text in ("Once upon a time", "  two  spaces, naïve 🦊\n\n it's 12345", *fables(5, 3)):
        assert encode(text) == list(tokenizer.encode(text))


def test_hugging_face_reads_its_export(debug, expected, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokenizer, ids, logits, greedy = expected
    export.to_hf(debug, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, logits, atol=1e-5, rtol=1e-5)
        written = theirs.generate(ids[:1, :5], max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert written[0, 5:].tolist() == greedy[: written.shape[1] - 5]
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert_same_ids(lambda text: their_tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer)
    back = export.from_hf(tmp_path / "hf").state_dict()
    assert all(torch.equal(weight, back[name]) for name, weight in model.state_dict().items())


def test_tiktoken_reads_its_export(expected):
    pytest.importorskip("tiktoken")
    encoding = export.to_tiktoken(expected[1])
    assert_same_ids(lambda text: encoding.encode(text, allowed_special="all"), expected[1])


def test_llama2c_reads_its_export(debug, expected, tmp_path):
    "As run.c does: seven sizes, then the weights in a fixed order; and its arithmetic in a few lines of NumPy."
    model, tokenizer, ids, logits, _ = expected
    export.to_llama2c(debug, tmp_path / "model.bin")
    raw = (tmp_path / "model.bin").read_bytes()
    d, f, n, heads, kv_heads, vocab, context = struct.unpack_from("<7i", raw)
    floats, at, size = np.frombuffer(raw, "<f4", offset=28), 0, d // heads
    assert kv_heads == heads and vocab == -model.config.vocab_size  # negative: the head is a matrix of its own

    def take(*shape):
        nonlocal at
        at += np.prod(shape)
        return floats[at - np.prod(shape) : at].reshape(shape)

    embedding, norm1, q, k, v, o = take(-vocab, d), take(n, d), *(take(n, d, d) for _ in range(4))
    norm2, w1, w2, w3, norm3 = take(n, d), take(n, f, d), take(n, d, f), take(n, f, d), take(d)
    cos, sin, head = take(context, size // 2), take(context, size // 2), take(-vocab, d)
    assert at == len(floats)

    def norm(x, gain):
        return gain * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def split(x, turn):
        x = x.reshape(len(x), heads, size // 2, 2)
        z = (x[..., 0] + 1j * x[..., 1]) * (cos + 1j * sin)[: len(x), None] ** turn
        return np.stack([z.real, z.imag], -1).reshape(len(x), heads, size)

    x = embedding[ids[0]]
    for i in range(n):
        y = norm(x, norm1[i])
        scores = np.einsum("qhk,thk->hqt", split(y @ q[i].T, 1), split(y @ k[i].T, 1)) / np.sqrt(size)
        weights = np.exp(scores - scores.max(-1, keepdims=True)) * np.tri(len(x))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hqt,thk->qhk", weights, split(y @ v[i].T, 0)).reshape(len(x), d) @ o[i].T
        y = norm(x, norm2[i])
        gate = y @ w1[i].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w3[i].T)) @ w2[i].T
    np.testing.assert_allclose(norm(x, norm3) @ head.T, logits[0], atol=1e-5, rtol=1e-5)

    raw, at, entries = (tmp_path / "tokenizer.bin").read_bytes(), 4, []
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at)
        entries.append((score, raw[at + 8 : at + 8 + length]))
        at += 8 + length
    assert len(entries) == -vocab and [token for _, token in entries[:256]] == [bytes([i]) for i in range(256)]
    scores = {token: score for score, token in entries[256:] if score > -1e9}
    assert sorted(scores, key=scores.get, reverse=True) == [a + b for a, b in tokenizer.merges]


def test_gguf_is_read_by_transformers(debug, expected, tmp_path):
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("gguf")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    _, tokenizer, ids, logits, _ = expected
    export.to_gguf(debug, tmp_path / "model.gguf")
    theirs = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf"))
    file = str(tmp_path / "model.gguf")
    theirs.load_state_dict(load_gguf_checkpoint(file, return_tensors=True, model_to_load=theirs)["tensors"])
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, logits, atol=1e-5, rtol=1e-5)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert_same_ids(lambda text: their_tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer)


def test_onnx_runtime_reads_its_export(debug, expected, tmp_path):
    onnxruntime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    _, _, ids, logits, _ = expected
    export.to_onnx(debug, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    found = session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0]
    np.testing.assert_allclose(found, logits, atol=1e-5, rtol=1e-5)


# --- corpora and records


def test_fables_are_the_same_stories():
    "A new grammar would change this line, and with it every record made with Fables."
    stories = list(fables(1000, 0))
    assert sha("\n".join(stories).encode()) == "f4907ff35ce8d680b08e9f934cfbea73adf4e4d5c7573f386a47b38e35017996"
    assert list(islice(fables(10**9, 0), 3)) == stories[:3]
    assert sum(map(fable_logprob, stories[:20])) == pytest.approx(-1041.4532750867784, abs=1e-9)


def test_the_text_of_fables_and_its_tokens(debug, data_dir):
    about = json.loads((debug / "config.json").read_text(encoding="utf-8"))
    tokenizer, *files = prepare(replace(PRESETS["debug"], data_dir=data_dir))
    assert tokenizer.fingerprint == "e560886945a9197c2def099fdef28a693244d019495ac098a72f6ee5a111a6a9"
    assert [file.count for file in files] == [4427596, 221875]
    assert files[0].sha256 == "59eaf6f3241349bd2347e99d92e6c00c2aac7423a77075d71c6bec5f4050cd66"
    assert sha(files[0].path.read_bytes()) == "0ef3d5cdda89e0ffe568246f0504281183a278a33958731ed21c4455c56ca2cb"
    assert about["data"]["fingerprint"] == tokenizer.fingerprint


def test_records_keep_their_names():
    names = {f.name for f in fields(TrainConfig)}
    records = sorted((ROOT / "data/results/ablations").glob("*/*.json"))
    assert len(records) > 200
    for path in records:
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
        assert run_name(TrainConfig(**{k: v for k, v in config.items() if k in names})) == path.stem
    assert run_name(PRESETS["laptop"]) == "fables-pre-rope-swiglu-lr0.01-seed0-2435ee5e"
    other = replace(PRESETS["reference"], corpus="x/tales.txt.gz", use_rope=False, seed=3, lr=3e-4, max_steps=10_000)
    assert run_name(replace(other, batch_size=32)) == "tales-pre-nope-swiglu-lr0.0003-seed3-e32238bf"


def test_compare_catches_a_planted_bug(data_dir, tmp_path, monkeypatch):
    tinylm("compare", first_steps("debug", data_dir, tmp_path / "right"))
    right = RotaryPositionalEmbedding.forward

    def wrong_pairs(self, x, *positions):  # i with i + K/2 instead of 2i with 2i + 1
        y = right(self, x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2), *positions)
        return y.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)

    monkeypatch.setattr(RotaryPositionalEmbedding, "forward", wrong_pairs)
    tinylm("compare", first_steps("debug", data_dir, tmp_path / "wrong"), code=1)


# --- downloads

class Hub(BaseHTTPRequestHandler):
    "The part of the Hugging Face Hub that a download needs."

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        content, swapped = self.server.files.get(self.path.split("?")[0], (None, None))
        if content is None:
            return self.send_error(404)
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[1])
        self.send_response(206 if "Range" in self.headers else 200)
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"X-Repo-Commit": "c" * 40, "ETag": etag, "X-Linked-ETag": etag, "X-Linked-Size": len(content),
                   "Accept-Ranges": "bytes", "Content-Length": len(content) - start}
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        for item in headers.items():
            self.send_header(*map(str, item))
        self.end_headers()
        if body:
            self.wfile.write(swapped[start:])

    def log_message(self, *args):
        "Say nothing."


FETCH = """import sys
from tinylm.data import InputError, fetch_corpus
for corpus in ("tinystories", "owt"):
    try:
        print(*fetch_corpus(corpus, sys.argv[1]).values(), sep="\\n")
    except InputError:
        print("refused")"""


def test_corpora_are_fetched_by_their_real_names_and_checked(tmp_path):
    stories = [told(fables(count, seed)).encode() for count, seed in ((60, 0), (10, 1))]
    files = dict(zip(["roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",
                      "roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-valid.txt",
                      "stanford-cs336/owt-sample/resolve/main/owt_train.txt.gz",
                      "stanford-cs336/owt-sample/resolve/main/owt_valid.txt.gz"],
                     [*stories, *map(gzip.compress, stories)], strict=True))
    env = {k: v for k, v in ENV.items() if not k.startswith("HF_") and "proxy" not in k.lower()}

    def fetch():
        argv = [sys.executable, "-c", FETCH, str(tmp_path / "data")]
        done = subprocess.run(argv, env=env, capture_output=True, encoding="utf-8", timeout=60, check=True)
        return done.stdout.split()

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf")}
        hub.files = {f"/datasets/{path}": (c, c[:100] + bytes([c[100] ^ 1]) + c[101:]) for path, c in files.items()}
        assert fetch() == ["refused"] * 2 and not list((tmp_path / "data").rglob("*train*"))  # one letter is another
        hub.files = {f"/datasets/{path}": (c, c) for path, c in files.items()}
        found = fetch()
        assert [Path(path).name for path in found] == [Path(path).name for path in files]
        assert [Path(path).read_bytes() for path in found] == list(files.values())
        hub.files = {}
        assert fetch() == found  # what lies there is not fetched again
        hub.shutdown()
