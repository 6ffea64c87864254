"""Batch normalization in whole nets, against torch in float64; buffers as state of a net."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphnet as gn
from graphnet import config
from graphnet.api import lower
from graphnet.errors import GraphError
from graphnet.ir.op import get_op
from graphnet.ir.text import parse
from graphnet.ir.verify import verify
from graphnet.lowering.build import native
from graphnet.report import inspect_text

SHAPE = (6, 3, 8, 8)


def blocks(lib, small=False):
    """A residual net of two blocks, or of one, of ours or of torch's."""
    wide = 4 if small else 8

    class Block(lib.Module):
        def __init__(self, into, out, stride):
            super().__init__()
            self.conv1 = lib.Conv2d(into, out, 3, stride, 1, bias=False)
            self.bn1 = lib.BatchNorm2d(out)
            self.conv2 = lib.Conv2d(out, out, 3, padding=1, bias=False)
            self.bn2 = lib.BatchNorm2d(out, momentum=None)
            self.down = lib.Sequential(
                lib.Conv2d(into, out, 1, stride, bias=False), lib.BatchNorm2d(out, momentum=0.3)
            )

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return torch.relu(y + self.down(x))

    class Net(lib.Module):
        def __init__(self):
            super().__init__()
            self.stem = lib.Sequential(lib.Conv2d(3, wide, 3, padding=1), lib.BatchNorm2d(wide))
            self.one = None if small else Block(wide, wide, 1)
            self.two = Block(wide, 2 * wide, 2)
            self.fc = lib.Linear(2 * wide, 5)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            x = self.two(x if self.one is None else self.one(x))
            return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))

    return Net()


def pair(small=False):
    torch.manual_seed(3)
    mine = blocks(gn, small)
    theirs = blocks(nn, small).double()
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


def batch(rows, seed, size=8):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, size, size, generator=g) * 2 + 1
    return x, torch.randint(0, 5, (rows,), generator=g)


def off(got, want):
    return float((got.double() - want).norm() / want.double().norm().clamp_min(1e-30))


def compare(mine, theirs, most=1e-5):
    want = theirs.state_dict()
    assert list(mine.state_dict()) == list(want)
    for key, got in mine.state_dict().items():
        if not got.is_floating_point():
            assert got.dtype == torch.int64 and torch.equal(got, want[key]), key
        else:
            assert off(got, want[key]) <= most, (key, off(got, want[key]))


