"""A model under a policy as a model of lm-evaluation-harness, which knows it as `dms_jax`.

    import experiments.methods.harness                     # registers it; harnesses with entry points need no import
    lm_eval.simple_evaluate(model="dms_jax", model_args="checkpoint=DIR,policy=h2o,cr=4", tasks=[...])

Likelihoods come from `dms_jax.evaluation.likelihood`, texts from `dms_jax.Generator`. Contexts are tokenized and
truncated from the left, and texts end at stop strings, as in the harness's Hugging Face model. Sampling differs: top-k
is off unless a task sets it; transformers takes 50.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from dms_jax import Generator, checkpoint, policies
from dms_jax.evaluation import likelihood
from dms_jax.evaluation.likelihood import Passage, Scored
from dms_jax.model import Model
from dms_jax.policies import Policy
from dms_jax.tokenizer import Tokenizer
from experiments.common import program
from experiments.methods.budgets import RULES, Budget, Group, fitted, most_tokens, shaped, takes_budget
from experiments.methods.score import masked

LEAST = 8  # scored tokens; rows with fewer share compiled shapes
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}  # settings that change nothing


@dataclasses.dataclass(frozen=True)
class Sampling:
  """What requests must share to be written by one `Generator`; a `temperature` of 0 is greedy."""

  stop: tuple[str, ...]
  temperature: float
  top_p: float | None
  top_k: int | None

  @classmethod
  def read(cls, given: Mapping[str, Any], default: int) -> tuple[Sampling, int]:
    """(sampling, most new tokens) from a task's `generation_kwargs`; `default` is the most if the task sets none.

    Raises:
      ValueError: a setting that would change the texts and is not implemented.
    """
    kwargs = dict(normalize_gen_kwargs(dict(given), default))
    stop = tuple(dict.fromkeys(text for text in kwargs.pop("until") if text))
    most, sample, temperature = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample"), kwargs.pop("temperature", 0.0)
    top_p, top_k = kwargs.pop("top_p", None), kwargs.pop("top_k", None)
    if most < 1:
      raise ValueError(f"generation_kwargs: max_gen_toks={most} must be 1 or more")
    if sample and not temperature:
      raise ValueError("generation_kwargs: do_sample=true needs a temperature above 0")
    if unknown := {k: v for k, v in kwargs.items() if v is not None and NEUTRAL.get(k) != v}:
      raise ValueError(f"generation_kwargs: {unknown} cannot be set here; leave them out")
    if not sample:
      return cls(stop, 0.0, None, None), most
    return cls(stop, float(temperature), None if top_p in (None, 1) else float(top_p), top_k or None), most


def policy_of(name: str, settings: Mapping[str, Any]) -> Policy:
  """The policy `name` with its own settings, given as text or as values.

  Raises:
    ValueError: no such policy or setting, or a bad value.
  """
  cls = policies.get(name)
  types = program.flag_types("", cls)
  if unknown := sorted(set(settings) - set(types)):
    raise ValueError(f"{unknown[0]}={settings[unknown[0]]}: policy={name} has {', '.join(types)}, and no {unknown[0]}")
  try:
    return cls(**{key: program.parse_value(types[key], str(value)) for key, value in settings.items()})
  except ValueError as error:
    raise ValueError(f"policy={name}: {error}") from None


def size_class(row: Passage) -> int:
  """Tokens of a row after the first scored position, rounded up to a power of two: rows of one class are alike."""
  steps = len(row.tokens) - 1 - int(row.positions[0])
  return steps and 1 << (max(steps, LEAST) - 1).bit_length()


def joined(first: Passage, second: Passage) -> Passage:
  """Two rows of the same tokens as one, which scores the targets of both."""
  join = lambda name: np.concatenate([getattr(first, name), getattr(second, name)])
  return Passage(first.tokens, join("positions"), join("targets"))


def check_device(device: str | None) -> None:
  """Raises ValueError if `device` is not where JAX computes, which JAX_PLATFORMS alone decides."""
  here = jax.default_backend()
  if device is not None and device.partition(":")[0] not in (here, {"gpu": "cuda"}.get(here)):
    raise ValueError(f"device={device}: JAX computes on {here}; leave the device out, or set JAX_PLATFORMS")


@register_model("dms_jax")
class DmsJaxLM(TemplateLM):
  """A checkpoint under a policy.

  Args:
    checkpoint, retrofit, dtype: as `dms_jax.load` takes them; the retrofit's weights serve any policy.
    policy: a name of `dms_jax.policies`, or a policy; default dms for a model with gates, else vanilla.
    cr, budget, budget_rule: the bound on the cache, a compression ratio or tokens a head
      (`experiments.methods.budgets.Budget`).
    batch_size: rows scored or written together; a number.
    max_batch_size: ignored; it is for automatic sizes.
    device: None, or the backend that JAX uses.
    max_length: most tokens of a text; default the model's context. Longer contexts lose their beginning.
    max_gen_toks: most new tokens where a task sets none.
    prefill_chunk: prompt tokens that are read at once.
    seed: of sampled texts; each request has a key of its own.
    settings: the policy's own, such as `window=16`.

  Raises:
    ValueError: a bad argument, or a policy that the model cannot follow.
  """

  def __init__(
    self, checkpoint: str, retrofit: str | None = None, dtype: str | None = None, policy: str | Policy | None = None,
    cr: float | None = None, budget: int | None = None, budget_rule: str = "paper", batch_size: int | str = 1,
    max_batch_size: int | None = None, device: str | None = None, max_length: int | None = None,
    max_gen_toks: int = 256, prefill_chunk: int = 256, seed: int = 0, **settings: Any,
  ):  # fmt: skip
    super().__init__()
    check_device(device)
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
      raise ValueError(f"batch_size={batch_size} must be a number, 1 or more")
    if settings and isinstance(policy, Policy | None):
      raise ValueError(f"{next(iter(settings))}=...: no such argument; the settings of a policy need policy=NAME")
    self.batch_size, self.chunk, self.seed, self.max_gen_toks = int(batch_size), prefill_chunk, seed, max_gen_toks
    self.checkpoint = str(checkpoint)
    self.tok = Tokenizer.load(checkpoint)
    self.dms_model = load_model(self.checkpoint, retrofit, dtype)
    longest = self.dms_model.config.max_position_embeddings
    self.max_length = longest if max_length is None else max_length
    if not 1 < self.max_length <= longest:
      raise ValueError(f"max_length={max_length} must lie between 2 and the model's {longest} positions")
    name = policy or ("vanilla" if self.dms_model.dms is None else "dms")
    self.policy = name if isinstance(name, Policy) else policy_of(name, settings)
    self.budget = self._bounded(cr, budget, budget_rule)
    fitted(self.dms_model, self.policy, self.budget, [self.max_length])

  def _bounded(self, cr: float | None, tokens: int | None, rule: str) -> Budget:
    """The budget; sets what follows from it in the policy."""
    name = type(self.policy).__name__
    if tokens is not None and not isinstance(tokens, int):
      raise ValueError(f"budget={tokens} must be a whole number of tokens")
    if rule not in RULES:
      raise ValueError(f"budget_rule={rule} must be one of {', '.join(RULES)}")
    if cr is not None and tokens is not None:
      raise ValueError(f"cr={cr} and budget={tokens}: give one of them")
    found = Budget(None if cr is None else float(cr), tokens, typing.cast(Any, rule))
    if found.given and not takes_budget(self.policy):
      raise ValueError(f"{found.named()}: {name} has no budget; leave it out")
    if (cr is not None and not cr >= 1) or (tokens is not None and tokens < 1):
      raise ValueError(f"{found.named()} must be 1 or more")
    if found.given and (own := [k for k in ("budget", "cr") if getattr(self.policy, k, None) is not None]):
      raise ValueError(f"{found.named()}: {name} has a {own[0]} of its own; give one of them")
    fields = {field.name: field.default for field in dataclasses.fields(self.policy)}
    more = {k: v for k, v in shaped(name.lower(), found).items() if getattr(self.policy, k) == fields[k]}
    self.policy = self.policy.replace(**more)
    return found

  # Text and tokens ----------------------------------------------------------------------------------------------------

  @property
  def eot_token_id(self) -> int:
    ids = self.tok.eos_token_ids or self.dms_model.config.eos_token_ids
    if not ids:
      raise ValueError(f"{self.checkpoint}: neither its tokenizer nor its config names an end token")
    return ids[0]

  @property
  def prefix_token_id(self) -> int:
    """The token before a text without a context: BOS, or the end token if there is no BOS."""
    return self.eot_token_id if self.tok.bos_token_id is None else self.tok.bos_token_id

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
    """Ids of a text; BOS comes first if the tokenizer adds it and `add_special_tokens` is not false."""
    return self.tok.encode(string, continues=add_special_tokens is False)

  @property
  def tokenizer_name(self) -> str:
    return self.checkpoint.strip("/").replace("/", "__")

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """The chat template's source, which the harness stores with the results; None if none is applied."""
    template = self.tok.settings.get("chat_template")
    return str(template) if chat_template and template is not None else None

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """The text of a conversation; without a generation prompt it ends with the last message, which goes on."""
    text = self.tok.chat(chat_history, add_generation_prompt=add_generation_prompt)
    if add_generation_prompt:
      return text
    last = chat_history[-1]["content"].strip()
    return text[: text.rindex(last) + len(last)]

  # Likelihood ---------------------------------------------------------------------------------------------------------

  def _passage(self, context: list[int], continuation: list[int]) -> Passage:
    """The row that scores a continuation, with as much of the context as fits."""
    if not context or not continuation:
      raise ValueError(f"a request with {len(context)} tokens of context and {len(continuation)} to score")
    if len(continuation) > self.max_length:
      raise ValueError(f"max_length={self.max_length}: a continuation has {len(continuation)} tokens")
    tokens = np.array((context + continuation)[-(self.max_length + 1) :][:-1], np.int32)
    count = len(continuation)
    return Passage(
      tokens, np.arange(len(tokens) - count, len(tokens), dtype=np.int32), np.array(continuation, np.int32)
    )

  def _scored(self, passages: Sequence[Passage]) -> Iterator[tuple[list[int], list[Scored]]]:
    """(numbers of passages, their scores) of each batch; a batch holds passages of one `size_class`."""
    limit = masked(self.policy, self.budget)
    group = None
    if isinstance(limit, Policy):
      group, _ = fitted(self.dms_model, self.policy, self.budget, [len(row.tokens) for row in passages])
    sizes: dict[int, list[int]] = {}
    for number, passage in enumerate(passages):
      sizes.setdefault(size_class(passage), []).append(number)
    for numbers in sizes.values():
      like = [passages[number] for number in numbers]
      numbers.sort(key=lambda number: -len(passages[number].tokens))
      for start in range(0, len(numbers), self.batch_size):
        block = numbers[start : start + self.batch_size]
        own = limit if group is None else group.at(block).batched()
        (found,) = likelihood.score(
          [(self.dms_model, own)], [passages[number] for number in block], batch=self.batch_size,
          chunk=self.chunk, shaped_like=like,
        )  # fmt: skip
        yield block, found

  def _loglikelihood_tokens(
    self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
  ) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, whether greedy decoding writes the continuation) of each request.

    Requests with one token to score after the same context, such as letters, share a row.
    """
    passages: list[Passage] = []
    asked: list[list[tuple[int, slice]]] = []  # requests of each passage, with their targets there
    shared: dict[bytes, int] = {}
    for number, (_, context, continuation) in enumerate(requests):
      row = self._passage(list(context), list(continuation))
      key = row.tokens.tobytes()
      if len(continuation) == 1 and key in shared:
        place = shared[key]
        passages[place] = row = joined(passages[place], row)
      else:
        place = len(passages)
        passages.append(row)
        asked.append([])
        if len(continuation) == 1:
          shared[key] = place
      asked[place].append((number, slice(len(row.targets) - len(continuation), len(row.targets))))
    out: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
      for numbers, found in self._scored(passages):
        for place, scored in zip(numbers, found, strict=True):
          for number, part in asked[place]:
            out[number] = float(scored.logprobs[part].sum()), bool(scored.greedy[part].all())
            if requests[number][0] is not None:
              self.cache_hook.add_partial("loglikelihood", requests[number][0], out[number])
            bar.update()
    return out

  def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
    """The log-likelihood of each whole text in nats, in windows of `max_length` tokens, each token scored once."""
    texts = [request.args[0] for request in requests]
    windows: list[tuple[Any, list[int], list[int]]] = []
    owners: list[int] = []
    for number, text in enumerate(texts):
      parts = utils.get_rolling_token_windows(
        token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
      )
      for part in map(utils.make_disjoint_window, parts):
        windows.append((None, *part))
        owners.append(number)
    totals = [0.0] * len(texts)
    for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
      totals[number] += value
    for text, total in zip(texts, totals, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
    return totals

  # Generation ---------------------------------------------------------------------------------------------------------

  def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
    """The text after each context, without the stop string that ended it."""
    out = [""] * len(requests)
    prompts: list[list[int]] = []
    most: list[int] = []
    alike: dict[Sampling, list[int]] = {}
    for number, request in enumerate(requests):
      context, given = request.args
      sampling, new = Sampling.read(given, self.max_gen_toks)
      if new >= self.max_length:
        raise ValueError(f"max_length={self.max_length} leaves no context beside max_gen_toks={new}")
      prompts.append((self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - new) :])
      most.append(new)
      alike.setdefault(sampling, []).append(number)
    with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
      for sampling, numbers in alike.items():
        totals = [len(prompts[number]) + most[number] for number in numbers]
        group, _ = fitted(self.dms_model, self.policy, self.budget, totals)
        for place, text in self._written(group, sampling, [(prompts[n], most[n], n) for n in numbers]):
          out[numbers[place]] = text
          self.cache_hook.add_partial("generate_until", requests[numbers[place]].args, text)
          bar.update()
    return out

  def _written(
    self, group: Group, sampling: Sampling, asked: Sequence[tuple[list[int], int, int]]
  ) -> Iterator[tuple[int, str]]:
    """(place in `asked`, text) as the texts end; `asked` holds (prompt, most new tokens, number of the request)."""
    longest = max(len(prompt) + most for prompt, most, _ in asked)
    generator = Generator(
      self.dms_model, policy=group.policy, width=self.batch_size, max_length=longest, temperature=sampling.temperature,
      top_p=sampling.top_p, top_k=sampling.top_k, stop=sampling.stop, prefill_chunk=self.chunk, tokenizer=self.tok,
    )  # fmt: skip
    if not group.policy.data_dependent:
      generator.memory.reserve(most_tokens(group.policy, group.numbers, longest), min(self.chunk, longest))
    key = jax.random.key(self.seed)
    tickets = {
      generator.submit(
        prompt, max_new_tokens=most, key=jax.random.fold_in(key, number) if sampling.temperature else None,
        **group.of_row(place),
      ): place
      for place, (prompt, most, number) in enumerate(asked)
    }  # fmt: skip
    while generator.busy:
      generator.step()
      for ticket in [ticket for ticket in tickets if generator.results[ticket].finished]:
        yield tickets.pop(ticket), generator.results.pop(ticket).text[0]


def load_model(path: str, retrofit: str | None, dtype: str | None) -> Model:
  """The model of a checkpoint, with the weights of a retrofit if one is given."""
  if retrofit is None:
    return checkpoint.load(path, dtype=dtype)
  return checkpoint.load_retrofitted(path, retrofit, dtype=dtype)
