"""Fully connected layers by pointers and by boxes, in parts, with what their epilogues do: against
the float64 reference over memory full of NaN, and as sm_90 binaries."""

import re
from dataclasses import replace

import pytest
import torch

import graphnet as gn
from graphnet.api import lower
from graphnet.ir.graph import Eqn, Graph
from graphnet.ir.text import parse
from graphnet.lowering.build.build import compile_launches, key_of, request
from graphnet.lowering.launch.choice import forced
from graphnet.lowering.launch.codegen import Ref
from graphnet.lowering.launch.config import SHARED_BYTES, Config
from graphnet.lowering.launch.files import Source, load, private_dir
from graphnet.lowering.launch.registry import by_op
from graphnet.lowering.launch.variants import Problem
from graphnet.lowering.launch.work import take_apart
from graphnet.lowering.targets.interpret import interpreted
from graphnet.lowering.tune.alone import Alone
from tests.twin import relative

pytestmark = pytest.mark.usefixtures("own_cache", "single_kernels")

OPS = ("linear", "linear_dgrad", "linear_wgrad")
SGD = gn.SGD(lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)


def variant(op: str, name: str):
    return next(v for v in by_op()[op] if v.name == name)


def apart(eqn: Eqn):
    return take_apart(eqn, lambda v: v.name)


def step(rows: int, *sizes: int, precision="bf16", optimizer=SGD, target="cuda", dropout=True):
    """The graph of a training step with these layers, and its fully connected equations."""
    layers: list = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [gn.Linear(a, b), gn.ReLU(), *([gn.Dropout(0.5)] if dropout else [])]
    net = gn.Sequential(*layers, gn.Linear(sizes[-1], 24))
    graph = lower(
        net, (rows, sizes[0]), target=target, precision=precision, loss=gn.CrossEntropyLoss(),
        optimizer=optimizer,
    ).plan.graph  # fmt: skip
    return graph, [e for e in graph.eqns if any(a.op in OPS for a in apart(e).anchors)]


def hold(graph: Graph, eqn: Eqn, name: str, c: Config) -> list:
    """Runs an equation alone, twice; it is right, and the same in every bit."""
    steps = variant(apart(eqn).anchor.op, name).launch(apart(eqn), c)
    alone = Alone(graph, eqn, "interpret")
    with interpreted():
        run, tensor = alone.prepare(steps)
        bits = []
        for _ in range(2):
            assert alone.verdict(run, tensor) is None
            refs = [Ref(v.name, v.type.dtype.name) for v in eqn.results]
            bits.append([tensor(r).clone().view(torch.uint8) for r in refs])
    for a, b in zip(*bits, strict=True):
        assert torch.equal(a, b)
    return steps


# ---- the interpreter -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, precision, split",
    [
        ("pointers", "bf16", 1), ("pointers", "bf16", 4), ("boxes", "bf16", 1),
        ("boxes", "bf16", 4), ("pointers", "fp32", 2),
    ],
)  # fmt: skip
def test_every_equation_of_a_step_is_the_reference(name, precision, split):
    """Forward with bias, relu and dropout, gradients behind their mask, updates with a copy."""
    graph, eqns = step(40, 48, 24, precision=precision)
    assert len(eqns) == 5
    for e in eqns:  # 16 divides 48 alone; the last parts are short or empty
        hold(graph, e, name, Config(16, 16, 16, SPLIT=split))


@pytest.mark.parametrize("tile", [(32, 32, 16), (16, 64, 32)], ids=str)
def test_tiles_that_fit_exactly_have_no_masks(tile):
    graph, eqns = step(64, 64, 64)
    for e in eqns:
        hold(graph, e, "pointers", Config(*tile))


def test_an_epilogue_that_draws_random_numbers_goes_by_chunks():
    graph, eqns = step(40, 32, 80)
    for e in (e for e in eqns if apart(e).anchor.op != "linear_wgrad"):
        drawn = any(r.op == "dropout" for r in apart(e).rest)
        for warps, chunks in ((1, 4), (2, 2)):
            (s,) = hold(graph, e, "boxes", Config(64, 64, 16, num_warps=warps))
            assert dict(s.constants)["CHUNKS"] == (chunks if drawn else 1)


