# %% [markdown]
# # From dms_jax to PyTorch
#
# {badge}
#
# A finding made in JAX is of use where models are trained and served in PyTorch. This notebook makes a small one and ports it: it trains a small Qwen3, retrofits it with eviction gates, exports the retrofit in three layouts of PyTorch, lets transformers evict from its cache, and compares texts, tokens held and logits with dms_jax.
#
# | | |
# | --- | --- |
# | runs on | CPU, as well as GPU or TPU: torch computes on the CPU here |
# | minutes | 1 with a CPU of two busy cores and the small settings of CI; more with these, which were not timed |
# | expect | texts and tokens held equal in all layouts; logits equal but for 1e-6 of the largest |

# %% [markdown]
# ## 1. Install
#
# torch and transformers 5 are for this notebook alone; dms_jax needs neither.

# %% install

# %%
def is_installed(name: str, major: int) -> bool:
  try:
    return int(importlib.metadata.version(name).split(".")[0]) >= major
  except importlib.metadata.PackageNotFoundError:
    return False


needed = {"torch": 2, "transformers": 5}
if missing := [f"{name}>={major}" for name, major in needed.items() if not is_installed(name, major)]:
  print("installing", *missing)
  install(*missing)

# %% [markdown]
# ## 2. A model
#
# A Qwen3 with 0.3 M parameters learns to write search traces of the game countdown. Its vocabulary is a hundred words. NVIDIA's code for DMS knows Qwen3 alone, hence the family; the other layouts also take Llama and Qwen2.

# %%
import contextlib
import functools
import tempfile

import numpy as np

from dms_jax.params import count_params, init_params, param_table
from dms_jax.retrofit import DataConfig, LossConfig, MemoryConfig, OptimizerConfig, RetrofitConfig, ScheduleConfig, loop
from dms_jax.retrofit.packing import StreamPacker
from experiments.tasks import reasoning

folder = Path(setting("OUTPUT", "") or tempfile.mkdtemp())
base_steps = setting("BASE_STEPS", 400)
steps_per_cr = setting("STEPS_PER_CR", 40)
length, rows = setting("LENGTH", 384), setting("ROWS", 8)

tokenizer = reasoning.tokenizer()
shape = dms_jax.ModelConfig(
  family="qwen3", num_layers=3, d_model=96, d_ff=256, num_heads=4, num_kv_heads=2, head_dim=32, qk_norm=True,
  vocab_size=tokenizer.vocab_size, max_position_embeddings=4096, eos_token_ids=tokenizer.eos_token_ids,
)  # fmt: skip
untrained = dms_jax.Model(init_params(param_table(shape), jax.random.key(0)), shape, tokenizer=tokenizer)
shared = dict(batch_size=rows, seq_len=length, memory=MemoryConfig(compute_dtype="float32"))
data = DataConfig(families=("countdown",), workers=0)


def train(base, gates, lora, settings, name) -> Path:
  documents = functools.partial(reasoning.documents, data.families, longest=settings.seq_len)
  run = loop.Run(base, gates, lora, settings, data, folder / name)

  def show(line):
    if line["step"] % 40 == 0:
      print(", ".join(f"{n} {line[n]:.4g}" for n in ("step", "nll", "kl", "target_cr", "achieved_cr") if n in line))

  with contextlib.closing(StreamPacker(documents, tokenizer, data, settings)) as packer:
    loop.train(run, packer, tokenizer, report=show)
  return folder / name / "final"


print(f"{count_params(param_table(shape)):,} parameters, {tokenizer.vocab_size} words")
pretraining = RetrofitConfig(
  objective="lm", trainable="all", **shared, loss=LossConfig("lm"), schedule=ScheduleConfig(steps=base_steps),
  optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20, decay_steps=-1, final_rate=0.1),
)  # fmt: skip
checkpoint = train(untrained, None, dms_jax.LoRAConfig(), pretraining, "base")

# %% [markdown]
# ## 3. Gates
#
# Adapter gates with a window of 16 tokens, and rank-8 updates of q, k, v and o. The target CR rises from 1 to 4.

