"""Conversion from GGUF files, Hugging Face directories and hub ids, and export to Hugging Face."""

from dms_jax.convert.api import convert as convert
from dms_jax.convert.layouts.transformers import export as export
