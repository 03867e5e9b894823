"""A journal is this user's, sweeps at once share it, and what it cannot keep, or says wrongly, costs only time."""

import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from flash.autotune import owned, sweep
from flash.autotune.journal import Journal
from flash.autotune.measure import Job
from tests import kills
from tests.kills import SMALL, Stand, pretend
from tests.test_sweep import fast_when_small, read


def test_a_journal_stays_while_another_sweep_uses_it(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    first, second = Journal(path), Journal(path)
    first.write("a", 1)
    second.write("b", 2)
    first.remove()
    assert Journal(path).entries == {"a": 1, "b": 2}
    third = Journal(path)
    third.write("c", 3)
    second.remove()
    assert Journal(path).entries["c"] == 3
    third.remove()
    assert not path.exists()
    third.write("d", 4)
    assert Journal(path).entries == {"d": 4}


def test_a_journal_that_is_removed_as_it_is_opened_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    stock, removed = owned.lock, []

    def lock(*arguments: Any, **options: Any) -> Any:
        if not removed:
            removed.append(path.unlink())  # type: ignore[func-returns-value]
        return stock(*arguments, **options)

    monkeypatch.setattr(owned, "lock", lock)
    Journal(path).write("a", 1)
    assert Journal(path).entries == {"a": 1}


def put(path: Path, what: str) -> None:
    """Something in a journal's place."""
    if what == "pipe":
        os.mkfifo(path)
    elif what == "link":
        path.with_name("elsewhere").write_text('{"key": "a", "value": 1}\n')
        path.symlink_to(path.with_name("elsewhere"))
    else:
        path.write_text('{"key": "a", "value": 1}\n')
        path.chmod(0o666 if what == "anybody's" else 0o600)
        if what == "gigabyte":
            os.truncate(path, 2**30)


@pytest.mark.parametrize("what", ["pipe", "link", "anybody's", "gigabyte"])
def test_a_journal_that_is_none_of_ours_is_put_aside_with_one_warning(tmp_path: Path, what: str) -> None:
    path = tmp_path / "journal"
    put(path, what)
    tracemalloc.start()
    with pytest.warns(RuntimeWarning, match="ignoring the journal") as seen:
        made = Journal(path)
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()
    assert len(seen) == 1 and made.entries == {}
    made.write("b", 2)
    assert Journal(path).entries == {"b": 2} and os.path.lexists(tmp_path / "journal.bad")
    assert not (tmp_path / "elsewhere").exists() or "b" not in (tmp_path / "elsewhere").read_text()


def test_a_folder_in_a_journals_place_stays(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.mkdir()
    with pytest.warns(RuntimeWarning, match="ignoring the journal") as seen:
        made = Journal(path)
        made.write("a", 1)
        made.remove()
    assert len(seen) == 1 and os.listdir(tmp_path) == ["journal"]


LIES = [
    {"status": "ok", "ms": float("nan")},
    {"status": "ok", "ms": -1.0},
    {"status": "ok", "ms": "0.1"},
    {"status": "ok"},
    {"status": 3},
    [],
    None,
]


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_a_journal_that_says_nonsense_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: Any
) -> None:
    path = pretend(monkeypatch, tmp_path)
    assert sweep.main(SMALL) == 0
    whole = path.read_bytes()
    monkeypatch.setattr(Journal, "remove", lambda journal: None)
    assert sweep.main(SMALL) == 0
    known = Journal(sweep.journal_of(path))
    for key, value in list(known.entries.items()):
        known.write(key, lie if isinstance(value, dict) else [[[48, 64, 4, 1, False], [0, 0, ""]]])
    assert sweep.main(SMALL) == 0
    assert path.read_bytes() == whole


@pytest.mark.parametrize("ms", [float("nan"), float("inf"), 0.0, -1.0, 1e12])
def test_a_time_that_is_none_does_not_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ms: float) -> None:
    def timed(job: Job) -> Any:
        return {"status": "ok", "ms": ms} if job.config.block_m == 16 else fast_when_small(job)

    path = pretend(monkeypatch, tmp_path, Stand(timed))
    assert sweep.main(SMALL) == 0
    assert len(read(path).rows) == kills.ROWS and all(each.config.block_m != 16 for each in read(path).rows)


def test_a_journal_that_has_no_room_is_told_once_and_goes_on_when_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    made = Journal(path)
    made.write("a", 1)
    stock = os.write
    with pytest.warns(RuntimeWarning, match="No space left") as seen:
        monkeypatch.setattr(os, "write", lambda descriptor, text: stock(descriptor, text[:5]))  # as a disk that fills
        made.write("b", 2)
        made.write("c", 3)
    assert len(seen) == 1 and made.entries == {"a": 1, "b": 2, "c": 3}
    monkeypatch.setattr(os, "write", stock)
    made.write("d", 4)
    assert Journal(path).entries == {"a": 1, "d": 4}


@pytest.mark.parametrize("figures", [["a", "b", "c"], [0, -1, ""], [0, True, ""], [0, 2**31, ""], [0.0, 1, ""]])
def test_figures_that_no_compiler_gave_are_found_again(tmp_path: Path, figures: list[Any]) -> None:
    from flash.autotune.offline import Need

    need = Need("forward", "bfloat16", 64, False, None)
    journal = Journal(tmp_path / "journal")
    journal.write("right", [[[64, 32, 4, 2, False], [0, 1024, ""]]])
    journal.write("wrong", [[[64, 32, 4, 2, False], figures]])
    assert sweep.remembered(journal, "right", need)
    assert sweep.remembered(journal, "wrong", need) is None
