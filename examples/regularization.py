"""The lecture's regularizers on a task that invites overfitting: few images, many parameters.

python examples/regularization.py
"""

import torch

import graphnet as gn
from graphnet.train.data import Batches, Dataset, load

full, test = load("digits", "train"), load("digits", "test")
few = Dataset(full.images[:150], full.labels[:150], full.classes, "150 digits", full.mean, full.std)


def net(dropout=0.0):
    torch.manual_seed(0)
    return gn.Sequential(
        gn.Flatten(), gn.Linear(784, 256), gn.ReLU(), gn.Dropout(dropout), gn.Linear(256, 10)
    )


def run(name, optimizer, dropout=0.0, smoothing=0.0):
    model = net(dropout)
    loss = gn.CrossEntropyLoss(label_smoothing=smoothing)
    trainer = gn.Trainer(model, loss, optimizer, seed=1)
    history = trainer.fit(Batches(few, 30, seed=1), test, epochs=20)
    weights = torch.cat([w.flatten() for k, w in model.state_dict().items() if "weight" in k])
    small = (weights.abs() < 1e-3).float().mean()
    print(
        f"{name:28} train loss {history[-1]['train_loss']:.4f}  "
        f"test accuracy {history[-1]['val_accuracy']:.1%}  weights near 0: {small:.0%}"
    )
    return float(small), history[-1]["train_loss"]


plain, fitted = run("nothing", gn.SGD(lr=0.05, momentum=0.9))
run("L2 (weight decay)", gn.SGD(lr=0.05, momentum=0.9, weight_decay=5e-3))
sparse, _ = run("L1", gn.SGD(lr=0.05, momentum=0.9, l1=5e-4))
run("elastic net", gn.SGD(lr=0.05, momentum=0.9, weight_decay=2e-3, l1=2e-4))
_, dropped = run("dropout 0.3", gn.SGD(lr=0.05, momentum=0.9), dropout=0.3)
run("label smoothing 0.1", gn.SGD(lr=0.05, momentum=0.9), smoothing=0.1)
assert sparse > 2 * plain, "L1 makes weights vanish"
assert dropped > fitted, "dropout keeps the net from learning its images by heart"
