"""torch's scaled_dot_product_attention by flash_attention: every argument means what it means to torch, nothing is
copied on the way, and a scope serves all calls in it and no others."""

import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import flash
from flash.integrations import sdpa
from flash.integrations.sdpa import scaled_dot_product_attention

STOCK = F.scaled_dot_product_attention
INF = float("inf")
Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]


def inputs(
    *batch: int, heads: int = 4, heads_k: int | None = None, q: int = 5, k: int = 7, d: int = 8, dv: int = 6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads_k = heads if heads_k is None else heads_k
    sizes = (heads, q, d), (heads_k, k, d), (heads_k, k, dv)
    found = [torch.randn(*batch, *size, dtype=torch.float64) for size in sizes]
    return found[0], found[1], found[2]


def gradients(attention: Callable[..., torch.Tensor], call: Call) -> list[torch.Tensor]:
    """The output, and the gradients of q, k, v and a float mask."""
    *tensors, keywords = call
    mask = keywords.get("attn_mask")
    leaves = [x.detach().requires_grad_() for x in tensors]
    if mask is not None and mask.is_floating_point():
        leaves.append(mask.detach().requires_grad_())
        keywords = {**keywords, "attn_mask": leaves[3]}
    o = attention(*leaves[:3], **keywords)
    do = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(1))
    # torch leaves a mask over nothing out of its graph
    return [o.detach(), *torch.autograd.grad(o, leaves, do, allow_unused=True, materialize_grads=True)]


