"""Rewrite rules as data, and the driver that decides whether each is legal.

A rule has a `name` (its equation), a `pattern`, a `guard` that says *why not* in a sentence, and a
`build`. The driver decides what a rule may do: a value that the rule would make interior must have
no reader outside the match and must not leave the graph, unless the rule keeps it as a result, and
the rewrite must not close a cycle. So no rule has to check that itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from graphnet.errors import GraphError
from graphnet.ir.graph import Eqn, Graph, Value, Where
from graphnet.ir.op import get_op
from graphnet.passes.templates import anchor_of, traits_of

MAX_ROUNDS = 64
DEPTH = 3  # equations in the longest pattern


@dataclass(frozen=True)
class P:
    """Matches an equation whose op is in `ops` ("anchor:conv2d" also matches a fused equation
    around that anchor, "chain" one of elementwise code alone, "is:..." and "takes:..." what has a
    trait, see `templates.traits_of`). `operand` is the pattern of one of
    its operands: at a fixed position `at`, or anywhere. `result` restricts which result of the
    inner equation is read."""

    ops: tuple[str, ...]
    operand: P | None = None
    at: int | None = None
    result: int | None = None



class _Names:
    """The names under which patterns find equations, worked out once for each equation."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Eqn, list[str]]] = {}  # an id lasts as long as its object

    def __call__(self, eqn: Eqn) -> list[str]:
        found = self._known.get(id(eqn))
        if found is None:
            anchor = anchor_of(eqn)
            kind = f"anchor:{anchor}" if anchor or eqn.body is None else "chain"
            found = self._known[id(eqn)] = eqn, sorted({eqn.op, kind, *traits_of(eqn)})
        return found[1]

    def fit(self, eqn: Eqn, pattern: P) -> bool:
        """Whether an equation is what a pattern asks for, its operands aside."""
        return not set(pattern.ops).isdisjoint(self(eqn))


@dataclass(frozen=True)
class Match:
    """`eqns[0]` is the root, each further one makes the value `edges[k]` the one before reads."""

    graph: Graph
    eqns: tuple[Eqn, ...]
    edges: tuple[Value, ...]
    producers: Mapping[Value, Eqn]
    readers: Mapping[Value, Sequence[Eqn]]
    rule: str = ""  # the name of the rule that looks for it

    @property
    def root(self) -> Eqn:
        return self.eqns[0]

    @property
    def inner(self) -> Eqn:
        return self.eqns[-1]


