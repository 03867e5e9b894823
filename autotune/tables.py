"""Which Config a kernel call runs with: a timed table of this machine, a shipped table, or a formula, with the reason.

`lookup` takes plain values and searches, first hit wins:
    the table that a sweep on this machine wrote      GPU name, Triton version and kernel sources are those of the call
    the table shipped for the target                  tables/cuda_90.json
    the table shipped for the nearest target          rows that fit the target's shared memory
    a formula                                         from shared memory, registers and the size of the dtype
"""

import hashlib
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from flash.kernels.spec import Config

from .form import HEAD_DIMS, HOPPER, ITEMSIZE, KERNELS, SEQLENS, Row, Table, dump, parse
from .owned import check_folder, read

__all__ = [
    "HEAD_DIMS", "HOPPER", "ITEMSIZE", "KERNELS", "SEQLENS", "Choice", "Row", "Table", "dump",
    "by_formula", "for_tangents", "head_bucket", "heuristic", "is_faster", "kernel_hash", "length_bucket", "load",
    "lookup", "narrowed", "parse",
    "registers_bound", "shared_limit", "shipped_table", "table_name", "timed", "too_wide", "triton_version",
    "user_folder", "user_table", "user_table_name",
]  # fmt: skip
KiB = 1024
LARGEST_FILE = 1024 * KiB

# Shared memory that one program may have, in bytes, as the vendors' tables of compute capabilities give it.
SHARED = {
    "cuda:75": 64 * KiB,
    "cuda:80": 163 * KiB,
    "cuda:86": 99 * KiB,
    "cuda:87": 163 * KiB,
    "cuda:89": 99 * KiB,
    "cuda:90": 227 * KiB,
    "cuda:100": 227 * KiB,
    "cuda:103": 227 * KiB,
    "cuda:120": 99 * KiB,
    "cuda:121": 99 * KiB,
    "hip:gfx950": 160 * KiB,
}
# The target whose table serves one that has none: the same matrix instructions, whatever the shared memory.
NEAREST = {
    "cuda:86": "cuda:80",
    "cuda:87": "cuda:80",
    "cuda:89": "cuda:80",
    "cuda:120": "cuda:80",
    "cuda:121": "cuda:80",
    "cuda:103": "cuda:100",
    "hip:gfx90a": "hip:gfx942",
    "hip:gfx940": "hip:gfx942",
    "hip:gfx941": "hip:gfx942",
    "hip:gfx950": "hip:gfx942",
}


# (kernel, dtype, bucket of head_dim, ragged, causal): a call, as far as tables tell calls apart besides their length.
Call = tuple[str, str, int, bool, bool]


class Choice(NamedTuple):
    """A Config and why it was chosen."""

    config: Config
    reason: str


