"""Conversations on disk.

    dms_jax.save_conversation("story", out)                            # only the live slots of every row
    ...
    past = dms_jax.load_conversation("story", model)                   # another process, another day
    more = dms_jax.generate(model, [" And then"], continue_from=past)

A folder holds cache.json and rows.npz. cache.json, the header, describes model, cache and policy. rows.npz holds the
arrays of each row's `HostRow`, with pages of one slot. bfloat16 and float8 are stored as their bits, so that every
machine reads the same values.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dms_jax import cache as caches
from dms_jax import disk, formats, policies
from dms_jax.cache import ShardedCache
from dms_jax.cache.base import storage_dtype
from dms_jax.cache.host import HostRow, check_fits, device_pages, restore_row
from dms_jax.decoder import Model
from dms_jax.generation.conversation import Continuation, Conversation, conversation_of, place_like
from dms_jax.json_files import is_number, read_json, shown
from dms_jax.model import check_policy
from dms_jax.npz import DAMAGE, Arrays
from dms_jax.policies import Policy
from dms_jax.processes import leads, together
from pallas_kernels.paged import FORMATS, format_of

HEADER, ROWS = "cache.json", "rows.npz"
# The arrays of a row, by their names in the file and in `HostRow`.
ARRAYS = ("kv", "evicted", "archived", "pages", "scales", "summaries")
# Version 0.1's names of caches that were renamed.
KINDS_0_1 = {"slots": "contiguous"}


def save_conversation(path: str | Path, past: Any) -> None:
  """Writes a conversation atomically; an older conversation at `path` is replaced.

  Over several processes each must call, and process 0 writes.

  Args:
    path: a folder.
    past: an `Output` of `generate`, a `Conversation`, a `Continuation` (an entry of `Result.stored`), or a sequence of
      continuations.

  Raises:
    ValueError: there is nothing to save, the rows are of different kinds, or `path` is not a conversation.
  """
  past = conversation_of(past)
  if isinstance(past, Conversation):
    count, row_of = past.batch, past.row
    kind, own = caches.kind_of(past.cache), caches.of_device(past.cache)
    slots, policy = past.cache.slots, past.policy
    devices = past.cache.mesh.size if isinstance(past.cache, ShardedCache) else 1
    pool = {"page": own.page_size, "pages": own.pages * devices} if kind == "paged" else {}
  else:
    rows = [past] if isinstance(past, Continuation) else list(past)
    if not rows or not all(isinstance(row, Continuation) for row in rows):
      raise ValueError("save_conversation: give an output of generate, a conversation, or finished rows of a Generator")
    if len({(row.cache.window, row.cache.masked, row.cache.pages.dtype, repr(row.policy)) for row in rows}) > 1:
      raise ValueError("save_conversation: rows of different policies, windows or page formats; save each on its own")
    count, row_of, policy, first = len(rows), rows.__getitem__, rows[0].policy, rows[0].cache
    kind = "masked" if first.masked else "paged"
    slots, pool = max(_slots(row.cache) for row in rows), {"page": first.page_size}
  if jax.process_count() > 1:
    rows = [row_of(index) for index in range(count)]  # before any can fail: all take part in gathering them
    row_of = rows.__getitem__
  with together():
    if leads():
      _write(Path(path), count, row_of, policy, {"cache": kind, "slots": slots, **pool})


def _write(path: Path, count: int, row_of: Callable[[int], Continuation], policy: Policy, about_cache: dict) -> None:
  """Writes `count` rows, one after another.

  Args:
    about_cache: fields of the header.
  """
  with disk.atomic_directory(path, replaces=is_cache) as folder:
    about, model = [], {}
    with zipfile.ZipFile(folder / ROWS, "w", zipfile.ZIP_STORED) as file:
      for index in range(count):
        one = row_of(index)
        model = _described(one.cache)
        about.append({"seen": int(one.cache.seen), "pending": one.pending, "generated": one.generated})
        for name, array in _live(one.cache).items():
          with file.open(f"{index}.{name}.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array(stream, array, allow_pickle=False)
    fields = [f for f in dataclasses.fields(policy) if f.metadata.get("flag", True)]  # tables are files of their own
    numbers = {f.name: getattr(policy, f.name) for f in fields}
    numbers = {name: None if value is None else np.asarray(value).tolist() for name, value in numbers.items()}
    header = {
      **formats.stamp("conversation"), **about_cache, **model,
      "policy": {"name": type(policy).__name__, "numbers": numbers}, "rows": about,
    }  # fmt: skip
    (folder / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def load_conversation(
  path: str | Path, model: Model, *, policy: Policy | None = None, cache: str | None = None, capacity: int | None = None
) -> Conversation:
  """Reads a conversation that `save_conversation` wrote, for `generate(continue_from=...)` or `Generator.submit`.

  Args:
    model: the model of the conversation; its shape, its dtype and the lag of its gates' decisions are checked.
    policy: the policy that continues it; default the policy that filled it.
    cache: "paged" or "contiguous"; default the saved kind.
    capacity: slots a head, as for `generate`; default as saved, or as many as the rows need.

  Raises:
    ValueError: no such folder, a damaged or foreign file, another model or policy, or too small a `capacity`.
  """
  header = _header(path)
  _check_sizes(path, header, model)
  kind, resolved = cache or header["cache"], _policy(path, header, model, policy)
  if kind not in caches.KINDS:
    raise ValueError(f"unknown cache {kind!r}; there are {sorted(caches.KINDS)}")
  config, lag = model.config, model.lag(resolved.window)
  dtype, archive = jnp.dtype(model.dtype).name, header["archive"]
  differences = [
    f"{name} is {shown(header[name])} there and {shown(ours)} here"
    for name, ours in (
      ("layers", config.num_layers),
      ("kv_heads", config.num_kv_heads),
      ("head_dim", config.head_dim),
      ("shift", lag),
      ("dtype", dtype),
    )
    if header[name] != ours
  ]
  if differences:
    raise ValueError(f"{path}: a cache of another model: {', '.join(differences)}")
  if (kind == "masked") != (header["cache"] == "masked") or (kind == "contiguous" and archive != dtype):
    saved = f"a {shown(header['cache'])} cache of {shown(archive)}"
    raise ValueError(f"{path}: cache={kind!r} cannot take what {saved} holds")
  memory = resolved.memory(config.num_heads // config.num_kv_heads, config.head_dim)
  rows, abouts = _read_rows(path, header, resolved.stats, memory), header["rows"]
  needed = max(_slots(row) for row in rows)
  options, longest = {}, max(header["slots"], needed)
  if kind == "paged":
    quantised = {form.dtype.name: name for name, form in FORMATS.items()}
    options = {"page_size": resolved.page or header.get("page"), "page_format": quantised.get(archive)}
  least = resolved.window + 2 if kind == "paged" else longest
  store = caches.for_model(
    model, resolved, batch=len(rows), capacity=capacity or least, kind=kind, longest=max(longest, capacity or 0),
    **options,
  )  # fmt: skip
  if kind == "paged" and capacity is None:
    devices = 1 if model.mesh is None else model.mesh.size
    pages = -(-header.get("pages", 0) // devices)
    store = store.with_pages(max(caches.of_device(store).pages, pages, device_pages(store, rows)))
  for index, row in enumerate(rows):
    advice = ""
    try:
      check_fits(store, row)
      if capacity is not None:  # after `check_fits` only the row's size can be refused
        advice = f"; give a larger capacity than {capacity}"
      store, enough = restore_row(store, index, row)
    except ValueError as error:
      raise ValueError(f"{path}: row {index}: {error}{advice}") from None
    if not enough:
      raise ValueError(f"{path}: row {index}: capacity={capacity} slots a head are too few pages; give a larger one")
  column = lambda name: jnp.asarray(np.array([about[name] for about in abouts], np.int32))
  pending, generated = place_like(model, (column("pending"), column("generated")))
  return Conversation(place_like(model, store), pending, generated, resolved)


def is_cache(path: str | Path) -> bool:
  """Whether a folder holds a conversation and nothing else, so that a new one may take its place."""
  try:
    return "rows" in read_json(Path(path) / HEADER) and {f.name for f in Path(path).iterdir()} <= {HEADER, ROWS}
  except ValueError:
    return False


# On disk --------------------------------------------------------------------------------------------------------------


def _slots(row: HostRow) -> int:
  """Slots that the fullest head needs."""
  return int(row.seen) if row.masked else row.window + 1 + int(row.archived.max(initial=0))


def _logical(dtype) -> str:
  """The name of an array's logical dtype; the array may store it as bits."""
  return "bfloat16" if dtype == jnp.uint16 else jnp.dtype(dtype).name


