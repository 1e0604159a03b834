"""The widgets of six chapters in a real browser: what they compute equals the book's Python, and they react."""
import math
import random
from dataclasses import replace

import nbformat
import numpy as np
import pytest
import regex
import torch
from conftest import ROOT, served
from nbformat.v4 import new_code_cell, new_notebook
from test_jupyterlab import KERNEL, lab, start  # noqa: F401  (a fixture)
from test_site import watched
from test_widgets import site, stored  # noqa: F401  (a fixture)

from tinylm.ablations import Difference
from tinylm.model import ModelConfig, TransformerLM, flops_per_token, memory_table, parameter_table
from tinylm.optim import AdamW, cosine_lr, cross_entropy
from tinylm.recipe import Muon
from tinylm.rope import RotaryPositionalEmbedding
from tinylm.tokenizer import PRETOKEN_PATTERN, train_bpe_naive

PAGES = {"bpe": "00_tokenizer", "rope": "02_rope", "calculator": "03_model", "valley": "04_optim", "learn": "05_train",
         "records": "06_ablations"}


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
    letters = "aaab'stdrevlmé中👍🏽1٣²½_.?Ωǅ  \t\n\r\v\f"
    letters += "\x1c\x1f\x85\xa0\u0301\u1680\u180e\u2000\u200b\u200d\u2028\u202f\u3000\ufeff\ufffd"
    texts = ["", " ", "a", "aaaaaaa aaaa", "There's the thin THE then\n\n  they'll  'd go",
             "naïve café 東京東京 👩‍👩‍👧 👍👍",
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
    found = scripts("rope", "a[2].map(at => w.score(a[0], a[1], ...at, 10000))", [query, key, places])
    rope = RotaryPositionalEmbedding(10_000.0, 8, 32)
    q, k = (rope(torch.tensor(x).expand(32, -1)) for x in (query, key))
    assert found == pytest.approx([(q[m] @ k[n]).item() for m, n in places], abs=1e-5)
    moved = scripts("rope", "a[2].map(i => w.score(a[0], a[1], 7 + i, 5 + i, 10000))", [query, key, [*range(25)]])
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


class Momentum:
    "The chapter's rule; with beta 0 it is plain descent. (The first use of torch.optim takes seconds.)"

    def __init__(self, params, beta):
        [self.w], self.beta, self.m = params, beta, torch.zeros(1, 2, dtype=torch.float64)

    def step(self):
        self.m.lerp_(self.w.grad, 1 - self.beta)
        self.w.data -= 0.07 * self.m


@pytest.mark.parametrize("name, make", [
    ("SGD", lambda p: Momentum(p, 0.0)),
    ("momentum", lambda p: Momentum(p, 0.9)),
    ("Adam", lambda p: AdamW(p, 0.07, betas=(0.9, 0.999), weight_decay=0.0)),
    ("Muon", lambda p: Muon(p, 0.07, momentum=0.9)),
])
def test_paths_equal_those_of_the_optimizers(scripts, name, make):
    w = torch.nn.Parameter(torch.tensor([[-9.0, 2.5]], dtype=torch.float64))
    optimizer, path = make([w]), [w[0].tolist()]
    for _ in range(30):
        w.grad = w.detach() * torch.tensor([[1.0, 25.0]])
        optimizer.step()
        path.append(w[0].tolist())
    assert np.allclose(scripts("valley", "w.walk(a, .07, .9, 25, 30, [-9, 2.5])", name), path, rtol=1e-6, atol=1e-9)


def test_differences_and_their_intervals_equal_the_chapter_s(scripts):
    dice = np.random.default_rng(0)
    for seeds in (1, 2, 3, 5, 6):
        ours, base = ({seed: float(x) for seed, x in enumerate(dice.normal(size=seeds))} for _ in range(2))
        found, expected = scripts("records", "w.difference(...a)", [ours, base]), Difference(ours, base)
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
        const each = (o, f) => Object.fromEntries(Object.entries(o).map(([name, x]) => [name, f(x)]));
        const l = w.learner(), W = each(a[1], x => Float64Array.from(x));
        const { loss, gradients } = l.gradients(a[0], W, ...a.slice(2)), lists = each(gradients, x => [...x]);
        const length = l.update(W, gradients, {}, 1, .02);
        return { loss, length, gradients: lists, weights: each(W, x => [...x]) };
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


def test_the_model_learns_in_the_page(scripts):
    "A text that repeats itself is learned in thirty steps; without norms and at a wild rate it is not."
    shape = {"vocab_size": 12, "context_length": 24, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24,
             "rope_theta": 10_000, "lr": 0.02, "batch_size": 4, "warmup_iters": 5, "cosine_cycle_iters": 40,
             "eval_every": 40}
    curves = scripts("learn", """a.map(shape => {
        const said = [], tokens = Int32Array.from({ length: 600 }, (_, i) => i % 12);
        w.learner().learn(shape, tokens, tokens.slice(0, 100), 0, message => said.push(message));
        return said;
    })""", [shape, {**shape, "lr": 3.0, "norm": "none"}])
    assert curves[0][-1]["valid"] < 0.1 < 2 < curves[0][0]["loss"] and curves[0][-1]["said"][:3] == [1, 2, 3]
    assert curves[1][-1].get("died") or curves[1][-1]["valid"] > 2


# --- each widget as its chapter has stored it


def text_of(page, selector: str) -> str:
    return page.inner_text(selector)


def press(page, selector: str, *keys: str):
    page.focus(selector)
    for key in keys:
        page.keyboard.press(key)


def drag(page, selector: str, by_x: int, by_y: int = 0):
    page.locator(selector).first.scroll_into_view_if_needed()
    box = page.locator(selector).first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + by_x, y + by_y, steps=4)
    page.mouse.up()


