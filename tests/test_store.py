"""What is written can be read, is this user's alone, and takes the place of nothing but a table."""

import os
from pathlib import Path

import pytest

from flash.autotune import owned, store, sweep
from flash.kernels.spec import Config
from tests.kills import ROWS, SMALL, pretend
from tests.test_faults import one_line
from tests.test_sweep import read, row, table


def test_drafts_of_killed_writers_go_with_the_next_one_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    store.save(path, table(row(16)))
    others = ["table.json2.abcd_123.tmp", "table.json.bad", "other.json.abcd1234.tmp"]
    for name in ["table.json.abcd_123.tmp", *others]:
        (tmp_path / name).touch()
    store.save(path, table(row(32)))
    assert sorted(os.listdir(tmp_path)) == sorted(["table.json", "table.json.lock", *others])


def test_a_table_that_no_reader_would_take_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    store.save(path, table(row(16)))
    for wrong in (
        table(row(32, ms=float("nan"))),
        table(row(32, config=Config(48, 16))),
        table(row(32))._replace(gpu="\n"),
    ):
        with pytest.raises(ValueError, match="must be|no number"):
            store.save(path, wrong)
    assert read(path).rows == (row(16),)


def test_rows_that_others_may_have_written_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    store.save(path, table(row(16)))
    path.chmod(0o666)
    with pytest.warns(RuntimeWarning, match="ignoring the table"):
        store.save(path, table(row(32)))
    assert read(path).rows == (row(32),) and owned.is_private(path.stat())


@pytest.mark.parametrize("what", ["pipe", "folder"])
def test_no_file_takes_the_place_of_a_pipe_a_folder_or_a_device(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, tmp_path / "home")
    output = tmp_path / what
    os.mkfifo(output) if what == "pipe" else output.mkdir()
    kind = output.stat().st_mode
    assert sweep.main([*SMALL, "--output", str(output)]) == 5
    assert f"cannot write {output}" in one_line(capsys)
    assert output.stat().st_mode == kind and os.listdir(tmp_path) == [what]


@pytest.mark.parametrize("name", ["table.journal", "table.lock", "table", "table.json.bad"])
def test_a_table_may_have_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, tmp_path)
    for _ in range(2):
        assert sweep.main([*SMALL, "--output", str(tmp_path / name)]) == 0
        assert len(read(tmp_path / name).rows) == ROWS
    assert sorted(os.listdir(tmp_path)) == sorted([name, f"{name}.lock"])
