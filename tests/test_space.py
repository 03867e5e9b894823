"""The candidates: allowed, distinct, in a useful order; and the calls that a choice is compiled for."""

import pytest

from flash.autotune import space, tables
from flash.kernels.spec import check_limits

CASES = [
    (target, kernel, dtype, head_dim)
    for target in ("cuda:80", "cuda:90", "hip:gfx942")
    for kernel in tables.KERNELS
    for dtype in tables.ITEMSIZE
    for head_dim in tables.HEAD_DIMS
]


def test_candidates_are_allowed_distinct_and_never_none() -> None:
    for case in CASES:
        found = space.candidates(*case)
        assert found and len(set(found)) == len(found), case
        for config in found:
            check_limits(case[1], config)


@pytest.mark.parametrize(("kernel", "owned", "walked"), [("forward", 0, 1), ("dq", 0, 1), ("dkdv", 1, 0)])
def test_owned_tile_is_no_smaller_than_the_walked_one(kernel: str, owned: int, walked: int) -> None:
    assert all(c[owned] >= c[walked] for c in space.candidates("cuda:90", kernel, "bfloat16", 128))


def test_longer_heads_are_tried_with_smaller_tiles_first() -> None:
    for kernel in tables.KERNELS:
        first = [space.candidates("cuda:90", kernel, "bfloat16", d)[0] for d in tables.HEAD_DIMS]
        areas = [c.block_m * c.block_n for c in first]
        assert areas == sorted(areas, reverse=True)


def test_stages_that_cannot_fit_are_left_out() -> None:
    for target, _, dtype, head_dim in CASES:
        for config in space.candidates(target, "forward", dtype, head_dim):
            buffers = (config.num_stages - 1) * config.block_n * head_dim * tables.ITEMSIZE[dtype]
            assert buffers <= tables.shared_limit(target)


@pytest.mark.parametrize("kernel", tables.KERNELS)
@pytest.mark.parametrize("head_dim", tables.HEAD_DIMS)
def test_variants_cover_what_changes_the_compiled_kernel(kernel: str, head_dim: int) -> None:
    found = space.variants(kernel, "float16", head_dim, False)
    assert {v.causal for v in found} == {False, True}
    assert {v.group for v in found} == {1, 4}
    assert {v.raw for v in found} == {v.q_offset for v in found} == {False, True}
    assert {v.head_dim for v in found} == ({head_dim, head_dim * 3 // 4} if head_dim >= 64 else {head_dim})
    ragged = space.variants(kernel, "float16", head_dim, True)
    assert all(v.head_dim % 16 and head_dim // 2 <= v.head_dim < head_dim for v in ragged)
    assert {v.causal for v in ragged} == {False, True}
