"""Calibration of TriAttention: its numbers against plain numpy, its file, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import dms_jax
from dms_jax import checkpoint, policies
from dms_jax import testing as tiny
from dms_jax.model import check_policy
from dms_jax.policies import triattention
from dms_jax.tokenizer import byte_tokenizer
from experiments import calibrate_triattention
from experiments.common import program
from experiments.hyperscaling import methods
from experiments.methods import run
from experiments.tasks import reasoning
from experiments.tasks.base import TasksConfig, get
from tests.helpers import save_checkpoints

TEXT = "The queries of a head lie close to one another. " * 3  # 144 bytes, a token each


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
  """(folder, model, the program's last line) after a calibration in passages of 60 tokens, chunks of 16."""
  folder = tmp_path_factory.mktemp("calibration")
  base, _ = save_checkpoints(folder)
  (folder / "text").write_text(TEXT)
  config = calibrate_triattention.Config(
    str(base), str(folder / "tables.npz"), str(folder / "text"), max_tokens=130, length=60, chunk=16, dtype="float32"
  )
  with pytest.MonkeyPatch.context() as patch:
    lines = {}
    patch.setattr(program, "read_flags", lambda prefix, cls: config)
    patch.setattr(program, "finish", lines.update)
    calibrate_triattention.main()
  return folder, dms_jax.load(base, dtype="float32")[0], lines


def test_the_first_layer_is_plain_numpy(calibrated):
  """Queries of the first layer are a projection of the normed embedding: no attention, no RoPE."""
  folder, model, lines = calibrated
  tokens = np.frombuffer(TEXT.encode(), np.uint8)[:130].astype(int)
  assert lines["tokens"] == 130 and lines["bytes"] == (folder / "tables.npz").stat().st_size
  params = model.stacked().params
  layer = {name: np.asarray(x[0], np.float64) for name, x in params["layers"].items()}
  x = np.asarray(params["embed"], np.float64)[tokens]
  x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + model.config.rms_norm_eps) * layer["attn_norm"]
  queries = np.einsum("td,nhd->tnh", x, layer["q_proj"])
  half = model.config.head_dim // 2
  tables = triattention.load(folder / "tables.npz", model.config)
  scale = np.abs(queries).max()
  np.testing.assert_allclose(tables.centres[0], queries.mean(axis=0), atol=2e-6 * scale)
  lengths = np.hypot(queries[..., :half], queries[..., half:])
  np.testing.assert_allclose(tables.norms[0], lengths.mean(axis=0), atol=2e-6 * scale)
  assert 0 < lines["concentration"] < 1


def test_a_model_decodes_under_its_calibration(calibrated):
  folder, model, _ = calibrated
  policy = policies.TriAttention(budget=12, buffer=4, calibration=str(folder / "tables.npz"))
  prompts = [tiny.tokens(model.config, 1, n, seed=n).tolist()[0] for n in (23, 9)]
  out = dms_jax.generate(model, prompts, policy=policy, max_new_tokens=12, eos=False, decode_block=6, history=True)
  assert out.metrics.live.max() <= 16 and int(out.metrics.history.max()) == 16
  dms_jax.save_conversation(folder / "saved", out)
  past = dms_jax.load_conversation(folder / "saved", model)
  assert past.policy.tables is not None
  header = json.loads((folder / "saved" / "cache.json").read_text())
  assert "tables" not in header["policy"]["numbers"] and header["policy"]["numbers"]["calibration"]


