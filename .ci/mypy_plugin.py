"""mypy plugin: `flax.struct.dataclass` adds `replace`, and the protocol `Cache` may be any kind."""

from __future__ import annotations

from collections.abc import Callable

from mypy.nodes import ARG_STAR2, Argument, Var
from mypy.plugin import AnalyzeTypeContext, ClassDefContext, Plugin
from mypy.plugins.common import add_method_to_class
from mypy.plugins.dataclasses import dataclass_tag_callback
from mypy.types import AnyType, Type, TypeOfAny
from mypy.typevars import fill_typevars


def add_replace(context: ClassDefContext) -> None:
  """mypy's own treatment of a `dataclass_transform`, and `def replace(self, **changes: Any) -> Self`."""
  dataclass_tag_callback(context)
  anything = AnyType(TypeOfAny.explicit)
  changes = Argument(Var("changes", anything), anything, None, ARG_STAR2)
  add_method_to_class(context.api, context.cls, "replace", [changes], fill_typevars(context.cls.info))


def as_any(context: AnalyzeTypeContext) -> Type:
  return AnyType(TypeOfAny.explicit)


class JaxPlugin(Plugin):
  def get_class_decorator_hook(self, fullname: str) -> Callable[[ClassDefContext], None] | None:
    return add_replace if fullname == "flax.struct.dataclass" else None

  def get_type_analyze_hook(self, fullname: str) -> Callable[[AnalyzeTypeContext], Type] | None:
    """Code that is declared to take a `Cache` and works on one kind reads that kind's own fields."""
    return as_any if fullname == "dms_jax.cache.base.Cache" else None


def plugin(version: str) -> type[Plugin]:
  return JaxPlugin
