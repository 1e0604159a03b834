"""Time a training step of the reference preset on the CPU, beside Hugging Face's Llama; print tables.

A step is forward, backward, clipping and AdamW. tinylm runs its own in float32, in bfloat16, and compiled; Hugging
Face's model of the same shape runs in float32 with PyTorch's cross-entropy, clipping and fused AdamW. The last row is
the machine's limit: the matrix products with weights of the same step alone, in their shapes, one after the other
(sgemm). Rounds alternate between them in one process, and the median round counts. Peak memory is measured in a process
for each model, beyond what the process held before it built the model, so that no library's own size counts. A token
file is read from the system's memory and, after that was told to forget it, from the disk.

The peer is optional: pip install transformers
"""
import argparse
import json
import operator
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peak import peak_memory

try:
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError:
    LlamaForCausalLM = None

from tinylm.model import TransformerLM, flops_per_token
from tinylm.optim import AdamW
from tinylm.train import PRESETS, _machine, get_batch, train_step

KINDS = {"matrix products": ("mm", "bmm", "addmm"), "attention": ("attention",), "optimizer": ("optimizer",)}


def tinylm_step(config, x, y):
    model = TransformerLM(config)
    optimizer = AdamW(model.parameters(), weight_decay=config.weight_decay)
    forward = torch.compile(model) if config.compile else model
    return lambda: train_step(forward, optimizer, (x, y), config, 1)


def hf_step(config, x, y):
    sizes = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, attention_bias=False,
        max_position_embeddings=config.context_length, rms_norm_eps=1e-5, tie_word_embeddings=False, use_cache=False)
    model = LlamaForCausalLM(sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)

    def step():
        optimizer.zero_grad()
        logits = model(x).logits
        F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_l2_norm)
        optimizer.step()

    return step


STEPS = {  # name -> how to build the step, and what is changed in the config
    "tinylm": (tinylm_step, {}),
    "tinylm, bfloat16": (tinylm_step, {"dtype": "bfloat16"}),
    "tinylm, compiled": (tinylm_step, {"compile": True}),
    "Hugging Face": (hf_step, {}),
}


def names():
    "What can run here."
    compiler = any(map(shutil.which, ("g++", "clang++", "cl")))
    can = {"tinylm, compiled": compiler, "Hugging Face": LlamaForCausalLM is not None}
    return [name for name in STEPS if can.get(name, True)]


def build(name, config, x, y):
    make, changes = STEPS[name]
    return make(replace(config, **changes), x, y)


def products_step(config, x, y):
    "The products with weights of one step: one forward, and two backward (for the input and for the weight)."
    d, n = config.d_model, x.numel()
    shapes = ([(d, d)] * 4 + [(d, config.d_ff)] * 3) * config.num_layers + [(d, config.vocab_size)]
    pairs = {shape: (torch.randn(n, shape[0]), torch.randn(shape[1], shape[0])) for shape in set(shapes)}
    outputs = {shape: torch.randn(n, shape[1]) for shape in set(shapes)}

    def step():
        for shape in shapes:
            (a, w), out = pairs[shape], outputs[shape]
            a @ w.T, out @ w, out.T @ a

    flops = sum(6 * n * d_in * d_out for d_in, d_out in shapes)
    return step, flops


def seconds(step):
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def data(config):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(config.vocab_size, (config.batch_size, config.context_length + 1), generator=draw)
    return rows[:, :-1], rows[:, 1:]


def measure(config, threads, rounds):
    "Seconds of each round, by name."
    torch.set_num_threads(threads)
    x, y = data(config)
    products, flops = products_step(config, x, y)
    steps = {**{name: build(name, config, x, y) for name in names()}, "products alone": products}
    for step in steps.values():
        step()
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step))
    return times, flops


def measure_optimizers(config, rounds):
    "Seconds of one step of our AdamW and of PyTorch's fused one on the reference parameters."
    times = {"tinylm": [], "PyTorch, fused": []}
    optimizers = {}
    for name in times:
        params = [torch.nn.Parameter(torch.randn_like(p)) for p in TransformerLM(config).parameters()]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizers[name] = AdamW(params) if name == "tinylm" else torch.optim.AdamW(params, fused=True)
        optimizers[name].step()
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            times[name].append(seconds(optimizer.step))
    return times


