"""ONNX models as nets of ours, against onnxruntime and against the torch modules they came from."""

import sys

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphnet as gn
from tests.onnx_models import exported, light, model, runtime

SHAPE = (2, 3, 9, 9)


class Net(nn.Module):
    """What exporters write differently: a norm over channels, groups, pads, a flatten, dropout."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, padding=1), nn.ReLU())
        self.norm = nn.LocalResponseNorm(3, alpha=0.5, beta=0.7, k=2.0)
        self.bn = nn.BatchNorm2d(4)  # behind no convolution, which would take it up
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)
        self.fc = nn.Sequential(nn.Dropout(), nn.Linear(24, 5))

    def forward(self, x):
        x = self.bn(F.max_pool2d(self.norm(self.stem(x)), 3, 2, padding=1))
        x = torch.cat([torch.tanh(self.conv(x)), x], 1)
        x = F.avg_pool2d(x, 2, 1)
        return self.fc(F.pad(x[:, :6], (0, 0, 0, 0)).flatten(1))


def net():
    torch.manual_seed(4)
    made = Net()
    made.bn.running_mean.normal_(), made.bn.running_var.uniform_(0.5, 2)
    made.bn.weight.data.normal_()
    return made


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_torch_exports_comes_back(dynamo):
    """Both exporters, the batch open and fixed: keys, outputs and gradients; the norm is one."""
    module = net()
    x, y = torch.randn(5, *SHAPE[1:]), torch.tensor([0, 1, 2, 3, 4])
    ours = gn.from_onnx(exported(module, SHAPE, dynamo, batch=not dynamo))
    assert set(ours.state_dict()) == set(module.state_dict())
    program = gn.compile(ours, x.shape, target="cpu")  # also where the file says 2 rows
    assert sum(e.op == "lrn" for e in program.graph("traced").eqns) == 1
    twin = module.double().eval()
    assert relative(program(x), twin(x.double())) < 1e-5
    run = gn.as_torch(ours, x.shape, target="cpu").eval()
    F.cross_entropy(run(x), y).backward()
    F.cross_entropy(twin(x.double()), y).backward()
    theirs = dict(twin.named_parameters())
    for key, p in run.named_parameters():
        assert relative(p.grad, theirs[key].grad) < 1e-5, key


RNG = np.random.default_rng(0)
W = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)
V = RNG.standard_normal((6, 4)).astype(np.float32)
ONE = np.float32(1.5)
CASES = {
    "auto_pad": ([("Conv", "x w", "y", {"auto_pad": "SAME_LOWER", "strides": [2, 2]})],
                 (2, 3, 8, 8), {"w": W}),
    "asymmetric": ([("MaxPool", "x", "y", {"kernel_shape": [3, 3], "strides": [2, 2],
                                          "pads": [0, 0, 1, 1]})], (2, 3, 8, 8), {}),
    "wide pads": ([("AveragePool", "x", "y", {"kernel_shape": [3, 3], "pads": [2, 2, 2, 2],
                                             "count_include_pad": 1})], (2, 3, 8, 8), {}),
    "gemm": ([("Gemm", "x w b", "y", {"alpha": 0.5, "beta": 2.0})], (2, 6),
             {"w": V, "b": V[:1]}),
    "one weight twice": ([("Gemm", "x w", "a", {"transB": 0}), ("Relu", "a", "h", {}),
                          ("Gemm", "h w", "y", {"transB": 1})], (2, 6), {"w": V}),
    "matmul, add": ([("MatMul", "x w", "a", {}), ("Add", "b a", "y", {})], (2, 6),
                    {"w": V, "b": V[0]}),
    "old softmax": ([("Softmax", "x", "y", {"axis": 1})], (2, 3, 2, 2), {}, 11),
    "softmax of rows": ([("Softmax", "x", "y", {"axis": -1})], (2, 3, 2, 4), {}, 13),
    "old softmax of rows": ([("LogSoftmax", "x", "y", {"axis": 2})], (2, 3, 2, 4), {}, 11),
    "softmax in five axes": ([("Softmax", "x", "y", {"axis": 2})], (2, 3, 4, 2, 2), {}, 13),
    "old clip": ([("Clip", "x", "y", {"min": 0.0, "max": 6.0})], (2, 3, 2, 2), {}, 7),
    "mask unread": ([("Dropout", "x", "y m", {"ratio": 0.5})], (2, 3), {}, 10),
    "folded": ([("Constant", "", "s", {"value": onnx.numpy_helper.from_array(np.array([0, 1, 2]))}),
                ("Add", "s s", "t", {}), ("Sub", "t s", "v", {}), ("Slice", "v lo hi", "k", {}),
                ("Unsqueeze", "c k", "d", {}), ("Mul", "x d", "y", {})], (2, 3, 2, 2),
               {"c": np.float32([1, 2, 3]), "lo": np.array([1]), "hi": np.array([3])}, 13),
    "flatten": ([("Flatten", "x", "y", {"axis": -2})], (2, 1, 3), {}),
    "shapes": ([("Shape", "x", "s", {}), ("Gather", "s i", "n", {}),
                ("Concat", "n m", "t", {"axis": 0}), ("Reshape", "x t", "y", {})], (2, 3, 2, 2),
               {"i": np.array([0]), "m": np.array([-1])}),
    "numbers": ([("Mul", "x a", "b", {}), ("Sub", "a b", "c", {}), ("Div", "c a", "d", {}),
                 ("Pow", "d p", "y", {})], (2, 3), {"a": ONE, "p": np.float32(2)}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_the_importer_reads(name):
    nodes, shape, weights, *opset = CASES[name]
    found = model(nodes, shape, weights, *opset)
    x = torch.randn(shape)
    ours = gn.from_onnx(found.SerializeToString())
    got = gn.compile(ours, shape, target="cpu")(x)
    (want,) = runtime(found, x)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_weights_keep_their_names_and_learn():
    found = model([("Conv", "x block.0.w copy", "y", {}), ("Relu", "y", "z", {})], (2, 3, 4, 4),
                  {"block.0.w": W, "copy": V[0]}, outputs=("z",))  # fmt: skip
    ours = gn.from_onnx(found)
    # `copy` is a method of nets.
    assert list(ours.state_dict()) == ["copy_", "block.0.w"] and ours.input_shape == (3, 4, 4)
    assert ours.block.__dict__["0"].w.trainable
    twice = gn.from_onnx(model(CASES["one weight twice"][0], (2, 6), {"w": V}))
    assert list(twice.state_dict()) == ["w", "w_"]


def test_batch_norm_keeps_its_statistics_under_their_names():
    found = model(
        [("BatchNormalization", "x n.weight n.bias n.running_mean n.running_var", "y",
          {"momentum": 0.8, "epsilon": 1e-3})], (4, 3, 2, 2),
        {"n.weight": np.float32([1, 2, 3]), "n.bias": np.float32([0, 1, 2]),
         "n.running_mean": np.float32([0.1, 0.2, 0.3]), "n.running_var": np.float32([1, 2, 3])},
    )  # fmt: skip
    ours, twin = gn.from_onnx(found), nn.BatchNorm2d(3, 1e-3, 0.2)
    assert list(ours.state_dict()) == [f"n.{k}" for k in twin.state_dict()]
    twin.load_state_dict({k.removeprefix("n."): v for k, v in ours.state_dict().items()})
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(
        gn.compile(ours, x.shape, target="cpu")(x), twin.eval()(x), rtol=1e-5, atol=1e-5
    )
    module = gn.as_torch(ours, x.shape, target="cpu")
    torch.testing.assert_close(module(x), twin.train()(x), rtol=1e-5, atol=1e-5)
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(ours.copy().state_dict()[f"n.{key}"], value)


def test_dropout_drops_in_training():
    ours = gn.from_onnx(model([("Dropout", "x", "d", {"ratio": 0.5}), ("Gemm", "d w", "y", {})],
                              (2, 6), {"w": V}, 11))  # fmt: skip
    step = gn.compile(ours, (2, 6), loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(), target="cpu")
    assert "dropout" in str(step.graph("traced"))


def test_several_outputs_and_a_copy():
    ours = gn.from_onnx(model([("Relu", "x", "a", {}), ("Neg", "x", "b", {})], (2, 3),
                              outputs=("b", "a")))  # fmt: skip
    x = torch.randn(2, 3)
    b, a = gn.compile(ours.copy(), (2, 3), target="cpu")(x)
    assert torch.equal(b, -x) and torch.equal(a, x.relu())


REFUSED = [
    (([("Erf", "x", "a", {}), ("Softsign", "a", "b", {}), ("Erf", "b", "y", {})], (2, 3)),
     ["has 2 parts", "Erf ('a', 'y'): no such operator", "Softsign ('b'): no such"]),
    (([("Resize", "x n s", "y", {})], (2, 3, 4, 4), {"n": V[:0, 0], "s": V[0]}),
     ["Resize ('y'): no such operator; instead: no resampling"]),
    (([("Conv", "x w", "y", {})], (2, 3, 4, 4, 4), {"w": W[..., None]}),
     ["Conv ('y')", "3-D windows", "images are 2-D"]),
    (([("Transpose", "x", "y", {"perm": [0, 2, 3, 1]})], (2, 3, 4, 4)), ["perm [0, 2, 3, 1]"]),
    (([("Flatten", "x", "y", {"axis": 2})], (2, 3, 4)), ["axis 0 is the batch"]),
    (([("Dropout", "x", "y m", {})], (2, 3), (), 11, ("y", "m")), ["its mask is read"]),
    (([("Relu", "x", "y", {})], (2, 3), (), 5), ["opset 5", "convert_version"]),
    (([("Gemm", "x x", "y", {})], (2, 2)), ["its second operand is computed"]),
]  # fmt: skip


@pytest.mark.parametrize("at", range(len(REFUSED)))
def test_what_it_does_not_take_is_named(at):
    given, parts = REFUSED[at]
    with pytest.raises(gn.UnsupportedOpError) as caught:
        gn.from_onnx(model(*given))
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_files_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(gn.DataError, match="does not exist"):
        gn.from_onnx(tmp_path / "no.onnx")
    with pytest.raises(gn.DataError, match="no whole ONNX file"):
        gn.from_onnx(b"\x08nonsense")
    with pytest.raises(gn.DataError, match="not an int"):
        gn.from_onnx(3)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(gn.BackendUnavailableError, match=r"pip install graphnet\[onnx\]"):
        gn.from_onnx("any.onnx")


def test_a_file_on_the_command_line(tmp_path, cli):
    found = model([("Conv", "x w", "c", {}), ("Relu", "c", "y", {})], (1, 3, 6, 6), {"w": W})
    onnx.save(found, tmp_path / "small.onnx")
    code, out, err = cli("inspect", f"{tmp_path}/small.onnx", "--batch", 4, "--stage", "traced")
    assert code == 0 and "%x: f32[4,3,6,6]" in out and "small.onnx" in out, err
    assert cli("inspect", f"{tmp_path}/none.onnx")[0] == 2


@pytest.mark.parametrize("name", [
    "squeezenet",
    *[pytest.param(n, marks=pytest.mark.slow) for n in
      ("inception_v1", "inception_v2", "bvlc_alexnet", "zfnet512", "vgg19",
       "resnet50", "densenet121")],
])  # fmt: skip
def test_the_models_of_the_onnx_package(name):
    """With random weights: with their own, every output is the same number."""
    found = light(name)
    ours = gn.from_onnx(found)
    shape = (1, *ours.input_shape)
    torch.manual_seed(0)
    x = torch.randn(shape)
    made = gn.compile(ours, shape, target="cpu")(x)
    results = made if isinstance(made, tuple) else (made,)
    for got, want in zip(results, runtime(found, x), strict=True):
        assert want.std() > 1e-3 * want.abs().max()
        assert float((got - want).abs().max() / want.abs().max()) < 1e-4
