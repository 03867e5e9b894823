"""Attention of DTensors: what each mesh dimension shards decides whether ranks compute alone or meet in a ring.

    q                        k and v                     what happens on that dimension of the mesh
    Shard(batch)             Shard(batch)                each rank has its own batch elements
    Shard(heads)             Shard(heads), Replicate     each rank has its own heads
    Shard(seqlen_q)          Shard(seqlen_k)             ring_attention over the ranks of the dimension
    Shard(seqlen_q)          Replicate                   each rank has its own queries
    Replicate                Replicate                   ranks do the same

Operands of the score follow q: a DTensor is brought to where it is needed, and ranks' shares of its gradient are added
up; a plain tensor is the whole, and each rank takes its part. Nothing is compared between ranks: DTensors know each
other's sizes, and keywords are taken to be alike, as everywhere with DTensors. A model that tensor parallelism, FSDP or
sequence parallelism has given DTensors calls flash_attention as before.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import prod
from operator import index
from typing import Any, NamedTuple

import torch

from .autograd import attend
from .blocks import blocks_of, sizes_of
from .checks import check_block_mask
from .kernels.spec import dense_like
from .parts import Extent, Extents, mod_of_part, starting, within_blocks
from .problem import Problem
from .ring import attend_shards, shaped

BATCH, HEADS, ROWS = "batch", "heads", "rows"  # what an axis is
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k")
OPERANDS = ("q_offset", "mask", "bias", "alibi_slopes", "sinks")


class Cut(NamedTuple):
    """What one dimension of the mesh does to a call."""

    role: str | None  # the axis of q that it shards
    shares_keys: bool  # its ranks hold all keys and values that others of its ranks hold


class Axes(NamedTuple):
    """What the axes of q are, and of lse."""

    q: tuple[str | None, ...]
    lse: tuple[str, ...]

    @classmethod
    def of(cls, rank: int, packed: bool) -> "Axes":
        """Those of a q with so many axes."""
        if packed:
            return cls((ROWS, HEADS, None), (HEADS, ROWS)) if rank == 3 else cls((ROWS, None), (ROWS,))
        if rank == 4:
            return cls((BATCH, HEADS, ROWS, None), (BATCH, HEADS, ROWS))
        return cls((BATCH, ROWS, None), (BATCH, ROWS))


def is_distributed(*tensors: Any) -> bool:
    """Whether some of them are DTensors; torch.distributed.tensor is not imported to find out."""
    return any(isinstance(x, torch.Tensor) and hasattr(x, "device_mesh") for x in tensors)


def attend_distributed(q: Any, k: Any, v: Any, keywords: dict[str, Any]) -> tuple[Any, Any]:
    """o and lse of DTensors, placed as q is; packed where cu_seqlens_q is among the keywords.

    Raises:
        ValueError: q, k and v are not all DTensors of one mesh, or a plain operand requires a gradient.
        NotImplementedError: placements that are not served; the message says which would be.
    """
    from torch.distributed.tensor import DTensor

    packed = keywords.get("cu_seqlens_q") is not None
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, DTensor):
            raise ValueError(f"{name} must be a DTensor where q, k or v is one, got {type(x).__name__}")
        if x.device_mesh != q.device_mesh:
            raise ValueError(f"{name} must be on q's mesh {q.device_mesh}, got {x.device_mesh}")
        if x.dim() not in ((2, 3) if packed else (3, 4)) or x.dim() != q.dim():
            raise ValueError(f"{name} must have the axes that flash_attention takes, got shape {list(x.shape)}")
    axes = Axes.of(q.dim(), packed)
    cuts = cuts_of(q, k, v, axes)
    extents = extents_of(q, cuts, axes, keywords)
    local = [x.to_local(grad_placements=grads_of(x, cuts)) for x in (q, k, v)]
    local[1:] = keys_of(local[1:], q, k, cuts, axes)
    given = {name: x for name, x in keywords.items() if x is not None}
    rows = [ROWS in roles_of(name, given[name], axes, packed) if name in given else False for name in ("mask", "bias")]
    for name in (*OPERANDS, *LENGTHS):
        if isinstance(given.get(name), torch.Tensor):
            given[name] = local_operand(name, given[name], q, cuts, axes, packed)
    if type(p := given.get("dropout_p")) is float and 0.0 < p < 1.0:
        given["seed"] = common_seed(q.device_mesh, local[0].device)
    ring = [at for at, cut in enumerate(cuts) if cut.role == ROWS and not cut.shares_keys]
    if ring:
        o, lse = ring_of(local, q, k, ring[0], extents, axes, given, rows)
    else:
        o, lse = alone(local, q, k, extents, axes, given)
    return whole_of(o, lse, q, v, axes)


def cuts_of(q: Any, k: Any, v: Any, axes: Axes) -> list[Cut]:
    """What each dimension of the mesh does, from the placements of q, k and v."""
    found = []
    for at, places in enumerate(zip(q.placements, k.placements, v.placements, strict=True)):
        if any(type(place).__name__ not in ("Shard", "Replicate") for place in places):
            raise refusal(at, q, places, "Shard and Replicate are, so redistribute what is not")
        of_q, of_k, of_v = (axes.q[place.dim % len(axes.q)] if place.is_shard() else None for place in places)
        whole = [place.is_replicate() for place in places]
        if any(role is None and not is_whole for role, is_whole in zip((of_q, of_k, of_v), whole, strict=True)):
            raise refusal(at, q, places, "head_dim is not sharded")
        if of_k != of_v:
            raise refusal(at, q, places, "k and v are placed alike")
        if of_k != of_q and not (whole[1] and of_q in (HEADS, ROWS)):
            raise refusal(at, q, places, f"k and v follow q's {of_q or 'Replicate'}")
        found.append(Cut(of_q, whole[1] and of_q is not None))
    if [cut.role for cut in found].count(ROWS) > 1:
        raise NotImplementedError(
            f"q has its sequence on more than one dimension of the mesh, {q.placements}: flatten them into one"
        )
    return found


def refusal(at: int, q: Any, places: Sequence[Any], hint: str) -> NotImplementedError:
    """What is raised for placements that are not served."""
    names = q.device_mesh.mesh_dim_names
    name = f" ({names[at]})" if names else ""
    return NotImplementedError(
        f"q, k and v placed {', '.join(map(str, places))} on dimension {at}{name} of the mesh are not served: {hint}"
    )


def grads_of(x: Any, cuts: Sequence[Cut]) -> list[Any]:
    """How the gradient of q, k or v is placed: as it is, and Partial where ranks share keys."""
    from torch.distributed.tensor import Partial

    return [
        Partial() if place.is_replicate() and cut.shares_keys else place
        for place, cut in zip(x.placements, cuts, strict=True)
    ]


def extents_of(q: Any, cuts: Sequence[Cut], axes: Axes, keywords: dict[str, Any]) -> Extents:
    """What this rank has of the batch, the heads and the rows."""
    mesh = q.device_mesh
    here = [mesh.get_local_rank(at) for at in range(mesh.ndim)]
    found = {
        role: extent_of(index(n), [cut.role == role for cut in cuts], mesh, here)
        for role, n in zip(axes.q, q.shape, strict=True)
        if role is not None
    }
    if keywords.get(LENGTHS[0]) is not None:
        batch = index(keywords[LENGTHS[0]].shape[0]) - 1
        found[BATCH] = Extent(0, batch, batch)
    heads = found.setdefault(HEADS, Extent(0, 1, 1))
    parts = prod([mesh.size(at) for at, cut in enumerate(cuts) if cut.role == HEADS])
    if heads.whole % parts:
        raise NotImplementedError(f"q's {heads.whole} heads do not divide among {parts} ranks; shard batch or sequence")
    return Extents(found[BATCH], heads, found[ROWS])


def extent_of(whole: int, sharded: Sequence[bool], mesh: Any, at: Sequence[int]) -> Extent:
    """What the rank at some place of the mesh has of an axis that some of its dimensions shard, one after another."""
    start, size = 0, whole
    for dimension, (cut, rank) in enumerate(zip(sharded, at, strict=True)):
        if cut:
            lengths = lengths_of(size, mesh.size(dimension))
            start, size = start + sum(lengths[:rank]), lengths[rank]
    return Extent(start, size, whole)


def keys_of(tensors: Sequence[torch.Tensor], q: Any, k: Any, cuts: Sequence[Cut], axes: Axes) -> list[torch.Tensor]:
    """The local keys and values of this rank's query heads, a view: where ranks share keys they hold more.

    Whether all ranks have the key heads of their query heads is found for all of them, so that they refuse alike.
    """
    if HEADS not in axes.q:
        return list(tensors)
    axis, mesh = axes.q.index(HEADS), q.device_mesh
    heads, heads_k = index(q.shape[axis]), index(k.shape[axis])
    if heads_k == 0 or heads % heads_k:
        return list(tensors)  # which is refused, or served, as on one device
    group = heads // heads_k
    of_q = [cut.role == HEADS for cut in cuts]
    of_k = [place.is_shard() and place.dim % k.dim() == axis for place in k.placements]
    here, own = [mesh.get_local_rank(at) for at in range(mesh.ndim)], slice(0, 0)
    for at in product(*(range(mesh.size(dimension)) for dimension in range(mesh.ndim))):
        there, held = (extent_of(n, cut, mesh, at) for n, cut in ((heads, of_q), (heads_k, of_k)))
        first, last = there.start // group, -(-(there.start + there.size) // group)
        if there.size % group and group % max(there.size, 1):
            raise NotImplementedError(
                f"q's {group} heads of a key head do not divide by the {there.size} of a rank; shard batch or sequence"
            )
        if there.size and not (held.start <= first and last <= held.start + held.size):
            raise NotImplementedError(
                f"{heads_k} key heads are not sharded as the {heads} heads that share them: replicate k and v"
            )
        if list(at) == here:
            own = slice(first - held.start, last - held.start) if there.size else slice(0, held.size)
    return [x.narrow(axis, own.start, own.stop - own.start) for x in tensors]


def local_operand(name: str, x: torch.Tensor, q: Any, cuts: Sequence[Cut], axes: Axes, packed: bool) -> torch.Tensor:
    """This rank's part of an operand; where ranks have shares of its gradient, redistribute adds them up."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    roles = roles_of(name, x, axes, packed)
    places: list[Any] = []
    grads: list[Any] = []
    for cut in cuts:
        if cut.role is not None and cut.role in roles:
            place = Shard(roles.index(cut.role))
            places.append(place)
            grads.append(place)
        else:
            places.append(Replicate())
            grads.append(Replicate() if cut.role is None else Partial())
    if not isinstance(x, DTensor):
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad, so it must be a DTensor like q, got {type(x).__name__}")
        # every rank has the whole: nothing is sent
        return distribute_tensor(x, q.device_mesh, places, src_data_rank=None).to_local()
    if x.device_mesh != q.device_mesh:
        raise ValueError(f"{name} must be on q's mesh {q.device_mesh}, got {x.device_mesh}")
    return x.redistribute(placements=places).to_local(grad_placements=grads)


