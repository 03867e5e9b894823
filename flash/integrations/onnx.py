"""Models that use us as ONNX: each call becomes an `Attention` node of opset 23, and what that lacks is written out.

    causal, q_offset = 0                              is_causal, which ONNX counts from the first query and key
    causal and window otherwise, mask, mask_mod       a bool attn_mask [batch|1, heads|1, seqlen_q, seqlen_k]
    bias, alibi_slopes                                a float one
    softcap, scale, heads_k, head_dim_v               as ONNX has them; softcap acts before the mask
    lse, sinks, score_mod                             matrix products and exponentials of all scores
    dropout, block_mask, packed sequences             refused

A query that sees no key has o = 0 here too, whatever the runtime makes of such a row. Unlike in our own kernels, what
is not finite in a hidden key or value may reach the result, and how much memory a node takes is the runtime's business.
scale and softcap are float32 in ONNX, so float64 comes out to the precision of float32. With sinks, ALiBi or a bias of
another dtype, which a mask of q's dtype would round, half precision is widened to float32 for the node.
"""

from typing import Any

import torch
from torch import Tensor

from ..ops import problem_of
from ..problem import Problem

FLOAT = 1  # float32 in onnx.TensorProto


def export(
    model: torch.nn.Module,
    args: tuple[Any, ...] = (),
    f: Any = None,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    opset_version: int = 23,
    **options: Any,
) -> Any:
    """torch.onnx.export of a model that calls flash_attention.

    Args:
        model: in evaluation mode, as a call with dropout is refused.
        args: what the model is called with; tensors of any float dtype that the runtime serves.
        f: where the file goes. Default: nowhere, and the program is returned.
        kwargs: keywords that the model is called with. Default: none.
        dynamic_shapes: which axes vary, as torch.onnx.export takes it: names, or torch.export.Dim with a max of at most
            2 ** 30 - 512 where it is a length. Default: none.
        opset_version: 23 or what torch.onnx.export has beyond. Default: 23.
        options: other keywords of torch.onnx.export.

    Returns:
        What torch.onnx.export returns: an ONNXProgram.

    Raises:
        ValueError: opset_version is earlier than 23, where Attention begins.
        NotImplementedError: a call uses what cannot be had in ONNX; the message names it. A BlockMask that no call met
            before the export is refused by torch.export itself.

    Source: https://onnx.ai/onnx/operators/onnx__Attention.html
    """
    if opset_version < 23:
        raise ValueError(f"opset_version must be at least 23, where Attention begins, got {opset_version}")
    dynamic = torch.export.Dim.DYNAMIC
    dims = torch.utils._pytree.tree_map(lambda dim: dynamic if isinstance(dim, str) else dim, dynamic_shapes)
    program = translate(torch.export.export(model, args, kwargs, dynamic_shapes=dims))
    return torch.onnx.export(
        program, (), f, dynamic_shapes=dynamic_shapes, opset_version=opset_version, dynamo=True, **options
    )


def translate(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """An exported program with ONNX's Attention in the place of our calls, which torch.onnx.export takes.

    Args:
        program: of torch.export.export.

    Returns:
        Another program.

    Raises:
        NotImplementedError: a call uses what cannot be had in ONNX.
    """
    translated: torch.export.ExportedProgram = program.run_decompositions({torch.ops.flash.forward.default: attention})
    graph = translated.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)  # they keep operands alive that only our kernels read
    graph.eliminate_dead_code()
    translated.graph_module.recompile()
    return translated


