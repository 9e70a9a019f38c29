"""Pictures of results. matplotlib is optional: without it a picture is skipped, and the log says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments import program

DENSE, DMS = "#4d4d4d", "#1f6fb4"


def pyplot() -> Any:
  """matplotlib.pyplot drawing to files, or None where it is not installed."""
  try:
    import matplotlib
  except ImportError:
    program.log("no picture: matplotlib is not installed (pip install 'dms_jax[plot]')")
    return None
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  return plt


def live_tokens(path: Path, dense: dict, dms: dict, *, read: int, title: str) -> str | None:
  """Live tokens of a cache against position: a line a run, and a thin one for each of DMS's heads.

  Args:
    dense, dms: `position` [P] and `live` [P, L, K].
    read: where reading ends and writing begins.

  Returns:
    The path written, or None without matplotlib.
  """
  if (plt := pyplot()) is None:
    return None
  figure, axis = plt.subplots(figsize=(9, 5.2), layout="constrained")
  layers, heads = dms["live"].shape[1:]
  each = dms["live"].reshape(len(dms["position"]), -1)
  lines = axis.plot(dms["position"], each, color=DMS, alpha=0.22, lw=0.6)
  lines[0].set_label(f"DMS, one line a head ({layers} layers x {heads} KV heads)")
  for run, name, color in ((dense, "dense", DENSE), (dms, "DMS, mean over heads", DMS)):
    mean = run["live"].mean(axis=(1, 2))
    axis.plot(run["position"], mean, color=color, lw=2.4, label=name)
    axis.annotate(
      f"{mean[-1]:,.0f}", (run["position"][-1], mean[-1]), xytext=(5, 0), textcoords="offset points",
      color=color, va="center", fontweight="bold",
    )  # fmt: skip
  axis.axvline(read, color="k", lw=0.8, ls=":")
  axis.annotate(
    "writes from here ", (read, 0.985), xycoords=("data", "axes fraction"), ha="right", va="top", fontsize=9
  )
  end = int(dms["position"][-1])
  axis.set(xlim=(0, end), ylim=(0, 1.04 * float(dense["live"].max())))
  axis.set(title=f"Tokens the KV cache holds\n{title}", xlabel="tokens read and written", ylabel="live tokens a head")
  axis.grid(alpha=0.25)
  axis.spines[["top", "right"]].set_visible(False)
  legend = axis.legend(loc="upper left", frameon=False)
  for handle in legend.get_lines():
    handle.set_alpha(1.0)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=140)
  plt.close(figure)
  return str(path)
