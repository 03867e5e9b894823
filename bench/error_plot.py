"""The errors as a picture: rms over that of the oracle, a panel for each dtype and output, ours beside peers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cases import Case
from bench.error_report import cases_of, peers_of, rows_of
from bench.peers import OURS, PLAIN
from bench.plot import COLOURS, figure, finish, label
from bench.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {"o": ("o",), "lse": ("lse",), "dq, dk, dv: the largest": ("dq", "dk", "dv")}
MARKERS = {"standard": "s", OURS: "o", PLAIN: "P", "sdpa-flash": "^", "sdpa-math": "v", "flex": "D"}
EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


def points(axes: "Axes", content: dict[str, Any], cases: list[Case], outputs: tuple[str, ...]) -> None:
    """A mark a case and a peer, side by side, whiskers from p20 to p80."""
    rows, peers = rows_of(content), peers_of(content, cases)
    for place, peer in enumerate(peers):
        shift = 0.7 * (place / max(len(peers) - 1, 1) - 0.5)
        for x, case in enumerate(cases):
            errors = rows[case.name, peer]["errors"]
            found = [errors[name]["relative"] for name in outputs if name in errors]
            largest = max(found, key=lambda each: float(each["median"]), default=None)
            if largest is None or largest["median"] == 0:  # what is exactly the oracle's has no place on a log axis
                continue
            middle, low, high = (largest[name] for name in ("median", "p20", "p80"))
            axes.errorbar(
                [x + shift], [middle], yerr=[[middle - low], [high - middle]], fmt=MARKERS.get(peer, "x"), lw=0.8, ms=6,
                color=COLOURS.get(peer, "#333333"), label=named(peer, content), zorder=4 if peer == OURS else 3,
            )  # fmt: skip


def named(peer: str, content: dict[str, Any]) -> str:
    """A peer in the legend; of ours, what it is here."""
    if content["machine"]["device"] == "cpu" and peer in (OURS, PLAIN):
        backend = "torch backend" if peer == OURS else f"kernels, {content['settings']['kernels']}"
        return f"{label(peer)}: {backend}"
    return label(peer)


def draw(content: dict[str, Any], path: Path) -> Path:
    """Dtypes down, outputs across."""
    found = cases_of(content)
    dtypes = [dtype for dtype in EPS if peers_of(content, [case for case in found if case.dtype == dtype])]
    drawn, panels = figure(len(dtypes), len(PANELS), 4.8, 3.1)
    handles: dict[str, Any] = {}
    for line, dtype in zip(panels, dtypes, strict=True):
        cases = [case for case in found if case.dtype == dtype]
        for axes, (title, outputs) in zip(line, PANELS.items(), strict=True):
            points(axes, content, cases, outputs)
            for x in range(0, len(cases), 2):  # whose marks stand together
                axes.axvspan(x - 0.5, x + 0.5, color="#777777", alpha=0.08, lw=0)
            axes.axhline(EPS[dtype], color="#333333", lw=0.8, ls=":", label="half an ulp of 1")
            axes.set_yscale("log")
            axes.tick_params(axis="y", which="both", labelsize=7)
            axes.margins(y=0.12)
            axes.set_xlim(-0.5, len(cases) - 0.5)
            names = [case.name.removeprefix(dtype).strip() for case in cases]
            axes.set_xticks(range(len(cases)), names, rotation=25, ha="right", fontsize=8)
            axes.set_title(f"{dtype}: {title}", fontsize=10)
            axes.set_ylabel("rms error / rms of the oracle", fontsize=8)
            axes.grid(axis="y", alpha=0.3)
            bars, texts = axes.get_legend_handles_labels()
            handles |= dict(zip(texts, bars, strict=True))
    drawn.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, fontsize=9)
    return finish(
        drawn, f"Errors against float64, median and p20-p80 of {content['settings']['seeds']} seeds (less is better)",
        Record(content["machine"], content["settings"], {}, {}, {}), path,
    )  # fmt: skip
