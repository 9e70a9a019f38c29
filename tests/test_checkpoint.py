"""Checkpoints: round trips, retrofits, damage of every kind, atomic writes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import checkpoint, disk
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig, LoRAConfig
from dms_jax.families import PRESETS
from dms_jax.json_files import to_json
from dms_jax.model import Model
from dms_jax.params import count_params, flatten, map_table, param_table, unflatten
from dms_jax.tokenizer import Tokenizer, byte_tokenizer

LORA = LoRAConfig(rank=3, scale=1.5)


def same(a, b) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def edit(path: Path, **changes) -> None:
  """Changes fields of a checkpoint's config.json; a dict updates the object there."""
  values = json.loads((path / "config.json").read_text())
  for name, change in changes.items():
    values[name] = {**values[name], **change} if isinstance(change, dict) else change
  (path / "config.json").write_text(json.dumps(values))


def visible(folder: Path) -> list[str]:
  return sorted(p.name for p in folder.iterdir())


@pytest.fixture(scope="module")
def gated() -> Model:
  return tiny.model(gates=tiny.dms(offset=4.0), lora=LORA)


@pytest.fixture
def saved(gated, tmp_path) -> Path:
  checkpoint.save(tmp_path / "whole", gated, byte_tokenizer(), metadata={"seed": 3})
  return tmp_path / "whole"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_there_and_back(tmp_path, family, dtype):
  config = tiny.config(
    family=family,
    qkv_bias=family == "qwen2",
    qk_norm=family == "qwen3",
    tie_embeddings=family == "llama",
    eos_token_ids=(3, 5),
  )
  model = tiny.model(config, tiny.dms() if family == "qwen3" else None, dtype=dtype)
  checkpoint.save(tmp_path / "m", model)
  loaded = checkpoint.load(tmp_path / "m")
  assert (loaded.config, loaded.dms, loaded.lora) == (model.config, model.dms, None)
  assert loaded.dtype == dtype
  same(loaded.params, model.params)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded.params))


def test_config_file(saved, gated):
  values = json.loads((saved / "config.json").read_text())
  assert list(values) == [
    "format", "version", "model", "dms", "gates", "lora", "groups", "dtype", "metadata", "files",
  ]  # fmt: skip
  assert values["format"] == 2 and values["groups"] == ["base", "gate", "lora"] and values["dtype"] == "float32"
  assert values["metadata"] == {"seed": 3}
  assert values["model"]["rope_scaling"] is None and values["dms"]["offset"] == 4.0 and values["lora"]["rank"] == 3
  assert Tokenizer.load(saved).encode("hi") == [104, 105]


def test_merging(saved, gated):
  same(checkpoint.load(saved, merge=False).params, gated.params)
  assert checkpoint.load(saved, merge=False).lora == LORA
  merged = checkpoint.load(saved)
  assert merged.lora is None and merged.dms == gated.dms
  same(merged.params, gated.merged().params)


def test_dtype(saved, gated):
  """The base is cast after merging; gates and separate updates keep the stored dtype."""
  merged = checkpoint.load(saved, dtype="bfloat16")
  expected = gated.merged().params
  for name, leaf in flatten(merged.params).items():
    kind = jnp.float32 if "dms" in name else jnp.bfloat16
    assert leaf.dtype == kind, name
    np.testing.assert_array_equal(leaf, flatten(expected)[name].astype(kind), err_msg=name)
  apart = flatten(checkpoint.load(saved, dtype=jnp.bfloat16, merge=False).params)
  assert apart["layers/q_proj"].dtype == jnp.bfloat16 and apart["layers/q_proj_lora_a"].dtype == jnp.float32


def test_retrofit(tmp_path, gated):
  base = gated.replace(params=tiny.model().params, dms=None, lora=None)
  checkpoint.save(tmp_path / "base", base)
  checkpoint.save(tmp_path / "retrofit", gated, groups=("gate", "lora"))
  assert checkpoint.read_config(tmp_path / "retrofit")[0]["groups"] == ["gate", "lora"]
  apart = checkpoint.load(tmp_path / "base", retrofit=tmp_path / "retrofit", merge=False)
  same(apart.params, gated.params)
  assert (apart.dms, apart.lora) == (gated.dms, LORA)
  merged = checkpoint.load(tmp_path / "base", retrofit=tmp_path / "retrofit")
  same(merged.params, gated.merged().params)
  assert (merged.dms, merged.lora) == (gated.dms, None)
  half = checkpoint.load(tmp_path / "base", retrofit=tmp_path / "retrofit", dtype="bfloat16")
  np.testing.assert_array_equal(  # rounded once, after merging in float32
    half.params["layers"]["q_proj"], gated.merged().params["layers"]["q_proj"].astype(jnp.bfloat16)
  )


