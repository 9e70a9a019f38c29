"""The benchmark of a first session: steps are timed cold and warm; numbers compile nothing new."""

from __future__ import annotations

import json

import pytest

from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.tokenizer import byte_tokenizer
from experiments import bench_start
from experiments.common import program


@pytest.mark.slow
def test_numbers_compile_nothing_and_a_warm_start_reads_all(tmp_path, monkeypatch, capsys):
  model = tiny.model(tiny.config(vocab_size=257, max_position_embeddings=512), tiny.dms())
  checkpoint.save(tmp_path / "model", model, byte_tokenizer())
  config = bench_start.Config(str(tmp_path / "model"), max_new_tokens=3, output=str(tmp_path / "start.json"))
  monkeypatch.setattr(program, "read_flags", lambda prefix, cls: config)
  monkeypatch.setattr(program, "flag_values", lambda changed_only=False: {})
  bench_start.main()
  found = json.loads(capsys.readouterr().out.splitlines()[-1])
  rows = {row["step"]: row for row in found["rows"]}
  assert json.loads((tmp_path / "start.json").read_text())["rows"] == found["rows"]
  assert rows["first answer"]["compiled"] > 0
  for step in ("the same again", "another prompt", "another threshold", "temperature 1, top_k 10", "TOVA, budget 96"):
    assert rows[step]["compiled"] == 0, step
  assert rows["another request"]["compiled"] <= 1  # a longer prompt
  assert all(row["cold_s"] > 0 and row["warm_cpu_s"] >= 0 for row in found["rows"])


def test_a_model_is_a_checkpoint_or_a_shape():
  for settings, message in (
    ({}, "give --checkpoint=FOLDER, or --preset=NAME"),
    ({"checkpoint": "x", "preset": "smollm2-135m"}, "give --checkpoint=FOLDER, or --preset=NAME"),
    ({"preset": "smollm2-135m", "retrofit": "r"}, "--retrofit=r: random weights have gates of their own"),
  ):
    with pytest.raises(ValueError, match=message):
      bench_start.Config(**settings)
