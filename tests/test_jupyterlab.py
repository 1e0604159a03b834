"""Real JupyterLab in a real browser opens three chapters and runs all of them, as a student will; by `make book`.

The kernel has what `pip install tinylm` brings and what the chapter's own `%pip install` line names, and no development
tools: a chapter opened alone must run there.
"""
import contextlib
import json
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from conftest import CHAPTERS, ROOT, environment, runnable_copy
from nbformat.v4 import new_code_cell, new_notebook, new_output

KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
NOTIFICATION = {"fetchNews": "false", "checkForUpdates": False}
PATIENCE = 240  # seconds for a chapter on two slow cores, others running beside it
PANEL = "Array.from(jupyterapp.shell.widgets('main')).find(e => e.context?.path === path)"
CELLS = f"Array.from({PANEL}.content.model.cells)"  # Lab puts cells that are out of sight on the page one by one
BEGUN = f"path => {CELLS}.some(cell => cell.executionState === 'running' || cell.executionCount)"
RUNNING = f"path => {CELLS}.some(cell => cell.executionState === 'running')"  # from the menu's click on
PICTURES = (f"path => Array.from({PANEL}.node.querySelectorAll('.jp-OutputArea-output img'))"
            ".filter(e => e.naturalWidth > 0).length")
OPEN = ("path => jupyterapp.commands.execute('docmanager:open', {path}).then(panel => panel.sessionContext.ready"
        ".then(() => panel.sessionContext.session.kernel.info).then(() => true))")  # until the kernel has answered
CLOSE = f"path => {{ const panel = {PANEL}; return panel.sessionContext.shutdown().then(() => panel.dispose()) }}"


def make_kernel(root: Path, name: str, *more: str):
    "Give the JupyterLab in `root` a kernel with tinylm, what it requires, and `more`."
    python, site = environment(root / f".environments/{name}", "ipykernel", *more)
    (site / "tinylm").symlink_to(ROOT / "tinylm")
    spec = KERNEL | {"argv": [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    (root / f".jupyter/kernels/{name}").mkdir(parents=True)
    (root / f".jupyter/kernels/{name}/kernel.json").write_text(json.dumps(spec), encoding="utf-8")


def copy_with_kernel(path: Path, root: Path) -> Path:
    "Copy a chapter; if it has a line that installs packages, it gets a kernel of its own that has them."
    copy = runnable_copy(path, root)
    notebook = nbformat.read(path, 4)
    if found := re.search(r"^%pip install (.*)$", "\n".join(cell.source for cell in notebook.cells), re.MULTILINE):
        make_kernel(root, path.stem, *(word for word in shlex.split(found[1]) if not word.startswith("-")))
        notebook = nbformat.read(copy, 4)
        notebook.metadata.kernelspec = KERNEL | {"name": path.stem}
        nbformat.write(notebook, copy)
    return copy


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on a folder: the folder, and the address."
    root = tmp_path_factory.mktemp("lab")
    make_kernel(root, "python3")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token = secrets.token_hex(8)
    settings = root / ".settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(NOTIFICATION), encoding="utf-8")
    env = os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(root / ".settings"), "JUPYTER_CONFIG_DIR": str(root / ".config"),
                        "JUPYTER_PATH": str(root / ".jupyter"), "IN_TEST": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
         f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}",
         "--LabServerApp.expose_app_in_browser=True"],
        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield root, f"http://127.0.0.1:{port}/lab?token={token}&reset"
    finally:
        server.terminate()
        server.wait(20)


def start(page, name: str):
    "Open a notebook in a tab and choose Run > Run All Cells."
    page.evaluate(OPEN, name)
    page.click('.lm-MenuBar-item:has-text("Run")')
    page.click('[data-command="runmenu:run-all"]')
    page.wait_for_function(BEGUN, arg=name, timeout=60_000)


def faults_in(page, notebook: Path, pictures: int) -> list[str]:
    "Save the notebook that ran, tell what is wrong with it, and close it."
    page.evaluate(OPEN, notebook.name)
    before = notebook.stat().st_mtime_ns
    page.keyboard.press("Control+s")
    saved = None
    for _ in range(100):
        page.wait_for_timeout(100)
        if notebook.stat().st_mtime_ns != before:
            with contextlib.suppress(json.JSONDecodeError):  # Lab empties the file before it writes
                saved = json.loads(notebook.read_text(encoding="utf-8"))
                break
    if saved is None:
        return ["it was not saved"]
    cells = [c for c in saved["cells"] if c["cell_type"] == "code"]
    outputs = [o for c in cells for o in c["outputs"]]
    faults = [f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]
    not_run = sum(bool("".join(c["source"]).strip()) and c["execution_count"] is None for c in cells)
    if not_run:
        faults.append(f"{not_run} cells were not run")
    for _ in range(50):
        seen = page.evaluate(PICTURES, notebook.name)
        if seen >= pictures:
            break
        page.wait_for_timeout(100)
    page.evaluate(CLOSE, notebook.name)
    return faults + [f"{seen} pictures, not {pictures}"] * (seen < pictures)


def run_all(browser, notebooks: list[Path], address: str) -> dict[str, list[str]]:
    "Run the notebooks, two at a time; returns what went wrong in each."
    pictures = {path.stem: path.read_text(encoding="utf-8").count('"image/png":') for path in notebooks}
    waiting, running, faults = list(notebooks), {}, {}
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.goto(address)
    page.wait_for_function("window.jupyterapp", timeout=60_000)
    page.evaluate("Promise.all([jupyterapp.restored, jupyterapp.serviceManager.ready]).then(() => true)")
    while waiting or running:
        while waiting and len(running) < 2:
            path = waiting.pop(0)
            start(page, path.name)
            running[path] = time.monotonic() + PATIENCE
        for path, end in list(running.items()):
            late = time.monotonic() > end
            if late or not page.evaluate(RUNNING, path.name):
                faults[path.stem] = faults_in(page, path, pictures[path.stem]) + [f"not done in {PATIENCE} s"] * late
                del running[path]
        page.wait_for_timeout(300)
    page.close()
    return faults


OPENED = [path for path in CHAPTERS if path.stem in ("00_data", "03_model", "08_export")]


@pytest.mark.book
@pytest.mark.timeout(900)
def test_chapters_run_in_jupyterlab_and_planted_faults_are_seen(browser, lab):
    root, address = lab
    picture = new_output("display_data", data={"image/png": "iVBORw0KGgo="})
    cells = [new_code_cell("1", outputs=[picture]), new_code_cell("import nbdev"), new_code_cell("1")]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), root / "planted.ipynb")
    chapters = [copy_with_kernel(path, root) for path in OPENED]
    assert run_all(browser, [*chapters, root / "planted.ipynb"], address) == {path.stem: [] for path in OPENED} | {
        "planted": ["ModuleNotFoundError: No module named 'nbdev'", "1 cells were not run", "0 pictures, not 1"]}
