"""Our models, configs and batches as those of the twin in PyTorch, and its tolerances."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dms_jax import testing as tiny
from dms_jax.config import DMSConfig
from dms_jax.families.huggingface import config_to_hf
from dms_jax.model import Model
from dms_jax.params import flatten, param_table
from dms_jax.retrofit import RetrofitConfig
from dms_jax.retrofit.step import Batch

torch = pytest.importorskip("torch", reason="torch is not installed (make test-parity installs it)")

from experiments.torch_reference import gates as twin_gates  # noqa: E402
from experiments.torch_reference import model as twin_model  # noqa: E402
from experiments.torch_reference import schedule as twin_schedule  # noqa: E402
from experiments.torch_reference import step as twin_step  # noqa: E402

LOSS, GRADIENT = 1e-5, 1e-4  # float32 in another order; gradients relative to the largest of their tensor
LOGITS = 4e-5  # of the logits' largest value
quick = functools.partial(jax.jit, compiler_options=tiny.QUICK)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
  """Threads cost more than they save on models of this size."""
  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


def to_torch(x) -> torch.Tensor:
  x = np.array(x)
  return torch.from_numpy(x).long() if x.dtype.kind in "iu" else torch.from_numpy(x)


def twin_names(model: Model) -> dict[str, tuple[str, int | None]]:
  """The twin's name of each tensor -> (path in our parameters, layer)."""
  names = {}
  table = param_table(model.config, model.dms, model.lora)
  for path, spec in table.items():
    name = spec.hf_name
    if name is None:  # a low-rank update: of the projection's name, "_lora_a" or "_lora_b"
      target = path.rsplit("_lora_", 1)[0]
      name = table[target].hf_name.removesuffix("weight") + f"lora_{path[-1].upper()}.weight"
    for layer in range(model.config.num_layers) if spec.layered else [None]:
      names[name.format(layer=layer)] = path, layer
  return names


def twin_tensors(model: Model, flat: dict) -> dict[str, np.ndarray]:
  """Tensors by our paths, those of `flat`, under the twin's names and in its shapes: outputs and inputs flattened."""
  table, out = param_table(model.config, model.dms, model.lora), {}
  for name, (path, layer) in twin_names(model).items():
    if path in flat:
      value, spec = np.asarray(flat[path] if layer is None else flat[path][layer]), table[path]
      outputs = spec.shape[spec.layered : len(spec.shape) - spec.num_inputs]
      out[name] = value.reshape(int(np.prod(outputs)), -1) if spec.num_inputs else value.reshape(-1)
  return out


def twin_of(model: Model) -> tuple[dict[str, torch.Tensor], twin_model.ModelConfig, twin_gates.DMSConfig | None]:
  """(weights, config, gates)."""
  weights = {name: to_torch(x) for name, x in twin_tensors(model, flatten(model.params)).items()}
  config = twin_model.ModelConfig.from_hf(config_to_hf(model.config, "float32"))
  config = dataclasses.replace(config, lora_scale=model.lora.scale if model.lora else 0.0)
  return weights, config, None if model.dms is None else gates_of(model.dms)


def gates_of(dms: DMSConfig) -> twin_gates.DMSConfig:
  return twin_gates.DMSConfig(**{f.name: getattr(dms, f.name) for f in dataclasses.fields(twin_gates.DMSConfig)})


def settings_of(config: RetrofitConfig) -> twin_schedule.RetrofitConfig:
  """Our settings as the twin's: each field by its name, whatever section it is in."""
  sections = [config, config.loss, config.schedule, config.optimizer]
  names = [f.name for f in dataclasses.fields(twin_schedule.RetrofitConfig)]
  return twin_schedule.RetrofitConfig(**{n: next(getattr(s, n) for s in sections if hasattr(s, n)) for n in names})


def batch_of(batch: Batch) -> twin_step.Batch:
  return twin_step.Batch(
    *(None if x is None else to_torch(x) for x in (batch.tokens, batch.segment_ids, batch.loss_mask))
  )