def agree(call: Call) -> None:
    """Ours and torch's, which multiplies as it is written down, forward and backward."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = gradients(STOCK, call)
    for got, expected in zip(gradients(scaled_dot_product_attention, call), want, strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def bools(*shape: int) -> torch.Tensor:
    return torch.rand(shape) < 0.6


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


ARGUMENTS: dict[str, Callable[[], Call]] = {
    "none": lambda: (*inputs(2), {}),
    "is_causal": lambda: (*inputs(2), {"is_causal": True}),
    "is_causal, more queries than keys": lambda: (*inputs(2, q=9), {"is_causal": True}),
    "is_causal, as many queries as keys": lambda: (*inputs(2, q=7), {"is_causal": True}),
    "scale": lambda: (*inputs(2), {"scale": 0.3}),
    "scale below zero": lambda: (*inputs(2), {"scale": -0.3}),
    "bool mask": lambda: (*inputs(2), {"attn_mask": bools(2, 4, 5, 7)}),
    "bool mask of keys": lambda: (*inputs(2), {"attn_mask": bools(2, 1, 1, 7)}),
    "bool mask of two axes": lambda: (*inputs(2), {"attn_mask": bools(5, 7)}),
    "float mask": lambda: (*inputs(2), {"attn_mask": floats(2, 4, 5, 7)}),
    "float mask of heads": lambda: (*inputs(2), {"attn_mask": floats(4, 5, 7)}),
    "float mask of two axes": lambda: (*inputs(2), {"attn_mask": floats(1, 7)}),
    "float mask that hides": lambda: (*inputs(2), {"attn_mask": floats(5, 7).masked_fill(bools(5, 7), -INF)}),
    "a query that sees nothing": lambda: (*inputs(2), {"attn_mask": bools(5, 7).index_fill(0, torch.tensor(2), False)}),
    "enable_gqa": lambda: (*inputs(2, heads_k=2), {"enable_gqa": True, "is_causal": True}),
    "enable_gqa, one head": lambda: (*inputs(2, heads_k=1), {"enable_gqa": True, "attn_mask": bools(2, 4, 5, 7)}),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_means_what_it_means_to_torch(name: str) -> None:
    agree(ARGUMENTS[name]())


def test_the_signature_is_torchs() -> None:
    found = inspect.signature(scaled_dot_product_attention)
    q, k, v = inputs(2)
    assert str(found).split(" -> ")[0].replace("torch.", "") == (
        "(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, "
        "is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False)"
    )
    for attention in (STOCK, scaled_dot_product_attention):
        attention(q, k, v, None, 0.0, True)
        with pytest.raises(TypeError):
            attention(q, k, v, None, 0.0, True, 1.0)


BROADCAST: dict[str, Callable[[], Call]] = {
    "two": lambda: (*(x[0] for x in inputs(heads=1)), {}),
    "two and a mask": lambda: (*(x[0] for x in inputs(heads=1)), {"attn_mask": floats(5, 7)}),
    "three": lambda: (*inputs(), {"is_causal": True}),
    "three and masks": lambda: (*inputs(), {"attn_mask": floats(4, 1, 7)}),
    "three, grouped": lambda: (*inputs(heads_k=2), {"enable_gqa": True}),
    "five": lambda: (*inputs(2, 3), {"attn_mask": floats(2, 3, 4, 5, 7)}),
    "five, mask shared": lambda: (*inputs(2, 3), {"attn_mask": bools(2, 1, 1, 5, 7)}),
    "five, mask of three axes": lambda: (*inputs(2, 3), {"attn_mask": floats(4, 5, 7)}),
    "five, grouped": lambda: (*inputs(2, 3, heads_k=2), {"enable_gqa": True, "is_causal": True}),
    "five, transposed": lambda: (*(x.transpose(0, 1) for x in inputs(3, 2)), {}),
    "five, keys shared": lambda: (inputs(2, 3)[0], *inputs(1, 3)[1:], {}),
    "six": lambda: (*inputs(2, 1, 3), {"attn_mask": bools(3, 1, 5, 7)}),
    "four and three": lambda: (inputs(2)[0], *inputs()[1:], {}),
    "three and four": lambda: (inputs()[0], *inputs(2)[1:], {}),
    "four and two": lambda: (inputs(2)[0], *(x[0] for x in inputs(heads=1)[1:]), {}),
    "one batch of keys": lambda: (inputs(2)[0], *inputs(1)[1:], {}),
    "one batch of values": lambda: (*inputs(2)[:2], inputs(1)[2], {}),
    "one batch of queries": lambda: (inputs(1)[0], *inputs(2)[1:], {"attn_mask": floats(2, 4, 5, 7)}),
    "one head of keys": lambda: (inputs(2)[0], *inputs(2, heads=1)[1:], {}),
    "one head of values": lambda: (*inputs(2)[:2], inputs(2, heads=1)[2], {}),
    "one head of queries": lambda: (inputs(2, heads=1)[0], *inputs(2)[1:], {}),
    "one head of values, grouped": lambda: (
        *inputs(2, heads_k=2)[:2], inputs(2, heads=1)[2], {"enable_gqa": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROADCAST)
def test_three_to_five_dimensions_are_served(name: str) -> None:
    agree(BROADCAST[name]())


@pytest.mark.parametrize("shape", [(0, 4, 5, 7), (2, 4, 0, 7), (2, 4, 5, 0)], ids=["batch", "queries", "keys"])
@pytest.mark.parametrize("outer", [(), (3,), (0,)], ids=["four", "five", "none of five"])
def test_empty_tensors_are_served(outer: tuple[int, ...], shape: tuple[int, int, int, int]) -> None:
    batch, heads, seqlen_q, seqlen_k = shape
    agree((*inputs(*outer, batch, heads=heads, q=seqlen_q, k=seqlen_k), {"attn_mask": floats(seqlen_q, seqlen_k)}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["none", "is_causal", "bool mask of keys", "float mask of heads", "enable_gqa"])
def test_gradients_are_torchs(name: str, dtype: torch.dtype) -> None:
    """Those of the same inputs in float64, no farther than torch's own in this dtype, and two roundings."""
    q, k, v, keywords = ARGUMENTS[name]()
    mask = keywords.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        keywords = {**keywords, "attn_mask": mask.to(dtype)}
    rounded = [x.to(dtype) for x in (q, k, v)]
    call: Call = (*rounded[:2], rounded[2], keywords)
    wide = {n: x.double() if n == "attn_mask" and x.is_floating_point() else x for n, x in keywords.items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = gradients(STOCK, (*(x.double() for x in rounded), wide))  # type: ignore[arg-type]
        plain = gradients(STOCK, call)
    for got, exact, other in zip(gradients(scaled_dot_product_attention, call), want, plain, strict=True):
        assert got.dtype == dtype
        eps = torch.finfo(dtype).eps
        limit = float((other.double() - exact).abs().max()) + 2 * eps * float(exact.abs().max())
        assert float((got.double() - exact).abs().max()) <= limit


@pytest.mark.parametrize("seqlen_k", [5, 7])
def test_dropout_has_torchs_mean_and_repeats_with_the_seed(seqlen_k: int) -> None:
    q, k, _ = inputs(2, k=seqlen_k)
    v = torch.eye(seqlen_k, dtype=torch.float64).expand(2, 4, -1, -1)  # o is the weights
    torch.manual_seed(3)
    first = scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    assert not torch.equal(first, scaled_dot_product_attention(q, k, v, dropout_p=0.25))
    torch.manual_seed(3)
    assert torch.equal(first, scaled_dot_product_attention(q, k, v, dropout_p=0.25))
    kept = (STOCK(q, k, v) / 0.75).where(first != 0, 0.0)
    torch.testing.assert_close(first, kept)
    assert 0.5 < (first != 0).double().mean() < 0.95


class Stop(Exception):
    """Raised by a spy that has seen enough."""


def seen(monkeypatch: pytest.MonkeyPatch, *args: Any, **keywords: Any) -> list[dict[str, Any]]:
    """What reaches flash_attention of a call, q, k and v by name."""
    found = []
    stock = flash.flash_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **others: Any) -> Any:
        found.append({"q": q, "k": k, "v": v, **others})
        return stock(q, k, v, **others)

    with monkeypatch.context() as patch:
        patch.setattr(sdpa, "flash_attention", spy)
        scaled_dot_product_attention(*args, **keywords)
    return found