def test_updates_by_cr_stay_apart(tmp_path):
  """Each row has its own, so `merge` leaves them; the file says so, and files without them say nothing."""
  lora = dataclasses.replace(LORA, by_cr=True)
  model = tiny.model(gates=tiny.dms(elastic=(2.0, 8.0)), lora=lora)
  checkpoint.save(tmp_path / "base", tiny.model())
  checkpoint.save(tmp_path / "retrofit", model, groups=("gate", "lora"))
  checkpoint.save(tmp_path / "whole", model)
  for loaded in (
    checkpoint.load(tmp_path / "base", retrofit=tmp_path / "retrofit"), checkpoint.load(tmp_path / "whole"),
  ):  # fmt: skip
    assert loaded.lora == lora
    same(loaded.params, model.params)
  assert "by_cr" in to_json(lora) and "by_cr" not in to_json(LORA)


def test_a_retrofit_or_a_whole_model(tmp_path, gated, saved):
  base = gated.replace(params=tiny.model().params, dms=None, lora=None)
  checkpoint.save(tmp_path / "base", base)
  checkpoint.save(tmp_path / "retrofit", gated, groups=("gate", "lora"))
  for path in (tmp_path / "retrofit", saved):
    same(checkpoint.load_retrofitted(tmp_path / "base", path).params, gated.merged().params)
  checkpoint.save(tmp_path / "other", tiny.model(tiny.config(num_layers=1)))
  for path in (tmp_path / "retrofit", saved):
    with pytest.raises(
      ValueError, match=r"a retrofit of another model than \S+other: num_layers is 2 there and 1 here"
    ):
      checkpoint.load_retrofitted(tmp_path / "other", path)


def test_the_fingerprint_is_of_the_content(tmp_path, gated):
  checkpoint.save(tmp_path / "a", gated, groups=("gate", "lora"))
  before = checkpoint.fingerprint(tmp_path / "a")
  shutil.copytree(tmp_path / "a", tmp_path / "b")
  assert checkpoint.fingerprint(tmp_path / "b") == before
  other = gated.replace(params=jax.tree.map(lambda x: x + 1, gated.params))
  checkpoint.save(tmp_path / "a", other, groups=("gate", "lora"))
  assert checkpoint.fingerprint(tmp_path / "a") != before


def test_retrofit_replaces_gates(tmp_path, gated, saved):
  """A model with gates and updates of its own: its updates are merged, its gates replaced."""
  other = gated.replace(dms=DMSConfig(gate="neuron", window=9), lora=None)
  other = other.replace(params=unflatten({n: flatten(gated.params)[n] for n in param_table(other.config, other.dms)}))
  checkpoint.save(tmp_path / "neuron", other, groups=("gate", "lora"))
  loaded = checkpoint.load(saved, retrofit=tmp_path / "neuron")
  assert loaded.dms == other.dms and loaded.lora is None
  own = param_table(gated.config)
  same(flatten(loaded.params), {n: v for n, v in flatten(gated.merged().params).items() if n in own})


def test_a_shipped_retrofit_is_small(tmp_path):
  """SmolLM2-135M, adapter gates and updates of rank 16 on q, k, v and o, in bfloat16: under 5 MB as files."""
  config, dms, lora = PRESETS["smollm2-135m"], DMSConfig(), LoRAConfig(rank=16)
  table = param_table(config, dms, lora)
  trained = {n: s for n, s in table.items() if s.group != "base"}
  assert count_params(table, "lora") == 1_843_200
  rng = np.random.default_rng(0)
  values = {n: rng.standard_normal(spec.shape, np.float32).astype(jnp.bfloat16) for n, spec in trained.items()}
  absent = flatten(map_table(lambda _, s: jax.ShapeDtypeStruct(s.shape, jnp.float32), table))
  checkpoint.save(tmp_path / "r", Model(unflatten({**absent, **values}), config, dms, lora), groups=("gate", "lora"))
  size = sum(f.stat().st_size for f in (tmp_path / "r").rglob("*") if f.is_file())
  assert size < 5_000_000
  assert size < 1.1 * 2 * sum(v.size for v in values.values())  # nothing is stored twice


