"""Generates text from a checkpoint, streaming it to the terminal.

    python -m experiments.generate --checkpoint=checkpoints/smollm2-135m-instruct \\
      --retrofit=smollm2-135m-cr4 --chat --prompt="Why is the sky blue?"

The prompt is `--prompt` or the text of `--file`; `--prompts_file` has one prompt a line. With `--chat` a prompt is a
user's message; without a prompt, standard input gives the turns of a conversation. `--policy=vanilla` keeps the whole
cache. A policy's own numbers are flags too (`--dms.threshold=2`, `--policy=h2o --h2o.budget=512`). The last line is one
JSON object with all rows and their cost.

    python -m experiments.generate --checkpoint=... --requests=requests.jsonl --width=16 --kv_budget_gib=2

answers a file of requests (fields: `experiments/common/requests.py`) in one pool of pages. Rows are written to
`--output` as they end. The same command again resumes a run that was cut short.

Several devices: --mesh.data=2 --mesh.tensor=4 splits rows (prompts, `--width`) and KV heads, or rows eightfold where 4
does not divide the KV heads; --kv_budget_gib is each device's. On several hosts run the same command on each, with
--mesh.coordinator=HOST:PORT --mesh.processes=2 --mesh.process=0 (1, ...); all files must be on a shared file system.
Process 0 writes and prints.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
from jax.sharding import Mesh

import dms_jax
from dms_jax import policies
from dms_jax.generation.generate import Output
from dms_jax.json_files import as_text
from dms_jax.model import Model
from dms_jax.policies import Policy
from dms_jax.tokenizer import Tokenizer
from experiments.common import files, program
from experiments.common import mesh as mesh_flags
from experiments.common import requests as request_file
from pallas_kernels.paged import FORMATS


@dataclasses.dataclass(frozen=True)
class Config:
  """The prompt, the model, and how it writes.

  Attributes:
    prompt: text to continue, or with --chat a message to answer.
    file: text file that holds the prompt.
    prompts_file: text file with one prompt a line.
    chat: prompts are messages; without a prompt, standard input gives the turns.
    requests: a file of requests, a JSON object a line.
    output: results of requests; default REQUESTS with the ending .results.jsonl.
    width: rows of requests that write together.
    chains: texts written for a request that gives no number.
    page_format: quantises the pages of requests: int8 or float8.
    system: the system message of a chat.
    samples: continuations of each prompt.
    eos: whether the model's end tokens end a text.
    cache: kind of cache; paged for requests, otherwise by default as `dms_jax.generate` chooses.
    capacity: slots of a head; default as many as are needed.
    stream: print the text as it is written.
    kv_budget_gib: most GiB of the cache of all rows, on each device; none: unlimited.
    on_pressure: where pages run out: preempt the newest chain, or compress all (DMS).
    policy: name of an eviction policy; none: the gates' own, vanilla without gates.
    stop: strings that end a text and are cut off, separated by commas; \\n is a line feed.
  """

  checkpoint: str
  retrofit: str | None = None
  dtype: Literal["float32", "bfloat16"] | None = None
  prompt: str | None = None
  file: str | None = None
  prompts_file: str | None = None
  requests: str | None = None
  output: str | None = None
  width: int = 8
  chains: int = 1
  kv_budget_gib: float | None = None
  kv_budget_tokens: int | None = None
  page_format: str | None = dataclasses.field(default=None, metadata={"choices": FORMATS})
  on_pressure: Literal["preempt", "compress"] = "preempt"
  chat: bool = False
  system: str | None = None
  policy: str | None = dataclasses.field(default=None, metadata={"choices": policies.REGISTRY})
  samples: int = 1
  max_new_tokens: int = 256
  temperature: float = 0.0
  top_k: int | None = None
  top_p: float | None = None
  seed: int = 0
  stop: tuple[str, ...] = ()
  eos: bool = True
  cache: Literal["contiguous", "paged", "masked"] | None = None
  capacity: int | None = None
  prefill_chunk: int = 256
  decode_block: int = 8
  stream: bool = True

  def __post_init__(self):
    given = [name for name in ("prompt", "file", "prompts_file", "requests") if getattr(self, name) is not None]
    if len(given) > 1:
      raise ValueError(f"give one prompt, file or list, not {' and '.join('--' + g for g in given)}")
    if not given and not self.chat:
      raise ValueError(
        "nothing to continue: give --prompt, --file or --prompts_file, or --chat to read turns from stdin"
      )
    if self.system is not None and not self.chat:
      raise ValueError("--system is a message of a chat: add --chat")
    if not 0 <= self.seed < request_file.SEEDS:
      raise ValueError(f"--seed={self.seed} must lie between 0 and 2**32 - 1")
    if self.samples < 1:
      raise ValueError(f"--samples={self.samples} must be 1 or more")
    if self.requests is not None:
      refused = [name for name in ("chat", "samples", "capacity") if getattr(self, name) not in (False, 1, None)]
      if refused:
        raise ValueError(f"--{refused[0]} does not go with --requests, whose lines say what each is to be")
      if self.cache not in (None, "paged"):
        raise ValueError(f"--cache={self.cache} does not go with --requests, which share one pool of pages")
    else:
      for name in ("output", "width", "chains", "kv_budget_gib", "kv_budget_tokens", "page_format", "on_pressure"):
        if getattr(self, name) != getattr(type(self), name):
          raise ValueError(f"--{name} is for --requests")
    if self.page_format not in (None, *FORMATS):
      raise ValueError(f"--page_format={self.page_format} is not one of {', '.join(FORMATS)}")
    if self.kv_budget_gib is not None and self.kv_budget_tokens is not None:
      raise ValueError("give either --kv_budget_gib or --kv_budget_tokens")

  def stops(self) -> tuple[str, ...]:
    """`stop` with each backslash and n replaced by a line feed."""
    return tuple(as_text(text).replace("\\n", "\n") for text in self.stop)

  @property
  def results(self) -> Path:
    """The file of the results of requests."""
    return Path(self.output or Path(self.requests).with_suffix(".results.jsonl"))

  def prompts(self) -> list[str]:
    """The prompts of the flags; none when turns come from standard input."""
    if self.prompt is not None:
      return [as_text(self.prompt)]
    if self.file is not None:
      return [files.read_text("file", self.file)]
    if self.prompts_file is not None:
      if not (lines := [line for _, line in files.text_lines("prompts_file", self.prompts_file)]):
        raise ValueError(f"--prompts_file={self.prompts_file}: holds no prompt")
      return lines
    return []


def user_turns() -> Iterator[str]:
  """Lines of standard input, with a prompt on a terminal; none where it is closed."""
  while sys.stdin is not None:
    if sys.stdin.isatty():
      print("> ", end="", file=sys.stderr, flush=True)
    if not (line := sys.stdin.readline()):
      return
    if line.strip():
      yield as_text(line.strip())


def next_turn(tokenizer, messages: list[dict], ended: bool) -> str:
  """The text of the chat template from the end of one answer to the start of the next.

  Args:
    ended: whether the answer ended with its end token, which is pending already.
  """
  before = tokenizer.chat(messages[:-1], add_generation_prompt=False)
  after = tokenizer.chat(messages)
  if not after.startswith(before):
    raise ValueError("the chat template rewrites earlier turns, so a conversation cannot go on from its cache")
  answer = before.rindex(messages[-2]["content"]) + len(messages[-2]["content"])
  rest = after[answer:]
  if ended:  # the template closes an answer with the token that ended it
    names = [tokenizer.token_bytes()[i].decode() for i in tokenizer.eos_token_ids]
    rest = next((rest[len(name) :] for name in names if rest.startswith(name)), rest)
  return rest


class Printer:
  """Prints rows as they stream: a single row piece by piece, several rows line by line."""

  def __init__(self, rows: int):
    self.rows, self.waiting = rows, [""] * rows

  def __call__(self, row: int, tokens: list[int], text: str) -> None:
    if self.rows == 1:
      print(text, end="", flush=True)
      return
    *lines, self.waiting[row] = (self.waiting[row] + text).split("\n")
    for line in lines:
      print(f"[{row}] {line}", flush=True)

  def close(self) -> None:
    for row, text in enumerate(self.waiting):
      if text:
        print(f"[{row}] {text}")
    print(flush=True)


def answer_requests(config: Config, output: Path, model, tokenizer, policy) -> dict:
  """Answers the file of `--requests` in the file `output`; returns the summary."""
  asked = request_file.read_requests(
    config.requests, tokenizer, max_new_tokens=config.max_new_tokens, chains=config.chains,
    temperature=config.temperature, seed=config.seed, width=config.width,
  )  # fmt: skip
  warmest = max(request.temperature for request in asked)
  try:
    generator = dms_jax.Generator(
      model, policy=policy, width=config.width, temperature=warmest, top_k=config.top_k, top_p=config.top_p,
      budget=None if config.kv_budget_gib is None else int(config.kv_budget_gib * 2**30),
      budget_tokens=config.kv_budget_tokens, stop=config.stops(), eos=config.eos,
      page_format=config.page_format, prefill_chunk=config.prefill_chunk, decode_block=config.decode_block,
      on_pressure=config.on_pressure,
    )  # fmt: skip
  except dms_jax.BudgetError as error:
    raise ValueError(f"--kv_budget_gib or --kv_budget_tokens, with --width={config.width}: {error}") from None
  deciding = ("checkpoint", "retrofit", "dtype", "top_k", "top_p", "stop", "eos", "page_format")
  settings = {name: getattr(config, name) for name in deciding}
  if config.on_pressure != "preempt":
    settings["on_pressure"] = config.on_pressure
  settings["policy"] = (type(policy).__name__, policy)
  summary = request_file.answer(generator, asked, output, settings)
  return {"output": str(config.results), **summary}


def load(config: Config, mesh: Mesh | None) -> tuple[Model, Tokenizer, Policy]:
  """What writes."""
  model, tokenizer = dms_jax.load(config.checkpoint, retrofit=config.retrofit, dtype=config.dtype, mesh=mesh)
  name = config.policy or (model.dms.objective if model.dms is not None else "vanilla")
  return model, tokenizer, program.read_flags(name.lower(), policies.get(name))


def main() -> None:
  config = program.read_flags("", Config)
  prompts = config.prompts()
  files.check_retrofit("retrofit", config.retrofit)
  mesh = mesh_flags.read()
  if config.requests is not None:
    with mesh_flags.written_alone(config.results, "file") as output:
      summary = answer_requests(config, output, *load(config, mesh))
    program.finish(summary)
    return
  if not prompts and jax.distributed.is_initialized():
    raise ValueError("--chat without a prompt reads turns from standard input, which one process alone has")
  model, tokenizer, policy = load(config, mesh)
  system = [] if config.system is None else [{"role": "system", "content": as_text(config.system)}]

  def ask(texts: list[str], past: Output | None = None) -> tuple[Output, dict]:
    key = jax.random.fold_in(jax.random.key(config.seed), len(rows))
    printer = Printer(len(texts)) if config.stream else None
    start = time.monotonic()
    out = dms_jax.generate(
      model, texts, policy=policy, max_new_tokens=config.max_new_tokens, key=key, temperature=config.temperature,
      top_k=config.top_k, top_p=config.top_p, stop=config.stops(), eos=config.eos,
      cache=config.cache, capacity=config.capacity, prefill_chunk=config.prefill_chunk,
      decode_block=config.decode_block, stream=printer, continue_from=past,
    )  # fmt: skip
    if printer:
      printer.close()
    for row, text in enumerate(out.text):
      logprob = sum(out.logprobs[row]) / max(len(out.logprobs[row]), 1)
      rows.append({"text": text, "finish_reason": out.finish_reason[row], "mean_logprob": logprob})
    return out, {"seconds": round(time.monotonic() - start, 2), **out.metrics.to_json()}

  rows, turns = [], []
  if prompts:
    if config.chat:
      prompts = [tokenizer.chat([*system, {"role": "user", "content": p}]) for p in prompts]
    turns.append(ask([p for p in prompts for _ in range(config.samples)])[1])
  else:
    messages, past = system, None
    for line in user_turns():
      messages = [*messages, {"role": "user", "content": line}]
      ended = past is not None and past.finish_reason[0] == "eos"
      text = tokenizer.chat(messages) if past is None else next_turn(tokenizer, messages, ended)
      past, metrics = ask([text], past)
      answer = tokenizer.decode(past.tokens[0])
      messages = [*messages, {"role": "assistant", "content": answer}]
      turns.append(metrics)
  program.finish({"rows": rows, "turns": turns})


if __name__ == "__main__":
  program.define_flags("", Config)
  for policy_name, policy_class in policies.REGISTRY.items():
    program.define_flags(policy_name, policy_class)
  mesh_flags.define()
  program.run(main, talks=True)
