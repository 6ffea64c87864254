"""torch's losses and optimizers as ours: same names, same numbers, or a refusal that says why."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from graphnet.errors import ConfigError, GraphnetError
from graphnet.frontends.dsl import Module
from graphnet.frontends.foreign import called, is_torchs, ours
from graphnet.frontends.tracer import user_place

_NO_MATTER = ("foreach", "capturable", "differentiable", "fused")  # how torch's steps run
_LIKE = {
    "NLLLoss": "gn.CrossEntropyLoss(), which takes logits: leave log_softmax out of the net",
    "BCEWithLogitsLoss": "gn.CrossEntropyLoss() with a class for each answer",
    "MultiLabelMarginLoss": "gn.MultiMarginLoss()",
    "cross_entropy": "gn.CrossEntropyLoss()",
    "multi_margin_loss": "gn.MultiMarginLoss()",
    "NAdam": "gn.Adam(lr=...)",
    "RAdam": "gn.Adam(lr=...)",
    "RMSprop": "gn.Adam(lr=...)",
    "Adagrad": "gn.Adam(lr=...)",
}
_ELSE = "or keep it in torch: gn.as_torch(net, shape) trains in a loop of torch's"


def loss_of(given: Any) -> Any:
    """Our loss for one of torch's; what is not torch's as it is."""
    if given is None or not is_torchs(given) or isinstance(given, type):
        return given
    names = ("weight", "ignore_index", "reduction", "label_smoothing", "p", "margin")
    has = {n: getattr(given, n) for n in names if hasattr(given, n)}
    return _converted("loss", given, has)


def optimizer_of(given: Any, net: Module) -> Any:
    """Our optimizer for one of torch's over all parameters of the net, or for a partial of one;
    what is not torch's as it is."""
    if isinstance(given, functools.partial) and is_torchs(given.func):
        if given.args:
            raise _refused("optimizer", given.func, "its arguments have no names")
        return _converted("optimizer", given.func, given.keywords)
    if given is None or not is_torchs(given) or isinstance(given, type):
        return given
    groups = getattr(given, "param_groups", None)
    if groups is None:
        return _converted("optimizer", given, {})
    if len(groups) > 1:
        raise _refused(
            "optimizer", given, f"it has {len(groups)} groups of parameters",
            "net.set_multipliers(pattern, lr=..., decay=...)",
        )  # fmt: skip
    shapes = sorted(tuple(p.shape) for p in groups[0]["params"])
    mine = sorted(p.shape for p in net.parameters() if p.trainable)
    if shapes != mine:
        raise _refused(
            "optimizer", given,
            f"it has {len(shapes)} parameters, the net has {len(mine)} trainable ones, and their "
            "shapes do not agree",
            f"{ours(given)}(...) takes all of the net; p.trainable = False freezes a parameter",
        )  # fmt: skip
    if given.state:
        raise _refused("optimizer", given, "it has taken steps, and their averages stay in torch")
    return _converted("optimizer", given, {k: v for k, v in groups[0].items() if k != "params"})


def _converted(what: str, given: Any, has: dict[str, Any]) -> Any:
    import graphnet

    name = getattr(given if isinstance(given, type) else type(given), "__name__", "")
    kind = getattr(graphnet, name, None) if ours(given) else None
    if kind is None or issubclass(kind, Module):
        raise _refused(what, given, None)
    takes = set(inspect.signature(kind).parameters)
    decoupled = has.pop("decoupled_weight_decay", name == "AdamW")
    if decoupled != (name == "AdamW"):
        raise _refused(what, given, "decoupled_weight_decay is not implemented", "gn.AdamW(...)")
    alien = [k for k, v in has.items() if k not in takes and k not in _NO_MATTER and v]
    if alien:
        raise _refused(what, given, f"{alien[0]}={has[alien[0]]!r} is not implemented")
    # torch's learning rate may be a tensor.
    number = lambda v: v.item() if getattr(v, "ndim", None) == 0 else v
    numbers = {k: number(v) for k, v in has.items() if k in takes}
    try:
        return kind(**numbers)
    except GraphnetError as error:
        raise _refused(what, given, error.message.removeprefix(f"{name}: ")) from error


def _refused(what: str, given: Any, because: str | None, instead: str = "") -> ConfigError:
    name = getattr(given, "__name__", type(given).__name__)
    twin = ours(given)
    call = instead or _LIKE.get(name) or (f"{twin}(...)" if twin else "")
    if not call:
        call = "gn.CrossEntropyLoss()" if what == "loss" else "gn.SGD(lr=0.01)"
    return ConfigError(
        f"{called(given)} cannot be the {what}: {because or 'graphnet has none like it'}",
        where=user_place() or None, help=f"{what}={call}; {_ELSE}",
    )  # fmt: skip
