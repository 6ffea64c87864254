"""Launches of the losses: a row in registers, value and gradient in one kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import Layout
from graphnet.lowering.launch.codegen import Index, Ref
from graphnet.lowering.launch.config import PROCESSORS, Config, cdiv, distinct, next_power, tile
from graphnet.lowering.launch.steps import Launch, arguments, make, source
from graphnet.lowering.launch.variants import Problem, Variant
from graphnet.lowering.launch.work import Work
from graphnet.passes.templates import anchors_of

MOST_CLASSES = 4096


class Losses(Variant):
    """Cross-entropy and multiclass hinge."""

    name, ops = "rows", ("cross_entropy", "multi_margin")

    def accepts(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
    ) -> str | None:
        classes = anchors_of(eqn)[0].inputs[0].type.shape[1]
        if classes > MOST_CLASSES:
            return f"it keeps a row in registers: {classes} classes, at most {MOST_CLASSES}"
        return None

    def configs(self, problem: Problem) -> Iterator[Config]:
        rows, classes = problem.shape
        bn = next_power(classes)
        bm = tile(rows, max(1, 2048 // bn), least=1)
        programs = 1 if rows * bn <= 16384 else min(cdiv(rows, bm), PROCESSORS)
        first = Config(bm, bn, SPLIT=programs)
        more = (
            replace(first, BM=bm, SPLIT=split)
            for bm in (1, 2, 4, 8, 16, 32, 64, 128)
            if bm <= next_power(rows) and bm * bn <= 16384
            for split in (min(cdiv(rows, bm), PROCESSORS), 1)
        )
        yield from distinct([first], more)

    def launch(self, work: Work, config: Config) -> list[Launch]:
        e, c = work.anchor, config
        kernel = e.op.removesuffix("_grad")
        logits, labels, live, *over = (work.ref(v) for v in e.inputs)
        rows = over[0] if over else None  # what the mean is over, if not the live ones
        m, n = e.inputs[0].type.shape
        grad = next((a for a in work.anchors if a.op.endswith("_grad")), None)
        value = next((a for a in work.anchors if not a.op.endswith("_grad")), None)
        outer = dict(work.stores)
        out = outer.get(value.out) if value is not None else None
        epi = work.epilogue(grad.out, Index((m, n))) if grad is not None else None
        s0, s1 = work.type(e.inputs[0]).strides
        a = e.attrs
        own = (
            {"SMOOTHING": a.label_smoothing}  # type: ignore[attr-defined]
            if kernel == "cross_entropy"
            else {"MARGIN": a.margin, "DIVISOR": n if a.mean else 1}  # type: ignore[attr-defined]
        )
        constants = {
            "M": m, "C": n, "S0": s0, "S1": s1, "BM": c.BM, "BN": c.BN, "PROGRAMS": c.SPLIT, **own,
            "LOSS": out is not None, "GRAD": epi is not None, "EPILOGUE": source(epi),
        }  # fmt: skip
        loss = work.ref(out) if out is not None else None
        several = loss is not None and c.SPLIT > 1
        sums = Ref(f".sums{work.eqn.results[0]}", "f32") if several else None
        written = sums or loss
        first = make(
            kernel, "loss",
            (logits, labels, live, rows, None if sums else loss, sums, arguments(epi)), constants,
            (c.SPLIT,), reads=tuple(work.name[v] for v in e.inputs),
            writes=(written.name,) if written else (), epilogues=(epi,),
            scratch=((sums.name, 4 * c.SPLIT),) if sums else (),
        )  # fmt: skip
        if sums is None:
            return [first]
        assert loss is not None
        mean = make(
            "mean_reduce", "reduce", (sums, rows or live, loss),
            {"COUNT": c.SPLIT, "BLOCK": next_power(c.SPLIT)}, (1,),
            reads=(sums.name, (rows or live).name), writes=(loss.name,),
        )  # fmt: skip
        return [first, mean]
