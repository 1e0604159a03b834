"""The package as its users get it: built, installed in an empty folder, run from anywhere."""
import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import CHAPTERS, ROOT


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


def test_wheel_trains_from_any_folder_with_a_read_only_home(wheel, tmp_path):
    target, work = tmp_path / "target", tmp_path / "work"
    work.mkdir()
    (tmp_path / "file").touch()
    home = tmp_path / "file/home"  # under a file, nobody can write, not even root
    installed = run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", f"--target={target}", str(wheel))
    assert installed.returncode == 0, installed.stderr
    keep = ("PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "OPENBLAS_CORETYPE")
    env = {k: os.environ[k] for k in keep if k in os.environ} | {
        "HOME": str(home), "USERPROFILE": str(home), "PYTHONPATH": str(target)}
    where = run(sys.executable, "-c", "import tinylm; print(tinylm.__file__)", cwd=work, env=env)
    assert Path(where.stdout.strip()).is_relative_to(target)
    trained = run(sys.executable, "-m", "tinylm.cli", "train", "--preset", "debug", cwd=work, env=env, timeout=240)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert list(work.glob("runs/*/checkpoints/step-*/model.safetensors"))


def test_package_imports_neither_development_tools_nor_torch_for_text():
    code = ("import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(f'tinylm.{name}')\n"
            "print(*{name.split('.')[0] for name in sys.modules})")
    loaded = run(sys.executable, "-c", code, *[path.stem.split("_", 1)[1] for path in CHAPTERS], cwd=ROOT)
    assert loaded.returncode == 0, loaded.stderr
    assert not {"nbdev", "fastcore", "jaxtyping", "einops", "pytest", "IPython"} & set(loaded.stdout.split())
    for name in ("tokenizer", "data"):
        assert "torch" not in run(sys.executable, "-c", code, name, cwd=ROOT).stdout.split(), name


def imports_of(path: Path) -> set[str]:
    "The modules that a module of the package needs to be imported itself."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            base = ("tinylm." if node.level else "") + (node.module or "")
            found |= {base} if node.module else {base + alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_what_the_package_imports_is_installed_with_it():
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    required = {re.split(r"[>=<]", name)[0].replace("_", "-") for name in config["DEFAULT"]["requirements"].split()}
    for path in (ROOT / "tinylm").glob("*.py"):
        for module in {name.split(".")[0] for name in imports_of(path)} - sys.stdlib_module_names - {"tinylm"}:
            owners = {name.replace("_", "-") for name in packages_distributions()[module]}
            assert owners & required, f"{path.name} imports {module}, which settings.ini does not require"


def test_a_chapter_builds_on_those_before_it():
    "But for the compiled loops of 09, which tokenizer, optimizer and generation call."
    order = [path.stem.split("_", 1)[1] for path in CHAPTERS]
    for i, name in enumerate(order):
        modules = imports_of(ROOT / f"tinylm/{name}.py")
        ours = {module.split(".")[1] for module in modules if module.startswith("tinylm.")}
        late = ours - set(order[:i]) - {"kernels", "__version__"}
        assert not late - ({"answers"} if name == "check" else set()), f"{name} imports {late}"


def test_what_the_book_builds_is_not_taken_from_torch():
    "Except as the reference in a check."
    ready = {"Linear", "Embedding", "RMSNorm", "SiLU", "silu", "softmax", "cross_entropy", "CrossEntropyLoss", "AdamW",
             "MultiheadAttention", "rms_norm", "clip_grad_norm_", "CosineAnnealingLR"}
    for path in (ROOT / "tinylm").glob("*.py"):
        if path.stem not in ("check", "answers"):
            names = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                     if isinstance(node, ast.Attribute) and node.attr in ready}
            assert not {name for name in names if name.split(".")[0] in ("torch", "nn", "F")}, path.name


def test_the_targets_that_pages_name_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data/README.md", *CHAPTERS]:
        named = set(re.findall(r"`make ([a-z]+)", path.read_text(encoding="utf-8")))
        assert named <= targets, f"{path.name} names {named - targets}"


def tool(name: str, *arguments: str, cwd: Path = ROOT) -> str:
    "Run a development tool; returns its complaints."
    result = run(str(Path(sys.executable).parent / name), *arguments, cwd=cwd)
    return result.stdout + result.stderr if result.returncode else ""


def test_types_hold():
    assert tool("mypy") == ""


def test_no_lint():
    assert tool("ruff", "check", ".") == ""


def test_notebooks_are_clean_and_the_package_is_their_export(tmp_path):
    for name in ("nbs", "tinylm"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "settings.ini", tmp_path)

    def state() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for name in ("nbs", "tinylm") for p in (tmp_path / name).glob("*.*")}

    before = state()
    assert tool("nbdev_clean", cwd=tmp_path) + tool("nbdev_export", cwd=tmp_path) == ""
    assert [name for name, text in state().items() if before.get(name) != text] == []


def test_planted_faults_are_seen(tmp_path):
    (tmp_path / "planted.py").write_text('import os\nx: int = "one"\n', encoding="utf-8")
    assert "F401" in tool("ruff", "check", "planted.py", cwd=tmp_path)
    assert "Incompatible types" in tool("mypy", "planted.py", cwd=tmp_path)
