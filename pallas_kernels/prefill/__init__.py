"""Prefill: many queries against keys that each have a first and a last query position that sees them."""

from pallas_kernels.prefill.api import NEVER as NEVER
from pallas_kernels.prefill.api import prefill_attention as prefill_attention
