"""Filters and their slots are stored (O, R, S, I); what people and files see is torch's."""

import json
import struct

import pytest
import torch

import graphnet as gn
from graphnet.api import lower
from graphnet.bench.twin import torch_twin
from graphnet.ir.types import NHWC, ROW, Layout
from graphnet.passes.pipeline import run as run_passes
from tests.storage import LOSS, SHAPE, assert_same, assert_stored, batches, small_net, step_of

WAYS = {
    "sgd": ({}, gn.SGD(0.05, momentum=0.9, weight_decay=1e-3),
            lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3)),
    "l1": ({}, gn.SGD(0.05, momentum=0.9, l1=1e-3), None),
    "adam": ({}, gn.Adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),
    "amsgrad": ({}, gn.Adam(0.01, amsgrad=True),
                lambda p: torch.optim.Adam(p, 0.01, amsgrad=True)),
    "clip": ({"clip_norm": 0.3}, gn.SGD(0.05), lambda p: torch.optim.SGD(p, 0.05)),
    "skip": ({"nonfinite": "skip"}, gn.SGD(0.05), lambda p: torch.optim.SGD(p, 0.05)),
    "accumulate": ({"accumulate": 2}, gn.Adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),
}  # fmt: skip


# ---- the layout ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (4, 1, 3, 3), (4, 6, 1, 1), (1, 1, 1, 1)])
def test_a_tensor_lies_as_its_layout_says_to_each_stride(shape):
    for layout in (ROW, NHWC):
        t = layout.zeros(shape, torch.float32)
        assert t.shape == shape and t.stride() == layout.strides(shape) and layout.lies(t)
        t.copy_(torch.arange(t.numel()).float().reshape(shape))
        flat = layout.elements(t)
        assert flat.data_ptr() == t.data_ptr() and flat.shape == (t.numel(),)
        index = tuple(s - 1 for s in shape)
        assert flat[layout.offset(shape, index)] == t[index] == t.numel() - 1


def test_what_lies_otherwise_is_copied():
    row = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert not NHWC.lies(row) and NHWC.elements(row)[1] == row[0, 1, 0, 0]
    assert not ROW.lies(row.to(memory_format=torch.channels_last))
    gaps = NHWC.zeros((2, 3, 2, 4), torch.float32)[..., ::2]
    assert not NHWC.lies(gaps) and NHWC.elements(gaps).data_ptr() != gaps.data_ptr()
    packed = Layout("row", None, 2)
    assert packed.zeros((1, 3, 5, 5), torch.float32).shape == (3 * 3 * 12,)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("target", ["cpu", "interpret", "cuda"])
def test_state_is_typed_alike_on_every_target(target, precision):
    how = {"loss": LOSS, "optimizer": gn.Adam(0.01), "accumulate": 2, "clip_norm": 1.0}
    stages = lower(small_net(), SHAPE, target=target, precision=precision, **how).stages
    for graph in (stages.joint, stages.fused):
        kept = [i for i in graph.inputs if i.role in ("param", "slot")]
        assert {i.value.name for i in kept} >= {"0.weight.exp_avg", "4.weight.grad_sum"}
        for i in kept:
            filters = len(i.value.type.shape) == 4
            assert i.value.type.layout == (NHWC if filters else ROW), i
        for old, new in graph.commits:
            if old in {i.value for i in kept} and target != "cpu" and graph is stages.fused:
                assert old.type == new.type, (old, new)


def test_a_gradient_that_is_written_lies_as_its_parameter():
    how = {"loss": LOSS, "optimizer": gn.SGD(0.05), "clip_norm": 1.0}
    graph = lower(small_net(), SHAPE, target="cuda", **how).stages.fused
    (norm,) = (e for e in graph.eqns if e.op == "global_norm")
    written = [v.type for v in norm.inputs if len(v.type.shape) == 4]
    assert len(written) == 4 and all(t.layout == NHWC for t in written)


# ---- what people see -------------------------------------------------------------------------


