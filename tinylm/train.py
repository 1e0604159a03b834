"""From a file of tokens to a model that tells stories, by a loop that can be trusted."""

import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from signal import Signals
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

import tinylm
from tinylm.checkpoint import load_checkpoint, read_state, save_checkpoint
from tinylm.core import END_OF_TEXT, InputError, atomic_write, cannot_write, noted_signals, read_json, say
from tinylm.data import corpus_name, cut_stories, draw_starts, fables_floor, fetch_corpus, get_batch, prepare, windows
from tinylm.distributed import all_reduce_max, all_reduce_mean, full_tensor, on_rank0, process_group, rank, world_size, wrap
from tinylm.model import ModelConfig, TransformerLM, flops_per_token, memory_table, num_parameters
from tinylm.optim import AdamW, clip_grad_norm, cosine_lr, cross_entropy
from tinylm.tokenizer import TokenFile, Tokenizer


@torch.no_grad()
def evaluate(
    model: nn.Module,  # maps ids (B, T) to logits (B, T, V)
    tokens: np.ndarray,  # validation tokens in a row, shape (N,)
    config: "TrainConfig",  # its context_length and eval_windows choose the windows
) -> float:  # mean loss in nats per token
    """Measure the loss on windows spread evenly over the tokens, the same for every run on the same data."""
    device, length = next(model.parameters()).device, config.context_length
    num_windows = min(config.eval_windows, (len(tokens) - 1) // length)
    if num_windows < 1:
        raise InputError(f"{len(tokens)} validation tokens are too few: context_length {length} needs {length + 1}")
    starts = np.linspace(0, len(tokens) - 1 - length, num_windows).astype(np.int64)
    total = 0.0
    for i in range(0, num_windows, 16):
        x, y = windows(tokens, starts[i : i + 16], length, device)
        total += cross_entropy(model(x), y).item() * len(x)
    return total / num_windows


@torch.no_grad()
def evaluate_stories(
    model: TransformerLM,  # the model to measure; its context_length says which stories fit
    tokens: np.ndarray,  # validation tokens in a row, shape (N,)
    end_id: int,  # id of <|endoftext|>
) -> tuple[float, int, int]:  # mean loss in nats per token, number of tokens predicted, number of stories
    """Measure the loss on whole stories, one a row, each from its first token to its `<|endoftext|>`.

    Stories longer than the context are left out. Raises InputError when none fits.
    """
    device = next(model.parameters()).device
    rows = sorted(cut_stories(tokens, end_id, model.config.context_length), key=len)
    if not rows:
        raise InputError(f"no story fits into context_length {model.config.context_length}; choose a longer context")
    total, count = 0.0, 0
    for i in range(0, len(rows), 16):
        padded = nn.utils.rnn.pad_sequence([torch.from_numpy(r) for r in rows[i : i + 16]], True, -1).to(device)
        x, y = padded[:, :-1].clamp(min=0), padded[:, 1:]
        real = y >= 0
        total += cross_entropy(model(x)[real], y[real]).item() * int(real.sum())
        count += int(real.sum())
    return total / count, count, len(rows)


@dataclass(frozen=True)
class TrainConfig(ModelConfig):
    """Describe a training run completely; the defaults are the reference preset."""

    preset: Literal["debug", "laptop", "reference"] = "reference"  # named set of defaults; in Python, PRESETS[name]
    corpus: str = "fables"  # fables, tinystories, owt, or the path of a .txt or .txt.gz file
    val_corpus: str | None = None  # validation text for a corpus given by path; None holds out its last documents
    data_dir: str = "data"  # folder for corpora, tokenizers and token files
    run_dir: str | None = None  # folder of the run; None means a new one, runs/<date>-<corpus>-<preset>
    resume: str | None = None  # folder of a run to go on with, instead of starting one
    seed: int = 0  # of the initial parameters and of the order of the data
    device: str = "auto"  # cpu, cuda, mps, or auto for the best one there is
    lr: float = 8e-4  # learning rate at the end of the warm-up
    min_lr: float | None = None  # learning rate at the end of the cosine; None means lr / 10
    batch_size: int = 64  # windows per step
    beta1: float = 0.9  # AdamW's memory of gradients
    beta2: float = 0.999  # AdamW's memory of squared gradients
    weight_decay: float = 1e-4  # AdamW's decoupled weight decay
    warmup_iters: int = 2_000  # steps of linear warm-up
    cosine_cycle_iters: int = 20_000  # step at which the cosine reaches min_lr
    max_l2_norm: float = 1.0  # longest gradient that is not clipped
    grad_accum_steps: int = 1  # pieces that a batch goes through the model in, one after the other, to save memory
    dtype: Literal["float32", "bfloat16"] = "float32"  # numbers in the matrix products; weights stay float32
    compile: bool = False  # let torch.compile write faster code for the model first
    fsdp: bool = False  # under torchrun, let each process keep a part of the model instead of all of it
    max_steps: int | None = None  # steps to take, whatever the cosine's length; None means cosine_cycle_iters
    max_minutes: float | None = None  # stop after so many minutes with a checkpoint; --resume goes on
    log_every: int = 50  # steps between lines of the log
    eval_every: int = 500  # steps between evaluations
    eval_windows: int = 256  # windows of the validation set that are evaluated
    checkpoint_every: int = 1_000  # steps between checkpoints
    watch: bool = False  # log activations, gradients and updates of every layer too
    tracker: Literal["none", "tensorboard", "wandb"] = "none"  # program that also shows the log

    def __post_init__(self) -> None:
        """Raise InputError for the first value that cannot work."""
        super().__post_init__()

        def need(names: str, fits: Callable[[Any], bool], expected: str) -> None:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise InputError(f"{name} is {value}; expected {expected}")

        need("batch_size grad_accum_steps cosine_cycle_iters max_steps log_every eval_every eval_windows "
             "checkpoint_every", lambda x: x >= 1, "at least 1")
        need("lr max_l2_norm max_minutes", lambda x: 0 < x < math.inf, "a number greater than 0")
        need("beta1 beta2", lambda x: 0 <= x < 1, "at least 0 and less than 1")
        need("weight_decay seed", lambda x: 0 <= x < math.inf, "0 or more")
        need("min_lr", lambda x: 0 <= x <= self.lr, f"0 to lr, which is {self.lr}")
        cycle, pieces = self.cosine_cycle_iters, self.grad_accum_steps
        need("warmup_iters", lambda x: 0 <= x < cycle, f"0 or more, and less than cosine_cycle_iters, which is {cycle}")
        need("batch_size", lambda x: x % pieces == 0, f"a multiple of grad_accum_steps, which is {pieces}")

    @property
    def last_step(self) -> int:
        """The step after which training ends."""
        return self.cosine_cycle_iters if self.max_steps is None else self.max_steps

    def lr_at(self, step: int) -> float:
        """Compute the learning rate of one step, counted from 1."""
        min_lr = self.lr / 10 if self.min_lr is None else self.min_lr
        return cosine_lr(step, self.lr, min_lr, self.warmup_iters, self.cosine_cycle_iters)


PRESETS = {  # what `--preset` begins with
    "debug": TrainConfig(
        preset="debug", vocab_size=1792, context_length=256, d_model=32, num_layers=2, num_heads=2, d_ff=96,
        lr=2e-2, batch_size=8, warmup_iters=5, cosine_cycle_iters=40,
        log_every=5, eval_every=20, eval_windows=16, checkpoint_every=20,
    ),
    "laptop": TrainConfig(
        preset="laptop", vocab_size=1792, context_length=256, d_model=128, num_layers=2, num_heads=8, d_ff=352,
        lr=1e-2, batch_size=8, warmup_iters=50, cosine_cycle_iters=1200,
        log_every=10, eval_every=200, eval_windows=64, checkpoint_every=200,
    ),
    "reference": TrainConfig(preset="reference"),
}

FREE = {  # what may change when a run goes on: it has no effect on what is learned
    "run_dir", "resume", "preset", "watch", "max_steps", "max_minutes", "device", "data_dir", "log_every",
    "eval_every", "checkpoint_every", "fsdp", "compile", "tracker",
}


class Diverged(RuntimeError):
    """The loss or its gradient is not a finite number; the weights are those before the bad step."""

    def __init__(
        self,
        step: int,  # the step whose update was not taken
        loss: float,  # its loss
        grad_norm: float,  # the length of its gradient
    ):
        found = f"loss {loss}, gradient norm {grad_norm}"
        super().__init__(f"training diverged at step {step}: {found}; lower the learning rate")
        self.step, self.loss, self.grad_norm = step, loss, grad_norm


class Watch:
    """Measure, in each step, the activations, the gradient and the update of each part of a model."""

    def __init__(self, model: Any):
        layers = {f"layers.{i}": layer for i, layer in enumerate(model.layers)}
        ends = {"ln_final": model.ln_final, "lm_head": model.lm_head}
        self.parts: dict[str, nn.Module] = {"token_embeddings": model.token_embeddings, **layers, **ends}
        self.row: dict[str, dict[str, float | str]] = {}  # of the step that was taken last
        for name, part in self.parts.items():
            part.register_forward_hook(lambda module, inputs, output, name=name: self.activation(name, output))

    def parameters(self) -> dict[str, list[Tensor]]:
        """Give the weights of each part; without norms, ln_final has none."""
        weights = {name: [p.detach() for p in part.parameters()] for name, part in self.parts.items()}
        return {name: tensors for name, tensors in weights.items() if tensors}

    def begin(self) -> None:
        """Remember the weights before a step."""
        self.row = {"activations": {}, "gradients": {}, "updates": {}}
        self.before = {name: [p.clone() for p in tensors] for name, tensors in self.parameters().items()}

    def activation(self, name: str, output: Tensor) -> None:
        """Note the root mean square of what a part gave, unless it was asked without gradients, as in evaluation."""
        if torch.is_grad_enabled():
            square = all_reduce_mean(output.detach().float().square().mean())
            self.row["activations"][name] = _number(square.sqrt().item())

    def gradients(self) -> None:
        """Note the length of each part's gradient."""
        for name in self.before:
            found = [p.grad for p in self.parts[name].parameters() if p.grad is not None]
            self.row["gradients"][name] = _number(_length(found))

    def updates(self) -> None:
        """Note how far each part's weights moved, relative to their length."""
        for name, after in self.parameters().items():
            moves = [a - b for a, b in zip(after, self.before[name], strict=True)]
            self.row["updates"][name] = _number(_length(moves) / _length(after))


def _length(tensors: list[Tensor]) -> float:
    """Compute the L2 norm of several tensors together."""
    return full_tensor(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))).item()


