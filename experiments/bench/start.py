"""The steps of a first session, timed; what takes time to import is imported in the first of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

SHORT = "What is the capital of France?"
LONGER = "What is the capital of Spain, and how many people live there? Answer in one sentence, please."


def measure(
  checkpoint: str, retrofit: str | None, dtype: str | None, max_new_tokens: int, steps: str, folder: str
) -> list[dict[str, Any]]:
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
    model, tokenizer = timed("load the model", lambda: dms_jax.load(checkpoint, retrofit=retrofit, dtype=dtype))

    def chat(text: str) -> str:
      return tokenizer.chat([{"role": "user", "content": text}]) if tokenizer.settings.get("chat_template") else text

    short, longer, key = chat(SHORT), chat(LONGER), jax.random.key(0)
    answer = lambda prompts=short, **settings: dms_jax.generate(
      model, prompts, max_new_tokens=max_new_tokens, eos=False, **settings
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
    timed("two rows", lambda: answer([short, longer]))
    timed("Vanilla", lambda: answer(policy=dms_jax.Vanilla()))
    timed("TOVA, budget 128", lambda: answer(policy=dms_jax.TOVA(budget=128)))
    timed("TOVA, budget 96", lambda: answer(policy=dms_jax.TOVA(budget=96)))
  return rows
