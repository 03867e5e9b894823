"""The interpreter that judges kernels is judged first: its arithmetic by torch, its memory checker by planted bugs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter

from tests.interpreter.memory import Launch, MemoryFault, Region
from tests.interpreter.poison import is_poisoned, poison

pytestmark = pytest.mark.interpret(gpu=False)

BLOCK = 512
SCALARS = {
    1: ("int1", "int8", "uint8", "float8e4nv", "float8e5"),
    2: ("int16", "uint16", "float16", "bfloat16"),
    4: ("int32", "uint32", "float32"),
    8: ("int64", "uint64", "float64"),
}  # by bytes in numpy


@triton.jit
def cast_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n).to(y.dtype.element_ty), mask=at < n)


@triton.jit
def arithmetic_kernel(x, y, out, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(x + at, mask=at < n), tl.load(y + at, mask=at < n)
    if OP == "add":
        c = a + b
    elif OP == "sub":
        c = a - b
    elif OP == "mul":
        c = a * b
    elif OP == "neg":
        c = -a
    elif OP == "abs":
        c = tl.abs(a)
    elif OP == "max":
        c = tl.maximum(a, b)
    elif OP == "less":
        c = tl.where(a < b, a, b)
    elif OP == "equal":
        c = tl.where(a == b, a, b)
    else:
        c = tl.where(a >= b, tl.full([BLOCK], 1.5, a.dtype), b)
    tl.store(out + at, c, mask=at < n)


@triton.jit
def reduce_kernel(x, out, M: tl.constexpr, N: tl.constexpr):
    tile = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(out + tl.arange(0, M), tl.max(tile, 1).to(x.dtype.element_ty))
    tl.store(out + M + tl.arange(0, M), tl.sum(tile, 1).to(x.dtype.element_ty))


@triton.jit
def dot_kernel(x, y, out, PRECISION: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(x + i * N + j), tl.load(y + i * N + j), input_precision=PRECISION)
    tl.store(out + i * N + j, product)


class Scalars(NamedTuple):
    plain: float


@triton.jit
def scalar_kernel(out, plain, bundle, quoted: "fp64", named: tl.float64):  # noqa: F821, UP037
    tl.store(out, tl.full([], plain, tl.float64))
    tl.store(out + 1, tl.full([], bundle.plain, tl.float64))
    tl.store(out + 2, tl.full([], quoted, tl.float64))
    tl.store(out + 3, tl.full([], named, tl.float64))


@triton.jit
def loop_kernel(out, n, BLOCK: tl.constexpr):
    total = tl.zeros([], tl.int32)
    for _ in range(0, tl.cdiv(n, BLOCK)):
        total += 1
    tl.store(out, total)


def every_kind_of_float(n: int = BLOCK) -> torch.Tensor:
    """float32 [n]: random bits, so every exponent and NaN, then the values where rounding goes wrong."""
    bits = torch.randint(-(2**31), 2**31, (n,), dtype=torch.int64).to(torch.int32)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0x00008000, 0x7F800001])
    bits[: len(ties)] = ties.to(torch.int32)
    x = bits.view(torch.float32)
    x[len(ties) : len(ties) + 5] = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan")])
    return x


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Bitwise equality in which all NaN are one."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return bool(((x.view(integer) == y.view(integer)) | (x.isnan() & y.isnan())).all())


@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.float16, torch.int32])
def test_casts_to_bfloat16_round_as_torch_does(source: torch.dtype) -> None:
    x = every_kind_of_float()
    x = x.view(torch.int32) if source == torch.int32 else x.to(source)
    y = torch.empty(BLOCK, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, BLOCK, BLOCK=BLOCK)
    assert same_bits(y, x.to(torch.bfloat16))


@pytest.mark.parametrize("target", [torch.float32, torch.float64, torch.float16])
def test_casts_from_bfloat16_are_torchs(target: torch.dtype) -> None:
    x, y = every_kind_of_float().to(torch.bfloat16), torch.empty(BLOCK, dtype=target)
    cast_kernel[(1,)](x, y, BLOCK, BLOCK=BLOCK)
    assert same_bits(y, x.to(target))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_casts_to_and_from_float8_are_torchs(dtype: torch.dtype) -> None:
    """Every float8, every number halfway between two of them, and what lies next to it."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = values.float().where(values.float().abs() <= 448, 0.0).sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    x = torch.cat((values.float(), middle, middle * (1 + 2**-7), middle * (1 - 2**-7), every_kind_of_float())).to(dtype)
    n = len(x)
    narrow, wide = torch.empty(n, dtype=torch.float8_e4m3fn), torch.empty(256, dtype=dtype)
    cast_kernel[(1,)](x, narrow, n, BLOCK=4 * BLOCK)
    cast_kernel[(1,)](values, wide, 256, BLOCK=256)
    assert same_bits(narrow.float(), x.to(torch.float8_e4m3fn).float())
    assert same_bits(wide, values.to(dtype))


