"""What `compile` is called with: checked, with an error that says what to give instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphnet.errors import ConfigError, number
from graphnet.frontends.dsl import Module
from graphnet.frontends.foreign import called, is_torchs, ours
from graphnet.frontends.tracer import user_place
from graphnet.ops.augment import Augment
from graphnet.ops.gradient import Handling


def check_net(net: Any) -> None:
    """ConfigError for what is no net, with what to give instead."""
    if not isinstance(net, Module):
        raise ConfigError(
            f"a gn.Module is compiled, not {called(net)}",
            where=user_place() or None,
            help=("net = gn.from_torch(Net())" if is_torchs(net) else "give an object: Net()")
            if isinstance(net, type) else
            "net = gn.from_torch(module) gives one with the same parameters and keys; it holds "
            "what is trained, so keep it, and module.load_state_dict(net.state_dict()) takes it "
            "back" if isinstance(net, torch.nn.Module) else
            "gn.Sequential(...), or a class of your own under gn.Module",
        )


def check_arguments(loss: Any, optimizer: Any, grads: bool) -> None:
    """ConfigError for a loss, an optimizer and grads that do not go together."""
    if loss is None and (optimizer is not None or grads):
        raise ConfigError(
            "an optimizer or grads=True needs a loss", help="loss=gn.CrossEntropyLoss()"
        )
    _check_spec("loss", loss, ("op", "attrs"), "gn.CrossEntropyLoss()")
    _check_spec("optimizer", optimizer, ("op", "slots"), "gn.SGD(lr=0.01)")
    if optimizer is not None and grads:
        raise ConfigError("grads=True and an optimizer exclude each other", help="compile twice")


def _check_spec(name: str, given: Any, has: Sequence[str], example: str) -> None:
    """ConfigError for what is no loss or no optimizer of ours; torch's are called torch's."""
    if given is None or all(hasattr(given, h) for h in has) and not isinstance(given, type):
        return
    twin, arguments = ours(given) or example.partition("(")[0], example.partition("(")[2]
    raise ConfigError(
        f"{name} is an object of graphnet's such as {example}, not {called(given)}",
        where=user_place() or None, help=f"{name}={twin}({arguments}",
    )  # fmt: skip


def check_augment(augment: Any, optimizer: Any) -> None:
    """ConfigError for what is no augmentation, or has no training step to be part of."""
    if augment is None:
        return
    if not isinstance(augment, Augment):
        raise ConfigError(f"{augment!r} is no augmentation", help="augment=gn.Augment(flip=0.5)")
    if optimizer is None:
        raise ConfigError("augment is for training steps", help="give an optimizer")


def check_ranks(ranks: Any, optimizer: Any, grads: bool, towers: Any) -> None:
    """ConfigError for what is no number of ranks, or is given without a training step; of two
    towers for another number than two."""
    if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
        raise ConfigError(f"ranks is a positive int, not {ranks!r}")
    if not isinstance(towers, bool):
        raise ConfigError(f"towers is True or False, not {towers!r}")
    if towers:
        if ranks != 2:
            raise ConfigError(
                f"two towers run on two ranks, not on {ranks}",
                help="start two processes (torchrun --nproc-per-node 2 -m graphnet train ..., in "
                'Python group="world" in each), or leave towers out',
            )
        return
    if ranks > 1 and optimizer is None and not grads:
        raise ConfigError(
            "several processes share a training step: an optimizer or grads=True is missing",
            help="compile inference and evaluation without group, and give each rank its rows",
        )


def check_share(rows: int, batch: int, ranks: int) -> None:
    """ConfigError where some rank would have none of the rows in every step.

    rows  of the largest batch that there is; `batch` is what a step has room for
    """
    own = -(-batch // ranks)
    used = -(-rows // own)
    if used == ranks:
        return
    there = f", of which there are {rows}" if rows < batch else ""
    batches = f", or a batch of {ranks * (rows // ranks)}" if rows >= ranks else ""
    raise ConfigError(
        f"a batch of {batch} images{there} gives each of {ranks} ranks {own}, and rank {used} has "
        "none in any step",
        help=f"start {used} process{'es' if used > 1 else ''}{batches}",
    )


def check_reduce(reduce: Any, precision: str) -> None:
    """ConfigError for what gradients cannot be summed as."""
    if reduce not in (None, "bf16"):
        raise ConfigError(
            f"reduce is None (fp32) or 'bf16', not {reduce!r}", where=user_place() or None
        )
    if reduce and precision != "bf16":
        raise ConfigError(
            f"reduce='bf16' rounds gradients that precision {precision} keeps in fp32",
            where=user_place() or None, help="precision='bf16', or reduce=None",
        )  # fmt: skip


def handling_of(
    optimizer: Any, accumulate: Any, clip_norm: Any, nonfinite: Any, apply: bool
) -> Handling:
    """How the gradients are treated; ConfigError for what cannot be."""
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise ConfigError(f"accumulate is a positive int, not {accumulate!r}")
    if clip_norm is not None:
        number("compile", "clip_norm", clip_norm, above=True)
    plain = accumulate == 1 and clip_norm is None and nonfinite in ("auto", None)
    if optimizer is None and not plain:
        raise ConfigError(
            "accumulate, clip_norm and nonfinite are about updates", help="give an optimizer"
        )
    if nonfinite == "auto" and accumulate > 1:
        nonfinite = None
    return Handling(accumulate > 1, apply, clip_norm is not None, nonfinite)
