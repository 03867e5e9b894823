"""flash_attention_decode as users call it: every keyword and pair by the torch backend, and what torch does to it."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from flash import dispatch_step, flash_attention_decode, flash_attention_varlen
from flash.kernels.spec import Config
from flash.reference_cache import Decoded
from tests import decode_cases
from tests.decode_cases import BATCH, CAPACITY, FEATURES, HEAD_DIM, HEAD_DIM_V, HEADS, HEADS_K, Case, draw, numbers

PAIRS = [(), *((name,) for name in FEATURES), *itertools.combinations(FEATURES, 2)]
PAIRS = [names for names in PAIRS if decode_cases.go_together(*names)]
ALL = ("pages of 3", "float8", "append", "interleaved", "cache_batch_idx", "cache_leftpad", "k_scale", "v_scale",
       "window", "alibi_slopes", "softcap", "sinks")  # fmt: skip
BEFORE = ("many queries", "append", "rotary", "cache_leftpad", "not causal")  # positions below 0, which see keys
SMALL = Config(16, 16, 4, 1)

by_torch: dict[str, Any] = {"backend": "torch"}
by_triton: dict[str, Any] = {"backend": "triton", "config": SMALL}


def whole(x: torch.Tensor) -> torch.Tensor:
    """x as float64 on the host: float8 cannot be compared."""
    return x.cpu().double()


def check(got: Decoded, want: Decoded, tolerance: float) -> None:
    """Compare o and lse within a tolerance, and the caches exactly."""
    for name in ("o", "lse"):
        one, other = whole(getattr(got, name)), getattr(want, name)
        assert_close(
            one, other, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text, name=name: name + text
        )
    for name in ("k_cache", "v_cache"):
        assert_close(whole(getattr(got, name)), whole(getattr(want, name)), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("names", [*PAIRS, ALL, BEFORE], ids=" + ".join)
def test_torch_backend_is_the_oracle_with_every_keyword_and_pair(names: tuple[str, ...]) -> None:
    x = decode_cases.case(*names)
    check(x.run(flash_attention_decode, **by_torch), x.oracle(), 1e-12)


@pytest.mark.parametrize("names", [(), ("append", "rotary", "pages of 3"), ALL], ids=" + ".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_backend_rounds_o_once(names: tuple[str, ...], dtype: torch.dtype) -> None:
    x = decode_cases.case(*names, dtype=dtype)
    got, want = x.run(flash_attention_decode, **by_torch), x.oracle()
    assert got.o.dtype == dtype and got.lse.dtype == torch.float32
    unit = torch.finfo(dtype).eps
    assert_close(got.o.double(), want.o, rtol=unit / 2 + 2e-6, atol=2e-6)
    check(got._replace(o=want.o), want, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_are_not_rounded_to_qs_dtype(dtype: torch.dtype) -> None:
    x = decode_cases.case("k_scale", "v_scale", dtype=dtype)
    x.options["k_scale"], x.options["v_scale"] = torch.tensor([1.7, 0.3]), 0.1 + torch.rand(BATCH, HEADS_K)
    got, want = x.run(flash_attention_decode, **by_torch), x.oracle()
    assert_close(got.o.double(), want.o, rtol=torch.finfo(dtype).eps / 2 + 2e-6, atol=2e-6)
    check(got._replace(o=want.o), want, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_cache_may_be_narrower_than_q(dtype: torch.dtype, stored: torch.dtype) -> None:
    x = decode_cases.case("append", "cache_leftpad", dtype=dtype)
    x = x._replace(k_cache=x.k_cache.to(stored), v_cache=x.v_cache.to(stored))
    check(x.run(flash_attention_decode, **by_torch), x.oracle(), 2e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.interpret
@pytest.mark.sampled(24)
@pytest.mark.parametrize("names", [*PAIRS, ALL], ids=" + ".join)
def test_triton_is_the_torch_backend(names: tuple[str, ...], place: Callable[..., torch.Tensor]) -> None:
    here = decode_cases.case(*names, dtype=torch.float32)
    want = here.run(flash_attention_decode, **by_torch)
    options = {name: place(x) if isinstance(x, torch.Tensor) else x for name, x in here.options.items()}
    there = Case(place(here.q), place(here.k_cache), place(here.v_cache), options)
    splits = 1 + len("".join(names)) % 3
    got = there.run(flash_attention_decode, num_splits=splits, **by_triton)
    check(got, want._replace(o=want.o.double(), lse=want.lse.double()), 3e-6)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])
def test_dense_paged_and_packed_say_the_same(backend: str, place: Callable[..., torch.Tensor]) -> None:
    """Sequences of a cache, or one after the other in memory, as flash_attention_varlen takes them."""
    lengths, rows = (11, 20, 2), 2
    keys = [draw(HEADS_K, n, HEAD_DIM, dtype=torch.float32) for n in lengths]
    values = [draw(HEADS_K, n, HEAD_DIM_V, dtype=torch.float32) for n in lengths]
    caches = [torch.zeros(BATCH, HEADS_K, CAPACITY, d) for d in (HEAD_DIM, HEAD_DIM_V)]
    for b, n in enumerate(lengths):
        caches[0][b, :, :n], caches[1][b, :, :n] = keys[b], values[b]
    q, seqlens = place(draw(BATCH, HEADS, rows, HEAD_DIM, dtype=torch.float32)), place(numbers(*lengths))
    options: dict[str, Any] = {"window": (7, 0), "backend": backend, "return_lse": True}
    table, pages = decode_cases.paged(caches, 3)
    dense = flash_attention_decode(q, *map(place, caches), cache_seqlens=seqlens, **options)
    found = flash_attention_decode(q, *map(place, pages), cache_seqlens=seqlens, block_table=place(table), **options)
    starts = [place(numbers(0, *itertools.accumulate(each))) for each in ((rows,) * BATCH, lengths)]
    packed = [place(torch.cat(x, 1).transpose(0, 1).contiguous()) for x in (keys, values)]
    o, lse = flash_attention_varlen(
        q.transpose(1, 2).flatten(0, 1), *packed, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], max_seqlen_q=rows,
        max_seqlen_k=max(lengths), causal=True, **options,
    )  # fmt: skip
    assert_close(found, dense, rtol=1e-6, atol=1e-6)
    assert_close(o.unflatten(0, (BATCH, rows)).transpose(1, 2), dense[0], rtol=2e-6, atol=2e-6)
    assert_close(lse.unflatten(1, (BATCH, rows)).transpose(0, 1), dense[1], rtol=2e-6, atol=2e-6)


def test_what_float8_cannot_hold_is_its_largest() -> None:
    """Also where a small factor makes it so; NaN stays NaN."""
    x = decode_cases.case("append", "float8", "k_scale", dtype=torch.float32)
    x.options["k"][:, :, 0], x.options["k"][:, :, 1], x.options["v"][:, :, 2] = 300.0, -1e30, float("nan")
    got, want = x.run(flash_attention_decode, **by_torch), x.oracle()
    assert (whole(got.k_cache)[0, :, 5] == torch.tensor([448.0, -144.0])[:, None]).all()  # 600, and -150 rounded
    assert (whole(got.k_cache)[0, :, 6] == torch.tensor([-448.0, 448.0])[:, None]).all()
    check(got._replace(o=want.o, lse=want.lse), want, 0.0)


def test_positions_past_the_rotary_tables_make_nan() -> None:
    x = decode_cases.case("append", "rotary", "cache_leftpad")
    for name in ("rotary_cos", "rotary_sin"):
        x.options[name] = x.options[name][:20]
    got = x.run(flash_attention_decode, **by_torch)
    assert got.o[2].isnan().all() and got.o[:2].isfinite().all()  # its last keys are at 20 to 22, its queries at 21, 22
    assert whole(got.k_cache)[2, :, 21:, :6].isnan().all() and whole(got.k_cache)[2, :, 21:, 6:].isfinite().all()
    check(got, x.oracle(), 1e-12)


def test_keys_appended_under_the_padding_turn_as_the_first() -> None:
    x = decode_cases.case("append", "rotary")
    x.options["cache_leftpad"] = numbers(7, 2, 0)
    check(x.run(flash_attention_decode, **by_torch), x.oracle(), 1e-12)


HOSTILE: dict[str, dict[str, Any]] = {
    "a negative length": {"cache_seqlens": -1},
    "the lowest length": {"cache_seqlens": -(2**31)},
    "one key too many": {"cache_seqlens": CAPACITY - decode_cases.NEW + 1},
    "the largest length": {"cache_seqlens": 2**31 - 1},
    "no slot": {"cache_batch_idx": decode_cases.SLOTS},
    "a negative slot": {"cache_batch_idx": -1},
    "negative padding": {"cache_leftpad": -1},
    "more padding than keys": {"cache_leftpad": decode_cases.LENGTHS[0] + decode_cases.NEW + 1},
}


@pytest.mark.parametrize("names", [("append",), ("append", "pages of 3")], ids=" + ".join)
@pytest.mark.parametrize("lie", HOSTILE)
def test_a_bad_sequence_is_nan_and_others_are_as_they_were(names: tuple[str, ...], lie: str) -> None:
    ((name, value),) = HOSTILE[lie].items()
    x = decode_cases.case(*names, *([] if name == "cache_seqlens" else [name]))
    wrong = x.options[name].clone()
    wrong[0] = value
    hostile = x._replace(options={**x.options, name: wrong})
    got, good = (y.run(flash_attention_decode, **by_torch) for y in (hostile, x))
    assert got.o[0].isnan().all() and got.lse[0].isnan().all()
    assert_close((got.o[1:], got.lse[1:]), (good.o[1:], good.lse[1:]), rtol=0, atol=0)
    check(got, hostile.oracle(), 1e-12)


@pytest.mark.parametrize("page", [-1, -(2**31), 2**31 - 1, 42])
@pytest.mark.parametrize(("at", "bad"), [(0, False), (1, True), (2, True), (3, False)])
def test_a_page_that_is_none_matters_where_it_is_seen(page: int, at: int, bad: bool) -> None:
    """Of a sequence of 5 keys and 3 new ones in pages of 3, with a window of two before the first of two queries."""
    x = decode_cases.case("pages of 3", "append")
    x.options["block_table"][0, at] = page
    x.options["window"] = (3, 0)
    got = x.run(flash_attention_decode, **by_torch)
    assert bool(got.o[0].isnan().all()) == bool(got.lse[0].isnan().all()) == bad
    check(got, x.oracle(), 1e-12)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])
def test_sizes_of_nothing(backend: str, device: torch.device) -> None:
    q, cache = draw(2, 4, 3, 8).to(device), draw(2, 2, 5, 8).to(device)
    options: dict[str, Any] = {"backend": backend, "cache_seqlens": numbers(0, 0).to(device)}
    o, lse = flash_attention_decode(q, cache, cache, return_lse=True, **options)
    assert (o == 0).all() and (lse == float("-inf")).all()
    none = cache[:, :, :0]
    assert (flash_attention_decode(q, none, none, **options) == 0).all()
    assert (flash_attention_decode(q, cache, cache, k=none, v=none, **options) == 0).all()
    assert flash_attention_decode(q[:, :, :0], cache, cache, **options).shape == (2, 4, 0, 8)
    assert flash_attention_decode(q[:, :0], cache[:, :0], cache[:, :0], **options).shape == (2, 0, 3, 8)
    options["cache_seqlens"] = options["cache_seqlens"][:0]
    assert flash_attention_decode(q[:0], cache, cache, **options).shape == (0, 4, 3, 8)


def test_the_result_lies_in_memory_as_q_does() -> None:
    x = decode_cases.case("append")
    q = x.q.transpose(1, 2).contiguous().transpose(1, 2)
    o = flash_attention_decode(q, x.k_cache, x.v_cache, **x.options)
    assert o.shape == (BATCH, HEADS, 2, HEAD_DIM_V) and o.transpose(1, 2).is_contiguous()


DERIVATIVES = ("q", "k_cache", "v_cache", "k", "v", "k_scale", "v_scale", "rotary_cos", "rotary_sin", "sinks")


def changed(x: Case, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    """x with one of its tensors changed."""
    if name in x.options:
        return x._replace(options={**x.options, name: change(x.options[name])})
    return x._replace(**{name: change(getattr(x, name))})


@pytest.mark.parametrize("name", [*DERIVATIVES, "alibi_slopes"])
def test_what_asks_for_a_derivative_raises_before_anything_is_written(name: str) -> None:
    x = decode_cases.case("append", "rotary", "k_scale", "v_scale", "alibi_slopes", "sinks")
    before = x.k_cache.clone()
    leaf = changed(x, name, lambda t: t.clone().requires_grad_())
    with pytest.raises(NotImplementedError, match=f"^{name} asks for a derivative.* flash_attention, which has one"):
        flash_attention_decode(*leaf[:3], **leaf.options)
    with torch.no_grad():
        leaf.run(flash_attention_decode)

    def call(t: torch.Tensor) -> Any:
        y = changed(x, name, lambda _: t)
        return flash_attention_decode(*y[:3], **y.options)

    t = x.options[name] if name in x.options else getattr(x, name)
    for transform in (torch.func.grad(lambda t: call(t).sum()), lambda t: torch.func.jvp(call, (t,), (t,))):
        with pytest.raises(NotImplementedError, match=name):
            transform(t)
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(NotImplementedError, match=name):
        call(forward_ad.make_dual(t, t))
    assert_close(x.k_cache, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", ["append", "decode"])
def test_the_raw_ops_refuse_to_lose_a_derivative(op: str) -> None:
    for number, x in enumerate(arguments(op)):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            args = arguments(op)
            args[number] = args[number].requires_grad_()
            with pytest.raises(RuntimeError, match="would be lost"):
                getattr(torch.ops.flash, op)(*args)
            with forward_ad.dual_level(), torch.no_grad(), pytest.raises(RuntimeError, match="would be lost"):
                args[number] = forward_ad.make_dual(x, x)
                getattr(torch.ops.flash, op)(*args)


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_tangent_raises_before_anything_is_written(no_grad: bool, backend: str) -> None:
    x = decode_cases.case("append")
    before = x.k_cache.clone()

    def call(q: torch.Tensor) -> Any:
        return flash_attention_decode(q, x.k_cache, x.v_cache, **x.options)

    def within(q: torch.Tensor) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(call(forward_ad.make_dual(q, q))).tangent

    def around(q: torch.Tensor) -> Any:
        with forward_ad.dual_level():
            return compiled(forward_ad.make_dual(q, q))

    for function, whole in ((within, within), (around, call)):
        torch._dynamo.reset()
        compiled = torch.compile(whole, backend=backend, fullgraph=True)
        with torch.set_grad_enabled(not no_grad), pytest.raises(Exception, match="would be lost"):
            (compiled if function is within else around)(x.q)
    assert_close(x.k_cache, before, rtol=0, atol=0, equal_nan=True)


def test_vmap_raises() -> None:
    x = decode_cases.case("append")
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(lambda q: flash_attention_decode(q, x.k_cache, x.v_cache, cache_seqlens=numbers(5, 0, 9)))(
            torch.stack([x.q, x.q])
        )
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(lambda q: flash_attention_decode(q, x.k_cache, x.v_cache, **x.options))(torch.stack([x.q, x.q]))


def arguments(op: str) -> list[Any]:
    """Arguments of an op, every optional one given."""
    names = ("append", "rotary", "cache_batch_idx", "cache_leftpad", "k_scale", "v_scale", "alibi_slopes", "sinks")
    x = decode_cases.case(*names, "pages of 3")
    caches = [t.nan_to_num(0.5) for t in x[1:3]]  # opcheck takes NaN for a change
    q = x.q.transpose(1, 2).contiguous().transpose(1, 2)
    step = decode_cases.step_of(q, *caches, **x.options, config=SMALL)
    cache, rotary = list(step.cache), list(step.rotary or ())
    if op == "append":
        return [*cache[:2], step.k, step.v, *cache[2:], *rotary, "auto"]
    text = str(tuple(step.spec))
    return [
        step.q, *cache, *rotary, step.mods.alibi_slopes, step.mods.sinks, step.new, step.scale, list(step.positions),
        text, 2, True, "auto", list(map(int, SMALL)),
    ]  # fmt: skip


@pytest.mark.parametrize("op", ["append", "decode"])
def test_opcheck_passes(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.flash, op).default, tuple(arguments(op)))


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("by_op", [False, True])
def test_an_append_is_a_write_that_autograd_knows_of(backend: str, by_op: bool, place: Any) -> None:
    x = decode_cases.case("append", dtype=torch.float32, place=place)
    weight = torch.ones_like(x.k_cache, requires_grad=True)
    product = weight * x.k_cache
    with torch.no_grad(), FlopCounterMode(display=False) if by_op else nullcontext():
        flash_attention_decode(*x[:3], **x.options, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("names", [("append", "pages of 3", "rotary"), ALL], ids=" + ".join)
def test_without_the_ops_a_plain_call_is_the_same(names: tuple[str, ...]) -> None:
    """Torch watches the one, and not the other: bit for bit."""
    x = decode_cases.case(*names, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        want = x.run(flash_attention_decode)
    assert set(counter.get_flop_counts()["Global"]) == {torch.ops.flash.decode}
    got = x.run(flash_attention_decode)
    assert_close(got[:2], want[:2], rtol=0, atol=0)
    check(got, want._replace(o=want.o.double(), lse=want.lse.double()), 0.0)
    with torch.inference_mode():
        inference = x.run(flash_attention_decode)
    assert_close(inference[:2], want[:2], rtol=0, atol=0)


class Loop(torch.nn.Module):
    """Steps of generation on buffers: each appends to what the last one left."""

    def __init__(self, steps: int, capacity: int = CAPACITY) -> None:
        super().__init__()
        self.steps = steps
        self.register_buffer("k_cache", torch.zeros(2, HEADS_K, capacity, HEAD_DIM))
        self.register_buffer("v_cache", torch.zeros(2, HEADS_K, capacity, HEAD_DIM))

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for _ in range(self.steps):
            keys = x[:, ::2] * 0.5
            y = flash_attention_decode(
                x, self.k_cache, self.v_cache, cache_seqlens=lengths, k=keys, v=keys + 1, window=9, softcap=3.0
            )
            lengths = lengths + x.shape[2]
            x = x + torch.tanh(y) + self.k_cache.sum()  # type: ignore[operator]
        return x, lengths


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole_the_appends_are_seen(dynamic: bool) -> None:
    torch._dynamo.reset()
    eager, loop = Loop(3), Loop(3)
    compiled = torch.compile(loop, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for rows in (1, 2) if dynamic else (1,):
            x, lengths = torch.randn(2, HEADS, rows, HEAD_DIM), numbers(3, 0)
            assert_close(compiled(x, lengths), eager(x, lengths))
            assert_close(loop.k_cache, eager.k_cache, rtol=0, atol=0)
            assert_close(loop.v_cache, eager.v_cache, rtol=0, atol=0)
    assert eager.k_cache.count_nonzero() > 0


@pytest.mark.parametrize("dynamic", [True, pytest.param(None, marks=pytest.mark.slow)])
def test_compiled_with_every_keyword_whatever_the_numbers(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    x = decode_cases.case(*ALL, dtype=torch.float32)

    def call(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, **options: Any) -> Any:
        return flash_attention_decode(q, k_cache, v_cache, **options)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n in (2, 3, 5):
        numbers_of = {"scale": 0.1 * n, "softcap": n / 2, "window": (n, None), "num_splits": n}
        y = x._replace(q=draw(BATCH, HEADS, n, HEAD_DIM, dtype=torch.float32), options={**x.options, **numbers_of})
        want = y.run(call)
        check(y.run(compiled), want._replace(o=want.o.double(), lse=want.lse.double()), 1e-6)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_it_is_two_nodes_and_writes_to_its_buffers(strict: bool) -> None:
    eager, loop = Loop(1), Loop(1)
    x, lengths = torch.randn(2, HEADS, 1, HEAD_DIM), numbers(3, 0)
    with torch.no_grad():
        program = torch.export.export(loop, (x, lengths), strict=strict)
        nodes = [str(node.target) for node in program.graph.nodes if "flash" in str(node.target)]
        assert nodes == ["flash.append.default", "flash.decode.default"], program.graph
        module = program.module()
        assert_close(module(x, lengths), eager(x, lengths))
    assert_close(module.k_cache, eager.k_cache, rtol=0, atol=0)
    assert eager.k_cache.count_nonzero() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_q_k_and_v_and_not_the_cache(dtype: torch.dtype) -> None:
    x = decode_cases.case("append", "rotary", dtype=torch.float32)
    lower = x._replace(k_cache=x.k_cache.to(dtype), v_cache=x.v_cache.to(dtype))
    with torch.autocast("cpu", dtype):
        got = lower.run(flash_attention_decode)
    options = {name: t.to(dtype) if name in ("k", "v") else t for name, t in x.options.items()}
    want = lower._replace(q=x.q.to(dtype), options=options).run(flash_attention_decode)
    assert got.o.dtype == dtype
    check(got, want._replace(o=want.o.double(), lse=want.lse.double()), 0.0)


class NoWaiting(TorchFunctionMode):
    """Raises where a tensor's numbers are asked for on the host, but inside launches: an interpreter reads them."""

    WAITS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero", "equal")
    launching = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert self.launching or name not in self.WAITS, f"waits for the device: {name}"
        return func(*args, **(kwargs or {}))


