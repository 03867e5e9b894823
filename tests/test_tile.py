"""Tiles: which lanes are read and written, and which program owns which tile."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from flash.kernels import tile
from flash.kernels.launch import view
from flash.kernels.spec import Mods, Sizes
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
def rows_kernel(x, y, sizes, ROWS: tl.constexpr, RAGGED: tl.constexpr):
    block, h, b = tile.locate(tl.cdiv(sizes.seqlen_q, ROWS), sizes.heads)
    value = tile.load_rows(x, sizes, b, h, block * ROWS, float("inf"), ROWS, RAGGED)
    tl.store(tile.row_pointers(y, sizes, b, h, block * ROWS, ROWS), value, mask=value < float("inf"))


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
    rows_kernel[(programs,)](x, y, Sizes(3, seqlen, 0, 0), ROWS=ROWS, RAGGED=seqlen % ROWS != 0)
    assert torch.equal(x, y) and not is_poisoned(y).any()


@pytest.mark.parametrize(
    "mods, want",
    [
        (lambda place: Mods(), [7, 7, 7]),
        (lambda place: Mods(q_offset=place(torch.tensor([0, -3, 2**20], dtype=torch.int32))), [0, -3, 2**20]),
        (lambda place: Mods(q_offset=place(torch.tensor([5, 2**40, -(2**40)]))), [5, MAX_SEQLEN, -MAX_SEQLEN]),
    ],
)
def test_positions_are_kept_within_32_bits(place: Place, mods: Any, want: list[int]) -> None:
    out = place(torch.zeros(3, dtype=torch.int32))
    position_kernel[(3,)](out, mods(place), Sizes(1, 1, 1, 7))
    assert out.tolist() == want


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_finite_turns_nan_and_infinity_into_zero(place: Place, dtype: torch.dtype) -> None:
    x = torch.tensor([1.5, -0.0, float("nan"), float("inf"), float("-inf"), 3e4, -1e-30, 0.0] * 2, dtype=dtype)
    y = place(torch.empty_like(x))
    finite_kernel[(1,)](place(x), y, N=16)
    assert torch.equal(y.cpu(), x.where(x.isfinite(), 0.0))
