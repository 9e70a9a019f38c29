"""Prefill attention: many queries against keys, each visible from a first to a last query position."""

from pallas_kernels.prefill.api import prefill_attention as prefill_attention
from pallas_kernels.prefill.plan import NEVER as NEVER