@pytest.mark.parametrize("name", BROADCAST)
def test_nothing_is_copied_nor_expanded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, keywords = BROADCAST[name]()
    calls = seen(monkeypatch, q, k, v, **keywords)
    given = {"q": q, "k": k, "v": v, "mask": keywords.get("attn_mask"), "bias": keywords.get("attn_mask")}
    for call in calls:
        for operand, x in given.items():
            if call.get(operand) is not None:
                assert call[operand].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
                assert operand not in ("mask", "bias") or call[operand].numel() <= x.numel()
    shared = "five, mask shared", "five, transposed", "five, keys shared", "six"
    assert len(calls) == (2 if name in shared else 1)


def test_key_heads_and_masks_reach_the_kernels_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(2, heads_k=2)
    mask = bools(2, 1, 1, 7)
    (call,) = seen(monkeypatch, q, k, v, attn_mask=mask, enable_gqa=True)
    for name, x in {"q": q, "k": k, "v": v, "mask": mask}.items():
        assert (call[name].data_ptr(), call[name].shape, call[name].stride()) == (x.data_ptr(), x.shape, x.stride())
    (call,) = seen(monkeypatch, q, k[:, :1], v[:, :1])
    assert call["k"].shape[1] == call["v"].shape[1] == 1
    (call,) = seen(monkeypatch, q, k, v, is_causal=True, enable_gqa=True)
    assert call["causal"] is True and call["q_offset"] == 0
    (call,) = seen(monkeypatch, q, k[:, :, :5], v[:, :, :5], is_causal=True, enable_gqa=True)
    assert call["causal"] is True and "q_offset" not in call  # plain calls are planned ahead


def test_the_output_lies_in_memory_as_the_query_does() -> None:
    q, k, v = (torch.randn(2, 5, 3, 8).transpose(1, 2) for _ in range(3))
    o = scaled_dot_product_attention(q, k, v)
    assert o.stride() == STOCK(q, k, v).stride() == q.stride()
    assert scaled_dot_product_attention(*(x.contiguous() for x in (q, k, v))).is_contiguous()


