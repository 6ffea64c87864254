"""Every op's kernels on the GPU, over the table of cases and at the edges of the tiles."""

import pytest
import torch

from graphnet.lowering.launch.choice import forced
from tests.case import attrs, f
from tests.cases import CASES
from tests.interp.test_cases import CONVS, EDGES, drawn
from tests.kinds import PRODUCTS, WGRADS
from tests.poisoned import graph_of, run

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_kernels_are_the_reference(case):
    run(graph_of(case), case.operands(torch.float32), case.exact, "cuda")


def hold(op, ins, at):
    from tests.case import Case

    graph = graph_of(Case(op, tuple(ins), torch.clone, at))
    run(graph, drawn(graph), target="cuda")


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("size", EDGES)
def test_linear_at_the_edges(size, split):
    with forced(*PRODUCTS, *WGRADS, BM=16, BN=16, BK=16):
        hold("linear", [f(size, 7), f(11, 7), f(11)], attrs("linear"))
        hold("linear_dgrad", [f(5, size), f(size, 11)], attrs("linear_dgrad"))
        with forced(*WGRADS, SPLIT=split):
            hold("linear_wgrad", [f(size, 7), f(size, 11)], attrs("linear_wgrad"))


@pytest.mark.parametrize("row", CONVS, ids=lambda r: "-".join(map(str, r)).replace(" ", ""))
def test_conv2d_at_the_edges(row):
    n, c, h, w, o, kernel, stride, padding, groups = row
    top, left = padding if isinstance(padding, tuple) else (padding, padding)
    at = attrs("conv2d", stride=(stride,) * 2, padding=(top, top, left, left), groups=groups)
    hold("conv2d", [f(n, c, h, w), f(o, c // groups, *kernel), f(o)], at)
