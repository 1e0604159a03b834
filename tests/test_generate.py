"""Generation: the cached path against a naive one, batches, the sliding window, filters against transformers' own."""
import threading
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from tinylm import core
from tinylm.core import InputError
from tinylm.generate import KVCache, _Reader, _window_start, generate, next_token_probs, pick_id, start_ids
from tinylm.generate import stream, stream_text
from tinylm.kernels import TokenReader
from tinylm.layers import RMSNorm
from tinylm.model import ModelConfig, TransformerLM
from tinylm.tokenizer import Tokenizer

SMALL = ModelConfig(vocab_size=300, context_length=16, d_model=32, num_layers=2, num_heads=4, d_ff=64)


def model_of(**kw):
    return TransformerLM(replace(SMALL, **kw))


def naive(model, ids, num, seed, **choice):
    "Run the whole window for each token; know nothing of caches or rows."
    ids, new, g = list(ids), [], torch.Generator().manual_seed(seed)
    for _ in range(num):
        window = ids[_window_start(len(ids), model.config.context_length):]
        with torch.inference_mode():
            probs = next_token_probs(model(torch.tensor([window]))[:, -1], **choice)
        new.append(pick_id(probs, torch.rand(1, generator=g, dtype=torch.float64)).item())
        ids.append(new[-1])
    return new


VARIANTS = [{"norm": "post"}, {"norm": "none"}, {"use_rope": False}, {"ffn": "silu"},
            {"num_kv_heads": 1, "tie_embeddings": True, "qk_norm": True}]  # which the compiled twin cannot read
CHOICES = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 40, "top_p": 0.9}]


@pytest.mark.parametrize("kw", [{}, {"num_kv_heads": 2, "tie_embeddings": True}, {"context_length": 1},
                                {"context_length": 7}, *VARIANTS], ids=str)
def test_cached_equals_naive_past_the_context(monkeypatch, kw):
    model = model_of(**kw)
    for choice in CHOICES if not kw else CHOICES[-1:]:
        expected = naive(model, [5, 9, 2], 30, 7, **choice)
        for core_fast in (True, False):
            monkeypatch.setattr(core, "FAST", core_fast)
            assert generate(model, [5, 9, 2], 30, seed=7, **choice) == expected


def test_ragged_batch_equals_each_row_alone():
    model = model_of()
    prompts = [[1, 2, 3], [4], list(range(40)), [7] * 16, [8] * 17]
    batch = generate(model, prompts, 45, seed=100)
    for r, prompt in enumerate(prompts):
        assert batch[r] == generate(model, prompt, 45, seed=100 + r) == generate(model, [prompt], 45, seed=100 + r)[0]


@pytest.mark.parametrize("stop", [0, None])  # a stop that is falsy, and one that the second row meets early
def test_stop_in_a_batch_ends_that_row_alone(stop):
    model, prompts = model_of(vocab_size=20), [[1], [2], [3, 4]]
    free = generate(model, prompts, 60, seed=5)
    stop = free[1][6] if stop is None else stop
    expected = [row[:row.index(stop)] if stop in row else row for row in free]
    assert expected != free and generate(model, prompts, 60, seed=5, stop_id=stop) == expected


def test_stream_is_lazy_and_equals_generate(monkeypatch):
    model, calls, logits = model_of(), [], _Reader.logits
    monkeypatch.setattr(_Reader, "logits", lambda *a: calls.append(1) or logits(*a))
    ids = stream(model, [1, 2, 3], 20, seed=1)
    first = [next(ids), next(ids)]
    assert len(calls) == 2 and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()  # nothing leaks
    assert first + list(ids) == generate(model, [1, 2, 3], 20, seed=1)


def test_compiled_code_reads_single_tokens_only(monkeypatch):
    model, widths, single = model_of(), [], []
    forward, scores = model.forward, TokenReader.scores
    monkeypatch.setattr(model, "forward", lambda ids, *a, **k: widths.append(ids.shape[1]) or forward(ids, *a, **k))
    monkeypatch.setattr(TokenReader, "scores", lambda *a: single.append(len(a[1])) or scores(*a))
    generate(model, [1] * 16, 8)  # 16 tokens, then 9 again as the window slides, then one by one
    assert widths == [16, 9] and single == [1] * 6
    generate(model, [[1], [2, 3, 4], [5]], 5)  # all rows walk in step, so the second one starts later and ends later
    assert widths == [16, 9, 1] and single == [1] * 6 + [3] * 6
    generate(model, [[1]] * 17, 3)  # with so many texts PyTorch is faster
    assert widths == [16, 9, 1] + [1] * 3 and len(single) == 12


@pytest.mark.parametrize("size", [1, 3, 4, 5, 8])
def test_the_twin_writes_what_is_written_as_taught(monkeypatch, size):
    model = model_of(d_ff=50)  # 50 rows are not a multiple of the four that are read at once
    prompts = [[7 * r + 1] * (1 + r) for r in range(size)]
    compiled = generate(model, prompts, 24, seed=3)  # past the context of 16
    monkeypatch.setattr(core, "FAST", False)
    assert compiled == generate(model, prompts, 24, seed=3)


