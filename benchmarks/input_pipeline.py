"""Reading image files: graphnet beside a torch DataLoader whose workers use Pillow.

    python benchmarks/input_pipeline.py --json FILE
    python benchmarks/input_pipeline.py --train --json FILE     # end to end, beside the step alone

Writes JPEGs of 256x256 into a temporary folder. In each round, in an order that rotates, every
contestant reads one epoch of shuffled batches of random 227x227 crops, with as many worker
processes each: the loader, graphnet over an empty cache (cold) and over a full one (warm; the
checksum of every row is compared, as in a new process). The time is from the first request to the
last batch, and the start of the workers is in it. Batches are compared before: they are equal in
every bit.

uint8    crops as bytes
float32  crops as (value / 255 - mean) / std; the loader in two ways, in its workers image by image
         or in the consumer batch by batch: the faster one of a round counts

With --train a net is trained on the files by `gn.Trainer`, as `graphnet train` does it: AlexNet in
bf16 on a GPU, a small net elsewhere. Each epoch's rate is the Trainer's own: the first one decodes
(cold), the others read what was kept (warm; the first of these compares checksums). Beside them
stands the rate of the step over one batch that lies on the device.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import graphnet as gn
from graphnet import config
from graphnet.bench.rounds import Quartiles, wait
from graphnet.train.augment import known, parse
from graphnet.train.data import Batches, crops, load, permutation
from graphnet.train.folder import Folder, processors, reading_of
from graphnet.train.trainer import Callback

SIZE, CROP, CLASSES = 256, 227, 8
Epoch = Iterator[tuple[torch.Tensor, torch.Tensor]]


def write_images(root: Path, count: int) -> float:
    """JPEGs with detail at every scale, as large as photographs are; returns their mean size."""
    rng, sizes, scenes = np.random.default_rng(0), [], []
    for _ in range(min(count, 32)):
        scene = np.full((SIZE, SIZE, 3), 128.0)
        for side, strength in ((4, 70), (16, 35), (64, 18), (256, 6)):
            noise = rng.standard_normal((3, side, side)).astype(np.float32)
            wide = [Image.fromarray(n).resize((SIZE, SIZE)) for n in noise]  # bicubic
            scene += strength * np.stack(wide, 2)
        scenes.append(scene.clip(0, 255).astype(np.uint8))
    for k in range(count):
        moved = np.roll(scenes[k % len(scenes)], (k // 7, k // 3), (0, 1))  # no two are alike
        path = root / "train" / f"class{k % CLASSES}" / f"{k:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(moved).save(path, quality=90)
        sizes.append(path.stat().st_size)
    return float(np.mean(sizes))


class Files(torch.utils.data.Dataset[Any]):
    """The same images, cut the same way, as one writes it for a DataLoader."""

    def __init__(self, data: Folder, where: list[Any], normalise: bool) -> None:
        self.paths, self.labels = [f.path for f in data.files], [f.label for f in data.files]
        self.where, self.normalise = where, normalise
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        top, left, _ = self.where[row]
        with Image.open(self.paths[row]) as image:
            piece = image.convert("RGB").crop((left, top, left + CROP, top + CROP))
        x = torch.from_numpy(np.array(piece)).permute(2, 0, 1).contiguous()
        if self.normalise:
            x = x.float().div_(255).sub_(self.mean).div_(self.std)
        return x, self.labels[row]


class Bench:
    """The contestants over one folder of images."""

    def __init__(self, root: Path, batch: int, workers: int) -> None:
        self.root, self.batch, self.workers = root, batch, workers
        data = self.folder()
        self.order = permutation(len(data), 0, 0)
        window = crops(len(data), 0, 0, data.stored, data.shape, False)
        self.windows = window
        self.where = window(np.arange(len(data)))

    def folder(self) -> Folder:
        spec = f"imagefolder:{self.root}"
        data = load(spec, "train", shape=(3, CROP, CROP), resize=SIZE)
        assert isinstance(data, Folder) and data.cache is not None
        return data

    def ours(self, form: str) -> Epoch:
        data, reading = self.folder(), reading_of(self.workers)
        if form == "float32":
            yield from Batches(data, self.batch, 0, reading=reading, cut="random")
            return
        for x, rows, _ in data.stream(self.order.numpy(), 0, self.batch, reading, self.windows):
            yield x, data.labels[rows]

    def loader(self, form: str) -> Epoch:
        data = self.folder()
        rows = [chunk.tolist() for chunk in self.order.split(self.batch)]
        source = Files(data, self.where, form == "in workers")
        for x, y in torch.utils.data.DataLoader(
            source, batch_sampler=rows, num_workers=self.workers
        ):
            yield data.normalised(x) if form == "by batch" else x, y

    def clear(self) -> None:
        shutil.rmtree(config.cache_dir() / "images", ignore_errors=True)

    def same(self, form: str, peers: list[str]) -> None:
        """Every batch of every contestant, cold and warm, beside the loader's first form."""
        self.clear()
        for peer in peers:
            for state in ("cold", "warm"):
                for a, b in zip(self.ours(form), self.loader(peer), strict=True):
                    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]), (form, peer, state)

    def compare(self, form: str, peers: list[str], rounds: int) -> dict[str, Any]:
        self.same(form, peers)

        ours = lambda: self.ours(form)
        runs: dict[str, Callable[[], Epoch]] = {"cold": ours, "warm": ours}
        runs |= {f"loader, {p}": lambda p=p: self.loader(p) for p in peers}  # type: ignore[misc]
        times: dict[str, list[float]] = {name: [] for name in runs}
        names = list(runs)
        for number in range(rounds):
            at = number % len(names)
            for name in names[at:] + names[:at]:
                if name == "cold":
                    self.clear()
                if name == "warm":
                    for _ in self.ours(form):  # fills what a cold run has not
                        pass
                begin = time.perf_counter()
                for _ in runs[name]():
                    pass
                times[name].append(time.perf_counter() - begin)
        best = [min(t) for t in zip(*(times[f"loader, {p}"] for p in peers), strict=True)]
        ratio = {
            name: Quartiles.of([b / t for b, t in zip(best, times[name], strict=True)])
            for name in ("cold", "warm")
        }
        images = len(self.order)
        rates = {name: Quartiles.of([images / t for t in times[name]]).median for name in times}
        return {
            **{f"{name}_ratio": _rounded(q) for name, q in ratio.items()},
            "images_per_s": {name: round(v, 1) for name, v in rates.items()},
        }


