"""What belongs to torch and was given to us: what an error calls it, and what to use instead.

Imports nothing heavy: `import graphnet` reaches it before torch is there.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

# Functions and tensor methods, by name, that `forward` may look for on a symbolic value.
_FUNCTIONS = {
    "concat": "gn.cat([x, y], 1)",
    "matmul": "the layer gn.Linear, an attribute of the net",
    "dropout": "the layer gn.Dropout, an attribute of the net",
    "batch_norm": "the layer gn.BatchNorm2d, an attribute of the net",
    "permute": "no copy of the axes: layouts are the compiler's",
    "transpose": "no copy of the axes: layouts are the compiler's",
    "max": "x.amax((2, 3)), or the layer gn.MaxPool2d",
    "interpolate": "no resampling inside a net: resize the images before it",
    "stack": "gn.cat([x, y], 1)",
    "group_norm": "the layer gn.BatchNorm2d, an attribute of the net",
    "layer_norm": "the layer gn.BatchNorm1d, an attribute of the net",
}
_ON_SYMBOLS = (
    "+, -, *, /, slices, x.reshape, x.flatten(1), x.mean((2, 3)), gn.cat, gn.pad, gn.softmax and "
    "activations, under torch's names"
)

_DEVICE = 'a net is nowhere until it is compiled: gn.compile(net, shape, target="cuda")'
_MODE = (
    "the mode is that of the program: gn.compile(net, shape) infers, with a loss and an "
    "optimizer it trains"
)
_DTYPE = 'parameters are fp32; what is computed is chosen by gn.compile(..., precision="bf16")'
_GRADS = "gn.compile(net, shape, loss=..., grads=True) gives a program that returns gradients"
_ASSIGN = "assign it: self.name = ... of a gn.Module or a gn.Parameter registers it"
_ON_MODULES = {
    **dict.fromkeys(("to", "cuda", "cpu", "device", "to_empty"), _DEVICE),
    **dict.fromkeys(("train", "eval", "training"), _MODE),
    **dict.fromkeys(("half", "float", "double", "bfloat16", "type"), _DTYPE),
    **dict.fromkeys(("zero_grad", "backward"), _GRADS),
    **dict.fromkeys(("add_module", "register_module", "register_parameter"), _ASSIGN),
    "requires_grad_": "p.trainable = False, for p in net.parameters(), freezes",
    "apply": "gn.init sets initial values; net.modules() gives the modules",
    "children": "net.modules() gives the modules, net.named_modules() with their paths",
    "named_children": "net.named_modules() gives the modules with their paths",
}


_FLAT = "images are 2-D: gn.Conv2d, gn.MaxPool2d, gn.AvgPool2d"
_NORMS = "gn.BatchNorm2d or gn.LocalResponseNorm, or fold it away for inference"
_LAYERS = {
    **dict.fromkeys(("Upsample", "ConvTranspose2d", "PixelShuffle"),
                    "no upsampling inside a net: keep this part in torch"),
    **dict.fromkeys(("ReflectionPad2d", "ReplicationPad2d", "CircularPad2d"), "gn.ZeroPad2d"),
    "Unflatten": "x.unflatten(dim, sizes) in forward",
    **{f"{n}{d}d": _FLAT for n in ("Conv", "MaxPool", "AvgPool", "BatchNorm") for d in (1, 3)},
    **dict.fromkeys(("GroupNorm", "LayerNorm", "InstanceNorm2d", "SyncBatchNorm"), _NORMS),
    **dict.fromkeys(("AlphaDropout", "FeatureAlphaDropout"), "gn.Dropout"),
    **dict.fromkeys(("AdaptiveMaxPool2d", "LPPool2d"), "gn.MaxPool2d of a size written out"),
    **dict.fromkeys(
        ("PReLU", "ELU", "CELU", "SELU", "RReLU", "Softplus", "Mish", "GLU", "Softsign"),
        "one of gn.ReLU, gn.Tanh, gn.Sigmoid",
    ),
}  # fmt: skip


def instead_of_call(name: str) -> str:
    """"; instead: ..." for a function or a tensor's method that we do not have, or nothing."""
    known = _FUNCTIONS.get(name.rstrip("_"))
    return f"; instead: {known}" if known else instead_of_layer(name)


def instead_of_layer(name: str) -> str:
    """"; instead: ..." for a layer or a function of torch's that we do not have, or nothing."""
    known = _LAYERS.get(name)
    return f"; instead: {known}" if known else ""


def called(what: Any) -> str:
    """What an error calls an object or a class: "torch's nn.ReLU", "a list"."""
    kind = what if isinstance(what, type) else type(what)
    room = kind.__module__.split(".")
    if room[0] == "torch":
        return "torch's " + ".".join([*room[1:2], kind.__name__])
    if isinstance(what, type):
        return f"the class {kind.__name__}"
    article = "an" if kind.__name__[:1].lower() in "aeiou" else "a"
    return f"{article} {kind.__name__}"


def is_torchs(what: Any) -> bool:
    """Whether an object, a class or a function is one of torch's."""
    kind = what if hasattr(what, "__module__") and callable(what) else type(what)
    return str(getattr(kind, "__module__", "")).split(".")[0] == "torch"


def ours(what: Any) -> str | None:
    """`gn.<Name>` where we have a class of the name of an object's class."""
    import graphnet

    name = (what if isinstance(what, type) else type(what)).__name__
    return f"gn.{name}" if name in graphnet.__all__ else None


def instead_of_function(name: str) -> str:
    """What to write for a function or a tensor method of that name."""
    known = _FUNCTIONS.get(name.rstrip("_"))
    return f"use {known}" if known else f"on symbolic values there are {_ON_SYMBOLS}"


def instead_on_module(name: str, has: Iterable[str]) -> str | None:
    """What to write for an attribute that a net does not have."""
    return _ON_MODULES.get(name) or did_you_mean(name, has)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """The nearest of the known names, as a question."""
    lower = {k.lower(): k for k in known if not k.startswith("_")}
    near = difflib.get_close_matches(name.lower(), lower, 1, 0.75)
    return f"did you mean {lower[near[0]]}?" if near else None
