"""Packed sequences at the front door: what is refused, what hostile lengths become, and that every keyword arrives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask

from flash import flash_attention, flash_attention_varlen, mods, reference
from flash.problem import Problem
from tests.philox import dropout_mask

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.interpret)]
LENGTHS_Q, LENGTHS_K = (5, 0, 9, 3), (7, 4, 9, 0)
TOTAL_Q, TOTAL_K = sum(LENGTHS_Q), sum(LENGTHS_K)
Place = Callable[[torch.Tensor], torch.Tensor]


def starts(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed(heads_k: int = 2, head_dim_v: int = 6) -> dict[str, Any]:
    return {
        "q": torch.randn(TOTAL_Q, 4, 8, dtype=torch.float64),
        "k": torch.randn(TOTAL_K, heads_k, 8, dtype=torch.float64),
        "v": torch.randn(TOTAL_K, heads_k, head_dim_v, dtype=torch.float64),
        "cu_seqlens_q": starts(*LENGTHS_Q),
        "cu_seqlens_k": starts(*LENGTHS_K),
        "max_seqlen_q": max(LENGTHS_Q),
        "max_seqlen_k": max(LENGTHS_K),
    }


def moved(call: dict[str, Any], place: Place) -> dict[str, Any]:
    return {name: place(x) if isinstance(x, torch.Tensor) else x for name, x in call.items()}


WRONG: dict[str, dict[str, Any]] = {
    "cu_seqlens_q must be a torch.Tensor, got list": {"cu_seqlens_q": [0, 5, 5, 14, 17]},
    "cu_seqlens_k must be a torch.Tensor, got NoneType": {"cu_seqlens_k": None},
    "cu_seqlens_q must be of dtype int32, got int64": {"cu_seqlens_q": starts(*LENGTHS_Q).long()},
    "cu_seqlens_k must be of dtype int32, got float32": {"cu_seqlens_k": starts(*LENGTHS_K).float()},
    r"cu_seqlens_q must have shape \[batch \+ 1\], one sequence at least, got \[1\]": {"cu_seqlens_q": starts()},
    r"cu_seqlens_k must have shape \[batch \+ 1\], one sequence at least, got \[5, 1\]": {
        "cu_seqlens_k": starts(*LENGTHS_K)[:, None]
    },
    "cu_seqlens_k must have length 5 like cu_seqlens_q, got 4": {"cu_seqlens_k": starts(7, 4, 9)},
    "cu_seqlens_q must be on device cpu like q, got meta": {"cu_seqlens_q": starts(*LENGTHS_Q).to("meta")},
    "max_seqlen_q must be an int >= 0, got -1": {"max_seqlen_q": -1},
    "max_seqlen_k must be an int >= 0, got 9.0": {"max_seqlen_k": 9.0},
    "max_seqlen_k must be an int >= 0, got None": {"max_seqlen_k": None},
    "max_seqlen_q must be an int >= 0, got True": {"max_seqlen_q": True},
    r"q must have 2 or 3 dimensions, .*, got shape \[1, 17, 4, 8\]": {"q": torch.randn(1, 17, 4, 8)},
    r"k must have 3 dimensions like q, got shape \[20, 8\]": {"k": torch.randn(20, 8)},
    "v must have total_k 20 like k, got 19": {"v": torch.randn(19, 2, 6, dtype=torch.float64)},
    "v must have heads_k 2 like k, got 4": {"v": torch.randn(20, 4, 6, dtype=torch.float64)},
    "k must have a number of heads that divides q's 4, got 3": packed(heads_k=3),
    r"q_offset must have shape \[\] or \[4\] \(batch\), got \[17\]": {"q_offset": torch.zeros(17, dtype=torch.int32)},
    r"mask must broadcast to \[batch, heads, seqlen_q, seqlen_k\] = \[4, 4, 9, 9\], got shape \[17, 20\]": {
        "mask": torch.ones(17, 20, dtype=torch.bool)
    },
    r"bias must broadcast to .* = \[4, 4, 9, 9\], got shape \[3, 1, 9\]": {"bias": torch.ones(3, 1, 9)},
    r"alibi_slopes must have shape \[4\] \(heads\) or \[4, 4\] \(batch, heads\), got \[1, 4\]": {
        "alibi_slopes": torch.ones(1, 4)
    },
    r"block_mask must be made for \(seqlen_q, seqlen_k\) = \(17, 20\), got \(9, 9\)": {
        "block_mask": create_block_mask(lambda b, h, i, j: i >= j, None, None, 9, 9, "cpu")
    },
    r"block_mask must have B in \(1, 1\) and H in \(1, 4\), got \(B, H\) = \(4, 1\)": {
        "block_mask": create_block_mask(lambda b, h, i, j: i >= j, 4, None, 17, 20, "cpu")
    },
    "return_lse must be True or False, got 1": {"return_lse": 1},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_named_with_what_was_expected_and_what_came(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flash_attention_varlen(**packed() | WRONG[message])


def test_lengths_are_asked_for_by_name() -> None:
    call = packed()
    del call["cu_seqlens_k"]
    with pytest.raises(TypeError, match="cu_seqlens_k"):
        flash_attention_varlen(**call)
    with pytest.raises(TypeError, match="cu_seqlens_q"):
        flash_attention(call["q"], call["k"], call["v"], cu_seqlens_q=call["cu_seqlens_q"])  # type: ignore[call-arg]


HOSTILE = {
    "right": ([0, 5, 5, 14, 17], [0, 5, 5, 14, 17], [0, 0, 0, 0]),
    "not from 0": ([2, 5, 5, 14, 15], [2, 5, 5, 14, 15], [0, 0, 0, 0]),
    "decreasing": ([0, 9, 4, 14, 17], [0, 9, 9, 14, 17], [0, 1, 1, 0]),
    "past the end": ([0, 5, 5, 14, 18], [0, 5, 5, 14, 17], [0, 0, 0, 1]),
    "negative": ([-1, 5, 5, 14, 17], [0, 5, 5, 14, 17], [1, 0, 0, 0]),
    "huge": ([0, 2**31 - 1, 5, 14, 17], [0, 17, 17, 17, 17], [1, 1, 1, 1]),
    "all of it": ([-(2**31), 2**31 - 1, 3, -7, 18], [0, 17, 17, 17, 17], [1, 1, 1, 1]),
}


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("name", HOSTILE)
def test_starts_never_decrease_or_leave_the_tensor_and_who_said_otherwise_is_bad(name: str, side: str) -> None:
    given, safe, bad = HOSTILE[name]
    call = packed()
    call |= {"k": call["k"][:17], "v": call["v"][:17], "cu_seqlens_k": starts(*LENGTHS_Q)}
    call[f"cu_seqlens_{side}"] = torch.tensor(given, dtype=torch.int32)
    mods = Problem.of(**call).mods
    found = mods.starts_q if side == "q" else mods.starts_k
    assert found.dtype == torch.int32 and found.tolist() == safe
    assert mods.bad.tolist() == [bool(x) for x in bad]
    assert torch.equal(mods.q_offset, mods.starts_k.diff() - mods.starts_q.diff())


@pytest.mark.parametrize("name", ["mask", "bias"])
def test_a_sequence_longer_than_an_axis_of_the_mask_or_bias_is_bad(name: str) -> None:
    def bad(shape: tuple[int, ...], **keywords: int) -> list[bool]:
        x = torch.ones(shape, dtype=torch.bool if name == "mask" else torch.float32)
        found: list[bool] = Problem.of(**packed() | {name: x} | keywords).mods.bad.tolist()
        return found

    assert bad((9, 9)) == [False] * 4
    assert bad((8, 1), max_seqlen_q=8) == [False, False, True, False]
    assert bad((4, 1), max_seqlen_q=4) == [True, False, True, False]
    assert bad((1, 6), max_seqlen_k=6) == [True, False, True, False]
    assert bad((0, 1), max_seqlen_q=0) == [True, False, True, True]
    assert bad((1, 1), max_seqlen_q=0, max_seqlen_k=0) == [False] * 4  # one for all reads nothing astray


def test_a_length_that_no_operand_has_an_axis_for_is_not_trusted() -> None:
    call = packed()
    expected = flash_attention_varlen(**call)
    assert torch.equal(flash_attention_varlen(**call | {"max_seqlen_q": 0, "max_seqlen_k": 1}), expected)


@pytest.mark.parametrize("q_offset", [3, torch.tensor(3), torch.tensor([1, 2, 3, 4], dtype=torch.int32)], ids=str)
def test_a_position_is_one_for_each_sequence(q_offset: int | torch.Tensor) -> None:
    problem = Problem.of(**packed(), q_offset=q_offset)
    wanted = q_offset.tolist() if isinstance(q_offset, torch.Tensor) and q_offset.dim() else [3] * 4
    assert problem.mods.q_offset.tolist() == wanted
    assert problem.mods.q_offset.is_contiguous()


def test_packed_tensors_are_views_of_one_batch_element() -> None:
    call = packed()
    problem = Problem.of(**call)
    assert not problem.one_head and problem.mods.spans is None
    for name, x in (("q", problem.q), ("k", problem.k), ("v", problem.v)):
        assert x.shape == (1, call[name].shape[1], call[name].shape[0], call[name].shape[2])
        assert x.data_ptr() == call[name].data_ptr() and x.untyped_storage().nbytes() == call[name].nbytes


def test_a_block_mask_hides_keys_beside_the_ends_of_sequences() -> None:
    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, TOTAL_Q, TOTAL_K, "cpu")
    assert Problem.of(**packed(), block_mask=block_mask).spec.hides


def test_nothing_waits_for_the_device() -> None:
    # a fake tensor has no numbers, and raises where the host asks for one
    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 9, 9, "cpu")
    q = torch.randn(2, 4, 9, 8)
    Problem.of(q, q, q, block_mask=block_mask)  # asks once for each BlockMask
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        call = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in packed().items()}
        Problem.of(**call, mask=torch.ones(4, 1, 9, 9, dtype=torch.bool), q_offset=torch.zeros(4, dtype=torch.int32))
        q, ids = mode.from_tensor(q), torch.zeros(2, 9, dtype=torch.int64)
        Problem.of(q, q, q, mask=torch.ones(2, 1, 1, 9, dtype=torch.bool), mask_mod=mods.document(ids), causal=True)
        Problem.of(q, q, q, q_offset=torch.zeros(2, dtype=torch.int64), window=3, sinks=torch.zeros(4))


KEYWORDS: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing": dict,
    "causal": lambda: {"causal": True},
    "window": lambda: {"window": (2, 1)},
    "q_offset": lambda: {"causal": True, "q_offset": torch.tensor([1, 0, -2, 9], dtype=torch.int32)},
    "scale": lambda: {"scale": -0.3},
    "mask": lambda: {"mask": torch.rand(4, 1, 9, 9) < 0.6},
    "padding": lambda: {"mask": torch.arange(9) < torch.tensor([4, 3, 9, 2])[:, None, None, None]},
    "bias": lambda: {"bias": torch.randn(4, 1, 9, 9, dtype=torch.float64)},
    "bias of heads": lambda: {"bias": torch.randn(4, 1, 9, dtype=torch.float64)},
    "alibi_slopes": lambda: {"alibi_slopes": torch.rand(4, 4, dtype=torch.float64)},
    "softcap": lambda: {"softcap": 0.7},
    "sinks": lambda: {"sinks": torch.randn(4, dtype=torch.float64)},
    "dropout_p": lambda: {"dropout_p": 0.4},
    "score_mod": lambda: {"score_mod": mods.relative_position(torch.randn(4, 7, dtype=torch.float64), 3)},
    "mask_mod": lambda: {"mask_mod": mods.document(torch.arange(9)[None] // torch.tensor([[2], [3], [4], [5]]))},
    "block_mask": lambda: {
        "block_mask": create_block_mask(
            lambda b, h, i, j: (i + 2 * j + h) % 3 > 0, None, 4, TOTAL_Q, TOTAL_K, "cpu", BLOCK_SIZE=16
        )
    },
}


def placed(options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Options where kernels run, user functions with their tensors."""

    def move(x: Any) -> Any:
        if isinstance(x, (mods.ScoreMod, mods.MaskMod)):
            return mods.from_handle(mods.handle_of(x), tuple(arg.to(device) for arg in x.args))
        return x.to(device) if hasattr(x, "to") else x

    return {name: move(x) for name, x in options.items()}


