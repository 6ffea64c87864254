"""Every op's kernels in the interpreter, over the table of cases and at the edges of the tiles.

Results and workspaces are filled with NaN first, so an element that no program writes fails.
"""

import pytest
import torch

from graphnet.ir.graph import Graph
from graphnet.ir.op import get_op
from graphnet.lowering.launch.choice import forced
from tests.case import Case, attrs, f, fill
from tests.cases import CASES
from tests.kinds import PRODUCTS, WGRADS
from tests.poisoned import graph_of, run

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_kernels_are_the_reference(case):
    graph = graph_of(case)
    run(graph, case.operands(torch.float32), case.exact)


# ---- the edges of the tiles ------------------------------------------------------------------

EDGES = (1, 15, 16, 17, 31, 37)


@pytest.fixture
def least_tiles():
    with forced(*PRODUCTS, *WGRADS, BM=16, BN=16, BK=16):
        yield


def drawn(graph: Graph) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [fill(i.value.type, g, torch.float32) for i in graph.inputs]


def hold(op: str, ins: list, at) -> None:
    graph = graph_of(Case(op, tuple(ins), torch.clone, at))
    run(graph, drawn(graph))


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("axis", range(3))
def test_linear_at_the_edges(axis, size, split, least_tiles):
    shape = [5, 7, 11]
    shape[axis] = size
    m, n, k = shape
    if split == 1:
        hold("linear", [f(m, k), f(n, k), f(n)], attrs("linear"))
        hold("linear_dgrad", [f(m, n), f(n, k)], attrs("linear_dgrad"))
    with forced(*WGRADS, SPLIT=split):
        hold("linear_wgrad", [f(m, k), f(m, n)], attrs("linear_wgrad"))


#   N, C, H, W, O, kernel, stride, padding, groups
CONVS = [
    (1, 1, 1, 1, 1, (1, 1), 1, 0, 1),
    (1, 1, 5, 5, 1, (5, 5), 1, 0, 1),  # one pixel comes out
    (2, 3, 7, 5, 15, (3, 3), 1, 1, 1),
    (1, 16, 4, 4, 16, (1, 1), 1, 0, 1),  # every dimension one tile
    (1, 17, 4, 5, 17, (1, 1), 1, 0, 1),
    (3, 2, 11, 13, 5, (5, 3), 2, (2, 1), 1),
    (1, 3, 19, 19, 4, (11, 11), 4, 0, 1),  # AlexNet's first layer, small
    (1, 3, 18, 18, 4, (11, 11), 4, 2, 1),
    (2, 6, 6, 6, 4, (3, 3), 1, 1, 2),
    (1, 34, 3, 3, 34, (3, 3), 1, 1, 2),  # 17 channels a group
    (2, 5, 6, 7, 10, (3, 3), 1, 1, 5),  # depthwise
    (1, 2, 9, 9, 3, (2, 2), 3, 0, 1),  # rows and columns that no window reads
    (1, 2, 4, 4, 3, (3, 3), 1, 2, 1),  # more padding than same
]


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("row", CONVS, ids=lambda r: "-".join(map(str, r)).replace(" ", ""))
def test_conv2d_at_the_edges(row, split, least_tiles):
    n, c, h, w, o, kernel, stride, padding, groups = row
    top, left = padding if isinstance(padding, tuple) else (padding, padding)
    common = {"stride": (stride,) * 2, "padding": (top, top, left, left), "groups": groups}
    x, weight = f(n, c, h, w), f(o, c // groups, *kernel)
    at = attrs("conv2d", **common)
    (y,) = get_op("conv2d").infer(at, x, weight)
    if split == 1:
        hold("conv2d", [x, weight, f(o)], at)
        dgrad = attrs("conv2d_dgrad", **common, input_size=(h, w))
        hold("conv2d_dgrad", [y, weight], dgrad)
    with forced(*WGRADS, SPLIT=split):
        hold("conv2d_wgrad", [x, y], attrs("conv2d_wgrad", **common, kernel=kernel))


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1023, 1024, 1025])
def test_elementwise_at_the_edges(size):
    hold("tanh", [f(size)], attrs("tanh"))
    hold("add", [f(size), f(size)], attrs("add"))


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (1, 1, 16, 8), (3, 5, 7, 11), (2, 17, 5, 4)])
@pytest.mark.parametrize("overlap", [False, True])
def test_pools_at_the_edges(shape, block, overlap):
    kernel, stride = ((3, 3), (2, 2)) if overlap else ((2, 2), (2, 2))
    padding = (1, 1, 1, 1) if overlap else (0, 0, 0, 0)
    with forced("maxpool2d", "avgpool2d", BLOCK=block):
        for op in ("maxpool2d", "avgpool2d"):
            hold(op, [f(*shape)], attrs(op, kernel=kernel, stride=stride, padding=padding))
