"""nbval runs every chapter in a real Jupyter kernel; cells marked `# NBVAL_CHECK_OUTPUT` must repeat their outputs.

It runs a temporary copy, since nbdev_clean strips the execution counts that nbval wants to see.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import CHAPTERS, ROOT, runnable_copy
from nbformat.v4 import new_code_cell, new_notebook, new_output


def nbval(folder: Path) -> str:
    "Run nbval on the notebooks in a folder, two at a time; returns what it said."
    # IN_TEST keeps nbdev from exporting; other plugins take seconds to load.
    env = os.environ | {"IN_TEST": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    options = ["-p", "nbval.plugin", "--nbval-lax", "--nbval-cell-timeout=300", "--nbval-kernel-startup-timeout=120",
               "-p", "xdist.plugin", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider", "-q", "--color=no"]
    result = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=folder, env=env, capture_output=True,
                            text=True, encoding="utf-8")
    return result.stdout + result.stderr


COMPILE = """
import sys
from tinylm.generate import generate
from tinylm.model import ModelConfig, TransformerLM
from tinylm.tokenizer import Tokenizer, train_bpe
tokenizer = Tokenizer(*train_bpe(sys.argv[1], 260, []))
tokenizer.decode(tokenizer.encode("twice"))
generate(TransformerLM(ModelConfig(vocab_size=9, context_length=8, d_model=8, num_layers=1, num_heads=1)), [1], 3)
"""  # on a new machine; else the cell that is the first to need it says so, and its output is another


@pytest.mark.timeout(900)
def test_every_chapter_runs_in_a_real_kernel_and_planted_faults_are_seen(tmp_path):
    (tmp_path / "text.txt").write_text("twice twice", encoding="utf-8")
    subprocess.run([sys.executable, "-c", COMPILE, tmp_path / "text.txt"], cwd=ROOT, check=True)
    wrong = new_output("execute_result", data={"text/plain": "3"})
    cells = [new_code_cell("from tinylm import no_such_name"),
             new_code_cell("# NBVAL_CHECK_OUTPUT\n1 + 1", outputs=[wrong])]
    nbformat.write(new_notebook(cells=cells), tmp_path / "planted.ipynb")
    for path in [*CHAPTERS, tmp_path / "planted.ipynb"]:
        runnable_copy(path, tmp_path / "nbs", counted=True)
    said = nbval(tmp_path / "nbs")
    failed = re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", said, re.MULTILINE)
    assert failed == ["planted.ipynb::Cell 0", "planted.ipynb::Cell 1"], said[-4000:]
    assert "ImportError" in said and "mismatch" in said and re.search(r"2 failed, \d{3,} passed", said), said[-4000:]
