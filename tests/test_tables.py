"""Look-up is a pure function that always answers, and a table can make a call slow, never wrong."""

import itertools
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flash.autotune import store, tables
from flash.kernels.spec import Config, check_limits

GPU = "NVIDIA H200"
TARGETS = ("cuda:75", "cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942", "hip:gfx1100")
ROW = tables.Row("forward", "bfloat16", 64, None, None, None, Config(64, 32, 4, 2), 1000, 8)


def table(*rows: tables.Row, **fields: Any) -> tables.Table:
    made = tables.Table("cuda:90", GPU, "3.7.1", tables.kernel_hash(), True, rows or (ROW,))
    return made._replace(**fields)


def forget() -> None:
    for cached in (tables._choose, tables.shipped_table, tables.user_table):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this machine's tables are."""
    monkeypatch.setattr(tables, "user_folder", lambda: tmp_path)
    monkeypatch.setattr(tables, "triton_version", lambda: "3.7.1")
    return tmp_path


def look(**changes: Any) -> tables.Choice:
    call = {"target": "cuda:90", "kernel": "forward", "dtype": "bfloat16", "head_dim": 64, "seqlen": 500}
    return tables.lookup(**{**call, "causal": False, **changes})


@pytest.mark.parametrize("target", [*TARGETS, "cuda:999", "hip:gfx000", "interpreter"])
def test_every_call_gets_an_allowed_config_and_a_reason(target: str) -> None:
    for kernel in tables.KERNELS:
        for dtype in tables.ITEMSIZE:
            for head_dim in (1, 16, 17, 40, 64, 80, 128, 200, 512):
                for causal in (False, True):
                    config, reason = tables.lookup(target, kernel, dtype, head_dim, 0, causal)
                    assert isinstance(config, Config)
                    check_limits(kernel, config)
                    assert reason


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"kernel": "backward"}, "kernel"), ({"dtype": "int8"}, "dtype"), ({"head_dim": 513}, "head_dim"),
     ({"head_dim": 0}, "head_dim")],
)  # fmt: skip
def test_what_no_call_asks_for_is_named(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        look(**changes)


def test_table_of_this_machine_is_preferred_and_says_so(folder: Path) -> None:
    store.save(folder / tables.user_table_name("cuda:90", GPU), table(ROW._replace(config=Config(16, 16, 2, 5))))
    assert look(gpu=GPU) == (Config(16, 16, 2, 5), f"timed on this machine's {GPU}")
    assert look().config != Config(16, 16, 2, 5)
    assert look(gpu="NVIDIA H100").config != Config(16, 16, 2, 5)


@pytest.mark.parametrize("other", ["another", ""])
@pytest.mark.parametrize("field", ["target", "gpu", "triton", "kernels"])
def test_table_of_another_machine_compiler_or_source_is_left_out_with_a_warning(
    folder: Path, field: str, other: str
) -> None:
    path = folder / tables.user_table_name("cuda:90", GPU)
    store.save(path, table(ROW._replace(config=Config(16, 16, 2, 5)), **{field: other}))
    with pytest.warns(RuntimeWarning, match=f"{field} must be") as seen:
        assert look(gpu=GPU).config != Config(16, 16, 2, 5)
        look(gpu=GPU, seqlen=9000)
    assert len(seen) == 1


def test_most_particular_row_of_the_nearest_length_wins(folder: Path) -> None:
    rows = {
        (None, None, None): Config(16, 16),
        (None, True, None): Config(16, 32),
        (None, True, 1024): Config(32, 16),
        (None, True, 4096): Config(32, 32),
        (True, None, None): Config(64, 16),
        (None, False, 1024): Config(64, 32),
    }
    made = [tables.Row("forward", "bfloat16", 64, *key, config) for key, config in rows.items()]
    store.save(folder / tables.user_table_name("cuda:90", GPU), table(*made))

    def config(**changes: Any) -> Config:
        return look(gpu=GPU, **changes).config

    assert config(causal=True, seqlen=0) == Config(32, 16)
    assert config(causal=True, seqlen=1024) == Config(32, 16)
    assert config(causal=True, seqlen=1025) == Config(32, 32)
    assert config(causal=True, seqlen=5000) == Config(16, 32)
    assert config(causal=False, seqlen=2**40) == Config(64, 32)
    assert config(causal=True, head_dim=40) == Config(64, 16)
    assert config(causal=True, head_dim=48, seqlen=4000) == Config(32, 32)


def test_target_without_a_table_takes_the_nearest_rows_that_fit_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tables").mkdir()
    monkeypatch.setattr(tables, "__file__", str(tmp_path / "tables.py"))
    small = ROW._replace(shared=99 * tables.KiB)
    large = ROW._replace(head_dim=128, shared=99 * tables.KiB + 1)
    store.save(tmp_path / "tables" / "cuda_80.json", table(small, large, target="cuda:80"))
    fits, too_large = look(target="cuda:89"), look(target="cuda:89", head_dim=128)
    assert fits.config == ROW.config and "cuda:80" in fits.reason and "99 KiB" in fits.reason
    assert too_large == (tables.heuristic("cuda:89", "forward", "bfloat16", 128), too_large.reason)
    assert "formula" in too_large.reason
    assert "formula" in look(target="cuda:90").reason


def test_interpreter_gets_small_tiles() -> None:
    assert look(target="interpreter").config == Config(32, 32, 4, 1)
    assert look(target="interpreter", head_dim=256).config == Config(16, 16, 4, 1)


def test_amd_float64_says_which_triton_it_waits_for() -> None:
    assert "3.9" in look(target="hip:gfx942", dtype="float64").reason


@pytest.mark.parametrize("target", TARGETS)
def test_formula_gives_longer_heads_no_larger_tiles(target: str) -> None:
    for kernel in tables.KERNELS:
        for dtype in tables.ITEMSIZE:
            areas = [
                c.block_m * c.block_n for d in tables.HEAD_DIMS for c in [tables.heuristic(target, kernel, dtype, d)]
            ]
            assert areas == sorted(areas, reverse=True)


def test_written_tables_read_back() -> None:
    made = table(ROW, ROW._replace(causal=True, seqlen=2048, ms=0.25), ROW._replace(kernel="dq", spill_bytes=0))
    again = tables.parse(tables.dump(made).encode())
    assert set(again.rows) == set(made.rows) and again._replace(rows=()) == made._replace(rows=())
    assert tables.parse(tables.dump(table()._replace(rows=())).encode()).rows == ()


def test_a_table_that_nobody_timed_names_no_sources() -> None:
    made = table(kernels="", gpu="", timed=False)
    text = tables.dump(made)
    assert "kernels" not in json.loads(text) and tables.parse(text.encode()) == made


def edited(**changes: Any) -> bytes:
    data = json.loads(tables.dump(table()))
    data["rows"][0].update(changes)
    return json.dumps(data).encode()


HEAD = b'{"format": 1, "target": "", "gpu": "", "triton": "", "kernels": "", "timed": true'
HOSTILE = {
    "empty": b"",
    "cut": tables.dump(table()).encode()[:-20],
    "zeros": b"\0" * 100,
    "no object": b"[1, 2]",
    "deep": b"[" * 200_000,
    "not UTF-8": b"\xff\xfe",
    "NaN": edited(ms=float("nan")),
    "huge number": edited(block_m=10**400),
    "block of 48": edited(block_m=48),
    "true as a number of warps": edited(num_warps=True),
    "float block": edited(block_n=64.0),
    "text": edited(num_stages="2; import os"),
    "Hopper forward of half a warpgroup": edited(kernel="hopper_forward", block_m=64, num_warps=8),
    "Hopper forward of mixed warpgroups": edited(kernel="hopper_forward", block_m=192, num_warps=8),
    "Hopper backward of a forward's tiles": edited(kernel="hopper_backward", block_m=128, block_n=128, num_warps=8),
    "negative spill": edited(spill_bytes=-1),
    "unknown kernel": edited(kernel="../forward"),
    "list as causal": edited(causal=[]),
    "number as causal": edited(causal=0),
    "too large": b" " * (tables.LARGEST_FILE + 1),
    "other format": tables.dump(table()).replace('"format": 1', '"format": 2').encode(),
    "no rows": HEAD + b"}",
    "row of numbers": HEAD + b', "rows": [1]}',
    "more digits than Python reads": HEAD + b', "rows": [' + b"9" * 5000 + b"]}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_file_is_left_out_with_one_warning(folder: Path, text: bytes) -> None:
    path = folder / tables.user_table_name("cuda:90", GPU)
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.warns(RuntimeWarning, match="ignoring the table") as seen:
        choice = look(gpu=GPU)
        assert look(gpu=GPU, causal=True)
    assert len(seen) == 1
    assert choice == look()


@pytest.mark.parametrize("kernel", tables.HOPPER)
def test_a_row_of_a_hopper_kernel_is_read_where_the_kernel_accepts_its_tiles(kernel: str) -> None:
    pytest.importorskip("triton.experimental.gluon")
    from flash.kernels import hopper_backward, hopper_forward

    module = hopper_forward if kernel == "hopper_forward" else hopper_backward
    read = 0
    for block_m, block_n, num_warps in itertools.product((16, 32, 64, 128, 192, 256), (64, 128), (2, 4, 8, 12, 16)):
        config = Config(block_m, block_n, num_warps, 2)
        made = edited(kernel=kernel, **config._asdict())
        try:
            module.options_of(config)
        except ValueError:
            with pytest.raises(ValueError, match="num_warps|block_m|block_n"):
                tables.parse(made)
        else:
            read += tables.parse(made).rows[0].config == config
    assert read == {"hopper_forward": 4, "hopper_backward": 1}[kernel]


@pytest.mark.parametrize("word", ["\\u001b[2J", "\\ud800", "\\u202e", "\\n", "a" * 201])
def test_words_that_a_terminal_does_not_print_are_refused(word: str) -> None:
    for field, value in (("gpu", GPU), ("triton", "3.7.1"), ("target", "cuda:90"), ("kernels", tables.kernel_hash())):
        with pytest.raises(ValueError, match="can be printed"):
            tables.parse(tables.dump(table()).replace(f'"{field}": "{value}"', f'"{field}": "{word}"').encode())


def test_a_name_twice_in_an_object_is_refused() -> None:
    text = tables.dump(table())
    for once, twice in (('"timed"', '"timed": false, "timed"'), ('"kernel"', '"kernel": "dq", "kernel"')):
        with pytest.raises(ValueError, match="each name once"):
            tables.parse(text.replace(once, twice).encode())


def test_nothing_is_said_where_there_can_be_no_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "home").touch()
    for absent in (folder / "absent", folder / "home" / "cache"):
        monkeypatch.setattr(tables, "user_folder", lambda absent=absent: absent)
        forget()
        assert look(gpu=GPU) == look()


def test_same_calls_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="two rows"):
        tables.parse(tables.dump(table(ROW, ROW._replace(config=Config(16, 16)))).encode())