def lookup(
    target: str, kernel: str, dtype: str, head_dim: int, seqlen: int, causal: bool, gpu: str | None = None
) -> Choice:
    """The Config to run a kernel with.

    Args:
        target: "cuda:90", "hip:gfx942", or "interpreter".
        kernel: "forward", "dkdv" or "dq".
        dtype: "float16", "bfloat16", "float32" or "float64".
        head_dim: the larger of the call's head_dim and head_dim_v, 1 to 512.
        seqlen: the longer of the call's seqlen_q and seqlen_k.
        causal: whether the call is causal.
        gpu: the device's name, as torch.cuda.get_device_name gives it; None leaves out what a sweep on it found.

    Returns:
        The Config, and where it comes from in words.

    Raises:
        ValueError: kernel or dtype is none of these, or head_dim is out of range.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {KERNELS}, got {kernel!r}")
    if dtype not in ITEMSIZE:
        raise ValueError(f"dtype must be one of {tuple(ITEMSIZE)}, got {dtype!r}")
    if not 1 <= head_dim <= HEAD_DIMS[-1]:
        raise ValueError(f"head_dim must be 1 to {HEAD_DIMS[-1]}, got {head_dim}")
    bucket = head_bucket(head_dim)
    return _choose(target, (kernel, dtype, bucket, head_dim % 16 != 0, bool(causal)), length_bucket(seqlen), gpu)


@lru_cache(maxsize=4096)
def timed(
    target: str, kernel: str, dtype: str, head_dim: int, seqlen: int, causal: bool, gpu: str | None = None
) -> Choice | None:
    """As `lookup`, but a Config that was timed on this GPU, or on the one of the shipped table; None without one."""
    found = _timed(target, kernel, dtype, head_dim, seqlen, causal, gpu)
    return None if found is None else Choice(found[1].config, f"timed on {found[0]}")


@lru_cache(maxsize=4096)
def is_faster(
    kernel: str, others: tuple[str, ...], target: str, dtype: str, head_dim: int, seqlen: int, causal: bool,
    gpu: str | None = None,
) -> bool:  # fmt: skip
    """Whether a kernel took less time than others together, all of them timed in the same table.

    dkdv and dq together are one plain backward pass: delta is in the time of dq alone.
    """
    call = (dtype, head_dim, seqlen, causal, gpu)
    found = [_timed(target, name, *call) for name in (kernel, *others)]
    if any(row is None or row[0] != found[0][0] for row in found):  # type: ignore[index]
        return False
    ours, *theirs = (row[1].ms for row in found)  # type: ignore[index]
    return ours < sum(theirs)


def _timed(
    target: str, kernel: str, dtype: str, head_dim: int, seqlen: int, causal: bool, gpu: str | None
) -> tuple[str, Row] | None:
    """The GPU and the row of the first table that has timed a kernel for a call."""
    bucket = next((d for d in HEAD_DIMS if d >= head_dim), None)
    if bucket is None:
        return None
    call = (kernel, dtype, bucket, head_dim % 16 != 0, bool(causal))
    for table in (None if gpu is None else user_table(target, gpu), shipped_table(target)):
        row = _find(table, call, length_bucket(seqlen))
        if table is not None and row is not None and row.ms:
            return table.gpu, row
    return None


@lru_cache(maxsize=4096)
def _choose(target: str, call: Call, seqlen: int, gpu: str | None) -> Choice:
    kernel, dtype, head_dim = call[:3]
    if target == "interpreter":
        side = 32 if head_dim <= 128 else 16
        return Choice(Config(side, side, 4, 1), "small tiles for the interpreter")
    if gpu is not None:
        row = _find(user_table(target, gpu), call, seqlen)
        if row is not None:
            return Choice(row.config, f"timed on this machine's {gpu}")
    table = shipped_table(target)
    row = _find(table, call, seqlen)
    if row is not None:
        return Choice(row.config, f"shipped table of {target}, {_origin(table, row)}")
    near = NEAREST.get(target)
    if near is not None:
        table = shipped_table(near)
        row = _find(table, call, seqlen)
        if row is not None and 0 < row.shared <= shared_limit(target):
            fits = f"its {shared_limit(target) // KiB} KiB of shared memory"
            return Choice(row.config, f"no table for {target}; the row of {near}, {_origin(table, row)}, fits {fits}")
    found = by_formula(target, kernel, dtype, head_dim)
    return found._replace(reason=f"no row for {kernel}, {dtype}, head_dim {head_dim} on {target}: {found.reason}")


def by_formula(target: str, kernel: str, dtype: str, head_dim: int) -> Choice:
    """The Choice without any table; head_dim is the larger of a call's head_dim and head_dim_v."""
    reason = "formula of what fits it"
    if target.startswith("hip:") and dtype == "float64":
        reason += "; Triton before 3.9 cannot compile float64 for AMD"
    return Choice(heuristic(target, kernel, dtype, head_bucket(head_dim)), reason)


def narrowed(choice: Choice, kernel: str) -> Choice:
    """The Choice for a call that looks up or draws something for each score: addresses and draws take registers.

    Compiled for sm_90 at head_dim 128, a walked tile of 32 spills at most 200 B a thread, one of 64 up to 2.8 kB; and
    two stages keep what is looked up within shared memory.
    """
    config = choice.config
    axis = "block_m" if kernel == "dkdv" else "block_n"
    cut = config._replace(**{axis: min(getattr(config, axis), 32), "num_stages": min(config.num_stages, 2)})
    return choice if cut == config else Choice(cut, f"{choice.reason}; narrowed for what each score looks up")


# Bytes of an element up to which warpgroups multiply tiles of 64 rows and more that stay out of registers.
ASYNCHRONOUS = {"cuda:90": 4, "cuda:100": 2, "cuda:103": 2}
# What eight warps whose matrix instructions read registers hold there without spilling: bytes of a tile of q and as
# many of its tangent's, and scores of a tile, of which there are four.
OPERAND, SCORES = 8 * KiB, 1024


