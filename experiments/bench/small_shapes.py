"""Decode and prefill kernels on an H200: new paths against XLA, and old sizes against new ones, in under four minutes.

    PYTHONPATH=. python3.12 kernels_gpu.py        # from the tree's root; writes $OUT/kernels.json

Each case is a process: it compiles beside the others and measures alone, under a lock. What dies harms no other case.
"""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time

OUT = os.environ.get("OUT", "/tmp")
LIMIT = float(os.environ.get("KERNELS_SECONDS", "235"))
BEGIN = float(os.environ.get("KERNELS_BEGIN", "0")) or time.time()
FOLDER = os.environ.get("KERNELS_FOLDER", "")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
SMALL = bool(os.environ.get("KERNELS_SMALL"))  # to try the script itself where there is no GPU


def say(case, **row):
  row = {"case": case, "at": round(time.time() - BEGIN, 1), **row}
  with open(os.path.join(FOLDER, case.split("/")[0] + ".jsonl"), "a") as file:
    file.write(json.dumps(row) + "\n")


class Inline:
  """A pool without threads, for SMALL."""

  def __init__(self, _):
    pass

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def submit(self, f, *args):
    from concurrent.futures import Future

    future = Future()
    try:
      future.set_result(f(*args))
    except Exception as error:
      future.set_exception(error)
    return future


class Lock:
  """The device is measured by one process at a time."""

  def __enter__(self):
    self.file = open(os.path.join(FOLDER, "lock"), "w")
    fcntl.flock(self.file, fcntl.LOCK_EX)

  def __exit__(self, *_):
    self.file.close()


# --- decode ---------------------------------------------------------------------------------------------------------
# name: (batch, heads, group, h, slots, layers, lengths, page, ring, mass, {variant: Blocks' arguments})
def decode_cases():
  B = lambda *a, **k: (a, k)
  return {
    "b32k1": (32, 1, 8, 128, 8192, 16, 8, 0, 0, False, {
      "old": B(64, 3, 128, 264), "c8": B(64, 2, 128, 264, cluster=8), "c4": B(64, 3, 128, 264, cluster=4),
      "c8 s3": B(64, 3, 128, 264, cluster=8), "split256": B(64, 3, 256, 264)}),
    "b8k8h64": (8, 8, 4, 64, 8192, 16, 8, 0, 0, False, {
      "old": B(64, 2, 256, 528), "tuned": B(64, 2, 256, 396), "c8": B(64, 2, 128, 264, cluster=8),
      "c4": B(64, 3, 128, 264, cluster=4), "c4 s6": B(64, 6, 128, 264, cluster=4)}),
    "b2048k2": (2048, 2, 3, 64, 2048, 2, "chains", 0, 0, False, {
      "old": B(64, 3, 1024, 264, rest=256, merged=4), "whole": B(64, 3, 2048, 264, rest=2048),
      "whole 396": B(64, 3, 2048, 396, rest=2048), "whole 528": B(64, 2, 2048, 528, rest=2048),
      "c2": B(64, 2, 128, 264, cluster=2)}),
    "b1k8s32k": (1, 8, 4, 128, 32768, 16, 8, 0, 0, False, {
      "old": B(64, 3, 256, 264), "c8": B(64, 3, 128, 264, cluster=8), "c8 s6": B(64, 6, 128, 264, cluster=8)}),
    "b64k3h64": (64, 3, 3, 64, 4096, 8, 4, 0, 0, False, {
      "old": B(64, 2, 512, 528), "c2": B(64, 3, 128, 264, cluster=2), "c4": B(64, 2, 128, 264, cluster=4),
      "c4 s3": B(64, 3, 128, 264, cluster=4), "w396": B(64, 3, 512, 396), "split1024": B(64, 2, 1024, 528, rest=256)}),
    "mass": (32, 8, 4, 128, 1024, 8, 1, 0, 0, True, {
      "old": B(64, 3, 128, 264), "whole": B(64, 3, 1024, 264, rest=1024), "c2": B(64, 2, 128, 264, cluster=2)}),
    "plain1024": (32, 8, 4, 128, 1024, 8, 1, 0, 0, False, {
      "old": B(64, 3, 128, 264), "whole": B(64, 3, 1024, 264, rest=1024), "c2": B(64, 2, 128, 264, cluster=2)}),
    "b2048k2pages": (2048, 2, 3, 64, 2048, 2, "chains", 16, 24, False, {
      "old": B(64, 3, 1024, 264, rest=256, merged=4), "whole": B(64, 3, 2048, 264, rest=2048),
      "whole 396": B(64, 2, 2048, 396, rest=2048)}),
    "fullheads": (32, 8, 4, 128, 8192, 2, "half", 32, 0, False, {
      "old": B(64, 3, 512, 264), "1024": B(64, 3, 1024, 264, rest=256, merged=4),
      "2048": B(64, 3, 2048, 264, rest=256, merged=4), "s2": B(64, 2, 1024, 264, rest=256, merged=4)}),
    "fullheads_contiguous": (32, 8, 4, 128, 8192, 2, "half", 0, 0, False, {
      "old": B(64, 3, 1024, 264, rest=256, merged=4)}),
    "b8k8h64pages": (8, 8, 4, 64, 8192, 16, 8, 32, 0, False, {
      "old": B(64, 2, 256, 528), "c8": B(64, 2, 128, 264, cluster=8)}),
    # kernels launched early: a process of their own, in case the runtime refuses them
    "b32k1/early": (32, 1, 8, 128, 8192, 16, 8, 0, 0, False, {
      "old": B(64, 3, 128, 264), "early": B(64, 3, 128, 264, early=True),
      "c8 early": B(64, 2, 128, 264, cluster=8, early=True)}),
    "b8k8h64/early": (8, 8, 4, 64, 8192, 16, 8, 0, 0, False, {
      "old": B(64, 2, 256, 528), "early": B(64, 2, 256, 528, early=True),
      "c8 early": B(64, 2, 128, 264, cluster=8, early=True)}),
    "b1k8s32k/c16": (1, 8, 4, 128, 32768, 16, 8, 0, 0, False, {
      "old": B(64, 3, 256, 264), "c16 s2": B(64, 2, 128, 264, cluster=16), "c16 s3": B(64, 3, 128, 264, cluster=16)}),
  }  # fmt: skip


