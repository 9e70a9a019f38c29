"""Eviction policies in plain float64 numpy, each written from its paper's own algorithm.

Papers decide between steps: token t attends to what is held and itself, then something is dropped. Every function takes
q [T, K, G, H] and k [T, K, H] of a text and returns a `Run`.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass
class Run:
  """`held[head][t]`: positions held while token t attends; `read[head][t]`: those it attends to.

  `margin`: by how much, relative to them, the closest two alternatives of any choice differed: what rounding may tip.
  """

  held: list[list[set[int]]]
  read: list[list[set[int]]]
  margin: float = math.inf


def softmax(x):
  weights = np.exp(x - x.max(axis=-1, keepdims=True))
  return weights / weights.sum(axis=-1, keepdims=True)


def attend(q, k, v, run: Run):
  """Attended values [T, K, G, H] when each token attends to what it reads."""
  out = np.zeros(q.shape)
  for head, reads in enumerate(run.read):
    for t, tokens in enumerate(reads):
      at = sorted(tokens)
      out[t, head] = softmax(q[t, head] @ k[at, head].T / math.sqrt(q.shape[-1])) @ v[at, head]
  return out


def streaming(q, k, *, sinks, window):
  """Attention sinks and a rolling cache of window(t) + 1 tokens (2309.17453, figure 4), with positions in the text."""
  rolling = lambda t: {j for j in range(t + 1) if j < sinks or t - j <= window(t)}
  held = [[rolling(t) for t in range(len(q))] for _ in range(k.shape[1])]
  return Run(held, held)


def _drop_least(q, k, size, recent, score):
  """Keeps size(t) tokens after step t; drops the least by `score(heads' weights so far)` of all but recent(t) latest.

  score(scores, weights) -> scores: dicts by position a head; weights are the mean over a KV head's query heads.
  """
  heads = k.shape[1]
  kept, scores, held, margin = (
    [[] for _ in range(heads)],
    [{} for _ in range(heads)],
    [[] for _ in range(heads)],
    math.inf,
  )
  for t in range(len(q)):
    weights = []
    for head in range(heads):
      kept[head].append(t)
      held[head].append(set(kept[head]))
      mean = softmax(q[t, head] @ k[kept[head], head].T / math.sqrt(q.shape[-1])).mean(axis=0)
      weights.append(dict(zip(kept[head], mean, strict=True)))
    scores = score(scores, weights)
    for head in range(heads):
      if len(kept[head]) > size(t):
        candidates = sorted(kept[head][: len(kept[head]) - recent(t)], key=lambda j: (scores[head][j], -j))
        if len(candidates) > 1:
          least, next_ = (scores[head][j] for j in candidates[:2])
          margin = min(margin, (next_ - least) / abs(next_))
        kept[head].remove(candidates[0])
  return Run(held, held, margin)


def tova(q, k, *, size, per_layer=False):
  """Token omission via attention (2401.06104, section 3.2): by the latest query's weights, itself a candidate."""

  def latest(scores, weights):
    if per_layer:  # all heads hold the same tokens, as they go by the same scores
      mean = {j: float(np.mean([w[j] for w in weights])) for j in weights[0]}
      return [mean for _ in weights]
    return weights

  return _drop_least(q, k, size, lambda t: 0, latest)


def h2o(q, k, *, size, recent):
  """Heavy hitters (2306.14048, algorithm 1): the sum of all weights so far, of all but the recent(t) latest tokens."""
  add = lambda scores, weights: [{j: s.get(j, 0.0) + w[j] for j in w} for s, w in zip(scores, weights, strict=True)]
  return _drop_least(q, k, size, recent, add)


def hashed(*counters) -> float:
  """32 bits a counter, mixed by the finaliser `lowbias32`; the upper 24 as a number in [0, 1)."""
  bits = 0
  for counter in counters:
    bits = (bits + counter + 0x9E3779B9) % 2**32
    bits = (bits ^ bits >> 16) * 0x7FEB352D % 2**32
    bits = (bits ^ bits >> 15) * 0x846CA68B % 2**32
    bits ^= bits >> 16
  return (bits >> 8) / 2**24


