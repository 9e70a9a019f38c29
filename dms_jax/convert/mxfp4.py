"""MXFP4, gpt-oss's experts on disk: 4-bit floats, 32 of them with a scale, widened when read."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from dms_jax.convert.tensors import Tensors

BLOCKS, SCALES = "_blocks", "_scales"
_POSITIVE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_FLOATS = np.array(_POSITIVE + [-value for value in _POSITIVE], np.float32)
# The two numbers of each byte, the one in its low bits first: bfloat16 [256, 2].
_PAIRS = np.stack([np.tile(_FLOATS, 16), np.repeat(_FLOATS, 16)], axis=-1).astype(jnp.bfloat16)
_PACKED = 16  # bytes of a block


def widened(tensors: Tensors) -> Tensors:
  """`tensors` with bfloat16 NAME [E, inputs, outputs] for each NAME_blocks and NAME_scales, which are uint8.

  The blocks are [E, outputs, inputs / 32, 16], the scales, exponents of 2 plus 127, [E, outputs, inputs / 32]. Every
  number is a bfloat16: nothing is rounded.

  Raises:
    ValueError: shapes of a pair do not fit.
  """
  shapes = dict(tensors.shapes)
  names = {name.removesuffix(BLOCKS) for name in shapes if name.endswith(BLOCKS)}
  names = {name for name in names if name + SCALES in shapes}
  for name in names:
    blocks, scales = shapes.pop(name + BLOCKS), shapes.pop(name + SCALES)
    if len(blocks) != 4 or blocks[:3] != scales or blocks[3] != _PACKED:
      raise ValueError(f"{tensors.source}: {name}{BLOCKS} {blocks} and {name}{SCALES} {scales} do not fit each other")
    experts, outputs, groups = scales
    shapes[name] = experts, 2 * _PACKED * groups, outputs

  def read(name: str) -> np.ndarray:
    if name not in names:
      return tensors.read(name)
    blocks, scales = tensors.read(name + BLOCKS), tensors.read(name + SCALES)
    factors = np.exp2(scales.astype(np.float32) - 127).astype(jnp.bfloat16)
    whole = np.empty(shapes[name], jnp.bfloat16)
    for expert, packed, factor in zip(whole, blocks, factors, strict=True):  # so one expert alone is in memory twice
      expert[:] = (_PAIRS[packed].reshape(*factor.shape, -1) * factor[..., None]).reshape(len(packed), -1).T
    return whole

  return dataclasses.replace(tensors, shapes=shapes, read=read)
