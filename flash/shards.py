"""Which positions of a sequence each rank holds, whose keys its queries see, and how far keys travel.

Arithmetic on lengths that every rank knows, so that all ranks find the same answers without asking each other.

    contiguous    rank r holds positions start_r ... start_r + length_r - 1, whatever the lengths
    zigzag        the sequence is cut into 2 * world_size chunks, and rank r holds chunks r and 2 * world_size - 1 - r:
                  under a causal mask all ranks then have alike much to do

Keys travel a ring: at hop h rank r holds those of rank r - h, or of rank r + h on a second way, the other way around.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

SHARDINGS = ("contiguous", "zigzag")


class Piece(NamedTuple):
    """Consecutive positions of the sequence, and where a shard holds them."""

    start: int  # position of the first one
    local: slice  # where they are among those of the shard

    @property
    def stop(self) -> int:
        """One past the last position."""
        return self.start + int(self.local.stop - self.local.start)


class Band(NamedTuple):
    """Which keys a query sees by its position: -left <= j - (i + offset) <= right; None: without limit."""

    offset: int
    left: int | None
    right: int | None


class Way(NamedTuple):
    """One way around the ring.

    Args:
        sign: 1 where keys go from rank r to rank r + 1, -1 where they go to rank r - 1.
        reach: for each rank, how many hops its keys travel.
    """

    sign: int
    reach: tuple[int, ...]

    @property
    def hops(self) -> int:
        """How many hops there are."""
        return max(self.reach)

    def source(self, rank: int, hop: int) -> int | None:
        """Whose keys a rank holds at a hop; None where they do not come that far."""
        source = (rank - self.sign * hop) % len(self.reach)
        return source if self.reach[source] >= hop else None

    def neighbour(self, rank: int, hops: int) -> int:
        """The rank that is so many hops further on."""
        return (rank + self.sign * hops) % len(self.reach)


def cuts(total: int, count: int) -> list[int]:
    """Where `count` chunks of a sequence start, and its end: as torch.tensor_split, the first ones may be longer."""
    size, longer = divmod(total, count)
    return [n * size + min(n, longer) for n in range(count + 1)]


def chunks_of(rank: int, world_size: int, sharding: str) -> tuple[int, ...]:
    """The chunks that a rank holds, in order."""
    return (rank,) if sharding == "contiguous" else (rank, 2 * world_size - 1 - rank)


def lengths_of(total: int, world_size: int, sharding: str) -> list[int]:
    """How many positions each rank holds of a sequence that is cut evenly."""
    chunks = [chunks_of(rank, world_size, sharding) for rank in range(world_size)]
    at = cuts(total, world_size * len(chunks[0]))
    return [sum(at[c + 1] - at[c] for c in own) for own in chunks]


def check_lengths(name: str, lengths: Sequence[int], sharding: str) -> None:
    """Raise ValueError where shards of these lengths are none of a sequence."""
    expected = lengths_of(sum(lengths), len(lengths), sharding)
    if sharding == "zigzag" and list(lengths) != expected:
        raise ValueError(
            f"{name}'s shards must have the lengths that flash.ring.shard makes with sharding='zigzag', {expected} of "
            f"{sum(lengths)} positions, got {list(lengths)}"
        )


def pieces_of(lengths: Sequence[int], sharding: str) -> list[list[Piece]]:
    """The pieces that each rank holds, in the order of its shard; none that is empty."""
    world_size, total = len(lengths), sum(lengths)
    if sharding == "contiguous":
        starts = [sum(lengths[:rank]) for rank in range(world_size)]
        found = [[Piece(start, slice(0, length))] for start, length in zip(starts, lengths, strict=True)]
    else:
        at, found = cuts(total, 2 * world_size), []
        for rank in range(world_size):
            first, last = chunks_of(rank, world_size, sharding)
            middle = at[first + 1] - at[first]
            found.append([Piece(at[first], slice(0, middle)), Piece(at[last], slice(middle, lengths[rank]))])
    return [[piece for piece in own if piece.stop > piece.start] for own in found]


def sees(queries: Piece, keys: Piece, band: Band | None) -> bool:
    """Whether some query of one piece sees some key of another by its position; without a Band, any may."""
    if band is None:
        return True
    lowest = keys.start - (queries.stop - 1) - band.offset
    highest = keys.stop - 1 - queries.start - band.offset
    return (band.right is None or lowest <= band.right) and (band.left is None or highest >= -band.left)


def needs_of(queries: list[list[Piece]], keys: list[list[Piece]], band: Band | None) -> list[list[bool]]:
    """Whether rank r [r] sees some key of rank s [s]."""
    return [[any(sees(q, k, band) for q in of_q for k in of_k) for of_k in keys] for of_q in queries]


def ways_of(needs: list[list[bool]]) -> list[Way]:
    """The ways that keys travel to whoever needs them, by the fewest hops in all; forwards where that is no longer."""
    world_size = len(needs)
    distances = [[d for d in range(1, world_size) if needs[(s + d) % world_size][s]] for s in range(world_size)]
    best: list[Way] = []
    fewest = world_size
    for turn in range(world_size - 1, -1, -1):  # what is further away than this comes the other way around
        ends = [bisect_right(own, turn) for own in distances]
        forwards = tuple([own[end - 1] if end else 0 for own, end in zip(distances, ends, strict=True)])
        backwards = tuple(
            [world_size - own[end] if end < len(own) else 0 for own, end in zip(distances, ends, strict=True)]
        )
        found = [way for way in (Way(1, forwards), Way(-1, backwards)) if way.hops]
        if (count := sum(way.hops for way in found)) < fewest:
            best, fewest = found, count
    return best


@lru_cache(maxsize=64)
def plan_of(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], sharding: str, band: Band | None
) -> tuple[list[list[Piece]], list[list[Piece]], list[list[bool]], list[Way]]:
    """The pieces of queries and of keys, who needs whose, and the ways: found once for calls that are cut alike."""
    queries, keys = pieces_of(lengths_q, sharding), pieces_of(lengths_k, sharding)
    needs = needs_of(queries, keys, band)
    return queries, keys, needs, ways_of(needs)
