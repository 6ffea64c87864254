"""A region: one launch whose programs run several stages, one after the other, on their images.

The body is generated (lowering/launch/region.py). It calls the stages below, each on the images
from `first` on, with a barrier of the block between two: what one stage stores the next one reads,
from the first-level cache. A stage is a jit function of a kernel family; to add one, write it in a
file beside this one, import it here, and tell `lowering/launch/region.py` which equations it takes.
"""

import triton
import triton.language as tl

from .common import program
from .region_conv import conv  # noqa: F401  (generated bodies call these)
from .region_grad import pool_grad, wgrad  # noqa: F401
from .region_linear import cross_entropy, linear, multi_margin  # noqa: F401


@triton.jit
def region(args, IMAGES: tl.constexpr, BODY: tl.constexpr, AT: tl.constexpr = None):
    """BODY for the images from program x IMAGES on."""
    BODY(program(0, AT) * IMAGES, args)
