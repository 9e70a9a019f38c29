"""`experiments.generate --requests`: reads requests from a file, writes answers as they end.

Each line of the file is a JSON object: `prompt` (text) or `messages` (a chat), and optionally `id`, `max_new_tokens`,
`seed`, `chains` and `temperature`; flags give the defaults. Each line of the results is a chain that has ended. The
same command again resumes a run that was cut short: chains in the results are not generated again, and the
`fingerprint` of each tells whether it answers the same request.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dms_jax.generation.batching import BudgetError, Generator
from dms_jax.json_files import HALF_PAIR
from experiments.common import files, program

SEEDS = 2**32  # number of distinct keys of jax.random.key while JAX computes in 32 bits
START = b'{"id": '  # first bytes of every result


@dataclasses.dataclass(frozen=True)
class Request:
  """One line. `id`: a text or number of its own, default its place among the lines, from 0."""

  id: str | int
  text: str
  max_new_tokens: int
  chains: int
  temperature: float
  key: jax.Array

  def fingerprint(self, settings: Mapping[str, Any]) -> str:
    """A hash of everything that decides the answers; `settings` holds what all requests share, such as the policy."""
    key = jax.random.key_data(self.key) if self.temperature else None  # greedy chains use no key
    own = {"text": self.text, "max_new_tokens": self.max_new_tokens, "chains": self.chains}
    return program.fingerprint({**settings, **own, "temperature": self.temperature, "key": key})


def read_requests(
  path: str | Path, tokenizer, *, max_new_tokens: int, chains: int, temperature: float, seed: int, width: int
) -> list[Request]:
  """All requests of a file. The arguments are defaults for lines without them; default keys derive from `seed`.

  A line that holds half of a surrogate pair gets no answer; it is logged, and the other lines keep their places.

  Raises:
    ValueError: no such file, a line that is not a request, or an id used twice; the message names the line.
  """
  requests, seen, left_out = [], {}, []
  for at, values in files.json_records("requests", path, {}, left_out):
    index = len(requests) + len(left_out)
    _check(at, values)
    request = Request(
      values.get("id", index),
      _text(at, values, tokenizer),
      values.get("max_new_tokens", max_new_tokens),
      values.get("chains", chains),
      float(values.get("temperature", temperature)),
      jax.random.key(values["seed"]) if "seed" in values else jax.random.fold_in(jax.random.key(seed), index),
    )
    if not 1 <= request.chains <= width:
      raise ValueError(f"{at}: chains={request.chains} must lie between 1 and --width={width}")
    if request.id in seen:
      raise ValueError(f"{at}: id {request.id!r} is that of {seen[request.id]} too")
    seen[request.id] = at.rpartition(", ")[2]
    requests.append(request)
  for at in left_out:
    program.log(f"{at}: {HALF_PAIR}; it gets no answer")
  if not requests:
    raise ValueError(f"--requests={path}: holds no request")
  return requests


def _check(at: str, values: dict[str, Any]) -> None:
  kinds = {
    "id": (str, int), "prompt": str, "messages": list, "max_new_tokens": int, "seed": int, "chains": int,
    "temperature": (int, float),
  }  # fmt: skip
  for name, value in values.items():
    if name not in kinds:
      raise ValueError(f"{at}: unknown field {name!r}; there are {sorted(kinds)}")
    if not isinstance(value, kinds[name]) or isinstance(value, bool):
      raise ValueError(f"{at}: {name}={value!r} has the wrong type")
  for name, least in (("max_new_tokens", 1), ("temperature", 0), ("seed", 0)):
    if values.get(name, least) < least:
      raise ValueError(f"{at}: {name}={values[name]} must be {least} or more")
  if values.get("seed", 0) >= SEEDS:
    raise ValueError(f"{at}: seed={values['seed']} must lie below 2**32")
  if ("prompt" in values) == ("messages" in values):
    raise ValueError(f"{at}: give either prompt or messages")


def _text(at: str, values: dict, tokenizer) -> str:
  if "prompt" in values:
    return values["prompt"]
  messages = values["messages"]
  if not messages or not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages):
    raise ValueError(f"{at}: messages must be objects with role and content")
  try:
    return tokenizer.chat(messages)
  except ValueError as error:
    raise ValueError(f"{at}: {error}") from None


def finished_chains(path: Path, asked: Mapping[str | int, str]) -> dict[str | int, set[int]]:
  """The chains of each id in a results file. A last line that was cut short is removed from the file.

  Args:
    asked: the fingerprint of each id.

  Raises:
    ValueError: a line is not a result, or answers another request.
  """
  if not path.exists():
    return {}
  files.cut_half_line(path, START)
  done: dict[str | int, set[int]] = {}
  other = "give another --output"
  try:
    for where, row in files.json_records("output", path, {"id": str | int, "chain": int, "fingerprint": str}):
      if asked.get(row["id"]) != row["fingerprint"]:
        other = f"give the requests and flags it was made with, take such lines out, or {other}"
        raise ValueError(f"{where}: answers request {row['id']!r} of another text or other settings")
      done.setdefault(row["id"], set()).add(row["chain"])
  except ValueError as error:
    raise ValueError(f"{error}; {other}") from None
  return done


def answer(
  generator: Generator, requests: Sequence[Request], output: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
  """Runs the chains that `output` does not hold yet, and adds a line to `output` as each chain ends.

  Args:
    settings: everything else that decides the answers: the checkpoint, the policy, what ends a text.

  Returns:
    requests and rows in all and done now, new_tokens, seconds, tokens_per_s, peak_tokens (held at once by all rows,
    mean over layers and heads), peak_bytes of pages in use, cache_bytes allocated, preemptions.

  Raises:
    ValueError: `output` is not a results file of these requests, or a request exceeds the whole budget. Chains that
      ended before are written.
  """
  files.append_text(output, "")
  prints = {request.id: request.fingerprint(settings) for request in requests}
  done = finished_chains(output, prints)
  left = [request for request in requests if len(done.get(request.id, ())) < request.chains]
  total, written, tokens = sum(request.chains for request in left), 0, 0
  start = shown = time.monotonic()
  running = {}  # (ticket, chain) of each chain that has not ended
  for request in left:
    try:
      ticket = generator.submit(
        request.text,
        chains=request.chains,
        max_new_tokens=request.max_new_tokens,
        key=request.key,
        temperature=request.temperature,
      )
    except ValueError as error:
      raise ValueError(f"request {request.id!r}: {error}") from None
    running |= {(ticket, chain): request for chain in range(request.chains)}
  while generator.busy:
    lacking, lines = None, []
    try:
      generator.step()
    except BudgetError as error:
      lacking = error
    for ticket, chain in [at for at in running if generator.results[at[0]].finish_reason[at[1]] != "running"]:
      result, request = generator.results[ticket], running.pop((ticket, chain))
      written, tokens = written + 1, tokens + len(result.tokens[chain])
      if chain not in done.get(request.id, ()):
        lines.append(json.dumps(program.to_plain(_row(request, chain, result, prints[request.id]))) + "\n")
    files.append_text(output, "".join(lines))
    for ticket in [ticket for ticket, result in generator.results.items() if result.finished]:
      del generator.results[ticket]  # a long file would fill the memory
    if lacking is not None:
      request = next(request for (ticket, _), request in running.items() if ticket == lacking.ticket)
      raise ValueError(
        f"request {request.id!r} does not fit the budget of {generator.budget} bytes, even alone: give a larger "
        f"--kv_budget_gib or --kv_budget_tokens; the {written} rows that ended before are in {output}"
      )
    if time.monotonic() - shown > 5:
      shown = time.monotonic()
      program.log(
        f"{written}/{total} rows, {sum(c is not None for c in generator.chains)} running, "
        f"{len(generator.waiting) + len(generator.preempted)} waiting, {tokens / (shown - start):.1f} tokens/s"
      )
  seconds = time.monotonic() - start
  cache, own = generator.cache, generator.memory.own
  return {
    "requests": len(requests), "requests_now": len(left), "rows": sum(r.chains for r in requests), "rows_now": written,
    "new_tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds, "peak_tokens": generator.peak_tokens,
    "peak_bytes": cache.nbytes // own.nbytes * own.fixed_bytes + generator.peak_pages * own.page_bytes,
    "cache_bytes": cache.nbytes,
    "preemptions": generator.preemptions,
  }  # fmt: skip


def _row(request: Request, chain: int, result, fingerprint: str) -> dict[str, Any]:
  logprobs = result.logprobs[chain]
  return {
    "id": request.id, "chain": chain, "fingerprint": fingerprint,
    "text": None if result.text is None else result.text[chain],
    "finish_reason": result.finish_reason[chain], "new_tokens": len(result.tokens[chain]),
    "mean_logprob": sum(logprobs) / max(len(logprobs), 1), "held_tokens": result.held[chain],
    "tokens": result.tokens[chain],
  }  # fmt: skip
