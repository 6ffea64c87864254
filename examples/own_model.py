"""A net of your own: a residual block, a shared layer, and gradients checked by differences.

python examples/own_model.py
"""

import torch

import graphnet as gn


class Block(gn.Module):
    """y = relu(x + conv(relu(conv(x)))): the sum is fused into the second convolution."""

    def __init__(self, channels):
        super().__init__()
        self.first = gn.Conv2d(channels, channels, 3, padding=1)
        self.second = gn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return gn.relu(x + self.second(gn.relu(self.first(x))))


class Net(gn.Module):
    def __init__(self):
        super().__init__()
        self.stem = gn.Conv2d(1, 8, 3, padding=1, name="stem")
        self.block = Block(8)
        self.pool = gn.MaxPool2d(2)
        self.head = gn.Linear(8 * 7 * 7, 10)

    def forward(self, x):
        x = self.pool(gn.relu(self.stem(x)))
        x = self.pool(self.block(self.block(x)))  # the same parameters, twice
        return self.head(gn.flatten(x, 1))


torch.manual_seed(0)
net = Net()
print(net.summary((1, 1, 28, 28)))
print(list(net.state_dict()))

# Each parameter's gradient against central differences in float64, on the oracle.
print(gn.check_gradients(net, (2, 1, 28, 28)))

# Frozen layers cost no gradient.
net.stem.weight.trainable = net.stem.bias.trainable = False
step = gn.compile(net, (16, 1, 28, 28), loss=gn.CrossEntropyLoss(), optimizer=gn.Adam(lr=1e-2))
x, y = torch.randn(16, 1, 28, 28), torch.randint(0, 10, (16,))
losses = [float(step(x, y)) for _ in range(15)]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0] / 2

# A misfit is an error before anything runs, with the layer and the chain of sizes.
try:
    gn.compile(Net(), (16, 1, 32, 32))
except gn.ShapeError as error:
    print(error)
