"""The site as its readers meet it: built anew, its links followed, its pages opened in a browser.

Where Quarto is not on PATH, `site` is made by a stand-in (see build_site.py), which forgives much that Quarto does not:
it once showed well a site of which Quarto made every code block a single line. So each test below that uses `site` says
what it proves of the real one; and what Quarto and pandoc make of the pages is tested without Quarto, on the filter's
own output, which goes through the real pandoc.
"""
import copy
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import yaml
from build_site import build, copy_project, filter_all
from conftest import CHAPTERS, ROOT, served

sys.path.insert(0, str(ROOT / "nbs"))
import _filter as nbs_filter  # noqa: E402
import _functions as functions  # noqa: E402

HOME = "https://tinylm.github.io/tinylm/"
OURS = re.compile(r"https://(?:github\.com|colab\.research\.google\.com/github)/tinylm/tinylm/(?:blob|tree)/main/"
                  r"([^?#]+)(?:#L(\w+))?.*")  # a file of the repository, and a line of it
CONFIG = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
DIRECTIVE = re.compile(r"^\s*(#\s*(\||NBVAL).*|:::.*|.*\bshow_doc\(.*)$", re.MULTILINE)  # for nbdev, nbval, Quarto
SIZES = {"desktop": (1300, 900), "phone": (390, 800)}
SCHEMES = {"desktop": "light", "phone": "dark"}


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    if not shutil.which("quarto"):
        pytest.importorskip("smalldocs", reason="neither Quarto nor its stand-in")
    return build(copy_project(ROOT, tmp_path_factory.mktemp("project")))


