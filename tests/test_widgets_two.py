"""The widgets of chapters 00, 02 to 06 in a real browser: what they compute equals the book's Python, and they react."""
import base64
import json
import math
import random
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
from conftest import CHAPTERS, ROOT, served

from tinylm.ablations import paired_difference
from tinylm.model import ModelConfig, TransformerLM, flops_per_token, memory_table, parameter_table
from tinylm.optim import AdamW, cosine_lr, cross_entropy
from tinylm.recipe import Muon
from tinylm.rope import RotaryPositionalEmbedding
from tinylm.tokenizer import PRETOKEN_PATTERN, train_bpe_naive

PAGES = {"bpe": "00_tokenizer", "rope": "02_rope", "calculator": "03_model", "valley": "04_optim", "learn": "05_train",
         "records": "06_ablations"}


def stored(name: str) -> str:
    "The output of a chapter that holds a widget."
    path = next(path for path in CHAPTERS if path.stem == PAGES[name])
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = ["".join(o.get("data", {}).get("text/html", "")) for c in cells for o in c.get("outputs", ())]
    return next(html for html in outputs if f'dataset.live = "{name}"' in html)


@pytest.fixture(scope="module")
def scripts(browser):
    "A page that has the scripts; ask(name, expression, argument) evaluates an expression of the widget `w`."
    with served(ROOT / "nbs/files") as address:
        page = browser.new_page()
        page.goto(address)

        def ask(name, expression, argument=None):
            return page.evaluate(f"a => import('./{name}.js').then(({{ default: w }}) => {expression})", argument)

        yield ask
        page.close()


def test_merges_equal_those_of_the_naive_trainer(scripts):
    dice = random.Random(0)
    spaces = "".join(map(chr, [9, 10, 11, 12, 28, 31, 32, 32, 133, 160, 5760, 6158, 8192, 8203, 8232, 8239, 12288, 65279]))
    letters = "aaab'stdrevlmé中👍🏽1٣²½_.?Ωǅ\u0301\u200d\ufffd" + spaces
    texts = ["", " ", "a", "aaaaaaa aaaa", "There's the thin THE then\n\n  they'll  'd go", "naïve café 東京東京 👩‍👩‍👧 \U0001f600\U0001f600",
             "x\u0085\u0085 y\ufeff\ufeffz\u180e \u2028 ", *("".join(dice.choices(letters, k=300)) for _ in range(6))]
    found = scripts("bpe", "a.map(text => w.merges(text, 60))", texts)
    for text, ours in zip(texts, found, strict=True):
        assert ours == [[a.hex(), b.hex()] for a, b in train_bpe_naive(text, 256 + 60, [])[1]], text


def test_every_white_space_of_python_is_one_in_the_page(scripts):
    "JavaScript's own idea of it has U+FEFF more and U+0085 less."
    characters = [chr(i) for i in [*range(0x3100), 0xFEFF]]
    found = scripts("bpe", "a.filter(c => w.pretokens(`a${c}${c}a`).length === 4)", characters)
    assert found == [c for c in characters if len(regex.findall(PRETOKEN_PATTERN, f"a{c}{c}a")) == 4]


def test_rope_scores_equal_and_know_only_the_distance(scripts):
    query, key = [1.0, 0.2] * 4, [0.9, -0.5] * 4
    places = [(9, 7), (14, 12), (31, 0), (0, 31), (5, 5)]
    found = scripts("rope", "a[2].map(([m, n]) => w.score(a[0], a[1], m, n, 10000))", [query, key, places])
    rope = RotaryPositionalEmbedding(10_000.0, 8, 32)
    q, k = (rope(torch.tensor(x).expand(32, -1)) for x in (query, key))
    assert found == pytest.approx([(q[m] @ k[n]).item() for m, n in places], abs=1e-5)
    moved = scripts("rope", "Array.from({ length: 25 }, (_, i) => w.score(a[0], a[1], 7 + i, 5 + i, 10000))", [query, key])
    assert max(moved) - min(moved) < 1e-12


def test_costs_equal_the_chapter_s_formulas(scripts):
    for change in ({}, {"d_model": 128, "num_heads": 8, "num_layers": 2, "d_ff": 352, "vocab_size": 1792},
                   {"d_model": 96, "num_heads": 3, "num_layers": 7, "context_length": 64}):
        config = replace(ModelConfig(), **change)
        for short in (False, True):
            a = {**vars(config), "batch_size": 5, "short": short}
            found = scripts("calculator", "w.costs(a)", a)
            assert found["parts"] == parameter_table(config)
            assert found["parameters"] == sum(parameter_table(config).values())
            assert found["flops"] == flops_per_token(config)
            assert found["memory"] == memory_table(config, 5, "bfloat16" if short else "float32")