def test_groups_left_out(tmp_path, gated):
  checkpoint.save(tmp_path / "base", gated, groups=("base",))
  loaded = checkpoint.load(tmp_path / "base")
  assert (loaded.dms, loaded.lora) == (None, None)
  checkpoint.save(tmp_path / "plain", tiny.model(), groups=("base", "gate", "lora"))
  assert checkpoint.read_config(tmp_path / "plain")[0]["groups"] == ["base"]


def test_gates_go_without_updates_only_where_there_were_none(tmp_path, gated, saved):
  """Merged updates are in the base, which a retrofit lacks. Those of a whole checkpoint are its base's own."""
  gates, save = ("gate", "lora"), lambda model, groups: checkpoint.save(tmp_path / "r", model, groups=groups)
  checkpoint.save(tmp_path / "base", gated, groups=("base",))
  checkpoint.save(tmp_path / "retrofit", gated, groups=gates)
  elastic = tiny.model(gates=tiny.dms(elastic=(2.0, 8.0)), lora=LORA)
  loaded = checkpoint.load(tmp_path / "base", retrofit=tmp_path / "retrofit")
  for model in (gated.merged(), loaded, elastic.at(4), elastic.unstacked().at(4).stacked()):
    for groups in (gates, ("gate",)):
      with pytest.raises(
        ValueError, match=r"^groups=\['gate'.*\]: this model's low-rank updates were merged .*Model.at"
      ):
        save(model, groups)
    checkpoint.save(tmp_path / "other", model)
    save(checkpoint.load(tmp_path / "other"), gates)
  save(elastic.at(4, merge=False), gates)
  assert checkpoint.read_config(tmp_path / "r")[0]["groups"] == ["gate", "lora"]
  for model in (checkpoint.load(saved), tiny.model(gates=tiny.dms(elastic=(2.0, 8.0))).at(4)):
    save(model, gates)
    assert checkpoint.read_config(tmp_path / "r")[0]["groups"] == ["gate"]


# Bad input ------------------------------------------------------------------------------------------------------------


def test_wrong_arguments(tmp_path, gated):
  with pytest.raises(ValueError, match=r"groups=\['heads'\] unknown"):
    checkpoint.save(tmp_path / "m", gated, groups=("base", "heads"))
  with pytest.raises(ValueError, match="layers are a list"):
    checkpoint.save(tmp_path / "m", gated.unstacked())
  with pytest.raises(ValueError, match=r"missing \['layers/dms_norm'.*unexpected"):
    checkpoint.save(tmp_path / "m", tiny.model(lora=LORA).replace(dms=tiny.dms(), lora=None))
  assert not visible(tmp_path)


def test_retrofit_and_model_confused(tmp_path, gated, saved):
  checkpoint.save(tmp_path / "retrofit", gated, groups=("gate", "lora"))
  with pytest.raises(ValueError, match=r"a retrofit .*load its base model with retrofit="):
    checkpoint.load(tmp_path / "retrofit")
  with pytest.raises(ValueError, match="a whole model, not a retrofit"):
    checkpoint.load(saved, retrofit=saved)


@pytest.mark.parametrize(
  ("change", "fits"),
  [
    ({"num_layers": 3}, "num_layers is 3 there and 2 here"),
    ({"d_ff": 32, "rope_theta": 5e5}, r"d_ff is 32 there and 48 here, rope_theta is 500000.0 there and 10000.0 here"),
    ({"eos_token_ids": (1, 2), "max_position_embeddings": 99}, None),
  ],
)
def test_retrofit_of_another_model(tmp_path, saved, change, fits):
  other = tiny.model(tiny.config(**change), tiny.dms(), LORA)
  checkpoint.save(tmp_path / "retrofit", other, groups=("gate", "lora"))
  if fits is None:
    checkpoint.load(saved, retrofit=tmp_path / "retrofit")
    return
  with pytest.raises(ValueError, match=f"a retrofit of another model than .*{fits}"):
    checkpoint.load(saved, retrofit=tmp_path / "retrofit")