def measure_batches(config, rounds):
    "Seconds of fetching a batch from a token file of 200 MB: held in memory by the system, and from the disk."
    rng, times = np.random.default_rng(1), {"in memory": [], "from disk": []}
    with tempfile.NamedTemporaryFile(dir=Path(__file__).parent) as file:
        np.random.default_rng(0).integers(config.vocab_size, size=10**8, dtype=np.uint16).tofile(file)
        os.fsync(file.fileno())
        for name, values in times.items():
            for _ in range(rounds):
                if name == "from disk":
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # forget what no map holds
                tokens = np.memmap(file.name, np.uint16, "r")
                values.append(seconds(
                    lambda t=tokens: get_batch(t, config.batch_size, config.context_length, "cpu", rng)))
                del tokens
    return times


def profile(config):
    "Share of each kind of work in a step, by PyTorch's profiler."
    x, y = data(config)
    step = build("tinylm", config, x, y)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    work = {}
    for event in profiler.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "all else")
        work[kind] = work.get(kind, 0) + event.self_cpu_time_total
    total = sum(work.values())
    return {kind: value / total for kind, value in sorted(work.items(), key=lambda pair: -pair[1])}


def held():
    "Bytes that this process holds now."
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak(name, options):
    "Peak memory of a process that takes two steps, beyond what it held before it built the model, in MB."
    done = subprocess.run([sys.executable, __file__, "--peak", name, "--batch-size", str(options.batch_size),
                           "--preset", options.preset], capture_output=True, text=True, encoding="utf-8", check=True)
    return float(done.stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=8, help="windows of 256 tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--preset", choices=PRESETS, default="reference", help="another one is a quick try")
    parser.add_argument("--peak", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    config = replace(PRESETS[options.preset], batch_size=options.batch_size)
    if options.peak:
        tiny = replace(PRESETS["debug"], batch_size=1)
        build(options.peak, tiny, *data(tiny))()  # loads all code that a step needs
        before = held()
        step = build(options.peak, config, *data(config))
        step(), step()
        print((peak_memory() - before) / 1e6)
        return

    tokens = config.batch_size * config.context_length
    needed = 3 * flops_per_token(config) * tokens
    record = {"command": " ".join(["python benchmarks/train.py", *sys.argv[1:]]), "batch_size": config.batch_size,
              "preset": options.preset, "rounds": options.rounds, **_machine("cpu"),
              "peak_mb": {name: peak(name, options) for name in names() if name != "tinylm, compiled"}}
    record["steps"], record["optimizers"], ratios = {}, {}, []
    print("| threads | | s a step | tokens/s | GFLOP/s | share of products alone | peak MB |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for threads in options.threads:
        times, flops = measure(config, threads, options.rounds)
        limit = flops / statistics.median(times["products alone"])
        for name, values in times.items():
            middle = statistics.median(values)
            rate = (flops if name == "products alone" else needed) / middle
            memory = f"{record['peak_mb'][name]:,.0f}" if name in record["peak_mb"] else ""
            speed = "" if name == "products alone" else f"{tokens / middle:,.0f}"
            print(f"| {threads} | {name} | {middle:.2f} | {speed} | {rate / 1e9:.1f} | {rate / limit:.2f} | {memory} |")
        record["steps"][threads] = {"seconds": times, "flops": {"step": needed, "products": flops}}
        for name in ("tinylm, bfloat16", "tinylm, compiled", "Hugging Face"):
            if name in times:
                ratio = statistics.median(map(operator.truediv, times[name], times["tinylm"]))
                ratios.append(f"{threads} thread(s): {name} takes {ratio:.2f} times as long as tinylm")
        if "Hugging Face" in times:
            record["steps"][threads]["faster_than_hf"] = ratio
        record["optimizers"][threads] = optimizers = measure_optimizers(config, 3 * options.rounds)
        ours, fused = (1000 * statistics.median(values) for values in optimizers.values())
        ratio = statistics.median(map(operator.truediv, *optimizers.values()))
        ratios.append(f"{threads} thread(s): AdamW {ours:.1f} ms, PyTorch's fused {fused:.1f}, ratio {ratio:.2f}")
    print("\nMedian ratios of the rounds:", *ratios, sep="\n- ", end="\n\n")
    record["batch_seconds"] = measure_batches(config, 100)
    record["profile"] = profile(config)
    for place, values in record["batch_seconds"].items():
        print(f"A batch from a token file, {place}: {1000 * statistics.median(values):.2f} ms")
    print("Where a step goes:", ", ".join(f"{kind} {share:.0%}" for kind, share in record["profile"].items()))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
