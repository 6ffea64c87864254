"""What `graphnet doctor` prints: what is installed here, what works, and what to do where not.

It must run on a broken installation, so nothing of graphnet beyond its lowest floor is imported
before it is tried.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graphnet import __version__, config
from graphnet.errors import ConfigError

_PACKAGES = ("torch", "triton", "numpy", "networkx", "safetensors", "typer")
_ROOT = Path(__file__).parent
# What, finding, whether it is a fault; of what works but for something, that as a sentence.
Line = tuple[str, str, bool | str]


def doctor_text() -> tuple[str, bool]:
    """(the findings and what follows from them, whether nothing is at fault). No GPU is no fault; a
    GPU that fails is."""
    parts: list[tuple[str, Callable[[], list[Line]]]] = [
        ("versions", _versions), ("links", links), ("cache", cache), ("targets", _targets),
        ("flags", flags),
    ]  # fmt: skip
    out, but, healthy = [], [], True
    for title, find in parts:
        lines = find()
        out.append(title)
        for what, finding, fault in lines:
            mark = "!" if fault is True else "?" if fault else " "
            out.append(f"{mark} {what:<12} {finding}".rstrip())
            healthy &= fault is not True
            but += [f"  {fault}"] if isinstance(fault, str) and fault else []
    end = "all is well" if healthy else "faults are marked with !"
    if but:
        end = f"{'it works' if healthy else end}, but (marked with ?):"
    return "\n".join([*out, end, *but]), healthy


def _one_line(error: BaseException) -> str:
    text = "; ".join(filter(None, map(str.strip, str(error).splitlines())))
    return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}"


# ---- what is installed ----------------------------------------------------------------------


def _versions() -> list[Line]:
    lines: list[Line] = [("graphnet", __version__, False)]
    lines.append(("python", platform.python_version(), False))
    for name in _PACKAGES:
        try:
            lines.append((name, importlib.metadata.version(name), False))
        except importlib.metadata.PackageNotFoundError:
            needed = name != "triton" or platform.system() == "Linux"
            lines.append((name, f"missing: pip install {name}", needed))
    return [*lines, _assembler(), _compiler(), _gpu()]


def _assembler() -> Line:
    from graphnet.errors import GraphnetError

    try:
        from graphnet.lowering.build.tools import ptxas

        path, version = ptxas()
    except (GraphnetError, ImportError) as error:
        return "ptxas", _one_line(error), platform.system() == "Linux"
    if not version.startswith("12.8."):
        return "ptxas", f"{version}, {path}", False
    note = f"{version}, {path}; known to miscompile some kernels for Hopper"
    if _hopper():
        return "ptxas", f"{note}, as this GPU is: set TRITON_PTXAS_PATH to a newer one", True
    return "ptxas", note, (
        "binaries for Hopper (sm_90) that are made here may be wrong, and no GPU here can prove "
        "them: set TRITON_PTXAS_PATH to a newer assembler before you take them to one"
    )  # fmt: skip


def _compiler() -> Line:
    """The cpu target works without one, in more time."""
    try:
        from graphnet.lowering.build import native

        found = native.compiler_of("batch_norm")
        if found:
            return "C compiler", f"{found}: batch normalization on the cpu target", False
        why = native.why_not("batch_norm")
    except ImportError as error:
        why = _one_line(error)
    if why.startswith("GRAPHNET_DISABLE"):
        return "C compiler", f"not used: {why}", False
    note = "batch normalization on the cpu target runs in torch's kernels: a training step of a "
    note += "ResNet-20 takes an eighth more"
    return "C compiler", f"not used: {why}", platform.system() == "Linux" and note


def _hopper() -> bool:
    """Whether the GPU at hand is one; a GPU that fails is a line of its own."""
    try:
        import torch

        return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    except Exception:
        return False


def _gpu() -> Line:
    try:
        import torch

        if not torch.cuda.is_available():
            return "GPU", "none", False
        about = torch.cuda.get_device_properties(torch.cuda.current_device())
        free, total = (n / 2**30 for n in torch.cuda.mem_get_info())
    except Exception as error:
        return "GPU", _one_line(error), True
    arch = f"sm_{about.major}{about.minor}"
    return "GPU", f"{about.name}, {arch}, {free:.1f} of {total:.1f} GiB free", False


def links(root: Path = _ROOT) -> list[Line]:
    """`kernels` and `frontends` are links in a checkout, and folders in an installed package."""
    lines: list[Line] = []
    for name in ("kernels", "frontends"):
        path = root / name
        if path.is_dir():
            kind = f"link to {os.readlink(path)}" if path.is_symlink() else "folder"
            lines.append((name, kind, False))
        elif path.is_file():  # what git leaves where core.symlinks is off
            fix = f"git config core.symlinks true && rm {path} && git checkout -- {path}"
            lines.append((name, f"a text file, no link: {fix}", True))
        elif path.is_symlink():
            lines.append((name, f"link to {os.readlink(path)}, which is not there", True))
        else:
            lines.append((name, f"missing: ln -s ../{name} {path}, or install again", True))
    return lines


def cache() -> list[Line]:
    """The folder of compiled kernels: there or not, whose, and whether others can write to it."""
    folder = config.cache_dir()
    if not folder.exists():
        above = next(p for p in folder.absolute().parents if p.exists())
        usable = above.is_dir() and os.access(above, os.W_OK)
        found = "not made yet" if usable else f"cannot be made: {above} is not writable"
        return [("folder", f"{folder}: {found}", not usable)]
    if not folder.is_dir():
        return [("folder", f"{folder} is no folder: set GRAPHNET_CACHE_DIR", True)]
    if folder.is_symlink():
        return [("folder", f"{folder} is a symbolic link: set GRAPHNET_CACHE_DIR", True)]
    about = folder.stat()
    shared = about.st_mode & 0o022
    own = not hasattr(os, "getuid") or about.st_uid == os.getuid()
    usable = own and os.access(folder, os.W_OK | os.X_OK)
    count = len(list(folder.glob("binaries/*.cubin"))) if usable else 0
    whose = "yours" if own else f"belongs to user {about.st_uid}: set GRAPHNET_CACHE_DIR"
    writable = "" if usable or not own else ", not writable"
    writable += f", others can write to it: chmod go-w {folder}" if shared else ""
    finding = f"{folder}: {whose}{writable}, mode {about.st_mode & 0o777:04o}, {count} binaries"
    return [("folder", finding, not usable or bool(shared))]


def flags() -> list[Line]:
    """Every GRAPHNET_* flag with its value and what it does."""
    fault: dict[str, str] = {}
    numbers = {"DEBUG": config.debug, "CHECK": config.check, "TUNE": config.tune,
               "STREAMS": config.streams}  # fmt: skip
    for name, read in numbers.items():
        try:
            read()
        except ConfigError as error:
            fault[name] = error.help or error.message
    lines: list[Line] = []
    for name, about in config.FLAGS.items():
        value = config.get(name) or "-"
        text = f"{value:<10} {fault.get(name, about)}"
        lines.append((f"GRAPHNET_{name}".ljust(18), text, name in fault))
    unknown = {k for k in os.environ if k.startswith("GRAPHNET_")}
    unknown -= {f"GRAPHNET_{name}" for name in config.FLAGS}
    return lines + [(name, "no flag of this version", False) for name in sorted(unknown)]


# ---- what works -----------------------------------------------------------------------------


def _targets() -> list[Line]:
    """Each target trains a tiny net for a step, and must agree with cpu; nothing is assumed."""
    lines: list[Line] = []
    try:
        import torch

        want, took = _timed(lambda: _step("cpu"))
    except Exception as error:
        return [("cpu", f"fails: {_one_line(error)}", True)]
    lines.append(("cpu", f"works ({took:.1f} s)", False))
    has_gpu = torch.cuda.is_available()
    for target in ("interpret", "cuda"):
        if target == "cuda" and not has_gpu:
            lines.append((target, "no GPU here; graphnet compile needs none", False))
            continue
        try:
            got, took = _timed(lambda t=target: _step(t))  # type: ignore[misc]
        except Exception as error:
            note = "target interpret does not work here; the others do not need it"
            fault = True if target == "cuda" else note
            lines.append((target, f"fails: {_one_line(error)}", fault))
            continue
        off = max(abs(a - b) for a, b in zip(want, got, strict=True))
        wrong = not off < 1e-4  # NaN is wrong
        lines.append(
            (target, f"differs from cpu by {off:.1e}" if wrong else f"works ({took:.1f} s)", wrong)
        )
    try:
        _, took = _timed(_build)
        lines.append(("compile", f"works for sm_90 ({took:.1f} s)", False))
    except Exception as error:
        lines.append(("compile", f"fails: {_one_line(error)}", platform.system() == "Linux"))
    return lines


def _timed(work: Callable[[], list[float]]) -> tuple[list[float], float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _arguments() -> tuple[Any, ...]:
    """A net with fixed weights, one batch for it, a loss and an optimizer."""
    import torch

    import graphnet as gn

    net = gn.Sequential(gn.Conv2d(1, 2, 3), gn.ReLU(), gn.Flatten(), gn.Linear(8, 3))
    torch_rng = torch.Generator().manual_seed(0)
    values = {k: torch.randn(v.shape, generator=torch_rng) / 4 for k, v in net.state_dict().items()}
    net.load_state_dict(values)
    x = torch.randn(2, 1, 4, 4, generator=torch_rng)
    return net, x, torch.tensor([0, 2]), gn.CrossEntropyLoss(), gn.SGD(lr=0.1)


def _step(target: str) -> list[float]:
    """Losses of two training steps: the second one sees what the first has learned."""
    import graphnet as gn

    net, x, y, loss, sgd = _arguments()
    step: Any = gn.compile(
        net, tuple(x.shape), target=target, precision="fp32", loss=loss, optimizer=sgd
    )
    if target == "cuda":
        x, y = x.cuda(), y.cuda()
    return [float(step(x, y)) for _ in range(2)]


def _build() -> list[float]:
    import graphnet as gn

    net, x, _, _, _ = _arguments()
    return [gn.build(net, tuple(x.shape)).seconds]