def test_any_damage_is_read_as_a_valid_table_or_refused() -> None:
    text = tables.dump(table(ROW, ROW._replace(kernel="dq"), ROW._replace(dtype="float32"))).encode()
    dice = random.Random(0)
    read = 0
    for _ in range(1000):
        damaged = bytearray(text)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(len(damaged))] = dice.choice(b'\0"0123456789,:{}[]-eEntf')
        try:
            made = tables.parse(bytes(damaged))
        except ValueError:
            continue
        read += 1
        for row in made.rows:
            check_limits(row.kernel, row.config)
    assert 0 < read < 1000


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX permissions")
def test_file_that_others_may_write_or_link_is_left_out(folder: Path) -> None:
    path = folder / tables.user_table_name("cuda:90", GPU)
    store.save(path, table())
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o666)
    with pytest.warns(RuntimeWarning, match="belong to this user"):
        assert look(gpu=GPU) == look()
    forget()
    moved = shutil.move(path, folder / "elsewhere.json")
    path.symlink_to(moved)
    with pytest.warns(RuntimeWarning, match="ignoring the table"):
        assert look(gpu=GPU) == look()


def test_shipped_tables_are_sound_and_untimed_unless_they_name_a_gpu_and_its_kernels() -> None:
    paths = sorted((Path(tables.__file__).parent / "tables").glob("*.json"))
    targets = []
    for path in paths:
        made = tables.parse(path.read_bytes())
        targets.append(made.target)
        assert path.name == tables.table_name(made.target)
        assert made.timed == any(row.ms > 0 for row in made.rows) == bool(made.gpu) == bool(made.kernels)
        assert all(0 < row.shared <= tables.shared_limit(made.target) for row in made.rows)
    assert set(targets) >= {"cuda:80", "cuda:90", "cuda:100", "hip:gfx942"}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kernel", tables.KERNELS)
def test_no_formula_chooses_for_half_precision_on_a_gpu_of_today(
    kernel: str, dtype: str, head_dim: int, causal: bool
) -> None:
    own = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
    near = {"cuda:103": "cuda:100", "cuda:120": "cuda:80", "cuda:121": "cuda:80", "hip:gfx950": "hip:gfx942"}
    said = {target: f"shipped table of {target}" for target in own} | {
        target: f"the row of {other}, untimed, fits" for target, other in near.items()
    }
    for target, words in said.items():
        assert words in tables.lookup(target, kernel, dtype, head_dim, 4096, causal).reason


def test_no_call_waits_for_a_file_that_is_no_table(folder: Path) -> None:
    os.mkfifo(folder / tables.user_table_name("cuda:90", GPU))
    with pytest.warns(RuntimeWarning, match="it must be a file"):
        assert look(gpu=GPU) == look()


def test_tables_hold_no_code() -> None:
    for path in Path(tables.__file__).parent.glob("*.py"):
        words = path.read_text(encoding="utf-8")
        assert not any(word in words for word in ("pickle", "eval(", "exec(", "torch.load", "yaml"))
