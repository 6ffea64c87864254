"""Before anything is timed, both sides must compute the same: each beside a twin that is exact.

The twin is the net in torch, in float64 on a CPU; on a GPU in IEEE fp32, and in float64 where fp32
itself is what is timed. For each of a few batches the twin and torch in the precision of the work
start from our weights and momentum. The error of a parameter is how far its change in the step is
from the twin's; in inference that of the logits, for forward and backward alone that of a gradient.
Ours may be half as large again as torch's own. So a precision is no excuse for more than it costs
torch.

A rounding may turn a relu on, or send a pool's gradient elsewhere; then all layers before it are a
thousand times as far off. Both sides flip some, and it is luck who flips fewer. What is too far off
in half of the batches is compared on more, of a few rows each, most of which flip nothing.
An error that is ours shows there as well. One that needs all rows would show in every whole batch;
where it does, that is asked of more of them, since five unlucky ones in a row are not rare enough.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from graphnet.bench.peers import LAYOUTS, Work, autocast, torch_flags
from graphnet.bench.twin import torch_twin
from graphnet.frontends.layers import Dropout

FACTOR, SLACK = 1.5, 1e-5  # ours may be this many times torch's error, and this much more
OF_LOSS = {"fp32": 1e-5, "tf32": 1e-3, "bf16": 1e-2}  # errors of one number are luck up to here
SMALL = 1e-2  # share of all changes below which a parameter's is not looked at by itself
BATCHES, MORE = 5, 3  # a refusal takes that many times as many parts, and whole batches
PART = 32  # of which the later ones have this share of the rows
LOSS, LOGITS = "loss", "logits"

# Tensors by name: [logits], [loss], [gradient]; in training a parameter and its momentum.
Values = dict[str, list[torch.Tensor]]
Sides = list[list[dict[str, float]]]  # by batch and side, ours first: the error of each name


@dataclass(frozen=True)
class Error:
    """How far the two sides are from the twin in one thing: relative, the median over batches."""

    name: str
    ours: float
    torch: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.ours <= self.allowed  # NaN is not

    @property
    def share(self) -> float:
        """Of what is allowed."""
        return math.inf if math.isnan(self.ours) else self.ours / self.allowed

    def as_dict(self) -> dict[str, Any]:
        """Plain types; null where an error is no number."""
        return {k: v if v == v else None for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Parity:
    """Both sides beside the twin; dropout is off, because the sides draw other masks.

    what         that was compared
    steps        batches
    reference    element type of the twin: "float64" or "float32"
    errors       by parameter, or of the logits; the loss has a row as well where there is one
    first, last  in training: our loss in the first step, and both sides' in the last one
    """

    what: str
    steps: int
    reference: str
    errors: tuple[Error, ...]
    first: float | None = None
    last: tuple[float, float] | None = None

    @property
    def ok(self) -> bool:
        return all(e.ok for e in self.errors)

    @property
    def worst(self) -> Error:
        return max(self.errors, key=lambda e: e.share)

    def as_dict(self) -> dict[str, Any]:
        return {
            "what": self.what, "steps": self.steps, "reference": self.reference,
            "first": self.first, "last": None if self.last is None else list(self.last),
            "ok": self.ok, "errors": [e.as_dict() for e in self.errors],
        }  # fmt: skip

    def table(self) -> str:
        """A line for each error: ours, torch's, and what ours may be."""
        width = max(len(e.name) for e in self.errors)
        lines = [f"{'':{width}} {'ours':>9} {'torch':>9} {'allowed':>9}"]
        for e in self.errors:
            line = f"{e.name:{width}} {e.ours:9.1e} {e.torch:9.1e} {e.allowed:9.1e}"
            lines.append(line if e.ok else f"{line}  too much")
        return "\n".join(lines)

    def __str__(self) -> str:
        count = f"{self.steps} batch{'es' if self.steps > 1 else ''}"
        losses, w = "", self.worst
        if self.last is not None:
            losses = f"loss {self.first:.4f} to {self.last[0]:.4f} (torch {self.last[1]:.4f}), "
        return (
            f"parity of {self.what} over {count}: {losses}nearest to its limit {w.name}: ours "
            f"{w.ours:.1e} off the {self.reference} twin, torch {w.torch:.1e} (allowed "
            f"{w.allowed:.1e}): {'ok' if self.ok else 'THE TWO DIFFER'}"
        )


