"""Tiles: which lanes are read and written, and which program owns which tile."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from flash.kernels import tile
from flash.kernels.launch import view
from flash.kernels.spec import Operands, Sizes
from flash.problem import MAX_SEQLEN
from tests.calls import Place, strided
from tests.interpreter.poison import is_poisoned, poison

pytestmark = pytest.mark.interpret

ROWS = 16


@triton.jit
def copy_kernel(x, y, seqlen, heads, DIM: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr):
    block, h, b = tile.locate(tl.cdiv(seqlen, ROWS), heads)
    value = tile.load(x, b, h, block * ROWS, seqlen, DIM, ROWS, D, RAGGED)
    tile.store(y, value, b, h, block * ROWS, seqlen, DIM)


@triton.jit
def whole_tile_kernel(x, out, start, end, DIM: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    zero = tl.program_id(0)
    value = tile.load(x, zero, zero, start, end, DIM, ROWS, D, True)
    tl.store(out + tl.arange(0, ROWS)[:, None] * D + tl.arange(0, D)[None, :], value)


@triton.jit
def rows_kernel(x, y, mods, heads, seqlen_q, seqlen_k, batch, ROWS: tl.constexpr, RAGGED: tl.constexpr):
    sizes = Sizes(heads, seqlen_q, seqlen_k, batch, 0, 0, 0)
    x, y = tile.rows_of(x, mods, sizes), tile.rows_of(y, mods, sizes)
    row, h, b, q0, _, sizes = tile.place(mods, sizes, sizes.heads, False, ROWS)
    end = q0 + sizes.seqlen_q
    value = tile.load_rows(x, b, h, q0 + row, end, float("inf"), ROWS, RAGGED)
    tile.store_rows(y, value, b, h, q0 + row, end)


@triton.jit
def place_kernel(out, mods, heads, seqlen, batch, GROUP: tl.constexpr, DOWNWARDS: tl.constexpr, ROWS: tl.constexpr):
    sizes = Sizes(heads, seqlen, seqlen, batch, 0, 0, 0)
    row, h, b, _, _, own = tile.place(mods, sizes, heads, False, ROWS, GROUP, DOWNWARDS)
    at = out + tl.program_id(0) * 4
    tl.store(at, row)
    tl.store(at + 1, h)
    tl.store(at + 2, b)
    tl.store(at + 3, own.seqlen_q)


@triton.jit
def position_kernel(out, mods, sizes):
    b = tl.program_id(0)
    tl.store(out + b, tile.first_position(mods, sizes, b))


@triton.jit
def finite_kernel(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tile.finite(tl.load(x + at)))


def copied(x: torch.Tensor, y: torch.Tensor, ragged: bool = True) -> torch.Tensor:
    batch, heads, seqlen, dim = x.shape
    programs = triton.cdiv(seqlen, ROWS) * heads * batch
    width = max(16, triton.next_power_of_2(dim))
    copy_kernel[(programs,)](view(x), view(y), seqlen, heads, DIM=dim, ROWS=ROWS, D=width, RAGGED=ragged)
    return y


@pytest.mark.parametrize("seqlen", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("dim", [1, 16, 24])
def test_every_element_is_copied_and_no_other_touched(place: Place, seqlen: int, dim: int) -> None:
    x = place(torch.randn(2, 3, seqlen, dim))
    y = place(poison(torch.empty_like(x)))
    assert torch.equal(copied(x, y, ragged=seqlen % ROWS != 0), x)


@pytest.mark.parametrize("kind", range(7))
def test_strides_are_followed_on_both_sides(place: Place, kind: int) -> None:
    x = torch.randn(2, 3, 17, 24)
    x, y = (list(strided(place, (2, 3, 17, 24), x.dtype).values())[kind].copy_(t) for t in (x, torch.zeros_like(x)))
    assert torch.equal(copied(x, y), x)


@pytest.mark.parametrize("start, end", [(0, 5), (3, 19), (8, 20), (20, 20)])
def test_lanes_past_the_end_are_zero(place: Place, start: int, end: int) -> None:
    x = place(torch.randn(1, 1, 20, 24))
    out = place(torch.empty(ROWS, 32))
    whole_tile_kernel[(1,)](view(x), out, start, end, DIM=24, ROWS=ROWS, D=32)
    want = torch.zeros(ROWS, 32)
    rows = x[0, 0, start : min(end, start + ROWS)]
    want[: rows.shape[0], :24] = rows
    assert torch.equal(out.cpu(), want)


@pytest.mark.parametrize("seqlen", [5, 16, 33])
def test_rows_are_loaded_and_stored_within_their_head(place: Place, seqlen: int) -> None:
    x = place(torch.randn(2, 3, seqlen))
    y = place(poison(torch.empty_like(x)))
    programs = triton.cdiv(seqlen, ROWS) * 6
    rows_kernel[(programs,)](x, y, Operands(), 3, seqlen, 0, 2, ROWS=ROWS, RAGGED=seqlen % ROWS != 0)
    assert torch.equal(x, y) and not is_poisoned(y).any()


@pytest.mark.parametrize("downwards", [False, True])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_programs_start_group_by_group_and_tile_by_tile(place: Place, group: int, downwards: bool) -> None:
    batch, heads, seqlen = 2, 4, 40  # three tiles
    out = place(torch.zeros(batch * heads * 3, 4, dtype=torch.int32))
    place_kernel[(len(out),)](out, Operands(), heads, seqlen, batch, GROUP=group, DOWNWARDS=downwards, ROWS=ROWS)
    rows = (32, 16, 0) if downwards else (0, 16, 32)
    groups = [range(first, first + group) for first in range(0, heads, group)]
    want = [[row, h, b, seqlen] for b in range(batch) for each in groups for row in rows for h in each]
    assert out.tolist() == want


def test_packed_programs_start_with_the_last_tile_where_it_has_most_to_do(place: Place) -> None:
    lengths = [5, 33]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tiles = torch.tensor([0, 1, 4], dtype=torch.int32)
    pointers = {"starts_q": starts, "starts_k": starts, "tiles": tiles, "bad": torch.zeros(2, dtype=torch.uint8)}
    mods = Operands(**{name: place(t) for name, t in pointers.items()})
    out = place(torch.zeros(2 * 5, 4, dtype=torch.int32))  # a tile to spare for each head
    place_kernel[(len(out),)](out, mods, 2, 38, 2, GROUP=2, DOWNWARDS=True, ROWS=ROWS)
    found = [(row, h, b) for row, h, b, seqlen in out.tolist() if seqlen > 0]
    assert found == [(row, h, b) for row, b in ((32, 1), (16, 1), (0, 1), (0, 0)) for h in range(2)]


@pytest.mark.parametrize("lengths", [[5, 16, 33], [0, 40, 0, 0, 1, 0], [0, 0]])
def test_each_row_of_packed_sequences_has_one_owner(place: Place, lengths: list[int]) -> None:
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tiles = torch.tensor([0, *(-(-length // ROWS) for length in lengths)]).cumsum(0).to(torch.int32)
    total = int(starts[-1]) + 3  # three rows of no sequence
    x, y = place(torch.randn(1, 2, total)), place(torch.zeros(1, 2, total))
    bad = torch.zeros(len(lengths), dtype=torch.uint8)
    pointers = {"starts_q": starts, "starts_k": starts, "tiles": tiles, "bad": bad}
    mods = Operands(**{name: place(t) for name, t in pointers.items()})
    programs = (total // ROWS + len(lengths)) * 2  # some to spare
    rows_kernel[(programs,)](x, y, mods, 2, total, total, len(lengths), ROWS=ROWS, RAGGED=True)
    assert torch.equal(y[..., :-3], x[..., :-3]) and not y[..., -3:].any()


@pytest.mark.parametrize(
    "mods, want",
    [
        (lambda place: Operands(), [7, 7, 7]),
        (lambda place: Operands(q_offset=place(torch.tensor([0, -3, 2**20], dtype=torch.int32))), [0, -3, 2**20]),
        (lambda place: Operands(q_offset=place(torch.tensor([5, 2**40, -(2**40)]))), [5, MAX_SEQLEN, -MAX_SEQLEN]),
    ],
)
def test_positions_are_kept_within_32_bits(place: Place, mods: Any, want: list[int]) -> None:
    out = place(torch.zeros(3, dtype=torch.int32))
    position_kernel[(3,)](out, mods(place), Sizes(1, 1, 1, 3, 7, 0, 0))
    assert out.tolist() == want


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_finite_turns_nan_and_infinity_into_zero(place: Place, dtype: torch.dtype) -> None:
    x = torch.tensor([1.5, -0.0, float("nan"), float("inf"), float("-inf"), 3e4, -1e-30, 0.0] * 2, dtype=dtype)
    y = place(torch.empty_like(x))
    finite_kernel[(1,)](place(x), y, N=16)
    assert torch.equal(y.cpu(), x.where(x.isfinite(), 0.0))
