"""Times an export in the layout dms_torch in transformers, beside the stock model of its weights.

    python -m experiments.bench_dms_torch --export=export/smollm2-cr4 --text=wiki.test.raw

Rows are neighbouring stretches of the text. A case reads prompts of `prompt_tokens` and decodes `new_tokens` greedily,
once to warm up and then `rounds` times; the best counts. `KV bytes` are those of the cache's tensors at the end. Needs
torch and transformers 5. Writes OUTPUT/dms_torch.json and prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from experiments.common import program
from experiments.reports import tables

COLUMNS = ("model", "rows", "prefill s", "decode tokens/s", "KV bytes", "tokens held", "achieved CR")


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of a run.

  Attributes:
    export: a folder that `experiments.export_torch --layout=dms_torch` wrote, with its tokenizer.
    text: the file whose text is read.
    rows: numbers of prompts that are read together, a case each.
    prompt_tokens, new_tokens: tokens of a prompt, and tokens decoded after it, at least 2.
    rounds: times that each case is timed.
    threads: torch's threads; 0 leaves its own choice.
    device: torch's device.
  """

  export: Path
  text: Path
  rows: tuple[int, ...] = (1, 4)
  prompt_tokens: int = 2048
  new_tokens: int = 64
  rounds: int = 2
  threads: int = 0
  device: str = "cpu"
  output: Path = Path("runs/bench_dms_torch")

  def __post_init__(self):
    if min(*self.rows, self.prompt_tokens, self.new_tokens - 1, self.rounds) < 1:
      raise ValueError("--rows, --prompt_tokens and --rounds must be 1 or more, --new_tokens 2 or more")


def measure(model: Any, ids: Any, config: Config) -> dict[str, Any]:
  """One row of the table: times and cache of `model` on prompts [B, T]."""
  import torch

  def run(count: int) -> tuple[float, Any]:
    start = time.perf_counter()
    out = model.generate(
      ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None,
      pad_token_id=0, return_dict_in_generate=True,
    )  # fmt: skip
    if ids.is_cuda:
      torch.cuda.synchronize()
    return time.perf_counter() - start, out

  run(2)
  prefill = min(run(1)[0] for _ in range(config.rounds))
  timed = [run(config.new_tokens) for _ in range(config.rounds)]
  out = timed[-1][1]
  cache = out.cache if "cache" in out else out.past_key_values  # its earlier name
  seen = ids.shape[1] + config.new_tokens - 1
  evicts = hasattr(cache, "live")
  live = cache.live().double() if evicts else torch.full((1,), float(seen))
  return {
    "model": type(model).__name__,
    "rows": len(ids),
    "prefill s": prefill,
    "decode tokens/s": len(ids) * (config.new_tokens - 1) / (min(seconds for seconds, _ in timed) - prefill),
    "KV bytes": cache.nbytes if evicts else sum(x.nbytes for y in cache.layers for x in (y.keys, y.values)),
    "tokens held": float(live.mean()),
    "achieved CR": float(1 / (live / seen).mean()),
  }


def main() -> None:
  config = program.read_flags("", Config)
  if not (config.export / "modeling_dms.py").is_file():
    raise ValueError(f"--export={config.export}: no modeling_dms.py in it; experiments.export_torch writes one")
  try:
    import torch
    import transformers
  except ImportError as error:
    raise ValueError(f"{error.name} is not installed: pip install 'torch>=2.4' 'transformers>=5,<6'") from None
  if config.threads:
    torch.set_num_threads(config.threads)
  tokenizer = transformers.AutoTokenizer.from_pretrained(config.export)
  tokens = tokenizer(config.text.read_text(encoding="utf-8")[: 16 * max(config.rows) * config.prompt_tokens])
  needed, found = max(config.rows) * config.prompt_tokens, len(tokens["input_ids"])
  if found < needed:
    raise ValueError(f"--text={config.text}: {needed} tokens needed, found {found}")
  results = []
  for trusted in (False, True):  # transformers runs the stock class unless it may run the folder's code
    model = transformers.AutoModelForCausalLM.from_pretrained(config.export, dtype="auto", trust_remote_code=trusted)
    model = model.eval().to(config.device)
    for rows in config.rows:
      ids = torch.tensor(tokens["input_ids"][: rows * config.prompt_tokens], device=config.device).view(rows, -1)
      results.append(measure(model, ids, config))
      program.log(f"  {results[-1]['model']}, {rows} rows: {results[-1]['decode tokens/s']:.3g} tokens/s")
    del model
  print(tables.of_mappings(results, COLUMNS))
  config.output.mkdir(parents=True, exist_ok=True)
  values = {"torch": torch.__version__, "transformers": transformers.__version__, "results": results}
  (config.output / "dms_torch.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
  program.finish(values)


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main)
