"""The worst bugs that attention kernels have had in public, each as a small test under its name.

Links go to the threads. Most have a large test of their own elsewhere; here each stands alone, so that a reader sees
which trap is closed.
"""

import inspect
import itertools
import re
from pathlib import Path

import pytest
import torch

from flash.attention import flash_attention, flash_attention_varlen
from flash.kernels.launch import launch
from tests import calls, features
from tests.bounds import check
from tests.calls import Place, random_inputs
from tests.features import Sizes

ROOT = Path(__file__).parents[1]
BOTH = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])


@pytest.mark.sampled(16)
@BOTH
@pytest.mark.parametrize("factor", [1.0, 3.0, 5.0, 50.0])
def test_gradients_of_a_short_tail_are_no_nan(place: Place, backend: str, factor: float) -> None:
    """https://github.com/Dao-AILab/flash-attention/issues/334, again 1052 and 1947: NaN dq at length 1."""
    for seqlen_q, seqlen_k in itertools.product((1, 2, 5, 17), repeat=2):
        x = random_inputs(place, seqlen_q=seqlen_q, seqlen_k=seqlen_k, sigma=factor, head_dim=8)
        check(features.run(x, backend), x, saturated=True)


@pytest.mark.sampled(16)
@BOTH
@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
def test_strides_of_every_operand_are_followed(place: Place, backend: str, name: str) -> None:
    """https://github.com/Dao-AILab/flash-attention/issues/355: silently wrong gradients where do is not contiguous."""
    x = features.call_of(place, ["bias"], Sizes(seqlen_q=20, seqlen_k=20))
    want = features.run(x, backend)
    tensor = getattr(x, name)
    for kind, view in calls.strided(place, tuple(tensor.shape), tensor.dtype).items():
        got = features.run(x._replace(**{name: view.copy_(tensor)}), backend)
        for output, a, b in zip(got._fields, got, want, strict=True):
            assert a is None or torch.allclose(a, b, rtol=1e-13, atol=1e-13), f"{output}, {name}: {kind}"


@pytest.mark.sampled(3, all=True)
@pytest.mark.interpret
@pytest.mark.parametrize("name", ["mask", "bias"])
@pytest.mark.parametrize("axis", range(4))
def test_offsets_beyond_32_bits_are_followed(place: Place, device: torch.device, name: str, axis: int) -> None:
    """https://github.com/fla-org/flash-linear-attention/issues/1080: silent corruption past 2^31 elements."""
    x = features.call_of(place, ["causal"], Sizes(seqlen_q=3, seqlen_k=3, heads=2, heads_k=2), torch.float32)
    operand = torch.randn(2, 2, 3, 3)
    x.options[name] = place(operand.half() if name == "bias" else operand > -1)
    want = features.run(x, "triton")
    strides = [64, 16, 4, 1]
    strides[axis] = 2**31 + 2**9 if axis < 2 else 2**30 + 2**9
    span = sum(s * (n - 1) for s, n in zip(strides, operand.shape, strict=True))
    far = torch.empty(span + 1, dtype=x.options[name].dtype, device=device).as_strided(operand.shape, strides)
    x.options[name] = far.copy_(x.options[name])
    call = features.attention("triton")
    o, lse = call(x.q, x.k, x.v, **x.options)
    assert torch.equal(o, want.o) and torch.equal(lse, want.lse)


@BOTH
@pytest.mark.parametrize(
    "lies", [[0, -5, 20], [0, 2**31 - 1, 20], [-(2**31), 9, 20], [0, 15, 3], [30, 40, 50]], ids=str
)
def test_hostile_lengths_read_nothing_beyond(place: Place, backend: str, lies: list[int]) -> None:
    """https://github.com/Dao-AILab/flash-attention/pull/2711, https://github.com/vllm-project/vllm/issues/53982."""
    x = features.call_of(place, ["packed", "causal"], Sizes(lengths=((9, 9), (11, 11))))
    x.options["cu_seqlens_k"] = place(torch.tensor(lies, dtype=torch.int32))
    got = features.run(x, backend)
    assert got.o.isnan().any() and not got.o.isinf().any()


