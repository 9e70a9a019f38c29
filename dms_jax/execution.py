"""Every device-dependent choice of a step, in one frozen dataclass.

No choice changes a result by more than rounding. `Execution.choose` makes every choice from the kind of device, the
step's shape and the model. The rest of the code reads the fields and never asks for the device. `override` sets fields
for a block of code, to test and to time each choice on and off (`experiments.bench_execution`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import jax

from dms_jax.sharding import row_and_head_axes
from pallas_kernels.common.platform import platform

if TYPE_CHECKING:
  from dms_jax.decoder import Model

LEAST_ROWS = 8  # value of `Execution.least_rows`, where it is on
LATE_ROWS = 32  # most rows for `Execution.late_gates` and `Execution.joint_updates`
FEW_ROWS = 16  # most rows for `Execution.weights_left`
MANY_LAYERS = 8  # fewest layers for `Execution.layers_apart` and `Execution.step_layers`
PART = 4  # most layers for `Execution.step_layers`

_overrides = jax.make_user_context(())


@dataclasses.dataclass(frozen=True)
class Execution:
  """The choices for one step; the defaults switch every one of them off.

  A percentage, such as "+54 %", says how much longer a decode step of one row takes without the choice, in bfloat16.
  CPU figures: SmolLM2-135M at 1,024 tokens and CR 4, two shared cores of an AMD EPYC, jax 0.10.2. GPU figures:
  Llama-3.2-1B's shape at 8,192 tokens and CR 8, one H100, jax 0.11.2. `experiments.bench_execution` measures them.

  Attributes:
    layers: a scan over stacked layers or a loop over a list of layers, whichever decodes faster. On CPUs (+126 %) and
      GPUs (+117 %) a scan copies each layer's weights out of the stack at every step. A loop copies nothing, but takes
      longer to compile. On a TPU the scan costs nothing.
    least_rows: rows to which a decode step pads everything except attention, on one GPU (+13 %). With fewer rows XLA
      reads weights at half the speed and splits a norm into more kernels. SmolLM2-135M is 9 % faster without padding.
      On a mesh, padding would move rows between devices.
    late_gates: a decode step on one GPU computes the adapter gates of all layers in one kernel after the layers (+3 %,
      SmolLM2-135M +7 %). The kernel reads each layer's x once per KV head and selects among L arrays, so above
      LATE_ROWS rows one kernel per layer is faster. The cache must support it (`Cache.can_decide_late`).
    fused_gate: a decode step on a GPU computes an adapter gate's RMSNorm and projection as one reduction (+10 %). The
      reduction is one small kernel instead of three.
    joint_updates: most rows for which low-rank updates that are not merged (`LoRAConfig.by_cr`) take few kernels, on a
      GPU: in a decode step those of q, k and v are one update, and a product with a matrix A is one reduction. It takes
      4 kernels a layer instead of 11 (SmolLM2-135M +24 %, +17 % with 32 rows, at 8,192 tokens on an H200). Otherwise
      XLA computes eight products, pads operands to split sums, and copies weights together at every step. A reduction
      reads x once per rank, so above LATE_ROWS rows products stay.
    weights_left: most rows for which a bfloat16 product has the weights as its left operand, on a CPU (+94 %). XLA's
      library packs the right operand at every call. For few rows, packing weights takes several times as long as the
      product.
    matvec_parts: number of matrices into which the weights of a matrix-vector product are split, on a CPU (+13 %, in
      float32, the only dtype split). XLA computes one product mostly in one thread and a batch of products in several.
    bits_storage: a cache stores bfloat16 as its bits in uint16, on a CPU (+54 %). To write one row of a bfloat16 array
      XLA converts the whole array to float32 and back, which takes 700 us instead of 2 us for a cache of 5 MB.
    embed_barrier: ties a bfloat16 embedding to the tokens before the gather, on a CPU (+22 %). The gather goes through
      float32, and without the barrier XLA hoists the conversion of the whole table out of a loop of decode steps.
    jitted_attention: attention is a jitted function inside the program, on a GPU. Its kernel takes seconds to lower and
      to compile, and is compiled once for all layers of a list.
    layers_apart: the host calls one compiled function for each layer of a prompt's chunk, on a CPU or GPU, from
      MANY_LAYERS layers in a list up. On a CPU SmolLM2's chunk of 256 tokens is compiled in 3.4 instead of 20 s of CPU
      time, and again for a grown pool in 0.7 instead of 19; it then takes 0.9 s either way. For an H200 it takes 5 to 6
      s instead of 55 to 95.
    step_layers: layers of a decode step that one compiled function computes, on a CPU, from MANY_LAYERS layers in a
      list up; the host calls it for each part of the layers. 0: a block of steps is one program. SmolLM2's block of
      32 steps takes 18 to 22 s of CPU time to compile, parts of 6 layers 4.6 s and of 3 layers 3.2 s. A step in parts
      of 6 takes 28.6 instead of 26.6 ms, and in parts of 3 about 3 % more CPU time than that. Only `generate` does
      this (a `Generator`'s steps took 8 % longer), and not for policies that merge or remove archived tokens, nor in a
      masked cache.
    skipped_filters: one program samples with and without top-k and top-p, on a CPU: at run time it skips a filter that
      excludes nothing, and setting one does not compile. A GPU would wait for the host to decide.
    small_cuts: cuts that a policy makes between decode steps (`cache.pruning`) are so small that they stay in the cache
      of a CPU. R-KV cuts 48 of 1,024 rows, the reasoner's shape with 384 slots a head, in 0.47 instead of 1.1 s of CPU
      time. A GPU would launch as many kernels for each of many small cuts as for a large one.
    replicated_writes: on a mesh of TPUs every device writes the whole pool of pages, because a kernel is not
      partitioned automatically.
  """

  layers: Literal["scan", "loop"] = "scan"
  least_rows: int = 0
  late_gates: bool = False
  fused_gate: bool = False
  joint_updates: int = 0
  weights_left: int = 0
  matvec_parts: int = 1
  bits_storage: bool = False
  embed_barrier: bool = False
  jitted_attention: bool = False
  layers_apart: bool = False
  step_layers: int = 0
  skipped_filters: bool = False
  small_cuts: bool = False
  replicated_writes: bool = False

  @classmethod
  def choose(cls, model: Model | None = None, rows: int = 0, tokens: int = 0) -> Execution:
    """The choices for a step of `tokens` tokens for each of `rows` rows, under the current mesh and overrides.

    Args:
      model: None leaves `late_gates`, `layers_apart` and `step_layers` off, the choices that depend on the model.
      rows, tokens: B and T of the step; with 0, fields that act in decode steps alone stay off.
    """
    kind, decodes = platform(), tokens == 1
    many = model is not None and model.config.num_layers >= MANY_LAYERS
    cpu, gpu, tpu = (kind == name for name in ("cpu", "gpu", "tpu"))
    alone = gpu and row_and_head_axes(rows, 1) is None
    chosen: dict[str, Any] = dict(
      layers="scan" if tpu else "loop",
      least_rows=LEAST_ROWS if alone else 0,
      late_gates=alone and rows <= LATE_ROWS,
      fused_gate=gpu,
      joint_updates=LATE_ROWS if gpu else 0,
      weights_left=FEW_ROWS if cpu else 0,
      matvec_parts=(os.cpu_count() or 1) if cpu else 1,
      bits_storage=cpu,
      embed_barrier=cpu,
      jitted_attention=gpu,
      layers_apart=(cpu or gpu) and many,
      step_layers=_part(model.config.num_layers) if cpu and many else 0,
      skipped_filters=cpu,
      small_cuts=cpu,
      replicated_writes=tpu,
    )
    chosen |= _overrides.value
    if not decodes:
      chosen |= dict(least_rows=0, late_gates=False, fused_gate=False, step_layers=0)
    # On a mesh a program is `shard_map` of a whole chunk or step.
    divided = model is not None and model.mesh is None and isinstance(model.params["layers"], list)
    chosen["layers_apart"] = bool(chosen["layers_apart"]) and divided and tokens > 1
    chosen["step_layers"] = chosen["step_layers"] if divided else 0
    chosen["late_gates"] = bool(chosen["late_gates"]) and model is not None and _listed_adapters(model)
    return cls(**chosen)


def _part(layers: int) -> int:
  """The most layers, up to PART, into which `layers` divide; PART where that is fewer than half of it."""
  size = max(size for size in range(1, PART + 1) if layers % size == 0)
  return size if 2 * size >= PART else PART


def _listed_adapters(model: Model) -> bool:
  """Whether the gates are adapters and the layers a list."""
  return model.dms is not None and model.dms.gate == "adapter" and isinstance(model.params["layers"], list)


@contextlib.contextmanager
def override(**fields: Any) -> Iterator[None]:
  """Sets fields of every `Execution` chosen inside: `with execution.override(late_gates=False): ...`.

  A field that is switched on acts on any device and any number of rows, if it applies to the step and the model. The
  overrides are part of the key of `jax.jit`, so functions traced before are traced again. `layers` takes effect when a
  model is prepared (`fastest_form`), `bits_storage` when a cache is created.

  Raises:
    TypeError: an unknown field.
  """
  dataclasses.replace(Execution(), **fields)
  with _overrides(tuple(sorted((dict(_overrides.value) | fields).items()))):
    yield


def fastest_form(model: Model) -> Model:
  """The model with its layers stacked or as a list, whichever decodes fastest on this device (`Execution.layers`).

  On a GPU a list of layers is a copy of the stacked weights, so convert once, as `load` does, not at every call of
  `generate`. SmolLM2-135M on two CPU cores generates 30 tokens/s from the list and 15 from the stack.
  """
  return model.unstacked() if Execution.choose().layers == "loop" else model
