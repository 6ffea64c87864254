"""What asks a trainer for a stop, at a step or in an evaluation."""

from graphnet.train.trainer import Callback


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, trainer, loss):
        if trainer.step == self.step:
            trainer.stop = True


class StopInEval:
    """Validation batches that ask for a stop when they are read in one epoch."""

    def __init__(self, batches, trainer, epoch):
        self.batches, self.trainer, self.epoch = batches, trainer, epoch

    def __iter__(self):
        self.trainer.stop = self.trainer.stop or self.trainer.epoch == self.epoch
        yield from self.batches
