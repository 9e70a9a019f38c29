"""Checkpoints on disk: DIR/{config.json, params/ (Orbax), tokenizer.json, tokenizer_config.json}.

A checkpoint holds some of three groups of parameters: "base", "gate" (eviction gates) and "lora" (low-rank updates). A
checkpoint without the base is a *retrofit*: small, and loaded on top of its base model. config.json also states the
schema and the version that wrote it (`formats`), what the gates' numbers mean (`gates.convention`), and every parameter
file with its size and checksum, so damage is detected before any parameter is read.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from dms_jax import disk, formats, shipped
from dms_jax.config import DMSConfig, LoRAConfig, ModelConfig
from dms_jax.decoder import Model
from dms_jax.gates import convention
from dms_jax.json_files import from_json, is_number, read_json, shown, to_json
from dms_jax.params import GROUPS, Params, ParamSpec, flatten, join_params, param_table, split_params, unflatten
from dms_jax.sharding import ShardingRules, param_shardings
from dms_jax.slices import Slice, dtype_of
from dms_jax.slices import read as read_slices
from dms_jax.slices import write as write_slices
from dms_jax.tokenizer import Tokenizer

CONFIG = "config.json"
PARAMS = "params"
CARD = ("README.md", "log.jsonl", "log.png")  # experiments.train_reasoner adds them


def save(
  path: str | Path,
  model: Model,
  tokenizer: Tokenizer | None = None,
  *,
  groups: Sequence[str] = GROUPS,
  metadata: dict[str, Any] | None = None,
) -> None:
  """Writes a checkpoint atomically; an older checkpoint at `path` is replaced.

  With several processes, every process must call this; each writes its shards to a shared file system.

  Args:
    groups: the groups to write; ("gate", "lora") writes a retrofit. Groups that the model lacks are skipped.
    metadata: JSON values to store in config.json.

  Raises:
    ValueError: a group is unknown, the layers are a list, `path` holds something other than a checkpoint, or the gates
      alone would go without low-rank updates that were merged.
  """
  if unknown := sorted(set(groups) - set(GROUPS)):
    raise ValueError(f"groups={unknown} unknown; there are {GROUPS}")
  if model.holds_updates and "base" not in groups:
    raise ValueError(
      f"groups={list(groups)}: this model's low-rank updates were merged into its base, without which its gates are no "
      "retrofit; save it whole, or keep the updates apart: merge=False of load and Model.at"
    )
  if isinstance(model.params["layers"], list):
    raise ValueError("this model's layers are a list (Model.unstacked); save model.stacked()")
  table = param_table(model.config, model.dms, model.lora)
  held = flatten(model.params)
  if set(held) != set(table):
    raise ValueError(f"the parameters do not fit the configs: {_difference(set(held), set(table))}")
  present = {"base": True, "gate": model.dms is not None, "lora": model.lora is not None and model.lora.rank > 0}
  groups = [g for g in GROUPS if g in groups and present[g]]
  flat = {name: held[name] for name, spec in table.items() if spec.group in groups}
  dtypes = sorted({str(value.dtype) for value in flat.values()})
  with _directory_of_all(path) as directory:
    if flat:
      context = ocp.Context()
      # A whole model is not compressed: that would halve its size, but take ten times longer.
      context.array.saving.use_compression = "base" not in groups
      with context, disk.plain_name(directory) as plain, disk.clear_full_disk(path):
        ocp.save(plain / PARAMS, unflatten(flat))
    if jax.process_index() == 0:
      _describe(directory, model.config, model.dms, model.lora, groups, dtypes, tokenizer, metadata)


def save_slices(
  path: str | Path,
  slices: Iterable[Slice],
  config: ModelConfig,
  dms: DMSConfig | None,
  dtype: Any,
  tokenizer: Tokenizer | None = None,
  *,
  metadata: dict[str, Any] | None = None,
) -> None:
  """Writes a checkpoint of a base, and gates if `dms` is given, as its slices come; otherwise as `save`.

  Memory: `slices.write`. One process writes.

  Args:
    slices: every slice of the parameters once, in any order, of `slices.dtype_of(spec, dtype)`.

  Raises:
    ValueError: `path` holds something other than a checkpoint.
  """
  dtype, table = jnp.dtype(dtype), param_table(config, dms)
  groups = [g for g in GROUPS if g == "base" or (g == "gate" and dms is not None)]
  with disk.atomic_directory(path, is_replaceable) as directory:
    with disk.plain_name(directory) as plain, disk.clear_full_disk(path):
      write_slices(plain / PARAMS, table, dtype, slices)
    dtypes = sorted({dtype_of(spec, dtype).name for spec in table.values()})
    _describe(directory, config, dms, None, groups, dtypes, tokenizer, metadata)


def _describe(
  directory: Path, config: ModelConfig, dms: DMSConfig | None, lora: LoRAConfig | None, groups: Sequence[str],
  dtypes: list[str], tokenizer: Tokenizer | None, metadata: dict[str, Any] | None,
) -> None:  # fmt: skip
  """Writes what a checkpoint in `directory` holds beside its parameters: config.json and the tokenizer."""
  # Orbax writes the name of the folder, which is temporary, into these files.
  for note in (directory / PARAMS).glob("commit_success*.txt"):
    note.write_text("saved\n")
  if tokenizer is not None:
    tokenizer.save(directory)
  values = {
    **formats.stamp("checkpoint"),
    "model": to_json(config),
    "dms": to_json(dms) if "gate" in groups else None,
    "gates": convention(dms) if "gate" in groups else None,
    "lora": to_json(lora) if "lora" in groups else None,
    "groups": groups,
    "dtype": dtypes[0] if len(dtypes) == 1 else dtypes,
    "metadata": metadata or {},
    "files": {name: list(entry) for name, entry in _fingerprints(directory / PARAMS).items()},
  }
  (directory / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load(
  path: str | Path | Stored, *, retrofit: str | Path | None = None, merge: bool = True, dtype: Any = None,
  mesh: Mesh | None = None, rules: Callable[[ModelConfig, Mesh], ShardingRules] | None = None, stored: bool = False,
) -> Model:  # fmt: skip
  """Loads a model, and optionally a retrofit on top of it.

  Args:
    path: a checkpoint with a base, or what `Stored.of` read of it.
    retrofit: a checkpoint of gates and low-rank updates for this model; its gates replace the model's own.
    merge: fold low-rank updates into the weights (in float32, rounded once); otherwise they stay separate, as do those
      that depend on each row's CR (`LoRAConfig.by_cr`).
    dtype: dtype of the weights; default as stored. Gates and separate updates keep the stored dtype.
    mesh: each of its devices reads only its shards (`sharding.param_shardings`), and every process must call this.
      Without a mesh this process's first device gets all parameters.
    rules: how the mesh splits parameters, such as `sharding.decoding`; default as in training.
    stored: the base's parameters stay on disk (`params.StoredParam`), to be read layer by layer by an export. Files of
      the checkpoint are checked now, and must stay.

  Raises:
    ValueError: a file is missing, cut short or damaged, or the retrofit belongs to another model.
  """
  if retrofit is not None and not shipped.find(retrofit).exists():
    raise ValueError(f"retrofit={retrofit}: no such checkpoint directory; shipped are {', '.join(shipped.names())}")
  added = None if retrofit is None else Stored.of(retrofit)
  return _load(path if isinstance(path, Stored) else Stored.of(path), added, merge, dtype, mesh, rules, stored)


class Stored(NamedTuple):
  """A checkpoint's folder, as it was given or found among those shipped, and what `read_config` found there."""

  path: Path
  values: dict
  config: ModelConfig
  dms: DMSConfig | None
  lora: LoRAConfig | None

  @classmethod
  def of(cls, path: str | Path) -> Stored:
    """Of a folder, or of the name of a retrofit that is shipped; a ValueError as of `read_config`."""
    return cls(shipped.find(path), *read_config(path))

  @property
  def whole(self) -> bool:
    """Whether it holds a base."""
    return "base" in self.values["groups"]


