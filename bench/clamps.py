"""What it costs in instructions that a page table may lie: decode compiled as it is, and with a table that is believed.

    python -m bench.clamps --target cuda:90

Every page is held to those that exist, and that one was not is remembered and turns the rows into NaN. Counted from the
compiled kernel, on any machine; what a GPU makes of them is another matter.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import triton
import triton.language as tl

from flash.autotune import cached, resources
from flash.autotune.space import Stored, Variant
from flash.kernels import cache

TARGETS = ("cuda:80", "cuda:90", "hip:gfx942")
PAGES = (1, 16, 128)  # a key, a part of a tile, and more than one


class Cost(NamedTuple):
    """Instructions and registers of the kernel with the clamps, and without."""

    instructions: int
    believing_instructions: int
    registers: int
    believing_registers: int


@triton.jit
def believed(cache, extent, slot, index, inside):
    """`cache.listed` without a doubt: pages as the table has them, and never a lie."""
    ptrs = cache.table.ptr + slot.to(tl.int64) * cache.table.stride_b + index.to(tl.int64) * cache.table.stride_s
    page = tl.load(ptrs, mask=inside)
    return page, tl.zeros_like(page)


@contextmanager
def believing() -> Iterator[None]:
    """Kernels compiled meanwhile believe their tables; none of them is left in Triton's cache."""
    stock = cache.listed
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope(), triton.knobs.compilation.scope():
        triton.knobs.cache.dir, triton.knobs.compilation.always_compile = folder, True
        cache.listed = believed
        try:
            yield
        finally:
            cache.listed = stock


def cost(target: str, page: int, dtype: str = "bfloat16", head_dim: int = 128, group: int = 8) -> Cost:
    """Compile the kernel of one query both ways.

    Args:
        target: "cuda:90", "hip:gfx942".
        page: positions in a page.
        dtype: of q and of the cache.
        head_dim: of q and v.
        group: query heads that share a key head.

    Returns:
        The counts.
    """
    stored = Stored(dtype, page)
    variant = Variant(dtype, head_dim, head_dim, group=group, stored=stored)
    config = cached.config("decode", target, variant, stored)
    ours = resources.report(target, "decode", variant, config, listing=True)
    with believing():
        theirs = resources.report(target, "decode", variant, config, listing=True)
    return Cost(ours.instructions, theirs.instructions, ours.registers, theirs.registers)


def main(argv: list[str] | None = None) -> int:
    """Print a line for each target and page size."""
    parser = argparse.ArgumentParser(prog="python -m bench.clamps", description=__doc__.split("\n")[0])
    parser.add_argument("--target", action="append", help="cuda:80, cuda:90, hip:gfx942; may repeat; absent = these")
    options = parser.parse_args(argv)
    for target in options.target or TARGETS:
        for page in PAGES:
            found = cost(target, page)
            more = found.instructions / found.believing_instructions - 1
            counts = f"{found.instructions} instructions, {found.believing_instructions} believing ({more:+.1%})"
            print(f"{target}, pages of {page}: {counts}; {found.registers} registers, {found.believing_registers}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
