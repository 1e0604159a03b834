"""Time BPE training and encoding beside other tokenizers, in one run on the same cores; print Markdown tables.

Each figure comes from a fresh process, so that peak memory is that of one task. What a tool does once, at its first
call (compiling, starting threads), is done on a small text beforehand and reported apart.

Peers are optional; a tool that is not installed is named as such:

    pip install gigabpe gigatoken rustbpe tokenizers tiktoken bpeasy
"""
import argparse
import gzip
import hashlib
import importlib.metadata
import io
import json
import os
import pickle
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

END = "<|endoftext|>"
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def small_text():
    "A text on which every tool does what it does once."
    draw = random.Random(1)
    words = [" " + "".join(draw.choices("abcdefghijé", k=draw.randint(2, 20))) for _ in range(30_000)]
    return "".join(f"It's{' '.join(words[i : i + 99])} 7.\n{END}\n" for i in range(0, 30_000, 99)) * 4


def documents(path):
    return Path(path).read_text(encoding="utf-8", errors="replace").split(END)


def byte_chars():
    "The letters that byte-level tokenizers print for bytes."
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


# --- training: each function trains on a file and returns the number of tokens that it can then produce


def train_tinylm(path, vocab_size, num_workers):
    from tinylm.kernels import count_pretokens, merge_pairs

    with open(path, "rb") as stream:
        pretokens = count_pretokens(stream, [END.encode()], num_workers=num_workers)
    return 257 + len(merge_pairs(pretokens, vocab_size - 257))


def train_gigabpe(path, vocab_size, num_workers):
    import gigabpe

    how = {"special_tokens": [END], "pretokenizer": "bytelevel", "threads": num_workers}
    return len(gigabpe.train_bpe([str(path)], vocab_size, **how)[0])


def train_gigatoken(path, vocab_size, num_workers):
    import gigatoken

    return len(gigatoken.train_bpe(gigatoken.TextFileSource([path], separator=END), vocab_size, [END])[0])


def train_rustbpe(path, vocab_size, num_workers):
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(documents(path)), vocab_size - 1, pattern=PATTERN)
    return tokenizer.vocab_size + 1


