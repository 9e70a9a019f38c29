"""TriAttention: keys are scored by calibrated query centres at future distances (arXiv 2604.04921)."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from dms_jax.collectives import devices, own_heads
from dms_jax.json_files import parse_json
from dms_jax.layers import rope_frequencies
from dms_jax.npz import DAMAGE, Arrays
from dms_jax.policies.base import is_whole, register
from dms_jax.policies.periodic import Periodic
from dms_jax.policies.rotation import rotation, turned
from pallas_kernels.common.xla_dot import einsum

# What a calibration says about its model; a model that differs in one of these is another one.
ABOUT = ("family", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "rope_theta")
PROGRAM = "experiments.calibrate_triattention"


@struct.dataclass
class Calibration:
  """Statistics of a model's queries before RoPE, for each layer and query head.

  Attributes:
    centres: float32 [L, N, H], mean queries.
    norms: float32 [L, N, H/2], mean absolute values of the complex numbers that RoPE turns: channels c and c + H/2.
    frequencies: float32 [1, H/2], RoPE's.
    ahead: float32 [2, H/2], real and imaginary part of the mean of RoPE's turns over the future distances; `fitted`
      computes it.
  """

  centres: Float[Array, "L N H"]
  norms: Float[Array, "L N half"]
  frequencies: Float[Array, "1 half"]
  ahead: Float[Array, "2 half"] | None = None


@register
@struct.dataclass
class TriAttention(Periodic):
  """Keeps the tokens to which the mean query of each head would attend at future distances, and those of long keys.

  Queries and keys before RoPE lie close to fixed centres. Let c_f be a query head's mean query, in complex numbers for
  RoPE's frequencies w_f, and k_f a key, D before the next token. Its trigonometric score is the mean over d = 1, 2, 4,
  ... up to `furthest` of sum_f |c_f| |k_f| cos(w_f (D + d) + arg c_f - arg k_f). Its norm score is
  sum_f (E|q_f| - |c_f|) |k_f|, which counts where queries are less concentrated. The sum of both is standardised over
  the held tokens of each query head, and a KV head takes the largest over its query heads.

  `calibration` is the file that experiments.calibrate_triattention writes for the model. `buffer` is the paper's beta,
  128 tokens. As in the released code no recent token is safe: W = 0, the newest alone stays.

  Every KV head of every layer keeps tokens of its own (the code's per_layer_perhead_pruning); selections that heads or
  layers share are not part of this. Prompt tokens compete like all others; by default the code keeps them all and
  counts generated tokens alone.

  Attributes:
    furthest: greatest distance of future queries that a score averages over.
  """

  calibration: str | None = struct.field(pytree_node=False, default=None)
  furthest: int = struct.field(pytree_node=False, default=65536)
  tables: Calibration | None = struct.field(default=None, metadata={"flag": False})

  compact_observes = ("keys",)

  def fitted(self, config):
    if not is_whole(self.furthest) or self.furthest < 1:
      raise ValueError(f"TriAttention: furthest={self.furthest} must be 1 or more tokens")
    tables = self.tables
    if tables is None:
      if not self.calibration:
        raise ValueError(f"TriAttention: give calibration=FILE, which `python -m {PROGRAM}` writes for a model")
      tables = load(self.calibration, config)
    shape = config.num_layers, config.num_heads, config.head_dim
    if tables.centres.shape != shape:
      raise ValueError(f"TriAttention: tables of shape {tables.centres.shape} do not fit a model of {shape}")
    # In float64: the distances are long, and the frequencies up to 1.
    distances = 2.0 ** np.arange(int(math.log2(self.furthest)) + 1)
    turns = np.exp(1j * distances[:, None] * np.asarray(tables.frequencies, np.float64)[0]).mean(axis=0)
    return self.replace(tables=tables.replace(ahead=jnp.asarray(np.stack([turns.real, turns.imag]), jnp.float32)))

  def scores(self, candidates):
    tables, held = self.tables, candidates.held
    b, heads, _, h = candidates.keys.shape
    keys = jnp.where(held[..., None], candidates.keys, 0).astype(jnp.float32)
    group = tables.centres.shape[1] // (heads * devices())
    layer, flip = jnp.broadcast_to(candidates.layer, (b,)), lambda x: jnp.swapaxes(x, 0, 1)
    own = lambda table: flip(own_heads(flip(table), heads * group)[:, layer]).reshape(b, heads, group, -1)
    centres, norms = own(tables.centres), own(tables.norms)
    # A key after RoPE holds its position, so that of the query alone turns the centre.
    now = rotation(tables.frequencies, candidates.tokens[:, None, None])  # [B, 1, 1, H/2]
    query = turned(turned(centres, now), (tables.ahead[0], tables.ahead[1]))
    rest = norms - jnp.sqrt(centres[..., : h // 2] ** 2 + centres[..., h // 2 :] ** 2)
    lengths = jnp.sqrt(keys[..., : h // 2] ** 2 + keys[..., h // 2 :] ** 2)
    score = einsum("bkgh,bkxh->bkgx", query, keys) + einsum("bkgf,bkxf->bkgx", rest, lengths)
    there = held[:, :, None].astype(jnp.float32)
    total = jnp.maximum(jnp.sum(there, axis=-1, keepdims=True), 1)
    score = score - jnp.sum(score * there, axis=-1, keepdims=True) / total
    deviation = jnp.sqrt(jnp.sum(score * score * there, axis=-1, keepdims=True) / total)
    return jnp.max(score / jnp.maximum(deviation, 1e-6), axis=2)


def describe(config: Any) -> dict[str, Any]:
  """What `save` writes about a `ModelConfig` and `load` compares."""
  return {name: getattr(config, name) for name in ABOUT}


def save(path: str | Path, tables: Calibration, config: Any) -> None:
  """Writes a calibration of a model of this `ModelConfig` as an .npz file; a file at `path` is replaced."""
  arrays = {name: np.asarray(getattr(tables, name), np.float32) for name in ("centres", "norms", "frequencies")}
  part = Path(path).with_name(Path(path).name + ".part")
  try:
    with open(part, "wb") as file:
      np.savez(file, about=json.dumps(describe(config)), **arrays)
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)


def load(path: str | Path, config: Any) -> Calibration:
  """Reads a calibration for a model of this `ModelConfig`.

  Raises:
    ValueError: no such file, not a calibration, or one of another model.
  """
  where = f"TriAttention: calibration={path}"
  try:
    with zipfile.ZipFile(path) as archive:
      arrays = Arrays(archive, Path(path))
      about = parse_json(str(arrays["about"]), "about")
      tables = {name: arrays[name] for name in ("centres", "norms", "frequencies")}
  except FileNotFoundError:
    raise ValueError(f"{where}: no such file; `python -m {PROGRAM}` writes it") from None
  except (*DAMAGE, ValueError) as error:
    raise ValueError(f"{where}: not a calibration, or damaged ({' '.join(str(error).split())[:100]})") from None
  others = [f"{n} {about.get(n)!r} there, {own!r} here" for n, own in describe(config).items() if about.get(n) != own]
  if others:
    raise ValueError(f"{where}: of another model: {', '.join(others)}")
  layers, n, h, own = config.num_layers, config.num_heads, config.head_dim, rope_frequencies(config)
  shapes = {"centres": (layers, n, h), "norms": (layers, n, h // 2), "frequencies": (1, h // 2)}
  if wrong := [name for name, shape in shapes.items() if tables[name].shape != shape]:
    raise ValueError(f"{where}: {wrong[0]} has shape {tables[wrong[0]].shape}, expected {shapes[wrong[0]]}; damaged")
  if wrong := [name for name in tables if tables[name].dtype.kind != "f" or not np.isfinite(tables[name]).all()]:
    raise ValueError(f"{where}: {wrong[0]} holds what is not a number; damaged, or the model computed NaN")
  if not np.allclose(tables["frequencies"][0], own, rtol=1e-5):
    raise ValueError(f"{where}: of a model with other RoPE frequencies")
  return Calibration(**{name: jnp.asarray(x, jnp.float32) for name, x in tables.items()})