def lengths_of(np, bench, batch, heads, slots, kind):
  if kind == "chains":
    return np.random.default_rng(0).integers(min(60, slots), min(300, slots) + 1, (batch, heads)).astype(np.int32)
  if kind == "half":  # heads that keep everything beside heads that keep a window
    return np.broadcast_to(np.where(np.arange(heads) % 2 == 0, slots, min(257, slots)), (batch, heads)).astype(np.int32)
  return bench.ragged_lengths(batch, heads, slots, kind)


def decode(name):
  import jax
  import jax.numpy as jnp
  import numpy as np
  from concurrent.futures import ThreadPoolExecutor

  from pallas_kernels.common import bench
  from pallas_kernels.decode import Pages, gpu, xla

  batch, heads, group, h, slots, layers, kind, page, ring, mass, variants = decode_cases()[name]
  if SMALL:
    batch, slots, layers = min(batch, 2), min(slots, 256), 2
  lengths = lengths_of(np, bench, batch, heads, slots, kind)
  in_ring = np.minimum(lengths, 17 if page else slots) * (ring > 0 or not page)
  in_pages = lengths - in_ring
  contiguous = ring if page else slots
  struct, i32 = jax.ShapeDtypeStruct, jnp.int32
  q = struct((batch, heads * group, h), jnp.bfloat16)
  kv = struct((layers, batch, heads, contiguous, 2 * h), jnp.bfloat16) if contiguous else None
  pages = None
  if page:
    most = slots // page
    used = -(-in_pages // page)
    number = int(used.sum())
    pages = Pages(
      struct((layers * number, page, 2 * h), jnp.bfloat16), struct((layers, batch, heads, most), i32),
      struct((batch, heads), i32),
    )
  lens = struct((batch, heads), i32) if contiguous else None
  calls = 4 if SMALL else 64

  def chain(attend, calls):
    attend = jax.jit(attend)

    def run(q, kv, lens, pages):
      first = score = None
      for n in range(calls):
        out = attend(q, i32(n % layers), kv, lens, pages)
        first = out if n == 0 else first
        if mass:
          q, new = out
          score = new if score is None else jax.tree.map(jnp.add, score, new)
          q, score = jax.lax.optimization_barrier((q, score))
        else:
          q = out
      return q, score, first

    return jax.jit(run)

  def compiled(blocks):
    begin = time.time()
    run = chain(
      lambda q, layer, kv, lens, pages: gpu.decode_attention(q, kv, layer, lens, pages=pages, mass=mass, blocks=blocks),
      calls,
    )
    return run.lower(q, kv, lens, pages).compile(), time.time() - begin

  def reference():
    run = lambda q, kv, lens, pages: xla.decode_attention(q, kv, i32(0), lens, pages=pages, mass=mass)
    return jax.jit(run).lower(q, kv, lens, pages).compile()

  with ThreadPoolExecutor(4) as pool:
    jobs = {x: pool.submit(compiled, gpu.Blocks(*a, **k)) for x, (a, k) in variants.items()}
    other = pool.submit(reference)
    programs = {}
    for x, job in jobs.items():
      try:
        programs[x], seconds = job.result()
        say(name, variant=x, compiled=round(seconds, 1))
      except Exception as error:
        say(name, variant=x, error=repr(error)[:600])
    try:
      other = other.result()
    except Exception as error:
      say(name, variant="xla", error=repr(error)[:300])
      other = None
  with Lock():
    make = lambda x, key: jax.jit(lambda: jax.random.normal(jax.random.key(key), x.shape[1:], x.dtype))()
    args_q = jax.random.normal(jax.random.key(0), q.shape, q.dtype)
    args_kv = None if kv is None else jax.jit(lambda x: jnp.broadcast_to(x, kv.shape))(make(kv, 1))
    args_pages = None
    if page:
      order = np.random.default_rng(1).permutation(layers * number).reshape(layers, number)
      table = np.full((layers, batch, heads, most), -1, np.int32)
      table[:, np.arange(most) < used[..., None]] = order
      pool = jax.jit(lambda: jax.random.normal(jax.random.key(2), pages.pool.shape, jnp.bfloat16))()
      args_pages = Pages(pool, jnp.asarray(table), jnp.asarray(in_pages))
    args = args_q, args_kv, None if lens is None else jnp.asarray(in_ring), args_pages
    want = None if other is None else jax.block_until_ready(other(*args))
    bytes_read = int(lengths.sum()) * 4 * h
    once = lambda program: jax.block_until_ready(program(*args)[2])
    for x, program in programs.items():
      try:
        got, again = once(program), once(program)
        same = all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True))
        row = {"same": same}
        if want is not None:
          a, b = (jax.tree.leaves(t)[0].astype(jnp.float32) for t in (got, want))
          row["error"] = None
          row["difference"] = float(jnp.abs(a - b).max() / jnp.abs(b).max())
          if mass:
            row["mass_difference"] = float(jnp.abs(jax.tree.leaves(got)[1] - jax.tree.leaves(want)[1]).max())
        us = bench.clock(program, *args, seconds=0.08) / calls * 1e6
        say(name, variant=x, us=us, bytes=bytes_read, blocks=str(variants[x]), **row)
      except Exception as error:
        say(name, variant=x, error=repr(error)[:600])


