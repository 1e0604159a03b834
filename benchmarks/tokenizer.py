"""Time BPE training and encoding beside other tokenizers, in one run on the same cores; print Markdown tables.

Each figure comes from a fresh process, so that peak memory is that of one task. What a tool does once, at its first
call (importing, compiling, starting threads), is done on a small text beforehand and reported apart. Encoding is
measured twice: until the ids are in memory, and until they are in a file of 16-bit numbers, flushed to the disk. (For
tinylm that is `Tokenizer.encode_file`, which also takes the SHA-256 of the text.) A tool that takes more than --limit-s
seconds or --limit-gb of memory is stopped, and its row says so. gigabpe and bpeasy only train; rustbpe encodes only by
what it has just trained itself, so its ids are its own.

Peers are optional; a tool that is not installed is named as such:

    pip install gigabpe gigatoken rustbpe tokenizers tiktoken bpeasy
"""

import argparse
import contextlib
import gzip
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peak import peak_memory

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


# --- training: each function trains on a file and returns the number of tokens that it can then produce


def train_tinylm(path, vocab_size, num_workers):
    from tinylm.tokenizer import train_bpe

    return len(train_bpe(path, vocab_size, [END], num_workers=num_workers)[0])


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


# --- encoding: each function loads a tokenizer.json, or trains; it returns how to encode a file in memory, how to get
# all ids but END's from that, and how to encode a file into a file, where there is a way of its own


def encode_tinylm(folder, num_workers, job):
    import numpy as np

    from tinylm.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    end_id = tokenizer.special_tokens[END]

    def encode(path):
        with open(path, "rb") as stream:
            chunks = iter(lambda: stream.read(1 << 20), b"")
            return list(tokenizer._encoder.encode_chunks(chunks, num_workers=num_workers))

    def to_file(path):
        tokenizer.encode_file(path, Path(folder) / "encoded.bin", num_workers=num_workers)

    return encode, lambda arrays: (ids := np.concatenate(arrays))[ids != end_id], to_file


def encode_gigatoken(folder, num_workers, job):
    import awkward
    import gigatoken

    tokenizer = gigatoken.Tokenizer(str(Path(folder) / "tokenizer.json"))

    def encode(path):
        return tokenizer.encode_files(gigatoken.TextFileSource([path], separator=END))

    return encode, lambda rows: awkward.to_numpy(awkward.flatten(rows)), None


def encode_tiktoken(folder, num_workers, job):
    import numpy as np
    import tiktoken

    from tinylm.tokenizer import Tokenizer  # tiktoken reads no tokenizer.json

    ranks = {token: i for i, token in Tokenizer.load(folder).vocab.items() if token != END.encode()}
    encoding = tiktoken.Encoding("trained", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode(path):
        return encoding.encode_ordinary_batch(documents(path), num_threads=num_workers)

    return encode, lambda rows: np.concatenate([np.array(row, np.uint16) for row in rows]), None


def encode_tokenizers(folder, num_workers, job):
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))

    def encode(path):
        return tokenizer.encode_batch_fast(documents(path))

    return encode, lambda rows: np.concatenate([np.array(row.ids, np.uint16) for row in rows]), None


def encode_rustbpe(folder, num_workers, job):
    import numpy as np
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(documents(job["path"])), job["vocab_size"] - 1, pattern=PATTERN)

    def encode(path):
        return tokenizer.batch_encode(documents(path))

    return encode, lambda rows: np.concatenate([np.array(row, np.uint16) for row in rows]), None


TRAIN = {"tinylm": train_tinylm, "gigabpe": train_gigabpe, "gigatoken": train_gigatoken, "rustbpe": train_rustbpe,
         "tokenizers": train_tokenizers, "bpeasy": train_bpeasy}  # fmt: skip
ENCODE = {"tinylm": encode_tinylm, "gigatoken": encode_gigatoken, "rustbpe": encode_rustbpe,
          "tiktoken": encode_tiktoken, "tokenizers": encode_tokenizers}  # fmt: skip
SLOW = {"tokenizers", "bpeasy", "rustbpe"}  # trained once only
SLOW_ENCODERS = {"rustbpe", "tiktoken", "tokenizers"}  # encode --slow-mb only, and keep lists of Python numbers


# --- one measurement, in a process of its own


