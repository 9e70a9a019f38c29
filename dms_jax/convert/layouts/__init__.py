"""Layouts of checkpoints in PyTorch, one file each: registry of those that an export writes."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from dms_jax.convert.layouts import dms_torch, fastdms, model_optimizer, nvidia_neuron, peft, transformers
from dms_jax.convert.tensors import Progress
from dms_jax.convert.writing import About
from dms_jax.decoder import Model
from dms_jax.tokenizer import Tokenizer


class Layout(Protocol):
  """A module of this package that writes a layout.

  Attributes:
    NAME: its name, as `--layout` takes it.
  """

  NAME: str

  def write(
    self,
    directory: Path,
    model: Model,
    tokenizer: Tokenizer | None,
    *,
    dtype: str,
    shard_bytes: int,
    progress: Progress | None = None,
    about: About = About(),
  ) -> None:
    """Fills an empty folder with the model; `export` moves it to its place when this returns.

    Args:
      model: its layers stacked, its low-rank updates apart where it has any.
      dtype: dtype of the weights, one of `tensors.DTYPES`.
      shard_bytes: most bytes of one safetensors file.
      progress: called as progress(done, total, file name).
      about: what the files say of the model and no parameter holds.

    Raises:
      ValueError: the layout cannot hold the model; `writing.refuse` lists the reasons.
    """


LAYOUTS: dict[str, Layout] = {
  transformers.NAME: transformers,
  model_optimizer.NAME: model_optimizer,
  nvidia_neuron.NAME: nvidia_neuron,
  fastdms.NAME: fastdms,
  peft.NAME: peft,
  dms_torch.NAME: dms_torch,
}  # fmt: skip
