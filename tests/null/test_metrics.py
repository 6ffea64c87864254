"""Metrics against plain loops."""

import math

import pytest
import torch

from graphnet.errors import ShapeError
from graphnet.train.metrics import RunningMean, confusion_matrix, topk_error, topk_wrong


def test_topk_against_torch():
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 10), torch.randint(0, 10, (200,))
    errors = topk_error(logits, labels, (1, 3, 10))
    for k, error in errors.items():
        hits = (logits.topk(k).indices == labels[:, None]).any(1)
        assert error == pytest.approx(1 - float(hits.double().mean()))
    assert errors[10] == 0 and topk_error(logits, logits.argmax(1)) == {1: 0.0}


def test_ties_and_nan_do_not_flatter():
    labels = torch.arange(10)
    assert topk_error(torch.zeros(10, 10), labels, (1, 5)) == {1: 0.9, 5: 0.5}
    assert topk_error(torch.full((10, 10), math.nan), labels, (1, 10)) == {1: 1.0, 10: 1.0}


def test_shapes_are_checked():
    for logits, labels, k in [
        (torch.zeros(3), torch.zeros(3), 1), (torch.zeros(3, 2), torch.zeros(2), 1),
        (torch.zeros(3, 2), torch.zeros(3), 3), (torch.zeros(3, 2), torch.zeros(3), 0),
    ]:  # fmt: skip
        with pytest.raises(ShapeError):
            topk_wrong(logits, labels.long(), k)
    with pytest.raises(ShapeError, match="0 rows"):
        topk_error(torch.zeros(0, 2), torch.zeros(0).long())


def test_confusion_matrix():
    labels, predicted = torch.tensor([0, 0, 2, 1]), torch.tensor([0, 2, 2, 0])
    assert confusion_matrix(predicted, labels, 3).tolist() == [[1, 0, 1], [1, 0, 0], [0, 0, 1]]
    assert confusion_matrix(labels[:0], labels[:0], 2).tolist() == [[0, 0], [0, 0]]
    for bad in (torch.tensor([0, 0, 3, 0]), torch.tensor([0, 0, -1, 0])):
        with pytest.raises(ShapeError, match="with 3 classes"):
            confusion_matrix(bad, labels, 3)


def test_running_mean_reads_a_buffer_before_it_is_reused():
    mean, ring = RunningMean(), torch.tensor(1.0)
    assert math.isnan(mean.value())
    mean.add(ring, 3)
    ring.fill_(5.0)
    mean.add(ring, 1)
    assert mean.value() == 2.0
    mean.add(6.0, 4)
    assert mean.value() == 4.0
