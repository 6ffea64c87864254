"""Batch normalization in C on the cpu target, against the formulas in float64."""

import copy
import os

import pytest
import torch
from torch import nn

import graphnet as gn
from graphnet import config
from graphnet.lowering.build import native
from graphnet.lowering.launch.files import private_dir
from graphnet.lowering.targets import cpu_norm

# [N, C, H, W] or [N, C], and how many rows live: whole blocks of 64 lanes and none, rows of several
# pixels with some left over, several parts.
SHAPES = {
    "one channel": ((3, 1, 5, 7), 3), "few pixels": ((1, 3, 1, 2), 1), "rows": ((4, 16, 8, 8), 4),
    "left over": ((5, 24, 3, 3), 4), "odd": ((3, 97, 5, 5), 2), "two blocks": ((2, 130, 7, 3), 2),
    "vectors": ((33, 10), 33), "wide vectors": ((7, 2100), 5), "parts": ((40, 16, 28, 29), 39),
    "many parts": ((64, 32, 32, 48), 64), "narrow": ((9, 31, 6, 5), 9),
}  # fmt: skip
EPS, SHARE = 1e-3, 0.3


@pytest.fixture(autouse=True)
def compiler():
    if native.library("batch_norm") is None:
        pytest.skip(native.why_not("batch_norm"))


def rows(t):
    """[pixels, channels] in memory, whatever the image's shape."""
    return t if t.ndim == 2 else t.contiguous(memory_format=torch.channels_last)


def blank(like):
    return torch.full_like(like, float("nan"))


def drawn(shape, seed=0, mean=0.0):
    g = torch.Generator().manual_seed(seed)
    return [rows(torch.randn(shape, generator=g) + mean) for _ in range(4)]


def sizes(shape, live):
    pixels = torch.Size(shape).numel() // shape[1]
    return shape[1], pixels, pixels // shape[0] * live


def forward(x, live, weight, bias, residual, relu, threads=1, y=None):
    """(y, mean, var, new running mean, new running variance)"""
    c = x.shape[1]
    y = blank(x) if y is None else y
    mean, var, new_mean, new_var = blank(torch.empty(4, c)).unbind()
    old = torch.linspace(-1, 1, c), torch.linspace(1, 2, c)
    kernel = cpu_norm._bound(native.library("batch_norm"), "forward")
    kernel(
        *sizes(x.shape, live), x, weight, bias, EPS, residual, relu, y, mean, var, *old, SHARE,
        new_mean, new_var, threads,
    )  # fmt: skip
    return y, mean, var, new_mean, new_var


def backward(dy, more, y, x, live, mean, var, weight, threads=1, g=None, dx=None):
    """(g, dx, dweight, dbias)"""
    dweight, dbias = blank(torch.empty(2, x.shape[1])).unbind()
    new = more is not None or y is not None
    g = blank(x) if g is None and new else g
    dx = blank(x) if dx is None else dx
    kernel = cpu_norm._bound(native.library("batch_norm"), "backward")
    kernel(
        *sizes(x.shape, live), dy, more, y, x, mean, var, EPS, weight, g, dx, dweight, dbias,
        threads,
    )  # fmt: skip
    return g if new else dy, dx, dweight, dbias