def roles_of(name: str, x: torch.Tensor, axes: Axes, packed: bool) -> list[str | None]:
    """What the axes of an operand are; None of one that all share."""
    if name in LENGTHS:
        return [None]
    if name == "q_offset":
        return [None if packed else BATCH] * x.dim()
    if name == "sinks":
        return [HEADS] * x.dim()
    if name == "alibi_slopes":
        return [HEADS] if x.dim() == 1 else [None if packed else BATCH, HEADS]
    # mask and bias
    one_head = HEADS not in axes.q
    full = [BATCH, ROWS, None] if one_head else [BATCH, HEADS, ROWS, None]
    if packed:  # indices within a sequence
        full = [None if role in (BATCH, ROWS) else role for role in full]
    full = full[len(full) - x.dim() :] if x.dim() <= len(full) else [None] * x.dim()
    return [None if size == 1 else role for role, size in zip(full, x.shape, strict=True)]


def common_seed(mesh: Any, device: torch.device) -> torch.Tensor:
    """A seed of dropout that all ranks of the mesh share: the one that its first rank drew."""
    from torch.distributed._functional_collectives import broadcast

    seed = torch.randint(0, 2**63 - 1, (1,), device=device)
    for at in range(mesh.ndim):
        seed = broadcast(seed, 0, mesh.get_group(at))  # of that group's ranks
    return seed


