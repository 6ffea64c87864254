"""augment: looking at what an augmentation does before a run is spent on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphnet.verbs.common import Json, app, emit

WHAT = "as for train: digits, cifar, photos, or flip,rotate=10,scale=0.9:1.1,..."


@app.command("augment")
def augment(
    data: Annotated[str, typer.Option(help="as for train")] = "digits",
    augment: Annotated[str, typer.Option(help=WHAT)] = "digits",
    preview: Annotated[bool, typer.Option("--preview", help="write the contact sheet")] = True,
    out: Annotated[Path, typer.Option(help="the picture")] = Path("augment.png"),
    size: Annotated[int, typer.Option(min=0, help="the net's input, of image files")] = 0,
    resize: Annotated[int, typer.Option(min=0, help="keep image files in this size")] = 0,
    images: Annotated[int, typer.Option(min=1, max=64)] = 8,
    draws: Annotated[int, typer.Option(min=1, max=64, help="epochs shown")] = 10,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Json = False,
) -> None:
    """A contact sheet of training images as they are stored, and as each epoch would see them."""
    from graphnet.train.augment import idle, known, parse, sheet
    from graphnet.train.data import load

    asked = parse(augment)
    shape = (3, size, size) if size else None
    # Files that are no image are the business of a run, with its limit and its list of them.
    train = load(data, "train", shape=shape, resize=resize or None, max_bad=1.0)
    what = known(asked, train)
    images = sheet(out, what, train, images=images, draws=draws, seed=seed)
    if remark := idle(what, train):
        typer.echo(remark, err=True)
    if as_json:
        emit({
            "preview": str(out), "augment": augment, "data": data, "images": images,
            "draws": draws, "shape": list(train.shape), "components": list(what.components),
        })  # fmt: skip
        return
    typer.echo(f"{out}: {images} images of {data}, {draws} draws of each")
