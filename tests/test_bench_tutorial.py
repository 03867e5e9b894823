"""The bench's rewrite of Triton's tutorial 06: right where it is interpreted, compiling for the GPU it is timed on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux alone")

from bench import tutorial  # noqa: E402
from bench.tutorial import Tiles  # noqa: E402
from tests.bounds import Inputs, Outputs, check  # noqa: E402

SMALL = Tiles(forward=(32, 16), dkdv=(32, 64), dq=(64, 32), num_stages=1)
# A diagonal tile is wider than a walked one, and tiles are walked before it and after it.
SHAPES = [(1, 2, 128, 16, torch.float16), (2, 1, 64, 32, torch.bfloat16), (1, 1, 128, 64, torch.float16)]


def inputs(place: Callable[[Any], Any], shape: tuple[Any, ...], causal: bool) -> Inputs:
    batch, heads, seqlen, head_dim, dtype = shape
    q, k, v, do = (place(torch.randn(batch, heads, seqlen, head_dim).to(dtype)) for _ in range(4))
    return Inputs(q, k, v, do, None, {"causal": causal})


@pytest.mark.interpret
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[:4])))
def test_the_tutorial_is_right_in_both_directions(
    shape: tuple[Any, ...], causal: bool, place: Callable[[Any], Any]
) -> None:
    x = inputs(place, shape, causal)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    o = tutorial.attention(*leaves, causal=causal, tiles=SMALL)
    gradients = torch.autograd.grad(o, leaves, x.do)
    detached = Inputs(*(t.detach() for t in leaves), x.do, None, x.options)
    check(Outputs(o.detach(), None, *gradients), detached)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((16, 16, 8192, 8192, 128, 128), None),
        ((32, 8, 8192, 8192, 128, 128), "as many key heads"),
        ((16, 16, 197, 197, 64, 64), "multiples of 128"),
        ((16, 16, 1024, 8192, 128, 128), "as many queries as keys"),
        ((8, 8, 8192, 8192, 256, 256), "head_dim"),
    ],
)
def test_shapes_that_the_tutorial_has_not_are_refused(shape: tuple[int, ...], reason: str | None) -> None:
    found = tutorial.refusal(*shape)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.aot
@pytest.mark.parametrize("head_dim", tutorial.HEAD_DIMS)
def test_the_tutorial_compiles_for_the_gpu_it_is_timed_on(head_dim: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> Any:
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        divisible = [name for name, kind in types.items() if kind.startswith("*") or name == "seqlen"]
        attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
        source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

    config = tutorial.CONFIGS[0]
    blocks = config.kwargs
    wide, walked = (f"tensordesc<bf16[{blocks[name]}, {head_dim}]>" for name in ("BLOCK_M", "BLOCK_N"))
    types = {"q": wide, "k": walked, "v": walked, "o": wide, "lse": "*fp32", "unit": "fp32", "seqlen": "i32"}
    constants = {"HEAD_DIM": head_dim, "CAUSAL": True, **blocks}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    assert "wgmma" in compiled(tutorial.forward_kernel, types, constants, **options).asm["ptx"]

    tiles = tutorial.TILES
    types = dict.fromkeys(("q", "k", "v", "do", "dq", "dk", "dv"), "*bf16") | {"lse": "*fp32", "delta": "*fp32"}
    types |= {"scale": "fp32", "seqlen": "i32"}
    constants = {"HEAD_DIM": head_dim, "CAUSAL": True, "tiles": tiles}
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    backward = compiled(tutorial.backward_kernel, types, constants, **options)
    assert backward.metadata.shared <= 227 * 1024


@pytest.mark.interpret(gpu=False)
def test_the_configuration_that_wins_shapes_the_descriptors(
    place: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    one = triton.Config({"BLOCK_M": 64, "BLOCK_N": 32}, pre_hook=tutorial.shape_descriptors)
    tuned = triton.autotune(configs=[one], key=["seqlen", "HEAD_DIM", "CAUSAL"])(tutorial.forward_kernel)
    monkeypatch.setattr(tutorial, "tuned_forward_kernel", tuned)
    x = inputs(place, SHAPES[0], True)
    o = tutorial.attention(x.q, x.k, x.v, causal=True)
    assert torch.equal(o, tutorial.attention(x.q, x.k, x.v, causal=True, tiles=SMALL._replace(forward=(64, 32))))