def _load(
  base: Stored, retrofit: Stored | None, merge: bool = True, dtype: Any = None, mesh: Mesh | None = None,
  rules: Callable[[ModelConfig, Mesh], ShardingRules] | None = None, stored: bool = False,
) -> Model:  # fmt: skip
  """`load`, of checkpoints whose config.json was read."""
  path, values, config, dms, lora = base
  if not base.whole:
    raise ValueError(f"{path}: a retrofit (it holds {values['groups']}); load its base model with retrofit={path}")
  if retrofit is not None:
    if retrofit.whole:
      raise ValueError(f"{retrofit.path}: a whole model, not a retrofit; load it by itself, without {path}")
    _check_shape(base, retrofit)
  apart = lora is None or (lora.by_cr and retrofit is None) or not (merge or retrofit is not None)
  # Weights to be merged are read in the stored dtype, so that they are rounded only once.
  early = dtype if apart and retrofit is None else None
  if not (rules is None or callable(rules)):
    raise ValueError(f"rules={rules!r:.80} must be a function of the model's config and the mesh, as sharding.decoding")
  split = None if mesh is None or rules is None else rules(config, mesh)
  params = _read_params(path, values, param_table(config, dms, lora), early, mesh, split, stored)
  model = Model(params, config, dms, lora)
  if not apart:
    model = model.merged().replace(holds_updates=False)  # they are this base's own
  if retrofit is not None:
    model = _apply_retrofit(model, retrofit, mesh, split)
    if merge and model.lora is not None and not model.lora.by_cr:
      model = model.merged()
  return model if dtype is None else _cast_base(model, jnp.dtype(dtype))


