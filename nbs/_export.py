"""Export the notebooks to the package: what nbdev_export does, and second modules.

nbdev makes one module of a notebook from the start; to any other it would append, again at each export. So cells of
05_train that belong to `checkpoint` are marked `#| export_to checkpoint`, which nbdev leaves alone.
"""
import re
from pathlib import Path

from execnb.nbio import mk_cell, read_nb
from nbdev.doclinks import nbdev_export
from nbdev.maker import ModuleMaker

SECOND = {"checkpoint": ("05_train", "A checkpoint that survives crashes, notices damage, and runs nobody's program.")}


def main() -> None:
    folder = Path(__file__).parent
    for module, (name, promise) in SECOND.items():
        path, mark = folder / f"{name}.ipynb", re.compile(rf"#\| export_to {module}\n")
        cells = [cell for cell in read_nb(path).cells if mark.match(cell.source)]
        for cell in cells:
            cell.source = mark.sub("", cell.source)
        title = mk_cell(f"# {module}\n\n> {promise}", "markdown")
        maker = ModuleMaker(dest=folder.parent / "tinylm", name=module, nb_path=path, is_new=True)
        maker.make([title, *cells], cells)
    nbdev_export()


if __name__ == "__main__":
    main()
