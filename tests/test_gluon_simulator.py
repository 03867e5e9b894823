"""The simulator runs Gluon kernels as a Hopper GPU would, and catches every error of protocol, each time.

One small kernel stands for all: a producer loads tiles of a and b through a ring of slots, a consumer adds up a_t b_t
and stores the sum. Mutants of it are found by an error or by a wrong result.
"""

from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.interpreter.gluon import Simulated

SIZE = gl.constexpr(64)
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@triton.jit
def halved(x):
    return tl.where(x < 0.0, x * 0.5, x * 0.5)


@gluon.jit
def producer(a_desc, b_desc, a_smem, b_smem, full, empty, tiles, SLOTS: gl.constexpr):
    for t in range(tiles):
        slot = t % SLOTS
        mbarrier.wait(empty.index(slot), (t // SLOTS) & 1 ^ 1)
        mbarrier.expect(full.index(slot), a_desc.block_type.nbytes + b_desc.block_type.nbytes)
        load_tile(a_desc, [t * SIZE, 0], full.index(slot), a_smem.index(slot))
        load_tile(b_desc, [t * SIZE, 0], full.index(slot), b_smem.index(slot))


@gluon.jit
def consumer(c_desc, a_smem, b_smem, c_smem, full, empty, tiles, SLOTS: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    acc = gl.zeros([SIZE, SIZE], gl.float32, LAYOUT)
    for t in range(tiles):
        slot = t % SLOTS
        mbarrier.wait(full.index(slot), (t // SLOTS) & 1)
        acc = warpgroup_mma(a_smem.index(slot), b_smem.index(slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(slot), count=1)
    c_smem.store(halved(acc).to(c_desc.dtype))
    fence_async_shared()
    store_tile(c_desc, [0, 0], c_smem)
    tma.store_wait(0)


@gluon.jit
def product_kernel(a_desc, b_desc, c_desc, tiles, SLOTS: gl.constexpr):
    a_smem = gl.allocate_shared_memory(a_desc.dtype, [SLOTS, SIZE, SIZE], a_desc.layout)
    b_smem = gl.allocate_shared_memory(b_desc.dtype, [SLOTS, SIZE, SIZE], b_desc.layout)
    c_smem = gl.allocate_shared_memory(c_desc.dtype, [SIZE, SIZE], c_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize([
        (consumer, (c_desc, a_smem, b_smem, c_smem, full, empty, tiles, SLOTS)),
        (producer, (a_desc, b_desc, a_smem, b_smem, full, empty, tiles, SLOTS)),
    ], [1], [24])  # fmt: skip


def descriptor(x: torch.Tensor) -> Any:
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.float16)
    return TensorDescriptor.from_tensor(x, [64, 64], layout)


def product(rows: int = 64, tiles: int = 5, slots: int = 2, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel makes of random tiles, and what it should; rows: of c, the last ones may be missing."""
    a, b = (torch.randn(tiles * 64, 64).half() for _ in range(2))
    c = torch.full((rows, 64), float("nan")).half()
    simulated = Simulated(product_kernel, **options)
    simulated[(1,)](descriptor(a), descriptor(b), descriptor(c), tiles, SLOTS=slots, num_warps=4)
    want = sum(x.float() @ y.float() for x, y in zip(a.split(64), b.split(64), strict=True)) / 2
    return c.float(), want[:rows]


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("tiles, slots", [(1, 2), (5, 2), (5, 1), (4, 3)])
def test_a_pipelined_product_is_right(tiles: int, slots: int, seed: int | None) -> None:
    got, want = product(tiles=tiles, slots=slots, seed=seed)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)


def test_a_store_leaves_out_what_lies_past_the_tensor() -> None:
    got, want = product(rows=37)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)


MUTANTS = {
    "the producer ignores that a slot is in use": ("producer", "(t // SLOTS) & 1 ^ 1)", "(t // SLOTS) & 1 ^ 1, False)"),
    "the producer awaits the wrong phase": ("producer", "& 1 ^ 1)", "& 1)"),
    "the producer expects too few bytes": ("producer", " + b_desc.block_type.nbytes", ""),
    "the producer loads into another slot": ("producer", "b_smem.index(slot)", "b_smem.index(0)"),
    "the consumer does not await a tile": ("consumer", "(t // SLOTS) & 1)", "(t // SLOTS) & 1, False)"),
    "the consumer awaits the wrong phase": ("consumer", "(t // SLOTS) & 1)", "(t // SLOTS) & 1 ^ 1)"),
    "the consumer never arrives": ("consumer", "mbarrier.arrive(empty.index(slot), count=1)", "pass"),
    "the consumer arrives twice": ("consumer", "count=1", "count=2"),
    "a slot is released before its product is done": (
        "consumer",
        "acc = warpgroup_mma_wait(0, deps=(acc,))\n        mbarrier.arrive(empty.index(slot), count=1)",
        "mbarrier.arrive(empty.index(slot), count=1)\n        acc = warpgroup_mma_wait(0, deps=(acc,))",
    ),
    "a product is not awaited": ("consumer", "warpgroup_mma_wait(0,", "warpgroup_mma_wait(1,"),
    "a fence is missing": ("consumer", "fence_async_shared()", "pass"),
    "a store is not awaited": ("consumer", "tma.store_wait(0)", "pass"),
    "memory changes under a store": ("consumer", "tma.store_wait(0)", "c_smem.store(acc.to(c_desc.dtype))"),
    "a barrier counts too many": ("product_kernel", "mbarrier.init(empty.index(i), count=1)",
                                  "mbarrier.init(empty.index(i), count=2)"),
    "a barrier is not initialised": ("product_kernel", "mbarrier.init(full.index(i), count=1)", "pass"),
    "a slot beyond the ring": ("consumer", "slot = t % SLOTS", "slot = t"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_error_of_protocol_is_caught(mutant: str) -> None:
    try:
        got, want = product(edits=[MUTANTS[mutant]])
    except (AssertionError, TimeoutError):
        return
    assert not torch.allclose(got, want, rtol=1e-3, atol=1e-2), f"{mutant}: the simulator saw nothing"


def test_a_deadlock_names_who_waits_for_what() -> None:
    with pytest.raises(TimeoutError, match=r"partition 0 \(consumer\) waits for parity 0, in phase 0 of barrier 0"):
        product(edits=[("producer", "a_desc.block_type.nbytes +", "1 + a_desc.block_type.nbytes +")])


def test_an_edit_that_changes_nothing_is_refused() -> None:
    with pytest.raises(AssertionError, match="0 times"):
        product(edits=[("producer", "no such text", "")])
    with pytest.raises(AssertionError, match="calls no absent"):
        product(edits=[("absent", "", "")])


@gluon.jit
def copy_kernel(x, y, total, n, wide, BLOCK: gl.constexpr, MASKED: gl.constexpr):
    at = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, gl.BlockedLayout([1], [32], [4], [0]))
    if MASKED:
        value = gl.load(x + at, mask=at < n, other=0.0)
        gl.store(y + at, value, mask=at < n)
    else:
        value = gl.load(x + at)
        gl.store(y + at, value)
    gl.atomic_add(total + at // 4 * 0, value, mask=at < n)


def copied(n: int, masked: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(2 * n)[::2]
    y, total = torch.full((n,), float("nan")), torch.zeros(1)
    contiguous = x.contiguous()
    Simulated(copy_kernel)[(-(-n // 16),)](contiguous, y, total, n, 2**40, BLOCK=16, MASKED=masked)
    return contiguous, y, total


def test_pointers_load_store_and_add_under_a_mask() -> None:
    x, y, total = copied(37, True)
    assert torch.equal(x, y)
    torch.testing.assert_close(total, x.sum(0, keepdim=True), rtol=1e-5, atol=1e-5)
    x, y, _ = copied(32, False)
    assert torch.equal(x, y)


def test_pointers_that_leave_their_tensor_raise() -> None:
    with pytest.raises(IndexError, match="element 37 of"):
        copied(37, False)


@gluon.jit
def gap_kernel(x, at):
    gl.store(x + at, 1.0)


def test_elements_between_those_of_a_strided_tensor_are_not_its_own() -> None:
    x = torch.zeros(4, 8)[:, :6]
    Simulated(gap_kernel)[(1,)](x, 13)
    assert x[1, 5] == 1
    for at in (6, 32, -1):
        with pytest.raises(IndexError):
            Simulated(gap_kernel)[(1,)](x, at)


@gluon.jit
def numbers_kernel(x, i, n):
    gl.store(x, i // n)
    gl.store(x + 1, i % n)
    gl.store(x + 2, gl.maximum(float("nan"), 0.0 * i + 2.0))
    gl.store(x + 3, (i + 0.5).to(gl.float16) * 2)
    gl.store(x + 4, gl.max(gl.where(gl.arange(0, 4) < n, float("nan"), 3.0), 0))


def test_numbers_follow_the_machine_and_not_python() -> None:
    x = torch.zeros(5)
    Simulated(numbers_kernel)[(1,)](x, -7, 2)
    assert x.tolist() == [-3, -1, 2, -13, 3]  # division goes towards zero, of NaN and a number the number is larger


@triton.jit
def greedy(x):
    return x + tl.full([64], 1.0, tl.float32)


@gluon.jit
def greedy_kernel(x):
    gl.store(x, greedy(gl.load(x)))


def test_a_shared_function_that_makes_a_tensor_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="tl.full"):
        Simulated(greedy_kernel)[(1,)](torch.zeros(1))


@gluon.jit
def early_kernel(desc, smem_desc):
    a = gl.allocate_shared_memory(desc.dtype, [64, 64], desc.layout)
    a.store(gl.zeros([64, 64], desc.dtype))
    fence_async_shared()
    acc = warpgroup_mma(a, a, gl.zeros([64, 64], gl.float32), is_async=True)
    acc = acc * 2.0
    acc = warpgroup_mma_wait(0, deps=(acc,))


def test_the_result_of_a_product_cannot_be_touched_before_its_wait() -> None:
    x = descriptor(torch.zeros(64, 64).half())
    with pytest.raises(AssertionError, match="touched before its wait"):
        Simulated(early_kernel)[(1,)](x, x)
