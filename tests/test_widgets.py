"""The pictures that a reader can touch: the model in the page is PyTorch's, and mouse and keyboard move each widget."""
import json
import random
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import torch
from build_site import copy_project, stand_in
from conftest import CHAPTERS, ROOT, served
from nbformat.v4 import new_code_cell, new_notebook
from shrink import renewed
from test_jupyterlab import KERNEL, lab, start  # noqa: F401  (a fixture)
from test_site import watched

from tinylm.fables import fables
from tinylm.generate import next_token_probs, start_ids
from tinylm.model import causal_mask, scaled_dot_product_attention
from tinylm.train import load_run
from tinylm.widgets import Widget

STORY = next(fables(1, seed=1))
SCRIPTS = re.compile(r"(?s)<script[^>]*>(.*?)</script>")
NASTY = ["", " ", "  a", "\r\n\r\n  \t x\n", "it's  \n  end  ", "don't we'll I'D 'S ’s",
         "<|endoftext|><|endoftext|>\n<|endof", "a\x85b \xa0\ufeffx\ufeff", "\ufeffstart", "\x1c\x1d x\x00\x7f",
         "\u2028\u2029\u3000 \u180e\u200b x\u1680\u202f\u205fz", "héllo e\u0301 \u0300", "日本語 テスト",
         "👩\u200d👩\u200d👧 \U0001f600", "१२३ ½ Ⅷ x²", "a" * 50, "one\ud800two", STORY]
HOW = [(1300, "light", "mouse"), (390, "dark", "mouse"), (1300, "dark", "keyboard"), (390, "light", "keyboard")]


@pytest.fixture(scope="module")
def trained():
    return load_run("tinylm")


@pytest.fixture(scope="module")
def page(browser):
    "A page that has the model as `window.model`, and the functions of model.js as `window.book`."
    page = browser.new_page()
    with served(ROOT) as address:
        page.goto(f"{address}nbs/images/")
        page.evaluate("""async () => {
            window.book = await import("/nbs/files/model.js");
            const file = await fetch("/tinylm/tinylm.safetensors");
            window.model = new book.Model(await file.arrayBuffer()); }""")
        yield page
    page.close()


