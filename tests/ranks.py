"""Several processes for the tests of data parallelism: `run(ranks)` starts them over gloo, each
does `checks`, and what they found comes back, one dict for each rank."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import graphnet as gn
from graphnet.api import compile_together
from graphnet.errors import GraphnetError
from graphnet.runtime.group import group_of
from graphnet.runtime.program import Program
from tests import towers

RATE = 0.05


def small() -> Any:
    """An AlexNet in small: strided convolution, pool and LRN, grouped convolution, dropout."""
    torch.manual_seed(0)
    return gn.Sequential(
        gn.Conv2d(3, 8, 5, stride=2, padding=2), gn.ReLU(), gn.MaxPool2d(2),
        gn.LocalResponseNorm(5), gn.Conv2d(8, 8, 3, padding=1, groups=2), gn.ReLU(), gn.Flatten(),
        gn.Dropout(0.5), gn.Linear(8 * 16, 24), gn.ReLU(), gn.Dropout(0.5), gn.Linear(24, 10),
    )  # fmt: skip


def lenet() -> Any:
    torch.manual_seed(0)
    return gn.models.lenet5()


def tiny() -> Any:
    torch.manual_seed(0)
    return gn.Sequential(
        gn.Conv2d(1, 4, 3), gn.ReLU(), gn.MaxPool2d(2), gn.Dropout(0.5), gn.Flatten(),
        gn.Linear(16, 10),
    )  # fmt: skip


def norm() -> Any:
    """Batch normalization of images and of rows, with both kinds of running statistics."""
    torch.manual_seed(0)
    return moved(gn.Sequential(
        gn.Conv2d(3, 8, 3, bias=False), gn.BatchNorm2d(8), gn.ReLU(), gn.MaxPool2d(2),
        gn.Conv2d(8, 8, 2, bias=False), gn.BatchNorm2d(8, momentum=None), gn.ReLU(), gn.Flatten(),
        gn.Dropout(0.25), gn.Linear(8, 16), gn.BatchNorm1d(16, affine=False), gn.ReLU(),
        gn.Linear(16, 10),
    ))  # fmt: skip


def one_norm(lib: Any = gn) -> Any:
    """What the interpreter runs in little time, of ours or of torch's."""
    torch.manual_seed(0)
    return moved(lib.Sequential(
        lib.Conv2d(1, 4, 3), lib.BatchNorm2d(4), lib.ReLU(), lib.Flatten(), lib.Linear(64, 10)
    ))  # fmt: skip


def two_norms(lib: Any = gn) -> Any:
    """Without what torch draws otherwise or cannot do with one row."""
    torch.manual_seed(0)
    return moved(lib.Sequential(
        lib.Conv2d(3, 8, 3), lib.BatchNorm2d(8), lib.ReLU(), lib.MaxPool2d(2),
        lib.Conv2d(8, 8, 2, bias=False), lib.BatchNorm2d(8, momentum=None), lib.ReLU(),
        lib.Flatten(), lib.Linear(8, 10),
    ))  # fmt: skip


def moved(net: Any) -> Any:
    """The net with vectors away from 0 and 1, so that their relative error says something."""
    state = net.state_dict()
    vectors = {k: v for k, v in state.items() if v.is_floating_point() and v.ndim == 1}
    net.load_state_dict(state | {k: v + torch.rand(v.shape) + 0.1 for k, v in vectors.items()})
    return net


NETS = {
    "lenet": (lenet, (1, 28, 28)), "small": (small, (3, 16, 16)), "tiny": (tiny, (1, 6, 6)),
    "norm": (norm, (3, 6, 6)), "one norm": (one_norm, (1, 6, 6)),
    "two norms": (two_norms, (3, 6, 6)),
}  # fmt: skip


