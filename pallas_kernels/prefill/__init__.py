"""Prefill: many queries against keys that each have a first and a last query position that sees them."""

from pallas_kernels.prefill.api import prefill_attention as prefill_attention
from pallas_kernels.prefill.plan import NEVER as NEVER
