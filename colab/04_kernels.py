# %% [markdown]
# # Attention kernels against the roofline of this device
#
# {badge}
#
# A decode step reads every live key and value once: its floor is their bytes over the memory bandwidth, so evicting tokens is what makes it faster. Prefill and training are bound by arithmetic instead. This notebook measures bandwidth and arithmetic of the device at hand, then the kernels of `pallas_kernels` against both.
#
# | | |
# | --- | --- |
# | runs on | TPU, GPU or CPU; the Pallas kernels need a TPU or a Hopper GPU, other devices compute by XLA |
# | minutes | 1 with a CPU of two busy cores; other devices were not timed |
# | expect | decode time that falls with the live tokens, at 0.85 to 0.97 of measured bandwidth for the kernel on an H100; see `experiments/results/bench_kernels` |

# %% [markdown]
# ## 1. Install

# %% install

# %% [markdown]
# ## 2. The roofline
#
# Bandwidth is that of XLA's fastest reduction, arithmetic that of a large matrix product.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from pallas_kernels.common import bench

ON_CPU = device.platform == "cpu"
dtype = jnp.float32 if ON_CPU else jnp.bfloat16
bandwidth = bench.read_bandwidth(2 ** setting("LOG_BYTES", 27 if ON_CPU else 30))
side = setting("MATRIX", 1024 if ON_CPU else 8192)
matrix = jnp.ones((side, side), dtype)
flops = 2 * side**3 / bench.clock(jax.jit(jnp.matmul), matrix, matrix)
print(
  f"{device.device_kind}: reads {bandwidth / 1e9:,.0f} GB/s, multiplies {flops / 1e12:,.2f} TFLOP/s in {matrix.dtype}"
)
print(f"the two balance at {flops / bandwidth:,.0f} operations a byte")

# %% [markdown]
# ## 3. Decode: one query a row, at several compression ratios
#
# B rows, K KV heads with G query heads each, heads of H channels, S slots a head. `lengths` says how many slots of each head are live; heads keep very different amounts, as under DMS. Work: 4 B N H operations a live token and query head; bytes: 2 H numbers a live token.

# %%
from pallas_kernels import decode, prefill, window_bias
from pallas_kernels.decode.api import IMPLEMENTATIONS

batch, kv_heads, group, size = setting("BATCH", 2 if ON_CPU else 32), 8, 4, setting("HEAD", 64 if ON_CPU else 128)
slots = setting("SLOTS", 4096 if ON_CPU else 16384)
keys = jax.random.split(jax.random.key(0), 2)
q = jax.random.normal(keys[0], (batch, kv_heads * group, size), dtype)
kv = jax.random.normal(keys[1], (1, batch, kv_heads, slots, 2 * size), dtype)


def attend(name):
  return jax.jit(lambda q, kv, lengths: decode.decode_attention(q, kv, 0, lengths, implementation=name))


def able(function, *args):
  """Whether an implementation takes the case; else its reason is printed."""
  try:
    jax.block_until_ready(function(*args))
    return True
  except NotImplementedError as reason:
    print("not here:", reason)
    return False


dense = bench.ragged_lengths(batch, kv_heads, slots, 1)
names = [name for name in IMPLEMENTATIONS if able(attend(name), q, kv, dense)]
print("implementations on this device:", names)

# %%
ratios = (1, 2, 4, 8, 16)
times = {name: [] for name in names}
live = []
for cr in ratios:
  lengths = bench.ragged_lengths(batch, kv_heads, slots, cr)
  live.append(int(lengths.sum()))
  for name in names:
    times[name].append(bench.clock(attend(name), q, kv, lengths))
