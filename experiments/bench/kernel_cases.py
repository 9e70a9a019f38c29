"""The cases of `bench_kernels`: named workloads, measurements and bars.

Decode: one compiled program chains calls over the layers of a cache, which together exceed the L2 cache. "CR 8" means
ragged live lengths, exp(0.8 N(0, 1)) times a mean of S / 8. The floor is the bytes of live keys and values
(and scales) over the measured read bandwidth. With "mass" each call also returns the attention mass of all slots, which
is added to a score as H2O does, beside the same calls without it and XLA's. Prefill: each head keeps a random T / CR
tokens of a text, the window included; at CR 1 it keeps all. The floor is dense attention's time times the share of its
pairs that are visible.
Retrofit: causal attention with the training bias, forward alone and with the backward pass.
With sinks (shapes of gpt-oss) or a cap (Gemma 2 27B) each is timed beside the same without, and beside XLA's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.bench import cases
from experiments.bench.cases import Bar
from pallas_kernels import decode, prefill
from pallas_kernels import window_bias as retrofit
from pallas_kernels.common import bench
from pallas_kernels.decode import Pages
from pallas_kernels.paged import format_of

CALLS = 64  # calls of a decode chain; with 16 the host sometimes limited the smallest cases
FEW_CALLS = 4  # of XLA's decode, which has several loops a call and takes long to compile
# Between two implementations in bfloat16: each rounds weights and results to half a unit in the last place, 2^-9.
SAME = Bar("difference", 8e-3, most=True)
SAME_MASS = Bar("mass_difference", 1e-4, most=True)  # float32 sums, approximate exponentials


Softmax = Literal["", "sinks", "softcap"]


def softmax_options(softmax: Softmax, query_heads: int) -> dict:
  """What attention is called with for a softmax of this kind."""
  if softmax == "sinks":
    return {"sinks": jnp.linspace(-2.0, 2.0, query_heads)}
  return {"softcap": 50.0} if softmax else {}


@dataclasses.dataclass(frozen=True)
class Decode:
  """B rows, K KV heads, G queries each of size H, S slots a head; `layers` in the cache.

  `spread` says how many slots of each head are live: "ragged" at a mean of S / `cr`; "chains", 60 to 300, as of many
  short chains of thought; "halves", of every other head all, of the others a window of 257.

  `pages` is the slots of a page, 0 for a contiguous cache; pages hold `stored`. The first `ring` slots of a head are
  contiguous, in q's dtype. `mass`: the attention mass of each slot is returned, too.
  """

  batch: int
  heads: int
  group: int
  size: int
  slots: int
  layers: int = 2
  cr: float = 8
  pages: int = 0
  stored: str = "bfloat16"
  ring: int = 0
  mass: bool = False
  bars: tuple[Bar, ...] = ()
  spread: Literal["ragged", "chains", "halves"] = "ragged"
  softmax: Softmax = ""

  def __str__(self) -> str:
    mass = (" mass" if self.mass else "") + ("" if self.spread == "ragged" else f" {self.spread}")
    pages = f" pages{self.pages} {self.stored}" if self.pages else ""
    ring = f" ring{self.ring}" if self.ring else ""
    softmax = f" {self.softmax}" if self.softmax else ""
    return f"B{self.batch} K{self.heads} G{self.group} H{self.size} S{self.slots}{pages}{ring}{mass}{softmax}"

  def options(self) -> dict:
    """Keyword arguments of attention besides the arrays."""
    return {"mass": self.mass, **softmax_options(self.softmax, self.heads * self.group)}

  def shrunk(self) -> Decode:
    """A small version without bars, for any machine."""
    slots = 128 if self.slots < 32768 else 256
    return dataclasses.replace(
      self, batch=2, heads=2, slots=slots, layers=2, pages=min(self.pages, 16), ring=min(self.ring, 9), bars=()
    )

  def lengths(self) -> np.ndarray:
    """int32 [B, K]: live slots of each head."""
    shape, most = (self.batch, self.heads), self.slots
    if self.spread == "chains":
      return np.random.default_rng(0).integers(min(60, most), min(300, most) + 1, shape).astype(np.int32)
    if self.spread == "halves":
      every_other = np.where(np.arange(self.heads) % 2 == 0, most, min(257, most))
      return np.broadcast_to(every_other, shape).astype(np.int32)
    return bench.ragged_lengths(*shape, most, self.cr)


@dataclasses.dataclass(frozen=True)
class Text:
  """T tokens, N query and K KV heads of size H, window W; `kind` "prefill" (at `cr`) or "retrofit".

  `uneven`: heads hold exp(0.8 N(0, 1)) times a mean, as trained gates leave them, instead of all the same.
  `by_age`: the bias of a retrofit grows with a key's age.
  """

  kind: str
  batch: int
  tokens: int
  queries: int
  heads: int
  size: int
  window: int
  cr: float = 8
  bars: tuple[Bar, ...] = ()
  softmax: Softmax = ""
  uneven: bool = False
  by_age: bool = False

  def __str__(self) -> str:
    more = (
      (f" {self.softmax}" if self.softmax else "")
      + (" uneven" if self.uneven else "")
      + (" by age" if self.by_age else "")
    )
    return f"B{self.batch} T{self.tokens} N{self.queries} K{self.heads} H{self.size} W{self.window}{more}"

  def options(self) -> dict:
    """Keyword arguments of attention besides the arrays."""
    return softmax_options(self.softmax, self.queries) | ({"by_age": True} if self.by_age else {})

  def shrunk(self) -> Text:
    return dataclasses.replace(self, batch=1, tokens=256, queries=4, heads=2, size=64, window=16, bars=())


# Scores are 7 (G = 4, H = 128) to 13 % (G = 8) more bytes, if they leave the L2 cache.
MASS = Bar("slowdown", 1.2, most=True), Bar("xla_ratio", 1.5)
CASES: dict[str, Decode | Text] = {
  "decode_b32_cr8": Decode(32, 8, 4, 128, 8192, bars=(Bar("dense_ratio", 6.5), Bar("of_floor", 0.8))),
  "decode_b32_cr1": Decode(32, 8, 4, 128, 8192, cr=1, bars=(Bar("of_floor", 0.95),)),
  "decode_b8_s32k_cr8": Decode(8, 8, 4, 128, 32768, bars=(Bar("dense_ratio", 6.5),)),
  "decode_h64_cr8": Decode(8, 8, 4, 64, 8192, 16, bars=(Bar("dense_ratio", 5),)),
  "decode_b1_s32k_cr8": Decode(1, 8, 4, 128, 32768, 16, bars=(Bar("dense_ratio", 5),)),
  "decode_shard_cr8": Decode(32, 1, 8, 128, 8192, 16, bars=(Bar("us", 8.5, most=True),)),  # of 70B over eight devices
  "decode_h64_b64_cr4": Decode(64, 3, 3, 64, 4096, 8, cr=4, bars=(Bar("of_floor", 0.8),)),
  "decode_chains": Decode(2048, 2, 3, 64, 2048, bars=(Bar("of_floor", 0.7),), spread="chains"),
  "pages_chains": Decode(2048, 2, 3, 64, 2048, pages=16, ring=24, spread="chains"),
  "pages_halves": Decode(32, 8, 4, 128, 8192, pages=32, bars=(Bar("of_floor", 0.85),), spread="halves"),
  "pages_b32_cr8": Decode(32, 8, 4, 128, 8192, pages=32, bars=(Bar("contiguous_ratio", 0.9),)),
  "pages_h64_cr8": Decode(8, 8, 4, 64, 8192, 16, pages=32, bars=(Bar("contiguous_ratio", 0.9),)),
  "pages_int8_b32_cr8": Decode(32, 8, 4, 128, 8192, pages=32, stored="int8"),
  "pages_float8_b32_cr8": Decode(32, 8, 4, 128, 8192, pages=32, stored="float8_e4m3fn"),
  "pages_ring_b32_cr8": Decode(32, 8, 4, 128, 8192, pages=32, ring=257, bars=(Bar("contiguous_ratio", 0.9),)),
  "pages_ring_int8_b32_cr8": Decode(32, 8, 4, 128, 8192, pages=32, stored="int8", ring=257),
  "decode_mass_b32": Decode(32, 8, 4, 128, 1024, cr=1, mass=True, bars=MASS),
  "decode_mass_g8_b32": Decode(32, 8, 8, 128, 1024, cr=1, mass=True, bars=MASS),
  "decode_mass_h64_b32": Decode(32, 3, 3, 64, 1024, 16, cr=1, mass=True, bars=MASS),
  "pages_ring_mass_b32": Decode(32, 8, 4, 128, 1024, cr=1, pages=32, ring=512, mass=True, bars=MASS),
  "pages_ring_mass_int8_b32": Decode(
    32, 8, 4, 128, 1024, cr=1, pages=32, stored="int8", ring=512, mass=True, bars=MASS
  ),
  "prefill_cr8": Text("prefill", 1, 32768, 32, 8, 128, 256, bars=(Bar("dense_ratio", 5),)),
  "prefill_cr1": Text("prefill", 1, 32768, 32, 8, 128, 256, cr=1, bars=(Bar("dense_ratio", 0.9),)),
  "prefill_uneven": Text("prefill", 1, 32768, 32, 8, 128, 256, uneven=True),
  "prefill_h64": Text("prefill", 4, 4096, 9, 3, 64, 64, cr=4, bars=(Bar("dense_ratio", 2.5), Bar("of_floor", 0.65))),
  "prefill_h64_b32": Text(
    "prefill", 32, 1024, 9, 3, 64, 64, cr=4, bars=(Bar("dense_ratio", 2.5), Bar("of_floor", 0.65))
  ),
  "retrofit_t8192": Text(
    "retrofit", 1, 8192, 32, 8, 128, 256, bars=(Bar("dense_slowdown", 1.8, most=True), Bar("flex_ratio", 15))
  ),
  "retrofit_t32768": Text("retrofit", 1, 32768, 32, 8, 128, 256, bars=(Bar("flex_ratio", 13),)),
  "retrofit_h64": Text("retrofit", 2, 4096, 32, 8, 64, 64),
  "retrofit_n28": Text("retrofit", 2, 4096, 28, 4, 128, 256, bars=(Bar("dense_slowdown", 1.12, most=True),)),
  "decode_sinks": Decode(8, 8, 8, 64, 8192, 16, softmax="sinks"),
  "decode_softcap": Decode(32, 16, 2, 128, 8192, softmax="softcap"),
  "prefill_sinks": Text("prefill", 1, 8192, 64, 8, 64, 127, cr=4, softmax="sinks"),
  "prefill_softcap": Text("prefill", 1, 8192, 32, 16, 128, 256, cr=4, softmax="softcap"),
  "retrofit_sinks": Text("retrofit", 1, 4096, 64, 8, 64, 127, softmax="sinks"),
  "retrofit_softcap": Text("retrofit", 1, 4096, 32, 16, 128, 256, softmax="softcap"),
  "retrofit_age": Text("retrofit", 4, 4096, 9, 3, 64, 0, by_age=True),
  "decode_h256": Decode(8, 8, 2, 256, 8192, 8),  # Gemma 2 9B
  "pages_h256": Decode(8, 8, 2, 256, 8192, 8, pages=32, ring=272),
  "prefill_h256": Text("prefill", 1, 8192, 16, 8, 256, 256, cr=4),
}


def growth(small: bool) -> dict[str, tuple[str, float, Decode]]:
  """{name: (axis, value, workload)}: decode against compression, length and batch."""
  base = Decode(8, 8, 4, 128, 8192, 16)
  if small:
    base = base.shrunk()
  change = dataclasses.replace
  ratios = (1, 4) if small else (1, 2, 4, 8, 16)
  lengths = (128, 256) if small else tuple(2**n for n in range(10, 18))
  batches = (1, 2) if small else (1, 2, 4, 8, 16, 32, 64)
  # Up to 16 layers, 2 GiB in all, so that more is live than L2 holds.
  layers = lambda slots, batch: base.layers if small else int(np.clip(2**19 // (slots * batch), 1, 16))
  points = [("CR", cr, change(base, cr=cr)) for cr in ratios]
  points += [("length", s, change(base, slots=s, layers=layers(s, base.batch))) for s in lengths]
  points += [("batch", b, change(base, batch=b, layers=layers(base.slots, b))) for b in batches]
  return {f"growth_{axis.lower()}_{value:g}": (axis, value, work) for axis, value, work in points}


def dense_attention(q, k, v, causal: bool):
  """JAX's own: cuDNN on a GPU."""
  implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
  return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=implementation)


