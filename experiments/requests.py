"""Many requests from a file, for `experiments.generate --requests`: read, answered together, written as they end.

Each line of the file is a JSON object: `prompt` (text) or `messages` (a chat), and optionally `id`, `max_new_tokens`,
`seed`, `chains` and `temperature`; what is left out comes from the flags. Each line of the results is a chain that has
ended. A run that was cut short is taken up by running it again: what the results hold already is not asked for twice.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from dms_jax.serving import Generator
from experiments import program


@dataclasses.dataclass(frozen=True)
class Request:
  """One line. `id`: a text or number of its own, default its place among the lines, from 0."""

  id: str | int
  text: str
  max_new_tokens: int
  chains: int
  temperature: float
  key: jax.Array


def read_requests(path: str | Path, tokenizer, *, max_new_tokens: int, chains: int, temperature: float, seed: int,
                  width: int) -> list[Request]:  # fmt: skip
  """All requests of a file; the numbers are for lines that give none, which draw their seeds from `seed`.

  Raises:
    ValueError: no such file, a line that is no such object, or two of one id; the line is named.
  """
  if not Path(path).is_file():
    raise ValueError(f"{path}: no such file")
  requests, seen = [], {}
  for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
    if not line.strip():
      continue
    at = f"{path}:{number}"
    values = _object(at, line)
    index = len(requests)
    request = Request(
      values.get("id", index), _text(at, values, tokenizer), values.get("max_new_tokens", max_new_tokens),
      values.get("chains", chains), float(values.get("temperature", temperature)),
      jax.random.key(values["seed"]) if "seed" in values else jax.random.fold_in(jax.random.key(seed), index),
    )  # fmt: skip
    if not 1 <= request.chains <= width:
      raise ValueError(f"{at}: chains={request.chains} must lie between 1 and --width={width}")
    if request.id in seen:
      raise ValueError(f"{at}: id {request.id!r} is that of line {seen[request.id]} too")
    seen[request.id] = number
    requests.append(request)
  if not requests:
    raise ValueError(f"{path}: holds no request")
  return requests


def _object(at: str, line: str) -> dict[str, Any]:
  try:
    values = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f"{at}: not valid JSON ({error})") from None
  kinds = {
    "id": (str, int), "prompt": str, "messages": list, "max_new_tokens": int, "seed": int, "chains": int,
    "temperature": (int, float),
  }  # fmt: skip
  if not isinstance(values, dict):
    raise ValueError(f"{at}: expected a JSON object, found {type(values).__name__}")
  for name, value in values.items():
    if name not in kinds:
      raise ValueError(f"{at}: unknown field {name!r}; there are {sorted(kinds)}")
    if not isinstance(value, kinds[name]) or isinstance(value, bool):
      raise ValueError(f"{at}: {name}={value!r} has the wrong type")
  for name, least in (("max_new_tokens", 1), ("temperature", 0), ("seed", 0)):
    if values.get(name, least) < least:
      raise ValueError(f"{at}: {name}={values[name]} must be {least} or more")
  if ("prompt" in values) == ("messages" in values):
    raise ValueError(f"{at}: give either prompt or messages")
  return values


def _text(at: str, values: dict, tokenizer) -> str:
  if "prompt" in values:
    return values["prompt"]
  messages = values["messages"]
  if not messages or not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages):
    raise ValueError(f"{at}: messages must be objects with role and content")
  return tokenizer.chat(messages)


def finished_chains(path: Path) -> dict[str | int, set[int]]:
  """What a results file holds: the chains of each id. A last line that was cut short is removed.

  Raises:
    ValueError: a line in it is no result.
  """
  if not path.is_file():
    return {}
  data = path.read_bytes()
  whole = data[: data.rfind(b"\n") + 1]
  done: dict[str | int, set[int]] = {}
  for number, line in enumerate(whole.decode().splitlines(), start=1):
    try:
      row = json.loads(line)
      done.setdefault(row["id"], set()).add(row["chain"])
    except (json.JSONDecodeError, KeyError, TypeError):
      raise ValueError(f"{path}:{number}: no result of this program; give another --output") from None
  if len(whole) < len(data):
    os.truncate(path, len(whole))
  return done


def answer(generator: Generator, requests: Sequence[Request], output: Path) -> dict[str, Any]:
  """Runs what `output` does not hold yet, and adds a line to it as each chain ends.

  Returns:
    requests and rows in all and done now, new_tokens, seconds, tokens_per_s, peak_tokens (held at once by all rows, the
    mean over layers and heads), peak_bytes of pages in use, cache_bytes allocated, swaps.

  Raises:
    ValueError: `output` holds something else; BudgetError: a request that the whole budget cannot hold.
  """
  output.parent.mkdir(parents=True, exist_ok=True)
  done = finished_chains(output)
  left = [request for request in requests if len(done.get(request.id, ())) < request.chains]
  total, written, tokens = sum(request.chains for request in left), 0, 0
  start = shown = time.monotonic()
  by_ticket = {}
  for request in left:
    try:
      ticket = generator.submit(
        request.text, chains=request.chains, max_new_tokens=request.max_new_tokens, key=request.key,
        temperature=request.temperature,
      )  # fmt: skip
    except ValueError as error:
      raise ValueError(f"request {request.id!r}: {error}") from None
    by_ticket[ticket] = request
  with output.open("a") as file:
    while generator.busy:
      for ticket, chain in {(ticket, chain) for ticket, chain, _, _ in generator.step()}:
        result, request = generator.results[ticket], by_ticket[ticket]
        if result.finish_reason[chain] == "running":
          continue
        written, tokens = written + 1, tokens + len(result.tokens[chain])
        if chain not in done.setdefault(request.id, set()):
          done[request.id].add(chain)
          file.write(json.dumps(program.to_plain(_row(request, chain, result))) + "\n")
          file.flush()
      if time.monotonic() - shown > 5:
        shown = time.monotonic()
        program.log(
          f"{written}/{total} rows, {sum(c is not None for c in generator.chains)} running, "
          f"{len(generator.waiting) + len(generator.swapped)} waiting, {tokens / (shown - start):.1f} tokens/s"
        )
  seconds = time.monotonic() - start
  cache = generator.cache
  return {
    "requests": len(requests), "requests_now": len(left), "rows": sum(r.chains for r in requests), "rows_now": written,
    "new_tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds, "peak_tokens": generator.peak_tokens,
    "peak_bytes": cache.fixed_bytes + generator.peak_pages * cache.page_bytes, "cache_bytes": cache.nbytes,
    "swaps": generator.swaps,
  }  # fmt: skip


def _row(request: Request, chain: int, result) -> dict[str, Any]:
  logprobs = result.logprobs[chain]
  return {
    "id": request.id, "chain": chain, "text": None if result.text is None else result.text[chain],
    "finish_reason": result.finish_reason[chain], "new_tokens": len(result.tokens[chain]),
    "mean_logprob": sum(logprobs) / max(len(logprobs), 1), "held_tokens": result.held[chain],
    "tokens": result.tokens[chain],
  }  # fmt: skip
