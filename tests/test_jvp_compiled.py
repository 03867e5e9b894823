"""The kernel of forward mode compiles wherever dq's tiles are known, fits, and spills no more than is written here.

Its tiles are made of dq's (`tables.for_tangents`). Compiled and simulated, not yet run on a GPU. The figures hold for
the Triton that is pinned: others allocate registers otherwise.
"""

import pytest

from flash.autotune import resources, tables
from flash.autotune.space import FEATURES, Variant
from flash.kernels.spec import Config

PINNED = "3.7.1"
TARGETS = ("cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:103", "cuda:120", "hip:gfx942", "interpreter")
# Bytes that a thread spills, the worst of `calls`; the others of EVERY spill nothing.
SPILLED = {
    ("cuda:80", "float32", 80): 484,
    ("cuda:80", "float32", 104): 9460,
    ("cuda:80", "float32", 128): 440,
    ("cuda:80", "float32", 256): 17552,
    ("cuda:90", "float32", 80): 460,
    ("cuda:90", "float32", 104): 752,
    ("cuda:90", "float32", 128): 408,
    ("cuda:90", "float32", 256): 16676,
    ("cuda:100", "float16", 80): 24,
    ("cuda:100", "float16", 128): 24,
    ("cuda:100", "bfloat16", 80): 24,
    ("cuda:100", "bfloat16", 128): 24,
    ("cuda:100", "float32", 80): 460,
    ("cuda:100", "float32", 104): 752,
    ("cuda:100", "float32", 128): 392,
    ("cuda:100", "float32", 256): 17464,
    ("hip:gfx942", "float32", 256): 128,
}


def chosen(target: str, dtype: str, head_dim: int, narrow: bool = False) -> Config:
    """The Config that forward mode runs with."""
    choice = tables.lookup(target, "dq", dtype, head_dim, 8192, True)
    choice = tables.narrowed(choice, "dq") if narrow else choice
    return tables.for_tangents(choice, target, dtype, head_dim).config


def calls(dtype: str, head_dim: int) -> tuple[Variant, ...]:
    """Causal with several query heads for each key head, full, and in natural units with offsets from a tensor."""
    one = Variant(dtype, head_dim, head_dim)
    grouped = one._replace(causal=True, group=4)
    return grouped, one, grouped._replace(raw=False, q_offset=True)


def compiled(target: str, dtype: str, head_dim: int, calls: tuple[Variant, ...]) -> None:
    for call in calls:
        made = resources.report(target, "jvp", call, chosen(target, dtype, head_dim))
        assert made.faults == () and not made.serialized, call
        if tables.triton_version() == PINNED:
            assert made.spill_bytes <= SPILLED.get((target, dtype, head_dim), 0), call


EVERY = [
    (target, dtype, head_dim)
    for target in ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
    for dtype in ("float16", "bfloat16", "float32")
    for head_dim in (64, 80, 104, 128, 256)
]


@pytest.mark.aot
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bfloat16_compiles_fits_and_spills_nothing_on_sm_90(head_dim: int) -> None:
    pytest.importorskip("triton")
    compiled("cuda:90", "bfloat16", head_dim, calls("bfloat16", head_dim)[:1])


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize(("target", "dtype", "head_dim"), EVERY)
def test_every_head_dim_compiles_fits_and_keeps_its_figures(target: str, dtype: str, head_dim: int) -> None:
    pytest.importorskip("triton")
    compiled(target, dtype, head_dim, calls(dtype, head_dim))


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("target", "head_dim"), [("cuda:80", 128), ("cuda:90", 64)])
def test_every_feature_compiles_and_fits(target: str, feature: str, head_dim: int) -> None:
    """Bias, slopes and sinks bring their tangents."""
    pytest.importorskip("triton")
    raw = feature not in ("bias", "alibi", "softcap", "score_mod")
    narrow = feature in ("mask", "padding", "bias", "mask_mod", "blocks", "dropout")
    call = Variant("bfloat16", head_dim, head_dim, True, 4, raw=raw, features=(feature,))
    made = resources.report(target, "jvp", call, chosen(target, "bfloat16", head_dim, narrow))
    assert made.faults == ()


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [256, 512])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("target", ["cuda:80", "cuda:89", "cuda:90"])
def test_a_wide_head_fits_or_is_named(target: str, dtype: str, head_dim: int) -> None:
    pytest.importorskip("triton")
    made = resources.report(target, "jvp", calls(dtype, head_dim)[0], chosen(target, dtype, head_dim))
    assert made.shared <= made.limit or tables.too_wide(target, dtype, head_dim) is not None


@pytest.mark.aot
def test_command_line_compiles_with_tangents_of_bias_slopes_and_sinks(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    call = Variant("bfloat16", 16, 16, raw=False, features=("bias", "alibi", "sinks"))
    config = Config(16, 16, 4, 1)
    found = resources._arguments("jvp", "cuda:90", call, config)["mods"]
    assert (found.bias_tangent, found.slopes_tangent, found.sinks_tangent) == (found.bias, found.slopes, found.sinks)
    assert found.bias.ptr.type == "*bf16"
    assert resources._arguments("dq", "cuda:90", call, config)["mods"].bias_tangent.constant is None
    features = [word for feature in call.features for word in ("--feature", feature)]
    assert resources.main(["jvp", "--head-dim", "16", "--target", "cuda:90", *features]) == 0
    assert capsys.readouterr().out.startswith("jvp Config(block_m=128, block_n=32, num_warps=8, num_stages=1")


@pytest.mark.parametrize("head_dim", [1, 16, 40, 64, 128, 200, 256, 512])
@pytest.mark.parametrize("dtype", tables.ITEMSIZE)
@pytest.mark.parametrize("target", TARGETS)
def test_tiles_divide_those_of_dq_and_a_whole_matrix_product(target: str, dtype: str, head_dim: int) -> None:
    for config in (Config(256, 128, 4, 3), Config(64, 64, 8, 2), Config(16, 16, 4, 1)):
        found = tables.for_tangents(tables.Choice(config, "why"), target, dtype, head_dim)
        made = found.config
        assert config.block_m % made.block_m == 0 and config.block_n % made.block_n == 0
        assert made.block_m >= 16 and made.block_n >= 16 and made.num_stages == 1
        assert found.reason.endswith("why")


def test_tiles_of_q_that_warps_hold_in_registers_keep_to_their_bound() -> None:
    choice = tables.Choice(Config(128, 64, 8, 3), "")
    for head_dim, tile in ((32, (128, 16)), (64, (64, 16)), (80, (32, 32)), (128, (32, 32)), (104, (16, 16))):
        assert tables.for_tangents(choice, "cuda:80", "bfloat16", head_dim).config == Config(*tile, 8, 1)
    for head_dim, rows in ((64, 128), (128, 128), (104, 16), (256, 16)):
        assert tables.for_tangents(choice, "cuda:90", "bfloat16", head_dim).config.block_m == rows
    for target, rows in (("cuda:80", 16), ("cuda:90", 128), ("cuda:100", 16), ("hip:gfx942", 128)):
        assert tables.for_tangents(choice, target, "float32", 64).config.block_m == rows
