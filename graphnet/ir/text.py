"""The textual form of graphs. What prints parses back to an equal graph.

    graph lenet5.fused(%x: bf16[64,1,28,28] data, %w: f32[6,1,5,5] param, %b: f32[6] param) {
      %0: bf16[64,6,28,28] = fused(%x, %w, %b) { %a = conv2d(%x, %w, %b); yield %a }  # conv1
      commit %w = %17
      return %0
    }

Types stand behind results; in a body they are derived, and what it yields is stored as declared
outside. A comment is provenance and is skipped.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from graphnet.errors import ParseError
from graphnet.ir.graph import ROLES, Builder, Eqn, Graph, Input, Value, substitute
from graphnet.ir.op import Attrs, get_op
from graphnet.ir.types import DTYPES, Layout, TensorType, parse_layout

# ---- printing -------------------------------------------------------------------------------


def _literal(value: object) -> str:
    if isinstance(value, tuple):
        inner = ",".join(map(_literal, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return repr(value)


def _attrs(attrs: Attrs) -> str:
    items = ", ".join(f"{k}={_literal(v)}" for k, v in attrs.items())
    return f" {{{items}}}" if items else ""


def _call(eqn: Eqn) -> str:
    args = ", ".join(map(str, eqn.inputs))
    if eqn.body is None:
        return f"{eqn.op}({args}){_attrs(eqn.attrs)}"
    lines = [f"{_names(e)} = {_call(e)}" for e in eqn.body.eqns]
    lines.append("yield " + ", ".join(map(str, eqn.body.returns)))
    return f"{eqn.op}({args}) {{ {'; '.join(lines)} }}"


def _names(eqn: Eqn) -> str:
    return ", ".join("_" if v is None else str(v) for v in eqn.outputs)


def eqn_text(eqn: Eqn) -> str:
    """One equation as a line, without its provenance."""
    outs = ", ".join("_" if v is None else f"{v}: {v.type}" for v in eqn.outputs)
    return f"{outs} = {_call(eqn)}"


def _input(i: Input) -> str:
    of = f"(%{i.of})" if i.of else ""
    return f"{i.value}: {i.value.type} {i.role}{of}" + (f" parts={i.parts}" if i.parts > 1 else "")


def to_text(graph: Graph) -> str:
    """The whole graph; provenance stands behind each line as a comment."""
    head = f"graph {graph.name}("
    inputs = [_input(i) for i in graph.inputs]
    if sum(map(len, inputs)) + len(head) < 90:
        lines = [head + ", ".join(inputs) + ") {"]
    else:
        lines = [head, *(f"    {i}," for i in inputs), ") {"]
    for e in graph.eqns:
        note = str(e.where)
        lines.append(f"  {eqn_text(e)}" + (f"  # {note}" if note else ""))
    if graph.commits:
        lines.append("  commit " + ", ".join(f"{old} = {new}" for old, new in graph.commits))
    lines.append("  return " + ", ".join(map(str, graph.returns)))
    return "\n".join([*lines, "}"]) + "\n"


# ---- parsing --------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""(?P<skip>\s+|\#[^\n]*)
      | (?P<value>%[\w.]+)
      | (?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
      | (?P<number>-?(?:inf|nan|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?))
      | (?P<word>[A-Za-z_][\w.]*)
      | (?P<punct>[(){}\[\],:=;])""",
    re.VERBOSE,
)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(self._tokens())
        self.at = 0

    def _tokens(self) -> Iterator[tuple[str, str, int]]:
        pos = 0
        while pos < len(self.text):
            m = _TOKEN.match(self.text, pos)
            if m is None:
                raise self._error(f"unexpected character {self.text[pos]!r}", pos)
            if m.lastgroup != "skip":
                yield str(m.lastgroup), m[0], pos
            pos = m.end()
        yield "end", "", pos

    def _error(self, message: str, pos: int | None = None) -> ParseError:
        pos = self.tokens[self.at][2] if pos is None else pos
        line = self.text.count("\n", 0, pos) + 1
        source = self.text.splitlines()[line - 1].strip() if self.text else ""
        return ParseError(f"line {line}: {message} in: {source[:120]}")

    def peek(self, text: str) -> bool:
        return self.tokens[self.at][1] == text

    def take(self, want: str) -> str:
        """The next token: of kind `want`, or the literal text `want`."""
        kind, text, _ = self.tokens[self.at]
        if want not in (kind, text):
            raise self._error(f"expected {want!r}, got {text or 'the end'!r}")
        self.at += 1
        return text

    def accept(self, text: str) -> bool:
        if self.peek(text):
            self.at += 1
            return True
        return False

    def values(self, close: str | None) -> list[str]:
        names = []
        while self.tokens[self.at][0] == "value" or self.peek("_"):
            text = self.tokens[self.at][1]
            self.at += 1
            names.append("_" if text == "_" else text[1:])
            if not self.accept(","):
                break
        if close:
            self.take(close)
        return names

    def type(self) -> TensorType:
        name = self.take("word")
        if name not in DTYPES:
            raise self._error(f"unknown dtype {name!r}")
        self.take("[")
        shape = []
        while not self.accept("]"):
            shape.append(int(self.take("number")))
            self.accept(",")
        layout = Layout()
        if self.peek("{"):
            start = self.tokens[self.at][2]
            while not self.accept("}"):
                self.at += 1
            raw = self.text[start + 1 : self.tokens[self.at - 1][2]]
            layout = parse_layout(raw.replace(" ", ""))
        return TensorType(DTYPES[name], tuple(shape), layout)

    def attrs(self, op: str) -> Attrs:
        fields = {}
        if self.accept("{"):
            while not self.accept("}"):
                key = self.take("word")
                self.take("=")
                fields[key] = self.literal()
                self.accept(",")
        try:
            return get_op(op).attrs_type(**fields)
        except TypeError as error:
            raise self._error(f"attributes of {op}: {error}") from None

    def literal(self) -> object:
        if self.accept("("):
            items = []
            while not self.accept(")"):
                items.append(self.literal())
                self.accept(",")
            return tuple(items)
        text = self.tokens[self.at][1]
        self.at += 1
        if text.lstrip("-") in ("inf", "nan"):
            return float(text)
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise self._error(f"not a literal: {text!r}") from None

    def body(self, operands: list[Value]) -> Graph:
        """Result types are derived here; the names are those of the text."""
        self.take("{")
        b = Builder("body", [v.name for v in operands])
        env = {v.name: v for v in operands}
        for v in operands:
            b.input(v.name, v.type)
        while not self.accept("yield"):
            self.equation(b, env, typed=False)
            self.take(";")
        returns = [self.lookup(n, env) for n in self.values("}")]
        return b.build(*returns)

    def lookup(self, name: str, env: dict[str, Value]) -> Value:
        if name not in env:
            raise self._error(f"%{name} is read before it is written")
        return env[name]

    def equation(self, b: Builder, env: dict[str, Value], *, typed: bool) -> None:
        names: list[str] = []
        types: list[TensorType | None] = []
        while True:
            if self.accept("_"):
                names.append("_")
                types.append(None)
            else:
                names.append(self.take("value")[1:])
                types.append(None)
                if typed:
                    self.take(":")
                    types[-1] = self.type()
            if not self.accept(","):
                break
        self.take("=")
        op = self.take("word")
        self.take("(")
        operands = [self.lookup(n, env) for n in self.values(")")]
        body = self.body(operands) if op == "fused" else None
        attrs = Attrs() if body is not None else self.attrs(op)
        for n in names:
            if n != "_" and n in env:
                raise self._error(f"%{n} is written twice")
        outs = b.emit(
            op, operands, attrs, body=body, names=names,
            unread=[i for i, n in enumerate(names) if n == "_"],
        )  # fmt: skip
        if len(outs) != len(names):
            raise self._error(f"{op} has {len(outs)} results, {len(names)} are named")
        for k, (name, out, declared) in enumerate(zip(names, outs, types, strict=True)):
            if out is None:
                continue
            if declared is not None:
                if declared.with_layout(out.type.layout) != out.type:
                    raise self._error(f"%{name} is declared {declared}, derived {out.type}")
                outs = (*outs[:k], Value(out.name, declared), *outs[k + 1 :])
            env[name] = outs[k]  # type: ignore[assignment]
        last = b.eqns[-1]
        body = last.body and _laid_out(last.body, outs)
        b.eqns[-1] = Eqn(last.op, last.inputs, tuple(outs), last.attrs, body)

    def graph(self) -> Graph:
        self.take("graph")
        b = Builder(self.take("word"))
        self.take("(")
        env: dict[str, Value] = {}
        while not self.accept(")"):
            name = self.take("value")[1:]
            self.take(":")
            type = self.type()
            role = self.take("word")
            if role not in ROLES:
                raise self._error(f"unknown role {role!r}")
            of = ""
            if self.accept("("):
                of = self.take("value")[1:]
                self.take(")")
            parts = 1
            if self.accept("parts"):
                self.take("=")
                parts = int(self.take("number"))
            env[name] = b.input(name, type, role, of, parts)
            self.accept(",")
        self.take("{")
        while not (self.peek("return") or self.peek("commit")):
            self.equation(b, env, typed=True)
        if self.accept("commit"):
            while True:
                old = self.lookup(self.take("value")[1:], env)
                self.take("=")
                b.commit(old, self.lookup(self.take("value")[1:], env))
                if not self.accept(","):
                    break
        self.take("return")
        returns = [self.lookup(n, env) for n in self.values(None)]
        self.take("}")
        self.take("end")
        return b.build(*returns)


def _laid_out(body: Graph, outer: Sequence[Value | None]) -> Graph:
    """The body with what it yields stored as declared outside: inside, types are not printed."""
    env = {
        inner: Value(inner.name, out.type)
        for inner, out in zip(body.returns, outer, strict=True)
        if out is not None
    }
    eqns = (
        replace(
            substitute(e, env),
            outputs=tuple(None if v is None else env.get(v, v) for v in e.outputs),
        )
        for e in body.eqns
    )
    returns = tuple(env.get(v, v) for v in body.returns)
    return replace(body, eqns=tuple(eqns), returns=returns)


def parse(text: str) -> Graph:
    """The graph that `text` describes; ParseError names the line."""
    return _Parser(text).graph()
