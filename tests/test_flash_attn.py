"""flash-attn's functions by flash_attention: its signatures, layout and alignment, and a slice of its own test cases.

Where flash-attn is installed on a GPU, its whole test file runs against us: put the functions of
`flash.integrations.flash_attn` in the place of those of `flash_attn` and `flash_attn.flash_attn_interface` in a
conftest.py beside it, and make `normalize_flash_attn_S` of the file return its first argument: it scales the weights by
that kernel's own tiles, and ours are scaled. `flash_attn_with_kvcache` has tests/test_kvcache.py.
"""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flash
from flash.integrations import flash_attn
from flash.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from tests.bounds import Inputs, check, differentiate, oracle, standard
from tests.philox import keep_mask

COMMON = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {  # of flash_attn/flash_attn_interface.py
    "flash_attn_func": f"q, k, v, {COMMON}",
    "flash_attn_kvpacked_func": f"q, kv, {COMMON}",
    "flash_attn_qkvpacked_func": f"qkv, {COMMON}",
    "flash_attn_varlen_func": f"q, k, v, {LENGTHS}, {COMMON}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {LENGTHS}, {COMMON}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {COMMON}",
}
INF = float("inf")
STARTS_Q, STARTS_K = (0, 5, 5, 30, 41), (0, 9, 12, 20, 54)  # the second sequence has no query


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_signature_is_fa2s(name: str) -> None:
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    found = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert ", ".join(found) == SIGNATURES[name]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def dense(
    seqlen_q: int = 19, seqlen_k: int = 23, heads: int = 4, heads_k: int = 2, d: int = 8, batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> list[torch.Tensor]:  # fmt: skip
    """q, k and v as flash-attn lays them out."""
    sizes = (batch, seqlen_q, heads, d), (batch, seqlen_k, heads_k, d), (batch, seqlen_k, heads_k, d)
    return [torch.randn(size).to(dtype) for size in sizes]


def starts(positions: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(positions, dtype=torch.int32)


def packed(
    heads: int = 4, heads_k: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[list[torch.Tensor], list[Any]]:
    """Packed q, k and v, and the four lengths."""
    sizes = (STARTS_Q[-1], heads, 8), (STARTS_K[-1], heads_k, 8), (STARTS_K[-1], heads_k, 8)
    return [torch.randn(size).to(dtype) for size in sizes], [starts(STARTS_Q), starts(STARTS_K), 25, 34]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # flash-attn's keywords, and flash_attention's
    "nothing": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_size": (3, 2)}, {"window": (3, 2)}),
    "window of one side": ({"window_size": (3, 0)}, {"window": (3, 0)}),
    "window of the other": ({"window_size": (0, 2)}, {"window": (0, 2)}),
    "window to the left": ({"window_size": (4, -1)}, {"window": (4, None)}),
    "window to the right": ({"window_size": (-1, 2)}, {"window": (None, 2)}),
    "causal window": ({"window_size": (5, 0), "causal": True}, {"window": (5, 0), "causal": True}),
    "causal wins over the right": ({"window_size": (5, 3), "causal": True}, {"window": (5, 3), "causal": True}),
    "window of tensors": ({"window_size": torch.tensor([3, 2])}, {"window": (3, 2)}),
    "scale": ({"softmax_scale": 0.7}, {"scale": 0.7}),
    "softcap": ({"softcap": 1.5}, {"softcap": 1.5}),
    "softcap below zero": ({"softcap": -1.0}, {}),
    "slopes": ({"alibi_slopes": torch.tensor([0.5, 0.3, 0.2, 0.1])},) * 2,
    "deterministic": ({"deterministic": True, "causal": True}, {"causal": True}),
}


def swap(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.transpose(1, 2) for x in tensors]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("name", CASES)
def test_every_function_equals_the_oracle(name: str, kind: str, dtype: torch.dtype) -> None:
    theirs, ours = CASES[name]
    (q, k, v), lengths = (dense(dtype=dtype), []) if kind == "dense" else packed(dtype=dtype)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
        keywords = {**theirs, **{n: x for n, x in options.items() if n == "alibi_slopes"}, "return_attn_probs": True}
        if kind == "packed":
            o, lse, _ = flash_attn_varlen_func(q, k, v, *lengths, **keywords)
        else:
            o, lse, _ = flash_attn_func(*swap(q, k, v), **keywords)
            o = o.transpose(1, 2)
        return o, lse.masked_fill(lse == INF, -INF)

    do = torch.randn_like(q)
    options = {**dict(zip(LENGTHS.split(", "), lengths, strict=False)), **ours}
    x = Inputs(q, k, v, do, options=options) if lengths else Inputs(*swap(q, k, v, do), options=options)
    x = x._replace(dlse=torch.randn(x.q.shape[:-1] if not lengths else x.q.shape[1::-1]).to(torch.float64))
    check(differentiate(attention, x), x)


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(2, 5), (5, 2)])
def test_causal_is_aligned_to_the_last_key(seqlen_q: int, seqlen_k: int) -> None:
    """The two pictures of flash-attn's docstring."""
    seen = {(2, 5): ["11110", "11111"], (5, 2): ["00", "00", "00", "10", "11"]}[seqlen_q, seqlen_k]
    q, k, _ = dense(seqlen_q, seqlen_k)
    v = torch.eye(seqlen_k, dtype=q.dtype)[None, :, None].expand(2, -1, 2, -1)  # o is the weights
    o = flash_attn_func(q, k, v, causal=True)
    assert isinstance(o, torch.Tensor)
    for picture, weights in zip(seen, o.transpose(0, 1), strict=True):
        assert torch.equal(weights > 0, torch.tensor([c == "1" for c in picture]).expand_as(weights))
        assert "1" in picture or not weights.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_return_attn_probs_answers_as_fa2_does(dtype: torch.dtype) -> None:
    q, k, v = dense(dtype=dtype)
    found = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert isinstance(found, tuple) and len(found) == 3
    o, lse, weights = found
    assert torch.equal(o, flash_attn_func(q, k, v, causal=True))
    assert lse.shape == (2, 4, 19) and lse.dtype == torch.float32
    assert weights.shape == (0,) and weights.dtype == dtype
    *_, lse, _ = flash_attn_func(q, k[:, :7], v[:, :7], causal=True, return_attn_probs=True)
    assert bool((lse[..., :12] == INF).all() and lse[..., 12:].isfinite().all())  # those see no key
    (q, k, v), lengths = packed(dtype=dtype)
    _, lse, weights = flash_attn_varlen_func(q, k, v, *lengths, return_attn_probs=True)
    assert lse.shape == (4, 41) and lse.dtype == torch.float32 and weights.shape == (0,)


