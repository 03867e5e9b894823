"""neuralforecast's time-series models with exact attention: `enable(model)`, and `disable(model)` to go back.

    TFT, PatchTST, iTransformer, VanillaTransformer, TimeXer    exact: predictions, losses and gradients stay
    Informer, Autoformer, FEDformer                             no softmax over all keys: left alone, with a warning
    these three with mechanism="full"                           exact full attention, which is another model

A module of attention gives its place to one of those here, which holds its parameters and buffers under their names, so
that checkpoints fit both ways. What is saved does not know of it: enable a model again after it was loaded.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..attention import flash_attention
from . import need

Model = TypeVar("Model")
FULL = "-full"  # ends the alias of a model whose mechanism was swapped, and the columns of its predictions


def enable(model: Model, mechanism: str | None = None) -> Model:
    """Give a neuralforecast model exact attention in memory that grows with the sequence, in place.

        TFT             o = 1/heads sum_h softmax(scale Q_h K_h^T) V, one V for all heads; its weights are computed when
                        `attention_weights()` or `feature_importance_correlations()` asks for them
        PatchTST        S_l = S_(l-1) + scale Q_l K_l^T = scale [Q_1 .. Q_l] [K_1 .. K_l]^T
        iTransformer    softmax(scale Q K^T) V, as it was

    TFT's buffer of seqlen^2 numbers is dropped, and written into checkpoints all the same. Attention dropout acts in
    training only, which mends PatchTST(res_attention=False): by itself (neuralforecast 3.3.0) it drops in predictions
    as well. VanillaTransformer's decoder stays without causality, as it is by itself (neuralforecast 3.3.0).

    Args:
        model: a model of neuralforecast, or a NeuralForecast with several; those without attention stay as they are.
        mechanism: None, or "full", by which Informer's ProbSparse attention, Autoformer's auto-correlation and
            FEDformer's Fourier blocks are swapped for softmax(Q K^T / sqrt(head_dim)) V, causal where their mask_flag
            is set (in the decoders of Informer and Autoformer). It is another model that wants its own training, and
            its alias ends in "-full"; FEDformer's Fourier weights are frozen. Default: None, these models are left
            alone, and a UserWarning says so.

    Returns:
        The model that was given.

    Raises:
        ImportError: neuralforecast is not installed.
        ValueError: mechanism is another, or there is no attention in the model; and when a PatchTST runs whose number
            of layers times head_dim is beyond 512.
        TypeError: model is neither of the two.
        NotImplementedError: a module of attention was made with output_attention=True.

    Source: Lim et al. 2021, "Temporal Fusion Transformers", https://arxiv.org/abs/1912.09363; He et al. 2021,
        "RealFormer", https://arxiv.org/abs/2012.11747 (the scores that add up over layers).
    """
    if mechanism not in (None, "full"):
        raise ValueError(f'mechanism must be None or "full", got {mechanism!r}')
    exact, others = known()
    swaps: list[tuple[torch.nn.Module, str, StandIn]] = []
    left: dict[str, str] = {}
    renamed: list[Any] = []
    served = False
    for one in models_of(model):
        for parent, name, child in children(one):
            if isinstance(child, StandIn):
                served = True
            elif type(child) in exact:
                swaps.append((parent, name, exact[type(child)](child)))  # may raise, and then nothing was swapped yet
            elif type(child) in others and mechanism is None:
                left[name_of(one)] = others[type(child)]
            elif type(child) in others:
                swaps.append((parent, name, FullAttention(child, causal=getattr(child, "mask_flag", False))))
                renamed.append(one)
    if not (swaps or left or served):
        raise ValueError(f"model must have attention of neuralforecast, got {type(model).__name__} without")
    for parent, name, stand_in in swaps:
        stand_in.take_over()
        setattr(parent, name, stand_in)
    for one in renamed:
        one.alias = name_of(one).removesuffix(FULL) + FULL
    for name, what in left.items():
        warnings.warn(
            f'{name} has {what}, which is no softmax over all keys: it is left alone. mechanism="full" swaps in exact '
            "full attention, which is another model",
            stacklevel=2,
        )
    return model


def disable(model: Model) -> Model:
    """Undo `enable`: the model's own attention comes back, with the parameters as they are now.

    Args:
        model: what was given to `enable`; one that was not is left as it is.

    Returns:
        The model that was given.

    Raises:
        ImportError: neuralforecast is not installed.
        TypeError: model is no model of neuralforecast and no NeuralForecast.
    """
    _, others = known()
    for one in models_of(model):
        stand_ins = [(parent, name, child) for parent, name, child in children(one) if isinstance(child, StandIn)]
        for parent, name, child in stand_ins:
            setattr(parent, name, child.give_back())
        if any(type(child.own[0]) in others for _, _, child in stand_ins):
            name = name_of(one).removesuffix(FULL)
            one.alias = None if name == type(one).__name__ else name
    return model


def models_of(model: Any) -> list[Any]:
    """The models in what a user has; those of a NeuralForecast twice, as it copies what it was made of."""
    from neuralforecast import NeuralForecast
    from neuralforecast.common._base_model import BaseModel

    tops = [*model.models_init, *model.models] if isinstance(model, NeuralForecast) else [model]
    if not all(isinstance(top, torch.nn.Module) for top in tops):
        raise TypeError(f"model must be a model of neuralforecast or a NeuralForecast, got {type(model).__name__}")
    return [one for top in tops for one in top.modules() if isinstance(one, BaseModel)]


def children(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Module]]:
    """(parent, name, child) of all that lies within a module; a child of several parents comes with each."""
    for parent in module.modules():
        for name, child in parent._modules.items():
            if child is not None:
                yield parent, name, child


def name_of(model: Any) -> str:
    """What neuralforecast calls a model."""
    return str(model.alias or type(model).__name__)


def known() -> tuple[dict[type, Any], dict[type, str]]:
    """neuralforecast's modules with softmax attention and who stands in for them, and those with something else."""
    need("neuralforecast")
    from neuralforecast.common import _modules
    from neuralforecast.models import autoformer, fedformer, informer, patchtst, tft

    exact = {
        tft.InterpretableMultiHeadAttention: InterpretableAttention,
        patchtst._ScaledDotProductAttention: ResidualAttention,
        _modules.FullAttention: full_attention,
    }
    others = {
        informer.ProbAttention: "ProbSparse attention",
        autoformer.AutoCorrelation: "auto-correlation",
        fedformer.FourierBlock: "Fourier blocks",
        fedformer.FourierCrossAttention: "Fourier blocks",
    }
    return exact, others


