"""Draw the picture of the README from records: python benchmarks/readme_picture.py

The curve is data/results/spine-fables-laptop.json, the texts are those of data/results/samples-by-step.json; the rungs
are counted here, on the tokens of Fables: single tokens, pairs and triples seen in the training text, smoothed by those
below (weights of absolute discounting), measured on the validation text.
"""
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from tinylm.data import prepare
from tinylm.train import PRESETS

RESULTS = Path(__file__).parent.parent / "data/results"
DISCOUNT = 0.75  # taken off each count and given to the shorter history


def rungs(train: np.ndarray, valid: np.ndarray, vocab_size: int) -> dict[str, float]:
    "Loss on the validation tokens in nats per token, of models that count runs of 1, 2 and 3 tokens."
    counts = [Counter(zip(*(train[i:] for i in range(n)), strict=False)) for n in (1, 2, 3)]
    followers = [Counter(run[:-1] for run in table) for table in counts]
    totals: list[Counter] = [Counter() for _ in counts]
    for table, total in zip(counts, totals, strict=True):
        for run, count in table.items():
            total[run[:-1]] += count

    def probability(run: tuple[int, ...]) -> float:
        if not run:
            return 1 / vocab_size
        n, history = len(run) - 1, run[:-1]
        shorter = probability(run[1:])
        if not totals[n][history]:
            return shorter
        left = DISCOUNT * followers[n][history] / totals[n][history]
        return max(counts[n][run] - DISCOUNT, 0) / totals[n][history] + left * shorter

    losses = {}
    for name, n in (("one token at a time", 1), ("the token before", 2), ("the two before", 3)):
        runs = zip(*(valid[i:] for i in range(n)), strict=False)
        losses[name] = float(np.mean([-math.log(probability(run)) for run in runs]))
    return losses


def main() -> None:
    record = json.loads((RESULTS / "spine-fables-laptop.json").read_text(encoding="utf-8"))
    samples = json.loads((RESULTS / "samples-by-step.json").read_text(encoding="utf-8"))["samples"]
    _, train_file, valid_file = prepare(replace(PRESETS["laptop"], data_dir="data"))
    found = rungs(train_file.tokens()[:1_000_000].tolist(), valid_file.tokens()[:50_000].tolist(), 1792)
    plt.style.use("tinylm.book")
    figure, axes = plt.subplots(figsize=(7.6, 4.3))
    rows = [(row["step"], row["val_loss"]) for row in samples] + [(1200, record["curve"][-1]["val_loss"])]
    rows += [(row["step"], row["val_loss"]) for row in record["curve"] if row["val_loss"] is not None and row["step"]]
    steps, losses = zip(*sorted(dict(rows).items()), strict=True)
    axes.plot([1, *steps], [record["curve"][0]["val_loss"], *losses], marker="o", ms=4)
    found = {"knows nothing (ln 1792)": math.log(1792), **{f"counts {k}": v for k, v in found.items()},
             "the grammar itself: no model can do better": record["corpus"]["floor"]}
    for name, loss in found.items():
        axes.axhline(loss, color="0.45", ls=":", lw=1)
        axes.text(1300, loss * 1.03, f"{name}  {loss:.2f}", ha="right", va="bottom", fontsize=8.5, color="0.25")
    for step, height in ((20, 3.1), (120, 1.4), (1000, 0.34)):  # what it says at these moments
        row = min(samples, key=lambda row: abs(row["step"] - step))
        text = " ".join(row["text"].removeprefix("Once upon a time").split())[:36]
        axes.annotate(f"step {row['step']}: “… {text} …”", (row["step"], row["val_loss"]), xytext=(1.05, height),
                      fontsize=8.5, color="#a5421f", arrowprops={"arrowstyle": "-", "color": "#d9a08c", "lw": 0.8})
    axes.set(xscale="log", yscale="log", xlim=(0.9, 1400), xlabel="step of training (all: two minutes on a laptop)",
             ylabel="loss on new stories, nats per token",
             title="A small Transformer climbs down to the floor of its corpus")
    axes.set_xticks([1, 10, 100, 1000], ["0", "10", "100", "1000"])
    axes.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["0.25", "0.5", "1", "2", "4", "8"])
    axes.minorticks_off()
    axes.grid(False)
    figure.savefig(Path(__file__).parent.parent / "nbs/images/laptop-run.png", dpi=160)


if __name__ == "__main__":
    main()