def measure_one(job):
    "Run one task, and print what it took as JSON."
    small, result = Path(job["folder"]) / "small.txt", {}
    with timed(result, "first"):
        if job["task"] == "train":
            TRAIN[job["tool"]](small, 4000, job["threads"])
        else:
            encode, flat, to_file = ENCODE[job["tool"]](job["tokenizer"], job["threads"], job)
            encode(small)
            if to_file:
                to_file(small)
    if job["task"] == "train":
        with timed(result, "seconds"):
            result["tokens"] = TRAIN[job["tool"]](job["path"], job["vocab_size"], job["threads"])
        result["peak"] = peak_memory() / 1e6
    elif job["task"] == "encode":
        with timed(result, "seconds"):
            ids = encode(job["path"])
        digest = flat(ids).astype("<u4")
        result |= {"tokens": len(digest), "digest": hashlib.sha256(digest.tobytes()).hexdigest()[:12]}
    elif job["task"] == "to file":
        with timed(result, "seconds"):
            if to_file:
                to_file(job["path"])
            else:
                write_ids(flat(encode(job["path"])), Path(job["tokenizer"]) / "encoded.bin")
        result["peak"] = peak_memory() / 1e6
    print(json.dumps(result))


def write_ids(ids, path):
    with open(path, "wb") as file:
        file.write(ids.astype("<u2"))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def timed(result, name):
    start = time.perf_counter()
    yield
    result[name] = time.perf_counter() - start


def stream_one(job):
    "Encode texts of more and more GB, as a stream of strings and as a file; print the peak memory after each."
    from tinylm.tokenizer import Tokenizer

    tokenizer, path = Tokenizer.load(job["tokenizer"]), Path(job["folder"]) / "stream.txt"
    with open(job["path"], encoding="utf-8", errors="replace") as file:
        text = file.read(10**6)
    sizes = [int(part * job["bytes"]) for part in (0.1, 0.2, 0.4, 1)]
    result, peaks = {}, []

    def chunks():
        written = 0
        for size in sizes:
            while written < size:
                yield text
                written += len(text.encode())
            peaks.append(peak_memory() / 1e6)

    with timed(result, "seconds"):
        result["tokens"] = sum(1 for _ in tokenizer.encode_iterable(chunks()))
    result |= {"peaks": peaks, "file_peaks": []}
    for size in sizes:
        with open(path, "a", encoding="utf-8") as file:
            while file.tell() < size:
                file.write(text)
        tokenizer.encode_file(path, path.with_suffix(".bin"), num_workers=job["threads"])
        result["file_peaks"].append(peak_memory() / 1e6)
    for made in (path, path.with_suffix(".bin"), path.with_suffix(".json")):
        made.unlink()
    print(json.dumps(result | {"bytes": sizes}))


def memory_of(process):
    "MB that another process holds now; 0 where the system does not tell."
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e6
    except (OSError, IndexError):
        return 0


def run_once(job, **env):
    "Run a job in a fresh process; its result, or a word about why there is none."
    env = {**os.environ, "RAYON_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "true", **env}
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=env)
        stop = time.monotonic() + job["limit_s"]
        while process.poll() is None:
            over = f"over {job['limit_s']:g} s" if time.monotonic() > stop else ""
            over = f"over {job['limit_gb']:g} GB" if memory_of(process) > 1000 * job["limit_gb"] else over
            if over:
                process.kill()
                process.wait()
                return over
            time.sleep(0.05)
        out.seek(0), err.seek(0)
        if process.returncode:
            last = (err.read().strip().splitlines() or ["killed"])[-1]
            return "not installed" if "ModuleNotFoundError" in last else f"failed: {last[:60]}"
        return json.loads(out.read().splitlines()[-1])


def run(job, repeat):
    "The best of a few fresh processes; encoding is measured in memory and to a file."
    results = []
    for _ in range(repeat):
        result = run_once(job)
        if job["task"] == "encode" and isinstance(result, dict):
            to_file = run_once({**job, "task": "to file"})
            if isinstance(to_file, str):
                return to_file
            result |= {"file_seconds": to_file["seconds"], "peak": to_file["peak"]}
        if isinstance(result, str):
            return result
        results.append(result)
    return {name: min(result[name] for result in results) for name in results[0]}


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
    from tinylm.fables import fables

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


