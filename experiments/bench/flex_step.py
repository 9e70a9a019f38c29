"""Times a retrofit step in PyTorch with FlexAttention, the baseline of the step in JAX.

The model is transformers' Llama in bfloat16 autocast over float32 weights (frozen ones in bfloat16), with adapter
gates, the training noise, a teacher of the same shape with PyTorch's own attention, reverse KL from whole logits, and
AdamW. Everything except attention is eager. Rows that do not fit in memory together accumulate gradients: whole logits
of several rows over a vocabulary of 128K, plus the optimizer's state, would not fit. The forms of attention are
those of `experiments.bench.flex_attention`.

`experiments.retrofit --benchmark --against_flex` runs `measure` in a separate process, so that two frameworks do not
share a device's memory.
"""

from __future__ import annotations

import statistics
import time

from experiments.bench import flex_attention

WARMUP = 2
NAME = "dms_flex"  # under which the attention is registered in transformers


def measure(
  shape: dict, trainable: str, rank: int, batch: int, together: int, tokens: int, window: int, steps: int, form: str,
  device: str = "cuda",
) -> dict:  # fmt: skip
  """Seconds of a step of `batch` rows, `step_seconds` (median), or why there are none ("skipped").

  Args:
    shape: LlamaConfig's arguments.
    together: rows that run at once, a divisor of `batch`.
    trainable: "gates", "lora" (of q, k, v and o, with `rank`) or "all".
    form: the form of attention, a name of `flex_attention.forms`.
  """
  try:
    import torch
    import torch.nn.attention.flex_attention
    import transformers
  except ImportError as error:
    return {"skipped": f"PyTorch with FlexAttention and transformers are not installed: {error}"}
  if device == "cuda" and not torch.cuda.is_available():
    return {"skipped": "PyTorch sees no GPU"}
  torch.manual_seed(0)
  attend = flex_attention.forms(tokens, device)[form]

  def attention(module, q, k, v, attention_mask, **kwargs):
    return attend(q, k, v, module.bias_of_step, window).transpose(1, 2), None  # the layer's hook has set the bias

  transformers.AttentionInterface.register(NAME, attention)
  model_of = lambda name: transformers.LlamaForCausalLM(
    transformers.LlamaConfig(**{**shape, "attn_implementation": name, "use_cache": False})
  ).to(device)
  student, teacher = model_of(NAME), model_of("sdpa").to(torch.bfloat16).requires_grad_(False)
  if trainable != "all":
    student.to(torch.bfloat16).requires_grad_(False)
  for layer in student.model.layers:
    _add_gate(torch, layer, shape["num_key_value_heads"], device)
    if trainable == "lora":
      for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        _add_update(torch, getattr(layer.self_attn, name), rank, device)
  trained = [p for p in student.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device == "cuda")
  wait = torch.cuda.synchronize if device == "cuda" else lambda: None
  head = student.lm_head

  def step():
    for rows in torch.randint(0, shape["vocab_size"], (batch // together, together, tokens), device=device):
      with torch.no_grad():
        wanted = teacher(rows).logits
      with torch.autocast(device, torch.bfloat16):
        logits = head(student.model(rows).last_hidden_state)
      log_p, log_q = (x.float().log_softmax(-1) for x in (logits, wanted))
      loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
      fraction = torch.stack([layer.fraction_of_step for layer in student.model.layers]).mean()
      ((loss + torch.relu(0.875 - fraction)) * together / batch).backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss)

  seconds = []
  for _ in range(WARMUP + steps):
    begin = time.perf_counter()
    loss = step()
    wait()
    seconds.append(time.perf_counter() - begin)
  found = {"step_seconds": statistics.median(seconds[WARMUP:]), "loss": loss, "compile_seconds": seconds[0]}
  if device == "cuda":
    found["peak_bytes"] = torch.cuda.max_memory_allocated()
  return found | {
    "tokens_per_second": batch * tokens / found["step_seconds"],
    "torch": torch.__version__,
    "transformers": transformers.__version__,
  }


def _add_gate(torch, layer, heads: int, device: str) -> None:
  """An adapter gate in float32; it reads the layer's input and sets the bias that the layer's attention uses."""
  layer.gate = torch.nn.Linear(layer.self_attn.q_proj.in_features, heads, bias=False, device=device)

  def before(module, args, kwargs):
    x = (args[0] if args else kwargs["hidden_states"]).float()
    with torch.autocast(x.device.type, enabled=False):
      raw = module.gate(torch.nn.functional.rms_norm(x, x.shape[-1:])).transpose(1, 2)
      uniform = torch.rand_like(raw).clamp(1e-6, 1 - 1e-6)
      z = (100 * raw - 5 + torch.logit(uniform)) / 0.1
      alpha = z.sigmoid()
      module.fraction_of_step = ((z > 0).float() - alpha).detach().mean() + alpha.mean()
      module.self_attn.bias_of_step = torch.nn.functional.logsigmoid(-z)

  layer.register_forward_pre_hook(before, with_kwargs=True)


def _add_update(torch, linear, rank: int, device: str) -> None:
  """A frozen projection with a low-rank update."""
  down = torch.nn.Linear(linear.in_features, rank, bias=False, device=device)
  up = torch.nn.Linear(rank, linear.out_features, bias=False, device=device)
  torch.nn.init.zeros_(up.weight)
  linear.update = torch.nn.Sequential(down, up)
  linear.register_forward_hook(lambda module, args, out: out + module.update(args[0]))
