"""torch's registry of flash implementations: our kernels have the schemas, outputs and values of torch's operators.

There is no GPU here. The kernels are called with CPU tensors, by themselves and, registered for the CPU, through
torch's own derivatives; and the CPU twin of the flash operator shows that scaled_dot_product_attention finds them.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention
from torch.nn.attention.varlen import AuxRequest, varlen_attn, varlen_attn_out

from flash import dispatch, fused, reference
from flash.integrations import sdpa_registry
from flash.integrations.sdpa_registry import KERNELS
from tests.philox import dropout_mask

ATEN = torch.ops.aten
FLASH, EFFICIENT = "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"
PADDED = 32  # rows of lse that the efficient operator's fake promises
Tensors = list[torch.Tensor]


def schema(name: str) -> Any:
    return getattr(ATEN, name).default._schema


def qkv(
    batch: int = 2, heads: int = 4, heads_k: int = 4, q: int = 19, k: int = 23, d: int = 8,
    dtype: torch.dtype = torch.float64,
) -> Tensors:  # fmt: skip
    sizes = (batch, heads, q, d), (batch, heads_k, k, d), (batch, heads_k, k, d)
    return [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]


def swapped(tensors: Tensors) -> Tensors:
    return [x.transpose(1, 2) for x in tensors]


def oracle(tensors: Tensors, grad: torch.Tensor, bias: torch.Tensor | None = None, **keywords: Any) -> Tensors:
    """o, lse, dq, dk, dv and, with a bias, its gradient, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (*tensors, *(() if bias is None else (bias,)))]
    named = {} if bias is None else {"bias": leaves[3]}
    o, lse = reference.attention(*leaves[:3], return_lse=True, **named, **keywords)
    return [o.detach(), lse.detach(), *torch.autograd.grad(o, leaves, grad.double())]


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_every_registered_kernel_has_the_schema_of_its_op(name: str) -> None:
    parameters = list(inspect.signature(KERNELS[name]).parameters.values())
    arguments = schema(name).arguments
    if KERNELS[name] is sdpa_registry.flash_into:  # `flash` with an argument in front
        assert [p.name for p in parameters] == ["out", "args", "keywords"] and arguments[0].name == "out"
        parameters, arguments = list(inspect.signature(sdpa_registry.flash).parameters.values()), arguments[1:]
    assert [p.name for p in parameters] == [a.name for a in arguments]
    for parameter, argument in zip(parameters, arguments, strict=True):
        assert (parameter.kind is parameter.KEYWORD_ONLY) == argument.kwarg_only
        assert (parameter.default is not parameter.empty) == argument.has_default_value()
        if argument.has_default_value():
            assert parameter.default == argument.default_value


def flash_call(dtype: torch.dtype, packed: bool) -> tuple[Tensors, tuple[Any, ...]]:
    """q, k and v, and what _flash_attention_forward wants after them."""
    if not packed:
        return swapped(qkv(dtype=dtype, heads_k=2)), (None, None, 19, 23, 0.0, True, False)
    q, k, v = (x.transpose(0, 1).flatten(1, 2).transpose(0, 1) for x in qkv(dtype=dtype, heads_k=2))
    starts = [torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 38], [0, 9, 46])]
    return [q.contiguous(), k, v], (*starts, 33, 37, 0.0, True, False)


OUTPUTS: dict[str, tuple[str, Callable[[torch.dtype], tuple[Any, ...]]]] = {
    "sdpa_flash": (FLASH, lambda t: (*qkv(dtype=t), 0.2, False)),
    "sdpa_flash, grouped": (FLASH, lambda t: (*qkv(heads_k=2, dtype=t),)),
    "sdpa_flash, transposed": (FLASH, lambda t: (*swapped(qkv(2, 19, 23, 4, 4, dtype=t)),)),
    "efficient": (EFFICIENT, lambda t: (*qkv(dtype=t), None, True, 0.2)),
    "efficient, without lse": (EFFICIENT, lambda t: (*qkv(dtype=t), None, False)),
    "efficient, whole tiles": (EFFICIENT, lambda t: (*qkv(q=64, dtype=t), None, True)),
    "efficient, transposed": (
        EFFICIENT,
        lambda t: (*swapped(qkv(2, 19, 19, 4, 4, dtype=t)), torch.randn(2, 4, 19, 19).to(t), True),
    ),
    "flash": ("_flash_attention_forward", lambda t: (lambda x, rest: (*x, *rest))(*flash_call(t, False))),
    "flash, packed": ("_flash_attention_forward", lambda t: (lambda x, rest: (*x, *rest))(*flash_call(t, True))),
}  # fmt: skip


