"""The package as its users get it: built, installed in an empty folder, run from anywhere."""
import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment, requirements
from packaging.requirements import Requirement

from tinylm import cli
from tinylm.train import load_run

owners_of = cache(packages_distributions)  # module -> the distributions that bring it
OPTIONAL = {"distributed", "gguf", "onnxscript", "tiktoken", "wandb"}  # a line says so where one is missing


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", **options)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    "Build a wheel of a copy of the project: setuptools leaves its traces beside the sources."
    folder = tmp_path_factory.mktemp("build")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "tinylm", folder / "tinylm", ignore=shutil.ignore_patterns("__pycache__"))
    built = run(sys.executable, "-m", "build", "--no-isolation", str(folder))  # sdist, and from it the wheel
    assert built.returncode == 0, built.stdout + built.stderr
    return next((folder / "dist").glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = {f"tinylm/{path.name}" for path in (ROOT / "tinylm").iterdir() if path.name != "__pycache__"}
    assert {"tinylm/py.typed", "tinylm/book.mplstyle", "tinylm/cli.py"} <= package
    assert {name for name in names if ".dist-info/" not in name} == package
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> str:
    """A Python of its own that has the wheel and what settings.ini requires, and nothing else. It stands for an empty
    environment after `pip install tinylm`; what it does not try is that pip finds these packages."""
    python, site = environment(tmp_path_factory.mktemp("environment"))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-I"]
    installed = run(*pip, str(wheel))
    assert installed.returncode == 0, installed.stderr
    compiled_as_in(ROOT / "tinylm", site / "tinylm")
    return python


def compiled_as_in(source: Path, copy: Path) -> None:
    "Give a copy the machine code that numba keeps for its source, which would take a minute to make again."
    for path in source.glob("*.py"):
        shutil.copystat(path, copy / path.name)  # numba knows a file by its time and size
    (copy / "__pycache__").mkdir(exist_ok=True)
    for path in source.glob("__pycache__/*.nb?"):
        shutil.copy(path, copy / "__pycache__")


@pytest.fixture
def strange_place(tmp_path) -> dict:
    "A folder that is not the project's, and an environment with a home where nobody can write, not even root."
    (tmp_path / "file").touch()
    home = str(tmp_path / "file/home")
    keep = ("PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "OPENBLAS_CORETYPE", "OMP_NUM_THREADS")
    env = {k: os.environ[k] for k in keep if k in os.environ} | {"HOME": home, "USERPROFILE": home}
    return {"cwd": tmp_path, "env": env}


def test_wheel_goes_from_nothing_to_a_story_in_any_folder_with_a_read_only_home(python, strange_place):
    where = run(python, "-c", "import tinylm; print(tinylm.__file__)", **strange_place)
    assert Path(where.stdout.strip()).is_relative_to(Path(python).parent.parent)
    tinylm = shutil.which("tinylm", path=Path(python).parent)  # the installed command itself
    trained = run(tinylm, "train", "--preset", "debug", **strange_place, timeout=240)
    assert trained.returncode == 0 and "Traceback" not in trained.stderr, trained.stdout + trained.stderr
    assert "validation loss" in trained.stdout and "floor" in trained.stdout
    words = re.search(r"tinylm (generate .*)", trained.stdout)[1].split()
    told = run(tinylm, *words, "--max_new_tokens", "40", "--seed", "0", **strange_place)
    assert told.returncode == 0 and len(told.stdout.split()) > 10, told.stderr
    folder = strange_place["cwd"]
    assert (folder / words[1]).parent == folder / "runs" and not list(folder.rglob("*.tmp*"))
    assert_equal_in_transformers(folder / words[1], told.stdout)


def test_the_readme_tells_how_to_use_it_from_python(python, strange_place):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    done = run(python, "-c", code, **strange_place, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Once upon a time" in done.stdout and re.search(r"^tensor\(\d\.\d+, grad_fn", done.stdout, re.M)


def assert_equal_in_transformers(run_dir: Path, text: str) -> None:
    "Export a run; transformers must give the same logits for a text. (test_export.py exports to the other formats.)"
    transformers = pytest.importorskip("transformers")
    assert cli.main(["export", str(run_dir)]) == 0
    model, tokenizer, _ = load_run(run_dir)
    ids = torch.tensor([tokenizer.encode(text)[:64]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run_dir / "export/hf")
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-5, rtol=1e-5)


LOAD = ("import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(*{name.split('.')[0] for name in sys.modules})")


def test_package_needs_no_development_tools_and_for_text_no_torch(python, strange_place):
    names = [f"tinylm.{path.stem}" for path in (ROOT / "tinylm").glob("*.py") if path.stem != "_modidx"]
    loaded = run(python, "-c", LOAD, *names, **strange_place)
    assert loaded.returncode == 0, loaded.stderr
    assert "torch" not in run(python, "-c", LOAD, "tinylm.tokenizer", **strange_place).stdout.split()


def imports_of(path: Path) -> set[str]:
    "The modules that a file imports, in its functions too."
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = ("tinylm." if node.level else "") + (node.module or "")
            found |= {base} if node.module else {base + alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def undeclared(path: Path) -> set[str]:
    "The modules that a file imports, in its functions too, and that come with nothing that settings.ini requires."
    required = {Requirement(text).name.replace("_", "-") for text in requirements()}
    modules = {name.split(".")[0] for name in imports_of(path)} - sys.stdlib_module_names - {"tinylm"}
    owners = {name: {owner.replace("_", "-") for owner in owners_of().get(name, [])} for name in modules}
    return {name for name in modules - OPTIONAL if not owners[name] & required}


def test_what_the_package_imports_is_installed_with_it():
    assert {path.name: names for path in (ROOT / "tinylm").glob("*.py") if (names := undeclared(path))} == {}