def batches(name: str, steps: int, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Global batches of which each third one is uneven, so that the last rank has fewer rows, or
    none."""
    g = torch.Generator().manual_seed(1)
    sizes = [rows // 3 + 1 if k % 3 == 2 else rows for k in range(steps)]
    shape = NETS[name][1]
    return [
        (torch.randn(n, *shape, generator=g), torch.randint(0, 10, (n,), generator=g))
        for n in sizes
    ]


def compiled(name: str, group: Any, rows: int, target: str, **how: Any) -> tuple[Any, Any]:
    """(net, step) for global batches of `rows`, of which each rank has an equal part, rounded
    up."""
    net, shape = NETS[name][0](), NETS[name][1]
    joined = group_of(group)
    ranks = joined.ranks if joined else 1
    ways = [{
        "target": target, "loss": gn.CrossEntropyLoss(), "ranks": ranks, "global_batch": rows,
        "optimizer": gn.SGD(lr=RATE, momentum=0.9, weight_decay=5e-4), **how,
    }]  # fmt: skip
    if joined and joined.rank:  # what rank 0 has wins
        net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()})
    (step,) = compile_together(net, (-(-rows // ranks), *shape), ways, seed=3, group=joined)
    return net, step


def trained(
    name: str, group: Any, steps: int, rows: int, target: str = "cpu", fault: str = "", **how: Any
) -> dict[str, Any]:
    """The losses and the parameters after some steps."""
    net, step = compiled(name, group, rows, target, **how)
    rank, own = (step.group.rank, step.shape[0]) if step.group else (0, rows)
    losses = []
    with planted(fault, step):
        for x, y in batches(name, steps, rows):
            a, b = rank * own, min((rank + 1) * own, rows)
            losses.append(float(step(x[a:b], y[a:b])))
    return {"losses": losses, "params": {k: v.clone() for k, v in net.state_dict().items()}}


@contextmanager
def planted(fault: str, step: Any) -> Any:
    """A step with a mistake in it, which the comparisons must find."""
    feed, run, group = Program._feed, step._run, step.group
    told = torch.zeros_like(step._told)
    if fault == "not reduced":
        group.sum = lambda t: (lambda: None) if t.dtype == torch.float32 else told_sum(t)
        told_sum = type(group).sum.__get__(group)
    elif fault == "ranks, not rows":

        def averaging(self: Any, *args: Any) -> int:
            rows = feed(self, *args)
            self._told[0] = group.ranks * rows
            return rows

        Program._feed = averaging  # type: ignore[method-assign]
    elif fault == "local masks":
        step._storage["first_row"].zero_()
    elif fault == "skipped update" and group.rank == 1:
        before = {n: t.clone() for n, t in step._storage.items() if n.endswith("weight")}

        def undone() -> None:
            run()
            step._storage["0.weight"].copy_(before["0.weight"])

        step._run = undone
    try:
        yield told
    finally:
        Program._feed, step._run = feed, run  # type: ignore[method-assign]
        if group is not None:
            group.__dict__.pop("sum", None)


FAULTS = ("not reduced", "ranks, not rows", "local masks", "skipped update")


def said(call: Any) -> str:
    """The error that a call raises."""
    try:
        call()
    except GraphnetError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def poisoned_step(group: Any) -> dict[str, Any]:
    """A NaN in the last rank's rows stops all of them in the same step, and changes nothing."""
    net, step = compiled("lenet", group, 4, "cpu")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x, y = batches("lenet", 1, 4)[0]
    own = step.shape[0]
    x = x[step.group.rank * own :][:own].clone()
    if step.group.rank == 1:
        x[-1, 0, 0, 0] = float("nan")
    error = said(lambda: step(x, y[step.group.rank * own :][:own]))
    same = all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    return {"error": error, "unchanged": same}


def bound(group: Any) -> list[float]:
    """The losses of `run` over bound data, of which each rank holds all."""
    g = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (10, 1, 28, 28), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, 10, (10,), generator=g)
    _, step = compiled("lenet", group, 4, "cpu")
    step.bind(images, labels, seed=5)
    return step.run(6).tolist()


