"""Which variant computes an equation, with which configuration, and why not the others.

What was measured wins over the rules, and what a test or a search forces wins over both. The
choice is a pure function of the problem, the layouts and what `Kernels` holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

from graphnet import config as flags
from graphnet.errors import ConfigError, UnsupportedOpError
from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import Layout
from graphnet.lowering.launch.config import Config
from graphnet.lowering.launch.variants import Problem, Variant
from graphnet.lowering.launch.work import Work, take_apart


@dataclass(frozen=True)
class Measured:
    """What a configuration of a variant took for a problem.

    source  who measured: "graphnet", or "prototype" (a kernel of the same structure, without masks
            and bias sums). Times are compared within one source only
    origin  GPU and date, for people
    """

    variant: str
    config: Config
    us: float
    source: str
    origin: str


@dataclass(frozen=True)
class Choice:
    """A variant and its configuration for a problem.

    source   "rule", "forced" or "measured"; `origin` says where that was
    us       what was measured, None without a measurement
    refused  (variant, why it was not taken) of the others
    """

    problem: Problem
    variant: Variant
    config: Config
    source: str
    origin: str = ""
    us: float | None = None
    refused: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """rows 128x256 k64 s4 w8: measured (prototype, h100, 2026-11-26), 192.0 us."""
        taken = f"{self.variant.name} {self.config}: {self.source}"
        if self.origin:
            taken += f" ({self.origin})"
        return taken + (f", {self.us:.1f} us" if self.us is not None else "")


Table = Mapping[Problem, Sequence[Measured]]

# What a prototype may take of the times that it has to beat: a tenth is what a kernel may lose in
# its place, by masks, bias sums and cold caches.
AHEAD = 0.9


@dataclass(frozen=True)
class Kernels:
    """The kernels of one target: the registry, bound to what decides between variants.

    registry     the variants of each op, those that the rules prefer first
    arch         90 for sm_90
    interpreted  Triton's interpreter runs the kernels
    table        what was measured, by problem
    """

    registry: Mapping[str, Sequence[Variant]]
    arch: int = 90
    interpreted: bool = False
    table: Table = field(default_factory=dict)

    def variants(self, op: str) -> Sequence[Variant]:
        """The variants of a problem's op; UnsupportedOpError where there are none."""
        kind = op.partition(":")[0]
        if kind not in self.registry:
            raise UnsupportedOpError(f"no kernel computes {op}")
        return self.registry[kind]

    def refusal(
        self, variant: Variant, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str
    ) -> str | None:
        """Why a variant cannot compute an equation here; None where it can."""
        if variant.name in flags.disabled():
            return "GRAPHNET_DISABLE names it"
        if self.interpreted and not variant.interpreted:
            return "Triton's interpreter cannot run it"
        return variant.accepts(eqn, layouts, dtype, self.arch)

    def takes(self, eqn: Eqn, layouts: Mapping[Value, Layout], names: Sequence[str] = ()) -> bool:
        """Whether a variant, of `names` where some are given, takes an anchor with its operands and
        results in these layouts, or in copies as it wants them. Passes ask; what is not in
        `layouts` lies row-major."""
        dtype = getattr(eqn.attrs, "math", None) or eqn.inputs[0].type.dtype.name
        whole = {v: layouts.get(v, Layout()) for v in (*eqn.inputs, *eqn.results)}
        return any(
            self.refusal(v, eqn, {**whole, **v.wants(eqn, whole, dtype)}, dtype) is None
            for v in self.registry.get(eqn.op, ())
            if not names or v.name in names
        )

    def able(self, work: Work, ask: bool = False) -> tuple[list[Variant], dict[str, str]]:
        """(variants that can compute the equation, why the others cannot).

        ask  with operands in the layouts that each variant wants, not as they lie
        """
        found, refused, dtype = [], {}, work.problem.dtype
        for v in self.variants(work.problem.op):
            layouts = work.layouts
            if ask:
                layouts |= v.wants(work.eqn, layouts, dtype)
            why = self.refusal(v, work.eqn, layouts, dtype)
            if why is None:
                found.append(v)
            else:
                refused[v.name] = why
        return found, refused

    def wanted(self, eqn: Eqn) -> Mapping[Value, Layout]:
        """The operands that the variant to be chosen reads in other layouts than they lie in."""
        work = take_apart(eqn, lambda v: v.name)
        if not work.anchors:
            return {}
        able, refused = self.able(work, ask=True)
        about = eqn, work.layouts, work.problem.dtype
        if not any(v.wants(*about) for v in able):
            return {}
        wants = self._picked(work, able, refused).variant.wants(*about)
        return {v: to for v, to in wants.items() if work.layouts[v] != to}

    def writes(self, eqn: Eqn, layout: Layout) -> bool:
        """Whether the kernel of an equation writes its result in another layout, too."""
        work = take_apart(eqn, lambda v: v.name)
        if not work.anchors:
            return False
        able, refused = self.able(work)
        return bool(able) and self._picked(work, able, refused).variant.writes(eqn, layout)

    def keeps(self, eqn: Eqn) -> str | None:
        """Why the kernel of a convolution keeps no moments of its result; None where it does."""
        work = take_apart(eqn, lambda v: v.name)
        return self.choose(work).variant.keeps(work.problem)

    def joins(self, whole: Eqn, parts: Sequence[Eqn]) -> str | None:
        """Why equations should not become one region; None where that pays."""
        work = take_apart(whole, lambda v: v.name)
        able, refused = self.able(work)
        if not able:
            return "; ".join(refused.values())
        works = [take_apart(p, lambda v: v.name) for p in parts]
        return able[0].joins(work, works, [self._padded(w) for w in works])

    def _padded(self, work: Work) -> int:
        """Arithmetic of the whole tiles of an equation's own launches; 0 for what is no product, or
        where no kernel takes the operands as they lie."""
        if not work.anchors or len(work.members) > 1 or not self.able(work)[0]:
            return 0
        choice = self.choose(work)
        return sum(s.padded for s in choice.variant.launch(work, choice.config))

    def choose(self, work: Work) -> Choice:
        """The variant and its configuration; UnsupportedOpError where none can."""
        p = work.problem
        able, refused = self.able(work)
        if not able:
            said = "; ".join(f"{name}: {why}" for name, why in refused.items())
            raise UnsupportedOpError(
                f"no kernel computes {p}: {said}", **work.eqn.where.located,
                help="target='cpu' runs every op on torch's kernels",
            )  # fmt: skip
        return self._picked(work, able, refused)

    def _picked(self, work: Work, able: Sequence[Variant], refused: dict[str, str]) -> Choice:
        """What is measured or by rule, and what is forced over it."""
        p = work.problem
        choice = self._measured(p, able) or self._rule(p, able)
        wanted, changes = _forces(p.kind, {v.name for v in self.variants(p.op)})
        named = next((v for v in able if v.name == wanted), None)
        if named is not None and named is not choice.variant:
            choice = Choice(p, named, self._config(named, p), "forced")
        if changes:
            config = choice.variant.cut(replace(choice.config, **changes), p)
            choice = replace(choice, config=config, source="forced", origin="", us=None)
        for v in able:
            if v is not choice.variant:
                refused[v.name] = self._passed_over(v, choice)
        return replace(choice, refused=tuple(refused.items()))

    def _rule(self, p: Problem, able: Sequence[Variant]) -> Choice:
        pick = next((v for v in able if v.suits(p) is None), able[0])
        return Choice(p, pick, self._config(pick, p), "rule")

    def _config(self, v: Variant, p: Problem) -> Config:
        """The configuration by the rules."""
        return v.interpretable(v.rule(p), p) if self.interpreted else v.rule(p)

    def _measured(self, p: Problem, able: Sequence[Variant]) -> Choice | None:
        """The row that decides among those of variants that can compute the equation."""
        by_name = {v.name: v for v in able}
        best = fastest([r for r in self.table.get(p, ()) if r.variant in by_name])
        if best is None:
            return None
        origin = f"{best.source}, {best.origin}"
        return Choice(p, by_name[best.variant], best.config, "measured", origin, best.us)

    def _passed_over(self, v: Variant, choice: Choice) -> str:
        """Why a variant that could compute the equation was not taken."""
        p = choice.problem
        if choice.source == "measured":
            rows = [r for r in self.table[p] if r.variant == v.name]
            same = [r.us for r in rows if choice.origin.startswith(r.source)]
            if rows and not same:
                return f"measured {min(r.us for r in rows):.1f} us by another source"
            return f"measured {min(same):.1f} us there" if same else "not measured there"
        if choice.source == "forced":
            return "another was asked for"
        return v.suits(p) or f"the rules prefer {choice.variant.name}"