def alike(got: Any, want: Any) -> None:
    """The same number of outputs, and the same shapes, dtypes and strides; devices of seeds are left open by torch."""
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        if isinstance(other, torch.Tensor):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
        else:
            assert one == other


def on_meta(args: Any) -> list[Any]:
    return [x.to("meta") if isinstance(x, torch.Tensor) else x for x in args]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_what_torchs_fakes_promise(name: str, dtype: torch.dtype) -> None:
    op, make = OUTPUTS[name]
    args = make(dtype)
    got = KERNELS[op](*args)
    alike(got, getattr(ATEN, op)(*on_meta(args)))
    q, k, v = args[:3]
    o, lse, *rest = got
    do = torch.randn_like(o)
    backward = op.replace("_forward", "") + "_backward"
    if "efficient" in op:
        if not args[4]:
            return
        tail: tuple[Any, ...] = (do, q, k, v, args[3], o, lse, *rest, 0.0, [True, True, True, args[3] is not None])
    elif "scaled" in op:
        tail = (do, q, k, v, o, lse, None, None, q.shape[2], k.shape[2], 0.0, False, *rest[4:6])
    else:
        tail = (do, q, k, v, o, lse, *args[3:7], 0.0, True, *rest[:2])
    # those of the flash operators promise tensors that torch's own kernels leave undefined
    want = getattr(ATEN, backward)(
        *(x if x is not None or "efficient" in op else torch.empty(0) for x in on_meta(tail))
    )
    alike(KERNELS[backward](*tail), want)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("heads_k, seqlen_k, causal", [(4, 23, False), (2, 23, True), (4, 19, True)])
def test_the_cuda_kernels_compute_what_their_ops_say(
    heads_k: int, seqlen_k: int, causal: bool, dropout_p: float
) -> None:
    """The flash slot of scaled_dot_product_attention; causal is aligned to the last key, as in flash-attn."""
    q, k, v = qkv(heads_k=heads_k, k=seqlen_k)
    o, lse, _, _, _, _, state, unused, debug = KERNELS[FLASH](q, k, v, dropout_p, causal, scale=0.4)
    do = torch.randn_like(o)
    found = KERNELS[FLASH + "_backward"](
        do, q, k, v, o, lse, None, None, 19, seqlen_k, dropout_p, causal, state, unused, scale=0.4
    )
    weights = dropout_mask(state.view(torch.int64)[0], dropout_p, 2, 4, 19, seqlen_k) if dropout_p else None
    assert (state != 0).any() == (dropout_p > 0) and debug.numel() == 0
    want = oracle([q, k, v], do, causal=causal, scale=0.4, dropout_mask=weights)
    for got, expected in zip((o, lse, *found), want, strict=True):
        close(got, expected)


BIASES: dict[str, Callable[[], torch.Tensor | None]] = {
    "no bias": lambda: None,
    "bias": lambda: torch.randn(2, 4, 19, 23, dtype=torch.float64),
    "expanded bias": lambda: torch.randn(1, 4, 1, 23, dtype=torch.float64).expand(2, -1, 19, -1),
    "bias that hides": lambda: torch.zeros(2, 4, 19, 23).double().masked_fill(torch.rand(19, 23) < 0.3, -math.inf),
    "aligned bias": lambda: torch.randn(2, 4, 19, 32, dtype=torch.float64),
}


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", BIASES)
def test_the_efficient_kernels_compute_what_their_ops_say(bias: str, dropout_p: float) -> None:
    given = BIASES[bias]()
    seqlen_k = 23 if given is None else given.shape[3]
    q, k, v = qkv(k=seqlen_k)
    o, lse, seed, offset = KERNELS[EFFICIENT](q, k, v, given, True, dropout_p)
    assert lse.shape == (2, 4, PADDED) and bool((lse[..., 19:] == math.inf).all())
    do = torch.randn_like(o)
    asked = [True, True, True, given is not None]
    found = KERNELS[EFFICIENT + "_backward"](do, q, k, v, given, o, lse, seed, offset, dropout_p, asked)
    weights = dropout_mask(seed, dropout_p, 2, 4, 19, seqlen_k) if dropout_p else None
    want = oracle([q, k, v], do, given, dropout_mask=weights)
    for got, expected in zip((o, lse[..., :19], *found[: len(want) - 2]), want, strict=True):
        close(got, expected)
    assert len(found) == 4 and (found[3] is None) == (given is None)
    if given is not None:
        *_, nothing = KERNELS[EFFICIENT + "_backward"](
            do, q, k, v, given, o, lse, seed, offset, dropout_p, [True, True, True, False]
        )
        assert nothing is None


