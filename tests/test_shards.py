"""flash/shards.py: pieces are the whole, sight is what pairs say, and keys come to whoever needs them."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash.shards import (
    SHARDINGS,
    Band,
    Piece,
    Way,
    check_lengths,
    lengths_of,
    needs_of,
    pieces_of,
    sees,
    ways_of,
)

BANDS = st.builds(
    Band, st.integers(-20, 20), st.one_of(st.none(), st.integers(0, 12)), st.one_of(st.none(), st.integers(0, 12))
)


def visible(i: int, j: int, band: Band) -> bool:
    away = j - i - band.offset
    return (band.left is None or away >= -band.left) and (band.right is None or away <= band.right)


def positions(piece: Piece) -> range:
    return range(piece.start, piece.stop)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("total", [0, 1, 2, 5, 8, 13, 37, 64])
def test_each_position_is_on_one_rank(total: int, world_size: int, sharding: str) -> None:
    lengths = lengths_of(total, world_size, sharding)
    pieces = pieces_of(lengths, sharding)
    assert sorted(at for own in pieces for piece in own for at in positions(piece)) == list(range(total))
    for own, length in zip(pieces, lengths, strict=True):
        held = [at for piece in own for at in range(piece.local.start, piece.local.stop)]
        assert held == list(range(length))  # in the order of the shard, without gaps
    assert max(lengths) - min(lengths) <= (1 if sharding == "contiguous" else 2)
    check_lengths("q", lengths, sharding)


def test_zigzag_pairs_early_chunks_with_late_ones() -> None:
    pieces = pieces_of(lengths_of(16, 4, "zigzag"), "zigzag")
    assert [[piece.start for piece in own] for own in pieces] == [[0, 14], [2, 12], [4, 10], [6, 8]]
    work = [sum(i + 1 for piece in own for i in positions(piece)) for own in pieces]  # keys seen, causal
    assert len(set(work)) == 1


def test_zigzag_takes_the_lengths_of_shard_alone() -> None:
    with pytest.raises(ValueError, match=r"k's shards must have .* \[4, 4\] of 8 positions, got \[5, 3\]"):
        check_lengths("k", [5, 3], "zigzag")
    check_lengths("k", [5, 3], "contiguous")


@given(st.integers(0, 30), st.integers(1, 9), st.integers(0, 30), st.integers(1, 9), BANDS)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_sight_is_what_pairs_say(q: int, rows: int, k: int, cols: int, band: Band) -> None:
    queries, keys = Piece(q, slice(0, rows)), Piece(k, slice(3, 3 + cols))
    pairs = product(positions(queries), positions(keys))
    assert sees(queries, keys, band) == any(visible(i, j, band) for i, j in pairs)
    assert sees(queries, keys, None)


def carried(ways: list[Way], world_size: int) -> set[tuple[int, int]]:
    """(rank, source) for all keys that come by, as messages from neighbour to neighbour."""
    found = set()
    for way in ways:
        held: dict[int, int | None] = {rank: rank for rank in range(world_size)}
        for hop in range(1, way.hops + 1):
            held = {way.neighbour(rank, 1): source for rank, source in held.items()}
            for rank in range(world_size):
                source = way.source(rank, hop)
                held[rank] = held[rank] if source is not None else None
                assert source is None or held[rank] == source  # the neighbour did have them
            found |= {(rank, source) for rank, source in held.items() if source is not None}
    return found


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=6),
    st.lists(st.integers(0, 6), min_size=6, max_size=6),
    st.sampled_from(SHARDINGS),
    st.one_of(st.none(), BANDS),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_keys_come_to_whoever_sees_them(
    lengths_q: list[int], lengths_k: list[int], sharding: str, band: Band | None
) -> None:
    world_size = len(lengths_q)
    lengths_k = lengths_k[:world_size]
    if sharding == "zigzag":
        lengths_q, lengths_k = (lengths_of(sum(x), world_size, sharding) for x in (lengths_q, lengths_k))
    needs = needs_of(pieces_of(lengths_q, sharding), pieces_of(lengths_k, sharding), band)
    wanted = {(r, s) for r in range(world_size) for s in range(world_size) if r != s and needs[r][s]}
    ways = ways_of(needs)
    assert wanted <= carried(ways, world_size)
    assert sum(way.hops for way in ways) <= world_size - 1
    for way in ways:  # nothing travels further than to the last that needs it
        for source, reach in enumerate(way.reach):
            assert reach == 0 or (way.neighbour(source, reach), source) in wanted


@pytest.mark.parametrize(
    "band, hops",
    [
        (Band(0, None, None), [3]),
        (Band(0, None, 0), [3]),  # causal: of rank 0 to rank 3
        (Band(0, 4, 0), [1]),
        (Band(0, 9, 0), [2]),
        (Band(0, 0, 0), []),
        (Band(0, 5, 5), [1, 1]),  # both neighbours, one each way
        (Band(100, None, None), [3]),
        (Band(-100, None, 0), []),  # no query sees any key
    ],
)
def test_a_window_ends_the_ring_early(band: Band, hops: list[int]) -> None:
    pieces = pieces_of([8, 8, 8, 8], "contiguous")
    assert [way.hops for way in ways_of(needs_of(pieces, pieces, band))] == hops


def test_a_causal_ring_stops_at_the_last_rank() -> None:
    pieces = pieces_of([8, 8, 8, 8], "contiguous")
    (way,) = ways_of(needs_of(pieces, pieces, Band(0, None, 0)))
    assert way.reach == (3, 2, 1, 0)
