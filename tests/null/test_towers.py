"""Two towers: the graph of a rank, and two ranks against one process."""

import pytest
import torch

import graphnet as gn
from graphnet.api import lower
from graphnet.errors import ConfigError, DataError
from graphnet.ir.text import parse
from graphnet.ops import collective
from tests.towers import (
    HOW,
    IMAGE,
    ROWS,
    batches,
    both,
    far,
    full_size,
    kept,
    made,
    parts,
    results,
    sgd,
    small,
    worst,
)


@pytest.fixture(scope="module")
def one():
    return results(None, clip_norm=0.5)


def test_two_ranks_are_one_process(one):
    for got in both(lambda group: results(group, clip_norm=0.5)):
        apart = worst(got, one)
        assert all(d < 1e-5 for d in apart.values()), apart


@pytest.mark.slow
def test_alexnet_2012_on_two_processes():
    """At full size, over gloo."""
    for apart in full_size():
        assert all(d < 1e-5 for d in apart.values()), apart


def summed(self, b, eqn, cotangents, needs):
    attrs = collective.AxisAttrs(eqn.attrs.ranks, eqn.attrs.axis)
    return (b.one("reduce_scatter", cotangents[0], attrs=attrs),)


@pytest.mark.parametrize("fault", ["reduced, not sliced", "dropout by local element"])
def test_a_mistake_is_found(one, fault, monkeypatch):
    if fault == "reduced, not sliced":
        monkeypatch.setattr(collective.AllGather, "vjp", summed)
    else:
        monkeypatch.setattr("graphnet.runtime.program.RANK", "nothing")
    apart = worst(both(lambda group: results(group, clip_norm=0.5))[1], one)
    assert apart["logits"] < 1e-5 < 1e-2 < apart["gradients"]