def for_tangents(choice: Choice, target: str, dtype: str, head_dim: int) -> Choice:
    """The Choice for the kernel of forward mode, from that for dq, which it is most like: its tiles, cut, in one stage.

    It owns tiles of q, of its tangent and of o's, and walks four where dq walks two. Compiled in half precision,
    OPERAND and SCORES (64 rows at head_dim 64, 32 at 128, 16 at 256) spill nothing up to head_dim 256, twice as much up
    to 144 B a thread, four times as much 4 kB. Where warpgroups keep q elsewhere, 128 rows of up to 256 B spill nothing
    either, but 64 of 512 B do up to 1.6 kB. On sm_100 float32 tiles of 64 rows of 512 B, or of 128 rows, compile to
    nothing at all. A head_dim that is no multiple of 16 counts twice, as each lane has an address of its own.

    Args:
        choice: for dq.
        target: "cuda:90", "hip:gfx942", or "interpreter".
        dtype: name of a floating dtype.
        head_dim: the larger of head_dim and head_dim_v, 1 to 512.

    Returns:
        The Choice; each of its tiles divides dq's.
    """
    config, itemsize = choice.config, ITEMSIZE[dtype]
    row = head_bucket(head_dim) * itemsize * (2 if head_dim % 16 else 1)
    block_m, num_warps = config.block_m, config.num_warps
    block_n = min(config.block_n, 32 if itemsize == 2 and head_dim % 16 == 0 else 16)
    if target.startswith("cuda:"):
        num_warps = 8
        if itemsize > ASYNCHRONOUS.get(target, 0) or row > 256 or block_m < 64:
            held = 2 * row if dtype == "float32" else row  # tf32x3 keeps each float32 operand as two of half its bits
            block_m = min(block_m, max(16, OPERAND // held))
            block_n = min(block_n, max(16, SCORES // block_m))
    cut = config._replace(block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=1)
    return Choice(cut, f"made of dq's: {choice.reason}")


# Bytes of shared memory that 16 x 16 tiles of the hungriest kernel, dkdv, take on NVIDIA by dtype and head_dim bucket,
# where that is more than some GPU has; tests/test_shipped.py compares them with what the compiler says
SMALLEST = {("float32", 512): 196608, ("float64", 256): 165888, ("float64", 512): 329728}


def too_wide(target: str, dtype: str, head_dim: int) -> str | None:
    """Why no tile of a head dimension fits a target, or None where one does.

    Args:
        target: "cuda:90", "hip:gfx942".
        dtype: name of a floating dtype.
        head_dim: the larger of head_dim and head_dim_v, 1 to 512.

    Returns:
        The reason in words, or None.
    """
    bucket = head_bucket(head_dim)
    needed, limit = SMALLEST.get((dtype, bucket), 0), shared_limit(target)
    if needed <= limit or not target.startswith("cuda:"):
        return None
    return f"its smallest tiles take {needed // KiB} KiB of shared memory, {target} has {limit // KiB}"


def head_bucket(head_dim: int) -> int:
    """The head dimension, of those that tables tell apart, that holds a call's larger one, 1 to 512."""
    return next(d for d in HEAD_DIMS if d >= head_dim)


def length_bucket(seqlen: int) -> int:
    """The length, of those that tables tell apart, that stands for a call's longer one."""
    return next((n for n in SEQLENS if n >= seqlen), SEQLENS[-1])


def _origin(table: Table | None, row: Row) -> str:
    return f"timed on {table.gpu}" if table is not None and row.ms else "untimed"


def _find(table: Table | None, call: Call, seqlen: int) -> Row | None:
    """The row of a table for a call: the most particular, and of those the one of the nearest length, rather longer."""
    if table is None:
        return None
    rows = [row for row in table.rows if row[:3] == call[:3]]
    for at in (3, 4):  # ragged, causal
        rows = [row for row in rows if row[at] is call[at]] or [row for row in rows if row[at] is None]
    if not rows:
        return None
    longest = SEQLENS[-1]
    reach = {row.seqlen or longest: row for row in rows}  # a row for any length serves past the last bucket too
    return reach[min((n for n in reach if n >= seqlen), default=max(reach))]


def shared_limit(target: str) -> int:
    """Bytes of shared memory that one program may have on a target."""
    return SHARED.get(target, 64 * KiB if target.startswith("hip:") else 99 * KiB)


def heuristic(target: str, kernel: str, dtype: str, head_dim: int) -> Config:
    """The largest of a falling series of tiles whose bounds of shared memory and registers hold.

    Args:
        target: "cuda:90", "hip:gfx942".
        kernel: "forward", "dkdv" or "dq".
        dtype: name of a floating dtype.
        head_dim: bucket, 16 to 512.

    Returns:
        A Config that fits; the smallest tiles where no bound holds, which a launch then refuses if they do not.
    """
    itemsize = ITEMSIZE[dtype]
    # tf32x3 keeps each float32 operand as two of half its bits
    held = 2 * itemsize if dtype == "float32" and target.startswith("cuda:") else itemsize
    for own, walked in ((128, 64), (64, 64), (64, 32), (32, 32), (32, 16)):
        for num_warps in (4, 8):
            if own * 2 < 16 * num_warps:  # a warp of matrix instructions has 16 rows of its own
                continue
            for num_stages in (2, 1):
                fits = _shared_bound(kernel, held, head_dim, own, walked, num_stages) <= shared_limit(target)
                if fits and registers_bound(kernel, held, head_dim, own, walked, num_warps) <= 96:
                    block_m, block_n = (walked, own) if kernel == "dkdv" else (own, walked)
                    return Config(block_m, block_n, num_warps, num_stages)
    return Config(16, 16, 8 if head_dim > 128 else 4, 1)


def _shared_bound(kernel: str, itemsize: int, head_dim: int, own: int, walked: int, num_stages: int) -> int:
    """Bytes of shared memory: the tiles that a program owns, those it walks, and one tile of scores."""
    tiles_owned = 1 if kernel == "forward" else 2
    tile = head_dim * itemsize
    return tiles_owned * own * tile + 2 * num_stages * walked * tile + own * walked * itemsize + 2 * KiB


def registers_bound(kernel: str, itemsize: int, head_dim: int, own: int, walked: int, num_warps: int) -> int:
    """Registers a thread needs for accumulators and tiles of scores."""
    accumulators = 2 if kernel == "dkdv" else 1
    scores = 1 if kernel == "forward" else 2
    words = 2 if itemsize == 8 else 1
    return (accumulators * own * head_dim + scores * own * walked) * words // (32 * num_warps)


def table_name(target: str) -> str:
    """The file of a target's shipped table: "cuda:90" -> "cuda_90.json"."""
    return re.sub(r"[^A-Za-z0-9]+", "_", target) + ".json"


@lru_cache(maxsize=64)
def shipped_table(target: str) -> Table | None:
    """The table that the library brings for a target, if it brings one."""
    path = Path(__file__).parent / "tables" / table_name(target)
    return load(path, {"target": target}) if path.is_file() else None


@lru_cache(maxsize=64)
def user_table(target: str, gpu: str) -> Table | None:
    """The table that a sweep on this machine wrote for a GPU, this Triton and these kernels, if there is one."""
    triton = triton_version()
    folder = user_folder()
    if triton is None or folder is None:
        return None
    path = folder / user_table_name(target, gpu)
    key = {"target": target, "gpu": gpu, "triton": triton, "kernels": kernel_hash()}
    return load(path, key, owned=True)


def user_table_name(target: str, gpu: str) -> str:
    """The file of a sweep's table, named by all that makes its timings mean something."""
    words = [target, gpu, triton_version() or "none", kernel_hash()]
    return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", word) for word in words) + ".json"


def user_folder() -> Path | None:
    """Where sweeps leave their tables: beside Triton's own cache; None where there is no Triton."""
    try:
        from triton import knobs
    except ImportError:
        return None
    return Path(knobs.cache.dir).parent / "flash-triton"


def triton_version() -> str | None:
    """Version of the Triton that compiles, or None."""
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


@lru_cache(maxsize=1)
def kernel_hash() -> str:
    """Sixteen hexadecimal digits of the kernels' sources: a timing of other sources says nothing about these."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent.parent / "kernels").glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def load(path: Path, key: Mapping[str, str], owned: bool = False) -> Table | None:
    """Read a table; one that is not what it should be is left out with a warning, one that is not there without.

    Args:
        path: the file.
        key: what the table must say of itself, as {"target": "cuda:90"}.
        owned: whether the file and its folder must belong to this user, be no links, and nobody else may write to them.

    Returns:
        The table, or None.
    """
    try:
        if owned:
            check_folder(path.parent)
        table = parse(read(path, LARGEST_FILE, owned))
        for field, value in key.items():
            if getattr(table, field) != value:
                raise ValueError(f"{field} must be {value!r}, got {getattr(table, field)!r}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"ignoring the table {path}: {error}", RuntimeWarning, stacklevel=2)
        return None
    return table
