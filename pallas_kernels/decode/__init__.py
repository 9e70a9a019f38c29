"""Decode: one query per row against the live prefix of each (row, KV head)."""

from pallas_kernels.decode.api import decode_attention as decode_attention
from pallas_kernels.decode.pages import Pages as Pages
from pallas_kernels.decode.put import put_slots as put_slots
