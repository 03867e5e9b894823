"""What transformers asks of a mask, and what ours says of every pair."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import DECODER, PACKED, SEQLEN, WINDOW, close, left_padded

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]


@pytest.mark.parametrize("rows", [slice(None), slice(3, None), slice(0, 2), slice(1, 3)], ids=str)
def test_a_model_may_cut_its_mask_to_some_of_its_queries(rows: slice) -> None:
    """Gemma 4 does, to those that logits are wanted of."""
    from flash.integrations.transformers import attend
    from flash.integrations.transformers_masks import Visibility

    q, k = torch.randn(2, 2, 4, 8).double(), torch.randn(2, 2, 6, 8).double()
    ids = torch.tensor([[0, 0, 1, 1, 1, 1], [5, 5, 5, 5, 6, 6]])
    for said in (Visibility(True, 2, 4, 6, ids != 5), Visibility(True, None, 4, 6, documents=ids)):
        mask = said.mask("cpu")
        whole = attend(torch.nn.Identity(), q, k, k, mask)
        close(attend(torch.nn.Identity(), q[:, :, rows], k, k, mask[:, :, rows]), whole[:, rows], 1e-12)


def test_a_mask_of_one_key_says_the_same_of_all() -> None:
    """MiniMax asks for one at each step of generation."""
    from flash.integrations.transformers import attend
    from flash.integrations.transformers_masks import Visibility

    q, k = torch.randn(2, 2, 1, 8).double(), torch.randn(2, 2, 6, 8).double()
    for shown in (None, torch.tensor([[True], [False]])):
        got = attend(torch.nn.Identity(), q, k, k, Visibility(True, None, 1, 1, shown).mask("cpu"))
        mask = None if shown is None else shown[:, None, None].expand(2, 1, 1, 6)
        close(got, attend(torch.nn.Identity(), q, k, k, mask, is_causal=False), 1e-12)


def pairs_of(mask: Tensor, batch: int, kv_length: int, q_length: int) -> Tensor:
    """What a mask of ours says of every pair, bool [batch, 1, q_length, kv_length]."""
    from flash.integrations.transformers_masks import Visibility

    if mask.dtype == torch.bool:
        return mask
    said, first = Visibility.of(mask, batch, q_length, kv_length)
    assert first == 0
    j = torch.arange(kv_length)
    i = torch.arange(q_length)[:, None] + kv_length - q_length
    sees = (j >= 0) & torch.ones_like(i).bool()
    if said.causal:
        sees = sees & (j <= i)
    if said.left is not None:
        sees = sees & (j >= i - said.left) & (said.causal | (j <= i + said.left))
    sees = sees.expand(mask.shape[0], 1, q_length, kv_length).clone()
    for rows in (said.shown, said.documents):
        if rows is not None:
            same = rows[:, None, :] if rows is said.shown else rows[:, :, None] == rows[:, None, :]
            sees &= same[:, None]
    return sees


def asked() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Requests as transformers' models make them: (creator, keywords)."""
    from transformers import DynamicCache, LlamaConfig, StaticCache, masking_utils

    config = LlamaConfig(**DECODER)
    config.sliding_window, config.attention_chunk_size = WINDOW, None
    chunks = LlamaConfig(**DECODER)
    chunks.attention_chunk_size = WINDOW
    padding = left_padded(torch.ones(2, SEQLEN, dtype=torch.long), (SEQLEN, 8))["attention_mask"]
    blocks = torch.tensor([-1] * 5 + [0] * 4 + [-1] * 3 + [1] * 7).expand(2, -1)

    def cache(kind: Any, filled: int, **options: Any) -> Any:
        past = kind(config=LlamaConfig(**DECODER), **options)
        for layer in range(2 if filled else 0):
            past.update(torch.zeros(2, 2, filled, 8), torch.zeros(2, 2, filled, 8), layer)
        return past

    of = {kind: getattr(masking_utils, f"create_{kind}_mask") for kind in (
        "causal", "sliding_window_causal", "chunked_causal", "bidirectional", "bidirectional_sliding_window",
    )}  # fmt: skip
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for kind, create in of.items():
        plain = {"config": chunks if "chunk" in kind else config, "attention_mask": None, "past_key_values": None}
        found[kind] = create, plain
        found[f"{kind}, padded"] = create, {**plain, "attention_mask": padding}
        if "bidirectional" in kind:
            continue
        found[f"{kind}, packed"] = create, {**plain, "position_ids": PACKED}
        found[f"{kind}, blocks"] = create, {**plain, "block_sequence_ids": blocks}
        found[f"{kind}, or"] = create, {**plain, "or_mask_function": lambda b, h, i, j: j < 3}
        found[f"{kind}, and"] = create, {**plain, "and_mask_function": lambda b, h, i, j: j > 0}
        for name, past in {
            "more": cache(DynamicCache, 5), "static": cache(StaticCache, 0, max_cache_len=32),
            "static, more": cache(StaticCache, 5, max_cache_len=32),
        }.items():  # fmt: skip
            found[f"{kind}, {name}"] = create, {**plain, "past_key_values": past}
    return found


def test_every_mask_says_of_every_pair_what_transformers_own_says() -> None:
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    from flash.integrations.transformers import register

    compact = []
    for name, (create, request) in asked().items():
        masks = {}
        for implementation in (register(), "pairs"):
            AttentionMaskInterface._global_mapping["pairs"] = lambda **x: sdpa_mask(
                **{**x, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            )
            request["config"]._attn_implementation_internal = implementation
            masks[implementation] = create(inputs_embeds=torch.zeros(2, SEQLEN, 32), **request)
        del AttentionMaskInterface._global_mapping["pairs"]
        ours, theirs = masks[register()], masks["pairs"]
        assert torch.equal(pairs_of(ours, 2, theirs.shape[3], SEQLEN).expand(theirs.shape), theirs), name
        if ours.dtype != torch.bool:
            compact.append(name)
            assert ours.untyped_storage().nbytes() <= 2 * 32 * 8, name
    wide = {name.split(", ", 1)[-1] for name in asked()} - {"blocks", "or", "and", "static", "static, more"}
    assert {name for name in asked() if name.split(", ", 1)[-1] in wide and "chunk" not in name} == set(compact)
