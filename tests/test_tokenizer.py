"""Faults, equality with other tokenizers, and properties of tinylm.tokenizer that are no lesson."""

import functools
import gzip
import itertools
import json
import os
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinylm import tokenizer as module
from tinylm.core import END_OF_TEXT, InputError
from tinylm.kernels import count_pretokens
from tinylm.tokenizer import PRETOKEN_PATTERN, TokenFile, Tokenizer, train_bpe, train_bpe_naive

# few examples, and the same ones each time, on a busy machine too
settings.register_profile("tinylm", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("tinylm")
SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
SPECIAL = [END_OF_TEXT, END_OF_TEXT * 2, "<|pad|>", " x "]

CORPUS = """It's a fox's life, isn't it? They'll see; we've seen, I'm sure, you're right, he'd go.
  Two  spaces,\tand tabs\t\tand\r\n\r\nlines   \n\n\n Números 123 4567 ¾ ² Ⅷ, ça va? Straße, naïve, e\u0301te\u0301.
日本語のテキスト、中文文本。 한국어 텍스트 שלום עולם مرحبا بالعالم Привет, мир! สวัสดี नमस्ते
👩\u200d🚀👨\u200d👩\u200d👧 🏳️\u200d🌈 🦊🦊🦊 \u200b\ufeff\u00a0\u3000\x00\x01\x7f\x85 ''' '''s 'S 'LL "quoted" --- ...
aaaaaaaaaaaaaaaa ababababab the the the then they them there other mother brother
"""

# Text that looks like what people and machines write, more often than uniform code points would.
PIECES = st.sampled_from(
    [*SPECIAL, "'s", "'ll", "'re", "'", "''", " ", "  ", "\n", "\r\n", "\t", "\x00", "\u00a0", "\u3000", "\u0301", "é"]
    + ["🦊", "👩\u200d🚀", "日本", "שלום", "مرحبا", "the", " the", "12", "¾", "-", "<|endof", "text|>", "<|", "aaaa"]
)
ASSIGNED = st.characters(exclude_categories=["Cn", "Cs"], max_codepoint=0x1FAFF)  # all libraries know these
TEXTS = st.lists(st.one_of(PIECES, st.text(ASSIGNED, max_size=8)), max_size=20).map("".join)


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text((CORPUS.replace("\0", "") + END_OF_TEXT) * 3, encoding="utf-8", newline="")  # a file holds none
    return path


@pytest.fixture(scope="session")
def tokenizer(corpus_path):
    return Tokenizer(*train_bpe(corpus_path, 500, SPECIAL), SPECIAL)


@pytest.fixture(scope="session")
def hugging_face(tokenizer, tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(tokenizer.save(tmp_path_factory.mktemp("saved"))))


def as_tiktoken(tokenizer):
    tiktoken = pytest.importorskip("tiktoken")
    special = tokenizer.special_tokens
    ranks = {token: i for i, token in tokenizer.vocab.items() if i not in special.values()}
    return tiktoken.Encoding("test", pat_str=PRETOKEN_PATTERN, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="session")
def tiktoken_encoding(tokenizer):
    return as_tiktoken(tokenizer)


# --- training


@given(text=TEXTS, block_size=st.integers(1, 50), num_workers=st.sampled_from([1, 2, 8]))
def test_any_workers_and_blocks_train_as_the_naive_one(text, block_size, num_workers, tmp_path_factory):
    path, text = tmp_path_factory.mktemp("blocks") / "x.txt", text.replace("\0", "")
    path.write_text("." + text, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "count_pretokens", functools.partial(count_pretokens, block_size=block_size))
        found = train_bpe(path, 300, SPECIAL, num_workers=num_workers)
    assert found == train_bpe_naive("." + text, 300, SPECIAL)


def test_gzip_and_crlf_are_read_as_they_are(tokenizer, corpus_path, tmp_path):
    packed = tmp_path / "corpus.txt.gz"
    packed.write_bytes(gzip.compress(corpus_path.read_bytes()))
    assert train_bpe(packed, 500, SPECIAL) == (tokenizer.vocab, tokenizer.merges)
    one, two = tokenizer.encode_file(packed, tmp_path / "x"), tokenizer.encode_file(corpus_path, tmp_path / "y.bin")
    assert one.path.name == "x.bin" and one.source == "corpus.txt.gz"
    assert one.path.read_bytes() == two.path.read_bytes()
    packed.write_bytes(gzip.compress(b"a\r\n\r\nb" * 9))
    assert train_bpe(packed, 257, [])[1] == [(b"\r", b"\n")]


def test_a_vocabulary_that_is_too_small_or_too_large(corpus_path, tmp_path, capsys):
    with pytest.raises(InputError, match="vocab_size 256: give 257 or more"):
        train_bpe(corpus_path, 256, [END_OF_TEXT])
    assert train_bpe(corpus_path, 257, [END_OF_TEXT])[1] == []
    (tmp_path / "small.txt").write_text("ab ab", encoding="utf-8")
    vocab, merges = train_bpe(tmp_path / "small.txt", 1000, [END_OF_TEXT])
    assert merges == [(b"a", b"b"), (b" ", b"ab")] and len(vocab) == 259
    assert capsys.readouterr().err.endswith("small.txt: 259 of 1000 tokens: no pair is left\n")


def test_files_that_cannot_be_read(tmp_path, tokenizer):
    (tmp_path / "empty.txt").touch()
    for name in ["missing.txt", "missing.txt.gz", "empty.txt", "."]:
        with pytest.raises(InputError):
            train_bpe(tmp_path / name, 300, [])
        with pytest.raises(InputError):
            tokenizer.encode_file(tmp_path / name, tmp_path / "out.bin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt"]


# --- encoding


@given(st.text())
def test_round_trip_of_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.binary())
def test_decoding_any_bytes_replaces_what_is_broken(tokenizer, data):
    assert tokenizer.decode(data) == data.decode(errors="replace")


