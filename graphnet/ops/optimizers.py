"""The optimizers by name, as the command line takes them."""

from __future__ import annotations

from graphnet.errors import ConfigError
from graphnet.ops.adam import Adam, AdamW
from graphnet.ops.update import SGD, OptimizerSpec

NAMES = ("sgd", "adam", "adamw")


def by_name(
    name: str,
    lr: float,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    form: str = "torch",
    l1: float = 0.0,
) -> OptimizerSpec:
    """The spec of that name; momentum, nesterov and form are SGD's and mean nothing to the others.

    ConfigError lists the valid names.
    """
    if name == "sgd":
        return SGD(lr, momentum, 0.0, weight_decay, nesterov, form, l1)
    if name == "adam":
        return Adam(lr, weight_decay=weight_decay, l1=l1)
    if name == "adamw":
        return AdamW(lr, weight_decay=weight_decay, l1=l1)
    raise ConfigError(f"unknown optimizer {name!r}", help=f"one of {', '.join(NAMES)}")