def apart(got, want):
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("behind", ["", "add", "relu", "add relu"])
@pytest.mark.parametrize("name", SHAPES)
def test_both_kernels(name, behind, affine):
    shape, live = SHAPES[name]
    x, residual, dy, more = drawn(shape, mean=3.0)
    c = shape[1]
    weight, bias = (torch.randn(c), torch.randn(c)) if affine else (None, None)
    res = residual if "add" in behind else None
    got = forward(x, live, weight, bias, res, "relu" in behind)

    wide = x.double().requires_grad_()
    over = lambda v: v.view(1, -1, *[1] * (len(shape) - 2))
    axes = [d for d in range(len(shape)) if d != 1]
    mean = wide[:live].mean(axes)
    var = wide[:live].var(axes, correction=0)
    scale = torch.ones(c).double() if weight is None else weight.double()
    shift = torch.zeros(c).double() if bias is None else bias.double()
    scale.requires_grad_(), shift.requires_grad_()
    z = (wide - over(mean)) / (over(var) + EPS).sqrt() * over(scale) + over(shift)
    z = z if res is None else z + res.double()
    y = z.relu() if "relu" in behind else z
    count = sizes(shape, live)[2]
    old = torch.linspace(-1, 1, c), torch.linspace(1, 2, c)
    new_mean = old[0] + SHARE * (mean - old[0])
    new_var = old[1] + SHARE * (var * count / (count - 1) - old[1])
    for a, b in zip(got, (y, mean, var, new_mean, new_var), strict=True):
        assert apart(a, b.detach()) < 3e-7

    # Behind the relu stand one term or two. The mask is that of our y: one pass over zero differs.
    two = more if "add" in behind else None
    mask = got[0] if "relu" in behind else None
    total = dy.double() if two is None else dy.double() + two.double()
    total = total if mask is None else total * (mask > 0)
    alive = torch.zeros(shape[0], *[1] * (len(shape) - 1)).double()
    alive[:live] = 1
    z = (wide - over(mean)) / (over(var) + EPS).sqrt() * over(scale) + over(shift)
    want = torch.autograd.grad(z, (wide, scale, shift), total * alive)
    g, dx, dweight, dbias = backward(dy, two, mask, x, live, *got[1:3], weight)
    assert apart(g, total) < 1e-7
    # Against the sums of magnitudes: what is left of two pixels is nearly nothing.
    total, rstd = (total * alive).abs(), 1 / (over(var) + EPS).sqrt().detach()
    xhat = ((wide.detach() - over(mean.detach())) * rstd).abs()
    sizes_of = total * rstd * over(scale.detach()).abs(), (total * xhat).sum(axes), total.sum(axes)
    for a, b, size in zip((dx, dweight, dbias), want, sizes_of, strict=True):
        assert float((a - b).norm()) < 3e-7 * float(size.norm())
    assert not dx[live:].any()


@pytest.mark.parametrize("name", ["parts", "odd", "many parts"])
def test_bits_depend_neither_on_threads_nor_on_what_is_written_over(name):
    shape, live = SHAPES[name]
    x, residual, dy, more = drawn(shape)
    weight, bias = torch.randn(2, shape[1]).unbind()
    plain = forward(x, live, weight, bias, residual, True)
    for threads in (2, 3, 7):
        again = forward(x, live, weight, bias, residual, True, threads)
        assert all(map(torch.equal, again, plain))
    assert torch.equal(
        forward(x, live, weight, bias, r := residual.clone(), True, y=r)[0], plain[0]
    )
    y, mean, var, *_ = plain
    want = backward(dy, more, y, x, live, mean, var, weight)
    for threads in (2, 5):
        again = backward(dy, more, y, x, live, mean, var, weight, threads)
        assert all(map(torch.equal, again, want))
    a = dy.clone()
    for g, dx in ((a, a), (a, None), (None, x.clone())):
        a.copy_(dy)
        image = x if dx is None or dx is a else dx
        again = backward(a, more, y, image, live, mean, var, weight, 2, g, dx)
        assert all(map(torch.equal, again[1:], want[1:]))


@pytest.mark.parametrize("mean, most", [(1.0, 1e-7), (100.0, 1e-7), (1e4, 3e-7), (1e5, 3e-7)])
def test_the_variance_of_a_large_mean(mean, most):
    x = drawn((128, 16, 16, 16), mean=mean)[0]
    got = forward(x, 128, None, None, None, False)[2]
    want = x.double().var((0, 2, 3), correction=0)
    assert float((got / want - 1).abs().max()) < most
    assert not forward(torch.full_like(x, mean), 128, None, None, None, False)[2].any()


def test_nan_passes_the_relu_and_reaches_the_gradients():
    x, _, dy, _ = drawn((4, 16, 4, 4))
    x[1, 3, 2, 2] = float("nan")
    y, mean, var, *_ = forward(x, 4, None, None, None, True)
    assert y[:, 3].isnan().all() and not y[:, :3].isnan().any()
    g, dx, dweight, _ = backward(dy, None, y, x, 4, mean, var, None)
    assert torch.equal(g[:, 3], dy[:, 3])  # as torch's threshold_backward
    assert dx[:, 3].isnan().all() and not dx[:, 4:].isnan().any() and dweight[3].isnan()


# ---- in nets ------------------------------------------------------------------------------------