def trained(target, rows=(6, 4, 6), size=8, small=False):
    """Steps on both sides, the second one on fewer rows."""
    mine, theirs = pair(small)
    shape, spec = (max(rows), 3, size, size), gn.SGD(lr=0.05, momentum=0.9)
    step = gn.compile(mine, shape, target=target, loss=gn.CrossEntropyLoss(), optimizer=spec)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.05, 0.9)
    for k, n in enumerate(rows):
        x, y = batch(n, k, size)
        loss = F.cross_entropy(theirs(x.double()), y)
        assert float(step(x, y)) == pytest.approx(float(loss.detach()), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return mine, theirs


@pytest.mark.parametrize("without", ["", native.NATIVE])
def test_three_steps_are_torchs(without):
    with config.override(DISABLE=without):
        mine, theirs = trained("cpu")
    compare(mine, theirs)
    x, y = batch(5, 9)
    theirs.eval()
    want = theirs(x.double()).detach()
    assert off(gn.compile(mine, SHAPE, target="cpu")(x), want) <= 1e-5
    loss, logits = gn.compile(mine, SHAPE, target="cpu", loss=gn.CrossEntropyLoss())(x, y)
    assert off(logits, want) <= 1e-5
    assert float(loss) == pytest.approx(float(F.cross_entropy(want, y)), rel=1e-5)


def test_frozen_statistics_train_the_rest():
    mine, theirs = pair()
    running = {k: v for k, v in mine.state_dict().items() if "running" in k or "num_b" in k}
    for m in mine.modules():
        if isinstance(m, gn.BatchNorm2d):
            m.frozen = True
    for m in theirs.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    x, y = batch(6, 0)
    g = gn.compile(mine, SHAPE, target="cpu", loss=gn.CrossEntropyLoss(), grads=True)
    want = torch.autograd.grad(F.cross_entropy(theirs(x.double()), y), list(theirs.parameters()))
    for (key, got), w in zip(g(x, y)[1].items(), want, strict=True):
        assert off(got, w) <= 2e-5, key
    step = gn.compile(
        mine, SHAPE, target="cpu", loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(lr=0.1)
    )
    step(x, y)
    assert all(torch.equal(mine.state_dict()[k], v) for k, v in running.items())


def test_gradients_alone_commit_nothing():
    mine, theirs = pair()
    before = mine.state_dict()
    x, y = batch(4, 1)
    program = gn.compile(mine, SHAPE, target="cpu", loss=gn.CrossEntropyLoss(), grads=True)
    _, grads = program(x, y)
    want = torch.autograd.grad(F.cross_entropy(theirs(x.double()), y), list(theirs.parameters()))
    for (key, got), w in zip(grads.items(), want, strict=True):
        # A bias before the normalization has no effect, and a gradient of rounding alone.
        assert off(got, w) <= 1e-5 or key == "stem.0.bias" and float(got.abs().max()) < 1e-7, key
    assert all(torch.equal(v, before[k]) for k, v in mine.state_dict().items())


def test_accumulated_steps_commit_at_each_call():
    mine, theirs = pair()
    spec = gn.SGD(lr=0.05)
    step = gn.compile(
        mine, SHAPE, target="cpu", loss=gn.CrossEntropyLoss(), optimizer=spec, accumulate=2
    )
    optimizer = torch.optim.SGD(theirs.parameters(), 0.05)
    total = 0
    for k, n in enumerate((6, 3)):
        x, y = batch(n, k)
        step(x, y)
        (F.cross_entropy(theirs(x.double()), y) * n / 9).backward()
        total += n
        assert int(mine.one.bn1.num_batches_tracked.data) == k + 1
    optimizer.step()
    compare(mine, theirs)


@pytest.mark.parametrize("how", [{}, {"nonfinite": "skip"}])
def test_a_step_that_is_not_finite_commits_no_statistics(how):
    mine, _ = pair()
    step = gn.compile(
        mine, SHAPE, target="cpu", loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(lr=0.1), **how
    )
    before = mine.state_dict()
    x, y = batch(6, 0)
    x[2, 1, 3, 3] = float("nan")
    with contextlib.suppress(gn.NumericsError):
        step(x, y)
    assert all(torch.equal(v, before[k]) for k, v in mine.state_dict().items())


def test_a_run_goes_on_with_the_same_bits():
    """State dict and optimizer state are all that outlives a step."""
    how = dict(target="cpu", loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(lr=0.05, momentum=0.9))
    whole, _ = pair()
    step = gn.compile(whole, SHAPE, **how)
    for k in range(2):
        step(*batch(6, k))
    again = blocks(gn)
    later = gn.compile(again, SHAPE, **how)
    again.load_state_dict(whole.state_dict())
    later.optimizer.load_state_dict(step.optimizer.state_dict())
    for k in range(2, 4):
        assert torch.equal(step(*batch(6, k)), later(*batch(6, k)))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())


def test_buffers_are_loaded_by_their_kind():
    mine, theirs = pair()
    state = theirs.float().state_dict()
    state["stem.1.num_batches_tracked"] = torch.tensor(7)
    mine.load_state_dict(state)
    assert int(mine.stem[1].num_batches_tracked.data) == 7
    state["stem.1.num_batches_tracked"] = torch.tensor(7.5)
    with pytest.raises(gn.StateDictError, match="num_batches_tracked: dtype torch.float32"):
        mine.load_state_dict(state)
    copy = mine.copy()
    copy.stem[1].running_mean.data = torch.ones(8)
    assert not torch.equal(copy.state_dict()["stem.1.running_mean"], state["stem.1.running_mean"])
    assert torch.equal(mine.state_dict()["stem.1.running_mean"], state["stem.1.running_mean"])


def test_one_value_for_a_channel_is_refused():
    net = gn.Sequential(gn.Flatten(), gn.Linear(192, 8), gn.BatchNorm1d(8), gn.Linear(8, 5))
    how = dict(target="cpu", loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(lr=0.1))
    with pytest.raises(gn.ShapeError, match=r"bn1.*more than one value"):
        gn.compile(net, (1, 3, 8, 8), **how)
    step = gn.compile(net, SHAPE, **how)
    with pytest.raises(gn.ShapeError, match="a batch of 1 row"):
        step(*batch(1, 0))
    with pytest.raises(gn.ShapeError, match="a batch of 1 row"):
        step.bind(*batch(13, 0))
    step(*batch(2, 0))
    assert gn.compile(net, SHAPE, target="cpu")(batch(1, 0)[0]).shape == (1, 5)


def test_a_buffer_of_ones_own():
    """A running maximum of the input's scale: read, replaced, read again in one forward."""

    class Scaled(gn.Module):
        def __init__(self):
            self.register_buffer("gain", torch.ones(1))
            self.register_buffer("steps", torch.tensor(3))
            self.fc = gn.Linear(4, 2)

        def forward(self, x):
            self.gain.update(self.gain * 2.0)
            return self.fc(x * self.gain)

    net = Scaled()
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 1])
    plain = F.cross_entropy(F.linear(2 * x, net.fc.weight.data, net.fc.bias.data), y)
    step = gn.compile(
        net, (3, 4), target="cpu", loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(lr=0.0)
    )
    assert float(step(x, y)) == pytest.approx(float(plain))
    step(x, y)
    assert list(net.state_dict()) == ["gain", "steps", "fc.weight", "fc.bias"]
    assert float(net.gain.data) == 4.0 and int(net.steps.data) == 3
    infer = gn.compile(net, (3, 4), target="cpu")
    assert torch.allclose(infer(x), F.linear(4 * x, net.fc.weight.data, net.fc.bias.data))
    with pytest.raises(gn.DTypeError, match="float32 or int64"):
        net.register_buffer("half", torch.ones(1).half())


