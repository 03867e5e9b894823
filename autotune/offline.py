"""Choose Configs by compiling alone: for each row of a target's table the best guess that fits and does not spill.

Nothing here has been timed, and the table says so.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from flash.kernels.spec import Config

from .journal import Journal
from .resources import Report
from .space import Variant, candidates, orders, variants
from .tables import HEAD_DIMS, KERNELS, Row, Table, heuristic, kernel_hash, shipped_table

Compile = Callable[..., Report]  # (target, kernel, variant, config), and `listing` for the loops
TRIES = 1  # candidates that fit before the least bad one is taken, where nothing promises that none spills
HIDDEN = 0.5  # least share of exponentials under a wgmma, in the worst call, that the order `ahead` is taken for
HOPELESS = 128  # bytes spilled: other numbers of stages will not mend that


class Need(NamedTuple):
    """A row that a table should have: what `Row` calls kernel, dtype, head_dim, ragged and causal."""

    kernel: str
    dtype: str
    head_dim: int
    ragged: bool | None
    causal: bool | None = None


class Figures(NamedTuple):
    """The worst that any variant of a Config takes, or why it is out (an empty fault = it is not)."""

    spill_bytes: int
    shared: int
    fault: str


def needs(target: str, dtypes: Iterable[str], head_dims: Iterable[int] = HEAD_DIMS) -> Iterator[Need]:
    """The rows of a target's table.

    Ragged calls have rows of their own where the registers that their addresses take would make the others slow, and
    so have full calls where those of causal ones would keep the forward's exponentials from hiding.
    """
    for dtype in dtypes:
        if dtype == "float64" and target.startswith("hip:"):  # Triton before 3.9 cannot compile it
            continue
        for head_dim in sorted(head_dims, key=lambda d: (d > 64, abs(d - 64))):  # small ones often agree with 64
            apart = target.startswith("cuda:") and dtype in ("float16", "bfloat16") and 32 <= head_dim <= 128
            for kernel in KERNELS:
                if (dtype, head_dim) == ("float64", 512) and kernel != "forward":  # even 16 by 16 does not fit
                    continue
                for ragged in (False, True) if apart else (None,):
                    yield Need(kernel, dtype, head_dim, ragged)
                if (target, kernel, head_dim) == ("cuda:90", "forward", 128) and apart:
                    yield Need(kernel, dtype, head_dim, False, False)


def spill_free(target: str, need: Need) -> bool:
    """Whether a row is held to spill nothing: half precision and head_dim up to 128 on NVIDIA."""
    return target.startswith("cuda:") and need.dtype in ("float16", "bfloat16") and need.head_dim <= 128


def calls_of(need: Need) -> tuple[Variant, ...]:
    """The calls that a row must compile for: causal with a group and full; where nothing may spill, all variants."""
    kernel, dtype, head_dim, ragged, causal = need
    calls = variants(kernel, dtype, head_dim, bool(ragged))
    calls = tuple(call for call in calls if causal in (None, call.causal))
    return calls if dtype in ("float16", "bfloat16") and head_dim <= 128 else calls[:2]


def measure(
    target: str, need: Need, config: Config, compile: Compile, most: float = float("inf"), hidden: float = 0.0
) -> Figures:
    """Compile a Config for the calls of a row; stops where it spills `most` bytes or more.

    Args:
        target: "cuda:90", "hip:gfx942".
        need: the row.
        config: the tiles.
        compile: (target, kernel, variant, config) -> Report.
        most: spilled bytes of the best so far.
        hidden: least share of exponentials under a wgmma that the order `ahead` is taken for.

    Returns:
        The worst figures, and a fault where it fails to compile, fit, keep its wgmma asynchronous or hide so much.
    """
    listed = {"listing": True} if config.ahead and hidden > 0.0 else {}
    spill_bytes = shared = 0
    for variant in calls_of(need):
        try:
            made = compile(target, need.kernel, variant, config, **listed)
        except RuntimeError as error:
            return Figures(spill_bytes, shared, str(error))
        spill_bytes, shared = max(spill_bytes, made.spill_bytes), max(shared, made.shared)
        fault = "; ".join(made.faults) or ("wgmma is serialised" if made.serialized else "")
        if listed and (made.hidden or 0.0) < hidden:
            fault = fault or "its exponentials are not hidden"
        if fault or spill_bytes >= most:
            return Figures(spill_bytes, shared, fault or "spills more than another")
    return Figures(spill_bytes, shared, "")


def choose(target: str, need: Need, compile: Compile, first: Iterable[Config] = ()) -> Row | None:
    """The first candidate that fits and does not spill, else the one that spills least.

    Args:
        target: "cuda:90", "hip:gfx942".
        need: the row.
        compile: (target, kernel, variant, config) -> Report.
        first: Configs to try before the others.

    Returns:
        The row, or None where no candidate compiles and fits.
    """
    best: Row | None = None
    fitting = 0
    hopeless = set()
    given = (order for config in first for order in orders(target, need.kernel, need.dtype, config))
    for config in dict.fromkeys((*given, *candidates(target, need.kernel, need.dtype, need.head_dim))):
        if (*config[:3], config.ahead) in hopeless:
            continue
        most = float("inf") if best is None else best.spill_bytes
        figures = measure(target, need, config, compile, most, HIDDEN)
        fitting += not figures.fault or figures.fault.startswith("spills")
        if not figures.fault:
            best = Row(*need, None, config, figures.shared, figures.spill_bytes)
        if figures.spill_bytes > HOPELESS:
            hopeless.add((*config[:3], config.ahead))
        if best is not None and (best.spill_bytes == 0 or (fitting >= TRIES and not spill_free(target, need))):
            break
    return best


def build_table(
    target: str, wanted: Iterable[Need], compile: Compile, journal: Journal, triton: str, progress: Any = None
) -> Table:
    """Choose every wanted row, going on where the journal ends.

    Args:
        target: "cuda:90", "hip:gfx942".
        wanted: the rows.
        compile: (target, kernel, variant, config) -> Report.
        journal: where finished rows are kept.
        triton: version of the Triton that compiles.
        progress: a tqdm bar, or None.

    Returns:
        The table, untimed and of no sources in particular; rows that nothing fits are left out.
    """
    rows: list[Row] = []
    shipped = shipped_table(target)
    old = () if shipped is None else shipped.rows  # a row stays what it is while it is as good
    for need in wanted:
        key = f"{target} {kernel_hash()} {triton} {need}"
        if key not in journal:
            kept = [row.config for row in old if row[:5] == need and row.seqlen is None]
            near = [row.config for row in rows if _akin(row, need)]
            row = choose(target, need, compile, kept or near or [heuristic(target, *need[:3])])
            journal.write(key, [] if row is None else [row.config, row.shared, row.spill_bytes])
        for config, shared, spill_bytes in [journal[key]] if journal[key] else []:
            rows.append(Row(*need, None, Config(*config), shared, spill_bytes))
        if progress is not None:
            progress.set_postfix_str(f"{' '.join(map(str, need[:3]))}: {journal[key]}")
            progress.update()
    return Table(target, "", triton, "", False, tuple(rows))


def _akin(row: Row, need: Need) -> bool:
    """Whether a row's Config is a good guess: of the other half precision, or of the next larger small head_dim."""
    if (row.kernel, row.ragged, row.causal) != (need.kernel, need.ragged, need.causal):
        return False
    if row.head_dim == need.head_dim:
        return {row.dtype, need.dtype} == {"float16", "bfloat16"}
    return row.dtype == need.dtype and row.head_dim == 2 * need.head_dim <= 64
