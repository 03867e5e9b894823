"""What the compiler makes of the Hopper kernels, with every configuration that ships, for every kind of call.

They are compiled for cuda:90, where no GPU is needed.
"""

import re
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from bench.overhead import stand_in
from flash.autotune import gluon, resources
from flash.autotune.space import Variant
from flash.kernels import hopper_backward, hopper_forward
from flash.kernels.spec import Config, Gradients
from tests import test_hopper_backward, test_hopper_forward
from tests.bounds import Outputs

pytestmark = pytest.mark.aot

FORWARDS = {
    "full": {},
    "causal, groups": {"causal": True, "group": 4},
    "window and sinks": {"features": ("window", "sinks")},
    "causal window, offsets": {"causal": True, "features": ("window",), "q_offset": True},
    "causal softcap": {"causal": True, "raw": False, "features": ("softcap",)},
}
SHIPPED_FORWARDS = [
    (head_dim, config, call)
    for (head_dim, banded), configs in hopper_forward.CONFIGS.items()
    for config in configs
    for call, options in FORWARDS.items()
    if banded == bool(options)
]
BACKWARDS = {
    "full": {},
    "causal, groups": {"causal": True, "group": 4},
    "window": {"features": ("window",)},
    "causal window": {"causal": True, "features": ("window",), "group": 8},
    "scaled": {"causal": True, "raw": False, "q_offset": True},
    "softcap": {"causal": True, "raw": False, "features": ("softcap",)},
}
SHIPPED_BACKWARDS = [
    pytest.param(head_dim, config, call, marks=[] if at == 0 and call == "causal, groups" else [pytest.mark.slow])
    for head_dim, configs in hopper_backward.CONFIGS.items()
    for at, config in enumerate(configs)
    for call in BACKWARDS
    if head_dim == 64 or call != "softcap"
]

# KiB of shared memory, of 227, that a configuration takes: of the forward by head_dim and consumers
SHARED = {(64, 2): 81, (64, 3): 89, (128, 2): 161, (256, 2): 193}
# and of the backward by kernel, head_dim and slots.
SHARED_BACKWARD = {
    ("hopper_backward", 64, 2): 98,
    ("hopper_backward", 64, 4): 131,
    ("hopper_backward", 128, 2): 178,
    ("hopper_backward", 128, 3): 211,
    ("hopper_dkdv", 64, 2): 66,
    ("hopper_dkdv", 64, 4): 99,
    ("hopper_dkdv", 128, 2): 130,
    ("hopper_dkdv", 128, 3): 163,
}


def compiled_well(head_dim: int, config: Config, call: str, dtype: str) -> None:
    variant = Variant(dtype, head_dim, head_dim, **FORWARDS[call])
    made = resources.report("cuda:90", "hopper_forward", variant, config, listing=True)
    consumers = config.block_m // 64
    assert made.faults == () and made.shared <= SHARED[head_dim, consumers] * 1024 <= 227 * 1024
    assert made.registers == hopper_forward.REGISTERS[consumers]  # they are all there are
    assert made.spill_bytes == 0 and not made.serialized and made.warnings == ()
    assert made.loops and not any("local" in loop.counts for loop in made.loops)
    assert made.hidden is not None and made.hidden >= 0.9


