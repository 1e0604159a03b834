"""The site as its readers meet it: built anew, its links followed, its pages opened in a browser."""
import importlib
import inspect
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import yaml
from build_site import build, copy_project
from conftest import CHAPTERS, ROOT, served

SOURCE = re.compile(r"https://github\.com/tinylm/tinylm/blob/main/(.+)#L(.+)")
DIRECTIVE = re.compile(r"^\s*(#\s*(\||NBVAL).*|:::.*|.*\bshow_doc\(.*)$", re.MULTILINE)  # for nbdev, nbval, Quarto
SIZES = {"desktop": (1300, 900), "phone": (390, 800)}
SCHEMES = {"desktop": "light", "phone": "dark"}


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    if not shutil.which("quarto"):
        pytest.importorskip("smalldocs", reason="neither Quarto nor its stand-in, which needs Python 3.11")
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


def broken_links(site: Path) -> list[str]:
    "Links within the site, or to a line of the source, that lead nowhere."
    pages = {path: Page(path) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(link)
            if source := SOURCE.fullmatch(link):
                lines = (ROOT / source[1]).read_text(encoding="utf-8").splitlines()
                good = source[2].isdigit() and re.match(r"\s*(def|class|async def) ", lines[int(source[2]) - 1])
            elif re.match(r"[a-z]+:|//", link):
                continue
            else:
                file = (path.parent / unquote(target)).resolve() if target else path
                file = file / "index.html" if file.is_dir() else file
                good = file.exists() and (file not in pages or unquote(anchor) in pages[file].anchors)
            if not good:
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


def seen_faults(page, address: str) -> list[str]:
    "What a reader would see go wrong on one page."
    faults = []
    page.on("console", lambda m: m.type == "error" and not m.location["url"].endswith("/favicon.ico")
            and faults.append(f"console: {m.text}"))
    page.on("pageerror", lambda e: faults.append(f"script: {e}"))
    page.on("request", lambda r: r.url.startswith(("http://127.0.0.1", "data:", "blob:"))
            or faults.append(f"request leaves the machine: {r.url}"))
    page.goto(address)  # until all that it loads is there
    faults += [f"directive: {m[0]}" for m in DIRECTIVE.finditer(page.inner_text("body"))]
    faults += [f"picture without alt text: {src[:60]}" for src in page.eval_on_selector_all(
        "img, svg[role=img]", "all => all.filter(e => !(e.alt || e.getAttribute('aria-label'))).map(e => e.src || '')")]
    if page.evaluate("document.documentElement.scrollWidth") > page.viewport_size["width"]:
        faults.append("wider than the window")
    return faults


def test_config_lists_every_chapter_once():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    first, chapters = config["website"]["sidebar"]["contents"]
    assert first["href"] == "README.md"
    assert [c["href"] for c in chapters["contents"]] == [f"nbs/{path.name}" for path in CHAPTERS]
    assert config["execute"] == {"enabled": False} and (ROOT / config["ipynb-filters"][0]).exists()


def test_links_lead_somewhere(site):
    assert broken_links(site) == []


def test_every_chapter_opens_in_colab(site):
    for path in CHAPTERS:
        html = (site / f"nbs/{path.stem}.html").read_text(encoding="utf-8")
        assert re.search(rf"https://colab\.research\.google\.com/github/[\w/.-]+/nbs/{path.name}", html), path.name


def test_every_public_name_is_documented(site):
    for path in CHAPTERS:
        module = path.stem.split("_", 1)[1]
        source = (ROOT / f"tinylm/{module}.py").read_text(encoding="utf-8")
        names = re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", source, re.MULTILINE)
        html = (site / f"nbs/{path.stem}.html").read_text(encoding="utf-8")
        for name in names:
            found = re.search(rf"<h3[^>]*>(<[^>]*>)*{name}<(.*?)(<h[123]|$)", html, re.DOTALL)
            assert found, f"{path.name} does not document {name}"
            assert "<pre" in found[2] and "source" in found[2], f"{path.name}: {name} without signature or source link"
            part = getattr(importlib.import_module(f"tinylm.{module}"), name)
            if module != "answers" and inspect.isfunction(part) and inspect.signature(part).parameters:
                assert "<table" in found[2], f"{path.name}: {name} without a table of its parameters"


@pytest.mark.parametrize("size", SIZES)
def test_pages(site, browser, size):
    width, height = SIZES[size]
    with served(site) as address:
        for name in ["README", *[f"nbs/{path.stem}" for path in CHAPTERS]]:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=SCHEMES[size])
            assert seen_faults(page, f"{address}{name}.html") == [], name
            page.close()


@pytest.mark.parametrize("size", SIZES)
def test_sidebar_and_search_lead_to_every_chapter(site, browser, size):
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height})

    def show_sidebar():
        page.wait_for_selector("#quarto-sidebar", state="attached")
        if size == "phone":
            page.click(".quarto-btn-toggle")

    with served(site) as address:
        page.goto(address)  # index.html, which leads to README.html
        page.wait_for_url("**/README.html")
        for path in CHAPTERS:
            show_sidebar()
            page.click(f"#quarto-sidebar a.sidebar-link[href$='{path.stem}.html']")
            page.wait_for_url(f"**/{path.stem}.html")
            title = page.inner_text("h1")
            page.goto(f"{address}README.html")
            show_sidebar()
            if not page.is_visible("#quarto-search input"):  # Quarto may show a button that opens the search
                page.click("#quarto-search button")
            page.fill("#quarto-search input, .aa-Input", title)
            page.click(f":is(.smalldocs-search-results, .aa-Panel) a[href*='{path.stem}.html'] >> nth=0")
            page.wait_for_url(f"**/{path.stem}.html*")
    page.close()


def test_planted_faults_are_seen(tmp_path, browser):
    (tmp_path / "index.html").write_text(
        '<link rel="icon" href="data:,"><a href="gone.html">1</a> <a href="#gone">2</a>'
        '<a href="https://github.com/tinylm/tinylm/blob/main/tinylm/data.py#LNone">3</a>'
        '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="><pre>#| export</pre>'
        '<div style="width: 2000px">wide</div><script src="https://example.com/x.js"></script><script>oops()</script>'
        '<script>console.error("planted")</script>',
        encoding="utf-8")
    assert len(broken_links(tmp_path)) == 3
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.route("https://**", lambda route: route.abort())
    with served(tmp_path) as address:
        faults = "\n".join(seen_faults(page, address))
    page.close()
    for fault in ("leaves the machine", "script: oops", "console: planted", "directive: #| export", "without alt text",
                  "wider"):
        assert fault in faults
