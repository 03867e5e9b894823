"""The formula of decoding's tiles keeps to what kernels take, and its number of parts fills a GPU without waste."""

import itertools

import pytest

from flash.autotune.decoding import IN_FLIGHT, MOST_PARTS, SHORTEST, for_decode, splits_of
from flash.autotune.tables import ITEMSIZE, shared_limit
from flash.kernels.spec import Config, check_limits

TARGETS = ("cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942", "interpreter")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head_dim", [1, 16, 40, 64, 128, 200, 512])
def test_every_choice_may_be_launched_and_leaves_room_for_two_programs(target: str, head_dim: int) -> None:
    calls = itertools.product(ITEMSIZE, (False, True), (False, True), (1, 16, 17, 64, 4096))
    for dtype, narrow, paged, rows in calls:
        cache_itemsize = 1 if narrow else ITEMSIZE[dtype]
        config, reason = for_decode(target, dtype, head_dim, rows, cache_itemsize, paged)
        check_limits("decode", config)
        assert reason
        pair = 2 * config.block_n * max(16, 1 << (head_dim - 1).bit_length()) * cache_itemsize
        tiles = (config.num_stages - 1) // (2 if paged else 1)
        # a pair of the smallest tiles may be more
        assert tiles * pair <= min(IN_FLIGHT, shared_limit(target) // 2) or tiles <= 1
        assert config.block_m == 16 or rows > 16


def test_a_few_choices_are_what_they_were_when_they_were_compiled() -> None:
    assert for_decode("cuda:90", "bfloat16", 128, 8, 2, False).config == Config(16, 64, 4, 3)
    assert for_decode("cuda:90", "bfloat16", 128, 8, 2, True).config == Config(16, 64, 4, 5)
    assert for_decode("cuda:90", "bfloat16", 128, 8, 1, False).config == Config(16, 32, 4, 5)
    assert for_decode("cuda:90", "bfloat16", 128, 64, 2, False).config == Config(64, 32, 8, 5)
    assert for_decode("cuda:90", "bfloat16", 512, 64, 2, False).config == Config(16, 16, 8, 3)
    assert for_decode("cuda:89", "bfloat16", 128, 8, 2, False).config == Config(16, 32, 4, 3)
    assert for_decode("hip:gfx942", "bfloat16", 128, 8, 2, False).config == Config(16, 64, 4, 2)
    assert for_decode("cuda:90", "float32", 128, 8, 4, False).config == Config(16, 32, 4, 3)
    assert for_decode("cuda:90", "bfloat16", 104, 8, 2, False).config == Config(16, 32, 4, 5)


@pytest.mark.parametrize("capacity", [0, 1, 100, 256, 1000, 4096, 131072, 2**30])
@pytest.mark.parametrize("block_n", [16, 64, 128])
def test_parts_are_enough_to_fill_and_long_enough_to_pay(capacity: int, block_n: int) -> None:
    tiles = -(-capacity // block_n)
    for programs in (1, 8, 64, 100, 264, 512, 10**5):
        splits = splits_of(capacity, programs, 1, 1, 132, block_n)
        assert 1 <= splits <= MOST_PARTS
        each = -(-tiles // splits)
        assert splits == 1 or each * block_n >= SHORTEST
        assert splits == 1 or (splits - 1) * each < tiles  # none is empty where a sequence fills its slot
        assert splits == 1 or programs < 2 * 132
        filled = splits * programs >= 132
        assert filled or splits == MOST_PARTS or each * block_n < 3 * SHORTEST


def test_parts_of_a_batch_of_one_and_of_a_large_one() -> None:
    assert splits_of(4096, 1, 8, 1, 132, 64) == 16  # 256 keys each
    assert splits_of(131072, 1, 8, 1, 132, 64) == 33  # 264 programs
    assert splits_of(131072, 64, 8, 1, 132, 64) == 1
    assert splits_of(131072, 1, 1, 1, 132, 64) == MOST_PARTS
    assert splits_of(131072, 4, 8, 2, 132, 64) == splits_of(131072, 64, 1, 1, 132, 64)  # only their product counts


@pytest.mark.parametrize("none", ["batch", "heads_k", "row_tiles"])
def test_a_call_of_nothing_has_a_number_of_parts(none: str) -> None:
    sizes = {"batch": 2, "heads_k": 2, "row_tiles": 1} | {none: 0}
    assert splits_of(1000, **sizes, multiprocessors=132, block_n=64) >= 1
