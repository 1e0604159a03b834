"""Write slides.html: the pictures of the chapters as a reveal.js deck, with captions. Needs Quarto."""
import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = """---
title: tinylm
subtitle: A language model from scratch, in pictures
format:
  revealjs: {embed-resources: true, html-math-method: mathml, slide-number: true, auto-stretch: false}
include-in-header:
  text: "<style>.reveal img { width: 100%; height: 540px; object-fit: contain }</style>"
---
"""


def option(source: str, name: str) -> str:
    "What a cell's `#| name:` says, over one line or, after `>-`, several."
    found = re.search(rf'(?m)^#\| *{name}: *(?:>-\n((?:#\|   .*\n?)+)|(.*))', source)
    text = (re.sub(r"(?m)^#\| *", "", found[1]).replace("\n", " ") if found[1] else found[2]) if found else ""
    return text.strip().strip('"').replace('\\"', '"')


def slides(path: Path, folder: Path) -> str:
    "A chapter's title and promise, and a slide for each of its pictures with a caption; these go to a folder."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    opening = "".join(cells[0]["source"])
    title, promise = (re.search(rf"(?m)^{sign} (.*)", opening) for sign in ("#", ">"))
    parts = [f"# {title[1]}\n\n{promise[1]}" if title and promise else f"# {path.stem}"]
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and (caption := option(source, "fig-cap")):
            drawn = next((o["data"]["image/png"] for o in cell["outputs"] if "image/png" in o.get("data", {})), None)
            if drawn:
                name, alt = f"{path.stem}-{cell['id']}.png", option(source, "fig-alt").replace('"', "'")
                (folder / name).write_bytes(base64.b64decode("".join(drawn)))
                parts.append(f'## \n\n![{caption}]({name}){{fig-alt="{alt}"}}')
    return "\n\n".join(parts)


def write(out: Path) -> None:
    order = ["index", *sorted(p.stem for p in (ROOT / "nbs").glob("[0-9]*.ipynb")), "appendix_fables"]
    with tempfile.TemporaryDirectory() as tmp:
        text = "\n\n".join([HEAD, *(slides(ROOT / f"nbs/{name}.ipynb", Path(tmp)) for name in order)])
        Path(tmp, "slides.qmd").write_text(text, encoding="utf-8")
        subprocess.run(["quarto", "render", "slides.qmd"], cwd=tmp, check=True)
        shutil.copy(Path(tmp, "slides.html"), out)
    print(f"{out}: {text.count(chr(10) + '## ')} pictures")


if __name__ == "__main__":
    if not shutil.which("quarto"):
        sys.exit("slides need Quarto on PATH: https://quarto.org/docs/download/")
    write(ROOT / "slides.html")
