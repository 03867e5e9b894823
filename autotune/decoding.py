"""How a call that reads a cache is cut: its tiles and what is in flight at a time, and the parts of its keys.

Decoding waits for memory and for nothing else. Rows are few, so that a tile is as many keys as registers hold; tiles in
flight hide the latency, and two or three programs share a multiprocessor. No GPU has timed this formula: every Config
that it gives compiles and fits, and tests say which spill.
"""

from flash.kernels.spec import Config

from .form import ITEMSIZE
from .tables import Choice, KiB, head_bucket, shared_limit

HELD = {2: 8192, 4: 4096, 8: 2048}  # elements of a tile of keys, by their size once converted
IN_FLIGHT = 64 * KiB  # of keys and values, for one program
SHORTEST = 256  # keys of a part: a shorter one costs more to merge than it saves
MOST_PARTS = 128
INVARIANT = 1024  # keys of a part where its size must depend on nothing: whole tiles of any size


def for_decode(target: str, dtype: str, head_dim: int, rows: int, cache_itemsize: int, paged: bool) -> Choice:
    """The Config to decode with.

    Args:
        target: "cuda:90", "hip:gfx942", or "interpreter".
        dtype: of q: "float16", "bfloat16", "float32" or "float64".
        head_dim: the larger of head_dim and head_dim_v, 1 to 512.
        rows: query heads that share a key head, times queries of a sequence.
        cache_itemsize: bytes of a stored number.
        paged: whether a table lists the pages of a sequence.

    Returns:
        The Config, and where it comes from in words.
    """
    if target == "interpreter":
        return Choice(Config(16, 32 if head_dim <= 128 else 16, 4, 1), "small tiles for the interpreter")
    width, itemsize = head_bucket(head_dim), ITEMSIZE[dtype]
    held = HELD[itemsize]
    block_m = next(m for m in (16, 32, 64) if m >= min(rows, 64, max(16, held // width)))
    # what is converted, or has a row for each lane to find, takes registers, and so do rows
    if cache_itemsize < itemsize or head_dim % 16 != 0 or block_m > 16:
        held //= 2
    block_n = max(16, min(held // width, 128 if width >= 64 else 64))
    many = block_m > 16 or width >= 256
    num_warps = 8 if many and target.startswith("cuda:") else 4  # AMD's have 64 lanes
    most = min(IN_FLIGHT, shared_limit(target) * 2 // 5)  # so that two programs fit
    if target.startswith("cuda:"):  # one tile would be waited for
        while block_n > 16 and 4 * block_n * width * cache_itemsize > most:
            block_n //= 2
    pair = 2 * block_n * width * cache_itemsize
    tiles = max(1, min(3 if paged else 4, most // pair))
    # the page of a tile is loaded before the tile, which takes as many stages again
    num_stages = 2 * tiles + 1 if paged else tiles + 1
    reason = f"formula for decoding: {tiles * pair // KiB} KiB in flight for each program; untimed"
    return Choice(Config(block_m, block_n, num_warps, num_stages), reason)


def splits_of(capacity: int, batch: int, heads_k: int, row_tiles: int, multiprocessors: int, block_n: int) -> int:
    """How many parts to cut the keys of each sequence into: enough programs for every multiprocessor to have two.

    Nothing on the device is read: the longest a sequence can be stands for its length, and shorter ones have parts that
    are shorter, or empty.

    Args:
        capacity: positions of a slot.
        batch: sequences.
        heads_k: key heads.
        row_tiles: tiles that the rows of a key head make.
        multiprocessors: of the GPU.
        block_n: keys in a tile.

    Returns:
        1 to MOST_PARTS.
    """
    tiles = max(1, -(-capacity // block_n))
    programs = max(1, batch * heads_k * row_tiles)
    most = min(MOST_PARTS, tiles // max(1, SHORTEST // block_n))
    splits = max(1, min(most, -(-2 * multiprocessors // programs)))
    each = -(-tiles // splits)
    return -(-tiles // each)
