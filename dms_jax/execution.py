"""Every device-dependent choice of a step, in one frozen dataclass.

No choice changes a result by more than rounding. `Execution.choose` makes them all from the kind of device, the step's
shape and the model; the rest of the code reads the fields and never asks which device there is. `override` sets fields
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
  from dms_jax.model import Model

LEAST_ROWS = 8  # rows to which `Execution.least_rows` pads
LATE_ROWS = 32  # most rows for `Execution.late_gates`
FEW_ROWS = 16  # most rows for `Execution.weights_left`

_overrides = jax.make_user_context(())


@dataclasses.dataclass(frozen=True)
class Execution:
  """The choices for one step; the defaults switch every one of them off.

  "+54 %" is how much longer a decode step of one row takes without the choice, in bfloat16: on a CPU SmolLM2-135M at
  1,024 tokens and CR 4 (two shared cores of an AMD EPYC, jax 0.10.2), on a GPU Llama-3.2-1B's shape at 8,192 tokens and
  CR 8 (an H100, jax 0.11.2). `experiments.bench_execution` measures them.

  Attributes:
    layers: the form of the layers that decodes fastest. A scan copies each layer's weights out of the stack at every
      step, on CPUs (+126 %) and GPUs (+117 %); a loop over a list of layers copies nothing and takes longer to compile.
      On a TPU the scan costs nothing.
    least_rows: rows to which a decode step pads everything except attention, on one GPU (+13 %). For fewer rows XLA
      reads weights at half the speed and splits a norm into more kernels. SmolLM2-135M is 9 % faster without. On a
      mesh, padding would move rows between devices.
    late_gates: a decode step on one GPU computes the adapter gates of all layers in one kernel after the layers (+3 %,
      SmolLM2-135M +7 %). The kernel reads each layer's x once per KV head and selects among L arrays, so above
      LATE_ROWS rows one kernel per layer is faster. The cache must allow it, too (`Cache.can_decide_late`).
    fused_gate: a decode step on a GPU computes an adapter gate's RMSNorm and projection as one reduction, which is one
      small kernel instead of three: +10 %.
    weights_left: most rows of a bfloat16 product that has the weights as its left operand, on a CPU. XLA's library
      packs the right operand at every call, which for few rows takes several times as long as the product: +94 %.
    matvec_parts: matrices into which the weights of a float32 matrix-vector product are split, on a CPU. XLA computes
      one product mostly in one thread and a batch of them in several: +13 %, in float32.
    bits_storage: a cache stores bfloat16 as its bits in uint16, on a CPU. XLA writes one row of a bfloat16 array by
      converting the whole array to float32 and back: +54 %, 700 us instead of 2 for a cache of 5 MB.
    embed_barrier: ties a bfloat16 embedding to the tokens before the gather, on a CPU. The gather goes through float32,
      and XLA hoists the conversion of the whole table out of a loop of decode steps: +22 %.
    jitted_attention: attention is a jitted function inside the program, on a GPU. Its kernel, which takes seconds to
      lower and to compile, is compiled once for all layers of a list.
    replicated_writes: on a mesh of TPUs every device writes the whole pool of pages itself, since a kernel is not
      partitioned automatically.
  """

  layers: Literal["scan", "loop"] = "scan"
  least_rows: int = 0
  late_gates: bool = False
  fused_gate: bool = False
  weights_left: int = 0
  matvec_parts: int = 1
  bits_storage: bool = False
  embed_barrier: bool = False
  jitted_attention: bool = False
  replicated_writes: bool = False

  @classmethod
  def choose(cls, model: Model | None = None, rows: int = 0, tokens: int = 0) -> Execution:
    """The choices for a step of `tokens` tokens for each of `rows` rows, under the current mesh and overrides.

    Args:
      model: None leaves out what depends on the model, gates after the layers.
      rows, tokens: B and T of the step; 0 leaves out what depends on the step.
    """
    kind, decodes = platform(), tokens == 1
    cpu, gpu, tpu = (kind == name for name in ("cpu", "gpu", "tpu"))
    alone = gpu and row_and_head_axes(rows, 1) is None
    chosen: dict[str, Any] = dict(
      layers="scan" if tpu else "loop",
      least_rows=LEAST_ROWS if alone else 0,
      late_gates=alone and rows <= LATE_ROWS,
      fused_gate=gpu,
      weights_left=FEW_ROWS if cpu else 0,
      matvec_parts=(os.cpu_count() or 1) if cpu else 1,
      bits_storage=cpu,
      embed_barrier=cpu,
      jitted_attention=gpu,
      replicated_writes=tpu,
    )
    chosen |= _overrides.value
    if not decodes:
      chosen |= dict(least_rows=0, late_gates=False, fused_gate=False)
    chosen["late_gates"] = bool(chosen["late_gates"]) and model is not None and _listed_adapters(model)
    return cls(**chosen)


def _listed_adapters(model: Model) -> bool:
  """Whether the gates are adapters and the layers a list."""
  return model.dms is not None and model.dms.gate == "adapter" and isinstance(model.params["layers"], list)


@contextlib.contextmanager
def override(**fields: Any) -> Iterator[None]:
  """Sets fields of every `Execution` chosen inside: `with execution.override(late_gates=False): ...`.

  A field that is switched on acts whatever the device and the number of rows, where step and model have what it acts
  on. The overrides are part of the key of `jax.jit`, so functions traced before are traced again. `layers` acts where a
  model is prepared (`fastest_form`), `bits_storage` where a cache is made.

  Raises:
    TypeError: an unknown field.
  """
  dataclasses.replace(Execution(), **fields)
  with _overrides(tuple(sorted((dict(_overrides.value) | fields).items()))):
    yield


def fastest_form(model: Model) -> Model:
  """The model with its layers in the form that decodes fastest on this device: see `Execution.layers`.

  A list of layers is a copy of the stacked weights: convert once, as `load` does, not at every call of `generate`.
  SmolLM2-135M on two CPU cores generates 30 tokens/s from the list and 15 from the stack.
  """
  return model.unstacked() if Execution.choose().layers == "loop" else model
