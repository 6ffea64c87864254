"""What torch offers for the same work: every variant is tried, the best one is the peer.

A variant is a memory layout, a form of the optimizer, a form of the precision, and a mode of
torch.compile. Batch and labels lie on the device beforehand, in the variant's own layout and
element type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import nn

from graphnet.bench.rounds import Contestant, Run, sentence, start
from graphnet.bench.twin import torch_twin

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
OPTIMIZERS: dict[str, dict[str, bool]] = {
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "plain": {"foreach": False},
    "compiled": {"foreach": True},
}
MODES = ("train", "infer", "grads")  # grads: forward and backward, no update


@dataclass(frozen=True)
class Kind:
    """A family of variants that is reported by its best.

    modes      of torch.compile; "" is eager
    sgd        forms of the optimizer that are tried
    graph      the whole step in one CUDA graph
    gpu_modes  those of `modes` that are CUDA graphs by another name
    """

    modes: tuple[str, ...] = ("",)
    sgd: tuple[str, ...] = ("foreach", "fused", "plain")
    graph: bool = False
    gpu_modes: tuple[str, ...] = ()


_COMPILED = ("fused", "compiled")
KINDS = {
    "eager": Kind(),
    "eager-graph": Kind(graph=True),
    "compile": Kind(("default", "reduce-overhead"), _COMPILED, gpu_modes=("reduce-overhead",)),
    "compile-max": Kind(("max-autotune",), _COMPILED),
}


@dataclass(frozen=True)
class Work:
    """What is timed: a net, one batch on the device, and the update.

    mode  "train" (sgd is the update), "infer" or "grads"
    """

    net: Any
    x: torch.Tensor
    y: torch.Tensor
    mode: str = "infer"
    sgd: Any = None
    precision: str = "fp32"

    @property
    def device(self) -> torch.device:
        return self.x.device


@dataclass(frozen=True)
class Variant:
    """One way to do the work in torch. `form` is "" or, in bf16, "autocast" or "pure"."""

    kind: str
    layout: str
    sgd: str = ""
    form: str = ""
    mode: str = ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.kind, self.layout, self.sgd, self.form, self.mode)))


def variants(kind: str, work: Work, like: str = "") -> tuple[list[Variant], str]:
    """The variants of a kind that make sense for the work on its device; where there are none,
    the reason.

    like  name of an eager variant: of a compiled kind only what is like it but for compiling
    """
    k, gpu = KINDS[kind], work.device.type == "cuda"
    if k.graph and not gpu:
        return [], "not applicable: a CUDA graph needs a GPU"
    # A compiled optimizer pays where launches cost; building one for a CPU takes a C++ compiler.
    sgd = k.sgd if gpu else tuple(s for s in k.sgd if s != "compiled")
    forms = ("autocast", "pure") if work.precision == "bf16" else ("",)
    modes = tuple(m for m in k.modes if gpu or m not in k.gpu_modes)
    made = [
        Variant(kind, layout, how, form, mode)
        for mode in modes
        for layout in LAYOUTS
        for how in (sgd if work.mode == "train" else ("",))
        for form in forms
    ]
    if like and modes != ("",):
        alike = lambda v, sgd: replace(v, kind="eager", mode="", sgd=sgd).name == like
        # A form of the update that is not compiled, like a plain one, stands for the first that is.
        made = [v for v in made if alike(v, v.sgd)] or [
            v for v in made if v.sgd == sgd[0] and any(alike(v, how) for how in OPTIMIZERS)
        ]
    return made, ""


@contextmanager
def torch_flags(precision: str) -> Iterator[None]:
    """Inside, torch may use TF32 unless fp32 is asked for, and times cuDNN's algorithms.

    torch's settings of the process stand again on the way out.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = precision != "fp32"
    cudnn.benchmark = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


# ---- building a variant ----------------------------------------------------------------------


