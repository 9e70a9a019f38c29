"""Bytes that generation takes on each device of a mesh, by shapes: no device, no weights.

    python -m experiments.mesh_memory --preset=llama-3.1-70b --rows=32 --tokens=131072 --cr=8 \\
      --mesh.data=1 --mesh.tensor=8 --device_gib=80                                # 8 H100
    python -m experiments.mesh_memory --mesh.data=2 --mesh.tensor=8 --device_gib=95  # TPU v5p 4x4

Weights and caches are those of `dms_jax.spmd`: rows are split over `data`; KV heads, feed-forward or experts, and
vocabulary over `tensor`. Where `tensor` does not divide the KV heads it splits rows in their place, and every device
has the whole weights of attention. A paged cache holds one in `cr` of `tokens` tokens a head, with tables for all of
them. Beside both, a step takes the logits of its rows, and a chunk of a prompt two copies of one layer's archives, as
if they were full. Smaller arrays are left out, so a device fits that keeps a tenth of its memory free. For a mixture of
experts it also counts the weights of those that a decode step's rows choose at random. The last line is one JSON
object.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding

from dms_jax import cache as caches
from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.families import PRESETS
from dms_jax.params import param_table
from dms_jax.policies import DMS
from dms_jax.retrofit.distributed import MeshConfig
from dms_jax.sharding import Split, decoding, partition_spec
from dms_jax.spmd import check_feed_forward
from experiments.common import program

FREE = 0.1  # share of a device's memory that stays free
DRAWS = 400  # of a step's experts


@dataclasses.dataclass(frozen=True)
class Config:
  """What is generated, and on what.

  Attributes:
    preset: name of the model's shape in `dms_jax.families.PRESETS`.
    rows: chains decoded together, on all devices.
    tokens: of each chain, prompt and answer.
    cr: tokens seen for each one held.
    window: W of the gates in tokens; none: 256, or that of layers that slide if it is smaller.
    dtype: of weights and cache.
    page_format: quantises the pages of the cache: int8 or float8.
    device_gib: memory of a device.
  """

  preset: str = dataclasses.field(default="llama-3.1-70b", metadata={"choices": PRESETS})
  rows: int = 32
  tokens: int = 131072
  cr: float = 8.0
  window: int | None = None
  dtype: str = "bfloat16"
  page_format: str | None = None
  device_gib: float = 80.0

  def __post_init__(self):
    if self.preset not in PRESETS:
      raise ValueError(f"--preset={self.preset} is not one of {', '.join(sorted(PRESETS))}")
    for name in ("rows", "tokens", "window", "device_gib"):
      if (value := getattr(self, name)) is not None and value < 1:
        raise ValueError(f"--{name}={value} must be 1 or more")
    if self.cr < 1:
      raise ValueError(f"--cr={self.cr:g} must be 1 or more")


def measure(config: Config, devices: MeshConfig) -> dict[str, Any]:
  """Bytes on each device, and whether they fit.

  Raises:
    ValueError: the mesh does not divide the rows, or the channels of the feed-forward.
  """
  data, tensor, model = devices.data, devices.tensor, PRESETS[config.preset]
  mesh, dtype = AbstractMesh((data, tensor), ("data", "tensor")), jnp.dtype(config.dtype)
  check_feed_forward(model, tensor)
  split = Split.of(model, mesh)
  if config.rows % split.row_parts:
    axes = f"--mesh.data={data}" + (f" x --mesh.tensor={tensor}" if split.by_rows else "")
    raise ValueError(f"{axes} does not divide --rows={config.rows}")
  window = config.window or min(256, model.ring_window or 256)
  table = param_table(model, DMSConfig(window=window))
  rules = decoding(model, mesh)
  shards = [NamedSharding(mesh, partition_spec(p, s, mesh, rules)).shard_shape(s.shape) for p, s in table.items()]
  heads = dict(num_heads=model.num_heads // split.head_parts, num_kv_heads=model.num_kv_heads // split.head_parts)
  own, rows = dataclasses.replace(model, **heads), config.rows // split.row_parts
  capacity = math.ceil(config.tokens / config.cr)

  def make():
    cache = caches.create(
      "paged", own, batch=rows, capacity=capacity, lag=1, dtype=dtype, policy=DMS(window=window),
      longest=config.tokens, page_format=config.page_format,
    )  # fmt: skip
    # With room for the windows of sliding layers.
    return cache.with_pages(max(cache.pages, rows * cache.row_pages(capacity, config.tokens)))

  parts = {
    "weights": sum(map(math.prod, shards)) * dtype.itemsize,
    "cache": jax.eval_shape(make).nbytes,
    "logits": rows * model.vocab_size * 4,
    "prompt chunk": 2 * rows * own.num_kv_heads * config.tokens * 2 * own.head_dim * dtype.itemsize,
  }
  total, memory = sum(parts.values()), config.device_gib * 2**30
  together = config.rows // data  # rows that meet in a feed-forward
  chosen = {"chosen experts": chosen_experts(model, together, tensor, dtype.itemsize)} if model.num_experts else {}
  return {
    "devices": data * tensor, "mesh": {"data": data, "tensor": tensor}, "bytes": parts, "total": total,
    "share": total / memory, "fits": total <= (1 - FREE) * memory, **chosen,
  }  # fmt: skip


def chosen_experts(model: ModelConfig, rows: int, tensor: int, itemsize: int) -> dict[str, float]:
  """Bytes of the experts that `rows` tokens choose, in all layers, on the busiest of `tensor` devices; by counting.

  A token's experts are drawn without replacement, all equally likely. "split": each device has a part of every expert.
  "whole": each has its own experts; left out where `tensor` does not divide their number.
  """
  rng, count = np.random.default_rng(0), model.num_experts
  order = np.argsort(rng.random((DRAWS, rows, count)), axis=-1)[..., : model.experts_per_token]
  hit = np.zeros((DRAWS, count), bool)
  np.put_along_axis(hit, order.reshape(DRAWS, -1), True, axis=-1)
  table = param_table(model)
  each = sum(math.prod(spec.shape) for spec in table.values() if spec.of_experts) // count * itemsize
  split = {"split": float(hit.sum(-1).mean()) / tensor * each}
  if count % tensor:
    return split
  return {"whole": float(hit.reshape(DRAWS, tensor, -1).sum(-1).max(-1).mean()) * each, **split}


def main() -> None:
  config, devices = program.read_flags("", Config), program.read_flags("mesh", MeshConfig)
  found = measure(config, devices)
  what = f"{config.preset}, {config.rows} chains of {config.tokens:,} tokens at CR {config.cr:g}"
  print(f"{what}, data {devices.data} x tensor {devices.tensor}: GiB on each of {found['devices']} devices")
  for name, size in (*found["bytes"].items(), ("total", found["total"])):
    print(f"  {name:<14}{size / 2**30:8.2f}")
  for how, size in found.get("chosen experts", {}).items():
    print(f"  chosen, {how:<6}{size / 2**30:8.2f}  read in a decode step by the busiest device")
  print(f"  {found['share']:.0%} of {config.device_gib:g} GiB: {'fits' if found['fits'] else 'does not fit'}")
  program.finish(found)


if __name__ == "__main__":
  program.define_flags("", Config)
  program.define_flags("mesh", MeshConfig)
  program.run(main)
