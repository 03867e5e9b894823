"""Modules: torch's own answers from MultiheadAttention, and the block written out."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flash.nn
from flash import weights
from flash.attention import flash_attention
from flash.nn import KeyValueCache, MultiheadAttention, TransformerBlock, rotary
from tests.test_footprint import allocated

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")

EXACT = dict(rtol=0.0, atol=1e-12)  # float64; the inputs are of order 1
KINDS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"kdim": 12, "vdim": 20},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 12},
]


def pair(**options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch's module and ours with the same random parameters, those that begin as 0 included."""
    made = {"embed_dim": 24, "num_heads": 4, "batch_first": True, "dtype": torch.float64, **options}
    theirs, ours = nn.MultiheadAttention(**made), MultiheadAttention(**made)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def operands(module: nn.MultiheadAttention, seqlen: int = 7, seqlen_k: int = 9, batch: int = 3) -> list[Tensor]:
    """query, key and value as the module takes them."""
    shapes = (batch, seqlen, 24), (batch, seqlen_k, module.kdim), (batch, seqlen_k, module.vdim)
    made = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return made if module.batch_first else [x.transpose(0, 1).contiguous() for x in made]


def answers(module: nn.Module, inputs: list[Tensor], extra: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Output, weights, and the gradients of inputs, `extra` leaves and parameters under random weights of both."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output, found = module(*inputs, **options)
    torch.manual_seed(1)
    loss = (output * torch.randn(output.shape, dtype=output.dtype)).sum()
    if found is not None:
        loss = loss + (found * torch.randn(found.shape, dtype=found.dtype)).sum()
    leaves = {**dict(zip(("query", "key", "value"), inputs, strict=True)), **dict(module.named_parameters())}
    leaves |= {f"extra {i}": x for i, x in enumerate(extra)}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    result = {f"d {name}": torch.zeros(()) if g is None else g for name, g in zip(leaves, grads, strict=True)}
    return result | {"output": output} | ({} if found is None else {"weights": found})


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda text, name=name: f"{name}: {text}", **EXACT)


