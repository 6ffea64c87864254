"""The DSL: torch's keys and weights, names, places, sharing, and errors that help."""

import pytest
import torch

import graphnet as gn
from graphnet.ir.text import parse
from graphnet.ir.verify import verify


class Residual(gn.Module):
    def __init__(self, channels):
        self.conv = gn.Conv2d(channels, channels, 3, padding=1)
        self.scale = gn.Parameter(torch.ones(()))

    def forward(self, x):
        return gn.relu(self.conv(x) * self.scale + x)


class Fancy(gn.Module):
    def __init__(self):
        self.block = Residual(4)
        self.drop = gn.Dropout(0.25, name="mask")
        self.fc = gn.Linear(4 * 8 * 8, 3)

    def forward(self, x):
        x = gn.cat([x[:, 0:2], gn.tanh(x[:, 2:])], dim=1)
        x = self.block(self.block(x))
        return self.fc(self.drop(x.flatten(1)))


def twin():
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def test_same_seed_gives_the_weights_of_the_torch_twin():
    torch.manual_seed(3)
    mine = gn.models.lenet5().state_dict()
    torch.manual_seed(3)
    theirs = twin().state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_state_dicts_interchange_both_ways():
    net, other = gn.models.lenet5(), twin()
    net.load_state_dict(other.state_dict())
    other.load_state_dict(gn.models.lenet5().state_dict())
    assert torch.equal(net[0].weight.data, net.state_dict()["0.weight"])


def test_load_lists_every_problem_and_changes_nothing():
    net = gn.models.lenet5()
    state = net.state_dict()
    before = state["0.weight"].clone()
    del state["3.bias"]
    state |= {"extra": torch.ones(1), "7.bias": torch.ones(5), "0.weight": before + 1}
    with pytest.raises(gn.StateDictError) as caught:
        net.load_state_dict(state)
    for part in ("missing 3.bias", "unexpected extra", "7.bias: the net has [120], the dict [5]"):
        assert part in str(caught.value)
    assert torch.equal(net[0].weight.data, before)
    state["7.bias"] = torch.zeros(120)
    left = net.load_state_dict(state, strict=False)
    assert left == (["3.bias"], ["extra"])


def test_traced_graph_prints_parses_and_verifies():
    graph = gn.trace(Fancy(), (2, 4, 8, 8), loss=gn.CrossEntropyLoss(), training=True)
    assert parse(str(verify(graph, "traced"))) == graph
    names = [i.value.name for i in graph.inputs]
    assert names == [
        "x", "block.scale", "block.conv.weight", "block.conv.bias", "fc.weight", "fc.bias",
        "labels", "live", "seed", "step",
    ]  # fmt: skip


def test_names_places_and_sharing():
    graph = gn.trace(Fancy(), (2, 4, 8, 8), loss=gn.CrossEntropyLoss(), training=True)
    convs = [e for e in graph.eqns if e.op == "conv2d"]
    assert [e.where.layers for e in convs] == [("conv1",), ("conv1",)]
    assert convs[0].inputs[1] == convs[1].inputs[1]  # one parameter, two uses
    assert convs[0].where.place.startswith("test_dsl.py:")
    relus = [e.where.layers[0] for e in graph.eqns if e.op == "relu"]
    assert relus == ["relu1", "relu2"]
    assert [e.where.layers for e in graph.eqns if e.op == "dropout"] == [("mask",)]
    lenet = gn.trace(gn.models.lenet5(), (1, 1, 28, 28))
    assert lenet.eqns[0].where.place.startswith("lenet.py:")


def test_dropout_is_off_in_inference_and_vanilla_scales():
    net = gn.Sequential(gn.Dropout(0.5), gn.Dropout(0.5, mode="vanilla"))
    ops = [e.attrs.mode for e in gn.trace(net, (2, 3)).eqns]
    assert ops == ["vanilla"]


