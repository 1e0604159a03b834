"""Equality, determinism and bounds of tinylm.kernels that are no lesson."""

import importlib
import io
import itertools
import random
import sys
import time
import tracemalloc
from collections import Counter
from functools import cache
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer import no_room

from tinylm import kernels
from tinylm.core import END_OF_TEXT
from tinylm.fables import fables
from tinylm.kernels import Decoder, Encoder, Pretokens, count_pretokens, merge_pairs, split_pretokens
from tinylm.tokenizer import PRETOKEN_PATTERN, count_pairs, merge_word

END = END_OF_TEXT.encode()
SPECIAL = [END, END * 2, b"<'", b"<|pad|>", b" x ", "¡fin!".encode()]
find_pretokens = regex.compile(PRETOKEN_PATTERN).findall
special_pattern = regex.compile(b"|".join(sorted(map(regex.escape, SPECIAL), key=len, reverse=True)).decode())

PIECES = st.sampled_from(
    [s.decode() for s in SPECIAL]
    + ["'s", "'ll", "'re", "'ve", "'l", "'", "''", "s", "ll", " ", "  ", "\n", "\r\n", "\t", "\x00", "\x1c", "\x85"]
    + ["\u00a0", "\u3000", "\u2028", "\u0301", "é", "🦊", "👩\u200d🚀", "日本", "שלום", "مرحبا", "the", " the", "12"]
    + ["¾", "-", "<|endof", "text|>", "<|", "aaaa", " supercalifragilistic", "\ufffd"]
)
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=8)), max_size=25).map("".join)
BYTES = st.lists(st.one_of(PIECES.map(str.encode), st.binary(max_size=6)), max_size=20).map(b"".join)
QUICK = settings(max_examples=60, deadline=None)


def expected_pretokens(text: str, special: bool = True) -> list[bytes]:
    "What `regex` says; special tokens stay whole."
    if not special:
        return [piece.encode() for piece in find_pretokens(text)]
    out, at = [], 0
    for match in special_pattern.finditer(text):
        out += [*find_pretokens(text[at : match.start()]), match.group()]
        at = match.end()
    return [piece.encode() for piece in out + find_pretokens(text[at:])]


def as_bytes(merges: np.ndarray) -> list[tuple[bytes, bytes]]:
    tokens = [bytes([byte]) for byte in range(256)]
    for a, b in merges.tolist():
        tokens.append(tokens[a] + tokens[b])
    return [(tokens[a], tokens[b]) for a, b in merges.tolist()]


@cache
def trained() -> tuple[np.ndarray, bytes]:
    "Merges of the fables, and a part of them to encode."
    data = "".join(f"{story}\n{END_OF_TEXT}\n" for story in fables(300, 5)).encode()
    return merge_pairs(count_pretokens(io.BytesIO(data), [END]), 3000), data[:400_000]


@cache
def fables_encoder() -> Encoder:
    merges = trained()[0]
    special = {name: 256 + len(merges) + k for k, name in enumerate(SPECIAL)}
    return Encoder(range(256), merges, special_tokens=special)


@cache
def fables_decoder() -> Decoder:
    tokens = [bytes([byte]) for byte in range(256)] + [a + b for a, b in as_bytes(trained()[0])]
    return Decoder(dict(enumerate(tokens + SPECIAL)))


def test_table_of_kinds_is_that_of_regex():
    if not regex.match(r"\p{L}", "\U000323b0") or regex.match(r"\p{L}", "\U0003347a"):
        pytest.skip("the installed regex knows another version of Unicode than 17.0")
    characters = "".join(map(chr, range(0x110000)))
    kinds = np.full(0x110000, kernels._OTHER, np.uint8)
    for kind, pattern in ((kernels._LETTER, r"\p{L}+"), (kernels._NUMBER, r"\p{N}+"), (kernels._WHITE, r"\s+")):
        for match in regex.finditer(pattern, characters):
            kinds[match.start() : match.end()] = kind
    assert np.array_equal(kernels._KINDS[kernels._BLOCK].ravel(), kinds)