@BOTH
@pytest.mark.parametrize("lengths", [((0, 0),), ((0, 16), (16, 0)), ((17, 0), (0, 17), (15, 1))], ids=str)
def test_zero_lengths_write_nothing_beyond(place: Place, backend: str, lengths: tuple[tuple[int, int], ...]) -> None:
    """https://github.com/Dao-AILab/flash-attention/pull/1155, 2562: stray writes and faults at zero lengths."""
    x = features.call_of(place, ["packed"], Sizes(lengths=lengths))
    check(features.run(x, backend), x)


@pytest.mark.gpu
@pytest.mark.parametrize("names", [["causal", "groups"], ["bias", "sinks"], ["window", "dropout_p"]], ids=str)
def test_gradients_race_with_nothing(place: Place, names: list[str]) -> None:
    """https://github.com/Dao-AILab/flash-attention/pull/2481, 359: a race in dq and dk.

    A race wants programs that run at once; where these are interpreted, the memory checker looks for elements that two
    of them touch.
    """
    x = features.call_of(place, names, Sizes(4, 8, 8, 500, 500, 64, 64), torch.bfloat16)
    want = features.run(x, "triton", None)
    for _ in range(250):
        got = features.run(x, "triton", None)
        for name, a, b in zip(got._fields, got, want, strict=True):
            assert a is None or torch.equal(a, b), name


@pytest.mark.sampled(16)
@BOTH
@pytest.mark.parametrize("name", ["score_mod", "mask_mod", "bias"])  # the others in test_pairs.py
def test_the_backward_pass_gets_what_the_forward_pass_got(place: Place, backend: str, name: str) -> None:
    """https://github.com/Dao-AILab/flash-attention/issues/2424, 1040: an argument that never reached the backward."""
    features.gradcheck(features.call_of(place, [name, "causal"]), backend)


def test_both_front_doors_take_the_same_keywords() -> None:
    """https://github.com/Dao-AILab/flash-attention/issues/1040: one of two signatures had moved on."""
    dense, packed = (inspect.signature(f).parameters for f in (flash_attention, flash_attention_varlen))
    own = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
    assert set(packed) - set(dense) == own and set(dense) <= set(packed)
    assert all(dense[name].default == packed[name].default for name in dense)


@BOTH
def test_a_window_holds_its_last_key_and_no_other(place: Place, backend: str) -> None:
    """https://github.com/sgl-project/sglang/pull/32087, vllm 30887: one key short, or garbage of V."""
    n, left = 40, 5
    x = random_inputs(place, heads=1, heads_k=1, seqlen_q=n)
    v = place(torch.eye(n)[None, None])
    o, _ = features.attention(backend)(x.q, x.k, v, window=(left, 0))
    i, j = torch.arange(n)[:, None], torch.arange(n)
    assert torch.equal((o[0, 0] > 0).cpu(), (j <= i) & (j >= i - left))


@BOTH
def test_lse_is_in_natural_logarithm_and_merges(place: Place, backend: str) -> None:
    """https://github.com/pytorch/pytorch/issues/181645: lse off by ln 2."""
    x = features.call_of(place, ["softcap"], Sizes(seqlen_q=20, seqlen_k=48))
    call = features.attention(backend)
    whole, lse = call(x.q, x.k, x.v, **x.options)
    parts = [call(x.q, x.k[:, :, cut], x.v[:, :, cut], **x.options) for cut in (slice(0, 30), slice(30, 48))]
    merged = torch.logaddexp(parts[0][1], parts[1][1])
    assert torch.allclose(merged, lse, rtol=1e-13)
    o = sum(part * (part_lse - merged).exp()[..., None] for part, part_lse in parts)
    assert torch.allclose(o, whole, rtol=1e-12, atol=1e-13)


def test_kernels_have_no_atomics() -> None:
    """https://github.com/Dao-AILab/flash-attention/issues/414, 2244: dq that differs from run to run."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        assert not re.search(r"tl\.atomic", path.read_text()), path


@BOTH
def test_a_row_has_the_same_bits_alone_and_in_a_batch(place: Place, backend: str) -> None:
    """https://github.com/Dao-AILab/flash-attention/issues/2244."""
    x = features.call_of(place, ["window", "bias"], Sizes(batch=3, seqlen_q=40, seqlen_k=40), torch.float32)
    want = features.run(x, backend)
    alone = x._replace(**{name: getattr(x, name)[1:2] for name in ("q", "k", "v", "do", "dlse")})
    got = features.run(alone, backend)
    for name in ("o", "lse", "dq", "dk", "dv"):
        a, b = getattr(got, name), getattr(want, name)[1:2]
        assert torch.equal(a, b) if backend == "triton" else torch.allclose(a, b, rtol=1e-5, atol=1e-6), name


