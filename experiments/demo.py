"""The demo: answers a question and continues a long text, dense and with DMS.

    python -m experiments.demo --checkpoint=checkpoints/smollm2-135m-instruct

Reads the first `--tokens` tokens of `--text` (default: this project's own documents and source) in chunks, with the
original model and a dense cache, and with the retrofit and DMS; then continues both texts, sampling with the same key.
Writes OUTPUT/{report.json, live_tokens.png} and ends with one JSON line. SmolLM2-135M takes two minutes on two idle CPU
cores. Half of that is compilation, which a second run finds in the cache on disk.
"""

from __future__ import annotations

import dataclasses
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import dms_jax
from dms_jax import cache as caches
from dms_jax import checkpoint
from dms_jax.generation.prefill import Chunk, read_prompts
from dms_jax.metrics import Metrics, count, kl_divergence
from dms_jax.model import Model, cached_forward, check_policy, unembed
from dms_jax.policies import DMS, Policy, Vanilla
from dms_jax.tokenizer import Tokenizer
from experiments.common import files, program
from experiments.reports import plots, tables

ROOT = Path(__file__).parent.parent
QUESTION = "What is the capital of France?"
STRIDES = 4  # sizes a cache grows through; each is compiled once, but attention reads all slots of a size


@dataclasses.dataclass(frozen=True)
class Config:
  """What is read and written.

  Attributes:
    tokens: first tokens of the text that are read.
    new_tokens: tokens that are written after them.
    chunk: tokens of the text that one compiled call reads.
    threshold: of the eviction gates; higher keeps more.
    text: text that is read; none: this project's own documents and source.
  """

  checkpoint: str = "checkpoints/smollm2-135m-instruct"
  retrofit: str = "smollm2-135m-cr4"
  text: str = ""
  tokens: int = 4096
  new_tokens: int = 128
  chunk: int = 256
  threshold: float = 0.0
  temperature: float = 0.7
  seed: int = 0
  dtype: Literal["float32", "bfloat16"] = "float32"
  output: str = "runs/report"

  def __post_init__(self):
    for name, least in (("tokens", 2), ("new_tokens", 1), ("chunk", 1)):
      if getattr(self, name) < least:
        raise ValueError(f"--{name}={getattr(self, name)} must be {least} or more")


def own_text() -> str:
  """The project's own documents, then its source, in a fixed order."""
  documents = [ROOT / "README.md", ROOT / "WORKSPACE.md"]
  sources = [
    p for package in ("dms_jax", "pallas_kernels", "experiments") for p in sorted((ROOT / package).rglob("*.py"))
  ]
  return "\n\n".join(path.read_text(encoding="utf-8") for path in documents + sources if path.exists())


# -------------------------------------------------------------------------------------------- reading and writing


@partial(jax.jit, donate_argnames="cache")
def _take(model: Model, policy: Policy, cache, tokens, lengths, remaining):
  """Reads one chunk of the text into the cache; returns hidden states, counts and the cache."""
  out, cache = cached_forward(model, policy, cache, tokens, lengths, remaining=remaining)
  return out.hidden, count(out.seen), cache


@jax.jit
def _score(models: tuple[Model, Model], hidden, target, scored):
  """Each model's negative log-likelihood, and KL(first || second), summed over the `scored` targets [1, C]."""
  logits = [unembed(model, states) for model, states in zip(models, hidden, strict=True)]
  nll = [-jnp.take_along_axis(jax.nn.log_softmax(x), target[..., None], axis=-1)[..., 0] for x in logits]
  kl = kl_divergence(logits[1], logits[0], "forward")
  return [jnp.sum(jnp.where(scored, x, 0.0)) for x in (*nll, kl)]


