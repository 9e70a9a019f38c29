"""Hopper warpgroup primitives missing from Pallas, in Mosaic GPU MLIR.

Matrices of eight columns, the fewest a tensor core computes, spread over all four warps by rows: stored transposed to
shared memory, reduced along rows, and stored to global memory with fewer than eight columns. Also an ordered running
sum, and atomic counters that return their old value. The interpreter gets each primitive's meaning in plain jax.numpy,
except for counters: a kernel must do without them there.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.common import compat
from pallas_kernels.common.compat import plgpu
from pallas_kernels.common.later import Later

if compat.HAS_MOSAIC_GPU:
  from jax._src.lib.mlir import ir
  from jax._src.lib.mlir.dialects import arith, memref, nvvm, vector

mgpu, utils = Later("jax.experimental.mosaic.gpu"), Later("jax.experimental.mosaic.gpu.utils")

ROWS = 64  # of a warpgroup's matrix
GROUP = 8  # columns of its narrowest matrix
THREADS = 128  # of a warpgroup


def _index(number: int):
  return arith.constant(ir.IndexType.get(), number)


def _i32(number: int):
  return arith.constant(ir.IntegerType.get_signless(32), number)


def _less(a, b):
  return arith.cmpi(arith.CmpIPredicate.ult, a, b)


def _thread():
  """The thread's number in its warpgroup, int32."""
  return arith.remui(utils.thread_idx(), _i32(THREADS))


def _places(value) -> zip:
  """(a register of an array in registers, the place of its first element) of each."""
  return zip(np.ndindex(value.registers.shape), value.layout.thread_idxs(value.shape), strict=True)


def _array(registers, layout, is_signed: bool | None = None):
  return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=is_signed)


