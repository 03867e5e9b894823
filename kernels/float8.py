"""float8 (e4m3fn: sign, 4 bits of exponent worth 2^(e - 7), 3 of mantissa; no infinity) from and to its bits.

Triton has the type from sm_89 on, cannot convert it from or to float64, and on sm_89 rounds float32 to it by way of
float16, which rounds twice. These few integer operations are right everywhere.
"""

import triton
import triton.language as tl

LARGEST: tl.constexpr = tl.constexpr(448.0)
SMALLEST_NORMAL: tl.constexpr = tl.constexpr(2.0**-6)


@triton.jit
def encoded(x):
    """float32 -> uint8: to the nearest, ties to even; no larger than the largest; NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(tl.abs(x), LARGEST)
    bits = size.to(tl.uint32, bitcast=True)
    rounded = bits + 0x7FFFF + ((bits >> 20) & 1)  # a carry goes on into the exponent, as it should
    normal = (rounded >> 20) - ((127 - 7) << 3)
    # below, numbers are multiples of 2^-9: so are floats of 2^14, which rounds the sum
    subnormal = (size + 2.0**14).to(tl.uint32, bitcast=True) & 0xF
    found = tl.where(size < SMALLEST_NORMAL, subnormal, normal)
    return (tl.where(x == x, found, 0x7F) | sign).to(tl.uint8)


@triton.jit
def decoded(x):
    """uint8 -> float16, which holds every float8: the bits, moved, are 2^-8 of the number."""
    bits = x.to(tl.uint16)
    size = (bits & 0x7F) << 7
    moved = (size | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True)
    return tl.where(size == 0x3F80, float("nan"), moved * 256.0).to(tl.float16)
