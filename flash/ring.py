"""Attention over a sequence that is sharded over the ranks of torch.distributed: what the user calls.

`shard` gives a rank its part of a tensor that all ranks hold, `ring_attention` attends to the whole sequence from each
part, `unshard` puts parts together again.
"""

from operator import index
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .blocks import blocks_of, sizes_of
from .checks import check_block_mask, check_flag, name_of
from .kernels.spec import Blocks
from .links import Links, agree
from .problem import PACKING, autocast
from .ring_call import KEYWORDS, Call, Setting, call_of, flatten
from .ring_ops import METHODS, attend, choose, met
from .shards import SHARDINGS, check_lengths, lengths_of, pieces_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["info", "ring_attention", "shard", "unshard"]


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: Any = None,
    mesh: "DeviceMesh | None" = None,
    sharding: str = "contiguous",
    method: str = "auto",
    run_check: bool = True,
    return_lse: bool = False,
    **keywords: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention of this rank's queries to the keys of all ranks, each of which has a shard of the sequence.

        o_i = sum_j exp(s_ij - lse_i) v_j       i of this rank, j of every rank, as flash_attention defines them

    Keys and values travel while attention to those that are there is computed; memory grows with the shard. All ranks
    of the group call it together, with the same keywords. The backward pass is theirs together too: it waits for ranks
    whose loss does not depend on o, which should add 0 * o.sum() to it. Gradients of q, k and v are those of the sum of
    all ranks' losses. Those of bias, alibi_slopes and sinks are this rank's share of it,
    as those of any parameter are where each rank has some of the tokens: whoever adds up the ranks' gradients (DDP,
    FSDP) makes them whole.

    Args:
        q: this rank's shard [batch, heads, seqlen_q, head_dim], float16, bfloat16, float32 or float64; any strides.
            [batch, seqlen_q, head_dim] is one head, and comes back so. Shards may have different lengths, also none.
        k: likewise [batch, heads_k, seqlen_k, head_dim]; seqlen_k may be other than seqlen_q. Key heads are never
            repeated on their way.
        v: likewise [batch, heads_k, seqlen_k, head_dim_v].
        group: a ProcessGroup of torch.distributed. Default: all ranks.
        mesh: a one-dimensional DeviceMesh, in place of group; of a larger one take the dimension, mesh["name"].
        sharding: "contiguous": rank r holds the positions after those of rank r - 1. "zigzag": of 2 * world_size chunks
            rank r holds chunks r and 2 * world_size - 1 - r, one after the other, which gives all ranks alike much to
            do where causal; lengths must then be those of `shard`. Default: "contiguous".
        method: "ring": keys travel from rank to rank, those that nobody further on sees no further. "all_gather": each
            rank fetches all keys that it sees: memory for all of them. "ulysses": ranks exchange rows for heads, which
            heads must divide for. Default: "auto", of which `info` says what it takes and why; it gathers short
            sequences alone, whose keys and values are 256 MB at most.
        run_check: compare the calls of all ranks and learn the lengths of their shards, by an all_gather of a few
            numbers that the host waits for; over a backend for the CPU where the group has one. Values of small
            operands (cu_seqlens, slopes, sinks, tensors of user functions) are compared where they are on a CPU. False,
            on all ranks, promises that calls are alike, shards of one length included: then nothing waits. Default:
            True.
        return_lse: also return lse. Default: False.
        **keywords: those of flash_attention, which mean what they mean there with i and j counted in the whole
            sequence: causal, window, q_offset (default: all keys minus all queries), scale, alibi_slopes, softcap,
            sinks, dropout_p (rank 0's seed counts), score_mod, mask_mod, block_mask (of the whole; what it hides is not
            skipped), deterministic, backend, config. mask and bias broadcast to [batch, heads, seqlen_q, keys of all
            ranks]: an axis of queries has this rank's ones, an axis of keys those of all, in the sequence's order. With
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k, which describe the whole, packed sequences are
            sharded wherever it comes: q is [seqlen_q, heads, head_dim], k and v likewise, as in flash_attention_varlen.

    Returns:
        o, of this rank's queries, as flash_attention returns it; with return_lse (o, lse). Differentiable once.

    Raises:
        ValueError: an argument is wrong, or differs between ranks; the message names it, and which ranks have what.
        TypeError: an unknown keyword, or a user function of another type.
        NotImplementedError: mask, bias or block_mask of packed sequences (mask_mod and score_mod serve), or a method
            that does not serve the call.
        RuntimeError: another rank refused its arguments, or is gone: after the group's time-out at the latest.

    Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers", https://arxiv.org/abs/2310.01889; Brandon et
    al. 2023, "Striped Attention", https://arxiv.org/abs/2311.09431, for the balance that zigzag gives chunk by chunk;
    Jacobs et al. 2023, "DeepSpeed Ulysses", https://arxiv.org/abs/2309.14509.
    """
    setting = setting_of(group_of(group, mesh), sharding, method, run_check)
    o, lse = attended(*begin(q, k, v, setting, keywords | {"return_lse": return_lse}))
    return (o, lse) if return_lse else o


def attend_shards(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: Any,
    lengths: tuple[tuple[int, ...], ...],
    batch: tuple[int, int, int],
    heads: tuple[int, int, int],
    keywords: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """o and lse of shards whose lengths all ranks know, and which may be part of a larger whole.

    Args:
        q, k, v: as ring_attention takes them, in contiguous shards.
        group: the ranks that have the others.
        lengths: seqlen_q and seqlen_k of each rank, and whether mask and bias have an axis of queries.
        batch: which batch elements of the whole these are: (start, size, whole).
        heads: likewise of the query heads.
        keywords: of ring_attention; with the seed of dropout, if it has any.
    """
    setting = setting_of(group, "contiguous", "auto", False)
    return attended(*begin(q, k, v, setting._replace(lengths=lengths, batch=(*batch,), heads=(*heads,)), keywords))


def attended(call: Call, axes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """o and lse of a Call, for a q of so many axes."""
    o, lse = attend(flatten(call), call.q, call.k, call.v)
    return shaped(o, lse, axes, call.packed)


def setting_of(group: Any, sharding: str, method: str, run_check: bool) -> Setting:
    """What a call says of its group."""
    return Setting(group.group_name, index(group.size()), sharding, method, run_check)


def begin(q: Any, k: Any, v: Any, setting: Setting, keywords: dict[str, Any]) -> tuple[Call, int]:
    """The Call of what ring_attention was given, and how many axes q had; if it is wrong, the other ranks are told."""
    try:
        check_setting(setting.sharding, setting.method, setting.run_check)
        check_flag("return_lse", keywords.pop("return_lse", False))
        call, axes = taken(q, k, v, setting, keywords)
        call.check()
        return call, axes
    except (ValueError, TypeError, NotImplementedError) as error:
        if setting.run_check is not False and not torch.compiler.is_compiling():
            device = q.device if isinstance(q, torch.Tensor) else torch.device("cpu")
            agree(Links.named(setting.group), device, {}, [0] * 4, error)
        raise


def taken(q: Any, k: Any, v: Any, setting: Setting, keywords: dict[str, Any]) -> tuple[Call, int]:
    """The Call of what ring_attention was given, its tensors of four axes; and how many axes q had."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.is_nested:
            raise NotImplementedError(f"{name} is a nested tensor; give packed rows and cu_seqlens_q, cu_seqlens_k")
    for name in keywords:
        if name not in KEYWORDS and not (name == "seed" and setting.lengths):
            raise TypeError(f"ring_attention has no keyword {name!r}")
    q, k, v = autocast(q, k, v)
    cu_seqlens_q, cu_seqlens_k = (keywords.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k"))
    packed = any(keywords.get(name) is not None for name in PACKING)
    if packed and any(keywords.get(name) is None for name in PACKING):
        raise ValueError(f"{', '.join(PACKING)} must be given together, got {sorted(keywords.keys() & set(PACKING))}")
    rank, ranks = q.dim(), ((2, 3) if packed else (3, 4))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() not in ranks or x.dim() != rank:
            expected = f"{ranks[0]} or {ranks[1]} dimensions" if x is q else f"{rank} dimensions like q"
            raise ValueError(f"{name} must have {expected}, got shape {list(x.shape)}")
    one_head = rank == ranks[0]
    if one_head:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    if packed:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    block_mask = keywords.pop("block_mask", None)
    if packed and block_mask is not None:
        raise NotImplementedError(
            "block_mask of packed sequences is not served by ring_attention: pass its rule as mask_mod"
        )
    for name in ("mask", "bias"):
        if isinstance(keywords.get(name), torch.Tensor):
            keywords[name] = of_four_axes(keywords[name], one_head)
    if keywords.get("deterministic") is None:
        keywords["deterministic"] = torch.are_deterministic_algorithms_enabled()
    if type(p := keywords.get("dropout_p")) is float and 0.0 < p < 1.0 and "seed" not in keywords:
        keywords["seed"] = torch.randint(0, 2**63 - 1, (1,), device=q.device)
    wanted = ("q", q), ("k", k), ("v", v), *((name, keywords.get(name)) for name in ("bias", "alibi_slopes", "sinks"))
    learns = [name for name, x in wanted if isinstance(x, torch.Tensor) and x.requires_grad and torch.is_grad_enabled()]
    one_length = packed and cu_seqlens_q is cu_seqlens_k
    setting = setting._replace(learns=", ".join(learns), one_length=one_length)
    blocks = None
    if block_mask is not None:
        setting, blocks = masked(block_mask, q, setting)
    return call_of(q, k, v, setting, keywords.pop("config", None), blocks, **keywords), rank


def masked(block_mask: Any, q: torch.Tensor, setting: Setting) -> tuple[Setting, Blocks]:
    """The setting of a call with a block mask of the whole, and the mask's blocks."""
    batch, heads = ((own or (0, n, n))[2] for own, n in zip((setting.batch, setting.heads), q.shape[:2], strict=True))
    lengths = [index(n) for n in getattr(block_mask, "seq_lengths", (0, 0))]
    check_block_mask(block_mask, (batch, heads, *lengths), q.device)
    size_q, size_k = sizes_of(block_mask, *lengths)
    blocks = blocks_of(block_mask, batch, heads, *lengths)
    return setting._replace(blocks=(index(size_q), index(size_k)), masked=(lengths[0], lengths[1])), blocks


def of_four_axes(x: torch.Tensor, one_head: bool) -> torch.Tensor:
    """A mask or bias as a view [batch, heads, seqlen_q, seqlen_k], missing axes of size 1."""
    if one_head and x.dim() <= 3:
        x = x[(None,) * (3 - x.dim())].unsqueeze(1)
    return x[(None,) * (4 - x.dim())]


def shaped(o: torch.Tensor, lse: torch.Tensor, rank: int, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """o and lse with the axes that q came with."""
    if packed:
        o, lse = o.squeeze(0).transpose(0, 1), lse.squeeze(0)
        return (o.squeeze(1), lse.squeeze(0)) if rank == 2 else (o, lse)
    return (o.squeeze(1), lse.squeeze(1)) if rank == 3 else (o, lse)


def group_of(group: Any, mesh: Any) -> Any:
    """The process group that a call names."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("torch.distributed must be initialised: call torch.distributed.init_process_group first")
    if mesh is not None:
        if group is not None:
            raise ValueError("group and mesh must not both be given: a mesh has its own group")
        if mesh.ndim != 1:
            raise ValueError(
                f"mesh must have one dimension, got {mesh.ndim} of names {mesh.mesh_dim_names}: take one, as in "
                "mesh['name']"
            )
        group = mesh.get_group()
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group must be a torch.distributed.ProcessGroup that this rank is in, got {type(group).__name__}"
        )
    return group


def check_setting(sharding: object, method: object, run_check: object) -> None:
    """Check what a call says of the group."""
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding must be one of {', '.join(SHARDINGS)}, got {sharding!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    check_flag("run_check", run_check)


def info(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: Any = None,
    mesh: "DeviceMesh | None" = None,
    sharding: str = "contiguous",
    method: str = "auto",
    run_check: bool = True,
    **keywords: Any,
) -> dict[str, Any]:
    """How a call of ring_attention would run; all ranks ask together.

    Args:
        q, k, v, group, mesh, sharding, method, run_check: as ring_attention takes them.
        **keywords: its other keywords.

    Returns:
        method and reason (what serves the call, and why), world_size, lengths_q and lengths_k (of each rank's shards),
        hops (of the ring, each way), sees (for each rank, whose keys its queries see by their positions).

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as the call itself would.
    """
    call, _ = begin(q, k, v, setting_of(group_of(group, mesh), sharding, method, run_check), keywords)
    links = Links.named(call.setting.group)
    said = met(links, call)
    layout = call.layout(said)
    taken_method, reason = choose(call, layout)
    return {
        "method": taken_method,
        "reason": reason,
        "world_size": links.world_size,
        "lengths_q": [seqlen_q for seqlen_q, *_ in said],
        "lengths_k": [seqlen_k for _, seqlen_k, *_ in said],
        "hops": [way.hops for way in layout.ways],
        "sees": [[source for source, needed in enumerate(row) if needed] for row in layout.needs],
    }


def shard(
    x: torch.Tensor, *, group: Any = None, mesh: "DeviceMesh | None" = None, sharding: str = "contiguous", dim: int = 2
) -> torch.Tensor:
    """This rank's part of a tensor that all ranks hold, cut along the sequence.

    Args:
        x: any tensor; its length along dim need not divide by the ranks.
        group: as in ring_attention. Default: all ranks.
        mesh: as in ring_attention. Default: none.
        sharding: as in ring_attention. Default: "contiguous".
        dim: the axis of the sequence. Default: 2, that of [batch, heads, seqlen, head_dim].

    Returns:
        The part: a view, or for "zigzag" two of them one after the other. Differentiable: the gradient is 0 elsewhere.

    Raises:
        ValueError: an argument is wrong.
    """
    group = group_of(group, mesh)
    check_setting(sharding, "auto", True)
    check_dim(x, dim)
    lengths = lengths_of(x.shape[dim], group.size(), sharding)
    pieces = pieces_of(lengths, sharding)[group.rank()]
    if not pieces:
        return x.narrow(dim, 0, 0)
    parts = [x.narrow(dim, piece.start, piece.stop - piece.start) for piece in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def unshard(
    x: torch.Tensor, *, group: Any = None, mesh: "DeviceMesh | None" = None, sharding: str = "contiguous", dim: int = 2
) -> torch.Tensor:
    """The whole of which each rank has a part, on every rank: the inverse of `shard`. All ranks call it together.

    Args:
        x: this rank's part; all axes but dim alike on all ranks.
        group: as in ring_attention. Default: all ranks.
        mesh: as in ring_attention. Default: none.
        sharding: as in ring_attention. Default: "contiguous".
        dim: the axis of the sequence. Default: 2.

    Returns:
        The whole. Differentiable: the gradient of a part is that of the sum of all ranks' losses, so that a loss which
        every rank computes alike from the whole counts once for each of them.

    Raises:
        ValueError: an argument is wrong, or differs between ranks.
    """
    group = group_of(group, mesh)
    try:
        check_setting(sharding, "auto", True)
        check_dim(x, dim)
    except ValueError as error:
        agree(Links.named(group.group_name), torch.device("cpu"), {}, [0], error)
    return Unshard.apply(x, group.group_name, sharding, dim % x.dim())  # type: ignore[no-any-return,no-untyped-call]


def check_dim(x: object, dim: object) -> None:
    """Check a tensor and its axis."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if type(dim) is not int or not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be an axis of x, which has {x.dim()}, got {dim!r}")


class Unshard(torch.autograd.Function):
    """The whole of (part, name of the group, sharding, axis)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, sharding: str, dim: int) -> torch.Tensor:
        links = Links.named(name)
        links.warm(x.device)
        shape = ["seqlen" if axis == dim else n for axis, n in enumerate(x.shape)]
        alike = {"x's dtype": name_of(x.dtype), "x's shape": shape, "sharding": sharding, "dim": dim}
        lengths = [length for (length,) in agree(links, x.device, alike, [x.shape[dim]], None)]
        check_lengths("x", lengths, sharding)
        ctx.links, ctx.pieces, ctx.dim, ctx.length = links, pieces_of(lengths, sharding), dim, x.shape[dim]
        sizes = [(*x.shape[:dim], length, *x.shape[dim + 1 :]) for length in lengths]
        parts = [(peer, x.new_empty(size)) for peer, size in enumerate(sizes)]
        own = x.contiguous()
        links.exchange([(peer, own) for peer in range(links.world_size)], parts)
        whole = x.new_empty((*x.shape[:dim], sum(lengths), *x.shape[dim + 1 :]))
        for (_, part), pieces in zip(parts, ctx.pieces, strict=True):
            for piece in pieces:
                there = whole.narrow(dim, piece.start, piece.stop - piece.start)
                there.copy_(part.narrow(dim, piece.local.start, piece.stop - piece.start))
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        links, dim, sends = ctx.links, ctx.dim, []
        for peer, pieces in enumerate(ctx.pieces):
            rows = [grad.narrow(dim, piece.start, piece.stop - piece.start) for piece in pieces]
            sends.append((peer, torch.cat(rows, dim) if rows else grad.narrow(dim, 0, 0).contiguous()))
        shape = (*grad.shape[:dim], ctx.length, *grad.shape[dim + 1 :])
        parts = [(peer, grad.new_empty(shape)) for peer in range(links.world_size)]
        links.exchange(sends, parts)
        return torch.stack([part for _, part in parts]).sum(0), None, None, None
