"""Modules that are imported when first used, such as Mosaic, which takes long."""

from __future__ import annotations

import importlib
from typing import Any


class Later:
  """Stands for a module; its attributes are those of the module.

  Args:
    name: the module's full name.
  """

  def __init__(self, name: str):
    self._name = name

  def __getattr__(self, name: str) -> Any:
    return getattr(importlib.import_module(self._name), name)
