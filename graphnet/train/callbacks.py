"""What a run keeps and shows: metrics, checkpoints, progress."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    """A checkpoint after each epoch and when stopped; best.json follows the test error."""

    def __init__(self, run: Path, keep: int = 2) -> None:
        self.run, self.keep = run, keep

    def save(self, trainer: Trainer, *, best: bool = False) -> None:
        # The net's tensors keep torch's names; the optimizer's carry their own prefix.
        tensors = {**trainer.net.state_dict(), **trainer.state_dict()}
        checkpoint.save(
            self.run, trainer.step, tensors, trainer.progress(), keep=self.keep, best=best
        )

    def on_epoch(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        scores = [m["val_accuracy"] for m in trainer.history if "val_accuracy" in m]
        self.save(trainer, best=bool(scores) and scores[-1] > max(scores[:-1], default=-1.0))

    def on_stop(self, trainer: Trainer) -> None:
        self.save(trainer)


def restore(trainer: Trainer, found: checkpoint.Checkpoint) -> None:
    """Puts a compiled trainer where the checkpoint was taken."""
    own = set(trainer.state_dict())
    trainer.load_state_dict({k: t for k, t in found.tensors.items() if k in own})
    trainer.net.load_state_dict({k: t for k, t in found.tensors.items() if k not in own})
    trainer.load_progress(found.state)


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