def test_statistics_must_be_told_the_live_rows():
    graph = """graph g(%x: f32[4,2] data, %n: i32[] {role}) {{
      %0: f32[4,2], %1: f32[2], %2: f32[2] = batch_norm(%x, %n) {{affine=False, track=False}}
      return %0 }}"""
    verify(parse(graph.format(role="hyper")), "joint")
    with pytest.raises(GraphError, match="reduces over the batch: its operand 2 must be %live"):
        verify(parse(graph.format(role="counter")), "joint")


def test_gradients_of_a_normalised_net_hold():
    """A bias in front of a normalization among them, whose gradient is zero but for rounding."""
    torch.manual_seed(0)  # no relu changes its side within the differences
    gn.check_gradients(blocks(gn), (3, 3, 6, 6))


def test_batch_norm_joins_the_convolution_in_inference():
    net = gn.compile(blocks(gn), SHAPE, target="interpret")
    for eqn in net.graph("fused").eqns:
        ops = [e.op for e in eqn.plain]
        behind = [ops[k - 1] for k, op in enumerate(ops) if op == "normalize" and k]
        assert set(behind) <= {"conv2d"} and ops[0] != "normalize"
    assert "normalize" in str(net.graph("fused"))


def test_torchs_modules_come_in_and_go_out():
    """Statistics are copied; a layer left in eval mode is frozen; as_torch's forward commits."""
    _, theirs = pair()
    theirs = theirs.float()
    theirs.one.bn1.eval()
    net = gn.from_torch(theirs)
    assert [m.frozen for m in net.modules() if isinstance(m, gn.BatchNorm2d)].count(True) == 1
    module = gn.as_torch(net, SHAPE, target="cpu")
    assert list(module.state_dict()) == list(theirs.state_dict())
    x, y = batch(5, 2)
    losses = []
    for m in (theirs, module):
        loss = F.cross_entropy(m(x), y)
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (key, p), (_, q) in zip(
        theirs.named_parameters(), module.named_parameters(), strict=True
    ):  # fmt: skip
        assert (p.grad - q.grad).norm() <= 1e-5 * max(float(p.grad.norm()), 1e-2), key
    for (key, b), (_, c) in zip(theirs.named_buffers(), module.named_buffers(), strict=True):
        assert torch.allclose(b, c, rtol=1e-5, atol=1e-6), key
    with torch.no_grad():
        assert torch.allclose(theirs.eval()(x), module.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "mean"), [((128, 16, 32, 32), 0.3), ((3, 24, 13, 7), 3.0), ((5001, 1000), 100.0)]
)
def test_sums_over_many_pixels_stay_exact(shape, mean):
    """Channels innermost, where torch's own variance is 1e-5 off; the last is in several parts."""
    g = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=g) for _ in range(2))
    x += mean
    if x.ndim == 4:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    live = torch.tensor(shape[0] - 1, dtype=torch.int32)
    w, b = torch.randn(2, shape[1], generator=g)
    forward, backward = get_op("batch_norm"), get_op("batch_norm_grad")
    a = forward.attrs_type(track=False)
    exact = [t.double() if t.is_floating_point() else t for t in (dy, x, w, b)]
    y, m, v = forward.cpu(a, x, live, w, b)
    want = forward.reference(a, exact[1], live, *exact[2:])
    assert y.stride() == x.stride()
    assert float(((m - want[1]) / want[2].sqrt()).norm()) < 3e-7 * max(1, mean) * len(m) ** 0.5
    assert off(v, want[2]) < 2e-7 * max(1, mean / 10)
    assert off(y, want[0]) < 2e-7 * max(1, mean)
    attrs = backward.attrs_type()
    got = backward.cpu(attrs, dy, x, m, v, live, w)
    want = backward.reference(attrs, *exact[:2], *want[1:3], live, exact[2])
    assert not got[0][-1].any()
    for one, right in zip(got, want, strict=True):
        assert off(one, right) < 1e-6 * max(1, mean)


def test_gradients_of_pools_lie_as_theirs_do():
    dy = torch.randn(2, 8, 3, 3).contiguous(memory_format=torch.channels_last)[:, 2:6]
    for name, more in (("avgpool2d_grad", {"kernel": (2, 2), "stride": (2, 2)}), ("adaptive", {})):
        op = get_op(name if more else "adaptive_avgpool2d_grad")
        (dx,) = op.cpu(op.attrs_type(input_size=(6, 6), **more), dy)
        assert dx.stride(1) == 1, name


