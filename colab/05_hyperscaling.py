# %% [markdown]
# # Hyper-scaling and ablations
#
# {badge}
#
# *Hyper-scaling* is the paper's claim: at equal KV reads, or equal peak memory, a compressed model that thinks longer or in more chains scores higher. This notebook trains a small reasoner from scratch on generated problems, retrofits it at several compression ratios, sweeps chains and lengths, and draws the frontiers; then it ablates the retrofit.
#
# | | |
# | --- | --- |
# | runs on | TPU or GPU; a CPU runs the same with a model that hardly learns, to see the programs and their pages |
# | minutes | on an H200 about 5 for training, 2 for the retrofits; the sweep was not timed at these settings. 11 with a CPU of two busy cores, at its small settings |
# | expect | on an H200, countdown: dense 90.8 % and DMS CR 8 86.9 % at L 3,840, W 1, with 1.8 million and 0.2 million KV reads; +34.8 points at equal reads and +50.9 at equal peak tokens, on average (`experiments/results/hyperscale`). On a CPU: scores near 0 |

# %% [markdown]
# ## 1. Install

# %% install

# %%
from IPython.display import Image, display

ON_CPU = device.platform == "cpu"
folder = setting("OUTPUT", Path("runs/hyperscaling"))
TASK = "countdown"
if ON_CPU:
  shape = {"num_layers": 2, "d_model": 64, "d_ff": 128, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
  base = {"retrofit__schedule__steps": setting("STEPS", 60), "retrofit__batch_size": 4, "retrofit__seq_len": 512}
  gates = {"retrofit__batch_size": 4, "retrofit__seq_len": 512, "retrofit__schedule__steps_per_cr": 3,
           "retrofit__schedule__hold_steps": 2, "retrofit__optimizer__decay_steps": 4}  # fmt: skip
  crs, lengths, chains, problems, width = (4,), (64, 128), (1, 2), setting("PROBLEMS", 4), 16
else:
  shape = {}  # 7.2 M parameters
  base = {"retrofit__schedule__steps": 8000}
  gates = {"retrofit__batch_size": 16, "retrofit__seq_len": 4096, "retrofit__schedule__steps_per_cr": 40,
           "retrofit__schedule__hold_steps": 20, "retrofit__optimizer__decay_steps": 60}  # fmt: skip
  crs, lengths, chains, problems, width = (2, 4, 8), (480, 960, 1920), (1, 2, 4), 128, 1024

# %% [markdown]
# ## 2. A reasoner
#
# It reads problems with search traces: what it finds early it notes down and lists at the end, so its cache must keep notes from the middle of a trace.

# %%
families = TASK if ON_CPU else "countdown,grids,programs,graphs"
trained = program("train_reasoner", output=folder / "reasoner", data__families=families, **base,
                  **{f"model__{name}": value for name, value in shape.items()})  # fmt: skip
display(Image(folder / "reasoner/log.png"))

# %% [markdown]
# ## 3. A retrofit for each compression ratio

# %%
program("retrofit", checkpoint=folder / "reasoner/final", output=folder / "retrofits", crs=crs, data__families=families,
        dms__window=16, retrofit__trainable="all", retrofit__loss__kind="forward_kl", retrofit__schedule__steps=0,
        retrofit__optimizer__learning_rate=3e-4, retrofit__saving__snapshots="false", **gates)  # fmt: skip

# %% [markdown]
# ## 4. Sweep chains, lengths and compression
#
# Each method writes W chains of at most L tokens for every problem. A point of a frontier is the best score at a cost; `prompt_window` keeps the prompt and a window.

# %%
swept = program("hyperscale", checkpoint=folder / "reasoner/final", methods="vanilla,dms,prompt_window", cr=max(crs),
                retrofit=tuple(f"{cr}:{folder}/retrofits/cr{cr}/final" for cr in crs), tasks=TASK, max_tokens=lengths,
                chains=chains, limit=problems, width=width, compare_cr=max(crs), output=folder / "sweep")  # fmt: skip
pictures = sorted((folder / "sweep").glob("*.png"))
for picture in pictures:
  display(Image(picture))
print(f"the whole page: {folder / 'sweep/index.html'}")

# %% [markdown]
# ## 5. An ablation
#
# Does it help to decide about a token when it arrives and to evict it W tokens later? `experiments.ablate` trains and scores every combination of a sweep. The text is generated too: held-out problems of another seed, with the traces that a searcher writes.

# %%
from experiments.tasks import reasoning

text = folder / "held_out.txt"
pairs = reasoning.documents((TASK,), seed=7, start=0, count=setting("TEXTS", 40 if ON_CPU else 2000), longest=4096)
text.write_text("\n".join(f"{prompt} {trace}" for prompt, trace in pairs if trace))
result = program("ablate", checkpoint=folder / "reasoner/final", output=folder / "ablations", name="eviction",
                 sweep="dms.window=0,16 dms.eviction=delayed,immediate", eval__text=text, eval__length=256 if ON_CPU else 2048,
                 data__families=families, retrofit__trainable="all", retrofit__schedule__steps=0,
                 retrofit__schedule__final_cr=max(crs), **gates)  # fmt: skip
display(Image(folder / "ablations/eviction/ablation.png"))

# %% [markdown]
# What the same ablation gave for SmolLM2-135M on an H100, at CR 4.3: KL 0.025 delayed and 0.108 immediate at W 64, 0.060 and 0.115 at W 16 (`experiments/results/ablate`). At W 0 both rules are the same.

# %%
print((folder / "ablations/eviction/table.md").read_text())
