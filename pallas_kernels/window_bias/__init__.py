"""Causal attention with a learned bias on the keys outside a window; differentiable. Retrofits train through it."""

from pallas_kernels.window_bias.api import window_bias_attention as window_bias_attention
from pallas_kernels.window_bias.common import SAVED as SAVED