@given(st.text(st.one_of(st.characters(categories=["Cs"]), st.sampled_from("a \n🦊")), max_size=12))
@example("\ud83e\udd8a")
@example("\ud83e\ud83e\udd8a\udd8a")
def test_surrogates_are_treated_as_tiktoken_treats_them(tokenizer, tiktoken_encoding, text):
    assert tokenizer.encode(text) == tiktoken_encoding.encode(text, allowed_special="all")


@given(TEXTS)
@example(END_OF_TEXT * 3 + " x " + END_OF_TEXT)
@example(f" {END_OF_TEXT} \n{END_OF_TEXT}\n x  x ")
@example("a  " + END_OF_TEXT + "  b")
def test_ids_equal_those_of_hugging_face(tokenizer, hugging_face, text):
    assert tokenizer.encode(text) == hugging_face.encode(text).ids


@given(TEXTS)
def test_ids_equal_those_of_tiktoken(tokenizer, tiktoken_encoding, text):
    # tiktoken does not promise the longest of overlapping special tokens, so each is tried alone.
    text = text.replace(END_OF_TEXT * 2, "").replace(" x ", "")
    assert tokenizer.encode(text) == tiktoken_encoding.encode(text, allowed_special="all")


@given(text=TEXTS, places=st.lists(st.integers(0, 100), max_size=20))
def test_streaming_gives_the_ids_of_the_whole(tokenizer, text, places):
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    chunks = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert list(tokenizer.encode_iterable(chunks)) == tokenizer.encode(text)


@given(data=st.lists(st.one_of(PIECES.map(str.encode), st.binary(max_size=4)), max_size=20).map(b"".join))
@settings(max_examples=25)
def test_a_file_of_any_bytes_gives_the_ids_of_its_text(tokenizer, data, tmp_path_factory):
    folder, data = tmp_path_factory.mktemp("any"), data.replace(b"\0", b"")
    (folder / "x.txt").write_bytes(b"." + data)
    expected = tokenizer.encode("." + data.decode(errors="replace"))
    for num_workers in (1, 8):
        made = tokenizer.encode_file(folder / "x.txt", folder / "x", num_workers=num_workers)
        assert made.tokens().tolist() == expected


def test_streaming_takes_what_it_needs_and_no_more(tokenizer):
    places = iter(range(100_000))  # as good as endless, and no trap for a program that reads it all
    ids = tokenizer.encode_iterable("Once upon a time. " for _ in places)
    assert len(list(itertools.islice(ids, 100_000))) == 100_000 and next(places) * 18 < 500_000


