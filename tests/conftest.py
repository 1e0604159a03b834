"""What several tests share: the chapters, a tiny run, a browser, a web server on this machine, bare environments."""
import configparser
import functools
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import venv
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; more threads than cores wait by spinning
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C, and so would its children
ROOT = Path(__file__).parent.parent
LEFT_OUT = re.compile(r"^#\| *(slow|eval: *false)", re.MULTILINE)  # see tst_flags in settings.ini
CHAPTERS = sorted((ROOT / "nbs").glob("*.ipynb"))


@pytest.fixture(scope="module")  # for no longer: while Playwright's event loop runs, wandb writes nothing
def browser():
    "A real browser without a window: Debian's chromium, or the Chrome that other systems have."
    path = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
    if path is None:
        pytest.skip("no Chromium on PATH (Debian and Ubuntu: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A tiny config whose data are prepared."
    from tiny import tiny_config

    return tiny_config(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(base, tmp_path):
    "The same, for a run of this test's own."
    return replace(base, run_dir=str(tmp_path / "run"))


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        "Say nothing."


@contextmanager
def served(folder: Path):
    "Serve a folder on this machine; gives its address."
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def requirements() -> list[str]:
    "What settings.ini says that tinylm needs to run."
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]["requirements"].split()


def with_what_they_require(names: list[str]) -> set[str]:
    "The names of these distributions, and of all that they need to run here."
    found, waiting = set(), list(names)
    while waiting:
        need = Requirement(waiting.pop())
        if need.name not in found and (need.marker is None or need.marker.evaluate({"extra": ""})):
            found.add(need.name)
            waiting += distribution(need.name).requires or []
    return found


def environment(folder: Path, *more: str) -> tuple[str, Path]:
    """Make a Python with what settings.ini requires, and `more`, and nothing else; returns it and its site-packages.

    They are links to the packages of this environment: nothing is downloaded, and pip does not decide on versions."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for name in with_what_they_require([*requirements(), *more]):
        for top in {file.parts[0] for file in distribution(name).files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(distribution(name).locate_file(top)))
    return shutil.which("python", path=sysconfig.get_path("scripts", vars={"base": str(folder)})), site


def runnable_copy(path: Path, folder: Path, counted: bool = False) -> Path:
    """Copy a chapter without the cells that nbdev_test leaves out, so that other tools can run it; `counted` gives back
    the execution counts that nbdev_clean strips, since nbval wants them."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["cells"] = [c for c in notebook["cells"] if not LEFT_OUT.search("".join(c["source"]))]
    for count, cell in enumerate((c for c in notebook["cells"] if c["cell_type"] == "code"), 1):
        cell["execution_count"] = count if counted else None
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                output["execution_count"] = cell["execution_count"]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder.parent / "data").exists():  # what chapters read
        shutil.copytree(ROOT / "data/results", folder.parent / "data/results")
    copy = folder / path.name
    copy.write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf-8")
    return copy


def nbval(folder: Path) -> str:
    "Run nbval on the notebooks in a folder; returns what it said."
    # IN_TEST keeps nbdev from exporting; other plugins take seconds to load.
    env = os.environ | {"IN_TEST": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    options = ["-p", "nbval.plugin", "--nbval-lax", "--nbval-cell-timeout=300", "--nbval-kernel-startup-timeout=120",
               "-p", "no:cacheprovider", "-q", "--color=no"]
    result = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=folder, env=env, capture_output=True,
                            text=True, encoding="utf-8")
    return result.stdout + result.stderr


def tool(name: str, *arguments: str, cwd: Path = ROOT) -> str:
    "Run a development tool; returns its complaints."
    command = [str(Path(sys.executable).parent / name), *arguments]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8")
    return result.stdout + result.stderr if result.returncode else ""