def test_the_live_tensor_has_torchs_shape_and_one_storage():
    net = small_net()
    step = step_of(net, "cpu")
    p = net[0].weight
    at = p.data.data_ptr()
    assert p.shape == (3, 2, 3, 3) and p.data.stride() == (18, 1, 6, 2)
    for value in (
        torch.randn(3, 2, 3, 3),
        torch.randn(3, 2, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(3, 3, 2, 3).transpose(1, 2),
        torch.randn(3, 1, 1, 3).expand(3, 2, 3, 3),
    ):
        p.data = value
        assert torch.equal(p.data, value) and p.data.data_ptr() == at
        assert torch.equal(net.state_dict()["0.weight"], value)
    x, y = batches(1)[0]
    step(x, y)
    assert not torch.equal(p.data, value) and p.data.data_ptr() == at
    assert step.state.entries["0.weight"].tensor.data_ptr() == at
    other = net.copy()
    assert torch.equal(other[0].weight.data, p.data) and other[0].weight.data.data_ptr() != at
    assert other[0].weight.data.stride() == p.data.stride()


def test_state_dicts_are_torchs():
    net = small_net()
    step = step_of(net, "cpu", gn.Adam(0.01), accumulate=2)
    for x, y in batches(3):
        step(x, y)
    twin = torch_twin(net)
    for state in (net.state_dict(), step.optimizer.state_dict()):
        for key, t in state.items():
            assert t.stride() == torch.empty(t.shape).stride(), key
    assert all(p.is_contiguous() for p in twin.parameters())
    assert_same(net.state_dict(), dict(twin.state_dict()))
    net.load_state_dict({k: v + 1 for k, v in twin.state_dict().items()})
    assert_same(net.state_dict(), {k: v + 1 for k, v in twin.state_dict().items()})


def test_gradients_are_torchs():
    net = small_net()
    x, y = batches(1)[0]
    twin = torch_twin(net).double()
    torch.nn.functional.cross_entropy(twin(x.double()), y).backward()
    _, grads = gn.compile(net, SHAPE, target="cpu", loss=LOSS, grads=True)(x, y)
    for key, p in twin.named_parameters():
        assert grads[key].is_contiguous(), key
        torch.testing.assert_close(grads[key].double(), p.grad, rtol=1e-4, atol=1e-6)


# ---- training --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [k for k, w in WAYS.items() if w[2]])
def test_updates_are_torchs(way):
    """Four calls beside torch in float64; what is stored keeps its place and its strides."""
    how, optimizer, other = WAYS[way]
    torch.manual_seed(1)
    net = small_net()
    twin = torch_twin(net).double()
    torchs = other(twin.parameters())
    step = step_of(net, "cpu", optimizer, **how)
    places = {n: e.tensor.data_ptr() for n, e in step.state.entries.items()}
    group = how.get("accumulate", 1)
    data = batches(4 * group)
    for at in range(4):
        part = data[at * group : (at + 1) * group]
        for x, y in part:
            step(x, y)
        x, y = (torch.cat(t) for t in zip(*part, strict=True))
        torchs.zero_grad()
        torch.nn.functional.cross_entropy(twin(x.double()), y).backward()
        if "clip_norm" in how:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), how["clip_norm"])
        torchs.step()
    for key, p in twin.named_parameters():
        torch.testing.assert_close(
            net.state_dict()[key].double(), p.detach(), rtol=1e-4, atol=2e-5, msg=key
        )
    assert places == {n: e.tensor.data_ptr() for n, e in step.state.entries.items()}
    assert_stored(net, step)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_saved_goes_on_bit_for_bit(way, tmp_path):
    how, optimizer, _ = WAYS[way]
    net = small_net()
    step = step_of(net, "cpu", optimizer, **how)
    data = batches(6)
    for x, y in data[:3]:
        step(x, y)
    gn.save(tmp_path / "net", net)
    other = gn.load(tmp_path / "net", small_net())
    again = step_of(other, "cpu", optimizer, **how)
    again.optimizer.load_state_dict(step.optimizer.state_dict())
    for x, y in data[3:]:
        assert torch.equal(step(x, y), again(x, y))
    assert_same(net.state_dict(), other.state_dict())
    assert_same(step.optimizer.state_dict(), again.optimizer.state_dict())


def test_another_program_of_the_net_keeps_the_slots():
    net = small_net()
    step = step_of(net, "cpu")
    for x, y in batches(2):
        step(x, y)
    before = step.optimizer.state_dict()
    assert float(before["2.weight.momentum_buffer"].norm()) > 0
    logits = gn.compile(net, SHAPE, target="cpu")
    gn.compile(net, (2, *SHAPE[1:]), target="cpu", loss=LOSS, optimizer=gn.SGD(0.1, momentum=0.9))
    low = gn.compile(net, SHAPE, target="cpu", precision="bf16")
    assert_same(before, step.optimizer.state_dict())
    x, y = batches(1, seed=5)[0]
    first = logits(x)
    step(x, y)
    assert not torch.equal(first, logits(x))
    torch.testing.assert_close(low(x), logits(x), rtol=0.05, atol=0.05)


