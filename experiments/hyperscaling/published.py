"""The paper's own margins, to stand beside measured ones (arXiv 2506.05345, tables 7 to 9)."""

from __future__ import annotations

TASKS = ("AIME24", "MATH-500", "GPQA Diamond", "LiveCodeBench")
SIZES = ("1.5B", "7B", "32B")  # R1-distilled Qwen 2.5
NA = None  # the paper's "NA": the frontiers share no interval

# {(method, over, axis): a row of SIZES for each of TASKS}, points of 100. Table 8 is by KV reads, table 9 by peak
# tokens, table 7 by throughput, whose axis is time here.
MARGINS: dict[tuple[str, str, str], tuple[tuple[float | None, ...], ...]] = {
  ("dms", "vanilla", "reads"): ((10.6, 15.0, 12.0), (4.2, 1.0, 1.6), (4.8, 4.1, 8.6), (7.3, 7.9, 9.7)),
  ("quest", "vanilla", "reads"): ((-6.8, 3.1, 2.0), (-1.8, -0.6, NA), (NA, NA, 2.3), (2.5, 5.0, 3.8)),
  ("dms", "quest", "reads"): ((18.8, 13.5, 5.8), (6.2, 2.1, 1.4), (NA, NA, NA), (4.9, 3.4, 5.6)),
  ("dms", "vanilla", "peak"): ((17.3, 15.7, 14.6), (3.4, 0.5, 1.6), (4.9, 4.2, 8.0), (7.4, 8.5, 16.7)),
  ("tova", "vanilla", "peak"): ((5.3, -0.2, 2.6), (1.3, -1.2, 1.8), (-1.1, -2.1, 2.1), (3.8, 3.3, 4.9)),
  ("dms", "tova", "peak"): ((9.6, 15.6, 8.1), (2.3, 1.8, -0.1), (5.6, 6.5, 6.3), (4.0, 6.0, 11.1)),
  ("dms", "vanilla", "seconds"): ((-1.5, 10.1, 7.4), (5.0, 2.2, 3.3), (5.6, 6.0, 8.4), (8.1, 7.3, 13.2)),
}  # fmt: skip


def means(method: str, over: str, axis: str) -> list[float | None]:
  """The paper's margin on each of TASKS, mean over the sizes that have one; [] if it has none at all."""
  rows = MARGINS.get((method, over, axis), ())
  there = [[value for value in row if value is not None] for row in rows]
  return [sum(row) / len(row) if row else None for row in there]