# --- checks at odd shapes -------------------------------------------------------------------------------------------
def checks(name):
  import jax
  import jax.numpy as jnp
  import numpy as np

  from pallas_kernels.common import bench
  from pallas_kernels.decode import Pages, gpu, xla

  rng = np.random.default_rng(0)
  B = gpu.Blocks
  cases = [
    ("c8", 3, 2, 3, 64, 712, 0, None, B(64, 2, 128, 264, cluster=8)),
    ("c4 g8 h128", 3, 3, 8, 128, 1032, 0, None, B(64, 3, 128, 264, cluster=4)),
    ("c2 ring int8 pages", 4, 2, 4, 128, 264, 32, "int8", B(64, 2, 128, 264, cluster=2)),
    ("c4 pages", 4, 2, 1, 64, 0, 16, None, B(64, 3, 128, 264, cluster=4)),
    ("whole", 5, 3, 3, 64, 512, 0, None, B(64, 3, 512, 264, rest=512)),
    ("whole ring pages", 5, 3, 2, 128, 72, 16, None, B(64, 3, 1024, 264, rest=1024)),
    ("listed", 5, 3, 3, 64, 512, 0, None, B(64, 3, 128, 264)),
  ]
  for x, b, k, g, h, slots, page, stored, blocks in cases:
    try:
      lengths = rng.integers(0, slots + 1, (b, k)).astype(np.int32) if slots else None
      if slots:
        lengths.flat[:4] = 0, 1, slots, 65
        kv = rng.normal(size=(2, b, k, slots, 2 * h)).astype(np.float32)
        kv = np.where(np.arange(slots)[None, None, None, :, None] < lengths[None, ..., None, None], kv, np.nan)
      pages = None
      if page:
        most = 24
        held = rng.integers(0, most * page + 1, (b, k)).astype(np.int32)
        held.flat[:3] = 0, most * page, 1
        table = rng.permutation(2 * b * k * most).reshape(2, b, k, most).astype(np.int32)
        pool, scales = rng.normal(size=(2 * b * k * most, page, 2 * h)), None
        if stored:
          pool, scales = np.clip(pool * 30, -120, 120), jnp.full((len(pool), 1, 2 * page), 1 / 30, jnp.float32)
        pages = Pages(
          jnp.asarray(pool, jnp.dtype(stored or "bfloat16")), jnp.asarray(table), jnp.asarray(held), scales
        )
      q = jnp.asarray(rng.normal(size=(b, k * g, h)), jnp.bfloat16)
      kv, lens = (jnp.asarray(kv, jnp.bfloat16), jnp.asarray(lengths)) if slots else (None, None)
      run = lambda f, **o: jax.jit(
        lambda q, kv, lens, pages: f(q, kv, jnp.int32(1), lens, pages=pages, lse=True, mass=True, **o)
      )
      ours = run(gpu.decode_attention, blocks=blocks)
      got, again = (jax.block_until_ready(ours(q, kv, lens, pages)) for _ in range(2))
      want = run(xla.decode_attention)(q, kv, lens, pages)
      diff = lambda a, b: float(jnp.nan_to_num(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)), nan=0.0).max())
      finite = all(bool(jnp.isfinite(t).all()) for t in jax.tree.leaves((got[0], got[2])))
      same = all(bool(jnp.array_equal(a, b)) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True))
      infinite = bool(jnp.array_equal(jnp.isneginf(got[1]), jnp.isneginf(want[1])))
      masses = [diff(a, b) for a, b in zip(jax.tree.leaves(got[2]), jax.tree.leaves(want[2]), strict=True)]
      # plain, without log-sum-exp: the same bits
      plain = jax.jit(lambda q, kv, lens, pages: gpu.decode_attention(q, kv, jnp.int32(1), lens, pages=pages, blocks=blocks))
      say(name, variant=x, difference=diff(got[0], want[0]), lse=diff(got[1], want[1]), mass_difference=max(masses),
          finite=finite, same=same, empty=infinite,
          plain_same=bool(jnp.array_equal(plain(q, kv, lens, pages), got[0])))  # fmt: skip
    except Exception as error:
      say(name, variant=x, error=repr(error)[:600])
  with Lock():
    say("bandwidth", variant="read", bytes_per_s=bench.read_bandwidth())