# ---- files -----------------------------------------------------------------------------------


def _file(tensors):
    """A safetensors file written by hand, as files of every earlier version are: row-major."""
    header, data = {}, b""
    for key, t in tensors.items():
        raw = struct.pack(f"<{t.numel()}f", *t.flatten().tolist())
        header[key] = {"dtype": "F32", "shape": list(t.shape),
                       "data_offsets": [len(data), len(data) + len(raw)]}  # fmt: skip
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _contents(data):
    """Key to the raw bytes of its tensor."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    body = data[8 + size :]
    spans = {k: v["data_offsets"] for k, v in header.items() if k != "__metadata__"}
    return {k: body[a:b] for k, (a, b) in spans.items()}


def test_an_old_file_loads_and_saves_bit_for_bit(tmp_path):
    wanted = {k: torch.randn(v.shape) for k, v in small_net().state_dict().items()}
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    old.write_bytes(_file(wanted))
    net = gn.load(old, small_net())
    assert_same(net.state_dict(), wanted)
    step_of(net, "cpu")
    assert_same(net.state_dict(), wanted)
    gn.save(new, net)
    assert _contents(new.read_bytes()) == _contents(old.read_bytes())


def test_an_old_checkpoint_goes_on(tmp_path):
    """Momentum, too, is row-major in files."""
    from graphnet.train import checkpoint

    net = small_net()
    step = step_of(net, "cpu")
    x, y = batches(1)[0]
    step(x, y)
    slots = {k: torch.randn(v.shape) for k, v in net.state_dict().items()}
    state = step.optimizer.state_dict()
    state |= {f"{k}.momentum_buffer": v for k, v in slots.items()}
    path = checkpoint.save(tmp_path, 1, {**net.state_dict(), **state})
    raw = _contents(path.read_bytes())
    for k, v in slots.items():
        assert raw[f"{k}.momentum_buffer"] == struct.pack(f"<{v.numel()}f", *v.flatten().tolist())
    found = checkpoint.load(path).tensors
    other = small_net()
    again = step_of(other, "cpu")
    other.load_state_dict({k: found[k] for k in other.state_dict()})
    again.optimizer.load_state_dict({k: v for k, v in found.items() if k in state})
    step.optimizer.load_state_dict(state)
    assert torch.equal(step(x, y), again(x, y))
    assert_same(net.state_dict(), other.state_dict())
    assert_same(step.optimizer.state_dict(), again.optimizer.state_dict())


# ---- edges -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs, groups", [(4, 1), (4, 4), (1, 1)])
def test_a_dilated_convolution_of_width_1_runs(inputs, groups):
    """Channels-last, torch 2.13 ends in a segmentation fault here."""
    net = gn.Sequential(
        gn.Conv2d(inputs, 4, 3, stride=2, padding=2, dilation=2, groups=groups), gn.ReLU(),
        gn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2, groups=4), gn.ReLU(),
        gn.Flatten(), gn.Linear(16, 3),
    )  # fmt: skip
    x, y = torch.randn(2, inputs, 5, 1), torch.tensor([0, 2])
    twin = torch_twin(net).double()
    torch.nn.functional.cross_entropy(twin(x.double()), y).backward()
    _, grads = gn.compile(net, (2, inputs, 5, 1), target="cpu", loss=LOSS, grads=True)(x, y)
    for key, p in twin.named_parameters():
        torch.testing.assert_close(grads[key].double(), p.grad, rtol=1e-4, atol=1e-6)


def test_passes_keep_the_types_of_state():
    """Without the layout pass, too, what is committed lies as what it replaces."""
    from graphnet.frontends.tracing import trace

    net = small_net()
    traced = trace(net, SHAPE, loss=LOSS, training=True)
    graph = run_passes(
        traced, optimizer=gn.Adam(0.01), trainable=list(net.state_dict()), disabled=["layout"]
    ).fused
    assert all(old.type == new.type for old, new in graph.commits)
