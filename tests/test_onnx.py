"""Models that call us, exported to ONNX and run by onnxruntime, against the oracle."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flash.attention import flash_attention, flash_attention_varlen
from flash.mods import MaskMod, ScoreMod, document, relative_position, tanh_softcap
from tests import bounds

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),  # torch, copying its programs
    pytest.mark.filterwarnings("ignore:# The axis name:UserWarning"),  # torch.onnx, where two axes share a name
]

LENGTH, LENGTH_K, NARROW = 9, 13, 6
Features = dict[str, dict[str, Any]]


class Calls(torch.nn.Module):
    """o and lse of one call for each set of keywords; key heads are shared, and values are narrower than keys."""

    def __init__(self, features: Features, lse: bool = True) -> None:
        super().__init__()
        self.features, self.lse = features, lse

    def forward(self, q: Any, k: Any, v: Any, operands: dict[str, Any]) -> list[Any]:
        found: list[Any] = []
        for keywords in self.features.values():
            made = {key: operands[x] if isinstance(x, str) else x for key, x in keywords.items()}
            call: Any = flash_attention(q, k, v, return_lse=self.lse, **made)
            found += call if self.lse else [call]
        return found


def tensors(length: int, length_k: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    shapes = (2, 4, length, 8), (2, 2, length_k, 8), (2, 2, length_k, NARROW)
    q, k, v = (torch.randn(shape).to(dtype) for shape in shapes)
    return q, k, v


def exported(model: torch.nn.Module, args: Any, dynamic_shapes: Any = None, **keywords: Any) -> Any:
    from flash.integrations.onnx import export

    return export(model.eval(), args, dynamic_shapes=dynamic_shapes, verbose=False, **keywords)


def runner(program: Any) -> Callable[..., list[torch.Tensor]]:
    """What onnxruntime makes of a program."""
    import onnxruntime

    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def run(*args: torch.Tensor) -> list[torch.Tensor]:
        given = {name: x.numpy() for name, x in zip(names, args, strict=True)}
        return [torch.from_numpy(x) for x in session.run(None, given)]

    return run


def hold(run: Any, features: Features, args: Any, operands: dict[str, torch.Tensor]) -> None:
    """Each call's o and lse are within the bounds of their dtype."""
    found = run(*args, *operands.values())
    assert len(found) == 2 * len(features)
    for (name, keywords), o, lse in zip(features.items(), found[::2], found[1::2], strict=True):
        options = {key: operands[x] if isinstance(x, str) else x for key, x in keywords.items()}
        lines = bounds.complaints(bounds.Outputs(o, lse), bounds.Inputs(*args, options=options))
        assert not lines, (name, lines)


def kinds(program: Any) -> list[str]:
    return [node.op_type for node in program.model.graph]


def attributes(program: Any) -> list[dict[str, Any]]:
    """Of each Attention node."""
    nodes = [node for node in program.model.graph if node.op_type == "Attention"]
    return [{key: x.value for key, x in node.attributes.items()} for node in nodes]