def without_dropout(net: Any) -> Any:
    """A copy of the net whose dropout layers do nothing."""
    made = net.copy()
    for m in made.modules():
        if isinstance(m, Dropout):
            m.p = 0.0
    return made


def check(work: Work, program: Callable[[Work], Any], batches: int = BATCHES) -> Parity:
    """Both sides beside the twin, on as many batches; where those refuse on parts of more, too.

    program  makes ours for a work; in training it trains the net of that work, and its momentum is
             read from `.optimizer`
    """
    work = Work(without_dropout(work.net), work.x, work.y, work.mode, work.sgd, work.precision)
    ours = _Ours(work, program(work))
    exact = _Torch(work, torch.contiguous_format, exact=True)
    layouts = [_Torch(work, layout) for layout in LAYOUTS.values()]
    dtype = str(exact.dtype).removeprefix("torch.")
    found: Sides = []
    losses: list[tuple[float, float]] = []
    feed = _batches(work, (1 + 2 * MORE) * batches)

    def compare(x: torch.Tensor, y: torch.Tensor) -> None:
        state = ours.state()
        want, *theirs = (side.run(state, x, y) for side in (exact, *layouts))
        got = ours.run(x, y)
        found.append([_apart(side, want, state) for side in (got, *theirs)])
        if work.mode == "train":
            losses.append((float(got[LOSS][0]), float(theirs[0][LOSS][0])))

    for x, y in islice(feed, batches):
        compare(x, y)
    errors = tuple(_median(name, found, work.precision) for name in found[0][0])
    if not all(e.ok for e in errors):
        for x, y in islice(feed, MORE * batches):
            rows = max(2, len(x) // PART)
            compare(x[:rows], y[:rows])
        whole, parts = found[:batches], found[batches:]
        again = lambda e: e if e.ok else _again(e, whole, parts, work.precision)
        errors = tuple(map(again, errors))
        if not all(e.ok for e in errors):
            for x, y in feed:
                compare(x, y)
            whole += found[(1 + MORE) * batches :]
            errors = tuple(map(again, errors))
    what = {"train": "what a step changes", "infer": "logits", "grads": "loss and gradients"}
    ends = (losses[0][0], losses[batches - 1]) if losses else ()  # of whole batches
    return Parity(what[work.mode], len(found), dtype, errors, *ends)


def _batches(work: Work, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The images carry their label in their brightness, so there is something to learn."""
    g = torch.Generator().manual_seed(0)
    classes = work.net.summary((1, *work.x.shape[1:])).rows[-1].output[-1]
    for _ in range(count):
        y = torch.randint(0, classes, work.y.shape, generator=g)
        x = torch.randn(work.x.shape, generator=g) + (y / classes - 0.5).view(-1, 1, 1, 1)
        yield x.to(work.device), y.to(work.device)


# ---- errors ----------------------------------------------------------------------------------


def _median(name: str, found: Sides, precision: str) -> Error:
    """Of each side over the batches; of torch's layouts the better one counts."""
    ours, *theirs = (statistics.median(e[name] for e in side) for side in zip(*found, strict=True))
    allowed = FACTOR * min(theirs) + SLACK
    if name == LOSS:
        allowed = max(allowed, OF_LOSS[precision])
    return Error(name, ours, min(theirs), allowed)


def _again(error: Error, whole: Sides, parts: Sides, precision: str) -> Error:
    """What counts of an error that is too large: that on parts of batches, unless there is no whole
    batch in which it is small enough."""
    lucky = any(_median(error.name, [batch], precision).ok for batch in whole)
    return _median(error.name, parts, precision) if lucky else error


def _apart(got: Values, want: Values, state: Values) -> dict[str, float]:
    """The relative error of each name. Of a parameter it is that of the change, of itself or of its
    momentum, whichever is larger. One that hardly moves beside the others (a bias behind relus that
    are off) is measured by all of them."""
    sizes = {name: [float(_change(v, state, name, k).norm()) for k, v in enumerate(tensors)]
             for name, tensors in want.items()}  # fmt: skip
    inner = [s for name, s in sizes.items() if name not in (LOSS, LOGITS)]
    least = [SMALL * math.hypot(*column) for column in zip(*inner, strict=True)]
    out: dict[str, float] = {}
    for name, tensors in want.items():
        floor = least if name not in (LOSS, LOGITS) else [0.0]
        errors = [
            float(_off(g, w, state.get(name) is not None).norm()) / max(size, small, 1e-30)
            for g, w, size, small in zip(got[name], tensors, sizes[name], floor, strict=True)
        ]
        out[name] = math.nan if any(map(math.isnan, errors)) else max(errors)
    return out


def _change(new: torch.Tensor, state: Values, name: str, k: int) -> torch.Tensor:
    return new.double() - state[name][k].double() if name in state else new.double()


def _off(got: torch.Tensor, want: torch.Tensor, stored: bool) -> torch.Tensor:
    """The difference; of what is stored between steps without the rounding of the store, which is
    large beside a small change and no fault."""
    off = got.double() - want.double()
    if not stored:
        return off
    rounding = torch.finfo(torch.float32).eps * want.abs().double()
    return off.sign() * (off.abs() - rounding).clamp_min(0.0)


# ---- the sides -------------------------------------------------------------------------------


class _Ours:
    """Our program: it goes its way, the others are given what it starts from."""

    def __init__(self, work: Work, program: Any) -> None:
        self.work, self.program = work, program

    def state(self) -> Values:
        """Parameters and momenta in front of a step, copied to where the work is done."""
        if self.work.mode != "train":
            return {}
        device = self.work.device
        buffers = self.program.optimizer.state_dict()
        out = {}
        for key, p in self.work.net.named_parameters():
            tensors = [p.data, *([buffers[f"{key}.momentum_buffer"]] if self.momentum else [])]
            out[key] = [t.detach().to(device, copy=True) for t in tensors]
        return out

    @property
    def momentum(self) -> bool:
        return bool(self.work.sgd.momentum)

    def run(self, x: torch.Tensor, y: torch.Tensor) -> Values:
        if self.work.mode == "infer":
            return {LOGITS: [self.program(x)]}
        if self.work.mode == "grads":
            loss, grads = self.program(x, y)
            return {LOSS: [loss], **{key: [g] for key, g in grads.items()}}
        loss = self.program(x, y).clone()
        return {LOSS: [loss], **self.state()}


class _Torch:
    """The net in torch, with torch's SGD: in the precision of the work, or exact."""

    def __init__(self, work: Work, layout: Any, exact: bool = False) -> None:
        self.work, self.layout = work, layout
        double = exact and (work.device.type == "cpu" or work.precision == "fp32")
        self.dtype = torch.float64 if double else torch.float32
        self.flags = "fp32" if exact else work.precision
        self.form = "autocast" if work.precision == "bf16" and not exact else ""
        module: Any = torch_twin(work.net).to(work.device, self.dtype)
        self.module = module.to(memory_format=layout)
        self.module.train(work.mode != "infer")
        if (s := work.sgd) is not None:
            self.sgd = torch.optim.SGD(
                self.module.parameters(), lr=s.lr, momentum=s.momentum,
                weight_decay=s.weight_decay, nesterov=s.nesterov,
            )  # fmt: skip

    def run(self, state: Values, x: torch.Tensor, y: torch.Tensor) -> Values:
        with torch_flags(self.flags):
            self._take(state)
            x = x.to(self.dtype).contiguous(memory_format=self.layout)
            if self.work.mode == "infer":
                with torch.inference_mode():
                    return {LOGITS: [self._forward(x)]}
            self.module.zero_grad()
            loss = nn.functional.cross_entropy(self._forward(x), y)
            loss.backward()
            out = {LOSS: [loss.detach()]}
            if self.work.mode == "grads":
                return out | {key: [p.grad] for key, p in self.module.named_parameters()}
            self.sgd.step()
            return out | {key: self._tensors(p) for key, p in self.module.named_parameters()}

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        with autocast(self.form, x.device):
            return self.module(x).to(self.dtype)

    def _tensors(self, p: Any) -> list[torch.Tensor]:
        buffer = self.sgd.state[p].get("momentum_buffer")
        return [p.detach(), *([] if buffer is None else [buffer])]

    def _take(self, state: Values) -> None:
        """The parameters and the momentum from now on."""
        for key, p in self.module.named_parameters():
            if key in state:
                value, *momentum = state[key]
                with torch.no_grad():
                    p.copy_(value)
                if momentum:
                    self.sgd.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(momentum[0])
