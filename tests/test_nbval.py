"""nbval runs every chapter in a real Jupyter kernel; cells marked `# NBVAL_CHECK_OUTPUT` must repeat their outputs.

It runs a temporary copy, since nbdev_clean strips the execution counts that nbval wants to see.
"""
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from conftest import CHAPTERS, runnable_copy
from nbformat.v4 import new_code_cell, new_notebook, new_output


def nbval(notebook: Path) -> tuple[int, str]:
    "Run nbval on a notebook; returns its exit code and what it said."
    # Two notebooks run at a time, so each takes one core; IN_TEST keeps nbdev from exporting.
    env = os.environ | {"IN_TEST": "1", "OMP_NUM_THREADS": "1"}
    options = ["--nbval-lax", "--nbval-cell-timeout=300", "--nbval-kernel-startup-timeout=120", "-q", "--color=no"]
    result = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, notebook.name],
                            cwd=notebook.parent, env=env, capture_output=True, text=True, encoding="utf-8")
    return result.returncode, result.stdout[-3000:] + result.stderr[-1000:]


@pytest.mark.timeout(600)
def test_every_chapter_runs_in_a_real_kernel(tmp_path):
    copies = [runnable_copy(path, tmp_path / path.stem, counted=True) for path in CHAPTERS]
    copies.sort(key=lambda path: path.stat().st_size, reverse=True)
    with ThreadPoolExecutor(2) as pool:
        failed = [said for code, said in pool.map(nbval, copies) if code]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("source, stored, said", [
    ("from tinylm import no_such_name", [], "ImportError"),
    ("# NBVAL_CHECK_OUTPUT\n1 + 1", [new_output("execute_result", data={"text/plain": "3"})],
     "mismatch"),
])
def test_planted_fault_is_seen(tmp_path, source, stored, said):
    notebook = new_notebook(cells=[new_code_cell(source, outputs=stored)])
    nbformat.write(notebook, tmp_path / "planted.ipynb")
    code, text = nbval(runnable_copy(tmp_path / "planted.ipynb", tmp_path / "copy", counted=True))
    assert code and said in text