def make_tokenizer(path, vocab_size, folder):
    "One tokenizer.json for all, trained by tinylm."
    from tinylm.tokenizer import Tokenizer, train_bpe

    made = folder / f"{path.stem}-{vocab_size}"
    Tokenizer(*train_bpe(path, vocab_size, [END]), [END]).save(made)
    return str(made)


# --- tables


def row(tool, result, size, ours):
    "A line of a table; `ours` is the result of tinylm and the size of its text."
    if isinstance(result, str):
        return f"| {tool} | {result} |"
    cells = [tool]
    for name in ("seconds", "file_seconds"):
        if name in result:
            faster = f"{result[name] / size * ours[1] / ours[0][name]:.2f}" if ours else ""
            cells += [f"{result[name]:.2f}", f"{size / result[name] / 1e6:,.1f}", faster]
    return f"| {' | '.join([*cells, format(result['peak'], ',.0f'), format(result['first'], '.1f')])} |"


def head_of(title):
    "The head of a table."
    measured = ["s", "MB/s", "tinylm is faster by"]
    if title.startswith("Encode"):
        measured = [f"{name}, {where}" for where in ("in memory", "to file") for name in ("s", "MB/s")]
        measured = [*measured[:2], "tinylm is faster by", *measured[2:], "tinylm is faster by"]
    names = ["tool", *measured, "peak MB", "first call, s"]
    return f"| {' | '.join(names)} |\n|---|{'---:|' * (len(names) - 1)}"


def show(rows):
    "Print the tables of a record."
    for title, group in itertools.groupby(rows, key=lambda row: row["title"]):
        of_title = list(group)
        print(f"\n**{title}**\n")
        if title.startswith(("Compile", "Stream")):
            print(sentence(of_title[0]["bytes"], of_title[0]["result"]))
            continue
        print(head_of(title))
        ours, digests = None, {}
        for one in of_title:
            tool, size, result = one["tool"], one["bytes"], one["result"]
            if tool == "tinylm" and isinstance(result, dict):
                ours = result, size
            if "digest" in result:
                digests.setdefault((size, result["digest"]), []).append(tool)
            print(row(tool, result, size, ours))
        for (size, digest), same in digests.items():
            print(f"\nids of {size / 1e6:.0f} MB: {digest} by {', '.join(same)}")


def sentence(size, result):
    "What there is to say about a task that only tinylm does."
    if isinstance(result, str):
        return result
    if "peaks" not in result:
        return f"{result['first']:.0f} s"
    lines = ["| GB | peak MB, as a stream of strings | peak MB, as a file |\n|---:|---:|---:|"]
    for one in zip(result["bytes"], result["peaks"], result["file_peaks"], strict=True):
        lines.append(f"| {one[0] / 1e9:.1f} | {one[1]:.0f} | {one[2]:.0f} |")
    return "\n".join(lines)


def this_run():
    "When, by which commit and how a row was measured, and how busy the machine was before."
    command = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    arguments = " ".join(argument for argument in sys.argv[1:] if "/" not in argument)
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit, "arguments": arguments, "load before": load}


RUN = this_run() if __name__ == "__main__" and "--job" not in sys.argv else {}


def measure(title, tools, job_of, repeat):
    "Measure all tools at one task."
    rows = []
    for tool in tools:
        job = job_of(tool)
        result = run(job, 1 if tool in SLOW else repeat)
        rows.append({"title": title, "tool": tool, "bytes": os.path.getsize(job["path"]), "result": result, "run": RUN})
        print(f"{title}, {tool}: {result}", file=sys.stderr, flush=True)
    return rows