def test_a_causal_efficient_call_is_aligned_to_the_first_key() -> None:
    q, k, v = qkv()
    o, lse, *rest = KERNELS[EFFICIENT](q, k, v, None, True, 0.0, True)
    found = KERNELS[EFFICIENT + "_backward"](o, q, k, v, None, o, lse, *rest, 0.0, [True, True, True, False], True)
    want = oracle([q, k, v], o, causal=True, q_offset=0)
    for got, expected in zip((o, lse[..., :19], *found[:3]), want, strict=True):
        close(got, expected)


def test_an_expanded_bias_is_read_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = []
    stock = dispatch.forward
    monkeypatch.setattr(dispatch, "forward", lambda problem: (problems.append(problem), stock(problem))[1])
    bias = torch.randn(1, 4, 1, 23, dtype=torch.float64)
    KERNELS[EFFICIENT](*qkv(), bias.expand(2, -1, 19, -1), True)
    assert problems[0].mods.bias.shape == bias.shape and problems[0].mods.bias.data_ptr() == bias.data_ptr()


@pytest.mark.parametrize("window", [(None, None), (-1, -1), (4, 0), (-1, 3), (2, -1)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_flash_attention_forward_and_backward(
    packed: bool, window: tuple[int | None, int | None], dropout_p: float
) -> None:
    (q, k, v), (starts_q, starts_k, max_q, max_k, *_) = flash_call(torch.float64, packed)
    call = (starts_q, starts_k, max_q, max_k, dropout_p, False)
    sides = dict(window_size_left=window[0], window_size_right=window[1])
    o, lse, state, unused, _ = KERNELS["_flash_attention_forward"](q, k, v, *call, False, **sides)
    do = torch.randn_like(o)
    found = KERNELS["_flash_attention_backward"](do, q, k, v, o, lse, *call, state, unused, **sides)
    seed = state.view(torch.int64)[0]
    bounded = tuple(None if x is None or x < 0 else x for x in window)
    if not packed:
        weights = dropout_mask(seed, dropout_p, 2, 4, 19, 23) if dropout_p else None
        want = oracle(swapped([q, k, v]), do.transpose(1, 2), window=bounded, dropout_mask=weights)
        for got, expected in zip((*swapped([o]), lse, *swapped(list(found))), want, strict=True):
            close(got, expected)
        return
    for b, (rows, keys) in enumerate(zip(spans(starts_q), spans(starts_k), strict=True)):
        parts = [x[at].transpose(0, 1)[None] for x, at in zip((q, k, v, do), (rows, keys, keys, rows), strict=True)]
        sizes = rows.stop - rows.start, keys.stop - keys.start
        weights = dropout_mask(seed, dropout_p, b + 1, 4, *sizes)[b:] if dropout_p else None
        want = oracle(parts[:3], parts[3], window=bounded, dropout_mask=weights)
        got = [o[rows], lse[:, rows].T[..., None], found[0][rows], found[1][keys], found[2][keys]]
        for one, expected in zip(got, want, strict=True):
            close(one.transpose(0, 1).reshape(expected.shape[1:]), expected[0])


def spans(starts: torch.Tensor) -> list[slice]:
    return [slice(a, b) for a, b in zip(starts.tolist()[:-1], starts.tolist()[1:], strict=True)]


@pytest.fixture
def on_the_cpu() -> Iterator[None]:
    """Our kernels where torch has none: torch's derivatives, fakes and modules above them are its own."""
    handle = sdpa_registry.install("CPU")
    yield
    handle.remove()


def test_torchs_derivatives_reach_the_backward_kernels(on_the_cpu: None) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    bias = torch.randn(2, 4, 19, 23, dtype=torch.float64, requires_grad=True)
    o, lse, *_ = ATEN._scaled_dot_product_efficient_attention(q, k, v, bias, True)
    do = torch.randn_like(o)
    want = oracle([q, k, v], do, bias)
    for got, expected in zip((o, lse[..., :19], *torch.autograd.grad(o, (q, k, v, bias), do)), want, strict=True):
        close(got, expected)
    o, *_ = ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
    want = oracle([q, k, v], do, causal=True)
    for got, expected in zip((o, *torch.autograd.grad(o, (q, k, v), do)), (want[0], *want[2:]), strict=True):
        close(got, expected)


def test_dropout_repeats_in_torchs_backward(on_the_cpu: None) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    for op, rest in (
        (ATEN._scaled_dot_product_efficient_attention, (None, True)),
        (ATEN._scaled_dot_product_flash_attention, ()),
    ):
        o, _, *others = op(q, k, v, *rest, 0.3)
        state = others[0] if rest else others[4]
        mask = dropout_mask(state.view(torch.int64).view(-1)[0], 0.3, 2, 4, 19, 23)
        want = oracle([q, k, v], torch.ones_like(o), dropout_mask=mask)
        for got, expected in zip((o, *torch.autograd.grad(o.sum(), (q, k, v))), (want[0], *want[2:]), strict=True):
            close(got, expected)


def test_compiled_graphs_hold_torchs_ops_and_run_ours(on_the_cpu: None) -> None:
    q, k, v = (x.float().requires_grad_() for x in qkv())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*inputs: torch.Tensor) -> torch.Tensor:
        return ATEN._scaled_dot_product_efficient_attention(*inputs, None, True)[0]

    o = compiled(q, k, v)
    do = torch.randn_like(o)
    want = oracle([q, k, v], do)
    for got, expected in zip((o, *torch.autograd.grad(o, (q, k, v), do)), (want[0], *want[2:]), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (6, 0)], ids=str)
