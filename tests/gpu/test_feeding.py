"""A trainer whose data lie on the GPU: the bits of one that is given batches."""

import pytest
import torch

import graphnet as gn
from graphnet.train import feeding
from graphnet.train.data import Dataset
from graphnet.train.feeding import Resident
from graphnet.train.trainer import Trainer


def data(kind, n=1000):
    g = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (n, 3, 32, 32), generator=g).to(torch.uint8)
    images = images if kind == "u8" else images.float() / 255
    labels = torch.randint(0, 10, (n,), generator=g)
    return Dataset(images, labels, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))


def trained(kind, precision, augment):
    torch.manual_seed(3)
    net = gn.Sequential(
        gn.Conv2d(3, 16, 5), gn.ReLU(), gn.MaxPool2d(2), gn.Flatten(), gn.Dropout(0.3),
        gn.Linear(16 * 14 * 14, 10),
    )  # fmt: skip
    t = Trainer(
        net, gn.CrossEntropyLoss(), gn.SGD(lr=0.01, momentum=0.9),
        gn.schedule.cosine(0.01, 378, 20), target="cuda", precision=precision, seed=5,
        augment=augment,
    )  # fmt: skip
    history = t.fit(data(kind), data("u8", 100), epochs=3, batch=8)
    return {**net.state_dict(), **t.state_dict()}, [m["train_loss"] for m in history], t


@pytest.mark.parametrize("augment", [None, gn.Augment(crop=True, pad=4, flip=0.5)],
                         ids=["plain", "augmented"])  # fmt: skip
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["u8", "f32"])
def test_resident_data_have_the_bits_of_batches(kind, precision, augment, monkeypatch):
    made = []
    real = Resident.__init__
    monkeypatch.setattr(
        Resident, "__init__", lambda self, *a: real(self, *a) or made.append(self.most)
    )
    state, losses, _ = trained(kind, precision, augment)
    assert made == [64]
    monkeypatch.setattr(feeding, "resident", lambda *_: False)
    twin, others, _ = trained(kind, precision, augment)
    assert losses == pytest.approx(others, rel=1e-12)
    assert state.keys() == twin.keys() and all(torch.equal(state[k], twin[k]) for k in state)


def test_a_run_over_image_files_says_what_it_waits_for():
    class Slow:
        def __iter__(self):
            for _ in range(20):
                torch.randn(1000, 1000) @ torch.randn(1000, 1000)
                yield torch.rand(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)

    net = gn.Sequential(gn.Flatten(), gn.Linear(64, 10))
    t = Trainer(net, gn.CrossEntropyLoss(), gn.SGD(lr=0.01), target="cuda")
    t.fit(Slow(), epochs=1, batch=8)
    assert t.waited is not None and "batches to be read" in t.waited