def chain(attend: Callable, layers: int, mass: bool = False, calls: int | None = None) -> Callable:
  """One program of `calls` calls `attend(q, layer, ...)`, default `CALLS`; each one's queries are the previous output.

  The call is a jitted function, so it is lowered once: lowering a kernel takes seconds. With `mass`, `attend` returns a
  second result, whose sum over the calls so far is computed before the next call, as a policy does.
  """
  attend = jax.jit(attend)

  def run(q, *args):
    score = None
    for number in range(calls or CALLS):
      q = attend(q, jnp.int32(number % layers), *args)
      if mass:
        q, new = q
        score = new if score is None else jax.tree.map(jnp.add, score, new)
        q, score = lax.optimization_barrier((q, score))
    return (q, score) if mass else q

  return jax.jit(run)


def queries(work: Decode) -> jax.Array:
  return jax.random.normal(jax.random.key(0), (work.batch, work.heads * work.group, work.size), jnp.bfloat16)


@functools.cache
def dense_decode(batch: int, heads: int, group: int, size: int, slots: int, layers: int) -> float:
  """Microseconds of dense attention over all slots, keys and values in separate arrays as cuDNN wants them."""
  shape = batch, slots, heads, size
  keys = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(layers)]
  values = [k + 1 for k in keys]

  @jax.jit
  def run(q, keys, values):
    for number in range(CALLS):
      q = dense_attention(q[:, None], keys[number % layers], values[number % layers], False)[:, 0]
    return q

  return bench.clock(run, queries(Decode(batch, heads, group, size, slots)), keys, values) / CALLS * 1e6