class StandIn(torch.nn.Module):
    """In the place of a module of neuralforecast, with its parameters, buffers and submodules under their names."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.own = (own,)  # in a tuple, as a module would be registered

    def take_over(self) -> None:
        own = self.own[0]
        for mine, its in self.registries():
            mine.update(its)
        self.training = own.training

    def give_back(self) -> Any:
        own = self.own[0]
        for mine, its in self.registries():
            its.update(mine)
        own.training = self.training
        return own

    def registries(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        names = ("_parameters", "_buffers", "_modules")
        return [(getattr(self, name), getattr(self.own[0], name)) for name in names]

    def dropout_p(self, name: str) -> float:
        """The probability of a nn.Dropout of ours, where there is one and this is training."""
        dropout: Any = self._modules.get(name)
        return float(dropout.p) if dropout is not None and self.training else 0.0


def full_attention(own: Any) -> "FullAttention":
    """In the place of neuralforecast's FullAttention, whose mask_flag does nothing where it returns no weights."""
    if own.output_attention:
        raise NotImplementedError(
            "FullAttention(output_attention=True) returns its weights, seqlen^2 of them; set output_attention to False"
        )
    return FullAttention(own, scale=own.scale or None)


class FullAttention(StandIn):
    """softmax(scale Q K^T) V, in the place of a layer's inner attention; all are [batch, seqlen, heads, head_dim]."""

    def __init__(self, own: Any, causal: bool = False, scale: float | None = None) -> None:
        super().__init__(own)
        self.causal, self.scale = causal, scale

    def take_over(self) -> None:
        super().take_over()
        for weight in self._parameters.values():  # of Fourier blocks; DDP waits for gradients of all that want one
            weight.requires_grad_(False)  # type: ignore[union-attr]

    def give_back(self) -> Any:
        for weight in self._parameters.values():
            weight.requires_grad_(True)  # type: ignore[union-attr]
        return super().give_back()

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, attn_mask: Any = None, tau: Any = None, delta: Any = None
    ) -> tuple[Tensor, None]:
        if attn_mask is not None:
            raise NotImplementedError(
                "attn_mask is not served, as no model gives one; call flash.flash_attention with mask"
            )
        q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
        o = attend(q, k, v, causal=self.causal, scale=self.scale, dropout_p=self.dropout_p("dropout"))
        return o.transpose(1, 2).contiguous(), None


