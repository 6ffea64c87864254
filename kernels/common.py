"""Casts, dots and index arithmetic that every template uses.

Triton's interpreter multiplies raw bf16 bits in `tl.dot` and truncates when it casts to bf16. Both
are mended here and nowhere else: operands go to fp32 before the dot, and `round_bf16` rounds with
integers, bit-equal to torch.
"""

import triton
import triton.language as tl

# How this copy of the modules was loaded; a mode never changes under a loaded copy.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
INT32_MAX = tl.constexpr(2**31 - 1)


@triton.jit
def round_bf16(x):
    """fp32 rounded to the nearest bf16, ties to even; still fp32. NaN becomes the quiet NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    odd = (bits >> 16) & 1
    kept = ((bits + 0x7FFF + odd) >> 16) << 16
    return tl.where(x != x, float("nan"), kept.to(tl.float32, bitcast=True))


@triton.jit
def round_tf32(x):
    """fp32 rounded to the nearest TF32 number, ties to even; still fp32. NaN stays NaN: its bits
    are left alone, because the sum could carry into the sign."""
    bits = x.to(tl.int32, bitcast=True)
    kept = (bits + 0xFFF + ((bits >> 13) & 1)) & -8192
    return tl.where(x == x, kept.to(tl.float32, bitcast=True), x)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """fp32 that went through DTYPE, "bf16" or "f32"."""
    if DTYPE == "bf16":
        if INTERPRET:
            value = round_bf16(value)
        else:
            value = value.to(tl.bfloat16).to(tl.float32)
    return value


@triton.jit
def cast_store(ptr, value, mask):
    """The one cast of a kernel: to the pointer's element type, at the store."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    if INTERPRET and dtype == tl.bfloat16:
        value = round_bf16(value.to(tl.float32))
    tl.store(ptr, value.to(dtype), mask=mask)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32. PRECISION: "ieee", "tf32" or "bf16" (operands rounded to bf16).

    In TF32 the tensor cores drop the low bits of an operand, and the interpreter multiplies what it
    is given: operands come rounded (ops/round_tf32.py), so that both compute the same.
    """
    if PRECISION == "bf16":
        if INTERPRET:
            if a.dtype != tl.bfloat16:
                a = round_bf16(a.to(tl.float32))
            if b.dtype != tl.bfloat16:
                b = round_bf16(b.to(tl.float32))
            acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc, input_precision="ieee")
    else:  # not after a return: what follows one is compiled all the same
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def maximum_nan(a, b):
    """max(a, b); a NaN in either wins, as in torch."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tanh(x):
    """tanh(x) = 1 - 2 / (exp(2x) + 1), by |x| so that exp does not overflow; odd by sign.

    For small |x| the difference cancels, so the series to x^7 takes over.
    """
    a = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    square = a * a
    small = a * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    y = tl.where(a < 0.15, small, large)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def below(i, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """i < SIZE for the numbers of a block; no comparison where blocks fill SIZE exactly."""
    if SIZE % BLOCK == 0:
        ok = tl.full(i.shape, True, tl.int1)
    else:
        ok = i < SIZE
    return ok


@triton.jit
def program(axis: tl.constexpr, AT: tl.constexpr):
    """The number of this program along an axis of its kernel's grid.

    AT: None in a launch of its own. In a group, where several kernels share one launch of one axis,
    (first, width, height): the number of the kernel's first program, and its grid's first two
    sizes. A kernel that takes AT can be a member of a group.
    """
    if AT is None:
        i = tl.program_id(axis)
    elif axis == 0:
        i = (tl.program_id(0) - AT[0]) % AT[1]
    elif axis == 1:
        i = (tl.program_id(0) - AT[0]) // AT[1] % AT[2]
    else:
        i = (tl.program_id(0) - AT[0]) // (AT[1] * AT[2])
    return i


@triton.jit
def elements(
    TOTAL: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, AT: tl.constexpr = None
):
    """Numbers of this program's BLOCK of elements out of TOTAL.

    int32, whose divisions are cheap, unless TOTAL or an operand of SPAN elements needs int64.
    """
    i = program(0, AT)
    if TOTAL + SPAN + BLOCK > INT32_MAX:
        i = i.to(tl.int64)
    return i * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def unflatten(i, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, NHWC: tl.constexpr):
    """Logical coordinates of the i-th element: row-major, or channels innermost."""
    if NHWC:
        i1 = i % D1
        rest = i // D1
        i3 = rest % D3
        rest = rest // D3
        return rest // D2, i1, rest % D2, i3
    i3 = i % D3
    rest = i // D3
    i2 = rest % D2
    rest = rest // D2
    return rest // D1, rest % D1, i2, i3


@triton.jit
def filter_position(q, CG: tl.constexpr, S: tl.constexpr, B: tl.constexpr = 1):
    """(channel, r, s) of the q-th element of a filter flattened as (r, s, channel).

    With space-to-depth by B, as (r // B, s // B, r % B, s % B, channel): then r and s may lie
    beyond the filter.
    """
    tap = q // (B * B * CG)
    sub = q // CG % (B * B)
    ACROSS: tl.constexpr = (S + B - 1) // B
    return q % CG, tap // ACROSS * B + sub // B, tap % ACROSS * B + sub % B


@triton.jit
def inside(start, STEP: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """(first, number) of the i below COUNT with 0 <= start + i STEP < SIZE."""
    if STEP > 0:
        first = tl.cdiv(tl.maximum(-start, 0), STEP)
        end = tl.cdiv(tl.maximum(SIZE - start, 0), STEP)
    else:
        first = tl.cdiv(tl.maximum(start - SIZE + 1, 0), -STEP)
        end = tl.cdiv(tl.maximum(start + 1, 0), -STEP)
    return first, tl.maximum(tl.minimum(end, COUNT) - first, 0)
