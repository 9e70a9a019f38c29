"""Conversion from GGUF files, directories of PyTorch layouts and hub ids; export to those layouts."""

from dms_jax.convert.api import convert as convert
from dms_jax.convert.export import export as export
from dms_jax.convert.writing import About as About
