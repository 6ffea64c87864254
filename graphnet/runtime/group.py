"""The processes of a data-parallel step: a process group of torch.distributed, and what graphnet
asks of it.

torch.distributed and torchrun start the processes and carry the messages (gloo on CPUs, NCCL on
GPUs). Every rank compiles the same step for its own share of the batch; rank r holds the rows from
r * batch on of a global batch of ranks * batch rows.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from graphnet.errors import BackendUnavailableError, ConfigError, NumericsError, RankError

_PLACE = re.compile(r"\[\S*\.(?:cc|cpp|hpp):\d+\]")  # in torch's own sources


class Group:
    """A process group with more than one process. RankError where another one fails to answer.

    rank, ranks  which one this is, of how many
    first        whether it is rank 0, which speaks and writes for all
    stopping     what this rank tells the others with its next step: that it wants to stop
    """

    def __init__(self, pg: Any) -> None:
        self.pg = pg
        self.rank, self.ranks = dist.get_rank(pg), dist.get_world_size(pg)
        self.root = dist.get_global_rank(pg, 0) if pg is not dist.group.WORLD else 0
        self.first, self.stopping = self.rank == 0, False
        gpu = "cpu:" not in dist.get_backend_config(pg)  # then hosts talk through their GPUs
        self._host = torch.device("cuda", torch.cuda.current_device()) if gpu else None

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's errors have no class of their own
            text = " ".join(_PLACE.sub("", str(error)).split())
            late = "timed out" in text.lower()
            raise RankError(
                f"rank {self.rank} of {self.ranks} got no answer from the others: {text}",
                help="one of them hangs, or needs longer than the timeout of the process group"
                if late else "one of them has failed or is gone; see what it said last",
            ) from error

    # ---- what a step asks -------------------------------------------------------------------

    def sum(self, t: torch.Tensor) -> Callable[[], None]:
        """Starts to sum a contiguous tensor over the ranks, in place; gives the call that waits for
        it: on a GPU the stream, not the host."""
        with self._talking():
            work = dist.all_reduce(t, group=self.pg, async_op=True)

        def wait() -> None:
            with self._talking():
                work.wait()

        return wait

    def gather(self, t: torch.Tensor) -> list[torch.Tensor]:
        """What every rank holds in place of a tensor, rank 0 first."""
        mine = t.contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.ranks)]
        with self._talking():
            dist.all_gather(parts, mine, group=self.pg)
        return parts

    # ---- what a run asks, between steps -----------------------------------------------------

    def tell(self, value: Any) -> Any:
        """The value of rank 0, any Python object."""
        box = [value]
        with self._talking():
            dist.broadcast_object_list(box, self.root, group=self.pg)
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        """The value of each rank, any Python objects, rank 0 first."""
        found: list[Any] = [None] * self.ranks
        with self._talking():
            dist.all_gather_object(found, value, group=self.pg)
        return found

    def total(self, values: Sequence[float]) -> list[float]:
        """Numbers of the host, in float64, each summed over the ranks. All ranks wait here for one
        another."""
        sums = torch.tensor(values, dtype=torch.float64, device=self._host)
        self.sum(sums)()
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is so on some rank."""
        return self.total([flag])[0] > 0

    # ---- what all must have in common -------------------------------------------------------

    def agree(self, facts: Mapping[str, Any], help: str = "") -> None:
        """ConfigError on every rank where a fact differs between them: it names the fact, and what
        two of the ranks have."""
        found = self.collect({k: str(v) for k, v in facts.items()})
        for name in facts:
            for rank, other in enumerate(found):
                if other.get(name) != found[0].get(name):
                    raise ConfigError(
                        f"the ranks do not run the same step: {name} is {found[0].get(name)} on "
                        f"rank 0 and {other.get(name)} on rank {rank}",
                        help=help or "start every rank with the same net, shape and arguments",
                    )

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Every rank gets the values of rank 0, in place."""
        for t in tensors:
            sent = t.detach().clone(memory_format=torch.contiguous_format)
            with self._talking():
                dist.broadcast(sent, self.root, group=self.pg)
            if self.rank:
                with torch.no_grad():
                    t.copy_(sent)

    def tell_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of rank 0, on the CPU; those of the others are not looked at."""
        kinds = self.tell({k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()})
        out = {}
        for name, (dtype, shape) in kinds.items():
            sent = tensors[name].contiguous() if self.first else torch.empty(shape, dtype=dtype)
            moved = sent.to(self._host) if self._host else sent
            self.share([moved])
            out[name] = moved.cpu()
        return out

    def same(self, named: Mapping[str, torch.Tensor]) -> None:
        """NumericsError where a tensor that every rank holds is not the same in every bit."""
        found = self.collect({name: digest(t) for name, t in named.items()})
        for rank, other in enumerate(found):
            if bad := [name for name in found[0] if other.get(name) != found[0][name]]:
                raise NumericsError(
                    f"the ranks have come apart: {bad[0]} is not the same on rank 0 and on rank "
                    f"{rank}" + (f", nor are {len(bad) - 1} others" if len(bad) > 1 else ""),
                    help="a processor or its memory may be at fault; the last checkpoint is from "
                    "before",
                )


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


def share_buffers(group: Group, net: Any) -> None:
    """Every rank gets the running statistics of rank 0, which are those of its rows."""
    cells = [cell for _, cell in net.named_buffers()]
    group.share(c.live for c in cells)
    for c in cells:
        c.touched()