# %%
original, _ = dms_jax.load(checkpoint)
gates, lora = dms_jax.DMSConfig(gate="adapter", window=16), dms_jax.LoRAConfig(rank=8)
recipe = RetrofitConfig(
  trainable="lora", **shared,
  schedule=ScheduleConfig(steps=0, final_cr=4.0, steps_per_cr=steps_per_cr, hold_steps=steps_per_cr),
  optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10),
)  # fmt: skip
retrofit = train(original.stacked(), gates, lora, recipe, "retrofit")
model, _ = dms_jax.load(checkpoint, retrofit=retrofit)

# %%
import json

import matplotlib.pyplot as plt

log = [json.loads(line) for line in (folder / "retrofit/log.jsonl").read_text().splitlines()]
figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
for axis, names in zip(axes, (["target_cr", "achieved_cr"], ["kl"]), strict=True):
  for name in names:
    axis.plot([line["step"] for line in log], [line[name] for line in log], label=name)
  axis.set(xlabel="step")
  axis.legend(frameon=False)
axes[1].set(title="KL(student || teacher), nats a token")
axes[0].set(title=f"compression ratio, rows of {length} tokens")
plt.show()

# %% [markdown]
# What has to arrive in PyTorch: these texts, from this many tokens in each head. `eos=False` lets all rows run on after the end of their text, to one length.

# %%
problems = [prompt for prompt, _ in reasoning.documents(data.families, seed=1, start=0, count=4, longest=length)]
new_tokens = setting("NEW_TOKENS", 192)

ours = dms_jax.generate(model, problems, max_new_tokens=new_tokens, eos=False)
print(problems[0])
print("->", ours.text[0][:400])
print(f"achieved CR {ours.metrics.achieved_cr:.2f} at T = {ours.metrics.seen.tolist()} tokens")

# %% [markdown]
# ## 4. Export
#
# One command a layout: `python -m experiments.export_torch --layout=...`, here as a function. Each folder has a README.md that says how to load it and what it does not hold.
#
# | layout | for |
# | --- | --- |
# | `model_optimizer` | NVIDIA Model-Optimizer: Qwen3 with the adapter's tensors among the weights |
# | `peft` | PEFT: the low-rank updates alone, the gates beside them |
# | `dms_torch` | transformers with eviction: weights, gates and one file of code |

# %%
import dms_jax.checkpoint
from dms_jax.convert import About, convert, export

apart = dms_jax.checkpoint.load(checkpoint, retrofit=retrofit, merge=False)  # low-rank updates not merged
about = About(cr=recipe.schedule.final_cr)
for layout in ("model_optimizer", "peft", "dms_torch"):
  path = export(folder / layout, apart, tokenizer, layout=layout, about=about)
  print(layout, {file.name: file.stat().st_size for file in sorted(path.iterdir())})

# %% [markdown]
# ## 5. Evict in transformers
#
# `trust_remote_code=True` runs modeling_dms.py of the folder, which needs torch and transformers and no dms_jax.

# %%
import torch
import transformers

transformers.logging.disable_progress_bar()
in_torch = transformers.AutoModelForCausalLM.from_pretrained(
  folder / "dms_torch", dtype=torch.float32, trust_remote_code=True
).eval()
words = transformers.AutoTokenizer.from_pretrained(folder / "dms_torch", padding_side="left")
inputs = words(problems, padding=True, return_tensors="pt", return_token_type_ids=False)
theirs = in_torch.generate(
  **inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=words.pad_token_id,
  return_dict_in_generate=True,
)  # fmt: skip
cache = theirs["cache"] if "cache" in theirs else theirs["past_key_values"]
tokens_of_torch = theirs.sequences[:, inputs.input_ids.shape[1] :].tolist()
held_in_torch = cache.live().numpy()
print("->", words.decode(tokens_of_torch[0])[:400])

# %% [markdown]
# Texts, tokens held by each head, and logits. Both compute in float32, in another order of summation: logits differ in the last digits, and decisions and tokens agree.

# %%
from dms_jax.model import Eviction, forward, unembed

same_tokens = [a == b for a, b in zip(ours.tokens, tokens_of_torch, strict=True)]
same_held = (ours.metrics.live == held_in_torch).all()

