"""The book as a whole: its chapters run and keep the pace, its package is their export, its modules point one way."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pacing
import pytest
from conftest import CHAPTERS, ROOT, nbval, runnable_copy, tool

PLAIN = {"core", "cli", "check", "course", "kernels", "widgets"}  # no notebook exports them; each says so in line 1
CONTENT = {"exercises", "__init__", "_modidx"}
LAYERS = [["core", "layers", "rope", "kernels"], ["fables", "tokenizer", "model", "optim", "recipe"],
          ["data", "distributed", "checkpoint"], ["train"], ["generate", "ablations", "export"],
          ["exercises", "check", "course", "widgets"], ["cli"]]  # imports point leftwards
MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tinylm").glob("*.py")}


COMPILE = """
import sys
from tinylm.generate import generate
from tinylm.model import ModelConfig, TransformerLM
from tinylm.tokenizer import Tokenizer, train_bpe
tokenizer = Tokenizer(*train_bpe(sys.argv[1], 260, []))
tokenizer.decode(tokenizer.encode("twice"))
generate(TransformerLM(ModelConfig(vocab_size=9, context_length=8, d_model=8, num_layers=1, num_heads=1)), [1], 3)
"""  # on a new machine; else the cell that is the first to need it says so, and its output is another


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    text = tmp_path_factory.mktemp("compiled") / "text.txt"
    text.write_text("twice twice", encoding="utf-8")
    subprocess.run([sys.executable, "-c", COMPILE, text], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_runs_and_repeats_its_outputs(tmp_path, path, compiled):
    "In a real Jupyter kernel; cells marked `# NBVAL_CHECK_OUTPUT` must give what is stored."
    runnable_copy(path, tmp_path / "nbs", counted=True)
    said = nbval(tmp_path / "nbs")
    assert re.search(r"\d{2,} passed", said) and not re.search(r"failed|error", said.splitlines()[-1]), said[-6000:]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_pace(path):
    assert pacing.check(path)[1] == []


def test_notebooks_are_clean_and_the_package_is_their_export(tmp_path):
    for name in ("nbs", "tinylm"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "settings.ini", tmp_path)

    def state() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for name in ("nbs", "tinylm") for p in (tmp_path / name).glob("*.*")}

    before = state()
    assert tool("nbdev_clean", cwd=tmp_path) == ""
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "nbs/_export.py"], cwd=tmp_path, env=env, check=True)
    assert [name for name, text in state().items() if before.get(name) != text] == []


def test_types_hold_and_there_is_no_lint():
    assert tool("mypy") + tool("ruff", "check", ".") == ""


# --- the package


def test_plain_modules_say_so_and_the_others_are_exported():
    exported = {"checkpoint"}
    for path in CHAPTERS:
        exported |= set(re.findall(r"#\| default_exp (\w+)", path.read_text(encoding="utf-8")))
    assert set(MODULES) - exported == PLAIN | CONTENT
    for name in PLAIN:
        assert "plain module" in ast.get_docstring(MODULES[name]).splitlines()[0].lower(), name
    assert exported <= set(MODULES)


def imports(name: str) -> list[tuple[str, str]]:
    "The modules of the package that a module imports, in its functions too, with the names that it takes."
    found = []
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("tinylm")):
            module = (node.module or "").removeprefix("tinylm").lstrip(".")
            found += [(module or alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name.split(".")[1], "") for alias in node.names if alias.name.startswith("tinylm.")]
    return [(module, taken) for module, taken in found if module in MODULES]


def test_imports_point_one_way_and_take_no_private_name():
    order = [name for group in LAYERS for name in group]
    assert sorted(order) == sorted(set(MODULES) - {"__init__", "_modidx"})
    for name in order:
        for module, taken in imports(name):
            assert order.index(module) < order.index(name), f"{name} imports {module}"
            assert not taken.startswith("_") or taken == "__version__", f"{name} imports {taken} from {module}"


def test_what_the_book_builds_is_not_taken_from_torch():
    "Except as the reference in a check."
    ready = {"Linear", "Embedding", "RMSNorm", "SiLU", "silu", "softmax", "cross_entropy", "CrossEntropyLoss", "AdamW",
             "MultiheadAttention", "rms_norm", "clip_grad_norm_", "CosineAnnealingLR"}
    for name in set(MODULES) - {"check", "exercises"}:
        used = {ast.unparse(node) for node in ast.walk(MODULES[name])
                if isinstance(node, ast.Attribute) and node.attr in ready}
        assert not {use for use in used if use.split(".")[0] in ("torch", "nn", "F")}, name


def test_the_targets_that_pages_name_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    pages = [*ROOT.glob("*.md"), ROOT / "data/README.md", ROOT / "benchmarks/README.md", *CHAPTERS]
    for path in pages:
        named = set(re.findall(r"`make ([a-z]+)", path.read_text(encoding="utf-8")))
        assert named <= targets, f"{path.name} names {named - targets}"


# --- the book's own checks see a fault that is planted; by `make book`


LESSON = [
    ("markdown", "# Title\n\n> One promise.\n\n" + "What we build and what we will know at the end. " * 4, []),
    ("code", '#| exports\ndef double(x):\n    "Double a number."\n    return 2 * x', []),
    ("code", "y = double(2)\ny", [{"output_type": "execute_result", "data": {"text/plain": "4"}}]),
    ("code", "assert y == 4", []),
    ("markdown", "## What we learned\n\n- To double.", []),
]


def faults_of(folder: Path, number: int | None = None, source: str = "", outputs: list | None = None) -> list[str]:
    cells = [{"cell_type": kind, "source": text, "outputs": given} for kind, text, given in LESSON]
    if number is not None:
        cells[number] |= {"source": source} if outputs is None else {"source": source, "outputs": outputs}
    (folder / "chapter.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    return pacing.check(folder / "chapter.ipynb")[1]


@pytest.mark.book
@pytest.mark.parametrize("number, source, outputs, fault", [
    (0, "# Title\n\nNo promise.", None, "opens without"),
    (1, "#| exports\ndef double(x):\n    return 2 * x", None, "no docstring"),
    (1, '#| exports\ndef double(x):\n    "Double a number."\n' + "    x = x\n" * 61, None, "exported run 62"),
    (2, "y = 4\ny", None, "never shown"),
    (2, "y = double(2)", [], "never shown"),
    (3, "y == 4", None, "never asserted"),
    (3, "assert y == 4  # " + "because " * 12, None, "width"),
    (2, "y = double(2)\ny", [{"output_type": "stream", "text": "4\n" * 50}], "an output of 50 lines"),
    (2, "y = double(2)\ny", [{"output_type": "stream", "text": "9/9 [00:01, 9.0it/s]"}], "progress bar"),
    (2, "y = double(2)\ny", [{"output_type": "error"}], "an error"),
    (2, "y = double(2)\ny", [{"output_type": "display_data", "data": {"image/png": "A"}}], "fig-alt"),
    (4, "The end.", None, "does not close"),
])
def test_pacing_sees_a_planted_fault(tmp_path, number, source, outputs, fault):
    assert faults_of(tmp_path) == []
    assert fault in "\n".join(faults_of(tmp_path, number, source, outputs))


@pytest.mark.book
def test_nbval_sees_planted_faults(tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook, new_output

    wrong = new_output("execute_result", data={"text/plain": "3"})
    cells = [new_code_cell("from tinylm import no_such_name"),
             new_code_cell("# NBVAL_CHECK_OUTPUT\n1 + 1", outputs=[wrong])]
    nbformat.write(new_notebook(cells=cells), tmp_path / "planted.ipynb")
    runnable_copy(tmp_path / "planted.ipynb", tmp_path / "nbs", counted=True)
    said = nbval(tmp_path / "nbs")
    assert "ImportError" in said and "mismatch" in said and "2 failed" in said, said
