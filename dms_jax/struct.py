"""Frozen dataclasses that are JAX pytrees, with static fields."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import jax


def field(*, pytree_node: bool = True, metadata: dict[str, Any] | None = None, **settings: Any) -> Any:
  """`dataclasses.field`; with `pytree_node=False` its value is static: part of the tree's structure, not a leaf."""
  return dataclasses.field(metadata={**(metadata or {}), "pytree_node": pytree_node}, **settings)


@typing.dataclass_transform(field_specifiers=(field,), frozen_default=True)
def dataclass(cls: type) -> Any:
  """Class decorator: a frozen dataclass and pytree whose `replace` gives a copy with other values of some fields."""
  made: Any = dataclasses.dataclass(frozen=True)(cls)
  parts: dict[bool, list[str]] = {True: [], False: []}
  for each in dataclasses.fields(made):
    parts[each.metadata.get("pytree_node", True)].append(each.name)
  made.replace = dataclasses.replace
  jax.tree_util.register_dataclass(made, parts[True], parts[False])
  return made