def train_tokenizers(path, vocab_size, num_workers):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = {"vocab_size": vocab_size, "special_tokens": [END], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train([str(path)], trainers.BpeTrainer(**how))
    return tokenizer.get_vocab_size()


def train_bpeasy(path, vocab_size, num_workers):
    import bpeasy

    return 1 + len(bpeasy.train_bpe(iter(documents(path)), PATTERN, 1 << 20, vocab_size - 1))


# --- encoding: each function gets a vocabulary, loads it, and returns a function from a path to all ids but END's


def encode_tinylm(vocabulary, num_workers):
    import numpy as np

    from tinylm.kernels import Encoder

    merges, end_id = vocabulary["merges"], vocabulary["end"]
    encoder = Encoder(range(256), merges, special_tokens={END.encode(): end_id})

    def encode(path):
        with open(path, "rb") as stream:
            chunks = iter(lambda: stream.read(1 << 20), b"")
            return list(encoder.encode_chunks(chunks, num_workers=num_workers))

    return encode, lambda arrays: (ids := np.concatenate(arrays))[ids != end_id]


def encode_gigatoken(vocabulary, num_workers):
    import awkward
    import gigatoken

    tokenizer = gigatoken.Tokenizer(vocabulary["json"])

    def encode(path):
        return tokenizer.encode_files(gigatoken.TextFileSource([path], separator=END))

    return encode, lambda rows: awkward.to_numpy(awkward.flatten(rows))


def encode_tiktoken(vocabulary, num_workers):
    import numpy as np
    import tiktoken

    ranks = {token: i for i, token in enumerate(vocabulary["tokens"])}
    encoding = tiktoken.Encoding("trained", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode(path):
        return encoding.encode_ordinary_batch(documents(path), num_threads=num_workers)

    return encode, lambda rows: np.concatenate([np.array(row, np.int64) for row in rows])


def encode_tokenizers(vocabulary, num_workers):
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(vocabulary["json"])

    def encode(path):
        return tokenizer.encode_batch_fast(documents(path))

    return encode, lambda rows: np.concatenate([np.array(row.ids, np.int64) for row in rows])


TRAIN = {"tinylm": train_tinylm, "gigabpe": train_gigabpe, "gigatoken": train_gigatoken, "rustbpe": train_rustbpe,
         "tokenizers": train_tokenizers, "bpeasy": train_bpeasy}  # fmt: skip
ENCODE = {"tinylm": encode_tinylm, "gigatoken": encode_gigatoken, "tiktoken": encode_tiktoken,
          "tokenizers": encode_tokenizers}  # fmt: skip
SLOW = {"tokenizers", "bpeasy"}  # left out with --large
SLOW_ENCODERS = {"tiktoken", "tokenizers"}  # encode --slow-mb only, and keep lists of Python numbers


# --- one measurement, in a process of its own


def measure_one(job):
    "Run one task, and print what it took as JSON."
    small = Path(job["folder"]) / "small.txt"
    start = time.perf_counter()
    if job["task"] == "train":
        TRAIN[job["tool"]](small, 4000, job["threads"])
        first = time.perf_counter() - start
        start, cpu = time.perf_counter(), time.process_time()
        tokens = TRAIN[job["tool"]](job["path"], job["vocab_size"], job["threads"])
        result = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "tokens": tokens}
    else:
        with open(job["vocabulary"], "rb") as file:
            encode, flat = ENCODE[job["tool"]](pickle.load(file), job["threads"])
        encode(small)
        first = time.perf_counter() - start
        start, cpu = time.perf_counter(), time.process_time()
        ids = encode(job["path"])
        result = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        result["peak"] = peak_memory()
        digest = flat(ids).astype("<u4")
        result |= {"tokens": len(digest), "digest": hashlib.sha256(digest.tobytes()).hexdigest()[:12]}
        del ids, digest
        start = time.perf_counter()
        encode(job["path"])
        result["again"] = time.perf_counter() - start
    print(json.dumps({"first": first, "peak": peak_memory()} | result))


def peak_memory():
    "MB that this process has held at most."
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent process too
        return int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def run(job, repeat):
    "The best of a few fresh processes; or a word about why there is no figure."
    best = None
    env = {**os.environ, "RAYON_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "true"}
    for _ in range(repeat):
        command = [sys.executable, __file__, "--job", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["killed"])[-1]
            return "not installed" if "ModuleNotFoundError" in last else last[:60]
        result = json.loads(done.stdout.splitlines()[-1])
        best = result if best is None or result["seconds"] < best["seconds"] else best
    return best


# --- corpora


def repeat_to(parts, size, path):
    "Write texts over and over until a file has the size."
    data = b"".join(parts)
    with open(path, "wb") as file:
        for start in range(0, size, len(data)):
            file.write(data[: size - start])
    return path


def read_any(path):
    with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
        return file.read()


def default_corpora():
    "Real text if it is here, else Fables."
    stories = sorted(SHARED.glob("tinystories/*.txt.gz"))
    if stories:
        return {"tinystories": stories, "books": [SHARED / "books/books.txt.gz"]}
    return {"fables": []}


def prepare(name, paths, size, folder):
    if paths:
        return repeat_to(map(read_any, paths), size, folder / f"{name}.txt")
    from tinylm.data import fables

    return repeat_to([f"{story}\n{END}\n".encode() for story in fables(20_000, 0)], size, folder / f"{name}.txt")


def write_large(path, size):
    "Words of a small language with endless forms: millions of distinct pretokens, in documents."
    draw = random.Random(0)
    onsets, rimes = ("", *"bcdfghklmnprstvz", "br", "st", "sch", "tr"), "a e i o u ai er in ung".split()
    syllables = [a + b for a in onsets for b in rimes]
    frequent = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(50_000)]
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            words = [frequent[int(50_000 * draw.random() ** 4)] for _ in range(360)]
            words += ["".join(draw.choices(syllables, k=draw.randint(3, 5))) for _ in range(40)]
            draw.shuffle(words)
            written += file.write(" ".join(words) + f".\n{END}\n")
    return path


def head(path, size, to):
    "A part of a file, cut behind a document."
    with open(path, "rb") as file:
        data = file.read(size)
    end = data.rfind(END.encode())
    to.write_bytes(data[:end] if end > 0 else data[: data.rfind(b" ")])
    return to


def make_vocabulary(path, vocab_size, folder):
    "One vocabulary for all: trained by tinylm, handed to every tool in the form that it reads."
    from tinylm.kernels import count_pretokens, merge_pairs

    with open(path, "rb") as stream:
        merges = merge_pairs(count_pretokens(stream, [END.encode()]), vocab_size - 257).tolist()
    tokens = [bytes([byte]) for byte in range(256)]
    for a, b in merges:
        tokens.append(tokens[a] + tokens[b])
    chars = byte_chars()
    names = ["".join(chars[byte] for byte in token) for token in tokens]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)},
             "merges": [[names[a], names[b]] for a, b in merges]}  # fmt: skip
    whole = {"version": "1.0", "added_tokens": [{"id": len(tokens), "content": END, **added}], "pre_tokenizer": level,
             "decoder": level, "model": model}  # fmt: skip
    as_json = folder / f"{path.stem}-{vocab_size}.json"
    as_json.write_text(json.dumps(whole), encoding="utf-8")
    to = folder / f"{path.stem}-{vocab_size}.pickle"
    to.write_bytes(pickle.dumps({"merges": merges, "tokens": tokens, "end": len(tokens), "json": str(as_json)}))
    return to


# --- tables