# ---- several ranks ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(7, 5, 4, 3), (7, 4)], ids=["image", "matrix"])
def test_the_parts_of_ranks_are_the_whole(mode, shape):
    """Of ranks with three rows, none and four: one knows nothing, its rows are normalized alike."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)
    x, dy, c = draw(*shape) + 30, draw(*shape), shape[1]
    weight, bias, running = draw(c), draw(c), (draw(c), draw(c).abs(), torch.tensor(4))

    def call(op, *args, **fields):
        return getattr(get_op(op), mode)(get_op(op).attrs_type(**fields), *args)

    rows = torch.tensor(7, dtype=torch.int32)
    y, mean, var, *moved = call("batch_norm", x, rows, weight, bias, *running)
    dx, dweight, dbias = call("batch_norm_grad", dy, x, mean, var, rows, weight)
    parts = [slice(0, 3), slice(3, 3), slice(3, 7)]
    padded = lambda t, p: torch.cat((t[p], torch.zeros(5, *shape[1:], dtype=t.dtype)))[:5]
    live = [torch.tensor(p.stop - p.start, dtype=torch.int32) for p in parts]
    told = [call("batch_norm_stats", padded(x, p), n)[0] for p, n in zip(parts, live, strict=True)]
    found = call("batch_norm_gather_stats", torch.cat(told), *running)
    for got, want in zip(found, (mean, var, *moved), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    sums = [call("batch_norm_grad_reduce", padded(dy, p), padded(x, p), mean, var, n)
            for p, n in zip(parts, live, strict=True)]  # fmt: skip
    p_all, s_all = (sum(part) for part in zip(*sums, strict=True))
    for got, want in ((p_all, dweight), (s_all, dbias)):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    for p, n in zip(parts, live, strict=True):
        own = padded(x, p)
        (part,) = call("batch_norm_elemt", own, mean, var, n, rows, weight, bias)
        torch.testing.assert_close(part[: int(n)], y[p], rtol=1e-11, atol=1e-11)
        (part,) = call("batch_norm_grad_elemt", padded(dy, p), own, mean, var, n, rows, p_all,
                       s_all, weight)  # fmt: skip
        torch.testing.assert_close(part[: int(n)], dx[p], rtol=1e-11, atol=1e-11)
        assert not part[int(n) :].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["reference", "cpu"])
def test_a_batch_without_rows_leaves_the_statistics(mode, dtype):
    """A rank may have none: results are finite, gradients zero, running statistics as they were."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, none = torch.randn(2, 3, 2, 2).to(dtype), torch.tensor(0, dtype=torch.int32)
    w, running = torch.ones(3, dtype=wide), (torch.randn(3), torch.rand(3), torch.tensor(4))
    op = get_op("batch_norm")
    y, mean, var, *moved = getattr(op, mode)(op.attrs_type(), x, none, w, w, *running)
    assert bool(torch.isfinite(y).all()) and not mean.any() and not var.any()
    assert all(torch.equal(a, b) for a, b in zip(moved, running, strict=True))
    op = get_op("batch_norm_grad")
    grads = getattr(op, mode)(op.attrs_type(), x, x, mean.to(wide), var.to(wide), none, w)
    assert all(bool((g == 0).all()) for g in grads)
    if mode == "cpu":
        assert y.dtype == grads[0].dtype == dtype


def test_inspect_says_what_normalization_moves():
    """An element has 2 bytes. Forward: the convolution writes it, one pass reads it and writes the
    result. Backward: two passes read image and gradient, and the second one writes."""
    net = gn.Sequential(gn.Conv2d(64, 64, 3, padding=1, bias=False), gn.BatchNorm2d(64), gn.ReLU(),
                        gn.Flatten(), gn.Linear(64 * 14 * 14, 10))  # fmt: skip
    low = lower(net, (128, 64, 14, 14), target="cuda", precision="bf16",
                loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(lr=0.1))  # fmt: skip
    facts = {"model": "net", "batch": 128, "train": True, "precision": "bf16", "stage": "plan",
             "gpu": "h100"}  # fmt: skip
    (line,) = (k for k in inspect_text(net, low, facts).splitlines() if "an element" in k)
    forward, backward = (float(line.split(way)[1].split()[0]) for way in ("forward", "backward"))
    assert line.startswith("batch normalization, bytes an element")
    assert 6.0 <= forward <= 6.6 and 10.0 <= backward <= 11.0
    plain = lower(net, (128, 64, 14, 14), target="cuda", precision="bf16")
    assert "an element" not in inspect_text(net, plain, {**facts, "train": False})
