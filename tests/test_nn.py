"""Modules: torch's own answers from MultiheadAttention, the block written out, estimates beside measurements."""

import copy
import pickle
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import flash.nn
from bench.measure import gpu_peak
from flash import mods, reference, weights
from flash.attention import flash_attention
from flash.nn import KeyValueCache, MultiheadAttention, TransformerBlock, attention_weights, memory_estimate, rotary
from tests import calls
from tests.calls import Place, random_inputs

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


def allocated(call: Callable[[], Any]) -> int:
    """Bytes that call() held on the CPU at most, opaque ops' own included, less those of the tensors it returned."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        returned = call()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most - sum(x.nbytes for x in returned)


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


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"heads": 5}, "heads must divide embed_dim 24"),
        ({"heads_k": 3}, "heads_k must divide heads 4, got 3"),
        ({"head_dim": 7, "rope_base": 1e4}, "head_dim must be even"),
        ({"norm": "batch"}, 'norm must be "layer" or "rms"'),
        ({"heads_k": 0}, "heads and heads_k must be at least 1, got 4 and 0"),
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


def standard(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q * q.shape[-1] ** -0.5) @ k.mT
    p = s.softmax(-1)
    return p @ v


def step(attention: Callable[..., Any], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """o and the gradients, do made beforehand."""
    *leaves, do = inputs
    o = attention(*leaves)
    return o, *torch.autograd.grad(o, leaves, do)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("seqlen", "seqlen_k"), [(256, 256), (128, 384)])
def test_the_memory_estimate_is_what_is_measured(seqlen: int, seqlen_k: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, n, 16, dtype=dtype) for n in (seqlen, seqlen_k, seqlen_k))
    estimate = memory_estimate(2, seqlen, 3, 16, dtype, seqlen_k=seqlen_k)
    assert abs(allocated(lambda: (standard(q, k, v),)) - estimate.standard_forward) <= 64
    leaves = [x.requires_grad_() for x in (q, k, v)]
    measured = allocated(lambda: step(standard, [*leaves, torch.randn_like(q)]))
    assert abs(measured - q.nbytes - estimate.standard_backward) <= max(q.nbytes, k.nbytes) + 64  # do is new here


class Made(TorchDispatchMode):
    """Bytes of all tensors that the launchers make; the interpreter's own do not count."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.__name__.startswith(("empty", "new_empty", "zeros", "new_zeros")):
            frame, around = sys._getframe(1), ("torch.", "conftest", "tests.conftest")
            while frame.f_globals["__name__"].startswith(around):
                frame = frame.f_back  # type: ignore[assignment]
            self.nbytes += out.nbytes if frame.f_globals["__name__"].startswith("flash.") else 0
        return out


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_memory_estimate_is_what_the_kernels_take(dtype: torch.dtype, place: Place) -> None:
    x = random_inputs(place, heads=2, seqlen_q=48, seqlen_k=64, head_dim=16, dtype=dtype)
    estimate = memory_estimate(1, 48, 2, 16, dtype, seqlen_k=64)
    with Made() as forward:
        found = calls.forward(x)
    assert forward.nbytes - found.o.nbytes == estimate.flash_forward
    with Made() as backward:
        grads = calls.backward(x, found=found)
    both = forward.nbytes + backward.nbytes
    returned = sum(g.nbytes for g in (found.o, grads.dq, grads.dk, grads.dv) if g is not None)
    assert both - returned == estimate.flash_backward


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_memory_estimate_is_what_a_gpu_measures(dtype: torch.dtype) -> None:
    q, k, v, do = torch.randn(4, 2, 3, 512, 64, dtype=dtype, device="cuda")
    estimate = memory_estimate(2, 512, 3, 64, dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for attention, forward, both in (
        (standard, estimate.standard_forward, estimate.standard_backward),
        (partial(flash_attention, backend="triton"), estimate.flash_forward, estimate.flash_backward),
    ):
        step(attention, [*leaves, do])  # compiles
        with torch.no_grad():
            assert abs(gpu_peak(lambda attention=attention: (attention(q, k, v),)) - forward) <= 4096 + 0.02 * forward
        measured = gpu_peak(lambda attention=attention: step(attention, [*leaves, do]))
        assert abs(measured - both) <= q.nbytes + 4096 + 0.02 * both


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_torch_backend_takes_no_more_than_its_estimate_says(dtype: torch.dtype) -> None:
    shares = []
    for seqlen in (512, 1024):
        inputs = [torch.randn(1, 2, seqlen, 64, dtype=dtype) for _ in range(4)]
        leaves = [x.requires_grad_() for x in inputs[:3]]
        with torch.no_grad():
            forward = allocated(lambda inputs=inputs: (flash_attention(*inputs[:3]),))
        both = allocated(lambda leaves=leaves, do=inputs[3]: step(flash_attention, [*leaves, do]))
        copy = 4 * inputs[0].numel()
        assert forward <= 6 * copy and both <= 15 * copy
        shares.append(both / copy)
    assert shares[1] <= 1.25 * shares[0]  # it grows with the length, in parts of it
    q, k, v = (torch.randn(1, 2, 4096, 64) for _ in range(3))
    tiles = allocated(lambda: (flash_attention(q, k, v, dropout_p=0.1),))
    assert tiles <= 40e6 < memory_estimate(1, 4096, 2, 64, torch.float32).standard_forward


def test_modules_estimate_their_own_attention() -> None:
    want = memory_estimate(2, 64, 4, 6, torch.float64)
    for module in (MultiheadAttention(24, 4), TransformerBlock(24, 4, heads_k=2)):
        assert module.double().memory_estimate(2, 64) == want


def test_an_estimate_of_nothing_that_can_be_is_refused() -> None:
    for heads in (-1, 1.5, "2"):
        with pytest.raises(ValueError, match=f"heads must be a whole number, at least 0, got {heads!r}"):
            memory_estimate(1, 8, heads, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype must be a float, got torch\.int32"):
        memory_estimate(1, 8, 1, 4, torch.int32)


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