@pytest.mark.parametrize(
    "optimizer",
    [gn.SGD(lr=0.1), gn.Adam(lr=1e-3, weight_decay=0.1), gn.AdamW(lr=1e-3, amsgrad=True)],
    ids=["sgd", "adam", "amsgrad"],
)
def test_updates_in_the_kernel_and_behind_parts(optimizer):
    graph, eqns = step(40, 32, 24, optimizer=optimizer)
    for e in (e for e in eqns if apart(e).anchor.op == "linear_wgrad"):
        for name, split in (("pointers", 1), ("boxes", 1), ("pointers", 2)):
            hold(graph, e, name, Config(16, 16, 16, SPLIT=split))


WGRAD = """graph g(%x: bf16[20,16] data, %dy: bf16[20,24] data, %b: f32[24] param, %lr: f32[] hyper,
    %wd: f32[] hyper) {
  @
  return %lr }"""
FROZEN = """%c: f32[24] = fused(%x, %dy, %b, %lr, %wd) {
    %w, %g = linear_wgrad(%x, %dy); %c = sgd_update(%b, %g, %lr, %wd); yield %c }
  commit %b = %c"""


@pytest.mark.parametrize(
    "text, kernels",
    [
        ("%g: f32[24,16], _ = linear_wgrad(%x, %dy)", ["linear_wgrad"]),
        ("%g: f32[24,16], %d: f32[24] = linear_wgrad(%x, %dy)", ["linear_wgrad"]),
        (FROZEN, ["channel_sum"]),
    ],
    ids=["no bias", "no update", "frozen weight"],
)
def test_gradients_without_bias_update_or_weight(text, kernels):
    graph = parse(WGRAD.replace("@", text))
    for name in ("pointers", "boxes"):
        steps = hold(graph, graph.eqns[0], name, Config(16, 16, 16))
        assert [s.kernel for s in steps] == kernels


def trained(target: str, precision: str) -> tuple[list[float], dict, set[str]]:
    """Losses, state and variants of two training steps of a small net."""
    torch.manual_seed(3)
    net = gn.Sequential(
        gn.Conv2d(1, 8, 3), gn.ReLU(), gn.MaxPool2d(2), gn.Flatten(), gn.Linear(72, 40), gn.Tanh(),
        gn.Linear(40, 24),
    )  # fmt: skip
    program = gn.compile(
        net, (12, 1, 8, 8), target=target, precision=precision, loss=gn.CrossEntropyLoss(),
        optimizer=SGD,
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 1, 8, 8, generator=g), torch.randint(0, 24, (12,), generator=g)
    losses = [float(program(x, y)) for _ in range(2)]
    made = getattr(program.plan, "launches", ())
    taken = {s.choice.variant.name for s in made if s.choice and s.choice.problem.op in OPS}
    return losses, net.state_dict(), taken


@pytest.mark.parametrize(
    "name, precision, split", [("boxes", "bf16", 1), ("boxes", "bf16", 2), ("pointers", "fp32", 2)]
)
def test_a_net_trains_as_on_the_cpu(name, precision, split):
    want, state, _ = trained("cpu", precision)
    with forced(*OPS, variant=name, BM=16, BN=16, BK=16, SPLIT=split):
        got, own, taken = trained("interpret", precision)
    assert taken == {name}
    close = 1e-5 if precision == "fp32" else 2e-2
    assert got == pytest.approx(want, rel=close) and want[-1] < want[0]
    for key, value in state.items():
        assert relative(own[key], value.double()) <= close, key


# ---- operands that are asked for beforehand --------------------------------------------------


def update(rows: int, inputs: int, outputs: int, **kw):
    """The equation that updates a layer."""
    _, eqns = step(rows, inputs, outputs, **kw)
    return next(e for e in eqns if problem(e).shape == (rows, inputs, outputs)
                and problem(e).op == "linear_wgrad")  # fmt: skip


def problem(eqn: Eqn) -> Problem:
    return apart(eqn).problem