def random(q, k, *, seed, layer, sinks, budget, window):
  """The `budget` - W - 1 tokens outside the window with the largest hashes, and the window."""
  held = []
  for head in range(k.shape[1]):
    value = [math.inf if j < sinks else hashed(seed, layer, head, j) for j in range(len(q))]
    order = sorted(range(len(q)), key=lambda j, value=value: (-value[j], j))
    best = lambda t, order=order: [j for j in order if j < t - window][: budget - window - 1]
    held.append([set(best(t)) | set(range(max(t - window, 0), t + 1)) for t in range(len(q))])
  return Run(held, held)


def quest(q, k, *, page, pages, window, dense, each_head=False):
  """Page bounds sum_h max(q min, q max) (2406.10774, algorithm 1), for the pages older than the window.

  A KV head reads the pages of the largest bounds over its query heads; with `each_head` every query head has pages of
  its own, and the KV head reads them all.
  """
  held = [[set(range(t + 1)) for t in range(len(q))] for _ in range(k.shape[1])]
  read, margin = [], math.inf
  for head in range(k.shape[1]):
    read.append([])
    for t in range(len(q)):
      older = max(t - window, 0)
      parts = [range(p, min(p + page, older)) for p in range(0, older, page)]
      ends = [(k[part, head].min(axis=0), k[part, head].max(axis=0)) for part in parts]
      by_query = [[np.maximum(query * low, query * high).sum() for low, high in ends] for query in q[t, head]]
      many, chosen = len(parts) if dense else pages(t), set()
      for bounds in by_query if each_head else [np.max(by_query, axis=0)]:
        order = sorted(range(len(parts)), key=lambda p, bounds=bounds: (-bounds[p], p))
        chosen |= set(order[:many])
        if many < len(parts):
          last, next_ = bounds[order[many - 1]], bounds[order[many]]
          margin = min(margin, (last - next_) / abs(last))
      read[-1].append({j for p in chosen for j in parts[p]} | set(range(older, t + 1)))
  return Run(held, read, margin)


def keydiff(k, held):
  """KeyDiff's scores (2504.15364, algorithm 1) of one head's held positions: -cos(mean of unit keys, key)."""
  unit = {j: k[j] / np.linalg.norm(k[j]) for j in held}
  anchor = np.mean(list(unit.values()), axis=0)
  return {j: -float(u @ anchor / np.linalg.norm(anchor)) for j, u in unit.items()}


def budgeted(q, k, events, *, window, capacity, rescore, halves=False):
  """A budget kept while a text is read in chunks and decoded.

  A chunk attends to what is held and to itself, is observed, and then the tokens outside the window are cut to
  capacity(tokens seen) - W - 1, the least scores first, of equal ones the later token. A decode step drops at most one
  token before its query attends.

  Args:
    events: [(length, is a chunk)], from the first token on.
    rescore: (scores, weights, held) -> scores after a step; dicts by position, a head each; weights [query][head].
    halves: the newest (capacity - 1) // 2 tokens beside the newest one are cut last.
  """
  heads, margin = k.shape[1], math.inf
  archive, scores = [[] for _ in range(heads)], [{} for _ in range(heads)]  # `archive`: held, whatever the window
  run, start = Run([[] for _ in range(heads)], [[] for _ in range(heads)]), 0

  def cut(end):
    nonlocal margin
    for head in range(heads):
      outside = [j for j in archive[head] if j < end - window - 1]
      count = max(capacity(end) - window - 1, 0)
      if len(outside) > count:
        first = end - 1 - (capacity(end) - 1) // 2 if halves else end
        score = {j: math.inf if j >= first else scores[head][j] for j in outside}
        order = sorted(outside, key=lambda j: (-score[j], j))
        if count and math.isfinite(score[order[count - 1]]):
          last, next_ = score[order[count - 1]], score[order[count]]
          margin = min(margin, abs(last - next_) / max(abs(last), 1e-9))
        archive[head] = [j for j in archive[head] if j not in order[count:]]

  for length, is_chunk in events:
    end = start + length
    if not is_chunk:
      cut(end)
    weights = []
    for t in range(start, end):
      weights.append([])
      for head in range(heads):
        archive[head].append(t)
        run.read[head].append(set(archive[head]))
        mean = softmax(q[t, head] @ k[archive[head], head].T / math.sqrt(q.shape[-1])).mean(axis=0)
        weights[-1].append(dict(zip(archive[head], mean, strict=True)))
    scores = rescore(scores, weights, archive)
    if is_chunk:
      cut(end)
    for head in range(heads):
      run.held[head] += [set(archive[head])] * length  # after the event
    start = end
  run.margin = margin
  return run


