"""Groups of ops that tests force configurations on."""

from graphnet.lowering.launch.registry import by_op

CONVS = ("conv2d", "conv2d_dgrad", "conv2d_wgrad")
PRODUCTS = ("conv2d", "conv2d_dgrad", "linear", "linear_dgrad")
WGRADS = ("conv2d_wgrad", "linear_wgrad")
NORMS = (
    "lrn", "lrn_grad", "maxpool2d+lrn", "lrn+maxpool2d", "lrn_grad+maxpool2d_grad",
    "maxpool2d_grad+lrn_grad",
)  # fmt: skip


def convs_of(variant: str) -> tuple[str, ...]:
    """The passes of a convolution that a variant computes."""
    return tuple(op for op in CONVS if variant in {v.name for v in by_op()[op]})