# --- prefill --------------------------------------------------------------------------------------------------------
def old_prefill():
  """The kernel before: pads queries to whole tiles, one tile a block of threads."""
  import types

  module = types.ModuleType("pallas_kernels.prefill.gpu_old")
  sys.modules[module.__name__] = module
  exec(compile(OLD_PREFILL, "gpu_old.py", "exec"), module.__dict__)
  return module


def prefill_case(name):
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"  # tunes on the device
  import dataclasses
  import functools
  from concurrent.futures import ThreadPoolExecutor

  import jax
  import jax.numpy as jnp
  import numpy as np

  from pallas_kernels.common import bench
  from pallas_kernels.prefill import NEVER, gpu, xla
  from pallas_kernels.prefill.gpu_common import Tile, default_blocks

  batch, tokens = (4, 4096) if name == "prefill4096" else (32, 1024)
  if name == "prefill32k":
    batch, tokens = 1, 32768
  n, k, h, window, cr = (9, 3, 64, 64, 4) if name != "prefill32k" else (32, 8, 128, 256, 8)
  if SMALL:
    batch, tokens, n, k = 1, 96, 3, 1
  keys = jax.random.split(jax.random.key(0), 3)
  position = np.broadcast_to(np.arange(tokens, dtype=np.int32), (batch, k, tokens))
  keep = max(tokens / cr - window - 1, 0) / max(tokens - window - 1, 1)
  kept = np.random.default_rng(0).random(position.shape) < keep
  last = np.where(kept, NEVER, position + np.int32(window))
  visible = float((np.minimum(last, tokens - 1).astype(np.int64) - position + 1).mean() * 2 / (tokens + 1))
  struct = jax.ShapeDtypeStruct
  of_q, of_kv = struct((batch, tokens, n, h), jnp.bfloat16), struct((batch, k, tokens, h), jnp.bfloat16)
  bounds, of_pos = struct((batch, k, tokens), jnp.int32), struct((batch, tokens), jnp.int32)
  shapes = of_q, of_kv, of_kv, of_pos, bounds, bounds
  tile, base = Tile.of(n // k), default_blocks(h)
  before = old_prefill()
  cores = {"workers": 132}
  variants = {
    "old": (before, {}), "new": (gpu, {}), "workers": (gpu, cores), "kv64 workers": (gpu, cores | {"kv": 64}),
    "s2": (gpu, {"stages": 2}), "kv64": (gpu, {"kv": 64}), "kv64 s6 workers": (gpu, cores | {"kv": 64, "stages": 6}),
  }  # fmt: skip
  if name == "prefill32k" or SMALL:
    variants = {x: variants[x] for x in ("old", "new", "workers")}

  def compiled(x):
    module, change = variants[x]
    blocks = dataclasses.replace(base, **change)
    prepare = functools.partial(module._prepare, tile, blocks, False)
    attend = jax.jit(functools.partial(module._attend, tile, blocks, False))
    whole = jax.jit(functools.partial(module.prefill_attention, blocks=blocks))
    prepared = jax.eval_shape(prepare, *shapes)[0]
    return (
      whole.lower(*shapes).compile(), jax.jit(lambda *a: prepare(*a)[0]).lower(*shapes).compile(),
      attend.lower(*prepared).compile(),
    )  # fmt: skip

  def dense(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=None if SMALL else "cudnn")

  programs = {}
  with (Inline if SMALL else ThreadPoolExecutor)(4) as pool:
    as_rows = struct((batch, tokens, k, h), jnp.bfloat16)
    jobs = {x: pool.submit(compiled, x) for x in variants}
    of_dense = pool.submit(lambda: jax.jit(dense).lower(of_q, as_rows, as_rows).compile())
    of_xla = pool.submit(lambda: jax.jit(lambda *a: xla.prefill_attention(*a)).lower(*shapes).compile())
    for x, job in jobs.items():
      try:
        programs[x] = job.result()
      except Exception as error:
        say(name, variant=x, error=repr(error)[:600])
    of_dense, of_xla = of_dense.result(), of_xla.result()
  with Lock():
    q, keys_, values = (jax.random.normal(x, (batch, tokens, m, h), jnp.bfloat16) for x, m in zip(keys, (n, k, k)))
    say(name, variant="dense", us=bench.clock(of_dense, q, keys_, values, seconds=0.1) * 1e6, visible=visible)
    keys_, values = (jnp.swapaxes(x, 1, 2) for x in (keys_, values))
    q_pos = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))
    args = q, keys_, values, q_pos, jnp.asarray(position), jnp.asarray(last)
    want = of_xla(*args).astype(jnp.float32) if tokens * batch <= 2**15 else None
    for x, (whole, prepare, attend) in programs.items():
      try:
        got, again = whole(*args), whole(*args)
        row = {"same": bool(jnp.array_equal(got, again))}
        if want is not None:
          row["difference"] = float(jnp.abs(got.astype(jnp.float32) - want).max() / jnp.abs(want).max())
        us = bench.clock(whole, *args, seconds=0.1) * 1e6
        prepared = jax.block_until_ready(prepare(*args))
        kernel = bench.clock(attend, *prepared, seconds=0.1) * 1e6
        plan = bench.clock(prepare, *args, seconds=0.05) * 1e6
        say(name, variant=x, us=us, kernel_us=kernel, prepare_us=plan, visible=visible, **row)
      except Exception as error:
        say(name, variant=x, error=repr(error)[:600])


