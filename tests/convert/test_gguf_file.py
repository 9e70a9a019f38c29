"""GGUF files that are damaged or in parts, and every format of quantised blocks in plain Python."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from dms_jax import testing as tiny
from dms_jax.convert import convert, gguf, gguf_file
from dms_jax.params import flatten
from tests.convert.gguf_files import FAMILIES, SIZES, loaded, write


def test_cut_short_anywhere(tmp_path):
  """A file cut in the header, metadata, tensor table or data always gives one error that names it."""
  write(tmp_path / "m.gguf", FAMILIES["llama"], quantize=GGMLQuantizationType.Q8_0)
  whole = (tmp_path / "m.gguf").read_bytes()
  (tmp_path / "cut.gguf").write_bytes(whole)
  rng = np.random.default_rng(0)
  for size in [0, 3, 4, 8, 24, *rng.integers(25, len(whole) - 40, 25)]:
    (tmp_path / "cut.gguf").write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"cut\.gguf: "):
      convert(str(tmp_path / "cut.gguf"), tmp_path / "ours")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.gguf", "m.gguf"]


def test_what_the_table_says_must_fit_the_file(tmp_path):
  """One tensor fewer in the header, another last size, a byte too many: else weights would be read from elsewhere."""
  write(tmp_path / "m.gguf", FAMILIES["llama"])
  whole = (tmp_path / "m.gguf").read_bytes()
  count = int.from_bytes(whole[8:16], "little")
  last = whole.index(b"output.weight")
  for data, message in (
    (whole[:8] + (count - 1).to_bytes(8, "little") + whole[16:], "should be at|end at"),
    (whole[:8] + (count + 1).to_bytes(8, "little") + whole[16:], "not a readable GGUF file"),
    (whole + b"\0", "tensors end at"),
    (
      whole[:last] + whole[last:].replace((64).to_bytes(8, "little"), (32).to_bytes(8, "little"), 1),
      "should be|end at",
    ),
    (whole.replace(b"output_norm.weight", b"attn_normx.weight\0", 1), "."),
  ):
    assert len(data) >= len(whole)
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=rf"bad\.gguf: .*({message})"):
      convert(str(tmp_path / "bad.gguf"), tmp_path / "ours")


def test_arrays_without_end(tmp_path):
  """Arrays of unknown types, of arrays, or of more values than the file has bytes are refused at once."""
  write(tmp_path / "m.gguf", FAMILIES["llama"])
  whole = (tmp_path / "m.gguf").read_bytes()
  at = whole.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 4
  for kind, length, message in (
    (5, 2**60, "1152921504606846976 values at byte"), (9, 2**60, "an array of type 9"), (77, 3, "an array of type 77"),
    (8, 2**40, "1099511627776 strings"), (5, 2**63, "9223372036854775808 values"),
  ):  # fmt: skip
    data = whole[:at] + kind.to_bytes(4, "little") + length.to_bytes(8, "little") + whole[at + 12 :]
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=f"bad.gguf: .*{message}"):
      gguf.read(tmp_path / "bad.gguf")


def test_split_files(tmp_path):
  """llama.cpp's parts are read together; one alone, or another's part, is refused by name."""
  config = FAMILIES["llama"]
  whole = tmp_path / "m.gguf"
  written = write(whole, config)
  entries = gguf_file.read(whole)[1]
  parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
  names = {entry.name for entry in entries[:7]}
  write(parts[0], config, without=[e.name for e in entries[7:]], split__no=0, split__count=2, split__tensors__count=21)
  write(parts[1], config, without=names, split__no=1, split__count=2)
  model = loaded(parts[0], tmp_path)
  jax.tree.map(np.testing.assert_array_equal, flatten(model.params), written)
  with pytest.raises(ValueError, match="one of 2 parts of a split GGUF file; pass the first"):
    convert(str(parts[1]), tmp_path / "other")
  write(parts[1], config, without=names | {entries[-1].name}, split__no=1, split__count=2)
  with pytest.raises(ValueError, match="21 tensors in 2 parts wanted, found 20"):
    convert(str(parts[0]), tmp_path / "other")
  parts[1].unlink()
  with pytest.raises(ValueError, match=r"m-00002-of-00002\.gguf: no such file"):
    convert(str(parts[0]), tmp_path / "other")


def halves(data: bytes) -> list[float]:
  return np.frombuffer(data, "<f2").astype(float).tolist()


def q8_0(block: bytes) -> list[float]:
  """Q8_0 of ggml-quants.c, 34 bytes: 32 values of 8 bits."""
  return [halves(block[:2])[0] * int(q) for q in np.frombuffer(block[2:], np.int8)]


def fives(high: bytes, low: bytes) -> list[int]:
  """32 numbers of 5 bits: the fifth bits in order, the others in the low and then in the high halves of 16 bytes."""
  fifth = int.from_bytes(high, "little")
  return [(byte & 15 if i < 16 else byte >> 4) | (fifth >> i & 1) << 4 for i, byte in enumerate(low * 2)]


def q5_0(block: bytes) -> list[float]:
  """Q5_0, 22 bytes: 32 values of 5 bits about 16."""
  return [halves(block[:2])[0] * (q - 16) for q in fives(block[2:6], block[6:])]


def q5_1(block: bytes) -> list[float]:
  """Q5_1, 24 bytes: 32 values of 5 bits above a least one."""
  scale, least = halves(block[:4])
  return [scale * q + least for q in fives(block[4:8], block[8:])]


def q2_k(block: bytes) -> list[float]:
  """Q2_K, a super-block of 84 bytes: 256 values in 16 sub-blocks, 4-bit scales and minima."""
  packed, low, (scale, least) = block[:16], block[16:80], halves(block[80:])
  values = []
  for j in range(16):  # 16 values each; 8 sub-blocks share 32 bytes
    half, shift, side = j // 8, j % 8 // 2 * 2, j % 2
    for i in range(16):
      q = low[32 * half + 16 * side + i] >> shift & 3
      values.append(scale * (packed[j] & 15) * q - least * (packed[j] >> 4))
  return values


def q3_k(block: bytes) -> list[float]:
  """Q3_K, a super-block of 110 bytes: 256 values in 16 sub-blocks, third bits apart, 6-bit scales about 32."""
  third, low, packed, (scale,) = block[:32], block[32:96], block[96:108], halves(block[108:])
  values = []
  for j in range(16):
    half, part, side = j // 8, j % 8 // 2, j % 2
    own = (packed[j % 8] >> 4 * (j // 8) & 15) | (packed[8 + j % 4] >> 2 * (j // 4) & 3) << 4
    for i in range(16):
      q = low[32 * half + 16 * side + i] >> 2 * part & 3
      bit = third[16 * side + i] >> (4 * half + part) & 1
      values.append(scale * (own - 32) * (q - (0 if bit else 4)))
  return values


def sixes(packed: bytes, j: int) -> tuple[int, int]:
  """(scale, minimum) of sub-block j, 6 bits each, of 8 in 12 bytes."""
  if j < 4:
    return packed[j] & 63, packed[j + 4] & 63
  high = packed[j - 4] >> 6 << 4, packed[j] >> 6 << 4
  return packed[j + 4] & 15 | high[0], packed[j + 4] >> 4 | high[1]


def q4_k(block: bytes) -> list[float]:
  """Q4_K, a super-block of 144 bytes: 256 values in 8 sub-blocks, 6-bit scales and minima."""
  (scale, least), packed, low = halves(block[:4]), block[4:16], block[16:]
  values = []
  for j in range(8):
    s, m = sixes(packed, j)
    for i in range(32):
      values.append(scale * s * (low[32 * (j // 2) + i] >> 4 * (j % 2) & 15) - least * m)
  return values


def q5_k(block: bytes) -> list[float]:
  """Q5_K, a super-block of 176 bytes: as Q4_K, with bit j of 32 bytes as the fifth bit of sub-block j."""
  (scale, least), packed, fifth, low = halves(block[:4]), block[4:16], block[16:48], block[48:]
  values = []
  for j in range(8):
    s, m = sixes(packed, j)
    for i in range(32):
      q = (low[32 * (j // 2) + i] >> 4 * (j % 2) & 15) | (fifth[i] >> j & 1) << 4
      values.append(scale * s * q - least * m)
  return values


def q6_k(block: bytes) -> list[float]:
  """Q6_K, a super-block of 210 bytes: 4 low bits, 2 high bits, 16 scales of 8 bits, one of 16."""
  low, high, scales, (scale,) = block[:128], block[128:192], np.frombuffer(block[192:208], np.int8), halves(block[208:])
  values = [0.0] * 256
  for half in range(2):
    for i in range(32):
      a, b, h = low[64 * half + i], low[64 * half + 32 + i], high[32 * half + i]
      four = (a & 15) | (h & 3) << 4, (b & 15) | (h >> 2 & 3) << 4, a >> 4 | (h >> 4 & 3) << 4, b >> 4 | (h >> 6) << 4
      for part, q in enumerate(four):
        values[128 * half + 32 * part + i] = scale * int(scales[8 * half + 2 * part + i // 16]) * (q - 32)
  return values


def mxfp4(block: bytes) -> list[float]:
  """MXFP4, 17 bytes: a power of 2, and 32 numbers of 4 bits, a sign, two bits of exponent and one of fraction."""
  floats = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
  floats += [-value for value in floats]
  return [2.0 ** (block[0] - 127) * floats[byte & 15 if i < 16 else byte >> 4] for i, byte in enumerate(block[1:] * 2)]


QUANTS = {  # type: (bytes of a block, its values in plain Python, places of its float16 numbers)
  "Q8_0": (34, q8_0, (0,)), "Q5_0": (22, q5_0, (0,)), "Q5_1": (24, q5_1, (0, 2)), "Q2_K": (84, q2_k, (80, 82)),
  "Q3_K": (110, q3_k, (108,)), "Q4_K": (144, q4_k, (0, 2)), "Q5_K": (176, q5_k, (0, 2)), "Q6_K": (210, q6_k, (208,)),
  "MXFP4": (17, mxfp4, ()),
}  # fmt: skip


@pytest.mark.parametrize("kind", QUANTS)
def test_quantised_blocks(tmp_path, kind):
  """Random blocks against each format written out in plain Python: products of so few bits are exact in float32."""
  size, of_block, at = QUANTS[kind]
  config = tiny.config(**SIZES | dict(d_model=256, d_ff=64))
  rng = np.random.default_rng(0)
  row = 256 // len(of_block(bytes(size)))  # blocks of a row of 256 weights
  blocks = rng.integers(0, 256, (64, row, size), dtype=np.uint8)
  if not at:
    blocks[..., 0] = rng.integers(100, 140, (64, row))  # else many numbers overflow
  for place in at:
    blocks[..., place : place + 2] = rng.normal(size=(64, row, 1)).astype("<f2").view(np.uint8)
  data = {"blk.0.ffn_up.weight": (blocks.reshape(64, -1), kind)}
  write(tmp_path / "m.gguf", config, without=tuple(data), blocks=data)
  model = loaded(tmp_path / "m.gguf", tmp_path)
  expected = np.array([of_block(block.tobytes()) for block in blocks.reshape(-1, size)]).reshape(64, 256)
  np.testing.assert_allclose(model.params["layers"]["up_proj"][0], expected, rtol=1e-6)


def test_garbled_anywhere(tmp_path):
  """Random bytes changed in header and metadata give an error that names the file, or a conversion."""
  write(tmp_path / "m.gguf", FAMILIES["llama"])
  whole = (tmp_path / "m.gguf").read_bytes()
  rng = np.random.default_rng(1)
  refused = 0
  for _ in range(40):
    data = bytearray(whole)
    for place in rng.integers(0, 9000, 3):
      data[place] = rng.integers(256)
    (tmp_path / "m.gguf").write_bytes(bytes(data))
    try:
      gguf.read(tmp_path / "m.gguf")
    except ValueError as error:
      assert "m.gguf" in str(error)
      refused += 1
  assert refused > 5
  for data in (b"GGUF", b"PK\x03\x04" + whole, b"\0" * 1000, whole[:4] + b"\xff" * 20 + whole[24:]):
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match="not a readable GGUF file"):
      gguf.read(tmp_path / "m.gguf")
