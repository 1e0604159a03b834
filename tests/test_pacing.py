"""The chapters keep the pace; and the check sees each fault when it is planted."""
import copy
import json

import pacing
import pytest
from conftest import CHAPTERS


def cell(kind: str, source: str, *outputs: dict) -> dict:
    return {"cell_type": kind, "source": source, "metadata": {}, "outputs": list(outputs)}


def result(**data: str) -> dict:
    return {"output_type": "execute_result", "data": {k.replace("_", "/"): v for k, v in data.items()}}


LESSON = [
    cell("markdown", "# Title\n\n> One promise.\n\n" + "What we build and what we will know at the end. " * 4),
    cell("code", "#| default_exp data"),
    cell("code", "import math"),
    cell("markdown", "A function with a reason. " * 9),
    cell("code", '#| exports\ndef double(x):\n    "Double a number."\n    return 2 * x'),
    cell("code", "y = double(2)\ny", result(text_plain="4")),
    cell("code", "assert y == 4"),
    cell("code", '#| fig-alt: "a line"\nplot(y);', result(image_png="iVBORw0KGgo=")),
    cell("markdown", "## What we learned\n\n- To double.\n\n## Exercises\n\n1. Halve.\n2. Triple."),
]


def faults_of(cells: list[dict], folder) -> list[str]:
    path = folder / "chapter.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    return pacing.check(path)[1]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter(path):
    assert pacing.check(path)[1] == []


def test_a_table_with_names_counts_as_one_line_and_a_shorter_one_does_not():
    rows = [f'    "{name}": {i},' for i, name in enumerate("abcd")]
    assert pacing.code_lines("\n".join(["x = {", *rows, "}"])) == 1
    assert pacing.code_lines("\n".join(["x = {", *rows[:3], "}"])) == 5


def test_good_lesson_passes(tmp_path):
    assert faults_of(LESSON, tmp_path) == []
    for constant in ("#| export\nTWICE = 2  # times", "#| export\n_TWICE = 2"):
        assert faults_of([*LESSON[:-1], cell("code", constant), LESSON[-1]], tmp_path) == []


@pytest.mark.parametrize("number, source, outputs, fault", [
    (0, "# Title\n\nNo promise.", None, "opens without"),
    (2, "import math\ny = 1", None, "imports mixed"),
    (2, "import math as", None, "invalid syntax"),
    (4, "#| exports\ndef double(x):\n    return 2 * x", None, "no docstring"),
    (4, '#| exports\nclass Pair:\n    "Two."\n    def one(self):\n        return 1', None, "Pair.one has no docstring"),
    (4, "#| export\nTWICE = 2  # fmt: skip", None, "TWICE is explained by no comment"),
    (4, '#| exports\ndef double(x):\n    "Double a number."\n' + "    x = x\n" * 31, None, "lines of code"),
    (5, "y = 4\ny", None, "never shown"),
    (6, "y = 4\nassert y == 4", None, "never asserted"),
    (6, "y == 4", None, "never asserted"),
    (6, "assert y == 4\n" + "y += 0\n" * 15, None, "lines of code"),
    (5, "y = double(2)\ny", [result(text_plain="4\n" * 50)], "an output of 50 lines"),
    (5, "y = double(2)\ny", [result(text_plain="9/9 [00:01, 9.0it/s]")], "progress bar"),
    (5, "y = double(2)\ny", [{"output_type": "error"}, result(text_plain="4")], "an error"),
    (5, "for i in range(y):\n    print(i)", [], "no output is stored"),
    (5, "y = double(2)\ny", [], "no output is stored"),
    (7, '#| fig-alt: "a line"\nplot(y);', [], "no output is stored"),
    (7, "plot(y);", None, "fig-alt"),
    (7, '#| fig-alt: "a line"\nplot(y);', [result(image_png="A" * 100_000)], "a picture of 75 kB"),
    (8, "## What we learned\n\n- To double.", None, "does not close"),
    (8, "## What we learned\n\n- To double.\n\n## Exercises\n\n1. Halve.", None, "1 exercises"),
])
def test_planted_fault_is_seen(tmp_path, number, source, outputs, fault):
    cells = copy.deepcopy(LESSON)
    cells[number]["source"] = source
    if outputs is not None:
        cells[number]["outputs"] = outputs
    faults = faults_of(cells, tmp_path)
    assert any(fault in f for f in faults), faults


@pytest.mark.parametrize("more, fault", [
    ([cell("code", "y", result(text_html="x" * 400_000))], "kB, not 400"),
    ([cell("code", "y += 0\n" * 7)] * 9, "half of the cells"),
    ([cell("code", "y += 0\n" * 7)] * 9, "words for a line"),
])
def test_planted_excess_is_seen(tmp_path, more, fault):
    assert any(fault in f for f in faults_of(LESSON + more, tmp_path))
