"""Write nbs/_live.md before the site is rendered: the surprise meter of the index chapter, as stored there, for the first page."""
import json
import re
from pathlib import Path

NBS = Path(__file__).parent


def stored(name: str, widget: str) -> str:
    "The HTML of a widget that is stored in a notebook."
    for cell in json.loads((NBS / name).read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            for text in map("".join, output.get("data", {}).values()):  # HTML, or what the filter made of it
                if found := re.search(rf'(?s)<div class="tinylm".*dataset.live = "{widget}".*</script>', text):
                    return found[0]
    raise LookupError(f"{name} shows no {widget}")


if __name__ == "__main__":
    html = stored("index.ipynb", "surprise")
    (NBS / "_live.md").write_text(f"```{{=html}}\n{html}\n```\n", encoding="utf-8")