def gradients(function: Any, call: dict[str, Any], **extra: Any) -> dict[str, torch.Tensor]:
    """o, lse and, by name, the gradient of each floating tensor of a call."""
    leaves = {name: x for name, x in call.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    o, lse = function(**call | leaves, return_lse=True, **extra)
    do, dlse = (torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view(x.shape) for x in (o, lse))
    seen = lse.masked_fill(lse == float("-inf"), 0.0)
    found = torch.autograd.grad((o * do).sum() + (seen * dlse).sum(), list(leaves.values()), allow_unused=True)
    grads = {f"d{name}": 0 * leaves[name] if x is None else x for name, x in zip(leaves, found, strict=True)}
    return {"o": o.detach(), "lse": lse.detach(), **grads}


INTERPRETED_SLOWLY = pytest.param("triton", marks=[pytest.mark.interpret, pytest.mark.slow])


@pytest.mark.parametrize("backend", ["torch", INTERPRETED_SLOWLY])
@pytest.mark.parametrize("name", KEYWORDS)
def test_every_keyword_reaches_each_sequence(name: str, backend: str, place: Place, device: torch.device) -> None:
    call = moved(packed(), place) | placed(KEYWORDS[name](), device)
    torch.manual_seed(3)
    found = gradients(flash_attention_varlen, call, backend=backend)
    wanted = dict(call)
    if dropout_p := wanted.pop("dropout_p", None):
        torch.manual_seed(3)
        seed = int(torch.randint(0, 2**63 - 1, (1,), device=device))
        wanted["dropout_mask"] = dropout_mask(seed, dropout_p, 4, 4, 9, 9).to(device)
    del wanted["max_seqlen_q"], wanted["max_seqlen_k"]
    expected = gradients(reference.attention_varlen, wanted)
    expected.pop("ddropout_mask", None)
    assert found.keys() == expected.keys()
    for key, want in expected.items():
        torch.testing.assert_close(found[key], want, rtol=1e-10, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_sequence_is_nan_and_the_others_are_bitwise_as_they_were(backend: str, place: Place) -> None:
    call = moved(packed(), place)
    clean = gradients(flash_attention_varlen, call, backend=backend, causal=True)
    hostile = call | {"cu_seqlens_k": place(torch.tensor([0, 7, 11, 20, 99], dtype=torch.int32))}
    found = gradients(flash_attention_varlen, hostile, backend=backend, causal=True)
    good = slice(0, 14)
    for key in ("o", "dq"):
        assert torch.equal(found[key][good], clean[key][good]) and found[key][14:].isnan().all()
    assert torch.equal(found["lse"][:, good], clean["lse"][:, good]) and found["lse"][:, 14:].isnan().all()
    assert torch.equal(found["dk"], clean["dk"]) and torch.equal(found["dv"], clean["dv"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_no_sequence_are_zero(backend: str, place: Place) -> None:
    call = moved(packed(), place)
    call["cu_seqlens_q"] = place(torch.tensor([2, 5, 5, 14, 15], dtype=torch.int32))
    call["cu_seqlens_k"] = place(torch.tensor([3, 7, 11, 18, 18], dtype=torch.int32))
    found = gradients(flash_attention_varlen, call, backend=backend)
    none_q, none_k = [0, 1, 15, 16], [0, 1, 2, 18, 19]
    assert not found["o"][none_q].any() and not found["dq"][none_q].any()
    assert (found["lse"][:, none_q] == float("-inf")).all()
    assert not found["dk"][none_k].any() and not found["dv"][none_k].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", ["q", "k", "both"])
def test_sequences_without_any_row_are_served(empty: str, backend: str, place: Place) -> None:
    call = packed()
    if empty in ("q", "both"):
        call |= {"q": call["q"][:0], "cu_seqlens_q": starts(0, 0, 0, 0)}
    if empty in ("k", "both"):
        call |= {"k": call["k"][:0], "v": call["v"][:0], "cu_seqlens_k": starts(0, 0, 0, 0)}
    call = moved(call, place)
    found = gradients(flash_attention_varlen, call, backend=backend)
    assert found["o"].shape == (call["q"].shape[0], 4, 6) and not found["o"].any()
    assert (found["lse"] == float("-inf")).all()
    assert all(not found[name].any() for name in ("dq", "dk", "dv"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_dimensions_are_one_head(backend: str, place: Place) -> None:
    call = moved(packed(heads_k=4), place)
    one = call | {name: call[name][:, 1] for name in ("q", "k", "v")}
    alone = call | {name: call[name][:, 1:2] for name in ("q", "k", "v")}
    mask = place(torch.rand(4, 9, 9) < 0.5)
    o, lse = flash_attention_varlen(**one, mask=mask, return_lse=True, backend=backend)
    o_3, lse_3 = flash_attention_varlen(**alone, mask=mask[:, None], return_lse=True, backend=backend)
    assert torch.equal(o, o_3[:, 0]) and torch.equal(lse, lse_3[0])


@pytest.mark.parametrize("head_dim_v", [8, 6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_o_is_dense_in_the_axis_order_of_q(backend: str, head_dim_v: int, place: Place) -> None:
    call = moved(packed(head_dim_v=head_dim_v), place)
    assert flash_attention_varlen(**call, backend=backend).is_contiguous()  # type: ignore[union-attr]
    call["q"] = call["q"].transpose(0, 1).contiguous().transpose(0, 1)
    assert flash_attention_varlen(**call, backend=backend).transpose(0, 1).is_contiguous()  # type: ignore[union-attr]


def test_compile_has_no_graph_break_and_the_same_values() -> None:
    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softcap: float, window: int, **rest: Any) -> Any:
        o: Any = flash_attention_varlen(q, k, v, softcap=softcap, window=(window, None), **rest)
        return o.pow(2).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (3, 5, 6):
        call = packed()
        for name in ("q", "k", "v"):
            call[name].requires_grad_()
        call |= {"softcap": n / 2, "window": n, "mask": torch.rand(4, 1, 1, 9) < 0.8}
        expected = torch.autograd.grad(loss(**call), (call["q"], call["k"], call["v"]))
        found = torch.autograd.grad(compiled(**call), (call["q"], call["k"], call["v"]))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
