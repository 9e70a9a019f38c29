"""Weights in and out: GGUF files, Hugging Face directories and hub ids in; Hugging Face directories out."""

from dms_jax.convert.api import convert as convert
from dms_jax.convert.layouts.transformers import export as export
