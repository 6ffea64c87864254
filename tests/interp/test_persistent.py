"""The training step as one kernel: the bits of its launches, and a barrier that cannot hang."""

import json
import re

import pytest
import torch

import graphnet as gn
from graphnet.api import lower
from graphnet.cli import main
from graphnet.errors import ConfigError, NumericsError
from graphnet.lowering import persistent
from graphnet.lowering.build import build_plan, private_dir
from graphnet.lowering.device import Functions
from graphnet.lowering.persistent import STEPS, SYNC, Take, fold, levels
from graphnet.lowering.plan import make_plan
from graphnet.lowering.targets import interpret
from tests.twin import relative

SHAPE = (4, 1, 8, 8)


def net(activation=gn.ReLU, pool=gn.MaxPool2d):
    torch.manual_seed(0)
    return gn.Sequential(
        gn.Conv2d(1, 4, 3, padding=1), activation(), pool(2), gn.Conv2d(4, 3, 3), activation(),
        gn.Flatten(), gn.Dropout(0.3), gn.Linear(12, 10),
    )  # fmt: skip


def step(one, model=None, **options):
    about = {"seed": 3, "loss": gn.CrossEntropyLoss(), "optimizer": sgd(), **options}
    return gn.compile(model or net(), SHAPE, target="interpret", persistent=one, **about)


def sgd():
    return gn.SGD(0.1, momentum=0.9, weight_decay=1e-3)


def images(n=10, dtype=torch.uint8):
    g = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=g)
    y = torch.randint(0, 10, (n,), generator=g)
    return (x if dtype == torch.uint8 else x.float() / 255), y


def plan(target="interpret", optimizer=None, model=None):
    low = lower(
        model or net(), SHAPE, target=target, loss=gn.CrossEntropyLoss(),
        optimizer=optimizer or sgd(), persistent=True,
    )  # fmt: skip
    return low.plan


def everything(program):
    entries = program.state.entries.values()
    return {e.name: e.tensor.clone() for e in entries} | program.optimizer.state_dict()


