"""Nets as ONNX files: what onnxruntime computes of them, and what comes back."""

import itertools

import onnx
import pytest
import torch

import graphnet as gn
from tests.onnx_models import runtime

SLOW = [n for n in gn.models.MODELS if n not in ("lenet5", "caffe_lenet")]


def statistics(net):
    """Running statistics as after training, in the place of zeros and ones."""
    for key, b in net.named_buffers():
        if b.data.is_floating_point():
            b.data = torch.rand(b.shape) - 0.5 + key.endswith("running_var")
    return net


def lines(net, shape):
    """The inference graph without names, and without pools that keep every pixel."""
    number, out, count = {}, [], itertools.count()
    graph = gn.trace(net, shape)
    for i in graph.inputs:
        number[i.value] = i.value.name
    for e in graph.eqns:
        if e.op == "adaptive_avgpool2d" and e.out.type == e.inputs[0].type:
            number[e.out] = number[e.inputs[0]]
            continue
        number.update({v: next(count) for v in e.results})
        out.append((e.op, str(e.attrs), [number[v] for v in e.inputs]))
    return out


def agree(net, shape, path=None):
    """(the file's model, the net that comes back), once both compute what the net does."""
    x = torch.randn(shape)
    found = gn.to_onnx(net, path, shape)
    want = gn.compile(net, shape, target="cpu")(x)
    back = gn.from_onnx(found if path is None else path)
    got = gn.compile(back, shape, target="cpu")(x)
    for y in (*runtime(found, x), got):
        assert float((y - want).abs().max() / want.abs().max()) < 1e-4
    return found, back


@pytest.mark.parametrize("name", [
    "lenet5", "caffe_lenet", *[pytest.param(n, marks=pytest.mark.slow) for n in SLOW]
])  # fmt: skip
def test_the_zoo_goes_out_and_comes_back(name):
    torch.manual_seed(0)
    net = statistics(gn.models.get(name))
    shape = (2, *net.input_shape)
    _, back = agree(net, shape)
    if name != "alexnet_2012":  # the paper's sum over channels comes back as a mean
        assert lines(back, shape) == lines(net, shape)


class Everything(gn.Module):
    """Every op that has an operator, on small images."""

    def __init__(self):
        self.conv = gn.Conv2d(3, 6, 3, stride=2, padding=(1, 2), groups=3, bias=False)
        self.bn = gn.BatchNorm2d(6, eps=1e-3, momentum=0.2)
        self.plain = gn.BatchNorm2d(6, affine=False)
        self.norm = gn.LocalResponseNorm(3, 0.2, alpha_mode="sum")
        self.scale = gn.Parameter(torch.randn(6, 1, 1))
        self.drop = gn.Dropout(0.25, mode="vanilla")
        self.fc = gn.Linear(72, 4, bias=False)

    def forward(self, x):
        y = self.norm(self.plain(gn.relu6(self.bn(self.conv(x)))))
        y = gn.cat([y[:, :3] * 2.0 - gn.tanh(y[:, 3:]), gn.silu(y[:, :3]) / 3], 1) * self.scale
        y = gn.hardswish(gn.leaky_relu(y, 0.2)) + gn.gelu(y) + gn.sigmoid(-y)
        y = gn.pad(gn.softmax(y, 1) + gn.log_softmax(y, -1), (1, 0, 0, 1))
        y = gn.MaxPool2d(2, ceil_mode=True).forward(y) - gn.AvgPool2d(2, ceil_mode=True).forward(y)
        return self.fc(self.drop(y.flatten(1))), y.mean((2, 3))


def test_every_op_that_has_an_operator():
    torch.manual_seed(0)
    net, shape = statistics(Everything()), (2, 3, 9, 9)
    x = torch.randn(shape)
    found = gn.to_onnx(net, None, shape)
    assert found.opset_import[0].version == 20 and "20" in gn.to_onnx.__doc__
    ops = [n.op_type for n in found.graph.node]
    assert ops.count("LRN") == 1 and ops.count("BatchNormalization") == 2
    norm = next(n for n in found.graph.node if n.op_type == "BatchNormalization")
    assert onnx.helper.get_node_attr_value(norm, "momentum") == pytest.approx(0.8)
    assert list(norm.input[1:]) == [
        "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"
    ]  # fmt: skip
    weights = {i.name for i in found.graph.initializer}
    read = {k for k in net.state_dict() if not k.endswith("num_batches_tracked")}
    assert read <= weights and "conv" in {n.name for n in found.graph.node}
    for program, given in ((gn.from_onnx(found), found), (net, found)):
        got = gn.compile(program, shape, target="cpu")(x)
        for a, b in zip(got, runtime(given, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_batch_stays_open_and_the_file_whole(tmp_path):
    net = gn.Sequential(gn.Conv2d(1, 2, 3), gn.Flatten(), gn.Linear(18, 3))
    found, back = agree(net, (4, 1, 5, 5), tmp_path / "net.onnx")
    assert back.input_shape == (1, 5, 5) and [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    x = torch.randn(7, 1, 5, 5)
    assert runtime(found, x)[0].shape == (7, 3)
    assert list(back.state_dict()) == list(net.state_dict())
    with pytest.raises(gn.GraphnetError, match="nowhere"):
        gn.to_onnx(net, tmp_path / "nowhere" / "net.onnx", (4, 1, 5, 5))


@pytest.mark.parametrize(("layer", "why"), [
    (gn.LocalResponseNorm(4), "even number of channels"),
    (gn.AdaptiveAvgPool2d(3), "windows of several sizes"),
])  # fmt: skip
def test_what_onnx_has_no_operator_for(layer, why):
    with pytest.raises(gn.UnsupportedOpError, match=why):
        gn.to_onnx(gn.Sequential(layer), None, (1, 4, 8, 8))