def test_varlen_attn_comes_to_us(on_the_cpu: None, window: tuple[int, int]) -> None:
    (q, k, v), (starts_q, starts_k, max_q, max_k, *_) = flash_call(torch.float64, True)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    lengths = (starts_q, starts_k, max_q, max_k)
    o, lse = varlen_attn(*inputs, *lengths, window_size=window, enable_gqa=True, return_aux=AuxRequest(lse=True))
    do = torch.randn_like(o)
    found = torch.autograd.grad(o, inputs, do)
    out = torch.empty_like(q)
    varlen_attn_out(out, q, k, v, *lengths, window_size=window, enable_gqa=True)
    assert torch.equal(out, o)
    bounded = tuple(None if x < 0 else x for x in window)
    for rows, keys in zip(spans(starts_q), spans(starts_k), strict=True):
        parts = [x[at].transpose(0, 1)[None] for x, at in zip((q, k, v, do), (rows, keys, keys, rows), strict=True)]
        want = oracle(parts[:3], parts[3], window=bounded)
        close(lse[:, rows], want[1][0])
        for got, expected in zip(
            (o[rows], *(x[at] for x, at in zip(found, (rows, keys, keys), strict=True))),
            (want[0], *want[2:]),
            strict=True,
        ):
            close(got.transpose(0, 1), expected[0])


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0)], ids=str)
def test_seqused_k_leaves_the_first_keys(on_the_cpu: None, window: tuple[int, int]) -> None:
    (q, k, v), (starts_q, starts_k, max_q, max_k, *_) = flash_call(torch.float64, True)
    used = torch.tensor([7, 20], dtype=torch.int32)
    o = varlen_attn(q, k, v, starts_q, starts_k, max_q, max_k, window_size=window, enable_gqa=True, seqused_k=used)
    bounded = tuple(None if x < 0 else x for x in window)
    for rows, keys, n in zip(spans(starts_q), spans(starts_k), used.tolist(), strict=True):
        parts = [x[at].transpose(0, 1)[None] for x, at in zip((q, k, v), (rows, keys, keys), strict=True)]
        want = reference.attention(parts[0], parts[1][:, :, :n], parts[2][:, :, :n], window=bounded)
        close(o[rows].transpose(0, 1), want[0])


def test_alibi_slopes_are_served_forward_and_refused_backward(on_the_cpu: None) -> None:
    (q, k, v), rest = flash_call(torch.float64, False)
    slopes = torch.rand(2, 4)
    o, *_ = ATEN._flash_attention_forward(q, k, v, *rest, alibi_slopes=slopes)
    close(o.transpose(1, 2), reference.attention(*swapped([q, k, v]), causal=True, alibi_slopes=slopes.double()))
    with pytest.raises(NotImplementedError, match="alibi_slopes has no place in torch's backward"):
        ATEN._flash_attention_forward(q.requires_grad_(), k, v, *rest, alibi_slopes=slopes)
    with torch.no_grad():
        ATEN._flash_attention_forward(q, k, v, *rest, alibi_slopes=slopes)


