"""Appending writes exactly what the oracle writes, bit by bit, and nothing else: interpreted, every access checked.

Numbers are small multiples of a power of two, so that turning them by the tables rounds once, at the end; one test uses
real angles and a tolerance.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from flash.kernels.append import append
from flash.kernels.cache import prepare
from flash.kernels.float8 import decoded, encoded
from flash.kernels.spec import Cache, Rotary
from flash.reference_cache import decode

pytestmark = pytest.mark.interpret

FLOAT8 = torch.float8_e4m3fn
BATCH, HEADS, CAPACITY = 3, 2, 48
PAGES = [None, 1, 3, 16]
DTYPES = [  # of k and v, of the cache
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float16, FLOAT8),
    (torch.bfloat16, FLOAT8),
    (torch.float32, FLOAT8),
    (torch.float64, FLOAT8),
]
Place = Callable[[Tensor], Tensor]


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiples of 1/16 in [-4, 4)."""
    return (torch.randint(-64, 64, shape) / 16).to(dtype)


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def call(
    dtype: torch.dtype = torch.float16,
    stored: torch.dtype | None = None,
    page: int | None = None,
    new: int = 1,
    head_dim: int = 16,
    head_dim_v: int | None = None,
    pairs: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Keywords of the oracle: a cache of BATCH + 1 slots that holds numbers already, and `new` keys for it."""
    head_dims = (head_dim, head_dim if head_dim_v is None else head_dim_v)
    slots, lists = BATCH + 1, 1 if page is None else CAPACITY // page
    elements = slots * lists + (0 if page is None else 2)  # two pages are nobody's
    positions = CAPACITY if page is None else page
    # as flash-attn lays pages out, with room behind each head
    caches = [numbers(elements, positions, HEADS, d + 3).to(stored or dtype)[..., :d].mT.mT for d in head_dims]
    given = [numbers(BATCH, new, HEADS, d, dtype=dtype).transpose(1, 2) for d in head_dims]
    table = torch.randperm(elements)[: slots * lists].to(torch.int32).view(slots, lists)
    rotary = {"rotary_cos": numbers(CAPACITY, pairs), "rotary_sin": numbers(pairs, CAPACITY).mT} if pairs else {}
    return {
        "k_cache": caches[0].transpose(1, 2),
        "v_cache": caches[1].transpose(1, 2),
        "k": given[0],
        "v": given[1],
        "cache_seqlens": lengths(0, 5, CAPACITY - new),
        "block_table": None if page is None else table,
        **rotary,
        **options,
    }


def check(call: dict[str, Any], place: Place) -> None:
    """Append, and compare the whole caches with the oracle's."""
    want = decode(call["k"][:, :, :0], **call)
    x = {name: place(value) if isinstance(value, Tensor) else value for name, value in call.items()}
    scales = [None if (s := x.get(name)) is None else torch.atleast_2d(s) for name in ("k_scale", "v_scale")]
    cache = Cache(
        x["k_cache"], x["v_cache"], x["cache_seqlens"], x["block_table"], x.get("cache_batch_idx"),
        x.get("cache_leftpad"), *scales,
    )  # fmt: skip
    rotary = None
    if "rotary_cos" in x:
        rotary = Rotary(x["rotary_cos"], x["rotary_sin"], x.get("rotary_interleaved", False))
    append(x["k"], x["v"], cache, rotary)
    for name in ("k_cache", "v_cache"):
        assert same_bits(x[name].cpu(), getattr(want, name)), name


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Bitwise equality in which all NaN are one."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    nan = x.double().isnan() & y.double().isnan()
    return bool(((x.contiguous().view(integer) == y.contiguous().view(integer)) | nan).all())


@pytest.mark.sampled(4)
@pytest.mark.parametrize("new", [1, 3, 20])
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(("dtype", "stored"), DTYPES)
def test_new_keys_go_behind_the_old_ones(
    dtype: torch.dtype, stored: torch.dtype, page: int | None, new: int, place: Place
) -> None:
    """Slots, left padding, scales and rotary together; numbers past what float8 holds saturate."""
    x = call(
        dtype, stored, page, new, 17, 24, pairs=6,
        cache_batch_idx=lengths(2, 0, 3),
        cache_leftpad=lengths(0, 4, 11),
        k_scale=torch.rand(BATCH, HEADS) + 0.5,
        v_scale=torch.tensor([0.001, 3.0]),
    )  # fmt: skip
    assert stored != FLOAT8 or bool((x["v"][:, 0].abs() / 0.001 > 448).any())
    check(x, place)


@pytest.mark.parametrize("stored", [torch.float16, FLOAT8])
@pytest.mark.parametrize("page", PAGES)
def test_plain_keys_are_copied(stored: torch.dtype, page: int | None, place: Place) -> None:
    check(call(stored=stored, page=page, new=3), place)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "pairs"), [(1, 0), (2, 1), (16, 8), (40, 12), (17, 8), (64, 32)])