def test_every_character_is_decoded_and_classified():
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    text = "".join(f"a{c}{c} {c}b" for c in [*characters[:0x3100], *characters[0x3100::97]])
    assert split_pretokens(text.encode()) == expected_pretokens(text, special=False)


@QUICK
@given(TEXTS)
@example("it's 'sam ''s 's's 'll 'l l don't'")
@example("a\u00a0 b  \u3000\u3000c \u00a0")
@example(f"'{END_OF_TEXT}s  {END_OF_TEXT}  x x  x ")
@example("'¡fin!' ¡fin!  ¡fin!")  # an apostrophe of a special token begins no contraction
@example("<'sun <'llama")
def test_splits_as_regex_does(text):
    text = text.encode("utf-8", "replace").decode()
    assert split_pretokens(text.encode(), SPECIAL) == expected_pretokens(text)
    assert split_pretokens(text.encode()) == expected_pretokens(text, special=False)


@QUICK
@given(BYTES)
@example(b"\xe2\x82")
@example(b"\xf0\x9f\xa6 \x80\xed\xa0\x80 \xc0\xaf\xf4\x90\x80\x80")
def test_reads_invalid_utf8_as_replacement_characters(data):
    assert split_pretokens(data, SPECIAL) == expected_pretokens(data.decode("utf-8", "replace"))


@QUICK
@given(BYTES, st.integers(1, 40), st.sampled_from([1, 2, 8]))
@example(b"\xe2\x82 \x82\xac" * 9, 1, 2)
@example(END * 5 + b"'s" + END * 3, 1, 1)
@example(b"  <|pad|>  " * 9, 3, 2)
def test_any_chunks_and_workers_give_the_same_counts_and_ids(data, size, num_workers):
    whole = expected_pretokens(data.decode("utf-8", "replace"))
    counts = Counter(piece for piece in whole if piece not in SPECIAL)
    pretokens = count_pretokens(io.BytesIO(data), SPECIAL, num_workers=num_workers, block_size=size)
    assert pretokens.as_dict() == counts
    encoder = fables_encoder()
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    arrays = list(encoder.encode_chunks(chunks, num_workers=num_workers, block_size=size))
    ids = encoder.encode(data)
    assert np.concatenate([np.empty(0, np.uint32), *arrays]).tolist() == ids.tolist()
    assert fables_decoder().decode(ids) == b"".join(whole)


def test_more_words_than_any_table_starts_with(monkeypatch):
    monkeypatch.setattr(kernels, "_FLUSH_AT", 1 << 10)
    draw = random.Random(0)
    words = [b" %x" % draw.getrandbits(draw.choice([20, 40, 100, 200])) for _ in range(30_000)]
    data = b"".join(words)
    expected = Counter(split_pretokens(data))
    for num_workers, block_size in ((1, 1 << 12), (2, 1 << 16), (8, 1 << 20)):
        pretokens = count_pretokens(io.BytesIO(data), num_workers=num_workers, block_size=block_size)
        assert pretokens.as_dict() == expected


def test_progress_tells_every_byte_and_merge():
    counted, encoded, merged = [], [], []
    count_pretokens(io.BytesIO(b"one two\n" * 999), num_workers=2, block_size=100, progress=counted.append)
    list(Encoder(range(256), []).encode_chunks([b"one two\n"] * 999, block_size=100, progress=encoded.append))
    merge_pairs(Pretokens.from_dict({b"abcabd": 3}), 100, progress=merged.append)
    assert [sum(counted), sum(encoded), sum(merged)] == [8 * 999, 8 * 999, 4]


WORDS = st.one_of(
    st.dictionaries(st.text("ab", min_size=1, max_size=30).map(str.encode), st.integers(1, 5), max_size=12),
    st.dictionaries(st.binary(min_size=1, max_size=12), st.integers(1, 3), max_size=20),
    st.dictionaries(st.text("a\0\xff", min_size=1, max_size=20).map(str.encode), st.integers(1, 10**12), max_size=9),
)


def merge_by_definition(counts, num_merges):
    words, merges = {tuple(bytes([byte]) for byte in word): count for word, count in counts.items()}, []
    while len(merges) < num_merges and (pairs := count_pairs(words)):
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        words = {merge_word(word, merges[-1]): count for word, count in words.items()}
    return merges


