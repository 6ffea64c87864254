"""The models against their own definitions, and against torch."""

import pytest
import torch

import graphnet as gn
from graphnet.bench.twin import torch_twin
from graphnet.errors import ConfigError, ShapeError

PARAMS = {
    "alexnet": 62_378_344, "alexnet_2012": 60_965_224, "caffenet": 60_965_224,
    "alexnet_owt": 61_100_840, "squeezenet1_1": 1_235_496, "zfnet": 62_357_608,
    "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032,
    "resnet20": 269_722, "googlenet": 6_624_904,
    "vgg11_bn": 132_868_840, "vgg13_bn": 133_053_736, "vgg16_bn": 138_365_992,
    "vgg19_bn": 143_678_248,
    "vgg11": 132_863_336, "vgg13": 133_047_848, "vgg16": 138_357_544, "vgg19": 143_667_240,
}  # fmt: skip
# Seconds to make, or to run.
LARGE = ("zfnet", "resnet34", "resnet50", *(n for n in PARAMS if n.startswith("vgg")))
NAMES = [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in PARAMS]
# The lecture's table, height x width x channels.
TABLE = {
    "conv1": (96, 55, 55), "pool1": (96, 27, 27), "norm1": (96, 27, 27), "conv2": (256, 27, 27),
    "pool2": (256, 13, 13), "norm2": (256, 13, 13), "conv3": (384, 13, 13),
    "conv4": (384, 13, 13), "conv5": (256, 13, 13), "pool5": (256, 6, 6), "fc6": (4096,),
    "fc7": (4096,), "fc8": (1000,),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts(name):
    assert sum(p.numel() for p in gn.models.get(name).parameters()) == PARAMS[name]


@pytest.mark.parametrize("name", ["alexnet", "alexnet_2012", "caffenet"])
def test_the_lectures_table(name):
    rows = {r.layer: r for r in gn.models.get(name).summary().rows}
    table = dict(TABLE)
    if name == "alexnet_2012":  # norm before pool
        table |= {"norm1": (96, 55, 55), "norm2": (256, 27, 27)}
    assert {k: rows[k].output[1:] for k in table} == table
    if name == "alexnet":
        assert rows["conv1"].params == 34_848 + 96


@pytest.mark.parametrize(
    "net, order, groups, k, mode, ceil",
    [
        (gn.models.alexnet, "pool1,norm1", 1, 2.0, "mean", False),
        (gn.models.alexnet_2012, "norm1,pool1", 2, 2.0, "sum", False),
        (lambda: gn.models.alexnet_2012(flavor="bvlc"), "norm1,pool1", 2, 1.0, "mean", True),
        (gn.models.caffenet, "pool1,norm1", 2, 1.0, "mean", True),
    ],
)
def test_what_tells_the_variants_apart(net, order, groups, k, mode, ceil):
    net = net()
    names = [r.layer for r in net.summary().rows]
    first, second = order.split(",")
    assert names.index(second) == names.index(first) + 1
    layers = dict(net.named_modules())
    assert [layers[f"conv{i}"].groups for i in range(1, 6)] == [1, groups, 1, groups, groups]
    norm = layers["norm1"]
    assert (norm.size, norm.alpha, norm.beta, norm.k, norm.alpha_mode) == (5, 1e-4, 0.75, k, mode)
    assert layers["pool1"].ceil_mode is ceil


def test_one_weird_trick_has_torchvisions_keys():
    keys = list(gn.models.alexnet_owt().state_dict())
    want = [f"features.{i}.{p}" for i in (0, 3, 6, 8, 10) for p in ("weight", "bias")]
    want += [f"classifier.{i}.{p}" for i in (1, 4, 6) for p in ("weight", "bias")]
    assert keys == want


@pytest.mark.parametrize("name", NAMES)
def test_inference_is_torchs(name):
    torch.manual_seed(0)
    net = gn.models.get(name, num_classes=10)
    x = torch.randn(2, *net.input_shape)
    got = gn.compile(net, tuple(x.shape), target="cpu")(x)
    torch.testing.assert_close(got, torch_twin(net).eval()(x), rtol=1e-4, atol=1e-5)


def test_sizes_of_zfnet_are_those_of_its_paper():
    rows = {r.layer: r.output for r in gn.models.zfnet(num_classes=2).summary().rows}
    sizes = [rows[k][2] for k in ("conv1", "pool1", "conv2", "pool2", "conv5", "pool5")]
    assert sizes == [110, 55, 26, 13, 13, 6]


def test_a_fire_trains_as_its_twin_and_shows_as_a_tree():
    torch.manual_seed(0)
    net = gn.models.squeezenet1_1(num_classes=4, dropout=0.0)
    keys = list(net.state_dict())
    assert keys[2:4] == ["features.3.squeeze.weight", "features.3.squeeze.bias"]
    assert keys[-1] == "classifier.1.bias"
    twin = torch_twin(net)
    x, y = torch.randn(2, 3, 63, 63), torch.tensor([1, 3])
    grads = gn.compile(net, tuple(x.shape), target="cpu", loss=gn.CrossEntropyLoss(), grads=True)
    loss, got = grads(x, y)
    want = torch.nn.functional.cross_entropy(twin(x), y)
    want.backward()
    torch.testing.assert_close(loss, want.detach())
    for key, p in twin.named_parameters():
        torch.testing.assert_close(got[key], p.grad, rtol=1e-3, atol=1e-5)
    text = str(net.summary())
    assert text.count("Sequential") == 2 and text.count("Fire") == 8
    assert "\n                          cat1      concat " in text


def test_initialisations():
    torch.manual_seed(0)
    net = gn.models.alexnet(init="bvlc")
    state = net.state_dict()
    assert float(state["fc6.weight"].std()) == pytest.approx(0.01, rel=0.01)
    assert float(state["conv2.bias"][0]) == pytest.approx(0.1) and not state["conv1.bias"].any()
    assert float(gn.models.alexnet_2012(init="paper").state_dict()["fc7.bias"][0]) == 1.0
    with pytest.raises(ConfigError, match="torch, bvlc, paper"):
        gn.models.alexnet(init="he")
    with pytest.raises(ConfigError, match="bvlc"):
        gn.models.alexnet_2012(flavor="caffe")
    assert gn.models.alexnet_2012(norm_groups=2).norm2.groups == 2


def test_an_image_that_is_too_small_shows_the_chain_of_sizes():
    with pytest.raises(ShapeError) as caught:
        gn.models.alexnet().summary((1, 3, 63, 63))
    text = str(caught.value)
    assert "63x63" in text and "227" in text and "->" in text
    with pytest.raises(ShapeError, match="227"):
        gn.models.alexnet().summary((1, 3, 224, 224))
    with pytest.raises(ConfigError, match="groups=2 must divide the 3 input channels and the"):
        gn.Conv2d(3, 8, 3, groups=2)
    with pytest.raises(ConfigError, match="alpha_mode"):
        gn.LocalResponseNorm(5, alpha_mode="max")
    with pytest.raises(ConfigError, match="groups of a normalization"):
        gn.LocalResponseNorm(5, groups=0)
    with pytest.raises(ShapeError, match="3 channels have no 2 equal groups"):
        gn.compile(gn.LocalResponseNorm(5, groups=2), (1, 3, 4, 4), target="cpu")


def test_residual_nets_have_torchvisions_keys():
    keys = list(gn.models.resnet18(num_classes=2).state_dict())
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    norm = lambda at: [f"{at}.{p}" for p in names]
    block = ["layer2.0.conv1.weight", *norm("layer2.0.bn1"), "layer2.0.conv2.weight"]
    block += [*norm("layer2.0.bn2"), "layer2.0.downsample.0.weight", *norm("layer2.0.downsample.1")]
    at = keys.index(block[0])
    assert keys[at : at + len(block)] == block and keys[:6] == ["conv1.weight", *norm("bn1")]
    assert keys[-2:] == ["fc.weight", "fc.bias"] and len(keys) == 122
    deep = list(gn.models.googlenet(num_classes=2).state_dict())
    assert deep[:2] == ["conv1.conv.weight", "conv1.bn.weight"]
    assert "inception4e.branch3.1.bn.running_var" in deep
    both = [gn.models.resnet20(shortcut=s) for s in ("pad", "conv")]
    assert [sum(p.numel() for p in n.parameters()) for n in both] == [269_722, 272_474]
    with pytest.raises(ConfigError, match="pad"):
        gn.models.resnet20(shortcut="crop")


def test_a_residual_net_trains_as_its_twin():
    torch.manual_seed(0)
    net = gn.models.resnet20()
    twin = torch_twin(net)
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([1, 3, 0, 9])
    step = gn.compile(
        net, tuple(x.shape), target="cpu", loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(lr=0.01)
    )
    want = torch.nn.functional.cross_entropy(twin(x), y)
    torch.testing.assert_close(step(x, y), want.detach(), rtol=1e-5, atol=1e-6)
    want.backward()
    torch.optim.SGD(twin.parameters(), 0.01).step()
    mine = net.state_dict()
    for key, t in twin.state_dict().items():
        torch.testing.assert_close(mine[key], t, rtol=1e-4, atol=1e-5)