def function(source: Source) -> str:
    return source.text.partition("@triton.jit\n")[2].partition("\n\n")[0]


def test_a_preload_loads_and_the_epilogue_does_not():
    (launch,) = variant("linear_wgrad", "pointers").launch(
        apart(update(32, 48, 40)), Config(16, 16, 16)
    )
    sources = dict(launch.constants)
    early, late = sources["PRELOAD"], sources["EPILOGUE"]
    assert function(early).count("tl.load") == 6  # weight, momentum, three rates, guard
    assert "tl.load" not in function(late) and "aux[4]" in function(late)
    assert early in launch.epilogues  # whoever writes or hashes generated files finds it
    lines = {s.text[: s.text.index("def ")].count("\n") for s in launch.epilogues}
    assert len(lines) == 1  # Triton's key holds the line
    assert load(Source(early.text), "graphnet_test").__name__ == "preload"


def test_an_edited_operand_gives_another_binary():
    (launch,) = variant("linear_wgrad", "pointers").launch(
        apart(update(32, 64, 64)), Config(64, 64, 32)
    )
    early = dict(launch.constants)["PRELOAD"]
    other = Source(early.text.replace("args[0] + i0 * 64", "args[0] + i0 * 0"))
    assert other != early
    constants = tuple((k, other if v == early else v) for k, v in launch.constants)
    edited = replace(launch, constants=constants)
    assert key_of(request(launch, 90)) != key_of(request(edited, 90))
    (_, a), (_, b) = compile_launches([launch, edited])[0]
    assert a["sha256"] != b["sha256"]


# ---- rules -----------------------------------------------------------------------------------


def refusal(op: str, dtype="bf16", arch=90, sizes=(16, 24)):
    _, eqns = step(20, *sizes, precision="fp32" if dtype != "bf16" else "bf16")
    e = next(e for e in eqns if apart(e).anchor.op == op)
    return variant(op, "boxes").accepts(e, apart(e).layouts, dtype, arch)


def test_boxes_say_what_they_do_not_take():
    assert all(refusal(op) is None for op in OPS)
    assert "boxes feed tensor cores, this product is ieee" in refusal("linear", "ieee")
    assert refusal("linear_wgrad", arch=80) == "sm_80 has no tensor descriptors"
    assert "take 40 bytes, which is no multiple of 16" in refusal("linear", sizes=(20, 24))


WHOLE = Config(128, 64, 64, num_stages=4)


@pytest.mark.parametrize(
    "op, shape, name, want",
    [
        ("linear", (128, 9216, 4096), "boxes", Config(128, 64, 64, SPLIT=2, num_stages=8)),
        ("linear", (128, 9216, 4096), "pointers", Config(64, 64, 128, num_stages=5)),
        ("linear", (128, 4096, 4096), "pointers", Config(64, 64, 128, num_stages=5)),
        ("linear", (128, 4096, 1000), "boxes", Config(128, 64, 64, SPLIT=8, num_stages=4)),
        ("linear_dgrad", (128, 9216, 4096), "boxes", WHOLE),
        ("linear_dgrad", (128, 4096, 4096), "pointers", Config(128, 64, 64, SPLIT=2, num_stages=4)),
        ("linear_dgrad", (128, 4096, 1000), "boxes", WHOLE),
        ("linear", (1024, 4096, 4096), "boxes",
         Config(128, 128, 64, num_warps=8, num_stages=4)),
        ("linear_wgrad", (128, 9216, 4096), "pointers", Config(64, 64, 64, num_stages=3)),
        ("linear_wgrad", (128, 4096, 1000), "boxes", Config(64, 64, 64, num_stages=3)),
    ],
)  # fmt: skip
def test_the_rules_are_what_was_measured(op, shape, name, want):
    p = Problem(op, shape, "bf16")
    found = list(variant(op, name).configs(p))
    assert found[0] == want and len(set(found)) == len(found) > 10
    assert all(c.shared_bytes(2) <= SHARED_BYTES for c in found)


