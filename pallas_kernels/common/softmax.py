"""Constants of the kernels' online softmax. All kernels keep scores in units of log 2: exp2 is what hardware has."""

from __future__ import annotations

import math

LOG2E = math.log2(math.e)
# A finite stand-in for -inf as the maximum of no scores: exp2(-inf - LOWEST) is 0, not NaN.
LOWEST = -1e30
