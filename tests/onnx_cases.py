"""ONNX's own backend cases, counted: `python -m tests.onnx_cases` writes docs/onnx.md.

A case passes where every result has the shape and the values that ONNX gives, is refused where a
GraphnetError says why, and is wrong or a crash elsewhere. Cases that spell an operator out in
others (`_expanded`) are left out.
"""

import importlib
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx.backend.test.case import node
from onnx.backend.test.loader import load_model_tests

import graphnet as gn
from graphnet.frontends import onnx_backend

PAGE = Path(__file__).resolve().parents[1] / "docs/onnx.md"
KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
RESULTS = ("pass", "refused", "wrong", "crash")


def _tensor(path):
    found = onnx.TensorProto()
    found.ParseFromString(path.read_bytes())
    return onnx.numpy_helper.to_array(found)


def _stored(folder):
    """(model, [(inputs, outputs)]) of a case on disk."""
    sets = []
    for data in sorted(folder.glob("test_data_set_*")):
        both = [[_tensor(data / f"{k}_{i}.pb") for i in range(len(list(data.glob(f"{k}_*"))))]
                for k in ("input", "output")]  # fmt: skip
        sets.append(tuple(both))
    return onnx.load(folder / "model.onnx"), sets


def result_of(model, sets, rtol, atol):
    """One of RESULTS, and why it is none that passes."""
    try:
        prepared = onnx_backend.prepare(model, "CPU")
        for inputs, outputs in sets() if callable(sets) else sets:
            got = prepared.run(inputs)
            assert len(got) == len(outputs), "another number of results"
            for a, b in zip(got, outputs, strict=True):
                assert a.shape == np.shape(b), f"{a.shape} instead of {np.shape(b)}"
                np.testing.assert_allclose(a, b, rtol, atol)
    except gn.GraphnetError as error:
        return "refused", str(error)
    except AssertionError as error:
        return "wrong", str(error)
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}"
    return "pass", ""


def _some(operators):
    """The node cases of these operators alone: making all of them takes seconds."""
    for op in operators:
        importlib.import_module(f"{node.__name__}.{op.lower()}")
    return [c for c in node._NodeTestCases if {n.op_type for n in c.model.graph.node} <= operators]


def cases(kind, operators=None):
    """(name, operator, result, why) of every case of a kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if operators is not None:
            found = _some(operators)
        else:
            found = node.collect_testcases(None) if kind == "node" else load_model_tests(kind=kind)
        for c in found:
            if "_expanded" in c.name or c.model is None and c.model_dir is None:
                continue
            model, sets = (c.model, c.data_sets) if c.model_dir is None else (None, None)
            if model is None:
                try:
                    model, sets = _stored(Path(c.model_dir))
                except Exception:  # a sequence or a map in the place of a tensor
                    model, sets = onnx.load(Path(c.model_dir) / "model.onnx"), [([[]], [])]
            ops = {n.op_type for n in model.graph.node} - {"Constant"}
            name = next(iter(ops)) if len(ops) == 1 else "several"
            # The limits of ONNX's runner, but for results of sums in another order.
            yield c.name, name, *result_of(model, sets, max(c.rtol, 1e-4), max(c.atol, 1e-6))


def counted(kind, operators=None):
    """Operator to how many of its cases end in which result."""
    out = {}
    for _, op, result, _ in cases(kind, operators):
        out.setdefault(op, Counter())[result] += 1
    return out


def row(op, counts):
    """The line of an operator."""
    return f"| {op} | {counts['pass']} | {counts['refused']} |"


def page():
    """The text of docs/onnx.md."""
    lines = [
        "# ONNX's backend cases", "",
        f"What becomes of the test cases of onnx {onnx.__version__} in",
        "`graphnet.frontends.onnx_backend` on the cpu target: passed, or refused with an error",
        "that names the node. `python -m tests.onnx_cases` writes this page, and a test counts",
        "again. Cases that spell an operator out in others (`_expanded`) are left out.", "",
        "| kind | pass | refused | wrong | crash |", "|---|---|---|---|---|",
    ]  # fmt: skip
    tables, details = {kind: counted(kind) for kind in KINDS}, []
    for kind, table in tables.items():
        total = sum(table.values(), Counter())
        lines.append(f"| {kind} | " + " | ".join(str(total[r]) for r in RESULTS) + " |")
        rows = {op: c for op, c in sorted(table.items()) if c["pass"]}
        details += ["", f"## {kind}", "", "| operator | pass | refused |", "|---|---|---|"]
        details += [row(op, c) for op, c in rows.items()]
        rest = sum(c["refused"] for op, c in table.items() if op not in rows)
        details.append(f"| {len(table) - len(rows)} others | 0 | {rest} |")
    return "\n".join([*lines, *details]) + "\n"


def totals(text):
    """Kind to its four counts, as a page has them."""
    rows = re.findall(r"^\| ([\w-]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.M)
    return {kind: tuple(map(int, counts)) for kind, *counts in rows}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
