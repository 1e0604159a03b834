"""Pictures that a reader can touch; a plain module.

To make one, write nbs/files/NAME.js, `export default { render({ model, el }) { ... } }`, which
fills the element `el` from `model.get("key")` (what several share: `import { f } from
"./model.js";`), and end a cell with `Widget("NAME", figure, "alt text", key=...)`. After a change
of a script, `python tests/shrink.py --scripts nbs/*.ipynb` renews it in the outputs.
"""
import base64
import hashlib
import io
import json
import re
import shutil
from contextlib import suppress
from html import escape
from pathlib import Path
from string import Template
from typing import Any



def _joined(folder: Path, name: str, seen: set[str]) -> str:
    """Read a script behind those that it imports, each of them once, as one module."""
    if name in seen:
        return ""
    seen.add(name)
    text = (folder / name).read_text(encoding="utf-8")
    imported = r'(?m)^import [^;]* from "\./([\w.]+)";\n'
    source = re.sub(imported, lambda found: _joined(folder, found[1], seen), text)
    return re.sub(r"(?m)^export (?!default)", "", source)


class Widget:
    """A still picture, and the script that takes its place where scripts run.

    The script is that of nbs/files/NAME.js, in anywidget's form, and reads `data`; the picture is a
    matplotlib figure, with `alt` for those who cannot see it, or HTML. All of it is written into
    the output, with widget.css, in the form of widget.html: nothing is fetched. Where the script
    fails or is not there (a wheel has none), the picture stays."""

    def __init__(self, name: str, still: Any, alt: str = "", **data: Any):
        self.name, self.still, self.data = name, still, data
        if hasattr(still, "savefig"):
            import matplotlib.pyplot as plt
            from PIL import Image

            raw, png = io.BytesIO(), io.BytesIO()
            still.savefig(raw, format="png", dpi=160)
            plt.close(still)  # or Jupyter would show it again
            Image.open(raw).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(png, "PNG", optimize=True)
            coded = base64.b64encode(png.getvalue()).decode()
            self.still = f'<img alt="{escape(alt)}" src="data:image/png;base64,{coded}">'

    def __repr__(self) -> str:
        return f"Widget({self.name!r})"

    def _repr_html_(self) -> str:
        for folder in Path("files"), Path(__file__).parent.parent / "nbs/files":
            if (folder / f"{self.name}.js").is_file():
                source = _joined(folder, f"{self.name}.js", set()).replace("export default", "const widget =")
                if "loadModel" in source and folder == Path("files"):
                    with suppress(OSError):  # JupyterLab shows pages no file above its folder
                        shutil.copyfile(Path(__file__).with_name("tinylm.safetensors"), "files/tinylm.safetensors")
                data = json.dumps(self.data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
                mark = f"tinylm-{hashlib.sha256((self.name + data).encode()).hexdigest()[:8]}"
                style, frame = ((folder / f"widget.{kind}").read_text("utf-8").rstrip() for kind in ("css", "html"))
                return Template(frame).substitute(vars(self), data=data, source=source, style=style, mark=mark)
        return f'<div class="tinylm">{self.still}</div>'
