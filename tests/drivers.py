"""A stand-in for a Hopper GPU's driver, without a GPU: kernels are compiled for sm_90, and launches do nothing."""

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import torch

INSTALLED = """
import json
import torch
from triton.runtime import driver
from tests.drivers import stand_in

driver.set_active(stand_in())
"""


def stand_in() -> Any:
    """A driver; Triton is imported here, since not every machine has it."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class StandIn(DriverBase):
        def __init__(self) -> None:
            limits = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}
            self.utils: Any = SimpleNamespace(
                load_binary=lambda *_: (1, 2, 100, 0, 1024), get_device_properties=lambda device: limits
            )
            self.launcher_cls: Any = lambda source, metadata: lambda *args: None

        is_active = classmethod(lambda cls: True)
        map_python_to_cpp_type = lambda self, type: type  # noqa: E731
        get_current_target = lambda self: GPUTarget("cuda", 90, 32)  # noqa: E731
        get_active_torch_device = lambda self: torch.device("cpu")  # noqa: E731
        get_current_device = lambda self: 0  # noqa: E731
        get_current_stream = lambda self, device: 0  # noqa: E731
        get_benchmarker = lambda self: None  # noqa: E731

    return StandIn()


def printed(script: str, prelude: str = INSTALLED) -> Any:
    """What a script prints as JSON, in a process of its own: the driver is one for a whole process."""
    command = [sys.executable, "-W", "ignore", "-c", prelude + script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
