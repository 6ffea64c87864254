"""Decodes image files into memory that it shares with its parent.

    python -m graphnet.train.decode_worker C,H,W STRIDE MEMORY_FD IMAGES_FD SUMS_FD

A request is a JSON line on stdin: [[slot, row, path], ...]. The image lands at slot * STRIDE of the
memory and, where there is a cache (IMAGES_FD not -1), in its row. The answer is a JSON line on
stdout with the reason for each file that is no image, null for the others.

A process of its own, and no multiprocessing: it works from a script, stdin or a notebook without
a guard around `__main__`, leaves the interpreter of the training loop alone, and a decoder that
crashes takes nothing with it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import sys
from collections.abc import Sequence

from graphnet.train.decode import BadImage, decode
from graphnet.train.rowstore import write_row


def fill(image: memoryview, path: str, shape: Sequence[int]) -> str | None:
    """Decodes a file into memory; the reason where it is no image."""
    try:
        planes = decode(path, shape)
    except BadImage as error:
        return str(error)
    at = 0
    for plane in planes:
        image[at : at + len(plane)] = plane
        at += len(plane)
    return None


def main(arguments: list[str]) -> int:
    """Serves requests until stdin ends."""
    # A signal to the whole group is for the parent: it still wants the rest of its step's data.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    shape = [int(v) for v in arguments[0].split(",")]
    stride, memory, images, sums = (int(v) for v in arguments[1:])
    shared = memoryview(mmap.mmap(memory, 0))
    size = shape[0] * shape[1] * shape[2]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not mix with answers
    for line in sys.stdin:
        reasons: list[str | None] = []
        for slot, row, path in json.loads(line):
            image = shared[slot * stride : slot * stride + size]
            reasons.append(fill(image, path, shape))
            if images >= 0 and reasons[-1] is None:
                with contextlib.suppress(OSError):  # a full disk: the row is decoded again later
                    write_row(images, sums, row, stride, image)
        answers.write(json.dumps(reasons) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
