"""The ops, one family per file. Importing this package fills the registry."""

from graphnet.ops import (  # noqa: F401
    activation,
    adam,
    adaptive_pool,
    augment,
    conv2d,
    dropout,
    elementwise,
    function,
    fused,
    gradient,
    linear,
    loss,
    lrn,
    math,
    pool,
    reduce,
    round_tf32,
    shape,
    softmax,
    update,
)