def test_jagged_tensors_are_served_as_torch_serves_them() -> None:
    offsets = torch.tensor([0, 5, 6, 14])
    q, k, v = (torch.nested.nested_tensor_from_jagged(torch.randn(14, 4, 8), offsets).transpose(1, 2) for _ in range(3))
    for is_causal in (False, True):
        o = scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        for got, *one in zip(o.unbind(), q.unbind(), k.unbind(), v.unbind(), strict=True):
            torch.testing.assert_close(got, STOCK(*one, is_causal=is_causal))
    with pytest.raises(NotImplementedError, match="attn_mask beside nested"):
        scaled_dot_product_attention(q, k, v, attn_mask=bools(5, 7))


WRONG: dict[str, tuple[Callable[[], Call], type[Exception], str]] = {
    "mask and is_causal": (
        lambda: (*inputs(2), {"attn_mask": bools(5, 7), "is_causal": True}), ValueError, "attn_mask should not be set",
    ),
    "heads differ": (lambda: (*inputs(2, heads_k=2), {}), ValueError, "enable_gqa is False"),
    "heads do not divide": (lambda: (*inputs(2, heads_k=3), {"enable_gqa": True}), ValueError, "divides"),
    "keys' heads are not values'": (
        lambda: (*inputs(2, heads_k=2)[:2], inputs(2)[2], {"enable_gqa": True}), NotImplementedError, "2 and 4 heads",
    ),
    "values' heads differ": (lambda: (*inputs(2)[:2], inputs(2, heads=2)[2], {}), ValueError, "value must have 4"),
    "grouped without heads": (
        lambda: (*(x[0] for x in inputs(heads=1)), {"enable_gqa": True}), ValueError, "enable_gqa must be False",
    ),
    "one axis": (lambda: (*(x[0, 0] for x in inputs(heads=1)), {}), ValueError, "query must have at least 2"),
    "batches differ": (lambda: (inputs(2)[0], *inputs(3)[1:], {}), ValueError, "before heads that broadcast"),
    "head dimensions differ": (lambda: (inputs(2)[0], *inputs(2, d=9)[1:], {}), ValueError, "head_dim"),
    "key lengths differ": (lambda: (*inputs(2)[:2], inputs(2, k=6)[2], {}), ValueError, "seqlen_k"),
    "dtypes differ": (lambda: (inputs(2)[0].float(), *inputs(2)[1:], {}), ValueError, "dtype"),
    "integers": (lambda: (*(x.int() for x in inputs(2)), {}), ValueError, "float16"),
    "mask of integers": (lambda: (*inputs(2), {"attn_mask": bools(5, 7).int()}), ValueError, "attn_mask must be"),
    "mask of a wrong shape": (lambda: (*inputs(2), {"attn_mask": bools(5, 6)}), ValueError, "broadcast"),
    "mask of a larger batch": (lambda: (*inputs(1), {"attn_mask": bools(3, 1, 5, 7)}), ValueError, "broadcast"),
    "mask of more axes": (lambda: (*inputs(), {"attn_mask": bools(2, 4, 5, 7)}), ValueError, "broadcast"),
    "mask of a wrong shape, five axes": (
        lambda: (*inputs(2, 3), {"attn_mask": bools(3, 1, 1, 5, 7)}), ValueError, "attn_mask must broadcast",
    ),
    "dropout_p above 1": (lambda: (*inputs(2), {"dropout_p": 1.5}), ValueError, "dropout_p"),
    "is_causal is a number": (lambda: (*inputs(2), {"is_causal": 1}), ValueError, "causal"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_raise(name: str) -> None:
    make, error, words = WRONG[name]
    q, k, v, keywords = make()
    with pytest.raises(error, match=words):
        scaled_dot_product_attention(q, k, v, **keywords)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    """The shapes of queries that have reached flash_attention; afterwards the name in torch must be torch's own."""
    found: list[torch.Size] = []
    stock = flash.flash_attention

    def spy(q: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        found.append(q.shape)
        return stock(q, *args, **keywords)

    monkeypatch.setattr(sdpa, "flash_attention", spy)
    yield found
    assert F.scaled_dot_product_attention is STOCK and not sdpa.REPLACED


def test_calls_in_the_scope_are_ours_and_those_outside_are_torchs(served: list[torch.Size]) -> None:
    q, k, v = inputs(2)
    want = F.scaled_dot_product_attention(q, k, v)
    assert not served
    with sdpa.patch():
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v), want)
        assert len(served) == 1
        torch.testing.assert_close(torch.nn.functional.scaled_dot_product_attention(q, k, v), want)
        assert len(served) == 2
    F.scaled_dot_product_attention(q, k, v)
    assert len(served) == 2


def test_the_scope_serves_torchs_modules_but_for_what_it_says(served: list[torch.Size]) -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)
    want = layer(x), attention(x, x, x, need_weights=False)[0]
    with sdpa.patch():
        torch.testing.assert_close((layer(x), attention(x, x, x, need_weights=False)[0]), want)
        assert len(served) == 2
        attention(x, x, x)
        layer.eval(), attention.eval()
        with torch.no_grad():
            layer(x), attention(x, x, x, need_weights=False)
            assert len(served) == 2
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                layer(x), attention(x, x, x, need_weights=False)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
        assert len(served) == 4
        STOCK(x, x, x)
    assert len(served) == 4


