"""LeNet-5 on scikit-learn's handwritten digits, and what the compiler made of its training step.

python examples/lenet_digits.py
"""

import torch

import graphnet as gn
from graphnet.train.data import Batches, load

torch.manual_seed(0)
net = gn.models.lenet5()
train, test = load("digits", "train"), load("digits", "test")

# One call compiles forward, loss, backward and the optimizer's update into one program.
step = gn.compile(
    net,
    (32, 1, 28, 28),
    loss=gn.CrossEntropyLoss(),
    optimizer=gn.SGD(lr=0.02, momentum=0.9, weight_decay=5e-4),
)
print(step.graph("fused"))

batches = Batches(train, 32, seed=0)
for epoch in range(3):
    losses = [float(step(x, y)) for x, y in batches]
    print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}")

# Inference is another program on the same parameters: it sees what the step has learned.
infer = gn.compile(net, (359, 1, 28, 28))
x, y = next(iter(Batches(test, 359, shuffle=False)))
accuracy = (infer(x).argmax(1) == y).float().mean()
print(f"test accuracy {accuracy:.1%}")
assert accuracy > 0.75
