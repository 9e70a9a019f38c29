"""Calibrates TriAttention for a model: the mean query of each head, before RoPE, on a text.

    python -m experiments.calibrate_triattention --checkpoint=checkpoints/smollm2-135m-instruct --text=wiki.train.raw \\
      --output=smollm2.triattention.npz
    python -m experiments.generate --checkpoint=checkpoints/smollm2-135m-instruct --policy=triattention \\
      --triattention.budget=512 --triattention.calibration=smollm2.triattention.npz --prompt="..."

The model reads the first `--max_tokens` tokens of the text, in passages of `--length` tokens, and evicts nothing. A
small reasoner reads generated problems with their traces instead of a text, each a passage of its own:

    python -m experiments.calibrate_triattention --checkpoint=runs/reasoner/final --output=reasoner.triattention.npz \\
      --families=countdown,grids,programs,graphs

The file holds, for each layer and query head, the mean of the queries and of the absolute values of their complex
channels (arXiv 2604.04921): a few hundred KB. It fits this model and its retrofits; the policy refuses models of
another shape or RoPE base. `--retrofit` adds a retrofit's low-rank updates.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from dms_jax import cache as caches
from dms_jax import checkpoint
from dms_jax.model import Model, cached_forward
from dms_jax.policies import Policy
from dms_jax.policies import triattention as tables
from dms_jax.policies.rotation import conjugate, frequencies, rotation, turned
from dms_jax.tokenizer import Tokenizer
from experiments.common import files, program


@dataclasses.dataclass(frozen=True)
class Config:
  """`chunk` tokens of a passage are read at once; the last passage may be shorter.

  Attributes:
    families: of generated problems, those of the training of a small reasoner, instead of a text.
    seed: of the problems; training has others.
  """

  checkpoint: str
  output: str
  text: str = ""
  families: tuple[str, ...] = ()
  seed: int = 1234
  retrofit: str | None = None
  max_tokens: int = 32768
  length: int = 4096
  chunk: int = 512
  dtype: Literal["bfloat16", "float32"] = "bfloat16"

  def __post_init__(self):
    for name in ("max_tokens", "length", "chunk"):
      if (value := getattr(self, name)) < 1:
        raise ValueError(f"--{name}={value} must be 1 or more tokens")
    if bool(self.text) == bool(self.families):
      raise ValueError("give either --text=FILE or --families=NAME,NAME: what the model reads")


@struct.dataclass
class Statistics(Policy):
  """Keeps every token, and sums the queries before RoPE and the absolute values of their complex channels."""

  frequencies: Float[Array, "1 half"] | None = None

  evicts = False
  remembers = True

  def memory(self, group, head_dim):
    return {"queries": (group, head_dim), "norms": (group, head_dim // 2)}

  def remember(self, memory, layer, queries, start, lengths):
    index = jnp.arange(queries.shape[3])
    real = (index < lengths[:, None])[:, None, None, :, None]
    back = tuple(x[:, None, None] for x in conjugate(rotation(self.frequencies, start[:, None] + index)))
    queries = jnp.where(real, turned(queries, back), 0)
    a, b = jnp.split(queries, 2, axis=-1)
    added = {"queries": queries, "norms": jnp.sqrt(a * a + b * b)}
    return {name: x.at[layer].add(jnp.sum(added[name], axis=3)) for name, x in memory.items()}


@partial(jax.jit, donate_argnames="cache")
def _read(model: Model, policy: Policy, cache, tokens: Int[Array, "1 T"], lengths: Int[Array, "1"]):
  return cached_forward(model, policy, cache, tokens, lengths)[1]


def calibrate(model: Model, passages: Sequence[Int[np.ndarray, "n"]], *, chunk: int) -> tables.Calibration:
  """The calibration of a model on passages of tokens.

  Args:
    chunk: tokens read at once.
  """
  config, sums = model.config, {"queries": np.zeros(()), "norms": np.zeros(())}
  policy = Statistics(window=0, frequencies=frequencies(config, "TriAttention"))
  longest, total = max(map(len, passages)), sum(map(len, passages))
  chunk = min(chunk, longest)
  for part in program.progress(passages, desc="reading"):
    cache = caches.for_model(model, policy, batch=1, capacity=-(-longest // chunk) * chunk, kind="contiguous")
    for start in range(0, len(part), chunk):
      piece = part[start : start + chunk]
      padded = np.zeros((1, chunk), np.int32)
      padded[0, : len(piece)] = piece
      cache = _read(model, policy, cache, padded, np.array([len(piece)], np.int32))
    sums = {name: x + np.asarray(cache.memory[name], np.float64)[:, 0] for name, x in sums.items()}
  mean = lambda name, width: jnp.asarray(sums[name].reshape(config.num_layers, -1, width) / total, jnp.float32)
  h = config.head_dim
  return tables.Calibration(mean("queries", h), mean("norms", h // 2), policy.frequencies)


def read_passages(config: Config, text: str, tokenizer: Tokenizer) -> list[Int[np.ndarray, "n"]]:
  """What the model reads: parts of the text, or problems with their traces up to as many tokens.

  Raises:
    ValueError: the text holds nothing, a family is unknown, or the tokenizer lacks its words.
  """
  if config.text:
    tokens = np.asarray(tokenizer.encode(text), np.int32)[: config.max_tokens]
    if not len(tokens):
      raise ValueError(f"--text={config.text}: holds no text")
    return [tokens[at : at + config.length] for at in range(0, len(tokens), config.length)]
  from experiments.tasks import reasoning  # all tasks, which take a while to import

  reasoning.check_families("--families", config.families, tokenizer)
  passages, left = [], config.max_tokens
  for prompt, trace in reasoning.documents(config.families, config.seed, 0, config.max_tokens, config.length):
    if trace is not None:
      tokens = np.asarray(tokenizer.encode(f"{prompt} {trace}"), np.int32)[:left]
      passages.append(tokens)
      left -= len(tokens)
      if not left:
        break
  return passages


def main() -> None:
  config = program.read_flags("", Config)
  text = files.read_text("text", config.text) if config.text else ""
  files.check_checkpoint("checkpoint", config.checkpoint)
  files.check_retrofit("retrofit", config.retrofit)
  # Layers stay stacked, so that one is compiled, not all.
  model = checkpoint.load(config.checkpoint, retrofit=config.retrofit, dtype=config.dtype)
  tokenizer = Tokenizer.load(config.checkpoint)
  if (most := model.config.max_position_embeddings) < config.length:
    raise ValueError(f"--length={config.length} is longer than the model's context of {most} tokens")
  start = time.perf_counter()
  passages = read_passages(config, text, tokenizer)
  calibration = calibrate(model, passages, chunk=config.chunk)
  tables.save(config.output, calibration, model.config)
  a, b = np.split(np.asarray(calibration.centres, np.float64), 2, axis=-1)
  # The mean resultant length of the paper, over all heads and frequencies: 1 where all queries are alike.
  concentration = float(np.hypot(a, b).sum() / np.asarray(calibration.norms, np.float64).sum())
  program.finish({
    "output": config.output, "bytes": Path(config.output).stat().st_size, "tokens": sum(map(len, passages)),
    "concentration": round(concentration, 4), "seconds": round(time.perf_counter() - start, 1),
  })  # fmt: skip


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main, writes="file")
