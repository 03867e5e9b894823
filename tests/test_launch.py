"""A launch as the JIT sees it, without a GPU: a stand-in driver compiles for sm_90 and launches nothing."""

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.aot

CALLS = """
import json, torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver


class Utilities:
    def load_binary(self, *args):
        return 1, 2, 100, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class StandIn(DriverBase):
    def __init__(self):
        self.utils = Utilities()
        self.launcher_cls = lambda source, metadata: lambda *args: None

    is_active = classmethod(lambda cls: True)
    map_python_to_cpp_type = lambda self, type: type
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_active_torch_device = lambda self: torch.device("cpu")
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_benchmarker = lambda self: None


driver.set_active(StandIn())

from flash.kernels import backward, forward
from flash.kernels.launch import LENGTHS
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
more = [call(*lengths)[0] for lengths in ((64, 256, 192), (128, 112, -16), (128, 128, 1), (37, 51, 14))]
scaled, _ = call(128, 128, 0, scale=0.3)
offset, _ = call(128, 128, 0, q_offset=torch.zeros(2, dtype=torch.int64))
found = {"counts": counts, "more": more, "scaled": scaled, "offset": offset, "scale": signature["scale"]}
print(json.dumps(found | {"sizes": [signature[name] for name in LENGTHS], "q": list(signature["q"])}))
"""


@pytest.fixture(scope="module")
def found() -> Any:
    # the driver is one for a whole process
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CALLS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_new_length_offset_or_scale_compiles_nothing(found: Any) -> None:
    assert found["counts"] == [1, 1, 1, 1]
    assert found["more"] == [[1, 1, 1, 1]] * 4
    assert found["scaled"] == [1, 1, 1, 1]


def test_an_offset_read_on_the_device_is_another_kernel(found: Any) -> None:
    assert found["offset"] == [2, 2, 2, 1]


def test_the_scale_arrives_in_64_bits_and_lengths_unspecialised(found: Any) -> None:
    assert found["scale"] == "fp64"
    assert found["sizes"] == ["i32"] * 7
    assert found["q"][-1] == "constexpr"  # a last stride of 1 is known, so that loads are wide
