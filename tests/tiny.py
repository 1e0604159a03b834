"""A run that takes a second, and what must be equal in two of them."""
import json
from pathlib import Path

import pytest
import torch

from tinylm.data import END_OF_TEXT, fables, prepare
from tinylm.train import TrainConfig

CLOCK = {"seconds", "tokens_per_second"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Models this small are faster on one thread, and child processes must compute as their parent does."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_fables(path, num_stories, seed):
    path.write_text("".join(f"{story}\n{END_OF_TEXT}\n" for story in fables(num_stories, seed)), encoding="utf-8")
    return str(path)


def tiny_config(folder):
    "A tiny config whose data are prepared in a folder."
    config = TrainConfig(
        vocab_size=400, context_length=32, d_model=16, num_layers=1, num_heads=2, d_ff=32,
        corpus=write_fables(folder / "train.txt", 300, 0), val_corpus=write_fables(folder / "valid.txt", 20, 1),
        data_dir=str(folder / "data"), device="cpu", lr=1e-2, batch_size=4, warmup_iters=5, cosine_cycle_iters=60,
        log_every=4, eval_every=20, eval_windows=8, checkpoint_every=7,
    )
    prepare(config)
    return config


def checkpoints(run):
    return sorted((Path(run) / "checkpoints").glob("step-*"))


def metrics(run):
    with open(Path(run) / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def result(run):
    "All that must be equal: weights and moments to the bit, the step, the log but for the clock, the samples."
    newest = checkpoints(run)[-1]
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    log = [{key: value for key, value in row.items() if key not in CLOCK} for row in metrics(run)]
    tensors = [(newest / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]
    return newest.name, state["optimizer"], log, (Path(run) / "samples.txt").read_bytes(), tensors


def tell(model, tokenizer, step):
    return f"a story after step {step} {model.lm_head.weight.sum().item()}"