@pytest.mark.parametrize("average", [True, False, None], ids=["average", "heads", "no weights"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "seqlen first"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_multihead_attention_loads_torchs_weights_and_equals_it(
    kind: dict[str, Any], batch_first: bool, average: bool | None
) -> None:
    theirs, ours = pair(batch_first=batch_first, **kind)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    inputs = operands(theirs)
    options = {"need_weights": average is not None, "average_attn_weights": bool(average)}
    same(answers(ours, inputs, [], **options), answers(theirs, inputs, [], **options))


def test_self_attention_is_one_projection_and_equals_torchs() -> None:
    theirs, ours = pair()
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    for module in (theirs, ours):
        module.zero_grad()
        output, found = module(x, x, x)
        (output.square().sum() + found.square().sum()).backward()
    torch.testing.assert_close(ours(x, x, x), theirs(x, x, x), **EXACT)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name, **EXACT)


@pytest.mark.parametrize("kind", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=["plain", "with more keys"])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("attn", [None, "bool", "float", "3-D bool", "3-D float"])
def test_masks_mean_what_they_mean_to_torch(attn: str | None, padding: str | None, kind: dict[str, Any]) -> None:
    theirs, ours = pair(**kind)
    inputs = operands(theirs)
    masks: dict[str, Tensor] = {}
    if attn is not None:
        shape = (12, 7, 9) if "3-D" in attn else (7, 9)
        hidden = torch.rand(shape) < 0.3
        hidden[..., 2] = False
        added = torch.randn(shape, dtype=torch.float64).masked_fill(hidden, float("-inf"))
        masks["attn_mask"] = hidden if "bool" in attn else added.requires_grad_()
    if padding is not None:
        hidden = torch.arange(9) >= torch.tensor([[9], [4], [6]])
        added = torch.randn(3, 9, dtype=torch.float64).masked_fill(hidden, float("-inf"))
        masks["key_padding_mask"] = hidden if padding == "bool" else added.requires_grad_()
    extra = [x for x in masks.values() if x.requires_grad]
    stock = dict(masks)
    if len({x.dtype for x in masks.values()}) == 2:  # torch wants both to be of a type
        for name, x in masks.items():
            if x.dtype == torch.bool:
                stock[name] = torch.zeros(x.shape, dtype=torch.float64).masked_fill_(x, float("-inf"))
    for need_weights in (True, False):
        got = answers(ours, inputs, extra, need_weights=need_weights, **masks)
        same(got, answers(theirs, inputs, extra, need_weights=need_weights, **stock))


def test_inputs_without_a_batch_equal_torchs() -> None:
    for batch_first in (True, False):
        theirs, ours = pair(batch_first=batch_first)
        inputs = [x[0] if batch_first else x[:, 0] for x in operands(theirs)]
        masks = {"attn_mask": torch.rand(4, 7, 9) < 0.2, "key_padding_mask": torch.arange(9) >= 8}
        for average in (True, False):
            options = {"average_attn_weights": average, **masks}
            same(answers(ours, inputs, [], **options), answers(theirs, inputs, [], **options))


@pytest.mark.parametrize("seqlen_k", [7, 5, 9])
def test_the_causal_hint_is_torchs(seqlen_k: int) -> None:
    theirs, ours = pair()
    inputs = operands(theirs, 7, seqlen_k)
    causal = torch.ones(7, seqlen_k, dtype=torch.bool).triu(1)
    for need_weights in (True, False):
        options = {"attn_mask": causal, "is_causal": True, "need_weights": need_weights}
        same(answers(ours, inputs, [], **options), answers(theirs, inputs, [], **options))
    with pytest.raises(ValueError, match="attn_mask must be given with is_causal"):
        ours(*inputs, is_causal=True)


def test_the_causal_hint_spares_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def recording(*args: Any, **keywords: Any) -> Any:
        seen.append(keywords)
        return flash_attention(*args, **keywords)

    monkeypatch.setattr(flash.nn, "flash_attention", recording)
    theirs, ours = pair()
    inputs = operands(theirs, 9, 9)
    causal, padding = torch.ones(9, 9, dtype=torch.bool).triu(1), torch.arange(9) >= torch.tensor([[9], [4], [6]])
    options = {"attn_mask": causal, "key_padding_mask": padding, "is_causal": True, "need_weights": False}
    same(answers(ours, inputs, [], **options), answers(theirs, inputs, [], **options))
    (keywords,) = seen
    assert keywords["causal"] and keywords["bias"] is None and keywords["mask"].shape == (3, 1, 1, 9)


def test_learned_keys_are_seen_under_a_causal_mask_with_and_without_the_hint() -> None:
    _, ours = pair(add_bias_kv=True)
    inputs = operands(ours, 7, 7)
    causal = torch.ones(7, 7, dtype=torch.bool).triu(1)
    hinted = ours(*inputs, attn_mask=causal, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(hinted, ours(*inputs, attn_mask=causal, need_weights=False)[0], **EXACT)


def test_a_query_that_sees_no_key_has_weights_zero() -> None:
    _, ours = pair()
    hidden = torch.zeros(7, 9, dtype=torch.bool)
    hidden[3] = True
    inputs = operands(ours)
    for mask in (hidden, torch.zeros(7, 9).masked_fill(hidden, float("-inf"))):
        got = answers(ours, inputs, [], attn_mask=mask)
        assert (got["weights"][:, 3] == 0).all() and (got["d query"][:, 3] == 0).all()
        assert torch.equal(got["output"][:, 3], ours.out_proj.bias.expand(3, -1))
        assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("average", [True, False])
def test_weights_asked_for_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch, average: bool) -> None:
    seqlen, heads = 1024, 4
    q, k = torch.randn(2, 1, heads, seqlen, 4).requires_grad_().unbind()
    lse = (q @ k.mT * 0.5).logsumexp(-1).detach().requires_grad_()
    do = torch.randn(1, seqlen, seqlen) if average else torch.randn(1, heads, seqlen, seqlen)

    def step() -> tuple[Tensor, ...]:
        found = weights.weights_of(q, k, lse, None, None, 0.5, average)
        return found, *torch.autograd.grad(found, (q, k, lse), do)

    monkeypatch.setattr(weights, "PAIRS", heads * seqlen**2)
    want = step()
    monkeypatch.setattr(weights, "PAIRS", 16 * heads * seqlen)  # 16 rows a block
    for got, expected in zip(step(), want, strict=True):
        torch.testing.assert_close(got, expected)
    assert allocated(step) < 8 * 4 * weights.PAIRS < heads * 4 * seqlen**2 / 4


def test_dropout_is_active_in_training_only() -> None:
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    theirs, ours = pair(dropout=0.4)
    block = TransformerBlock(24, 4, dropout=0.4, dtype=torch.float64)
    for module, call in ((ours, lambda: ours(x, x, x)[0]), (block, lambda: block(x))):
        assert not torch.equal(call(), call())
        torch.manual_seed(3)
        first = call()
        torch.manual_seed(3)
        assert torch.equal(call(), first)
        module.eval()
        assert torch.equal(call(), call())
    torch.testing.assert_close(ours(x, x, x), theirs.eval()(x, x, x), **EXACT)
    plain = TransformerBlock(24, 4, dtype=torch.float64)
    plain.load_state_dict(block.state_dict())
    assert torch.equal(block(x), plain(x))
    ours.train()
    torch.testing.assert_close(ours(x, x, x)[1], theirs(x, x, x)[1], **EXACT)  # weights are those before dropout


def test_dropped_weights_are_scaled_up() -> None:
    _, ours = pair(dropout=0.4)
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    found = torch.stack([ours(x, x, x, need_weights=False)[0] for _ in range(1000)])
    off = (found.mean(0) - ours.eval()(x, x, x)[0]) / (found.std(0) / 1000**0.5)
    assert off.abs().max() < 5  # standard deviations


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_encoder_layer_calls_it_in_eval_mode_too(norm_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"batch_first": True, "norm_first": norm_first, "dtype": torch.float64}
    stock = nn.TransformerEncoderLayer(24, 4, 32, **made)
    layer = copy.deepcopy(stock)
    layer.self_attn = MultiheadAttention(24, 4, batch_first=True, dtype=torch.float64)
    layer.load_state_dict(stock.state_dict(), strict=True)
    calls: list[int] = []
    monkeypatch.setattr(flash.nn, "flash_attention", lambda *a, **k: calls.append(1) or flash_attention(*a, **k))
    x, padding = torch.randn(3, 7, 24, dtype=torch.float64), torch.arange(7) >= torch.tensor([[7], [4], [6]])
    layer, stock = layer.eval(), stock.eval()
    with torch.no_grad():
        for options in ({}, {"src_key_padding_mask": padding}, {"src_mask": torch.rand(7, 7) < 0.2}):
            calls.clear()
            got, want = layer(x, **options), stock(x, **options)
            assert calls == [1]
            torch.testing.assert_close(got, want, **EXACT)
        calls.clear()
        pickle.loads(pickle.dumps(layer))(x)
        assert calls == [1]


def swapped(stock: nn.Module) -> nn.Module:
    """A copy with our module in place of each nn.MultiheadAttention."""
    module = copy.deepcopy(stock)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MultiheadAttention):
                setattr(parent, name, MultiheadAttention(24, 4, batch_first=True, dtype=torch.float64))
    module.load_state_dict(stock.state_dict(), strict=True)
    return module.train(stock.training)