def _number(x: float) -> float | str:
    """Round to four digits; JSON has no infinity, so that becomes a word."""
    return float(f"{x:.4g}") if math.isfinite(x) else str(x)


def train_step(
    model: nn.Module,  # changed in place
    optimizer: torch.optim.Optimizer,  # of the model's parameters
    batch: tuple[Tensor, Tensor],  # inputs and targets, each (B, T)
    config: TrainConfig,  # its schedule, its pieces, its clipping
    step: int,  # which step this is, counted from 1
    watch: Watch | None = None,  # notes what each layer does
) -> tuple[float, float]:  # loss before the update, gradient norm before clipping
    """Take one step. Raises Diverged, before the update, if loss or gradient are not finite."""
    for group in optimizer.param_groups:
        group["lr"] = config.lr_at(step)
    optimizer.zero_grad()
    if watch:
        watch.begin()
    pieces, total = config.grad_accum_steps, torch.zeros((), device=batch[0].device)
    for x, y in zip(batch[0].chunk(pieces), batch[1].chunk(pieces), strict=True):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            logits = model(x)
        loss = cross_entropy(logits.float(), y) / pieces
        loss.backward()
        total += loss.detach()
    if watch:
        watch.gradients()
    grad_norm = full_tensor(clip_grad_norm(model.parameters(), config.max_l2_norm))
    loss_value, norm_value = torch.stack([all_reduce_mean(total), grad_norm]).tolist()
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        raise Diverged(step, loss_value, norm_value)
    optimizer.step()
    if watch:
        watch.updates()
    return loss_value, norm_value