def test_memory_does_not_grow_with_the_file(tokenizer, corpus_path, tmp_path):
    block = b"the weather in the hills is the same as ever, he said\n" * 20_000  # 1.1 MB
    (tmp_path / "long.txt.gz").write_bytes(gzip.compress(block * 30, 1))
    tokenizer.encode_file(corpus_path, tmp_path / "short", num_workers=1)  # compile, and make a cache
    tracemalloc.start()
    tokenizer.encode_file(tmp_path / "long.txt.gz", tmp_path / "long", num_workers=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6 < 30 * len(block)


def test_ids_that_the_vocabulary_leaves_out():
    gappy = Tokenizer({i: bytes([i]) for i in range(256)} | {300: b"ab"}, [(b"a", b"b")])
    assert gappy.encode("xab") == [120, 300] and gappy.decode(iter([120, 300])) == "xab" and gappy.decode([]) == ""
    with pytest.raises(InputError, match="token id 299"):
        gappy.decode([120, 299])


@pytest.mark.parametrize("ids", [[65, -1], [65, 500], [10**9], [2**70], [104.7], ["a"], np.array([0.5])], ids=str)
def test_ids_that_are_none(tokenizer, ids):
    with pytest.raises(InputError, match="token id .*: not in the vocabulary"):
        tokenizer.decode(ids)


# --- files


def test_load_reads_what_hugging_face_writes(tokenizer, hugging_face, tmp_path):
    hugging_face.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


END, TEXT = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
KNOWN = {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [496], "tokens": [END_OF_TEXT]}}
BEGIN = {"type": "TemplateProcessing", "single": [END, TEXT], "pair": [TEXT, TEXT], "special_tokens": KNOWN}
LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
NO_EFFECT = [
    ("post_processor", LEVEL), ("post_processor", BEGIN), ("model.unk_token", END_OF_TEXT),
    ("pre_tokenizer.trim_offsets", False), ("decoder", None), ("added_tokens.0.special", False),
]
EFFECT = [
    ("normalizer", {"type": "NFC"}), ("model.dropout", 0.5), ("model.type", "WordPiece"), ("model.merges", [["a"]]),
    ("truncation", {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}), ("model", None),
    ("pre_tokenizer", {"type": "Whitespace"}), ("pre_tokenizer", None), ("pre_tokenizer.use_regex", False),
    ("pre_tokenizer.add_prefix_space", True), ("model.ignore_merges", True), ("model.end_of_word_suffix", "</w>"),
    ("added_tokens.0.lstrip", True), ("added_tokens.0.normalized", True), ("added_tokens.0.id", 7), ("news", 1),
    ("post_processor", {**BEGIN, "single": [TEXT, END]}), ("post_processor", {**BEGIN, "single": [END, END, TEXT]}),
    ("post_processor", {"type": "BertProcessing", "sep": ["x", 1], "cls": ["y", 2]}), ("model.vocab", {"日": 1}),
]


def write_changed(tokenizer, folder, setting, value):
    path = tokenizer.save(folder)
    whole = json.loads(path.read_text(encoding="utf-8"))
    *parts, last = setting.split(".")
    place = functools.reduce(lambda found, part: found[int(part) if part.isdigit() else part], parts, whole)
    place[last] = value
    path.write_text(json.dumps(whole), encoding="utf-8")
    return path


