"""Exported layouts read by torch, transformers and PEFT: keys, decisions, logits by their rules."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.config import LoRAConfig, ModelConfig
from dms_jax.convert import convert, export
from dms_jax.model import Eviction, Model, forward, unembed

LOGITS = 1e-4  # float32, sums of at most 64 products of numbers of size 1, in another order
CLOSE = 1e-3  # gate logits nearer to the threshold may fall on either side
LENGTH = 60
LLAMA = tiny.config(tie_embeddings=False)
QWEN3 = tiny.config(family="qwen3", qk_norm=True, tie_embeddings=False, head_dim=32)
LORA = LoRAConfig(3, 0.7, ("q_proj", "v_proj", "up_proj"))
GATES = dict(scale=20.0, offset=0.5)  # both decisions are common


def our_logits(model: Model, tokens, eviction: Eviction | None = None) -> tuple[np.ndarray, np.ndarray | None]:
  """Logits [B, T, V] and gate logits [L, B, K, T]."""

  def run(model, tokens):
    hidden, z = forward(model, tokens, eviction=eviction)
    return unembed(model, hidden), z

  logits, z = jax.jit(run)(model, tokens)
  return np.asarray(logits), None if z is None else np.asarray(z)


def load_strictly(torch, folder: Path):
  """The reference model of the folder; every tensor must have its place, and every place its tensor."""
  values = json.loads((folder / "config.json").read_text())
  model = reference(torch, values)
  state = {name: torch.from_numpy(value) for name, value in load_file(folder / "model.safetensors").items()}
  model.load_state_dict(state, strict=True)
  return model.eval(), values


def reference(torch, values: dict):
  """A decoder in torch, written from the formulas, with the names of NVIDIA's modules; `values`: config.json."""
  nn = torch.nn
  width, heads, kv, size = (
    values[n] for n in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
  )
  normed, separate = values["model_type"] == "qwen3", values.get("dms_separate_alpha", False)
  linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)
  norm = lambda channels: nn.RMSNorm(channels, eps=values["rms_norm_eps"])

  class Attention(nn.Module):
    def __init__(self):
      super().__init__()
      self.q_proj, self.o_proj = linear(width, heads * size), linear(heads * size, width)
      self.k_proj, self.v_proj = linear(width, kv * size), linear(width, kv * size)
      if normed:
        self.q_norm, self.k_norm = norm(size), norm(size)
      if separate:
        self.dms_proj_alpha, self.dms_proj_alpha_norm = linear(width, kv), norm(width)

  class Layer(nn.Module):
    def __init__(self):
      super().__init__()
      self.self_attn, self.mlp = Attention(), nn.Module()
      self.input_layernorm, self.post_attention_layernorm = norm(width), norm(width)
      for name in ("gate_proj", "up_proj"):
        setattr(self.mlp, name, linear(width, values["intermediate_size"]))
      self.mlp.down_proj = linear(values["intermediate_size"], width)

  class Decoder(nn.Module):
    def __init__(self):
      super().__init__()
      self.model = nn.Module()
      self.model.embed_tokens = nn.Embedding(values["vocab_size"], width)
      self.model.layers = nn.ModuleList(Layer() for _ in range(values["num_hidden_layers"]))
      self.model.norm = norm(width)
      self.lm_head = linear(width, values["vocab_size"])

    def forward(self, ids, rule):
      """Logits [B, T, V] and gate logits [L, B, K, T]. `rule(gate logits) -> visible` [B, K, T queries, T keys]."""
      count, length = ids.shape
      angles = torch.arange(length)[:, None] * values["rope_theta"] ** (-torch.arange(0, size, 2) / size)
      cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
      rotate = lambda x: x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin
      split = lambda x: x.view(count, length, -1, size).transpose(1, 2)
      x, seen = self.model.embed_tokens(ids), []
      for layer in self.model.layers:
        attention, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (split(f(h)) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
        if normed:
          q, k = attention.q_norm(q), attention.k_norm(k)
        if separate:
          raw = attention.dms_proj_alpha(attention.dms_proj_alpha_norm(x)).transpose(1, 2)
        else:
          raw = q[:, :: heads // kv, :, -1].clone()
          q[:, :: heads // kv, :, -1] = 0
        q, k = rotate(q), rotate(k)
        if not separate:
          q[:, :: heads // kv, :, -1] = 0
        logits = values["dms_alpha_scale"] * raw - values["dms_initial_alpha_offset"]
        if values.get("dms_alpha_per") == "layer":
          logits = logits[:, :1].expand_as(logits)
        seen.append(logits)
        repeat = lambda y: y.repeat_interleave(heads // kv, dim=1)
        scores = q @ repeat(k).transpose(2, 3) / size**0.5
        weights = scores.masked_fill(~repeat(rule(logits)), -torch.inf).softmax(-1)
        x = x + attention.o_proj((weights @ repeat(v)).transpose(1, 2).reshape(count, length, -1))
        h, mlp = layer.post_attention_layernorm(x), layer.mlp
        x = x + mlp.down_proj(nn.functional.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
      return self.lm_head(self.model.norm(x)), torch.stack(seen)

  return Decoder()


def visible(torch, evicted, window: int):
  """[B, K, T queries, T keys]: a key is visible to the W tokens after it, and to all if it stays."""
  length = evicted.shape[-1]
  distance = torch.arange(length)[:, None] - torch.arange(length)[None]
  return (distance >= 0) & ((distance <= window) | ~evicted[:, :, None])


def nvidia_rule(torch, values: dict):
  """What token t computes is about token t - 1; the newest token is not decided about yet."""

  def rule(logits):
    decided = (logits > 0) & (not values.get("dms_disable_eviction", False))
    return visible(
      torch, torch.cat([decided[..., 1:], torch.zeros_like(decided[..., :1])], -1), values["dms_window_size"]
    )

  return rule


def fastdms_rule(torch, metadata: dict):
  """The token that computes a decision is the one that it is about; written with FastDMS's quotient."""

  def rule(logits):
    value = (logits + metadata["alpha_offset"]) / metadata["alpha_scale"]
    return visible(torch, value > metadata["alpha_offset"] / metadata["alpha_scale"], metadata["window_size"])

  return rule


def compare(torch, folder: Path, model: Model, rule) -> None:
  """Decisions equal where the logit is not at the threshold; logits close; eviction changes them."""
  theirs, _ = load_strictly(torch, folder)
  tokens = tiny.tokens(model.config, 2, LENGTH)
  ids = torch.from_numpy(np.array(tokens)).long()
  with torch.no_grad():
    expected, gates = (x.numpy() for x in theirs(ids, rule))
    everything = lambda logits: visible(torch, torch.zeros_like(logits, dtype=torch.bool), LENGTH)
    dense = theirs(ids, everything)[0].numpy()
  ours, z = our_logits(model, tokens, Eviction(threshold=0.0))
  assert np.abs(gates).min() > CLOSE  # so that all decisions are compared
  np.testing.assert_array_equal(z > 0, gates > 0)
  assert 0.1 < (gates > 0).mean() < 0.9
  np.testing.assert_allclose(z, gates, atol=1e-3)  # the scale multiplies LOGITS
  np.testing.assert_allclose(ours, expected, atol=LOGITS)
  assert np.abs(expected - dense).max() > 0.1


@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_model_optimizer(torch, tmp_path, granularity):
  model = tiny.model(QWEN3, tiny.dms(granularity=granularity, **GATES), LORA)
  folder = export(tmp_path / "student", model, layout="model_optimizer")
  compare(torch, folder, model, nvidia_rule(torch, json.loads((folder / "config.json").read_text())))
  loaded = checkpoint.load(convert(str(folder), tmp_path / "ours"))
  compare(torch, folder, loaded, nvidia_rule(torch, json.loads((folder / "config.json").read_text())))


def test_nvidia_neuron(torch, tmp_path):
  model = tiny.model(QWEN3, tiny.dms(gate="neuron", **GATES), LORA)
  folder = export(tmp_path / "hub", model, layout="nvidia_neuron")
  compare(torch, folder, model, nvidia_rule(torch, json.loads((folder / "config.json").read_text())))


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_fastdms(torch, tmp_path, config: ModelConfig):
  model = tiny.model(config, tiny.dms(gate="neuron", shift=0, **GATES), LORA)
  folder = export(tmp_path / "fastdms", model, layout="fastdms")
  compare(torch, folder, model, fastdms_rule(torch, json.loads((folder / "dms_metadata.json").read_text())))


def test_eviction_switched_off(torch, tmp_path):
  """dms_disable_eviction: the neuron's channel stays out of attention, and every token stays, in both."""
  folder = export(tmp_path / "hub", tiny.model(QWEN3, tiny.dms(gate="neuron", **GATES)), layout="nvidia_neuron")
  values = json.loads((folder / "config.json").read_text()) | {"dms_disable_eviction": True}
  (folder / "config.json").write_text(json.dumps(values))
  model = checkpoint.load(convert(str(folder), tmp_path / "ours"))
  tokens = tiny.tokens(QWEN3, 2, LENGTH)
  theirs, values = load_strictly(torch, folder)
  with torch.no_grad():
    expected = theirs(torch.from_numpy(np.array(tokens)).long(), nvidia_rule(torch, values))[0].numpy()
  np.testing.assert_allclose(our_logits(model, tokens, Eviction(threshold=0.0))[0], expected, atol=LOGITS)


# transformers and PEFT ------------------------------------------------------------------------------------------------


def hf_logits(torch, model, tokens) -> np.ndarray:
  with torch.no_grad():
    return model(torch.from_numpy(np.array(tokens)).long()).logits.float().numpy()


@pytest.mark.parametrize("layout", ["transformers", "fastdms", "nvidia_neuron", "model_optimizer"])
def test_weights_load_in_plain_transformers(transformers, torch, tmp_path, layout):
  """The dense weights of every layout are the family's own, low-rank updates merged; adapters are ignored."""
  gate = {"gate": "neuron"} if layout in ("fastdms", "nvidia_neuron") else {}
  model = tiny.model(QWEN3, tiny.dms(shift=int(layout != "fastdms"), **gate, **GATES), LORA)
  folder = export(tmp_path / "hf", model, layout=layout, shard_bytes=20_000)
  theirs = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager").eval()
  tokens = tiny.tokens(QWEN3, 2, LENGTH)
  dense = model.replace(dms=None)  # as plain transformers has it: the neuron's channel takes part
  layers = {n: v for n, v in model.params["layers"].items() if not n.startswith("dms_")}
  dense = dense.replace(params={**model.params, "layers": layers})
  np.testing.assert_allclose(our_logits(dense, tokens)[0], hf_logits(torch, theirs, tokens), atol=LOGITS)


@pytest.fixture
def peft(transformers):
  return pytest.importorskip("peft", reason="peft is not installed")


def without_updates(model: Model) -> Model:
  kept = {n: v for n, v in model.params["layers"].items() if "_lora_" not in n and not n.startswith("dms_")}
  return model.replace(params={**model.params, "layers": kept}, dms=None, lora=None)


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_peft_loads_our_updates(peft, transformers, torch, tmp_path, config: ModelConfig):
  model = tiny.model(config, tiny.dms(), LORA)
  base = export(tmp_path / "base", without_updates(model))
  folder = export(tmp_path / "adapter", model, layout="peft")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32", attn_implementation="eager")
  adapted = peft.PeftModel.from_pretrained(theirs, folder).eval()
  tokens = tiny.tokens(config, 2, LENGTH)
  expected = our_logits(model.replace(dms=None), tokens)[0]
  np.testing.assert_allclose(hf_logits(torch, adapted, tokens), expected, atol=LOGITS)
  assert np.abs(our_logits(without_updates(model), tokens)[0] - expected).max() > 0.1  # the updates matter
  merged = adapted.merge_and_unload().state_dict()["model.layers.1.self_attn.q_proj.weight"].numpy()
  ours = np.asarray(model.merged().params["layers"]["q_proj"][1], np.float32)
  np.testing.assert_allclose(merged, ours.reshape(merged.shape), atol=1e-6)


def test_updates_that_peft_saved(peft, transformers, torch, tmp_path):
  """An adapter that PEFT made and saved becomes a retrofit with its logits."""
  base = export(tmp_path / "base", tiny.model(LLAMA))
  ours = convert(str(base), tmp_path / "ours")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32", attn_implementation="eager")
  settings = peft.LoraConfig(
    r=4, lora_alpha=10, target_modules=["k_proj", "q_proj", "gate_proj"], use_rslora=True, init_lora_weights=False,
    task_type="CAUSAL_LM",
  )  # fmt: skip
  adapted = peft.get_peft_model(theirs, settings).eval()
  adapted.save_pretrained(tmp_path / "adapter")
  retrofit = convert(str(tmp_path / "adapter"), tmp_path / "retrofit", base=str(base))
  values, _, dms, lora = checkpoint.read_config(retrofit)
  assert values["groups"] == ["lora"] and dms is None and lora.rank == 4 and lora.scale == 5.0
  model = checkpoint.load(ours, retrofit=retrofit, merge=False)
  tokens = tiny.tokens(LLAMA, 2, LENGTH)
  expected = hf_logits(torch, adapted, tokens)
  np.testing.assert_allclose(our_logits(model, tokens)[0], expected, atol=LOGITS)
  np.testing.assert_allclose(our_logits(checkpoint.load(ours, retrofit=retrofit), tokens)[0], expected, atol=LOGITS)
  assert jnp.abs(our_logits(checkpoint.load(ours), tokens)[0] - expected).max() > 0.1
