"""Attention of Hugging Face models: one line for a model that exists, or a name for `attn_implementation=`.

    enable(model)                                                          # and disable(model)
    AutoModel.from_pretrained(..., attn_implementation=register())

transformers calls two functions by that name: one makes the mask of a forward (`transformers_masks.py` says which), the
other is a layer's attention. A user's own 4-D mask, bool or float to be added, says all there is to say. Where no mask
was asked for, as in vision encoders, a layer's `is_causal` and `sliding_window` count.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from flash.attention import flash_attention, flash_attention_varlen
from flash.integrations import need
from flash.integrations.transformers_masks import Visibility, pairs, visibility
from flash.mods import MaskMod, document

NAME = "triton_attention"  # transformers takes any name with "flash" in it for one of its own
OWN = ("eager", "sdpa")  # what short sequences can be left to
IGNORED = {  # keywords that pass through layers to attention, and that attention does not depend on
    "cache_position",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "labels",
    "logits_to_keep",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "return_dict",
    "seq_idx",
    "token_type_ids",
    "use_cache",
}

# position_ids -> (version, documents), for the layers of a forward
_documents: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Implementation:
    """One attention implementation, as transformers knows it: an attention function (the object itself) and `mask`.

    instead_of is the implementation that a model had; sequences of fewer keys than min_seqlen are left to it.
    """

    instead_of: str | None = None
    min_seqlen: int = 0

    @property
    def name(self) -> str:
        return NAME if self.instead_of is None else f"{NAME}_from_{self.min_seqlen}_instead_of_{self.instead_of}"

    def register(self) -> str:
        """Make both functions known to transformers."""
        from transformers import AttentionInterface, AttentionMaskInterface

        document(torch.zeros(1, dtype=torch.int64))  # torch.compile must have met it once
        AttentionInterface.register(self.name, self)
        AttentionMaskInterface.register(self.name, self.mask)
        return self.name

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
    ) -> tuple[Tensor, Tensor | None]:
        """What transformers' attention layers call; see attend."""
        if key.shape[2] < self.min_seqlen:
            own = own_attention(self.instead_of, module)
            found: tuple[Tensor, Tensor | None] = own(module, query, key, value, attention_mask, **rest)
            return found
        return attend(module, query, key, value, attention_mask, **rest), None

    def mask(self, *, q_length: int, kv_length: int, device: Any = "cpu", **request: Any) -> Tensor | None:
        """What transformers' models call to say what a query may see; see visibility."""
        if kv_length < self.min_seqlen:
            from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

            own: Callable[..., Tensor | None] = ALL_MASK_ATTENTION_FUNCTIONS[self.instead_of]
            return own(q_length=q_length, kv_length=kv_length, device=device, **request)
        found = visibility(q_length, kv_length, **request)
        return pairs(q_length, kv_length, device, request) if found is None else found.mask(device)


def register() -> str:
    """Make flash attention an attention implementation of transformers, for models that are loaded by its name.

        AutoModel.from_pretrained(..., attn_implementation=register())

    Unlike enable, this looks at no model: one that lacks transformers' attention interface ignores the name.

    Returns:
        The name, "triton_attention".

    Raises:
        ImportError: transformers is not installed.

    Source: transformers' documentation, "Attention Interface",
        https://huggingface.co/docs/transformers/attention_interface.
    """
    need("transformers")
    return Implementation().register()


def enable(model: nn.Module, min_seqlen: int = 0) -> None:
    """Let every Hugging Face model in a module attend through flash_attention; its weights and code stay as they are.

        o = softmax(scaling * q k^T + what the model adds, over the keys that its mask shows) v

    with windows, soft caps, sinks, position biases and packed documents, in training and in generation. Attention
    weights are never made: output_attentions=True raises where a model tells its attention of it, and others return
    none. Documents that position_ids pack do not see each other, with a cache too, where transformers' own attention
    lets them. A padded query that sees no key is 0 here, and a mean of all values in eager attention: a loss that is
    taken of one, as the last before the first token of a row padded on the left, differs by that. A model that was
    pickled as it is wants to be enabled again; save_pretrained keeps nothing of this.

    Args:
        model: a PreTrainedModel, or a module that holds some (peft's, sentence-transformers').
        min_seqlen: attention over fewer keys than this many stays the model's own, "eager" or "sdpa": 512 is a usual
            choice for embedding models. In generation, keys are counted at each step; those of a static cache are all
            its places. Default: 0, none.

    Raises:
        ImportError: transformers is not installed.
        NotImplementedError: a model in it lacks transformers' attention interface, or might lose its causality: it
            supports neither "sdpa" nor flash attention, and none of its layers says that it is causal.
        ValueError: there is no such model in it, min_seqlen is no such number, or the model's own attention is neither
            "eager" nor "sdpa" where short sequences are left to it.
    """
    if isinstance(min_seqlen, bool) or not isinstance(min_seqlen, int) or min_seqlen < 0:
        raise ValueError(f"min_seqlen must be an int >= 0, got {min_seqlen!r}")
    models = list(outermost(model))
    if not models:
        raise ValueError(f"model must be or hold a transformers.PreTrainedModel, got {type(model).__name__}")
    for each in models:
        check_causality(each)

    def chosen(current: str, stock: str) -> str:
        before = instead_of(current, stock)
        if min_seqlen and before not in OWN:
            raise ValueError(
                f"min_seqlen={min_seqlen} leaves short sequences to the model's own attention, which must be one of "
                f"{', '.join(OWN)}, got {before!r}; call model.set_attn_implementation first, or leave min_seqlen at 0"
            )
        return Implementation(before, min_seqlen).register()

    for each, plan in [(each, choices(each, each.config, chosen)) for each in models]:
        each.set_attn_implementation(plan)


