"""What the tests of the benchmark harness share."""

import json
from pathlib import Path

import pytest
import torch

import graphnet as gn
from graphnet.bench import bench
from graphnet.bench.peers import Work

SCHEMA = json.loads((Path(__file__).parents[1] / "benchmarks" / "schema.json").read_text())
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads wait for each other for long where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quick(**changes):
    plain = {"batch": 4, "target": "cpu", "rounds": 2, "seconds": 0.1, "parity_batches": 2}
    return bench.BenchConfig(**{"model": "lenet5", "by_layer": False, **plain, **changes})


def work(mode="train", precision="fp32", net=None):
    net = net or gn.models.lenet5()
    sgd = gn.SGD(lr=0.01, momentum=0.9, weight_decay=5e-4) if mode == "train" else None
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 1, 28, 28, generator=g), torch.randint(0, 10, (4,), generator=g)
    return Work(net, x, y, mode, sgd, precision)


def every_layer():
    return gn.Sequential(
        gn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1), gn.ReLU(), gn.MaxPool2d(3, 2),
        gn.Conv2d(8, 8, 3, padding="same", groups=2, bias=False), gn.Tanh(), gn.AvgPool2d(2),
        gn.Sigmoid(), gn.AdaptiveAvgPool2d(2), gn.Flatten(),
        gn.Sequential(gn.Linear(32, 16), gn.Dropout(0.5, mode="vanilla")), gn.Linear(16, 5),
    )  # fmt: skip