def contiguous(work: Decode) -> jax.Array:
  """A cache [L, B, K, S, 2H] of equal layers."""
  shape = work.layers, work.batch, work.heads, work.slots, 2 * work.size
  return jax.jit(lambda: jnp.broadcast_to(jax.random.normal(jax.random.key(1), shape[1:], jnp.bfloat16), shape))()


def paged(work: Decode, lengths: np.ndarray) -> Pages:
  """An archive whose pages fill the pool in random order."""
  page, most = work.pages, work.slots // work.pages
  used = -(-lengths // page)
  held = np.arange(most) < used[..., None]
  number = int(used.sum())
  order = np.random.default_rng(1).permutation(work.layers * number).reshape(work.layers, number)
  table = np.full((work.layers, *held.shape), -1, np.int32)
  table[:, held] = order
  make = lambda key: jax.random.normal(key, (work.layers * number, page, 2 * work.size), jnp.bfloat16)
  pool, scales = jax.jit(make)(jax.random.key(1)), None
  if work.stored != "bfloat16":
    pool = jax.jit(lambda x: (x * 30).astype(jnp.dtype(work.stored)))(pool)
    scales = jnp.full((len(pool), 1, 2 * page), 1 / 30, jnp.float32)
  return Pages(pool, jnp.asarray(table), jnp.asarray(lengths), scales)


def decode_arguments(work: Decode) -> tuple[tuple, np.ndarray]:
  """((cache or None, its live slots or None, pages or None), live slots of each head in all)."""
  lengths = work.lengths()
  if not work.pages:
    return (contiguous(work), jnp.asarray(lengths), None), lengths
  in_ring = np.minimum(lengths, work.ring)
  pages = paged(work, lengths - in_ring)
  if not work.ring:
    return (None, None, pages), lengths
  rings = contiguous(dataclasses.replace(work, slots=-(-work.ring // 16) * 16))  # whole tiles of memory
  return (rings, jnp.asarray(in_ring), pages), lengths


def attend_with(implementation: str | None, options: dict) -> Callable:
  """`decode_attention` of an implementation, called with the arguments of `decode_arguments`."""
  ours = functools.partial(decode.decode_attention, implementation=implementation, **options)
  return lambda q, layer, kv, lengths, pages: ours(q, kv, layer, lengths, pages=pages)


def decode_us(
  work: Decode, implementation: str | None, attend: Callable | None = None, calls: int | None = None
) -> tuple[float, np.ndarray]:
  """(microseconds of the kernel, the heads' lengths); `attend` replaces an implementation, `calls` is of `chain`."""
  args, lengths = decode_arguments(work)
  if attend is None:
    run = attend_with(implementation, work.options())
  else:
    run = lambda q, layer, kv, lengths, pages: attend(q, kv, layer, lengths, pages=pages)
  program = chain(run, work.layers, work.mass, calls)
  return bench.clock(program, queries(work), *args) / (calls or CALLS) * 1e6, lengths


def decode_difference(work: Decode, implementation: str | None) -> dict[str, float]:
  """The largest difference from the XLA implementation, relative to the largest value; and of mass, not relative."""
  args, _ = decode_arguments(work)
  outs = [jax.jit(attend_with(x, work.options()))(queries(work), jnp.int32(1), *args) for x in (implementation, "xla")]
  ours, other = ((out[0] if work.mass else out).astype(jnp.float32) for out in outs)
  found = {"difference": float(jnp.abs(ours - other).max() / jnp.abs(other).max())}
  if work.mass:
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), *(out[1] for out in outs))
    found["mass_difference"] = max(jax.tree.leaves(apart))
  return found


def our_decode(work: Decode, bandwidth: float, implementation: str | None) -> dict[str, float]:
  """Microseconds of the kernel, of the floor and, for pages, of a contiguous cache; `calls` of a chain.

  With mass, sinks or a cap, the kernel without them and XLA with them are measured instead of a contiguous cache.
  """
  us, lengths = decode_us(work, implementation)
  slot = format_of(work.stored).slot_bytes(work.size)
  in_ring = float(np.minimum(lengths, work.ring).sum())
  floor = (in_ring * 4 * work.size + (float(lengths.sum()) - in_ring) * slot) / bandwidth * 1e6
  row = {"us": us, "floor_us": floor, "of_floor": floor / us, "calls": CALLS}
  if work.mass or work.softmax:
    plain, _ = decode_us(dataclasses.replace(work, mass=False, softmax=""), implementation)
    xla, _ = decode_us(work, "xla", calls=FEW_CALLS)
    return row | beside(us, plain, xla)
  if work.pages:
    other, _ = decode_us(dataclasses.replace(work, pages=0, ring=0), implementation)
    row |= {"contiguous_us": other, "contiguous_ratio": other / us}
  return row


def beside(us: float, plain: float, xla: float) -> dict[str, float]:
  """The figures of a case beside those of the kernel without what it adds, and of XLA with it."""
  return {"plain_us": plain, "slowdown": us / plain, "xla_us": xla, "xla_ratio": xla / us}


def measure_decode(work: Decode, bandwidth: float, implementation: str | None, check: bool = True) -> dict[str, float]:
  """`our_decode` with dense attention's time; with `check` also the difference from XLA's result."""
  row = our_decode(work, bandwidth, implementation)
  dense = dense_decode(work.batch, work.heads, work.group, work.size, work.slots, work.layers)
  row |= {"dense_us": dense, "dense_ratio": dense / row["us"]}
  return row | (decode_difference(work, implementation) if check else {})


@functools.cache
def inputs(batch: int, tokens: int, queries: int, heads: int, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Random q [B, T, N, H], k and v [B, T, K, H]."""
  keys = jax.random.split(jax.random.key(0), 3)
  counts = queries, heads, heads
  q, k, v = (
    jax.random.normal(key, (batch, tokens, n, size), jnp.bfloat16) for key, n in zip(keys, counts, strict=True)
  )
  return q, k, v


def inputs_of(work: Text) -> tuple[jax.Array, jax.Array, jax.Array]:
  return inputs(work.batch, work.tokens, work.queries, work.heads, work.size)


def evictions(work: Text) -> tuple[np.ndarray, np.ndarray]:
  """First and last positions [B, K, T] at the CR of the workload, on average over heads; CR 1 evicts nothing."""
  position = np.broadcast_to(np.arange(work.tokens, dtype=np.int32), (work.batch, work.heads, work.tokens))
  outside = work.tokens - work.window - 1
  held = np.full((work.batch, work.heads), work.tokens / work.cr)
  if work.uneven:
    held = bench.ragged_lengths(work.batch, work.heads, work.tokens, work.cr)
  keep = np.ones(held.shape) if work.cr == 1 else np.maximum(held - work.window - 1, 0) / max(outside, 1)
  kept = np.random.default_rng(0).random(position.shape) < keep[..., None]
  return position, np.where(kept, prefill.NEVER, position + np.int32(work.window))


def prefill_us(work: Text, attend: Callable) -> tuple[float, float]:
  """(microseconds of the kernel and its preparation, visible pairs over those of dense causal attention)."""
  q, k, v = inputs_of(work)
  first, last = evictions(work)
  q_pos = np.broadcast_to(np.arange(work.tokens, dtype=np.int32), (work.batch, work.tokens))
  keys, values = (jnp.swapaxes(x, 1, 2) for x in (k, v))
  us = bench.clock(jax.jit(attend), q, keys, values, *(jnp.asarray(x) for x in (q_pos, first, last))) * 1e6
  visible = np.minimum(last, work.tokens - 1).astype(np.int64) - first + 1
  return us, float(visible.mean() * 2 / (work.tokens + 1))


def measure_prefill(work: Text, implementation: str | None) -> dict[str, float]:
  """Microseconds of the kernel, of dense causal attention, and of the floor: dense time for the visible pairs alone."""

  def timed(name: str | None, **options) -> tuple[float, float]:
    return prefill_us(work, functools.partial(prefill.prefill_attention, implementation=name, **options))

  us, visible = timed(implementation, **work.options())
  dense = bench.clock(jax.jit(lambda q, k, v: dense_attention(q, k, v, True)), *inputs_of(work)) * 1e6
  floor = {"visible": visible, "floor_us": dense * visible, "of_floor": dense * visible / us}
  row = {"us": us, "dense_us": dense, "dense_ratio": dense / us} | floor
  if work.softmax:
    row |= beside(us, timed(implementation)[0], timed("xla", **work.options())[0])
  return row


def retrofit_us(work: Text, attend: Callable) -> tuple[float, float]:
  """Microseconds of `attend(q, k, v, bias)`, forward alone and with the backward pass."""
  q, k, v = inputs_of(work)
  dout = jax.random.normal(jax.random.key(1), q.shape, q.dtype)
  bias = jax.nn.log_sigmoid(4 * jax.random.normal(jax.random.key(2), (work.batch, work.heads, work.tokens)))

  def both(q, k, v, bias, dout):
    out, pull = jax.vjp(attend, q, k, v, bias)
    return out, *pull(dout)

  forward = bench.clock(jax.jit(attend), q, k, v, bias) * 1e6
  return forward, bench.clock(jax.jit(both), q, k, v, bias, dout) * 1e6


def measure_retrofit(work: Text, implementation: str | None, flex: bool) -> dict:
  """Microseconds forward and both ways: the kernel, dense causal attention, and FlexAttention with the same bias."""

  def timed(name: str | None, **options) -> tuple[float, float]:
    ours = functools.partial(retrofit.window_bias_attention, implementation=name, **options)
    return retrofit_us(work, lambda q, k, v, bias: ours(q, k, v, bias, work.window))

  forward, us = timed(implementation, **work.options())
  dense_forward, dense = retrofit_us(work, lambda q, k, v, bias: dense_attention(q, k, v, True))
  row = {
    "us": us, "forward_us": forward, "dense_us": dense, "dense_forward_us": dense_forward, "dense_ratio": dense / us,
    "dense_slowdown": us / dense,
  }  # fmt: skip
  if work.softmax or work.by_age:
    return row | beside(us, timed(implementation)[1], timed("xla", **work.options())[1])
  if flex:
    row |= measure_flex(work)
    row |= {f"{name}_ratio": row[f"{name}_us"] / us for name in ("flex", "flex_blocks") if f"{name}_us" in row}
  return row


def measure_flex(work: Text, timeout: float = 300.0) -> dict:
  """PyTorch's FlexAttention with the same bias, in a separate process: {"flex_us", ...} or {"flex_skipped": why}."""
  shape = {name: getattr(work, name) for name in ("batch", "tokens", "queries", "heads", "size", "window")}
  row = cases.apart("experiments.bench.flex_attention", shape, timeout)
  return {"flex_skipped": row["skipped"]} if "skipped" in row else row