def _enlarged(cache, policy: Policy, tokens: int, most: int):
  """`cache`, enlarged if `tokens` more might not fit: by pages, or by whole strides of `most` / STRIDES slots."""
  if isinstance(cache, caches.PagedCache):
    return cache.ensure_capacity(policy, np.array([tokens]), most)
  lack, slots = tokens - int(cache.free_tokens(policy).min()), cache.slots
  if lack <= 0 or slots >= most:
    return cache
  stride = -(-most // STRIDES)
  return cache.grow(min(most, slots + -(-lack // stride) * stride))


def compare(
  original: Model,
  model: Model,
  tokens: np.ndarray,
  *,
  new_tokens: int,
  chunk: int,
  threshold: float = 0.0,
  temperature: float = 0.0,
  seed: int = 0,
) -> dict[str, dict[str, Any]]:
  """Reads `tokens` [T] and writes `new_tokens` more with both models.

  Args:
    original: the original model, run with a dense cache.
    model: the retrofit, run with DMS.
    temperature, seed: of the written tokens, for both models; temperature 0 is greedy, which makes small models repeat
      themselves.

  Returns:
    {"dense": ..., "dms": ...}. Each has the perplexity and kl of the text read (every position but the first;
    KL(original || model) in nats per token), the new tokens `written`, the `metrics` of reading and writing, and `live`
    [P, L, K], tokens live at `position` [P].
  """
  models = (original, model)
  policies = (Vanilla(), check_policy(model, DMS(threshold=threshold)))
  most = max(len(tokens) + new_tokens, policies[1].window + 1)  # slots that suffice for any evictions
  empty = partial(caches.for_model, batch=1, capacity=-(-most // STRIDES), longest=most)
  state = [empty(m, p) for m, p in zip(models, policies, strict=True)]
  reading = [Metrics.zero(m.config.num_layers, 1, m.config.num_kv_heads) for m in models]
  sums, positions, live = [], [], ([], [])
  total = len(tokens) - 1  # the last token is not read here: writing feeds it first
  bar = program.progress(-(-total // chunk), desc=f"reading, chunks of {chunk} tokens")

  def feed(part: Chunk) -> np.ndarray:
    next(bar)
    start, length = int(part.start[0]), int(part.lengths[0])
    target = np.zeros((1, chunk), np.int32)
    target[0, :length] = tokens[start + 1 : start + 1 + length]
    hidden = [None, None]
    for i, (m, p) in enumerate(zip(models, policies, strict=True)):
      larger = _enlarged(state[i], p, length, most)
      hidden[i], counts, state[i] = _take(m, p, larger, part.tokens, part.lengths, part.remaining)
      reading[i] = reading[i].add(counts, decode=False)
      live[i].append(np.asarray(counts.live[:, 0]))
    positions.append(start + length)
    sums.append(_score(models, hidden, target, np.arange(chunk)[None] < length))
    return np.zeros(1, bool)

  read_prompts([tokens[:total]], chunk, feed)
  next(bar, None)
  sums = np.array(sums, np.float64).sum(axis=0)

  results = {}
  for i, (name, m, p) in enumerate(zip(("dense", "dms"), models, policies, strict=True)):
    program.log(f"writing {new_tokens} tokens, {name}")
    past = dms_jax.Conversation(state[i], jnp.asarray(tokens[-1:], jnp.int32), jnp.zeros((1,), jnp.int32), p)
    state[i] = None
    out = dms_jax.generate(
      m, continue_from=past, max_new_tokens=new_tokens, temperature=temperature, key=jax.random.key(seed),
      eos=False, history=True,
    )  # fmt: skip
    metrics = out.metrics
    results[name] = {
      "perplexity": float(np.exp(sums[i] / total)),
      "kl": float(sums[2] / total) if i else 0.0,
      "written": out.tokens[0],
      "metrics": metrics.replace(
        prompt_reads=reading[i].prompt_reads,
        peak=np.maximum(metrics.peak, reading[i].peak),
        peak_total=max(metrics.peak_total, reading[i].peak_total),
        history=None,
      ),
      "position": np.array([*positions, *range(total + 1, total + new_tokens + 1)]),
      "live": np.concatenate([np.stack(live[i]), metrics.history[:, :, 0]]),
    }
  return results


# --------------------------------------------------------------------------------------------------- what is shown


def side_by_side(left: str, right: str, width: int = 57, rows: int = 24) -> str:
  """Two texts in columns headed "dense" and "DMS", at most `rows` lines each."""

  def wrap(text: str) -> list[str]:
    lines = [part for line in text.splitlines() for part in (textwrap.wrap(line, width) or [""])]
    return lines if len(lines) <= rows else [*lines[: rows - 1], "..."]

  columns = [["dense", "-" * width, *wrap(left)], ["DMS", "-" * width, *wrap(right)]]
  longest = max(map(len, columns))
  columns = [column + [""] * (longest - len(column)) for column in columns]
  return "\n".join(f"{a:<{width}} | {b}".rstrip() for a, b in zip(*columns, strict=True))


def table(dense: dict, dms: dict) -> str:
  """The figures of both runs, a row each."""
  mib = lambda n: f"{n / 2**20:.1f} MiB"
  change = dms["perplexity"] / dense["perplexity"] - 1
  lines = [
    ("perplexity of what was read", f"{dense['perplexity']:.3f}", f"{dms['perplexity']:.3f}", f"{change:+.1%}"),
    ("KL to the original, nats a token", "0", f"{dms['kl']:.4f}", ""),
    (f"achieved CR at T = {dms['seen_tokens'][0]:,}", f"{dense['achieved_cr']:.2f}", f"{dms['achieved_cr']:.2f}", ""),
  ]
  for title, key, show in (
    ("KV reads of the continuation", "kv_reads", lambda n: f"{n:,.0f}"),
    ("peak tokens, mean over heads", "peak_tokens", lambda n: f"{n:,.0f}"),
    ("cache, live", "bytes_live", mib),
    ("cache, allocated", "bytes_allocated", mib),
  ):
    less = dense[key] / dms[key]
    lines.append((title, show(dense[key]), show(dms[key]), f"{less:.2f}x less" if less > 1.05 else ""))
  return tables.markdown(("", "dense", "DMS", "difference"), lines)


def main() -> None:
  config, start = program.read_flags("", Config), time.perf_counter()
  files.check_retrofit("retrofit", config.retrofit)
  program.log(f"loading {config.checkpoint} and {config.retrofit}")
  tokenizer = Tokenizer.load(config.checkpoint)
  original = checkpoint.load(config.checkpoint, dtype=config.dtype).replace(dms=None)
  model = checkpoint.load(config.checkpoint, retrofit=config.retrofit, dtype=config.dtype)
  text = files.read_text("text", config.text) if config.text else own_text()
  tokens = np.asarray(tokenizer.encode(text), np.int32)[: config.tokens]
  if len(tokens) < config.tokens:
    raise ValueError(f"--text={config.text}: {len(tokens)} tokens, fewer than --tokens={config.tokens}")

  chat = tokenizer.chat([{"role": "user", "content": QUESTION}])
  # Nearly greedy. The dense model has a cache as large as the long text needs, so both texts share compiled decoding.
  alike = {"history": True, "key": jax.random.key(config.seed), "temperature": min(config.temperature, 0.01)}
  answers = {}
  for name, m, capacity in (("dense", original, config.tokens + config.new_tokens), ("dms", model, None)):
    policy = DMS(threshold=config.threshold) if m.dms else Vanilla()
    answer = dms_jax.generate(
      m, chat, tokenizer=tokenizer, policy=policy, max_new_tokens=32, capacity=capacity, **alike
    )
    answers[name] = answer.text[0].strip()
  print(f"\n{QUESTION}\n" + side_by_side(answers["dense"], answers["dms"]), flush=True)

  results = compare(
    original, model, tokens, new_tokens=config.new_tokens, chunk=config.chunk, threshold=config.threshold,
    temperature=config.temperature, seed=config.seed,
  )  # fmt: skip
  dense, dms = results["dense"], results["dms"]
  for run in (dense, dms):
    run["text"] = tokenizer.decode(run.pop("written"))
    run.update(run.pop("metrics").to_json())
  print(f"\n{len(tokens):,} tokens of {config.text or 'the project itself'}, continued by {config.new_tokens}:")
  print(side_by_side(dense["text"], dms["text"]) + "\n\n" + table(dense, dms), flush=True)

  picture = plots.live_tokens(
    Path(config.output) / "live_tokens.png",
    dense,
    dms,
    read=len(tokens),
    title=f"{Path(config.checkpoint).name}, window {model.dms.window}: achieved CR {dms['achieved_cr']:.2f}",
  )
  for run in (dense, dms):
    run["live_mean"] = run.pop("live").mean(axis=(1, 2)).round(1)
  seconds = round(time.perf_counter() - start, 1)
  line = {"dense": dense, "dms": dms, "answers": answers, "picture": picture}
  saved = {"config": program.flag_values(), "environment": program.environment(), **line}
  path = program.save_json(Path(config.output) / "report.json", saved)
  program.log(f"{seconds:.0f} s; wrote {path}" + (f" and {picture}" if picture else ""))
  for run in (dense, dms):  # the curves stay in report.json
    del run["live_mean"], run["position"]
  program.finish({**line, "seconds": seconds})


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main, writes="folder")
