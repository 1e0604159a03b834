"""Stubs, checks and solutions of the chapters' exercises, each pair in one place.

In a notebook of this folder:

    from exercises import check, stub
    print(stub("layer_norm"))  # what to fill in
    check(layer_norm)          # nothing, or what is wrong with your answer

A stub is its solution without the body, so the two cannot drift apart. Below each solution stands its check, with
wrong answers that the check must refuse; tests/test_exercises.py sees to that. Reading on spoils the fun.
"""
import ast
import inspect
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.testing import assert_close

import tinylm.data
from tinylm.ablations import t_quantile
from tinylm.model import ModelConfig, flops_per_token, parameter_table
from tinylm.optim import cross_entropy
from tinylm.rope import apply_rope, rope_angles


class Exercise(NamedTuple):
    chapter: str
    number: int
    solution: Callable
    check: Callable
    wrong: list[Callable]


EXERCISES: dict[str, Exercise] = {}


def exercise(chapter: str, number: int, solution: Callable, wrong: list[Callable]) -> Callable[[Callable], None]:
    "Keep the decorated check together with its solution and the wrong answers that it must refuse."
    def keep(check: Callable) -> None:
        EXERCISES[solution.__name__] = Exercise(chapter, number, solution, check, wrong)
    return keep


def stub(name: str) -> str:
    "The signature and the task of an exercise, as text to copy into a cell."
    source = inspect.getsource(EXERCISES[name].solution)
    docstring = ast.parse(source).body[0].body[0]
    return "\n".join(source.splitlines()[:docstring.end_lineno]) + "\n    raise NotImplementedError\n"


def check(answer: Callable, name: str | None = None) -> None:
    "Check an answer, by default to the exercise of its own name; raises AssertionError where it is wrong."
    EXERCISES[name or answer.__name__].check(answer)


# Chapter 00, data

def equal_weights(text: str) -> str:
    "Take the weight before an option out of the grammar's text, so that all options of a rule are as likely."
    return re.sub(r"(?m)(^\s*|[:,]\s+)\d+ (?=\S)", r"\1", text)


@exercise("00_data", 2, equal_weights, wrong=[lambda text: text, lambda text: re.sub(r"\d+ ", "", text, count=9)])
def _(answer):
    rules, before = tinylm.data._read(answer(tinylm.data._TEXT)), tinylm.data._read(tinylm.data._TEXT)
    assert {name: [words for _, words, _ in rule] for name, rule in rules.items()} == {
        name: [words for _, words, _ in rule] for name, rule in before.items()}, "the words must stay"
    assert {weight for rule in rules.values() for weight, _, _ in rule} == {1}, "some weights are left"


# Chapter 00, tokenizer

def longest_match(text: bytes, vocab: dict[int, bytes]) -> list[int]:
    "Encode by taking, at each place, the longest token of the vocabulary that fits."
    ids = {token: i for i, token in vocab.items()}
    found = []
    while text:
        length = next(n for n in range(len(text), 0, -1) if text[:n] in ids)
        found.append(ids[text[:length]])
        text = text[length:]
    return found


@exercise("00_tokenizer", 2, longest_match, wrong=[
    lambda text, vocab: list(text),
    lambda text, vocab: [i for i, token in vocab.items() if token in text],
])
def _(answer):
    vocab = {i: bytes([i]) for i in range(256)} | {256: b"th", 257: b"he", 258: b"hen"}
    assert answer(b"then", vocab) == [256, ord("e"), ord("n")], "at each place, from the left"
    assert answer(b"when", vocab) == [ord("w"), 258], "the longest, not the first"
    assert answer(b"", vocab) == []


# Chapter 01, layers

def layer_norm(x: torch.Tensor) -> torch.Tensor:
    "Subtract the mean over the last axis, then divide by the standard deviation (epsilon 1e-5 inside the root)."
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@exercise("01_layers", 1, layer_norm, wrong=[
    lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt(),
    lambda x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True),  # divides by n - 1
])
def _(answer):
    x = 3 + torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    assert_close(answer(x), F.layer_norm(x, (8,)))


def log_softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    "Take the logarithm of the softmax without ever leaving the range of float32."
    shifted = x - x.max(dim, keepdim=True).values
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


@exercise("01_layers", 3, log_softmax, wrong=[
    lambda x, dim: x.softmax(dim).log(),
    lambda x, dim: x - x.exp().sum(dim, keepdim=True).log(),
])
def _(answer):
    for x in (torch.tensor([1000.0, 0.0]), torch.tensor([[1.0, 2.0], [3.0, -4.0]])):
        for dim in range(x.ndim):
            assert_close(answer(x, dim), F.log_softmax(x, dim))


# Chapter 02, rotary positions

def query_for_distance(key: torch.Tensor, distance: int) -> torch.Tensor:
    "Turn a key of size K so that, used as the query, it scores highest against equal keys `distance` places back."
    angles = rope_angles(torch.tensor(distance), len(key))
    return apply_rope(key, angles.cos(), -angles.sin())


