"""gn.Module -> torch.nn.Module: our programs inside torch's autograd.

`as_torch` gives a module that a loop of torch's trains with its own losses and optimizers. Its
forward and backward are two programs: the joint graph of the net and its backward pass from given
cotangents, split behind all passes. They are compiled when they are first needed, for the inputs
whose gradients are asked for.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from graphnet import api, config
from graphnet.errors import ConfigError, DTypeError, GraphError
from graphnet.frontends.dsl import Buffer, Module, Parameter
from graphnet.frontends.foreign import called
from graphnet.frontends.tracer import user_place
from graphnet.frontends.tracing import trace
from graphnet.passes.autodiff import reached
from graphnet.runtime.passes import Backward, Forward
from graphnet.runtime.state import state_of


def as_torch(
    net: Module, shape: Sequence[int], *, target: str = "auto", precision: str = "auto",
    seed: int = 0,
) -> TorchModule:
    """A torch.nn.Module that computes a net with programs compiled for inputs of `shape`.

    target, precision, seed  as in `gn.compile`

    Parameters are `torch.nn.Parameter`s on the storage of the net's own, under the same keys, so
    that torch's optimizers train the net; one that is not trainable has requires_grad=False.
    `.train()` and `.eval()` choose what dropout does. A batch may be smaller than compiled. What
    the backward pass reads is kept in buffers of the latest forward call: an earlier call has no
    backward pass any more, and says so.
    """
    if not isinstance(net, Module):
        raise ConfigError(
            f"as_torch takes a gn.Module, not {called(net)}", where=user_place() or None,
            help="gn.from_torch(module) makes one" if isinstance(net, torch.nn.Module) else None,
        )  # fmt: skip
    how = {"target": api._resolve(target), "precision": precision}
    return TorchModule(net, tuple(shape), how, seed)


class _Part(torch.nn.Module):
    """A container: torch wants one for each dot in a key."""


class TorchModule(torch.nn.Module):
    """What `as_torch` returns.

    net    the net; `net.state_dict()` and the module's are the same values
    shape  what it is compiled for, batch first
    """

    def __init__(self, net: Module, shape: tuple[int, ...], how: dict[str, Any], seed: int) -> None:
        super().__init__()
        traced = trace(net, shape)
        self.net, self.shape = net, shape
        self._how, self._seed, self._masks = how, seed, 0
        self._passes: dict[Any, tuple[Forward, Backward | None]] = {}
        self._infer: Any = None
        self._moved = True  # whether parameters may differ from their copies
        self._versions: list[int] = []
        device = api._device(how["target"])
        state = state_of(net, device)
        with state.lock:
            entries = state.attach(traced)
            state.acquire(entries)
            for b in net.buffers():  # those, too, that only training reads
                b.live = b.live.to(device)
        self._keys = tuple(key for key, _ in net.named_parameters())
        self._own = self._adopt(net)

    def _adopt(self, net: Module) -> tuple[torch.nn.Parameter, ...]:
        """Registers the net's parameters, each on the storage that the programs read."""
        made: dict[Any, torch.nn.Parameter] = {}
        for key, p in net._keys():
            *parts, last = key.split(".")
            into: torch.nn.Module = self
            for part in parts:
                if part not in into._modules:
                    into.add_module(part, _Part())
                into = into.get_submodule(part)
            if isinstance(p, Buffer):
                into.register_buffer(last, p.data, p.persistent)
                continue
            assert isinstance(p, Parameter)
            if p not in made:
                made[p] = torch.nn.Parameter(p.data, requires_grad=p.trainable)
            into.register_parameter(last, made[p])
        return tuple(made.values())

    # ---- programs ---------------------------------------------------------------------------

    def passes(
        self, wrt: Sequence[str] | None = None, training: bool = True
    ) -> tuple[Forward, Backward | None]:
        """The forward and the backward program with respect to inputs, by name: by default to the
        parameters that require gradients."""
        if wrt is None:
            wrt = [k for k, p in zip(self._keys, self._own, strict=True) if p.requires_grad]
        key = (tuple(wrt), training)
        if key not in self._passes:
            self._passes[key] = _compiled(self.net, self.shape, self._how, self._seed, *key)
        return self._passes[key]

    def _inference(self, x: torch.Tensor) -> Any:
        if self._infer is None:
            self._infer = api.compile(self.net, self.shape, seed=self._seed, **self._how)
        versions = [p._version for p in self._own]
        if self._moved or versions != self._versions:
            self._infer.state.stale = True
            self._moved, self._versions = False, versions
        return self._infer(x)

    def forward(self, x: torch.Tensor) -> Any:
        """The net's result for a batch of at most shape[0] rows."""
        if x.dtype in (torch.float16, torch.bfloat16):  # of a module before it, under autocast
            x = x.float()
        elif x.dtype != torch.float32:
            raise DTypeError(f"the input has dtype {x.dtype}, not torch.float32", help="x.float()")
        asked = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self._own)
        )
        if not self.training and not asked:
            return self._inference(x)
        out = _Run.apply(self, x, *self._own)
        return out[0] if len(out) == 1 else out

    # ---- what torch does with modules -------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """What .to(), .cuda() and .half() call: the storage is the net's, and stays."""
        here = torch.empty(1, device=self._own[0].device if self._own else "cpu")
        there = fn(here)
        if (there.dtype, there.device) != (here.dtype, here.device):
            raise ConfigError(
                f"the programs of this module run on {here.device} with fp32 parameters, not on "
                f"{there.device} with {there.dtype}",
                where=user_place() or None,
                help='gn.as_torch(net, shape, target="cuda", precision="bf16") chooses both',
            )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchModule:
        made = TorchModule(copy.deepcopy(self.net, memo), self.shape, self._how, self._seed)
        made.training = self.training
        for mine, its in zip(self._own, made._own, strict=True):
            its.requires_grad_(mine.requires_grad)
        memo[id(self)] = made
        return made

    def extra_repr(self) -> str:
        about = ", ".join(f"{k}={v!r}" for k, v in self._how.items())
        return f"{self.net._title()}, {self.shape}, {about}"


