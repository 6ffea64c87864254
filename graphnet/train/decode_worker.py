"""Decodes image files into memory that it shares with its parent.

    python -m graphnet.train.decode_worker C,H,W STRIDE MEMORY_FD IMAGES_FD SUMS_FD

A request is a JSON line on stdin: [[slot, row, path], ...]. The answer is one on stdout, with the
`handled` of each: where there is a cache (IMAGES_FD not -1) the image lands in its row there, else
at slot * STRIDE of the memory.

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

Job = tuple[int, int, str]  # slot of the memory, row of the data set, file
Cache = tuple[int, int]  # descriptors of the images and of their checksums


def handled(
    job: Job, shape: Sequence[int], stride: int, memory: memoryview, cache: Cache | None
) -> bool | str:
    """Decodes a file: True for in the cache, False for in its slot, or why it is no image."""
    slot, row, path = job
    try:
        planes = decode(path, shape)
    except BadImage as error:
        return str(error)
    # Not both: copies and memory that is touched for the first time are most of what decoding a
    # small JPEG costs besides the decoder.
    if cache is not None:
        with contextlib.suppress(OSError):  # a full disk: the row is decoded again later
            if write_row(*cache, row, stride, planes):
                return True
    image = b"".join(planes)
    memory[slot * stride : slot * stride + len(image)] = image
    return False


def main(arguments: list[str]) -> int:
    """Serves requests until stdin ends."""
    # A signal to the whole group is for the parent: it still wants the rest of its step's data.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    shape = [int(v) for v in arguments[0].split(",")]
    stride, handle, images, sums = (int(v) for v in arguments[1:])
    memory = memoryview(mmap.mmap(handle, 0))
    cache = None if images < 0 else (images, sums)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not mix with answers
    for line in sys.stdin:
        answer = [handled(job, shape, stride, memory, cache) for job in json.loads(line)]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