class Page(HTMLParser):
    "The links and anchors of a page."

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.anchors = [], {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        self.links += [attrs[k] for k in ("href", "src") if attrs.get(k)]


def in_repository(path: str, line: str | None) -> bool:
    "Whether there is such a file, and a definition in that line of it."
    if line is None or not (ROOT / path).is_file():
        return (ROOT / path).exists()
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return line.isdigit() and bool(re.match(r"\s*(def|class|async def) ", lines[int(line) - 1]))


def in_site(link: str, path: Path, site: Path, pages: dict[Path, Page]) -> bool:
    "Whether a link from a page leads to a file of the site, and to an anchor in it."
    target, anchor = urldefrag(link)
    start, target = (site, target[len(HOME):]) if target.startswith(HOME) else (path.parent, target or path.name)
    file = (start / unquote(target)).resolve()
    file = file / "index.html" if file.is_dir() else file
    return file.exists() and (file not in pages or unquote(anchor) in pages[file].anchors)


def broken_links(site: Path) -> list[str]:
    "Links within the site, or into the repository, that lead nowhere."
    pages = {path: Page(path) for path in site.resolve().rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            if ours := OURS.fullmatch(link):
                good = in_repository(unquote(ours[1]), ours[2]) or ours[1] == "nbs/functions.md"  # made when rendering
            else:
                abroad = re.match(r"[a-z]+:|//", link) and not link.startswith(HOME)
                good = abroad or in_site(link, path, site, pages)
            if not good:
                broken.append(f"{path.name}: {link}")
    return broken


def watched(page) -> list[str]:
    "A list that gets what goes wrong from now on: complaints on the console, requests that leave the machine."
    faults = []
    page.on("console", lambda m: m.type == "error" and not m.location["url"].endswith("/favicon.ico")
            and faults.append(f"console: {m.text}"))
    page.on("pageerror", lambda e: faults.append(f"script: {e}"))
    page.on("request", lambda r: r.url.startswith(("http://127.0.0.1", "data:", "blob:"))
            or faults.append(f"request leaves the machine: {r.url}"))
    return faults


def seen_faults(page) -> list[str]:
    "What a reader would see go wrong on the page that is open."
    page.wait_for_load_state()  # until all that it loads is there
    faults = [f"directive: {m[0]}" for m in DIRECTIVE.finditer(page.inner_text("body"))]
    faults += [f"picture without alt text: {src[:60]}" for src in page.eval_on_selector_all(
        "img, svg[role=img]", "all => all.filter(e => !(e.alt || e.getAttribute('aria-label'))).map(e => e.src || '')")]
    if page.evaluate("document.documentElement.scrollWidth") > page.viewport_size["width"]:
        faults.append("wider than the window")
    return faults


def listed(contents: list) -> list[str]:
    "The pages that a sidebar lists, with those of its sections."
    return [href for entry in contents for href in ([entry["href"]] if "href" in entry else []) +
            listed(entry.get("contents", []))]


def config_faults(config: dict) -> list[str]:
    "Pages that the sidebar lists and that do not exist, and chapters that it does not list once and in reading order."
    pages = listed(config["website"]["sidebar"]["contents"])
    chapters = [f"nbs/{path.name}" for path in CHAPTERS]
    made = {"nbs/functions.md"}  # before rendering
    faults = [f"{page} does not exist" for page in pages if not (ROOT / page).exists() and page not in made]
    faults += [f"{page} is listed {pages.count(page)} times" for page in chapters if pages.count(page) != 1]
    numbers = [page[4:6] for page in pages if re.match(r"nbs/\d\d_", page)]
    return faults or ["the sidebar is not in reading order"] * (numbers != sorted(numbers))


def test_config_lists_every_chapter_once():
    assert config_faults(CONFIG) == []
    assert CONFIG["execute"] == {"enabled": False} and (ROOT / CONFIG["ipynb-filters"][0]).exists()


@pytest.mark.parametrize("plant, fault", [
    (lambda chapters: chapters.append({"href": "nbs/99_none.ipynb"}), "nbs/99_none.ipynb does not exist"),
    (lambda chapters: chapters.append(chapters[3]), "nbs/02_rope.ipynb is listed 2 times"),
    (lambda chapters: chapters.pop(3), "nbs/02_rope.ipynb is listed 0 times"),
    (lambda chapters: chapters.reverse(), "the sidebar is not in reading order"),
])
def test_planted_fault_in_the_config_is_seen(plant, fault):
    config = copy.deepcopy(CONFIG)
    chapters = next(c["contents"] for c in config["website"]["sidebar"]["contents"] if "contents" in c)
    plant(chapters)
    assert config_faults(config) == [fault]


# --- what Quarto gets from the filter, and what pandoc makes of it: true of the real site too


@pytest.fixture(scope="session")
def filtered(tmp_path_factory) -> dict[str, list[dict]]:
    "The cells of each chapter's page, as the filter hands them to Quarto."
    project = copy_project(ROOT, tmp_path_factory.mktemp("filtered"))
    filter_all(project)
    return {path.stem: json.loads((project / "nbs" / path.name).read_text("utf-8"))["cells"] for path in CHAPTERS}


def as_quarto_reads(cells: list[dict]) -> str:
    """The Markdown that Quarto hands to pandoc. A source that is a string it splits into lines without their newlines,
    and it glues the lines of all sources together as they are."""
    parts = []
    for cell in cells:
        source = cell["source"].split("\n") if isinstance(cell["source"], str) else cell["source"]
        if cell["cell_type"] == "code":
            code = "".join(line for line in source if not line.startswith("#|"))
            parts.append(f"``` python\n{code}\n```")
        else:
            parts.append("".join(source))
    return "\n\n".join(parts)


def pandoc_faults(cells: list[dict]) -> list[str]:
    "What a reader would see go wrong on the page that the real pandoc makes of these cells."
    pypandoc = pytest.importorskip("pypandoc", reason="pandoc is not at hand (pip install pypandoc_binary)")
    html = pypandoc.convert_text(as_quarto_reads(cells), "html", format="markdown+raw_html", extra_args=["--mathml"])
    headings = [re.sub("<annotation.*?</annotation>|<[^>]*>", "", h)
                for h in re.findall(r"(?s)<h[1-6][^>]*>(.*?)</h[1-6]>", html)]
    blocks = [block.rstrip("\n") for block in re.findall(r"(?s)<pre[^>]*>(.*?)</pre>", html)]
    text = re.sub(r"(?s)<(pre|code|math|style|script)\b.*?</\1>", "", html)
    faults = [f"heading of {len(h)} characters: {h[:40]}" for h in headings if len(h) > 90]
    faults += ["no code block has several lines"] * (bool(blocks) and not any("\n" in block for block in blocks))
    faults += [f"shown as text: {found}" for found in re.findall(r"description:.*|::: ?\{.*|(?<= )–[a-z]\w+", text)]
    faults += [f"backslash in a table: {c}" for c in re.findall(r"<code>[^<]*\\\|[^<]*</code>", html)]
    return faults


def string_sources(cells: list[dict]) -> list[dict]:
    "The same cells with each source as one string, as the format of notebooks allows."
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


@pytest.mark.parametrize("name", [path.stem for path in CHAPTERS])
def test_every_source_is_a_list_of_lines_that_keep_their_newlines(filtered, name):
    for cell in filtered[name]:
        assert isinstance(cell["source"], list) and cell["source"]
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        assert all(line.count("\n") <= 1 for line in cell["source"])


@pytest.mark.parametrize("name", [path.stem for path in CHAPTERS])
def test_pandoc_makes_of_a_page_what_was_meant(filtered, name):
    assert pandoc_faults(filtered[name]) == []


def test_what_quarto_makes_of_string_sources_would_be_seen(filtered):
    faults = "\n".join(pandoc_faults(string_sources(filtered["01_layers"])))
    assert "no code block has several lines" in faults and "heading of" in faults and "description:" in faults
    table = [{"cell_type": "markdown", "source": ["| a | b |\n", "|---|---|\n", "| `x \\| y` | with --resume |\n"]}]
    assert len(pandoc_faults(table)) == 2


def test_exported_code_is_on_the_page(filtered):
    "Folded where the notebook says `export`, in sight where it says `exports`; nbdev alone would leave the first out."
    for path in CHAPTERS:
        cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        shown = "".join("".join(cell["source"]) for cell in filtered[path.stem])
        for source in ("".join(cell["source"]) for cell in cells):
            if re.match(r"#\| *exports?\b", source):
                assert source.partition("\n")[2] in shown, (path.name, source[:100])


def test_quarto_may_run_the_filter():
    "As Quarto runs it: in the folder of the notebook, which it must find out."
    path = ROOT / "nbs/01_layers.ipynb"
    result = subprocess.run([sys.executable, "_filter.py"], input=path.read_bytes(), cwd=path.parent,
                            capture_output=True, check=True)
    sources = ["".join(cell["source"]) for cell in json.loads(result.stdout)["cells"]]
    assert any("https://colab.research.google.com/github/" in source and path.name in source for source in sources)
    assert not any("# NBVAL" in source or "show_doc(" in source for source in sources)


@pytest.mark.parametrize("text, linked", [
    ("See chapter 05.", "See [chapter 05](05_train.ipynb)."),
    ("Chapters 01 to 03, and 05", "Chapters [01](01_layers.ipynb) to [03](03_model.ipynb), and [05](05_train.ipynb)"),
    ("of chapter 03 and 2 more", "of [chapter 03](03_model.ipynb) and 2 more"),
    ("here, in chapter 02", "here, in chapter 02"),
    ("chapter 77", "chapter 77"),
    ("## From chapter 05\n\nChapter 03", "## From chapter 05\n\n[Chapter 03](03_model.ipynb)"),
    ("`chapter 05`, [chapter 05](x.md), $chapter 05$", "`chapter 05`, [chapter 05](x.md), $chapter 05$"),
    ("```\nchapter 05\n```", "```\nchapter 05\n```"),
])
def test_each_chapter_that_prose_names_is_a_link(text, linked):
    numbers = {path.name[:2]: path.name for path in CHAPTERS}
    assert nbs_filter.link_numbers(text, numbers, "02_rope.ipynb") == linked


def test_a_chapter_opens_with_what_it_takes_and_its_answers_are_folded():
    def code(source: str) -> dict:
        return {"cell_type": "code", "source": source, "outputs": [], "metadata": {}}

    def text(source: str) -> dict:
        return {"cell_type": "markdown", "source": source, "metadata": {}}

    cells = [text("# Layers\n\n> Small parts.\n\nWe build them."), code("import math\nimport os"),
             text("### Exercise 1.1\n\nTwice?"), code('#| solution\n#| code-fold: true\n2 * 2'),
             code("#| solution\n4"), text("On.")]
    page = nbs_filter.page({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5},
                           ROOT / "nbs/01_layers.ipynb")
    sources = ["".join(cell["source"]) for cell in page["cells"]]
    [opening] = [source for source in sources if source.startswith("::: {.chapter-facts}")]
    assert "About 5 minutes · needs [00 Tokenizer](00_tokenizer.ipynb) · 1 exercise\n" in opening
    assert "01_layers.ipynb" in opening and opening.endswith("We build them.")
    assert '#| code-fold: true\n#| code-summary: "Set-up"\nimport math\nimport os' in sources
    at = sources.index('::: {.callout-tip collapse="true"}\n## Answer')
    assert sources[at + 1:] == ["2 * 2", "4", ":::", "On."]


def test_every_public_name_stands_in_the_index_of_functions():
    rows = [row for path in CHAPTERS for row in functions.rows(path)]
    assert len(rows) > 100
    for row in rows:
        assert re.fullmatch(r"\| \[`\w+`\]\(\w+\.ipynb#def-\w+\) \| \S.* \| `tinylm\.\w+` \|", row)


def test_the_glossary_is_in_order_and_links_each_word():
    text = (ROOT / "nbs/glossary.md").read_text(encoding="utf-8").partition("## Words")[2]
    rows = re.findall(r"^\| (.+?) \| (.+) \| (.+) \|$", text, re.MULTILINE)[1:]
    words = [row[0] for row in rows if row[0] != "---"]
    assert words == sorted(words, key=str.lower)
    for word, _, where in rows:
        assert word == "---" or re.fullmatch(r"\[\d\d\]\(\w+\.ipynb\)(, \[\d\d\]\(\w+\.ipynb\))*", where), word


# --- the whole site, by Quarto or by the stand-in


def test_links_lead_somewhere(site):
    "By the stand-in: links name files that exist and headings that the source has. Quarto's anchors may be others."
    assert broken_links(site) == []


def exported(path: Path) -> list[str]:
    "The modules that a notebook exports to."
    source = path.read_text(encoding="utf-8")
    return re.findall(r'"#\| *(?:default_exp|exports?) +(\w+)', source)


def test_every_public_name_is_documented(site):
    "What is documented comes from the filter; that it looks well on the page, the stand-in does not prove."
    for path in CHAPTERS:
        html = (site / f"nbs/{path.stem}.html").read_text(encoding="utf-8")
        for module in dict.fromkeys(exported(path)):
            source = (ROOT / f"tinylm/{module}.py").read_text(encoding="utf-8")
            for name in re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", source, re.MULTILINE):
                found = re.search(rf"<h3[^>]*>(<[^>]*>)*{name}<(.*?)(<h[123]|$)", html, re.DOTALL)
                assert found, f"{path.name} does not document {name}"
                assert "<pre" in found[2] and "source" in found[2], f"{path.name}: {name} without call or source link"
                part = getattr(importlib.import_module(f"tinylm.{module}"), name)
                if inspect.isfunction(part) and nbs_filter.parameter_table(part):
                    assert "<table" in found[2], f"{path.name}: {name} without a table of its parameters"


def show_sidebar(page):
    page.wait_for_selector("#quarto-sidebar", state="attached")
    if page.is_visible(".quarto-btn-toggle"):  # on a phone
        page.click(".quarto-btn-toggle")
        page.wait_for_function("!document.querySelector('#quarto-sidebar.collapsing')")  # until it has unfolded


def go_by_sidebar(page, path: Path):
    show_sidebar(page)
    links = page.locator("#quarto-sidebar a.sidebar-link")
    found = links.evaluate_all("(all, end) => all.findIndex(e => e.href.endsWith(end))", f"/nbs/{path.stem}.html")
    links.nth(found if found >= 0 else 999).click()
    page.wait_for_url(f"**/nbs/{path.stem}.html")


def go_by_search(page, path: Path):
    "Search for the title of a chapter, and follow what is found."
    page.wait_for_selector("#quarto-sidebar", state="attached")
    if page.is_visible("button.quarto-search-button"):  # Quarto's, on a phone
        page.click("button.quarto-search-button")
    else:
        show_sidebar(page)
    title = json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"][0].strip("# \n")
    page.fill("#quarto-search input, .aa-Input", title)
    page.click(f":is(.smalldocs-search-results, .aa-Panel) a[href*='{path.stem}.html'] >> nth=0")
    page.wait_for_url(f"**/{path.stem}.html*")


@pytest.mark.parametrize("size, ways", [("desktop", (go_by_sidebar, go_by_search)),
                                        ("phone", (go_by_search, go_by_sidebar))], ids=["desktop", "phone"])
def test_sidebar_and_search_lead_to_every_chapter_and_all_is_well_there(site, browser, size, ways):
    """Each chapter is seen at both widths; what the sidebar leads to at one, the search leads to at the other.

    By the stand-in: scripts and pictures are well, nothing leaves the machine, pages are as wide as the phone by its
    own styles. Quarto's search, its styles (_site.scss) and its dark theme are seen only where Quarto is."""
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=SCHEMES[size])
    faults = watched(page)

    with served(site) as address:
        page.goto(address)
        page.wait_for_selector("#quarto-sidebar", state="attached")
        assert seen_faults(page) == []
        for path, go in zip(CHAPTERS, ways * len(CHAPTERS), strict=False):
            go(page, path)
            assert faults + seen_faults(page) == [], path.name
    page.close()
    assert faults == []


def test_planted_faults_are_seen(tmp_path, browser):
    (tmp_path / "index.html").write_text(
        '<link rel="icon" href="data:,"><a href="gone.html">1</a> <a href="#gone">2</a>'
        '<a href="https://github.com/tinylm/tinylm/blob/main/tinylm/data.py#LNone">3</a>'
        '<a href="https://github.com/tinylm/tinylm/blob/main/gone.md">4</a>'
        '<a href="https://tinylm.github.io/tinylm/gone.html">5</a> <a href="https://tinylm.github.io/tinylm/">good</a>'
        '<a href="https://github.com/tinylm/tinylm/blob/main/README.md">good</a> <a href="index.html">good</a>'
        '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="><pre>#| export</pre>'
        '<div style="width: 2000px">wide</div><script src="https://example.com/x.js"></script><script>oops()</script>'
        '<script>console.error("planted")</script>',
        encoding="utf-8")
    assert len(broken_links(tmp_path)) == 5
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.route("https://**", lambda route: route.abort())
    faults = watched(page)
    with served(tmp_path) as address:
        page.goto(address)
        said = "\n".join(faults + seen_faults(page))
    page.close()
    for fault in ("leaves the machine", "script: oops", "console: planted", "directive: #| export", "without alt text",
                  "wider"):
        assert fault in said
