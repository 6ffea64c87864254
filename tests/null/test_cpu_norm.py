"""Batch normalization in C on the cpu target, against the formulas in float64."""

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import graphnet as gn
from graphnet import config, doctor
from graphnet.lowering.build import native
from graphnet.lowering.launch.files import private_dir
from graphnet.lowering.targets import cpu_norm, cpu_over

# [N, C, H, W] or [N, C], and how many rows live: whole blocks of 64 lanes and none, rows of several
# pixels with some left over, several parts.
SHAPES = {
    "one channel": ((3, 1, 5, 7), 3), "few pixels": ((1, 3, 1, 2), 1), "rows": ((4, 16, 8, 8), 4),
    "left over": ((5, 24, 3, 3), 4), "odd": ((3, 97, 5, 5), 2), "two blocks": ((2, 130, 7, 3), 2),
    "vectors": ((33, 10), 33), "wide vectors": ((7, 2100), 5), "parts": ((40, 16, 28, 29), 39),
    "many parts": ((64, 32, 32, 48), 64), "narrow": ((9, 31, 6, 5), 9),
    "mostly dead": ((40, 16, 20, 20), 1), "wide": ((70, 1100), 69),
}  # fmt: skip
EPS, SHARE = 1e-3, 0.3


@pytest.fixture(autouse=True)
def compiler():
    if native.load("batch_norm") is None:
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
    kernel = cpu_norm.bound(native.load("batch_norm"), "forward")
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
    kernel = cpu_norm.bound(native.load("batch_norm"), "backward")
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
    torch.manual_seed(c)
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
        assert apart(a, b.detach()) < 5e-7

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
    monkeypatch.setattr(cpu_norm, "tasks_of", lambda a: made.extend(t := plain(a)) or t)
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


class Crossed(gn.Module):
    """Two normalizations that run twice: what each adds would need the other's statistics first."""

    def __init__(self, swap):
        super().__init__()
        self.a, self.b = gn.Conv2d(3, 8, 3), gn.Conv2d(3, 8, 3)
        self.m, self.k = gn.BatchNorm2d(8), gn.BatchNorm2d(8)
        self.fc = gn.Linear(8, 5)
        self.swap = swap

    def forward(self, x):
        u, v = self.a(x), self.b(x)
        r, t = self.k(u), self.m(v)
        p, q = self.m(u), self.k(v)
        y = torch.relu(r + p if self.swap else p + r) * torch.relu(t + q if self.swap else q + t)
        return self.fc(y.mean((2, 3)))


@pytest.mark.parametrize("swap", [False, True])
def test_no_task_waits_for_another_that_waits_for_it(swap):
    losses = []
    for off in ("", native.NATIVE):
        torch.manual_seed(0)
        how = {"loss": gn.CrossEntropyLoss(), "optimizer": gn.SGD(lr=0.1), "target": "cpu"}
        with config.override(DISABLE=off):
            step = gn.compile(Crossed(swap), (6, 3, 10, 9), **how)
        losses.append([float(step(*batch(6, k))) for k in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_second_backward_finds_what_the_first_one_found():
    """Nothing that the forward pass left is written over."""
    torch.manual_seed(0)
    twin = Net()
    net = gn.as_torch(gn.from_torch(copy.deepcopy(twin)), (6, 3, 10, 9), target="cpu")
    x, y = batch(6, 0)
    x.requires_grad_()
    loss = nn.functional.cross_entropy(net(x), y)
    wanted = [x, *net.parameters()]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, wanted)))
    wide = twin.double()
    far = x.detach().double().requires_grad_()
    loss = nn.functional.cross_entropy(wide(far), y)
    for got, want in zip(first, torch.autograd.grad(loss, [far, *wide.parameters()]), strict=True):
        assert apart(got, want) < 2e-5 or float(want.norm()) < 1e-6


def test_what_a_kernel_cannot_take_is_written_in_place_as_before(monkeypatch):
    """A dilated convolution leaves its image row-major."""
    ran = []
    for op in ("_relu", "_add", "_relu_grad"):
        plain = getattr(cpu_over, op)
        note = lambda args, k, plain=plain, op=op: ran.append(op) or plain(args, k)
        places = cpu_over._OVER[op[1:]][0]
        monkeypatch.setitem(cpu_over._OVER, op[1:], (places, note))
    torch.manual_seed(0)
    net = gn.Sequential(
        gn.Conv2d(3, 8, 3, dilation=2), gn.BatchNorm2d(8), gn.ReLU(), gn.Conv2d(8, 4, 1),
        gn.Flatten(), gn.Linear(120, 5),
    )  # fmt: skip
    how = {"loss": gn.CrossEntropyLoss(), "optimizer": gn.SGD(lr=0.1), "target": "cpu"}
    gn.compile(net, (6, 3, 10, 9), **how)(*batch(6, 0))
    assert ran == ["_relu", "_relu_grad"]


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
    assert native.load("batch_norm") is None
    assert native.why_not("batch_norm") == (
        "CC names no-such-compiler, which is not there: install gcc, or set CC"
    )
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


@pytest.mark.parametrize(
    "cc, why",
    [
        ('"gcc', "CC is no command: No closing quotation"), ("echo", "No such file"),
        ("gcc -static-pie -nonsense", "fails"), ("gcc -fvisibility=hidden -ffast-math", ""),
        ("gcc -fsanitize=address", ""),
    ],
)  # fmt: skip
def test_odd_compilers_break_no_run(cc, why, fresh):
    if cc.startswith("gcc") and not shutil.which("gcc"):
        pytest.skip("no gcc")
    fresh.setenv("CC", cc)
    found = native.why_not("batch_norm")
    assert why in found and bool(why) == bool(found)
    if not why:  # NaN stays what it is
        test_nan_passes_the_relu_and_reaches_the_gradients()


def test_the_openmp_is_torchs_own(fresh, tmp_path):
    import ctypes

    own = native._openmp()
    ctypes.CDLL(shutil.copy(own, tmp_path / Path(own).name))
    assert native._openmp() == own and Path(own).is_relative_to(Path(torch.__file__).parent)


def test_a_folder_that_cannot_be_found_breaks_no_run(fresh):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    fresh.setattr(config, "cache_dir", homeless)
    assert native.why_not("batch_norm") == "Could not determine home directory."


def test_doctor_says_what_runs(fresh):
    assert doctor._compiler()[2] is False and "gcc" in doctor._compiler()[1]
    native._loaded.cache_clear()
    fresh.setenv("CC", "no-such-compiler")
    what, finding, fault = doctor._compiler()
    assert what == "C compiler" and "install gcc, or set CC" in finding
    assert "ResNet-20 takes an eighth more" in fault
    with config.override(DISABLE=native.NATIVE):
        assert doctor._compiler() == (
            "C compiler", "not used: GRAPHNET_DISABLE names native", False
        )  # fmt: skip


def test_a_cache_that_is_not_ours_is_no_fault_of_a_run(fresh, tmp_path):
    (tmp_path / "cache").mkdir()
    os.chmod(tmp_path / "cache", 0o777)
    assert native.load("batch_norm") is None
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
        assert native.load("batch_norm") is None
        assert native.why_not("batch_norm") == "GRAPHNET_DISABLE names native"