def load_retrofitted(path: str | Path, retrofit: str | Path, **how: Any) -> Model:
  """The retrofitted model: `retrofit` on top of the base at `path`.

  A `retrofit` that is a whole model (`SavingConfig.export`) is loaded alone, if it has the shape of the base.

  Args:
    how: `dtype`, `mesh` and `rules` of `load`.

  Raises:
    ValueError: as `load`.
  """
  base, added = Stored.of(path), Stored.of(retrofit)
  if added.whole:
    _check_shape(base, added, may_differ=(*MAY_DIFFER, "rope_scaling"))
    return _load(added, None, **how)
  return _load(base, added, **how)


# Fields in which fine-tuned versions of a base may differ from it.
MAY_DIFFER = ("eos_token_ids", "max_position_embeddings")


def _check_shape(base: Stored, retrofit: Stored, may_differ: Sequence[str] = MAY_DIFFER) -> None:
  """Raises ValueError if the model that was retrofitted has not the shape of the base."""
  ours, theirs = (to_json(stored.config) for stored in (base, retrofit))
  if differ := [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k) and k not in may_differ]:
    there, here = retrofit.config, base.config
    found = ", ".join(f"{k} is {getattr(there, k)} there and {getattr(here, k)} here" for k in differ)
    raise ValueError(f"{retrofit.path}: a retrofit of another model than {base.path}: {found}")


def _apply_retrofit(model: Model, retrofit: Stored, mesh: Mesh | None, rules: ShardingRules | None) -> Model:
  path, values, config, dms, lora = retrofit
  table = {n: s for n, s in param_table(config, dms, lora).items() if s.group in ("gate", "lora")}
  added = _read_params(path, values, table, mesh=mesh, rules=rules) if table else {}
  own = param_table(model.config)
  kept, _ = split_params(model.params, own.__contains__)
  return Model(join_params(kept, added), model.config, dms, lora)


def _cast_base(model: Model, dtype: jnp.dtype) -> Model:
  table = param_table(model.config, model.dms, model.lora)
  cast = lambda name, value: value.astype(dtype) if table[name].group == "base" else value
  return model.replace(params=unflatten({name: cast(name, value) for name, value in flatten(model.params).items()}))