def test_a_sweep_finds_its_calibration_by_flag(calibrated, monkeypatch):
  """TriAttention with budgets for each L and the file of --triattention.calibration, as in `experiments.hyperscale`."""
  folder, _, _ = calibrated
  path = str(folder / "base")
  read = lambda name, cls: cls(calibration=str(folder / "tables.npz")) if name == "triattention" else cls()
  original = checkpoint.load(path, dtype="float32")
  found = methods.build(("vanilla", "triattention"), path, original, (), (2.0,), "float32", read)
  config = TasksConfig(limit=1, chains=(2,), temperature=1.0)
  (job,) = run.prepare([get("countdown")()], config, (), byte_tokenizer(), 4096, (20, 30))
  made = [record for part in run.run(job, found, byte_tokenizer(), width=2) for record in part]
  held = {(r.method, r.max_tokens): r.peak for r in made if r.chain == 0}
  assert len(made) == 8 and held["triattention", 30] < held["vanilla", 30]


def test_a_reasoner_reads_problems_instead_of_a_text():
  """Each a passage from its start, up to as many tokens in all; other tokenizers lack the words."""
  config = calibrate_triattention.Config("a", "b", families=("countdown", "graphs"), max_tokens=3000, length=1024)
  tokenizer = reasoning.tokenizer()
  passages = calibrate_triattention.read_passages(config, "", tokenizer)
  assert sum(map(len, passages)) == 3000 and max(map(len, passages)) <= 1024
  assert all(part[0] == reasoning.IDS[reasoning.BOS] for part in passages)
  assert all(part[-1] == reasoning.IDS[reasoning.END] for part in passages[:-1])
  for wrong in (dict(), dict(text="a", families=("b",))):
    with pytest.raises(ValueError, match="give either --text=FILE or --families=NAME,NAME"):
      calibrate_triattention.Config("a", "b", **wrong)
  with pytest.raises(ValueError, match="--families=countdown,graphs: this model's tokenizer lacks"):
    calibrate_triattention.read_passages(config, "", byte_tokenizer())


@pytest.mark.parametrize(
  ("change", "message"),
  [({"rope_theta": 1e6}, "of another model: rope_theta 10000.0 there, 1000000.0 here"), ({"d_ff": 64}, None)],
)
def test_another_model_is_refused(calibrated, change, message):
  folder, model, _ = calibrated
  policy = policies.TriAttention(budget=12, calibration=str(folder / "tables.npz"))
  other = dataclasses.replace(model, config=dataclasses.replace(model.config, **change))
  if message is None:  # nothing that queries depend on
    assert check_policy(other, policy).tables.centres.shape == (2, 4, 16)
    return
  with pytest.raises(ValueError, match=message):
    check_policy(other, policy)


def test_damaged_files_are_refused(calibrated, tmp_path):
  folder, model, _ = calibrated
  whole, bad = (folder / "tables.npz").read_bytes(), tmp_path / "bad.npz"
  for content in (b"", b"no calibration", whole[: len(whole) // 2]):
    bad.write_bytes(content)
    with pytest.raises(ValueError, match="not a calibration, or damaged"):
      check_policy(model, policies.TriAttention(budget=12, calibration=str(bad)))
  np.savez(bad, about=json.dumps(triattention.describe(model.config)), centres=0, norms=0, frequencies=0)
  with pytest.raises(ValueError, match=r"centres has shape \(\), expected \(2, 4, 16\)"):
    check_policy(model, policies.TriAttention(budget=12, calibration=str(bad)))
  whole = dict(np.load(folder / "tables.npz"))
  for change, message in (
    ({"norms": whole["norms"] * np.nan}, "norms holds what is not a number"),
    ({"about": "[1]"}, "not a calibration, or damaged"), ({"about": "3"}, "not a calibration, or damaged"),
  ):  # fmt: skip
    np.savez(bad, **{**whole, **change})
    with pytest.raises(ValueError, match=message):
      check_policy(model, policies.TriAttention(budget=12, calibration=str(bad)))


def test_flags_have_no_tables():
  flags = program.flag_types("triattention", policies.TriAttention)
  assert flags["triattention.calibration"] == str | None and "triattention.tables" not in flags
  with pytest.raises(ValueError, match="--length=0 must be 1 or more"):
    calibrate_triattention.Config("a", "b", "c", length=0)
