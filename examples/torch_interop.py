"""Parameters to torch and back: names, layouts and fp32 are torch's.

python examples/torch_interop.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import graphnet as gn

torch.manual_seed(0)
ours = gn.Sequential(
    gn.Conv2d(3, 8, 3, padding=1), gn.ReLU(), gn.MaxPool2d(2), gn.Flatten(), gn.Linear(128, 5)
)
theirs = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 5)
)
theirs.load_state_dict(ours.state_dict())

x, y = torch.randn(16, 3, 8, 8), torch.randint(0, 5, (16,))
step = gn.compile(
    ours,
    tuple(x.shape),
    precision="fp32",  # as torch computes here; on a GPU the default is tf32
    loss=gn.CrossEntropyLoss(),
    optimizer=gn.SGD(lr=0.1, momentum=0.9, weight_decay=1e-3),
)
sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
for k in range(10):
    mine = float(step(x, y))
    loss = nn.functional.cross_entropy(theirs(x), y)
    sgd.zero_grad()
    loss.backward()
    sgd.step()
    print(f"step {k}: {mine:.6f} and torch {loss.item():.6f}")

state = theirs.state_dict()
for key, value in ours.state_dict().items():
    assert torch.allclose(value, state[key], rtol=1e-4, atol=1e-6), key

# What torch has trained runs here, and what is saved here any safetensors reader opens.
ours.load_state_dict(theirs.state_dict())
infer = gn.compile(ours, (16, 3, 8, 8), precision="fp32")
assert torch.allclose(infer(x), theirs(x), atol=1e-5)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "net.safetensors"
    gn.save(path, ours)
    gn.load(path, ours)
print("equal after ten steps, and both ways")