def checks(two: Any) -> dict[str, Any]:
    """What each of three ranks does; `two` is the group of the first two."""
    rank = dist.get_rank()
    clip = {"clip_norm": 0.5, "accumulate": 2}
    found: dict[str, Any] = {
        "small 3": trained("small", "world", 6, 7),
        "small 3 clip": trained("small", "world", 6, 7, **clip),
        "tiny 3 interpret": trained("tiny", "world", 3, 4, "interpret"),
        "norm 3": trained("norm", "world", 20, 13, sync_bn=True),
        "norm 3 accumulate": trained("norm", "world", 4, 13, sync_bn=True, accumulate=2),
        "norm 3 interpret": trained("one norm", "world", 3, 4, "interpret", sync_bn=True),
        "norm 3 of 2": without_rows("world"),
        "fitted": fitted("world"),
        "bf16": trained("small", "world", 3, 7, precision="bf16"),
        "bf16 reduced": trained("small", "world", 3, 7, precision="bf16", reduce="bf16"),
        "bf16 reduced interpret": trained(
            "tiny", "world", 1, 4, "interpret", precision="bf16", reduce="bf16"
        ),
        "nan": poisoned_step("world"),
        "bound": bound("world"),
    }
    for fault in FAULTS:
        found[fault] = trained("small", "world", 3, 7, fault=fault)
    with torch.no_grad():
        _, step = compiled("lenet", "world", 6, "cpu", optimizer=None, grads=True)
        x, y = batches("lenet", 1, 6)[0]
        mine = slice(rank * 2, rank * 2 + 2)
        loss, gradients = step(x[mine], y[mine])
        found["grads"] = {"loss": float(loss), "grads": gradients}
    net = lenet()
    common = {"loss": gn.CrossEntropyLoss(), "optimizer": gn.SGD(lr=0.1), "group": "world"}
    found["shapes"] = said(lambda: gn.compile(net, (2 + rank, 1, 28, 28), **common))
    found["seeds"] = said(lambda: gn.compile(net, (2, 1, 28, 28), seed=rank, **common))
    other = gn.Sequential(gn.Flatten(), gn.Linear(784, 10 + rank))
    found["nets"] = said(lambda: gn.compile(other, (2, 1, 28, 28), **common))
    if rank < 2:
        found["towers"] = towers.results(two, clip_norm=0.5, accumulate=2)
        found["towers interpret"] = towers.results(two, towers.tiny, (2, 6, 6), target="interpret")
        found["lenet 2"] = trained("lenet", two, 6, 7)
        found["ddp"] = ddp(two, "lenet", _torch_lenet())
        found["ddp norm"] = ddp(two, "two norms", two_norms(torch.nn), steps=2)
        found["ddp norm interpret"] = ddp(two, "one norm", one_norm(torch.nn), "interpret", 2)
        found["norm 2"] = without_rows(two)
    return found


def fitted(group: Any) -> dict[str, Any]:
    """Two epochs of a Trainer with a net that normalizes, and what its evaluation says."""
    from graphnet.train.callbacks import Together

    g = torch.Generator().manual_seed(4)
    data = torch.randn(20, 3, 6, 6, generator=g), torch.randint(0, 10, (20,), generator=g)
    net = norm()
    trainer = gn.Trainer(
        net, gn.CrossEntropyLoss(), gn.SGD(lr=RATE), target="cpu", seed=3, group=group,
        sync_bn=True,
    )  # fmt: skip
    trainer.callbacks = [Together(trainer.group, ())] if trainer.group else []
    history = trainer.fit(data, data, epochs=2, batch=12)
    kept = ("train_loss", "val_loss", "val_accuracy")
    return {"history": [{k: m[k] for k in kept} for m in history],
            "params": {k: v.clone() for k, v in net.state_dict().items()}}  # fmt: skip


def without_rows(group: Any) -> dict[str, Any]:
    """Statistics of each rank: batches of 6 rows for ranks with room for 3, of which a third one
    gets none."""
    net = two_norms()
    how = {"target": "cpu", "loss": gn.CrossEntropyLoss(), "optimizer": gn.SGD(lr=RATE)}
    step = gn.compile(net, (3, 3, 6, 6), seed=3, group=group, **how)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for x, y in batches("two norms", 2, 6):
        mine = slice(step.group.rank * 3, step.group.rank * 3 + 3)
        step(x[mine], y[mine])
    return {"before": before, "params": {k: v.clone() for k, v in net.state_dict().items()}}


def ddp(
    group: Any, name: str, twin: Any, target: str = "cpu", steps: int = 6
) -> dict[str, Any]:  # fmt: skip
    """torch's DistributedDataParallel with losses weighted by rows: DDP averages over ranks."""
    net, step = compiled(name, group, 7, target)
    twin.load_state_dict(net.state_dict())
    parallel = torch.nn.parallel.DistributedDataParallel(twin, process_group=group)
    sgd = torch.optim.SGD(parallel.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    rank, own = step.group.rank, step.shape[0]
    for x, y in batches(name, steps, 7):
        a, b = rank * own, min((rank + 1) * own, 7)
        mine, rows = x[a:b], y[a:b]
        sgd.zero_grad()
        out = parallel(mine)
        loss = torch.nn.functional.cross_entropy(out, rows, reduction="sum")
        (loss * step.group.ranks / len(x)).backward()
        sgd.step()
        step(mine, rows)
    want = dict(twin.state_dict())
    return {k: float((v - want[k]).float().norm() / want[k].float().norm())
            for k, v in net.state_dict().items()}  # fmt: skip


def _torch_lenet() -> Any:
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84),
        nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def _process(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=ranks
    )
    try:
        torch.save(checks(dist.new_group([0, 1])), f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()


def run(ranks: int = 3) -> list[dict[str, Any]]:
    """What each rank found."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (ranks, folder), nprocs=ranks)
        return [torch.load(os.path.join(folder, str(r))) for r in range(ranks)]
