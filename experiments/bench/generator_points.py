"""A `Generator` at many rows: what its host loop takes beside the device, against plain `generate`.

Twice as many chains as rows are served, eight of each prompt, so that rows join and leave. The host's time is the
processor time of the one thread that runs the loop; a thread that waits for the device takes none. On a CPU it includes
computations that JAX runs in the calling thread.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np

import dms_jax
from dms_jax.execution import fastest_form
from dms_jax.policies import Policy
from experiments.bench import synthetic
from experiments.bench.generate_points import Shape

CHAINS = 8  # of a prompt
PROMPT = (24, 48)  # tokens of a prompt, the least and the most
BLOCK = 32  # decode steps of a compiled call


class Served:
  """A generator of a shape at a width, and prompts for it.

  Args:
    tokens: new tokens of a chain.
  """

  def __init__(self, shape: Shape, width: int, tokens: int):
    config, self.width, self.tokens = shape.config, width, tokens
    model = synthetic.random_model(config, window=shape.window, dtype=shape.dtype)
    self.model, self.policy = fastest_form(model), self._policy(shape)
    self.chains = min(CHAINS, width)
    rng = np.random.default_rng(0)
    lengths = rng.integers(*PROMPT, max(2 * width // self.chains, 1), endpoint=True)
    self.prompts = [rng.integers(0, config.vocab_size, length).tolist() for length in lengths]
    self.longest = PROMPT[1] + tokens
    held = self.longest / shape.cr + shape.window + shape.page  # by the mean head, its last page half empty
    self.generator = dms_jax.Generator(
      self.model, policy=self.policy, width=width, max_length=self.longest, temperature=0.8, eos=False,
      page_size=shape.page, pages=int(width * config.num_layers * config.num_kv_heads * -(-held // shape.page)),
      prefill_chunk=64, decode_block=BLOCK,
    )  # fmt: skip

  def _policy(self, shape: Shape) -> Policy:
    return synthetic.sampled_policy(shape.config, tokens=self.tokens, cr=shape.cr, window=shape.window)

  def serve(self, tokens: int) -> dict[str, float]:
    """Serves all prompts with `tokens` new tokens a chain: seconds, blocks, and the host's seconds in both parts."""
    begun = time.thread_time()
    for number, prompt in enumerate(self.prompts):
      self.generator.submit(prompt, chains=self.chains, max_new_tokens=tokens, key=jax.random.key(number))
    blocks, start, busy = 0, time.perf_counter(), time.thread_time()
    while self.generator.busy:
      self.generator.step()
      blocks += 1
    seconds, host = time.perf_counter() - start, time.thread_time() - busy
    self.generator.results.clear()
    return {"seconds": seconds, "host": host, "blocks": blocks, "submit": busy - begun}

  def generate(self, tokens: int) -> float:
    """Seconds of one `generate` that fills the width with the same prompts."""
    rows = [prompt for prompt in self.prompts for _ in range(self.chains)][: self.width]
    start = time.perf_counter()
    dms_jax.generate(
      self.model, rows, policy=self.policy, max_new_tokens=tokens, key=jax.random.key(0), temperature=0.8, eos=False,
      prefill_chunk=64, decode_block=BLOCK,
    )  # fmt: skip
    return time.perf_counter() - start


def measure(shape: Shape, width: int, tokens: int) -> dict[str, Any]:
  """Figures of a width, after a warm-up that compiles.

  Returns:
    ms: of a decode step, all told. host_ms: of the host in a step, beside the device. submit_ms, admit_ms: of the
    host, for each request. tokens_per_s, of_generate: new tokens a second, and over those of `generate`.
  """
  served = Served(shape, width, tokens)
  served.serve(BLOCK + 2)
  served.generate(tokens)  # whose cache grows: each size is compiled
  brief, whole, requests = served.serve(1), served.serve(tokens), len(served.prompts)
  steps, admitted = whole["blocks"] * BLOCK, brief["host"] / requests
  speed = requests * served.chains * tokens / whole["seconds"]
  return {
    "ms": 1e3 * whole["seconds"] / steps,
    "host_ms": 1e3 * (whole["host"] - admitted * requests) / steps,
    "submit_ms": 1e3 * whole["submit"] / requests,
    "admit_ms": 1e3 * admitted,
    "tokens_per_s": speed,
    "of_generate": speed / (width * tokens / served.generate(tokens)),
  }
