"""The engine of `tinylm check`: what it says of answers right, wrong, endless or broken; training with a part."""
import re
import runpy
import sys

import numpy as np
import pytest
import torch

from tinylm import check as book
from tinylm import exercises
from tinylm.core import InputError
from tinylm.exercises import PARTS

# Answers as readers write them, unlike those of the table: the likely mistake is known by its numbers alone.

OTHERS = {
    "epsilon is added outside the root": ("RMSNorm", """
class RMSNorm(nn.Module):
    def __init__(self, d_model, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d_model)), eps
    def forward(self, x):
        return self.weight * x / ((x ** 2).mean(dim=-1, keepdim=True) ** 0.5 + self.eps)"""),
    "sqrt(d_k) is missing": ("attention", """
def attention(q, k, v, mask=None):
    scores = torch.einsum("...td,...sd->...ts", q, k)
    mask = torch.ones_like(scores).bool() if mask is None else mask
    return torch.where(mask, scores, -1e30).softmax(-1) @ v"""),
}


def complaint(name, answer):
    with pytest.raises(book.Wrong) as caught:
        book.check(name, answer)
    return str(caught.value)


@pytest.mark.parametrize("words", OTHERS)
def test_a_mistake_is_known_by_its_numbers(words):
    name, source = OTHERS[words]
    space: dict = {}
    exec("import math, torch\nfrom torch import nn\n" + source, space)
    assert re.findall("likely mistake: (.*)", complaint(name, space[name]))[:1] == [words]


def test_what_differs_is_told():
    one = torch.ones(2, 3)
    two = one.clone()
    two[1, 1] = 1.5
    assert book.difference(one, two) == "at [1, 1] is 1.5, expected 1 (1 of its 6 numbers are off, by up to 0.5)"
    assert book.difference(one, one + 1e-6) is None and book.difference(one, one.double()) == (
        "has dtype torch.float64, expected torch.float32")
    assert book.difference(one, one.T) == "has shape (3, 2), expected (2, 3)"
    assert book.difference(one[0, :1].double(), one[0, :1].double() + 1e-7) == "at [0] is 1.0000001, expected 1"
    assert book.difference(one, (one, one)) == "is no tensor but a tuple"
    assert book.difference(one, np.ones((2, 3))) == "is no tensor but a ndarray"
    assert book.difference([one], (one,)) is None and book.difference(5, np.array([5, 6])).startswith("is array")
    assert book.difference({"weight": (8,)}, {"gain": (8,)}) == "has no weight, but 'gain'"
    assert book.difference([1, 2, 3], [1, 7, 3]) == "item 1 is 7, expected 2"
    assert book.difference(0.5, None).startswith("is None: a `return` is missing")


def test_an_error_of_an_answer_is_told_with_its_line():
    def broken(x, dim):
        return x + torch.ones(77)

    assert "of test_check.py: return x + torch.ones(77)" in complaint("softmax", broken)
    assert "it raises SystemExit: 0" in complaint("softmax", lambda x, dim: sys.exit(0))
    assert book.Wrong("one\ntwo")._render_traceback_() == ["one", "two"]


def test_importing_the_table_draws_nothing(monkeypatch):
    monkeypatch.setattr(torch, "randn", None)
    assert list(runpy.run_path(exercises.__file__)["PARTS"]) == list(PARTS)


# A file of a reader's runs in a process of its own.

FILE = """
import collections, math, multiprocessing, os, torch
print("at import")

def my_attention(q, k, v, mask=None):
    weights = (q @ k.mT / math.sqrt(4)).softmax(-1)
    return weights @ v, weights

def softmax(x, dim):
    print("in softmax")
    return x.softmax(dim)

def count(words):
    return collections.Counter(words)

def train_bpe(path, size, special):
    pool = multiprocessing.Pool(2)
    assert sum(pool.map(count, ["ab", "cd"]), collections.Counter()).total() == 4
    from tinylm.exercises import train_bpe
    return train_bpe(path, size, special)

def cosine_lr(step, *rest):
    return step / 0

def log_softmax(x, dim):
    return torch.log_softmax(x, dim)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("reader") / "my.py"
    path.write_text(FILE, encoding="utf-8")
    return path


def test_a_file_is_marked_part_by_part(file, capfd):
    names = ["attention:my_attention", "softmax", "train_bpe", "cosine_lr", "log_softmax"]
    assert book.check_file(str(file), names) == 2
    assert capfd.readouterr() == ((
        "attention differs in case 1 of 9, no mask:\n  output is no tensor but a tuple\n"
        "softmax: agrees with the book's in all 8 cases\n" + "  it prints: in softmax\n" * 4 +
        "train_bpe: agrees with the book's in all 8 cases\n"
        "cosine_lr differs in case 1 of 5, during the warm-up:\n  it raises ZeroDivisionError: division by zero\n"
        "  line 23 of my.py: return step / 0\n"
        "log_softmax: agrees with the book's in all 4 cases\n"), "")


def test_training_uses_every_part_and_is_that_of_the_book(monkeypatch):
    used, fables = set(), book.fables
    monkeypatch.setattr(book, "fables", lambda count, seed: fables(30, seed))

    def noted(name, answer):
        class Noted(answer if isinstance(answer, type) else object):
            def __new__(cls, *args, **settings):
                used.add(name)
                return super().__new__(cls) if isinstance(answer, type) else answer(*args, **settings)
        return Noted

    whole = {"MultiHeadSelfAttention", "TransformerBlock", "TransformerLM"}  # made of the others
    plain = {name: noted(name, PARTS[name].answer) for name in book.TRAINABLE if name not in whole}
    scaled = PARTS["clip_grad_norm"].wrong("gradients below the limit are scaled up")
    wrong = {"attention": plain.pop("attention"), "clip_grad_norm": scaled}
    expected, right, other = ([*book.Training(parts).losses(12)] for parts in ({}, plain, wrong))
    assert used == {*plain, "attention"} and len(expected) == 12 and expected[-1] < expected[0] - 1
    assert right == pytest.approx(expected, abs=5e-3)
    assert max(abs(a - b) for a, b in zip(other, expected, strict=True)) > 0.01


def test_training_with_a_file_prints_both_losses(file, monkeypatch, capsys):
    monkeypatch.setattr(book, "mark_files", lambda *how: [])  # no need to mark it once more
    assert book.check_file(str(file), ["softmax"], train=True) == 0
    yours, books = capsys.readouterr().out.splitlines()[-2:]
    assert yours.removeprefix("with yours") == books.removeprefix("with the book's") and "40 steps" in yours
    with pytest.raises(InputError, match="log_softmax has no place in training; there are: get_batch, "):
        book.check_file(str(file), ["log_softmax"], train=True)
