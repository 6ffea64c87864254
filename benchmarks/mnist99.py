#!/usr/bin/env python3
"""How long LeNet-5 trains to 99 % test accuracy on MNIST, with the data on the device.

    GRAPHNET_DATA=DIR python benchmarks/mnist99.py --seeds 0-9 --json benchmarks/results

A fixed recipe: images as value / 255, batch 256, 3 epochs (705 steps), Nesterov momentum 0.9,
weight decay 5e-4, He initialization, a learning rate that rises to 0.15 in a line over a quarter
of the steps and falls to 0 in a line. The time is that of the steps, from the first to the end of
the last one; compiling, a warm-up on another net, and the test at the end are not in it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import graphnet as gn
from graphnet import config
from graphnet.bench import facts
from graphnet.bench.result import SCHEMA
from graphnet.bench.rounds import wait
from graphnet.errors import GraphnetError
from graphnet.train.checkpoint import atomic_write
from graphnet.train.data import Dataset, load

GOAL = 0.99
RECIPE: dict[str, Any] = {
    "batch": 256, "epochs": 3, "lr": 0.15, "up": 0.25, "momentum": 0.9, "nesterov": True,
    "weight_decay": 5e-4, "init": "He", "images": "value / 255", "steps_per_rate": 3,
}  # fmt: skip


def triangle(at: float, total: int) -> float:
    """The learning rate in step `at`: up in a line, then down to 0 in a line."""
    top = RECIPE["up"] * total
    return RECIPE["lr"] * (at / top if at < top else (total - at) / (total - top))


def he_init(net: gn.Module, seed: int) -> None:
    """Weights from a normal distribution of variance 2 / fan-in, no bias."""
    g = torch.Generator().manual_seed(seed)
    net.load_state_dict({
        k: torch.zeros_like(p) if p.ndim == 1
        else torch.randn(p.shape, generator=g) * (2 / p[0].numel()) ** 0.5
        for k, p in net.state_dict().items()
    })  # fmt: skip


def train(step: Any, total: int) -> float:
    """Seconds of `total` steps over the bound data."""
    every = RECIPE["steps_per_rate"]
    wait(step.device)
    begin = time.perf_counter()
    for at in range(0, total, every):
        count = min(every, total - at)
        step.optimizer.lr = triangle(at + count / 2, total)
        step.run(count)
    wait(step.device)
    return time.perf_counter() - begin


def accuracy(infer: Any, test: Dataset, batch: int) -> float:
    images = replace(test, mean=(0.0,), std=(1.0,)).normalised(test.images)
    right = sum(
        int((infer(x.to(infer.device)).argmax(1).cpu() == y).sum())
        for x, y in zip(images.split(batch), test.labels.split(batch), strict=True)
    )
    return right / len(test.labels)


def one_seed(seed: int, data: tuple[Dataset, Dataset], target: str, precision: str,
             epochs: int) -> dict[str, Any]:  # fmt: skip
    train_set, test_set = data
    batch = min(RECIPE["batch"], len(train_set.labels))
    total = epochs * -(-len(train_set.labels) // batch)
    shape = (batch, 1, 28, 28)
    sgd = gn.SGD(
        lr=RECIPE["lr"], momentum=RECIPE["momentum"], weight_decay=RECIPE["weight_decay"],
        nesterov=RECIPE["nesterov"],
    )  # fmt: skip

    def ready(seed: int) -> tuple[gn.Module, Any]:
        net = gn.models.lenet5()
        he_init(net, seed)
        step: Any = gn.compile(
            net, shape, target=target, precision=precision, seed=seed,
            loss=gn.CrossEntropyLoss(), optimizer=sgd,
        )  # fmt: skip
        return net, step.bind(train_set.images, train_set.labels)

    begin = time.perf_counter()
    net, step = ready(seed)
    _, other = ready(seed + 1_000_000)  # warms up the machine, and learns for nobody
    train(other, min(total, 30))
    compile_s = time.perf_counter() - begin
    train_s = train(step, total)
    infer = gn.compile(net, (min(1000, len(test_set.labels)), 1, 28, 28), target=target)
    return {
        "seed": seed, "steps": total, "compile_s": compile_s, "train_s": train_s,
        "accuracy": accuracy(infer, test_set, infer.shape[0]),
    }  # fmt: skip


def seeds_of(text: str) -> list[int]:
    """ "0-9" or "3" or "0,4"."""
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else [int(s) for s in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    given = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = config.data_dir()
    default = f"mnist:{folder / 'mnist'}" if folder else None
    given.add_argument("--data", default=default, help="default: mnist in GRAPHNET_DATA")
    given.add_argument("--target", default="auto")
    given.add_argument("--precision", default="fp32")
    given.add_argument("--seeds", type=seeds_of, default=seeds_of("0-9"))
    given.add_argument("--epochs", type=int, default=RECIPE["epochs"])
    given.add_argument("--json", type=Path, help="file, or a folder that it gets a name in")
    a = given.parse_args(argv)
    if a.data is None:
        given.error("no data: set GRAPHNET_DATA, or give --data mnist:DIR")
    data = load(a.data, "train", shape=(1, 28, 28)), load(a.data, "test", shape=(1, 28, 28))
    target = ("cuda" if torch.cuda.is_available() else "cpu") if a.target == "auto" else a.target
    device = torch.device("cuda" if target == "cuda" else "cpu")
    set_name, epochs = a.data.partition(":")[0], a.epochs
    asked = [f"--precision {a.precision}", f"--seeds {a.seeds[0]}-{a.seeds[-1]}"]
    result: dict[str, Any] = {
        "schema": SCHEMA, "kind": "mnist99", "target": target, "precision": a.precision,
        "date": facts.now(), "machine": facts.machine(device), "versions": facts.versions(),
        "recipe": {**RECIPE, "epochs": epochs, "data": set_name},
        "command": shlex.join(["python", "benchmarks/mnist99.py"]) + " " + " ".join(asked),
        "complete": False, "rows": [],
    }  # fmt: skip
    name = (result["machine"]["device"], "mnist99", a.precision, result["date"][:10])
    path = a.json
    if path is not None and path.is_dir():
        path = path / f"{facts.gpu_slug(name[0])}-{'-'.join(name[1:])}.json"

    def save() -> None:
        if path is not None:
            atomic_write(path, (json.dumps(result, indent=1) + "\n").encode())

    for seed in a.seeds:
        row = one_seed(seed, data, target, a.precision, epochs)
        result["rows"].append(row)
        save()
        print(f"seed {seed}: {row['steps']} steps in {row['train_s']:.4f} s, "
              f"accuracy {row['accuracy']:.2%}", flush=True)  # fmt: skip
    result["complete"] = True
    save()
    took = statistics.median(r["train_s"] for r in result["rows"])
    reached = sum(r["accuracy"] >= GOAL for r in result["rows"])
    print(f"median {took:.4f} s; {reached} of {len(result['rows'])} seeds reached {GOAL:.0%}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GraphnetError as error:
        print(f"mnist99: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
