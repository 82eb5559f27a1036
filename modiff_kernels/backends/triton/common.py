"""What the Triton kernels share: the rounding contract of `quant/affine.py` in device code, and the switch for tests
that run them in Triton's interpreter.
"""

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # set before this module is imported, see Triton's docs
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def rne(x):
    """Round half to even, for |x| <= 2^22: clamp first (to integers, which changes no code)."""
    if _INTERPRETED:  # it has no libdevice; compiled, the addition could fuse with a product before it
        return (x + 12582912.0) - 12582912.0
    else:
        return libdevice.rint(x)