def descend(make, curvature, steps, start):
    w = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer, path = make([w]), [w[0].tolist()]
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (w[0, 0] ** 2 + curvature * w[0, 1] ** 2)).backward()
        optimizer.step()
        path.append(w[0].tolist())
    return path


@pytest.mark.parametrize("name, make", [
    ("SGD", lambda p: torch.optim.SGD(p, 0.07)),
    ("momentum", lambda p: torch.optim.SGD(p, 0.07, momentum=0.9, dampening=0.1)),
    ("Adam", lambda p: AdamW(p, 0.07, betas=(0.9, 0.999), weight_decay=0.0)),
    ("Muon", lambda p: Muon(p, 0.07, momentum=0.9)),
])
def test_paths_equal_those_of_the_optimizers(scripts, name, make):
    found = scripts("valley", "w.walk(a, .07, .9, 25, 30, [-9, 2.5])", name)
    expected = descend(make, 25, 30, [-9.0, 2.5])
    if name == "momentum":  # torch takes the first gradient whole, the book a tenth of it
        w, m, expected = np.array([-9.0, 2.5]), 0, [[-9.0, 2.5]]
        for _ in range(30):
            m = 0.9 * m + 0.1 * w * [1, 25]
            w = w - 0.07 * m
            expected.append(w.tolist())
    assert np.allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_differences_and_their_intervals_equal_the_chapter_s(scripts):
    dice = np.random.default_rng(0)
    for seeds in (1, 2, 3, 5, 6):
        ours, base = ({seed: float(x) for seed, x in enumerate(dice.normal(size=seeds))} for _ in range(2))
        found, expected = scripts("records", "w.difference(...a)", [ours, base]), paired_difference(ours, base)
        assert found["mean"] == pytest.approx(expected.mean)
        assert (found["half"] or math.inf) == pytest.approx(expected.half_width, rel=1e-5)
    assert scripts("records", "w.difference({ 1: Infinity, 2: 1 }, { 1: 1, 2: 1 }).mean") is None


@pytest.mark.parametrize("norm", ["pre", "none"])
def test_gradients_equal_autograd_s_and_a_step_the_optimizer_s(scripts, norm):
    config = ModelConfig(vocab_size=13, context_length=9, d_model=8, num_layers=2, num_heads=2, d_ff=12, norm=norm)
    model = TransformerLM(config).double()
    ids = torch.randint(13, (3, 10), generator=torch.Generator().manual_seed(0))
    loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    loss.backward()
    weights = {name: p.flatten().tolist() for name, p in model.named_parameters()}
    a = [vars(config), weights, ids[:, :-1].flatten().tolist(), ids[:, 1:].flatten().tolist(), 3, 9]
    found = scripts("learn", """(() => {
        const l = w.learner(), W = Object.fromEntries(Object.entries(a[1]).map(([name, x]) => [name, Float64Array.from(x)]));
        const { loss, gradients } = l.gradients(a[0], W, a[2], a[3], a[4], a[5]), G = structuredClone(gradients);
        const length = l.update(W, gradients, {}, 1, .02), lists = o => Object.fromEntries(Object.entries(o).map(([n, x]) => [n, [...x]]));
        return { loss, length, gradients: lists(G), weights: lists(W) };
    })()""", a)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for name, p in model.named_parameters():
        theirs = torch.tensor(found["gradients"][name]).view_as(p.grad)
        assert (theirs - p.grad).norm() <= 1e-4 * p.grad.norm(), name
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    AdamW(model.parameters(), 0.02, weight_decay=1e-4).step()
    assert found["length"] == pytest.approx(norm.item(), rel=1e-4)
    for name, p in model.named_parameters():
        assert np.allclose(found["weights"][name], p.detach().flatten(), atol=1e-4), name


def test_the_rate_of_a_step_is_the_book_s(scripts):
    a = {"lr": 0.02, "warmup_iters": 5, "cosine_cycle_iters": 40}
    found = scripts("learn", "Array.from({ length: 40 }, (_, i) => w.learner().rateAt(i + 1, a))", a)
    assert found == pytest.approx([cosine_lr(step, 0.02, 0.002, 5, 40) for step in range(1, 41)])
