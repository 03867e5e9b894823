"""Every plain kernel compiles with every Triton that is supported: `make compat` runs this with each."""

import itertools

import pytest

from flash.autotune.space import Stored, Variant
from flash.kernels.spec import Config

SMALL = Config(16, 32, 4, 2)
CALLS = {
    "plain": Variant("bfloat16", 64, 64),
    "grouped, causal, padded": Variant("float16", 40, 48, causal=True, group=4),
    "every operand": Variant("bfloat16", 64, 64, raw=False, dlse=True, features=("bias", "alibi", "sinks")),
    "packed": Variant("bfloat16", 64, 64, causal=True, features=("packed", "window")),
}
CACHES = {
    "dense": Stored("bfloat16"),
    "pages, rotary": Stored("bfloat16", 16, 16),
    "several tiles": Stored("bfloat16", 16, alike=False, several=True),
    "parts": Stored("bfloat16", split=True),
}


@pytest.mark.aot
@pytest.mark.parametrize(
    ("kernel", "name"),
    [("dbias", "every operand"), *itertools.product(["forward", "delta", "dkdv", "dq", "jvp"], CALLS)],
)
def test_a_kernel_compiles(kernel: str, name: str) -> None:
    pytest.importorskip("triton")
    from flash.autotune.resources import build

    assert build("cuda:90", kernel, CALLS[name], SMALL).asm["ptx"]


@pytest.mark.aot
@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("kernel", ["append", "decode", "merge"])
def test_a_kernel_of_a_cache_compiles(kernel: str, name: str) -> None:
    pytest.importorskip("triton")
    from flash.autotune.resources import build

    variant = Variant("bfloat16", 64, 64, group=4, stored=CACHES[name])
    assert build("cuda:90", kernel, variant, SMALL).asm["ptx"]