def load_queries(ref, target) -> None:
  """Copies a [G, H] ref in global memory, G <= 8, to the first rows of a [8, H] ref in shared memory, laid out as the
  tensor cores read it (`compat.operand_transforms`). Other warps see it after a `commit_smem`."""
  group, h = ref.shape
  if compat.interpreting():
    target[...] = jnp.concatenate([ref[...], jnp.zeros((GROUP - group, h), ref.dtype)])
    return
  together = 8  # elements of 16 bits: the 16 bytes that swizzling keeps together

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(_transforms(ref.dtype))))
  def copy(_, source, target):
    index = ir.IndexType.get()
    element = ir.MemRefType(source.type).element_type
    thread = arith.index_cast(index, _thread())
    first, piece = arith.divui(thread, _index(h // together)), arith.remui(thread, _index(h // together))
    step = THREADS * together // h  # rows that all threads copy at once
    for i in range(-(-group // step)):
      row = arith.addi(first, _index(i * step))
      with mgpu.when(_less(row, _index(group))):
        at = [row, arith.muli(piece, _index(together))]
        value = vector.load(ir.VectorType.get((together,), element), source, at)
        vector.store(value, target, _swizzled(_index(0), row, at[1]))

  copy(ref, target)


def _transforms(dtype) -> tuple:
  """Transforms of a matrix of 16-bit elements that tensor cores read: 64 columns a tile."""
  return compat.operand_transforms(dtype, 64)


def _swizzled(tile_row, row, column) -> list:
  """Where element (8 * tile_row + row, column) of such a matrix lies in [tile rows, tile columns, 8, 64]."""
  inside = arith.xori(arith.remui(column, _index(64)), arith.muli(row, _index(8)))
  return [tile_row, arith.divui(column, _index(64)), row, inside]


def store_weights(x: jax.Array, target) -> None:
  """Stores the transpose of x [S, 8], 16 bits, in a warpgroup's registers, to a [8, S] ref in shared memory, laid out
  as the tensor cores read it. Other warps see it after a `commit_smem`."""
  if compat.interpreting():
    target[...] = x.T
    return

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(_transforms(x.dtype))))
  def store(_, value, target):
    for register, (slot, query) in _places(value):
      for i in range(2):  # of two neighbouring queries
        element = vector.extract(value.registers[register], [], [i])
        memref.store(element, target, _swizzled(_index(0), arith.addi(query, _index(i)), slot))

  store(x, target)


def clear_rows(ref, first: jax.Array) -> None:
  """Zeros the rows of a [S, H] ref in shared memory, laid out as the tensor cores read it, from `first` on. Other warps
  see it after a `commit_smem`."""
  rows, h = ref.shape
  if compat.interpreting():
    ref[...] = jnp.where(jnp.arange(rows)[:, None] < first, ref[...], jnp.zeros((), ref.dtype))
    return
  together = 8  # as in `load_queries`; their order in a row does not matter

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(_transforms(ref.dtype)), plgpu.Layout.WG_SPLAT(())))
  def clear(_, target, first):
    index, element = ir.IndexType.get(), ir.MemRefType(target.type).element_type
    first = arith.index_cast(index, first.registers.item())
    thread = arith.remui(arith.index_cast(index, utils.thread_idx()), _index(THREADS))
    kind = ir.VectorType.get((together,), element)
    zeros = arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, ir.FloatAttr.get(element, 0.0)))
    row, piece = arith.divui(thread, _index(h // together)), arith.remui(thread, _index(h // together))
    step = THREADS * together // h  # rows that all threads clear at once
    for i in range(rows // step):
      at = arith.addi(row, _index(i * step))
      with mgpu.when(arith.cmpi(arith.CmpIPredicate.sge, at, first)):
        tile_row, inner = arith.divui(at, _index(8)), arith.remui(at, _index(8))
        vector.store(zeros, target, _swizzled(tile_row, inner, arith.muli(piece, _index(together))))

  clear(ref, jnp.asarray(first, jnp.int32))


def store_transposed(x: jax.Array, ref) -> None:
  """Stores the first G columns of x [H, 8], in a warpgroup's registers, as rows of a [G, H] ref in global memory."""
  group = ref.shape[0]
  if compat.interpreting():
    ref[...] = x[:, :group].T
    return

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
  def store(_, value, target):
    places = list(_places(value))
    column = places[0][1][1]  # the same for all: the first of two
    for i in range(2):
      with mgpu.when(_less(arith.addi(column, _index(i)), _index(group))):
        for register, (row, column) in places:
          element = vector.extract(value.registers[register], [], [i])
          memref.store(element, target, [arith.addi(column, _index(i)), row])

  store(x, ref)


def store_columns(x: jax.Array, ref) -> None:
  """Stores the first G of x [8], in `column_layout`, to a [G] ref in global memory."""
  group = ref.shape[0]
  if compat.interpreting():
    ref[...] = x[:group]
    return

  @plgpu.inline_mgpu(arg_types=(compat.column_layout(), plgpu.RefType()))
  def store(_, value, target):
    ((column,),) = value.layout.thread_idxs(value.shape)
    thread = _thread()
    first = _less(thread, _i32(4))  # they hold all eight
    for i in range(2):
      at = arith.addi(column, _index(i))
      with mgpu.when(arith.andi(first, _less(at, _index(group)))):
        memref.store(vector.extract(value.registers.flat[0], [], [i]), target, [at])

  store(x, ref)


def reduce_columns(x: jax.Array, kind: str, scratch) -> jax.Array:
  """The maximum ("max") or the sum ("sum") of each column of float32 x [S, 8] in a warpgroup's registers, [8] in
  `column_layout`; always in the same order.

  Args:
    scratch: float32 [4, 8] ref in shared memory; consecutive calls need different ones.
  """
  if compat.interpreting():
    return x.max(axis=0) if kind == "max" else x.sum(axis=0)
  out = plgpu.ShapeDtypeStruct((GROUP,), jnp.float32, layout=compat.column_layout())

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()), return_type=out)
  def reduce(_, value, scratch):
    both = arith.maxnumf if kind == "max" else arith.addf
    index = ir.IndexType.get()
    layout = compat.column_layout().to_mgpu()
    column = functools.reduce(both, value.registers.flat)  # of the two columns that a thread has
    pair = column.type
    parts = [vector.extract(column, [], [i]) for i in range(2)]
    for distance in (4, 8, 16):
      parts = [both(part, utils.shfl_bfly(part, distance)) for part in parts]
    thread = _thread()
    warp = arith.index_cast(index, arith.divui(thread, _i32(32)))
    ((at,),) = layout.thread_idxs((GROUP,))
    lane = arith.remui(thread, _i32(32))
    with mgpu.when(_less(lane, _i32(4))):
      vector.store(vector.from_elements(pair, parts), scratch, [warp, at])
    utils.warpgroup_barrier()
    whole = functools.reduce(both, [vector.load(pair, scratch, [_index(i), at]) for i in range(THREADS // 32)])
    registers = np.empty(layout.registers_shape((GROUP,)), dtype=object)
    registers.flat[0] = whole
    return _array(registers, layout)

  return reduce(x, scratch)


def load_columns(ref, shape: tuple[int, int], vector_size: int) -> jax.Array:
  """A [R] ref in global memory, each value repeated along a row of `shape` [R, H], in `strided_layout`."""
  if compat.interpreting():
    return jnp.broadcast_to(ref[...][:, None], shape)
  layout = compat.strided_layout(shape, vector_size)

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=layout))
  def load(_, source):
    lowered = layout.to_mgpu()
    kind = lowered.registers_element_type(ir.MemRefType(source.type).element_type)
    registers = np.empty(lowered.registers_shape(shape), dtype=object)
    for register, index in zip(np.ndindex(registers.shape), lowered.thread_idxs(shape), strict=True):
      registers[register] = vector.broadcast(kind, memref.load(source, [index[0]]))
    return _array(registers, lowered)

  return load(ref)


def store_rows(x: jax.Array, ref, first: jax.Array, vector_size: int) -> None:
  """Stores x [R, H], in `strided_layout`, as rows `first` on of a [G, H] ref in global memory; rows past its end are
  dropped."""
  rows, group = len(x), ref.shape[0]
  if group % rows == 0:
    ref[pl.ds(first, rows)] = x
    return
  if compat.interpreting():
    for i in range(rows):
      pl.when(first + i < group)(functools.partial(ref.__setitem__, first + i, x[i]))
    return
  layout = compat.strided_layout(x.shape, vector_size)

  @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
  def store(_, value, target, first):
    index = ir.IndexType.get()
    first = arith.index_cast(index, first.registers.item())
    for register, (row, column) in _places(value):
      row = arith.addi(row, first)
      with mgpu.when(_less(row, _index(group))):
        vector.store(value.registers[register], target, [row, column])

  store(x, ref, jnp.asarray(first, jnp.int32))


def load_pairs(ref) -> tuple[jax.Array, jax.Array]:
  """(x[0::2], x[1::2]) of a [2N] float32 ref in shared memory, in `row_layout`."""
  if compat.interpreting():
    pairs = ref[...].reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]
  count = ref.shape[0] // 2
  result = plgpu.ShapeDtypeStruct((count,), ref.dtype, layout=compat.row_layout())

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(result, result))
  def load(_, source):
    layout = compat.row_layout().to_mgpu()
    element = ir.MemRefType(source.type).element_type
    two, kind = ir.VectorType.get((2,), element), layout.registers_element_type(element)
    parts = tuple(np.empty(layout.registers_shape((count,)), dtype=object) for _ in range(2))
    for register, (row,) in zip(np.ndindex(parts[0].shape), layout.thread_idxs((count,)), strict=True):
      numbers = vector.load(two, source, [arith.muli(row, _index(2))])
      for i, part in enumerate(parts):
        number = vector.extract(numbers, [], [i])
        part[register] = number if kind == element else vector.from_elements(kind, [number])
    return tuple(_array(x, layout) for x in parts)

  return load(ref)