@pytest.mark.parametrize("head_dim, call", [(64, "causal, groups"), (128, "full"), (128, "causal, groups")])
def test_the_softmax_is_hidden_and_nothing_spills(head_dim: int, call: str) -> None:
    compiled_well(head_dim, hopper_forward.CONFIGS[head_dim, bool(FORWARDS[call])][0], call, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim, config, call", SHIPPED_FORWARDS)
def test_every_shipped_forward_hides_the_softmax_and_spills_nothing(
    head_dim: int, config: Config, call: str, dtype: str
) -> None:
    compiled_well(head_dim, config, call, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernel", ["hopper_backward", pytest.param("hopper_dkdv", marks=pytest.mark.slow)])
@pytest.mark.parametrize("head_dim, config, call", SHIPPED_BACKWARDS)
def test_main_loops_of_the_backward_touch_no_local_memory_and_hide_their_exponentials(
    head_dim: int, config: Config, call: str, kernel: str, dtype: str
) -> None:
    variant = Variant(dtype, head_dim, head_dim, **BACKWARDS[call])
    made = resources.report("cuda:90", kernel, variant, config, listing=True)
    assert made.faults == () and not made.serialized
    assert made.shared <= SHARED_BACKWARD[kernel, head_dim, config.num_stages] * 1024
    assert made.spill_bytes <= 136  # before the loops, and in those that mask
    loops = [loop for loop in made.loops if "exp2" in loop.counts]
    assert len(loops) == 4  # of each consumer one over full tiles and one over those that are masked
    full = sorted(loops, key=lambda loop: loop.instructions)[:2]
    assert [loop.counts.get("local", 0) for loop in full] == [0, 0]
    assert all(loop.hidden >= 0.9 for loop in loops)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_conversion_of_dq_spills_nothing(head_dim: int) -> None:
    made = resources.report("cuda:90", "hopper_convert", Variant("bfloat16", head_dim, head_dim), Config(64, 128, 4, 1))
    assert made.faults == () and made.spill_bytes == 0


def test_a_launch_of_the_forward_with_all_its_operands_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # through Triton's own specialisation of descriptors, tuples and absent operands, which the report writes by hand
    import triton

    made = []

    def warm(kernel: Any, programs: int, device: Any, config: Config, *args: Any, **options: int) -> None:
        blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        made.append(kernel.warmup(*args, grid=(programs,), **blocks, **options))

    monkeypatch.setattr(triton.runtime.driver, "_active", stand_in())
    monkeypatch.setattr(hopper_forward, "launch", warm)
    options = {"causal": True, "window": (5, None), "q_offset": torch.tensor([1, -2]), "sinks": torch.randn(2)}
    x = test_hopper_forward.inputs(lambda x: x, batch=2, heads_k=1, seqlen_k=33, **options)
    test_hopper_forward.call(x, Config(128, 64, 8, 2))
    assert made[0].metadata.num_warps == 12 and made[0].metadata.shared < 227 * 1024


@pytest.mark.parametrize("wants_q", [False, True])
def test_launches_of_the_backward_compile_as_triton_specialises_them(
    monkeypatch: pytest.MonkeyPatch, wants_q: bool
) -> None:
    import triton

    made = []

    def warm(kernel: Any, programs: int, device: Any, config: Config, *args: Any, **options: int) -> None:
        given = {"num_warps": config.num_warps, "num_stages": config.num_stages} | options
        made.append(kernel.warmup(*args, grid=(programs,), BLOCK_M=config.block_m, BLOCK_N=config.block_n, **given))

    monkeypatch.setattr(triton.runtime.driver, "_active", stand_in())
    monkeypatch.setattr(hopper_backward, "launch", warm)
    q_offset = torch.tensor([1, -2])
    sizes = {"batch": 2, "heads": 2, "seqlen_q": 33, "seqlen_k": 40}
    x = test_hopper_backward.one_head(lambda t: t, **sizes, causal=True, q_offset=q_offset)
    found = Outputs(torch.zeros_like(x.q), torch.zeros(2, 2, 33))
    test_hopper_backward.launch(x, Gradients(wants_q, True, True), 2, found)
    assert [kernel.metadata.num_warps for kernel in made] == ([4, 12, 4] if wants_q else [4, 12])


@cache
def ptx_of(kernel: str, head_dim: int) -> str:
    """The code of a causal call with the configuration to use."""
    variant = Variant("bfloat16", head_dim, head_dim, causal=True)
    return str(resources.build("cuda:90", kernel, variant, gluon.config(kernel, variant)).asm["ptx"])


# What one thread of a consumer says for all 128: an arrival at a barrier, or a tile that leaves by TMA.
SPOKEN = r"\bmbarrier\.arrive\.shared|\bcp\.(reduce\.)?async\.bulk\.tensor\.\dd\.global\.shared"
ACCESS = r"\b(ld|st|atom|red)\.shared|\b(ld|st)matrix|\bwgmma\.wait_group|^\$L\w+:"  # or a label: who knows from where


def spoken(ptx: str) -> list[bool]:
    """Of each arrival and store, whether all threads of its consumer met after their last access to shared memory."""
    found, met = [], False
    for line in map(str.strip, ptx.splitlines()):
        if re.search(r"\bbar(rier)?\.sync\b", line):
            met = True
        elif re.search(SPOKEN, line):
            found.append(met)
        elif re.search(ACCESS, line):
            met = False
    return found


@pytest.mark.parametrize(
    "kernel, head_dim, count",
    [  # of two consumers: arrivals before the loop over full tiles, at its first tile and in it, and stores
        pytest.param("hopper_forward", 64, 2 * (2 + 1 + 2 + 1), marks=pytest.mark.slow),
        ("hopper_forward", 128, 2 * (2 + 1 + 2 + 1)),
        pytest.param("hopper_forward", 256, 2 * (2 + 1 + 2 + 1), marks=pytest.mark.slow),
        ("hopper_backward", 64, 2 * (3 + 4 + 2)),  # in either loop, and stores
        ("hopper_backward", 128, 2 * (3 + 4 + 2)),
    ],
)
def test_one_thread_speaks_for_all_after_they_met(kernel: str, head_dim: int, count: int) -> None:
    """The simulator takes the threads of a consumer as one; that they are is Triton's `bar.sync`."""
    ptx = ptx_of(kernel, head_dim)
    assert spoken(ptx) == [True] * count
    assert spoken(re.sub(r"\bbar(rier)?\.sync\b", "nothing", ptx)) == [False] * count


@pytest.mark.parametrize("head_dim", [64, 128])
def test_dq_is_added_four_numbers_at_once(head_dim: int) -> None:
    atomics = re.findall(r"\b(?:atom|red)\.global\.(\S+)", ptx_of("hopper_backward", head_dim))
    # two loops of two consumers, each with 128 threads for half of a tile [64, head_dim]
    assert atomics == ["gpu.relaxed.add.v4.f32"] * (2 * 2 * 64 * head_dim // 2 // 128 // 4)