@QUICK
@given(WORDS, st.integers(0, 80))
def test_merges_by_the_definition(words, num_merges):
    assert as_bytes(merge_pairs(Pretokens.from_dict(words), num_merges)) == merge_by_definition(words, num_merges)


def test_merges_by_the_definition_however_little_room_there_is_at_first(monkeypatch):
    words = count_pretokens(io.BytesIO(trained()[1][:30_000]), [END]).as_dict()
    words |= {b"a" * 20_000: 10**6, bytes(range(256)) * 3: 1}
    room_for_pairs, make_room, enlarged = kernels._room_for_pairs, kernels._Merger.make_room, set()

    def watched(self, step):
        before = len(self.pairs.left), len(self.tokens.arena)
        make_room(self, step)
        enlarged.add((len(self.pairs.left) > before[0], len(self.tokens.arena) > before[1]))

    monkeypatch.setattr(kernels, "_room_for_pairs", lambda room: room_for_pairs(700))
    monkeypatch.setattr(kernels._Merger, "make_room", watched)
    assert as_bytes(merge_pairs(Pretokens.from_dict(words), 250)) == merge_by_definition(words, 250)
    assert enlarged == {(True, False), (False, True)}  # for pairs, and for the bytes of long tokens


def test_ids_of_any_size_and_type_are_the_same_ids():
    merges, data = trained()
    large = np.where(merges < 256, merges, merges + 100_000)
    special = 256 + len(merges)
    expected = Encoder(range(256), merges, special_tokens={END: special}, dtype=np.uint16).encode(data)
    ids = Encoder(range(256), large, 100_256 + np.arange(len(merges)), {END: 100_000 + special}).encode(data)
    assert expected.dtype == np.uint16 and ids.dtype == np.uint32 and ids.max() == 100_000 + special
    assert np.array_equal(np.where(ids < 256, ids, ids - 100_000), expected)


def test_more_pretokens_than_the_cache_keeps():
    draw, letters = random.Random(0), bytes.maketrans(b"0123456789abcdef", b"abcdefghijklmnop")
    num = 1 << (kernels._ENCODE_BITS - 1)  # so many that a few share a place
    words = [b" forever" + (b"%07x" % draw.getrandbits(28)).translate(letters) for _ in range(num)]
    encoder, data = fables_encoder(), b"".join(words)
    fresh = kernels._Worker(encoder._specials, encoder._ranks, encoder.dtype)
    few_at_a_time = []
    for i in range(0, num, 5000):
        part = b"".join(words[i : i + 5000])
        few_at_a_time.append(fresh.encode((kernels._pad(part), len(part))))
        fresh.lines[:] = kernels._EMPTY
    for _ in range(2):
        assert np.array_equal(encoder.encode(data), np.concatenate(few_at_a_time))


@QUICK
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12, unique=True), st.binary(max_size=150))
def test_short_and_long_pretokens_merge_alike(pairs, data):
    "Any merges, in any order, also such as no training would give."
    letters = bytes(97 + b % 4 for b in data)
    byte_ids = [b % 4 for b in range(256)]
    new_ids = [i % 10 for i in range(len(pairs))]
    ranks = Encoder(byte_ids, pairs, new_ids)._ranks
    block, n = kernels._pad(letters), len(letters)
    one, two = np.zeros((2, n + 16), np.uint32)
    n1 = kernels._merge_short(*ranks, block, 0, n, one, np.zeros(n + 1, np.int32)) if n else 0
    n2 = kernels._merge_long(*ranks, block, 0, n, two) if n else 0
    assert one[:n1].tolist() == two[:n2].tolist()


HARD = {
    "one letter": b"a" * 300_000,
    "letters without a space": "".join(random.Random(0).choices("abcdefghij", k=300_000)).encode(),
    "apostrophes": b"'" * 300_000,
    "special tokens": END * 25_000,
    "not UTF-8": b"\xff" * 100_000,
    "Chinese": "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少".encode() * 5_000,
}


