"""Steps that draw their own batches on the GPU: the bits of as many calls, k to a CUDA graph."""

import time

import pytest
import torch

import graphnet as gn
from tests.draws import LOSS, WAYS, compiled, data, run_beside_calls, same


@pytest.mark.parametrize("way", WAYS)
def test_a_run_is_its_calls_in_every_bit(way):
    step, got, twin, want = run_beside_calls(way, "cuda")
    assert torch.equal(got, want)
    same(step, twin)


def test_graphs_of_every_size_cross_epochs():
    images, labels = data(300)
    one, many = (compiled(target="cuda").bind(images, labels) for _ in range(2))
    losses = torch.cat([one.run(1) for _ in range(200)])
    assert torch.equal(losses, many.run(200))
    same(one, many)
    assert {1, 4, 16, 64} == set(many._draws._runs)


def lenet5(batch=128):
    torch.manual_seed(0)
    step = gn.compile(
        gn.models.lenet5(), (batch, 1, 28, 28), target="cuda", precision="fp32", loss=LOSS,
        optimizer=gn.SGD(lr=0.01, momentum=0.9),
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60_000, 1, 28, 28), generator=g).to(torch.uint8)
    return step.bind(images, torch.randint(0, 10, (60_000,), generator=g))


def test_a_run_waits_for_nothing_and_costs_the_host_little():
    step = lenet5()
    rates = [0.01 / (1 + k) for k in range(1000)]
    step.run(1000, lr=rates)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # a hidden synchronisation raises
    try:
        begin = time.perf_counter()
        losses = step.run(1000, lr=rates)
        host = time.perf_counter() - begin
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(torch.isfinite(losses).all())
    # The driver holds the host up while its queue of launches is full; that is no work.
    print(f"host: {1e6 * host / 1000:.2f} us a step")


def test_a_call_costs_the_host_little():
    step = lenet5()
    x, y = torch.randn(128, 1, 28, 28, device="cuda"), torch.zeros(128, device="cuda").long()
    times = []
    for _ in range(30):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(10):
            step(x, y)
        times.append((time.perf_counter() - begin) / 10)
    print(f"host: {1e6 * sorted(times)[len(times) // 2]:.1f} us a call")
