"""Build the site into _docs: with Quarto where it is on PATH, else with a stand-in, so that it can be read and tested.

The stand-in is smalldocs (pure Python, from PyPI). It reads _quarto.yml, but runs no notebook filter, compiles no Sass
and leaves maths and the themes' fonts to a CDN. It reads Markdown and notebooks by rules of its own, which forgive what
Quarto does not: a page that is well here need not be well there. So it gets a copy of the project with filtered
notebooks, and what it built is mended after, only where _quarto.yml tells Quarto the same: a setting that is lost there
leaves the request in the stand-in too, where the test in the browser sees it.
"""
import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from latex2mathml.converter import convert

ROOT = Path(__file__).parent.parent
FILTER_ALL = """
import json, _filter
paths = sorted(_filter.Path.cwd().glob("*.ipynb"))
pages = [_filter.page(json.loads(path.read_text(encoding="utf-8")), path) for path in paths]
for path, page in zip(paths, pages):
    path.write_text(json.dumps(page, ensure_ascii=False), encoding="utf-8")
"""  # what Quarto has done by a process for each notebook, which takes longer


def build(root: Path = ROOT) -> Path:
    "Build the site of the project in `root`; returns the folder of the site."
    out = root / "_docs"
    if shutil.which("quarto"):
        subprocess.run(["quarto", "render"], cwd=root, env=os.environ | {"QUARTO_PYTHON": sys.executable}, check=True)
    else:
        stand_in(root, out)
    return out


def copy_project(root: Path, to: Path) -> Path:
    "Copy what a site is made of; returns the folder of the copy."
    leave = shutil.ignore_patterns(".*", "_docs", "data", "runs", "tests", "build", "dist", "*.egg-info")
    return shutil.copytree(root, to / "project", ignore=leave)


def filter_all(project: Path) -> None:
    "Replace the notebooks of a copied project by what the filter makes of them for their pages."
    subprocess.run([sys.executable, "-c", FILTER_ALL], cwd=project / "nbs", check=True)


def stand_in(root: Path, out: Path) -> None:
    "Build with smalldocs from a copy of the project whose notebooks went through the filter."
    with tempfile.TemporaryDirectory() as tmp:
        copy = copy_project(root, Path(tmp))
        config = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
        theme = config["format"]["html"]["theme"]
        mathml = config["format"]["html"].pop("html-math-method", None) == "mathml"
        own_fonts = all(sets_own_fonts(root / names[-1]) for names in theme.values())
        config["format"]["html"]["theme"] = {mode: names[0] for mode, names in theme.items()}
        del config["execute"], config["ipynb-filters"]
        (copy / "_quarto.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
        filter_all(copy)
        subprocess.run([sys.executable, "-m", "smalldocs.cli", "render", str(copy)], check=True)
        mend(copy / "_docs", mathml, own_fonts)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(copy / "_docs", out)


def sets_own_fonts(scss: Path) -> bool:
    "Whether a Sass file keeps the theme that it stands behind from fetching fonts."
    return scss.suffix == ".scss" and "\n$web-font-path: false;" in scss.read_text(encoding="utf-8")


def mend(site: Path, mathml: bool, own_fonts: bool) -> None:
    "Do what Quarto does when _quarto.yml asks for it: maths as MathML, themes without fonts from a CDN."
    def convert_formula(found: re.Match) -> str:
        return convert(html.unescape(found[2]), display="block" if found[1] == "[" else "inline")

    for path in site.rglob("*.html") if mathml else ():
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"\\([(\[])(.+?)\\[)\]](?=</span>)", convert_formula, text, flags=re.DOTALL)
        text = re.sub(r'<link [^>]*katex[^>]*>|<script [^>]*katex[^>]*></script>', "", text)
        path.write_text(text, encoding="utf-8")
    for path in site.rglob("*.css") if own_fonts else ():
        text = re.sub(r"@import url\(https://fonts\.[^)]*\);?", "", path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")
    with (site / "site_libs/smalldocs.css").open("a", encoding="utf-8") as css:
        css.write(".sidebar-title a { color: inherit; }\n")  # else black on black


if __name__ == "__main__":
    site = build()
    print(f"The site is in {site}: open {site / 'index.html'}")
    if not shutil.which("quarto"):
        print("Quarto is not on PATH, so this is a stand-in; for the real one see https://quarto.org/docs/download/")
