"""What is no lesson in 00_data: faults of disk and network, and the proof that the Fables grammar is unambiguous."""

import gzip
import hashlib
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import data
from tinylm.data import END_OF_TEXT, InputError, atomic_write, fable_logprob, fables, fetch_corpus, read_documents

# ---------------------------------------------------------------- writing


def test_a_failure_half_way_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    for failure in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(failure), atomic_write(path) as file:
            file.write(b"new" * 100_000)
            raise failure
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_nobody_sees_the_new_file_before_it_is_whole(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "text", "w"), atomic_write(tmp_path / "bytes"):
            pass
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("text", "bytes")] == [mode, mode]


def test_the_disk_has_the_file_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *a: (calls.append("fsync"), fsync(*a)))
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), replace(*a)))
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"new")
    assert calls[:2] == ["fsync", "replace"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_write(tmp_path / "link", "w") as file:
        file.write("ä")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == "ä".encode()


FULL_DISK = """
import resource, signal, sys
from tinylm.data import InputError, atomic_write, fetch_corpus
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    if sys.argv[2] == "fables":
        fetch_corpus("fables", sys.argv[1])
    else:
        with atomic_write(sys.argv[1] + "/a.bin") as file:
            file.write(b"new" * 100_000)
except InputError as err:
    print(err)
"""


@pytest.mark.parametrize("what", ["a.bin", "fables"])
def test_no_room_is_one_line_and_leaves_nothing(tmp_path, what):
    (tmp_path / "a.bin").write_bytes(b"old")
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "cannot write" in done.stdout and "free some space" in done.stdout and done.stdout.count("\n") == 1
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == b"old"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_really_full_disk(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        with pytest.raises(InputError, match="No space left"), atomic_write(tmp_path / "a.bin") as file:
            file.write(b"x" * 200_000)
        assert os.listdir(tmp_path) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="cannot write"), atomic_write(tmp_path / "file" / "a.txt"):
        pass


# ---------------------------------------------------------------- reading


@given(st.lists(st.text(max_size=30), max_size=6), st.integers(1, 40))
def test_documents_do_not_depend_on_the_blocks(texts, size):
    whole = END_OF_TEXT.join(texts)
    blocks = [whole[i : i + size] for i in range(0, len(whole), size)]
    assert list(data._split(blocks)) == whole.split(END_OF_TEXT)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1), st.booleans())
def test_what_is_written_is_read(tmp_path_factory, texts, packed):
    wanted = [text.strip() for text in texts if text.strip() and END_OF_TEXT not in text]
    path = tmp_path_factory.mktemp("d") / ("a.txt.gz" if packed else "a.txt")
    raw = "".join(f"{text}\n{END_OF_TEXT}\n" for text in wanted).encode()
    path.write_bytes(gzip.compress(raw) if packed else raw)
    if wanted:
        assert list(read_documents(path)) == wanted
    else:
        with pytest.raises(InputError, match="empty"):
            list(read_documents(path))


