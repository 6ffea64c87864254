"""What is not finite on the GPU, where losses are read after later steps have run."""

import math

import pytest
import torch

import graphnet as gn
from graphnet.train.trainer import Callback


class Spoil(Callback):
    def __init__(self, key):
        self.key = key

    def on_step(self, trainer, loss):
        if self.key and trainer.step == 3:
            p = dict(trainer.net.named_parameters())[self.key]
            p.data = torch.full_like(p.data, math.nan)


@pytest.mark.parametrize("key", [None, "3.bias"])
def test_the_step_and_the_layer_are_named(key):
    torch.manual_seed(0)
    net = gn.Sequential(
        gn.Conv2d(1, 4, 3), gn.ReLU(), gn.MaxPool2d(2), gn.Conv2d(4, 4, 2), gn.Flatten(),
        gn.Linear(16, 4),
    )  # fmt: skip
    data = [(torch.rand(4, 1, 9, 9), torch.randint(0, 4, (4,))) for _ in range(8)]
    if key is None:
        data[3][0][2, 0, 4, 4] = math.nan
    t = gn.Trainer(
        net, gn.CrossEntropyLoss(), gn.SGD(0.05), callbacks=[Spoil(key)], target="cuda",
        precision="fp32",
    )  # fmt: skip
    said = "the parameter 3.bias held NaN" if key else "the input holds NaN in row 2"
    with pytest.raises(gn.NumericsError, match=f"at step 3: {said}") as e:
        t.fit(data, epochs=1, batch=4)
    assert e.value.layer == ("conv2" if key else None)
