"""A table as JSON: its rows, what each number may be, and how it is read and written.

A table says where it was made, and has rows (kernel, dtype, head_dim, ragged, causal, seqlen) -> Config. head_dim is a
bucket, the power of two that holds the call's; ragged calls have a head_dim that is no multiple of 16, so that their
rows are not aligned; seqlen is the longest sequence that a row is for; null as ragged, causal or seqlen means any.
Every number is held to an allow-list on reading, those of a Config to what its kernel accepts (`spec.LIMITS`), so a
table can make a call slow, but never wrong: tiles that do not fit are replaced by the formula's, with a warning.
"""

import json
from typing import Any, NamedTuple

from flash.kernels.spec import Config, Configs, check_limits

KERNELS = Configs._fields
HOPPER = ("hopper_forward", "hopper_backward")  # Gluon kernels; their rows are all timed
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}  # bytes of one element
HEAD_DIMS = (16, 32, 64, 128, 256, 512)
SEQLENS: tuple[int, ...] = tuple(2**n for n in range(4, 21))
FORMAT = 1


class Row(NamedTuple):
    """One line of a table.

    Args:
        kernel: one of KERNELS or HOPPER.
        dtype: "float16", "bfloat16", "float32" or "float64".
        head_dim: a power of two, 16 to 512.
        ragged: whether the row is for calls whose head_dim is no multiple of 16; None = both.
        causal: whether the row is for causal calls; None = both.
        seqlen: the longest sequence that the row is for, a power of two; None = any.
        config: what to launch with.
        shared: bytes of shared memory that it takes at most, 0 = unknown.
        spill_bytes: bytes a thread spills, the worst variant.
        ms: median milliseconds of the timed call, 0 = untimed; delta's count with dq, none with dkdv.
    """

    kernel: str
    dtype: str
    head_dim: int
    ragged: bool | None
    causal: bool | None
    seqlen: int | None
    config: Config
    shared: int = 0
    spill_bytes: int = 0
    ms: float = 0.0


class Table(NamedTuple):
    """Rows and where they come from.

    Args:
        target: "cuda:90", "hip:gfx942".
        gpu: name of the GPU that timed it, "" = untimed.
        triton: version of Triton that compiled the candidates.
        kernels: `kernel_hash` of the sources that were timed, "" = untimed; tests compile such rows again.
        timed: whether a GPU timed any row; the others only compile and fit.
        rows: at most one for each (kernel, dtype, head_dim, ragged, causal, seqlen).
    """

    target: str
    gpu: str
    triton: str
    kernels: str
    timed: bool
    rows: tuple[Row, ...]


def parse(text: bytes) -> Table:
    """A table from its JSON, every value checked.

    Args:
        text: UTF-8.

    Returns:
        The table.

    Raises:
        ValueError: it is no JSON, or holds what no table holds.
    """
    data = json.loads(text.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_once)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"a table must be an object of format {FORMAT}")
    words = [data.get(field) for field in ("target", "gpu", "triton")] + [data.get("kernels", "")]
    # what is printed moves no cursor and turns no text around
    if not all(isinstance(word, str) and len(word) <= 200 and word.isprintable() for word in words):
        raise ValueError("target, gpu, triton and kernels must be short strings that can be printed")
    if not isinstance(data.get("timed"), bool):
        raise ValueError("timed must be true or false")
    if not isinstance(data.get("rows"), list):
        raise ValueError("rows must be a list")
    rows = tuple(_row(row) for row in data["rows"])
    if len({row[:6] for row in rows}) != len(rows):
        raise ValueError("two rows say something of the same calls")
    target, gpu, triton, kernels = (str(word) for word in words)
    return Table(target, gpu, triton, kernels, data["timed"], rows)


def _row(data: Any) -> Row:
    if not isinstance(data, dict):
        raise ValueError(f"a row must be an object, got {data!r:.80}")

    def one_of(field: str, allowed: tuple[Any, ...]) -> Any:
        value = data.get(field)
        if not any(type(value) is type(x) and value == x for x in allowed):  # 1 == True, but is no answer
            raise ValueError(f"{field} must be one of {allowed}, got {value!r:.80}")
        return value

    def count(field: str) -> int:
        value = data.get(field, 0)
        if type(value) is not int or not 0 <= value < 2**31:
            raise ValueError(f"{field} must be a count of bytes, got {value!r:.80}")
        return value

    kernel = one_of("kernel", KERNELS + HOPPER)
    config = Config._make(data.get(field, False if field == "ahead" else None) for field in Config._fields)
    check_limits(kernel, config)
    return Row(
        kernel,
        one_of("dtype", tuple(ITEMSIZE)),
        one_of("head_dim", HEAD_DIMS),
        one_of("ragged", (None, False, True)),
        one_of("causal", (None, False, True)),
        one_of("seqlen", (None, *SEQLENS)),
        config,
        count("shared"),
        count("spill_bytes"),
        _milliseconds(data.get("ms", 0.0)),
    )


def _milliseconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e9:
        raise ValueError(f"ms must be a time in milliseconds, got {value!r:.80}")
    return float(value)


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a table's objects must have each name once, got one twice")
    return found


def dump(table: Table) -> str:
    """A table as JSON, one row a line; `parse` reads it back.

    Args:
        table: the table.

    Returns:
        The text, rows in a fixed order.
    """
    order = {name: i for i, name in enumerate((*KERNELS, *HOPPER, *ITEMSIZE))}
    rows = sorted(table.rows, key=lambda row: (order[row.dtype], order[row.kernel], *map(str, row[2:6])))
    rows.sort(key=lambda row: (order[row.dtype], row.head_dim, order[row.kernel]))
    lines = []
    for row in rows:
        fields = row._asdict()
        fields.update(fields.pop("config")._asdict())
        if not fields["ahead"]:
            del fields["ahead"]
        lines.append("    " + json.dumps(fields))
    head = {"format": FORMAT, **{field: value for field, value in table._asdict().items() if field != "rows"}}
    if not table.kernels:
        del head["kernels"]
    start = json.dumps(head, indent=2)[:-2]
    return f'{start},\n  "rows": [\n' + ",\n".join(lines) + "\n  ]\n}\n"
