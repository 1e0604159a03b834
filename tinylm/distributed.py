"""One training, many processes: the same losses, sooner, or with a part of the memory each."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinylm.core import InputError

def rank() -> int:  # 0 where there is one process
    """Return the number of this process among those that train together."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:  # 1 where there is one process
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started, and leave them at the end; alone, do nothing.

    Only rank 0 can be heard meanwhile. Raises InputError if another process dies.
    """
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    store, me, size = next(dist.rendezvous("env://"))
    if os.environ["GROUP_WORLD_SIZE"] == "1":  # after a restart, the addresses of the dead are still in the store
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=me, world_size=size)
    try:
        with only_rank0_speaks():
            yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            what = "another process of this job has died"
            raise InputError(f"{what}; go on with --resume and the folder of the run") from error
        raise
    finally:
        dist.destroy_process_group()


@contextmanager
def only_rank0_speaks() -> Iterator[None]:
    """Let what the processes of other ranks print go nowhere."""
    if int(os.environ.get("RANK", 0)) == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def leave(
    code: int,  # exit code of this process
) -> NoReturn:
    """End the program; if torchrun started it, at once, since gloo's threads may not survive Python's own end."""
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


P = ParamSpec("P")
R = TypeVar("R")

def on_rank0(
    work: Callable[P, R],  # returns what can be sent to the others: numbers, texts, paths, lists of them
) -> Callable[P, R]:  # the same, to be called by all processes in the same order
    """Let a function run in the process of rank 0 alone; its result, or its failure, is everybody's."""

    @wraps(work)
    def together(*args: P.args, **kwargs: P.kwargs) -> R:
        if world_size() == 1:
            return work(*args, **kwargs)
        outcome: list[Any] = [None, None]  # the result, and what went wrong
        error = None
        if rank() == 0:
            try:
                outcome[0] = work(*args, **kwargs)
            except Exception as caught:
                error, outcome[1] = caught, str(caught)
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise error or InputError(outcome[1])
        return outcome[0]

    return together


def all_reduce_mean(
    x: Tensor,  # of the same shape in each process
) -> Tensor:  # the mean of all, the same in each process
    """Average a tensor over all processes."""
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / world_size()


def all_reduce_max(
    value: int,  # what this process says
) -> int:  # the greatest of what they all say
    """Let all processes learn the greatest of their numbers."""
    if world_size() == 1:
        return value
    box = torch.tensor(value)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def wrap(
    model: Any,  # a TransformerLM, the same in each process
    fsdp: bool,  # let each process keep a part of weights, gradients and moments, instead of all
) -> nn.Module:  # what to call instead of the model, so that gradients are averaged over the processes
    """Let the processes train one model, by DDP or by FSDP.

    FSDP changes the parameters in place: make the optimizer afterwards.
    """
    if world_size() == 1:
        return model
    if not fsdp:
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(next(model.parameters()).device.type, (world_size(),))
    for module in [*model.layers, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model


def full_tensor(
    x: Tensor,  # perhaps a DTensor, of which each process keeps a shard
) -> Tensor:  # all of it
    """Put together a tensor that is sharded over the processes; any other is whole already."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shard_like(
    x: Tensor,  # whole, the same in each process
    like: Tensor,  # perhaps a DTensor, of which each process keeps a shard
) -> Tensor:  # x, on the device of `like` and sharded as it is
    """Share out a tensor over the processes in the way in which another one is."""
    x = x.to(like.device)
    if not hasattr(like, "placements"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, like.device_mesh, like.placements)