def filled_reader(model, size):
    "A reader that has read one token of each text, so that its twin is there."
    reader = _Reader(model)
    reader.logits([[0]] * size, 1)
    return reader


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_twins_logits_equal_the_full_forward_through_shared_memory(size):
    model = model_of(context_length=40, d_model=48, num_heads=3, d_ff=50, vocab_size=301)
    for i, norm in enumerate(part for part in model.modules() if isinstance(part, RMSNorm)):
        norm.eps = 0.1 * (i + 1)
    ids = torch.randint(300, (size, 40), generator=torch.Generator().manual_seed(1))
    twin = filled_reader(model, size).twin
    with torch.no_grad():
        model.layers[0].ffn.w2.weight *= 2  # shared, so it must be seen
        steps = torch.stack([torch.from_numpy(twin.scores(ids[:, t].tolist(), t, 1)) for t in range(40)], 1)
        torch.testing.assert_close(steps, model(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_threads_share_the_texts_and_change_no_bit(monkeypatch, size):
    twin, read, seen, written = filled_reader(model_of(), size).twin, TokenReader._read, set(), []
    monkeypatch.setattr(TokenReader, "_read", lambda *a: seen.add(threading.get_ident()) or read(*a))
    for count in (1, 2, 3):
        written.append([twin.scores([(7 * r + t) % 300 for r in range(size)], t, count) for t in range(1, 16)])
    for scores in written:
        assert all((a == b).all() for a, b in zip(scores, written[0], strict=True))
    assert (len(seen) > 1) == (size > 2)  # pairs are shared, and a single pair stays where it is


def test_a_part_of_somebody_else_is_never_passed_over(monkeypatch):
    class MyNorm(RMSNorm):
        "Looks alike and computes something else."

    model = model_of()
    assert filled_reader(model, 1).twin is not None
    model.layers[1].ln1 = MyNorm(32)
    for other in (model, model_of().bfloat16(), model_of().double(), *(model_of(**kw) for kw in VARIANTS)):
        assert filled_reader(other, 1).twin is None
    monkeypatch.setattr(core, "FAST", False)
    assert filled_reader(model_of(), 1).twin is None


def test_global_random_state_is_untouched():
    before = torch.random.get_rng_state()
    told = generate(model_of(), [1], 10, seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert generate(model_of(), [1], 10, seed=2) == told


BAD = [
    *(("temperature", value) for value in (-0.1, float("nan"), float("inf"))),
    *(("top_p", value) for value in (0.0, 1.01, float("nan"))), ("top_k", 0), ("max_new_tokens", -1),
    *(("seed", value) for value in (2**64, -(2**63) - 1)),
    *(("prompt_ids", value) for value in ([], [300], [2, -1])),
]


@pytest.mark.parametrize("name, value", BAD, ids=str)
def test_bad_values_are_refused_in_one_line_before_any_work(name, value):
    settings = {"prompt_ids": [1], "max_new_tokens": 3, name: value}
    for call in (generate, stream):
        with pytest.raises(InputError) as caught:
            call(model_of(), **settings)  # stream complains at once, not at the first token
        assert name.removesuffix("_ids") in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_of_other_libraries_and_the_largest_seed_are_taken():
    ids = generate(model_of(), [np.int64(1)], np.int32(4), temperature=np.float32(0.5), seed=2**63 - 1, stop_id=None)
    assert len(ids) == 4 and ids == list(stream(model_of(), [1], 4, temperature=0.5, seed=2**63 - 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_model_is_named(value):
    model = model_of()
    model.lm_head.weight.data[3, 3] = value
    with pytest.raises(InputError, match="not finite"):
        generate(model, [[1], [2]], 3, temperature=0.0)


def test_cache_refuses_to_overflow():
    cache = KVCache(3)
    cache.append(*torch.ones(2, 1, 1, 3, 2))
    with pytest.raises(AssertionError, match="room for 3"):
        cache.append(*torch.ones(2, 1, 1, 1, 2))
    cache.length = 0
    assert cache.append(*torch.ones(2, 1, 1, 1, 2))[0].shape == (1, 1, 1, 2)


def test_filters_equal_those_of_transformers():
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = 4 * torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    for t, k, p in product((0.3, 1.0, 1.7), (None, 1, 5, 64), (None, 0.05, 0.5, 0.95)):
        theirs = process.TemperatureLogitsWarper(t)(None, logits)
        theirs = process.TopKLogitsWarper(k)(None, theirs) if k else theirs
        theirs = process.TopPLogitsWarper(p)(None, theirs) if p else theirs
        torch.testing.assert_close(next_token_probs(logits, t, k, p), theirs.softmax(-1), atol=1e-6, rtol=1e-5)


BYTES = {i: bytes([i]) for i in range(256)}


@pytest.mark.parametrize("raw", [b"a\xf0\x9f", b"\xff\xfeb", b"\xf0\x9f\xf0\x9f\xa6\x8a", b"\x80", b""])
def test_streamed_text_equals_decode_on_broken_bytes(raw):
    tokenizer = Tokenizer(BYTES, [])
    assert "".join(stream_text(tokenizer, raw)) == tokenizer.decode(list(raw))
    assert "".join(stream_text(tokenizer, [65, 5000, 66])) == "A\ufffdB"  # an id that the tokenizer lacks


def test_a_story_starts_after_end_of_text_where_there_is_one():
    assert start_ids(Tokenizer(BYTES | {256: b"<|endoftext|>"}, [], ["<|endoftext|>"])) == [256, 10]
    assert start_ids(Tokenizer(BYTES, []), "Hi") == [10, 72, 105]