def test_checkpoints_go_both_ways(one):
    """What two ranks have learned goes on in one process, and what one has learned on two ranks:
    each step as one process makes it. Other programs of the net see it all."""
    x, y = batches(1, ROWS)[0]
    shape = (ROWS, *IMAGE)

    def going_on(group, towers, state=None, steps=1):
        net = made()
        step = gn.compile(net, shape, optimizer=sgd(), **HOW, **parts(group if towers else None))
        if state is not None:
            net.load_state_dict(state[0])
            step.optimizer.load_state_dict(state[1])
        for _ in range(steps):
            step(x, y)
        return kept(net, step)

    first = going_on(None, False, steps=2)
    want = going_on(None, False, first)
    loaded = both(lambda group: going_on(group, True, first, steps=0))
    ranks = both(lambda group: going_on(group, True, steps=2))
    pairs = zip((*loaded[0], *loaded[1], *ranks[0]), (*first, *first, *ranks[1]), strict=True)
    for got, mine in pairs:
        assert got.keys() == mine.keys() and all(torch.equal(got[k], mine[k]) for k in mine)
    found = [going_on(None, False, ranks[1]), *both(lambda group: going_on(group, True, first))]
    for got in found:
        assert max(far(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


def test_other_programs_of_the_net(one):
    """Steps of two towers and of one process take turns on a net; inference sees them all."""
    x, y = batches(1, ROWS)[0]
    shape = (ROWS, *IMAGE)

    def turns(group):
        net = made()
        towers = gn.compile(net, shape, optimizer=sgd(), **HOW, **parts(group))
        alone = gn.compile(net, shape, optimizer=sgd(), **HOW)
        infer = gn.compile(net, shape, target="cpu")
        seen = []
        for step in (towers, alone, towers, towers):
            step(x, y)
            seen.append(infer(x))
        net.load_state_dict({k: v / 2 for k, v in net.copy().state_dict().items()})
        towers(x, y)
        return {"seen": torch.stack(seen), **net.state_dict()}

    want = turns(None)
    for got in both(turns):
        assert far(got, want) < 1e-5


class Scaled(gn.Module):
    """A parameter that both ranks hold whole, behind the last layer that they share; statistics of
    a batch, and a sum of two values."""

    def __init__(self):
        self.conv = gn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm = gn.BatchNorm2d(8)
        self.more = gn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.fc = gn.Linear(8 * 16, 10)
        self.scale = gn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        a = gn.relu(self.norm(self.conv(x)))
        b = gn.relu(self.more(a) + a)
        return self.fc(b.reshape(b.shape[0], -1)) * self.scale


def test_parameters_that_both_ranks_hold_count_once():
    """In the norm of the gradients, above all."""
    want = results(None, Scaled, (2, 4, 4), clip_norm=1e-3)
    for got in both(lambda group: results(group, Scaled, (2, 4, 4), clip_norm=1e-3)):
        apart = worst(got, want)
        assert all(d < 1e-5 for d in apart.values()), apart


def test_a_trainer_of_two_towers():
    """Its metrics, and what it would save in the middle of a group of batches."""
    x, y = torch.cat([x for x, _ in batches(4, 5)]), torch.cat([y for _, y in batches(4, 5)])

    def trained(group):
        how = {k: HOW[k] for k in ("target", "seed")} | {"accumulate": 2, **parts(group)}
        trainer = gn.Trainer(made(), HOW["loss"], sgd(), **how)
        history = trainer.fit((x, y), (x[:7], y[:7]), epochs=1, batch=7)
        names = ("train_loss", "val_loss", "val_accuracy")
        metrics = {k: torch.tensor(history[0][k]) for k in names}
        return metrics | trainer.state_dict() | trainer.net.state_dict()

    want = trained(None)
    for got in both(trained):
        assert far(got, want) < 1e-5


def test_the_graph_of_a_rank():
    low = lower(small(), (ROWS, *IMAGE), target="cpu", ranks=2, towers=True, optimizer=sgd(),
                loss=HOW["loss"])  # fmt: skip
    graph = low.stages.joint
    assert parse(str(graph)) == graph
    ops = [e.op for e in graph.eqns]
    # conv3, fc6 to fc8 and the loss see all maps; of the loss's gradient a rank keeps its part.
    assert ops.count("all_gather") == 5 and ops.count("reduce_scatter") == 4
    assert ops.count("own_part") == 1 and "all_reduce" not in ops
    assert all(i.parts == 2 for i in graph.inputs if i.role == "param")
    whole = sum(p.numel() for p in small().parameters())
    assert 2 * sum(i.value.type.numel for i in graph.inputs if i.role == "param") == whole


def test_what_two_towers_refuse():
    shape, two = (ROWS, *IMAGE), {"target": "cpu", "ranks": 2, "towers": True}
    with pytest.raises(ConfigError, match="'fc3'.*11 output features have no 2 equal parts"):
        lower(small(num_classes=11), shape, **two)
    for ranks in (1, 3):
        with pytest.raises(ConfigError, match=f"two ranks, not on {ranks}"):
            lower(small(), shape, **{**two, "ranks": ranks})
    with pytest.raises(ConfigError, match="two ranks, not on 1"):
        gn.compile(small(), shape, target="cpu", towers=True)
    with pytest.raises(ConfigError, match="over all 8 channels, of which a rank holds 4"):
        norm = gn.Sequential(gn.Conv2d(3, 8, 3), gn.LocalResponseNorm(5), gn.Flatten())
        lower(norm, (1, 3, 6, 6), **two)
    with pytest.raises(ConfigError, match="3 groups have no 2 equal parts"):
        lower(gn.Conv2d(3, 6, 3, groups=3), (1, 3, 6, 6), **two)
    with pytest.raises(ConfigError, match="no convolution and no linear layer"):
        lower(gn.ReLU(), (1, 3, 6, 6), **two)

    def different(group):
        net = gn.Sequential(gn.Flatten(), gn.Linear(6, 4))
        step = gn.compile(net, (3, 6), optimizer=sgd(), **HOW, **parts(group))
        step(torch.ones(3, 6), torch.tensor([0, 1, 2 + group.rank]))

    with pytest.raises(DataError, match="different batches"):
        both(different)
