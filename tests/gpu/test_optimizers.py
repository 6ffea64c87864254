"""Every optimizer on the GPU beside torch.optim in float64; groups, clipping, the guard."""

import math

import pytest
import torch

from tests.optimizers import TABLE, Race, many_steps


@pytest.mark.parametrize("name", TABLE)
def test_a_hundred_steps_with_a_drop_of_the_rate(name):
    many_steps(name, "cuda")


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_groups_clipping_and_the_guard(name):
    race = Race(*TABLE[name], "cuda", accumulate=2, clip_norm=1e6, nonfinite="skip")
    for sizes in ((6, 6), (6, 3), (1, 6)):
        parts = [race.batch(n) for n in sizes]
        for x, y in parts:
            race.step(x, y)
        race.teach(*(torch.cat(t) for t in zip(*parts, strict=True)))
        assert race.error() <= 1e-5
    before = race.net.state_dict()
    x, y = race.batch()
    x[0, 0] = math.nan
    race.step(x, y)
    assert math.isnan(float(race.step(*race.batch())))
    assert all(torch.equal(v, before[k]) for k, v in race.net.state_dict().items())