def autocast(form: str, device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if form == "autocast" else nullcontext()


def module_of(work: Work, v: Variant) -> tuple[nn.Module, torch.Tensor]:
    """The twin of the net and the batch, as the variant stores them."""
    module: Any = torch_twin(work.net)
    module = module.to(work.device, memory_format=LAYOUTS[v.layout])
    x = work.x.contiguous(memory_format=LAYOUTS[v.layout])
    if v.form == "pure":
        module, x = module.to(torch.bfloat16), x.to(torch.bfloat16)
    return module.train(work.mode != "infer"), x


_numbers = count()


def _compiled(function: Any, mode: str) -> Any:
    """The function under torch.compile, as code of its own.

    torch.compile keeps what it compiled by code object and gives up silently behind eight: the
    ninth variant made by one `def` would run in eager mode.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    own = FunctionType(
        code, function.__globals__, code.co_name, function.__defaults__, function.__closure__
    )
    return torch.compile(own, mode=mode)


class _Master:
    """fp32 parameters behind a bf16 module: gradients are widened, the result is rounded back."""

    def __init__(self, module: nn.Module) -> None:
        self.low: list[Any] = list(module.parameters())
        self.high: list[Any] = [nn.Parameter(p.detach().float()) for p in self.low]
        for p in self.high:
            p.grad = torch.zeros_like(p)

    def before(self) -> None:
        torch._foreach_copy_([p.grad for p in self.high], [p.grad for p in self.low])

    def after(self) -> None:
        torch._foreach_copy_(self.low, self.high)


def _update(work: Work, v: Variant, module: nn.Module) -> Callable[[], None]:
    """What follows the backward pass."""
    if work.sgd is None:
        return lambda: None
    s = work.sgd
    master = _Master(module) if v.form == "pure" else None
    parameters = module.parameters() if master is None else master.high
    sgd = torch.optim.SGD(
        parameters, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay,
        nesterov=s.nesterov, **OPTIMIZERS[v.sgd],
    )  # fmt: skip

    def plain() -> None:
        sgd.step()

    step = _compiled(plain, "default") if v.sgd == "compiled" else plain
    if master is None:
        return step

    @torch.no_grad()
    def update() -> None:
        master.before()
        step()
        master.after()

    return update


def _whole_step(work: Work, v: Variant) -> Callable[[], Any]:
    module, x = module_of(work, v)
    wrap: Any = (lambda f: _compiled(f, v.mode)) if v.mode else lambda f: f

    def forward(x: torch.Tensor) -> torch.Tensor:
        with autocast(v.form, work.device):
            return module(x)

    if work.mode == "infer":
        logits = wrap(forward)

        @torch.inference_mode()
        def infer() -> Any:
            return logits(x)

        return infer

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with autocast(v.form, work.device):
            return nn.functional.cross_entropy(module(x).float(), y)

    loss, update = wrap(loss_of), _update(work, v, module)
    parameters = list(module.parameters())

    def step() -> None:
        for p in parameters:  # zero_grad(set_to_none=True)
            p.grad = None
        loss(x, work.y).backward()
        update()

    return step


def _captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # cuDNN picks its algorithms, the optimizer makes its state
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    # A graph holds addresses alone: the module, its batch and the optimizer live with the step.
    def replay(_keep: Callable[[], Any] = step) -> None:
        graph.replay()

    return replay


def build(work: Work, v: Variant) -> Run:
    """The variant, ready to run."""
    step = _whole_step(work, v)
    if KINDS[v.kind].graph:
        step = _captured(step)

    def run(steps: int) -> None:
        for _ in range(steps):
            step()

    return run


def start_all(work: Work, kind: str, like: str = "") -> tuple[list[Contestant], dict[str, str]]:
    """The variants of a kind, started; and why the others could not be, by name."""
    found, why = variants(kind, work, like)
    failures = {} if found else {kind: why}
    out = []
    for v in found:
        try:
            out.append(start(v.name, kind, lambda v=v: build(work, v), work.device))  # type: ignore[misc]
        except Exception as error:  # a peer's failure is a result, not ours
            failures[v.name] = sentence(error)
        if failures and work.device.type == "cuda":
            torch.cuda.empty_cache()  # what a failed variant held must not fail the next one
    return out, failures
