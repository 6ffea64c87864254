"""A small CNN with local response normalization, for 32x32 colour images.

    graphnet train examples/cifar_cnn.py:net --data cifar10:PATH --epochs 10 --lr 0.02 --out runs/c

Three convolutions with the order of the 2012 paper, conv - relu - LRN - pool, at a size that a
laptop trains in minutes. `graphnet inspect examples/cifar_cnn.py:net --train` shows what is fused.
"""

import graphnet as gn


def net(num_classes: int = 10) -> gn.Sequential:
    """66,570 parameters."""
    model = gn.Sequential(
        gn.Conv2d(3, 32, 3, padding=1), gn.ReLU(),
        gn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0), gn.MaxPool2d(2),
        gn.Conv2d(32, 64, 3, padding=1), gn.ReLU(),
        gn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0), gn.MaxPool2d(2),
        gn.Conv2d(64, 64, 3, padding=1), gn.ReLU(), gn.MaxPool2d(2),
        gn.Flatten(), gn.Dropout(0.25), gn.Linear(1024, num_classes),
    )  # fmt: skip
    model.input_shape = (3, 32, 32)
    return model
