"""Store pictures with a palette of 64 colors, a third of the size: python tests/shrink.py nbs/00_data.ipynb

A plot has few colors, so nothing visible is lost. Run it after executing a chapter that pacing.py finds too heavy.
With --scripts it leaves pictures alone. Run that after changing a script in nbs/files: it gives the widgets that are
stored in a notebook the scripts of today, and the first page (nbs/_live.md, in index.qmd) that of the index chapter.
"""
import base64
import io
import re
import sys
from pathlib import Path

import nbformat
from PIL import Image

from tinylm.widgets import Widget


def shrink(png: str) -> str:
    "A PNG in base64, with at most 64 colors."
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if picture.mode == "P":
        return png
    out = io.BytesIO()
    small = picture.convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    small.save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode() + "\n"


def renewed(html: str) -> str:
    "The HTML of a widget, with the style and the script of today; other HTML as it is."
    found = re.search(r"(?s)<style>.*\nfor \(const box .*dataset.live = \"(\w+)\"", html)
    if not found:
        return html
    fresh = Widget(found[1], "")._repr_html_()
    start, end = "<style>", "\nfor (const box "
    return html.partition(start)[0] + fresh[fresh.index(start):fresh.index(end)] + html[html.index(end):]


if __name__ == "__main__":
    paths = [path for path in sys.argv[1:] if path != "--scripts"]
    for path in paths:
        notebook = nbformat.read(path, 4)
        for data in [o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", ())]:
            if "image/png" in data and "--scripts" not in sys.argv:
                data["image/png"] = shrink(data["image/png"])
            if "text/html" in data:
                data["text/html"] = text = renewed(data["text/html"])
                if path.endswith("nbs/index.ipynb") and 'dataset.live = "surprise"' in text:
                    Path(path).with_name("_live.md").write_text(f"```{{=html}}\n{text}\n```\n", encoding="utf-8")
        nbformat.write(notebook, path)