itemsize = jnp.dtype(dtype).itemsize
floor = np.array(live) * 2 * size * itemsize / bandwidth
print(
  f"{'CR':>4}{'live tokens':>14}{'floor, us':>12}"
  + "".join(f"{name + ', us':>12}{'of bandwidth':>14}" for name in names)
)
for i, cr in enumerate(ratios):
  row = "".join(f"{times[n][i] * 1e6:12,.0f}{floor[i] / times[n][i]:14.0%}" for n in names)
  print(f"{cr:4}{live[i]:14,}{floor[i] * 1e6:12,.0f}{row}")

# %% [markdown]
# A kernel skips the dead slots of every head. XLA reads blocks of slots up to the last live one of the *fullest* head, of all heads alike, so its time follows that head and not the mean.

# %%
figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
axis.loglog(ratios, np.array(floor) * 1e6, color="k", ls="--", lw=1.2, label="bytes of live tokens / bandwidth")
for name, color in zip(names, ("#1f6fb4", "#f0a830", "#7a5195"), strict=False):
  axis.loglog(ratios, np.array(times[name]) * 1e6, "o-", color=color, label=name)
axis.set(
  title=f"decode attention, {batch} rows of {slots:,} slots, {device.device_kind}",
  xlabel="compression ratio",
  ylabel="microseconds",
)
axis.set_xticks(ratios, [str(cr) for cr in ratios])
axis.set_xticks([], minor=True)
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 4. Prefill and training
#
# A chunk of a prompt under eviction (each key is visible from a first to a last query), and causal attention with DMS's training bias, forward and backward. Operations count visible pairs.

# %%
length, heads = setting("LENGTH", 1024 if ON_CPU else 8192), 8
keys = jax.random.split(jax.random.key(1), 4)
q4 = jax.random.normal(keys[0], (1, length, heads * group, size), dtype)
k4, v4 = (jax.random.normal(key, (1, length, heads, size), dtype) for key in keys[1:3])
window = 64
evicted = jax.random.bernoulli(keys[3], 0.75, (1, heads, length))
position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (1, heads, length))
last = jnp.where(evicted, position + window, prefill.NEVER)
read = jax.jit(lambda q, k, v: prefill.prefill_attention(
  q, k.swapaxes(1, 2), v.swapaxes(1, 2), position[:, 0], position, last))  # fmt: skip
bias = jnp.where(evicted, -8.0, 0.0)


def loss(q, k, v, bias):
  return window_bias.window_bias_attention(q, k, v, bias, window).astype(jnp.float32).sum()


train = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
pairs = length * (length + 1) / 2
visible = float(np.asarray(jnp.minimum(last, length - 1) - position + 1).mean() * length)
bytes_moved = (q4.size * 2 + k4.size * 2) * itemsize
points = {
  "prefill, CR 4": (4 * visible * heads * group * size, bytes_moved, bench.clock(read, q4, k4, v4)),
  "training, forward and backward": (
    14 * pairs * heads * group * size,
    4 * bytes_moved,
    bench.clock(train, q4, k4, v4, bias),
  ),
}
for i, cr in enumerate(ratios):
  if cr in (1, 8):
    points[f"decode, CR {cr}"] = (4 * live[i] * group * size, live[i] * 2 * size * itemsize, times[names[0]][i])
for name, (operations, moved, seconds) in points.items():
  print(
    f"{name:32}{seconds * 1e3:9.2f} ms{operations / seconds / 1e12:9.3f} TFLOP/s{operations / moved:9,.0f} operations a byte"
  )

# %%
figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
intensity = np.geomspace(0.3, 3e4, 200)
axis.loglog(intensity, np.minimum(flops, intensity * bandwidth) / 1e12, color="k", lw=1.6)
for (name, (operations, moved, seconds)), color in zip(
  points.items(), ("#1f6fb4", "#d1495b", "#4d4d4d", "#f0a830"), strict=True
):
  axis.loglog(operations / moved, operations / seconds / 1e12, "o", ms=9, color=color, label=name)
axis.set(title=f"roofline of {device.device_kind}, as measured", xlabel="operations a byte", ylabel="TFLOP/s")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
plt.show()