@pytest.mark.interpret(gpu=False)
@pytest.mark.parametrize("names", [("append",), ALL], ids=" + ".join)
def test_nothing_waits_for_the_device(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from flash.kernels import launch as started

    mode = NoWaiting()

    def aside(launch: Callable[..., Any]) -> Callable[..., Any]:
        def launched(*args: Any, **options: Any) -> Any:
            mode.launching = True
            try:
                return launch(*args, **options)
            finally:
                mode.launching = False

        return launched

    monkeypatch.setattr(started, "launch", aside(started.launch))
    x = decode_cases.case(*names, dtype=torch.float32)
    want = x.oracle()
    with mode:  # the ops' own bodies: torch sets the mode aside below an op
        step = decode_cases.step_of(*x[:3], **x.options, backend="triton", config=SMALL)
        assert step.k is not None and step.v is not None
        dispatch_step.append(step.k, step.v, step.cache, step.rotary, "triton")
        o, lse = dispatch_step.decode(step)
    check(Decoded(o, lse, *x[1:3]), want, 3e-6)
    with mode, pytest.raises(AssertionError, match="tolist"):
        x.options["cache_seqlens"].tolist()


@pytest.mark.gpu
def test_a_call_never_waits_for_the_gpu(place: Callable[..., torch.Tensor]) -> None:
    x = decode_cases.case(*ALL, dtype=torch.float16, place=place)
    flash_attention_decode(*x[:3], **x.options, backend="triton")  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attention_decode(*x[:3], **x.options, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_other_lengths() -> None:
    x = decode_cases.case("append", "pages of 3", dtype=torch.float16, place=torch.Tensor.cuda)
    want = [x._replace(options={**x.options, "cache_seqlens": numbers(*n)}) for n in ((5, 0, 21), (1, 20, 4))]
    wanted = [y.run(flash_attention_decode, backend="triton") for y in want]
    caches = [t.clone() for t in x[1:3]]
    lengths = x.options["cache_seqlens"]
    for _ in range(2):
        flash_attention_decode(x.q, *caches, **x.options, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = flash_attention_decode(x.q, *caches, **x.options, backend="triton")
    for y, expected in zip(want, wanted, strict=True):
        for cache, fresh in zip(caches, x[1:3], strict=True):
            cache.copy_(fresh)
        lengths.copy_(y.options["cache_seqlens"])
        graph.replay()
        assert_close(o, expected.o, rtol=0, atol=0, equal_nan=True)


def test_flops_are_counted_over_the_keys_there_are() -> None:
    x = decode_cases.case("append")
    with FlopCounterMode(display=False) as counter:
        flash_attention_decode(*x[:3], **x.options)
    keys = sum(x.options["cache_seqlens"].tolist()) + BATCH * decode_cases.NEW
    assert counter.get_total_flops() == 2 * HEADS * 2 * keys * (HEAD_DIM + HEAD_DIM_V)