def child(name):
  if SMALL:
    import jax

    from pallas_kernels.common import bench, compat
    from pallas_kernels.decode import gpu, xla

    bench.clock = lambda f, *args, **_: jax.block_until_ready(f(*args)) is None or 1e-6
    bench.read_bandwidth = lambda: 1e12
    gpu.decode_attention = lambda *args, blocks, **options: xla.decode_attention(*args, **options)
    if name.startswith("prefill"):
      with compat.gpu_interpret_mode():
        return prefill_case(name)
  if name == "checks":
    checks(name)
  elif name.startswith("prefill"):
    prefill_case(name)
  else:
    decode(name)


ORDER = [
  "checks", "b32k1", "b8k8h64", "b2048k2", "prefill4096", "b64k3h64", "b1k8s32k", "mass", "plain1024", "b2048k2pages",
  "b8k8h64/early", "fullheads", "prefill1024", "b32k1/early", "fullheads_contiguous", "b8k8h64pages", "b1k8s32k/c16",
  "prefill32k",
]  # fmt: skip


def main():
  folder = tempfile.mkdtemp()
  only = sys.argv[1:] or ORDER
  env = os.environ | {"KERNELS_BEGIN": str(BEGIN), "KERNELS_FOLDER": folder}
  waiting, running = list(only), {}
  at_once = int(os.environ.get("KERNELS_AT_ONCE", "9"))
  while (waiting or running) and time.time() - BEGIN < LIMIT:
    while waiting and len(running) < at_once:
      name = waiting.pop(0)
      log = open(os.path.join(folder, name.replace("/", "_") + ".log"), "w")
      running[name] = subprocess.Popen([sys.executable, __file__, "--child", name], env=env, stdout=log, stderr=log)
    for name, process in list(running.items()):
      if process.poll() is not None:
        del running[name]
        if process.returncode:
          tail = open(os.path.join(folder, name.replace("/", "_") + ".log")).read()[-700:]
          print(f"{name}: ended with {process.returncode}: {tail}", flush=True)
    time.sleep(0.2)
  for process in running.values():
    process.kill()
  rows = []
  for file in sorted(os.listdir(folder)):
    if file.endswith(".jsonl"):
      rows += [json.loads(line) for line in open(os.path.join(folder, file))]
  with open(os.path.join(OUT, "kernels.json"), "w") as file:
    json.dump({"rows": rows, "unfinished": [*waiting, *running]}, file, indent=1)
  report(rows, [*waiting, *running])
  print(f"{time.time() - BEGIN:.0f} s; {OUT}/kernels.json")