ARITHMETIC: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "neg": lambda a, b: 0 - a,  # Triton before 3.9 negates so, and -0.0 comes out as 0.0
    "abs": lambda a, b: a.abs(),
    "max": lambda a, b: torch.fmax(a, b),
    "less": lambda a, b: torch.where(a < b, a, b),
    "equal": lambda a, b: torch.where(a == b, a, b),
    "greater_equal": lambda a, b: torch.where(a >= b, torch.full_like(a, 1.5), b),
}


@pytest.mark.parametrize("op", ARITHMETIC)
def test_bfloat16_arithmetic_and_comparison_are_torchs(op: str) -> None:
    a, b = torch.randn(2, BLOCK).mul(3).to(torch.bfloat16)
    b[:9] = a[:9]
    out = torch.empty_like(a)
    arithmetic_kernel[(1,)](a, b, out, BLOCK, OP=op, BLOCK=BLOCK)
    assert same_bits(out, ARITHMETIC[op](a, b))


def test_bfloat16_reductions_are_torchs() -> None:
    x = torch.randint(-8, 9, (16, 16)).to(torch.bfloat16)  # sums of these are exact in any order
    out = torch.empty(2, 16, dtype=torch.bfloat16)
    reduce_kernel[(1,)](x, out, M=16, N=16)
    assert same_bits(out, torch.stack([x.amax(1), x.sum(1)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_is_torchs(dtype: torch.dtype) -> None:
    x, y = torch.randint(-128, 129, (2, 32, 32)).to(dtype)  # sums of products are exact in float32, in any order
    out = torch.empty(32, 32)
    dot_kernel[(1,)](x, y, out, PRECISION="ieee", N=32)
    assert same_bits(out, x.float() @ y.float())


def test_a_dot_in_tf32_loses_the_bits_that_tf32_loses() -> None:
    x, y = torch.randn(32, 32), torch.eye(32)
    out = torch.empty(32, 32)
    dot_kernel[(1,)](x, y, out, PRECISION="tf32", N=32)
    lost = (out - x).abs() / x.abs()
    assert 2**-13 < lost.max() <= 2**-11
    dot_kernel[(1,)](x, y, out, PRECISION="ieee", N=32)
    assert torch.equal(out, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_transposed_dot_is_the_dot_transposed(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 32, 32).to(dtype)
    out, transposed = torch.empty(2, 32, 32)
    dot_kernel[(1,)](x, y, out, PRECISION="ieee", N=32)
    dot_kernel[(1,)](y.T.contiguous(), x.T.contiguous(), transposed, PRECISION="ieee", N=32)
    assert torch.equal(out, transposed.T)
    assert torch.allclose(out, x.float() @ y.float(), atol=1e-5)


def test_float_arguments_have_the_width_the_compiler_gives_them() -> None:
    out = torch.empty(4, dtype=torch.float64)
    scalar_kernel[(1,)](out, 0.1, Scalars(0.1), 0.1, named=0.1)
    narrow = torch.tensor(0.1, dtype=torch.float32).double().item()
    assert out.tolist() == [narrow, narrow, 0.1, 0.1]


def test_a_loop_bound_may_be_a_tensor() -> None:
    out = torch.empty((), dtype=torch.int32)
    loop_kernel[(1,)](out, 100, BLOCK=16)
    assert out.item() == 7


def test_types_are_those_of_stock_triton() -> None:
    """Whatever haste.py keeps of a type: each dtype's numpy one, shapes, and which types are equal."""
    scalars = [getattr(tl, name) for names in SCALARS.values() for name in names]
    for width, names in SCALARS.items():
        for name in names:
            kind = getattr(tl, name)
            assert interpreter._get_np_dtype(kind).itemsize == width
            assert interpreter._get_np_dtype(tl.block_type(kind, [4, 2])) == interpreter._get_np_dtype(kind)
            assert interpreter._get_np_dtype(tl.pointer_type(kind)) == np.uint64
            assert (interpreter._get_np_dtype(kind).kind == "f") == (name in ("float16", "float32", "float64"))
            assert [other for other in scalars if kind == other] == [kind]
            for shape in ([4, 2], [tl.constexpr(4), tl.constexpr(2)], tl.core.tuple([4, 2])):
                block = tl.block_type(kind, shape)
                assert (list(block.shape), block.numel, block.element_ty) == ([4, 2], 8, kind)
                assert str(kind) in str(block)
                assert block == tl.block_type(kind, [4, 2]) and hash(kind) == hash(getattr(tl, name))
                assert block != tl.block_type(kind, [2, 4]) and block != kind
                tensor = tl.core.tensor(None, block)
                assert [n.value for n in tensor.shape] == [4, 2] and tensor.numel.value == 8
                assert (tensor.type, tensor.dtype) == (block, kind)
            scalar = tl.core.tensor(None, kind)
            assert len(scalar.shape) == 0 and scalar.numel.value == 1
    with pytest.raises(TypeError, match="0d block_type"):
        tl.block_type(tl.float32, [])
    with pytest.raises(ValueError, match="power of 2"):
        tl.block_type(tl.float32, [3])
    with pytest.raises(KeyError):
        interpreter._get_np_dtype(tl.void)


class Rows(NamedTuple):
    ptr: Any
    stride: int


@triton.jit
def copy_kernel(x, y, rows, cols, BUG: tl.constexpr, BLOCK: tl.constexpr):
    """Copy one row a program, x [rows, cols] -> y [rows, cols], with one bug planted."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    load_mask, store_mask = at < cols, at < cols
    load_row, store_row = row.to(tl.int64), row
    if BUG == "no load mask":
        load_mask = at < BLOCK
    elif BUG == "no store mask":
        store_mask = at < BLOCK
    elif BUG == "wrong row":
        load_row = load_row + 1
    elif BUG == "int32":
        load_row = row
    elif BUG == "everybody writes row 0":
        store_row = row * 0
    elif BUG == "duplicate":
        at = at // 2
    elif BUG == "a row forgotten":
        store_mask = store_mask & (row != 1)
    elif BUG == "a column forgotten":
        store_mask = store_mask & (at != 0)
    value = tl.load(x.ptr + load_row * x.stride + tl.arange(0, BLOCK), mask=load_mask, other=0.0)
    if BUG == "reads its output":
        value += tl.load(y.ptr + row * y.stride + at, mask=at < cols)
    elif BUG == "reads another's output" and row > 0:
        value += tl.load(y.ptr + (row - 1) * y.stride + at, mask=at < cols)
    tl.store(y.ptr + store_row * y.stride + at, value, mask=store_mask)
    if BUG == "overwrites another's input":
        tl.store(x.ptr + (rows - 1 - row) * x.stride + at, value, mask=at < cols)


def copy(x: torch.Tensor, bug: str = "") -> torch.Tensor:
    rows, cols = x.shape
    y = poison(torch.empty(rows, cols + 3, dtype=x.dtype)[:, :cols])
    copy_kernel[(rows,)](Rows(x, x.stride(0)), Rows(y, y.stride(0)), rows, cols, BUG=bug, BLOCK=16)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_right_kernel_passes(dtype: torch.dtype, launches: list[Launch]) -> None:
    x = torch.randn(3, 13).to(dtype)
    assert torch.equal(copy(x), x)
    assert launches[-1].loads == {"x": 39} and launches[-1].stores == {"y": 39} and launches[-1].grid == (3, 1, 1)


@pytest.mark.parametrize(
    "bug, finding",
    [
        ("no load mask", "load out of bounds: 3 of 16 lanes are not elements of x"),
        ("no store mask", "store out of bounds: 3 of 16 lanes are not elements of y"),
        ("wrong row", "load out of bounds: 13 of 13 lanes are not elements of x"),
        ("everybody writes row 0", "race: store to y, which another program writes"),
        ("duplicate", "duplicate: two lanes of one store hit the same element of y"),
        ("a row forgotten", "13 of 39 elements of y left unwritten"),
        ("a column forgotten", "3 of 39 elements of y left unwritten"),
        ("reads its output", "never written: load of 13 elements of y"),
        ("reads another's output", "race: load of y, which another program writes"),
        ("overwrites another's input", "race: "),
    ],
)
def test_a_planted_bug_is_named(bug: str, finding: str) -> None:
    x = torch.randn(3, 32)[:, :13]  # room on all sides, so that nothing but the checker notices
    with pytest.raises(MemoryFault, match="copy_kernel") as fault:
        copy(x, bug)
    assert finding in str(fault.value)


def test_a_neighbour_in_the_same_allocation_is_out_of_bounds() -> None:
    packed = torch.randn(3, 2, 13)
    assert torch.equal(copy(packed[:, 0]), packed[:, 0])
    with pytest.raises(MemoryFault, match="3 of 16 lanes are not elements of x"):
        copy(packed[:, 0], "no load mask")


def test_offsets_past_32_bits_are_followed_and_their_overflow_is_named() -> None:
    stride = 2**30 + 8
    virtual = torch.empty(2 * stride + 64, dtype=torch.bfloat16)  # 4 GiB, of which three pages get used
    x = virtual.as_strided((3, 13), (stride, 1))
    x.copy_(torch.randn(3, 13))
    assert torch.equal(copy(x), x)
    with pytest.raises(MemoryFault, match="13 of 13 lanes are not elements of x"):
        copy(x, "int32")


@triton.jit
def atomic_kernel(x):
    tl.atomic_add(x, 1.0)


def test_an_atomic_is_refused() -> None:
    with pytest.raises(MemoryFault, match="no atomics"):
        atomic_kernel[(2,)](torch.zeros(1))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x[:, 1:, ::2],
        lambda x: x.permute(2, 0, 1),
        lambda x: x[:1].expand(5, -1, -1),
        lambda x: x[0, 0, 0],
        lambda x: x[:, :0],
        lambda x: x.as_strided((7, 3), (2, 1)),  # rows overlap
        lambda x: x.as_strided((4, 4), (1, 1)),
    ],
)
def test_a_region_is_exactly_the_elements_of_a_view(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = view(torch.arange(4 * 5 * 6, dtype=torch.float32).reshape(4, 5, 6))
    first = x.data_ptr() - x.storage_offset() * 4
    elements = {first + 4 * int(value) for value in x.flatten()}
    addresses = torch.arange(first - 16, first + 600).numpy()
    _, inside = Region("x", x).find(addresses)
    assert set(addresses[inside].tolist()) == elements


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_poison_is_nan_and_no_other_nan_is_poison(dtype: torch.dtype) -> None:
    x = poison(torch.zeros(8, dtype=dtype)[::2])
    assert x.isnan().all() and is_poisoned(x).all()
    assert not is_poisoned(torch.full((4,), float("nan"), dtype=dtype)).any()