@pytest.mark.parametrize("training", [True, False])
def test_torchs_transformer_gives_the_same_answers_and_gradients(training: bool) -> None:
    stock = nn.Transformer(24, 4, 2, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64).train(training)
    module = swapped(stock)
    source, target = (torch.randn(3, n, 24, dtype=torch.float64) for n in (7, 5))
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64),
        "src_key_padding_mask": torch.arange(7) >= torch.tensor([[7], [4], [6]]),
        "memory_key_padding_mask": torch.arange(7) >= torch.tensor([[7], [4], [6]]),
        "tgt_is_causal": True,
    }
    found = []
    for model in (module, stock):
        output = model(source, target, **masks)
        grads = torch.autograd.grad(output.square().sum(), list(model.parameters()))
        found.append([output, *grads])
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)  # a dozen layers
    with torch.no_grad():
        torch.testing.assert_close(module(source, target, **masks), stock(source, target, **masks), **EXACT)


def test_torchs_encoder_may_make_the_batch_nested() -> None:
    """In eval mode, of padding on the right; then it fills what was padding with 0."""
    layer = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True, dtype=torch.float64)
    stock = nn.TransformerEncoder(layer, 2).eval()
    assert stock.use_nested_tensor
    x, padding = torch.randn(3, 7, 24, dtype=torch.float64), torch.arange(7) >= torch.tensor([[7], [4], [6]])
    with torch.no_grad():
        got, want = (model(x, src_key_padding_mask=padding) for model in (swapped(stock), stock))
    assert (want[padding] == 0).all()
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("kind", [{}, {"kdim": 12, "vdim": 20}, {"add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_sequences_of_their_own(layout: torch.layout, kind: dict[str, Any]) -> None:
    theirs, ours = pair(**kind)
    lengths, lengths_k = (7, 1, 4), (5, 3, 8)
    parts = [operands(theirs, n, m, batch=1) for n, m in zip(lengths, lengths_k, strict=True)]
    inputs = [[x[0].requires_grad_() for x in column] for column in zip(*parts, strict=True)]
    nested = [torch.nested.as_nested_tensor(column, layout=layout) for column in inputs]
    if layout == torch.jagged:  # key and value of the same lengths, which torch can only know of the same object
        nested[2] = torch.nested.nested_tensor_from_jagged(torch.cat(inputs[2]), nested[1].offsets())
    output, none = ours(*nested, need_weights=False)
    assert none is None and output.is_nested and output.layout == layout
    want = [theirs(*x, need_weights=False)[0] for x in zip(*inputs, strict=True)]
    torch.testing.assert_close(list(output.unbind()), want, **EXACT)
    leaves = [x for column in inputs for x in column]
    grads = [torch.autograd.grad(sum(y.square().sum() for y in x), leaves) for x in (output.unbind(), want)]
    torch.testing.assert_close(*grads, **EXACT)


def test_nested_tensors_that_are_not_served_are_refused_by_name() -> None:
    x = torch.nested.nested_tensor([torch.randn(3, 24), torch.randn(5, 24)], layout=torch.jagged)
    ours, extended = MultiheadAttention(24, 4), MultiheadAttention(24, 4, add_bias_kv=True)
    for module, arguments, text in (
        (ours, (x, x, x), "need_weights=False"),
        (ours, (x, x, torch.randn(2, 5, 24)), "must all be nested"),
        (extended, (x, x, x), "add_bias_kv"),
    ):
        with pytest.raises(NotImplementedError, match=text):
            module(*arguments, need_weights="need_weights" in text)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"query": torch.randn(7, 24)}, "must all have 3 dimensions, or 2 without a batch"),
        ({"value": torch.randn(3, 8, 24)}, "value must have batch and length of key"),
        ({"query": torch.randn(2, 7, 24)}, "key must have batch 2 like query, got 3"),
        ({"attn_mask": torch.zeros(9, 7)}, r"attn_mask must have shape \(7, 9\) or \(12, 7, 9\), got \(9, 7\)"),
        ({"attn_mask": torch.zeros(7, 9, dtype=torch.int32)}, "attn_mask must be bool, True = ignored, or float"),
        ({"key_padding_mask": torch.zeros(9)}, r"key_padding_mask must have shape \(3, 9\), got \(9,\)"),
    ],
)
def test_wrong_calls_raise(change: dict[str, Tensor], text: str) -> None:
    ours = MultiheadAttention(24, 4, batch_first=True)
    inputs = {"query": torch.randn(3, 7, 24), "key": torch.randn(3, 9, 24), "value": torch.randn(3, 9, 24)}
    with pytest.raises(ValueError, match=text):
        ours(**{**inputs, **change})