def report(rows, unfinished):
  bandwidth = next((r["bytes_per_s"] for r in rows if "bytes_per_s" in r), None)
  print(f"read bandwidth: {(bandwidth or 0) / 1e12:.2f} TB/s; unfinished: {unfinished}")
  short = lambda x: f"{x:.4g}" if isinstance(x, float) else str(x)
  names = list(dict.fromkeys(r["case"] for r in rows))
  for name in [*(x for x in ORDER if x in names), *(x for x in names if x not in ORDER)]:
    own = [r for r in rows if r["case"] == name and "compiled" not in r]
    old = next((r["us"] for r in own if r["variant"] == "old" and "us" in r), None)
    dense = next((r["us"] for r in own if r["variant"] == "dense" and "us" in r), None)
    print(f"\n{name}")
    for r in own:
      if r.get("error"):
        print(f"  {r['variant']:16} FAILED {r['error'][:300]}")
        continue
      parts = [f"{r['variant']:16}"]
      if "us" in r:
        parts.append(f"{r['us']:8.2f} us")
        if old:
          parts.append(f"old/this {old / r['us']:.3f}")
        if bandwidth and "bytes" in r:
          parts.append(f"of floor {r['bytes'] / bandwidth * 1e6 / r['us']:.3f}")
        if dense:
          parts.append(f"dense/this {dense / r['us']:.3f} of visible {dense * r['visible'] / r['us']:.3f}")
      keys = "kernel_us", "prepare_us", "difference", "mass_difference", "lse", "finite", "empty", "same", "plain_same"
      parts += [f"{key} {short(r[key])}" for key in keys if key in r]
      print("  " + "  ".join(parts))


