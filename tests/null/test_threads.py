"""Programs that several threads call, of one net and of several."""

import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

import graphnet as gn
from graphnet.lowering.targets import cuda, interpret
from graphnet.lowering.tune.alone import mode
from graphnet.runtime.state import lock_of

THREADS = 4


def together(work, calls):
    """work(k) `calls` times in each thread k, all at once: how often it said False."""
    wrong, errors = [0] * THREADS, []
    start = threading.Barrier(THREADS)

    def body(k):
        try:
            start.wait()
            for _ in range(calls):
                wrong[k] += not work(k)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(k,)) for k in range(THREADS)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors
    return sum(wrong)


def tiny():
    torch.manual_seed(0)
    layers = gn.Conv2d(1, 2, 3), gn.ReLU(), gn.Flatten(), gn.Linear(32, 3)
    return gn.Sequential(*layers)


@pytest.fixture
def batches():
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 1, 6, 6, generator=g), torch.randint(0, 3, (rows,), generator=g))
        for rows in range(1, THREADS + 1)  # smaller batches, too: a thread may not see another's
    ]


@pytest.mark.parametrize("target, calls", [("cpu", 150), ("interpret", 5)])
def test_threads_take_turns_on_a_program(target, calls, batches):
    net, shape, loss = tiny(), (THREADS, 1, 6, 6), gn.CrossEntropyLoss()
    infer = gn.compile(net, shape, target=target)
    evaluate = gn.compile(net, shape, target=target, loss=loss)
    want = [infer(x) for x, _ in batches]
    losses = [evaluate(x, y) for x, y in batches]

    def same(k):
        x, y = batches[k]
        found, logits = evaluate(x, y)
        return torch.equal(infer(x), want[k]) and torch.equal(found, losses[k][0]) \
            and torch.equal(logits, losses[k][1])  # fmt: skip

    assert together(same, calls) == 0


def test_threads_interpret_several_nets_and_compile_meanwhile(batches):
    nets = [tiny() for _ in range(THREADS)]
    programs = [gn.compile(net, (THREADS, 1, 6, 6), target="interpret") for net in nets]
    want = [p(x) for p, (x, _) in zip(programs, batches, strict=True)]

    def same(k):
        again = gn.compile(nets[k], (THREADS, 1, 6, 6), target="interpret")
        x = batches[k][0]
        return torch.equal(programs[k](x), want[k]) and torch.equal(again(x), want[k])

    assert together(same, 2) == 0


def test_steps_of_several_threads_are_all_counted(batches):
    net = tiny()
    how = {"loss": gn.CrossEntropyLoss(), "target": "cpu"}
    step = gn.compile(net, (THREADS, 1, 6, 6), optimizer=gn.SGD(0.0), **how)
    some = gn.compile(net, (THREADS, 1, 6, 6), optimizer=gn.SGD(0.0), accumulate=2, **how)
    want = [step(x, y).clone() for x, y in batches]
    before = step.state.steps

    def same(k):
        x, y = batches[k]
        return torch.equal(step(x, y), want[k]) and torch.equal(some(x, y), want[k])

    assert together(same, 50) == 0
    assert step.state.steps == before + 2 * 50 * THREADS == int(step._storage["step"])
    assert step.state.pending == 0


def test_a_snapshot_is_of_one_moment():
    """Every parameter starts at 0 and has the gradient 1, so that all are equal at all times."""
    net = gn.Sequential(gn.Flatten(), *(gn.Linear(1, 1) for _ in range(3)))
    step = gn.compile(net, (1, 1, 1, 1), loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(1.0),
                      target="cpu")  # fmt: skip
    names = list(net.state_dict())

    def moved(storage=step._storage):
        for name in names:
            storage[name].add_(1)

    step._run = moved
    x, y = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64)
    net.load_state_dict({k: torch.zeros_like(v) for k, v in net.state_dict().items()})

    def whole(k):
        if k % 2:
            step(x, y)
            return True
        return len({float(v) for v in net.state_dict().values()}) == 1

    assert together(whole, 200) == 0


def held(lock):
    """Whether another thread would have to wait for a lock."""
    got = []

    def ask():
        free = lock.acquire(blocking=False)
        if free:
            lock.release()
        got.append(not free)

    other = threading.Thread(target=ask)
    other.start()
    other.join()
    return got[0]


def test_compiling_and_launching_for_a_gpu_exclude_the_interpreter(monkeypatch):
    plan = SimpleNamespace(
        launches=["l"], steps=["l"], types={}, arena_bytes=8, edges=(), streams=(0,),
        storage={}, tables=(), arena={},
        graph=SimpleNamespace(returns=(), input_values=()),
    )  # fmt: skip
    seen = []
    monkeypatch.setattr(cuda, "_pin_tools", lambda: None)
    monkeypatch.setattr(cuda, "_arch", lambda: 90)
    monkeypatch.setattr(cuda, "require", lambda plan: None)
    monkeypatch.setattr(cuda, "compile_launches", lambda *_: ([("key", {})], set()))
    launch = lambda: seen.append(("launched", held(interpret.MODE)))
    monkeypatch.setattr(
        cuda, "_loaded", lambda *_: seen.append(("loaded", held(interpret.MODE))) or launch
    )
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nullcontext())
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    run = cuda.prepare(plan, {"x": torch.zeros(1)}, capture=False)
    run()
    with mode("cuda"):
        seen.append(("alone", held(interpret.MODE)))
    assert seen == [("loaded", True), ("launched", True), ("alone", True)]
    assert not held(interpret.MODE)


def test_steps_are_recorded_once_and_behind_one_another(monkeypatch):
    """On a GPU that says what it is asked for: recording holds the lock, replaying does not."""
    said = []

    class Graph:
        def replay(self):
            said.append(("replayed", self.number, held(interpret.MODE)))

    class Stream:
        def wait_stream(self, other):
            said.append("waits")

    @contextmanager
    def graph(made, stream):
        assert isinstance(stream, Stream)
        made.number = len([s for s in said if s == "recorded"])
        yield
        said.append("recorded")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "device", lambda *_: nullcontext())
    launch = lambda name: lambda: said.append((name, held(interpret.MODE)))
    draw = cuda.Replayed(launch("draw"), torch.device("cuda", 0))
    step = cuda.Replayed(launch("step"), torch.device("cuda", 0))
    both = step.behind(draw, 2)
    assert said == []
    both.record()
    step()
    both()
    step()
    assert said == [
        "waits", *[("draw", True), ("step", True)] * 2, "recorded", "waits",
        "waits", ("step", True), "recorded", "waits", ("replayed", 1, False),
        ("replayed", 0, False), ("replayed", 1, False),
    ]  # fmt: skip


def test_the_locks_are_re_entrant_and_one_for_a_net():
    net, other = tiny(), tiny()
    infer = gn.compile(net, (1, 1, 6, 6), target="cpu")
    step = gn.compile(net, (2, 1, 6, 6), loss=gn.CrossEntropyLoss(), grads=True, target="cpu")
    assert infer.state.lock is step.state.lock is lock_of(net) is not lock_of(other)
    with lock_of(net), interpret.MODE, interpret.interpreted(), interpret.interpreted():
        infer(torch.zeros(1, 1, 6, 6))
        net.state_dict()
        assert held(lock_of(net)) and held(interpret.MODE)