@pytest.mark.parametrize("setting, value", NO_EFFECT, ids=lambda x: str(x)[:30])
def test_settings_without_effect_are_read_and_give_the_ids_of_hugging_face(tokenizer, tmp_path, setting, value):
    tokenizers = pytest.importorskip("tokenizers")
    path = write_changed(tokenizer, tmp_path, setting, value)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    for text in (CORPUS, f"a {END_OF_TEXT} \x00b", "x\ufffd 🦊"):
        assert Tokenizer.load(path).encode(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("setting, value", EFFECT, ids=lambda x: str(x)[:30])
def test_settings_with_an_effect_are_refused_by_name(tokenizer, tmp_path, setting, value):
    path = write_changed(tokenizer, tmp_path, setting, value)
    name = setting.split(".")[-1] if value and setting not in ("model.vocab", "model.merges") else "tokenizer.json"
    with pytest.raises(InputError, match=name.replace("type", "WordPiece")):
        Tokenizer.load(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_what_is_no_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)


def test_fingerprint_sees_every_part(tokenizer):
    prints = {tokenizer.fingerprint}
    prints.add(Tokenizer(tokenizer.vocab, tokenizer.merges).fingerprint)
    prints.add(Tokenizer(tokenizer.vocab, tokenizer.merges[:-1], SPECIAL).fingerprint)
    swapped = dict(tokenizer.vocab)
    swapped[65], swapped[66] = swapped[66], swapped[65]
    prints.add(Tokenizer(swapped, tokenizer.merges, SPECIAL).fingerprint)
    assert len(prints) == 4


@pytest.fixture(scope="session")
def gpt2():
    "Ours, Hugging Face's and tiktoken's, with GPT-2's vocabulary."
    tokenizers, files = pytest.importorskip("tokenizers"), [SHARED / "gpt2/vocab.json", SHARED / "gpt2/merges.txt"]
    if not files[0].is_file():
        pytest.skip("GPT-2's vocabulary is not at hand (../shared/data/gpt2)")
    ours, theirs = Tokenizer.from_files(*files, [END_OF_TEXT]), tokenizers.ByteLevelBPETokenizer(*map(str, files))
    theirs.add_special_tokens([END_OF_TEXT])
    return ours, theirs, as_tiktoken(ours)


def assert_gpt2_agrees(gpt2, text):
    ours, theirs, tiktoken = gpt2
    assert ours.encode(text) == theirs.encode(text).ids == tiktoken.encode(text, allowed_special="all")


@pytest.mark.parametrize("name", ["tinystories/valid_v2.txt.gz", "books/books.txt.gz"])
def test_gpt2_on_real_text(gpt2, name):
    assert gpt2[0].encode("Hello world" + END_OF_TEXT) == [15496, 995, 50256] and gpt2[0].vocab_size == 50257
    if not (SHARED / name).is_file():
        pytest.skip(f"real text is not at hand (../shared/data/{name})")
    with gzip.open(SHARED / name) as file:
        assert_gpt2_agrees(gpt2, file.read(200_000).decode("utf-8", "ignore"))


@given(text=TEXTS)
@example(CORPUS)
def test_gpt2_on_any_text(gpt2, text):
    assert_gpt2_agrees(gpt2, text)


# --- token files


@pytest.fixture
def token_file(tokenizer, corpus_path, tmp_path):
    return tokenizer.encode_file(corpus_path, tmp_path / "train.bin")


@pytest.mark.parametrize("size, dtype", [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_large_vocabularies_take_four_bytes(tmp_path, size, dtype):
    vocab = {i: bytes([i]) if i < 256 else str(i).encode() + b"!" for i in range(size)}
    large = Tokenizer(vocab, [])
    (tmp_path / "x.txt").write_text("abc", encoding="utf-8")
    made = large.encode_file(tmp_path / "x.txt", tmp_path / "x.bin")
    assert made.dtype == dtype and made.tokens().tolist() == [97, 98, 99]


@pytest.mark.parametrize("content", ["", "[]", "{}", {"extra": 1}, {"dtype": None}, {"count": "many"}, {"count": 0}],
                         ids=str)
def test_token_file_with_a_damaged_description(token_file, content):
    path = token_file.path.with_suffix(".json")
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text(encoding="utf-8")), **content})
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="train"):
        TokenFile.load(token_file.path)


def test_token_file_that_is_not_whole(token_file):
    os.truncate(token_file.path, token_file.path.stat().st_size - 1)
    with pytest.raises(InputError, match="train.bin: unfinished .* bytes"):
        TokenFile.load(token_file.path)
    for missing in (token_file.path, token_file.path.with_suffix(".json")):
        missing.unlink()
        with pytest.raises(InputError, match=missing.name):
            TokenFile.load(token_file.path)


@pytest.mark.parametrize("source, target", [("x.bin", "x"), ("x.json", "x.bin"), ("x.json", "x")])
def test_a_text_is_never_overwritten_by_its_tokens(tokenizer, tmp_path, source, target):
    (tmp_path / source).write_text("words", encoding="utf-8")
    with pytest.raises(InputError, match="would overwrite"):
        tokenizer.encode_file(tmp_path / source, tmp_path / target)
    assert (tmp_path / source).read_text(encoding="utf-8") == "words"


def test_failure_while_encoding_leaves_the_old_pair(tokenizer, token_file, corpus_path, tmp_path, monkeypatch):
    before = token_file.path.read_bytes()

    def fail(chunks, **how):
        yield np.zeros(3, np.uint32)
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer._encoder, "encode_chunks", fail)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode_file(corpus_path, token_file.path)
    assert TokenFile.load(token_file.path) == token_file and token_file.path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.bin", "train.json"]


@contextmanager
def no_room(size):
    "No file can grow larger, as on a full disk."
    resource = pytest.importorskip("resource")  # not on Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [4096, 200])  # the ids do not fit; the ids fit and the description does not
def test_full_disk_leaves_nothing_half_written(tokenizer, tmp_path, limit):
    (tmp_path / "x.txt").write_text("words " * (9999 if limit > 1000 else 5), encoding="utf-8")
    with no_room(limit), pytest.raises(InputError, match="cannot write"):
        tokenizer.encode_file(tmp_path / "x.txt", tmp_path / "x.bin")
    assert sorted(p.name for p in tmp_path.iterdir()) in (["x.txt"], ["x.bin", "x.txt"])
    with pytest.raises(InputError):
        TokenFile.load(tmp_path / "x.bin")