def test_broken_utf8_is_marked_even_at_the_very_end(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\xffb" + END_OF_TEXT.encode() + b"caf\xc3")
    assert list(read_documents(tmp_path / "a.txt")) == ["a\ufffdb", "caf\ufffd"]


def test_a_character_that_straddles_two_blocks_survives(tmp_path):
    text = "x" * ((1 << 20) - 1) + "é" + "y"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert list(read_documents(tmp_path / "a.txt")) == [text]


def test_a_gzip_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "a.txt.gz"
    whole = gzip.compress("".join(f"{story}\n{END_OF_TEXT}\n" for story in fables(20, 0)).encode())
    for size in range(1, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="not a whole gzip file"):
            list(read_documents(path))


def test_reading_needs_no_more_memory_for_a_larger_file(tmp_path):
    code = "import sys; from tinylm.data import peak_memory, read_documents\n"
    code += "n = sum(1 for _ in read_documents(sys.argv[1])); print(peak_memory())"
    block = "".join(f"{story}\n{END_OF_TEXT}\n" for story in fables(1000, 0)).encode()
    peaks = []
    for copies in (4, 80):
        with gzip.open(tmp_path / "a.txt.gz", "wb", compresslevel=1) as file:
            for _ in range(copies):
                file.write(block)
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.txt.gz"], capture_output=True, text=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 5_000_000  # the second file is 67 MB longer


# ---------------------------------------------------------------- the grammar


def test_no_two_series_of_choices_tell_the_same_words():
    assert list(clashes(data._FABLES)) == []


def test_the_search_for_clashes_finds_them():
    same_words = "story:\n<a:x>b\n<a:y>\nx: a, c\ny: ab, d"
    one_begins_the_other = "story:\n<x>.\nx: Go, Go on"
    hidden_in_a_recalled_word = "story:\n<a:x> <end>\nx: so, he\nend:\n{a} ends\nhe ends"
    for text in (same_words, one_begins_the_other, hidden_in_a_recalled_word):
        assert list(clashes(data._compile(text))), text


def clashes(grammar):
    """Pairs of options of one rule such that a text of one can begin a text of the other.

    Two options are told side by side; the one that is behind must catch up with what the other has said. Where a
    word comes from before the rule, every word that this name can stand for is tried, the same for both.
    """
    names = {}
    steps = [step for rule in grammar.values() for option in rule.options for step in option]
    for kind, _, entries in steps:
        for _, notes in entries if kind == data._CHOOSE else ():
            for key, word in notes.items():
                names.setdefault(key, set()).add(word)
    for name, rule in grammar.items():
        options = [tuple(reversed(option)) for option in rule.options]
        for i in range(len(options)):
            for j in range(i):
                if clash(grammar, names, options[i], options[j]):
                    yield name, i, j


def clash(grammar, names, one, two):
    agenda = [((one, {}), (two, {}), "")]  # the second value is ahead of the first by the third
    while agenda:
        (todo, memory), ahead, lead = agenda.pop()
        if not todo or (not lead and not ahead[0]):
            return True
        (kind, what, entries), rest = todo[0], todo[1:]
        if kind == data._SAY:
            moves = [(what, (rest, memory), ahead)]
        elif kind == data._TELL:
            moves = [("", ((*reversed(option), *rest), memory), ahead) for option in grammar[what].options]
        elif kind == data._CHOOSE:
            moves = [(word, (rest, memory | notes), ahead) for word, notes in entries]
        elif what in memory:
            moves = [(memory[what], (rest, memory), ahead)]
        else:
            moves = [
                (word, (rest, memory | {what: word}), (ahead[0], {what: word} | ahead[1])) for word in names[what]
            ]
        for said, behind, other in moves:
            if lead.startswith(said):
                agenda.append((behind, other, lead[len(said) :]))
            elif said.startswith(lead):
                agenda.append((other, behind, said[len(lead) :]))
    return False


def test_many_stories_have_one_parse_with_the_sampled_probability():
    random = Random(5).random
    for _ in range(400):
        story, logprob = data._sample(data._FABLES, random)
        assert len(list(data._parses(data._FABLES, story))) == 1
        assert fable_logprob(story) == logprob


def test_the_entropy_formula_agrees_with_20000_stories():
    random = Random(6).random
    nats = [-data._sample(data._FABLES, random)[1] for _ in range(20_000)]
    mean = sum(nats) / len(nats)
    error = (sum((x - mean) ** 2 for x in nats) / len(nats) ** 2) ** 0.5
    assert abs(mean - data._entropy(data._FABLES)) < 4 * error < 0.2


def test_options_occur_as_often_as_their_weights_say():
    total = 4000
    plots = Counter()
    for story in fables(total, 9):
        choices = next(data._parses(data._FABLES, story))
        plots[next(b.name for a, b in zip(choices, choices[1:], strict=False) if a.name == "plot")] += 1
    rule = data._FABLES["plot"]
    before = 0.0
    for after, option in zip(rule.cumulative, rule.options, strict=True):
        p, before = after - before, after
        assert abs(plots[option[0][1]] - total * p) < 4.5 * (total * p * (1 - p)) ** 0.5


STORIES = list(fables(50, 21))


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(STORIES), st.data())
def test_a_changed_word_is_refused_or_has_its_own_probability(story, draw):
    """A changed text is either none of our stories, or a story that parses to its own probability."""
    words = re.findall(r"\w+|\W+", story)
    at = draw.draw(st.integers(0, len(words) - 1))
    new = draw.draw(st.sampled_from(words) | st.text(max_size=5))
    changed = "".join([*words[:at], new, *words[at + 1 :]])
    try:
        fable_logprob(changed)
    except InputError as err:
        assert "not a Fables story" in str(err) and "\n" not in str(err)
    else:
        assert len(list(data._parses(data._FABLES, changed))) == 1


