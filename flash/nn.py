"""Modules: attention with torch's own face, and a transformer block.

MultiheadAttention      stands in for torch.nn.MultiheadAttention: its arguments, its state_dict, its answers
TransformerBlock        pre-norm attention and perceptron, with rotary positions, grouped heads and SwiGLU by choice
KeyValueCache           the keys and values of a generation so far
attention_weights       weights to look at (`flash/weights.py`)
memory_estimate         bytes that attention needs (`flash/footprint.py`)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import flash_attention, flash_attention_varlen
from .checks import check_sizes
from .footprint import MemoryEstimate, memory_estimate
from .problem import ConfigLike, Window
from .weights import attention_weights, weights_of

__all__ = [
    "KeyValueCache", "MemoryEstimate", "MultiheadAttention", "TransformerBlock", "attention_weights",
    "memory_estimate", "rotary",
]  # fmt: skip


def keep_from_the_fast_path(module: nn.Module, args: Any) -> None:
    """A forward pre-hook that does nothing: where a module has one, torch's encoder layers call the module.

    Otherwise nn.TransformerEncoderLayer, in eval mode and without gradients, gives the module's weights to a kernel of
    its own that holds all scores (torch/nn/modules/transformer.py, `why_not_sparsity_fast_path`; torch 2.13).
    """


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on flash_attention: no [seqlen_q, seqlen_k] matrix unless its weights are asked for.

        head_h = attention(query W_h^Q, key W_h^K, value W_h^V)
        output = concat(head_1, ..., head_heads) W^O

    Its arguments, parameters, state_dict and answers are those of torch.nn.MultiheadAttention, so that weights load
    either way. It may replace `self_attn` and `multihead_attn` of torch's encoder and decoder layers, which call it in
    eval mode too. Where it differs:

    - A query that may see no key gets the output of o = 0, and weights 0; torch has NaN or 0.
    - The weights it returns are those before dropout.
    - With `is_causal` and `key_padding_mask` both are taken at their word, and `attn_mask` is not read.
    - A float `attn_mask` and a float `key_padding_mask` are added up, [batch, 1 or heads, seqlen_q, seqlen_k], if
      there is more than one sequence; with one of them bool nothing is made larger.
    - Nested tensors are served with need_weights=False and without masks, in training too.

    Args:
        embed_dim: width of query and output.
        num_heads: heads; they divide embed_dim.
        dropout: probability that a weight is dropped, in training only. Default: 0.0.
        bias: give the projections a bias. Default: True.
        add_bias_kv: append a learned key and value to every sequence, which copies keys and values. Default: False.
        add_zero_attn: append a key and a value of zeros to every sequence; a sink stands for them. Default: False.
        kdim: width of key. Default: embed_dim.
        vdim: width of value. Default: embed_dim.
        batch_first: inputs and output are [batch, seqlen, width]; else [seqlen, batch, width]. Default: False.
        device, dtype: of the parameters.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2, https://arxiv.org/abs/1706.03762.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.register_forward_pre_hook(keep_from_the_fast_path)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of query to key and value, and its weights.

        Args:
            query: [seqlen_q, batch, embed_dim], [batch, seqlen_q, embed_dim] with batch_first, or without a batch
                [seqlen_q, embed_dim].
            key: likewise, [.., seqlen_k, .., kdim].
            value: likewise, [.., seqlen_k, .., vdim].
            key_padding_mask: [batch, seqlen_k], or [seqlen_k] without a batch; bool, True = ignored, or float, added to
                the scores. Default: none.
            need_weights: also return the weights, computed in blocks from lse. Default: True, as in torch.
            attn_mask: [seqlen_q, seqlen_k] or [batch * num_heads, seqlen_q, seqlen_k]; bool, True = hidden, or float,
                added to the scores and differentiable. Default: none.
            average_attn_weights: return the mean of the weights over heads. Default: True.
            is_causal: attn_mask is the causal mask, key j visible to query i when j <= i, so that it need not be read;
                it must be given nonetheless. It is read where weights are asked for. Default: False.

        Returns:
            (output, weights): output as query, with embed_dim; weights None, or differentiable [batch, seqlen_q,
            seqlen_k], [batch, num_heads, seqlen_q, seqlen_k] without average, either without a batch as query.

        Raises:
            ValueError: an argument is wrong; the message names it.
            NotImplementedError: a nested tensor comes with masks, with need_weights or to a module with add_bias_kv.
        """
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if any(x.is_nested for x in (query, key, value)):
            if need_weights or is_causal or key_padding_mask is not None or attn_mask is not None:
                raise NotImplementedError(
                    "query must be padded for weights, masks and is_causal; nested tensors go with need_weights=False"
                )
            return self.forward_nested(query, key, value), None
        check_inputs(query, key, value, key_padding_mask, attn_mask, self.num_heads, self.batch_first)
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.shape[-1] != width:
                raise ValueError(f"{name} must have {width} features, got shape {list(x.shape)}")
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given with is_causal, which says that it is the causal mask; got None")
        batched, same = query.dim() == 3, query is key and key is value
        projected = self.project(query, key, value, same)
        if not batched:
            projected = tuple(x.unsqueeze(0) for x in projected)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            projected = tuple(x.transpose(0, 1) for x in projected)
        q, k, v = (x.transpose(1, 2) for x in projected)  # views [batch, heads, seqlen, head_dim]
        causal = is_causal and not need_weights and self.bias_k is None
        if self.bias_k is not None and self.bias_v is not None:
            learned = [x.view(1, self.num_heads, 1, -1).expand(len(q), -1, -1, -1) for x in (self.bias_k, self.bias_v)]
            k, v = torch.cat([k, learned[0]], 2), torch.cat([v, learned[1]], 2)
            key_padding_mask = None if key_padding_mask is None else F.pad(key_padding_mask, (0, 1))  # visible
            attn_mask = None if attn_mask is None else F.pad(attn_mask, (0, 1))
        mask, bias = self.masks(q, key_padding_mask, None if causal else attn_mask)
        sinks = torch.zeros(self.num_heads, dtype=q.dtype, device=q.device) if self.add_zero_attn else None
        o, lse = flash_attention(
            q, k, v, causal=causal, q_offset=0 if causal else None, mask=mask, bias=bias, sinks=sinks,
            dropout_p=self.dropout if self.training else 0.0, return_lse=True,
        )  # fmt: skip
        o = o.transpose(1, 2)
        o = o.squeeze(0) if not batched else o if self.batch_first else o.transpose(0, 1)
        output = F.linear(o.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        if not need_weights:
            return output, None
        weights = weights_of(q, k, lse, mask, bias, self.head_dim**-0.5, average_attn_weights)
        if self.add_zero_attn:
            zero = lse.neg().exp().to(weights.dtype)
            zero = zero.mean(1) if average_attn_weights else zero
            weights = torch.cat([weights, zero.unsqueeze(-1)], -1)
        return output, weights if batched else weights.squeeze(0)

    def memory_estimate(self, batch: int, seqlen: int) -> MemoryEstimate:
        """Bytes that this module's attention needs beside its projections; see flash.nn.memory_estimate."""
        return memory_estimate(batch, seqlen, self.num_heads, self.head_dim, self.out_proj.weight.dtype)

    def project(self, query: Tensor, key: Tensor, value: Tensor, same: bool) -> tuple[Tensor, ...]:
        """q, k and v [.., seqlen, heads, head_dim] of inputs [.., seqlen, width], all three in one if they are same."""
        if same and self.in_proj_weight is not None:
            projected: Tensor = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            return tuple(projected.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3))
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim))
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )

    def masks(
        self, q: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """flash_attention's mask (True = visible) and bias, of four axes each; neither is expanded."""
        if attn_mask is not None:
            shape = (1, 1) if attn_mask.dim() == 2 else (q.shape[0], self.num_heads)
            attn_mask = attn_mask.view(*shape, *attn_mask.shape[-2:])
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, None, None]
        given = [x for x in (attn_mask, key_padding_mask) if x is not None]
        hidden, added = [x for x in given if x.dtype == torch.bool], [x for x in given if x.dtype != torch.bool]
        if len(hidden) == 2:  # of two, the one without rows can be a bias: it is small
            padding = torch.zeros(hidden[1].shape, dtype=q.dtype, device=q.device)
            added = [padding.masked_fill(hidden[1], float("-inf"))]
        mask = ~hidden[0] if hidden else None
        return mask, None if not added else added[0] if len(added) == 1 else added[0] + added[1]

    def forward_nested(self, query: Any, key: Any, value: Any) -> Tensor:
        """Attention within each sequence of nested [batch, *, width]: a packed call on what they hold."""
        if self.bias_k is not None:
            raise NotImplementedError(
                "add_bias_kv is not served with nested tensors; pass padded ones and key_padding_mask"
            )
        same = query is key and key is value
        rows_q, starts_q = packed(query)
        (rows_k, starts_k), (rows_v, _) = [(rows_q, starts_q)] * 2 if same else (packed(key), packed(value))
        q, k, v = self.project(rows_q, rows_k, rows_v, same)
        o = flash_attention_varlen(
            q, k, v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, max_seqlen_q=0, max_seqlen_k=0,
            sinks=torch.zeros(self.num_heads, dtype=q.dtype, device=q.device) if self.add_zero_attn else None,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        assert isinstance(o, Tensor)
        output = F.linear(o.flatten(1), self.out_proj.weight, self.out_proj.bias)
        if query.layout == torch.jagged:
            return torch.nested.nested_tensor_from_jagged(output, query.offsets())
        return torch.nested.as_nested_tensor(list(output.split(starts_q.diff().tolist())))


def check_inputs(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, heads: int,
    batch_first: bool,
) -> None:  # fmt: skip
    """Raise ValueError where flash_attention could not tell what is wrong with a module's inputs."""
    axes = query.dim()
    if axes not in (2, 3) or key.dim() != axes or value.dim() != axes:
        got = query.dim(), key.dim(), value.dim()
        raise ValueError(f"query, key and value must all have 3 dimensions, or 2 without a batch, got {got}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"value must have batch and length of key, {tuple(key.shape[:-1])}, got {tuple(value.shape)}")
    seqlen_axis = 0 if axes == 2 or not batch_first else 1
    batch = 1 if axes == 2 else query.shape[1 - seqlen_axis]
    if axes == 3 and key.shape[1 - seqlen_axis] != batch:
        raise ValueError(f"key must have batch {batch} like query, got {key.shape[1 - seqlen_axis]}")
    lengths = (query.shape[seqlen_axis], key.shape[seqlen_axis])
    padding = (batch, lengths[1]) if axes == 3 else lengths[1:]
    for name, mask, shapes in (
        ("key_padding_mask", key_padding_mask, [padding]),
        ("attn_mask", attn_mask, [lengths, (batch * heads, *lengths)]),
    ):
        if mask is None:
            continue
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"{name} must be bool, True = ignored, or float, got {mask.dtype}")
        if tuple(mask.shape) not in shapes:
            expected = " or ".join(str(shape) for shape in shapes)
            raise ValueError(f"{name} must have shape {expected}, got {tuple(mask.shape)}")


def packed(x: Any) -> tuple[Tensor, Tensor]:
    """The rows of a nested tensor [batch, *, width], [total, width]; where its sequences start, int32 [batch + 1]."""
    if not x.is_nested:
        raise NotImplementedError("query, key and value must all be nested tensors where one is")
    if x.layout == torch.jagged:
        if x._ragged_idx != 1 or x.lengths() is not None:
            raise NotImplementedError("a jagged nested tensor must be [batch, *, width]; x.contiguous() leaves no gaps")
        return x.values(), x.offsets().to(torch.int32)
    parts = x.unbind()
    lengths = torch.tensor([0, *(len(part) for part in parts)], dtype=torch.int32)
    return torch.cat(parts), lengths.cumsum(0, dtype=torch.int32).to(x.device)


class KeyValueCache:
    """The keys and values of one block's sequences so far; it grows by concatenation, which copies it at every step.

    Attributes:
        k: [batch, heads_k, seqlen, head_dim], None before the first call.
        v: likewise.
    """

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def __len__(self) -> int:
        """How many positions it holds."""
        return 0 if self.k is None else self.k.shape[2]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, those of k and v [batch, heads_k, new, head_dim] last."""
        self.k = k if self.k is None else torch.cat([self.k, k], 2)
        self.v = v if self.v is None else torch.cat([self.v, v], 2)
        return self.k, self.v


def rotary(x: Tensor, start: int = 0, base: float = 10000.0) -> Tensor:
    """Rotary position embedding: each pair of coordinates turns by an angle that grows with the position.

        (x_t, x_{t + d/2}) <- rotation by i * base^(-2t / d) of it          at position i, t < d / 2

    Args:
        x: [.., seqlen, head_dim], an even head_dim.
        start: position of the first row. Default: 0.
        base: the longest wavelength is near 2 pi base. Default: 10000.

    Returns:
        The rotated tensor, of x's shape and dtype; angles are float32 (float64 for float64).

    Source: Su et al. 2021, "RoFormer", https://arxiv.org/abs/2104.09864; the halves are paired as in Llama.
    """
    seqlen, head_dim = x.shape[-2:]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    positions = torch.arange(start, start + seqlen, device=x.device, dtype=dtype)
    frequencies = base ** (-torch.arange(0, head_dim, 2, device=x.device, dtype=dtype) / head_dim)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    one, two = x.chunk(2, -1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1).to(x.dtype)


class TransformerBlock(nn.Module):
    """A pre-norm transformer block.

        x <- x + dropout(W^O attention(norm(x)))
        x <- x + dropout(W^down act(norm(x)))           act(y) = gelu(W^up y), or silu(W^gate y) * W^up y with swiglu

    Its parameters are norm_attention, qkv (rows: heads of q, then heads_k of k, then heads_k of v, head_dim each), out,
    norm_mlp, up (with swiglu rows of gate, then of up) and down; nothing else is state. Dropout, of weights and of
    both branches, acts in training only.

    Args:
        embed_dim: width of x.
        heads: query heads.
        heads_k: key and value heads; they divide heads (grouped-query attention). Default: heads.
        head_dim: width of a head. Default: embed_dim // heads.
        hidden_dim: width inside the perceptron. Default: 4 * embed_dim; with swiglu 8/3 of it, up to a multiple of 8,
            which is as many parameters.
        swiglu: a gated perceptron. Default: False.
        rope_base: rotate q and k by their positions (see rotary), with this base. Default: no rotary positions.
        norm: "layer" or "rms". Default: "layer".
        bias: give linear layers and layer norms a bias. Default: True.
        dropout: probability, in [0, 1). Default: 0.0.
        causal, window, backend, config: as in flash_attention.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument is wrong; the message names it.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, with norms as in Xiong et al. 2020,
        https://arxiv.org/abs/2002.04745, and SwiGLU of Shazeer 2020, https://arxiv.org/abs/2002.05202.
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        *,
        heads_k: int | None = None,
        head_dim: int | None = None,
        hidden_dim: int | None = None,
        swiglu: bool = False,
        rope_base: float | None = None,
        norm: str = "layer",
        bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        window: Window = None,
        backend: str = "auto",
        config: ConfigLike = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        embed_dim, heads = check_sizes(dict(embed_dim=embed_dim, heads=heads)).values()
        given = dict(heads_k=heads_k, head_dim=head_dim, hidden_dim=hidden_dim)
        sizes = check_sizes({name: size for name, size in given.items() if size is not None})
        heads_k, head_dim, hidden_dim = (sizes.get(name) for name in given)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.heads, self.heads_k = heads, heads if heads_k is None else heads_k
        if head_dim is None and embed_dim % heads:
            raise ValueError(f"heads must divide embed_dim {embed_dim}, or head_dim be given, got {heads}")
        if heads % self.heads_k:
            raise ValueError(f"heads_k must divide heads {heads}, got {heads_k}")
        self.head_dim = embed_dim // heads if head_dim is None else head_dim
        if rope_base is not None and self.head_dim % 2:
            raise ValueError(f"head_dim must be even with rope_base, got {self.head_dim}")
        if norm not in ("layer", "rms"):
            raise ValueError(f'norm must be "layer" or "rms", got {norm!r}')
        if hidden_dim is None:
            hidden_dim = -(-8 * embed_dim // 24) * 8 if swiglu else 4 * embed_dim
        self.swiglu, self.rope_base, self.dropout = swiglu, rope_base, dropout
        self.attention: dict[str, Any] = dict(causal=causal, window=window, backend=backend, config=config)
        made: dict[str, Any] = dict(device=device, dtype=dtype)

        def normalisation() -> nn.Module:
            return nn.LayerNorm(embed_dim, bias=bias, **made) if norm == "layer" else nn.RMSNorm(embed_dim, **made)

        width = self.heads * self.head_dim
        self.norm_attention = normalisation()
        self.qkv = nn.Linear(embed_dim, width + 2 * self.heads_k * self.head_dim, bias=bias, **made)
        self.out = nn.Linear(width, embed_dim, bias=bias, **made)
        self.norm_mlp = normalisation()
        self.up = nn.Linear(embed_dim, hidden_dim * (2 if swiglu else 1), bias=bias, **made)
        self.down = nn.Linear(hidden_dim, embed_dim, bias=bias, **made)

    def memory_estimate(self, batch: int, seqlen: int) -> MemoryEstimate:
        """Bytes that this block's attention needs beside its projections; see flash.nn.memory_estimate."""
        return memory_estimate(batch, seqlen, self.heads, self.head_dim, self.out.weight.dtype)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """The block's output.

        Args:
            x: [batch, seqlen, embed_dim]; with a cache the positions that follow it.
            mask: flash_attention's: bool, True = attend, broadcastable to [batch, heads, seqlen, seqlen_k]. Default:
                none.
            cache: keys and values of earlier positions, to which those of x are appended. Default: none.

        Returns:
            [batch, seqlen, embed_dim].
        """
        dropout = self.dropout if self.training else 0.0
        projected = self.qkv(self.norm_attention(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = projected.split([self.heads, self.heads_k, self.heads_k], 1)  # views [batch, heads, seqlen, head_dim]
        if self.rope_base is not None:
            start = 0 if cache is None else len(cache)
            q, k = rotary(q, start, self.rope_base), rotary(k, start, self.rope_base)
        if cache is not None:
            k, v = cache.append(k, v)
        o = flash_attention(q, k, v, mask=mask, dropout_p=dropout, **self.attention)
        assert isinstance(o, Tensor)
        x = x + F.dropout(self.out(o.transpose(1, 2).flatten(2)), dropout, self.training)
        y = self.up(self.norm_mlp(x))
        if self.swiglu:
            gate, y = y.chunk(2, -1)
            y = F.silu(gate) * y
        else:
            y = F.gelu(y)
        return x + F.dropout(self.down(y), dropout, self.training)
