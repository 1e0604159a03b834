"""Pictures that a reader can touch; a plain module.

To make one, write nbs/files/NAME.js, `export default { render({ model, el }) { ... } }`, which
fills the element `el` from `model.get("key")` (what several share: `import { f } from
"./model.js";`), and end a cell with `Widget("NAME", figure, "alt text", key=...)`. After a change
of a script, `python tests/shrink.py nbs/*.ipynb` renews it in the stored outputs.
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
from typing import Any

_SCRIPT = """<div class="tinylm" id="{id}">{still}</div>
<style>{style}</style>
<script type="module">
{source}
for (const box of document.querySelectorAll("#{id}:not([data-live])")) {{
  const values = {data}, el = document.createElement("div");
  await widget.render({{ model: {{ get: key => values[key] }}, el }});
  box.dataset.live = "{name}";
  box.replaceChildren(el);
}}
</script>"""


def _joined(folder: Path, name: str, seen: set[str]) -> str:
    """Read a script behind those that it imports, each of them once, as one module."""
    seen.add(name)
    source = re.sub(
        r'(?m)^import [^;]* from "\./([\w.]+)";\n',
        lambda found: "" if found[1] in seen else _joined(folder, found[1], seen),
        (folder / name).read_text(encoding="utf-8"))
    return re.sub(r"(?m)^export (?!default)", "", source)


class Widget:
    """A still picture, and the script that takes its place where scripts run.

    The script is that of nbs/files/NAME.js, in anywidget's form, and reads `data`; the picture is a
    matplotlib figure, with `alt` for those who cannot see it, or HTML. Script, data and colors
    (widget.css) are written into the output: nothing is fetched. Where the script fails or is not
    there (a wheel has none), the picture stays."""

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
                style = (folder / "widget.css").read_text(encoding="utf-8")
                data = json.dumps(self.data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
                mark = f"tinylm-{hashlib.sha256((self.name + data).encode()).hexdigest()[:8]}"
                return _SCRIPT.format(id=mark, **vars(self) | {"data": data, "source": source, "style": style})
        return f'<div class="tinylm">{self.still}</div>'
