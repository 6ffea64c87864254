"""What a trained net is worth: test error, ten crops, ensembles, and what it says of an image."""

from __future__ import annotations

import json
import shlex
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from graphnet import disk
from graphnet.api import compile
from graphnet.errors import LARGEST, CheckpointError, ConfigError, DataError, printable
from graphnet.frontends.dsl import Module
from graphnet.frontends.loading import input_shape, load_model, runs_code
from graphnet.train import checkpoint, rundir
from graphnet.train.building import read_settings
from graphnet.train.data import Batches, ClassesWarning, check_classes, load
from graphnet.train.decode import MAX_PIXELS
from graphnet.train.folder import Folder, centre, normalised, processors, reading_of
from graphnet.train.metrics import confusion_matrix, topk_wrong
from graphnet.train.settings import RunConfig

_MAX_ABOUT = 16 << 20
ABOUT = "data.json"  # in a run folder: what the training data were
_ABOUT = ("classes", "mean", "std", "stored")
TOP = 5
SHOWN = 48  # misclassified images that are kept


@dataclass(frozen=True)
class Trained:
    """A trained net: where its tensors come from, and what is known of the run they lie in."""

    net: Module
    name: str
    file: Path
    settings: RunConfig | None = None
    about: dict[str, Any] = field(default_factory=dict)


def load_trained(
    path: Path, model: str | None = None, *, insist: bool = True, trusted: Sequence[str] = ()
) -> Trained:
    """The net of a run folder (its last checkpoint) or of a checkpoint.

    model    of a file that lies in no run; where `insist`, instead of a run's own as well
    trusted  further models whose files may be run where a run names them
    ConfigError where a run names any other FILE.py: a run folder may come from anybody.
    """
    tensors, settings, file, run = _find(Path(path), model)
    name = settings.model if settings and not (model and insist) else model or ""
    if runs_code(name) and name not in (model, *trusted):
        raise ConfigError(
            f"{path} names the model {name}, a file that would be run",
            help=f"if you trust it: --model {shlex.quote(name)}",
        )
    mine = settings if settings and name == settings.model else None
    net = load_model(name, mine.classes, mine.towers) if mine else load_model(name)
    if settings is None and not runs_code(name):
        net = load_model(name, _outputs(net, tensors))
    own = set(net.state_dict())
    net.load_state_dict({k: t for k, t in tensors.items() if k in own or not _trainers(k)})
    return Trained(net, name, file, settings, _about(run))


def _find(
    path: Path, model: str | None
) -> tuple[dict[str, torch.Tensor], RunConfig | None, Path, Path | None]:
    """(tensors, settings of the run, file, run folder)."""
    if not path.exists():
        raise CheckpointError(f"{str(path)!r} is no run and no checkpoint: nothing is there")
    if path.is_dir():
        settings = read_settings(path)
        found = checkpoint.load_latest(path)
        if found is None:
            raise CheckpointError(f"{path} has no checkpoint yet", help="train it first")
        return found.tensors, settings, found.path, path
    run = path.parent.parent
    if path.parent.name == checkpoint.FOLDER and (run / rundir.CONFIG).is_file():
        found = checkpoint.load(path)
        return found.tensors, read_settings(run), found.path, run
    if model is None:
        raise ConfigError(f"{path} lies in no run, so its model is not known", help="give --model")
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        return from_bytes(disk.read(path)), None, path, None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {error}") from None


def _outputs(net: Module, tensors: Mapping[str, torch.Tensor]) -> int:
    """The outputs of the net that the tensors are of, where `net` differs in those alone; or 0."""
    key, own = [(k, t) for k, t in net.state_dict().items() if t.ndim > 1][-1]
    theirs = tensors.get(key, own)
    return len(theirs) if theirs.shape[1:] == own.shape[1:] and len(theirs) != len(own) else 0


def _trainers(key: str) -> bool:
    """Whether a tensor of a checkpoint is the trainer's, not the net's."""
    return key.startswith("optimizer.") or key in ("epoch", "step")