def machine(threads):
    "On what all this is measured."
    names = {name: importlib.metadata.version(name) for name in sorted({"numba", *TRAIN, *ENCODE}) if has(name)}
    cpu = next((line.split(":")[1].strip() for line in io.StringIO(read_cpu()) if line.startswith("model name")), "")
    return {"cpu": cpu or platform.processor(), "threads": threads, "python": platform.python_version(),
            "versions": names}  # fmt: skip


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
    add("--tasks", nargs="+", default=["compile", "train", "encode"], choices=["compile", "train", "encode", "stream"])
    add("--threads", type=int, default=2)
    add("--repeat", type=int, default=3, help="take the best of so many runs; slow trainers run once")
    add("--slow-mb", type=int, default=10, help="MB that tiktoken and tokenizers encode")
    add("--large", action="store_true", help="only a generated file with millions of distinct pretokens")
    add("--large-mb", type=int, default=1000)
    add("--stream-gb", type=float, default=5, help="length of the text for the task `stream`")
    add("--limit-s", type=float, default=120, help="stop a tool that takes longer")
    add("--limit-gb", type=float, default=8, help="stop a tool that takes more memory")
    add("--folder", type=Path, help="where to put the corpora (default: a temporary folder)")
    add("--json", type=Path, help="keep all figures in this file; what it holds of other tasks stays")
    add("--show", type=Path, help="measure nothing, print the tables of such a file")
    add("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_corpora(args, folder):
    "Name and path of each corpus."
    if args.large:
        large = folder / "large.txt"
        return {"large": large if large.exists() else write_large(large, args.large_mb * 10**6)}
    corpora = {path.name.split(".")[0]: [path] for path in args.corpus} if args.corpus else default_corpora()
    sizes = [args.mb[min(i, len(args.mb) - 1)] * 10**6 for i in range(len(corpora))]
    return {name: prepare(name, parts, size, folder)
            for (name, parts), size in zip(corpora.items(), sizes, strict=True)}  # fmt: skip


def benchmark(args, folder):
    "All rows of all tables."
    (folder / "small.txt").write_text(small_text(), encoding="utf-8")

    def job(task, tool, path, **more):
        common = {name: getattr(args, name) for name in ("threads", "limit_s", "limit_gb")}
        return {"task": task, "tool": tool, "path": str(path), "folder": str(folder), **common, **more}

    rows = []
    small = make_tokenizer(folder / "small.txt", 1000, folder)
    if "compile" in args.tasks:
        for task in ("train", "encode"):
            with tempfile.TemporaryDirectory() as empty:
                chosen = job(task, "tinylm", folder / "small.txt", vocab_size=1000, tokenizer=small)
                result = run_once(chosen, NUMBA_CACHE_DIR=empty)
            title = f"Compile, once per installation: {task}"
            rows.append({"title": title, "tool": "tinylm", "bytes": 1, "result": result, "run": RUN})
    for name, path in make_corpora(args, folder).items():
        part = head(path, args.slow_mb * 10**6, folder / f"{name}-part.txt")
        for vocab_size in args.vocab_size[-1:] if args.large else args.vocab_size:
            what = f"{name}, {path.stat().st_size / 1e6:.0f} MB, {vocab_size:,} tokens"

            def training(tool):
                return job("train", tool, path, vocab_size=vocab_size)  # noqa: B023

            if "train" in args.tasks:
                rows += measure(f"Train: {what}", [t for t in args.tools if t in TRAIN], training, args.repeat)
            if not {"encode", "stream"} & set(args.tasks):
                continue
            by = {"tokenizer": make_tokenizer(path, vocab_size, folder), "vocab_size": vocab_size}

            def encoding(tool):
                return job("encode", tool, part if tool in SLOW_ENCODERS else path, **by)  # noqa: B023

            if "encode" in args.tasks:
                rows += measure(f"Encode: {what}", [t for t in args.tools if t in ENCODE], encoding, args.repeat)
            if "stream" in args.tasks and not any(row["title"].startswith("Stream") for row in rows):
                size = int(args.stream_gb * 1e9)
                result = run_once(job("stream", "tinylm", path, bytes=size, **by))
                rows.append({"title": f"Stream: {what}", "tool": "tinylm", "bytes": size, "result": result, "run": RUN})
    return rows


def record(rows, args):
    "Put new rows in the place of old ones of the same task."
    old = json.loads(args.json.read_text(encoding="utf-8"))["rows"] if args.json.exists() else []
    new = {(row["title"], row["tool"]) for row in rows}
    rows = [row for row in old if (row["title"], row["tool"]) not in new] + rows
    whole = {"command": "python benchmarks/tokenizer.py", "environment": machine(args.threads), "rows": rows}
    args.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def main():
    args = parse()
    if args.job:
        job = json.loads(args.job)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: job["threads"]]))
        stream_one(job) if job["task"] == "stream" else measure_one(job)
        return
    if args.show:
        show(json.loads(args.show.read_text(encoding="utf-8"))["rows"])
        return
    print(json.dumps(machine(args.threads)))
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        rows = benchmark(args, folder)
    if args.json:
        record(rows, args)
    show(rows)


if __name__ == "__main__":
    main()