Guard = Callable[[Match], str | None]
Build = Callable[[Match, Callable[[], str]], list[Eqn]]


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    name     its equation, e.g. `relu(conv2d(x,w,b)) => fused`
    pattern  what it looks for
    guard    the reason why it does not apply, or None
    build    the equations that replace the match; together they define every result that the
             match had and the rest of the graph reads
    keeps    interior values may be read elsewhere: the replacement yields them too
    told     the equation of one match, where `name` stands for many; hits, refusals and provenance
             have it, and it can be disabled like `name`
    """

    name: str
    pattern: P
    build: Build
    guard: Guard = lambda m: None
    keeps: bool = False
    told: Callable[[Match], str] = lambda m: m.rule


@dataclass
class Log:
    """What happened: rule hits, and refusals as (rule, line, sentence)."""

    hits: dict[str, int] = field(default_factory=dict)
    refusals: dict[tuple[str, str], str] = field(default_factory=dict)


def _find(
    rule: Rule, root: Eqn, producers: Mapping[Value, Eqn], names: _Names
) -> Iterable[tuple[tuple, tuple]]:
    """Chains of (equations, edges) below `root` that fit the pattern, as the root does."""
    chains: list[tuple[tuple[Eqn, ...], tuple[Value, ...]]] = [((root,), ())]
    pattern = rule.pattern
    while pattern.operand is not None:
        longer = []
        for eqns, edges in chains:
            for k, v in enumerate(eqns[-1].inputs):
                below = producers.get(v)
                if below is None or (pattern.at is not None and k != pattern.at):
                    continue
                if v in eqns[-1].inputs[:k] or not names.fit(below, pattern.operand):
                    continue
                if pattern.result is not None and below.outputs.index(v) != pattern.result:
                    continue
                longer.append(((*eqns, below), (*edges, v)))
        chains, pattern = longer, pattern.operand
    yield from chains


def _illegal(rule: Rule, m: Match) -> str | None:
    """Why the driver refuses a match, or None."""
    inside = set(map(id, m.eqns))
    escaping = m.graph.escaping
    for v in m.edges:
        if rule.keeps:
            continue
        if v in escaping:
            return f"{v} leaves the graph"
        for reader in m.readers.get(v, ()):
            if id(reader) not in inside:
                why = f"{v} is also read by {reader.op} ({reader.where or 'no layer'})"
                return why + _price(v, reader)
    return None


def _price(v: Value, reader: Eqn) -> str:
    """What a value costs that the norm of all gradients keeps out of its kernel."""
    if reader.op != "global_norm":
        return ""
    return f": {v.type.bytes:,} bytes are written once and read twice at each step"


def _closes_cycle(m: Match) -> str | None:
    """Whether a result of the match feeds an operand of the match from outside."""
    inside = set(map(id, m.eqns))
    results = {v for e in m.eqns for v in e.results}
    todo = [v for e in m.eqns for v in e.inputs if v not in results]
    seen: set[Value] = set()
    while todo:
        v = todo.pop()
        if v in seen:
            continue
        seen.add(v)
        if v in results:
            made = m.producers[v]
            return f"{made.op} feeds an operand of the match through other equations"
        made_by = m.producers.get(v)
        if made_by is not None and id(made_by) not in inside:
            todo.extend(made_by.inputs)
    return None


def rewrite(
    graph: Graph, rules: Iterable[Rule], *, log: Log | None = None, disabled: Iterable[str] = ()
) -> Graph:
    """Applies the rules to a fixpoint, consumers first. Raises if it does not end."""
    log = Log() if log is None else log
    off = set(disabled)
    rules = [r for r in rules if r.name not in off]
    by_root: dict[str, list[Rule]] = {}
    for rule in rules:
        for op in rule.pattern.ops:
            by_root.setdefault(op, []).append(rule)
    budget = MAX_ROUNDS * (len(graph.eqns) + 1)
    names, at, swept = _Names(), len(graph.eqns), True
    while True:
        found = _one(graph, at, by_root, names, log, off)
        if found is None:
            if swept:
                return graph
            at, swept = len(graph.eqns), True  # once more: what changed may let others match
            continue
        graph, at = found
        swept = False
        budget -= 1
        if budget < 0:
            trace = ", ".join(f"{k} x{n}" for k, n in log.hits.items())
            raise GraphError(f"rewriting {graph.name} does not end; hits: {trace}")


def _one(
    graph: Graph, end: int, by_root: Mapping[str, Sequence[Rule]], names: _Names, log: Log,
    off: set[str],
) -> tuple[Graph, int] | None:  # fmt: skip
    """The first rewrite among the equations before `end`, consumers first: the graph after it, and
    where to go on; None if there is none."""
    producers, readers = graph.producers, graph.readers
    taken: set[str] = set()

    def fresh() -> str:
        if not taken:
            taken.update(v.name for e in graph.eqns for v in e.results)
            taken.update(v.name for v in graph.input_values)
        return _fresh(taken)

    for root in reversed(graph.eqns[:end]):
        for rule in (r for name in names(root) for r in by_root.get(name, ())):
            for eqns, edges in _find(rule, root, producers, names):
                m = Match(graph, eqns, edges, producers, readers, rule.name)
                name = rule.told(m)
                if name in off:
                    continue
                why = rule.guard(m) or _illegal(rule, m) or _closes_cycle(m)
                if why is not None:
                    log.refusals[name, _label(root)] = why
                    continue
                new = rule.build(m, fresh)
                log.hits[name] = log.hits.get(name, 0) + 1
                log.refusals.pop((name, _label(root)), None)
                after = _replace(graph, m, new, name)
                return after, _behind(after, {v for e in m.eqns for v in e.results})
    return None


def _behind(graph: Graph, changed: set[Value]) -> int:
    """Behind the last equation that a pattern may see differently: the readers of what changed, and
    their readers, as far up as patterns reach."""
    for _ in range(DEPTH):
        changed |= {v for u in changed for r in graph.readers.get(u, ()) for v in r.results}
    near = [k for k, e in enumerate(graph.eqns) if not changed.isdisjoint(e.results)]
    return near[-1] + 1 if near else len(graph.eqns)


def _label(eqn: Eqn) -> str:
    return f"{eqn.op} -> {eqn.results[0]} ({', '.join(eqn.where.layers) or 'no layer'})"


def _fresh(names: set[str]) -> str:
    k = 0
    while str(k) in names:
        k += 1
    names.add(str(k))
    return str(k)


def _replace(graph: Graph, m: Match, new: list[Eqn], rule: str) -> Graph:
    where = Where()
    for e in reversed(m.eqns):
        where = where.merged(e.where)
    defined = {v for e in new for v in e.results}
    # A matched equation stays where somebody outside reads it and the rule does not replace it.
    inside = set(map(id, m.eqns))
    wanted = m.graph.escaping | {v for e in graph.eqns if id(e) not in inside for v in e.inputs}
    gone = {id(e) for e in m.eqns if e is m.root or not (set(e.results) - defined) & wanted}
    stamped = [replace(e, where=where.merged(e.where, rule)) for e in new]
    eqns: list[Eqn] = []
    for e in graph.eqns:
        if e is m.root:
            eqns += stamped
        elif id(e) not in gone:
            eqns.append(e)
    return replace(graph, eqns=order(eqns, graph))


def order(eqns: list[Eqn], graph: Graph) -> tuple[Eqn, ...]:
    """Topological order that keeps the given order wherever it is legal, and that of collectives
    always: all ranks meet them in one order."""
    ready = set(graph.input_values)
    out: list[Eqn] = []
    waiting = list(eqns)
    while waiting:
        rest: list[Eqn] = []
        held = False  # whether a collective waits
        for e in waiting:
            together = get_op(e.op).effect == "collective"
            if all(v in ready for v in e.inputs) and not (together and held):
                ready.update(e.results)
                out.append(e)
            else:
                rest.append(e)
                held = held or together
        if len(rest) == len(waiting):
            missing = [str(v) for v in rest[0].inputs if v not in ready]
            raise GraphError(f"{rest[0].op} waits for {', '.join(missing)}: a cycle, or a rule bug")
        waiting = rest
    return tuple(out)
