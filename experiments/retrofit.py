"""Retrofits a model with eviction gates, and on request with low-rank updates or new weights.

    python -m experiments.retrofit --checkpoint=checkpoints/smollm2-135m-instruct --output=runs/retrofit/mine \\
      --data.paths=text.txt,chats.jsonl --retrofit.steps=400 --retrofit.final_cr=4

Run the same command again after an interruption: it goes on from the last checkpoint with the same numbers. Writes
OUTPUT/{run.json, log.jsonl, state/, cr2/, cr3/, ..., final/, log.png}; each crN and final is a retrofit for
`dms_jax.load(checkpoint, retrofit=...)`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import jax

from dms_jax import checkpoint
from dms_jax.config import DMSConfig, LoRAConfig
from dms_jax.retrofit import DataConfig, RetrofitConfig
from dms_jax.retrofit.data import Packer, load_sources
from dms_jax.retrofit.loop import LOG, Run, train
from dms_jax.tokenizer import Tokenizer
from experiments import program


@dataclasses.dataclass(frozen=True)
class Config:
  """Where from and where to. `stop_after` leaves after so many steps in all, as if interrupted; 0 runs to the end."""

  checkpoint: str
  output: str
  stop_after: int = 0


def plot(log: Path, picture: Path) -> None:
  """Draws log.jsonl: losses, target and achieved compression, gate rate, learning rate."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  lines = [json.loads(line) for line in log.read_text().splitlines()]
  steps = [line["step"] for line in lines]
  figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
  axes[0].plot(steps, [line["kl"] for line in lines], lw=0.6)
  axes[0].set(title="distillation loss", ylabel="KL, nats per token", yscale="log")
  axes[1].plot(steps, [line["target_cr"] for line in lines], "k--", label="target (share of decisions)")
  axes[1].plot(steps, [line["achieved_cr"] for line in lines], lw=0.6, label="achieved at the row length")
  axes[1].set(title="compression", ylabel="CR")
  axes[1].legend()
  axes[2].plot(steps, [line["gate_rate"] for line in lines], lw=0.6, label="decisions that evict")
  axes[2].plot(steps, [line["compression_loss"] for line in lines], lw=0.6, label="compression loss")
  axes[2].set(title="gates", ylim=(0, 1))
  axes[2].legend()
  for axis in axes:
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
  figure.savefig(picture, dpi=110)
  plt.close(figure)


def main() -> None:
  config = program.read_flags("", Config)
  dms, lora = program.read_flags("dms", DMSConfig), program.read_flags("lora", LoRAConfig)
  settings, data = program.read_flags("retrofit", RetrofitConfig), program.read_flags("data", DataConfig)
  base = checkpoint.load(config.checkpoint)
  tokenizer = Tokenizer.load(config.checkpoint)
  program.log("reading and tokenizing text")
  sources = load_sources(data, tokenizer)
  for source in sources:
    program.log(f"  {source.name}: {len(source.tokens):,} tokens in {source.document[-1]:,} documents")
  output, start = Path(config.output), time.perf_counter()
  shown = [start]

  def report(line: dict) -> None:
    if time.perf_counter() - shown[0] > 5:
      shown[0] = time.perf_counter()
      left = (settings.steps - line["step"] - 1) * line["seconds"]
      program.log(
        f"step {line['step']}/{settings.steps}: KL {line['kl']:.4f}, CR {line['achieved_cr']:.2f} (target "
        f"{line['target_cr']:.2f}), {line['seconds'] * 1e3:.0f} ms a step, {left / 60:.1f} min left"
      )

  run, packer = Run(base, dms, lora, settings, data, output), Packer(sources, data, settings)
  last = train(run, packer, tokenizer, report=report, stop_after=config.stop_after or None)
  try:
    plot(output / LOG, output / "log.png")
  except ImportError:
    program.log("no picture of the log: matplotlib is not installed (pip install 'dms_jax[plot]')")
  minutes = (time.perf_counter() - start) / 60
  program.finish({"output": str(output), "minutes": minutes, "device": jax.devices()[0].device_kind, "last": last})


if __name__ == "__main__":
  program.define_flags("", Config)
  program.define_flags("dms", DMSConfig, window=64)
  program.define_flags("lora", LoRAConfig, rank=16)
  program.define_flags("retrofit", RetrofitConfig)
  program.define_flags("data", DataConfig)
  program.run(main)
