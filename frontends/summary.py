"""The table behind `net.summary()`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from graphnet.errors import ConfigError
from graphnet.frontends.dsl import Module
from graphnet.frontends.tracing import trace
from graphnet.ir.graph import Eqn


@dataclass(frozen=True)
class Row:
    """One layer: the shape it gives, the parameters it owns, multiply-adds of one pass.

    path  of attributes that leads to it; a function called in `forward` has none
    """

    layer: str
    type: str
    output: tuple[int, ...]
    params: int
    macs: int
    path: str = ""


@dataclass(frozen=True)
class Summary:
    """Rows and totals; prints as a table, with the tree of attributes on its left.

    inside  (path, type) of each module that holds others
    """

    name: str
    input: tuple[int, ...]
    rows: tuple[Row, ...]
    params: int
    trainable: int
    macs: int
    inside: tuple[tuple[str, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The table in plain types, for JSON."""
        about = asdict(self)
        about.pop("inside")
        return {"model": about.pop("name"), "layers": about.pop("rows"), **about}

    def __str__(self) -> str:
        head = ("attribute", "layer", "type", "output", "params", "MACs")
        cells = list(self._tree())
        width = [max(len(c[i]) for c in (head, *cells)) for i in range(6)]

        def line(c: tuple[str, ...]) -> str:
            left = "  ".join(c[i].ljust(width[i]) for i in range(4))
            return f"{left}  {c[4].rjust(width[4])}  {c[5].rjust(width[5])}".rstrip()

        rule = "-" * len(line(head))
        frozen = self.params - self.trainable
        note = f" ({frozen:,} frozen)" if frozen else ""
        foot = f"{self.name} on {_dims(self.input)}: {self.params:,} parameters{note}, " \
               f"{self.macs:,} MACs"  # fmt: skip
        return "\n".join([line(head), rule, *map(line, cells), rule, foot])

    def _tree(self) -> Iterator[tuple[str, ...]]:
        """Cells of each layer under those of the modules that it lies in, in the order of calls."""
        kinds, open_ = dict(self.inside), list[str]()
        for r in self.rows:
            if not r.path:  # a function between layers
                above, key = list(open_), ""
            else:
                *above, key = r.path.split(".")
            while above[: len(open_)] != open_:
                open_.pop()
            for part in above[len(open_) :]:
                yield "  " * len(open_) + part, "", kinds[".".join([*open_, part])], "", "", ""
                open_.append(part)
            name = "  " * len(open_) + key
            yield name, r.layer, r.type, _dims(r.output), f"{r.params:,}", f"{r.macs:,}"

    __repr__ = __str__


def _dims(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def macs(eqn: Eqn) -> int:
    """Multiply-adds of a product; 0 for everything else."""
    if eqn.op not in ("conv2d", "linear"):
        return 0
    return eqn.out.type.numel * prod(eqn.inputs[1].type.shape[1:])


def summarize(net: Module, shape: tuple[int, ...] | None = None) -> Summary:
    """The summary of a net; ConfigError when no input shape is known."""
    if shape is None:
        if net.input_shape is None:
            raise ConfigError(
                "the net does not know its input shape", help="net.summary((1, 3, 32, 32))"
            )
        shape = (1, *net.input_shape)
    graph = trace(net, shape)
    owner = {name: m for m, name in net.layer_names().items()}
    paths = {m: path for path, m in net.named_modules()}
    counted: set[str] = set()
    rows = []
    for eqn in graph.eqns:
        layer = ", ".join(eqn.where.layers)
        if eqn.op == "full":
            continue
        module = owner.get(layer)
        own = 0
        if layer not in counted:  # a layer called twice owns its parameters once
            counted.add(layer)
            own = sum(i.type.numel for i in eqn.inputs if _is_param(graph, i))
        kind = type(module).__name__ if module is not None else eqn.op
        path = paths[module] if module is not None else ""
        rows.append(Row(layer, kind, eqn.out.type.shape, own, macs(eqn), path))
    params = list(net.parameters())
    return Summary(
        net._title(),
        tuple(shape),
        tuple(rows),
        sum(p.numel() for p in params),
        sum(p.numel() for p in params if p.trainable),
        sum(r.macs for r in rows),
        tuple((path, type(m).__name__) for m, path in paths.items() if not m.kind),
    )


def _is_param(graph, value) -> bool:  # type: ignore[no-untyped-def]
    return any(i.value == value and i.role == "param" for i in graph.inputs)
