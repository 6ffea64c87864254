"""Losses and their gradients from the same logits. Rows stay whole in registers: C up to 4,096.

Each program takes a block of rows. With one program the mean loss is final; with several, each
writes its sum to `work` and `mean_reduce` adds them in order. The mean is over the rows of all
ranks where `rows_ptr` counts them, else over the live ones.
"""

import triton
import triton.language as tl

from .common import program


@triton.jit
def _finish(total, rows, loss, work, PROGRAMS: tl.constexpr, AT: tl.constexpr):
    if PROGRAMS == 1:
        tl.store(loss, total / rows)
    else:
        tl.store(work + program(0, AT), total)


@triton.jit
def cross_entropy_rows(
    logits, labels, live, rows, args, m,
    M: tl.constexpr, C: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, BN: tl.constexpr,
    SMOOTHING: tl.constexpr, LOSS: tl.constexpr, GRAD: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """The sum of the losses of the live rows among m; their gradients go to EPILOGUE."""
    cols = tl.arange(0, BN)
    inside = (m < M)[:, None] & (cols < C)[None, :]
    alive = m < live
    z = tl.load(
        logits + m[:, None] * S0 + (cols * S1)[None, :], mask=inside, other=float("-inf")
    ).to(tl.float32)
    label = tl.load(labels + m, mask=m < M, other=0)
    z = tl.where((m < M)[:, None], z, tl.where((cols < C)[None, :], 0.0, float("-inf")))
    top = tl.max(z, 1)
    e = tl.exp(z - top[:, None])
    norm = tl.sum(e, 1)
    hit = cols[None, :] == label[:, None]
    total = 0.0
    if LOSS:
        logp = z - top[:, None] - tl.log(norm)[:, None]
        picked = tl.sum(tl.where(hit, logp, 0.0), 1) * (1.0 - SMOOTHING)
        if SMOOTHING > 0:
            spread = tl.sum(tl.where((cols < C)[None, :], logp, 0.0), 1)
            picked += spread * (SMOOTHING / C)
        total -= tl.sum(tl.where(alive, picked, 0.0))
    if GRAD:
        target = tl.where(hit, 1.0 - SMOOTHING, 0.0) + SMOOTHING / C
        grad = (e / norm[:, None] - target) / rows
        grad = tl.where(alive[:, None], grad, 0.0)
        EPILOGUE(grad, 0, m[:, None], cols[None, :], 0, 0, inside, args)
    return total


@triton.jit
def cross_entropy(
    logits, labels, live_ptr, rows_ptr, loss, work, args,
    M: tl.constexpr, C: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PROGRAMS: tl.constexpr,
    SMOOTHING: tl.constexpr, LOSS: tl.constexpr, GRAD: tl.constexpr, EPILOGUE: tl.constexpr,
    AT: tl.constexpr = None,
):  # fmt: skip
    """Mean over the first `live` rows of -sum_j t_j log softmax(z)_j, and (softmax(z) - t)/live."""
    live = tl.load(live_ptr).to(tl.float32)
    rows = live if rows_ptr is None else tl.load(rows_ptr).to(tl.float32)
    total = 0.0
    ROWS: tl.constexpr = (M + PROGRAMS * BM - 1) // (PROGRAMS * BM) * BM
    for start in range(0, ROWS, BM):
        m = program(0, AT) * ROWS + start + tl.arange(0, BM)
        total += cross_entropy_rows(
            logits, labels, live, rows, args, m, M, C, S0, S1, BN, SMOOTHING, LOSS, GRAD, EPILOGUE
        )
    if LOSS:
        _finish(total, rows, loss, work, PROGRAMS, AT)


@triton.jit
def multi_margin_rows(
    logits, labels, live, rows, args, m,
    M: tl.constexpr, C: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, BN: tl.constexpr,
    MARGIN: tl.constexpr, DIVISOR: tl.constexpr, LOSS: tl.constexpr, GRAD: tl.constexpr,
    EPILOGUE: tl.constexpr,
):  # fmt: skip
    """The sum of the losses of the live rows among m; their gradients go to EPILOGUE."""
    cols = tl.arange(0, BN)
    inside = (m < M)[:, None] & (cols < C)[None, :]
    alive = m < live
    z = tl.load(logits + m[:, None] * S0 + (cols * S1)[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    label = tl.load(labels + m, mask=m < M, other=0)
    hit = cols[None, :] == label[:, None]
    right = tl.sum(tl.where(hit, z, 0.0), 1)
    gap = z - right[:, None] + MARGIN
    # Not gap > 0: a NaN must reach the loss.
    other = inside & (cols[None, :] != label[:, None]) & alive[:, None] & ~(gap <= 0.0)
    total = 0.0
    if LOSS:
        total += tl.sum(tl.where(other, gap, 0.0)) / DIVISOR
    if GRAD:
        broken = tl.where(other, 1.0, 0.0)
        grad = tl.where(hit, -tl.sum(broken, 1)[:, None], broken) / (rows * DIVISOR)
        grad = tl.where(alive[:, None], grad, 0.0)
        EPILOGUE(grad, 0, m[:, None], cols[None, :], 0, 0, inside, args)
    return total


@triton.jit
def multi_margin(
    logits, labels, live_ptr, rows_ptr, loss, work, args,
    M: tl.constexpr, C: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PROGRAMS: tl.constexpr,
    MARGIN: tl.constexpr, DIVISOR: tl.constexpr, LOSS: tl.constexpr, GRAD: tl.constexpr,
    EPILOGUE: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """Mean over live rows of sum over j != y of max(0, z_j - z_y + MARGIN) / DIVISOR."""
    live = tl.load(live_ptr).to(tl.float32)
    rows = live if rows_ptr is None else tl.load(rows_ptr).to(tl.float32)
    total = 0.0
    ROWS: tl.constexpr = (M + PROGRAMS * BM - 1) // (PROGRAMS * BM) * BM
    for start in range(0, ROWS, BM):
        m = program(0, AT) * ROWS + start + tl.arange(0, BM)
        total += multi_margin_rows(
            logits, labels, live, rows, args, m, M, C, S0, S1, BN, MARGIN, DIVISOR, LOSS, GRAD,
            EPILOGUE,
        )  # fmt: skip
    if LOSS:
        _finish(total, rows, loss, work, PROGRAMS, AT)
