"""A data set on the device, from which steps draw their batches.

`Bound` is the data and the place in it, as the host sees it. `Draws` runs steps that draw for
themselves: the graph of one equation, `take`, stands in front of the step and writes its inputs, so
that many steps run behind one another without the host: k to a CUDA graph where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from graphnet.errors import DataError, DTypeError, ShapeError
from graphnet.ir.graph import Builder, Graph
from graphnet.ir.types import DTYPES, TensorType, f32, i64
from graphnet.ir.verify import verify
from graphnet.ops.take import TakeAttrs

if TYPE_CHECKING:
    from graphnet.runtime.training import TrainStep

TABLE = 1024  # steps whose numbers lie on the device: as many are sent at once at most
SIZES = (64, 16, 4, 1)  # steps in a CUDA graph
LAUNCHES = 1024  # in a CUDA graph: above it, the work of a step hides the host's anyway
Order = Callable[[int], torch.Tensor]  # epoch -> i64[N]


class Bound:
    """A data set on the device and the place in it.

    images  u8[N, ...], or in the element type that the step reads; labels i64[N]
    order   epoch -> order of the samples, i64[N] on the CPU; None for that in which they lie
    levels  [C, 256]: what the step reads for each byte of a channel; None for images that it reads
            as they are
    """

    def __init__(
        self, images: torch.Tensor, labels: torch.Tensor, batch: int, order: Order | None,
        levels: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        self.images, self.labels, self.batch = images, labels, batch
        self.order, self.levels = order, levels
        self.epoch, self.at = 0, 0  # of the next batch
        self.latest = 0, 0  # epoch and rows of the batch that was drawn last
        self._known: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def batches(self) -> int:
        """In a whole epoch."""
        return -(-len(self) // self.batch)

    @property
    def left(self) -> int:
        """Batches to the end of this epoch."""
        return -(-(len(self) - self.at) // self.batch)

    def ordered(self, epoch: int) -> torch.Tensor:
        """The order of an epoch; the latest two are kept."""
        if epoch not in self._known:
            made = torch.arange(len(self)) if self.order is None else self.order(epoch)
            last = list(self._known.items())[-1:]
            self._known = dict([*last, (epoch, made)])
        return self._known[epoch]

    def advance(self, steps: int) -> None:
        """Moves the place on by so many batches."""
        if steps > (left := self.left):
            whole, behind = divmod(steps - left - 1, self.batches)
            self.epoch, self.at, steps = self.epoch + 1 + whole, 0, behind + 1
        if steps:
            first = self.at + (steps - 1) * self.batch
            self.latest = self.epoch, min(self.batch, len(self) - first)
            self.at = first + self.batch
            if self.at >= len(self):
                self.epoch, self.at = self.epoch + 1, 0

    def rows(self) -> torch.Tensor:
        """Which images the next batch holds; the last one of an epoch may be smaller."""
        rows = self.ordered(self.epoch)[self.at : self.at + self.batch]
        self.advance(1)
        return rows.to(self.images.device)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch as a net without augmentation is called with it, and its labels."""
        rows = self.rows()
        x = self.images[rows]
        if self.levels is not None:
            channel = 256 * torch.arange(x.shape[1], device=x.device)[:, None]
            x = self.levels.flatten()[x.flatten(2).long() + channel].reshape(x.shape)
        return x.float(), self.labels[rows]

    def stored(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """The next batch as it is kept, with its places in the data and its epoch."""
        epoch, rows = self.epoch, self.rows()
        return self.images[rows], self.labels[rows], rows, epoch


class Draws:
    """Steps of a program over bound data, each with the batch that it draws.

    On the device lie the orders of the epochs, the place (at step s, epoch e stood at sample c),
    and a table with the numbers of the steps to come. The place and the step counter say which
    batch is next, so the host sends an order for each epoch and a table for each 1,024 steps.
    """

    def __init__(self, step: TrainStep, bound: Bound) -> None:
        self.step, self.bound = step, bound
        sizes = SIZES if hasattr(step._run, "behind") else (1,)
        each = len(step.plan.steps) + 1
        self.sizes = tuple(s for s in sizes if s == 1 or s * each <= LAUNCHES)
        # As many orders as epochs that one graph may touch.
        orders = 1 if bound.order is None else 2 + self.sizes[0] // bound.batches
        graph = draw_graph(step, bound, orders)
        own = {i.value.name: i.value.type for i in graph.inputs if i.value.name != "step"}
        made = {n: t.layout.zeros(t.shape, t.dtype.torch, step.device) for n, t in own.items()
                if n in ("orders", "place", "table")}  # fmt: skip
        self.orders, self.place, self.table = made["orders"], made["place"], made["table"]
        storage = made | {"images": bound.images, "targets": bound.labels}
        storage |= {"step": step._storage["step"], "hypers": step._hypers.tensor}
        if bound.levels is not None:
            storage["levels"] = bound.levels
        for v in graph.returns:
            storage.setdefault(v.name, step._input(v.name, v.type))
        self._sent: dict[int, int] = {}  # row of the orders: the epoch there
        self._origin: tuple[int, int, int] | None = None  # what `place` says
        self._until = 0  # the steps done when these draws ended
        self._draw = step._prepare(_plan(graph, step.target), storage)
        self._runs: dict[int, Callable[[], None]] = {}
        self._send_orders(1)
        for size in self.sizes:
            if hasattr(run := self._run(size), "record"):
                run.record()

    def _run(self, size: int) -> Any:
        """So many steps, each behind its draw, as one call."""
        if size not in self._runs:
            draw, step = self._draw, self.step._run
            if hasattr(step, "behind"):
                self._runs[size] = step.behind(draw, size)
            else:
                self._runs[size] = partial(_alternate, draw, step)
        return self._runs[size]

    def send(self, table: torch.Tensor) -> None:
        """Puts the numbers of the next steps, f32[n, K] with n up to TABLE, where these will look
        for them."""
        first = self.step.state.steps % TABLE
        wrap = min(len(table), TABLE - first)
        _send(table[:wrap], self.table[first : first + wrap])
        if wrap < len(table):
            _send(table[wrap:], self.table[: len(table) - wrap])

    def go(self, n: int) -> None:
        """Runs n steps, whose numbers have been sent, and moves the place on."""
        self._meet()
        while n:
            size = next(s for s in self.sizes if s <= n)
            self._send_orders(size)
            self._run(size)()
            self.bound.advance(size)
            self.step.state.steps += size
            self._until = self.step.state.steps
            n -= size
            self.step.look()

    def back_to(self, done: int) -> None:
        """Moves the place back behind the batch of step `done`, the first that was held back. Those
        behind it were held too: as the counter stood still, each has drawn that batch again."""
        if self._origin is not None and self._origin[0] <= done < self._until:
            start, self.bound.at, self.bound.epoch = self._origin
            self.bound.advance(done + 1 - start)

    def _meet(self) -> None:
        """Sends the place, unless the device will come to it by itself."""
        bound, steps = self.bound, self.step.state.steps
        if self._origin is not None:
            start, at, epoch = self._origin
            device = copy(bound)
            device.at, device.epoch = at, epoch
            device.advance(steps - start)
            if steps >= start and (device.at, device.epoch) == (bound.at, bound.epoch):
                return
        self._origin = steps, bound.at, bound.epoch
        _send(torch.tensor(self._origin), self.place)

    def _send_orders(self, steps: int) -> None:
        """Sends the orders of the epochs that the next steps touch."""
        bound = self.bound
        last = bound.epoch
        if steps > bound.left:
            last += -(-(steps - bound.left) // bound.batches)
        for epoch in range(bound.epoch, last + 1) if bound.order is not None else (0,):
            row = epoch % len(self.orders)
            if self._sent.get(row) != epoch:
                _send(bound.ordered(epoch), self.orders[row])
                self._sent[row] = epoch


def _alternate(draw: Callable[[], None], step: Callable[[], None]) -> None:
    draw()
    step()


def _send(source: torch.Tensor, into: torch.Tensor) -> None:
    """Copies from the host without waiting for the device."""
    into.copy_(source.pin_memory() if into.is_cuda else source, non_blocking=True)


def draw_graph(step: TrainStep, bound: Bound, orders: int) -> Graph:
    """The graph of one `take`: its results are named as the step's inputs."""
    b = Builder("draw")
    n, like = len(bound), tuple(bound.images.shape)
    kind = {d.torch: d for d in DTYPES.values()}
    image = TensorType(kind[bound.images.dtype], like)
    ins = [
        b.input("images", image), b.input("targets", TensorType(i64, (n,))),
        b.input("orders", TensorType(i64, (orders, n))), b.input("place", TensorType(i64, (3,))),
        b.input("step", TensorType(i64, ()), "counter"),
        b.input("table", TensorType(f32, (TABLE, len(step._hypers.values)))),
    ]  # fmt: skip
    if bound.levels is not None:
        levels = TensorType(kind[bound.levels.dtype], tuple(bound.levels.shape))
        ins.append(b.input("levels", levels))
    names = ("x", "labels", "index", "live", "epoch", "hypers")
    unread = [k for k, name in enumerate(names) if k in (2, 3, 4) and name not in step._storage]
    outs = b.emit("take", ins, TakeAttrs(bound.batch), names=names, unread=unread)
    return verify(b.build(*(v for v in outs if v is not None)), "plan")


def _plan(graph: Graph, target: str) -> Any:
    from graphnet.lowering.plan.plan import make_plan

    return make_plan(graph, target)


def check_labels(labels: torch.Tensor, classes: int) -> None:
    """DataError naming the first row whose label is outside 0..classes-1."""
    least, most = labels.aminmax()
    if int(least) >= 0 and int(most) < classes:
        return
    bad = (labels < 0) | (labels >= classes)
    row = int(bad.nonzero()[0])
    raise DataError(
        f"row {row} has the label {int(labels[row])}, outside 0..{classes - 1}",
        help=f"the net has {classes} classes",
    )


def check_bound(
    images: torch.Tensor, labels: torch.Tensor, shape: tuple[int, ...], classes: int
) -> None:
    """DTypeError, ShapeError or DataError for data that a step of this shape cannot draw."""
    if images.dtype not in (torch.uint8, torch.float32):
        raise DTypeError(f"images have dtype {images.dtype}", help="use torch.uint8 or float32")
    if images.ndim != len(shape) or tuple(images.shape[1:]) != shape[1:]:
        want = ", ".join(map(str, shape[1:]))
        raise ShapeError(f"images of shape {list(images.shape)}, compiled for [N, {want}]")
    if images.shape[0] == 0 or tuple(labels.shape) != (images.shape[0],):
        raise ShapeError(f"{images.shape[0]} images with labels of shape {list(labels.shape)}")
    if classes:
        check_labels(labels.cpu(), classes)
