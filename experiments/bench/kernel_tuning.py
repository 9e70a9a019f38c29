"""Searches the fastest block sizes of a kernel on this device, and writes them to a table.

Sizes are tried group by group, each group around the best sizes so far: splits, pieces, blocks and stages, workers,
results merged at a time. A candidate that does not compile is skipped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.bench import kernel_cases
from experiments.bench.kernel_cases import Decode, Text
from experiments.common import program
from pallas_kernels.common import tuned
from pallas_kernels.common.platform import processors
from pallas_kernels.decode import gpu as decode_gpu
from pallas_kernels.prefill import gpu as prefill_gpu
from pallas_kernels.window_bias import gpu as retrofit_gpu

REPLACE = dataclasses.replace


def decode_candidates(processors: int) -> Iterator[Callable[[Any], list]]:
  """Groups of candidates around the best so far, for decode."""
  yield lambda best: [
    REPLACE(best, split=n, rest=min(best.rest, n))
    for n in (128, 192, 256, 512, 1024)
    if n % best.block == 0 and n > best.block
  ]
  yield lambda best: [REPLACE(best, rest=n) for n in (128, 256, 512) if n <= best.split and n % best.block == 0]
  yield lambda best: [
    REPLACE(best, block=block, stages=stages, split=max(best.split, 2 * block), rest=max(best.rest, block))
    for block in (64, 128)
    for stages in (2, 3, 4, 6)
    if max(best.split, 2 * block) % block == 0 and max(best.rest, block) % block == 0
  ]
  yield lambda best: [REPLACE(best, workers=n * processors) for n in (0, 1, 2, 3, 4)]
  yield lambda best: [REPLACE(best, merged=n) for n in (2, 4, 8)]


def prefill_candidates() -> Iterator[Callable[[Any], list]]:
  yield lambda best: [REPLACE(best, kv=kv, stages=stages) for kv in (64, 128, 192) for stages in (2, 3, 4)]


def retrofit_candidates() -> Iterator[Callable[[Any], list]]:
  yield lambda best: [REPLACE(best, kv=kv, stages=stages) for kv in (64, 128) for stages in (2, 3, 4)]
  yield lambda best: [REPLACE(best, dq_kv=kv, dq_stages=n) for kv in (64, 128) for n in (2, 3)]
  yield lambda best: [REPLACE(best, dkv_stages=n, dkv_overlap=x) for n in (2, 3) for x in (False, True)]


def search(default: Any, groups: Iterator[Callable], clock: Callable[[Any], float], end: float) -> tuple[Any, float]:
  """(fastest sizes, their microseconds); the default is measured first, and candidates that fail are skipped."""
  tried: dict[Any, float] = {}

  def measured(sizes) -> float:
    if sizes not in tried:
      try:
        tried[sizes] = clock(sizes)
        program.log(f"  {tried[sizes]:9.2f} us  {sizes}")
      except Exception as error:  # any error of a kernel's compiler
        tried[sizes] = float("inf")
        program.log(f"  failed: {sizes}: {' '.join(str(error).split())[:120]}")
    return tried[sizes]

  best = default
  measured(default)
  for group in groups:
    for sizes in group(best):
      if time.monotonic() > end:
        return min(tried, key=tried.get), min(tried.values())
      measured(sizes)
    best = min(tried, key=tried.get)
  return best, tried[best]


def subject(work: Decode | Text) -> tuple[str, str, Any, Iterator[Callable], Callable[[Any], float]]:
  """(operation, class of shapes, default sizes, candidates, clock of sizes in microseconds) of a workload."""
  if isinstance(work, Decode):
    pairs, count = work.batch * work.heads, processors()
    contiguous = -(-work.ring // 16) * 16 if work.pages else work.slots
    default = decode_gpu.default_blocks(
      work.batch, work.heads, contiguous, work.size, count, work.pages > 0, work.stored != "bfloat16"
    )
    shapes = decode_gpu.shape_class(pairs, work.size, contiguous, work.pages, work.stored)
    attend = lambda sizes: functools.partial(decode_gpu.decode_attention, blocks=sizes)
    clock = lambda sizes: kernel_cases.decode_us(work, None, attend(sizes))[0]
    return "decode", shapes, default, decode_candidates(count), clock
  if work.kind == "prefill":
    default = prefill_gpu.default_blocks(work.size, processors())
    attend = lambda sizes: functools.partial(prefill_gpu.prefill_attention, blocks=sizes)
    clock = lambda sizes: kernel_cases.prefill_us(work, attend(sizes))[0]
    return "prefill", tuned.shape_class(H=work.size), default, prefill_candidates(), clock
  default = retrofit_gpu.default_blocks(work.size, work.batch * work.tokens * work.heads, processors())
  attend = lambda sizes: (
    lambda q, k, v, bias: retrofit_gpu.window_bias_attention(q, k, v, bias, work.window, None, blocks=sizes)
  )
  clock = lambda sizes: kernel_cases.retrofit_us(work, attend(sizes))[1]
  return "window_bias", tuned.shape_class(H=work.size), default, retrofit_candidates(), clock


def tune(name: str, work: Decode | Text, path: Path, end: float, about: dict, done: set[tuple[str, str]]) -> None:
  """Measures candidates for a case's workload and writes the winner into the table at `path`.

  A case whose class of shapes is in `done` is skipped, as is one after `end`; its class is then added to `done`.
  """
  operation, shapes, default, groups, clock = subject(work)
  if (operation, shapes) in done or time.monotonic() > end:
    return
  done.add((operation, shapes))
  program.log(f"tuning {name}: {operation}, {shapes}")
  best, us = search(default, groups, clock, end)
  if us == float("inf"):
    return
  measured = f"{about['date']}, jax {about['jax']}, {name}: {work}"
  entry = {"blocks": dataclasses.asdict(best), "us": us, "measured": measured}
  table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  program.save_json(path, tuned.merged(table, about["device"], operation, shapes, entry))
  tuned.table.cache_clear()