def read_config(path: str | Path) -> tuple[dict, ModelConfig, DMSConfig | None, LoRAConfig | None]:
  """(all values, ModelConfig, DMSConfig, LoRAConfig) of a checkpoint's config.json.

  Args:
    path: a folder, or the name of a retrofit that is shipped.

  Raises:
    ValueError: there is no checkpoint, its format is newer, or a file is damaged.
  """
  path = shipped.find(path)
  file = path / CONFIG
  if not path.is_dir():
    raise ValueError(f"{path}: no such checkpoint directory")
  values = read_json(file)
  if "format" not in values:
    theirs = "a Hugging Face directory; run experiments.convert_weights on it"
    raise ValueError(f"{file}: not a dms_jax checkpoint but {theirs if 'model_type' in values else 'something else'}")
  schema = formats.check("checkpoint", values, file)
  if missing := [k for k in ("model", "dms", "lora", "groups", "files") if k not in values]:
    raise ValueError(f"{file}: field(s) {missing} missing; the file is damaged")
  if not (isinstance(values["groups"], list) and all(group in GROUPS for group in values["groups"])):
    raise ValueError(f"{file}: field 'groups' should be a list of {', '.join(GROUPS)}; the file is damaged")
  files = values["files"]
  if not isinstance(values.setdefault("metadata", {}), dict):
    raise ValueError(f"{file}: field 'metadata' should be an object, found {shown(values['metadata'])}")
  if not isinstance(files, dict) or not all(_is_entry(name, entry) for name, entry in files.items()):
    raise ValueError(f"{file}: field 'files' should hold a size and a checksum for each file; the file is damaged")
  configs = []
  for name, cls in (("model", ModelConfig), ("dms", DMSConfig), ("lora", LoRAConfig)):
    given = values[name]
    if not isinstance(given, dict) and not (given is None and name != "model"):
      raise ValueError(f"{file}: field {name!r} should be an object, found {shown(given)}")
    configs.append(None if given is None else from_json(cls, given, f"{file}: {name}"))
  if schema > 1 and configs[1] is not None:
    _check_convention(file, values.get("gates"), convention(configs[1]))
  try:
    param_table(*configs)
  except ValueError as error:  # such as updates of a projection that the model does not have
    raise ValueError(f"{file}: {error}") from None
  return values, *configs


def _check_convention(file: Path, theirs: Any, ours: dict[str, str]) -> None:
  """Raises ValueError where a checkpoint's gates do not mean what this version's do."""
  theirs = theirs if isinstance(theirs, dict) else {}
  names = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
  differ = [f"{name} is {shown(theirs.get(name))} there and {shown(ours.get(name))} here" for name in names]
  if names:
    raise ValueError(f"{file}: gates of another convention: {'; '.join(differ)}; use the dms_jax that wrote it")


def _is_entry(name: str, entry: Any) -> bool:
  """Whether an entry of "files" is the path of a file in `params` and its [bytes, CRC-32]."""
  inside = not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name
  return inside and isinstance(entry, list) and len(entry) == 2 and all(is_number(n, int) for n in entry)


def fingerprint(path: str | Path) -> str:
  """CRC-32 of a checkpoint's config.json. It identifies the content, because the file lists every parameter's checksum.

  Raises:
    ValueError: as `read_config`.
  """
  read_config(path)
  return f"{zlib.crc32((shipped.find(path) / CONFIG).read_bytes()):08x}"


def is_checkpoint(path: str | Path) -> bool:
  """Whether a directory holds a checkpoint of any format."""
  try:
    return "format" in read_json(Path(path) / CONFIG)
  except ValueError:
    return False


def is_damaged(path: str | Path) -> bool:
  """Whether a checkpoint's config.json cannot be read, or a parameter file is missing or of another size."""
  try:
    files = read_config(path)[0]["files"]
  except ValueError:
    return True
  there = {name: Path(path) / PARAMS / name for name in files}
  return any(not file.is_file() or file.stat().st_size != files[name][0] for name, file in there.items())


def is_replaceable(path: Path) -> bool:
  """Whether a folder holds a checkpoint and nothing else, so that a new one may take its place."""
  if not is_checkpoint(path):
    return False
  names = {CONFIG, PARAMS, *CARD, "tokenizer.json", "tokenizer_config.json"}
  files = read_json(path / CONFIG).get("files")
  listed = set(files) if isinstance(files, dict) else set()
  found = {p.relative_to(path / PARAMS).as_posix() for p in (path / PARAMS).rglob("*") if not p.is_dir()}
  return {p.name for p in path.iterdir()} <= names and found <= listed


@contextlib.contextmanager
def _directory_of_all(path: str | Path) -> Iterator[Path]:
  """The `disk.atomic_directory` of process 0, yielded on every process."""
  if jax.process_count() == 1:
    with disk.atomic_directory(path, is_replaceable) as directory:
      yield directory
    return
  with contextlib.ExitStack() as stack:
    name, failure = b"", None
    try:
      if jax.process_index() == 0:
        name = os.fsencode(stack.enter_context(disk.atomic_directory(path, is_replaceable)))
    except Exception as error:  # tell the other processes before raising it
      failure = error
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(name.ljust(4096, b"\0"), np.uint8))
    if failure is not None:
      raise failure
    if not (name := bytes(np.asarray(told, np.uint8)).rstrip(b"\0")):
      raise OSError(f"{path}: process 0 could not make the folder; its own message says why")
    yield Path(os.fsdecode(name))


