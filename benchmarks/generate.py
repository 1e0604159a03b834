"""Time generation beside Hugging Face's `generate` and llama2.c, in one run on the same cores; print a Markdown table.

All of them write greedily with the same weights, the reference preset drawn at random, and the script checks that they
write the same. Rounds alternate between the tools, and the best round of each counts: what else runs on the machine
can only make a round slower.

Peers are optional. Hugging Face: `pip install transformers`. llama2.c is one C file (github.com/karpathy/llama2.c; the
figures in the book are from its commit 411c5bd):

    gcc -O3 -o run run.c -lm
    gcc -O3 -march=native -o runnative run.c -lm
    gcc -Ofast -fopenmp -march=native -o runomp run.c -lm
    python benchmarks/generate.py --llama2c run --llama2c-native runnative --llama2c-omp runomp
"""
import argparse
import importlib.util
import json
import os
import re
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tinylm.export import to_hf, to_llama2c
from tinylm.generate import generate
from tinylm.model import TransformerLM
from tinylm.tokenizer import Tokenizer
from tinylm.train import PRESETS, _machine, load_run, save_checkpoint

END = "<|endoftext|>"


def make_run(folder):
    "A run of the reference preset as it was drawn; ids beyond the bytes have no text."
    model, tokenizer = TransformerLM(PRESETS["reference"]), Tokenizer({i: bytes([i]) for i in range(256)}, [], [END])
    tokenizer.save(folder / "tokenizer")
    save_checkpoint(model, torch.optim.SGD(model.parameters()), 1, folder / "checkpoints/step-00000001")
    described = vars(PRESETS["reference"]) | {"data": {"fingerprint": Tokenizer.load(folder / "tokenizer").fingerprint}}
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


def time_tinylm(model, batch_size, num_tokens, threads):
    torch.set_num_threads(threads)
    began = time.perf_counter()
    rows = generate(model, [[1]] * batch_size, num_tokens, temperature=0)
    return batch_size * num_tokens / (time.perf_counter() - began), rows[0]


def time_hf(model, batch_size, num_tokens, threads):
    torch.set_num_threads(threads)
    ids = torch.ones(batch_size, 1, dtype=torch.long)
    settings = dict(max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
    began = time.perf_counter()
    with torch.inference_mode():
        rows = model.generate(ids, **settings)
    return batch_size * num_tokens / (time.perf_counter() - began), rows[0, 1:].tolist()


def time_llama2c(binary, folder, num_tokens, threads):
    argv = [binary.resolve(), folder / "model.bin", "-z", folder / "tokenizer.bin", "-t", "0", "-n", str(num_tokens)]
    done = subprocess.run(argv, capture_output=True, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    return float(re.search(rb"tok/s: ([\d.]+)", done.stderr)[1]), done.stdout.removesuffix(b"\n")


def text_of(ids):
    "What llama2.c prints for ids: bytes that are printable ASCII or white, and the names of placeholders."
    seen = {i: bytes([i]) if chr(i) in string.printable else b"" for i in range(256)}
    return b"".join(seen.get(i, END.encode() if i == 256 else b"[PAD%d]" % i) for i in ids)


def cases(folder, args):
    "Yield (tool, batch size, threads, function that makes one round)."
    model = load_run(folder / "run")[0]
    half = load_run(folder / "run")[0].bfloat16()
    hf = None
    if importlib.util.find_spec("transformers"):
        from transformers import AutoModelForCausalLM

        hf = AutoModelForCausalLM.from_pretrained(to_hf(folder / "run", folder / "hf"))
        hf.generation_config.eos_token_id = None  # never stop
    for threads in args.threads:
        for size in (1, 8):
            yield "tinylm", size, threads, lambda s=size, t=threads: time_tinylm(model, s, args.tokens, t)
            yield "tinylm, bfloat16", size, threads, lambda s=size, t=threads: time_tinylm(half, s, args.tokens, t)
            if hf:
                yield "Hugging Face", size, threads, lambda s=size, t=threads: time_hf(hf, s, args.tokens, t)
    for name, binary, counts in (("llama2.c -O3", args.llama2c, [1]),
                                 ("llama2.c -O3 native", args.llama2c_native, [1]),
                                 ("llama2.c -Ofast", args.llama2c_omp, args.threads)):
        for threads in counts if binary else []:
            yield name, 1, threads, lambda b=binary, t=threads: time_llama2c(b, folder, args.tokens, t)


def main():
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--llama2c", type=Path, help="binary of llama2.c, compiled as its README says: gcc -O3")
    parser.add_argument("--llama2c-native", type=Path, help="another one, compiled with -O3 -march=native")
    parser.add_argument("--llama2c-omp", type=Path, help="another one, compiled with -Ofast -fopenmp -march=native")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to write, at most 255")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores}))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_run(folder / "run")
        to_llama2c(folder / "run", folder / "model.bin")
        every = list(cases(folder, args))
        rates, written = {case[:3]: [] for case in every}, {}
        for _ in range(args.rounds):
            for tool, size, threads, once in every:
                rate, written[tool, size, threads] = once()
                rates[tool, size, threads].append(rate)
    reference = written["tinylm", 1, args.threads[0]]
    rows = []
    print("| tool | batch | threads | tokens/s | rounds | same text |\n|---|---|---|---|---|---|")
    for (tool, size, threads), all_rates in rates.items():
        output = written[tool, size, threads]
        same = output == (text_of(reference) if isinstance(output, bytes) else reference)
        rows.append(dict(tool=tool, batch=size, threads=threads, tokens_per_second=all_rates, same_text=same))
        rounds = ", ".join(f"{rate:.0f}" for rate in all_rates)
        print(f"| {tool} | {size} | {threads} | {max(all_rates):.0f} | {rounds} | {'yes' if same else 'no'} |")
    if args.json:
        words = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])
        command = " ".join(["python benchmarks/generate.py", *words])
        record = dict(command=command, preset="reference", tokens=args.tokens, **_machine("cpu"))
        args.json.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