class Block(torch.nn.Module):
    """A layer with weights that want a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(24, 48), torch.nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (-1, 6)).transpose(1, 2) for y in self.qkv(x).split((24, 12, 12), -1))
        o: Any = flash_attention(q, k, v, causal=True)
        return x + self.out(o.transpose(1, 2).flatten(2))


def test_a_model_becomes_attention_nodes_and_runs_alike() -> None:
    model, x = torch.nn.Sequential(Block(), Block()), torch.randn(2, LENGTH, 24)
    batch, length = "batch", "length"
    program = exported(model, (x,), ({0: batch, 1: length},))
    assert [(node["is_causal"], round(node["scale"], 6)) for node in attributes(program)] == [(1, 0.408248)] * 2
    assert not {"Softmax", "Exp", "Where", "ReduceMax", "Range"} & set(kinds(program))
    assert kinds(program).count("MatMul") == 4  # of the Linear layers
    shape = program.model.graph.inputs[0].shape
    assert [str(n) for n in shape] == ["batch", "length", "24"]

    import onnxruntime

    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for size in ((2, LENGTH), (1, 1), (3, 40)):
        x = torch.randn(*size, 24)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=2e-6, atol=2e-6)


ALIKE: Features = {
    "nothing": {},
    "causal": {"causal": True},
    "window": {"window": 2},
    "causal window": {"causal": True, "window": (3, None)},
    "softcap": {"softcap": 0.7},
    "softcap causal window": {"softcap": 0.7, "causal": True, "window": (3, 0)},
    "scale": {"scale": 0.2},
    "scale 0": {"scale": 0.0},
    "scale below 0": {"scale": -0.3},
    "sinks": {"sinks": "sinks"},
}
UNLIKE: Features = {
    "causal": {"causal": True},
    "causal from the first key": {"causal": True, "q_offset": 0},
    "window": {"window": (4, 2)},
    "each has its place": {"causal": True, "window": (5, None), "q_offset": "offsets"},
    "softcap causal": {"causal": True, "softcap": 0.7},
}
OPERANDS: Features = {
    "mask": {"mask": "mask"},
    "padding": {"mask": "padding", "causal": True},
    "bias": {"bias": "bias", "softcap": 0.9},
    "bias of keys": {"bias": "key_bias"},
    "alibi": {"alibi_slopes": "slopes", "causal": True},
    "alibi of the batch": {"alibi_slopes": "batch_slopes", "bias": "bias"},
    "sinks": {"sinks": "sinks"},
    "sinks mask": {"sinks": "sinks", "mask": "mask", "scale": 0.5},
    "everything": {
        "causal": True, "window": (6, None), "mask": "mask", "bias": "bias", "alibi_slopes": "slopes",
        "softcap": 0.9, "sinks": "sinks", "scale": 0.4,
    },
}  # fmt: skip


def operands(length: int, length_k: int) -> dict[str, torch.Tensor]:
    mask = torch.rand(2, 4, length, length_k) > 0.4
    mask[0, 1, -1] = mask[1, :, 0] = False  # queries that see no key
    padding = torch.arange(length_k) < torch.tensor([length_k - 2, 0])[:, None]
    bias = torch.randn(4, length, length_k)
    bias[1, -1] = torch.finfo(bias.dtype).min
    bias[2, 0, 1:] = float("-inf")
    return {
        "mask": mask, "padding": padding[:, None, None], "bias": bias, "key_bias": torch.randn(2, 1, 1, length_k),
        "slopes": torch.rand(4), "batch_slopes": torch.rand(2, 4), "sinks": torch.randn(4),
        "offsets": torch.tensor([1, -3]),
    }  # fmt: skip


def used(features: Features, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {x for keywords in features.values() for x in keywords.values() if isinstance(x, str)}
    return {name: x for name, x in given.items() if name in names}


def test_different_lengths_get_a_bottom_right_mask() -> None:
    args, given = tensors(LENGTH, LENGTH_K), used(UNLIKE, operands(LENGTH, LENGTH_K))
    program = exported(Calls(UNLIKE), (*args, given))
    assert [node.get("is_causal", 0) for node in attributes(program)] == [0, 1, 0, 0, 0]
    hold(runner(program), UNLIKE, args, given)
    only_o = exported(Calls({"causal": {"causal": True}}, lse=False), (*args, {}))
    assert kinds(only_o).count("Attention") == 1
    assert not {"MatMul", "Exp", "Where"} & set(kinds(only_o))  # nothing of lse, and each query sees a key
    upside_down = {"causal": {"causal": True}}
    args = tensors(LENGTH_K, LENGTH)  # so that the first queries see none
    only_o = exported(Calls(upside_down, lse=False), (*args, {}))
    assert "Where" in kinds(only_o)  # onnxruntime 1.31 makes 0 of them by itself; opset 23 used to leave NaN
    (o,) = runner(only_o)(*args)
    assert not o[:, :, : LENGTH_K - LENGTH].any() and o[:, :, LENGTH_K - LENGTH :].all()
    hold(runner(exported(Calls(upside_down), (*args, {}))), upside_down, args, {})


def test_dynamic_lengths_run() -> None:
    batch, length, length_k = (torch.export.Dim(name, max=1000) for name in ("batch", "length", "length_k"))
    args = tensors(LENGTH, LENGTH)
    whole = {0: batch, 2: length}
    given = used(ALIKE, operands(LENGTH, LENGTH))
    run = runner(exported(Calls(ALIKE), (*args, given), (whole, whole, whole, {"sinks": None})))
    for size in (LENGTH, 1, 37):
        hold(run, ALIKE, tensors(size, size), given)
    args, given = tensors(LENGTH, LENGTH_K), used(UNLIKE, operands(LENGTH, LENGTH_K))
    keys = {0: batch, 2: length_k}
    shapes = (whole, keys, keys, {"offsets": {0: batch}})
    run = runner(exported(Calls(UNLIKE), (*args, given), shapes))
    for size, size_k in ((LENGTH, LENGTH_K), (LENGTH_K, LENGTH), (1, 30), (30, 2)):
        hold(run, UNLIKE, tensors(size, size_k), given)


def test_operands_run_alike() -> None:
    args, given = tensors(LENGTH, LENGTH_K), used(OPERANDS, operands(LENGTH, LENGTH_K))
    program = exported(Calls(OPERANDS), (*args, given))
    assert kinds(program).count("Attention") == len(OPERANDS)
    hold(runner(program), OPERANDS, args, given)


def test_half_precision_rounds_no_bias() -> None:
    args, given = tensors(LENGTH, LENGTH_K, torch.float16), used(OPERANDS, operands(LENGTH, LENGTH_K))
    given["key_bias"] = given["key_bias"].half()  # the other bias stays float32
    program = exported(Calls(OPERANDS), (*args, given))
    half = [node for node in attributes(program) if node.get("softmax_precision") == 1]  # float32
    assert (len(half), len(attributes(program))) == (3, len(OPERANDS))  # mask, padding and a bias of q's dtype
    hold(runner(program), OPERANDS, args, given)


def test_float64_comes_out_to_the_precision_of_float32() -> None:
    args, given = tensors(LENGTH, LENGTH_K), used(OPERANDS, operands(LENGTH, LENGTH_K))
    wide = [x.double() for x in args]
    run = runner(exported(Calls(OPERANDS), (*wide, given)))
    found = run(*wide, *given.values())
    assert {x.dtype for x in found} == {torch.float64}
    hold(lambda *_: [x.float() for x in found], OPERANDS, args, given)


def test_features_without_a_node_are_decomposed_or_refused() -> None:
    table, ids = torch.randn(4, 7), torch.arange(LENGTH) // 4
    distance = ScoreMod(None, lambda s, b, h, i, j, args: s - 0.1 * (h + 1) * (i - j).abs(), None)
    corner = MaskMod(None, lambda b, h, i, j, args: (i + j > 5) & (b + h < 4))
    decomposed: Features = {
        "score_mod": {"score_mod": distance, "causal": True},
        "score_mod with a table": {"score_mod": relative_position(table, 3), "sinks": "sinks"},
        "score_mod after softcap": {"score_mod": tanh_softcap(0.8), "softcap": 0.9, "mask": "mask"},
        "mask_mod": {"mask_mod": corner},
        "document": {"mask_mod": document(ids), "causal": True},
    }
    args, given = tensors(LENGTH, LENGTH), used(decomposed, operands(LENGTH, LENGTH))
    program = exported(Calls(decomposed), (*args, given))
    assert kinds(program).count("Attention") == 2
    hold(runner(program), decomposed, args, given)

    from torch.nn.attention.flex_attention import create_block_mask

    blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, LENGTH, LENGTH, "cpu", 16)
    jit_only = MaskMod(corner.fn or _triton_only(), None)
    flash_attention(*args, block_mask=blocks)  # torch.export cannot ask a BlockMask that was not asked before
    for match, keywords in (
        ("dropout_p; export the model in evaluation mode", {"dropout_p": 0.5}),
        ("block_mask; give the same rule as mask_mod", {"block_mask": blocks}),
        ("without torch_fn", {"mask_mod": jit_only}),
    ):
        with pytest.raises(NotImplementedError, match=f"ONNX has nothing for .*{match}"):
            exported(Calls({"it": keywords}), (*args, {}))


def _triton_only() -> Any:
    import triton

    @triton.jit
    def fn(b, h, i, j, args):  # type: ignore[no-untyped-def]
        return i >= j

    return fn


def test_packed_sequences_and_early_opsets_are_refused() -> None:
    class Packed(torch.nn.Module):
        def forward(self, x: torch.Tensor, starts: torch.Tensor) -> Any:
            lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 5, "max_seqlen_k": 5}
            return flash_attention_varlen(x, x, x, **lengths)

    with pytest.raises(NotImplementedError, match="ONNX has nothing for flash_attention_varlen"):
        exported(Packed(), (torch.randn(7, 2, 8), torch.tensor([0, 5, 7], dtype=torch.int32)))
    with pytest.raises(ValueError, match="opset_version must be at least 23"):
        exported(Block(), (torch.randn(1, 4, 24),), opset_version=18)


def test_a_file_is_written(tmp_path: Any) -> None:
    import onnx

    path = tmp_path / "block.onnx"
    exported(Block(), (torch.randn(1, 4, 24),), f=str(path))
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert [x.version for x in model.opset_import if x.domain == ""] == [23]
    assert "Attention" in [node.op_type for node in model.graph.node]
