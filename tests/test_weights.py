"""Attention weights, asked for in part or whole, beside the softmax written out."""

from typing import Any

import pytest
import torch

from flash import mods, reference
from flash.nn import attention_weights
from tests.test_footprint import allocated

EXACT = dict(rtol=0.0, atol=1e-12)  # float64; the inputs are of order 1


def options_of(names: str) -> dict[str, Any]:
    """Keywords for q [2, 4, 11, 8] and k [2, 2, 17, 8] in float64."""
    every: dict[str, Any] = {
        "causal": True, "window": (5, 3), "q_offset": 2, "scale": 0.7, "softcap": 1.5,
        "mask": torch.rand(2, 1, 11, 17) < 0.6,
        "bias": torch.randn(1, 4, 11, 17, dtype=torch.float64),
        "alibi_slopes": torch.rand(4, dtype=torch.float64),
        "sinks": torch.randn(4, dtype=torch.float64),
        "mask_mod": mods.dilated_window(7, 2),
        "score_mod": mods.alibi(torch.rand(4, dtype=torch.float64)),
    }  # fmt: skip
    return {name: every[name] for name in names.split()}


@pytest.mark.parametrize(
    "names",
    [
        "",
        "causal",
        "window q_offset",
        "scale softcap bias",
        "mask sinks",
        "alibi_slopes sinks causal",
        "mask_mod score_mod",
    ],
)
def test_attention_weights_equal_the_softmax(names: str) -> None:
    q, k = torch.randn(2, 4, 11, 8, dtype=torch.float64), torch.randn(2, 2, 17, 8, dtype=torch.float64)
    options = options_of(names)
    want = reference.attention(q, k, torch.eye(17, dtype=torch.float64).expand(2, 2, 17, 17), **options)
    torch.testing.assert_close(attention_weights(q, k, **options), want, **EXACT)
    for rows in ([3], [-1, 0, 1, 9], slice(2, None, 3), range(4, 8), []):
        chosen = rows if isinstance(rows, slice) else list(rows)
        torch.testing.assert_close(attention_weights(q, k, rows=rows, **options), want[:, :, chosen], **EXACT)
    pooled = attention_weights(q, k, pool=(4, 5), **options)
    groups = [p.mean(2) for p in want.split(4, 2)]
    expected = torch.stack([torch.stack([p.sum(-1) for p in g.split(5, -1)], -1) for g in groups], 2)
    torch.testing.assert_close(pooled, expected, **EXACT)


def test_attention_weights_of_one_head_and_of_half_precision() -> None:
    q, k = torch.randn(2, 2, 9, 16, dtype=torch.bfloat16)
    found = attention_weights(q, k, causal=True)
    assert found.shape == (2, 9, 9) and found.dtype == torch.float32
    torch.testing.assert_close(found, attention_weights(q[:, None].float(), k[:, None].float(), causal=True)[:, 0])


def test_attention_weights_hold_only_what_is_asked_for() -> None:
    q = torch.randn(1, 1, 4096, 16)  # all weights are 67 MB, and making them takes a handful of that
    for options in ({"rows": [0, 4095]}, {"pool": (64, 128)}):
        assert allocated(lambda options=options: (attention_weights(q, q, **options),)) < 50e6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rows": [11]}, "rows must be within -11 and 10, got"),
        ({"rows": 3}, "rows must be a slice or whole numbers, got 3"),
        ({"rows": [0.5]}, "rows must be a slice or whole numbers"),
        ({"rows": [True, False, True]}, "rows must be a slice or whole numbers"),
        ({"rows": torch.ones(11, dtype=torch.bool)}, "rows must be a slice or whole numbers"),
        ({"pool": (0, 4)}, "pool must be two whole numbers > 0"),
        ({"pool": 4}, "pool must be two whole numbers > 0"),
        ({"softcap": -1.0}, "softcap"),
    ],
)
def test_weights_that_cannot_be_are_refused(options: dict[str, Any], text: str) -> None:
    q = torch.randn(1, 1, 11, 8)
    with pytest.raises(ValueError, match=text):
        attention_weights(q, q, **options)