def test_the_rules_say_why_boxes_are_left():
    products, wgrad = variant("linear", "boxes"), variant("linear_wgrad", "boxes")
    p = Problem("linear", (128, 4096, 4096), "bf16")
    assert "fill the processors once" in products.suits(p)
    assert products.suits(replace(p, op="linear_dgrad")) is None
    assert (
        products.suits(replace(p, shape=(128, 400, 120))) == "large tiles fill 2 of 132 processors"
    )
    assert "need no masks" in wgrad.suits(replace(p, op="linear_wgrad"))
    assert wgrad.suits(Problem("linear_wgrad", (128, 4096, 1000), "bf16")) is None


# ---- sm_90 -----------------------------------------------------------------------------------


BACKWARD = Problem("linear_dgrad", (128, 4096, 1000), "bf16")


def ptx(launch) -> str:
    path = private_dir("binaries") / f"{key_of(request(launch, 90))}.ptx"
    return path.read_text()


def places(text: str, pattern: str) -> list[int]:
    return [m.start() for m in re.finditer(pattern, text)]


def binaries(eqns, name):
    """(launch, what is known of its binary) of equations by the rule; none spills."""
    made = []
    for e in eqns:
        v = variant(problem(e).op, name)
        made += v.launch(apart(e), v.rule(problem(e)))
    found = [(s, about) for s, (_, about) in zip(made, compile_launches(made)[0], strict=True)]
    assert all(about["spill_bytes"] == 0 for _, about in found), found
    return found


@pytest.mark.parametrize("name", ["pointers", "boxes"])
@pytest.mark.parametrize("outputs", [4096, 1000])
def test_updates_on_sm_90(name, outputs):
    (launch, about), *more = binaries([update(128, 4096, outputs)], name)
    assert not more and about["wgmma"] == 4 and about["registers"] <= 224  # two blocks a processor
    assert (about["tma"] > 0) == (name == "boxes") == (about["cp_async"] == 0)
    text = ptx(launch)
    early = places(text, r"ld\.global[\w.]*\.v4")
    assert sum(at < text.index("wgmma.mma_async") for at in early) >= 16, "weight and momentum"
    stores = places(text, r"st\.global")
    # Weight and momentum by 16 bytes, the copy by 8 or 16; two of the bias.
    assert len(stores) - 2 == len(places(text, r"st\.global[\w.]*\.v[24]")) <= 24


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pointers", "boxes"])
@pytest.mark.parametrize(
    "optimizer", [gn.Adam(lr=1e-3), gn.AdamW(lr=1e-3, amsgrad=True)], ids=["adam", "amsgrad"]
)
def test_wider_updates_on_sm_90(name, optimizer):
    binaries([update(128, 4096, 1000, optimizer=optimizer)], name)


@pytest.mark.parametrize("name", ["pointers", "boxes"])
def test_products_on_sm_90(name):
    """AlexNet's last layer, in parts forward and whole backward, where its dropout is drawn."""
    _, eqns = step(128, 4096, 1000)
    found = binaries([e for e in eqns if problem(e).op != "linear_wgrad"][:1], name)
    _, eqns = step(128, 1024, 4096, 1000)
    found += binaries([e for e in eqns if problem(e) == BACKWARD], name)
    assert [s.kernel for s, _ in found] == ["linear_product", "add_parts", "linear_product"]
    for s, about in found:
        if s.kernel == "linear_product":
            assert about["wgmma"] > 0 and (about["tma"] > 0) == (name == "boxes")
            assert (about["cp_async"] == 0) == (name == "boxes")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pointers", "boxes"])
def test_the_wide_layers_on_sm_90(name):
    _, eqns = step(128, 1024, 9216, 4096)
    binaries([e for e in eqns if 9216 in problem(e).shape and 4096 in problem(e).shape], name)


@pytest.mark.parametrize(
    "precision", ["fp32", pytest.param("tf32", marks=pytest.mark.slow)]
)  # fmt: skip
def test_fp32_and_tf32_on_sm_90(precision):
    _, eqns = step(128, 256, 120, precision=precision)
    binaries([e for e in eqns if 256 in problem(e).shape], "pointers")
