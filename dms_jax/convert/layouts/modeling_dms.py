"""Llama, Qwen2 and Qwen3 that evict from their KV cache (DMS), for transformers 5; plain PyTorch.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=256, return_dict_in_generate=True)
    out.cache.live()        # tokens held, [layers, rows, KV heads]; `out.past_key_values` in earlier versions
    out.cache.nbytes        # bytes of its keys and values

A conversation goes on with `model.generate(all tokens so far, attention_mask=..., cache=out.cache)`. What a row has
read cannot be taken back: a row that ends early reads padding until all have ended, and its mask must go on to show it.

Dynamic Memory Sparsification (DMS, arXiv 2506.05345) teaches a model which entries of its KV cache it can forget. Each
KV head of each layer computes one *gate logit* a token. Above the threshold, the token `shift` places before is evicted
for this head: it stays visible for a window of W more tokens, and then its slot is free for another token. With i the
position of a query and j that of a key:

    key j is visible to query i  if and only if  j <= i and (i - j <= W or not evicted[j])

The same holds in training, in prefill and in decoding. So a prompt may be read at once, in chunks or token by token.

What differs from a stock model:
  `DMSAttention` takes the place of each layer's attention: it adds the gate, and attends by the formula above.
  `DMSCache` takes the place of `DynamicCache`. A head's tokens lie in pages of `PAGE` slots; a page belongs to one head
      of one row, and heads that evict much own few.
  `DMSMixin.forward` finds each token's position, in its own row and without padding, for all layers.

Settings are keys of config.json, mostly with the names of NVIDIA's checkpoints; `from_pretrained(..., name=value)` or
`model.config.name = value` change them:
  dms_separate_alpha: true for an adapter gate, a projection of the residual stream; false for a neuron gate, the last
      channel of the first query head of each group, which attention then does without.
  dms_window_size: W, in tokens.
  dms_alpha_scale, dms_initial_alpha_offset: a gate logit is scale * raw - offset.
  dms_alpha_per: "head", or "layer" where KV head 0 decides for all heads of its layer.
  dms_shift: 1 if a token decides about the token before it, 0 if about itself.
  dms_threshold: tokens with a logit above it are evicted; raise it to evict less, without training.
  dms_disable_eviction: true keeps every token; the neuron gate's channel stays left out.

Letters in shapes: B rows, T tokens of a chunk, N query heads, K KV heads, G = N/K, H head size, D model width, S slots.
"""

from __future__ import annotations

import dataclasses
import inspect
import math

import torch
import transformers
from torch import nn
from torch.nn import functional as F

if int(transformers.__version__.split(".")[0]) != 5 or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 4):
  raise ImportError(
    f"modeling_dms.py needs transformers 5 and torch 2.4 or newer, found transformers {transformers.__version__} and "
    f"torch {torch.__version__}: pip install 'transformers>=5,<6' 'torch>=2.4'"
  )

from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

PAGE = 32  # slots of a page: fewer waste less memory, more make larger matrix products
QUERIES = 256  # queries of a prompt that attend at once: bounds the memory of their mask
NOWHERE = torch.iinfo(torch.int32).max  # position of a free slot and of padding: after every query, so never visible
# The name of a model's cache argument: transformers renamed `past_key_values` within version 5.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


