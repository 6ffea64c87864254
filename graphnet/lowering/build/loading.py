"""Binaries of our cache in Triton's hands: its launcher runs them and compiles nothing.

Triton's own cache verifies nothing, and to ask it takes hashing its library first. So where a
kernel would be compiled it is handed what the workers have made, if that is the same kernel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from graphnet.lowering.launch.files import private_dir


def specialised(src: Any) -> str:
    """SHA-256 of a kernel as Triton is about to compile it: text, types, alignment, constants.

    Triton's own hash of a source depends on what was hashed before it in the process: constants
    of a function that it calls are part of it only from the second time on.
    """
    plain = {k: getattr(v, "src", v) for k, v in src.constants.items()}  # of a function its text
    asked = (src.fn.src, src.signature, sorted(src.attrs.items()), sorted(plain.items()))
    return hashlib.sha256(repr(asked).encode()).hexdigest()


def loaded(
    kernel: Any, grid: tuple[int, ...], args: list[Any], named: dict[str, Any],
    key: str, about: Mapping[str, Any],
) -> Any:  # fmt: skip
    """Triton's compiled kernel for a launch, which that launch then finds.

    kernel      the jit function; `args` and `named` are what it is launched with
    key, about  the cached binary that was made for it (`build.compile_launches`)

    What Triton asks for may still be another kernel (a tensor that is not aligned as those of a
    plan are, an option in the environment): that is compiled here, as Triton does it.
    """
    from triton.runtime.driver import driver

    kernel.device_caches[driver.active.get_current_device()]  # makes what is exchanged below
    own = kernel.compile

    def provide(src: Any, target: Any = None, options: Any = None, **rest: Any) -> Any:
        found = _same(src, options or {}, key, about)
        return own(src, target=target, options=options, **rest) if found is None else found

    kernel.compile = provide
    try:
        return kernel.warmup(*args, grid=grid, **named)
    finally:
        kernel.compile = own


def _same(src: Any, options: dict[str, Any], key: str, about: Mapping[str, Any]) -> Any:
    """The binary of a key as Triton keeps kernels; None where that is not what `src` is."""
    from triton.compiler import CompiledKernel

    if specialised(src) != about["source"]:
        return None
    folder = private_dir("binaries")
    group = {f"kernel.{as_}": str(folder / f"{key}.{file}")
             for as_, file in (("json", "meta"), ("cubin", "cubin"), ("ptx", "ptx"))}  # fmt: skip
    described = (folder / f"{key}.meta").read_bytes()
    # What was asked for, and for the rest what came out: specialised warps are counted together.
    built = {**json.loads(described), **about["parts"]["options"]}
    asked = json.loads(json.dumps(options, default=vars))
    if any(built.get(name) != value for name, value in asked.items()):
        return None
    made = CompiledKernel(src, group, key)
    read = {"meta": described, "cubin": made.asm["cubin"]}
    whole = all(hashlib.sha256(data).hexdigest() == about["files"][f] for f, data in read.items())
    return made if whole else None
