"""The processes of one training run, as torchrun starts them: one per GPU, or one by default.

    torchrun --standalone --nproc-per-node 8 --no-python regionspot train --cache o365.zarr --out runs/bl

Every process holds the whole head and computes its part of each batch; torch's DistributedDataParallel averages the
gradients. The processes agree on stopping at the end of a metrics interval: a process that stopped alone would leave
the others waiting for its gradients.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from regionspot.cache.errors import InputError
from regionspot.cache.machine import compute_device


@dataclass(frozen=True)
class Group:
    """This process's number among those of the run."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes; all must call it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in some process; all must call it."""
        if self.size > 1:
            flags: list[bool] = [False] * self.size
            dist.all_gather_object(flags, flag)
            return any(flags)
        return flag

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


SINGLE = Group()


@contextmanager
def process_group(device: str | None) -> Iterator[tuple[Group, torch.device]]:
    """Join the processes that torchrun started, if any. Yields the group and the device of this process.

    Raises InputError for a GPU by number (each process takes its own) and for more processes than GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or "MASTER_ADDR" not in os.environ:
        yield SINGLE, compute_device(device)
        return
    one = compute_device(device)
    if one.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if one.index is not None:
            raise InputError(
                f"device {device}: torchrun's processes take a GPU each; give --device cuda, or leave it out"
            )
        if local >= torch.cuda.device_count():
            raise InputError(
                f"training: process {local} has no GPU, this machine has {torch.cuda.device_count()}; "
                f"start torchrun with --nproc-per-node {torch.cuda.device_count()}"
            )
        one = torch.device("cuda", local)
        torch.cuda.set_device(one)
    dist.init_process_group("nccl" if one.type == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), dist.get_world_size()), one
    finally:
        dist.destroy_process_group()
