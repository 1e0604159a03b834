"""Write data/results/surprise-by-step.json: what each word of Maya's fable costs in training (minutes)."""
import json
import re
from bisect import bisect
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path

import torch

from tinylm.fables import fables
from tinylm.generate import start_ids
from tinylm.tokenizer import Tokenizer
from tinylm.train import PRESETS, train

STEPS = (10, 30, 60, 100, 200, 300, 400, 500, 600, 800, 1000, 1200)
story = next(fables(1, seed=1))
ends = [*accumulate(len(word) for word in re.findall(r"\s*\S+", story))]
rows: list[list] = []


@torch.no_grad()
def note(model: torch.nn.Module, tokenizer: Tokenizer, step: int) -> None:
    "Add up the surprises at the tokens of each word."
    if step not in STEPS:
        return
    ids, nats, at = torch.tensor(start_ids(tokenizer, story)), [0.0] * len(ends), 0
    costs = -model(ids[None])[0].log_softmax(-1)
    for place, i in enumerate(ids[2:].tolist(), 1):
        nats[bisect(ends, at)] += costs[place, i].item()
        at += len(tokenizer.decode([i]))
    rows.append([step, [round(x, 3) for x in nats]])


if __name__ == "__main__":
    config = replace(PRESETS["fast"], qk_norm=False, eval_every=10, eval_windows=1)
    run = train(config, on_eval=note)
    saved = json.loads((run / "config.json").read_text(encoding="utf-8"))
    about = {"config": asdict(config), "commit": saved["commit"], "environment": saved["environment"]}
    out = Path(__file__).resolve().parent.parent / "data/results/surprise-by-step.json"
    out.write_text(json.dumps({**about, "story": story, "words": rows}), encoding="utf-8")