def _described(row: HostRow) -> dict[str, Any]:
  layers, heads, _, width = row.kv.shape
  return {
    "layers": layers, "kv_heads": heads, "head_dim": width // 2, "dtype": _logical(row.kv.dtype),
    "archive": _logical(row.pages.dtype), "window": row.window, "shift": row.lag, "policy_page": row.page,
  }  # fmt: skip


def _live(row: HostRow) -> dict[str, np.ndarray]:
  """The row's arrays as written: only live slots, and dtypes that numpy cannot name as their bits."""
  row, ring = row.repaged(1), int(min(row.seen, row.kv.shape[2]))
  row = row.replace(kv=row.kv[:, :, :ring], evicted=row.evicted[:, :, :ring])
  bits = lambda x: x.view(f"u{x.dtype.itemsize}") if x.dtype.kind == "V" else x
  arrays = {name: getattr(row, name) for name in ARRAYS} | {f"stats.{name}": x for name, x in row.stats.items()}
  arrays |= {f"memory.{name}": x for name, x in row.memory.items()}
  return {name: bits(np.ascontiguousarray(x)) for name, x in arrays.items() if x is not None}


def _header(path: str | Path) -> dict[str, Any]:
  """cache.json, checked."""
  if not Path(path).is_dir():
    raise ValueError(f"{path}: no such folder of a saved cache")
  file = Path(path) / HEADER
  header = read_json(file)
  formats.check("conversation", header, file)
  if header.get("cache") in list(KINDS_0_1):
    header["cache"] = KINDS_0_1[header["cache"]]
  kinds = {
    "format": int, "cache": str, "slots": int, "layers": int, "kv_heads": int, "head_dim": int, "dtype": str,
    "archive": str, "window": int, "shift": int, "policy_page": int, "policy": dict, "rows": list,
  }  # fmt: skip
  for name, kind in kinds.items():
    if not isinstance(header.get(name), kind) or (kind is int and not is_number(header[name], int)):
      raise ValueError(f"{file}: field {name!r} is missing or not {kind.__name__}; not a saved cache, or damaged")
  if not isinstance(header["policy"].get("name"), str) or not isinstance(header["policy"].get("numbers"), dict):
    raise ValueError(f"{file}: field 'policy' has no name and numbers; damaged")
  numbers = ("seen", "pending", "generated")
  for index, row in enumerate(header["rows"]):
    if not isinstance(row, dict) or not all(is_number(row.get(name), int) for name in numbers):
      raise ValueError(f"{file}: rows[{index}] must have whole numbers {', '.join(numbers)}; damaged")
  for name in ("page", "pages"):
    if name in header and not (is_number(header[name], int) and 0 < header[name] < 2**31):
      raise ValueError(f"{file}: field {name!r} must be a positive whole number; damaged")
  if header["cache"] not in caches.KINDS:
    raise ValueError(f"{file}: field 'cache' is {shown(header['cache'])}, not one of {sorted(caches.KINDS)}; damaged")
  if not header["rows"]:
    raise ValueError(f"{file}: field 'rows' is empty; damaged")
  return header


