"""Every wrong argument is named, with what was expected and what came; what is not served yet is named too."""

import math
from typing import Any

import pytest
import torch

import flash
from flash.attention import flash_attention
from flash.problem import MAX_SEQLEN, Problem


def qkv(**shape: Any) -> list[torch.Tensor]:
    sizes = {"batch": 2, "heads": 4, "heads_k": 2, "seqlen_q": 5, "seqlen_k": 7, "head_dim": 8, "head_dim_v": 6} | shape
    b, h, h_k, m, n, d, d_v = sizes.values()
    return [torch.randn(b, h, m, d), torch.randn(b, h_k, n, d), torch.randn(b, h_k, n, d_v)]


def replaced(index: int, x: Any) -> list[Any]:
    tensors: list[Any] = qkv()
    tensors[index] = x
    return tensors


WRONG_TENSORS = {
    "q must be a torch.Tensor, got list": replaced(0, [1.0]),
    "k must be a torch.Tensor, got NoneType": replaced(1, None),
    r"q must have 3 or 4 dimensions, got shape \[5, 8\]": [torch.randn(5, 8)] * 3,
    r"q must have 3 or 4 dimensions, got shape \[1, 2, 4, 5, 8\]": [torch.randn(1, 2, 4, 5, 8)] * 3,
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


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize(
    "keyword",
    [
        {"window": 4},
        {"mask": torch.ones(5, 7, dtype=torch.bool)},
        {"bias": torch.zeros(5, 7)},
        {"alibi_slopes": torch.ones(4)},
        {"softcap": 30.0},
        {"sinks": torch.zeros(4)},
        {"dropout_p": 0.1},
        {"score_mod": object()},
        {"mask_mod": object()},
        {"block_mask": object()},
    ],
    ids=lambda keyword: next(iter(keyword)),
)
def test_what_is_not_served_yet_is_named_on_every_backend_alike(keyword: dict[str, Any], backend: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{next(iter(keyword))} is not served yet on any backend"):
        flash_attention(*qkv(), backend=backend, **keyword)


def test_a_nested_tensor_is_not_served_yet() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.jagged)
    with pytest.raises(NotImplementedError, match="q is a nested tensor"):
        flash_attention(nested, nested, nested)


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
    assert Problem.of(q, k, v, q_offset=2**40).q_offset == MAX_SEQLEN
    assert Problem.of(q, k, v, q_offset=-(2**40)).q_offset == -MAX_SEQLEN
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
