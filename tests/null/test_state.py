"""State: programs of one net share it, torch's state dicts see it, copies follow it."""

import gc
import weakref

import pytest
import torch

import graphnet as gn
from graphnet.runtime.state import state_of

SHAPE = (4, 1, 28, 28)
CPU = torch.device("cpu")


def batch(n=4):
    return torch.randn(n, 1, 28, 28), torch.randint(0, 10, (n,))


def train_step(net, **sgd):
    optimizer = gn.SGD(**({"lr": 0.05, "momentum": 0.9} | sgd))
    return gn.compile(net, SHAPE, target="cpu", loss=gn.CrossEntropyLoss(), optimizer=optimizer)


def test_inference_sees_what_training_learned():
    torch.manual_seed(0)
    net = gn.models.lenet5()
    infer, step = gn.compile(net, SHAPE, target="cpu"), train_step(net)
    x, y = batch()
    before, weights = infer(x), net.state_dict()
    step(x, y)
    assert not torch.equal(before, infer(x))
    after = net.state_dict()
    assert all(not torch.equal(weights[k], after[k]) for k in weights)
    net.load_state_dict(weights)
    assert torch.equal(before, infer(x))


def test_bf16_copies_follow_loads_assignments_and_other_programs():
    torch.manual_seed(0)
    net = gn.models.lenet5()
    low = gn.compile(net, SHAPE, target="cpu", precision="bf16")
    high = gn.compile(net, SHAPE, target="cpu")
    x, y = batch()

    def close():
        return (low(x) - high(x)).abs().max() < 0.05 * high(x).abs().max() + 1e-3

    assert close()
    step = train_step(net)
    for _ in range(3):
        step(x, y)
    assert close()
    net[11].weight.data = net[11].weight.data * 50
    assert close()
    net.load_state_dict(gn.models.lenet5().state_dict())
    assert close()


def test_entries_record_what_they_are():
    net = gn.models.lenet5()
    net[0].weight.trainable = False
    train_step(net)
    entries = state_of(net, CPU).entries
    assert not entries["0.weight"].trainable and entries["0.bias"].trainable
    assert entries["0.bias"].global_shape == (6,) and entries["0.bias"].shard is None
    slot = entries["0.bias.momentum_buffer"]
    assert slot.role == "slot" and slot.of == "0.bias"
    assert "0.weight.momentum_buffer" not in entries


def test_frozen_parameters_stay():
    net = gn.models.lenet5()
    net[0].weight.trainable = False
    before = net.state_dict()
    train_step(net)(*batch())
    after = net.state_dict()
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["0.bias"], after["0.bias"])


def test_state_lives_as_long_as_the_net():
    net = gn.models.lenet5()
    gn.compile(net, SHAPE, target="cpu")
    alive = weakref.ref(state_of(net, CPU))
    assert alive() is not None
    del net
    gc.collect()
    assert alive() is None


def test_save_and_load(tmp_path):
    net, other = gn.models.lenet5(), gn.models.lenet5()
    file = tmp_path / "net.safetensors"
    gn.save(file, net)
    gn.load(file, other)
    assert torch.equal(net[3].weight.data, other[3].weight.data)
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    with pytest.raises(gn.CheckpointError, match="cannot read"):
        gn.load(tmp_path / "none", net)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(gn.CheckpointError, match="no whole safetensors"):
        gn.load(file, net)
    with pytest.raises(gn.CheckpointError, match="cannot write"):
        gn.save(tmp_path / "no" / "net.safetensors", net)


def test_optimizer_state_round_trip_is_exact():
    torch.manual_seed(0)
    a = gn.models.lenet5()
    b = a.copy()
    batches = [batch() for _ in range(6)]
    one = train_step(a)
    for x, y in batches[:3]:
        one(x, y)
    two = train_step(b, lr=0.5)
    b.load_state_dict(a.state_dict())
    two.optimizer.load_state_dict(one.optimizer.state_dict())
    assert two.optimizer.lr == 0.05 and two.state.steps == 3
    for x, y in batches[3:]:
        assert torch.equal(one(x, y), two(x, y))
    with pytest.raises(gn.StateDictError, match="missing 0.bias.momentum_buffer"):
        two.optimizer.load_state_dict({"lr": torch.tensor(0.1)})