OLD_PREFILL = r'''
"""Prefill attention on Hopper GPUs with Pallas Mosaic GPU: the forward kernel.

The keys that any query sees are gathered first (`plan`), so that far blocks are dense. The kernel follows
FlashAttention-3 (arXiv 2407.08608): in each block two warpgroups compute on 64 rows each, and a third one feeds them
keys and values by TMA. A tile's 128 rows are several query heads of one KV head, with `Tile.queries` neighbouring
queries of each: the fewer queries a tile spans, the less it visits of the band that only some of its rows see. Blocks
that all queries of a tile see come first and need no mask; in the others, at the diagonal and in the band, each pair is
tested.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common import compat, dispatch, pipeline, tuned
from pallas_kernels.common.compat import plgpu
from pallas_kernels.common.pipeline import WARPGROUPS
from pallas_kernels.common.softmax import LOG2E, LOWEST
from pallas_kernels.common.warpgroup import ROWS
from pallas_kernels.prefill import gpu_mass
from pallas_kernels.prefill import plan as planning
from pallas_kernels.prefill.gpu_common import GRAIN, Blocks, Tile, default_blocks
from pallas_kernels.prefill.plan import KEPT, START, STOP, WHOLE


def prefill_attention(
  q, keys, values, q_pos, k_first, k_last, *, lse=False, query_weights=None, softcap=None, blocks: Blocks | None = None
):
  """See `api.prefill_attention`; bfloat16 or float16, head size 64 or 128.

  Raises:
    NotImplementedError: another device, dtype or head size.
  """
  compat.require_hopper()
  dispatch.supports_no_softcap(softcap)
  _, t, n, h = q.shape
  dispatch.supports(("bfloat16", "float16"), q=q, keys=keys, values=values)
  dispatch.supports_head_size(h)
  blocks = blocks or tuned.blocks("prefill", tuned.shape_class(H=h), default_blocks(h))
  tile, weighted = Tile.of(n // keys.shape[1]), query_weights is not None
  args, row = _prepare(tile, blocks, weighted, q, keys, values, q_pos, k_first, k_last)
  out, logs = _attend(tile, blocks, lse or weighted, *args)
  results = [out[:, :t]]
  if lse:
    results.append(tile.join(logs.reshape(*logs.shape[:3], -1))[:, :t] * (1 / LOG2E))
  if weighted:
    q, keys, _, rows, bounds, _ = args
    results.append(gpu_mass.key_mass(tile, q, keys, rows, bounds, row, logs, query_weights))
  return tuple(results) if len(results) > 1 else results[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prepare(tile: Tile, blocks: Blocks, weighted: bool, q, keys, values, q_pos, k_first, k_last):
  """(the arguments of `_attend`, the gathered row of each key, if `weighted`)."""
  b, t = q_pos.shape
  pad = -t % tile.queries
  positions = jnp.pad(q_pos.astype(jnp.int32), ((0, 0), (0, pad)), constant_values=-2)
  positions = positions.reshape(b, (t + pad) // tile.queries, tile.queries)
  plan = planning.make(positions, k_first, k_last, block=blocks.kv, grain=GRAIN)
  rows = tile.arrange(positions, -2).reshape(*positions.shape[:2], WARPGROUPS, ROWS)
  keys, values = (planning.gather(x, plan.source) for x in (keys, values))
  q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
  return (q, keys, values, rows, plan.bounds, plan.ranges), plan.row if weighted else None


def _attend(tile: Tile, blocks: Blocks, lse: bool, q, keys, values, rows, bounds, ranges):
  """(out [B, T, N, H], log-sum-exp float32 [B, parts, tiles, 2, 64] in units of log 2, if asked for).

  q [B, T, N, H], keys and values [B, K, R, H], rows [B, tiles, 2, 64]: positions; bounds, ranges: see `Plan`.
  """
  b, _, n, h = q.shape
  tiles, group = rows.shape[1], n // keys.shape[1]
  parts = group // tile.heads  # of a group of query heads, each with tiles of its own
  block, stages = blocks.kv, blocks.stages
  scale = h**-0.5 * LOG2E  # scores in units of log 2: exp2 is what the hardware has
  i32 = jnp.int32
  pieces = tile.pieces()

  def body(q_ref, k_ref, v_ref, rows_ref, bounds_ref, ranges_ref, out_ref, logs_ref, *scratch):
    logs_smem, q_smem, k_smem, v_smem, rows_smem, bounds_smem, *scratch = scratch
    q_ready, k_ready, v_ready, k_free, v_free, turn = scratch
    part, batch, wg = lax.axis_index("part"), lax.axis_index("batch"), lax.axis_index("wg")
    kv_head = lax.div(part, i32(parts))
    # The last tiles have the most keys: they start first.
    number = (tiles - 1) - lax.axis_index("tile")
    whole, kept, band_start, stop = (ranges_ref[batch, kv_head, number, i] for i in (WHOLE, KEPT, START, STOP))

    def here(ref, piece):
      """A piece's part of q or of the output."""
      first = number * tile.queries + piece.first
      return ref.at[batch, pl.ds(first, piece.count), part * tile.heads + piece.head]

    def take_turn():
      plgpu.barrier_arrive(turn)
      plgpu.barrier_wait(turn)

    @pl.when(wg < WARPGROUPS)
    def _compute():
      plgpu.set_max_registers(blocks.compute_registers, action="increase")
      plgpu.barrier_wait(q_ready)
      positions = pipeline.row_vector(rows_smem, wg)
      acc = pipeline.zeros(ROWS, h)

      # The warpgroups take turns: one multiplies while the other computes its exponentials.
      pl.when(wg == 1)(take_turn)

      def step(i, carry, masked):
        acc, top, total = carry
        slot = lax.rem(i, i32(stages))
        plgpu.barrier_wait(k_ready.at[slot])
        s = compat.dot(q_smem.at[wg], k_smem.at[slot].transpose((1, 0)), then=take_turn)
        if masked:
          bounds = (pipeline.column_vector(bounds_smem, slot, x) for x in range(2))
          first, last = (lax.broadcast_in_dim(x, s.shape, [1]) for x in bounds)
          query = lax.broadcast_in_dim(positions, s.shape, [0])
          s = jnp.where((first <= query) & (query <= last), s, -jnp.inf)
        compat.release(k_free.at[slot])
        # The maximum is kept scaled, so that scaling and subtracting are one instruction.
        new_top = jnp.maximum(top, s.max(axis=1) * scale)
        shrink = jnp.exp2(top - new_top)
        p = jnp.exp2(s * scale - lax.broadcast_in_dim(new_top, s.shape, [0]))
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
        total = total * shrink + p.sum(axis=1)
        p16 = p.astype(q.dtype)
        acc, total, new_top, p16 = lax.optimization_barrier((acc, total, new_top, p16))
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_ready.at[slot])
        plgpu.barrier_wait(turn)
        acc = compat.accumulate(acc, p16, v_smem.at[slot])
        compat.release(v_free.at[slot])
        return acc, new_top, total

      carry = acc, pipeline.filled_rows(ROWS, LOWEST), pipeline.filled_rows(ROWS, 0.0)
      carry = lax.fori_loop(0, whole, functools.partial(step, masked=False), carry)
      acc, top, total = lax.fori_loop(whole, stop, functools.partial(step, masked=True), carry)
      pl.when(wg == 0)(take_turn)

      # Padding (which the unmasked blocks include) and rows that saw nothing give zeros.
      real = (positions >= -1) & (total > 0.0)
      weight = lax.broadcast_in_dim(jnp.where(real, 1 / jnp.where(real, total, 1.0), 0.0), acc.shape, [0])
      q_smem[wg] = jnp.where(weight > 0.0, acc * weight, 0.0).astype(q.dtype)
      if lse:
        logs_smem[wg] = jnp.where(real, top + jnp.log(jnp.where(real, total, 1.0)) * LOG2E, -jnp.inf)
      plgpu.commit_smem()
      if lse:
        plgpu.copy_smem_to_gmem(logs_smem.at[wg], logs_ref.at[batch, part, number, wg])
      for piece in pieces:
        source = q_smem.at[piece.warpgroup, pl.ds(piece.row, piece.count)]
        store = functools.partial(plgpu.copy_smem_to_gmem, source, here(out_ref, piece))
        pl.when(wg == piece.warpgroup)(store)
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == WARPGROUPS)
    def _load():
      plgpu.set_max_registers(blocks.memory_registers, action="decrease")
      plgpu.copy_gmem_to_smem(rows_ref.at[batch, number], rows_smem, q_ready)
      for piece in pieces:
        target = q_smem.at[piece.warpgroup, pl.ds(piece.row, piece.count)]
        plgpu.copy_gmem_to_smem(here(q_ref, piece), target, q_ready)

      def copies(i):
        first = jnp.where(i < kept, i * block, band_start + (i - kept) * block)
        span = pl.ds(pl.multiple_of(first, GRAIN), block)
        bounds = bounds_ref, (batch, kv_head, slice(None), span), bounds_smem
        return [(k_ref, (batch, kv_head, span), k_smem), bounds], [(v_ref, (batch, kv_head, span), v_smem)]

      pipeline.stream(stop, stages, copies, (k_free, k_ready), (v_free, v_ready))

  operand = lambda *shape: pipeline.matrix(shape, q.dtype)
  scratch = [pipeline.vector(WARPGROUPS, ROWS) if lse else None, operand(WARPGROUPS, ROWS, h)]
  scratch += [operand(stages, block, h), operand(stages, block, h)]
  scratch += [pipeline.vector(WARPGROUPS, ROWS, dtype=i32), pipeline.vector(stages, 2, block, dtype=i32)]
  scratch += [plgpu.Barrier(num_arrivals=1 + len(pieces)), pipeline.barriers(stages, 2), pipeline.barriers(stages, 1)]
  scratch += [pipeline.barriers(stages), pipeline.barriers(stages), pipeline.barriers(1)]
  logs = jax.ShapeDtypeStruct((b, n // tile.heads, *rows.shape[1:]), jnp.float32) if lse else None
  return pipeline.launch(
    body,
    [q, keys, values, rows, bounds, ranges],
    [jax.ShapeDtypeStruct(q.shape, q.dtype), logs],
    scratch,
    {"part": n // tile.heads, "tile": tiles, "batch": b},
    f"prefill_{tile.heads}x{tile.queries}_{block}x{stages}",
  )
'''


if __name__ == "__main__":
  if sys.argv[1:2] == ["--child"]:
    child(sys.argv[2])
  else:
    main()
