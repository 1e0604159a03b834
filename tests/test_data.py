"""What is no lesson in 00_data: faults of disk and network, two processes at once, files that are not ours."""
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_fables

from tinylm import data
from tinylm.data import (
    END_OF_TEXT, InputError, atomic_write, fables, fetch_corpus, prepare, read_documents,
)


def corpus_bytes(count, seed):
    return "".join(f"{story}\n{END_OF_TEXT}\n" for story in fables(count, seed)).encode()


def files_below(folder):
    "All files but locks and other hidden ones."
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if not Path(name).name.startswith("."))


# --- reading


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)),
       st.sampled_from(["\n", "", "\r\n"]))
def test_what_is_written_is_read(tmp_path_factory, texts, end):
    wanted = [text.strip() for text in texts if text.strip() and END_OF_TEXT not in text]
    path = tmp_path_factory.mktemp("d") / "a.txt.gz"
    path.write_bytes(gzip.compress("".join(f"{text}{end}{END_OF_TEXT}{end}" for text in wanted or [" "]).encode()))
    assert list(read_documents(path)) == wanted


def test_broken_utf8_is_marked_even_at_the_very_end(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\xffb" + END_OF_TEXT.encode() + b"caf\xc3")
    assert list(read_documents(tmp_path / "a.txt")) == ["a\ufffdb", "caf\ufffd"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_half_way_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(failure), atomic_write(tmp_path / "link") as file:
        file.write(b"new" * 100_000)
        raise failure
    assert sorted(os.listdir(tmp_path)) == ["link", "real"] and (tmp_path / "real").read_bytes() == b"old"
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"


def test_a_gzip_file_cut_anywhere_is_refused(tmp_path):
    path, whole = tmp_path / "a.txt.gz", gzip.compress(corpus_bytes(20, 0))
    for size in range(1, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="not a whole gzip file"):
            list(read_documents(path))


# --- made corpora


def test_the_built_in_corpus_is_reused_when_whole_and_made_again_when_not(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_STORIES", {"train": (30, 0), "valid": (5, 1)})
    paths = fetch_corpus("fables", tmp_path)
    assert list(read_documents(paths["train"])) == list(fables(30, 0))
    assert list(read_documents(paths["valid"])) == list(fables(5, 1))
    assert json.loads((tmp_path / "fables" / "made_from.json").read_text(encoding="utf-8")) == {
        "grammar_sha256": "611e85af317c8311d999acdc351bfb794186844530635ae254613d7e34880731",
        "train": {"stories": 30, "seed": 0}, "valid": {"stories": 5, "seed": 1},
        "bytes": {split: path.stat().st_size for split, path in paths.items()}}
    made = paths["train"].stat().st_mtime_ns
    assert fetch_corpus("fables", tmp_path) == paths and paths["train"].stat().st_mtime_ns == made
    with open(paths["train"], "a", encoding="utf-8") as file:
        file.write("edited")
    fetch_corpus("fables", tmp_path)
    assert list(read_documents(paths["train"])) == list(fables(30, 0))


def test_stopped_half_way_it_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_STORIES", {"train": (30, 0), "valid": (5, 1)})
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(data, "fables", lambda count, seed: fables(count, seed) if seed == 0 else (1 / 0 for _ in "a"))
        fetch_corpus("fables", tmp_path)
    assert files_below(tmp_path) == []
    assert list(read_documents(fetch_corpus("fables", tmp_path)["valid"])) == list(fables(5, 1))


NO_ROOM = """
import resource, signal, sys
from tinylm.data import InputError, fetch_corpus
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    fetch_corpus(sys.argv[1], sys.argv[2])
except InputError as err:
    print(err)
"""


def test_no_room_is_one_line_and_leaves_no_text(tmp_path):
    done = subprocess.run([sys.executable, "-c", NO_ROOM, "fables", tmp_path], capture_output=True, text=True)
    assert "cannot write" in done.stdout and done.stdout.count("\n") == 1, done.stderr
    assert files_below(tmp_path) == []


def test_a_file_of_your_own(tmp_path, capsys):
    stories, own = list(fables(100, 3)), tmp_path / "mine.txt"
    own.write_bytes(corpus_bytes(100, 3))
    paths = fetch_corpus(str(own), tmp_path / "data")
    assert "last 5 of 100 documents" in capsys.readouterr().err
    assert list(read_documents(paths["train"])) == stories[:95] and list(read_documents(paths["valid"])) == stories[95:]
    mark = hashlib.sha256(own.read_bytes()).hexdigest()[:8]
    assert paths["train"] == tmp_path / "data" / f"mine-{mark}" / "train.txt"
    assert fetch_corpus(str(own), tmp_path / "data") == paths and not capsys.readouterr().err  # reused
    assert fetch_corpus(str(own), tmp_path / "data", str(own)) == {"train": own, "valid": own}
    own.write_text(f"a{END_OF_TEXT}b", encoding="utf-8")  # changed: another text, in another place
    assert list(read_documents(fetch_corpus(str(own), tmp_path / "data")["valid"])) == ["b"]
    assert list(read_documents(paths["train"])) == stories[:95]


@pytest.mark.parametrize("name, text, message", [
    ("none.txt", None, "cannot read"),
    ("empty.txt", b"", "empty"),
    ("blank.txt", f"\n{END_OF_TEXT}\n \n".encode(), "0 documents"),
    ("line.txt", b"one line, which cannot be cut", "1 documents, nothing to hold out"),
    ("packed.txt", gzip.compress(b"a\nb", mtime=0), "a gzip file"),
    ("model.txt", b"\x80\x02\0\0", "no text"),
    ("old.txt", "\ufeffa story".encode("utf-16-le"), "UTF-16; expected UTF-8"),
    ("old.txt.gz", gzip.compress("\ufeffa story".encode("utf-16-be"), mtime=0), "UTF-16; expected UTF-8"),
    ("table.csv", b"a,b", "no such corpus"),
])
def test_files_that_are_no_corpus_are_refused(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_bytes(text)
    with pytest.raises(InputError, match=message) as caught:
        fetch_corpus(str(tmp_path / name), tmp_path / "data")
    assert "\n" not in str(caught.value) and files_below(tmp_path / "data") == []


def test_a_book_without_separators_is_cut_at_a_line_break(tmp_path, capsys):
    lines = [f"line {i}" for i in range(1000)]
    (tmp_path / "book.txt").write_text("\n".join(lines), encoding="utf-8")
    paths = fetch_corpus(str(tmp_path / "book.txt"), tmp_path / "data")
    (train,), (valid,) = (list(read_documents(paths[split])) for split in ("train", "valid"))
    assert train.split("\n") + valid.split("\n") == lines and 45 <= len(valid.split("\n")) <= 55
    assert "book.txt: the last 4" in capsys.readouterr().err


def test_bytes_that_are_not_utf8_are_told_and_u_fffd_itself_is_not(tmp_path, capsys):
    texts = [t.encode("latin-1") for t in ("a cafe", "un café", "thé")] + ["a \ufffd".encode(), b"end"]
    (tmp_path / "old.txt").write_bytes(END_OF_TEXT.encode().join(texts))
    paths = fetch_corpus(str(tmp_path / "old.txt"), tmp_path / "data")
    assert "old.txt: 2 of 5 documents are not UTF-8; see the U+FFFD\n" in capsys.readouterr().err
    assert list(read_documents(paths["train"])) == ["a cafe", "un caf\ufffd", "th\ufffd", "a \ufffd"]
    (tmp_path / "new.txt").write_bytes(END_OF_TEXT.encode().join(texts[3:]))
    fetch_corpus(str(tmp_path / "new.txt"), tmp_path / "data")
    assert "UTF-8" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train.txt", "valid.txt"])
def test_files_that_we_did_not_make_are_not_replaced(tmp_path, name):
    (tmp_path / "fables").mkdir()
    (tmp_path / "fables" / name).write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=f"{name}: not made by tinylm") as refused:
        fetch_corpus("fables", tmp_path)
    assert "\n" not in str(refused.value) and files_below(tmp_path) == [f"fables/{name}"]
    assert (tmp_path / "fables" / name).read_text(encoding="utf-8") == "mine"


# --- tokenizer and token files


@pytest.fixture
def config(tmp_path):
    return SimpleNamespace(corpus=write_fables(tmp_path / "train.txt", 60, 0), vocab_size=300, context_length=32,
                           val_corpus=write_fables(tmp_path / "valid.txt", 5, 1), data_dir=str(tmp_path / "data"))


def changed(config, **fields):
    return SimpleNamespace(**{**vars(config), **fields})


def test_what_fits_is_reused_and_what_does_not_is_made_again(config, capsys):
    tokenizer, train, valid = prepare(config)
    folder = train.path.parent
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(whole) == ["made_from.json", "tokenizer.json", "train.bin", "train.json", "valid.bin", "valid.json"]
    spoiled = {
        "valid.bin": whole["valid.bin"][:-2], "train.bin": b"\xff\xff" + whole["train.bin"][2:], "train.json": b"",
        "tokenizer.json": b"{", "valid.json": whole["valid.json"].replace(tokenizer.fingerprint.encode(), b"0" * 64),
    }
    for name, content in spoiled.items():
        (folder / name).write_bytes(content)
        capsys.readouterr()
        assert prepare(config)[1:] == (train, valid) and "training a tokenizer" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    prepare(config)
    assert capsys.readouterr().err == ""


def test_a_tokenizer_that_we_did_not_make_is_not_replaced(config):
    path = prepare(config)[1].path.with_name("tokenizer.json")
    path.with_name("made_from.json").unlink()
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="tokenizer.json: not made by tinylm"):
        prepare(config)
    assert path.read_text(encoding="utf-8") == "{}"


def test_a_text_too_short_for_a_window_and_a_vocabulary_too_small(config, tmp_path):
    (tmp_path / "short.txt").write_text("Hello.\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"valid.bin: \d+ tokens: too few; one window needs 33: use more text"):
        prepare(changed(config, val_corpus=str(tmp_path / "short.txt")))
    with pytest.raises(InputError, match="257"):
        prepare(changed(config, vocab_size=256))


PREPARE = """
import sys
from types import SimpleNamespace
from tinylm.data import prepare
corpus, val_corpus, data_dir = sys.argv[1:]
config = SimpleNamespace(corpus=corpus, val_corpus=val_corpus, data_dir=data_dir, vocab_size=300, context_length=32)
print([file.sha256 for file in prepare(config)[1:]])
"""


def test_texts_of_one_name_prepared_at_once_have_places_of_their_own(tmp_path):
    commands = []
    for i, name in enumerate(["wiki", "poems", "wiki"]):  # the first and the last want the same
        (tmp_path / name).mkdir(exist_ok=True)
        texts = [write_fables(tmp_path / name / f"{split}.txt", 60, i % 2 + 4 * len(split)) for split in data._STORIES]
        commands.append([*texts, str(tmp_path / "data")])
    with ThreadPoolExecutor() as pool:
        run = [sys.executable, "-c", PREPARE]
        done = list(pool.map(lambda args: subprocess.run([*run, *args], capture_output=True, text=True), commands))
    for (train, valid, _), result in zip(commands, done, strict=True):
        wanted = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in (train, valid)]
        assert result.stdout == f"{wanted}\n", result.stderr
    assert len(list((tmp_path / "data").iterdir())) == 2
    assert "".join(result.stderr for result in done).count("training a tokenizer") == 2


# --- downloads, from a real server


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face Hub that a download needs, with faults on request."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        hub, name = self.server, self.path.rsplit("/", 1)[-1]
        content = hub.files.get(name) if "/resolve/" in self.path else None
        begin = int(re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-").group(1))
        hub.log.append((self.command, name, begin))
        headers = {"X-Error-Code": "EntryNotFound", "Content-Length": 0}
        if content is not None:
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            headers = {"X-Repo-Commit": "c" * 40, "ETag": etag, "X-Linked-ETag": etag, "Accept-Ranges": "bytes",
                       "X-Linked-Size": len(content), "Content-Length": len(content) - begin}
        if content and begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self.send_response(404 if content is None else 206 if begin else 200)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if body and content:
            sent = hub.swapped.get(name, content)[begin:]
            if hub.cuts.get(name):
                hub.cuts[name] -= 1
                sent, self.close_connection = sent[:len(sent) // 2], True
            self.wfile.write(sent)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {
        "TinyStoriesV2-GPT4-train.txt": corpus_bytes(500, 0), "TinyStoriesV2-GPT4-valid.txt": corpus_bytes(20, 1),
        "owt_train.txt.gz": gzip.compress(corpus_bytes(30, 2)), "owt_valid.txt.gz": gzip.compress(corpus_bytes(10, 3)),
    }
    server.log, server.cuts, server.swapped = [], {}, {}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


FETCH = """
import sys
from tinylm.data import InputError, fetch_corpus
try:
    print(*fetch_corpus(sys.argv[1], sys.argv[2]).values())
except InputError as err:
    print("InputError:", err)
"""


def fetch(name, folder, hub=None, code=FETCH):
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port if hub else 9}", "HF_HOME": str(folder / "hf")}
    command = [sys.executable, "-c", code, name, str(folder / "data")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    return done.stdout.strip()


def downloads(hub, name):
    return [begin for verb, file, begin in hub.log if verb == "GET" and file == name]


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub, tmp_path):
    name = "TinyStoriesV2-GPT4-train.txt"
    hub.files[name] *= 80  # the library keeps what has arrived in blocks of 10 MB
    hub.cuts[name] = 2
    fetch("tinystories", tmp_path, hub)
    assert (tmp_path / "data" / "tinystories" / name).read_bytes() == hub.files[name]
    assert downloads(hub, name) == [0, 10485760, 20971520]
    assert files_below(tmp_path / "data" / "tinystories") == sorted(n for n in hub.files if n.startswith("Tiny"))


def test_two_commands_at_once_download_it_once_and_a_third_not_at_all(hub, tmp_path):
    with ThreadPoolExecutor() as pool:
        said = list(pool.map(lambda _: fetch("owt", tmp_path, hub), range(2)))
    assert said[0] == said[1] and downloads(hub, "owt_train.txt.gz") == [0]
    requests = len(hub.log)
    assert fetch("owt", tmp_path, hub) == said[0] and len(hub.log) == requests
    assert list(read_documents(tmp_path / "data" / "owt" / "owt_train.txt.gz")) == list(fables(30, 2))


def test_no_file_no_network_and_no_room_are_one_line_each(hub, tmp_path):
    del hub.files["owt_valid.txt.gz"]
    said = fetch("owt", tmp_path, hub)
    assert said.startswith(f"InputError: owt_valid.txt.gz: cannot download from http://127.0.0.1:{hub.server_port}")
    assert "404" in said and "HF_ENDPOINT" in said
    assert files_below(tmp_path / "data") == ["owt/owt_train.txt.gz"]  # what was whole is kept
    assert fetch("tinystories", tmp_path).startswith("InputError: TinyStoriesV2-GPT4-train.txt: cannot download")
    assert "File too large" in fetch("tinystories", tmp_path, hub, NO_ROOM)
    assert files_below(tmp_path / "data") == ["owt/owt_train.txt.gz"]


def test_a_wrong_file_is_refused_and_not_left_behind(hub, tmp_path):
    name, right = "owt_train.txt.gz", hub.files["owt_train.txt.gz"]
    hub.swapped[name] = right[:100] + bytes([right[100] ^ 1]) + right[101:]  # as long as the true one
    answer = fetch("owt", tmp_path, hub)
    assert answer.startswith("InputError: ") and name in answer and "SHA-256" in answer
    assert files_below(tmp_path / "data") == []
    hub.swapped = {}
    assert fetch("owt", tmp_path, hub).endswith("owt_valid.txt.gz")


def test_texts_that_were_laid_there_by_hand_are_welcome(tmp_path, config):
    folder = tmp_path / "data" / "tinystories"
    folder.mkdir(parents=True)
    for split in ("train", "valid"):
        (folder / f"TinyStoriesV2-GPT4-{split}.txt").write_bytes(corpus_bytes(60, len(split)))
    first = prepare(own := changed(config, corpus="tinystories", val_corpus=None))
    assert prepare(own)[1:] == first[1:]
    (folder / "TinyStoriesV2-GPT4-train.txt").write_bytes(corpus_bytes(61, 9))
    assert prepare(own)[1].sha256 != first[1].sha256