def disable(model: nn.Module) -> None:
    """Give every Hugging Face model in a module back the attention that it had before enable.

    Args:
        model: what enable was called with.

    Raises:
        ImportError: transformers is not installed.
        ValueError: no model in it was enabled.
    """
    models = [each for each in outermost(model) if implementation(each.config._attn_implementation) is not None]
    if not models:
        raise ValueError(f"model must be or hold one that enable was called with, got {type(model).__name__}")
    for each in models:
        each.set_attn_implementation(choices(each, each.config, instead_of))


def outermost(model: nn.Module) -> Iterator[Any]:
    """The PreTrainedModels in a module that lie in no other one."""
    need("transformers")
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        yield model
        return
    for child in model.children():
        yield from outermost(child)


def choices(model: Any, config: Any, choose: Callable[[str, str], str]) -> str | dict[str, Any]:
    """For set_attn_implementation: what is chosen instead of the implementation of a config, and of each one in it."""
    stock = "sdpa" if model._supports_sdpa else "eager"
    own = choose(config._attn_implementation or stock, stock)
    inner = {name: getattr(config, name, None) for name in config.sub_configs}
    if all(sub is None for sub in inner.values()):
        return own
    return {"": own, **{name: choices(model, sub, choose) for name, sub in inner.items() if sub is not None}}