def test_what_is_not_served_is_refused_by_name() -> None:
    (q, k, v), rest = flash_call(torch.float64, True)
    with pytest.raises(NotImplementedError, match="block_table is not served"):
        KERNELS["_flash_attention_forward"](q, k, v, *rest, block_table=torch.zeros(2, 1, dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="return_debug_mask is not served"):
        KERNELS["_flash_attention_forward"](q, k, v, *rest[:-1], True)
    with pytest.raises(NotImplementedError, match="return_debug_mask is not served"):
        KERNELS[FLASH](*qkv(), 0.0, False, True)


def test_autocast_leaves_the_kernels_inputs_alone() -> None:
    q, k, v = (x.float() for x in qkv())
    with torch.autocast("cpu", torch.bfloat16):
        o, *_ = KERNELS[EFFICIENT](q, k, v, None, True)
    assert o.dtype == torch.float32
    torch.testing.assert_close(o.double(), reference.attention(*(x.double() for x in (q, k, v))), rtol=1e-5, atol=1e-5)


class Twin:
    """The efficient kernels as torch's flash operator for the CPU, which takes a mask too; it counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float = 0.0,
        is_causal: bool = False, *, attn_mask: torch.Tensor | None = None, scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        self.calls.append("forward")
        o, lse, *_ = sdpa_registry.efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)
        return o, lse[..., : query.shape[2]]

    def backward(
        self, grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
        logsumexp: torch.Tensor, dropout_p: float, is_causal: bool, *, attn_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        self.calls.append("backward")
        call = (grad_out, query, key, value, attn_mask, out, logsumexp, logsumexp, logsumexp, dropout_p)
        found = sdpa_registry.efficient_backward(*call, [True, True, True, False], is_causal, scale=scale)
        return found[:3]  # type: ignore[return-value]

    def install(self) -> sdpa_registry.Handle:
        library = torch.library.Library("aten", "IMPL")
        library.impl("_scaled_dot_product_flash_attention_for_cpu", self.forward, "CPU")
        library.impl("_scaled_dot_product_flash_attention_for_cpu_backward", self.backward, "CPU")
        return sdpa_registry.Handle(library)


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Twin]:
    # the torch backend would call torch's operator, which is the twin now
    for name in ("serves", "serves_backward"):
        monkeypatch.setattr(fused, name, lambda *args: False)
    found = Twin()
    attention.register_flash_attention_impl("flash-triton twin", register_fn=found.install)
    yield found
    attention.restore_flash_attention_impl(_raise_warn=False)
    attention._registry._FLASH_ATTENTION_IMPLS.pop("flash-triton twin")


@pytest.mark.filterwarnings("ignore:Warning only once for all operators:UserWarning")  # that the CPU has a kernel
@pytest.mark.parametrize("keywords", [{}, {"is_causal": True}, {"attn_mask": True}, {"scale": 0.3}], ids=str)
def test_the_cpu_twin_is_called_forward_and_backward(twin: Twin, keywords: dict[str, Any]) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    if "attn_mask" in keywords:
        keywords = {"attn_mask": torch.rand(2, 1, 1, 23) < 0.7}

    def both() -> Tensors:
        o = F.scaled_dot_product_attention(q, k, v, **keywords)
        return [o.detach(), *torch.autograd.grad(o.square().sum(), (q, k, v))]

    want = both()
    assert not twin.calls and attention.current_flash_attention_impl() is None
    attention.activate_flash_attention_impl("flash-triton twin")
    assert attention.current_flash_attention_impl() == "flash-triton twin"
    for got, expected in zip(both(), want, strict=True):
        close(got, expected)
    assert twin.calls == ["forward", "backward"]
    attention.restore_flash_attention_impl()
    for got, expected in zip(both(), want, strict=True):
        assert torch.equal(got, expected)
    assert len(twin.calls) == 2


def test_restoring_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def registered(key: str) -> list[bool]:
        return [torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key) for name in KERNELS]

    monkeypatch.setattr(attention._registry, "_FLASH_ATTENTION_IMPLS", {})  # whatever was registered before
    before = registered("CUDA")
    try:
        sdpa_registry.register()
        sdpa_registry.register("another name")
        assert registered("CUDA") == before  # nothing changes before a name is activated
        for name in ("flash-triton", "another name"):
            attention.activate_flash_attention_impl(name)
            assert attention.current_flash_attention_impl() == name and all(registered("CUDA"))
        attention.restore_flash_attention_impl()
        assert registered("CUDA") == before and attention.current_flash_attention_impl() is None
        handle = sdpa_registry.install("CPU")
        assert all(registered("CPU"))
        handle.remove()
        handle.remove()
        assert not any(registered("CPU"))
    finally:
        attention.restore_flash_attention_impl(_raise_warn=False)