def keep_about(run: Path, data: Any) -> None:
    """Leaves in the run folder what prediction must know of the training data; DataError where the
    run was started on data of other classes."""
    if (run / ABOUT).exists():
        _check_names(_about(run)["classes"], run, data)
        return
    about = {name: list(getattr(data, name)) for name in _ABOUT}
    about["stored"] = list(getattr(data, "seen", None) or data.stored)
    checkpoint.atomic_write(run / ABOUT, json.dumps(about).encode())


def _about(run: Path | None) -> dict[str, Any]:
    """What `keep_about` wrote. Without it predictions would be wrong, and nobody would notice."""
    if run is None:
        return {}
    try:
        about = json.loads(disk.read(run / ABOUT, _MAX_ABOUT))
        if not isinstance(about, dict):
            raise ValueError("it is no object")
        if lost := [n for n in _ABOUT if n not in about]:
            raise ValueError(f"it lacks {', '.join(lost)}")
        about = {name: about[name] for name in _ABOUT}
        _check_about(**about)
        return about
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"cannot read {run / ABOUT}, by which images are normalised: {why}",
            help="graphnet train --resume writes it again, if the run is not finished",
        ) from None


def _check_about(classes: Any, mean: Any, std: Any, stored: Any) -> None:
    """ValueError where an entry is none that `keep_about` writes."""

    def listed(values: Any, of: type | tuple[type, ...]) -> bool:
        return isinstance(values, list) and all(
            isinstance(v, of) and not isinstance(v, bool) for v in values
        )

    if not listed(classes, str):
        raise ValueError("classes is no list of names")
    sizes = listed(stored, int) and len(stored) == 3 and min(stored) > 0
    if not sizes or stored[1] * stored[2] > MAX_PIXELS:
        raise ValueError(f"stored {stored!r:.80} is no size of an image [C, H, W]")
    for name, values, least in (("mean", mean, -LARGEST), ("std", std, 0.0)):
        numbers = listed(values, (int, float)) and all(least < v <= LARGEST for v in values)
        if not numbers or len(values) not in (1, stored[0]):
            raise ValueError(f"{name} {values!r:.80} is no number for each of {stored[0]} channels")


def _check_fits(trained: Trained, shape: Sequence[int]) -> None:
    """CheckpointError where the run's images are none that its net takes, [N, C, H, W]."""
    stored = trained.about.get("stored")
    if stored and (stored[0] != shape[1] or stored[1] < shape[2] or stored[2] < shape[3]):
        raise CheckpointError(
            f"{trained.file.parent.parent / ABOUT}: images kept as {stored}, the net takes "
            f"{list(shape[1:])}",
            help="give the model that the run was trained with",
        )


# ---- probabilities ---------------------------------------------------------------------------