class _Run(torch.autograd.Function):
    """One call of the two programs."""

    @staticmethod
    def forward(ctx: Any, module: TorchModule, x: torch.Tensor, *params: torch.Tensor) -> Any:
        names = ("x", *module._keys)
        wrt = tuple(n for n, need in zip(names, ctx.needs_input_grad[1:], strict=True) if need)
        forward, ctx.back = module.passes(wrt, module.training)
        ctx.names, module._moved = names, True
        out = forward(x, module._masks)
        module._masks += module.training
        ctx.call, ctx.forward = forward.calls, forward
        ctx.save_for_backward(*params)  # torch notices what changes them before the backward pass
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        _ = ctx.saved_tensors
        back = ctx.back
        if back is None:
            return (None,) * (1 + len(ctx.names))
        with back.state.lock:
            if ctx.call != ctx.forward.calls:
                raise GraphError(
                    "this is the backward pass of a forward call whose values are gone: a later "
                    "call has taken its buffers",
                    help="call backward before the next forward, join the batches, or use a second "
                    "gn.as_torch of the same net, which has buffers of its own",
                )
            found = back(cotangents)
        return (None, *(found.get(n) for n in ctx.names))


def _compiled(
    net: Module, shape: tuple[int, ...], how: dict[str, Any], seed: int, wrt: tuple[str, ...],
    training: bool,
) -> tuple[Forward, Backward | None]:
    """Both programs. They share buffers, so that both are lowered by the same kernels.

    On the cpu target they are two parts of one program, which keeps values in whatever form is
    best. Only where it is checked against float64, a graph at a time, they are two there as well.
    """
    traced = trace(net, shape, training=training)
    keys = reached(traced, wrt)
    whole = how["target"] == "cpu" and bool(keys) and not config.check()
    halves: tuple[int | None, ...] = (None,) if whole else (0, 1) if keys else (0,)
    args = [{**how, "pass_": api.Pass(half, keys, training)} for half in halves]
    lows = [api.lower(net, shape, **a) for a in args]
    if lows[0].target == "cuda":
        lows = _settled(net, shape, args[: len(lows)], lows)
    target = importlib.import_module(f"graphnet.lowering.targets.{lows[0].target}")
    common = [
        {"stages": low.stages, "plan": low.plan, "prepare": target.prepare, "seed": seed,
         "state": state_of(net, api._device(low.target)), "target": low.target,
         "precision": low.precision}
        for low in lows
    ]  # fmt: skip
    results = len(traced.returns)
    if whole:
        common[0]["prepare"] = partial(target.prepare, results=results)
    forward = Forward(results=results, **common[0])
    if not keys:
        return forward, None
    if whole:
        common.append({**common[0], "prepare": lambda plan, storage: forward.rest})
    return forward, Backward(keys=keys, forward=forward, **common[1])


def _settled(
    net: Module, shape: tuple[int, ...], args: Sequence[dict[str, Any]], lows: list[api.Lowered]
) -> list[api.Lowered]:
    """Both passes with choices that hold on this GPU, and the same ones."""
    cuda = importlib.import_module("graphnet.lowering.targets.cuda")
    for a, low in zip(args, lows, strict=True):
        api._make_sure_of_room(net, shape, a, low)
    cuda.compile_together([low.plan for low in lows])
    while True:
        before = lows[0].kernels
        for k, a in enumerate(args):
            kernels = lows[k - 1].kernels
            if lows[k].kernels is not kernels:
                lows[k] = api.lower(net, shape, **a, kernels=kernels)
            if config.tune() and lows[k].plan.launches:
                api.tune(lows[k])
            lows[k], _ = api.settle(lows[k], True, net, shape, **a)
        if lows[-1].kernels is lows[0].kernels is before or lows[0].kernels == lows[-1].kernels:
            return lows
