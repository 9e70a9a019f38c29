"""Speed of the attention kernels against dense attention by cuDNN and the memory's limit, on one accelerator.

    python -m experiments.bench_kernels                     # an H100, three minutes
    python -m experiments.bench_kernels --quick             # tiny shapes, anywhere: that everything runs, no figures

Decode: a chain of calls over the layers of a cache in one compiled program, large enough that the L2 cache serves none
of it; "CR 8" means ragged live lengths, exp(0.8 N(0, 1)) times a mean of S / 8. The floor is the bytes of live keys and
values over the measured read bandwidth. Prefill: a text of which each head keeps a random T / CR tokens, the window
included, and all of it at CR 1; the floor is dense attention's time times the share of its pairs that are visible.
Retrofit: causal attention with the training bias, forward alone and with the backward pass. Both against dense causal
attention. Prints a table, writes OUTPUT/{bench.json, decode.png}; the last line is one JSON object. A case that fails
is reported as such and the others go on.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import plots, program
from pallas_kernels import bench, decode, prefill, retrofit

OPERATIONS = "decode", "prefill", "retrofit", "growth"


@dataclasses.dataclass(frozen=True)
class Config:
  """`implementation` is that of the kernels, on a GPU "gpu" by default; after `seconds` no further case starts."""

  operations: tuple[str, ...] = OPERATIONS
  quick: bool = False
  implementation: str | None = None
  seconds: float = 170.0
  output: str = "runs/bench_kernels"

  def __post_init__(self):
    if unknown := set(self.operations) - set(OPERATIONS):
      raise ValueError(f"--operations: {sorted(unknown)} must be among {', '.join(OPERATIONS)}")


@dataclasses.dataclass(frozen=True)
class Decode:
  """A decode case: B rows, K KV heads, G queries each of size H, S slots a head; `layers` in the cache."""

  batch: int
  heads: int
  group: int
  size: int
  slots: int
  layers: int = 2

  def __str__(self) -> str:
    return f"B{self.batch} K{self.heads} G{self.group} H{self.size} S{self.slots}"


@dataclasses.dataclass(frozen=True)
class Text:
  """A prefill or training case: T tokens, N query and K KV heads of size H, window W."""

  batch: int
  tokens: int
  queries: int
  heads: int
  size: int
  window: int

  def __str__(self) -> str:
    return f"B{self.batch} T{self.tokens} N{self.queries} K{self.heads} H{self.size} W{self.window}"


DECODE = (
  Decode(32, 8, 4, 128, 8192), Decode(8, 8, 4, 64, 8192, 16), Decode(1, 8, 4, 128, 32768, 16),
  Decode(8, 8, 4, 128, 32768),
)  # fmt: skip
RETROFIT = Text(2, 4096, 32, 8, 64, 64), Text(1, 8192, 32, 8, 128, 256), Text(1, 32768, 32, 8, 128, 256)
PREFILL = (Text(1, 32768, 32, 8, 128, 256),)
QUICK_DECODE, QUICK_TEXT = (Decode(2, 2, 4, 64, 256),), (Text(1, 256, 4, 2, 64, 16),)
CALLS = 16  # of a decode chain


def dense_attention(q, k, v, causal: bool):
  """JAX's own: cuDNN on a GPU."""
  implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
  return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=implementation)


def chain(attend: Callable, layers: int) -> Callable:
  """One program of `CALLS` calls, the queries of each the output of the one before."""

  def run(q, *args):
    for number in range(CALLS):
      q = attend(q, number % layers, *args)
    return q

  return jax.jit(run)


def queries(case: Decode) -> jax.Array:
  return jax.random.normal(jax.random.key(0), (case.batch, case.heads * case.group, case.size), jnp.bfloat16)


def dense_decode(case: Decode) -> dict:
  """Microseconds of dense attention over all slots, keys and values apart as cuDNN wants them."""
  shape = case.batch, case.slots, case.heads, case.size
  keys = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(case.layers)]
  values = [k + 1 for k in keys]
  run = chain(lambda q, i, keys, values: dense_attention(q[:, None], keys[i], values[i], False)[:, 0], case.layers)
  return {"us": bench.clock(run, queries(case), keys, values) / CALLS * 1e6}


def our_decode(case: Decode, cr: float, bandwidth: float, implementation: str | None) -> dict:
  """Microseconds of the kernel over live slots, and of the floor."""
  shape = case.layers, case.batch, case.heads, case.slots, 2 * case.size
  kv = jax.jit(lambda: jnp.broadcast_to(jax.random.normal(jax.random.key(1), shape[1:], jnp.bfloat16), shape))()
  lengths = bench.ragged_lengths(case.batch, case.heads, case.slots, cr)
  attend = lambda q, i, kv, lengths: decode.decode_attention(q, kv, i, lengths, implementation=implementation)
  us = bench.clock(chain(attend, case.layers), queries(case), kv, jnp.asarray(lengths)) / CALLS * 1e6
  floor = float(lengths.sum()) * 4 * case.size / bandwidth * 1e6
  return {"us": us, "floor_us": floor, "of_floor": floor / us}


