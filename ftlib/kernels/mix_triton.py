"""A hash of 32-bit words for Triton kernels whose noise depends on where a number stands."""

import triton
import triton.language as tl


@triton.jit
def mix(x):  # noqa: ANN001, ANN201
    """A bijection of 32-bit words that scrambles them well: as `ftlib.kernels.draw` and `ftlib.optim.rounding`."""
    x = x.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
