# %% [markdown]
# # Hyper-scaling and ablations
#
# {badge}
#
# *Hyper-scaling* is the paper's claim: at equal KV reads, or equal peak memory, a compressed model that thinks longer or in more chains scores higher. This notebook shows it on the small reasoner that comes with the library: it looks at one of its chains, sweeps chains and lengths under the dense cache, DMS and a window beside the prompt, and draws the frontiers. Then it ablates the retrofit.
#
# | | |
# | --- | --- |
# | runs on | GPU, TPU or CPU; a CPU takes easy problems and short chains, and leaves the ablation out |
# | minutes | 2 on a CPU of two cores; not timed on a GPU |
# | expect | DMS at CR 4 scores as the dense cache does, with a fraction of its KV reads; prompt + window, which forgets the notes, scores less. The whole measurement, DMS +52.5 points over dense at equal reads, is in `experiments/results/hyperscale` |

# %% [markdown]
# ## 1. Install

# %% install

# %%
from IPython.display import Image, display

import experiments

ON_CPU = device.platform == "cpu"
REASONER = Path(experiments.__file__).parent / "results/reasoner"  # 7.2 M parameters, and low-rank retrofits of it
folder = setting("OUTPUT", Path("runs/hyperscaling"))
TASK, CR = "programs", 4
if ON_CPU:
  sizes = {"limit": setting("PROBLEMS", 4), "max_tokens": (160, 320), "chains": (1, 2), "width": 8, "dtype": "float32"}
  level = 1
else:
  sizes = {"limit": 128, "max_tokens": (480, 960, 1920, 3840), "chains": (1, 2, 4), "width": 512}
  level = 3

# %% [markdown]
# ## 2. A chain
#
# A problem gives examples of several unknown programs. The model tries operations at random; what it finds it notes down at once, goes on with the next one, and lists all notes at the end. So its cache must keep notes from the middle of the text, and may forget what failed.

# %%
import numpy as np

from experiments.tasks import get
from experiments.tasks.base import TasksConfig

model, tokenizer = dms_jax.load(REASONER / "dense", retrofit=REASONER / f"cr{CR}")
problem = get(TASK)(level=level).prompts(TasksConfig(limit=1), tokenizer, 0, 16384)[0]
answer = dms_jax.generate(model, problem.text, max_new_tokens=sizes["max_tokens"][-1], temperature=0.8,
                          key=jax.random.key(setting("SEED", 0)), decode_block=16)  # fmt: skip
print(problem.text, "\n---\n", answer.text[0], sep="")
print(
  f"\n{answer.metrics.seen[0]} tokens, of which a head holds {np.asarray(answer.metrics.live)[:, 0].mean():.0f} at the end"
)

# %% [markdown]
# ## 3. Sweep chains, lengths and compression
#
# Each method writes W chains of at most L tokens for every problem. A point of a frontier is the best score at a cost; `prompt_window` keeps the prompt and a window.

# %%
swept = program("hyperscale", checkpoint=REASONER / "dense", methods="vanilla,dms,prompt_window", cr=CR, compare_cr=CR,
                retrofit=f"{CR}:{REASONER}/cr{CR}", tasks=TASK, programs__level=level, output=folder / "sweep", **sizes)  # fmt: skip
pictures = sorted((folder / "sweep").glob("*.png"))
for picture in pictures:
  display(Image(picture))
print(f"the whole page: {folder / 'sweep/index.html'}")

# %% [markdown]
# Other retrofits join as `--retrofit=2:...,4:...,8:...`, other methods as `--methods=...,tova,h2o,quest,rkv`. `python -m experiments.train_reasoner` trains such a model, 3 minutes on an H200, and `experiments.retrofit` its retrofits; the commands are in `experiments/results/reasoner`.

# %% [markdown]
# ## 4. An ablation
#
# Does it help to decide about a token when it arrives and to evict it W tokens later? `experiments.ablate` trains and scores every combination of a sweep. The text is generated too: problems of another seed than the training's, with the traces that a searcher writes.

# %%
from experiments.tasks import reasoning

if setting("ABLATE", int(not ON_CPU)):
  text = folder / "held_out.txt"
  pairs = reasoning.documents((TASK,), seed=7, start=0, count=setting("TEXTS", 2000), longest=4096)
  text.write_text("\n".join(f"{prompt} {trace}" for prompt, trace in pairs if trace))
  length, rows = setting("LENGTH", 4096), setting("ROWS", 16)
  result = program("ablate", checkpoint=REASONER / "dense", output=folder / "ablations", name="eviction",
                   sweep="dms.window=0,16 dms.eviction=delayed,immediate", eval__text=text, eval__length=length // 2,
                   data__families=TASK, retrofit__seq_len=length, retrofit__batch_size=rows, retrofit__trainable="all",
                   retrofit__schedule__steps=0, retrofit__schedule__final_cr=CR, retrofit__schedule__steps_per_cr=setting("STEPS", 40),
                   retrofit__schedule__hold_steps=2, retrofit__optimizer__decay_steps=setting("STEPS", 40),
                   retrofit__optimizer__learning_rate=3e-4)  # fmt: skip
  display(Image(folder / "ablations/eviction/ablation.png"))
  print((folder / "ablations/eviction/table.md").read_text())

# %% [markdown]
# What the same ablation gave for SmolLM2-135M on an H100, at CR 4.3: KL 0.025 delayed and 0.108 immediate at W 64, 0.060 and 0.115 at W 16 (`experiments/results/ablate`). At W 0 both rules are the same.
