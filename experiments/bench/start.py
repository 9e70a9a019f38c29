"""The steps of a first session, timed; what takes time to import is imported in the first of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

SHORT = "What is the capital of France?"
LONGER = "What is the capital of Spain, and how many people live there? Answer in one sentence, please."


def measure(
  checkpoint: str | None, preset: str | None, retrofit: str | None, dtype: str | None, max_new_tokens: int, steps: str,
  folder: str,
) -> list[dict[str, Any]]:  # fmt: skip
  """The steps of one process, which must be new, with their seconds; `folder` keeps compiled programs."""
  rows: list[dict[str, Any]] = []
  count: Callable[[], int] = lambda: 0  # programs compiled so far

  def timed(name: str, f: Callable[[], Any]) -> Any:
    wall, cpu, before = time.perf_counter(), time.process_time(), count()
    if not rows:  # with the start of the interpreter
      cpu = 0.0
    found = f()
    row = {"step": name, "s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    rows.append(row | {"programs": count() - before})
    return found

  def imported() -> Any:
    import dms_jax

    dms_jax.keep_compiled(folder)
    return dms_jax

  dms_jax = timed("import dms_jax", imported)
  import jax

  from dms_jax import compilation

  with compilation.counted() as programs:
    count = programs
    load = lambda: dms_jax.load(checkpoint, retrofit=retrofit, dtype=dtype)
    model, tokenizer = timed("load the model", load if preset is None else lambda: _random(preset, dtype))

    def chat(text: str) -> str | list[int]:
      if tokenizer is None:
        return list(text.encode())  # ids below 256, which every vocabulary has
      return tokenizer.chat([{"role": "user", "content": text}]) if tokenizer.settings.get("chat_template") else text

    short, longer, key = chat(SHORT), chat(LONGER), jax.random.key(0)
    answer = lambda *prompts, **settings: dms_jax.generate(
      model, [*prompts] or [short], max_new_tokens=max_new_tokens, eos=False, **settings
    )
    timed("first answer", answer)
    if steps == "first":
      return rows
    timed("the same again", answer)
    timed("another prompt", lambda: answer(longer))
    if model.dms is not None:
      timed("another threshold", lambda: answer(policy=dms_jax.DMS(threshold=1.0)))
    timed("temperature 0.7", lambda: answer(key=key, temperature=0.7))
    timed("temperature 1", lambda: answer(key=key, temperature=1.0))
    timed("temperature 1, top_k 50", lambda: answer(key=key, temperature=1.0, top_k=50))
    timed("temperature 1, top_k 10", lambda: answer(key=key, temperature=1.0, top_k=10))
    timed("two rows", lambda: answer(short, longer))
    timed("Vanilla", lambda: answer(policy=dms_jax.Vanilla()))
    timed("TOVA, budget 128", lambda: answer(policy=dms_jax.TOVA(budget=128)))
    timed("TOVA, budget 96", lambda: answer(policy=dms_jax.TOVA(budget=96)))

    def serve(generator: Any, prompt: Any) -> Any:
      generator.submit(prompt, max_new_tokens=max_new_tokens)
      list(generator.run())
      return generator

    make = lambda: dms_jax.Generator(model, tokenizer=tokenizer, width=4, eos=False)
    generator = timed("Generator of 4 rows, a request", lambda: serve(make(), short))
    timed("another request", lambda: serve(generator, longer))
  return rows


def _random(preset: str, dtype: str | None) -> tuple[Any, None]:
  """(model with adapter gates in the form that decodes fastest, no tokenizer)."""
  import jax
  import jax.numpy as jnp

  from dms_jax.execution import fastest_form
  from dms_jax.families import PRESETS
  from experiments.bench import synthetic

  model = synthetic.random_model(PRESETS[preset], window=64, dtype=jnp.dtype(dtype or "bfloat16"))
  return jax.block_until_ready(fastest_form(model)), None