class Net(nn.Module):
    """Residuals, a cotangent that two layers read, and an image as it came."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3)  # its image lies row-major: by the op's twin
        self.one, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.two, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None)
        self.down, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False)
        self.bn4 = nn.BatchNorm2d(8, track_running_stats=False)
        self.fc, self.bn5 = nn.Linear(8, 6), nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.one(torch.relu(self.first(x)))))
        y = torch.relu(self.bn2(self.two(x)) + self.bn3(self.down(x)))
        y = torch.relu(y + self.bn4(y))
        y = self.bn4(y) * y  # behind it no relu
        return self.out(torch.relu(self.bn5(self.fc(y.mean((2, 3))))))


def trained(twin, off=""):
    """A net after three steps, the second one on fewer rows."""
    net = gn.from_torch(twin)
    spec = gn.SGD(lr=0.05, momentum=0.9)
    with config.override(DISABLE=off):
        how = {"target": "cpu", "precision": "fp32", "loss": gn.CrossEntropyLoss()}
        step = gn.compile(net, (6, 3, 10, 9), optimizer=spec, **how)
        for k, n in enumerate((6, 4, 6)):
            step(*batch(n, k))
    return net.state_dict()


def batch(n, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 10, 9, generator=g), torch.randint(0, 5, (n,), generator=g)


def test_steps_of_a_net_are_torchs(monkeypatch):
    made = []
    plain = cpu_norm.tasks_of
    monkeypatch.setattr(cpu_norm, "tasks_of", lambda *a: made.extend(t := plain(*a)) or t)
    torch.manual_seed(0)
    twin = Net()
    wide = copy.deepcopy(twin).double()
    got, other = trained(twin), trained(twin, native.NATIVE)
    ops = sorted("+".join(e.op for e in t.eqns) for t in made)
    # bn2 takes bn3's result along, as they are added; the gradient of their relu goes to both.
    assert ops == sorted([
        *["batch_norm+relu"] * 3, *["batch_norm+add+relu"] * 2, *["batch_norm"] * 2,
        *["relu_grad+batch_norm_grad"] * 2, *["add+relu_grad+batch_norm_grad"] * 3,
        *["batch_norm_grad"] * 2,
    ])  # fmt: skip
    optimizer = torch.optim.SGD(wide.parameters(), 0.05, 0.9)
    for k, n in enumerate((6, 4, 6)):
        x, y = batch(n, k)
        optimizer.zero_grad()
        nn.functional.cross_entropy(wide(x.double()), y).backward()
        optimizer.step()
    for key, want in wide.state_dict().items():
        assert apart(got[key], want.double()) < 1e-5, key
        assert apart(other[key], want.double()) < 1e-5, key


# ---- the compiler ------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A cache of its own, and a process that has loaded nothing."""
    monkeypatch.setenv("GRAPHNET_CACHE_DIR", str(tmp_path / "cache"))
    native._loaded.cache_clear()
    yield monkeypatch
    native._loaded.cache_clear()


def test_without_a_compiler_torch_runs(fresh, tmp_path):
    fresh.setenv("CC", "no-such-compiler")
    assert native.library("batch_norm") is None
    assert native.why_not("batch_norm") == "CC names no-such-compiler, which is not there"
    native._loaded.cache_clear()
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit\necho out of order >&2\nexit 1\n")
    broken.chmod(0o700)
    fresh.setenv("CC", str(broken))
    assert native.why_not("batch_norm") == f"{broken} fails: out of order"
    torch.manual_seed(0)
    twin = Net()
    without = trained(twin)
    native._loaded.cache_clear()
    fresh.delenv("CC")
    assert native.why_not("batch_norm") == ""
    with_it = trained(twin)
    assert max(apart(v, with_it[k].double()) for k, v in without.items()) < 1e-5


def test_a_cache_that_is_not_ours_is_no_fault_of_a_run(fresh, tmp_path):
    (tmp_path / "cache").mkdir()
    os.chmod(tmp_path / "cache", 0o777)
    assert native.library("batch_norm") is None
    assert "others can write to the cache" in native.why_not("batch_norm")


def test_a_library_is_compiled_once_and_again_where_it_is_damaged(fresh):
    ran, plain = [], native._output
    fresh.setattr(native, "_output", lambda c: ran.append(c) or plain(c))
    compiled = lambda: sum("-c" in c for c in ran)
    again = lambda: native._compiled("batch_norm", native._compiler(), "1.0")
    path = again()
    assert path.parent == private_dir("native") and compiled() == 1
    assert again() == path and compiled() == 1
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"!")
    assert again() == path and compiled() == 2
    assert path.read_bytes()[-1:] != b"!"


def test_the_switch():
    with config.override(DISABLE=native.NATIVE):
        assert native.library("batch_norm") is None
        assert native.why_not("batch_norm") == "GRAPHNET_DISABLE names native"
