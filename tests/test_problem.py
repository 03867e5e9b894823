"""Every wrong argument is named, with what was expected and what came; what is not served yet is named too."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import flash
from flash import mods
from flash.attention import flash_attention
from flash.kernels.spec import Spans, Spec
from flash.mods import MaskMod, ScoreMod
from flash.problem import MAX_SEQLEN, Problem


def qkv(**shape: Any) -> list[torch.Tensor]:
    sizes = {"batch": 2, "heads": 4, "heads_k": 2, "seqlen_q": 5, "seqlen_k": 7, "head_dim": 8, "head_dim_v": 6} | shape
    b, h, h_k, m, n, d, d_v = sizes.values()
    return [torch.randn(b, h, m, d), torch.randn(b, h_k, n, d), torch.randn(b, h_k, n, d_v)]


def replaced(index: int, x: Any) -> list[Any]:
    tensors: list[Any] = qkv()
    tensors[index] = x
    return tensors


def score_mod(*args: torch.Tensor) -> ScoreMod:
    return ScoreMod(None, lambda s, b, h, i, j, args: s, None, args)


def mask_mod(*args: torch.Tensor) -> MaskMod:
    return MaskMod(None, lambda b, h, i, j, args: i >= j, args)


def fits_no_call(batch: int, heads: int, seqlen_q: int, seqlen_k: int, args: tuple[torch.Tensor, ...]) -> None:
    raise ValueError("args fit no call")


def block_mask(
    seqlen_q: int,
    seqlen_k: int,
    batch: int | None = None,
    heads: int | None = None,
    sizes: tuple[int, int] = (128, 128),
) -> BlockMask:
    return create_block_mask(lambda b, h, i, j: i >= j, batch, heads, seqlen_q, seqlen_k, "cpu", sizes)


WRONG_TENSORS = {
    "q must be a torch.Tensor, got list": replaced(0, [1.0]),
    "k must be a torch.Tensor, got NoneType": replaced(1, None),
    r"q must have 3 or 4 dimensions, .*, got shape \[5, 8\]": [torch.randn(5, 8)] * 3,
    r"q must have 3 or 4 dimensions, .*, got shape \[1, 2, 4, 5, 8\]": [torch.randn(1, 2, 4, 5, 8)] * 3,
    r"v must have 4 dimensions like q, got shape \[2, 7, 6\]": replaced(2, torch.randn(2, 7, 6)),
    "q must be float16, bfloat16, float32 or float64, got int64": [torch.ones(2, 4, 5, 8, dtype=torch.int64)] * 3,
    "q must be float16, bfloat16, float32 or float64, got complex64": [torch.ones(2, 4, 5, 8, dtype=torch.cfloat)] * 3,
    "k must have dtype float32 like q, got float16": replaced(1, qkv()[1].half()),
    "v must have dtype float32 like q, got float64": replaced(2, qkv()[2].double()),
    "k must be on device cpu like q, got meta": replaced(1, qkv()[1].to("meta")),
    "v must be a strided tensor, got layout torch.sparse_coo": replaced(2, qkv()[2].to_sparse()),
    "k must have batch 2 like q, got 3": replaced(1, qkv(batch=3)[1]),
    "v must have batch 2 like q, got 1": replaced(2, qkv(batch=1)[2]),
    "k must have head_dim 8 like q, got 9": replaced(1, qkv(head_dim=9)[1]),
    "v must have seqlen_k 7 like k, got 6": replaced(2, qkv(seqlen_k=6)[2]),
    "v must have heads_k 2 like k, got 4": replaced(2, qkv(heads_k=4)[2]),
    "k must have a number of heads that divides q's 4, got 3": qkv(heads_k=3),
    "k must have a number of heads that divides q's 4, got 0": qkv(heads_k=0),
    "q must have a head_dim from 1 to 512, got 0": qkv(head_dim=0),
    "q must have a head_dim from 1 to 512, got 513": qkv(head_dim=513),
    "v must have a head_dim from 1 to 512, got 513": qkv(head_dim_v=513),
}


@pytest.mark.parametrize("message", WRONG_TENSORS)
def test_a_wrong_tensor_is_named_with_what_was_expected_and_what_came(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flash_attention(*WRONG_TENSORS[message])


WRONG_KEYWORDS = {
    "causal must be True or False, got 1": {"causal": 1},
    "deterministic must be True or False, got 'yes'": {"deterministic": "yes"},
    "return_lse must be True or False, got None": {"return_lse": None},
    "scale must be a finite float or None, got nan": {"scale": math.nan},
    "scale must be a finite float or None, got inf": {"scale": math.inf},
    "scale must be a finite float or None, got '1'": {"scale": "1"},
    "scale must be a finite float or None, got True": {"scale": True},
    "scale must be a finite float or None, got an int of 401 digits": {"scale": 10**400},
    r"dropout_p must be a number in \[0, 1\), got 1.0": {"dropout_p": 1.0},
    r"dropout_p must be a number in \[0, 1\), got -0.1": {"dropout_p": -0.1},
    r"dropout_p must be a number in \[0, 1\), got nan": {"dropout_p": math.nan},
    "q_offset must be an int, an int tensor or None, got 1.5": {"q_offset": 1.5},
    "q_offset must be an int, an int tensor or None, got True": {"q_offset": True},
    "q_offset must be of dtype int32 or int64, got float32": {"q_offset": torch.zeros(2)},
    r"q_offset must have shape \[\] or \[2\] \(batch\), got \[3\]": {"q_offset": torch.zeros(3, dtype=torch.int32)},
    r"q_offset must have shape \[\] or \[2\] \(batch\), got \[2, 1\]": {
        "q_offset": torch.zeros(2, 1, dtype=torch.int32)
    },
    "q_offset must be on device cpu like q, got meta": {"q_offset": torch.zeros(2, dtype=torch.int32, device="meta")},
    "backend must be one of auto, triton, hopper, torch, got 'cuda'": {"backend": "cuda"},
    "backend must be one of auto, triton, hopper, torch, got None": {"backend": None},
    "config must be a flash.Config, a dict of them or None, got 64": {"config": 64},
    "config must have keys among forward, dkdv, dq, got 'backward'": {"config": {"backward": flash.Config(64, 64)}},
    r"config\['dq'\] must be a flash.Config, got \(64, 64\)": {"config": {"dq": (64, 64)}},
    r"config\['forward'\].block_m must be one of .*, got 48": {"config": flash.Config(48, 64)},
    r"config\['forward'\].block_m must be one of .*, got 16.0": {"config": flash.Config(16.0, 16)},  # type: ignore[arg-type]
    r"config\['forward'\].num_warps must be one of .*, got True": {"config": flash.Config(16, 16, True)},
    r"config\['dkdv'\].block_n must be one of .*, got 512": {"config": {"dkdv": flash.Config(64, 512)}},
    r"config\['forward'\].num_warps must be one of .*, got 3": {"config": flash.Config(64, 64, num_warps=3)},
    r"config\['forward'\].num_stages must be one of .*, got 0": {"config": flash.Config(64, 64, num_stages=0)},
}


@pytest.mark.parametrize("message", WRONG_KEYWORDS)
def test_a_wrong_keyword_is_named_with_what_was_expected_and_what_came(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flash_attention(*qkv(), **WRONG_KEYWORDS[message])


def test_more_positions_than_32_bits_hold_are_refused() -> None:
    q, k, v = qkv(batch=1, heads=1, heads_k=1, head_dim=1, head_dim_v=1)
    far = MAX_SEQLEN + 1
    with pytest.raises(ValueError, match=f"q must have a seqlen of at most {MAX_SEQLEN}, got {far}"):
        flash_attention(q.expand(1, 1, 5, 1)[:, :, :1].expand(1, 1, far, 1), k, v)
    with pytest.raises(ValueError, match=f"k must have a seqlen of at most {MAX_SEQLEN}, got {far}"):
        flash_attention(q, k[:, :, :1].expand(1, 1, far, 1), v[:, :, :1].expand(1, 1, far, 1))


WRONG_OPERANDS = {
    "window must be >= 0 on each side .*, got -1": {"window": -1},
    r"window must be >= 0 on each side .*, got \(-1, 0\)": {"window": (-1, 0)},
    r"window must be >= 0 on each side .*, got \(None, -2\)": {"window": (None, -2)},
    r"window must be an int, a tuple \(left, right\) or None, got 2.0": {"window": 2.0},
    r"window must be an int, a tuple \(left, right\) or None, got True": {"window": True},
    r"window must be an int, a tuple \(left, right\) or None, got \(1, 2, 3\)": {"window": (1, 2, 3)},
    r"window must be an int, a tuple \(left, right\) or None, got \(1, '2'\)": {"window": (1, "2")},
    r"window must be an int, a tuple \(left, right\) or None, got \[1, 2\]": {"window": [1, 2]},
    r"mask must be bool \(True = attend\), got float32; use bias for a float one": {"mask": torch.zeros(5, 7)},
    r"mask must be bool \(True = attend\), got int64; mask.bool": {"mask": torch.ones(5, 7).long()},
    "mask must be a torch.Tensor, got list": {"mask": [True]},
    "mask must be on device cpu like q, got meta": {"mask": torch.ones(5, 7, dtype=torch.bool, device="meta")},
    "mask must be a dense, strided tensor, got torch.sparse_coo": {"mask": torch.ones(5, 7).bool().to_sparse()},
    r"mask must broadcast to \[batch, heads, seqlen_q, seqlen_k\] = \[2, 4, 5, 7\], got shape \[7, 5\]": {
        "mask": torch.ones(7, 5, dtype=torch.bool)
    },
    r"mask must broadcast to .* = \[2, 4, 5, 7\], got shape \[2, 7\]": {"mask": torch.ones(2, 7, dtype=torch.bool)},
    r"mask must broadcast to .*, got shape \[2, 5, 7\]": {"mask": torch.ones(2, 5, 7, dtype=torch.bool)},
    r"mask must broadcast to .*, got shape \[1, 1, 1, 5, 7\]": {"mask": torch.ones(1, 1, 1, 5, 7, dtype=torch.bool)},
    r"mask must broadcast to .*, got shape \[0\]": {"mask": torch.ones(0, dtype=torch.bool)},
    "bias must be floating point, got bool; use mask for a bool one": {"bias": torch.ones(5, 7, dtype=torch.bool)},
    "bias must be float16, bfloat16, float32 or float64, got int32": {"bias": torch.ones(5, 7, dtype=torch.int32)},
    "bias must be a torch.Tensor, got float": {"bias": 1.0},
    "bias must be on device cpu like q, got meta": {"bias": torch.ones(5, 7, device="meta")},
    r"bias must broadcast to .* = \[2, 4, 5, 7\], got shape \[3, 1, 5, 7\]": {"bias": torch.ones(3, 1, 5, 7)},
    r"bias must broadcast to .*, got shape \[2, 1, 7\]": {"bias": torch.ones(2, 1, 7)},
    "alibi_slopes must be a torch.Tensor, got list": {"alibi_slopes": [1.0]},
    r"alibi_slopes must have shape \[4\] \(heads\) or \[2, 4\] \(batch, heads\), got \[2\]": {
        "alibi_slopes": torch.ones(2)
    },
    r"alibi_slopes must have shape .*, got \[1, 4\]": {"alibi_slopes": torch.ones(1, 4)},
    r"alibi_slopes must have shape .*, got \[\]": {"alibi_slopes": torch.ones(())},
    "alibi_slopes must be float16, bfloat16, float32 or float64, got int64": {"alibi_slopes": torch.ones(4).long()},
    "alibi_slopes must be on device cpu like q, got meta": {"alibi_slopes": torch.ones(4, device="meta")},
    "softcap must be a finite float > 0 or None, got 0": {"softcap": 0},
    "softcap must be a finite float > 0 or None, got -30.0": {"softcap": -30.0},
    "softcap must be a finite float > 0 or None, got inf": {"softcap": math.inf},
    "softcap must be a finite float > 0 or None, got nan": {"softcap": math.nan},
    "softcap must be a finite float > 0 or None, got True": {"softcap": True},
    "softcap must be a finite float > 0 or None, got '30'": {"softcap": "30"},
    "softcap must be a finite float > 0 or None, got an int of 401 digits": {"softcap": 10**400},
    r"sinks must have shape \[4\] \(heads\), got \[2\]": {"sinks": torch.zeros(2)},
    r"sinks must have shape \[4\] \(heads\), got \[2, 4\]": {"sinks": torch.zeros(2, 4)},
    "sinks must be float16, bfloat16, float32 or float64, got bool": {"sinks": torch.ones(4, dtype=torch.bool)},
    "sinks must be a torch.Tensor, got float": {"sinks": 0.0},
    "sinks must be on device cpu like q, got meta": {"sinks": torch.zeros(4, device="meta")},
    r"score_mod.args\[0\] must be on device cpu like q, got meta": {
        "score_mod": score_mod(torch.ones(4, device="meta"))
    },
    r"mask_mod.args\[1\] must be contiguous, got strides \(2,\)": {
        "mask_mod": mask_mod(torch.ones(4), torch.ones(8)[::2])
    },
    "args fit no call": {"mask_mod": MaskMod(None, lambda b, h, i, j, args: i >= j, check=fits_no_call)},
    r"block_mask must be made for \(seqlen_q, seqlen_k\) = \(5, 7\), got \(7, 7\)": {"block_mask": block_mask(7, 7)},
    r"block_mask must have B in \(1, 2\) and H in \(1, 4\), got \(B, H\) = \(3, 1\)": {
        "block_mask": block_mask(5, 7, batch=3)
    },
    r"block_mask must have B in \(1, 2\) and H in \(1, 4\), got \(B, H\) = \(1, 2\)": {
        "block_mask": block_mask(5, 7, heads=2)
    },
    "block_mask must be on device cpu like q, got meta": {"block_mask": block_mask(5, 7).to("meta")},
}


@pytest.mark.parametrize("message", WRONG_OPERANDS)
def test_a_wrong_operand_of_the_score_is_named_with_what_was_expected_and_what_came(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flash_attention(*qkv(), **WRONG_OPERANDS[message])


WRONG_TYPES = {
    "score_mod must be a flash.mods.ScoreMod, got function": {"score_mod": lambda s, b, h, i, j: s},
    "score_mod must be a flash.mods.ScoreMod, got MaskMod": {"score_mod": mask_mod()},
    "mask_mod must be a flash.mods.MaskMod, got function": {"mask_mod": lambda b, h, i, j: i >= j},
    "mask_mod must be a flash.mods.MaskMod, got ScoreMod": {"mask_mod": score_mod()},
    "block_mask must be a torch.nn.attention.flex_attention.BlockMask, got Tensor": {"block_mask": torch.ones(5, 7)},
}


@pytest.mark.parametrize("message", WRONG_TYPES)
def test_a_user_function_or_block_mask_of_another_type_is_a_type_error(message: str) -> None:
    with pytest.raises(TypeError, match=message):
        flash_attention(*qkv(), **WRONG_TYPES[message])


def test_blocks_of_no_multiple_of_16_are_not_served_and_the_nearest_are_named() -> None:
    with pytest.raises(NotImplementedError, match="block_mask has blocks of 24 x 128; multiples of 16 are served"):
        flash_attention(*qkv(), block_mask=block_mask(5, 7, sizes=(24, 128)))


def test_a_user_functions_tensor_with_a_gradient_is_refused_only_where_it_would_be_lost() -> None:
    learned = torch.ones(4, requires_grad=True)
    for keyword in ({"score_mod": score_mod(learned)}, {"mask_mod": mask_mod(learned)}):
        with pytest.raises(NotImplementedError, match=r"args\[0\] requires grad, .* as bias"):
            Problem.of(*qkv(), **keyword)
        with torch.no_grad():
            Problem.of(*qkv(), **keyword)


OPERANDS = {"mask": torch.bool, "bias": torch.float32}


@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize("full", list(itertools.product([False, True], repeat=4)), ids=str)
def test_a_mask_or_bias_becomes_four_axes_without_a_copy(name: str, full: tuple[bool, ...]) -> None:
    shape = [size if is_full else 1 for size, is_full in zip((2, 4, 5, 7), full, strict=True)]
    x = torch.ones(shape, dtype=OPERANDS[name])
    for drop in range(5):
        if all(size == 1 for size in shape[:drop]):
            given = x.reshape(shape[drop:])
            got = getattr(Problem.of(*qkv(), **{name: given}).mods, name)
            assert list(got.shape) == shape and got.data_ptr() == given.data_ptr()
            assert got.untyped_storage().nbytes() == x.numel() * x.element_size()


def test_the_strides_of_a_mask_stay_as_they_came() -> None:
    mask = torch.ones(2, 1, 1, 14, dtype=torch.bool)[..., ::2].expand(2, 4, 5, 7)
    got = Problem.of(*qkv(), mask=mask).mods.mask
    assert got.shape == mask.shape and got.stride() == mask.stride() == (14, 0, 0, 2)


@pytest.mark.parametrize("name", OPERANDS)
def test_of_three_dimensions_a_mask_or_bias_has_three_too(name: str) -> None:
    q, k, v = qkv(heads=1, heads_k=1)
    call = q[:, 0], k[:, 0], v[:, 0]
    for shape, four in (((2, 5, 7), [2, 1, 5, 7]), ((2, 1, 7), [2, 1, 1, 7]), ((5, 1), [1, 1, 5, 1]), ((), [1] * 4)):
        x = torch.ones(shape, dtype=OPERANDS[name])
        assert list(getattr(Problem.of(*call, **{name: x}).mods, name).shape) == four
    with pytest.raises(ValueError, match=rf"{name} must broadcast to \[batch, seqlen_q, seqlen_k\] = \[2, 5, 7\]"):
        Problem.of(*call, **{name: torch.ones(2, 1, 5, 7, dtype=OPERANDS[name])})


@pytest.mark.parametrize(
    "keywords, spec, positions",
    [
        ({}, {}, (2, 0, 0)),
        ({"window": (None, None)}, {}, (2, 0, 0)),
        ({"window": 3}, {"left": True, "right": True}, (2, 3, 3)),
        ({"window": (0, None), "q_offset": 1}, {"left": True}, (1, 0, 0)),
        ({"window": (None, 4)}, {"right": True}, (2, 0, 4)),
        ({"window": (1, 4), "causal": True}, {"causal": True, "left": True}, (2, 1, 0)),
        ({"window": (None, 0), "causal": True}, {"causal": True}, (2, 0, 0)),
        # up to its own index, which is as far right as position -2**40 reaches
        ({"window": 2**40, "q_offset": -(2**40)}, {"left": True, "right": True}, (-MAX_SEQLEN, 0, MAX_SEQLEN)),
        ({"window": 2**31, "q_offset": 2**40}, {"left": True, "right": True}, (MAX_SEQLEN, 0, 0)),
    ],
    ids=str,
)  # fmt: skip
def test_a_window_is_two_bounds_of_which_causal_is_the_tighter_right_one(
    keywords: dict[str, Any], spec: dict[str, bool], positions: tuple[int, int, int]
) -> None:
    problem = Problem.of(*qkv(), **keywords)
    assert problem.spec == Spec(**spec)
    assert problem.positions == positions


@pytest.mark.parametrize(
    "keywords, hides, raw",
    [
        ({}, False, True),
        ({"causal": True, "window": 2}, False, True),
        ({"mask": torch.ones(7, dtype=torch.bool)}, True, True),
        ({"bias": torch.zeros(7)}, True, False),
        ({"mask_mod": mask_mod()}, True, True),
        ({"alibi_slopes": torch.ones(4)}, False, False),
        ({"softcap": 5}, False, False),
        ({"sinks": torch.ones(4)}, False, True),
        ({"dropout_p": 0.5}, False, True),
        ({"score_mod": score_mod()}, False, False),
        ({"block_mask": block_mask(5, 7)}, False, True),
        ({"block_mask": block_mask(5, 7), "causal": True}, True, True),
        ({"block_mask": block_mask(5, 7), "window": (None, 1)}, True, True),
        ({"block_mask": block_mask(5, 7), "window": (1, None)}, True, True),
    ],
    ids=lambda keywords: " ".join(keywords) if isinstance(keywords, dict) else str(keywords),
)
def test_what_hides_keys_and_what_changes_scores_is_found(keywords: dict[str, Any], hides: bool, raw: bool) -> None:
    spec = Problem.of(*qkv(), **keywords).spec
    assert (spec.hides, spec.raw) == (hides, raw)
    assert spec.softcap == keywords.get("softcap") and spec.dropout_p == keywords.get("dropout_p", 0.0)
    assert spec.blocks == ((128, 128) if "block_mask" in keywords else None)


def key_side(spans: Spans, seqlen_k: int) -> torch.Tensor:
    """bool [batch|1, heads|1, seqlen_q|1, seqlen_k]: which keys the spans of queries do not rule out."""
    j = torch.arange(seqlen_k)
    return (j >= spans.key_begin[..., None]) & (j < spans.key_end[..., None])


def query_side(spans: Spans, seqlen_q: int) -> torch.Tensor:
    """bool [batch|1, heads|1, seqlen_q, seqlen_k|1]: which queries the spans of keys do not rule out."""
    i = torch.arange(seqlen_q)[:, None]
    return (i >= spans.query_begin[..., None, :]) & (i < spans.query_end[..., None, :])


def seen_within(spans: Spans, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
    """bool [batch|1, heads|1, seqlen_q, seqlen_k]: which pairs the spans do not rule out."""
    assert all(x.dtype == torch.int32 for x in spans)
    return key_side(spans, seqlen_k) & query_side(spans, seqlen_q)


def padding() -> torch.Tensor:
    """Key padding [3, 1, 1, 7]: keys 2 to 4 but 3, all, none."""
    mask = torch.ones(3, 1, 1, 7, dtype=torch.bool)
    mask[0, ..., [0, 1, 3, 5, 6]] = False
    mask[2] = False
    return mask


def test_a_padding_mask_bounds_what_is_seen_and_is_never_expanded() -> None:
    mask = padding()
    tensors = qkv(batch=3)
    mods = Problem.of(*tensors, mask=mask).mods
    assert mods.mask.numel() == 21
    assert mods.spans is not None
    assert mods.spans.key_begin.tolist() == [[[2]], [[0]], [[7]]]
    assert mods.spans.key_end.tolist() == [[[5]], [[7]], [[0]]]
    assert mods.spans.query_begin[:, 0].tolist() == [[5, 5, 0, 5, 0, 5, 5], [0] * 7, [5] * 7]
    assert mods.spans.query_end[:, 0].tolist() == [[0, 0, 5, 0, 5, 0, 0], [5] * 7, [0] * 7]
    expanded = Problem.of(*tensors, mask=mask.expand(3, 4, 5, 7)).mods.spans  # known by its strides
    assert expanded is not None
    assert all(torch.equal(x, y) for x, y in zip(expanded, mods.spans, strict=True))


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 7), (1, 4, 1, 7), (3, 4, 1, 7), (3, 4, 1, 1), (1, 1, 1, 1), (7,), ()], ids=str
)
def test_the_spans_of_a_mask_rule_out_no_visible_pair(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.3
    spans = Problem.of(*qkv(batch=3), mask=mask).mods.spans
    assert spans is not None
    assert torch.equal(
        seen_within(spans, 5, 7), mask[(None,) * (4 - mask.dim())].expand(*seen_within(spans, 5, 7).shape)
    )


def test_a_mask_with_an_axis_of_queries_has_no_spans() -> None:
    assert Problem.of(*qkv(), mask=torch.ones(5, 7, dtype=torch.bool)).mods.spans is None


@pytest.mark.parametrize("lengths", [{"seqlen_k": 0}, {"seqlen_q": 0}, {"batch": 0}], ids=str)
def test_a_mask_of_nothing_is_served(lengths: dict[str, int]) -> None:
    q, k, v = qkv(**lengths)
    for mask in (torch.ones(1, dtype=torch.bool), torch.ones(q.shape[0], 1, 1, k.shape[2], dtype=torch.bool)):
        o = flash_attention(q, k, v, mask=mask, backend="torch")
        assert o.shape == (*q.shape[:3], 6) and not o.any()


def test_the_spans_of_a_mask_function_are_asked_for_and_met_with_the_masks() -> None:
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    document = mods.document(ids[2:], ids)
    alone, padded, both = (
        Problem.of(*qkv(batch=3), **keywords).mods.spans
        for keywords in ({"mask_mod": document}, {"mask": padding()}, {"mask_mod": document, "mask": padding()})
    )
    assert alone is not None and padded is not None and both is not None
    assert torch.equal(seen_within(alone, 5, 7)[0, 0], ids[2:, None] == ids)
    assert torch.equal(key_side(both, 7), key_side(alone, 7) & key_side(padded, 7))
    assert torch.equal(query_side(both, 5), query_side(alone, 5) & query_side(padded, 5))
    assert Problem.of(*qkv(), mask_mod=mask_mod()).mods.spans is None


def test_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="is_causal"):
        flash_attention(*qkv(), is_causal=True)  # type: ignore[call-arg]


def test_three_dimensions_are_one_head() -> None:
    q, k, v = qkv(heads=1, heads_k=1)
    o, lse = flash_attention(q, k, v, return_lse=True)
    o_3, lse_3 = flash_attention(q[:, 0], k[:, 0], v[:, 0], return_lse=True)
    assert torch.equal(o_3, o[:, 0])
    assert torch.equal(lse_3, lse[:, 0])


def test_an_offset_beyond_every_length_reads_as_the_farthest_one() -> None:
    q, k, v = qkv()
    assert Problem.of(q, k, v, q_offset=2**40).positions.q_offset == MAX_SEQLEN
    assert Problem.of(q, k, v, q_offset=-(2**40)).positions.q_offset == -MAX_SEQLEN
    everything = flash_attention(q, k, v)
    assert torch.equal(flash_attention(q, k, v, causal=True, q_offset=2**40), everything)
    assert torch.equal(flash_attention(q, k, v, causal=True, q_offset=-(2**40)), torch.zeros_like(everything))


@pytest.mark.parametrize("scale, raw", [(0.125, True), (0.0, False), (-1.0, False), (1e-38, False), (1e38, False)])
def test_only_a_positive_scale_within_float32_waits_for_the_exponent(scale: float, raw: bool) -> None:
    assert Problem.of(*qkv(), scale=scale).spec.raw is raw


def test_autocast_casts_q_k_and_v_but_not_float64() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash_attention(q, k, v).dtype == torch.bfloat16
        assert flash_attention(q.double(), k.double(), v.double()).dtype == torch.float64
        assert flash_attention(q.bfloat16(), k, v.half()).dtype == torch.bfloat16
    assert flash_attention(q, k, v).dtype == torch.float32


def test_the_input_is_neither_changed_nor_copied() -> None:
    q, k, v = qkv()
    before = [x.clone() for x in (q, k, v)]
    problem = Problem.of(q, k, v)
    assert problem.q is q and problem.k is k and problem.v is v
    flash_attention(q, k, v, causal=True)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_traces_every_keyword_without_a_break_whatever_the_numbers(dynamic: bool | None) -> None:
    def derived(*tensors: torch.Tensor, **keywords: Any) -> tuple[Any, ...]:
        problem = Problem.of(*tensors, **keywords)
        return problem.q * 1, problem.mods.spans, problem.positions, str(tuple(problem.spec))

    torch._dynamo.reset()
    compiled = torch.compile(derived, fullgraph=True, dynamic=dynamic, backend="eager")
    for n in (7, 9, 12):
        tensors = qkv(seqlen_k=n)
        keywords = {
            "window": (n, None), "q_offset": n - 2, "scale": 0.1 * n, "mask": torch.rand(2, 1, 1, n) < 0.5,
            "bias": torch.randn(4, 1, n), "alibi_slopes": torch.randn(4), "softcap": n / 2, "sinks": torch.randn(4),
            "dropout_p": 1 / n, "mask_mod": mods.document(torch.arange(5) // 2, torch.arange(n) // n),
        }  # fmt: skip
        found, expected = compiled(*tensors, **keywords), derived(*tensors, **keywords)
        assert found[2:] == expected[2:]
        assert all(torch.equal(x, y) for x, y in zip(found[1], expected[1], strict=True))
    assert compiled(*tensors, softcap=3)[3] == derived(*tensors, softcap=3.0)[3]
    for n in (12, 13):
        tensors, keywords = qkv(seqlen_k=n), {"block_mask": block_mask(5, n)}
        expected = derived(*tensors, **keywords)  # a BlockMask is read outside of compiled code the first time
        assert compiled(*tensors, **keywords)[3] == expected[3]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (lambda m, n, args: None, "must return flash.kernels.spec.Spans, got NoneType"),
        (lambda m, n, args: Spans(None, None, None, None), "key_begin as an int32 tensor on cpu, got NoneType"),
        (
            lambda m, n, args: Spans(*4 * [torch.zeros(1, 1, m)]),
            "key_begin as an int32 tensor on cpu, got float32 on cpu",
        ),
        (lambda m, n, args: Spans(*4 * [torch.zeros(1, 1, m, dtype=torch.int32)]), r"query_begin of shape \[2, 4, 7\]"),
    ],
)
def test_spans_that_kernels_could_not_read_are_refused(spans: Any, message: str) -> None:
    mod = mods.MaskMod(None, lambda b, h, i, j, args: i >= j, (), spans)
    with pytest.raises(ValueError, match=message):
        Problem.of(*qkv(), mask_mod=mod)


@pytest.mark.parametrize("softcap", [1e-40, 1e39])
def test_a_softcap_that_float32_does_not_hold_is_refused(softcap: float) -> None:
    with pytest.raises(ValueError, match="softcap must be between 1e-30 and 1e30"):
        Problem.of(*qkv(), softcap=softcap)


@pytest.mark.parametrize("sizes", [{"seqlen_q": 0}, {"seqlen_k": 0}])
def test_a_rule_meets_no_query_or_no_key(sizes: dict[str, int]) -> None:
    for mod in (mods.prefix_lm(torch.tensor([3, 4])), mods.dilated_window(3, 2), mods.neighborhood_2d(2, 2, 1)):
        o = flash_attention(*qkv(**sizes), mask_mod=mod)
        assert isinstance(o, torch.Tensor) and not o.any()
