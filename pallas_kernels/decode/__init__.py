"""Decode attention: one query per row against the live slots of each (row, KV head)."""

from pallas_kernels.decode.api import decode_attention as decode_attention
from pallas_kernels.paged.pages import Pages as Pages
