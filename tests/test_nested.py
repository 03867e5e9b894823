"""Jagged nested tensors: what they hold is packed, so the answer is that of the packed call, nested as q is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flash import flash_attention, flash_attention_varlen, mods, reference

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.interpret)]
LENGTHS_Q, LENGTHS_K = (5, 1, 9), (7, 4, 9)
Place = Callable[[torch.Tensor], torch.Tensor]


def starts(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def rows(lengths: tuple[int, ...], *shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(sum(lengths), *shape, dtype=torch.float64, device=device).requires_grad_()


def nested(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[batch, heads, *, head_dim] of [total, heads, head_dim], or [batch, *, head_dim] of [total, head_dim]."""
    x: torch.Tensor = torch.nested.nested_tensor_from_jagged(values, offsets)
    return x.transpose(1, 2) if values.dim() == 3 else x


def call(device: torch.device, heads: int = 4, heads_k: int = 2) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The rows of q, k and v, and the same nested; k and v share their offsets."""
    packed = [
        rows(LENGTHS_Q, heads, 8, device=device),
        rows(LENGTHS_K, heads_k, 8, device=device),
        rows(LENGTHS_K, heads_k, 6, device=device),
    ]
    offsets_q, offsets_k = (starts(lengths, device) for lengths in (LENGTHS_Q, LENGTHS_K))
    return packed, [nested(x, o) for x, o in zip(packed, (offsets_q, offsets_k, offsets_k), strict=True)]


def lengths(device: torch.device) -> dict[str, Any]:
    cu = (starts(lengths, device).to(torch.int32) for lengths in (LENGTHS_Q, LENGTHS_K))
    return dict(zip(("cu_seqlens_q", "cu_seqlens_k"), cu, strict=True))


KEYWORDS: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing": dict,
    "causal": lambda: {"causal": True, "q_offset": torch.tensor([1, 0, -2])},
    "window": lambda: {"window": (2, None)},
    "mask": lambda: {"mask": torch.rand(3, 1, 9, 9) < 0.7},
    "bias": lambda: {"bias": torch.randn(4, 1, 9, dtype=torch.float64)},
    "slopes, softcap and sinks": lambda: {
        "alibi_slopes": torch.rand(3, 4, dtype=torch.float64),
        "softcap": 0.7,
        "sinks": torch.randn(4, dtype=torch.float64),
    },
    "score_mod": lambda: {"score_mod": mods.relative_position(torch.randn(4, 7, dtype=torch.float64), 3)},
    "mask_mod": lambda: {"mask_mod": mods.document(torch.arange(9)[None] // torch.tensor([[2], [3], [4]]))},
}


def placed(options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Options where kernels run, user functions with their tensors."""

    def move(x: Any) -> Any:
        if isinstance(x, (mods.ScoreMod, mods.MaskMod)):
            return mods.from_handle(mods.handle_of(x), tuple(arg.to(device) for arg in x.args))
        return x.to(device) if isinstance(x, torch.Tensor) else x

    return {name: move(x) for name, x in options.items()}


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", KEYWORDS)
def test_a_nested_call_is_the_packed_one_and_its_gradient_too(name: str, backend: str, device: torch.device) -> None:
    packed, (q, k, v) = call(device)
    options = placed(KEYWORDS[name](), device)
    o, lse = flash_attention(q, k, v, return_lse=True, backend=backend, **options)
    assert o.is_nested and o.shape[:3] == q.shape[:3] and o.shape[3] == 6  # the same lengths, which torch can add up
    assert lse.is_nested and lse.shape == q.shape[:3] and lse.dtype == torch.float64
    flat_o, flat_lse = o.values().transpose(0, 1), lse.values()
    want_o, want_lse = reference.attention_varlen(*packed, **lengths(device), return_lse=True, **options)
    torch.testing.assert_close(flat_o, want_o, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(flat_lse, want_lse, rtol=1e-10, atol=1e-10)
    do = torch.randn_like(want_o)
    seen = [x.masked_fill(x == float("-inf"), 0.0).sin().sum() for x in (flat_lse, want_lse)]
    found = torch.autograd.grad((flat_o * do).sum() + seen[0], packed, retain_graph=True)
    wanted = torch.autograd.grad((want_o * do).sum() + seen[1], packed)
    for key, x, want in zip(("dq", "dk", "dv"), found, wanted, strict=True):
        torch.testing.assert_close(x, want, rtol=1e-10, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_bitwise_the_packed_call(backend: str, device: torch.device) -> None:
    packed, (q, k, v) = call(device)
    o, lse = flash_attention(q, k, v, causal=True, return_lse=True, backend=backend)
    longest = {"max_seqlen_q": 9, "max_seqlen_k": 9}
    want, want_lse = flash_attention_varlen(
        *packed, **lengths(device), **longest, causal=True, return_lse=True, backend=backend
    )
    assert torch.equal(o.values().transpose(0, 1), want)
    assert torch.equal(lse.values(), want_lse)


def test_the_gradient_of_a_nested_leaf_is_nested() -> None:
    parts = [torch.randn(n, 4, 8, dtype=torch.float64) for n in LENGTHS_Q]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    q = x.transpose(1, 2)
    o: Any = flash_attention(q, q, q, causal=True)
    (o + q).values().sum().backward()  # o has q's lengths
    assert x.grad is not None and x.grad.is_nested
    leaves = [part.clone().requires_grad_() for part in parts]
    for leaf in leaves:
        alone = leaf.transpose(0, 1)[None]
        (reference.attention(alone, alone, alone, causal=True) + alone).sum().backward()
    for found, leaf in zip(x.grad.unbind(), leaves, strict=True):
        torch.testing.assert_close(found, leaf.grad, rtol=1e-10, atol=1e-10)


def test_three_axes_are_one_head() -> None:
    packed, (q, k, v) = call(torch.device("cpu"), heads=1, heads_k=1)
    flat = [x.squeeze(1) for x in packed]
    three = [nested(x, y.offsets()) for x, y in zip(flat, (q, k, v), strict=True)]  # type: ignore[attr-defined]
    mask = torch.rand(3, 9, 9) < 0.7
    o, lse = flash_attention(*three, mask=mask, return_lse=True)
    o_4, lse_4 = flash_attention(q, k, v, mask=mask[:, None], return_lse=True)
    assert o.shape == (*three[0].shape[:2], 6) and lse.shape == three[0].shape[:2]
    assert torch.equal(o.values(), o_4.values()[0]) and torch.equal(lse.values(), lse_4.values()[0])


def test_k_and_v_may_be_made_apart_where_their_lengths_agree() -> None:
    _, (q, k, v) = call(torch.device("cpu"))
    apart = nested(v.values().transpose(0, 1), starts(LENGTHS_K, v.device))  # type: ignore[operator]
    found: Any = flash_attention(q, k, apart)
    want: Any = flash_attention(q, k, v)
    assert torch.equal(found.values(), want.values())
    other = nested(v.values().transpose(0, 1), starts((4, 7, 9), v.device))  # type: ignore[operator]
    with pytest.raises(ValueError, match="v must have sequences of the lengths of k's, got others"):
        flash_attention(q, k, other)


def test_lengths_that_k_and_v_share_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (q, k, v) = call(torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.delattr(torch, "equal")
        flash_attention(q, k, v)


def test_autocast_casts_what_a_nested_tensor_holds() -> None:
    parts = [torch.randn(n, 2, 8) for n in LENGTHS_Q]
    q = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash_attention(q, q, q).dtype == torch.bfloat16  # type: ignore[union-attr]


def test_what_is_wrong_with_a_nested_tensor_is_named() -> None:
    packed, (q, k, v) = call(torch.device("cpu"))
    dense = torch.randn(3, 2, 9, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="q, k and v must all be nested tensors where one is, got k"):
        flash_attention(q, dense, dense)
    with pytest.raises(ValueError, match="q, k and v must all be nested tensors where one is, got q"):
        flash_attention(dense, k, v)
    with pytest.raises(ValueError, match="q, k and v must all be nested tensors where one is, got v"):
        flash_attention(q, k, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k must have 4 dimensions like q, got 3"):
        flash_attention(q, nested(packed[1][:, 0], starts(LENGTHS_K, q.device)), v)
    with pytest.raises(ValueError, match="k and v must have batch 3 like q, got 2 and 3"):
        flash_attention(q, nested(packed[1], starts((11, 9), q.device)), v)
    with pytest.raises(ValueError, match=r"mask must broadcast to .* = \[3, 4, 9, 9\], got shape \[15, 20\]"):
        flash_attention(q, k, v, mask=torch.ones(15, 20, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="k must have its ragged axis last but one"):
        flash_attention(q, k.transpose(1, 2), v)
    with pytest.raises(ValueError, match="k must have dtype float64 like q, got float32"):
        flash_attention(q, k.float(), v)


def test_other_layouts_are_not_served_and_the_nearest_is_named() -> None:
    wide = torch.randn(2, 9, 4, 8)
    gaps = torch.nested.narrow(wide, 1, torch.tensor([0, 1]), torch.tensor([5, 3]), layout=torch.jagged).transpose(1, 2)
    with pytest.raises(NotImplementedError, match=r"gaps between its sequences; use q.contiguous\(\)"):
        flash_attention(gaps, gaps, gaps)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_strided_nested_tensors_are_not_served_and_the_nearest_layout_is_named() -> None:
    strided = torch.nested.nested_tensor([torch.randn(4, n, 8) for n in LENGTHS_Q])
    with pytest.raises(
        NotImplementedError, match="q is a nested tensor of layout torch.strided; torch.jagged is served"
    ):
        flash_attention(strided, strided, strided)


def test_only_flash_attention_takes_them() -> None:
    _, (q, k, v) = call(torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="q is nested, which only flash_attention takes; pass q.values"):
        flash_attention_varlen(q, k, v, **lengths(q.device), max_seqlen_q=9, max_seqlen_k=9)


def test_compile_has_no_graph_break_and_the_same_values() -> None:
    def loss(x: torch.Tensor) -> Any:
        q = x.transpose(1, 2)
        o: Any = flash_attention(q, q, q, causal=True)
        return o.values().square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for last in (3, 4):
        parts = [torch.randn(n, 2, 8, dtype=torch.float64) for n in (5, last)]
        x = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
        (expected,) = torch.autograd.grad(loss(x), x)
        (found,) = torch.autograd.grad(compiled(x), x)
        torch.testing.assert_close(found.values(), expected.values(), rtol=1e-12, atol=1e-12)