def implementation(name: str | None) -> Implementation | None:
    """Ours by its name; None of another."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found = ALL_ATTENTION_FUNCTIONS.get(name)
    return found if isinstance(found, Implementation) else None


def instead_of(name: str, stock: str) -> str:
    """What a model had before, where the name is ours; `stock` where it was loaded by our name."""
    ours = implementation(name)
    return name if ours is None else ours.instead_of or stock


def check_causality(model: Any) -> None:
    """Raise where a model would not call us, or might attend to the future."""
    from transformers import PreTrainedModel

    for each in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        if not each._can_set_attn_implementation():
            raise NotImplementedError(
                f"{type(each).__name__} does not attend through transformers' attention interface, so that nothing "
                "would change; enable a model within it that does"
            )
    vouched = model._supports_sdpa or model._supports_flash_attn
    if not vouched and not any(getattr(module, "is_causal", False) is True for module in model.modules()):
        raise NotImplementedError(
            f"{type(model).__name__} supports neither sdpa nor flash attention, and none of its layers says that it is "
            'causal: with anything but attn_implementation="eager" it might attend to the future'
        )


def own_attention(name: str | None, module: nn.Module) -> Callable[..., Any]:
    """The attention function that a layer would call without us."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name != "eager":
        found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
        return found
    file = sys.modules[type(module).__module__]
    eager: Callable[..., Any] | None = getattr(file, "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(
            f"{file.__name__} has no eager_attention_forward to leave short sequences to; enable with min_seqlen=0"
        )
    return eager


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    deterministic: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> Tensor:
    """The attention of a layer, as transformers asks for it; key heads are never repeated.

    Args:
        module: the layer; its is_causal counts where neither a mask nor the keyword says it.
        query: [batch, heads, seqlen_q, head_dim].
        key: [batch, heads_k, seqlen_k, head_dim].
        value: [batch, heads_k, seqlen_k, head_dim_v].
        attention_mask: what our mask function returned, or a user's own mask that broadcasts to [batch, heads,
            seqlen_q, seqlen_k], bool (True = attend) or float, added to the score.
        dropout: probability that an attention weight is dropped. Default: 0.0.
        scaling: factor of q.k. Default: head_dim ** -0.5.
        is_causal: as the module's. Default: the module's.
        sliding_window: W keys to the left, a query's own among them, and as many to the right if not causal; a mask of
            ours has it already. Default: none.
        softcap: as flash_attention's. Default: none.
        s_aux: [heads], sinks. Default: none.
        position_bias: added to the score, with a gradient, [1 or batch, heads, seqlen_q, seqlen_k]. Default: none.
        position_ids: [1 or batch, seqlen_q]: a sequence that starts again at 0 is another document. Default: one.
        deterministic: True as flash_attention's. Default: torch's setting.
        cu_seq_lens_q: int32 [documents + 1], where packed documents of a batch of one start. Default: none.
        cu_seq_lens_k: likewise for the keys.
        max_length_q: length of the longest document; not needed.
        max_length_k: likewise for the keys.
        others: what attention does not depend on.

    Returns:
        o [batch, seqlen_q, heads, head_dim_v], contiguous.

    Raises:
        NotImplementedError: a keyword that is not known here may change the result, or weights are asked for.
        ValueError: the mask does not fit, or what is said of causality is contradictory.
    """
    refuse(others)
    seen: dict[str, Any] = {}
    bias = position_bias
    if attention_mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        seen = band(causal, None if sliding_window is None else sliding_window - 1)
    elif attention_mask.dim() != 4:
        raise ValueError(f"attention_mask must have 4 dimensions, got shape {list(attention_mask.shape)}")
    elif attention_mask.dtype == torch.bool:
        seen = {"mask": attention_mask}
    elif attention_mask.is_floating_point():
        bias = attention_mask if bias is None else bias + attention_mask
    else:
        seqlen_q = query.shape[2]
        said, row = Visibility.of(attention_mask, query.shape[0], seqlen_q, key.shape[2])
        if said.causal and is_causal is False:
            raise ValueError("is_causal must not be False beside a causal mask; set model.config.is_causal = False")
        seen = band(said.causal, said.left)
        first = said.keys - said.rows + row  # place of the first query among the keys
        if row + seqlen_q != said.rows:  # the model has left out the last ones
            seen["q_offset"] = first
        if said.shown is not None:
            seen["mask"] = said.shown[:, None, None]
        elif said.documents is not None:
            seen["mask_mod"] = document(said.documents[:, first : first + seqlen_q].contiguous(), said.documents)
        elif said.causal and not said.whole and cu_seq_lens_q is None and seqlen_q == said.keys:
            seen["mask_mod"] = restarts(position_ids)

    keywords = dict(scale=scaling, softcap=softcap, sinks=s_aux, bias=bias, dropout_p=dropout, **seen)
    keywords["deterministic"] = deterministic or None
    if cu_seq_lens_q is None:
        o = flash_attention(query, key, value, **keywords)
        assert isinstance(o, Tensor)
        return o.transpose(1, 2).contiguous()
    if cu_seq_lens_k is None or query.shape[0] != 1 or bias is not None or "mask" in seen:
        raise ValueError(
            "cu_seq_lens_q must come with cu_seq_lens_k, a batch of one, no padding and no bias, got others"
        )
    keywords["mask_mod"] = None  # the same documents
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    o = flash_attention_varlen(
        *rows, cu_seqlens_q=cu_seq_lens_q, cu_seqlens_k=cu_seq_lens_k, max_seqlen_q=max_length_q or 0,
        max_seqlen_k=max_length_k or 0, **keywords,
    )  # fmt: skip
    assert isinstance(o, Tensor)
    return o.unsqueeze(0).contiguous()


def refuse(keywords: dict[str, Any]) -> None:
    """Raise where a keyword would change the result."""
    for name, value in keywords.items():
        if name == "output_attentions" and value:
            raise NotImplementedError(
                "output_attentions=True asks for weights that are never made; "
                'use model.set_attn_implementation("eager")'
            )
        if name not in IGNORED and value is not None and value is not False:
            raise NotImplementedError(
                f"{name} is not known here and may change the result; use the model's own attention, "
                'model.set_attn_implementation("sdpa") or "eager"'
            )


def band(causal: bool, left: int | None) -> dict[str, Any]:
    """causal and window of flash_attention; a window that is not causal reaches as far to the right."""
    window = None if left is None else (left, None if causal else left)
    return {"causal": causal, "window": window}


def restarts(position_ids: Tensor | None) -> MaskMod | None:
    """Documents that begin where positions begin again at 0; None of a sequence that is one document.

    Models that pass position_ids to transformers' mask functions had this done there; GPT-OSS does not pass them.
    """
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] < 2:
        return None
    if torch.compiler.is_compiling():
        return document((position_ids == 0).cumsum(-1))
    version = None if position_ids.is_inference() else position_ids._version
    found = _documents.get(position_ids)
    if found is None or version is None or found[0] != version:
        several = bool((position_ids[:, 1:] == 0).any())  # waits for the device, once a forward
        found = version, (position_ids == 0).cumsum(-1) if several else None
        _documents[position_ids] = found
    return None if found[1] is None else document(found[1])
