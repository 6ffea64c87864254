"""The processes of a data-parallel step: a process group of torch.distributed, and what graphnet
asks of it.

torch.distributed and torchrun start the processes and carry the messages (gloo on CPUs, NCCL on
GPUs). Every rank compiles the same step for its own share of the batch; rank r holds the rows from
r * batch on of a global batch of ranks * batch rows.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from graphnet.errors import BackendUnavailableError, ConfigError


class Group:
    """A process group with more than one process. rank, ranks: which one this is, of how many."""

    def __init__(self, pg: Any) -> None:
        self.pg = pg
        self.rank, self.ranks = dist.get_rank(pg), dist.get_world_size(pg)
        self.root = dist.get_global_rank(pg, 0) if pg is not dist.group.WORLD else 0

    # ---- what a step asks -------------------------------------------------------------------

    def sum(self, t: torch.Tensor) -> Callable[[], None]:
        """Starts to sum a contiguous tensor over the ranks, in place; gives the call that waits for
        it: on a GPU the stream, not the host."""
        work = dist.all_reduce(t, group=self.pg, async_op=True)
        return work.wait

    def gather(self, t: torch.Tensor) -> list[torch.Tensor]:
        """What every rank holds in place of a tensor, rank 0 first."""
        mine = t.contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(parts, mine, group=self.pg)
        return parts

    def tell(self, value: Any) -> Any:
        """The value of rank 0, any Python object."""
        box = [value]
        dist.broadcast_object_list(box, self.root, group=self.pg)
        return box[0]

    # ---- before the first step --------------------------------------------------------------

    def agree(self, facts: Mapping[str, Any]) -> None:
        """ConfigError on every rank where a fact differs between them: it names the fact, and what
        two of the ranks have."""
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, {k: str(v) for k, v in facts.items()}, group=self.pg)
        for name in facts:
            for rank, other in enumerate(found):
                if other[name] != found[0][name]:
                    raise ConfigError(
                        f"the ranks do not run the same step: {name} is {found[0][name]} on rank 0"
                        f" and {other[name]} on rank {rank}",
                        help="start every rank with the same net, shape and arguments",
                    )

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Every rank gets the values of rank 0, in place."""
        for t in tensors:
            sent = t.detach().clone(memory_format=torch.contiguous_format)
            dist.broadcast(sent, self.root, group=self.pg)
            if self.rank:
                with torch.no_grad():
                    t.copy_(sent)

    def same(self, named: Mapping[str, torch.Tensor]) -> None:
        """ConfigError where a tensor that every rank holds is not the same in every bit."""
        self.agree({name: digest(t) for name, t in named.items()})


def digest(t: torch.Tensor) -> str:
    """SHA-256 of the values of a tensor, in row-major order."""
    flat = t.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def group_of(given: Any) -> Group | None:
    """The group that `group=` names: None, "world" or a ProcessGroup. One process needs no group;
    ConfigError for what is none, or where none was initialised."""
    if given is None or isinstance(given, Group):
        return given
    if not dist.is_available():
        raise BackendUnavailableError("this torch is built without torch.distributed")
    if given == "world" or given is dist.group.WORLD and given is not None:
        if not dist.is_initialized():
            raise ConfigError(
                'group="world" without an initialised process group',
                help='torch.distributed.init_process_group("gloo") under torchrun, or group=None '
                "for one process",
            )
        given = dist.group.WORLD
    if not isinstance(given, dist.ProcessGroup):
        raise ConfigError(
            f"{given!r} is no process group", help='group=None, "world" or a ProcessGroup'
        )
    if dist.get_rank(given) < 0:
        raise ConfigError("this process is no member of the group that compile was given")
    return Group(given) if dist.get_world_size(given) > 1 else None


def versions() -> dict[str, str]:
    """What must be the same on all ranks, whatever they run."""
    found = {"the version of torch": str(torch.__version__)}
    found["the version of graphnet"] = importlib.import_module("graphnet").__version__
    return found
