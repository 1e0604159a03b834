"""Train with several processes as if they were one."""
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .data import InputError

Result = TypeVar("Result")


def rank() -> int:  # 0 where there is one process
    "Return the number of this process among those that train together."
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:  # 1 where there is one process
    "Return how many processes train together."
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes that torchrun started, and leave them at the end; alone, do nothing.

    Raises InputError in the processes that are left when another one has died."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise InputError("another process of this job has ended; go on with --resume and the run's folder") from error
        raise
    finally:
        dist.destroy_process_group()


def mean_over_ranks(
    x: Tensor,  # of the same shape in each process
) -> Tensor:  # the mean of all, the same in each process
    "Average a tensor over all processes."
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / world_size()


def any_rank(
    flag: bool,  # what this process says
) -> bool:  # whether any process says so
    "Ask whether something holds in any process; all of them must ask."
    return bool(mean_over_ranks(torch.tensor(float(flag))))


def from_rank0(
    value: Result,  # what this process would take
) -> Result:  # what the process of rank 0 takes
    "Let all processes take the value of rank 0."
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def rank0_first(
    work: Callable[[], Result],  # leaves files behind, and finds them when it is called again
) -> Result:  # what it returned in this process
    "Do some work in the process of rank 0, and then in the others, which find it done."
    if world_size() > 1 and rank() > 0:
        dist.barrier()
    result = work()
    if world_size() > 1 and rank() == 0:
        dist.barrier()
    return result


def whole(
    x: Tensor,  # perhaps one of which each process holds a part
) -> Tensor:  # all of it
    "Collect a tensor from all processes, if it is shared out among them."
    return x.full_tensor() if isinstance(x, DTensor) else x


def spread(
    model: nn.Module,  # the same in each process
    optimizer: torch.optim.Optimizer,  # of its parameters, in their order
    fsdp: bool,  # share out parameters, gradients and moments, instead of keeping all in each process
) -> nn.Module:  # what to call instead of the model, so that gradients are averaged over the processes
    "Let the processes train one model: by DDP, or by FSDP, which changes model and optimizer in place."
    if world_size() == 1:
        return model
    if fsdp:
        return _shard(model, optimizer)
    return nn.parallel.DistributedDataParallel(model)


def _shard(model: Any, optimizer: torch.optim.Optimizer) -> nn.Module:
    "Share out a model layer by layer, and the optimizer's moments like the parameters they belong to."
    states = [optimizer.state[p] for p in model.parameters()]
    mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
    for module in [*model.layers, model]:
        fully_shard(module, mesh=mesh)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.state.clear()
    for p, state in zip(model.parameters(), states, strict=True):
        optimizer.state[p] = {key: _like(value, p) for key, value in state.items()}
    return model


def _like(value: Any, p: Any) -> Any:
    "Share out a tensor as the parameter is; leave what is no tensor."
    return distribute_tensor(value, p.device_mesh, p.placements) if isinstance(value, Tensor) else value