def inputs(case: Text) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Random q [B, T, N, H], k and v [B, T, K, H]."""
  keys = jax.random.split(jax.random.key(0), 3)
  shape = lambda heads: (case.batch, case.tokens, heads, case.size)
  heads = case.queries, case.heads, case.heads
  q, k, v = (jax.random.normal(key, shape(n), jnp.bfloat16) for key, n in zip(keys, heads, strict=True))
  return q, k, v


def dense_prefill(case: Text) -> dict:
  """Microseconds of dense causal attention, keys and values apart as cuDNN wants them."""
  return {"us": bench.clock(jax.jit(lambda q, k, v: dense_attention(q, k, v, True)), *inputs(case)) * 1e6}


def evictions(case: Text, cr: float) -> tuple[np.ndarray, np.ndarray]:
  """First and last positions [B, K, T] at an achieved CR; at CR 1 nothing is evicted."""
  position = np.broadcast_to(np.arange(case.tokens, dtype=np.int32), (case.batch, case.heads, case.tokens))
  outside = case.tokens - case.window - 1
  keep = 1.0 if cr == 1 else max(case.tokens / cr - case.window - 1, 0) / max(outside, 1)
  kept = np.random.default_rng(0).random(position.shape) < keep
  return position, np.where(kept, prefill.NEVER, position + np.int32(case.window))


def our_prefill(case: Text, cr: float, implementation: str | None) -> dict:
  """Microseconds of the kernel with all that prepares it; visible pairs over those of dense causal attention."""
  q, k, v = inputs(case)
  first, last = evictions(case, cr)
  q_pos = np.broadcast_to(np.arange(case.tokens, dtype=np.int32), (case.batch, case.tokens))
  keys, values = (jnp.swapaxes(x, 1, 2) for x in (k, v))
  attend = jax.jit(lambda *args: prefill.prefill_attention(*args, implementation=implementation))
  us = bench.clock(attend, q, keys, values, *(jnp.asarray(x) for x in (q_pos, first, last))) * 1e6
  visible = np.minimum(last, case.tokens - 1).astype(np.int64) - first + 1
  return {"us": us, "visible": float(visible.mean() * 2 / (case.tokens + 1))}


def retrofit_case(case: Text, ours: bool, implementation: str | None) -> dict:
  """Microseconds of the forward pass and of forward and backward, with the bias (ours) or dense."""
  q, k, v = inputs(case)
  dout = jax.random.normal(jax.random.key(1), q.shape, q.dtype)
  bias = jax.nn.log_sigmoid(4 * jax.random.normal(jax.random.key(2), (case.batch, case.heads, case.tokens)))

  def attend(q, k, v, bias):
    if ours:
      return retrofit.retrofit_attention(q, k, v, bias, case.window, implementation=implementation)
    return dense_attention(q, k, v, True)

  def both(q, k, v, bias, dout):
    out, pull = jax.vjp(attend, q, k, v, bias)
    return out, *pull(dout)

  forward = bench.clock(jax.jit(attend), q, k, v, bias) * 1e6
  return {"us": forward, "backward_us": bench.clock(jax.jit(both), q, k, v, bias, dout) * 1e6}


def growth(quick: bool) -> list[tuple[str, float, Decode, float]]:
  """(axis, value, case, CR): decode against compression, length and batch."""
  base = QUICK_DECODE[0] if quick else Decode(8, 8, 4, 128, 8192, 16)
  ratios, lengths, batches = ((1, 4), (256,), (1,)) if quick else (
    (1, 2, 4, 8, 16), [2**n for n in range(10, 18)], (1, 2, 4, 16, 32),
  )  # fmt: skip
  change = dataclasses.replace
  return (
    [("CR", cr, base, cr) for cr in ratios]
    + [("length", s, change(base, slots=s, layers=min(base.layers, max(1, 2**17 // s))), 8) for s in lengths]
    + [("batch", b, change(base, batch=b), 8) for b in batches]
  )


class Runner:
  """Runs cases one by one, guarded: a failure or the end of time becomes a row that says so."""

  def __init__(self, seconds: float):
    self.end = time.monotonic() + seconds
    self.rows: list[dict] = []

  def __call__(self, about: dict, f: Callable[[], dict]) -> dict:
    row = dict(about)
    try:
      row |= f() if time.monotonic() < self.end else {"skipped": "out of time"}
    except Exception as error:  # whatever a kernel or its compiler raises, the other cases stand
      row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    self.rows.append(row)
    program.log("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    return row


def ratio(a: dict, b: dict, key: str = "us") -> dict:
  return {"dense_ratio": a[key] / b[key]} if key in a and key in b else {}


def prefill_floor(dense: dict, ours: dict) -> dict:
  """Dense attention's time, had it computed visible pairs alone."""
  if "us" not in dense or "us" not in ours:
    return {}
  floor = dense["us"] * ours["visible"]
  return {"floor_us": floor, "of_floor": floor / ours["us"]}


