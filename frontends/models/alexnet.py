"""The nets that people mean by "AlexNet"; they differ, see the docstrings.

Shared form: five convolutions, three 3x3 stride-2 max-pools, three linear layers with dropout.
"""

from __future__ import annotations

from collections import OrderedDict

from graphnet.errors import ConfigError
from graphnet.frontends.dsl import Module, Sequential
from graphnet.frontends.init import LATE, normal_
from graphnet.frontends.layers import (
    AdaptiveAvgPool2d,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    LocalResponseNorm,
    MaxPool2d,
    ReLU,
)

_INITS = {"torch": None, "bvlc": 0.1, "paper": 1.0}  # where biases of init.LATE start


def _init(net: Sequential, init: str) -> None:
    """Gaussian weights of std 0.01 (Krizhevsky et al. 2012, section 5); "torch" keeps torch's."""
    if init not in _INITS:
        raise ConfigError(f"unknown init {init!r}", help=f"one of {', '.join(_INITS)}")
    start = _INITS[init]
    if start is not None:
        normal_(net, std=0.01, bias=dict.fromkeys(LATE, start))


def _tower(
    name: str, order: str, groups: int, norm: dict, ceil: bool, num_classes: int, dropout: float,
    init: str,
) -> Sequential:  # fmt: skip
    """The 96-256-384-384-256 tower for 3x227x227; `order` is what follows conv1 and conv2."""
    made: OrderedDict[str, Module] = OrderedDict()

    def add(key: str, module: Module) -> None:
        module.name = key
        made[key] = module

    def behind(k: int) -> None:
        for kind in order.split(","):
            if kind == "pool":
                add(f"pool{k}", MaxPool2d(3, 2, ceil_mode=ceil))
            else:
                add(f"norm{k}", LocalResponseNorm(5, alpha=1e-4, beta=0.75, **norm))

    #          in, out, kernel, stride, padding, groups
    table = [(3, 96, 11, 4, 0, 1), (96, 256, 5, 1, 2, groups), (256, 384, 3, 1, 1, 1),
             (384, 384, 3, 1, 1, groups), (384, 256, 3, 1, 1, groups)]  # fmt: skip
    for k, (c, o, kernel, stride, padding, g) in enumerate(table, 1):
        add(f"conv{k}", Conv2d(c, o, kernel, stride, padding, groups=g))
        add(f"relu{k}", ReLU())
        if k <= 2:
            behind(k)
    add("pool5", MaxPool2d(3, 2, ceil_mode=ceil))
    add("flatten", Flatten())
    for k, (c, o) in enumerate([(256 * 6 * 6, 4096), (4096, 4096)], 6):
        add(f"fc{k}", Linear(c, o))
        add(f"relu{k}", ReLU())
        add(f"drop{k}", Dropout(dropout))
    add("fc8", Linear(4096, num_classes))
    net = Sequential(made)
    net.name, net.input_shape = name, (3, 227, 227)
    _init(net, init)
    return net


def alexnet(num_classes: int = 1000, dropout: float = 0.5, init: str = "torch") -> Sequential:
    """The single tower of the lectures: conv, relu, pool, norm; 62,378,344 parameters.

    LRN over 5 channels with alpha 1e-4 / 5, beta 0.75, k 2. `init` is "torch", "bvlc" (Gaussian,
    some biases 0.1) or "paper" (some biases 1).
    """
    norm = {"k": 2.0}
    return _tower("alexnet", "pool,norm", 1, norm, False, num_classes, dropout, init)


def alexnet_2012(
    num_classes: int = 1000, dropout: float = 0.5, flavor: str = "paper", init: str = "torch", *,
    norm_groups: int = 1,
) -> Sequential:  # fmt: skip
    """Two towers (groups in conv2, 4, 5), norm before pool; 60,965,224 parameters.

    norm_groups 2 keeps the windows of the norms within each half of the channels, as on two GPUs;
    `gn.compile(..., towers=True)` wants it.

    flavor "paper" (Krizhevsky et al. 2012): LRN with k 2 and undivided alpha; "bvlc" (Caffe's
    bvlc_alexnet): k 1, alpha / 5, pooling sizes round up.
    """
    if flavor not in ("paper", "bvlc"):
        raise ConfigError(f"unknown flavor {flavor!r}", help='"paper" or "bvlc"')
    norm: dict = {"k": 2.0, "alpha_mode": "sum"} if flavor == "paper" else {}
    norm["groups"] = norm_groups
    ceil = flavor == "bvlc"
    return _tower("alexnet_2012", "norm,pool", 2, norm, ceil, num_classes, dropout, init)


def caffenet(num_classes: int = 1000, dropout: float = 0.5, init: str = "torch") -> Sequential:
    """Caffe's reference net: two towers, pool before norm, k 1, sizes round up."""
    return _tower("caffenet", "pool,norm", 2, {}, True, num_classes, dropout, init)


def alexnet_owt(num_classes: int = 1000, dropout: float = 0.5) -> Sequential:
    """torchvision's alexnet, after "One weird trick" (Krizhevsky 2014): no norm, 3x224x224,
    61,100,840 parameters under torchvision's keys."""
    features: list[Module] = []
    #          in, out, kernel, stride, padding, pooled
    for c, o, kernel, stride, padding, pooled in [
        (3, 64, 11, 4, 2, True), (64, 192, 5, 1, 2, True), (192, 384, 3, 1, 1, False),
        (384, 256, 3, 1, 1, False), (256, 256, 3, 1, 1, True),
    ]:  # fmt: skip
        features += [Conv2d(c, o, kernel, stride, padding), ReLU()]
        features += [MaxPool2d(3, 2)] if pooled else []
    classifier = Sequential(
        Dropout(dropout), Linear(256 * 6 * 6, 4096), ReLU(), Dropout(dropout), Linear(4096, 4096),
        ReLU(), Linear(4096, num_classes),
    )  # fmt: skip
    net = Sequential(
        OrderedDict(
            features=Sequential(*features),
            avgpool=AdaptiveAvgPool2d(6),
            flatten=Flatten(),
            classifier=classifier,
        )  # fmt: skip
    )
    net.name, net.input_shape = "alexnet_owt", (3, 224, 224)
    return net