@BOTH
def test_dropout_differs_from_call_to_call(place: Place, backend: str) -> None:
    """https://github.com/Dao-AILab/flash-attention/issues/2088: the seed was a constant."""
    x = random_inputs(place, seqlen_q=30)
    first, second = (
        flash_attention(x.q, x.k, x.v, dropout_p=0.5, backend=backend, config=features.TILES) for _ in "ab"
    )
    assert isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor) and not torch.equal(first, second)


@BOTH
@pytest.mark.parametrize("lowest", [float("-inf"), torch.finfo(torch.float32).min])
def test_rows_without_keys_are_no_nan(place: Place, backend: str, lowest: float) -> None:
    """https://github.com/pytorch/pytorch/issues/109517, 153799, flash-attention 1778: fully masked rows."""
    x = features.call_of(place, ["causal"], Sizes(seqlen_q=40, seqlen_k=20), torch.float32)
    x.options["bias"] = place(torch.zeros(40, 20).index_fill_(0, torch.tensor([25, 39]), lowest))
    got = features.run(x, backend)
    empty = torch.tensor([i < 20 or i in (25, 39) for i in range(40)], device=x.q.device)
    assert torch.equal((got.lse == float("-inf"))[0, 0], empty) and (got.o[:, :, empty] == 0).all()
    assert got.dq is not None and (got.dq[:, :, empty] == 0).all()
    assert all(t is None or t.isfinite().all() for t in got[2:])


@pytest.mark.interpret(gpu=False)
def test_a_launch_enters_the_tensors_device(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """https://github.com/linkedin/Liger-Kernel/issues/1303: kernels that ran on whatever GPU was current."""
    assert "device" in inspect.signature(launch).parameters
    source = inspect.getsource(launch)
    assert "cuda.device" in source or "device" in source
    for path in sorted((ROOT / "kernels").glob("*.py")):
        stray = re.findall(r"_kernel\s*\[", path.read_text())
        assert not stray, f"{path} launches without the one launcher"


@pytest.mark.gpu
@pytest.mark.parametrize("names", [["causal"], ["bias", "sinks"], ["padding"]], ids=str)
def test_a_captured_graph_replays(place: Place, names: list[str]) -> None:
    """https://github.com/flashinfer-ai/flashinfer/pull/5176: stale workspaces. CUDA graphs want a GPU."""
    x = features.call_of(place, names, Sizes(seqlen_q=200, seqlen_k=200, head_dim=64, head_dim_v=64), torch.float16)
    call = features.attention("triton", None)
    with torch.no_grad():
        call(x.q, x.k, x.v, **x.options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, lse = flash_attention(x.q, x.k, x.v, return_lse=True, backend="triton", **x.options)
        for _ in range(3):
            for t in (x.q, x.k, x.v):
                t.copy_(torch.randn_like(t))
            graph.replay()
            want = call(x.q, x.k, x.v, **x.options)
            assert torch.equal(o, want[0]) and torch.equal(lse, want[1])


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret(gpu=False))])
@pytest.mark.parametrize("names", [["causal"], ["padding", "alibi_slopes"], ["window", "sinks", "softcap"]], ids=str)
def test_compiled_calls_of_changing_lengths_equal_eager_ones(place: Place, backend: str, names: list[str]) -> None:
    """https://github.com/pytorch/pytorch/issues/136232, 186775: NaN with dynamic shapes."""
    torch._dynamo.reset()
    call = lambda q, k, v, **o: flash_attention(q, k, v, return_lse=True, backend=backend, config=features.TILES, **o)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (17, 33, 5, 1, 40):
        x = features.call_of(place, names, Sizes(seqlen_q=n, seqlen_k=n))
        got, want = compiled(x.q, x.k, x.v, **x.options), call(x.q, x.k, x.v, **x.options)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), n
