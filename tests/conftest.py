"""What several tests share: the chapters, a browser, a web server on this machine."""
import functools
import http.server
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "nbs").glob("*.ipynb"))


@pytest.fixture(scope="session")
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