def test_pairs_turn(dtype: torch.dtype, interleaved: bool, head_dim: int, pairs: int, place: Place) -> None:
    check(call(dtype, new=5, head_dim=head_dim, pairs=pairs, rotary_interleaved=interleaved), place)


@pytest.mark.parametrize("table", [torch.float16, torch.bfloat16, torch.float64])
def test_tables_of_angles_have_a_dtype_of_their_own(table: torch.dtype, place: Place) -> None:
    x = call(torch.float32, new=3, pairs=5)
    check(x | {name: x[name].to(table) for name in ("rotary_cos", "rotary_sin")}, place)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_real_angles_round_by_no_more_than_their_products(dtype: torch.dtype, interleaved: bool, place: Place) -> None:
    """Once in the accumulator for each of two products and their sum, and once in the cache."""
    x = call(dtype, new=20, head_dim=32)
    angles = torch.arange(CAPACITY)[:, None] * 10000.0 ** -(torch.arange(16) / 16)
    tables = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": interleaved}
    want = decode(
        x["k"][:, :, :0].double(),
        **x | tables,
    ).k_cache.double()
    got = place(x["k_cache"])
    cache = Cache(got, place(x["v_cache"]), place(x["cache_seqlens"]))
    append(place(x["k"]), place(x["v"]), cache, Rotary(*map(place, (angles.cos(), angles.sin())), interleaved))
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    limit = torch.finfo(dtype).eps * want.abs() + 4 * torch.finfo(accumulator).eps * 2 * 4
    assert ((got.cpu().double() - want).abs() <= limit).all()


def test_positions_past_the_tables_become_nan_and_others_do_not(place: Place) -> None:
    x = call(new=3, head_dim=24, pairs=6, cache_seqlens=lengths(0, 5, 9), cache_leftpad=lengths(3, 0, 2))
    x |= {name: x[name][:7] for name in ("rotary_cos", "rotary_sin")}
    check(x, place)
    nan = decode(x["k"][:, :, :0], **x).k_cache.isnan()
    assert not nan[0].any() and nan[1, :, 7, :12].all() and not nan[1, :, 7, 12:].any() and nan[2, :, 9:12, :12].all()


HOSTILE = (-(2**31), -(2**30), -1, 2**31 - 1, 2**30, 10**6)