def test_an_exception_closes_the_scope(served: list[torch.Size]) -> None:
    with pytest.raises(Stop), sdpa.patch():
        raise Stop
    assert F.scaled_dot_product_attention is STOCK


def test_scopes_nest_and_serve_a_function(served: list[torch.Size]) -> None:
    q, k, v = inputs(2)
    with sdpa.patch():
        with sdpa.patch():
            F.scaled_dot_product_attention(q, k, v)
        F.scaled_dot_product_attention(q, k, v)
    sdpa.patch()(lambda: F.scaled_dot_product_attention(q, k, v))()
    assert len(served) == 3


def test_what_stood_for_the_name_before_stands_for_it_again(
    served: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*args: Any) -> str:
        return "other"

    q, k, v = inputs(2)
    with sdpa.patch(), monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", other)
        with sdpa.patch():
            F.scaled_dot_product_attention(q, k, v)
        assert F.scaled_dot_product_attention(q, k, v) == "other"
    assert len(served) == 1


def test_scopes_overlap_in_threads_and_serve_all_of_them(served: list[torch.Size]) -> None:
    opened, closed, checked = threading.Event(), threading.Event(), []
    q, k, v = inputs(2)

    def other() -> None:
        F.scaled_dot_product_attention(q, k, v)  # in the first thread's scope
        with sdpa.patch():
            opened.set()
            assert closed.wait(30)
            F.scaled_dot_product_attention(q, k, v)  # the first scope is closed, this one is open
        checked.append(F.scaled_dot_product_attention is STOCK)

    thread = threading.Thread(target=other)
    with sdpa.patch():
        thread.start()
        assert opened.wait(30)
    F.scaled_dot_product_attention(q, k, v)  # the other thread's scope is open
    closed.set()
    thread.join(30)
    assert checked == [True] and len(served) == 3


def test_checkpoints_recompute_in_the_scope(served: list[torch.Size]) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2))
    with sdpa.patch():
        o = torch.utils.checkpoint.checkpoint(
            lambda *qkv: F.scaled_dot_product_attention(*qkv), q, k, v, use_reentrant=False
        )
        o.sum().backward()
    assert len(served) == 2


def test_compiled_calls_are_served_in_the_scope_alone() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append("flash" in graph.code)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = inputs(2)
    want = attention(q, k, v)
    assert graphs == [False]
    with sdpa.patch():
        torch.testing.assert_close(attention(q, k, v), want)
    assert graphs == [False, True]
    assert torch.equal(attention(q, k, v), want)
    with sdpa.patch():
        attention(q, k, v)
    assert graphs == [False, True]  # both are kept, and chosen between
    torch._dynamo.reset()


def test_autocast_casts_as_it_does_for_torch(served: list[torch.Size]) -> None:
    q, k, v = (x.float() for x in inputs(2))
    with torch.autocast("cpu", torch.bfloat16):
        want = F.scaled_dot_product_attention(q, k, v)
        with sdpa.patch():
            got = F.scaled_dot_product_attention(q, k, v)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-7)