def row(tool, result, size, ours):
    if isinstance(result, str):
        return f"| {tool} | {result} |" + " |" * 6
    speed = size / result["seconds"] / 1e6
    again = f"{size / result['again'] / 1e6:,.0f}" if "again" in result else ""
    ratio = f"{ours / speed:.2f}" if ours else ""
    cells = [tool, f"{result['seconds']:.2f}", f"{result['cpu']:.2f}", f"{speed:,.1f}", again, ratio]
    return f"| {' | '.join(cells)} | {result['peak']:,.0f} | {result['first']:.1f} |"


def table(title, tools, job_of, repeat, records):
    "Measure all tools at one task, and print the rows as they come."
    print(f"\n**{title}**\n")
    print("| tool | s | CPU s | MB/s | again, MB/s | tinylm is faster by | peak MB | first call, s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    ours, digests = None, {}
    for tool in tools:
        job = job_of(tool)
        result, size = run(job, repeat), os.path.getsize(job["path"])
        if tool == "tinylm" and isinstance(result, dict):
            ours = size / result["seconds"] / 1e6
        if isinstance(result, dict) and "digest" in result:
            digests.setdefault((size, result["digest"]), []).append(tool)
        records.append({"title": title, "tool": tool, "bytes": size, "result": result})
        print(row(tool, result, size, ours), flush=True)
    for (size, digest), same in digests.items():
        print(f"\nids of {size / 1e6:.0f} MB: {digest} by {', '.join(same)}")


def machine(threads):
    names = [f"{name} {importlib.metadata.version(name)}" for name in sorted(TRAIN | ENCODE) if has(name)]
    cpu = next((line.split(":")[1].strip() for line in io.StringIO(read_cpu()) if line.startswith("model name")), "")
    print(f"{cpu or platform.processor()}, {threads} threads, Python {platform.python_version()}; {', '.join(names)}")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        print(f"\nThe machine is busy (load {os.getloadavg()[0]:.1f}): trust the ratios at most.")


def read_cpu():
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8") if path.exists() else ""


def has(name):
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--corpus", nargs="+", type=Path, help=".txt or .txt.gz (default: TinyStories and books, or Fables)")
    add("--mb", type=int, nargs="+", default=[52, 100], help="MB of each corpus; smaller ones are repeated")
    add("--vocab-size", type=int, nargs="+", default=[10_000, 32_000])
    add("--tools", nargs="+", default=sorted(TRAIN | ENCODE, key=[*TRAIN, *ENCODE].index))
    add("--threads", type=int, default=2)
    add("--repeat", type=int, default=2, help="take the best of so many runs")
    add("--slow-mb", type=int, default=10, help="MB that tiktoken and tokenizers encode")
    add("--large", action="store_true", help="also a generated file with millions of distinct pretokens")
    add("--large-mb", type=int, default=1000)
    add("--folder", type=Path, help="where to put the corpora (default: a temporary folder)")
    add("--json", type=Path, help="write all figures to this file")
    add("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def benchmark(args, folder):
    records = []
    (folder / "small.txt").write_text(small_text(), encoding="utf-8")
    machine(args.threads)
    corpora = {path.name.split(".")[0]: [path] for path in args.corpus} if args.corpus else default_corpora()
    paths = {}
    for i, (name, parts) in enumerate(corpora.items()):
        paths[name] = prepare(name, parts, args.mb[min(i, len(args.mb) - 1)] * 10**6, folder)
    if args.large:
        paths["large"] = write_large(folder / "large.txt", args.large_mb * 10**6)

    def job(task, tool, path, vocab_size, **more):
        more |= {"task": task, "tool": tool, "path": str(path), "vocab_size": vocab_size}
        return more | {"threads": args.threads, "folder": str(folder)}

    for name, path in paths.items():
        sizes = args.vocab_size[-1:] if name == "large" else args.vocab_size
        part = head(path, args.slow_mb * 10**6, folder / f"{name}-part.txt")
        for vocab_size in sizes:
            what = f"{name}, {path.stat().st_size / 1e6:.0f} MB, {vocab_size:,} tokens"
            tools = [t for t in args.tools if t in TRAIN and not (name == "large" and t in SLOW)]

            def training(tool):
                return job("train", tool, path, vocab_size)  # noqa: B023

            table(f"Train: {what}", tools, training, args.repeat, records)
            vocabulary = str(make_vocabulary(path, vocab_size, folder))

            def encoding(tool):
                source = part if tool in SLOW_ENCODERS else path  # noqa: B023
                return job("encode", tool, source, vocab_size, vocabulary=vocabulary)  # noqa: B023

            table(f"Encode: {what}", [t for t in args.tools if t in ENCODE], encoding, args.repeat, records)
    if args.json:
        args.json.write_text(json.dumps(records, indent=1), encoding="utf-8")


def main():
    args = parse()
    if args.job:
        job = json.loads(args.job)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: job["threads"]]))
        measure_one(job)
    elif args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
        benchmark(args, args.folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            benchmark(args, Path(folder))


if __name__ == "__main__":
    main()