def attention(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    """o and lse of the raw op `flash::forward` in operations that ONNX has; those of lse are dropped where it is."""
    problem = problem_of(q, k, v, *call)
    refuse(problem)
    visible, added = visibility(problem), addend(problem)
    s = scores(problem, visible, added)
    keys, total, lse = sums(s, problem.mods.sinks)
    if problem.mods.score_mod is None:
        o = attention_node(problem, visible, added)
        if problem.mods.sinks is not None:
            o = o * (keys / total).unsqueeze(-1)
    else:
        o = weighted_values(problem, (s - lse.unsqueeze(-1)).exp())
    if visible is not None and may_be_empty(problem):
        o = o.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return o.to(q.dtype), lse


def refuse(problem: Problem) -> None:
    """Raise NotImplementedError for a call that has no counterpart in ONNX."""
    mods, what = problem.mods, None
    if problem.spec.dropout_p > 0:
        what = "dropout_p; export the model in evaluation mode, model.eval()"
    elif mods.starts_q is not None:
        what = "flash_attention_varlen; give padded sequences and a mask"
    elif mods.blocks is not None:
        what = "block_mask; give the same rule as mask_mod, or as a mask"
    elif any(mod is not None and mod.torch_fn is None for mod in (mods.score_mod, mods.mask_mod)):
        what = "a ScoreMod or MaskMod without torch_fn; give it one, which is what is written out"
    if what is not None:
        raise NotImplementedError(f"ONNX has nothing for {what}")


def attention_node(problem: Problem, visible: Tensor | None, added: Tensor | None) -> Tensor:
    """The Attention node: o, but for sinks."""
    import torch.onnx.ops

    is_causal, scale = is_upper_left(problem), problem.scale
    q, k, v = (x.to(dtype_of_node(problem)) for x in (problem.q, problem.k, problem.v))
    mask = None if is_causal else visible
    if added is not None:
        mask = (added if visible is None else torch.where(visible, added, float("-inf"))).to(q.dtype)
    if mask is not None:  # onnxruntime wants these two axes whole
        mask = mask.expand(*mask.shape[:2], q.shape[2], k.shape[2])
    if scale <= 0:  # its square root is taken, and 0 stands for the default
        q, scale = q * scale, 1.0
    o: Tensor = torch.onnx.ops.attention(
        q, k, v, mask, is_causal=is_causal, scale=scale, softcap=problem.spec.softcap or 0.0,
        softmax_precision=FLOAT if q.dtype in (torch.float16, torch.bfloat16) else None,
    )[0]  # fmt: skip
    return o


def dtype_of_node(problem: Problem) -> torch.dtype:
    """q's dtype, or the accumulator's where a mask of q's would round what is added, or o is not ready."""
    q, mods = problem.q, problem.mods
    rounded = mods.sinks is not None or mods.alibi_slopes is not None
    rounded = rounded or (mods.bias is not None and mods.bias.dtype != q.dtype)
    return accumulator(q) if rounded else q.dtype


def is_upper_left(problem: Problem) -> bool:
    """Whether the only rule of visibility is ONNX's causal one: key j is visible when j <= i."""
    spec, mods = problem.spec, problem.mods
    others = (mods.q_offset, mods.mask, mods.bias, mods.alibi_slopes, mods.mask_mod)
    alone = spec.causal and not spec.left and all(x is None for x in others)
    return alone and known(problem.positions.q_offset == 0)


def may_be_empty(problem: Problem) -> bool:
    """Whether a query may see no key: only where causal and windows are all there is, each is known to see its own."""
    spec, mods = problem.spec, problem.mods
    if is_upper_left(problem):
        return False
    if any(x is not None for x in (mods.q_offset, mods.mask, mods.bias, mods.mask_mod)):
        return True
    first, seqlen_q, seqlen_k = problem.positions.q_offset, problem.q.shape[2], problem.k.shape[2]
    return (spec.causal or spec.left or spec.right) and not (known(first >= 0) and known(first + seqlen_q <= seqlen_k))


def known(statement: Any) -> bool:
    """Whether a statement about symbolic sizes holds for all of them."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(statement)


def places(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """b, h, i, j and the position of query i among the keys, which broadcast to [batch, heads, seqlen_q, seqlen_k]."""
    q, k, offset = problem.q, problem.k, problem.mods.q_offset
    sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    b, h, i, j = (torch.arange(n, device=q.device) for n in sizes)
    b, h, i = b[:, None, None, None], h[:, None, None], i[:, None]
    return b, h, i, j, i + (problem.positions.q_offset if offset is None else offset[:, None, None, None])


def visibility(problem: Problem) -> Tensor | None:
    """Which keys a query sees, bool that broadcasts to [batch, heads, seqlen_q, seqlen_k] from four axes; None: all."""
    spec, mods, (b, h, i, j, position) = problem.spec, problem.mods, places(problem)
    rules = []
    if spec.causal:
        rules.append(j <= position)
    if spec.left:
        rules.append(j >= position - problem.positions.left)
    if spec.right:
        rules.append(j <= position + problem.positions.right)
    if mods.mask is not None:
        rules.append(mods.mask)
    if mods.bias is not None:
        rules.append(~(mods.bias <= torch.finfo(mods.bias.dtype).min))
    if mods.mask_mod is not None:
        rules.append(mods.mask_mod.torch_fn(b, h, i, j, mods.mask_mod.args))
    visible = None
    for rule in rules:
        visible = rule if visible is None else visible & rule
    return None if visible is None else visible[(None,) * (4 - visible.dim())]


def addend(problem: Problem) -> Tensor | None:
    """What is added to the score, of the dtype that sums are made in: bias and ALiBi."""
    mods, dtype, (_, _, _, j, position) = problem.mods, accumulator(problem.q), places(problem)
    added = None if mods.bias is None else mods.bias.to(dtype)
    if mods.alibi_slopes is not None:
        fall = mods.alibi_slopes.to(dtype)[..., None, None] * (position - j).abs().to(dtype)
        added = -fall if added is None else added - fall
    return added


def accumulator(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def scores(problem: Problem, visible: Tensor | None, added: Tensor | None) -> Tensor:
    """The score of every pair, [batch, heads, seqlen_q, seqlen_k], -inf where hidden."""
    dtype, cap, mod = accumulator(problem.q), problem.spec.softcap, problem.mods.score_mod
    heads_k = problem.k.shape[1]
    q = problem.q.to(dtype).unflatten(1, (heads_k, problem.q.shape[1] // heads_k))
    s = (q @ problem.k.to(dtype).unsqueeze(2).mT).flatten(1, 2) * problem.scale
    if cap is not None:
        s = cap * (s / cap).tanh()
    if added is not None:
        s = s + added
    if mod is not None:
        b, h, i, j, _ = places(problem)
        s = mod.torch_fn(s, b, h, i, j, mod.args).to(dtype)
    return s if visible is None else torch.where(visible, s, float("-inf"))


def sums(s: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each query: the sum of exp(s - m) over its keys, that with the sink, and lse = m + log of the latter."""
    m = s.amax(-1)
    if sinks is not None:
        m = torch.maximum(m, sinks.to(s.dtype)[:, None])
    m = torch.where(m == float("-inf"), 0.0, m)
    keys = (s - m.unsqueeze(-1)).exp().sum(-1)
    total = keys if sinks is None else keys + (sinks.to(s.dtype)[:, None] - m).exp()
    return keys, total, m + total.log()


def weighted_values(problem: Problem, p: Tensor) -> Tensor:
    """p @ v, with key heads shared."""
    heads_k = problem.v.shape[1]
    o: Tensor = p.unflatten(1, (heads_k, p.shape[1] // heads_k)) @ problem.v.to(p.dtype).unsqueeze(2)
    return o.flatten(1, 2)
