"""Partial results put together: any split of the keys is attention to all of them, with its gradients."""

import itertools
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import flash
from flash import flash_attention

BATCH, HEADS, ROWS, KEYS, HEAD_DIM = 2, 3, 4, 9, 5


def qkv(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(BATCH, HEADS, n, HEAD_DIM, dtype=dtype) for n in (ROWS, KEYS, KEYS)]


def part(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: slice, **options: Any) -> Any:
    """(o, lse) of the keys of a slice, causal as among all of them."""
    offset = KEYS - ROWS - keys.start
    return flash_attention(q, k[:, :, keys], v[:, :, keys], causal=True, q_offset=offset, return_lse=True, **options)


@pytest.mark.parametrize("at", range(KEYS + 1))
def test_a_split_anywhere_is_the_whole(at: int) -> None:
    """Also where a part has no key, or none that some query sees."""
    q, k, v = qkv()
    found = flash.merge(*part(q, k, v, slice(0, at)), *part(q, k, v, slice(at, KEYS)))
    assert_close(found, part(q, k, v, slice(0, KEYS)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_parts_merge_in_any_order(order: tuple[int, ...]) -> None:
    q, k, v = qkv()
    parts = [part(q, k, v, keys) for keys in (slice(0, 2), slice(2, 3), slice(3, KEYS))]
    first, second, third = (parts[n] for n in order)
    want = part(q, k, v, slice(0, KEYS))
    assert_close(flash.merge(*flash.merge(*first, *second), *third), want, rtol=1e-12, atol=1e-12)


def test_a_sink_is_in_one_part() -> None:
    q, k, v = qkv()
    sinks = torch.randn(HEADS)
    found = flash.merge(*part(q, k, v, slice(0, 4)), *part(q, k, v, slice(4, KEYS), sinks=sinks))
    assert_close(found, part(q, k, v, slice(0, KEYS), sinks=sinks), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype)
    o, lse = flash.merge(*part(q, k, v, slice(0, 4)), *part(q, k, v, slice(4, KEYS)))
    want = part(q.double(), k.double(), v.double(), slice(0, KEYS))
    assert o.dtype == dtype and lse.dtype == torch.float32
    assert_close(lse, want[1].float(), rtol=2e-6, atol=2e-6)
    unit = torch.finfo(dtype).eps  # two roundings: of a part's o, and of the sum
    assert_close(o.double(), want[0], rtol=0, atol=2 * unit * float(v.abs().max()))


def test_a_row_without_keys_takes_nothing_from_its_part() -> None:
    """Whatever that holds: scores may be large, and what was never written may be NaN."""
    o = torch.full((2, 3), 7.0)
    lse = torch.tensor([-1e30, 1e30])
    nothing, none = torch.full_like(o, float("nan")), torch.full_like(lse, float("-inf"))
    assert_close(flash.merge(o, lse, nothing, none), (o, lse), rtol=0, atol=0)
    assert_close(flash.merge(nothing, none, o, lse), (o, lse), rtol=0, atol=0)
    assert_close(flash.merge(nothing, none, nothing, none), (torch.zeros_like(o), none), rtol=0, atol=0)


def test_gradients_are_those_of_the_formula() -> None:
    o1, o2 = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True).unbind()
    lse1, lse2 = torch.randn(2, 4, dtype=torch.float64, requires_grad=True).unbind()
    leaves = [x.detach().requires_grad_() for x in (o1, lse1, o2, lse2)]
    assert torch.autograd.gradcheck(flash.merge, leaves)
    assert torch.autograd.gradgradcheck(flash.merge, leaves)


@pytest.mark.parametrize("none", [(True, False), (False, True), (True, True)])
def test_gradients_of_rows_without_keys_are_zero(none: tuple[bool, bool]) -> None:
    leaves = [torch.randn(*shape, dtype=torch.float64) for shape in ((4, 3), (4,)) * 2]
    for lse, empty in zip(leaves[1::2], none, strict=True):
        lse[1:3] = float("-inf") if empty else 50.0
    leaves = [x.requires_grad_() for x in leaves]
    o, lse = flash.merge(*leaves)
    loss = o.square().sum() + lse.masked_fill(lse == float("-inf"), 0.0).sum()
    for x, empty in zip(torch.autograd.grad(loss, leaves), (*none[:1] * 2, *none[1:] * 2), strict=True):
        assert x.isfinite().all() and bool((x[1:3] == 0).all()) == empty


def test_gradients_reach_q_k_and_v() -> None:
    leaves = [x.requires_grad_() for x in qkv()]
    whole = part(*leaves, slice(0, KEYS))
    merged = flash.merge(*part(*leaves, slice(0, 6)), *part(*leaves, slice(6, KEYS)))
    back = [torch.randn_like(x) for x in whole]
    want, found = (torch.autograd.grad(outputs, leaves, back) for outputs in (whole, merged))
    assert_close(found, want, rtol=1e-11, atol=1e-11)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no tensor": (dict(lse1=1.0), "lse1 must be a torch.Tensor, got float"),
    "no float": (dict(o2=torch.ones(2, 3, dtype=torch.int32)), "o2 must be of a float dtype, got torch.int32"),
    "another device": (dict(lse2=torch.ones(2, device="meta")), "lse2 must be on device cpu like o1, got meta"),
    "another shape": (dict(o2=torch.ones(2, 4)), r"o2 must be torch.float32 \[2, 3\] like o1, got torch.float32 \[2"),
    "another dtype": (dict(o2=torch.ones(2, 3).half()), r"o2 must be torch.float32 .* got torch.float16"),
    "lse of other rows": (dict(lse1=torch.ones(3)), r"lse1 must have shape \[2\], o1's less head_dim, got \[3\]"),
    "two kinds of lse": (dict(lse2=torch.ones(2).double()), r"lse2 must be torch.float32 \[2\] like lse1, got"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_together_raises(name: str) -> None:
    change, message = WRONG[name]
    good = dict(o1=torch.ones(2, 3), lse1=torch.ones(2), o2=torch.ones(2, 3), lse2=torch.ones(2))
    with pytest.raises(ValueError, match=message):
        flash.merge(**{**good, **change})
