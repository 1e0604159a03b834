"""Store pictures with a palette of 64 colors, a third of the size: python tests/shrink.py nbs/00_data.ipynb

A plot has few colors, so nothing visible is lost. Run it after executing a chapter that pacing.py finds too heavy.
"""
import base64
import io
import sys

import nbformat
from PIL import Image


def shrink(png: str) -> str:
    "A PNG in base64, with at most 64 colors."
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if picture.mode == "P":
        return png
    out = io.BytesIO()
    small = picture.convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    small.save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode() + "\n"


if __name__ == "__main__":
    for path in sys.argv[1:]:
        notebook = nbformat.read(path, 4)
        for output in (o for cell in notebook.cells for o in cell.get("outputs", ())):
            if png := output.get("data", {}).get("image/png"):
                output["data"]["image/png"] = shrink(png)
        nbformat.write(notebook, path)