def lengths_of(total: int, count: int) -> list[int]:
    """How many positions each rank of a dimension has: as torch.chunk, the last ones may have fewer or none."""
    size = -(-total // count)
    return [max(0, min(size, total - rank * size)) for rank in range(count)]


def ring_of(
    local: Sequence[torch.Tensor], q: Any, k: Any, at: int, extents: Extents, axes: Axes, given: dict[str, Any],
    rows_of: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """o and lse of this rank's rows, whose keys lie on the ranks of a dimension of the mesh."""
    mesh, axis = q.device_mesh, axes.q.index(ROWS)
    lengths = [lengths_of(x.shape[axis], mesh.size(at)) for x in (q, k)]
    lengths += [[int(rows)] * mesh.size(at) for rows in rows_of]
    return attend_shards(
        *local, group=mesh.get_group(at), lengths=tuple(zip(*lengths, strict=True)), batch=extents.batch,
        heads=extents.heads, keywords=given,
    )  # fmt: skip


def alone(
    local: Sequence[torch.Tensor], q: Any, k: Any, extents: Extents, axes: Axes, given: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """o and lse of this rank's batch elements, heads and rows, all of whose keys it has."""
    packed, rows = LENGTHS[0] in given, extents.rows
    total_k = k.shape[axes.q.index(ROWS)]
    if packed and rows.size != rows.whole:
        raise NotImplementedError("q of packed sequences is sharded by rows, and k and v are not: shard them alike")
    if rows.size != rows.whole:
        offset = given.get("q_offset", total_k - rows.whole)
        given["q_offset"] = (offset.long() if isinstance(offset, torch.Tensor) else offset) + rows.start
    seed, block_mask = given.pop("seed", None), given.pop("block_mask", None)
    of_mods = extents._replace(rows=Extent(0, given["max_seqlen_q"], given["max_seqlen_q"])) if packed else extents
    for name in ("score_mod", "mask_mod"):
        if given.get(name) is not None and hasattr(given[name], "args"):
            given[name] = mod_of_part(given[name], of_mods)
    problem = Problem.of(*local, **given)
    if block_mask is not None:
        if packed:
            raise NotImplementedError("block_mask of packed DTensors is not served: pass its rule as mask_mod")
        sizes = extents.batch.whole, extents.heads.whole, rows.whole, index(total_k)
        check_block_mask(block_mask, sizes, local[0].device)
        block_q, block_k = sizes_of(block_mask, *sizes[2:])
        problem = within_blocks(problem, blocks_of(block_mask, *sizes), (index(block_q), index(block_k)))
    problem = starting(problem, 0 if packed else extents.batch.start, extents.heads.start, 0 if packed else rows.start)
    return shaped(*attend(replace(problem, mods=problem.mods._replace(seed=seed))), q.dim(), packed)


def whole_of(o: torch.Tensor, lse: torch.Tensor, q: Any, v: Any, axes: Axes) -> tuple[Any, Any]:
    """o and lse as DTensors placed as q is."""
    from torch.distributed.tensor import DTensor, Shard

    shape = (*q.shape[:-1], v.shape[-1])
    like = torch.empty_strided(q.shape, q.stride(), dtype=q.dtype, device="meta")
    like = like[(None,) * (4 - like.dim())]
    stride = dense_like(like, v.shape[-1]).stride()[4 - q.dim() :]
    roles = [axes.q[place.dim % len(axes.q)] if place.is_shard() else None for place in q.placements]
    of_lse = [
        place if role is None else Shard(axes.lse.index(role)) for place, role in zip(q.placements, roles, strict=True)
    ]
    sizes = dict(zip(axes.q, q.shape, strict=True))
    lse_shape = torch.Size([sizes[role] for role in axes.lse])
    found = DTensor.from_local(o, q.device_mesh, q.placements, run_check=False, shape=torch.Size(shape), stride=stride)
    strides = torch.empty(lse_shape, device="meta").stride()
    return found, DTensor.from_local(lse, q.device_mesh, of_lse, run_check=False, shape=lse_shape, stride=strides)
