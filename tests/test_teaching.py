"""What a teacher gets: chapters without answers, assignments for nbgrader, slides."""
import __future__
import ast
import json
import re
import sys

import pytest
from conftest import CHAPTERS, ROOT

sys.path.insert(0, str(ROOT / "nbs"))
import _slides  # noqa: E402
import _student  # noqa: E402


def answers(path) -> dict[str, str]:
    "The cells of a chapter that hold an answer, by their ids."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in cells
            if cell["cell_type"] == "code" and re.search(r"(?m)^#\| *solution", "".join(cell["source"]))}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_each_cell_to_fill_in_says_that_it_is_still_a_stub(path):
    "In what the chapter imports; that each answer passes its checks is shown where the chapter itself is run."
    notebook, known = json.loads(path.read_text(encoding="utf-8")), {"__name__": "student"}
    for cell in notebook["cells"]:
        source = "".join(cell["source"]) if cell["cell_type"] == "code" else ""
        for node in ast.parse(re.sub(r"(?m)^[%!].*", "", source)).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), known)
    made = {cell["id"]: cell for cell in _student.student(notebook)["cells"]}
    for name, answer in answers(path).items():
        source = "".join(made[name]["source"])
        assert made[name]["outputs"] == [] and len(source) < len(answer) + 150
        with pytest.raises((NotImplementedError, AssertionError), match="still a stub"):
            exec(compile(source, name, "exec", __future__.annotations.compiler_flag), known)
    code = "\n".join("".join(cell["source"]) for cell in made.values() if cell["cell_type"] == "code")
    assert not re.search(r"(?m)^#(\| *(solution|export|default_exp)| NBVAL)", code)
    assert len(made) >= len(notebook["cells"]) - 3 and "An answer</summary>" not in json.dumps(made)


def test_nbgrader_gets_answers_between_its_markers_and_checks_in_locked_cells():
    notebook = json.loads((ROOT / "nbs/01_layers.ipynb").read_text(encoding="utf-8"))
    cells = {cell["id"]: cell for cell in _student.student(notebook, nbgrader=True)["cells"]}
    graded = {name: cell["metadata"]["nbgrader"] for name, cell in cells.items() if "nbgrader" in cell["metadata"]}
    for name, answer in answers(ROOT / "nbs/01_layers.ipynb").items():
        own, check = graded.pop(name), graded.pop(f"{name}-check", None)
        assert own["solution"] and own["grade"] == (check is None)
        assert (check or own)["points"] == 1 and (check is None or check["locked"])
        assert "### BEGIN SOLUTION" in "".join(cells[name]["source"])
        assert (check is not None) == ("check(" in answer)
    assert graded == {}


def test_slides_have_the_chapters_promises_and_pictures(tmp_path):
    "The deck's Markdown; Quarto makes reveal.js of it."
    text = _slides.slides(ROOT / "nbs/02_rope.ipynb", tmp_path)
    assert text.startswith("# ") and text.count("\n## ") == len(list(tmp_path.iterdir())) >= 8
    for name, alt in re.findall(r"\]\(([^)]+)\)\{fig-alt=\"(.+?)\"\}", text):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and len(alt) > 20