def hostile(seed: int) -> dict[str, Any]:
    """A call whose lengths, slots, left padding and table lie here and there."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    page, new = dice.choice(PAGES), dice.choice([1, 3, 20])

    def lies(honest: Tensor, *others: int) -> Tensor:
        bad = honest.clone().view(-1)
        for n in range(len(bad)):
            if dice.random() < 0.15:
                bad[n] = dice.choice((*HOSTILE, *others))
        return bad.view(honest.shape)

    x = call(page=page, new=new, pairs=dice.choice([0, 6]), rotary_interleaved=dice.random() < 0.5)
    x["cache_seqlens"] = lies(lengths(*(dice.randint(0, CAPACITY - new) for _ in range(BATCH))), CAPACITY - new + 1)
    if dice.random() < 0.5:  # a slot listed twice would be written twice
        x["cache_batch_idx"] = lies(torch.randperm(BATCH + 1)[:BATCH].to(torch.int32), BATCH + 1)
    if dice.random() < 0.5:
        x["cache_leftpad"] = lies(lengths(*(dice.randint(0, 9) for _ in range(BATCH))))
    if page is not None:
        x["block_table"] = lies(x["block_table"], x["k_cache"].shape[0])
    return x


def test_a_call_that_lies_writes_where_it_does_not(place: Place) -> None:
    for seed in range(40):
        check(hostile(seed), place)


@pytest.mark.slow
def test_a_thousand_calls_that_lie(place: Place) -> None:
    for seed in range(40, 1040):
        check(hostile(seed), place)


@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize(("new", "slots"), [(0, 4), (2, 0)])
@pytest.mark.parametrize("page", [None, 4])
def test_nothing_to_append_or_nowhere_to(batch: int, new: int, slots: int, page: int | None, place: Place) -> None:
    x = call(page=page, new=new)
    x |= {name: x[name][:batch] for name in ("k", "v", "cache_seqlens")}
    if slots == 0:
        x |= {name: x[name][:0] for name in ("k_cache", "v_cache")}
    check(x, place)


def test_addresses_pass_32_bits(place: Place, device: torch.device) -> None:
    """The last page of a cache of 3 GiB, most of which is never touched."""
    far = torch.empty(3, 2**30, dtype=FLOAT8, device=device)[:, -16 * 16 :]
    cache = far.view(3, 1, 16, 16)
    cache.fill_(1.0)
    k = numbers(1, 1, 1, 16, dtype=torch.float16)
    append(place(k), place(k), Cache(cache, cache.clone(), place(lengths(7)), place(lengths(2)[None])), None)
    assert torch.equal(cache[2, 0, 7].cpu().float(), k[0, 0, 0].to(FLOAT8).float())
    assert bool((cache[:2].float() == 1.0).all())


@pytest.mark.parametrize("rows", [1, 2])
def test_a_table_whose_rows_lie_far_apart_is_read_all_the_same(rows: int, place: Place, device: torch.device) -> None:
    """8 GiB and more from one row of the table to the next, of which a page is touched."""
    table = torch.empty_strided((rows, 2), (2**31, 1), dtype=torch.int32, device=device)
    table.copy_(torch.tensor([[0, 1], [3, 2]], dtype=torch.int32)[:rows])
    views, extent, page = prepare(
        Cache(*2 * [place(numbers(4, 1, 4, 16, dtype=torch.float16))], lengths(*rows * [3]), table)
    )
    assert all(-(2**31) <= number < 2**31 for number in extent) and page == 4
    read = views.table.ptr.as_strided((rows, 2), (extent.apart, views.table.stride_s))
    assert torch.equal(read.cpu(), table.cpu())


@triton.jit
def encode_kernel(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, encoded(tl.load(x + at)))


@triton.jit
def decode_kernel(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, decoded(tl.load(x + at)))


def test_float8_is_torchs(place: Place) -> None:
    """Every float8, every number halfway between two of them, their neighbours, and any bits."""
    every = torch.arange(256, dtype=torch.uint8)
    wide, narrow = place(torch.empty(256, dtype=torch.float16)), place(torch.empty(4096, dtype=torch.uint8))
    decode_kernel[(1,)](place(every), wide, N=256)
    assert same_bits(wide.cpu(), every.view(FLOAT8).half())
    finite = every.view(FLOAT8).float().nan_to_num().sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    x = torch.cat((finite, middle, middle * (1 + 2**-22), middle * (1 - 2**-22), torch.tensor([1e-40, 448.1, -1e30])))
    bits = torch.randint(-(2**31), 2**31, (4096 - len(x),), dtype=torch.int64).to(torch.int32)
    x = torch.cat((x, bits.view(torch.float32)))
    encode_kernel[(1,)](place(x), narrow, N=4096)
    assert same_bits(narrow.cpu().view(FLOAT8), x.clamp(-448, 448).to(FLOAT8))
