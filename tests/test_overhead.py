"""A plain call's overhead stays what a plan makes it; bounds are ratios within one process, and generous."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.aot


def test_a_call_made_before_costs_little_more_than_its_allocations() -> None:
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-m", "bench.overhead", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ways = {name.removeprefix("flash: ") for name, cost in found.items() if name.startswith("flash: ") and cost}
    assert {"forward and backward", "torch.func.vjp", "torch.func.jvp", "torch.vmap over 2", "torch.compile"} <= ways
    assert found["flash_attention"] < 40 * found["torch.empty_like"], found
    assert found["flash_attention"] < 3 * found["scaled_dot_product_attention"], found
    assert found["flash_attention"] < 0.5 * found["without a plan"], found