# Settings and positions -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
  """The `dms_*` keys of a config.json; see the module's docstring."""

  adapter: bool
  window: int
  scale: float
  offset: float
  per: str
  shift: int
  threshold: float

  @classmethod
  def of(cls, config) -> Settings:
    """The settings in a transformers config.

    Raises:
      ValueError: a key is missing, or its value is none that DMS knows.
    """
    read = lambda name, default=None: getattr(config, name, None) if hasattr(config, name) else default
    settings = cls(
      adapter=read("dms_separate_alpha"),
      window=read("dms_window_size"),
      scale=read("dms_alpha_scale"),
      offset=read("dms_initial_alpha_offset"),
      per=read("dms_alpha_per", "head"),
      shift=read("dms_shift", 1),
      threshold=math.inf if read("dms_disable_eviction") else read("dms_threshold", 0.0),
    )
    number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    whole = lambda value: isinstance(value, int) and not isinstance(value, bool)
    wrong = [
      f"{name}={getattr(config, name, None)!r} should be {what}"
      for name, right, what in (
        ("dms_separate_alpha", isinstance(settings.adapter, bool), "true or false"),
        ("dms_window_size", whole(settings.window) and settings.window >= 0, "0 or more tokens"),
        ("dms_alpha_scale", number(settings.scale) and math.isfinite(settings.scale), "a number"),
        ("dms_initial_alpha_offset", number(settings.offset) and math.isfinite(settings.offset), "a number"),
        ("dms_alpha_per", settings.per in ("head", "layer"), "'head' or 'layer'"),
        ("dms_shift", whole(settings.shift) and settings.shift in (0, 1), "0 or 1"),
        ("dms_threshold", number(settings.threshold), "a number"),
        ("dms_disable_eviction", isinstance(read("dms_disable_eviction"), bool | None), "true or false"),
      )
      if not right
    ]
    if wrong:
      raise ValueError(f"config.json does not describe DMS gates: {'; '.join(wrong)}")
    return settings


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Where the tokens of one forward pass stand; the same for all layers.

  Attributes:
    positions: int64 [B, T]; each row's first real token is at 0, padding is `NOWHERE`.
    before, after: int64 [B], position of the newest token before this chunk and at its end; -1 for none.
    decider: int64 [B, T + 1], the column that decides about the token before this chunk, then about each column's
      token; T where none has decided yet.
    settings: of the gates.
    window: W.
  """

  positions: torch.Tensor
  before: torch.Tensor
  after: torch.Tensor
  decider: torch.Tensor
  settings: Settings
  window: int

  @classmethod
  def of(cls, real: torch.Tensor, cache: DMSCache | None, settings: Settings) -> Chunk:
    """The chunk whose tokens [B, T] are `real`, the others padding, after those that `cache` has read."""
    rows, columns = real.shape
    fresh = cache is None or cache.seen is None
    seen = torch.zeros(rows, dtype=torch.long, device=real.device) if fresh else cache.seen
    index = torch.arange(columns, device=real.device).expand(rows, -1)
    none = torch.full_like(real[:, :1], columns, dtype=torch.long)
    if settings.shift:  # the first real token at or after each column
      decider = torch.cat([index.masked_fill(~real, columns), none], 1).flip(1).cummin(1).values.flip(1)
    else:
      decider = torch.cat([none, index], 1)
    positions = seen[:, None] + real.long().cumsum(1) - 1
    return cls(
      positions=positions.masked_fill(~real, NOWHERE), before=seen - 1, after=positions[:, -1], decider=decider,
      settings=settings, window=settings.window if cache is None else cache.window,
    )  # fmt: skip


def visible(queries: torch.Tensor, keys: torch.Tensor, evicted: torch.Tensor, window: int) -> torch.Tensor:
  """Which keys each query sees, bool [B, K, T, S], from positions [B, T] and [B, K, S] and evictions [B, K, S]."""
  distance = queries[:, None, :, None] - keys[:, :, None]
  return (distance >= 0) & ((distance <= window) | ~evicted[:, :, None])


# The cache ------------------------------------------------------------------------------------------------------------


class DMSCacheLayer:
  """The tokens that the KV heads of one layer hold, in pages.

  Head k of row b is owner b * K + k. A slot holds a token's key and value after RoPE, its position, and whether it is
  evicted once it leaves the window; order means nothing. Pages are never given back: a head's tokens do not become
  fewer, as those that are not evicted stay and the window keeps its length.

  Attributes, with P pages:
    keys, values: [P, PAGE, H], in the model's dtype.
    position: int32 [P, PAGE]; `NOWHERE` for a free slot.
    evicted: bool [P, PAGE].
    owner: int64 [P].
  """

  def __init__(self, rows: int, heads: int, like: torch.Tensor):
    """An empty layer of B `rows` and K `heads`, with the head size, dtype and device of `like` [..., H]."""
    self.rows, self.heads = rows, heads
    self.keys = like.new_zeros(0, PAGE, like.shape[-1])
    self.values = self.keys
    self.position = torch.full((0, PAGE), NOWHERE, dtype=torch.int32, device=like.device)
    self.evicted = torch.zeros((0, PAGE), dtype=torch.bool, device=like.device)
    self.owner = torch.zeros(0, dtype=torch.long, device=like.device)

  def _count(self, per_page: torch.Tensor) -> torch.Tensor:
    """Sums a number a page [P] for each owner, int64 [B * K]."""
    return torch.zeros(self.rows * self.heads, dtype=torch.long, device=self.owner.device).index_add(
      0, self.owner, per_page.long()
    )

  def live(self) -> torch.Tensor:
    """Tokens that each head holds, int64 [B, K]."""
    return self._count((self.position != NOWHERE).sum(1)).view(self.rows, self.heads)

  def decide(self, chunk: Chunk, evicted: torch.Tensor) -> None:
    """Takes the decisions [B, K] about the newest token before the chunk, which may come one token late."""
    newest = self.position == chunk.before[self.owner // self.heads, None]
    self.evicted |= newest & evicted.flatten()[self.owner, None]

  def forget(self, chunk: Chunk) -> None:
    """Frees the slots of evicted tokens that are outside the window of the next query."""
    oldest = chunk.after[self.owner // self.heads, None] - chunk.window
    self.position.masked_fill_(self.evicted & (self.position < oldest), NOWHERE)

  def write(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor, evicted: torch.Tensor) -> None:
    """Stores keys and values [B, K, T, H] of the tokens whose position [B, K, T] is not `NOWHERE`.

    They take free slots of their head, and then new pages.
    """
    chosen = (position != NOWHERE).flatten().nonzero().squeeze(1)  # ordered by owner
    owner = chosen // position.shape[2]
    wanted = owner.bincount(minlength=self.rows * self.heads)
    free = self._count((self.position == NOWHERE).sum(1))
    pages = (wanted - free).clamp(min=0).add(PAGE - 1).div(PAGE, rounding_mode="floor")
    self._add_pages(torch.arange(len(pages), device=pages.device).repeat_interleave(pages))
    free += pages * PAGE

    slots = (self.position == NOWHERE).flatten().nonzero().squeeze(1)
    slots = slots[self.owner[slots // PAGE].argsort(stable=True)]  # ordered by owner too
    rank = torch.arange(len(chosen), device=chosen.device) - (wanted.cumsum(0) - wanted)[owner]
    slots = slots[(free.cumsum(0) - free)[owner] + rank]  # the token of rank r takes its owner's free slot r
    self.keys.flatten(0, 1)[slots] = keys.flatten(0, 2)[chosen]
    self.values.flatten(0, 1)[slots] = values.flatten(0, 2)[chosen]
    self.position.flatten()[slots] = position.flatten()[chosen].int()
    self.evicted.flatten()[slots] = evicted.flatten()[chosen]

  def _add_pages(self, owner: torch.Tensor) -> None:
    """Adds empty pages of these owners [n]."""
    if not len(owner):
      return
    # Zeros, not any memory: an invisible slot has weight 0, and 0 times NaN would be NaN.
    more = lambda pages, fill: torch.cat([pages, pages.new_full((len(owner), *pages.shape[1:]), fill)])
    self.keys, self.values = more(self.keys, 0), more(self.values, 0)
    self.position, self.evicted = more(self.position, NOWHERE), more(self.evicted, False)
    self.owner = torch.cat([self.owner, owner])

  def attend(self, queries: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of one query a row and head over all tokens held, [B, N, 1, H] -> [B, N, 1, H].

    It reads each page once and builds no padded copy: a softmax in float32 whose maximum and sums are taken first over
    each page, then over the pages of a head.
    """
    owners = self.rows * self.heads
    pages = queries.view(owners, -1, queries.shape[-1]).float()[self.owner]  # the queries [G, H] of each page
    scores = (pages @ self.keys.float().mT * scale).masked_fill((self.position == NOWHERE)[:, None], -torch.inf)
    index = self.owner[:, None].expand(-1, scores.shape[1])
    top = scores.new_full((owners, scores.shape[1]), -torch.inf).scatter_reduce(0, index, scores.amax(2), "amax")
    weights = (scores - top[self.owner, :, None]).exp()
    total = torch.zeros_like(top).index_add(0, self.owner, weights.sum(2))
    out = scores.new_zeros(*top.shape, self.values.shape[2]).index_add(0, self.owner, weights @ self.values.float())
    out = out / total.clamp(min=torch.finfo(total.dtype).tiny)[..., None]  # of a row that has only seen padding: 0
    return out.to(queries.dtype).view(queries.shape)

  def padded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(keys, values [B, K, S, H], position, evicted [B, K, S]) as one array, S for the head with the most pages.

    A chunk of a prompt attends to this copy, which lives no longer than its layer's attention.
    """
    order = self.owner.argsort(stable=True)
    owner, count = self.owner[order], self._count(torch.ones_like(self.owner))
    most = int(count.max()) if len(order) else 0
    place = owner * most + torch.arange(len(order), device=owner.device) - (count.cumsum(0) - count)[owner]

    def spread(pages: torch.Tensor, fill) -> torch.Tensor:
      out = pages.new_full((len(count) * most, *pages.shape[1:]), fill)
      out[place] = pages[order]
      return out.view(self.rows, self.heads, most * PAGE, *pages.shape[2:])

    return spread(self.keys, 0), spread(self.values, 0), spread(self.position, NOWHERE), spread(self.evicted, False)

  def select_rows(self, rows: torch.Tensor) -> None:
    """Makes row `rows[b]` the new row b; a row may be taken several times, as in beam search."""
    row_of_page = self.owner // self.heads
    taken = [(row_of_page == row).nonzero().squeeze(1) for row in rows.tolist()]
    pages = torch.cat(taken)
    sizes = torch.tensor([len(t) for t in taken], device=pages.device)
    new_row = torch.arange(len(taken), device=pages.device).repeat_interleave(sizes)
    self.rows, self.owner = len(taken), new_row * self.heads + self.owner[pages] % self.heads
    self.keys, self.values = self.keys[pages], self.values[pages]
    self.position, self.evicted = self.position[pages], self.evicted[pages]


class DMSCache(Cache):
  """A KV cache from which each head frees what it evicts.

  Attributes:
    layers: a `DMSCacheLayer` for each layer; empty before the first forward pass.
    window: W of the model it was made for.
    seen: int64 [B], tokens that each row has read, padding not counted; None before the first forward pass.
    columns: tokens and padding read, the same for all rows.
  """

  is_compileable, is_croppable = False, False
  is_initialized = property(lambda self: self.seen is not None)

  def __init__(self, config):
    super().__init__(layers=[])
    self.window = Settings.of(config).window
    self.num_layers, self.heads = config.num_hidden_layers, config.num_key_value_heads
    self.reset()

  def reset(self) -> None:
    """Forgets everything."""
    self.layers: list[DMSCacheLayer] = []
    self.seen, self.columns = None, 0

  def layer(self, index: int, keys: torch.Tensor) -> DMSCacheLayer:
    """The layer `index`, made for keys like `keys` [B, K, T, H] if it is the first to be read."""
    if index == len(self.layers):
      self.layers.append(DMSCacheLayer(len(keys), self.heads, keys))
    return self.layers[index]

  def advance(self, chunk: Chunk) -> None:
    """Notes that all layers have read the chunk."""
    self.seen, self.columns = chunk.after + 1, self.columns + chunk.positions.shape[1]

  def live(self) -> torch.Tensor:
    """Tokens held, int64 [L, B, K]."""
    return torch.stack([layer.live().cpu() for layer in self.layers])

  @property
  def nbytes(self) -> int:
    """Bytes of all pages, free slots included."""
    return sum(x.nbytes for y in self.layers for x in (y.keys, y.values, y.position, y.evicted, y.owner))

  # What generation asks of a cache. Its length is that of the token matrix, not the number of tokens held.

  def get_seq_length(self, layer_idx: int = 0) -> int:
    return self.columns

  def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
    return self.columns + query_length, 0

  def get_max_length(self, layer_idx: int | None = None) -> int:
    return -1  # none

  get_max_cache_shape = get_max_length  # its earlier name

  def batch_select_indices(self, indices: torch.Tensor) -> None:
    """Keeps the rows `indices` alone, in this order."""
    for layer in self.layers:
      layer.select_rows(indices)
    self.seen = self.seen[indices.to(self.seen.device)]

  def reorder_cache(self, beam_idx: torch.Tensor) -> None:
    """Beam search: row b goes on from row `beam_idx[b]`."""
    self.batch_select_indices(beam_idx)

  def batch_repeat_interleave(self, repeats: int) -> None:
    """Repeats each row `repeats` times."""
    self.batch_select_indices(torch.arange(len(self.seen)).repeat_interleave(repeats))

  def update(self, *args, **kwargs):
    raise NotImplementedError("DMSCache stores tokens with their evictions: it works with the models of its file alone")

  def crop(self, *args, **kwargs):
    raise NotImplementedError("DMSCache cannot take tokens back: what they evicted is gone")

  def activate_past_recording(self):
    raise NotImplementedError("assisted decoding takes tokens back, and DMSCache cannot: what they evicted is gone")

  def offload(self, *args, **kwargs):
    raise NotImplementedError("DMSCache is not offloaded")

  prefetch = early_initialization = offload


# The model ------------------------------------------------------------------------------------------------------------


class DMSAttention(nn.Module):
  """Attention with a gate and evictions; takes over the projections, and norms of q and k, of a stock attention."""

  def __init__(self, stock: nn.Module, config):
    super().__init__()
    self.layer_idx, self.head_dim, self.scaling = stock.layer_idx, stock.head_dim, stock.scaling
    self.groups, self.eps = stock.num_key_value_groups, config.rms_norm_eps
    self.q_proj, self.k_proj, self.v_proj, self.o_proj = stock.q_proj, stock.k_proj, stock.v_proj, stock.o_proj
    self.q_norm, self.k_norm = (getattr(stock, name, nn.Identity()) for name in ("q_norm", "k_norm"))
    if Settings.of(config).adapter:
      self.dms_proj_alpha_norm = nn.RMSNorm(config.hidden_size, eps=self.eps)
      self.dms_proj_alpha = nn.Linear(config.hidden_size, config.num_key_value_heads, bias=False)

  def forward(
    self,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    residual: torch.Tensor,
    chunk: Chunk,
    cache: DMSCache | None = None,
    past_key_values: DMSCache | None = None,
    **_,
  ) -> tuple[torch.Tensor, None]:
    """Attention of a chunk: normed states [B, T, D] -> (update of the residual stream [B, T, D], None).

    Args:
      position_embeddings: RoPE's (cos, sin).
      residual: the residual stream [B, T, D], which the adapter gate reads.
    """
    heads = lambda x: x.unflatten(2, (-1, self.head_dim))  # [B, T, heads, H]
    q = self.q_norm(heads(self.q_proj(hidden_states))).transpose(1, 2)
    k = self.k_norm(heads(self.k_proj(hidden_states))).transpose(1, 2)
    v = heads(self.v_proj(hidden_states)).transpose(1, 2)
    settings = chunk.settings
    decided = self.gate_logits(settings, residual, hidden_states) > settings.threshold  # by each token, [B, K, T]
    if not settings.adapter:
      q = self.clear_neuron(q)
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    if not settings.adapter:
      q = self.clear_neuron(q)  # RoPE has turned it

    # About the token before the chunk, then about each of its tokens; those not decided yet are not evicted.
    evicted = F.pad(decided, (0, 1)).gather(2, chunk.decider[:, None].expand(-1, k.shape[1], -1))
    before, evicted = evicted[..., 0], evicted[..., 1:]
    position = chunk.positions[:, None].expand_as(evicted)
    cache = past_key_values if cache is None else cache
    if cache is None:
      attended = self.attend(q, (k, v, position, evicted), chunk)
    else:
      held = cache.layer(self.layer_idx, k)
      held.decide(chunk, before)
      if q.shape[2] == 1:  # write first: a slot that is freed now takes the new token
        held.forget(chunk)
        held.write(k, v, position, evicted)
        attended = held.attend(q, self.scaling)
      else:  # attend first: the chunk's first queries still see what its last ones do not
        pairs = zip(held.padded(), (k, v, position, evicted), strict=True)
        attended = self.attend(q, [torch.cat([old, new], dim=2) for old, new in pairs], chunk)
        held.forget(chunk)
        outside = evicted & (position < (chunk.after - chunk.window)[:, None, None])
        held.write(k, v, position.masked_fill(outside, NOWHERE), evicted)
    return self.o_proj(attended.transpose(1, 2).flatten(2)), None

  def gate_logits(self, settings: Settings, residual: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
    """Gate logits [B, K, T], always float32: at a scale of 100, rounding would flip decisions."""
    with torch.autocast(residual.device.type, enabled=False):
      if settings.adapter:
        norm, weight = self.dms_proj_alpha_norm.weight.float(), self.dms_proj_alpha.weight.float()
        raw = F.linear(F.rms_norm(residual.float(), norm.shape, norm, self.eps), weight)
      else:
        first = lambda x: x.unflatten(0, (-1, self.groups, self.head_dim))[:, 0].flatten(0, 1).float()  # of each group
        weight, bias = self.q_proj.weight, self.q_proj.bias
        q = F.linear(normed.float(), first(weight), None if bias is None else first(bias))
        raw = self.q_norm(q.unflatten(2, (-1, self.head_dim)))[..., -1]
      raw = raw.transpose(1, 2)
      if settings.per == "layer":
        raw = raw[:, :1].expand_as(raw)
      return settings.scale * raw - settings.offset

  def clear_neuron(self, q: torch.Tensor) -> torch.Tensor:
    """Queries [B, N, T, H] without the channel that the neuron gate borrows."""
    q = q.clone()
    q[:, :: self.groups, :, -1] = 0
    return q

  def attend(self, q: torch.Tensor, keys_and_values, chunk: Chunk) -> torch.Tensor:
    """Attention of queries [B, N, T, H] to (keys, values, position, evicted), the chunk's own T last."""
    keys, values, position, evicted = keys_and_values
    count, out = q.shape[2], []
    for start in range(0, count, QUERIES):
      end = min(start + QUERIES, count)
      until = keys.shape[2] - count + end  # no query of this block sees what comes later
      mask = visible(chunk.positions[:, start:end], position[..., :until], evicted[..., :until], chunk.window)
      # G query heads share a KV head: [B, K, G * T, H].
      grouped = q[:, :, start:end].unflatten(1, (-1, self.groups)).flatten(2, 3)
      mask = mask[:, :, None].expand(-1, -1, self.groups, -1, -1).flatten(2, 3)
      block = F.scaled_dot_product_attention(
        grouped, keys[:, :, :until], values[:, :, :until], attn_mask=mask, scale=self.scaling
      )
      out.append(block.unflatten(2, (self.groups, -1)).flatten(1, 2))
    return torch.cat(out, dim=2)


