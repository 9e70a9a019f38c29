"""Retrofit: causal attention with a learned bias on keys that have left the window; differentiable."""

from pallas_kernels.window_bias.api import window_bias_attention as window_bias_attention
from pallas_kernels.window_bias.common import SAVED as SAVED