@pytest.mark.parametrize("seqlen_k", [23, 600])
def test_dropped_weights_are_negative_in_s_dmask(seqlen_k: int) -> None:
    q, k, v = dense(seqlen_k=seqlen_k)
    torch.manual_seed(5)
    want = flash_attn_func(q, k, v, 0.3, causal=True)
    after = torch.rand(())
    torch.manual_seed(5)
    o, _, found = flash_attn_func(q, k, v, 0.3, causal=True, return_attn_probs=True)
    assert torch.equal(o, want) and torch.equal(after, torch.rand(()))  # it draws what it draws without
    assert found.shape == (2, 4, 128, -(-seqlen_k // 128) * 128) and not found[:, :, 19:].any()
    assert not found[..., seqlen_k:].any()
    weights = found[:, :, :19, :seqlen_k]
    dropped = weights.clamp(min=0) / 0.7
    torch.testing.assert_close(dropped @ swap(v)[0].repeat_interleave(2, 1), o.transpose(1, 2))
    torch.testing.assert_close(weights.abs().sum(-1), torch.ones(2, 4, 19).double())
    torch.manual_seed(5)
    keep = keep_mask(torch.randint(0, 2**63 - 1, (1,)), 0.3, 2, 4, 19, seqlen_k)
    assert torch.equal(weights >= 0, keep | (weights == 0))


def test_packed_s_dmask_is_by_sequence() -> None:
    (q, k, v), lengths = packed()
    torch.manual_seed(5)
    o, _, found = flash_attn_varlen_func(q, k, v, *lengths, 0.3, return_attn_probs=True)
    assert found.shape == (4, 4, 128, 128)
    for b, (rows, keys) in enumerate(zip(spans(STARTS_Q), spans(STARTS_K), strict=True)):
        n, m = rows.stop - rows.start, keys.stop - keys.start
        weights = found[b, :, :n, :m]
        assert not found[b, :, n:].any() and not found[b, :, :, m:].any()
        values = v[keys].transpose(0, 1).repeat_interleave(2, 0)
        torch.testing.assert_close(weights.clamp(min=0) / 0.7 @ values, o[rows].transpose(0, 1))


def spans(positions: tuple[int, ...]) -> list[slice]:
    return [slice(*pair) for pair in zip(positions[:-1], positions[1:], strict=True)]


KEYWORDS: dict[str, Any] = {
    "dropout_p": 0.2, "softmax_scale": 0.5, "causal": True, "window_size": (6, 0), "softcap": 2.0,
    "alibi_slopes": torch.tensor([0.5, 0.3, 0.2, 0.1]), "deterministic": True,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_packed_functions_equal_their_parts(kind: str) -> None:
    """Values, and gradients of the one tensor they come from; keywords by position."""
    keywords = tuple(KEYWORDS.values())
    for heads_k in (4, 2):
        if kind == "dense":
            (q, k, v), axis = dense(19, 19, heads_k=heads_k), 2
            whole: tuple[Any, ...] = (flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func)
            lengths: list[list[Any]] = [[], [], []]
        else:
            (q, k, v), ((_, cu, _, most), axis) = packed(heads_k=heads_k)[0], (packed()[1], 1)
            q = torch.randn(54, 4, 8, dtype=torch.float64)
            whole = flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func
            lengths = [[cu, cu, most, most]] * 2 + [[cu, most]]
        parts = [x.requires_grad_() for x in (q, k, v)]
        groups: list[list[torch.Tensor]] = [parts, [q, torch.stack(parts[1:], axis)]]
        if heads_k == 4:
            groups.append([torch.stack(parts, axis)])
        results = []
        for function, tensors, rest in zip(whole, groups, lengths, strict=False):
            torch.manual_seed(1)
            o, lse, weights = function(*tensors, *rest, *keywords, True)
            results.append([o, lse, weights, *torch.autograd.grad(o.square().sum() + lse.sum(), parts)])
        for found in results[1:]:
            for got, want in zip(found, results[0], strict=True):
                assert torch.equal(got, want)


def slopes(batch: int, heads: int) -> torch.Tensor:
    return torch.rand(batch, heads) * 0.3


SLICE = [  # seqlen_q, seqlen_k, head_dim, heads_k, dropout_p, and which of causal, local, alibi, softcap, deterministic
    (97, 97, 32, 6, 0.0, ""),
    (97, 97, 59, 6, 0.17, "causal"),
    (113, 203, 64, 2, 0.0, "causal local"),
    (128, 217, 40, 1, 0.17, "local"),
    (113, 211, 111, 6, 0.0, "alibi deterministic"),
    (108, 256, 32, 2, 0.17, "causal alibi"),
    (256, 108, 64, 1, 0.0, "causal"),
    (128, 128, 80, 2, 0.0, "softcap"),
    (113, 203, 59, 6, 0.0, "softcap causal local alibi"),
    (1, 239, 128, 1, 0.0, "causal"),
    (3, 799, 64, 6, 0.0, "local"),
    (203, 113, 160, 2, 0.0, "alibi local causal deterministic"),
]


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("case", SLICE, ids=str)
def test_a_slice_of_fa2s_own_tests(case: tuple[Any, ...], kind: str, dtype: torch.dtype) -> None:
    """test_flash_attn_output and test_flash_attn_varlen_output by their rule: no more than twice (of gradients three
    times) the error that the same formula in this dtype makes, and 1e-5; padded rows are cut away before."""
    seqlen_q, seqlen_k, d, heads_k, dropout_p, names = case
    batch, heads = 2, 6
    theirs: dict[str, Any] = {"causal": "causal" in names, "deterministic": "deterministic" in names}
    ours: dict[str, Any] = {"causal": "causal" in names}
    if "local" in names:
        theirs["window_size"] = torch.randint(0, seqlen_k, (2,))  # a tensor, as there
        ours["window"] = tuple(theirs["window_size"].tolist())
    if "softcap" in names:
        theirs["softcap"] = ours["softcap"] = 50.0
    q, k, v = dense(seqlen_q, seqlen_k, heads, heads_k, d, batch, torch.float32)
    q, k, v = (x.to(dtype) for x in (q * ours.get("softcap", 1.0), k, v))
    alibi = slopes(batch, heads) if "alibi" in names else None
    do = torch.randn_like(q)
    if kind == "dense":
        rows, keys = [slice(0, seqlen_q)] * batch, [slice(0, seqlen_k)] * batch
        inputs = [x.requires_grad_() for x in (q, k, v)]
        o, lse, found = flash_attn_func(*inputs, dropout_p, alibi_slopes=alibi, return_attn_probs=True, **theirs)
        gradients = torch.autograd.grad(o, inputs, do)
    else:  # lengths of padded sequences, within 20 of the longest
        lengths_q, lengths_k = ([max(1, n - 13), n] for n in (seqlen_q, seqlen_k))
        rows, keys = [slice(0, n) for n in lengths_q], [slice(0, n) for n in lengths_k]
        flat = [
            torch.cat([x[b, at[b]] for b in range(batch)]) for x, at in ((q, rows), (k, keys), (v, keys), (do, rows))
        ]
        inputs = [x.requires_grad_() for x in flat[:3]]
        lengths = [starts((0, n[0], n[0] + n[1])) for n in (lengths_q, lengths_k)]
        o, lse, found = flash_attn_varlen_func(
            *inputs, *lengths, seqlen_q, seqlen_k, dropout_p, alibi_slopes=alibi, return_attn_probs=True, **theirs
        )
        gradients = torch.autograd.grad(o, inputs, flat[3])
        o, *gradients = (
            x.split(n) for x, n in zip((o, *gradients), (lengths_q, lengths_q, lengths_k, lengths_k), strict=True)
        )  # type: ignore[assignment]
    fractions = []
    for b in range(batch):
        at = rows[b], keys[b], keys[b], rows[b]
        tensors = [x[b, part][None].transpose(1, 2).detach() for x, part in zip((q, k, v, do), at, strict=True)]
        options = {**ours, **({} if alibi is None else {"alibi_slopes": alibi[b : b + 1]})}
        if dropout_p:
            kept = found[b : b + 1, :, rows[b], keys[b]] >= 0
            options["dropout_mask"] = kept.double() / (1 - dropout_p)
            fractions.append(1 - float(kept[found[b : b + 1, :, rows[b], keys[b]] != 0].double().mean()))
        x = Inputs(*tensors, options=options)
        want, plain = oracle(x), standard(x)
        for name, got in zip(("o", "dq", "dk", "dv"), (o, *gradients), strict=True):
            exact, other = (getattr(y, name).double() for y in (want, plain))
            error = float((got[b].detach()[None].transpose(1, 2).double() - exact).abs().max())
            assert error <= (2 if name == "o" else 3) * float((other - exact).abs().max()) + 1e-5, name
    for fraction in fractions:
        assert abs(fraction - dropout_p) <= 0.02


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_nothing_is_copied_on_the_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    name = "flash_attention" if kind == "dense" else "flash_attention_varlen"
    stock = getattr(flash, name)

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: Any) -> Any:
        found.update(q=q, k=k, v=v, **keywords)
        return stock(q, k, v, **keywords)

    monkeypatch.setattr(flash_attn, name, spy)
    if kind == "dense":
        qkv = torch.randn(2, 19, 3, 4, 8)[..., ::2]
        o = flash_attn_qkvpacked_func(qkv, alibi_slopes=torch.rand(2, 4), causal=True)
        parts = [qkv[:, :, n].transpose(1, 2) for n in range(3)]
        assert isinstance(o, torch.Tensor) and o.is_contiguous() and o.shape == (2, 19, 4, 4)
    else:
        qkv = torch.randn(54, 3, 4, 8)[..., ::2]
        flash_attn_varlen_qkvpacked_func(qkv, starts(STARTS_K), 34, causal=True)
        parts = [qkv[:, n] for n in range(3)]
    for name, part in zip("qkv", parts, strict=True):
        assert (found[name].data_ptr(), found[name].shape, found[name].stride()) == (
            part.data_ptr(), part.shape, part.stride(),
        )  # fmt: skip
    assert found["window"] is None and found["softcap"] is None and found["deterministic"] is None


def test_an_empty_batch_and_no_keys_are_served() -> None:
    q, k, v = (x.requires_grad_() for x in dense(batch=0))
    o, lse, weights = flash_attn_func(q, k, v, 0.1, return_attn_probs=True)
    assert o.shape == q.shape and lse.shape == (0, 4, 19) and weights.shape == (0, 4, 128, 128)
    o.sum().backward()
    q, k, v = (x.requires_grad_() for x in dense(seqlen_k=0))
    o, lse, weights = flash_attn_func(q, k, v, 0.1, return_attn_probs=True)
    assert not o.any() and bool((lse == INF).all()) and weights.shape == (2, 4, 128, 0)
    o.sum().backward()
    assert q.grad is not None and not q.grad.any()


def test_compiled_without_a_graph_break() -> None:
    q, k, v = dense(dtype=torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return flash_attn_func(q, k, v, causal=True, window_size=(5, 0), softcap=2.0)

    torch.testing.assert_close(attention(q, k, v), flash_attn_func(q, k, v, 0.0, None, True, (5, 0), 2.0))
    torch._dynamo.reset()


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "three axes": (lambda: flash_attn_func(*(x[0] for x in dense())), ValueError, "q must be .batch, seqlen, heads"),
    "four axes": (lambda: flash_attn_varlen_func(*dense(), *packed()[1]), ValueError, "q must be .total, heads"),
    "kv of three": (
        lambda: flash_attn_kvpacked_func(dense()[0], torch.randn(2, 23, 3, 2, 8)), ValueError, "kv must be .*, 2, h",
    ),
    "qkv of two": (lambda: flash_attn_qkvpacked_func(torch.randn(2, 23, 2, 2, 8)), ValueError, "qkv must be .*, 3, h"),
    "heads that do not divide": (lambda: flash_attn_func(*dense(heads_k=3)), ValueError, "divides q's 4"),
    "block_table": (
        lambda: flash_attn_varlen_func(*packed()[0], *packed()[1], block_table=torch.zeros(4, 1, dtype=torch.int32)),
        NotImplementedError, "block_table is not served",
    ),
    "three slopes": (lambda: flash_attn_func(*dense(), alibi_slopes=torch.ones(3)), ValueError, "alibi_slopes must"),
    "a window of one side": (lambda: flash_attn_func(*dense(), window_size=2), ValueError, "window_size must be .left"),
    "softcap None": (lambda: flash_attn_func(*dense(), softcap=None), ValueError, "softcap must be a float"),
    "dropout_p of 1": (lambda: flash_attn_func(*dense(), 1.0), ValueError, "dropout_p"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_raise(name: str) -> None:
    call, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        call()