def test_not_a_checkpoint(tmp_path):
  with pytest.raises(ValueError, match="nowhere: no such checkpoint directory"):
    checkpoint.load(tmp_path / "nowhere")
  with pytest.raises(ValueError, match=r"retrofit=smollm2-cr4: no such .*; shipped are smollm2-135m-cr4, "):
    checkpoint.load(tmp_path, retrofit="smollm2-cr4")
  with pytest.raises(ValueError, match=r"config\.json: no such file"):
    checkpoint.load(tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  with pytest.raises(ValueError, match=r"a Hugging Face directory; run experiments\.convert_weights"):
    checkpoint.load(tmp_path)


def test_damaged_config(saved):
  whole = (saved / "config.json").read_text()
  for text, message in [
    (whole[:200], "not valid JSON"),
    ("[]", "expected a JSON object"),
    ("\0\0", "not valid JSON"),
    (whole.replace('"format": 2', '"format": 0'), "format 0 is no schema of dms_jax"),
    (whole.replace('"groups"', '"group"'), r"field\(s\) \['groups'\] missing"),
    (whole.replace('"d_ff"', '"ffn"'), r"unknown field\(s\) \['ffn'\] for ModelConfig"),
    (whole.replace('"window": 5', '"window": -5'), "dms.window=-5 must be 0 or more"),
    (whole.replace('"q_proj"', '"x_proj"'), "config.json: lora.targets: 'x_proj' is not a projection of this model"),
    (whole.replace('"files": {', '"files": {"state/gone": [1, 2],'), "state/gone is missing"),
  ]:
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
      checkpoint.load(saved)
  values = json.loads(whole)
  for version, wanted in (
    ("7.1", "'dms_jax>=7.1'"),
    ("0.3.0rc1", "'dms_jax>=0.3.0rc1'"),
    ("; rm x", "dms_jax"),
    (7, "dms_jax"),
  ):
    (saved / "config.json").write_text(json.dumps({**values, "format": 9, "version": version}))
    with pytest.raises(ValueError, match=f"schema 9; this version reads up to 2: pip install -U {wanted}$"):
      checkpoint.load(saved)
  for name, wrong in (("model", 3), ("dms", "yes"), ("lora", [1])):
    (saved / "config.json").write_text(json.dumps({**values, name: wrong}))
    with pytest.raises(ValueError, match=f"field '{name}' should be an object"):
      checkpoint.load(saved)


def test_gates_of_another_convention(saved):
  """What a gate's numbers mean is stated, and checked; schema 1 states nothing."""
  stated = json.loads((saved / "config.json").read_text())["gates"]
  assert stated["logit"] == "scale * raw - offset" and "raw" not in stated
  edit(saved, gates={"evicted": "logit < threshold"})
  with pytest.raises(ValueError, match="convention: evicted is 'logit < threshold' there and 'logit > threshold' here"):
    checkpoint.load(saved)
  edit(saved, format=1)
  checkpoint.load(saved)


def test_every_file_cut_or_garbled(saved):
  """Each parameter file in turn is cut short, changed by one bit, or removed. The error names it."""
  files = [f for f in (saved / "params").rglob("*") if f.is_file()]
  assert len(files) >= 4
  for file in files:
    whole, name = file.read_bytes(), file.relative_to(saved / "params").as_posix()
    damages = [(whole[: len(whole) // 2], f"{name} has {len(whole) // 2} bytes of {len(whole)}")] if whole else []
    if whole:
      flipped = bytearray(whole)
      flipped[len(whole) // 2] ^= 4
      damages.append((bytes(flipped), f"{name} is not what was written"))
    for data, message in [*damages, (None, f"{name} is missing")]:
      file.unlink()
      if data is not None:
        file.write_bytes(data)
      with pytest.raises(ValueError, match=message):
        checkpoint.load(saved)
      file.write_bytes(whole)
  checkpoint.load(saved)


def test_parameters_and_config_disagree(saved):
  """Not detected by checksums: intact files of another model."""
  edit(saved, model={"d_ff": 50})
  with pytest.raises(
    ValueError, match=r"layers/gate_proj has shape \(2, 48, 32\), the config means \(2, 50, 32\); .*up_proj"
  ):
    checkpoint.load(saved)
  edit(saved, model={"d_ff": 48, "tie_embeddings": False}, lora=None)
  with pytest.raises(ValueError, match=r"missing \['lm_head'\], unexpected \['layers/k_proj_lora_a'"):
    checkpoint.load(saved)


def test_garbled_orbax(saved):
  """Even with recomputed checksums, Orbax's own error becomes one ValueError."""
  file = next(f for f in (saved / "params").rglob("_METADATA"))
  file.write_text("{")
  edit(saved, files={n: list(e) for n, e in checkpoint._fingerprints(saved / "params").items()})
  with pytest.raises(ValueError, match="Orbax cannot read it"):
    checkpoint.load(saved)


# Whole or not at all --------------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_one(saved, gated, monkeypatch):
  folder, before = saved.parent, visible(saved)
  with monkeypatch.context() as patch:

    def fail(path, params):
      Path(path).mkdir()
      (Path(path) / "half").write_text("written")
      raise OSError("disk full")

    patch.setattr(checkpoint.ocp, "save", fail)
    for target in ("whole", "new"):
      with pytest.raises(OSError, match="disk full"):
        checkpoint.save(folder / target, gated)
  assert visible(folder) == ["whole"] and visible(saved) == before
  same(checkpoint.load(saved, merge=False).params, gated.params)


def test_saving_again_replaces(saved, gated):
  other = gated.replace(params=jax.tree.map(lambda x: x + 1, gated.params))
  checkpoint.save(saved, other)
  same(checkpoint.load(saved, merge=False).params, other.params)
  assert visible(saved.parent) == ["whole"]
  assert visible(saved) == ["config.json", "params"]  # no tokenizer this time, and none left over


def test_what_is_not_ours_is_not_replaced(tmp_path, gated):
  (tmp_path / "photos").mkdir()
  (tmp_path / "photos" / "cat.jpg").write_text("meow")
  (tmp_path / "file").write_text("text")
  for name in ("photos", "file"):
    with pytest.raises(ValueError, match=f"{name}: exists and is not something this program wrote"):
      checkpoint.save(tmp_path / name, gated)
  assert visible(tmp_path) == ["file", "photos"] and visible(tmp_path / "photos") == ["cat.jpg"]
  (tmp_path / "empty").mkdir()
  checkpoint.save(tmp_path / "empty", gated)
  assert checkpoint.is_checkpoint(tmp_path / "empty")


def test_links_stay(tmp_path, gated):
  """As where checkpoints lie on another disk: what a link points to is replaced."""
  there = tmp_path / "disk"
  (there / "empty").mkdir(parents=True)
  checkpoint.save(there / "old", gated)
  for name in ("empty", "old", "new"):
    link = tmp_path / name
    link.symlink_to(there / name)
    disk.check_writable(link)
    checkpoint.save(link, gated)
    assert link.is_symlink() and checkpoint.is_checkpoint(there / name)
    same(checkpoint.load(link, merge=False).params, gated.params)
  disk.write_text(tmp_path / "text", "1")
  (tmp_path / "again").symlink_to(tmp_path / "text")
  disk.write_text(tmp_path / "again", "2")
  assert (tmp_path / "again").is_symlink() and (tmp_path / "text").read_text() == "2"
  assert visible(there) == ["empty", "new", "old"]
  assert visible(tmp_path) == ["again", "disk", "empty", "new", "old", "text"]


def test_paths_with_brackets(tmp_path, gated):
  """Orbax takes them for patterns."""
  path = tmp_path / "a[b]" / "m[1]*"
  checkpoint.save(path, gated)
  same(checkpoint.load(path, merge=False).params, gated.params)
  (path.parent / f".m[1]*.partial-{dead_pid()}").mkdir()
  (path.parent / f".m1.partial-{dead_pid()}").mkdir()
  checkpoint.save(path, gated)
  assert visible(path.parent) == [next(n for n in visible(path.parent) if n.startswith(".m1")), path.name]


@pytest.mark.parametrize("name", ["notes.txt", "params/mine", "params/state/mine", "more/mine"])
def test_a_checkpoint_with_foreign_files_is_not_replaced(saved, gated, name):
  (saved / name).parent.mkdir(exist_ok=True)
  (saved / name).write_text("mine")
  with pytest.raises(ValueError, match="is not something this program wrote, or holds other files, too"):
    checkpoint.save(saved, gated)
  assert (saved / name).read_text() == "mine"


def test_a_full_disk_is_one_line(tmp_path, gated, monkeypatch):
  def fail(path, params):
    raise ValueError("RESOURCE_EXHAUSTED: Error writing\n" + "line\n" * 200)

  monkeypatch.setattr(checkpoint.ocp, "save", fail)
  with pytest.raises(OSError, match="m: the disk is full; nothing was written") as error:
    checkpoint.save(tmp_path / "m", gated)
  assert "\n" not in str(error.value) and not visible(tmp_path)


def test_an_output_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("text")
  with pytest.raises(ValueError, match="file/m: cannot be written"):
    disk.check_writable(tmp_path / "file" / "m")
  with pytest.raises(ValueError, match="cannot be written"):
    disk.check_writable("/proc/m")
  disk.check_writable(tmp_path / "new" / "m")


def test_a_disk_without_room_is_refused_before_the_work(tmp_path, monkeypatch):
  table = param_table(tiny.config())
  size = checkpoint.nbytes(table, "bfloat16")
  assert size == 2 * sum(x.size for x in jax.tree.leaves(tiny.model().params))
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=size))
  disk.check_room(tmp_path / "not" / "there", size)
  with pytest.raises(ValueError, match=r"not/there: about \S+ MB will be written, and the disk has \S+ MB free"):
    disk.check_room(tmp_path / "not" / "there", size + 1)
  monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(total=0, free=0))  # it does not tell
  disk.check_room(tmp_path, size)


def test_fields_of_other_types(saved):
  values = json.loads((saved / "config.json").read_text())
  for name, wrong in (
    ("groups", "base"), ("groups", [3]), ("files", [1]), ("files", {"a": 3}), ("files", {"../a": [1, 2]}),
    ("files", {"a": [1, None]}), ("metadata", [1]), ("model", {"num_layers": "two"}), ("format", [1]),
  ):  # fmt: skip
    (saved / "config.json").write_text(json.dumps({**values, name: wrong}))
    with pytest.raises(ValueError, match=rf"config\.json: .*({name}|num_layers)"):
      checkpoint.load(saved)


def dead_pid() -> int:
  process = subprocess.Popen([sys.executable, "-c", ""])
  process.wait()
  return process.pid


def test_leftovers_of_a_killed_save(saved, gated):
  """A killed save leaves at most a hidden folder, which the next save removes; a running save's is left alone."""
  folder = saved.parent
  (folder / f".whole.partial-{dead_pid()}").mkdir()
  (folder / f".whole.partial-{os.getppid()}").mkdir()
  checkpoint.save(saved, gated)
  assert visible(folder) == [f".whole.partial-{os.getppid()}", "whole"]


def test_killed_between_the_two_renames(saved, gated):
  """A kill between the two renames: the old checkpoint is moved away, the new one is not there yet."""
  folder, pid = saved.parent, dead_pid()
  saved.rename(folder / f".whole.partial-old-{pid}")
  (folder / f".whole.partial-{pid}").mkdir()
  with pytest.raises(RuntimeError), disk.atomic_directory(saved, checkpoint.is_replaceable):
    raise RuntimeError  # the next save fails too; the old checkpoint is restored nevertheless
  assert visible(folder) == ["whole"]
  same(checkpoint.load(saved, merge=False).params, gated.params)


def test_configs_travel_whole(tmp_path):
  """Every field of every config survives, at values other than its default."""
  small = dict(
    num_layers=1, d_model=32, d_ff=32, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=11, eos_token_ids=(3, 7)
  )
  config = dataclasses.replace(PRESETS["llama-3.2-1b"], **small)
  dms = DMSConfig("adapter", 7, 50.0, 2.5, 0, "layer")
  lora = LoRAConfig(2, 0.5, ("v_proj", "up_proj"))
  checkpoint.save(tmp_path / "m", tiny.model(config, dms, lora))
  loaded = checkpoint.load(tmp_path / "m", merge=False)
  assert (loaded.config, loaded.dms, loaded.lora) == (config, dms, lora)
