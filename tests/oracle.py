"""All of DMS in plain float64 numpy, written from the formulas, sharing no code with dms_jax.

    logit[l, b, k, t] = scale * raw - offset,  evict = logit > threshold             (arXiv 2506.05345, 3.1)
    the decision computed at token t is about token t - shift
    key j visible to query i  iff  j <= i and (i - j <= W or not evict[j])

Weights are a flat mapping of arrays in Hugging Face's orientation (outputs before inputs), layers stacked first.
"""

from __future__ import annotations

import math

import numpy as np


def _norm(x, weight, eps):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _softmax(scores):
  weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
  return weights / weights.sum(axis=-1, keepdims=True)


def _frequencies(config):
  """Radians per position of the H/2 channel pairs; Llama 3.1's three bands where the config asks for them."""
  out = []
  for pair in range(config.head_dim // 2):
    freq = config.rope_theta ** (-2 * pair / config.head_dim)
    if config.rope_scaling is not None:
      s = config.rope_scaling
      turns = s.original_max_position_embeddings * freq / (2 * math.pi)  # full turns within the original context
      if turns < s.low_freq_factor:
        freq = freq / s.factor
      elif turns <= s.high_freq_factor:
        part = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        freq = (1 - part) * freq / s.factor + part * freq
    out.append(freq)
  return np.array(out)


def _rotate(x, positions, config):
  """x [T, heads, H]: pairs (c, c + H/2) turned by position * frequency."""
  angle = positions[:, None, None] * _frequencies(config)
  half = config.head_dim // 2
  a, b = x[..., :half], x[..., half:]
  return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def about(decisions, shift):
  """decisions [..., T] by the token that computed them -> [..., T] by the token they are about; undecided: False."""
  out = np.zeros_like(decisions)
  for t in range(decisions.shape[-1]):
    if t - shift >= 0:
      out[..., t - shift] = decisions[..., t]
  return out


def held(evicted, window):
  """Tokens that remain after the last one, [..., T] -> [...]: the last W + 1, and of the others those not evicted."""
  position = np.arange(evicted.shape[-1])
  return ((position >= len(position) - 1 - window) | ~evicted).sum(axis=-1)


def visible(evicted, window):
  """[T, T] of one head, from the formula, entry by entry."""
  length = len(evicted)
  out = np.zeros((length, length), bool)
  for i in range(length):
    for j in range(i + 1):
      out[i, j] = i - j <= window or not evicted[j]
  return out


def forward(
  weights, config, dms, tokens, *, window=0, evict=True, threshold=0.0, override=None, noise=None, tau=0.1,
  segments=None, lora_scale=0.0,
):  # fmt: skip
  """One row.

  Args:
    tokens: [T]. segments: [T] ids of documents that never see each other; positions restart in each.
    threshold: a number, or that of each query [T], which may only fall. evict: False leaves everything visible.
    override: bool [L, K, T] decisions used instead of the gates'.
    noise: [L, K, T], the soft training mask: log(1 - sigmoid((logit + noise) / tau)) on keys beyond the window.

  Returns:
    (logits [T, V], gate logits [L, K, T] or None, visible [L, K, T, T] or None where the mask is soft).
  """
  w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
  tokens = np.asarray(tokens)
  length, heads, group = len(tokens), config.num_kv_heads, config.num_heads // config.num_kv_heads
  segments = np.zeros(length, int) if segments is None else np.asarray(segments)
  positions = np.array(
    [t - min(j for j in range(t + 1) if (segments[j : t + 1] == segments[t]).all()) for t in range(length)], np.float64
  )
  causal = np.tril(np.ones((length, length), bool)) & (segments[:, None] == segments[None])
  far = np.arange(length)[:, None] - np.arange(length)[None] > window
  x = w["embed"][tokens]
  gate_logits, seen = [], []
  for layer in range(config.num_layers):
    p = {name.removeprefix("layers/"): value[layer] for name, value in w.items() if name.startswith("layers/")}

    def project(y, name, inputs=1, p=p):
      weight = p[name]
      if f"{name}_lora_a" in p:
        weight = weight + lora_scale * np.tensordot(p[f"{name}_lora_b"], p[f"{name}_lora_a"], axes=(-1, 0))
      return np.tensordot(y, weight, axes=(list(range(-inputs, 0)), list(range(-inputs, 0))))

    h = _norm(x, p["attn_norm"], config.rms_norm_eps)
    q, k, v = (project(h, f"{name}_proj") for name in "qkv")
    if config.qkv_bias:
      q, k, v = q + p["q_bias"], k + p["k_bias"], v + p["v_bias"]
    if config.qk_norm:
      q, k = _norm(q, p["q_norm"], config.rms_norm_eps), _norm(k, p["k_norm"], config.rms_norm_eps)
    if dms is not None:
      if dms.gate == "neuron":
        raw = np.stack([q[:, kv * group, config.head_dim - 1] for kv in range(heads)])
      else:
        raw = (_norm(x, p["dms_norm"], config.rms_norm_eps) @ p["dms_proj"].T).T
      if dms.granularity == "layer":
        raw = np.repeat(raw[:1], heads, axis=0)
      logit = dms.scale * raw - dms.offset
      gate_logits.append(logit)
    neuron = dms is not None and dms.gate == "neuron"
    if neuron:
      q = q.copy()
      q[:, ::group, -1] = 0
    q, k = _rotate(q, positions, config), _rotate(k, positions, config)
    if neuron:
      q[:, ::group, -1] = 0
    out = np.zeros_like(q)
    for kv in range(heads):
      bias, mask = 0.0, causal
      if evict and dms is not None:
        if noise is not None:
          z = (logit[kv] + noise[layer, 0 if dms.granularity == "layer" else kv]) / tau
          soft = np.zeros(length)
          for t in range(length - dms.shift):
            soft[t] = -np.logaddexp(0, z[t + dms.shift])
          bias = np.where(far, soft[None], 0.0)
        else:
          if np.ndim(threshold):
            rows = [visible(about(logit[kv] > limit, dms.shift), window)[i] for i, limit in enumerate(threshold)]
            mask = causal & np.stack(rows)
          else:
            decisions = logit[kv] > threshold if override is None else np.asarray(override[layer, kv])
            mask = causal & visible(about(decisions, dms.shift), window)
      seen.append(mask)
      for head in range(kv * group, (kv + 1) * group):
        scores = q[:, head] @ k[:, kv].T / math.sqrt(config.head_dim) + bias
        out[:, head] = _softmax(np.where(mask, scores, -np.inf)) @ v[:, kv]
    x = x + project(out, "o_proj", inputs=2)
    h = _norm(x, p["mlp_norm"], config.rms_norm_eps)
    gate = project(h, "gate_proj")
    x = x + project(gate / (1 + np.exp(-gate)) * project(h, "up_proj"), "down_proj")
  head = w["embed"] if config.tie_embeddings else w["lm_head"]
  logits = _norm(x, w["final_norm"], config.rms_norm_eps) @ head.T
  seen = np.stack(seen).reshape(config.num_layers, heads, length, length)
  return logits, np.stack(gate_logits) if gate_logits else None, None if noise is not None else seen


def slot_reuse(decisions, window, shift):
  """The released code's cache of one head, token by token: the set of positions held after each token.

  A token leaving the ring of W + 1 entries gives its slot to the newest token if it was flagged, else the newest token
  takes a fresh slot. The incoming decision is written before the leaving token is asked.
  """
  slots, place, flags, history = [], {}, {}, []
  for t, decision in enumerate(decisions):
    flags[t] = False
    if t - shift >= 0:
      flags[t - shift] = bool(decision)
    leaving = t - (window + 1)
    if leaving >= 0 and flags[leaving]:
      place[t] = place[leaving]
      slots[place[t]] = t
    else:
      place[t] = len(slots)
      slots.append(t)
    history.append(frozenset(slots))
  return history