def fastest(rows: Sequence[Measured]) -> Measured | None:
    """The row that decides: the fastest of ours, once there is one of ours.

    A variant that was never measured in its place can still be taken by its prototype. That has to
    be ahead of the fastest prototype of the variant that our fastest row names, which is of one
    source with it, and of that row, whose configuration no prototype may have had.
    """
    own = [r for r in rows if r.source == "graphnet"]
    best = min(own or rows, key=lambda r: r.us, default=None)
    if not own or best is None:
        return best
    prototypes = [r for r in rows if r.source == "prototype"]
    ours = [r.us for r in prototypes if r.variant == best.variant]
    known = {r.variant for r in own}
    new = min((r for r in prototypes if r.variant not in known), key=lambda r: r.us, default=None)
    return new if new is not None and ours and new.us <= AHEAD * min(*ours, best.us) else best


# ---- what tests and searches force -----------------------------------------------------------

_forced: list[tuple[tuple[str, ...], dict[str, Any]]] = []


def _forces(op: str, known: set[str]) -> tuple[str | None, dict[str, Any]]:
    """(variant, fields) that are forced on an op."""
    out: dict[str, Any] = {}
    for ops, changes in _forced:
        if not ops or op in ops:
            out |= changes
            wanted = changes.get("variant")
            if op in ops and wanted is not None and wanted not in known:
                raise ConfigError(
                    f"no variant {wanted!r} of {op}", help=f"one of {', '.join(sorted(known))}"
                )
    return out.pop("variant", None), out


def adjusted(op: str, config: Config) -> Config:
    """The configuration of a kernel that has no variants, with what is forced on `op`."""
    for ops, changes in _forced:
        if op in ops:
            config = replace(config, **{k: v for k, v in changes.items() if k != "variant"})
    return config


@contextmanager
def forced(*ops: str, **changes: int | str | bool) -> Iterator[None]:
    """Overrides the variant and fields of the configuration of every choice (of the given ops, or
    of all). A variant that cannot compute an equation is not taken. For tests and the tuner."""
    unknown = set(changes) - {f.name for f in fields(Config)} - {"variant"}
    if unknown:
        raise ConfigError(f"no configuration field {sorted(unknown)}")
    _forced.append((ops, changes))
    try:
        yield
    finally:
        _forced.pop()