def drive_bpe(page):
    page.click(".bpe >> text=merge ▶")
    assert "Merge 1: h + e → he, token 256" in text_of(page, ".bpe")
    press(page, ".bpe input[type=range]", "ArrowRight", "ArrowRight")
    assert "Merge 3:" in text_of(page, ".bpe") and page.locator(".bpe .token.new").count() > 1
    page.click(".bpe >> text=◀")
    page.click(".bpe summary")
    assert "Merge 2:" in text_of(page, ".bpe") and " × " in text_of(page, ".bpe details")
    page.fill(".bpe textarea", "ab ab é")
    assert "No merge yet" in text_of(page, ".bpe") and "‹c3›" in text_of(page, ".bpe .text")


def drive_rope(page):
    def score():
        return text_of(page, ".rope p[aria-live]").split("Score ")[1][:6]

    before, moved = score(), page.get_attribute("[data-what=query]", "aria-valuenow")
    drag(page, "[data-what=both] >> rect >> nth=1", 60)
    press(page, "[data-what=both]", "ArrowRight")
    assert score() == before and page.get_attribute("[data-what=query]", "aria-valuenow") != moved
    press(page, "[data-what=key]", "ArrowLeft")
    after = score()
    drag(page, "[data-what=query]", 80)
    assert before != after != score()


def drive_calculator(page):
    page.click(".calculator button:has-text('reference')")
    assert text_of(page, "[data-total=parameters]") == "22,696,448"
    assert text_of(page, "[data-total=time]") == "5.3 days"
    memory = text_of(page, "[data-total='memory of a step']")
    press(page, ".calculator [data-name=batch_size]", "ArrowRight")
    assert text_of(page, "[data-total=parameters]") == "22,696,448"
    assert text_of(page, "[data-total='memory of a step']") != memory
    page.locator(".calculator [data-name=num_heads]").click(position={"x": 3, "y": 5})  # one head
    press(page, ".calculator [data-name=num_heads]", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight")
    assert "No such model" in text_of(page, ".calculator")


def drive_valley(page):
    loss = text_of(page, "[data-loss=SGD]")
    press(page, ".valley [aria-label=rate]", *["ArrowRight"] * 20)
    assert text_of(page, "[data-loss=SGD]") == "flew out" != loss
    press(page, ".valley [aria-label=curvature]", *["ArrowLeft"] * 20)
    assert text_of(page, "[data-loss=SGD]") != "flew out"
    adam = text_of(page, "[data-loss=Adam]")
    drag(page, ".valley .start", 60, 20)
    assert text_of(page, "[data-loss=Adam]") != adam
    page.click(".valley >> text=Muon")
    assert page.locator("[data-loss=Muon]").count() == 0
    page.click(".valley >> text=▶ run")
    page.wait_for_function("document.querySelector('.valley').innerText.includes('after 3 steps')")


def drive_records(page):
    assert "post-norm" in text_of(page, "[data-row=post-norm]")
    press(page, ".records [aria-label=rate]", "ArrowRight")
    at = text_of(page, ".records th")
    page.locator(".records .hit").first.click()
    assert text_of(page, ".records th") not in (at, "") and page.locator(".records svg polyline").count() > 5
    page.select_option(".records select", "tinystories")
    page.click(".records >> text=silu")
    assert page.locator("[data-row=silu]").count() == 0 and "±" in text_of(page, "[data-row=nope]")


def drive_learn(page):
    for broken in ([], ["no norm"]):
        for name in broken:
            press(page, f"[data-switch='{name}']", "Space")
        page.click(".learn .main")
        page.wait_for_function("/Step \\d+ of/.test(document.querySelector('.learn').innerText)")
        page.click(".learn .main")
        assert "Stopped" in text_of(page, ".learn")
    assert page.locator(".learn svg polyline").count() == 2 and "no norm" in page.text_content(".learn svg")


@pytest.mark.parametrize("width, scheme", [(1300, "light"), (390, "dark")])
def test_each_widget_reacts_on_its_page_of_the_site(browser, site, width, scheme):  # noqa: F811
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    faults = watched(page)
    with served(site) as address:
        for name, chapter in PAGES.items():
            page.goto(f"{address}nbs/{chapter}.html")
            page.wait_for_selector(f'[data-live="{name}"]')
            globals()[f"drive_{name}"](page)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
    page.close()
    assert faults == []


@pytest.mark.book
@pytest.mark.timeout(600)
def test_each_widget_reacts_in_jupyterlab(browser, lab):  # noqa: F811
    "As its chapter has stored it, shown by a cell that is run there."
    root, address = lab
    shown = [html for name in PAGES for _, html in stored() if f'dataset.live = "{name}"' in html]
    cells = [new_code_cell(f"import IPython.display as show\nshow.HTML({html!r})") for html in shown]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), root / "live.ipynb")
    page = browser.new_page(viewport={"width": 1300, "height": 2400})
    page.goto(address)
    page.wait_for_function("window.jupyterapp", timeout=60_000)
    page.evaluate("Promise.all([jupyterapp.restored, jupyterapp.serviceManager.ready]).then(() => true)")
    start(page, "live.ipynb")
    for name in PAGES:
        page.locator(f'[data-live="{name}"]').scroll_into_view_if_needed(timeout=60_000)
        globals()[f"drive_{name}"](page)
    page.close()
