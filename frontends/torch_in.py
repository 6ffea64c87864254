"""torch.nn.Module -> gn.Module, by torch.fx: layers stay whole, keys and their order are torch's.

The layers of torch.nn become ours of the same name. What `forward` does with them is recorded
(recorded.py), once in training and once in inference.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F

from graphnet.errors import ConfigError, GraphnetError, UnsupportedOpError
from graphnet.frontends import layers
from graphnet.frontends.dsl import Module, Parameter
from graphnet.frontends.foreign import called, instead_of_call, instead_of_layer
from graphnet.frontends.functions import FUNCTIONS, PYTHON, method
from graphnet.frontends.held import BUFFERS, Buffer
from graphnet.frontends.imported import Part, put, refusal
from graphnet.frontends.recorded import (
    Call,
    Identity,
    Ref,
    TorchNet,
    is_layer,
    mapped,
    record,
    title,
)
from graphnet.frontends.tracer import user_place
from graphnet.frontends.tracing import trace

_OWN_MODE = (F.dropout,)  # functions that have a mode: they become layers
_ALL = (
    "replace them by layers that graphnet has, or keep these parts in torch and convert what lies "
    "between them: gn.as_torch makes a torch module of it again"
)


def from_torch(module: torch.nn.Module, example: torch.Tensor | None = None) -> Module:
    """A net of ours that computes what a torch module does, with copies of its parameters.

    module   its forward takes one batch; keys and their order in `state_dict` stay. A parameter
             with requires_grad=False is not trainable
    example  a batch: the net knows the shape of its input then, and errors of shapes come here

    Everything that graphnet does not have is listed in one UnsupportedOpError, each with its path
    and place. Modes are those of programs: what the module does in `.train()` and in `.eval()` is
    recorded, whichever it is in.
    """
    if not isinstance(module, torch.nn.Module):
        raise ConfigError(
            f"from_torch takes a torch.nn.Module, not {called(module)}",
            where=user_place() or None,
            help="give an object: Net()" if isinstance(module, type) else None,
        )
    return _Conversion(module).net(example)


class _Conversion:
    """One run of from_torch."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = _unwrapped(module)
        self.title = type(self.module).__name__
        self.reasons: list[str] = []
        self.made: dict[torch.nn.Module, Module] = {}
        self.parameters: dict[torch.nn.Parameter, Parameter] = {}
        self.paths = {m: path for path, m in self.module.named_modules()}

    def net(self, example: torch.Tensor | None) -> Module:
        net = self._alone() if is_layer(self.module) else self._recorded()
        if self.reasons:
            raise refusal(self.title, self.reasons, user_place() or None, _ALL)
        net.name = self.title.lower()
        net.__dict__["place"] = user_place()
        if example is not None:
            net.input_shape = tuple(example.shape[1:])
            trace(net, tuple(example.shape))
        return net

    def _alone(self) -> Module:
        """The net of one layer of torch's."""
        with torch.random.fork_rng(devices=[]):
            return self._layer(self.module, "", {})

    def _recorded(self) -> Module:
        recorded = {mode: record(self.module, mode) for mode in (True, False)}
        places = self._places(recorded)
        net = TorchNet()
        with torch.random.fork_rng(devices=[]):  # layers draw weights, which are replaced
            self._fill(net, self.module, "", places)
            net._calls = {mode: self._calls(net, graph) for mode, graph in recorded.items()}
        return net

    # ---- what forward does ------------------------------------------------------------------

    def _places(self, graphs: dict[bool, torch.fx.Graph]) -> dict[str, str]:
        """Where each layer is called: path to file:line."""
        return {
            self.paths[self.module.get_submodule(str(n.target))]: n.meta.get("place", "")
            for graph in graphs.values()
            for n in graph.nodes
            if n.op == "call_module"
        }

    def _calls(self, net: TorchNet, graph: torch.fx.Graph) -> list[Call]:
        out = []
        for n in graph.nodes:
            call = self._call(net, n)
            if call is not None:
                out.append(call)
        return out

    def _call(self, net: TorchNet, n: Any) -> Call | None:
        ref = lambda a: Ref(a.name) if isinstance(a, torch.fx.Node) else a
        args, kwargs = mapped(tuple(n.args), ref), mapped(dict(n.kwargs), ref)
        place = n.meta.get("place", "")
        make = lambda what, over="": Call(n.name, what, args, kwargs, over, place)
        if n.op == "placeholder":
            first = n.prev.op == "root"  # the batch; what follows has its default
            return Call(n.name, None, () if first else n.args[:1])
        if n.op == "output":
            return Call("output", None, args)
        if n.op == "get_attr":
            return Call(n.name, self._path_of(net, str(n.target), place), place=place)
        if n.op == "call_module":
            layer = self.module.get_submodule(str(n.target))
            over = n.args[0].name if getattr(layer, "inplace", False) else ""
            return make(self.paths[layer], over)
        if n.op == "call_method":
            over = n.args[0].name if str(n.target).endswith("_") else ""
            function = method(str(n.target))
            if function is None:
                self._refuse(f"x.{n.target}()", place)
                return None
            return make(function, over)
        return self._function(net, n, make, place)

    def _function(self, net: TorchNet, n: Any, make: Any, place: str) -> Call | None:
        if n.target in _OWN_MODE:
            return self._dropout(net, n, place)
        if n.target in PYTHON:
            in_place = n.target.__name__ in _IN_PLACE and isinstance(n.args[0], torch.fx.Node)
            return make(n.target, n.args[0].name if in_place else "")
        function = FUNCTIONS.get(n.target)
        if function is None:
            self._refuse(f"{title(n.target)}()", place)
            return None
        kwargs = dict(n.kwargs)
        over = n.args[0].name if kwargs.get("inplace") or title(n.target)[-1] == "_" else ""
        return make(function, over)

    def _dropout(self, net: TorchNet, n: Any, place: str) -> Call:
        """F.dropout is a layer of ours where it drops, and nothing elsewhere."""
        given = dict(zip(("input", "p", "training", "inplace"), n.args, strict=False)) | n.kwargs
        x = given["input"].name
        over = x if given.get("inplace") else ""
        if not given.get("training", True):
            return Call(n.name, None, (Ref(x),), place=place)
        held = net.__dict__.setdefault("_functions", Part())
        path = f"drop_{sum(1 for _ in held._own(Module))}"
        layer = layers.Dropout(given.get("p", 0.5))
        layer.__dict__["place"] = place
        put(held, path, layer)
        return Call(n.name, f"_functions.{path}", (Ref(x),), over=over, place=place)

    def _path_of(self, net: TorchNet, target: str, place: str) -> str:
        """The key under which a tensor that forward reads is kept. One that is neither a parameter
        nor a buffer becomes a buffer that is not saved."""
        if target in dict(net._keys()):
            return target
        *parts, last = target.split(".")
        value: Any = self.module
        for part in (*parts, last):
            value = getattr(value, part)
        if not value.is_floating_point():
            at = f" ({place})" if place else ""
            self.reasons.append(
                f"net.{target}: a tensor of {value.dtype} in forward{at}; instead: one of float32"
            )
            return target
        into: Module = net
        for part in parts:
            into = into.__dict__[part]
        put(into, last, _constant(value, False), target)
        return target

    def _refuse(self, what: str, place: str) -> None:
        """what: as `forward` writes it: "x.sum()", "F.relu()"."""
        name = what.rpartition(".")[2].removesuffix("()")
        self.reasons.append(f"{what}{f' ({place})' if place else ''}{instead_of_call(name)}")

    # ---- the tree ---------------------------------------------------------------------------

    def _fill(self, into: Module, module: Any, path: str, places: dict[str, str]) -> None:
        """Gives a container what a torch module has: parameters first, then modules, as torch."""
        self.made[module] = into
        for key, p in module._parameters.items():
            if p is not None:
                put(into, key, self._parameter(p), f"{path}.{key}".strip("."))
        for key, b in module._buffers.items():
            if b is None:
                continue
            whole = f"{path}.{key}".strip(".")
            kept = key not in module._non_persistent_buffers_set
            if b.is_floating_point() or b.dtype in BUFFERS:
                put(into, key, _constant(b, kept), whole)
            elif kept:
                self.reasons.append(
                    f"net.{whole}: a buffer of {b.dtype}; instead: float32 or int64, or where "
                    f"forward does not read it register_buffer({key!r}, ..., persistent=False)"
                )
        for key, child in module._modules.items():
            if child is None:
                continue
            whole = f"{path}.{key}".strip(".")
            if child in self.made:
                put(into, key, self.made[child], whole)
            elif is_layer(child) and whole in places:
                made = self._layer(child, whole, places)
                self.made[child] = made
                put(into, key, made, whole)
            else:
                part = Part()
                put(into, key, part, whole)
                self._fill(part, child, whole, places)

    def _layer(self, layer: torch.nn.Module, path: str, places: dict[str, str]) -> Module:
        """Our layer with the arguments and values of torch's; a reason where there is none."""
        place = places.get(path, "")
        title = f"net.{path}: {layer!r:.60}".split("\n")[0]
        try:
            made = self._twin(layer)
        except GraphnetError as error:
            text = f"{error.message}{f'; {error.help}' if error.help else ''}"
            self.reasons.append(f"{title}{f' ({place})' if place else ''}: {text}")
            made = Part()
        made.__dict__["place"] = place
        return made

    def _twin(self, layer: torch.nn.Module) -> Module:
        kind = getattr(layers, type(layer).__name__, None)
        if kind is None and isinstance(layer, torch.nn.Identity):
            return Identity()
        if hasattr(layer, "parametrizations"):
            raise UnsupportedOpError(
                "it has parametrizations",
                help="torch.nn.utils.parametrize.remove_parametrizations(layer, \"weight\")",
            )
        if kind is None or not issubclass(kind, Module):
            raise UnsupportedOpError(f"no such layer{instead_of_layer(type(layer).__name__)}")
        if layer._forward_pre_hooks or layer._forward_hooks:
            raise UnsupportedOpError(
                "it has hooks (weight_norm is one)",
                help="torch.nn.utils.remove_weight_norm(layer), or the like",
            )
        made = kind(**_arguments(layer, kind))
        for key, p in layer._parameters.items():
            if p is not None:
                put(made, key, self._parameter(p))
        for key, b in layer._buffers.items():
            if b is not None:
                getattr(made, key).data = b.detach()
        if layer._buffers and self.module.training and not layer.training:
            made.frozen = True  # left in eval mode inside a module that trains
        return made

    def _parameter(self, p: torch.nn.Parameter) -> Parameter:
        if p not in self.parameters:
            if p.is_meta or not p.is_floating_point():
                raise UnsupportedOpError(f"a parameter of dtype {p.dtype} on {p.device}")
            self.parameters[p] = Parameter(p.detach(), trainable=p.requires_grad)
        return self.parameters[p]


def _constant(t: torch.Tensor, persistent: bool) -> Buffer:
    t = t.detach()
    return Buffer(t.float() if t.is_floating_point() else t, persistent)


_IN_PLACE = {f"i{n}" for n in ("add", "sub", "mul", "truediv")}


def _unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """ConfigError for what only wraps the module that is meant, and for what holds no Python."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ConfigError(
            f"{called(module)} holds no Python to record",
            help="convert the module that it was made from",
        )
    for name in ("_orig_mod", "module"):  # torch.compile, DataParallel
        inner = getattr(module, name, None)
        if isinstance(inner, torch.nn.Module) and type(module).__module__.startswith("torch."):
            raise ConfigError(
                f"{called(module)} wraps a module", where=user_place() or None,
                help=f"give what it wraps: gn.from_torch(module.{name})",
            )  # fmt: skip
    return module


def _arguments(layer: torch.nn.Module, kind: type) -> dict[str, Any]:
    """What our layer of the same name is made with: torch keeps its arguments as attributes."""
    out = {}
    for name, p in inspect.signature(kind).parameters.items():
        if p.kind is not p.KEYWORD_ONLY and hasattr(layer, name):
            value = getattr(layer, name)
            out[name] = value is not None if name == "bias" else value
    return out