def same(a, b):
    left, right = everything(a), everything(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# ---- the same bits ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_run_has_the_bits_of_its_launches(dtype):
    """Two epochs of 4 + 4 + 2 rows, a schedule, single steps in between; dropout by its counter."""
    x, y = images(dtype=dtype)
    programs = [step(one).bind(x, y, seed=5) for one in (False, True)]
    losses = [[p.run(2), p.run(4, lr=[0.2, 0.1, 0.05, 0.02])] for p in programs]
    for p, said in zip(programs, losses, strict=True):
        said += [p(images(3, torch.float32)[0], y[:3]), p.run(1)]
    for a, b in zip(*losses, strict=True):
        assert torch.equal(a, b)
    assert same(*programs) and programs[1].optimizer.lr == 0.02
    assert len(programs[1].plan.launches) == 1
    assert len(programs[1].plan.inner.launches) == len(programs[0].plan.launches)


def test_the_1998_flavour_and_adam():
    x, y = images()
    programs = [
        step(one, net(gn.Tanh, gn.AvgPool2d), optimizer=gn.Adam(lr=1e-2)).bind(x, y)
        for one in (False, True)
    ]
    assert torch.equal(programs[0].run(3), programs[1].run(3)) and same(*programs)


def test_against_torch_in_float64():
    plain = gn.Sequential(gn.Flatten(), gn.Linear(64, 10))
    twin = torch.nn.Linear(64, 10).double()
    twin.load_state_dict({k.removeprefix("1."): v for k, v in plain.state_dict().items()})
    optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    x, y = images(8, torch.float32)
    program = step(True, plain).bind(x, y, shuffle=False)
    losses = program.run(4)
    for k in range(4):
        rows = slice(4 * (k % 2), 4 * (k % 2) + 4)
        loss = torch.nn.functional.cross_entropy(twin(x[rows].double().flatten(1)), y[rows])
        assert float(losses[k]) == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert relative(plain.state_dict()["1.weight"], twin.weight.detach()) < 1e-6


def test_phases_as_launches_of_many_programs():
    """What a GPU does at once: tasks dealt to several programs, phase by phase, over NaN."""
    whole = plan()
    inner = whole.inner
    launch = whole.launches[0]

    def storage():
        g = torch.Generator().manual_seed(2)
        made = {}
        for i in inner.graph.inputs:
            t = i.value.type
            value = torch.rand(t.shape, generator=g) if t.dtype.torch.is_floating_point else (
                torch.full(t.shape, 4 if i.value.name == "live" else 1))  # fmt: skip
            made[i.value.name] = value.to(t.dtype.torch)
        made |= {v.name: torch.zeros(v.type.shape) for v in inner.graph.returns}
        own = {STEPS: torch.ones(1, dtype=torch.int32), SYNC: torch.zeros(2, dtype=torch.int32)}
        return made | own

    def run(steps):
        at = storage()
        arena = torch.full((inner.arena_bytes,), 0xFF, dtype=torch.uint8)
        changed = persistent.replace(
            whole, steps=tuple(steps), streams=(0,) * len(steps), edges=()
        )
        program = interpret.calls(changed, interpret.buffers(changed, at, arena))
        with interpret.interpreted():
            for call in program:
                call()
        return at

    def phase(k, programs):
        constants = {**dict(launch.constants), "PHASE": k, "PROGRAMS": programs}
        return persistent.replace(
            launch, constants=tuple(constants.items()), grid=(programs, 1, 1)
        )

    want = run([*inner.steps])
    for programs in (1, 3):
        got = run([phase(k, programs) for k in range(launch.phases)])
        assert all(torch.equal(got[k], want[k]) for k in want), programs


def test_levels_keep_every_dependency():
    inner = plan().inner
    at = {k: n for n, group in enumerate(levels(inner)) for k in group}
    assert len(at) == len(inner.steps) and all(at[a] < at[b] for a, b in inner.edges)
    assert any(len(group) > 1 for group in levels(inner))


# ---- a barrier that cannot hang --------------------------------------------------------------


def test_a_program_that_never_comes_ends_the_run_with_its_barrier(monkeypatch):
    monkeypatch.setattr(persistent, "LIMIT", 3)
    whole = plan()
    launch = whole.launches[0]
    constants = tuple({**dict(launch.constants), "PROGRAMS": 2}.items())  # but one is launched
    lost = persistent.replace(launch, constants=constants)
    broken = persistent.replace(whole, steps=(whole.steps[0], lost))
    monkeypatch.setattr("graphnet.api._folded", lambda plan, optimizer, accumulate: broken)
    program = step(True)
    program(*images(4, torch.float32))
    with pytest.raises(NumericsError, match="lost each other at barrier 1 "):
        program(*images(4, torch.float32))
    assert torch.isnan(program._storage["ring"]).all()


def test_the_block_waits_before_its_release_and_behind_the_acquire():
    """Triton puts no barrier there by itself: without it, one thread's release would cover
    stores of others that have not happened."""
    whole = fold(plan("cuda").inner, take=Take("u8", 100))
    (row,) = build_plan(whole).rows
    ptx = (private_dir("binaries") / f"{row.binary}.ptx").read_text()
    entry = ptx[ptx.index(".entry persistent") :].splitlines()
    code = [s for line in entry if (s := line.strip()) and not s.startswith((".", "//", "$"))]
    releases = [k for k, line in enumerate(code) if re.search(r"atom\.\S*release\S*add", line)]
    assert len(releases) == whole.launches[0].phases
    for k in releases:
        before = next(c for c in code[k - 1 :: -1] if re.match(r"bar\.sync|st\.|@.*st\.|call", c))
        assert before.startswith("bar.sync"), before
    acquires = [k for k, line in enumerate(code) if "acquire" in line]
    assert len(acquires) >= len(releases)
    assert row.spill_bytes == 0 and row.shared_bytes <= 232448 and row.float_atomics == 0
    assert "ld.global.nc" not in ptx  # a cache that no barrier makes coherent


# ---- refusals, reports -----------------------------------------------------------------------


def test_what_cannot_be_one_kernel_says_why():
    with pytest.raises(ConfigError, match="without an optimizer"):
        gn.compile(net(), SHAPE, target="interpret", persistent=True)
    with pytest.raises(ConfigError, match="on the cpu target"):
        gn.compile(net(), SHAPE, target="cpu", loss=gn.CrossEntropyLoss(), optimizer=sgd(),
                   persistent=True)  # fmt: skip
    big = {"loss": gn.CrossEntropyLoss(), "optimizer": sgd(), "persistent": True}
    with pytest.raises(ConfigError, match="us at the least .* is not what it waits for"):
        lower(gn.models.alexnet(), (128, 3, 227, 227), target="cuda", **big)
    program = step(True)
    with pytest.raises(ConfigError, match="run without data"):
        program.run(1)
    program.bind(*images())
    with pytest.raises(ConfigError, match="2 learning rates for 3 steps"):
        program.run(3, lr=[0.1, 0.1])


def test_a_template_told_its_ids_asks_for_none():
    functions = Functions()
    functions.need("elementwise", "elementwise")  # asks through a helper
    functions.need("loss", "cross_entropy")
    text = functions.text()
    assert "program_id" not in text and "elements(pid0, pid1, pid2, TOTAL, 0, BLOCK)" in text
    assert text.index("def _finish(pid0") < text.index("def cross_entropy(pid0")


def test_inspect_shows_one_row(capsys):
    with pytest.raises(SystemExit) as end:
        main(["inspect", "lenet5", "--train", "--persistent", "--json"])
    assert end.value.code == 0
    data = json.loads(capsys.readouterr().out)
    (row,) = data["kernels"]
    assert row["name"] == "persistent" and {"conv1", "fc3"} <= set(row["layers"])
    sums = lower(
        gn.models.lenet5(), (128, 1, 28, 28), target="cuda", loss=gn.CrossEntropyLoss(),
        optimizer=gn.SGD(lr=0.01, momentum=0.9, weight_decay=5e-4),
    ).plan  # fmt: skip
    assert row["flops"] == sum(s.flops for s in sums.launches)
    assert make_plan(sums.graph, "cuda", parallel=True).arena_bytes >= sums.arena_bytes