def test_graph_values_match_torch():
    from graphnet.ops.evaluate import evaluate

    torch.manual_seed(0)
    net = Fancy()
    w = net.state_dict()
    x = torch.randn(2, 4, 8, 8)
    got = evaluate(gn.trace(net, (2, 4, 8, 8)), {"x": x, **w})[0]
    h = torch.cat([x[:, :2], x[:, 2:].tanh()], 1)
    for _ in range(2):
        c = torch.conv2d(h, w["block.conv.weight"], w["block.conv.bias"], padding=1)
        h = (c * w["block.scale"] + h).relu()
    want = torch.nn.functional.linear(h.flatten(1), w["fc.weight"], w["fc.bias"])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_vanishing_size_shows_the_chain_and_the_hint():
    net = gn.Sequential(
        gn.Conv2d(3, 8, 11, stride=4), gn.MaxPool2d(3, 2), gn.MaxPool2d(3, 2), gn.MaxPool2d(3, 2)
    )
    with pytest.raises(gn.ShapeError) as caught:
        gn.trace(net, (1, 3, 32, 32))
    text = str(caught.value)
    assert "layer 'pool2'" in text or "layer 'pool1'" in text
    assert "input 3x32x32 -> conv1 8x6x6" in text
    assert "227" in text and "224" in text and "test_dsl.py:" in text


def test_mismatched_linear_names_layer_and_chain():
    net = gn.Sequential(gn.Conv2d(3, 8, 3), gn.Flatten(), gn.Linear(10, 2, name="head"))
    with pytest.raises(gn.ShapeError, match="head") as caught:
        gn.trace(net, (1, 3, 8, 8))
    assert "conv1 8x6x6 -> flatten1 288" in str(caught.value)


def test_summary():
    table = gn.models.lenet5().summary()
    assert table.params == 61706 and table.macs == 416520
    assert gn.models.caffe_lenet().summary().params == 431080
    text = str(table)
    assert "conv1" in text and "61,706 parameters" in text and "117,600" in text
    with pytest.raises(gn.ConfigError, match="input shape"):
        Fancy().summary()


def test_lenet_flavours_and_registry():
    net = gn.models.lenet5(activation="tanh", pool="avg")
    ops = [e.op for e in gn.trace(net, (1, 1, 28, 28)).eqns]
    assert ops.count("tanh") == 4 and ops.count("avgpool2d") == 2
    with pytest.raises(gn.ConfigError, match="caffenet, googlenet, lenet5"):
        gn.models.get("vgg")


def test_copy_is_independent():
    net = gn.models.lenet5()
    other = net.copy()
    other[0].weight.data = torch.zeros(6, 1, 5, 5)
    assert net[0].weight.data.abs().sum() > 0
    assert other.input_shape == net.input_shape
    assert list(other.state_dict()) == list(net.state_dict())


def test_misuse_is_told():
    class Loose(gn.Module):
        def __init__(self):
            self.layers = [gn.Linear(3, 3)]

        def forward(self, x):
            return self.layers[0](x)

    class Branch(gn.Module):
        def forward(self, x):
            return x if x else x + 1

    with pytest.raises(gn.ConfigError, match="Sequential"):
        gn.trace(Loose(), (1, 3))
    with pytest.raises(gn.UnsupportedOpError, match="branch"):
        gn.trace(Branch(), (1, 3))
    with pytest.raises(gn.ConfigError, match="outside a trace"):
        gn.ReLU()(torch.ones(1))
    with pytest.raises(gn.ConfigError, match="two layers are named"):
        gn.trace(gn.Sequential(gn.ReLU(name="a"), gn.ReLU(name="a")), (1, 3))
    with pytest.raises(gn.ConfigError, match="modules"):
        gn.Sequential(torch.nn.ReLU())
    with pytest.raises(gn.ConfigError, match="groups"):
        gn.Conv2d(3, 4, 3, groups=2)


@pytest.mark.parametrize("make", [
    lambda nn: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2, bias=False),
    lambda nn: nn.Conv2d(4, 6, 4, padding="same", dilation=2),
    lambda nn: nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False),
    lambda nn: nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    lambda nn: nn.AdaptiveAvgPool2d((3, None)),
])  # fmt: skip
def test_layers_match_torch(make):
    from graphnet.ops.evaluate import evaluate

    torch.manual_seed(1)
    mine = make(gn)
    torch.manual_seed(1)
    theirs = make(torch.nn)
    x = torch.randn(2, 4, 9, 8)
    got = evaluate(gn.trace(mine, x.shape), {"x": x, **mine.state_dict()})[0]
    torch.testing.assert_close(got, theirs(x).detach(), rtol=1e-5, atol=1e-6)