def pass_residual(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
  """Hands a layer's input on to its attention: stock layers pass the normed states alone."""
  return args, {**kwargs, "residual": args[0] if args else kwargs["hidden_states"]}


class DMSMixin:
  """Turns a stock `...ForCausalLM` into one that evicts."""

  _keep_in_fp32_modules_strict = ["dms_proj_alpha", "dms_proj_alpha_norm"]  # noqa: RUF012
  _supports_flash_attn = _supports_flex_attn = _can_compile_fullgraph = False

  def __init__(self, config):
    super().__init__(config)
    for layer in self.model.layers:
      layer.self_attn = DMSAttention(layer.self_attn, config)
      layer.register_forward_pre_hook(pass_residual, with_kwargs=True)
    self.post_init()

  @classmethod
  def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
    """As in transformers; gates that are missing are an error, for random ones would evict at random."""
    model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
    if missing := sorted(name for name in info["missing_keys"] if "dms_proj_alpha" in name):
      source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
      raise ValueError(
        f"{source}: {len(missing)} tensors of the gates are missing, such as {missing[0]}; export or fetch it again"
      )
    return (model, info) if output_loading_info else model

  def forward(
    self,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: DMSCache | None = None,
    past_key_values: DMSCache | None = None,
    inputs_embeds: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    **kwargs,
  ):
    """As in transformers.

    Args:
      attention_mask: [B, tokens read before + T], 0 for padding, on any side; None means that every token is real.
      cache: a `DMSCache`, which is extended by these tokens; None makes one, unless `use_cache` is false.

    Raises:
      ValueError: a row is longer than the model's context, or an argument contradicts the cache.
    """
    cache = past_key_values if cache is None else cache
    use_cache = self.config.use_cache if use_cache is None else use_cache
    if cache is None and use_cache:
      cache = DMSCache(self.config)
    if not isinstance(cache, DMSCache | None):
      raise ValueError(f"a {type(cache).__name__} cannot evict: pass a DMSCache, or none")
    if kwargs.get("output_attentions"):
      raise ValueError("output_attentions=True: attention weights are not kept; leave it out")
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    chunk = Chunk.of(self._real_tokens(tokens, attention_mask, cache), cache, Settings.of(self.config))
    self._check_positions(chunk, position_ids)
    outputs = super().forward(
      input_ids=input_ids,
      attention_mask=(chunk.positions != NOWHERE)[:, None, None],  # four axes: stock code makes no mask of its own
      position_ids=chunk.positions.masked_fill(chunk.positions == NOWHERE, 0),
      inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache, logits_to_keep=logits_to_keep, chunk=chunk,
      **{CACHE: cache}, **kwargs,
    )  # fmt: skip
    if cache is not None:
      cache.advance(chunk)
    return outputs

  def _real_tokens(self, tokens, attention_mask, cache) -> torch.Tensor:
    """Which tokens of the chunk are no padding, bool [B, T]."""
    rows, columns = tokens.shape[:2]
    before = 0 if cache is None else cache.columns
    if before and len(cache.seen) != rows:
      raise ValueError(f"{rows} rows of tokens, and the cache has {len(cache.seen)}")
    if attention_mask is None:
      return torch.ones(rows, columns, dtype=torch.bool, device=tokens.device)
    if attention_mask.shape != (rows, before + columns):
      shape = tuple(attention_mask.shape)
      raise ValueError(
        f"attention_mask has shape {shape}; {rows} rows of {before} tokens in the cache and {columns} new ones need "
        f"{(rows, before + columns)}"
      )
    real = attention_mask.bool()
    if before and not torch.equal(real[:, :before].sum(1), cache.seen.to(real.device)):
      raise ValueError(
        "attention_mask hides tokens that the cache has read, or shows its padding; what was read cannot be taken back"
      )
    return real[:, before:]

  def _check_positions(self, chunk: Chunk, position_ids: torch.Tensor | None) -> None:
    longest, context = int(chunk.after.max()) + 1, self.config.max_position_embeddings
    if longest > context:
      raise ValueError(f"a row has {longest} tokens, and the model's context is {context}: shorten the prompt")
    if position_ids is not None:
      real = chunk.positions != NOWHERE
      if not torch.equal(position_ids.expand_as(real)[real], chunk.positions[real]):
        raise ValueError("position_ids must count each row's tokens from 0, padding left out; or leave them out")

  def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
    """Lets `generate` start from a `DMSCache`."""
    if generation_config.cache_implementation is not None:
      raise ValueError(
        f"cache_implementation={generation_config.cache_implementation!r}: this model evicts from a DMSCache of its "
        "own; leave it out"
      )
    given = model_kwargs.get("cache") is not None or model_kwargs.get("past_key_values") is not None
    if generation_config.use_cache is not False and not given:
      model_kwargs[CACHE] = DMSCache(self.config)
    return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


class DMSLlamaForCausalLM(DMSMixin, LlamaForCausalLM):
  """A Llama that evicts."""


class DMSQwen2ForCausalLM(DMSMixin, Qwen2ForCausalLM):
  """A Qwen2 that evicts."""


class DMSQwen3ForCausalLM(DMSMixin, Qwen3ForCausalLM):
  """A Qwen3 that evicts."""
