"""The models by name: `gn.models.lenet5()` or `gn.models.get("lenet5")`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graphnet.errors import ConfigError
from graphnet.frontends.dsl import Module
from graphnet.frontends.models.alexnet import alexnet, alexnet_2012, alexnet_owt, caffenet
from graphnet.frontends.models.lenet import caffe_lenet, lenet5
from graphnet.frontends.models.squeezenet import squeezenet1_1
from graphnet.frontends.models.vgg import vgg11, vgg13, vgg16, vgg19
from graphnet.frontends.models.zfnet import zfnet

MODELS: dict[str, Callable[..., Module]] = {
    "alexnet": alexnet,
    "alexnet_2012": alexnet_2012,
    "alexnet_owt": alexnet_owt,
    "caffe_lenet": caffe_lenet,
    "caffenet": caffenet,
    "lenet5": lenet5,
    "squeezenet1_1": squeezenet1_1,
    "vgg11": vgg11,
    "vgg13": vgg13,
    "vgg16": vgg16,
    "vgg19": vgg19,
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
