"""A kernel to try the mutator on: some of its mutants are wrong, one is the same kernel, one is never run."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

PATH = "tests/mutation/toy.py"


@triton.jit
def doubled(x):
    """Twice x."""
    return x + tl.maximum(x, x)


@triton.jit
def toy_kernel(x, out, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    y = doubled(tl.load(x + i, mask=i < n, other=0.0))
    if SHIFT:
        y = y + 1.0
    tl.store(out + i, y, mask=i < n)


class Toy(NamedTuple):
    """What a trial needs of a case, and of a prepared one."""

    name: str
    n: int
    tells: str = ""

    @property
    def case(self) -> "Toy":
        return self


CASES = [Toy("short", 5), Toy("whole", 8)]


def check(toy: Toy) -> str:
    """What is wrong with the kernel; empty where nothing is."""
    x, out = torch.randn(toy.n), torch.full((toy.n,), float("nan"))
    kernel: Any = toy_kernel
    kernel[(1,)](x, out, toy.n, False, 8)
    return "" if torch.equal(out, 2 * x) else f"gives {out.tolist()}"


def prepare(toy: Toy) -> Toy:
    assert not check(toy)
    return toy
