"""Kernels compile for machines that are not here as a launch would compile them, and the report reads what came out."""

import json

import pytest

from flash.autotune import listing, resources
from flash.autotune.resources import Report, report
from flash.autotune.space import FEATURES, Variant
from flash.autotune.tables import lookup, narrowed
from flash.kernels.spec import Config

pytest.importorskip("triton")
SMALL = Config(64, 32, 4, 2)

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0030*/                   MUFU.EX2 R4, R5 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/                   MUFU.EX2 R4, R5 ;
        /*0060*/                   MUFU.EX2 R4, R5 ;
        /*0070*/                   STL [R1], R4 ;
        /*0080*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0090*/                   FFMA R4, R5, R6, R7 ;
        /*00a0*/                   BRA `(.L_x_2) ;
"""


def test_innermost_matrix_loops_are_found_and_counted() -> None:
    (loop,) = listing.matrix_loops(SASS)
    assert loop.instructions == 8
    assert loop.counts == {"wgmma": 2, "exp2": 3, "local": 1}
    assert loop.hidden == pytest.approx(1 / 3)


def test_group_in_flight_across_the_back_edge_hides_exponentials() -> None:
    body = ["MUFU.EX2 R4, R5", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "HGMMA R24, gsb0"]
    assert listing.hidden(body) == 1.0
    assert listing.hidden([body[1], body[0], body[2]]) == 0.0
    assert listing.hidden([body[0]]) is None


@pytest.mark.parametrize(
    ("fields", "word"),
    [({"shared": 200}, "shared memory"), ({"tensor_memory": 576}, "tensor memory"), ({"registers": 4}, "empty kernel")],
)
def test_report_says_why_a_launch_would_fail(fields: dict[str, int], word: str) -> None:
    good = Report("cuda:100", 100, 0, 50, 100, 0, (), ())
    assert good.faults == ()
    assert word in good._replace(**fields).faults[0]


def test_interpreted_kernels_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_function", lambda kernel: object())
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        resources.report("cuda:90", "forward", Variant("float16", 64, 64), SMALL)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("target", "kind"), [("cuda:80", "mma"), ("cuda:90", "wgmma"), ("cuda:100", "tcgen05"), ("hip:gfx942", "mfma")]
)
def test_every_target_compiles_to_its_own_matrix_instructions(target: str, kind: str) -> None:
    made = resources.report(target, "forward", Variant("float16", 64, 64, True), SMALL, listing=True)
    assert made.target == target and made.faults == ()
    assert made.loops and all(kind in loop.counts for loop in made.loops)
    assert any("exp2" in loop.counts for loop in made.loops)
    assert (made.hidden is not None) == (target == "cuda:90")
    assert 0 < made.shared <= made.limit and 16 < made.registers <= 512


@pytest.mark.aot
def test_one_process_compiles_for_one_target_after_another() -> None:
    variant = Variant("bfloat16", 32, 32)
    codes = [resources.build(target, "dq", variant, SMALL).asm["ptx"] for target in ("cuda:80", "cuda:90", "cuda:80")]
    assert ".target sm_80" in codes[0] and ".target sm_90a" in codes[1] and codes[0] == codes[2]


@pytest.mark.aot
@pytest.mark.parametrize(
    ("kernel", "variant"),
    [
        ("forward", Variant("float32", 24, 40, True, 2, raw=False, q_offset=True)),
        ("dkdv", Variant("float64", 16, 16, True, 4)),
        ("dq", Variant("float16", 40, 24, q_offset=True)),
        ("delta", Variant("bfloat16", 64, 48, dlse=True)),
    ],
)
def test_calls_of_every_kind_compile(kernel: str, variant: Variant) -> None:
    for target in ("cuda:90", "cuda:80"):
        assert resources.report(target, kernel, variant, Config(32, 32, 4, 1)).faults == ()


@pytest.mark.aot
def test_too_large_tiles_are_reported_before_any_launch() -> None:
    made = resources.report("cuda:80", "forward", Variant("float32", 256, 256), Config(64, 64, 8, 3))
    assert made.faults and str(made.limit) in made.faults[0]


@pytest.mark.aot
def test_command_line_prints_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["forward", "--head-dim", "64", "--config", "64,32,4,2", "--target", "cuda:90"]
    assert resources.main(arguments) == 0
    assert "registers" in capsys.readouterr().out
    assert resources.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["limit"] == 227 * 1024


@pytest.mark.aot
def test_gluon_kernels_compile_for_hopper_alone(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton.experimental.gluon")
    with pytest.raises(RuntimeError, match="for cuda:90 alone"):  # the compiler would abort the process
        resources.build("cuda:100", "hopper_forward", Variant("float16", 64, 64), Config(128, 64, 8, 2))
    with pytest.raises(ValueError, match="no tile holds head_dim 300"):
        resources.build("cuda:90", "hopper_forward", Variant("float16", 300, 300), Config(128, 64, 8, 2))
    assert resources.main(["hopper_forward", "--head-dim", "64", "--dtype", "float16", "--causal"]) == 0
    assert "100% of exponentials under a wgmma" in capsys.readouterr().out


def chosen(target: str, kernel: str, feature: str, head_dim: int) -> Config:
    """The Config that a call with a feature runs with."""
    choice = lookup(target, "dq" if kernel == "dbias" else kernel, "bfloat16", head_dim, 8192, True)
    elementwise = {"mask", "padding", "bias", "mask_mod", "blocks", "dropout"}
    config = (narrowed(choice, kernel) if feature in elementwise else choice).config
    if kernel == "dbias":  # as kernels/bias.py takes the dq kernel's
        config = config._replace(block_m=min(config.block_m, 64), block_n=min(config.block_n, 64), num_stages=1)
    return config


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "dkdv", "dq", "dbias"])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("target", "head_dim"), [("cuda:80", 64), ("cuda:90", 128)])
def test_every_feature_compiles_and_fits(target: str, feature: str, kernel: str, head_dim: int) -> None:
    pytest.importorskip("triton")
    features = (feature,) if kernel != "dbias" or feature == "bias" else ("bias", feature)
    raw = not {"bias", "alibi", "softcap", "score_mod"} & set(features)
    call = Variant("bfloat16", head_dim, head_dim, True, 4, raw=raw, features=features)
    assert report(target, kernel, call, chosen(target, kernel, feature, head_dim)).faults == ()
