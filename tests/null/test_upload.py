"""The order of what two streams do for a batch that comes from the host."""

from contextlib import contextmanager

import torch

from graphnet.runtime.upload import Upload


class Stream:
    def __init__(self, done, name):
        self.done, self.name = done, name

    def wait_stream(self, other):
        self.done.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.done.append(f"{self.name} waits for {event.of}")


class Event:
    of = "nothing"

    def __init__(self, done):
        self.done = done

    def record(self, stream):
        self.of = f"{stream.name} {sum(' at ' in d for d in self.done)}"
        self.done.append(f"{stream.name} at {self.of}")


def test_a_place_is_written_once_its_batch_was_taken(monkeypatch):
    done = []
    main, side = Stream(done, "step"), Stream(done, "copy")
    entered = []

    @contextmanager
    def stream(s):
        entered.append(s.name)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(done))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    upload = Upload(torch.zeros(4, 2, dtype=torch.bfloat16), torch.float32)
    got = []
    for k in range(3):
        got.append(upload.send(torch.full((4 - k, 2), float(k))))
        upload.taken()
    assert done == [
        "copy waits for step",
        "copy waits for nothing", "copy at copy 0", "step waits for copy 0", "step at step 1",
        "copy waits for nothing", "copy at copy 2", "step waits for copy 2", "step at step 3",
        "copy waits for step 1", "copy at copy 4", "step waits for copy 4", "step at step 5",
    ]  # fmt: skip
    assert entered == ["copy"] * 3 and got[0].dtype == torch.float32
    assert torch.equal(got[1], torch.ones(3, 2)) and torch.equal(got[2], torch.full((2, 2), 2.0))
    assert got[0].data_ptr() == got[2].data_ptr() != got[1].data_ptr()
