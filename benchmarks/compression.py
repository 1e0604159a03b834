"""Measure how many bytes a token stands for as the vocabulary grows; chapter 00 draws two of these curves.

    python benchmarks/compression.py NAME=TRAIN.txt,HELD_OUT.txt ... --json data/results/tokenizer-compression.json

The texts may be .txt or .txt.gz. A tokenizer with fewer tokens is the same list of merges, cut off earlier, so each
corpus is trained on once.
"""
import argparse
import hashlib
import json
from pathlib import Path

from tinylm.core import END_OF_TEXT, open_text
from tinylm.tokenizer import Tokenizer, train_bpe

SIZES = [512 << k for k in range(7)]  # 512 to 32,768


def read(path, size):
    with open_text(path) as stream:
        return stream.read(size)


def compression(train, held_out, size):
    "Bytes per token of a held-out text for each vocabulary size; train on one file, measure on another."
    vocab, merges = train_bpe(train, SIZES[-1], [END_OF_TEXT])
    data = read(held_out, size)
    curve = {}
    for vocab_size in [size for size in SIZES if size < len(vocab)] + [len(vocab)]:
        fewer = merges[: vocab_size - 257]
        tokens = [bytes([byte]) for byte in range(256)] + [a + b for a, b in fewer]
        tokenizer = Tokenizer(dict(enumerate(tokens)), fewer, [END_OF_TEXT])
        curve[vocab_size] = round(len(data) / len(tokenizer.encode(data.decode("utf-8", "replace"))), 4)
    sha256 = hashlib.sha256(data).hexdigest()
    return {"train": Path(train).name, "held_out": Path(held_out).name, "bytes": len(data), "sha256": sha256,
            "bytes_per_token": curve}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="+", help="NAME=TRAIN,HELD_OUT")
    parser.add_argument("--mb", type=float, default=2, help="MB of the held-out text to measure on")
    parser.add_argument("--json", type=Path, help="where to write the record")
    args = parser.parse_args()
    record = {}
    for corpus in args.corpora:
        name, _, paths = corpus.partition("=")
        record[name] = compression(*paths.split(","), int(args.mb * 1e6))
        print(name, record[name]["bytes_per_token"], flush=True)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
