"""Every shipped Config compiles for its target and fits it, and spills no more than its table says.

A row's figures are the worst over the calls it is for: causal and not, several query heads per key head, head_dim that
fills the bucket or is padded to it. They hold for the Triton that the table names: others allocate registers otherwise.
"""

from pathlib import Path

import pytest

from flash.autotune import offline, resources, tables
from flash.autotune.space import Variant

FOLDER = Path(tables.__file__).parent / "tables"
SHIPPED = [tables.parse(path.read_bytes()) for path in sorted(FOLDER.glob("*.json"))]
ROWS = [(table, row) for table in SHIPPED for row in table.rows]
KINDS = {(None, None): [], (False, None): [], (True, None): ["ragged"], (False, False): ["full"]}
NAMES = [
    "-".join([table.target, row.kernel, row.dtype, str(row.head_dim), *KINDS[row.ragged, row.causal]])
    for table, row in ROWS
]


def need_of(row: tables.Row) -> offline.Need:
    return offline.Need(*row[:5])


def check(table: tables.Table, row: tables.Row, calls: tuple[Variant, ...]) -> None:
    for call in calls:
        made = resources.report(table.target, row.kernel, call, row.config)
        assert made.faults == (), call
        assert not made.serialized, call
        if table.triton == tables.triton_version():
            assert made.spill_bytes <= row.spill_bytes, call


def quick(table: tables.Table, row: tables.Row) -> bool:
    """Whether a row is compiled in every run: AMD's take twice as long, and of sm_100 the likeliest to spill are."""
    likely = row.kernel == "dkdv" and row.head_dim >= 128 and not row.ragged
    return table.target in ("cuda:80", "cuda:90") or (table.target == "cuda:100" and likely)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("table", "row"),
    [
        pytest.param(*each, id=name)
        for each, name in zip(ROWS, NAMES, strict=True)
        if each[1].dtype == "bfloat16" and quick(*each)
    ],
)
def test_bfloat16_row_compiles_fits_and_keeps_its_figures(table: tables.Table, row: tables.Row) -> None:
    pytest.importorskip("triton")
    calls = [call for call in offline.calls_of(need_of(row)) if not call.q_offset]
    check(table, row, tuple({call.causal: call for call in reversed(calls)}.values()))


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "row"), [pytest.param(*each, id=name) for each, name in zip(ROWS, NAMES, strict=True)]
)
def test_row_compiles_fits_and_keeps_its_figures_in_every_call(table: tables.Table, row: tables.Row) -> None:
    pytest.importorskip("triton")
    check(table, row, offline.calls_of(need_of(row)))


@pytest.mark.aot
@pytest.mark.parametrize(
    ("table", "row"),
    [pytest.param(*each, id=name) for each, name in zip(ROWS, NAMES, strict=True) if each[1].config.ahead],
)
def test_a_row_that_multiplies_ahead_hides_exponentials(table: tables.Table, row: tables.Row) -> None:
    pytest.importorskip("triton")
    for call in offline.calls_of(need_of(row)):
        made = resources.report(table.target, row.kernel, call, row.config, listing=True)
        if table.triton == tables.triton_version():
            assert (made.hidden or 0.0) >= offline.HIDDEN, call
            full = min(made.loops, key=lambda loop: loop.instructions if "exp2" in loop.counts else 10**6)
            assert "local" not in full.counts, call


def test_half_precision_up_to_head_dim_128_spills_nothing_on_nvidia() -> None:
    spilling = [
        name
        for (table, row), name in zip(ROWS, NAMES, strict=True)
        if row.spill_bytes and offline.spill_free(table.target, need_of(row))
    ]
    assert spilling == []


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100"])
def test_every_row_that_must_not_spill_is_shipped(target: str) -> None:
    wanted = {need for need in offline.needs(target, tables.ITEMSIZE) if offline.spill_free(target, need)}
    (found,) = ({need_of(row) for row in table.rows} for table in SHIPPED if table.target == target)
    assert wanted - found == set()


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "head_dim"), tables.SMALLEST)
def test_the_smallest_tiles_take_the_shared_memory_that_is_said(dtype: str, head_dim: int) -> None:
    pytest.importorskip("triton")
    call = Variant(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim, causal=True, group=2)
    made = resources.report("cuda:80", "dkdv", call, tables.Config(16, 16, 8, 1))
    if tables.triton_version() == "3.7.1":
        assert made.shared == tables.SMALLEST[dtype, head_dim]


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "dkdv", "dq"])
@pytest.mark.parametrize("head_dim", [256, 512])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("target", ["cuda:80", "cuda:89", "cuda:90"])
def test_a_wide_head_fits_or_is_named(target: str, dtype: str, head_dim: int, kernel: str) -> None:
    pytest.importorskip("triton")
    call = Variant(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim, causal=True, group=2)
    config = tables.lookup(target, kernel, dtype, head_dim, 4096, True).config
    made = resources.report(target, kernel, call, config)
    assert made.shared <= made.limit or tables.too_wide(target, dtype, head_dim) is not None