def load_padded(ref, size: int, fill: int) -> jax.Array:
  """[size] int32 in `consecutive_layout` from a [N] ref in global memory, N <= size; `fill` from N on."""
  count = ref.shape[0]
  if compat.interpreting():
    return jnp.concatenate([ref[...], jnp.full((size - count,), fill, ref.dtype)])
  layout = consecutive_layout(size)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((size,), ref.dtype, layout=layout)
  )
  def load(_, source):
    lowered = layout.to_mgpu()
    element = ir.MemRefType(source.type).element_type
    ((first,),) = lowered.thread_idxs((size,))
    numbers = []
    for i in range(size // THREADS):
      at = arith.addi(first, _index(i))
      number = memref.load(source, [arith.minui(at, _index(count - 1))])
      inside = _less(at, _index(count))
      numbers.append(arith.select(inside, number, arith.constant(element, fill)))
    register = vector.from_elements(lowered.registers_element_type(element), numbers)
    return _array(np.array([register], dtype=object), lowered, True)

  return load(ref)


def consecutive_layout(size: int):
  """Layout of a [size] vector, a multiple of 128: neighbouring elements to the same thread."""
  return compat.strided_layout((size,), size // THREADS)


def running_sum(x: jax.Array, scratch) -> tuple[jax.Array, jax.Array]:
  """(sums [N] of the elements before each, the sum of all) of int32 x [N] in `consecutive_layout`.

  Args:
    scratch: int32 [4] ref in shared memory, used once.
  """
  if compat.interpreting():
    return jnp.cumsum(x) - x, x.sum()
  (size,) = x.shape
  layout = consecutive_layout(size)
  out = plgpu.ShapeDtypeStruct((size,), jnp.int32, layout=layout), _scalar()

  @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()), return_type=out)
  def add(_, value, totals):
    index = ir.IndexType.get()
    (register,) = value.registers
    elements = [vector.extract(register, [], [i]) for i in range(size // THREADS)]
    sums, own = [], _i32(0)
    for element in elements:
      sums.append(own)
      own = arith.addi(own, element)
    thread = _thread()
    lane, warp = arith.remui(thread, _i32(32)), arith.divui(thread, _i32(32))
    upto = own
    for distance in (1, 2, 4, 8, 16):
      lower = nvvm.shfl_sync(_i32(-1), upto, _i32(distance), _i32(0), nvvm.ShflKind.up)
      reaches = arith.cmpi(arith.CmpIPredicate.uge, lane, _i32(distance))
      upto = arith.select(reaches, arith.addi(upto, lower), upto)
    with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, lane, _i32(31))):
      memref.store(upto, totals, [arith.index_cast(index, warp)])
    utils.warpgroup_barrier()
    before, total = arith.subi(upto, own), _i32(0)
    for i in range(THREADS // 32):
      part = memref.load(totals, [_index(i)])
      earlier = arith.cmpi(arith.CmpIPredicate.ugt, warp, _i32(i))
      before = arith.addi(before, arith.select(earlier, part, _i32(0)))
      total = arith.addi(total, part)
    register = vector.from_elements(register.type, [arith.addi(before, x) for x in sums])
    registers = np.array([register], dtype=object)
    sums = _array(registers, value.layout, True)
    return sums, mgpu.FragmentedArray.splat(total, (), is_signed=True)

  return add(x, scratch)


def draw(counter, last: jax.Array) -> jax.Array:
  """The next number of 0, 1, ... `last` from `counter`, a [1] semaphore of the whole grid; after `last`, 0 again.

  A counter is 0 before and after: exactly `last` + 1 numbers must be taken. The call does not wait for the number, and
  only one thread gets it: `announce` tells the others.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())), return_type=_scalar())
  def take(_, ref, last):
    i32 = ir.IntegerType.get_signless(32)
    leads = arith.extui(i32, utils.single_thread_predicate(scope=utils.ThreadSubset.WARPGROUP))
    number = utils.inline_ptx(
      "{ .reg .pred leads; setp.ne.u32 leads, $1, 0; mov.u32 $0, 0; @leads atom.relaxed.gpu.inc.u32 $0, [$2], $3; }",
      leads, utils.memref_ptr(ref), last.registers.item(), result_types=i32, has_side_effects=True,
    )  # fmt: skip
    return mgpu.FragmentedArray.splat(number, (), is_signed=True)

  return take(counter, jnp.asarray(last, jnp.int32))


def announce(number: jax.Array, board) -> jax.Array:
  """The number that `draw` returned, for all threads of the warpgroup; `board`: int32 [1] ref in shared memory.

  Other warpgroups may read it from the board after a barrier.
  """
  if compat.interpreting():
    board[...] = jnp.full((1,), number, jnp.int32)
    return number

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT(()), plgpu.RefType()), return_type=_scalar())
  def tell(_, number, board):
    first = _index(0)
    utils.warpgroup_barrier()  # all have read the number before
    with utils.single_thread(scope=utils.ThreadSubset.WARPGROUP):
      memref.store(number.registers.item(), board, [first])
    utils.warpgroup_barrier()
    return mgpu.FragmentedArray.splat(memref.load(board, [first]), (), is_signed=True)

  return tell(number, board)


def _scalar():
  """Type of an int32 number that all threads of a warpgroup hold."""
  return plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(()))
