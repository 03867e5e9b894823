"""Error messages, read as someone who does not know the code: what was wrong, what was expected, what to do."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module

import numpy as np
import pytest
import torch

import flash
from flash import mods
from flash.integrations.flash_attn import flash_attn_with_kvcache
from flash.integrations.sdpa import scaled_dot_product_attention
from flash.nn import MultiheadAttention, TransformerBlock, memory_estimate
from tests.test_layout import SHIPPED, places, sources, tree

SUBJECTS = {"a", "it", "no", "method", "torch", "two", "ONNX"}  # of messages about something else than an argument
LEFT_OUT = {
    "explicit attn_mask should not be set when is_causal=True": "torch's own words",
    "two rows say something of the same calls": "said of a file, whose name stands before it",
    "{} is no number": "said of a file, whose name stands before it",
    "no tile holds head_dim {} and head_dim_v {}": "said of a candidate in what a sweep writes down",
}


def text_of(node: ast.expr, constants: dict[str, str]) -> str:
    """A message as it is written: "{}" for what a call puts into it, and names of constants resolved."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, constants) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.Name):
        return constants.get(node.id, "{}")
    return "{}"


def constants_of(folder: str) -> dict[str, str]:
    """Texts that have a name at the top of a file."""
    return {
        target.id: text_of(node.value, {})
        for path in sources(folder)
        for node in tree(path).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def messages() -> Iterator[tuple[str, str, str]]:
    """("file:line", the exception's name, its text) of each message that is written where it is raised."""
    constants = {name: text for folder in SHIPPED for name, text in constants_of(folder).items()}
    for place, node in places(SHIPPED, ast.Raise):
        call = node.exc
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.args:
            yield place, call.func.id, text_of(call.args[0], constants)


def subjects() -> set[str]:
    """What a message may begin with: arguments, fields, functions, classes."""
    named = {
        getattr(node, "arg", None) or node.name for _, node in places(SHIPPED, (ast.arg, ast.FunctionDef, ast.ClassDef))
    }
    fields = {node.target.id for _, node in places(SHIPPED, ast.AnnAssign) if isinstance(node.target, ast.Name)}
    return named | fields | SUBJECTS


def faults(place: str, kind: str, text: str, known: set[str]) -> list[str]:
    """What a message lacks, as it is written."""
    if text == "{}" or text in LEFT_OUT or kind not in ("ValueError", "TypeError", "NotImplementedError"):
        return []
    found = []
    first = re.split(r"[^A-Za-z0-9_{}]", text, maxsplit=1)[0]
    if not first.startswith("{") and first not in known and f"{first}=" not in text:
        found.append(f"it begins with {first!r}, which is no argument")
    if kind == "ValueError" and " must " not in text:
        found.append("it does not say what must be")
    of_file = place.startswith("flash/autotune/")
    if kind == "ValueError" and not of_file and not re.search(r"\bgot\b|[;:] ", text):
        found.append("it says neither what came nor what to do")
    if kind == "NotImplementedError" and not re.search(r"[;:] |\bmust\b|\{\}$", text):
        found.append("it names nothing that works")
    return found


def test_every_message_names_its_argument_and_what_to_do() -> None:
    known, written = subjects(), list(messages())
    lacking = {
        f"{place}: {text}": lacks for place, kind, text in written if (lacks := faults(place, kind, text, known))
    }
    assert lacking == {}
    assert len(written) > 200
    assert LEFT_OUT.keys() <= {text for _, _, text in written}


@pytest.mark.parametrize(
    "kind, text",
    [
        ("ValueError", "bad shape"),
        ("ValueError", "q must be a torch.Tensor"),
        ("ValueError", "q is wrong, got {}"),
        ("ValueError", "Expected q, which must be a torch.Tensor, got {}"),
        ("NotImplementedError", "backend is not supported"),
        ("TypeError", "unsupported operand, which must be a tensor"),
    ],
)
def test_a_message_that_helps_nobody_is_found(kind: str, text: str) -> None:
    assert faults("flash/x.py:1", kind, text, {"q", "backend"})


def dense(**changes: object) -> object:
    """A call that is right but for what is changed; by position where it is q, k or v."""
    given: dict[str, object] = dict(q=Q, k=K, v=K) | changes
    return flash.flash_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def varlen(**changes: object) -> object:
    rows = {"q": torch.zeros(16, 4, 32), "k": torch.zeros(16, 2, 32), "v": torch.zeros(16, 2, 32)}
    lengths = {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS, "max_seqlen_q": 11, "max_seqlen_k": 11}
    given: dict[str, object] = rows | lengths | changes
    return flash.flash_attention_varlen(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def decode(**changes: object) -> object:
    given: dict[str, object] = dict(q=torch.zeros(2, 4, 1, 32), k_cache=CACHE, v_cache=CACHE, cache_seqlens=LENGTHS)
    given |= changes
    q, k_cache, v_cache = (given.pop(name) for name in ("q", "k_cache", "v_cache"))
    return flash.flash_attention_decode(q, k_cache, v_cache, **given)


def merge(**changes: object) -> object:
    given: dict[str, object] = dict(o1=Q, lse1=Q[..., 0], o2=Q, lse2=Q[..., 0]) | changes
    return flash.merge(**given)


def cache(**changes: object) -> object:
    sizes: dict[str, object] = dict(pages=8, page_size=16, layers=1, heads_k=2, head_dim=32, dtype=torch.float32)
    return flash.PagedCache(**(sizes | changes))


def module(**changes: object) -> object:
    given: dict[str, object] = dict(query=ROWS, key=ROWS, value=ROWS) | changes
    return MultiheadAttention(32, 4, batch_first=True)(**given)


def sdpa(**changes: object) -> object:
    return scaled_dot_product_attention(**(dict(query=Q, key=Q, value=Q) | changes))


def block(**changes: object) -> object:
    return TransformerBlock(**(dict(embed_dim=32, heads=4) | changes))


def kvcache(**changes: object) -> object:
    rows = CACHE.transpose(1, 2)
    return flash_attn_with_kvcache(torch.zeros(2, 1, 4, 32), k_cache=rows, v_cache=rows, **changes)


def estimate(**changes: object) -> object:
    return memory_estimate(**(dict(batch=1, seqlen=16, heads=4, head_dim=32) | changes))


def info(**changes: object) -> object:
    return flash.info(**changes)


Q, K, ROWS = torch.zeros(2, 4, 16, 32), torch.zeros(2, 2, 24, 32), torch.zeros(2, 5, 32)
STARTS, LENGTHS = torch.tensor([0, 5, 16], dtype=torch.int32), torch.tensor([3, 5], dtype=torch.int32)
CACHE = torch.zeros(2, 2, 64, 32)
BOOL = torch.ones(16, 24, dtype=torch.bool)

# One thing wrong a row, as by someone who comes from another library; the words that must stand in the answer.
MISTAKES = [
    (dense, {"q": Q[0, 0]}, ["q must have 3 or 4 dimensions, [batch, seqlen, head_dim] or [batch, heads,", "[16, 32]"]),
    (dense, {"k": K[0]}, ["k must have 4 dimensions like q", "[2, 24, 32]"]),
    (dense, {"q": Q[None]}, ["q must have 3 or 4 dimensions", "[1, 2, 4, 16, 32]"]),
    (dense, {"q": Q.transpose(1, 2), "k": K.transpose(1, 2), "v": K.transpose(1, 2)}, ["transpose(1, 2) swaps"]),
    (dense, {"q": Q.half()}, ["k must have dtype float16 like q, got float32"]),
    (dense, {"v": K.bfloat16()}, ["v must have dtype float32 like q, got bfloat16"]),
    (dense, {"k": torch.zeros(2, 3, 24, 32), "v": torch.zeros(2, 3, 24, 32)}, ["k must", "divides q's 4, got 3"]),
    (dense, {"v": torch.zeros(2, 4, 24, 32)}, ["v must have heads_k 2 like k, got 4"]),
    (dense, {"v": torch.zeros(2, 2, 23, 32)}, ["v must have seqlen_k 24 like k, got 23"]),
    (dense, {"k": torch.zeros(2, 2, 24, 48)}, ["k must have head_dim 32 like q, got 48"]),
    (dense, {"k": torch.zeros(3, 2, 24, 32)}, ["k must have batch 2 like q, got 3"]),
    (dense, {"q": Q.long(), "k": K.long(), "v": K.long()}, ["q must be float16", "got int64"]),
    (dense, {"q": Q.tolist()}, ["q must be a torch.Tensor, got list"]),
    (dense, {"k": np.zeros((2, 2, 24, 32))}, ["k must be a torch.Tensor, got ndarray"]),
    (dense, {"v": None}, ["v must be a torch.Tensor, got NoneType"]),
    (dense, {"q": Q.to("meta")}, ["k must be on device meta like q, got cpu"]),
    (dense, {"q": Q.to_sparse()}, ["q must be a strided tensor", "sparse"]),
    (dense, {"q": torch.zeros(2, 4, 16, 600), "k": torch.zeros(2, 2, 24, 600)}, ["q must have a head_dim from 1 to"]),
    (dense, {"mask": torch.ones(16, 24)}, ["mask must be bool (True = attend), got float32; use bias"]),
    (dense, {"mask": torch.ones(2, 24, dtype=torch.int64)}, ["got int64; mask.bool() makes it one"]),
    (dense, {"mask": BOOL.mT}, ["mask must broadcast to", "[2, 4, 16, 24]", "got shape [24, 16]"]),
    (dense, {"mask": BOOL[:2]}, ["mask must broadcast to", "mask[:, None, None] has batch first"]),
    (dense, {"mask": BOOL.expand(2, 16, 24)}, ["mask must broadcast to", "mask[:, None] has batch first"]),
    (dense, {"mask": BOOL.numpy()}, ["mask must be a torch.Tensor, got ndarray"]),
    (dense, {"mask": "causal"}, ["mask must be a torch.Tensor, got str"]),
    (dense, {"mask": BOOL.to("meta")}, ["mask must be on device cpu like q, got meta"]),
    (dense, {"bias": BOOL}, ["bias must be floating point, got bool; use mask"]),
    (dense, {"bias": torch.zeros(8, 16, 24)}, ["bias must broadcast to", "[8, 16, 24]"]),
    (dense, {"bias": 0.5}, ["bias must be a torch.Tensor, got float"]),
    (dense, {"bias": BOOL.long()}, ["bias must be float16", "got int64"]),
    (dense, {"window": -1}, ["window must be >= 0", "got -1"]),
    (dense, {"window": (4,)}, ["window must be an int, a tuple (left, right) or None, got (4,)"]),
    (dense, {"window": [4, 0]}, ["window must be an int, a tuple (left, right) or None, got [4, 0]"]),
    (dense, {"window": "4"}, ["window must be an int", "got '4'"]),
    (dense, {"window": (4.0, 0)}, ["window must be an int", "got (4.0, 0)"]),
    (dense, {"scale": torch.tensor(0.5)}, ["scale must be a finite float or None, got tensor(0.5"]),
    (dense, {"scale": float("nan")}, ["scale must be a finite float or None, got nan"]),
    (dense, {"dropout_p": 1.5}, ["dropout_p must be a number in [0, 1), got 1.5"]),
    (dense, {"dropout_p": None}, ["dropout_p must be a number in [0, 1), got None"]),
    (dense, {"alibi_slopes": torch.zeros(3)}, ["alibi_slopes must have shape [4] (heads)", "got [3]"]),
    (dense, {"alibi_slopes": torch.zeros(4, device="meta")}, ["alibi_slopes must be on device cpu like q, got meta"]),
    (dense, {"alibi_slopes": [0.1] * 4}, ["alibi_slopes must be a torch.Tensor, got list"]),
    (dense, {"softcap": -1}, ["softcap must be a finite float > 0 or None, got -1"]),
    (dense, {"sinks": torch.zeros(2)}, ["sinks must have shape [4] (heads), got [2]"]),
    (dense, {"sinks": True}, ["sinks must be a torch.Tensor, got bool"]),
    (dense, {"q_offset": 1.5}, ["q_offset must be an int, an int tensor or None, got 1.5"]),
    (dense, {"q_offset": torch.zeros(3, dtype=torch.int32)}, ["q_offset must have shape [] or [2] (batch), got [3]"]),
    (dense, {"causal": 1}, ["causal must be True or False, got 1"]),
    (dense, {"causal": "yes"}, ["causal must be True or False, got 'yes'"]),
    (dense, {"return_lse": None}, ["return_lse must be True or False, got None"]),
    (dense, {"deterministic": "yes"}, ["deterministic must be True or False, got 'yes'"]),
    (dense, {"backend": "cuda"}, ["backend must be one of auto, triton, hopper, torch, got 'cuda'"]),
    (dense, {"backend": "hopper"}, ["backend 'hopper' does not serve", "use backend='auto'"]),
    (dense, {"config": (64, 64, 4, 1)}, ["config must be a flash.Config, a dict of them or None, got (64, 64, 4, 1)"]),
    (dense, {"config": {"fwd": flash.Config(64, 64)}}, ["config must have keys among forward, dkdv, dq, got 'fwd'"]),
    (dense, {"config": flash.Config(100, 64)}, ["config['forward'].block_m must be one of", "got 100"]),
    (dense, {"score_mod": lambda s, b, h, i, j: s}, ["score_mod must be a flash.mods.ScoreMod, got", "makes one"]),
    (dense, {"mask_mod": mods.document}, ["mask_mod must be a flash.mods.MaskMod, got function", "makes one"]),
    (dense, {"block_mask": BOOL}, ["block_mask must be a torch.nn", "got Tensor", "create_block_mask makes one"]),
    (dense, {"is_causal": True}, ["flash_attention() got an unexpected keyword argument 'is_causal'"]),
    (varlen, {"cu_seqlens_q": STARTS.long()}, ["cu_seqlens_q must be of dtype int32, got int64"]),
    (varlen, {"cu_seqlens_q": [0, 5, 16]}, ["cu_seqlens_q must be a torch.Tensor, got list"]),
    (varlen, {"cu_seqlens_q": STARTS[:2]}, ["cu_seqlens_k must have length 2 like cu_seqlens_q, got 3"]),
    (varlen, {"cu_seqlens_k": STARTS.to("meta")}, ["cu_seqlens_k must be on device cpu like q, got meta"]),
    (varlen, {"max_seqlen_q": torch.tensor(11)}, ["max_seqlen_q must be an int >= 0, got tensor(11)"]),
    (varlen, {"q": torch.zeros(1, 16, 4, 32)}, ["q must have 2 or 3 dimensions, [total, head_dim] or [total, heads,"]),
    (decode, {"cache_seqlens": LENGTHS.long()}, ["cache_seqlens must be of dtype int32, got int64"]),
    (decode, {"cache_seqlens": LENGTHS.to("meta")}, ["cache_seqlens must be on device cpu like q, got meta"]),
    (decode, {"cache_seqlens": 4}, ["cache_seqlens must be a torch.Tensor, got int"]),
    (decode, {"cache_seqlens": LENGTHS[:1]}, ["cache_seqlens must have shape [2] (batch), got [1]"]),
    (decode, {"k": CACHE[:, :, :1]}, ["k and v must be given together, got only k"]),
    (decode, {"block_table": torch.zeros(2, 4)}, ["block_table must be of dtype int32, got float32"]),
    (decode, {"num_splits": 0}, ["num_splits must be an int >= 1 or None, got 0"]),
    (decode, {"q": torch.zeros(2, 4, 32)}, ["q must have 4 dimensions [batch, heads,", "got shape [2, 4, 32]"]),
    (decode, {"q": torch.zeros(2, 4, 1, 32, requires_grad=True)}, ["q asks for a derivative", "torch.no_grad"]),
    (decode, {"rotary_cos": torch.zeros(64, 16)}, ["rotary_cos and rotary_sin must be given together"]),
    (merge, {"lse1": Q}, ["lse1 must have shape [2, 4, 16]", "got [2, 4, 16, 32]"]),
    (cache, {"pages": 0}, ["pages must be at least 1, got 0"]),
    (cache, {"dtype": "float16"}, ["dtype must be a torch.dtype of floats, got 'float16'"]),
    (cache, {"dtype": torch.int8}, ["dtype must be a torch.dtype of floats, got torch.int8"]),
    (kvcache, {"cache_seqlens": [3, 5]}, ["cache_seqlens must be an int or an int32 tensor [batch], got [3, 5]"]),
    (kvcache, {"cache_seqlens": True}, ["cache_seqlens must be an int or an int32 tensor [batch], got True"]),
    (kvcache, {"cache_seqlens": 65}, ["cache_seqlens must be 0 to 64, what the cache has room for, got 65"]),
    (estimate, {"dtype": "float16"}, ["dtype must be a torch.dtype of floats, got 'float16'"]),
    (module, {"query": ROWS[..., :16]}, ["query must have 32 features, got shape [2, 5, 16]"]),
    (module, {"is_causal": True}, ["attn_mask must be given with is_causal", "got None"]),
    (module, {"key_padding_mask": BOOL}, ["key_padding_mask must have shape (2, 5), got (16, 24)"]),
    (module, {"query": ROWS.numpy()}, ["query must be a torch.Tensor, got ndarray"]),
    (sdpa, {"query": Q.numpy()}, ["query must be a torch.Tensor, got ndarray"]),
    (sdpa, {"attn_mask": BOOL[:, :16].long()}, ["attn_mask must be bool or float, got torch.int64"]),
    (sdpa, {"attn_mask": [True]}, ["attn_mask must be a torch.Tensor, got list"]),
    (sdpa, {"key": K, "value": K}, ["key and value must have 4 heads like query where enable_gqa is False"]),
    (block, {"heads": 5}, ["heads must divide embed_dim 32", "got 5"]),
    (block, {"heads": "4"}, ["heads must be an int, got '4'"]),
    (block, {"embed_dim": 32.0}, ["embed_dim must be an int, got 32.0"]),
    (block, {"hidden_dim": 0}, ["hidden_dim must be at least 1, got 0"]),
    (info, {"q": "q"}, ["q must be a torch.Tensor, got str"]),
]  # fmt: skip


def test_heads_that_do_not_divide_are_not_taken_for_a_layout() -> None:
    with pytest.raises(ValueError, match="divides q's 4, got 3$"):
        dense(k=torch.zeros(2, 3, 16, 32), v=torch.zeros(2, 3, 16, 32))


@pytest.mark.parametrize(
    "call, wrong, told", MISTAKES, ids=[f"{call.__name__}-{'-'.join(wrong)}" for call, wrong, _ in MISTAKES]
)
def test_a_newcomers_mistake_is_named(call: Callable[..., object], wrong: dict[str, object], told: list[str]) -> None:
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as caught:
        call(**wrong)
    assert [words for words in told if words not in str(caught.value)] == [], caught.value
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "package, function",
    [
        ("transformers", "enable"), ("transformers", "disable"), ("transformers", "register"),
        ("neuralforecast", "enable"), ("neuralforecast", "disable"),
    ],
)  # fmt: skip
def test_a_package_that_is_lacking_is_named_with_what_installs_it(
    package: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    call = getattr(import_module(f"flash.integrations.{package}"), function)
    with pytest.raises(ImportError, match=rf"^{package} is not installed: pip install 'flash-triton\[{package}\]'$"):
        call() if function == "register" else call(torch.nn.Linear(2, 2))


def test_modules_that_users_name_are_found_without_an_import_of_their_own() -> None:
    source = "import flash; print(callable(flash.mods.alibi), callable(flash.nn.MultiheadAttention))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("True True\n", "", 0)
