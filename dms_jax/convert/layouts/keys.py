"""The settings of DMS gates in other projects' JSON files: what was read, and by which rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dms_jax.config import DMSConfig
from dms_jax.json_files import is_number, shown

_DEFAULTS: dict[str, float] = {"scale": 100.0, "offset": 5.0}  # of both projects


@dataclasses.dataclass(frozen=True)
class Gates:
  """The gates of a directory and where they were found.

  Attributes:
    dms: the gates.
    layout: name of the layout.
    file: the file that describes them.
    assumed: the settings that no file states, each with the rule that gives it.
    cr: the compression ratio they were trained for; None if no file says it.
    base: the model they were trained on; None if no file says it.
  """

  dms: DMSConfig
  layout: str
  file: str
  assumed: tuple[str, ...] = ()
  cr: int | float | None = None
  base: str | None = None

  def report(self) -> dict[str, Any]:
    """What was read, as JSON values."""
    d = self.dms
    gates = {name: getattr(d, name) for name in ("gate", "window", "scale", "offset", "shift", "granularity")}
    found = {"layout": self.layout, "file": self.file, **gates, "cr": self.cr, "base": self.base}
    return {**{name: value for name, value in found.items() if value is not None}, "assumed": list(self.assumed)}


def read(
  values: Mapping[str, Any],
  source: str,
  names: Mapping[str, Sequence[str]],
  *,
  layout: str,
  file: str,
  gate: Literal["adapter", "neuron"],
  shift: int,
  shift_rule: str,
  window: int,
) -> Gates:
  """The gates that the keys of a file describe.

  Args:
    source: name of the checkpoint, for errors.
    names: the keys of "window", "scale", "offset", "shift" and "cr", the first that is there decides.
    shift: the shift of this layout, where no key states it.
    shift_rule: why.
    window: W where no key states it, as in the layout's own code.

  Raises:
    ValueError: a value cannot be read.
  """
  assumed = []

  def number(setting: str, default: int | float | None) -> Any:
    keys = names[setting]
    value = next((values[n] for n in keys if values.get(n) is not None), default)
    if value is None:
      return None
    if not is_number(value) or abs(value) > 1e9:
      raise ValueError(f"{source}: {keys[0]} should be a number, found {shown(value)}")
    if all(values.get(n) is None for n in keys):
      assumed.append(f"{setting} {value:g}: {shift_rule if setting == 'shift' else f'no {keys[0]}, the default there'}")
    return value

  found = {name: number(name, default) for name, default in {"window": window, "shift": shift, **_DEFAULTS}.items()}
  for name in ("window", "shift"):
    if found[name] != int(found[name]):
      raise ValueError(f"{source}: {names[name][0]}={found[name]} is not a whole number of tokens")
  if not found["scale"]:
    raise ValueError(f"{source}: {names['scale'][0]}=0: every gate would say the same")
  try:
    dms = DMSConfig(
      gate=gate,
      window=int(found["window"]),
      scale=float(found["scale"]),
      offset=float(found["offset"]),
      shift=int(found["shift"]),
      granularity=values.get("dms_alpha_per") or "head",
    )
  except ValueError as error:
    raise ValueError(f"{source}: {error}") from None
  return Gates(dms, layout, file, tuple(assumed), number("cr", None))
