"""A checkpoint that survives crashes, notices damage, and runs nobody's program."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinylm.core import InputError, aside, atomic_write, file_sha256, read_json
from tinylm.distributed import full_tensor, on_rank0, rank, shard_like


def _sha256(state: dict[str, Any]) -> str:
    """Compute the SHA-256 of the content of state.json."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """List the names of the parameters in the order in which the optimizer counts them."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def save_checkpoint(
    model: nn.Module,  # its parameters are saved
    optimizer: torch.optim.Optimizer,  # its state is saved
    iteration: int,  # number of steps taken so far
    out: str | Path,  # the folder to write
    extra: dict[str, Any] | None = None,  # more to keep in state.json: anything that JSON can hold
) -> None:
    """Write a folder with model.safetensors, optimizer.safetensors and state.json, all at once.

    Raises InputError when the place cannot be written or is full; nothing half-written stays.
    """
    names, packed = _names(model, optimizer), optimizer.state_dict()
    tensors, numbers = {}, {}
    for i, entry in packed["state"].items():
        for key, value in entry.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{names[i]}.{key}"] = value
    files: dict[str, dict[str, Tensor]] = {}
    for file, content in [("model.safetensors", model.state_dict()), ("optimizer.safetensors", tensors)]:
        files[file] = {}
        for name in sorted(content):  # every process in the same order, since a sharded tensor needs them all
            x = full_tensor(content[name])
            if rank() == 0:
                files[file][name] = x.cpu().contiguous()
    groups = {"state": numbers, "param_groups": packed["param_groups"]}
    state = {"iteration": iteration, "optimizer": groups, "extra": extra or {}}

    @on_rank0
    def write() -> None:
        with atomic_write(out, "dir") as folder:
            checksums = {"state.json": _sha256(state)}
            for file, content in files.items():
                save_file(content, folder / file)
                checksums[file] = file_sha256(folder / file)
            text = json.dumps({**state, "sha256": checksums}, indent=1)
            (folder / "state.json").write_text(text, encoding="utf-8")

    write()


def read_state(
    src: str | Path,  # a checkpoint folder
) -> tuple[Path, dict[str, Any]]:  # where its files lie, and what state.json says
    """Check the files of a checkpoint against their SHA-256.

    Raises InputError naming the file that is missing or damaged.
    """
    folder = Path(src)
    if not folder.exists() and aside(folder).exists():  # killed between the two renames
        folder = aside(folder)
    state = read_json(folder / "state.json")
    try:
        checksums = state.pop("sha256")
        found = {"state.json": _sha256(state)}
        found |= {file: file_sha256(folder / file) for file in ("model.safetensors", "optimizer.safetensors")}
        damaged = [file for file, sha256 in found.items() if sha256 != checksums[file]]
    except OSError as error:
        raise InputError(f"{error.filename}: this part of a checkpoint cannot be read ({error.strerror})") from error
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{folder / 'state.json'}: damaged, not the JSON of a checkpoint") from error
    if damaged:
        raise InputError(f"{folder / damaged[0]}: damaged, its SHA-256 is not the one in state.json")
    return folder, state


def load_checkpoint(
    src: str | Path,  # a checkpoint folder
    model: nn.Module,  # gets the saved parameters
    optimizer: torch.optim.Optimizer | None = None,  # gets the saved state; None leaves it out
) -> int:  # number of steps that had been taken
    """Load a checkpoint after checking it, into a model that may be sharded over several processes.

    Raises InputError when a file is missing or damaged, or when the model has another shape.
    """
    folder, state = read_state(src)
    try:
        weights, moments = (load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer"))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder}: not in the format of safetensors ({error})") from error
    ours = model.state_dict()
    for name in sorted({*ours, *weights}):
        here, there = (tuple(t[name].shape) if name in t else None for t in (ours, weights))
        if here != there:
            raise InputError(f"{folder}: does not fit: {name} is {there} there and {here} in the model")
    with torch.no_grad():
        for name, x in ours.items():
            x.copy_(shard_like(weights[name], x))
    if optimizer is None:
        return state["iteration"]

    names, parameters = _names(model, optimizer), dict(model.named_parameters())
    packed: dict[int, dict[str, Any]] = {}
    for key, value in {**moments, **state["optimizer"]["state"]}.items():
        name, kind = key.rsplit(".", 1)
        if isinstance(value, Tensor):
            value = shard_like(value, parameters[name]) if value.dim() else value
        packed.setdefault(names.index(name), {})[kind] = value
    groups = state["optimizer"]["param_groups"]
    for saved, now in zip(groups, optimizer.param_groups, strict=True):
        saved |= {key: tuple(value) for key, value in saved.items() if isinstance(now.get(key), tuple)}  # JSON has lists
    optimizer.load_state_dict({"state": packed, "param_groups": groups})
    return state["iteration"]
