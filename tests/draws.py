"""A small net and a data set for steps that draw their own batches."""

import torch

import graphnet as gn

LOSS = gn.CrossEntropyLoss()


def data(n=23, kind="u8"):
    g = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (n, 2, 6, 5), generator=g).to(torch.uint8)
    labels = torch.randint(0, 3, (n,), generator=g)
    return (images if kind == "u8" else images.float() / 100 - 1), labels


def compiled(batch=4, optimizer=None, target="cpu", **how):
    torch.manual_seed(1)
    net = gn.Sequential(
        gn.Conv2d(2, 3, 3), gn.ReLU(), gn.Dropout(0.3), gn.Flatten(), gn.Linear(36, 3)
    )  # fmt: skip
    optimizer = optimizer or gn.SGD(lr=0.1, momentum=0.9, weight_decay=1e-3)
    return gn.compile(
        net, (batch, 2, 6, 5), target=target, loss=LOSS, optimizer=optimizer, seed=6, **how
    )


def order_of(seed, n, shuffle=True):
    """Epoch to order, as `bind` says it."""
    draw = lambda e: torch.randperm(
        n, generator=torch.Generator().manual_seed(seed * 1_000_003 + e)
    )
    return draw if shuffle else lambda e: torch.arange(n)


def called(step, images, labels, steps, rates=None, order=None, batch=4):
    """Losses of the same steps, each called with the batch that an epoch's order gives it."""
    order = order or order_of(6, len(images))
    plan, epoch = [], 0
    while len(plan) < steps:
        plan += [(epoch, rows) for rows in order(epoch).split(batch)]
        epoch += 1
    out = []
    for k, (epoch, rows) in enumerate(plan[:steps]):
        if rates is not None:
            step.optimizer.lr = rates[k]
        x = images[rows]
        if step._inputs.index is not None:
            out.append(step(x, labels[rows], rows, epoch).clone())
        else:
            x = x.float() / 255 if x.dtype == torch.uint8 else x
            out.append(step(x, labels[rows]).clone())
    return torch.stack(out)


def same(a, b):
    """Parameters and the optimizer's state, bit by bit."""
    for key, p in a.state.params.items():
        assert torch.equal(p.live, b.state.params[key].live), key
    one, two = a.optimizer.state_dict(), b.optimizer.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


WAYS = {
    "bytes": {},
    "float": {"kind": "f32"},
    "sorted": {"shuffle": False},
    "adam": {"optimizer": gn.Adam(lr=0.01)},
    "clipped": {"clip_norm": 0.5},
    "summed": {"accumulate": 2},
    "drawn": {"augment": gn.Augment(rotate=20.0, flip=0.5, stored=(2, 6, 5))},
    "one batch": {"batch": 32},
    "bf16": {"precision": "bf16"},
    "bf16 float": {"precision": "bf16", "kind": "f32"},
    "bf16 summed": {"precision": "bf16", "accumulate": 2},
}


def run_beside_calls(way, target="cpu", rates=True):
    """(a step that ran 31 steps as two runs, their losses, its twin that was called, its losses)"""
    how = dict(WAYS[way])
    batch, shuffle = how.pop("batch", 4), how.pop("shuffle", True)
    images, labels = data(kind=how.pop("kind", "u8"))
    lr = [0.1 / (1 + k) for k in range(31)] if rates else None
    twin, step = (compiled(batch, target=target, **how) for _ in range(2))
    want = called(twin, images, labels, 31, lr, order_of(6, 23, shuffle), batch)
    step.bind(images, labels, shuffle=shuffle)
    got = torch.cat([step.run(n, lr and lr[at : at + n]) for at, n in ((0, 20), (20, 11))])
    return step, got, twin, want
