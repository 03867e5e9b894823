"""What to choose from: the candidate Configs of a kernel, best guess first, and the calls that a choice must serve.

A program owns one tile, of queries (forward, dq) or of keys (dkdv), and walks tiles of the other kind. A larger tile to
own reads memory less often, a larger tile to walk pays less often for the loop, and registers and shared memory limit
both.
"""

from typing import NamedTuple

from flash.kernels.spec import Config

from .tables import ITEMSIZE, registers_bound, shared_limit

OWNED = (128, 64, 32, 16)
WALKED = (128, 64, 32, 16)
RAGGED = {16: 8, 32: 24, 64: 40, 128: 104, 256: 200, 512: 328}  # of each bucket, a head_dim that is no multiple of 16


FEATURES = (
    "window", "mask", "padding", "bias", "alibi", "softcap", "sinks", "dropout", "score_mod", "mask_mod", "blocks",
    "packed", "origin",
)  # fmt: skip


class Stored(NamedTuple):
    """What the compiler knows of a cache and of a call that decodes with it.

    Args:
        dtype: of the cache; "float8_e4m3fn" too.
        page: positions in a page; 0: there is no table.
        pairs: that rotary embedding turns; 0: none.
        interleaved: whether a pair's dimensions are neighbours.
        slots: whether sequences name their slots, and their left padding.
        scales: whether stored numbers have factors.
        split: whether the keys of a sequence are split.
        alike: whether all rows of a sequence see the same keys, as those of one query do.
        several: whether the rows of a key head fill more than one tile.
    """

    dtype: str
    page: int = 0
    pairs: int = 0
    interleaved: bool = False
    slots: bool = False
    scales: bool = False
    split: bool = False
    alike: bool = True
    several: bool = False


class Variant(NamedTuple):
    """What the compiler knows of a call.

    Args:
        dtype: of q, k, v.
        head_dim: of q and k, 1 to 512.
        head_dim_v: of v, 1 to 512.
        causal: whether keys after the query are hidden.
        group: query heads that share a key head.
        raw: whether scores stay in units of q.k (a positive scale).
        q_offset: whether offsets are read from a tensor.
        dlse: whether lse has a gradient (the delta kernel's).
        features: names of FEATURES, what else makes or hides a score.
        stored: the cache of a kernel that reads or writes one.
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    causal: bool = False
    group: int = 1
    raw: bool = True
    q_offset: bool = False
    dlse: bool = False
    features: tuple[str, ...] = ()
    stored: Stored | None = None


def candidates(target: str, kernel: str, dtype: str, head_dim: int) -> tuple[Config, ...]:
    """Configs worth compiling, the most promising first; `ahead` where matrix products are asynchronous.

    Args:
        target: "cuda:90", "hip:gfx942".
        kernel: "forward", "dkdv" or "dq".
        dtype: name of a floating dtype.
        head_dim: bucket, 16 to 512.

    Returns:
        The Configs; some of them may not fit.
    """
    ranked = []
    for owned in OWNED:
        for walked in WALKED:
            for num_warps in (4, 8):
                for num_stages in (1, 2, 3):
                    cost = _cost(target, kernel, dtype, head_dim, owned, walked, num_warps, num_stages)
                    if cost is not None:
                        block_m, block_n = (walked, owned) if kernel == "dkdv" else (owned, walked)
                        ranked.append((cost, Config(block_m, block_n, num_warps, num_stages)))
    found = (config for _, config in sorted(ranked))
    return tuple(order for config in found for order in orders(target, kernel, dtype, config))


def orders(target: str, kernel: str, dtype: str, config: Config) -> tuple[Config, ...]:
    """A Config with each order of the forward's loop that is worth compiling, the more promising first."""
    asynchronous = target == "cuda:90" and dtype in ("float16", "bfloat16")
    choices = (True, False) if kernel == "forward" and asynchronous else (False,)
    return tuple(config._replace(ahead=ahead) for ahead in choices)


def _cost(
    target: str, kernel: str, dtype: str, head_dim: int, owned: int, walked: int, num_warps: int, num_stages: int
) -> float | None:
    """A guess at the time of one score, to order candidates by; None where it is not worth a compilation."""
    if owned < 8 * num_warps and num_warps > 4:  # two warps would share 16 rows
        return None
    if walked > owned:
        return None
    size = ITEMSIZE[dtype]
    # at least this much is held at once: the owned tiles, unless they are in registers, and a walked one per stage
    least = (num_stages - 1) * walked * head_dim * size
    registers: float = registers_bound(kernel, size, head_dim, owned, walked, num_warps)
    if target.startswith("hip:"):  # a warp has 64 lanes, and four of them have twice the registers that eight have
        registers *= num_warps / 16
    if least > shared_limit(target) or registers > 400:
        return None
    traffic = 64 / owned
    loop = 16 / walked
    pressure = max(0.0, registers - 120) / 64
    latency = 0.1 / num_stages
    return traffic + loop + pressure + latency + num_warps / 64


def variants(kernel: str, dtype: str, head_dim: int, ragged: bool) -> tuple[Variant, ...]:
    """The calls that every Config of a bucket is compiled for, those that need most registers first.

    Args:
        kernel: "forward", "dkdv" or "dq".
        dtype: name of a floating dtype.
        head_dim: bucket, 16 to 512.
        ragged: whether head_dim is no multiple of 16: rows are then not aligned, and lanes are loaded one by one.

    Returns:
        Causal and not, one and several query heads per key head; head_dim filling the bucket and padded to it.
    """
    if ragged:
        return tuple(Variant(dtype, RAGGED[head_dim], RAGGED[head_dim], *call) for call in ((True, 4), (False, 1)))
    padded = head_dim * 3 // 4 if head_dim >= 64 else head_dim
    found = [Variant(dtype, padded, padded, True, 4), Variant(dtype, head_dim, head_dim)]
    if kernel == "dkdv":  # walks the group
        found.append(Variant(dtype, head_dim, head_dim, True))
    return (*found, Variant(dtype, head_dim, head_dim, True, 4, raw=False, q_offset=True))
