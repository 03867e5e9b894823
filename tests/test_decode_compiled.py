"""The kernels of a cache compile wherever they are to run, fit, and spill no more than is written here.

Compiled and simulated, not yet run on a GPU. The figures hold for the Triton that is pinned: others allocate registers
otherwise.
"""

import pytest

pytest.importorskip("triton")

from bench import clamps
from flash.autotune import cached, resources, tables
from flash.autotune.decoding import for_decode
from flash.autotune.space import Stored, Variant
from tests.drivers import printed

pytestmark = pytest.mark.aot

PINNED = "3.7.1"
FLOAT8 = "float8_e4m3fn"


def plain(dtype: str, stored: str, head_dim: int, page: int, group: int = 8) -> Variant:
    """One query of each head."""
    return Variant(dtype, head_dim, head_dim, group=group, stored=Stored(stored, page))


def everything(dtype: str, stored: str, head_dim: int, page: int, group: int = 8) -> Variant:
    """Several queries, with every operand and option that decoding has, at once."""
    cache = Stored(stored, page, head_dim // 4, False, slots=True, scales=True, split=True, alike=False)
    features = ("window", "alibi", "softcap", "sinks")
    return Variant(dtype, head_dim, head_dim, True, group, raw=False, features=features, stored=cache)


def compiled(target: str, variant: Variant, rows: int = 8) -> resources.Report:
    """The report of decode with the tiles that a call of so many rows runs with, which must fit."""
    assert variant.stored is not None
    size = cached.SIZES[variant.stored.dtype]
    config = for_decode(target, variant.dtype, variant.head_dim, rows, size, variant.stored.page > 0).config
    made = resources.report(target, "decode", variant, config)
    assert made.faults == (), variant
    return made


def check_spills(target: str, variant: Variant, rows: int, allowed: int) -> None:
    made = compiled(target, variant, rows)
    if tables.triton_version() == PINNED:
        assert made.spill_bytes <= allowed, variant


@pytest.mark.parametrize(
    ("target", "stored", "page"), [("cuda:80", FLOAT8, 0), ("cuda:90", "bfloat16", 16), ("hip:gfx942", "bfloat16", 0)]
)
def test_one_query_spills_nothing(target: str, stored: str, page: int) -> None:
    check_spills(target, plain("bfloat16", stored, 128, page), 8, 0)


def test_everything_at_once_compiles() -> None:
    check_spills("cuda:90", everything("bfloat16", "bfloat16", 128, 16), 8, 0)


def test_append_and_merge_spill_nothing() -> None:
    variant = everything("bfloat16", FLOAT8, 128, 16)
    for kernel in ("append", "merge"):
        config = cached.config(kernel, "cuda:90", variant, variant.stored)  # type: ignore[arg-type]
        made = resources.report("cuda:90", kernel, variant, config)
        assert made.faults == () and made.spill_bytes == 0, kernel


def test_a_table_that_may_lie_costs_few_instructions() -> None:
    """The budget of a guard is a twentieth of the kernel; `python -m bench.clamps` prints the counts."""
    found = clamps.cost("cuda:90", 16)
    assert 0 < found.believing_instructions < found.instructions <= 1.05 * found.believing_instructions
    if tables.triton_version() == PINNED:
        assert found.registers <= found.believing_registers + 16


EVERY = [
    (dtype, stored, head_dim, page)
    for dtype, stored in (("bfloat16", "bfloat16"), ("bfloat16", FLOAT8), ("float32", "float32"))
    for head_dim in ((64, 128) if dtype == "float32" else (64, 128, 256))
    for page in (0, 16)
]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "stored", "head_dim", "page"), EVERY)
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_every_choice_of_few_rows(target: str, dtype: str, stored: str, head_dim: int, page: int) -> None:
    check_spills(target, plain(dtype, stored, head_dim, page), 8, 0)
    check_spills(target, everything(dtype, stored, head_dim, page), 8, 0)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [16, 32, 512])
@pytest.mark.parametrize("stored", ["bfloat16", FLOAT8])
def test_narrow_and_wide_heads_on_sm_90(stored: str, head_dim: int) -> None:
    check_spills("cuda:90", plain("bfloat16", stored, head_dim, 0), 8, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "spilled"), [(256, 56), (512, 5768)])
def test_wide_heads_in_float32_spill_on_sm_90(head_dim: int, spilled: int) -> None:
    """tf32x3 keeps q as two of half its bits, and each warp all of it."""
    check_spills("cuda:90", plain("float32", "float32", head_dim, 0), 8, spilled)
    check_spills("cuda:90", everything("float32", "float32", head_dim, 0), 8, spilled)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_many_rows(target: str, head_dim: int) -> None:
    """Eight queries of eight heads."""
    check_spills(target, everything("bfloat16", "bfloat16", head_dim, 16), 64, 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [80, 104, 128])
def test_padded_and_ragged_heads(dtype: str, head_dim: int) -> None:
    check_spills("cuda:90", plain(dtype, dtype, head_dim, 0), 8, 0)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sm_100(head_dim: int) -> None:
    check_spills("cuda:100", plain("bfloat16", "bfloat16", head_dim, 16), 8, 0)


def test_command_line_compiles_the_kernels_of_a_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert resources.main(["append", "--page", "16", "--cache-dtype", FLOAT8, "--rotary", "32"]) == 0
    assert capsys.readouterr().out.startswith("append Config(block_m=16, block_n=16, num_warps=4, num_stages=1")


WIDTHS = """
from flash import dispatch_step
from flash.autotune import tables
from flash.decode import flash_attention_decode
from flash.kernels.append import append_kernel
from flash.kernels.decode import decode_kernel
from flash.kernels.spec import Config

dispatch_step.chosen = lambda *_: "triton"
dispatch_step.tuned = lambda step: tables.Choice(Config(16, 32, 4, 2), "small")
half = dict(dtype=torch.bfloat16)
q, new, cache = torch.zeros(2, 4, 1, 64, **half), torch.zeros(2, 2, 1, 64, **half), torch.zeros(9, 2, 16, 64, **half)
counts = []
with torch.no_grad():
    for width in (1, 2, 16, 32, 37):
        table = torch.zeros(2, width, dtype=torch.int32)
        lengths = torch.zeros(2, dtype=torch.int32)
        flash_attention_decode(
            q, cache, cache.clone(), cache_seqlens=lengths, block_table=table, k=new, v=new.clone(), num_splits=2
        )
        counts.append([len(kernel.device_caches[0][0]) for kernel in (append_kernel, decode_kernel)])
print(json.dumps(counts))
"""


def test_a_wider_table_compiles_nothing() -> None:
    assert printed(WIDTHS) == [[1, 1]] * 5
