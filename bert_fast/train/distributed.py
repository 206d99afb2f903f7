"""Processes that train one model together: DDP, or FSDP2, on PyTorch's own engine.

    torchrun --nproc-per-node 8 -m bert_fast pretrain ...

Gradients are summed over the processes, never averaged: the objective divides by the labels of the
whole step. Two processes so compute the bits that one does with two micro-batches.
"""

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from bert_fast.train.objective import PreTrainingObjective

_TIMEOUT = timedelta(minutes=10)
# Groups that were left. Freeing gloo's joins its threads while Python's lock is held, for which one
# of them may wait: after the death of another process DDP's last reference would hang this one.
_left: list[dist.ProcessGroup] = []


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        rank: 0 to world - 1.
        world: how many there are.
        device: where this one computes.
    """

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, device: str | None = None) -> "Ranks":
        """Meet the processes that torchrun started; alone without torchrun.

        Args:
            device: None: this process's GPU if there is one, else the CPU.

        Raises:
            ValueError: several processes and a device with a number of its own; a GPU where
                PyTorch finds none.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world > 1 and device is not None and ":" in device:
            raise ValueError(f"device: want cpu or cuda for {world} processes, got {device}")
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        where = torch.device(device)
        if where.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device: want cpu, since PyTorch finds no GPU, got {device}")
        if where.type == "cuda":
            where = torch.device("cuda", local if where.index is None else where.index)
            torch.cuda.set_device(where)
        if world > 1:
            backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=_TIMEOUT)
        return cls(int(os.environ.get("RANK", "0")), world, where)

    def leave(self) -> None:
        """Part from the others."""
        if self.world > 1 and dist.is_initialized():
            _left.append(dist.group.WORLD)
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set in some process; asked on the CPU, beside the device."""
        if self.world == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    def of_first(self, value: int) -> int:
        """Return the first process's value in all of them."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64)
        dist.broadcast(tensor, 0)
        return int(tensor)


def wrap(
    objective: PreTrainingObjective, ranks: Ranks, *, sharded: bool, dtype: torch.dtype
) -> nn.Module:
    """Return the module that all processes train together.

    Args:
        objective: on this process's device, the same everywhere.
        ranks: the processes.
        sharded: FSDP2 in place of DDP: each process keeps its share of parameters, gradients and
            moments.
        dtype: of the arithmetic with `sharded`, whose parameters stay fp32.
    """
    if sharded:
        return _shard(objective, dtype)
    if ranks.world == 1:
        return objective
    wrapped = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, _sum_bucket)
    return wrapped


def _sum_bucket(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sum a bucket of gradients; DDP's own way divides by the number of processes."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _shard(objective: PreTrainingObjective, dtype: torch.dtype) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in objective.model.bert.encoder.layer:
        fully_shard(layer, mp_policy=policy)
    fully_shard(objective, mp_policy=policy)
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return objective


def settle(module: nn.Module) -> None:
    """Have a sharded module's parameters be the shares again, after a forward has gathered them."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


class ShardedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW over FSDP2's parameters, with the clipping and skipping of `optim.AdamW`.

    Unlike that one it waits for the device at each step.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay of the mean of gradients and of their squares.
        eps: added to the root of the latter.
        max_grad_norm: norm to which all gradients together are scaled down; None: never.

    Attributes:
        grad_norm: () fp32, the norm of all gradients at the last step, before clipping.
        found_inf: () fp32, for one step; not 0: nothing is changed.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        max_grad_norm: float | None,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, foreach=True)
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self.found_inf: Tensor | None = None

    def step(self, closure: None = None) -> None:
        """Update the parameters, unless the norm of the gradients is not finite."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        most = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(params, most)
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        skip, self.found_inf = self.found_inf, None  # which torch's own would not accept
        if self.grad_norm.isfinite() and not skip:
            super().step()


def without_sync(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Return the context of a micro-batch: gradients are summed behind the last one only."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    return nullcontext()