class ResidualAttention(StandIn):
    """PatchTST's: the scores of earlier layers are added, by concatenation of all queries and keys so far."""

    scale: Tensor

    def forward(
        self,
        q: Tensor,  # [batch, heads, seqlen, head_dim]
        k: Tensor,  # [batch, heads, head_dim, seqlen]
        v: Tensor,
        prev: tuple[Tensor, Tensor] | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> tuple[Any, ...]:
        if key_padding_mask is not None or attn_mask is not None:
            raise NotImplementedError(
                "attn_mask and its like are not served, as PatchTST gives none; call flash.flash_attention with mask"
            )
        k, dropout_p = k.transpose(2, 3), self.dropout_p("attn_dropout")
        if not self.own[0].res_attention:
            return attend(q, k, v, dropout_p=dropout_p), None
        q = q * self.scale  # of each layer its own
        if prev is not None:
            q, k = torch.cat((prev[0], q), -1), torch.cat((prev[1], k), -1)
        return attend(q, k, v, scale=1.0, dropout_p=dropout_p), None, (q, k)


class InterpretableAttention(StandIn):
    """TFT's: all heads share one value head, and the mean of their outputs is projected."""

    qkv_linears: torch.nn.Linear
    out_proj: torch.nn.Linear
    out_dropout: torch.nn.Dropout

    def take_over(self) -> None:
        own = self.own[0]
        self.length = own._buffers.pop("_mask").shape[-1]  # seqlen^2 numbers
        super().take_over()

    def give_back(self) -> Any:
        own = super().give_back()
        own.register_buffer("_mask", self.future())
        return own

    def future(self) -> Tensor:
        """The buffer that was dropped: -inf where a key is later than the query, [1, seqlen, seqlen]."""
        weight = self.qkv_linears.weight.detach()
        return weight.new_full((1, self.length, self.length), float("-inf")).triu_(1)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}_mask"] = self.future()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state_dict.pop(f"{prefix}_mask", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor, mask_future_timesteps: bool = True) -> tuple[Tensor, "AttentionWeights"]:
        own: Any = self.own[0]
        heads, width = own.n_head, own.n_head * own.d_head
        q, k, v = self.qkv_linears(x).split((width, width, own.d_head), dim=-1)
        q, k = (t.unflatten(-1, (heads, own.d_head)).transpose(1, 2) for t in (q, k))
        v = v.unsqueeze(1).expand(-1, heads, -1, -1)
        dropout_p = self.dropout_p("attn_dropout")
        o = attend(q, k, v, causal=mask_future_timesteps, scale=own.scale, dropout_p=dropout_p)
        out = self.out_dropout(self.out_proj(o.mean(1)))
        return out, AttentionWeights(q.detach(), k.detach(), own.scale, mask_future_timesteps)


def attend(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
    o = flash_attention(q, k, v, **keywords)
    assert isinstance(o, Tensor)
    return o


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """softmax(scale Q K^T) [batch, heads, seqlen, seqlen], before dropout, computed whenever it is looked at.

    It has what a Tensor has, and `tensor()`; a mean over the batch takes one element of it at a time.

    Args:
        q: [batch, heads, seqlen, head_dim], any float dtype.
        k: likewise.
        scale: factor of q.k.
        causal: no query sees later keys.
    """

    q: Tensor
    k: Tensor
    scale: float
    causal: bool

    def of(self, b: int) -> Tensor:
        """The weights of one element of the batch, [heads, seqlen, seqlen]."""
        s = self.q[b] @ self.k[b].mT * self.scale
        if self.causal:
            s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), float("-inf"))
        return s.softmax(-1)

    def tensor(self) -> Tensor:
        return torch.stack([self.of(b) for b in range(len(self.q))])

    def size(self, dim: int | None = None) -> Any:
        size = torch.Size((*self.q.shape[:3], self.k.shape[2]))
        return size if dim is None else size[dim]

    def mean(self, *args: Any, **keywords: Any) -> Tensor:
        if (args, keywords) not in (((0,), {}), ((), {"dim": 0})):
            return self.tensor().mean(*args, **keywords)
        total = self.of(0)
        for b in range(1, len(self.q)):
            total += self.of(b)
        return total / len(self.q)

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor()[index]

    def __len__(self) -> int:
        return len(self.q)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # protocols, which ask whatever they meet
            raise AttributeError(name)
        return getattr(self.tensor(), name)
