"""Batches on their way to a GPU, while the step before still runs there."""

from __future__ import annotations

import torch


class Upload:
    """Copies batches from the host on a stream of its own, into one of two places on the device;
    the step's stream waits for a batch to arrive and copies it on. So a copy from pinned memory
    runs beside the step before, and no copy waits for that step.

    like   the tensor that the step reads
    dtype  of the batches: what the step reads may be rounded, which the device then does
    """

    def __init__(self, like: torch.Tensor, dtype: torch.dtype) -> None:
        self.device = like.device
        self.stream = torch.cuda.Stream(self.device)
        self.places = [torch.empty(like.shape, dtype=dtype, device=self.device) for _ in range(2)]
        # Memory that was used on the step's stream before: not before that is done with it.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        self.arrived = [torch.cuda.Event() for _ in self.places]
        self.left = [torch.cuda.Event() for _ in self.places]
        self.at = 0

    def send(self, batch: torch.Tensor) -> torch.Tensor:
        """The batch on the device, for the current stream, until `taken`."""
        into = self.places[self.at][: batch.shape[0]]
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.left[self.at])  # at once where nothing was there
            into.copy_(batch, non_blocking=True)
            self.arrived[self.at].record(self.stream)
        torch.cuda.current_stream(self.device).wait_event(self.arrived[self.at])
        return into

    def taken(self) -> None:
        """Says that the current stream has been given all that reads the batch sent last."""
        self.left[self.at].record(torch.cuda.current_stream(self.device))
        self.at = (self.at + 1) % len(self.places)
