"""What is no lesson in 00_data: faults of disk and network, two commands at once, files that are not ours."""
import gzip
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import no_room
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


@settings(deadline=None, max_examples=40)
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
    for size in range(1, len(whole), 397):
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


def test_no_room_is_one_line_and_leaves_no_text(tmp_path):
    with no_room(50_000), pytest.raises(InputError, match="cannot write") as refused:
        fetch_corpus("fables", tmp_path)
    assert "\n" not in str(refused.value) and files_below(tmp_path) == []


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
    ("fable", None, "cannot read"),
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


def test_files_that_we_did_not_make_are_not_replaced(tmp_path):
    (tmp_path / "fables").mkdir()
    (tmp_path / "fables/valid.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="valid.txt: not made by tinylm"):
        fetch_corpus("fables", tmp_path)
    assert files_below(tmp_path) == ["fables/valid.txt"]
    assert (tmp_path / "fables/valid.txt").read_text(encoding="utf-8") == "mine"


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


def test_texts_of_one_name_prepared_at_once_have_places_of_their_own(config, tmp_path, capsys):
    configs = []
    for i, name in enumerate(["wiki", "poems", "wiki"]):  # the first and the last want the same
        (tmp_path / name).mkdir(exist_ok=True)
        configs.append(changed(config, corpus=write_fables(tmp_path / name / "train.txt", 60, i % 2)))
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(prepare, configs))
    for own, (_, train, _) in zip(configs, done, strict=True):
        assert train.sha256 == hashlib.sha256(Path(own.corpus).read_bytes()).hexdigest()
    assert len(list((tmp_path / "data").iterdir())) == 2
    assert capsys.readouterr().err.count("training a tokenizer") == 2


# --- downloads; in test_golden.py they come from a real server


@pytest.fixture
def hub(monkeypatch):
    "The files of a hub; whatever else is asked for is not there."
    files, log = {f"owt_{split}.txt.gz": gzip.compress(split.encode() * 99) for split in ("train", "valid")}, []

    def download(repo, name, repo_type, local_dir):
        log.append(name)
        with atomic_write(Path(local_dir) / name) as file:
            file.write(files[name])
        return Path(local_dir) / name

    def metadata(url):
        return SimpleNamespace(etag=hashlib.sha256(files[url.rpartition("/")[2]]).hexdigest())

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    return SimpleNamespace(files=files, log=log)


def test_two_commands_at_once_download_it_once(hub, tmp_path):
    with ThreadPoolExecutor() as pool:
        one, two = pool.map(lambda _: fetch_corpus("owt", tmp_path), range(2))
    assert one == two and sorted(hub.log) == sorted(hub.files)


def test_no_file_and_no_room_are_one_line_each_and_what_was_whole_is_kept(hub, tmp_path):
    valid = hub.files.pop("owt_valid.txt.gz")
    with pytest.raises(InputError, match=r"owt_valid.txt.gz: cannot download from https://.* HF_ENDPOINT"):
        fetch_corpus("owt", tmp_path)
    hub.files["owt_valid.txt.gz"] = valid
    with no_room(9), pytest.raises(InputError, match="owt_valid.txt.gz: cannot download .*File too large") as refused:
        fetch_corpus("owt", tmp_path)
    assert "\n" not in str(refused.value) and files_below(tmp_path) == ["owt/owt_train.txt.gz"]


def test_texts_that_were_laid_there_by_hand_are_welcome(tmp_path, config):
    folder = tmp_path / "data" / "tinystories"
    folder.mkdir(parents=True)
    for split in ("train", "valid"):
        (folder / f"TinyStoriesV2-GPT4-{split}.txt").write_bytes(corpus_bytes(60, len(split)))
    first = prepare(own := changed(config, corpus="tinystories", val_corpus=None))
    assert prepare(own)[1:] == first[1:]
    (folder / "TinyStoriesV2-GPT4-train.txt").write_bytes(corpus_bytes(61, 9))
    assert prepare(own)[1].sha256 != first[1].sha256