def _check_sizes(path: str | Path, header: dict, model: Model) -> None:
  """Raises ValueError where a count of the header is more than the model can hold: nothing is allocated before."""
  file, rows = Path(path) / HEADER, header["rows"]
  longest = 4 * model.config.max_position_embeddings + 4096  # a cache may be larger than the text, if not many times
  for name in ("slots", "window", "page", "policy_page", "layers", "kv_heads", "head_dim"):
    if not 0 <= header.get(name, 0) <= min(longest, 2**31 - 1):
      raise ValueError(f"{file}: field {name!r} is {shown(header[name])}, not 0 to {longest}; damaged")
  heads = header["layers"] * header["kv_heads"] * len(rows)
  if header.get("pages", 0) > heads * longest:
    raise ValueError(f"{file}: field 'pages' is {shown(header['pages'])}, for {heads} heads; damaged")
  for index, row in enumerate(rows):
    limits = {"seen": (0, longest), "generated": (0, 2**31 - 1), "pending": (-1, model.config.vocab_size - 1)}
    for name, (least, limit) in limits.items():
      if not least <= row[name] <= limit:
        raise ValueError(f"{file}: rows[{index}]: {name} is {shown(row[name])}, not {least} to {limit}; damaged")


def _policy(path, header, model: Model, given: Policy | None) -> Policy:
  """The policy that continues a conversation; it must be compatible with the policy that filled the cache."""
  name, numbers = header["policy"]["name"], header["policy"]["numbers"]
  try:
    rows = {name: np.asarray(value) for name, value in numbers.items() if isinstance(value, list)}
    held = policies.get(name)(**{**numbers, **rows})
    resolved = check_policy(model, held if given is None else given)
  except (ValueError, TypeError, OverflowError) as error:
    raise ValueError(f"{path}: policy: {' '.join(str(error).split())}") from None
  if resolved.window != header["window"]:
    raise ValueError(f"{path}: policy window is {header['window']} there and {resolved.window} here")
  if not resolved.continues(held):
    raise ValueError(
      f"{path}: policy is {name} there and {type(resolved).__name__} here; their caches hold other tokens"
    )
  if header["cache"] != "masked" and resolved.page != header["policy_page"]:
    raise ValueError(f"{path}: policy page is {header['policy_page']} there and {resolved.page} here")
  return resolved


