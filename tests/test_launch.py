"""A launch as the JIT sees it, without a GPU (drivers.py)."""

from typing import Any

import pytest
import torch

from tests.drivers import printed

pytestmark = pytest.mark.aot

CALLS = """
from flash.kernels import backward, forward
from flash.kernels.spec import Config, Configs, Gradients, Mods, Positions, Spec

config = Config(64, 64, 4, 2)
kernels = [forward.forward_kernel, backward.dkdv_kernel, backward.dq_kernel, backward.delta_kernel]


def call(seqlen_q, seqlen_k, position, scale=0.125, **mods):
    q, k = torch.randn(2, 4, seqlen_q, 64).half(), torch.randn(2, 2, seqlen_k, 64).half()
    args = Mods(**mods), Spec(causal=True), scale, Positions(position)
    o, lse = forward.forward(q, k, k, *args, config)
    backward.backward(o, None, q, k, k, o, lse, *args, Configs(config, config, config), Gradients(True, True, True))
    compiled = [next(iter(kernel.device_caches.values()))[0] for kernel in kernels]
    return [len(cache) for cache in compiled], next(iter(compiled[0].values())).src.signature


counts, signature = call(128, 128, 0)
lengths = (64, 256, 192), (128, 112, -16), (128, 128, 1), (37, 51, 14), (38, 37, -1), (1, 1, 0)
more = [call(*each)[0] for each in lengths]
scaled, _ = call(128, 128, 0, scale=0.3)
offset, _ = call(128, 128, 0, q_offset=torch.zeros(2, dtype=torch.int64))
found = {"counts": counts, "more": more, "scaled": scaled, "offset": offset}
found["scale"] = signature["scale"]
print(json.dumps(found | {"sizes": list(signature["sizes"]), "q": list(signature["q"])}))
"""


EVERYTHING = """
from torch.nn.attention.flex_attention import create_block_mask

from flash import mods
from flash.kernels import backward, forward
from flash.kernels.spec import Config, Configs, Gradients
from flash.problem import Problem

config = Config(32, 32, 4, 1)


def everything(seqlen_q, seqlen_k, **keywords):
    # an operand of every kind through every kernel
    q, k = torch.randn(2, 4, seqlen_q, 64).half(), torch.randn(2, 2, seqlen_k, 64).half()
    problem = Problem.of(
        q, k, k, bias=torch.randn(1, 4, seqlen_q, seqlen_k), alibi_slopes=torch.ones(4), sinks=torch.ones(4),
        mask=torch.ones(2, 1, 1, seqlen_k, dtype=torch.bool), softcap=30.0, dropout_p=0.1, window=(60, 20),
        score_mod=mods.tanh_softcap(20.0), **keywords,
    )
    seeded = problem.mods._replace(seed=torch.zeros(1, dtype=torch.int64))
    args = seeded, problem.spec, problem.scale, problem.positions
    o, lse = forward.forward(q, k, k, *args, config)
    needs = Gradients(True, True, True, True, True, True)
    found = backward.backward(o, None, q, k, k, o, lse, *args, Configs(config, config, config), needs)
    return all(x is not None for x in found)


ids = torch.arange(150).expand(2, 150).contiguous() // 40
whole = everything(150, 150, mask_mod=mods.document(ids))
for seqlen_q, seqlen_k in ((100, 150), (1, 64), (64, 1)):  # lists of one block have strides of 1
    visible = lambda b, h, i, j: (i + j) % 3 > 0
    block_mask = create_block_mask(visible, None, None, seqlen_q, seqlen_k, "cpu", BLOCK_SIZE=64)
    whole &= everything(seqlen_q, seqlen_k, block_mask=block_mask)
print(json.dumps(whole))
"""


@pytest.fixture(scope="module")
def found() -> Any:
    return printed(CALLS)


def test_a_new_length_offset_or_scale_compiles_nothing(found: Any) -> None:
    assert found["counts"] == [1, 1, 1, 1]
    assert found["more"] == [[1, 1, 1, 1]] * 6
    assert found["scaled"] == [1, 1, 1, 1]


def test_an_offset_read_on_the_device_is_another_kernel(found: Any) -> None:
    assert found["offset"] == [2, 2, 2, 1]


def test_the_scale_arrives_in_64_bits_and_lengths_unspecialised(found: Any) -> None:
    assert found["scale"] == "fp64"
    assert found["sizes"] == ["i64"] * 7  # which no length changes: `launch.coded`
    assert found["q"][-1] == "constexpr"  # a last stride of 1 is known, so that loads are wide


@pytest.mark.slow
def test_every_operand_has_its_place_in_a_launch() -> None:
    assert printed(EVERYTHING)


def test_a_launch_is_made_again_only_where_all_of_its_tensors_are_known() -> None:
    from flash.kernels.launch import Launched, Slot

    x, y, own = (torch.zeros(4) for _ in range(3))
    device = torch.device("cpu")
    made = Launched("compiled", "kernel", 3, device, ((x, 1), y, 16))
    known = made.without([x, y])
    assert known is not None and known.args == ((Slot(0), 1), Slot(1), 16)
    assert made.without([x, x[:2]]) is None  # which of them a launch was given could not be told
    assert made._replace(args=(own,)).without([x, y]) is None  # a tensor that the call made
    assert made._replace(compiled=None).without([x, y]) is None  # interpreted: there is nothing to launch
    none = made._replace(compiled=None, programs=0).without([x, y])
    assert none is not None and none.again([x, y])  # of no program there is nothing to do
