"""Batches that come from the host: the bits of batches that lie on the GPU."""

import pytest
import torch

import graphnet as gn
from tests.draws import LOSS


def trained(where, precision, rows):
    torch.manual_seed(0)
    net = gn.Sequential(
        gn.Conv2d(3, 8, 5), gn.ReLU(), gn.MaxPool2d(2), gn.Flatten(), gn.Linear(8 * 62 * 62, 10)
    )  # fmt: skip
    step = gn.compile(
        net, (64, 3, 128, 128), target="cuda", precision=precision, loss=LOSS,
        optimizer=gn.SGD(lr=0.01, momentum=0.9),
    )  # fmt: skip
    g, losses = torch.Generator().manual_seed(1), []
    for n in rows:
        x, y = torch.randn(n, 3, 128, 128, generator=g), torch.randint(0, 10, (n,), generator=g)
        x = {"gpu": x.cuda, "pinned": x.pin_memory, "pageable": lambda x=x: x}[where]()
        losses.append(step(x, y).clone())
        del x  # its memory may be handed out again while it is copied
    return torch.stack(losses).cpu(), net.state_dict()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_where_a_batch_comes_from_changes_no_bit(precision):
    rows = [64, 64, 17, 64, 1, 64, 64, 33] * 3
    losses, state = trained("gpu", precision, rows)
    for where in ("pinned", "pageable"):
        other, twin = trained(where, precision, rows)
        assert torch.equal(losses, other), where
        assert all(torch.equal(state[k], twin[k]) for k in state)