def read_config(
    run_dir: str | Path,  # the folder of a run
) -> TrainConfig:  # what it was made with
    """Read the config of a run. Raises InputError when the folder is no run."""
    if not Path(run_dir, "config.json").exists():
        raise InputError(f"{run_dir}: not a run folder, it has no config.json")
    saved = read_json(Path(run_dir, "config.json"))
    try:
        return TrainConfig(**{f.name: saved[f.name] for f in fields(TrainConfig) if f.name in saved})
    except TypeError as error:
        raise InputError(f"{Path(run_dir, 'config.json')}: not the config of a run ({error})") from error


def read_metrics(
    run_dir: str | Path,  # the folder of a run
) -> list[dict[str, Any]]:  # step, tokens, seconds, train_loss, val_loss, lr, grad_norm, tokens_per_second, ...
    """Read the lines of a run's log; a last one that a crash has cut off is no line."""
    with open(Path(run_dir, "metrics.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def checkpoints(
    run_dir: str | Path,  # the folder of a run
) -> list[Path]:  # checkpoint folders, the newest first
    """List a run's checkpoints; only `step-` and eight digits is one, so a copy under another name is the user's."""
    folders = Path(run_dir, "checkpoints").glob("step-*")
    return sorted((path for path in folders if re.fullmatch(r"step-\d{8}", path.name)), reverse=True)


def load_newest(
    run_dir: str | Path,  # the folder of a run
    model: nn.Module,  # gets the parameters
    optimizer: torch.optim.Optimizer | None = None,  # gets its state
) -> dict[str, Any] | None:  # the checkpoint's state.json, None if the run has no checkpoint yet
    """Load the newest checkpoint that is not damaged. Raises InputError when all of them are."""
    folders = checkpoints(run_dir)
    for folder in folders:
        try:
            state = read_state(folder)[1]
            load_checkpoint(folder, model, optimizer)
            return state
        except InputError as error:
            say(f"{error}; trying the checkpoint before it" if folder != folders[-1] else str(error))
    if folders:
        raise InputError(f"{run_dir}: none of its {len(folders)} checkpoints can be used; start a new run")
    return None


def load_run(
    run_dir: str | Path,  # the folder of a run
    device: str = "cpu",  # where the model will live; "auto" for the best there is
) -> tuple[TransformerLM, Tokenizer, TrainConfig]:  # the model of the newest valid checkpoint, tokenizer, config
    """Load what a run has made so far. Raises InputError when there is nothing to load."""
    config = read_config(run_dir)
    model = TransformerLM(config, seed=config.seed)
    if load_newest(run_dir, model) is None:
        raise InputError(f"{run_dir}: the run has no checkpoint yet")
    tokenizer = Tokenizer.load(Path(run_dir, "tokenizer"))
    if tokenizer.fingerprint != read_json(Path(run_dir, "config.json"))["data"]["fingerprint"]:
        raise InputError(f"{Path(run_dir, 'tokenizer')}: not the tokenizer that this run began with; bring that back")
    return model.to(pick_device(device)), tokenizer, config


def pick_device(
    name: str,  # cpu, cuda, cuda:1, mps, or auto for the best there is
) -> str:  # the name of a device that is there
    """Choose a device. Raises InputError for one that is not there."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "auto":
        return best
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used here; try {best} or auto") from error
    return name


def memory_there(
    device: str,  # its name, as pick_device returns it
) -> int | None:  # bytes for each process on this machine, None where the system does not tell
    """Count the bytes of memory that a device has."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _check_machine(config: TrainConfig) -> str:
    """Choose the device. Raises InputError if the machine cannot do what the config wants."""
    device, pieces = pick_device(config.device), world_size() * config.grad_accum_steps
    if config.batch_size % pieces:
        raise InputError(f"batch_size {config.batch_size} must be a multiple of {pieces}: processes x grad_accum_steps")
    if config.fsdp and world_size() == 1:
        raise InputError("fsdp shares out the model among several processes; start them with torchrun, or leave it out")
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and config.run_dir is None:
        raise InputError("torchrun --max-restarts needs --run_dir, by which a run that starts again is found")
    if config.compile and device == "cpu" and not any(map(shutil.which, COMPILERS)):
        raise InputError(f"compile needs a C++ compiler on the PATH: {', '.join(COMPILERS)}; or leave it out")
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        raise InputError(f"tracker {config.tracker} is a package that is not there; pip install {config.tracker}")
    table = memory_table(config, config.batch_size // pieces, config.dtype)
    model = sum(table[name] for name in ("weights", "gradients", "optimizer"))
    needed = sum(table.values()) - (model - model // world_size() if config.fsdp else 0)
    there = memory_there(device)
    if there is not None and needed > there:
        found = f"a step needs {needed / 1e9:.1f} GB of memory, and {device} has {there / 1e9:.1f} GB"
        raise InputError(f"{found}; raise --grad_accum_steps, or choose a smaller batch or model")
    return device


COMPILERS = [os.environ.get("CXX", "g++"), "clang++", "cl"]


@on_rank0
def _open_folder(config: TrainConfig, held: ExitStack) -> tuple[Path, TokenFile, TokenFile, float | None]:
    """Prepare the data, then make the run's folder or find that the one there was made by this config; lock it."""
    run_dir = Path(config.resume or config.run_dir or "").expanduser()
    if config.resume is not None:
        read_config(run_dir)  # it must be there
    tokenizer, train_file, valid_file = prepare(config)
    try:
        if config.resume is None and config.run_dir is None:
            name = f"{time.strftime('%Y-%m-%d-%H%M%S')}-{corpus_name(config.corpus)}-{config.preset}"
            for i in range(1, 1000):  # several runs may begin in the same second
                run_dir = Path("runs", name if i == 1 else f"{name}-{i}")
                run_dir.parent.mkdir(exist_ok=True)
                try:
                    run_dir.mkdir()
                    break
                except FileExistsError:
                    continue
        run_dir.mkdir(parents=True, exist_ok=True)
        held.enter_context(FileLock(run_dir / ".lock", timeout=0))
    except Timeout as error:
        raise InputError(f"{run_dir}: in use by another process; stop it first, or wait") from error
    except OSError as error:
        raise cannot_write(run_dir, error) from error
    data = {"fingerprint": tokenizer.fingerprint, "sha256": train_file.sha256, "valid_sha256": valid_file.sha256}
    if (run_dir / "config.json").exists():
        saved, ours = read_json(run_dir / "config.json"), asdict(config)
        for name in ours:
            before = saved.get(name, getattr(TrainConfig, name, None))
            if name not in FREE and before != ours[name]:
                what = f"made with {name} {before}, not {ours[name]}"
                raise InputError(f"{run_dir}: {what}; go on with what it was made with, or choose another --run_dir")
        for name, value in data.items():
            if saved["data"].get(name) != value:
                what = {"fingerprint": "tokenizer", "sha256": "training text", "valid_sha256": "validation text"}[name]
                raise InputError(f"{run_dir}: its {what} has changed since it began; bring that back, or start a new run")
        for path in Path(run_dir, "checkpoints").glob(".*.tmp"):  # begun when the process was killed
            shutil.rmtree(path, ignore_errors=True)
        return run_dir, train_file, valid_file, saved["data"]["floor"]
    if {path.name for path in run_dir.iterdir()} - {".lock", "tokenizer"}:
        raise InputError(f"{run_dir}: there are files in it, and no run; choose another --run_dir")
    text = fetch_corpus(config.corpus, config.data_dir, config.val_corpus)["train"]
    about = {"name": corpus_name(config.corpus), "bytes": text.stat().st_size, "tokens": train_file.count}
    try:
        floor = fables_floor(valid_file.tokens(), tokenizer, config.context_length)
    except InputError as error:
        floor = None
        if config.corpus == "fables":
            say(f"the floor stays unknown: {error}")
    data = {**about, **data, "valid_tokens": valid_file.count, "floor": floor}
    tokenizer.save(run_dir / "tokenizer")
    with atomic_write(run_dir / "config.json", "w") as file:
        made = {**asdict(replace(config, run_dir=str(run_dir))), "data": data, "commit": commit()}
        json.dump({**made, "environment": environment(pick_device(config.device))}, file, indent=1)
    return run_dir, train_file, valid_file, floor


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; it has finished its step and saved a checkpoint."""

    def __init__(
        self,
        signum: int,  # number of the signal
        run_dir: Path,  # the run that can go on
    ):
        super().__init__(f"stopped by {Signals(signum).name}; go on with --resume {run_dir}")
        self.exit_code = 128 + signum


class Log:
    """The log of a run: what the steps since its last line gave, and the files that it goes to."""

    def __init__(self, run_dir: Path, config: TrainConfig, state: dict[str, Any] | None, listeners: list[Any]):
        saved = state["extra"] if state else {"pending": [], "seconds": 0.0, "sizes": {}}
        self.run_dir, self.config, self.listeners, self.pending = run_dir, config, listeners, saved["pending"]
        self.started = time.perf_counter() - saved["seconds"]
        for name in ("metrics.jsonl", "samples.txt"):  # as long as they were when the checkpoint was written
            self.append(name, "", saved["sizes"].get(name, 0))

    @on_rank0
    def append(self, name: str, text: str, cut: int | None = None) -> int:
        """Write at the end of a file, cut to a length first if need be; store it, and return its length."""
        try:
            with open(self.run_dir / name, "ab") as file:
                file.truncate(cut if cut is not None and cut < file.tell() else None)
                file.write(text.encode())
                file.flush()
                if not text:
                    os.fsync(file.fileno())
                return file.tell()
        except OSError as error:
            raise cannot_write(self.run_dir / name, error) from error

    def line(self, step: int, **more: Any) -> None:
        """Write a line for the steps since the last one."""
        losses, norms, seconds = zip(*self.pending, strict=True) if self.pending else ((), (), ())
        tokens = self.config.batch_size * self.config.context_length
        row = {
            "step": step, "tokens": step * tokens, "seconds": round(time.perf_counter() - self.started, 3),
            "train_loss": sum(losses) / len(losses) if losses else None, "val_loss": None,
            "lr": self.config.lr_at(step) if step else None, "grad_norm": max(norms) if norms else None,
            "tokens_per_second": round(len(losses) * tokens / sum(seconds), 1) if losses else None, **more,
        }
        self.append("metrics.jsonl", json.dumps(row) + "\n")
        for listener in self.listeners:
            listener(row)
        self.pending = []

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must know to go on with this log, after storing the files for good."""
        sizes = {name: self.append(name, "") for name in ("metrics.jsonl", "samples.txt")}
        return {"pending": self.pending, "seconds": time.perf_counter() - self.started, "sizes": sizes}


OnEval = Callable[[TransformerLM, Tokenizer, int], str | None]
OnLog = Callable[[dict[str, Any]], None]


def train(
    config: TrainConfig,  # the whole description of the run
    on_eval: OnEval | None = None,  # called as (model, tokenizer, step) after evaluations; returns text to keep
    on_log: OnLog | None = None,  # called with each line of the log
) -> Path:  # the run directory
    """Make a run's folder whole: begin the run, or go on from its newest valid checkpoint, up to the last step.

    A run that goes on ends as if it had never stopped, to the last bit on a CPU. Raises InputError for a mistake that
    the user can mend, such as a folder that another config has made; Diverged if the loss stops being finite; and
    Stopped when a signal asked for it.
    """
    with process_group(), ExitStack() as held:
        device = _check_machine(config)
        run_dir, train_file, valid_file, floor = _open_folder(config, held)
        train_tokens, valid_tokens = train_file.tokens(), valid_file.tokens()
        tokenizer = Tokenizer.load(run_dir / "tokenizer")
        model = TransformerLM(config, seed=config.seed).to(device)
        forward: Any = wrap(model, config.fsdp)
        optimizer = AdamW(model.parameters(), betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
        state = load_newest(run_dir, model, optimizer)
        step: int = state["iteration"] if state else 0
        last = config.last_step
        watch = Watch(model) if config.watch else None
        if config.compile and not watch:
            forward = torch.compile(forward)
        log = Log(run_dir, config, state, [f for f in (on_log, tracker(config, run_dir, step)) if f])
        starts, tokens_per_step = np.empty(0, np.int64), config.batch_size * config.context_length
        stop, time_over = 0, 1  # why to stop: a signal's number (SIGINT is 2), or that the time is over
        deadline = math.inf if config.max_minutes is None else time.monotonic() + 60 * config.max_minutes
        if step >= last:
            say(f"{run_dir}: step {step} is done, and the last is {last}; more with --max_steps")
        bar = tqdm(total=last, initial=step, unit="step", dynamic_ncols=True,
                   mininterval=0.5 if sys.stderr.isatty() else 10)
        with noted_signals() as noted, bar:
            try:
                if step == 0:
                    log.line(0, val_loss=evaluate(model, valid_tokens, config))
                while step < last and not stop:
                    step += 1
                    began = time.perf_counter()
                    rng = np.random.default_rng([config.seed, step])  # so a batch depends on seed and step alone
                    starts = draw_starts(train_tokens, config.batch_size, config.context_length, rng)
                    mine = starts[rank() :: world_size()]
                    batch = windows(train_tokens, mine, config.context_length, device)
                    loss, norm = train_step(forward, optimizer, batch, config, step, watch)
                    seconds = time.perf_counter() - began
                    log.pending.append([loss, norm, seconds])
                    bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_step / seconds:,.0f} tokens/s", refresh=False)
                    bar.update()
                    layers = watch.row if watch else {}
                    if step % config.eval_every == 0 or step == last:
                        val_loss = evaluate(model, valid_tokens, config)
                        if not math.isfinite(val_loss):
                            raise Diverged(step, val_loss, math.nan)
                        stories = {}
                        if floor is not None and step == last:
                            story_loss, _, count = evaluate_stories(model, valid_tokens, tokenizer.special_tokens[END_OF_TEXT])
                            stories = {"story_loss": story_loss, "floor": floor, "stories": count}
                        log.line(step, val_loss=val_loss, **stories, **layers)
                        if on_eval and (text := _story(on_eval, model, tokenizer, step, config)) is not None:
                            log.append("samples.txt", f"=== step {step} ===\n{text}\n\n")
                            tqdm.write(f"--- after step {step}:\n{text}\n")
                    elif step % config.log_every == 0:
                        log.line(step, **layers)
                    stop = all_reduce_max(noted[0] if noted else time_over * (time.monotonic() >= deadline))
                    if step % config.checkpoint_every == 0 or step == last or stop:
                        size = _length([p.detach() for p in model.parameters()])
                        if not math.isfinite(size):
                            raise Diverged(step, loss, size)
                        name = f"step-{step:08d}"
                        save_checkpoint(model, optimizer, step, run_dir / "checkpoints" / name, log.state())
                        _remove([path for path in checkpoints(run_dir) if path.name <= name][3:])
            except Diverged as error:
                found: dict[str, Any] = {"loss": _number(error.loss), "grad_norm": _number(error.grad_norm)}
                found["windows"] = starts.tolist()
                log.line(step, **(watch.row if watch else {}), diverged=True, divergence=found)
                raise
        if step < last and stop > time_over:
            raise Stopped(stop, run_dir)
        if step < last:
            say(f"{config.max_minutes} minutes are over at step {step}; go on with --resume {run_dir}")
        _report(run_dir)
    return run_dir


def _story(on_eval: OnEval, model: Any, tokenizer: Tokenizer, step: int, config: TrainConfig) -> str | None:
    """Let the callback tell a story in the process of rank 0; a sharded model is put together for it first."""
    weights = {name: full_tensor(x) for name, x in model.state_dict().items()} if config.fsdp else {}

    @on_rank0
    def tell() -> str | None:
        whole = model
        if config.fsdp:
            whole = TransformerLM(config)
            whole.load_state_dict(weights)
        return on_eval(whole, tokenizer, step)

    return tell()


@on_rank0
def _remove(folders: list[Path]) -> None:
    """Delete folders and what is in them."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def tracker(
    config: TrainConfig,  # its field `tracker` chooses
    run_dir: Path,  # where TensorBoard's and Weights & Biases' files go
    step: int,  # what was told of later steps, before a crash, is dropped
) -> OnLog | None:
    """Open a program that shows the log as well: what it returns takes each line of the log."""
    def flat(row: dict[str, Any]) -> dict[str, float]:
        kinds = ("activations", "gradients", "updates")
        layers = {f"{kind}/{part}": x for kind in kinds for part, x in row.get(kind, {}).items()}
        return {name: x for name, x in {**row, **layers}.items() if isinstance(x, (int, float)) and name != "step"}

    if config.tracker == "none" or rank() > 0:
        return None
    if config.tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

        def show(row: dict[str, Any]) -> None:
            for name, value in flat(row).items():
                writer.add_scalar(name, value, row["step"])
            writer.flush()

        return show
    import wandb

    mode: Any = os.environ.get("WANDB_MODE", "offline")
    run = wandb.init(project="tinylm", name=run_dir.name, config=asdict(config), mode=mode, dir=str(run_dir),
                     reinit="finish_previous")
    return lambda row: run.log(flat(row), step=row["step"])


def _report(run_dir: Path) -> None:
    """Print how a run ended, with the excess over the floor where it is known."""
    last = next((row for row in reversed(read_metrics(run_dir)) if row.get("val_loss") is not None), None)
    if last is None:
        return
    line = f"validation loss {last['val_loss']:.4f} nats per token after step {last['step']}"
    if "floor" in last:
        loss, floor = last["story_loss"], last["floor"]
        line += f"; on the {last['stories']:,} stories that fit whole {loss:.4f}, and their floor is {floor:.4f}:"
        line += f" excess {loss - floor:.4f}"
        if loss < floor - 0.01:
            line += ". No model can know that much: validation stories must have come with the training text"
    tqdm.write(line)


def environment(
    device: str,  # its name, as pick_device returns it
) -> dict[str, Any]:
    """Describe the machine and the versions in use, for records."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(iter(re.findall(r"model name\s*: (.*)", info.read_text(encoding="utf-8"))), cpu)
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "processes": world_size(), "platform": platform.platform(),
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "tinylm": tinylm.__version__,
    }


def commit() -> str | None:  # 40 hexadecimal digits
    """Find the commit of this code, if it lies in a git repository."""
    folder = Path(tinylm.__file__).parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def plot_run(
    source: str | Path,  # a run folder, or a record made by record_run
) -> Any:  # a matplotlib Figure
    """Draw the losses of a run with the Fables floor, its learning rate and its gradient norm."""
    import matplotlib.pyplot as plt

    source = Path(source)
    if source.is_dir():
        read_config(source)
        rows, floor = read_metrics(source), read_json(source / "config.json")["data"]["floor"]
    else:
        record = read_json(source)
        rows, floor = record["curve"], record["corpus"]["floor"]

    def column(key: str) -> tuple[list[int], list[float]]:
        found = [row for row in rows if row.get(key) is not None]
        return [row["step"] for row in found], [row[key] for row in found]

    figure, axes = plt.subplot_mosaic([["loss", "lr"], ["loss", "norm"]], width_ratios=[2.2, 1], figsize=(7.6, 3.6))
    axes["loss"].plot(*column("train_loss"), label="training", lw=1.2)
    axes["loss"].plot(*column("val_loss"), label="validation", marker="o", ms=4)
    if floor is not None:
        axes["loss"].axhline(floor, color="black", ls=":", lw=1.2, label=f"floor {floor:.3f}")
    axes["loss"].set(xlabel="step", ylabel="loss (nats per token)")
    axes["loss"].legend()
    axes["lr"].plot(*column("lr"))
    axes["lr"].set(ylabel="learning rate", xticklabels=[])
    axes["norm"].plot(*column("grad_norm"))
    axes["norm"].set(xlabel="step", ylabel="gradient norm")
    for axis in (axes["loss"], axes["norm"]):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "2357" else "")
    return figure


def forecast(
    config: TrainConfig,  # the run to foresee
) -> str:  # a table: parameters, tokens, operations, memory and time on this machine
    """Foresee what a run will take, without data: memory by formula, time from one step on a part of a batch.

    Raises InputError for a run that this machine cannot do.
    """
    with process_group():
        device, share, steps = _check_machine(config), config.batch_size // world_size(), config.last_step
        memory = memory_table(config, share // config.grad_accum_steps, config.dtype)
        rows: int = max(1, min(8, share // config.grad_accum_steps))
        model: Any = TransformerLM(config, seed=config.seed).to(device)
        optimizer = AdamW(model.parameters(), lr=0.0)
        model = torch.compile(model) if config.compile else model
        for _ in range(2):  # the first loads code, and compiles
            ids = torch.randint(config.vocab_size, (rows, config.context_length + 1), device=device)
            began = time.perf_counter()
            train_step(model, optimizer, (ids[:, :-1], ids[:, 1:]), replace(config, grad_accum_steps=1), 1)
            sequence = (time.perf_counter() - began) / rows
    tokens, step_seconds = config.batch_size * config.context_length, sequence * share
    evaluations = 1 + math.ceil(steps / config.eval_every)
    seconds = steps * step_seconds + evaluations * config.eval_windows * sequence / 3
    flops, there = 3 * tokens * flops_per_token(config), memory_there(device)
    unit, size = next((u, n) for u, n in (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
                      if seconds >= 2 * n or n == 1)
    return "\n".join([
        f"parameters  {num_parameters(config):,}",
        f"tokens      {steps * tokens:,} in {steps:,} steps of {tokens:,}",
        f"operations  {steps * flops:.3g} in all, {flops:.3g} a step",
        f"memory      {sum(memory.values()) / 1e9:.2f} GB beside what Python and PyTorch hold"
        + (f", of {there / 1e9:.0f} GB" if there else ""),
        "  in MB     " + ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in memory.items()),
        f"time        {seconds / size:.1f} {unit}, {step_seconds:.3g} seconds a step",
        f"speed       {tokens / step_seconds:,.0f} tokens/s, {flops / step_seconds / 1e9:,.0f} GFLOP/s",
        "left out    preparing the data, stories told on the way, saving, what processes send to each other",
    ])


def record_run(
    run_dir: str | Path,  # the folder of a run that is finished or has diverged
    dst: str | Path,  # the JSON file to write
) -> dict[str, Any]:  # what was written
    """Write the record of a run: config, corpus, commit, environment, curve, divergence and best validation loss."""
    config, saved, curve = read_config(run_dir), read_json(Path(run_dir, "config.json")), read_metrics(run_dir)
    record = {
        "config": asdict(config), "corpus": saved["data"], "commit": saved["commit"],
        "environment": saved["environment"],
        "diverged_at_step": next((row["step"] for row in curve if row.get("diverged")), None),
        "best_val_loss": min((row["val_loss"] for row in curve if row["val_loss"] is not None), default=None),
        "curve": curve,
    }
    with atomic_write(dst, "w") as file:
        json.dump(record, file)
    return record
