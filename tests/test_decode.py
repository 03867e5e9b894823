"""The decode kernel against the oracle: what it computes from any cache, what it reads, and what it never looks at."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from flash.kernels import decode
from flash.kernels.spec import Config
from tests import calls, decoding
from tests.bounds import Outputs
from tests.calls import Place
from tests.decoding import check, equal, random_call, run

pytestmark = pytest.mark.interpret

HALVES = [torch.float16, torch.bfloat16]
PAGES = [None, 1, 3, 16, 64]  # smaller than a tile, as large, larger, and one that no tile has room for
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "not causal": {"causal": False},
    "window": {"window": 20},
    "window, not causal": {"window": (9, 0), "causal": False},
    "open window": {"window": (None, 1), "causal": False},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, float("-inf")])},
    "slopes": {"alibi_slopes": torch.tensor([0.1, 0.2, -0.3, 0.0])},
    "slopes of each sequence": {"alibi_slopes": torch.arange(12.0).view(3, 4) / 16},
    "left padding": {"cache_leftpad": torch.tensor([17, 0, 3], dtype=torch.int32)},
    "slots": {"cache_batch_idx": torch.tensor([4, 0, 2], dtype=torch.int32)},
    "scales": {"k_scale": torch.tensor([0.5, 3.0]), "v_scale": torch.tensor([2.0, 0.1])},
    "scales of each sequence": {"k_scale": torch.rand(3, 2) + 0.5, "v_scale": torch.rand(3, 2) - 0.5},
    "a negative scale of keys": {"k_scale": torch.tensor([-0.5, 1.0])},
    "all of it": {
        "window": 20,
        "softcap": 2.0,
        "sinks": torch.tensor([0.5, -1.0, 3.0, 0.0]),
        "alibi_slopes": torch.tensor([0.1, 0.2, -0.3, 0.0]),
        "cache_leftpad": torch.tensor([17, 0, 3], dtype=torch.int32),
        "cache_batch_idx": torch.tensor([4, 0, 2], dtype=torch.int32),
        "k_scale": torch.tensor([0.5, 3.0]),
        "v_scale": torch.tensor([2.0, 0.1]),
    },
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_errors_are_those_of_standard_attention(
    place: Place, dtype: torch.dtype, page_size: int | None, splits: int
) -> None:
    x = random_call(place, (113, 64, 1), seqlen_q=2, head_dim=64, dtype=dtype, page_size=page_size)
    check(run(x, splits), x)


@pytest.mark.parametrize("page_size", [None, 3])
def test_float64_is_exact_to_the_twelfth_digit(place: Place, page_size: int | None) -> None:
    x = random_call(place, (50, 17), dtype=torch.float64, page_size=page_size, sigma=3.0)
    check(run(x, 2), x)


@pytest.mark.sampled(30)
@pytest.mark.parametrize("splits", [1, 2, 7])
@pytest.mark.parametrize("seqlen_q", [1, 5])
@pytest.mark.parametrize("page_size", [None, 3, 16])
@pytest.mark.parametrize("feature", FEATURES)
def test_every_keyword(place: Place, feature: str, page_size: int | None, seqlen_q: int, splits: int) -> None:
    x = random_call(place, (50, 33, 4), seqlen_q=seqlen_q, page_size=page_size, **FEATURES[feature])
    check(run(x, splits), x)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("heads, heads_k", [(2, 2), (3, 1), (8, 1)])
def test_rows_of_a_group_share_tiles(place: Place, heads: int, heads_k: int, seqlen_q: int, causal: bool) -> None:
    x = random_call(
        place, (50, 37), heads=heads, heads_k=heads_k, seqlen_q=seqlen_q, page_size=16, causal=causal, window=(30, None)
    )
    check(run(x, 2, Config(32, 16, 4, 1)), x)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim, head_dim_v", [(16, 16), (40, 24), (64, 72), (1, 40), (128, 128)])
def test_any_head_dim(place: Place, head_dim: int, head_dim_v: int, dtype: torch.dtype) -> None:
    x = random_call(place, (37,), head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype, page_size=3)
    check(run(x, 2), x)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("block_n", [16, 32, 64])
@pytest.mark.parametrize("page_size", [None, 32])
def test_any_tile(place: Place, block_m: int, block_n: int, page_size: int | None) -> None:
    x = random_call(place, (81, 20), seqlen_q=20, page_size=page_size)
    check(run(x, 2, Config(block_m, block_n, 4, 1)), x)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("seqlen_q", [1, 5])
@pytest.mark.parametrize("splits", [1, 2, 3, 7, 18])
def test_any_number_of_parts(place: Place, splits: int, seqlen_q: int) -> None:
    for dtype, sigma in ((torch.float16, 1.0), (torch.float32, 3.0)):
        x = random_call(place, (113, 50, 16, 2, 0), heads=2, heads_k=1, seqlen_q=seqlen_q, dtype=dtype, sigma=sigma)
        check(run(x, splits), x)


@triton.jit
def parts_kernel(found, first, total, splits, keys, BLOCK_N: tl.constexpr):
    split = tl.program_id(0)
    begin, end = decode.part_of(first, total, split, splits, keys, BLOCK_N)
    tl.store(found + 2 * split, begin)
    tl.store(found + 2 * split + 1, end)


@pytest.mark.parametrize("splits, keys", [(1, 0), (2, 0), (3, 0), (7, 0), (8, 16), (4, 32)])
@pytest.mark.parametrize("first, total", [(0, 113), (100, 113), (15, 97), (16, 96), (90, 91), (40, 40), (0, 0)])
def test_parts_are_equal_but_for_a_tile(place: Place, first: int, total: int, splits: int, keys: int) -> None:
    """Or of so many keys. One after the other they are all of the keys, and the tiles are shared out evenly."""
    found = place(torch.zeros(splits, 2, dtype=torch.int32))
    parts_kernel[(splits,)](found, first, total, splits, keys, BLOCK_N=16)
    parts = [part for part in found.tolist() if part[0] < part[1]]
    assert [p for part in parts for p in range(*part)] == list(range(first, total))
    tiles = [-(-end // 16) - begin // 16 for begin, end in parts]
    each = keys // 16 if keys else -(-(-(-total // 16) - first // 16) // splits)
    assert all(number == each for number in tiles[:-1]) and all(number <= each for number in tiles[-1:])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("lengths, seqlen_q", [((0, 0), 5), ((0, 3, 20), 5), ((2, 1, 4), 5), ((130,), 5), ((0, 3), 20)])
def test_short_empty_and_long_sequences(
    place: Place, lengths: tuple[int, ...], seqlen_q: int, window: int | None
) -> None:
    """Queries at positions before the first key see none."""
    x = random_call(place, lengths, seqlen_q=seqlen_q, page_size=16, window=window)
    got = run(x, 2)
    check(got, x)
    for b, total in enumerate(lengths):
        blind = max(seqlen_q - total, 0)
        assert (got.o[b, :, :blind] == 0).all() and (got.lse[b, :, :blind] == float("-inf")).all()


def test_without_sequences_heads_or_queries_there_is_nothing_to_do(place: Place) -> None:
    for x in (random_call(place, ()), random_call(place, heads=0, heads_k=0), random_call(place, seqlen_q=0)):
        for splits in (1, 2):
            got = run(x, splits)
            assert got.o.shape == x.q.shape and got.lse.shape == x.q.shape[:3]


@pytest.mark.parametrize("page_size", [None, 16])
def test_a_cache_without_slots_or_pages_has_no_keys(place: Place, page_size: int | None) -> None:
    x = random_call(place, (5, 0), page_size=page_size)
    got = run(x._replace(k_cache=x.k_cache[:0], v_cache=x.v_cache[:0]), 2)
    assert got.o[0].isnan().all() and got.lse[0].isnan().all()
    assert page_size is None or (got.o[1] == 0).all() and (got.lse[1] == float("-inf")).all()


@pytest.mark.sampled(5)
@pytest.mark.parametrize("page_size", [None, 3, 16])
@pytest.mark.parametrize(
    "dtype, stored",
    [
        (torch.float16, torch.float8_e4m3fn),
        (torch.bfloat16, torch.float8_e4m3fn),
        (torch.float32, torch.float8_e4m3fn),
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.bfloat16),
        (torch.float64, torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_a_cache_may_be_narrower_than_its_queries(
    place: Place, dtype: torch.dtype, stored: torch.dtype, page_size: int | None
) -> None:
    factors = {"k_scale": torch.tensor([0.5, 3.0]), "v_scale": torch.tensor([2.0, 0.1])}
    x = random_call(place, seqlen_q=2, dtype=dtype, stored=stored, page_size=page_size, **factors)
    check(run(x, 2), x)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_number_of_float8_is_read(
    place: Place, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, convert: bool
) -> None:
    """One key: its value is what comes out, whatever the score. Where Triton converts no float8, its bytes are read."""
    if not convert:
        monkeypatch.setattr(decode, "converts_float8", lambda q: False)
    numbers = place(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn))
    x = random_call(place, (1,), heads=1, heads_k=1, head_dim=256, dtype=dtype, stored=numbers.dtype)
    x.v_cache[0, 0, 0] = numbers
    got = run(x).o[0, 0, 0]
    assert torch.equal(got.nan_to_num(7e4), numbers.to(dtype).nan_to_num(7e4))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("pairs", [3, 8, 20])
def test_queries_turn_by_their_position(place: Place, pairs: int, page_size: int | None, interleaved: bool) -> None:
    """Positions count from the left padding; those below 0 turn as 0."""
    angle = torch.rand(60, pairs) * 6
    x = random_call(
        place,
        (50, 33, 2),
        seqlen_q=5,
        head_dim=40,
        page_size=page_size,
        cache_leftpad=torch.tensor([17, 0, 1], dtype=torch.int32),
        rotary_cos=angle.cos(),
        rotary_sin=angle.sin(),
        rotary_interleaved=interleaved,
    )
    check(run(x, 2), x)


def test_queries_past_the_end_of_the_angles_are_not_a_number(place: Place) -> None:
    angle = torch.rand(40, 8)
    x = random_call(place, (42, 30), seqlen_q=5, rotary_cos=angle.cos(), rotary_sin=angle.sin())
    got = run(x, 2)
    assert torch.equal(got.lse.isnan(), decoding.oracle(x).lse.isnan())
    assert got.o[0, :, 3:].isnan().all() and got.o[0, :, :3].isfinite().all() and got.o[1].isfinite().all()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("new", [1, 7, 20])
@pytest.mark.parametrize("page_size", [None, 3])
def test_new_keys_count(place: Place, page_size: int | None, new: int) -> None:
    x = random_call(place, (50, 33, 20), seqlen_q=new, new=new, page_size=page_size)
    check(run(x, 2), x)


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-12, 3.0])
def test_any_scale(place: Place, scale: float) -> None:
    x = random_call(place, scale=scale)
    check(run(x, 2), x)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_dense_and_paged_have_the_same_bits(place: Place, page_size: int) -> None:
    for splits, seqlen_q in ((1, 1), (3, 5)):
        torch.manual_seed(1)
        want = run(random_call(place, (113, 50, 7), seqlen_q=seqlen_q, window=40, dtype=torch.bfloat16), splits)
        torch.manual_seed(1)
        x = random_call(place, (113, 50, 7), seqlen_q=seqlen_q, window=40, dtype=torch.bfloat16, page_size=page_size)
        assert equal(run(x, splits), want)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", range(7))
def test_strides_change_no_bit(place: Place, kind: int, dtype: torch.dtype) -> None:
    for page_size in (None, 16):
        x = random_call(place, (50, 33), dtype=torch.bfloat16, stored=dtype, page_size=page_size, head_dim=24)
        want = run(x, 2)
        for name in ("k_cache", "v_cache"):
            t = getattr(x, name)
            view = list(calls.strided(place, tuple(t.shape), dtype).values())[kind]
            assert equal(run(x._replace(**{name: view.copy_(t)}), 2), want), name


def test_strides_of_the_small_tensors_change_no_bit(place: Place) -> None:
    x = random_call(place, (50, 33, 20), page_size=16, **FEATURES["all of it"])
    want = run(x, 2)
    for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table"):
        t = x.options[name]
        wide = place(t.new_zeros(*t.shape, 2))
        wide[..., 1] = t
        assert equal(run(x._replace(options=x.options | {name: wide[..., 1]}), 2), want), name


@pytest.mark.sampled(3)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_what_is_beside_a_sequence_changes_no_bit(place: Place, seqlen_q: int, splits: int) -> None:
    x = random_call(place, (113, 50, 0, 33), seqlen_q=seqlen_q, dtype=torch.bfloat16, page_size=16)
    together = run(x, splits)
    assert equal(run(x, splits), together)
    for b in range(4):
        options = {name: y[b : b + 1] for name, y in x.options.items()}
        got = run(x._replace(q=x.q[b : b + 1], options=options), splits)
        assert equal(got, Outputs(together.o[b : b + 1], together.lse[b : b + 1])), b


@pytest.mark.sampled(3)
@pytest.mark.parametrize("lengths", [(30,), (33, 7), (113, 64)])
def test_parts_of_so_many_keys_know_nothing_of_the_cache_around_them(place: Place, lengths: tuple[int, ...]) -> None:
    x = random_call(place, lengths, page_size=16, dtype=torch.bfloat16, sinks=torch.randn(4))
    table = x.options["block_table"]
    want = run(x, -(-max(lengths) // 32), keys=32)
    check(want, x)
    for more in (1, 9, 40):
        longer = torch.cat([table, place(torch.full((len(lengths), more), -1, dtype=torch.int32))], 1)
        got = run(x._replace(options=x.options | {"block_table": longer}), -(-longer.shape[1] * 16 // 32), keys=32)
        assert equal(got, want), more


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)])
@pytest.mark.parametrize("splits", [1, 2])
def test_the_output_is_dense_in_the_querys_axis_order(place: Place, order: tuple[int, ...], splits: int) -> None:
    x = random_call(place, seqlen_q=3, head_dim=24, head_dim_v=40)
    back = [order.index(axis) for axis in range(4)]
    want = run(x, splits)
    got = run(x._replace(q=x.q.permute(order).contiguous().permute(back)), splits)
    assert got.o.permute(order).is_contiguous() and got.lse.is_contiguous() and equal(got, want)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("axis", ["batch", "head", "row", "tile"])
@pytest.mark.parametrize("paged", [False, True])
def test_offsets_beyond_32_bits_are_followed(place: Place, device: torch.device, axis: str, paged: bool) -> None:
    """Past 2^31 lies the last slot, page, head or key."""
    lengths, heads = {"batch": ((7, 7, 7), 2), "head": ((7,), 3), "row": ((3,), 1), "tile": ((36,), 1)}[axis]
    page_size = max(lengths) if paged else None
    x = random_call(
        place, lengths, heads=heads, heads_k=heads, dtype=torch.bfloat16, page_size=page_size, capacity=max(lengths)
    )
    if paged:  # without the page to spare
        used = x.options["block_table"].long().flatten()
        x = x._replace(k_cache=x.k_cache[used], v_cache=x.v_cache[used])
        x.options["block_table"] = torch.arange(len(used), device=device, dtype=torch.int32)[:, None]
    want = run(x)
    for name in ("k_cache", "v_cache"):
        got = run(x._replace(**{name: calls.far_apart(getattr(x, name), axis, device)}))
        assert equal(got, want), name


@pytest.mark.parametrize("axis", [0, 1])
def test_a_table_may_pass_32_bits(place: Place, device: torch.device, axis: int) -> None:
    x = random_call(place, (6, 3, 5), page_size=2)
    want = run(x)
    far = 2**30 + 8  # the third is past 2^31
    strides = (far, 1) if axis == 0 else (1, far)
    spread = torch.empty(2 * far + 3, dtype=torch.int32, device=device).as_strided((3, 3), strides)
    x.options["block_table"] = spread.copy_(x.options["block_table"])
    assert equal(run(x), want)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("names", [("k_cache",), ("v_cache",), ("k_cache", "v_cache")], ids=str)
def test_a_bad_key_reaches_only_the_rows_that_see_it(
    place: Place, names: tuple[str, ...], splits: int, poison: float
) -> None:
    for position, window in ((47, None), (20, None), (24, 20), (3, 20)):
        x = random_call(place, (50, 33), seqlen_q=5, window=window)
        clean = run(x, splits)
        for name in names:
            getattr(x, name)[0, 1, position, 3] = poison
        got = run(x, splits)
        at = torch.arange(45, 50, device=got.o.device)
        blind = torch.ones_like(got.lse, dtype=torch.bool)
        blind[0, 2:] = (at < position) | (at - position > (50 if window is None else window))
        assert torch.equal(got.o[blind], clean.o[blind]) and torch.equal(got.lse[blind], clean.lse[blind]), position
        assert torch.equal(got.o.isfinite(), decoding.oracle(x).o.isfinite()), position


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_bad_query_row_stays_alone(place: Place, poison: float) -> None:
    x = random_call(place, (50, 33), seqlen_q=3)
    clean = run(x, 2)
    x.q[0, 1, 2, 3] = poison
    got = run(x, 2)
    others = torch.ones_like(got.lse, dtype=torch.bool)
    others[0, 1, 2] = False
    assert torch.equal(got.o[others], clean.o[others]) and torch.equal(got.lse[others], clean.lse[others])
    assert not got.o[0, 1, 2].isfinite().any()


@pytest.mark.sampled(3)
@pytest.mark.interpret(gpu=False)  # the interpreter counts the work
@pytest.mark.parametrize("splits", [1, 2, 9])
@pytest.mark.parametrize(
    "length, seqlen_q, window, pad, keys",
    [
        (113, 1, None, 0, 113),
        (113, 1, None, 100, 13),
        (113, 1, 20, 0, 21),
        (113, 1, 20, 100, 13),
        (113, 5, 20, 0, 25),
        (40, 50, None, 0, 40),
        (0, 1, None, 0, 0),
    ],
)
def test_keys_that_no_query_sees_are_never_read(
    place: Place, launches: list[Any], length: int, seqlen_q: int, window: int | None, pad: int, keys: int, splits: int
) -> None:
    x = random_call(
        place, (length,), heads=2, heads_k=1, seqlen_q=seqlen_q, window=window, page_size=1, capacity=120,
        cache_leftpad=torch.tensor([pad], dtype=torch.int32),
    )  # fmt: skip
    run(x, splits, Config(128, 16, 4, 1))
    loads, first = launches[0].loads, length - keys
    assert loads["caches.k"] == loads["caches.v"] == keys * 16
    assert loads["caches.table"] == keys
    tiles = -(-length // 16) - first // 16 if keys else 0
    assert launches[0].dots == 2 * tiles


@pytest.mark.interpret(gpu=False)
def test_a_page_that_holds_whole_tiles_is_looked_up_once_a_tile(place: Place, launches: list[Any]) -> None:
    run(random_call(place, (113,), heads=2, heads_k=1, page_size=64))
    assert launches[0].loads["caches.table"] == 8


@pytest.mark.interpret(gpu=False)
def test_one_part_needs_no_merge(place: Place, launches: list[Any]) -> None:
    x = random_call(place)
    run(x, 1)
    run(x, 2)
    assert [launch.kernel for launch in launches] == ["decode_kernel", "decode_kernel", "merge_kernel"]
