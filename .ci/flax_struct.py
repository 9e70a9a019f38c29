"""mypy plugin: `flax.struct.dataclass` gives a class its `replace`."""

from __future__ import annotations

from mypy.nodes import ARG_STAR2, Argument, Var
from mypy.plugin import ClassDefContext, Plugin
from mypy.plugins.common import add_method_to_class
from mypy.plugins.dataclasses import dataclass_tag_callback
from mypy.types import AnyType, TypeOfAny
from mypy.typevars import fill_typevars


def add_replace(context: ClassDefContext) -> None:
  """What mypy does for any `dataclass_transform`, and `def replace(self, **changes: Any) -> Self`."""
  dataclass_tag_callback(context)
  anything = AnyType(TypeOfAny.explicit)
  changes = Argument(Var("changes", anything), anything, None, ARG_STAR2)
  add_method_to_class(context.api, context.cls, "replace", [changes], fill_typevars(context.cls.info))


class FlaxStruct(Plugin):
  def get_class_decorator_hook(self, fullname: str):
    return add_replace if fullname == "flax.struct.dataclass" else None


def plugin(version: str) -> type[Plugin]:
  return FlaxStruct