def table(rows: list[dict]) -> str:
  """The rows as Markdown."""
  columns = ("operation", "case", "CR", "kernel", "us", "backward_us", "floor_us", "of_floor", "dense_ratio")
  lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
  for row in rows:
    cells = [row.get(c, row.get("error", row.get("skipped", "")) if c == "us" else "") for c in columns]
    lines.append("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |")
  return "\n".join(lines)


def picture(path: Path, rows: list[dict], device: str) -> str | None:
  """Decode time against CR, length and batch, with the floor."""
  if (plt := plots.pyplot()) is None:
    return None
  figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
  for axis, name in zip(axes, ("CR", "length", "batch"), strict=True):
    points = sorted((r["value"], r["us"], r["floor_us"]) for r in rows if r.get("axis") == name and "us" in r)
    if points:
      x, us, floor = zip(*points, strict=True)
      axis.loglog(x, us, "o-", color=plots.DMS, label="decode kernel")
      axis.loglog(x, floor, "--", color=plots.DENSE, label="floor: live bytes / read bandwidth")
    axis.set(xlabel={"CR": "compression ratio", "length": "slots a head"}.get(name, name), ylabel="microseconds")
    axis.grid(alpha=0.25, which="both")
  if axes[0].lines:
    axes[0].legend(frameon=False)
  figure.suptitle(f"Decode attention of one layer, bfloat16, {device}")
  figure.savefig(path, dpi=120)
  plt.close(figure)
  return str(path)


def main() -> None:
  config = program.read_flags("", Config)
  run = Runner(config.seconds)
  bandwidth = bench.read_bandwidth(2**22 if config.quick else 2**30)
  program.log(f"read bandwidth {bandwidth / 1e12:.3f} TB/s")
  forced = config.implementation or ("gpu" if jax.default_backend() == "gpu" else None)
  if "decode" in config.operations:
    for case in QUICK_DECODE if config.quick else DECODE:
      about = {"operation": "decode", "case": str(case)}
      dense = run(about | {"CR": 1, "kernel": "dense"}, lambda case=case: dense_decode(case))
      for cr in (8, 1):
        ours = run(
          about | {"CR": cr, "kernel": "ours"},
          lambda case=case, cr=cr: our_decode(case, cr, bandwidth, forced),
        )
        ours |= ratio(dense, ours)
        run.rows[-1] = ours
  if "prefill" in config.operations:
    for case in QUICK_TEXT if config.quick else PREFILL:
      about = {"operation": "prefill", "case": str(case)}
      dense = run(about | {"CR": 1, "kernel": "dense"}, lambda case=case: dense_prefill(case))
      for cr in (8, 1):
        ours = run(about | {"CR": cr, "kernel": "ours"}, lambda case=case, cr=cr: our_prefill(case, cr, forced))
        run.rows[-1] = ours | ratio(dense, ours) | prefill_floor(dense, ours)
  if "retrofit" in config.operations:
    for case in QUICK_TEXT if config.quick else RETROFIT:
      about = {"operation": "retrofit", "case": str(case)}
      dense = run(about | {"kernel": "dense"}, lambda case=case: retrofit_case(case, False, None))
      ours = run(about | {"kernel": "ours"}, lambda case=case: retrofit_case(case, True, forced))
      run.rows[-1] = ours | ratio(dense, ours, "backward_us")
  if "growth" in config.operations:
    for axis, value, case, cr in growth(config.quick):
      about = {"operation": "growth", "axis": axis, "value": value, "case": str(case), "CR": cr, "kernel": "ours"}
      run(about, lambda case=case, cr=cr: our_decode(case, cr, bandwidth, forced))
  folder = Path(config.output)
  result = {
    "date": datetime.date.today().isoformat(), "read_bandwidth": bandwidth, "rows": run.rows,
    "environment": program.environment(),
  }  # fmt: skip
  saved = program.save_json(folder / "bench.json", result)
  drawn = picture(folder / "decode.png", run.rows, jax.devices()[0].device_kind)
  print(table(run.rows))
  program.finish({"read_bandwidth": bandwidth, "rows": run.rows, "json": str(saved), "png": drawn})


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main)
