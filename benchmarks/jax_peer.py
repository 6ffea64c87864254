#!/usr/bin/env python3
"""The two training steps in JAX, as XLA compiles them: forward, loss, backward, SGD with momentum
and decay, the batch on the device.

    python benchmarks/jax_peer.py --json FILE [--batch 128] [--seconds 100]

Needs jax alone. Parameters and momenta are fp32; in bf16 they are rounded once a step, as autocast
does. `scan` rows run many steps in one call: what a graph of the whole step is elsewhere. The file
is rewritten after every row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
from jax import lax

LR, MOMENTUM, DECAY = 0.01, 0.9, 5e-4
WINDOWS, WINDOW_S = 7, 0.06
MATMUL = {"bf16": "default", "tf32": "tensorfloat32", "fp32": "highest"}
Params = list[tuple[jax.Array, jax.Array]]


# ---- the nets: NHWC images, HWIO filters -------------------------------------------------------


def conv(x: jax.Array, p: tuple[jax.Array, jax.Array], stride: int, pad: int) -> jax.Array:
    w, b = (t.astype(x.dtype) for t in p)
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(
        x, w, (stride, stride), [(pad, pad)] * 2, dimension_numbers=numbers
    )
    return jax.nn.relu(y + b)


def pool(x: jax.Array, size: int, stride: int) -> jax.Array:
    window, step = (1, size, size, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, step, "VALID")


def lrn(x: jax.Array) -> jax.Array:
    """Over 5 channels, as torch computes it: k 2, alpha 1e-4 by the size, beta 0.75."""
    squares = jnp.square(x.astype(jnp.float32))
    total = lax.reduce_window(squares, 0.0, lax.add, (1, 1, 1, 5), (1, 1, 1, 1), "SAME")
    return (x * (2.0 + 1e-4 / 5 * total) ** -0.75).astype(x.dtype)


def dense(x: jax.Array, p: tuple[jax.Array, jax.Array]) -> jax.Array:
    w, b = (t.astype(x.dtype) for t in p)
    return x @ w + b


def dropout(x: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)


def alexnet(p: Params, x: jax.Array, key: jax.Array) -> jax.Array:
    first, second = jax.random.split(key)
    x = lrn(pool(conv(x, p[0], 4, 0), 3, 2))
    x = lrn(pool(conv(x, p[1], 1, 2), 3, 2))
    x = conv(conv(x, p[2], 1, 1), p[3], 1, 1)
    x = pool(conv(x, p[4], 1, 1), 3, 2).reshape(x.shape[0], -1)
    x = dropout(jax.nn.relu(dense(x, p[5])), first)
    x = dropout(jax.nn.relu(dense(x, p[6])), second)
    return dense(x, p[7])


def lenet5(p: Params, x: jax.Array, key: jax.Array) -> jax.Array:
    x = pool(conv(x, p[0], 1, 2), 2, 2)
    x = pool(conv(x, p[1], 1, 0), 2, 2).reshape(x.shape[0], -1)
    for layer in p[2:4]:
        x = jax.nn.relu(dense(x, layer))
    return dense(x, p[4])


Net = Callable[[Params, jax.Array, jax.Array], jax.Array]
NETS: dict[str, tuple[Net, tuple[int, ...], list[tuple[int, ...]]]] = {
    "alexnet": (alexnet, (227, 227, 3), [
        (11, 11, 3, 96), (5, 5, 96, 256), (3, 3, 256, 384), (3, 3, 384, 384), (3, 3, 384, 256),
        (9216, 4096), (4096, 4096), (4096, 1000),
    ]),
    "lenet5": (lenet5, (28, 28, 1), [
        (5, 5, 1, 6), (5, 5, 6, 16), (400, 120), (120, 84), (84, 10),
    ]),
}  # fmt: skip
ROWS = [
    ("alexnet", "bf16", 1), ("alexnet", "tf32", 1), ("alexnet", "bf16", 20),
    ("lenet5", "fp32", 1), ("lenet5", "fp32", 500), ("lenet5", "bf16", 500),
]  # fmt: skip


# ---- a step ------------------------------------------------------------------------------------


def training(model: str, batch: int, precision: str) -> tuple[Any, Callable[[Any, Any], Any]]:
    """(the state, a step from state and key to state and loss)."""
    net, image, shapes = NETS[model]
    key = jax.random.PRNGKey(0)
    draw = lambda k, s: 0.02 * jax.random.normal(jax.random.fold_in(key, k), s)
    p: Params = [(draw(k, s), jnp.zeros(s[-1])) for k, s in enumerate(shapes)]
    x = jax.random.normal(key, (batch, *image))
    x = x.astype(jnp.bfloat16 if precision == "bf16" else jnp.float32)
    y = jax.random.randint(key, (batch,), 0, shapes[-1][-1])

    def loss_of(p: Params, key: jax.Array) -> jax.Array:
        logits = net(p, x, key).astype(jnp.float32)
        own = jnp.take_along_axis(logits, y[:, None], 1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - own)

    def step(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        p, m = state
        loss, grads = jax.value_and_grad(loss_of)(p, key)
        m = jax.tree.map(lambda m, g, p: MOMENTUM * m + g + DECAY * p, m, grads, p)
        return (jax.tree.map(lambda p, m: p - LR * m, p, m), m), loss

    return (p, jax.tree.map(jnp.zeros_like, p)), step


def timed(model: str, batch: int, precision: str, scan: int) -> dict[str, Any]:
    """Median milliseconds of a step over windows of steps; `scan` of them to a call."""
    with jax.default_matmul_precision(MATMUL[precision]):
        state, step = training(model, batch, precision)
        if scan > 1:
            call = lambda s, k: lax.scan(step, s, jax.random.split(k, scan))
        else:
            call = step
        run = jax.jit(call, donate_argnums=0)
        key = jax.random.PRNGKey(1)

        def seconds(calls: int) -> float:
            nonlocal state, loss
            began = time.perf_counter()
            for _ in range(calls):
                state, loss = run(state, key)
            jax.block_until_ready((state, loss))
            return time.perf_counter() - began

        loss = jnp.zeros(())
        cold = seconds(1)
        seconds(1)
        calls = max(1, min(200, int(WINDOW_S / seconds(1))))
        ms = [1e3 * seconds(calls) / calls / scan for _ in range(WINDOWS)]
    median = statistics.median(ms)
    return {
        "ms": median, "images_per_s": 1e3 * batch / median, "cold_s": cold,
        "loss": float(jnp.ravel(loss)[-1]),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    given = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    given.add_argument("--json", type=Path, help="file, or a folder that it gets a name in")
    given.add_argument("--batch", type=int, default=128)
    given.add_argument("--seconds", type=float, default=100.0, help="no row begins behind that")
    given.add_argument("--models", default="alexnet,lenet5")
    args = given.parse_args(argv)
    device = jax.devices()[0]
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    result: dict[str, Any] = {
        "schema": 2, "kind": "jax", "date": now,
        "machine": {"device": device.device_kind},
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]}, "rows": [],
        "complete": False,
    }  # fmt: skip
    path, began = args.json, time.perf_counter()
    if path is not None and path.is_dir():
        words = [w for w in device.device_kind.lower().split() if w != "nvidia"]
        path = path / f"{words[0]}-jax-{now[:10]}.json"

    def save() -> None:
        if path is not None:
            beside = path.with_suffix(".part")
            beside.write_text(json.dumps(result, indent=1) + "\n")
            beside.replace(path)

    asked = [row for row in ROWS if row[0] in args.models.split(",")]
    for model, precision, scan in asked:
        if time.perf_counter() - began > args.seconds:
            break
        row = {"model": model, "batch": args.batch, "precision": precision, "scan": scan}
        try:
            row |= {"failure": "", **timed(model, args.batch, precision, scan)}
            print(f"{model} b{args.batch} {precision} scan {scan}: {row['ms']:.4f} ms", flush=True)
        except Exception as error:  # a row that fails is a result
            row["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            print(f"{model} b{args.batch} {precision}: {row['failure']}", flush=True)
        result["rows"].append(row)
        save()
    result["complete"] = len(result["rows"]) == len(asked)
    save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