def add_mass(scores, weights, held):
  """H2O: every query credits what it attends to."""
  out = [dict(s) for s in scores]
  for query in weights:
    for head, of_head in enumerate(query):
      for j, weight in of_head.items():
        out[head][j] = out[head].get(j, 0.0) + weight
  return out


def last_mass(scores, weights, held):
  """TOVA: the last query's attention."""
  return [dict(of_head) for of_head in weights[-1]]


def mean_of_heads(scores, weights, held):
  """TOVA in a layer whose heads hold the same tokens: the last query's attention, mean over KV heads."""
  return [{j: float(np.mean([of_head[j] for of_head in weights[-1]])) for j in weights[-1][0]} for _ in weights[-1]]


def key_similarity(k):
  """KeyDiff: from the keys held."""
  return lambda scores, weights, held: [keydiff(k[:, head], positions) for head, positions in enumerate(held)]


# (policy, keys, values) -> `rescore` of `budgeted`, by the name of a policy that derives from `Budgeted`
RESCORE = {
  "H2O": lambda policy, k, v: add_mass,
  "TOVA": lambda policy, k, v: mean_of_heads if policy.per_layer else last_mass,
  "KeyDiff": lambda policy, k, v: key_similarity(k),
}


def snapkv(q, k, *, prompt, window, budget, pool):
  """SnapKV (2404.14469, section 4): the prompt is read densely, then cut; what is generated is kept.

  `held` and `read` as while each token attends.
  """
  heads, length, margin = k.shape[1], len(q), math.inf
  held = [[set(range(t + 1)) for t in range(prompt)] for _ in range(heads)]
  for head in range(heads):
    past = max(prompt - window - 1, 0)
    votes = np.zeros(past)
    for t in range(past, prompt):
      votes += softmax(q[t, head] @ k[: t + 1, head].T / math.sqrt(q.shape[-1])).mean(axis=0)[:past]
    pooled = [votes[max(j - pool // 2, 0) : j + pool // 2 + 1].max() for j in range(past)]
    order, count = sorted(range(past), key=lambda j: (-pooled[j], j)), max(budget - window - 1, 0)
    kept = set(order[:count])
    if 0 < count < past:  # neighbours share a pooled maximum: ties are no near ties
      boundary = [pooled[j] for j in order]
      apart = [abs(boundary[count - 1] - x) / boundary[count - 1] for x in boundary if x != boundary[count - 1]]
      margin = min([margin, *apart])
    kept |= set(range(past, prompt))
    held[head] += [kept | set(range(prompt, t + 1)) for t in range(prompt, length)]
  return Run(held, held, margin)


# Methods that prune once every few steps ------------------------------------------------------------------------------


def periodic(q, k, events, *, window, budget, buffer, score):
  """Heads that hold budget(tokens seen) + `buffer` tokens are cut to the budget before the next token is read.

  A prompt is attended to densely and cut at its end.

  Args:
    events: [(length, tokens of the prompt still to come; None for a decode step)].
    score: (head, positions outside the window, positions held, tokens seen, tokens seen at the last cut) -> (scores by
      position, margin).
  """
  cuts = [0]
  heads, kept, start = k.shape[1], [[] for _ in range(k.shape[1])], 0
  run = Run([[] for _ in range(heads)], [[] for _ in range(heads)])

  def cut(end):
    least = max(budget(end), window + 1)
    for head in range(heads):
      outside, count = [j for j in kept[head] if j < end - window - 1], least - window - 1
      if len(outside) <= count:
        continue
      scores, margin = score(head, outside, list(kept[head]), end, cuts[-1])
      order = sorted(outside, key=lambda j, scores=scores: (-scores[j], j))
      if count:
        last, next_ = scores[order[count - 1]], scores[order[count]]
        if last != next_ or not math.isinf(last):
          margin = min(margin, abs(last - next_) / max(abs(last), abs(next_), 1e-9))
      run.margin = min(run.margin, margin)
      kept[head] = [j for j in kept[head] if j not in order[count:]]
    cuts.append(end)

  for length, remaining in events:
    end = start + length
    if remaining is None and len(kept[0]) >= max(budget(start), window + 1) + buffer:
      cut(start)
    for head in range(heads):
      for t in range(start, end):
        kept[head].append(t)
        run.read[head].append(set(kept[head]))
    if remaining == 0:
      cut(end)
    for head in range(heads):
      run.held[head] += [set(kept[head])] * length
    start = end
  return run


def rkv(q, k, *, window, importance, threshold, pool):
  """R-KV's scores (2505.24133, section 3, and its released code)."""

  def score(head, outside, held, end, since):
    attention = np.zeros(len(outside))
    for t in range(end - window - 1, end):
      logits = [max(query @ k[j, head] for query in q[t, head]) / math.sqrt(q.shape[-1]) for j in outside]
      attention += softmax(np.array(logits)) / (window + 1)
    pooled = [attention[max(i - pool // 2, 0) : i + pool // 2 + 1].max() for i in range(len(outside))]
    unit = np.array([k[j, head] / np.linalg.norm(k[j, head]) for j in held])
    cosine, margin = unit @ unit.T, math.inf
    for i in range(len(held)):
      margin = min(margin, np.abs(np.delete(cosine[i], i) - threshold).min())
      cosine[i, i] = 0
      if similar := [j for j in range(len(held)) if j != i and cosine[i, j] > threshold]:
        cosine[i, similar[-1]] = 0
    redundancy = dict(zip(held, softmax(cosine.mean(axis=0)), strict=True))
    return {j: importance * a - (1 - importance) * redundancy[j] for j, a in zip(outside, pooled, strict=True)}, margin

  return score


def rotated(x, position, frequencies):
  """x [H] turned by RoPE to `position`: channels c and c + H/2 are a pair."""
  half, out = len(frequencies), np.array(x)
  for c, w in enumerate(frequencies):
    cos, sin = math.cos(position * w), math.sin(position * w)
    out[c], out[c + half] = x[c] * cos - x[c + half] * sin, x[c] * sin + x[c + half] * cos
  return out


def expected_attention(q, k, v, *, frequencies, sinks, future, epsilon, covariance):
  """Expected Attention's scores (2510.00636, section 3); the statistics are of the queries since the last cut."""
  h = q.shape[-1]

  def score(head, outside, held, end, since):
    turn = np.mean(
      [np.stack([rotated(column, p, frequencies) for column in np.eye(h)], axis=1) for p in range(end, end + future)],
      axis=0,
    )
    total = np.zeros(len(held))
    scored = [i for i, j in enumerate(held) if j >= sinks]
    for g in range(q.shape[2]):
      queries = np.array(
        [rotated(q[t, head, g], -t, frequencies) for t in range(max(since, sinks), end)] or np.zeros((1, h))
      )
      mean = queries.mean(axis=0)
      spread = np.mean([np.outer(x - mean, x - mean) for x in queries], axis=0)
      mean, spread = turn @ mean, turn @ spread @ turn.T
      keys = k[[held[i] for i in scored], head]
      logits = keys @ mean / math.sqrt(h) + covariance * np.array([key @ spread @ key for key in keys]) / (2 * h)
      total[scored] += softmax(logits) / q.shape[2]
    norms = np.linalg.norm(v[held, head], axis=-1)
    scores = {j: math.inf if j < sinks else (w + epsilon) * n for j, w, n in zip(held, total, norms, strict=True)}
    return scores, math.inf

  return score


def triattention(q, k, *, frequencies, centres, norms, furthest):
  """TriAttention's scores (2604.04921) from calibrated queries: centres [N, H] and norms [N, H/2] of one layer."""
  half, distances = len(frequencies), [2**i for i in range(32) if 2**i <= furthest]
  numbers = lambda x: x[:half] + 1j * x[half:]

  def score(head, outside, held, end, since):
    best = np.full(len(held), -math.inf)
    for g in range(q.shape[2]):
      n = head * q.shape[2] + g
      centre, own = numbers(centres[n]), []
      for j in held:
        key, total = numbers(rotated(k[j, head], -j, frequencies)), 0.0
        for f, w in enumerate(frequencies):
          size, angle = abs(key[f]), np.angle(centre[f]) - np.angle(key[f])
          waves = [math.cos(w * (end - j + d) + angle) for d in distances]
          total += abs(centre[f]) * size * np.mean(waves) + (norms[n][f] - abs(centre[f])) * size
        own.append(total)
      best = np.maximum(best, (np.array(own) - np.mean(own)) / np.std(own))
    return dict(zip(held, best, strict=True)), math.inf

  return score


def vase(q, k, v, *, layer, window, budget, large, sinks, seed):
  """VaSE-AttnV (2606.03928, section 3.2, and its released code): large values, and a sample of the others."""

  def score(head, outside, held, end, since):
    spread = {j: math.inf if j < sinks else v[j, head].max() - v[j, head].min() for j in outside}
    order = sorted(outside, key=lambda j: (-spread[j], j))
    count = min(int(np.float32(budget(end)) * np.float32(large)), budget(end) - window - 1)
    margin = math.inf
    if 0 < count < len(order) and math.isfinite(spread[order[count - 1]]):
      margin = 1 - spread[order[count]] / spread[order[count - 1]]
    attention = np.zeros(len(outside))
    for g in range(q.shape[2]):
      rows = [softmax(k[outside, head] @ q[t, head, g] / math.sqrt(q.shape[-1])) for t in range(end - window - 1, end)]
      mean = np.pad(np.mean(rows, axis=0), 2)
      attention += np.array([mean[i : i + 5].sum() / 5 for i in range(len(outside))]) / q.shape[2]
    scores = {}
    for j, p in zip(outside, attention, strict=True):
      noise = hashed(seed, layer, head, j, end) + 2**-25
      scores[j] = math.inf if j in order[:count] else math.log(p) - math.log(-math.log(noise))
    return scores, margin

  return score


def by_policy(policy, layer, q, k, v, events):
  """The run of a policy by its own numbers; it derives from `Periodic`, or from `Budgeted` and has a `RESCORE`.

  Args:
    events: [(length, tokens of the prompt still to come; None for a decode step)].
  """
  if rescore := RESCORE.get(type(policy).__name__):
    return budgeted(
      q, k, [(length, remaining is not None) for length, remaining in events], window=policy.window,
      capacity=lambda tokens: int(policy.capacity(tokens)), rescore=rescore(policy, k, v),
      halves=getattr(policy, "halves", False),
    )  # fmt: skip
  number = lambda name: float(getattr(policy, name))
  budget = lambda tokens: policy.budget if policy.budget is not None else math.ceil(tokens / policy.cr)
  match type(policy).__name__:
    case "RKV":
      options = dict(importance=number("importance"), threshold=number("threshold"), pool=policy.pool)
      score = rkv(q, k, window=policy.window, **options)
    case "ExpectedAttention":
      options = dict(sinks=policy.sinks, future=policy.future, epsilon=policy.epsilon, covariance=policy.covariance)
      frequencies = np.asarray(policy.frequencies, float)[0]
      score = expected_attention(q, k, v, frequencies=frequencies, **options)
    case "TriAttention":
      tables = policy.tables
      parts = (np.asarray(x, float) for x in (tables.frequencies[0], tables.centres[layer], tables.norms[layer]))
      score = triattention(
        q, k, **dict(zip(("frequencies", "centres", "norms"), parts, strict=True)), furthest=policy.furthest
      )
    case "VaSE":
      options = dict(large=policy.large, sinks=policy.sinks, seed=policy.seed)
      score = vase(q, k, v, layer=layer, window=policy.window, budget=budget, **options)
    case name:
      raise NotImplementedError(f"{name}: write its scores here, or in RESCORE")
  return periodic(q, k, events, window=policy.window, budget=budget, buffer=policy.buffer, score=score)