@exercise("02_rope", 1, query_for_distance, wrong=[
    lambda key, distance: key,
    lambda key, distance: query_for_distance(key, -distance),  # looks ahead
])
def _(answer):
    key = torch.tensor([1.0, 0.0] * 8)
    angles = rope_angles(torch.arange(10), 16)
    for distance in (0, 3, 5):
        query = apply_rope(answer(key, distance).expand(10, 16), angles.cos(), angles.sin())[9]
        back = 9 - (apply_rope(key.expand(10, 16), angles.cos(), angles.sin()) @ query).argmax()
        assert back == distance, f"the highest score is {back} places back, not {distance}"


# Chapter 03, the model

def long_context(config: ModelConfig) -> int:
    "Find the first context length at which attention costs more operations than the blocks' matrices."
    parts = parameter_table(config)
    return (parts["attention"] + parts["feed-forward"]) // (2 * config.num_layers * config.d_model) + 1


@exercise("03_model", 4, long_context, wrong=[
    lambda config: 4 * config.d_model,  # without the feed-forward
    lambda config: flops_per_token(config) // (4 * config.num_layers * config.d_model) + 1,  # with the head
])
def _(answer):
    assert answer(ModelConfig()) == 3041
    assert answer(ModelConfig(d_model=64, num_heads=4, d_ff=192)) == 2 * 64 + 3 * 192 // 2 + 1


# Chapter 04, loss and optimizer

def smooth_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    "Average the cross-entropy against targets of which the share `smoothing` is spread over all V tokens."
    log_probs = logits.log_softmax(-1)
    hit = log_probs.gather(-1, targets[..., None])[..., 0]
    return -((1 - smoothing) * hit + smoothing * log_probs.mean(-1)).mean()


@exercise("04_optim", 1, smooth_cross_entropy, wrong=[
    lambda logits, targets, smoothing: (1 - smoothing) * F.cross_entropy(logits, targets),
    lambda logits, targets, smoothing: F.cross_entropy(logits, targets) + smoothing * math.log(logits.shape[-1]),
])
def _(answer):
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(6, 5, generator=generator), torch.randint(5, (6,), generator=generator)
    for smoothing in (0.0, 0.1, 0.5):
        assert_close(answer(logits, targets, smoothing), F.cross_entropy(logits, targets, label_smoothing=smoothing))


# Chapter 05, training

def gradients_in_halves(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    "Leave in `.grad` the gradient of the batch's mean loss, computed from its two halves; return that loss."
    model.zero_grad()
    total = 0.0
    for half_x, half_y in zip(x.chunk(2), y.chunk(2), strict=True):
        loss = cross_entropy(model(half_x), half_y) * len(half_x) / len(x)
        loss.backward()
        total += loss.item()
    return total


def _unscaled(model, x, y):
    model.zero_grad()
    losses = [cross_entropy(model(half_x), half_y) for half_x, half_y in zip(x.chunk(2), y.chunk(2), strict=True)]
    sum(losses).backward()
    return sum(losses).item() / 2


def _last_half_only(model, x, y):
    model.zero_grad()
    cross_entropy(model(x[len(x) // 2:]), y[len(y) // 2:]).backward()
    return cross_entropy(model(x), y).item()


@exercise("05_train", 3, gradients_in_halves, wrong=[_unscaled, _last_half_only])
def _(answer):
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7))
    x, y = torch.arange(21).reshape(3, 7) % 7, torch.arange(21).reshape(3, 7) % 5  # halves of two rows and of one
    loss = cross_entropy(model(x), y)
    whole = torch.autograd.grad(loss, list(model.parameters()))
    assert abs(answer(model, x, y) - loss.item()) < 1e-5
    assert_close([p.grad for p in model.parameters()], list(whole))


# Chapter 06, ablations

def seeds_needed(deviation: float, difference: float) -> int:
    "Find the fewest seeds with which Student's 95% interval is narrower than `difference` on either side."
    seeds = 2
    while t_quantile(0.95, seeds - 1) * deviation / math.sqrt(seeds) >= difference:
        seeds += 1
    return seeds


@exercise("06_ablations", 1, seeds_needed, wrong=[
    lambda deviation, difference: max(2, math.floor((1.96 * deviation / difference) ** 2) + 1),
    lambda deviation, difference: next(
        n for n in range(2, 999) if t_quantile(0.95, n) * deviation / math.sqrt(n) < difference),
])
def _(answer):
    for deviation, difference in [(0.001, 0.1), (0.0053, 0.011), (0.01, 0.01), (0.03, 0.01)]:
        seeds = answer(deviation, difference)
        assert t_quantile(0.95, seeds - 1) * deviation / math.sqrt(seeds) < difference, f"{seeds} seeds are too few"
        if seeds > 2:
            fewer = seeds - 1
            assert t_quantile(0.95, fewer - 1) * deviation / math.sqrt(fewer) >= difference, f"{seeds} are too many"


# Chapter 07, generation

def keep_min_p(probs: torch.Tensor, share: float) -> torch.Tensor:
    "Keep, in each row, the tokens at least `share` as probable as the most probable one; rows sum to 1 again."
    kept = probs * (probs >= share * probs.max(-1, keepdim=True).values)
    return kept / kept.sum(-1, keepdim=True)


@exercise("07_generate", 1, keep_min_p, wrong=[
    lambda probs, share: probs * (probs >= share * probs.max(-1, keepdim=True).values),  # no longer sums to 1
    lambda probs, share: probs * (probs >= share) / (probs * (probs >= share)).sum(-1, keepdim=True),  # absolute
])
def _(answer):
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.85, 0.05]])
    assert_close(answer(probs, 0.5), torch.tensor([[0.625, 0.375, 0], [0, 1, 0]]))
    assert_close(answer(probs, 1.0), torch.tensor([[1.0, 0, 0], [0, 1, 0]]), msg="the first always stays")
    assert_close(answer(probs, 0.0), probs)


