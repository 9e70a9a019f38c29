"""Conversion from GGUF files, Hugging Face directories and hub ids, and export to Hugging Face."""

from dms_jax.convert.api import convert as convert
from dms_jax.convert.export import export as export
from dms_jax.convert.writing import About as About
