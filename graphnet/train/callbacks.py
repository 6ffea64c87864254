"""What a run keeps and shows: metrics, checkpoints, progress."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from graphnet.runtime.group import Group
from graphnet.runtime.state import settle
from graphnet.train import checkpoint, rundir
from graphnet.train.rundir import MetricsLog
from graphnet.train.trainer import Callback, Trainer


def say(text: str) -> None:
    """A line on stderr. The run goes on where nobody reads it any more (`2>&1 | head`)."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


class Metrics(Callback):
    """metrics.jsonl: `{"kind": "epoch", ...}` each epoch, `{"kind": "train", ...}` in between.

    A run that is taken up again repeats the epochs since its checkpoint: the later record counts.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._log = MetricsLog(run)

    def on_losses(self, trainer: Trainer, losses: Sequence[float]) -> None:
        mean = sum(losses) / len(losses)
        assert trainer.program is not None
        lr = trainer.program.optimizer.lr
        self._log.append(
            {"kind": "train", "step": trainer.heard, "loss": mean, "of": len(losses), "lr": lr}
        )

    def on_epoch(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self._log.append({"kind": "epoch", **metrics})
        rundir.write_csv(self.run, trainer.history)

    def on_end(self, trainer: Trainer) -> None:
        self._log.close()


class Checkpoints(Callback):
    """A checkpoint after each epoch and when stopped; best.json follows the test error. Of several
    ranks, rank 0 writes it and the others wait until it is there."""

    def __init__(self, run: Path, keep: int = 2) -> None:
        self.run, self.keep = run, keep

    def save(self, trainer: Trainer, *, best: bool = False) -> None:
        group, sharing = trainer.group, trainer.sharing
        others = {} if sharing is None else sums_of_others(trainer, sharing)
        settle(trainer.net)  # what ranks hold in parts, all of them bring together
        if group is None or group.first:
            # The net's tensors keep torch's names; the optimizer's carry their own prefix.
            tensors = {**trainer.net.state_dict(), **trainer.state_dict(), **others}
            state = trainer.progress() | {
                "ranks": 1 if group is None else group.ranks, "threads": torch.get_num_threads()
            }  # fmt: skip
            checkpoint.save(self.run, trainer.step, tensors, state, keep=self.keep, best=best)
        if group is not None:
            group.any(False)

    def on_epoch(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        scores = [m["val_accuracy"] for m in trainer.history if "val_accuracy" in m]
        self.save(trainer, best=bool(scores) and scores[-1] > max(scores[:-1], default=-1.0))

    def on_stop(self, trainer: Trainer) -> None:
        self.save(trainer)


_SUM, _OF = ".grad_sum", ".of_rank"  # names of gradients that wait for their update


def sums_of_others(trainer: Trainer, group: Group) -> dict[str, torch.Tensor]:
    """What the other ranks have summed up since the last update (`accumulate`), on rank 0: unlike
    all else, it is not the same on each."""
    assert trainer.program is not None
    if not trainer.program.state.pending:
        return {}
    mine = {k: t for k, t in trainer.state_dict().items() if k.endswith(_SUM)}
    found = {k: group.gather(t.to(trainer.program.device)) for k, t in sorted(mine.items())}
    return {f"{k}{_OF}{r}": t.cpu() for k, ts in found.items() for r, t in enumerate(ts) if r}


def restore(trainer: Trainer, found: checkpoint.Checkpoint) -> None:
    """Puts a compiled trainer where the checkpoint was taken; every rank is given all of it."""
    others = {k: t for k, t in found.tensors.items() if k.startswith("optimizer.") and _OF in k}
    tensors = {k: t for k, t in found.tensors.items() if k not in others}
    group = trainer.sharing
    rank, ranks = (0, 1) if group is None else (group.rank, group.ranks)
    if ranks > 1 or others:
        same = found.state.get("ranks", 1) == ranks
        for key in [k for k in tensors if k.endswith(_SUM) and k.startswith("optimizer.")]:
            parts = [tensors[key]]
            while (name := f"{key}{_OF}{len(parts)}") in others:
                parts.append(others[name])
            if same and len(parts) == ranks:
                tensors[key] = parts[rank]
            else:  # there were other ranks: one has what all had
                tensors[key] = sum(parts[1:], parts[0]) if rank == 0 else torch.zeros_like(parts[0])
    own = set(trainer.state_dict())
    trainer.load_state_dict({k: t for k, t in tensors.items() if k in own})
    trainer.net.load_state_dict({k: t for k, t in tensors.items() if k not in own})
    trainer.load_progress(found.state)


class Together(Callback):
    """Of several ranks, in front of all else after an epoch: their parameters and slots, and with
    `sync_bn` their running statistics, are the same in every bit, and each knows which image files
    the others have left out."""

    def __init__(self, group: Group, data: Sequence[Any]) -> None:
        self.group, self.data = group, [d for d in data if hasattr(d, "set_aside")]

    def on_epoch(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        program = trainer.program
        assert program is not None
        roles = ("param", "slot", "buffer") if trainer.sync_bn else ("param", "slot")
        same = {e.name: e.cell.live for e in program._entries
                if e.role in roles and not e.shard and not e.name.endswith(_SUM)}  # fmt: skip
        self.group.same(same)
        for found in self.group.collect([d.quarantined for d in self.data]):
            for d, failed in zip(self.data, found, strict=True):
                d.set_aside(failed)


class Quarantine(Callback):
    """quarantine.jsonl: `{"path": ..., "reason": ...}` for each image file that was left out.

    Written whenever there are more of them, so also when there were too many.
    """

    def __init__(self, run: Path, data: Sequence[Any]) -> None:
        self.path = run / "quarantine.jsonl"
        self.data = [d for d in data if hasattr(d, "report")]
        self.known: dict[str, str] = {}
        if self.path.exists():  # of the run that is taken up again
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.known = {r["path"]: r["reason"] for r in map(json.loads, lines)}
        for note in dict.fromkeys(d.note for d in self.data if d.note):
            say(note)

    def write(self) -> None:
        found = {r["path"]: r["reason"] for d in self.data for r in d.report()}
        if new := found.keys() - self.known.keys():
            self.known |= found
            rows = [json.dumps({"path": p, "reason": r}) for p, r in sorted(self.known.items())]
            checkpoint.atomic_write(self.path, ("\n".join(rows) + "\n").encode())
            say(f"{len(new)} image files left out, {len(self.known)} in all: see {self.path}")

    def on_epoch(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self.write()

    def on_end(self, trainer: Trainer) -> None:
        self.write()


class Progress(Callback):
    """A bar on a terminal; elsewhere one line per epoch. Shows losses that were fetched anyway."""

    def __init__(self, epochs: int, batches: int, images: int) -> None:
        self.epochs, self.batches, self.images = epochs, batches, images
        self._bar: Any = None
        self._task: Any = None

    def on_start(self, trainer: Trainer) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        if not console.is_terminal:
            return
        self._bar = Bar(
            TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]} images/s  loss {task.fields[loss]}"),
            TimeRemainingColumn(), console=console,
        )  # fmt: skip
        total = self.epochs * self.batches
        self._task = self._bar.add_task(
            "", total=total, completed=trainer.step, epoch=trainer.epoch + 1, rate="-", loss="-"
        )
        self._bar.start()

    def on_losses(self, trainer: Trainer, losses: Sequence[float]) -> None:
        if self._bar is None:
            return
        speed = self._bar.tasks[0].speed
        rate = "-" if not speed else f"{speed * self.images / self.batches:,.0f}"
        self._bar.update(
            self._task, completed=trainer.step, epoch=trainer.epoch + 1, rate=rate,
            loss=f"{losses[-1]:.4f}",
        )  # fmt: skip

    def on_epoch(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        text = (
            f"epoch {metrics['epoch']:.0f}/{self.epochs}  loss {metrics['train_loss']:.4f}  "
            f"{metrics['images_per_s']:,.0f} images/s"
        )
        if "val_accuracy" in metrics:
            text += f"  test accuracy {100 * metrics['val_accuracy']:.2f} %"
        if "skipped" in metrics:
            text += f"  {metrics['skipped']:.0f} steps were not finite and skipped"
        if trainer.waited:
            text += f"  ({trainer.waited})"
        if self._bar is None:
            say(text)
            return
        self._bar.update(self._task, epoch=min(trainer.epoch + 1, self.epochs))
        self._bar.console.print(text, highlight=False)

    def on_end(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.stop()