@pytest.mark.parametrize("name", HARD)
def test_hard_texts_take_bounded_time_and_memory(name):
    data = HARD[name]
    encoder = Encoder(range(256), trained()[0], special_tokens={END: 9999})
    encoder.encode(b"a" * 100 + b"b c")  # compile
    merge_pairs(count_pretokens(io.BytesIO(b"abc"), [END]), 1)
    start = time.process_time()
    tracemalloc.start()
    ids = encoder.encode(data)
    merges = merge_pairs(count_pretokens(io.BytesIO(data), [END], num_workers=1, block_size=1 << 16), 200)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.process_time() - start < 10
    assert peak < 100e6
    assert 0 < len(ids) <= 3 * len(data)
    words = count_pretokens(io.BytesIO(data), [END]).as_dict()
    assert as_bytes(merges[:1]) == merge_by_definition(words, 1)


def test_memory_does_not_grow_with_the_stream():
    story = trained()[1]
    encoder = fables_encoder()

    def peak(times: int) -> int:
        tracemalloc.start()
        for _ in encoder.encode_chunks(itertools.repeat(story, times), num_workers=2, block_size=1 << 18):
            pass
        stories = itertools.repeat(story, times)
        count_pretokens(SimpleNamespace(read=lambda size: next(stories, b"")), [END], num_workers=2, block_size=1 << 18)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(2)
    assert peak(400) < 1.5 * max(peak(100), peak(100))


def test_nothing_to_do():
    assert split_pretokens(b"") == [] == Encoder(range(256), []).encode(b"").tolist()
    assert list(Encoder(range(256), []).encode_chunks([b"", b""])) == []
    assert merge_pairs(count_pretokens(io.BytesIO(b"")), 5).shape == (0, 2)
    assert len(merge_pairs(Pretokens.from_dict({b"abc": 2, b"b": 1}), 10**12)) == 2  # room for no more
    assert Decoder({0: b"a"}).decode([]) == b""


def test_mistakes_are_errors():
    for wrong in (2, -1):
        with pytest.raises(IndexError, match="from 0 to 1"):
            Decoder({0: b"a", 1: b"b"}).decode([wrong])
    for new_id, special in ((1 << 21, {}), (1 << 16, {}), (256, {END: 1 << 16})):
        with pytest.raises(AssertionError, match="65,536|2,097,152"):
            Encoder(range(256), [(97, 98)], [new_id], special, np.uint16)


def test_a_failing_stream_stops_the_workers():
    def chunks():
        yield b"one two " * 1000
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(fables_encoder().encode_chunks(chunks(), num_workers=2, block_size=100))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    "Calls a compiled function as a fresh process would, and returns what that said; its files lie in run.cache."
    (tmp_path / "two.py").write_text("import tinylm.kernels as k\n@k.compiled\ndef twice(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))

    def run():
        kernels._announce.cache_clear()
        sys.modules.pop("two", None)
        assert importlib.import_module("two").twice(1) == 2
        return capsys.readouterr().err

    run.cache = tmp_path / "cache"
    return run


def test_works_where_nothing_can_be_written(run, monkeypatch):
    "Without a folder for compiled code numba refuses to cache; then the functions are compiled anew."
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    assert "compiling" in run()


def test_a_full_disk_under_the_cache_is_no_error(run):
    with no_room(100):
        assert "compiling" in run()


@pytest.mark.parametrize("kind, content", [("nbi", b""), ("nbc", b""), ("nbi", b"\0" * 9), ("nbc", b"no pickle")])
def test_compiled_code_is_kept_on_disk_and_made_anew_when_damaged(run, kind, content):
    assert run().count("compiling") == 1
    files = {path: path.stat().st_mtime_ns for path in run.cache.rglob("*.nb?")}
    assert files and run() == ""
    assert files == {path: path.stat().st_mtime_ns for path in run.cache.rglob("*.nb?")}
    for path in run.cache.rglob(f"*.{kind}"):
        path.write_bytes(content)
    assert run().count("compiling") == 1 and run() == ""


def test_a_notebook_keeps_no_compiled_code():
    "numba would not see a change in what a function calls."
    def twice(x):
        return 2 * x

    assert kernels.compiled(twice).stats.cache_path
    twice.__module__ = "__main__"
    assert kernels.compiled(twice).stats.cache_path is None
