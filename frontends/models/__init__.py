"""The models by name: `gn.models.lenet5()` or `gn.models.get("lenet5")`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graphnet.errors import ConfigError
from graphnet.frontends.dsl import Module
from graphnet.frontends.models.alexnet import alexnet, alexnet_2012, alexnet_owt, caffenet
from graphnet.frontends.models.googlenet import googlenet
from graphnet.frontends.models.lenet import caffe_lenet, lenet5
from graphnet.frontends.models.resnet import resnet18, resnet20, resnet34, resnet50
from graphnet.frontends.models.squeezenet import squeezenet1_1
from graphnet.frontends.models.vgg import (
    vgg11,
    vgg11_bn,
    vgg13,
    vgg13_bn,
    vgg16,
    vgg16_bn,
    vgg19,
    vgg19_bn,
)
from graphnet.frontends.models.zfnet import zfnet

MODELS: dict[str, Callable[..., Module]] = {
    "alexnet": alexnet,
    "alexnet_2012": alexnet_2012,
    "alexnet_owt": alexnet_owt,
    "caffe_lenet": caffe_lenet,
    "caffenet": caffenet,
    "googlenet": googlenet,
    "lenet5": lenet5,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "squeezenet1_1": squeezenet1_1,
    "vgg11": vgg11,
    "vgg11_bn": vgg11_bn,
    "vgg13": vgg13,
    "vgg13_bn": vgg13_bn,
    "vgg16": vgg16,
    "vgg16_bn": vgg16_bn,
    "vgg19": vgg19,
    "vgg19_bn": vgg19_bn,
    "zfnet": zfnet,
}


def get(name: str, **options: Any) -> Module:
    """A new net of that name; ConfigError lists the valid names."""
    try:
        make = MODELS[name]
    except KeyError:
        raise ConfigError(
            f"unknown model {name!r}", help=f"valid models: {', '.join(sorted(MODELS))}"
        ) from None
    return make(**options)


__all__ = ["MODELS", "get", *MODELS]