def test_a_contradicted_reference_is_refused():
    refused = 0
    for story in STORIES:
        treat = next(c for c in next(data._parses(data._FABLES, story)) if c.name == "treat")
        word = story[treat.start : treat.end]
        other = "berry pie" if word != "berry pie" else "apple tart"
        last = story.rfind(word)
        if last > treat.start:
            refused += 1
            with pytest.raises(InputError):
                fable_logprob(story[:last] + other + story[last + len(word) :])
        assert fable_logprob(story.replace(word, other)) < 0  # changed everywhere, it is another good story
    assert refused > 25


def test_the_english_is_right():
    for story in fables(3000, 31):
        assert not re.search(r"\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiou]|[{}<>|¶]|  |\n \w|\.\.|\b(\w+) \1\b", story), story
        assert story.count('"') % 2 == 0 and all(part[-1] in '.!?"' for part in story.split("\n\n")), story
        assert all(re.match(r'["A-Z]', part) for part in story.split("\n\n"))
        assert 120 <= len(story.split()) <= 230


def test_stories_are_the_same_on_every_machine():
    digest = hashlib.sha256("\n".join(fables(1000, 0)).encode()).hexdigest()
    # A new grammar changes this line, and with it every record made with Fables.
    assert digest == "f4907ff35ce8d680b08e9f934cfbea73adf4e4d5c7573f386a47b38e35017996"


# ---------------------------------------------------------------- made corpora


def test_the_built_in_corpus_is_reused_when_whole_and_made_again_when_not(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_STORIES", {"train": (30, 0), "valid": (5, 1)})
    paths = fetch_corpus("fables", tmp_path)
    assert list(read_documents(paths["train"])) == list(fables(30, 0))
    assert list(read_documents(paths["valid"])) == list(fables(5, 1))
    made = paths["train"].stat().st_mtime_ns
    fetch_corpus("fables", tmp_path)
    assert paths["train"].stat().st_mtime_ns == made
    with open(paths["train"], "a", encoding="utf-8") as file:
        file.write("edited")
    fetch_corpus("fables", tmp_path)
    assert list(read_documents(paths["train"])) == list(fables(30, 0))
    monkeypatch.setattr(data, "_STORIES", {"train": (31, 0), "valid": (5, 1)})
    fetch_corpus("fables", tmp_path)
    assert sum(1 for _ in read_documents(paths["train"])) == 31


def test_a_file_of_your_own(tmp_path, capsys):
    stories = list(fables(100, 3))
    own, valid = tmp_path / "mine.txt", tmp_path / "valid.txt"
    own.write_text("".join(f"{story}\n{END_OF_TEXT}\n" for story in stories), encoding="utf-8")
    paths = fetch_corpus(str(own), tmp_path / "data")
    assert "last 5 of 100 documents" in capsys.readouterr().err
    assert list(read_documents(paths["train"])) == stories[:95]
    assert list(read_documents(paths["valid"])) == stories[95:]
    valid.write_text(f"one{END_OF_TEXT}", encoding="utf-8")
    assert fetch_corpus(str(own), tmp_path / "data", str(valid)) == {"train": own, "valid": valid}
    own.write_text(f"a{END_OF_TEXT}b", encoding="utf-8")  # changed: split again
    assert list(read_documents(fetch_corpus(str(own), tmp_path / "data")["valid"])) == ["b"]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("none.txt", None, "cannot read"),
        ("empty.txt", "", "empty"),
        ("blank.txt", f"\n{END_OF_TEXT}\n \n", "empty"),
        ("line.txt", "one line, which cannot be cut", "only 1 document"),
        ("table.csv", "a,b", "not the name of a text file"),
        ("table.csv", None, "no such corpus"),
    ],
)
def test_files_that_are_no_corpus_are_refused_and_nothing_is_written(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        fetch_corpus(str(tmp_path / name), tmp_path / "data")
    assert "\n" not in str(caught.value) and not (tmp_path / "data").exists()


def test_a_book_without_separators_is_cut_at_a_line_break(tmp_path, capsys):
    lines = [f"line {i}" for i in range(1000)]
    (tmp_path / "book.txt").write_text("\n".join(lines), encoding="utf-8")
    paths = fetch_corpus(str(tmp_path / "book.txt"), tmp_path / "data")
    train, valid = (list(read_documents(paths[split])) for split in ("train", "valid"))
    assert len(train) == len(valid) == 1 and train[0].split("\n") + valid[0].split("\n") == lines
    assert 45 <= len(valid[0].split("\n")) <= 55
    assert "one document; the last 4" in capsys.readouterr().err


def test_bytes_that_are_not_utf8_are_told(tmp_path, capsys):
    (tmp_path / "old.txt").write_bytes(f"a cafe{END_OF_TEXT}un café{END_OF_TEXT}thé{END_OF_TEXT}".encode("latin-1"))
    fetch_corpus(str(tmp_path / "old.txt"), tmp_path / "data")
    assert "old.txt: 2 of 3 documents hold bytes that are not UTF-8, now U+FFFD\n" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_utf16_is_refused_with_the_way_out(tmp_path, name, encoding):
    data = ("\ufeff" + "a story\n" * 99).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(InputError, match="UTF-16; expected UTF-8"):
        fetch_corpus(str(tmp_path / name), tmp_path / "data")


def test_a_missing_validation_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="none.txt"):
        fetch_corpus("fables", tmp_path, str(tmp_path / "none.txt"))


