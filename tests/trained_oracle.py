"""Trained methods in float64 numpy, from their papers: what they hold, and their losses.

It shares no code with dms_jax. Weights are a flat mapping as in `tests.oracle`.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from tests import oracle
from tests.policy_oracle import Run

# What is held ---------------------------------------------------------------------------------------------------------


def gated(evicted, score, *, window, capacity=None):
  """Tokens held while each token attends, one at a time.

  A token that leaves the window is dropped if it is evicted. Else it is archived, and the archive is cut to
  capacity(tokens seen) - W - 1 tokens: the least score goes, of equal ones the later token.

  Args:
    evicted: bool [K, T], by the token that the decision is about.
    score: (head, token, newest token of those held before) -> number.
    capacity: tokens seen -> tokens allowed; None: any number.
  """
  heads, length = evicted.shape
  held, margin = [[] for _ in range(heads)], math.inf
  for head in range(heads):
    archive: list[int] = []
    for t in range(length):
      left = t - window - 1
      if left >= 0 and not evicted[head, left]:
        archive.append(left)
        if capacity is not None and len(archive) > capacity(t + 1) - window - 1:
          order = sorted(archive, key=lambda j, head=head, t=t: (score(head, j, t - 1), -j))
          if len(order) > 1:
            least, next_ = (score(head, j, t - 1) for j in order[:2])
            if next_ != least:  # the rule decides between equal ones
              margin = min(margin, abs(next_ - least) / max(abs(next_), 1e-9))
          archive.remove(order[0])
      held[head].append(set(archive) | set(range(max(t - window, 0), t + 1)))
  return Run(held, held, margin)


def ranked(about):
  """Gate logits as a limit orders them: rounded to bfloat16."""
  return about.astype(np.float32).astype(ml_dtypes.bfloat16).astype(float)


def sharing(about, threshold, *, window, budget):
  """Tokens held while each token attends, where the heads of a layer share a limit of `budget` tokens a head.

  After the tokens that leave the windows have been archived, those with the highest gate logits go while the heads hold
  more than K * `budget` together; of equal ones (`ranked`) the later token, then that of the first head.

  Args:
    about: gate logits [K, T], by the token that they are about.
    budget: tokens seen -> tokens a head.
  """
  (heads, length), rank = about.shape, ranked(about)
  archive: list[tuple[int, int]] = []
  held, margin = [[] for _ in range(heads)], math.inf
  for t in range(length):
    left = t - window - 1
    if left >= 0:
      archive += [(head, left) for head in range(heads) if about[head, left] <= threshold]
    while len(archive) > heads * max(budget(t + 1) - window - 1, 0):
      order = sorted(archive, key=lambda at: (-rank[at], -at[1], at[0]))
      if len(order) > 1 and rank[order[0]] != rank[order[1]]:
        margin = min(margin, abs(rank[order[0]] - rank[order[1]]))
      archive.remove(order[0])
    for head in range(heads):
      held[head].append({j for of, j in archive if of == head} | set(range(max(t - window, 0), t + 1)))
  return Run(held, held, margin)


def under_pressure(about, thresholds, *, window, capacity=None):
  """Tokens held while each token attends, as in `gated`, where the threshold falls as the text is read.

  Where it falls, archived tokens above it go, before the next token is read.

  Args:
    about: gate logits [K, T], by the token that they are about.
    thresholds: [T], in force while each token is read.
    capacity: tokens of the archive and the window allowed; None: any number.
  """
  held = []
  for logits in about:
    archive, sets = [], []
    for t, limit in enumerate(thresholds):
      archive = [j for j in archive if logits[j] <= limit]
      left = t - window - 1
      if left >= 0 and logits[left] <= limit:
        archive.append(left)
        if capacity is not None and len(archive) > capacity - window - 1:
          archive.remove(max(archive, key=lambda j, rank=ranked(logits): (rank[j], j)))
      sets.append(set(archive) | set(range(max(t - window, 0), t + 1)))
    held.append(sets)
  return Run(held, held)


def dmc(q, k, v, merges, omega, *, window):
  """Attended values [T, K, G, H] and tokens held [K, T], one token at a time (2403.09636).

  A token that leaves the window is merged into the newest slot, or starts one: k <- (k z + k' w) / (z + w), z <- z + w.

  Args:
    merges, omega: [K, T], by token.
  """
  out, held = np.zeros(q.shape), np.zeros(merges.shape, int)
  for head in range(k.shape[1]):
    slots: list[list] = []  # [key, value, z]
    for t in range(len(q)):
      if (left := t - window - 1) >= 0:
        key, value, w = k[left, head], v[left, head], omega[head, left]
        if merges[head, left] and slots:
          old_key, old_value, z = slots[-1]
          slots[-1] = [(old_key * z + key * w) / (z + w), (old_value * z + value * w) / (z + w), z + w]
        else:
          slots.append([key, value, w])
      recent = range(max(t - window, 0), t + 1)
      keys = np.array([s[0] for s in slots] + [k[j, head] for j in recent])
      values = np.array([s[1] for s in slots] + [v[j, head] for j in recent])
      out[t, head] = oracle._softmax(q[t, head] @ keys.T / math.sqrt(q.shape[-1])) @ values
      held[head, t] = len(keys)
  return out, held


# What is trained ------------------------------------------------------------------------------------------------------


def log_sigmoid(x):
  return -np.logaddexp(0.0, -x)


def gelu(x):
  return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gate(p, x, config, dms):
  """Gate logits [K, T] of one layer from its parameters and the residual stream [T, D]."""
  y = oracle._norm(x, p["dms_norm"], config.rms_norm_eps)
  if dms.gate == "mlp":
    y = y @ p["dms_fc"].T + p["dms_fc_bias"]
    y = gelu(y) if dms.objective == "kvzap" else y / (1 + np.exp(-y))
  return dms.scale * (y @ p["dms_proj"].T + p["dms_bias"]).T - dms.offset


def positions_of(segments):
  """Positions from 0 in each run of equal ids."""
  out = []
  for t, segment in enumerate(segments):
    out.append(out[-1] + 1 if t and segments[t - 1] == segment else 0)
  return np.array(out)


def run(weights, config, tokens, segments, attend):
  """Logits [T, V] of one row; `attend(p, x, h, q, k, v, causal)` gives [T, N, H] in each layer."""
  w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
  positions = positions_of(segments).astype(float)
  causal = np.tril(np.ones((len(tokens),) * 2, bool)) & (np.asarray(segments)[:, None] == np.asarray(segments)[None])
  x = w["embed"][tokens]
  for layer in range(config.num_layers):
    p = {name.removeprefix("layers/"): value[layer] for name, value in w.items() if name.startswith("layers/")}
    h = oracle._norm(x, p["attn_norm"], config.rms_norm_eps)
    q, k, v = (np.einsum("td,nhd->tnh", h, p[f"{name}_proj"]) for name in "qkv")
    q, k = (oracle._rotate(y, positions, config) for y in (q, k))
    x = x + np.einsum("tnh,dnh->td", attend(p, x, h, q, k, v, causal), p["o_proj"])
    h = oracle._norm(x, p["mlp_norm"], config.rms_norm_eps)
    inner = h @ p["gate_proj"].T
    x = x + (inner / (1 + np.exp(-inner)) * (h @ p["up_proj"].T)) @ p["down_proj"].T
  return oracle._norm(x, w["final_norm"], config.rms_norm_eps) @ w["embed"].T


def weights_of(q, k, causal, bias=None):
  """Attention probabilities [N, T, T]; `bias` is [K, T, T]."""
  group = q.shape[1] // k.shape[1]
  out = []
  for n in range(q.shape[1]):
    scores = q[:, n] @ k[:, n // group].T / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias[n // group]
    out.append(oracle._softmax(np.where(causal, scores, -np.inf)))
  return np.stack(out)


def mixed(probabilities, v):
  group = len(probabilities) // v.shape[1]
  return np.stack([p @ v[:, n // group] for n, p in enumerate(probabilities)], axis=1)


def trimkv(weights, config, dms, tokens, segments, capacity):
  """(forward KL, next-token loss, capacity loss): sums over the counted positions of one row, and the counts.

  Equation 3: scores + (t - i) log beta_i. Capacity: max(0, sum over i <= t of beta_i^(t - i) - M) / t, summed over
  layers, heads and tokens.
  """
  over = []

  def student(p, x, h, q, k, v, causal):
    log_beta = log_sigmoid(gate(p, x, config, dms))
    age = np.arange(len(tokens))[:, None] - np.arange(len(tokens))[None]
    bias = age * log_beta[:, None]
    sizes = np.where(causal, np.exp(np.minimum(bias, 0)), 0.0).sum(-1)
    over.append((np.maximum(sizes - capacity, 0) / (positions_of(segments) + 1)).sum())
    return mixed(weights_of(q, k, causal, bias), v)

  log_p = lambda logits: (
    logits
    - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    - (logits.max(-1, keepdims=True))
  )
  teacher = log_p(run(weights, config, tokens, segments, lambda p, x, h, q, k, v, c: mixed(weights_of(q, k, c), v)))
  own = log_p(run(weights, config, tokens, segments, student))
  kl = (np.exp(teacher) * (teacher - own)).sum()
  goes_on = [t for t in range(len(tokens) - 1) if segments[t] == segments[t + 1]]
  nll = -sum(own[t, tokens[t + 1]] for t in goes_on)
  return kl, len(tokens), nll, len(goes_on), sum(over)


def kvzip_plus(weights, config, dms, before, text, between):
  """(targets, predictions) [L, K, T] each: log KVzip+ scores of a text's tokens, and the gates' logits."""
  start, length = len(before), len(text)
  tokens = [*before, *text, *between, *text]
  targets, found = [], []

  def attend(p, x, h, q, k, v, causal):
    probabilities = weights_of(q, k, causal)
    group = config.num_heads // config.num_kv_heads
    score = np.full((config.num_kv_heads, length), -np.inf)
    for n in range(config.num_heads):
      for i in range(length):
        out = np.linalg.norm(p["o_proj"][:, n] @ v[start + i, n // group])
        for j in range(len(tokens) - length, len(tokens)):
          value = probabilities[n, j, start + i] * out / np.linalg.norm(h[j])
          score[n // group, i] = max(score[n // group, i], value)
    targets.append(np.log(score))
    found.append(gate(p, x, config, dms)[:, start : start + length])
    return mixed(probabilities, v)

  run(weights, config, tokens, [0] * len(tokens), attend)
  return np.stack(targets), np.stack(found)


def merging(q, k, v, z, omega, window, segments):
  """Relaxed merging attention [T, N, H] of one row, query by query from the definition of a slot.

  Slot j is the mean of the keys i <= j of its document with weights omega_i times the product of alpha_m, i < m <= j.
  """
  alpha, group = 1 / (1 + np.exp(-z)), q.shape[1] // k.shape[1]
  out = np.zeros(q.shape)
  for n in range(q.shape[1]):
    h = n // group
    for i in range(len(q)):
      first = i - positions_of(segments)[i]
      scores, values = [], []
      for j in range(first, i + 1):
        key, value, bias = k[j, h], v[j, h], 0.0
        if i - j > window:
          weights = np.array([omega[h, m] * np.prod(alpha[h, m + 1 : j + 1]) for m in range(first, j + 1)])
          key, value = (weights @ x[first : j + 1, h] / weights.sum() for x in (k, v))
          bias = math.log(1 - alpha[h, j + 1]) if i - j > window + 1 else 0.0
        scores.append(q[i, n] @ key / math.sqrt(q.shape[-1]) + bias)
        values.append(value)
      out[i, n] = oracle._softmax(np.array(scores)) @ np.array(values)
  return out


# Gates for a range of compression ratios ------------------------------------------------------------------------------


def level_threshold(cr, low, high, table):
  """The threshold of CR `cr`: linear in log(c - 1) between those of `table`, from the lowest CR to the highest."""
  place = (math.log(min(max(cr, low), high) - 1) - math.log(low - 1)) / (math.log(high - 1) - math.log(low - 1))
  left = min(int(place * (len(table) - 1)), len(table) - 2)
  part = place * (len(table) - 1) - left
  return table[left] * (1 - part) + table[left + 1] * part


def evicting_share(cr, tokens, window, held):
  """Share of a row's decisions that evict at CR `cr`; with `held`, once the last W + 1 tokens are held anyway."""
  outside = tokens - (window + 1)
  if not held:
    return 1 - 1 / cr
  return min((tokens - tokens / cr) / outside, 1.0) if outside > 0 else 0.0


def threshold_of_share(noisy, mask, share):
  """The value of `noisy` [L, B, K, T], pads left out, above which `share` of its values lie."""
  values = sorted((v for l in noisy for b, row in enumerate(l) for k in row for v in k[mask[b]]), reverse=True)
  return values[min(round(share * len(values)), len(values) - 1)]


def threshold_derivative(logits, mask, threshold, move):
  """Change of the threshold, per unit of `move`, that keeps the share of logits above it over all logistic noise.

  By bisection and a central difference, in float64; the share is the mean probability 1 / (1 + exp(threshold - logit)).
  """
  rows = [(l, b, k) for l in range(logits.shape[0]) for b in range(logits.shape[1]) for k in range(logits.shape[2])]
  values, moves = (np.concatenate([np.asarray(x[at], np.float64)[mask[at[1]]] for at in rows]) for x in (logits, move))
  share = lambda x, at: np.mean(1 / (1 + np.exp(at - x)))
  ends = []
  for step in (-1e-4, 1e-4):
    low, high = threshold - 1.0, threshold + 1.0
    for _ in range(60):
      middle = (low + high) / 2
      low, high = (middle, high) if share(values + step * moves, middle) > share(values, threshold) else (low, middle)
    ends.append(low)
  return (ends[1] - ends[0]) / 2e-4