def test_autocast_is_followed() -> None:
    _, ours = pair(dtype=torch.float32)
    x = torch.randn(2, 9, 24)
    want, want_weights = ours(x, x, x)
    with torch.autocast("cpu", torch.bfloat16):
        got, got_weights = ours(x, x, x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)
    torch.testing.assert_close(got_weights.float(), want_weights, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        _, sharp = ours(30 * x, 30 * x, x)  # scores that bfloat16 would round by more than 1
    torch.testing.assert_close(sharp.float().sum(-1), torch.ones(2, 9), rtol=0, atol=0.01)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_compiled_module_has_one_graph_and_the_same_gradients(need_weights: bool) -> None:
    _, ours = pair()
    inputs = operands(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    want = answers(ours, inputs, [], need_weights=need_weights)
    got = answers(compiled, inputs, [], need_weights=need_weights)
    same({name.replace("_orig_mod.", ""): x for name, x in got.items()}, want)


BLOCKS: list[dict[str, Any]] = [
    {},
    {"causal": True, "heads_k": 2, "rope_base": 100.0, "swiglu": True, "norm": "rms", "bias": False},
    {"window": (2, 1), "head_dim": 10, "hidden_dim": 13},
    {"causal": True, "window": 3, "heads_k": 1, "rope_base": 1e4},
]


def formula(block: TransformerBlock, x: Tensor, options: dict[str, Any]) -> Tensor:
    """A block written out, a head at a time, rotary positions as complex numbers."""
    seqlen, d = x.shape[1], block.head_dim
    heads, heads_k = 4, options.get("heads_k", 4)
    i, j = torch.arange(seqlen)[:, None], torch.arange(seqlen)
    left, right = w if isinstance(w := options.get("window", seqlen), tuple) else (w, w)
    keep = (j - i <= right) & (i - j <= left) & ((j <= i) | (not options.get("causal", False)))

    def turned(y: Tensor) -> Tensor:
        if "rope_base" not in options:
            return y
        t = torch.arange(d // 2, dtype=torch.float64)
        turn = torch.polar(torch.ones(seqlen, d // 2, dtype=torch.float64), i * options["rope_base"] ** (-2 * t / d))
        z = torch.complex(y[..., : d // 2], y[..., d // 2 :]) * turn
        return torch.cat([z.real, z.imag], -1)

    qkv = block.qkv(block.norm_attention(x))
    parts = [qkv[..., n * d : (n + 1) * d] for n in range(heads + 2 * heads_k)]
    o = []
    for h in range(heads):
        g = h // (heads // heads_k)
        s = turned(parts[h]) @ turned(parts[heads + g]).mT / d**0.5
        o.append(s.masked_fill(~keep, float("-inf")).softmax(-1) @ parts[heads + heads_k + g])
    x = x + block.out(torch.cat(o, -1))
    y = block.up(block.norm_mlp(x))
    hidden = block.down.in_features
    y = F.silu(y[..., :hidden]) * y[..., hidden:] if options.get("swiglu") else F.gelu(y)
    return x + block.down(y)


@pytest.mark.parametrize("options", BLOCKS, ids=str)
def test_a_transformer_block_equals_its_formula(options: dict[str, Any]) -> None:
    block = TransformerBlock(24, 4, dtype=torch.float64, **options)
    x = torch.randn(2, 11, 24, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters()]
    found = [(y, *torch.autograd.grad(y.square().sum(), leaves)) for y in (block(x), formula(block, x, options))]
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)  # gradients of order 100
    assert {name.split(".")[0] for name in block.state_dict()} == {
        "norm_attention", "qkv", "out", "norm_mlp", "up", "down",
    }  # fmt: skip


def test_a_gated_perceptron_is_as_large_as_a_plain_one() -> None:
    sizes = [sum(p.numel() for p in TransformerBlock(96, 4, swiglu=s, bias=False).parameters()) for s in (True, False)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("options", BLOCKS[1:2] + BLOCKS[3:], ids=str)
def test_a_cache_continues_where_it_was(options: dict[str, Any]) -> None:
    block = TransformerBlock(24, 4, dtype=torch.float64, **options)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    cache = KeyValueCache()
    steps = [block(part, cache=cache) for part in x.split([4, 1, 1, 3], 1)]
    assert len(cache) == 9
    torch.testing.assert_close(torch.cat(steps, 1), block(x), **EXACT)


def test_a_block_takes_a_mask() -> None:
    block = TransformerBlock(24, 4, dtype=torch.float64)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    keep = (torch.arange(9) < torch.tensor([[9], [5]]))[:, None, None]
    torch.testing.assert_close(block(x, mask=keep)[1, :5], block(x[1:, :5])[0], **EXACT)


def test_a_compiled_block_has_one_graph_and_the_same_gradients() -> None:
    block = TransformerBlock(24, 4, dtype=torch.float64, **BLOCKS[1])
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = [(y, *torch.autograd.grad(y.square().sum(), list(block.parameters()))) for y in (compiled(x), block(x))]
    torch.testing.assert_close(*found, **EXACT)


def test_a_block_trains_under_ddp(tmp_path: Any) -> None:
    import torch.distributed as dist

    block = TransformerBlock(24, 4, dtype=torch.float64, **BLOCKS[1])
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    want = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(block)(x).square().sum().backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close([p.grad for p in block.parameters()], list(want), **EXACT)


def test_sizes_of_a_block_may_be_numpys() -> None:
    block = TransformerBlock(np.int64(24), np.int32(4), heads_k=np.int8(2))
    assert block(torch.zeros(1, 3, 24)).shape == (1, 3, 24)
    wide = TransformerBlock(24, 4, heads_k=np.int8(2), head_dim=np.int8(64))  # 4 * 64 does not fit int8
    assert wide.qkv.weight.shape == ((4 + 2 + 2) * 64, 24) and type(wide.heads_k) is int


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"heads": 5}, "heads must divide embed_dim 24"),
        ({"heads_k": 3}, "heads_k must divide heads 4, got 3"),
        ({"head_dim": 7, "rope_base": 1e4}, "head_dim must be even"),
        ({"norm": "batch"}, 'norm must be "layer" or "rms"'),
        ({"heads_k": 0}, "heads_k must be at least 1, got 0"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\), got 1.5"),
    ],
)
def test_a_block_that_cannot_be_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        TransformerBlock(**{"embed_dim": 24, "heads": 4, **options})


def test_rotary_scores_depend_on_distances_alone() -> None:
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)
    near, far = (rotary(q, n + 5) @ rotary(k, n).mT for n in (0, 1000))
    torch.testing.assert_close(near, far, **EXACT)
    assert rotary(q.bfloat16(), 3).dtype == torch.bfloat16