def ten_crops(images: torch.Tensor, size: Sequence[int]) -> Iterator[torch.Tensor]:
    """The four corners and the centre of images [N,C,S,T], in `size` (H, W), and their mirrors."""
    (h, w), (s, t) = size, images.shape[-2:]
    for top, left in ((0, 0), (0, t - w), (s - h, 0), (s - h, t - w), ((s - h) // 2, (t - w) // 2)):
        crop = images[..., top : top + h, left : left + w]
        yield crop
        yield crop.flip(-1)


Predict = Callable[[torch.Tensor], torch.Tensor]


def averaged(members: Sequence[Predict], size: Sequence[int] | None = None) -> Predict:
    """x -> the mean of the members' softmax, and over ten crops of `size` where it is given."""

    def predict(x: torch.Tensor) -> torch.Tensor:
        views = [x] if size is None else list(ten_crops(x, size))
        total = torch.zeros(())
        for view in views:
            for member in members:
                total = total + torch.softmax(member(view.contiguous()).float(), 1)
        return total / (len(views) * len(members))

    return predict


def _width(program: Any) -> int:
    return int(program.stages.traced.returns[0].type.shape[-1])


def _member(program: Any, about: Mapping[str, Any], otherwise: Mapping[str, Any]) -> Predict:
    """Images in the net's size, not normalised -> logits: normalised as the net was trained."""
    mean, std = (about.get(name, otherwise[name]) for name in ("mean", "std"))
    return lambda x: program(normalised(x, mean, std))


def _check_names(mine: Sequence[str], file: Path, data: Any) -> None:
    """DataError where a class number means one thing to the net and another in the data."""
    theirs = list(data.classes)
    if not mine or not theirs or mine == theirs:
        return
    pairs = zip_longest(mine, theirs)
    k, (ours, other) = next((k, pair) for k, pair in enumerate(pairs) if pair[0] != pair[1])
    raise DataError(
        f"{data.name} has {len(theirs)} classes, the net of {file} was trained on "
        f"{len(mine)}; class {k} is {other!r} there, {ours!r} here",
        help="give data with the classes of the training, in their order",
    )


# ---- test error ------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts over batches of probabilities [N, K] and labels."""

    classes: int
    images: int = 0
    loss: float = 0.0
    top1: int = 0
    top5: int = 0
    confusion: torch.Tensor = field(init=False)
    shown: list[tuple[float, torch.Tensor, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.confusion = torch.zeros(self.classes, self.classes, dtype=torch.int64)

    def add(self, p: torch.Tensor, y: torch.Tensor, images: torch.Tensor | None = None) -> None:
        """images: as they are shown, of which the surest mistakes are kept."""
        p, y = p.cpu(), y.cpu()
        self.images += len(y)
        self.loss -= float(p[torch.arange(len(y)), y].clamp_min(1e-38).log().double().sum())
        self.top1 += int(topk_wrong(p, y))
        self.top5 += int(topk_wrong(p, y, min(TOP, self.classes)))
        said = p.argmax(1)
        self.confusion += confusion_matrix(said, y, self.classes)
        if images is None:
            return
        for k in (said != y).nonzero().flatten().tolist():
            self.shown.append((float(p[k, said[k]]), images[k].clone(), int(y[k]), int(said[k])))
        self.shown = sorted(self.shown, key=lambda row: -row[0])[:SHOWN]

    @classmethod
    def of_all(cls, parts: Sequence[Tally]) -> Tally:
        """What several ranks have counted, each in its rows."""
        whole = cls(parts[0].classes)
        for name in ("images", "loss", "top1", "top5", "confusion"):
            setattr(whole, name, sum(getattr(p, name) for p in parts))
        shown = [row for p in parts for row in p.shown]
        whole.shown = sorted(shown, key=lambda row: -row[0])[:SHOWN]
        return whole

    def as_dict(self) -> dict[str, Any]:
        """loss, top-1 and top-5 error in percent, confusion (row = label)."""
        if not self.images:
            raise DataError("the evaluation data holds no batch")
        return {
            "images": self.images, "loss": self.loss / self.images,
            "top1_error": 100 * self.top1 / self.images,
            "top5_error": 100 * self.top5 / self.images, "confusion": self.confusion.tolist(),
        }  # fmt: skip


def evaluate_run(
    path: Path,
    data: str | None = None,
    *,
    model: str | None = None,
    trusted: Sequence[str] = (),
    batch: int = 256,
    target: str = "auto",
    ten_crop: bool = False,
    ensemble: Sequence[Path] = (),
    resize: int = 0,
    workers: int | None = None,
) -> dict[str, Any]:
    """Test loss, top-1 and top-5 error in percent and confusion matrix (row = label), as JSON.

    path      a run folder (its last checkpoint) or a checkpoint
    data      default: the run's own
    model     of a file that lies in no run; FILE.py:ATTRIBUTE where the run names it, which is run
    trusted   such models of the `ensemble`
    ten_crop  the softmax is averaged over four corners, the centre and their mirrors, cut from
              images kept in `resize` (default: the run's)
    ensemble  further runs or checkpoints; the softmax is averaged over all of them
    workers   processes that decode image files; one for each processor by default
    """
    first = load_trained(path, model)
    others = (load_trained(p, model, insist=False, trusted=trusted) for p in ensemble)
    members = [first, *others]
    spec = data or (first.settings.data if first.settings else None)
    if spec is None:
        raise ConfigError(f"{path} lies in no run, so its data are not known", help="give --data")
    shape = input_shape(first.net, batch)
    for m in members:
        if (other := input_shape(m.net, batch)) != shape:
            raise ConfigError(
                f"{m.file} takes {list(other[1:])}, {first.file} {list(shape[1:])}",
                help="an ensemble looks at the same images",
            )
        _check_fits(m, shape)
    known = first.settings or RunConfig()
    kept = resize or known.resize
    test: Any = load(
        spec, "test", shape=shape[1:], resize=kept or None, max_bad=known.max_bad,
        cache=not known.uncached,
    )  # fmt: skip
    for m in members:
        _check_names(m.about.get("classes", ()), m.file, test)
    if ten_crop and test.stored == test.shape:
        raise ConfigError(
            f"ten crops of {shape[2]}x{shape[3]} from images of the same size are one",
            help="image files, kept larger: --resize 256",
        )
    batch = min(batch, len(test))  # a larger one would be padded with rows of zeros
    programs: list[Any] = [compile(m.net, (batch, *shape[1:]), target=target) for m in members]
    for m, program in zip(members, programs, strict=True):
        if (theirs := _width(program)) != (ours := _width(programs[0])):
            raise ConfigError(
                f"{m.file} tells {theirs} classes apart, {first.file} {ours}",
                help="an ensemble votes on the same classes",
            )
    reading = reading_of(processors() if workers is None else workers)
    batches = Batches(test, batch, shuffle=False, reading=reading, raw=True)
    voices = [
        _member(program, m.about, {"mean": test.mean, "std": test.std})
        for m, program in zip(members, programs, strict=True)
    ]
    probabilities = averaged(voices, shape[2:] if ten_crop else None)
    tally: Tally | None = None
    start = time.perf_counter()
    for x, y in batches:
        p = probabilities(x if ten_crop else centre(x, shape[2:]))
        if tally is None:
            tally = Tally(p.shape[1])
            check_classes(test, p.shape[1], old=True)
        tally.add(p, y)
    if tally is None:
        raise DataError("the evaluation data holds no batch")
    return {
        "model": first.name, "data": spec, "checkpoint": str(first.file),
        "target": programs[0].target, "precision": programs[0].precision, **tally.as_dict(),
        "classes": list(test.classes), "ten_crop": ten_crop, "members": len(members),
        "left_out": test.report() if isinstance(test, Folder) else [],
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


# ---- single images ---------------------------------------------------------------------------


def predict(
    path: Path,
    images: Sequence[Path],
    *,
    model: str | None = None,
    top: int = TOP,
    batch: int = 32,
    target: str = "auto",
) -> list[dict[str, Any]]:
    """What the net says of image files: for each the `top` classes with their probabilities.

    A file that is no image becomes a row with "error"; the others are answered.
    """
    from graphnet.train.readers import read_image

    if top < 1:
        raise ConfigError(f"top={top} classes of each image", help="at least 1")
    trained = load_trained(path, model)
    size = min(batch, max(1, len(images)))
    shape = input_shape(trained.net, size)
    _check_fits(trained, shape)
    program = compile(trained.net, shape, target=target)
    logits = _member(program, trained.about, {"mean": (0.0,), "std": (1.0,)})
    names = [printable(name) for name in trained.about.get("classes") or []]
    if names and (outputs := _width(program)) != len(names):
        warnings.warn(
            f"{trained.file} has {outputs} outputs for {len(names)} classes: the others stand for "
            "nothing and are left out", ClassesWarning, stacklevel=2,
        )  # fmt: skip
    out: list[dict[str, Any]] = []
    for at in range(0, len(images), size):
        whole: list[tuple[dict[str, Any], torch.Tensor]] = []
        for file in images[at : at + size]:
            row: dict[str, Any] = {"image": str(file)}
            out.append(row)
            try:
                whole.append((row, read_image(file, shape[1:], trained.about.get("stored"))))
            except DataError as error:
                row["error"] = error.message
        if not whole:
            continue
        p = torch.softmax(logits(torch.stack([image for _, image in whole])).float(), 1).cpu()
        p = p[:, : len(names) or None]  # of a net with more outputs, the classes that there are
        values, indices = p.topk(min(top, p.shape[1]), 1)
        for (row, _), v, k in zip(whole, values.tolist(), indices.tolist(), strict=True):
            row["classes"] = [
                {"index": i, "name": names[i] if i < len(names) else str(i), "p": round(q, 6)}
                for i, q in zip(k, v, strict=True)
            ]
    return out