text = np.array([tokenizer.encode(problems[0]) + ours.tokens[0]])
hidden, _ = jax.jit(forward)(model, jax.numpy.asarray(text), eviction=Eviction())
logits = np.asarray(unembed(model, hidden))
with torch.no_grad():
  logits_of_torch = in_torch(torch.from_numpy(text)).logits.numpy()
gap = np.abs(logits - logits_of_torch).max() / np.abs(logits).max()

print("texts equal:", same_tokens)
print(f"tokens held equal: {same_held}; mean {held_in_torch.mean():.1f} of {ours.metrics.seen.mean():.1f}")
print(f"largest difference of logits: {gap:.1e} of the largest logit")

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained", width_ratios=(1, 1, 1.3))
seen = ours.metrics.seen[0]
for axis, name, held in zip(axes, ("dms_jax", "transformers"), (ours.metrics.live, held_in_torch), strict=False):
  share = held[:, 0] / seen
  image = axis.imshow(share, vmin=0, vmax=1, cmap="viridis", aspect="auto")
  for (layer, head), value in np.ndenumerate(share):
    axis.text(head, layer, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
  axis.set(title=f"share of tokens held, {name}", xlabel="KV head", ylabel="layer", xticks=[0, 1], yticks=[0, 1, 2])
figure.colorbar(image, ax=axes[1])
axes[2].semilogy(np.abs(logits - logits_of_torch)[0].max(axis=-1), color="#1f6fb4")
axes[2].set(title=f"largest difference of logits, which reach {np.abs(logits).max():.0f}", xlabel="token of the text")
plt.show()

# %% [markdown]
# ## 6. Read NVIDIA's layout back
#
# A student that NVIDIA's Model-Optimizer trained is read in the same way: weights, adapter and settings come from one folder. What no file states is reported as assumed.

# %%
nvidia, _ = dms_jax.load(convert(str(folder / "model_optimizer"), folder / "from_nvidia"))
print(nvidia.dms)
back = dms_jax.generate(nvidia, problems, max_new_tokens=new_tokens, eos=False, tokenizer=tokenizer)
print("texts equal:", [a == b for a, b in zip(ours.tokens, back.tokens, strict=True)])

adapter = convert(str(folder / "peft"), folder / "from_peft", base=str(checkpoint))
updated, _ = dms_jax.load(checkpoint, retrofit=adapter)
again = dms_jax.generate(updated, problems, max_new_tokens=new_tokens, eos=False)
print("and from PEFT's:", [a == b for a, b in zip(ours.tokens, again.tokens, strict=True)])

# %% [markdown]
# ## 7. Port the method
#
# `experiments/torch_reference` is the method in plain PyTorch, a few files of a page or two that are tested to equal dms_jax: gates, masks, losses, one retrofit step, and decoding with a ring and an archive. Its files name the paper's sections and are what to read for an implementation of one's own. Here it decodes the retrofit, and trains it for three more steps.

# %%
from safetensors.torch import load_file

from experiments.torch_reference import decode, schedule, step
from experiments.torch_reference.gates import DMSConfig
from experiments.torch_reference.model import ModelConfig

config = ModelConfig.from_hf(json.loads((folder / "model_optimizer/config.json").read_text()))
dms = DMSConfig(gate="adapter", window=gates.window)
weights = load_file(folder / "model_optimizer/model.safetensors")
real = inputs.attention_mask.bool()
tokens, ring_and_archive = decode.generate(weights, config, dms, inputs.input_ids, 32, mask=real)
few = dms_jax.generate(model, problems, max_new_tokens=32, eos=False)
print("texts equal:", [a == b for a, b in zip(few.tokens, tokens.tolist(), strict=True)])
print("tokens held equal:", (ring_and_archive.live().numpy() == few.metrics.live).all())

teacher = load_file(export(folder / "original", original, tokenizer) / "model.safetensors")
settings = schedule.RetrofitConfig(trainable="all", initial_cr=6.0, learning_rate=1e-4)
state = step.init_state(weights, settings)
for _ in range(3):
  figures = step.train_step(state, teacher, config, dms, settings, step.Batch(inputs.input_ids, inputs.attention_mask))
  print(", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