class Told(Callback):
    """What each epoch waited for."""

    def __init__(self) -> None:
        self.waited: list[str | None] = []

    def on_epoch(self, trainer: gn.Trainer, metrics: dict[str, float]) -> None:
        self.waited.append(trainer.waited)


def small() -> gn.Module:
    """A step of a few milliseconds on a CPU."""
    return gn.Sequential(
        gn.Conv2d(3, 8, 11, stride=8), gn.ReLU(), gn.Flatten(), gn.Linear(8 * 28 * 28, CLASSES)
    )  # fmt: skip


def end_to_end(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Images a second of a training run over the files, epoch by epoch, and of its step alone."""
    gpu = torch.cuda.is_available()
    data = load(f"imagefolder:{root}", "train", shape=(3, CROP, CROP), resize=SIZE)
    torch.manual_seed(0)
    net = gn.models.alexnet(num_classes=CLASSES) if gpu else small()
    told = Told()
    trainer = gn.Trainer(
        net, gn.CrossEntropyLoss(), gn.SGD(lr=0.001, momentum=0.9, weight_decay=5e-4),
        callbacks=[told], precision="bf16" if gpu else "fp32",
        augment=known(parse("crop,flip=0.5,brightness=0.1,contrast=0.2"), data),
    )  # fmt: skip
    batch, reading = options.batch, reading_of(options.workers, pin=gpu)
    step = trainer.compile((batch, 3, CROP, CROP))
    alone = rate_alone(step, data, batch, options.rounds)
    batches = Batches(data, batch, 0, reading=reading, cut="random", raw=True)
    history = trainer.fit(batches, epochs=1 + options.epochs, batch=batch)
    rates = [round(m["images_per_s"], 1) for m in history]
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu", "net": "alexnet" if gpu
        else "small", "precision": step.precision, "prefetch": reading.prefetch,
        "step_images_per_s": round(alone, 1), "cold_images_per_s": rates[0],
        "first_warm_images_per_s": rates[1],
        "warm_images_per_s": round(float(np.median(rates[2:] or rates[1:])), 1),
        "epochs": rates, "waited": told.waited,
    }  # fmt: skip


def rate_alone(step: Any, data: Folder, batch: int, rounds: int) -> float:
    """Images a second of calls with one batch on the device; the best of the rounds."""
    x = torch.randint(0, 256, (batch, *data.stored), dtype=torch.uint8).to(step.device)
    y = torch.zeros(batch, dtype=torch.int64, device=step.device)
    index = torch.arange(batch, device=step.device)
    best, calls = float("inf"), 20 if step.device.type == "cuda" else 2
    for _ in range(rounds + 1):
        wait(step.device)
        begin = time.perf_counter()
        for _ in range(calls):
            step(x, y, index, 0)
        wait(step.device)
        best = min(best, (time.perf_counter() - begin) / calls)
    return batch / best


def _rounded(q: Quartiles) -> dict[str, float]:
    return {k: round(getattr(q, k), 3) for k in ("median", "low", "high")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=processors())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--train", action="store_true", help="end to end, beside the step alone")
    parser.add_argument("--epochs", type=int, default=4, help="of --train, behind the first")
    parser.add_argument("--json", type=Path, help="file, or a folder that it gets a name in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, config.override(CACHE_DIR=f"{folder}/cache"):
        size = write_images(Path(folder) / "images", options.images)
        found: dict[str, Any] = {
            "images": options.images, "image_bytes": round(size), "batch": options.batch,
            "workers": options.workers, "rounds": options.rounds,
            "threads": torch.get_num_threads(), "torch": torch.__version__,
        }  # fmt: skip
        if options.train:
            found["train"] = end_to_end(Path(folder) / "images", options)
        else:
            bench = Bench(Path(folder) / "images", options.batch, options.workers)
            found["uint8"] = bench.compare("uint8", ["as bytes"], options.rounds)
            both = ["in workers", "by batch"]
            found["float32"] = bench.compare("float32", both, options.rounds)
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        place = options.json
        if place.is_dir():
            place /= "input-pipeline-train.json" if options.train else "input-pipeline.json"
        place.write_text(text + "\n")


if __name__ == "__main__":
    main()