# Chapter 08, export

def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    "Turn a matrix (R, C) into int8 in -127..127 and scales (R, 1), so that their product is as near as can be."
    scale = weight.abs().amax(1, keepdim=True) / 127
    return torch.round(weight / scale.clamp(min=1e-30)).to(torch.int8), scale


@exercise("08_export", 1, quantize_rows, wrong=[
    lambda w: (torch.round(w / (w.abs().max() / 127)).to(torch.int8), (w.abs().max() / 127).expand(len(w), 1)),
    lambda w: ((w / w.abs().amax(1, keepdim=True) * 127).to(torch.int8), w.abs().amax(1, keepdim=True) / 127),
])
def _(answer):
    sizes = torch.tensor([[1e-3], [1], [1], [50], [1e4]])
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)) * sizes
    numbers, scale = answer(weight)
    assert numbers.dtype == torch.int8 and numbers.shape == weight.shape and scale.shape == (5, 1)
    assert (numbers.abs().amax(1) == 127).all(), "the largest number of each row should become 127 or -127"
    error = (numbers * scale - weight).abs()
    assert (error <= scale * 0.5001).all(), f"off by {(error / scale).max():.2f} of a row's scale; half is possible"
    assert answer(torch.zeros(2, 3))[0].eq(0).all(), "a row of zeros stays a row of zeros"


# Chapter 09, kernels

def number_starts(text: str) -> list[int]:
    "Find where the pretokens of GPT-4's rule for numbers, ` ?\\p{N}{1,3}`, start in a text of digits and spaces."
    starts, run = [], 0  # no look at a few neighbors can do it: what counts is the length of the run so far
    for i, char in enumerate(text):
        if char == " ":
            run = 0
        else:
            if run % 3 == 0:
                starts.append(i - 1 if run == 0 and text[i - 1:i] == " " else i)
            run += 1
    return starts


@exercise("09_kernels", 3, number_starts, wrong=[
    lambda text: [m.start() for m in re.finditer(r" ?\d+", text)],
    lambda text: [m.start() for m in re.finditer(r"\d{1,3}", text)],
])
def _(answer):
    for text in ("1", " 12", "1234", " 1234567 89", "12  3456", "000 111 ", ""):
        wanted = [found.start() for found in re.finditer(r" ?\d{1,3}", text)]
        assert answer(text) == wanted, f"{text!r}: {wanted}, not {answer(text)}"


# Chapter 10, the command

def edit_distance(a: str, b: str) -> int:
    "Count the least insertions, deletions, replacements and swaps of neighbors that turn `a` into `b`."
    rows = [list(range(len(b) + 1))]
    for i in range(1, len(a) + 1):
        row = [i]
        for j in range(1, len(b) + 1):
            best = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (a[i - 1] != b[j - 1]))
            if i > 1 and j > 1 and a[i - 2:i] == b[j - 2:j][::-1]:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]


def _no_swaps(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(_no_swaps(a[1:], b) + 1, _no_swaps(a, b[1:]) + 1, _no_swaps(a[1:], b[1:]) + (a[0] != b[0]))


@exercise("10_cli", 2, edit_distance, wrong=[
    _no_swaps,
    lambda a, b: sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b)),
])
def _(answer):
    for a, b, distance in [("", "", 0), ("", "ab", 2), ("ab", "ba", 1), ("lr", "lrr", 1), ("sede", "seed", 1)]:
        assert answer(a, b) == distance, f"{a!r} to {b!r} is {distance}, not {answer(a, b)}"
    flags = ["batch_size", "d_model", "max_steps"]
    assert min(flags, key=lambda flag: answer("abtch_size", flag)) == "batch_size"
