"""Crew: processes that share the sequences of a step and add up their gradients, one CPU thread each."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

Shared = TypeVar("Shared", list[Any], torch.Tensor)
Hits = dict[str, tuple[int, int]]


class Crew:
    """One worker's view of the crew; alone if nothing is said."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def leads(self) -> bool:
        """Whether this worker writes logs and checkpoints."""
        return self.rank == 0

    def share(self, whole: Shared) -> Shared:
        """This worker's part of a step."""
        return whole[self.rank :: self.size]

    def join(
        self, model: torch.nn.Module, losses: dict[str, float], hits: Hits
    ) -> tuple[dict[str, float], Hits]:
        """Means gradients and losses over the workers, in place, and adds up the counts."""
        if self.size == 1:
            return losses, hits
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for gradient, whole in zip(gradients, self.sum(gradients), strict=True):
            gradient.copy_(whole).div_(self.size)
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, (losses, hits))
        kinds = sorted({kind for _, one in told for kind in one})
        summed = {
            kind: (sum(h.get(kind, (0, 0))[0] for _, h in told), sum(h.get(kind, (0, 0))[1] for _, h in told))
            for kind in kinds
        }
        names = sorted({name for one, _ in told for name in one})
        return {n: _mean([one[n] for one, _ in told if n in one]) for n in names}, summed

    def sum(self, mine: list[torch.Tensor]) -> list[torch.Tensor]:
        """The workers' tensors added up, the same for all of them."""
        if self.size == 1:
            return mine
        flat = torch.cat([one.flatten() for one in mine])
        dist.all_reduce(flat)
        parts = torch.split(flat, [one.numel() for one in mine])
        return [part.view_as(one) for part, one in zip(parts, mine, strict=True)]

    def any(self, mine: bool) -> bool:
        """Whether it is so for any worker: all of them get the same answer."""
        if self.size == 1:
            return mine
        flag = torch.tensor(float(mine))
        dist.all_reduce(flag)
        return bool(flag > 0)


def together(workers: int, work: Callable[..., None], *args: Any) -> None:
    """Runs `work(crew, *args)` in so many processes, or here if it is one."""
    if workers == 1:
        work(Crew(), *args)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meet")
        spawn(_worker, (workers, meeting, work, args), nprocs=workers)  # type: ignore[no-untyped-call]


def _worker(rank: int, size: int, meeting: str, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    try:
        work(Crew(rank, size), *args)
    finally:
        dist.destroy_process_group()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