def _read_params(
  path: Path, values: dict, table: dict[str, ParamSpec], dtype: Any = None, mesh: Mesh | None = None,
  rules: ShardingRules | None = None, stored: bool = False,
) -> Params:  # fmt: skip
  """Reads and checks the tensors of `table`. `dtype` applies to the base; other groups keep the stored dtype."""
  directory = (path / PARAMS).absolute()  # Orbax refuses relative paths
  _check_files(path, values["files"])
  with disk.plain_name(directory) as plain, _clear_errors(directory):
    found = flatten(ocp.metadata(plain).metadata)
  problems = [_difference(set(found), set(table))] if set(found) != set(table) else []
  problems += [
    f"{name} has shape {tuple(found[name].shape)}, the config means {spec.shape}"
    for name, spec in table.items()
    if name in found and tuple(found[name].shape) != spec.shape
  ]
  if problems:
    raise ValueError(f"{path}: parameters and config.json do not fit: {'; '.join(problems)}")
  if stored:
    with _clear_errors(directory):
      kept = read_slices(directory, table)
    in_dtype = lambda value: value if dtype is None else value.astype(jnp.dtype(dtype))
    place = lambda name, value: in_dtype(value) if table[name].group == "base" else jnp.asarray(value)
    return unflatten({name: place(name, value) for name, value in kept.items()})
  alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shardings = dict.fromkeys(table, alone) if mesh is None else flatten(param_shardings(mesh, table, rules))

  def abstract(name: str, spec: ParamSpec) -> jax.ShapeDtypeStruct:
    kind = found[name].dtype if dtype is None or spec.group != "base" else jnp.dtype(dtype)
    return jax.ShapeDtypeStruct(spec.shape, kind, sharding=shardings[name])

  with disk.plain_name(directory) as plain, _clear_errors(directory):
    return ocp.load(plain, unflatten({name: abstract(name, spec) for name, spec in table.items()}))


def nbytes(table: dict[str, ParamSpec], dtype: Any) -> int:
  """Bytes of the parameters of a table in one dtype."""
  return sum(math.prod(spec.shape) for spec in table.values()) * jnp.dtype(dtype).itemsize


@contextlib.contextmanager
def _clear_errors(directory: Path) -> Iterator[None]:
  """Turns Orbax's errors into one line that says what to do."""
  try:
    yield
  except Exception as error:
    raise ValueError(f"{directory}: Orbax cannot read it ({first_line(error)}); save or convert it again") from None


def _difference(found: set[str], wanted: set[str]) -> str:
  parts = ("missing", wanted - found), ("unexpected", found - wanted)
  return ", ".join(f"{word} {sorted(names)}" for word, names in parts if names)


def _fingerprints(directory: Path) -> dict[str, tuple[int, int]]:
  """{relative path: (bytes, CRC-32)} of every file in `directory`; read in parallel, about 1 GB/s a core."""
  files = sorted(p for p in directory.rglob("*") if p.is_file())

  def fingerprint(file: Path) -> tuple[int, int]:
    return file.stat().st_size, crc32(file)

  names = [p.relative_to(directory).as_posix() for p in files]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return dict(zip(names, pool.map(fingerprint, files), strict=True))


def crc32(file: Path) -> int:
  """CRC-32 of a file's content."""
  crc = 0
  with file.open("rb") as stream:
    while block := stream.read(1 << 20):
      crc = zlib.crc32(block, crc)
  return crc


def _check_files(path: Path, expected: dict[str, list[int]]) -> None:
  found = _fingerprints(path / PARAMS)
  problems = [f"{name} is missing" for name in expected if name not in found]
  for name, (size, crc) in expected.items():
    if name in found and found[name][0] != size:
      problems.append(f"{name} has {found[name][0]} bytes of {size}")
    elif name in found and found[name][1] != crc:
      problems.append(f"{name} is not what was written (checksum)")
  if problems:
    raise ValueError(f"{path / PARAMS}: damaged: {'; '.join(problems)}; save, convert or fetch it again")


def first_line(error: Exception) -> str:
  """The start of a library's message, for one of our own."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