def _read_rows(path: str | Path, header: dict, stats: tuple[str, ...], memory: dict) -> list[HostRow]:
  """The rows of a file, every array checked against cache.json; `memory`: `Policy.memory`'s axes."""
  file, rows = Path(path) / ROWS, []
  lead, width = (header["layers"], header["kv_heads"]), 2 * header["head_dim"]
  own, cells = (_dtype(path, header, name) for name in ("dtype", "archive"))
  masked, page = header["cache"] == "masked", header["policy_page"]
  try:
    with zipfile.ZipFile(file) as archive:
      arrays = Arrays(archive, file)
      for index, about in enumerate(header["rows"]):
        parts = {name: arrays[key] if (key := f"{index}.{name}") in arrays else None for name in ARRAYS}
        ring = about["seen"] if masked else min(about["seen"], header["window"] + 1)
        archived = parts["archived"]
        if archived is None or archived.shape != lead or archived.dtype != np.int32 or (archived < 0).any():
          raise ValueError(f"array '{index}.archived' must be int32 {lead}")
        held = int(archived.sum())
        most = header["window"] + 1 + int(archived.max(initial=0))
        expected = {
          "kv": ((*lead, ring, width), own),
          "evicted": ((*lead, ring), np.dtype(bool)),
          "pages": ((held, 1, format_of(cells).width(width // 2)), cells),
          "scales": ((held, 1, 2), np.dtype(np.float32)) if format_of(cells).scaled else None,
          "summaries": ((*lead, None, width), own) if page else None,
        }
        for name, want in expected.items():
          parts[name] = _checked(f"array '{index}.{name}'", parts[name], want)
        if not masked and most - header["window"] - 1 > about["seen"]:
          raise ValueError(f"array '{index}.archived' counts more than the {about['seen']} tokens seen")
        parts["stats"] = _read_stats(arrays, index, stats, lead, 0 if masked else most, about["seen"], header["window"])
        parts["memory"] = {}
        for name, axes in memory.items():
          array = arrays[key] if (key := f"{index}.memory.{name}") in arrays else None
          parts["memory"][name] = _checked(f"array '{key}'", array, ((*lead, *axes), np.dtype(np.float32)))
        for name in ("kv", "evicted"):  # restore the ring's free slots, which are not in the file
          widths = [(0, 0)] * parts[name].ndim
          widths[2] = (0, 0 if masked else header["window"] + 1 - ring)
          parts[name] = np.pad(parts[name], widths)
        rows.append(
          HostRow(
            **parts,
            seen=np.int32(about["seen"]),
            window=header["window"],
            lag=header["shift"],
            page=page,
            masked=masked,
          )
        )
  except FileNotFoundError:
    raise ValueError(f"{file}: no such file") from None
  except DAMAGE as error:
    raise ValueError(f"{file}: damaged or cut short ({' '.join(str(error).split())[:100]}); save it again") from None
  except ValueError as error:
    raise ValueError(f"{file}: {error}; not what {HEADER} means, or damaged") from None
  return rows


def _read_stats(
  arrays, index: int, names: tuple[str, ...], lead: tuple[int, int], least: int, seen: int, window: int
) -> dict[str, np.ndarray]:
  """The statistics `names` of row `index`, float32 [L, K, S], where S is at least `least`; 0 for a masked cache."""
  stats = {}
  for name in names:
    key = f"{index}.stats.{name}"
    if name == "score" and key not in arrays:
      key = f"{index}.scores"  # version 0.1
    if name == "position" and key not in arrays and "score" in stats:  # version 0.1
      stats[name] = _positions(stats["score"].shape, seen, window if least else seen)
      continue
    stats[name] = _checked(
      f"array '{key}'", arrays[key] if key in arrays else None, ((*lead, None), np.dtype(np.float32))
    )
    if stats[name].shape[2] < least:
      raise ValueError(f"array '{key}' has {stats[name].shape[2]} slots of {least}")
  return stats


def _positions(shape: tuple[int, int, int], seen: int, window: int) -> np.ndarray:
  """Positions of the tokens in the slots of a row, float32 [L, K, S]; archived ones count as in the order of slots."""
  slots, ring = np.arange(shape[2]), window + 1
  in_ring = seen - 1 - (seen - 1 - slots) % ring
  return np.broadcast_to(np.where(slots < ring, in_ring, slots - ring), shape).astype(np.float32)


def _dtype(path, header, name: str) -> np.dtype:
  """The dtype in which a cache stores the header's `dtype` or `archive`."""
  try:
    return storage_dtype(jnp.dtype(header[name]))
  except TypeError:
    raise ValueError(f"{Path(path) / HEADER}: {name}={header[name]!r} is no type of numbers; damaged") from None


def _checked(what: str, array: np.ndarray | None, want: tuple | None) -> np.ndarray | None:
  """`array` in the wanted dtype, viewed from its bits if needed; None in a shape means any size."""
  if (array is None) != (want is None):
    raise ValueError(f"{what} is {'missing' if array is None else 'one too many'}")
  if want is None:
    return None
  shape, dtype = want
  fits = array.ndim == len(shape) and all(b is None or a == b for a, b in zip(array.shape, shape, strict=True))
  if not fits:
    raise ValueError(f"{what} has shape {array.shape}, expected {shape}")
  if array.dtype != dtype:
    if array.dtype.kind != "u" or array.dtype.itemsize != dtype.itemsize or dtype.kind == "f":
      raise ValueError(f"{what} holds {array.dtype}, expected {dtype}")
    array = array.view(dtype)
  return array