def test_a_file_named_like_a_built_in_corpus_has_a_folder_of_its_own():
    assert data.corpus_name("x/fables.txt") == "my-fables"
    assert data.corpus_name("x/books.txt.gz") == "books"
    assert data.corpus_name("tinystories") == "tinystories"


# ---------------------------------------------------------------- downloads, from a real server


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face Hub that a download needs, with faults on request."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        hub = self.server
        name = self.path.rsplit("/", 1)[-1]
        hub.log.append((self.command, name, self.headers.get("Range")))
        if hub.dead or "/resolve/" not in self.path or name not in hub.files:
            self.send_response(503 if hub.dead else 404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = hub.files[name]
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-").group(1))
        self.send_response(206 if self.headers.get("Range") else 200)
        if self.headers.get("Range"):
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if body:
            sent = hub.swapped.get(name, content)[start:]
            if hub.cuts.get(name):
                hub.cuts[name] -= 1
                sent = sent[: len(sent) // 2]
                self.close_connection, hub.dead = True, hub.dies
            self.wfile.write(sent)

    def log_message(self, *args):
        pass


def corpus_bytes(count, seed):
    return "".join(f"{story}\n{END_OF_TEXT}\n" for story in fables(count, seed)).encode()


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {
        "TinyStoriesV2-GPT4-train.txt": corpus_bytes(500, 0),
        "TinyStoriesV2-GPT4-valid.txt": corpus_bytes(20, 1),
        "owt_train.txt.gz": gzip.compress(corpus_bytes(30, 2)),
        "owt_valid.txt.gz": gzip.compress(corpus_bytes(10, 3)),
    }
    server.log, server.cuts, server.swapped = [], {}, {}
    server.dies = server.dead = False  # whether it stops working after a cut; whether it has
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
    for split, path in fetch_corpus(sys.argv[1], sys.argv[2]).items():
        print(split, path)
except InputError as err:
    print("InputError:", err)
"""


def fetch(name, folder, endpoint):
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf")}
    env["TQDM_POSITION"] = "-1"  # show the progress bar although this is no terminal
    command = [sys.executable, "-c", FETCH, name, str(folder / "data")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def endpoint_of(server):
    return f"http://127.0.0.1:{server.server_port}"


def ranges(hub, name):
    return [span for verb, file, span in hub.log if verb == "GET" and file == name]


def files_below(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return sorted(path.relative_to(folder).as_posix() for path in files)


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub, tmp_path):
    name = "TinyStoriesV2-GPT4-train.txt"
    hub.files[name] *= 80  # the library keeps what has arrived in blocks of 10 MB
    hub.cuts[name] = 2
    said, progress = fetch("tinystories", tmp_path, endpoint_of(hub))
    assert said.startswith("train ") and "100%" in progress
    assert (tmp_path / "data" / "tinystories" / name).read_bytes() == hub.files[name]
    assert ranges(hub, name) == [None, "bytes=10485760-", "bytes=20971520-"]
    assert files_below(tmp_path / "data" / "tinystories") == sorted(n for n in hub.files if n.startswith("Tiny"))


def test_the_next_command_goes_on_where_the_last_one_gave_up(hub, tmp_path):
    name = "TinyStoriesV2-GPT4-train.txt"
    hub.files[name] *= 80
    hub.cuts[name], hub.dies = 1, True
    said, _ = fetch("tinystories", tmp_path, endpoint_of(hub))
    assert said.startswith(f"InputError: {name}: cannot download") and "what has arrived is kept" in said
    assert not (tmp_path / "data" / "tinystories" / name).exists()
    hub.log.clear()
    hub.dead = hub.dies = False
    assert fetch("tinystories", tmp_path, endpoint_of(hub))[0].startswith("train ")
    assert (tmp_path / "data" / "tinystories" / name).read_bytes() == hub.files[name]
    assert ranges(hub, name) == ["bytes=10485760-"]


def test_what_lies_there_is_not_downloaded_again(hub, tmp_path):
    first, _ = fetch("owt", tmp_path, endpoint_of(hub))
    requests = len(hub.log)
    second, _ = fetch("owt", tmp_path, endpoint_of(hub))
    assert first == second and len(hub.log) == requests
    assert list(read_documents(tmp_path / "data" / "owt" / "owt_train.txt.gz")) == list(fables(30, 2))


def test_two_commands_at_once_download_it_once(hub, tmp_path):
    with ThreadPoolExecutor() as pool:
        said = [r[0] for r in pool.map(lambda _: fetch("owt", tmp_path, endpoint_of(hub)), range(2))]
    assert said[0] == said[1] and said[0].startswith("train ")
    assert ranges(hub, "owt_train.txt.gz") == [None]


def test_404_is_one_line(hub, tmp_path):
    del hub.files["owt_valid.txt.gz"]
    said, _ = fetch("owt", tmp_path, endpoint_of(hub))
    assert said.startswith("InputError: owt_valid.txt.gz: cannot download from http://127.0.0.1")
    assert "404" in said and "HF_ENDPOINT" in said and "\n" not in said
    assert "owt_train.txt.gz" in files_below(tmp_path / "data" / "owt")  # what was whole is kept


def test_no_network_is_one_line(tmp_path):
    said, _ = fetch("tinystories", tmp_path, "http://127.0.0.1:9")
    assert said.startswith("InputError: TinyStoriesV2-GPT4-train.txt: cannot download") and "\n" not in said
    assert files_below(tmp_path / "data") == []


@pytest.mark.parametrize("fault", ["one letter", "no corpus", "not gzip"])
def test_a_wrong_file_is_refused_and_not_left_behind(hub, tmp_path, fault):
    name = "owt_train.txt.gz"
    if fault == "one letter":  # as long as the true one, but not the same: only the SHA-256 can tell
        right = hub.files[name]
        hub.swapped[name] = right[:100] + bytes([right[100] ^ 1]) + right[101:]
    elif fault == "no corpus":  # consistent in itself, as from a mirror that serves something else
        hub.files[name] = gzip.compress(b"<html>Please log in</html>" * 1000)
    else:
        hub.files[name] = b"<html>Please log in</html>" * 1000
    said, _ = fetch("owt", tmp_path, endpoint_of(hub))
    assert said.startswith("InputError: ") and name in said and "\n" not in said
    assert {"one letter": "SHA-256", "no corpus": "not a corpus", "not gzip": "gzip"}[fault] in said
    assert files_below(tmp_path / "data") == []
    hub.swapped.clear()
    hub.files[name] = gzip.compress(corpus_bytes(30, 2))
    assert fetch("owt", tmp_path, endpoint_of(hub))[0].startswith("train ")


# ---------------------------------------------------------------- real data, and imports


def test_real_tinystories():
    folder = Path(__file__).parents[2] / "shared" / "data" / "tinystories"
    if not folder.exists():
        pytest.skip("no TinyStories sample beside the project (../shared/data/tinystories)")
    stories = list(read_documents(folder / "valid_v2.txt.gz"))
    assert len(stories) == 3000 and all(story == story.strip() != "" for story in stories)


def test_importing_data_does_not_import_torch():
    code = "import sys, tinylm.data; assert not {'torch', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