def test_the_model_in_the_page_is_pytorchs(page, trained):
    "After each layer, in each head, and in the logits; of the int8 file, whose own error chapter 05 measures."
    model, tokenizer, _ = trained
    ids = start_ids(tokenizer, STORY)
    theirs = page.evaluate("""ids => { const reader = new book.Reader(model); return JSON.stringify(ids.map(id => {
        const { logits, attention, stream } = reader.read(id);
        return [Array.from(logits), stream.map(x => Array.from(x)), attention.map(heads => heads.map(w =>
            [...w, ...Array(ids.length - w.length).fill(0)]))]; })); }""", ids)
    logits, stream, attention = (torch.tensor(part) for part in zip(*json.loads(theirs), strict=True))
    with torch.inference_mode():
        x = model.token_embeddings(torch.tensor([ids]))
        for number, layer in enumerate(model.layers):
            q, k, _ = layer.attn.project(layer.ln1(x))
            each = torch.eye(len(ids)).expand(*k.shape[:2], -1, -1)  # as values, they show the weights
            ours = scaled_dot_product_attention(q, k, each, causal_mask(len(ids)))[0]
            torch.testing.assert_close(attention[:, number].transpose(0, 1), ours, atol=1e-5, rtol=1e-4)
            x = layer(x)
            torch.testing.assert_close(stream[:, number], x[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits, model(torch.tensor([ids]))[0], atol=1e-4, rtol=1e-4)


def test_past_the_context_the_page_goes_on_with_the_last_half(page, trained):
    model, _, config = trained
    ids = [i % 1700 for i in range(7, 7 + config.context_length + 20)]
    last = page.evaluate("ids => { const reader = new book.Reader(model); let out;"
                         "for (const id of ids) out = reader.read(id); return Array.from(out.logits); }", ids)
    with torch.inference_mode():
        ours = model(torch.tensor([ids[config.context_length // 2:]]))[0, -1]
    torch.testing.assert_close(torch.tensor(last), ours, atol=1e-3, rtol=1e-4)


def test_the_tokenizer_in_the_page_is_ours(page, trained):
    tokenizer, draw = trained[1], random.Random(0)
    letters = "".join(NASTY) + "'s't re\n\n  \t09½" * 9
    texts = NASTY + ["".join(draw.choices(letters, k=draw.randrange(30))) for _ in range(500)]
    codes = [[ord(c) for c in text] for text in texts]  # no JSON holds half a surrogate pair
    theirs = page.evaluate("""codes => codes.map(c => {
        const ids = model.tokenizer.encode(c.map(x => String.fromCodePoint(x)).join(""));
        return [ids, model.tokenizer.decode(ids)]; })""", codes)
    for text, (ids, back) in zip(texts, theirs, strict=True):
        assert ids == tokenizer.encode(text), ascii(text)
        assert back == tokenizer.decode(ids), ascii(text)
    broken = [[240, 159, 152], [255, 200, 195, 40], [237, 160, 128, 65]]
    theirs = page.evaluate("rows => rows.map(ids => model.tokenizer.decode(ids))", broken)
    assert theirs == list(map(tokenizer.decode, broken))


def test_choices_in_the_page_are_those_of_chapter_07(page):
    logits = 4 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    for temperature, k, p in [(1, 0, 1), (0, 0, 1), (0.5, 5, 1), (2, 0, 0.9), (0.8, 20, 0.7), (3, 50, 0.01)]:
        theirs = page.evaluate("([logits, ...knobs]) => Array.from(book.reshape(logits, ...knobs))",
                               [logits.tolist(), temperature, k, p])
        ours = next_token_probs(logits[None], temperature, k or None, p)[0]
        torch.testing.assert_close(torch.tensor(theirs, dtype=torch.float32), ours, atol=1e-6, rtol=1e-4)
    assert page.evaluate("[0, 0.49, 0.5, 0.99, 1].map(u => book.draw([0.5, 0, 0.5, 0], u))") == [0, 0, 2, 2, 2]


# --- how they are stored


def stored() -> list[tuple[str, str]]:
    "The widgets in the notebooks: chapter and HTML."
    found = []
    for path in CHAPTERS:
        outputs = [o for cell in json.loads(path.read_text("utf-8"))["cells"] for o in cell.get("outputs", [])]
        shown = ["".join(output.get("data", {}).get("text/html", "")) for output in outputs]
        found += [(path.stem, html) for html in shown if 'class="tinylm"' in html]
    return found


def test_stored_widgets_have_the_scripts_of_today_and_a_picture():
    assert {"index", "07_generate"} <= {chapter for chapter, _ in stored()}
    [meter] = [html for chapter, html in stored() if chapter == "index"]
    assert meter in (ROOT / "nbs/_live.md").read_text(encoding="utf-8"), "python tests/shrink.py --scripts nbs/*.ipynb"
    size: dict[str, int] = {}
    for chapter, html in stored():
        assert renewed(html) == html, f"{chapter}: python tests/shrink.py --scripts nbs/*.ipynb"
        picture, _, rest = html.partition("</div>\n<style>")
        assert re.search(r'<img alt="[^"]+" src="data:image/png|<svg|<table|<pre|<p', picture), chapter
        [script] = SCRIPTS.findall(rest)
        assert not re.search(r"https?://(?!www\.w3\.org)", script), chapter
        size[chapter] = size.get(chapter, 0) + len(re.sub(r"(?m)^  const values = .*$", "", script).encode())
    assert max(size.values()) <= 60_000, size


def test_the_picture_stays_where_a_script_fails_or_is_missing(browser, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("files").mkdir()
    for name in ("widget.css", "widget.html"):
        shutil.copy(ROOT / "nbs/files" / name, "files")
    Path("files/part.js").write_text("export const more = 1;\n", encoding="utf-8")
    Path("files/good.js").write_text('import { more } from "./part.js";\nexport default { render({ model, el }) '
                                     '{ el.textContent = model.get("x") + more; } };\n', encoding="utf-8")
    Path("files/bad.js").write_text('export default { render() { throw new Error("planted"); } };\n', encoding="utf-8")
    shown = [Widget(name, "<b>still</b>", x="</script>")._repr_html_() for name in ("good", "bad", "missing")]
    assert "<script" not in shown[2]
    page = browser.new_page()
    faults = watched(page)
    page.set_content("\n".join(shown))
    page.wait_for_selector("[data-live]")
    assert page.eval_on_selector_all(".tinylm", "all => all.map(e => e.innerText)") == ["</script>1", "still", "still"]
    assert faults == ["script: planted"]
    page.close()


# --- on the site, and in JupyterLab


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "The first page and the chapters that have widgets, by the stand-in of build_site.py."
    pytest.importorskip("smalldocs", reason="no stand-in for Quarto")
    project = copy_project(ROOT, tmp_path_factory.mktemp("project"))
    for path in (project / "nbs").glob("*.ipynb"):
        if path.stem not in dict(stored()):
            path.unlink()
    stand_in(project, project / "_docs")
    return project / "_docs"


@pytest.fixture(params=HOW, ids=lambda how: "-".join(map(str, how)))
def visit(request, site, browser):
    "Open a page of the site at one width and in one scheme; what goes wrong there fails the test."
    width, scheme, hand = request.param
    page = browser.new_page(viewport={"width": width, "height": 840}, color_scheme=scheme)
    faults = watched(page)
    with served(site) as address:
        def go(name: str, widget: str):
            page.goto(address + name)
            page.wait_for_selector(f'.tinylm[data-live="{widget}"]')
            back = page.eval_on_selector(".tinylm", "e => getComputedStyle(e).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", back)[:3])) < 200) == (scheme == "dark"), back
            return page, hand == "keyboard"

        yield go
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
    assert faults == []


def test_the_surprise_meter_reacts(visit):
    "Choose the second Maya of the fable, look at another head, have a story told and stop it."
    page, by_keyboard = visit("index.html", "surprise")
    words, read = page.locator(".w"), "all => all.map(e => +e.dataset.nats.split(' ')[1])"
    stored = page.eval_on_selector_all(".w", read)
    at = [text.strip() for text in words.all_inner_texts()].index("Maya")
    page.locator(".surprise label input").press("Home")  # early in its training the name is a surprise
    assert float(words.nth(at).get_attribute("data-nats").split()[1]) > 5
    if by_keyboard:
        words.first.focus()
        for _ in range(at % 10):
            page.keyboard.press("ArrowRight")
        for _ in range(at // 10):
            page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
    else:
        words.nth(at).click()
    page.wait_for_selector(".heads", timeout=60_000)
    computed, panel = page.eval_on_selector_all(".w", read), page.locator(".panel").inner_text()
    assert computed == pytest.approx(stored, abs=2e-4) and len(stored) == len(STORY.split())
    assert re.search(r"Maya\s+(100|9\d)%", panel) and re.search(r"looks at Maya\. (100|9\d)%", panel)
    assert "color-mix" in (words.nth(7).get_attribute("style") or "")  # the name, where it was said first
    grammar, model, one_back = map(float, words.nth(at).get_attribute("data-nats").split())
    assert grammar == 0 and model < 0.05 and one_back > 3
    other = page.locator(".heads button").first
    assert other.get_attribute("aria-pressed") == "false"
    other.focus() if by_keyboard else other.click()
    page.keyboard.press("Enter") if by_keyboard else None
    assert other.get_attribute("aria-pressed") == "true"
    begin, tell = page.locator(".begin"), page.locator("button.main")
    begin.fill("There once lived a shy fox named")
    begin.press("Enter") if by_keyboard else tell.click()
    page.wait_for_function("document.querySelectorAll('.w').length > 12", timeout=60_000)
    assert tell.inner_text() == "Stop" or words.count() > 40
    tell.press("Enter") if by_keyboard else tell.click()
    page.wait_for_function("document.querySelector('button.main').textContent === 'Tell'", timeout=60_000)
    assert " ".join(words.all_inner_texts()).startswith("There once lived a shy fox named")
    assert re.match(r"\d+ tokens, \d+ a second", page.locator("[role=status]").inner_text())
    words.nth(3).click()
    page.wait_for_selector(".heads", timeout=60_000)
    page.click("text=Back to the fable")
    assert words.nth(5).inner_text().strip() == "mouse"


def test_the_knobs_of_sampling_react(visit):
    page, by_keyboard = visit("nbs/07_generate.html", "sampling")
    knobs, shares = page.locator(".knobs input"), page.locator(".option span:last-child")

    def turn(knob: int, key: str, x: float) -> list[str]:
        if by_keyboard:
            knobs.nth(knob).press(key)
        else:
            box = knobs.nth(knob).bounding_box()
            knobs.nth(knob).click(position={"x": box["width"] * x, "y": box["height"] / 2})
        return shares.all_inner_texts()

    start = shares.all_inner_texts()
    hot = turn(0, "End", 0.99)
    assert float(hot[-1].rstrip("%")) > 50 > float(start[-1].rstrip("%").lstrip("<"))
    assert turn(1, "Home", 0.01)[1:] == ["0"] * 12
    page.click(".sampling button.main") if not by_keyboard else page.locator(".sampling button.main").press("Enter")
    assert page.locator(".drawn").inner_text().split(",")[0] in page.locator(".option span").first.inner_text()
    assert page.locator(".drawn").inner_text().count(",") == 19
    page.click("text=Reset")
    assert shares.all_inner_texts() == start
    cut = turn(2, "Home", 0.01)
    assert cut[0] == "100.0%" and "1 of 1792" in page.locator(".sampling .note.num").inner_text()


LAB = '''from tinylm.widgets import Widget
words = [["There", 1, 1, 1], [" once", 0, 0, 0], [" lived", 0, 0, 0]]
Widget("surprise", "<p>still</p>", words=words, begin="There once lived")'''


@pytest.mark.book
@pytest.mark.timeout(600)
def test_the_surprise_meter_in_jupyterlab(browser, lab):  # noqa: F811
    root, address = lab
    shutil.copytree(ROOT / "nbs/files", root / "files")
    nbformat.write(new_notebook(cells=[new_code_cell(LAB)], metadata={"kernelspec": KERNEL}), root / "live.ipynb")
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    faults = watched(page)
    page.goto(address)
    page.wait_for_function("window.jupyterapp", timeout=60_000)
    page.evaluate("Promise.all([jupyterapp.restored, jupyterapp.serviceManager.ready]).then(() => true)")
    start(page, "live.ipynb")
    page.wait_for_selector(".tinylm[data-live]", timeout=60_000)
    page.click(".w >> nth=1")
    page.wait_for_selector(".heads", timeout=60_000)
    assert "once" in page.locator(".panel").inner_text()
    page.click(".tinylm button.main")
    page.wait_for_function("document.querySelectorAll('.w').length > 12", timeout=60_000)
    page.close()
    assert [fault for fault in faults if "leaves" in fault or "script" in fault] == []
