"""Results that cannot be written are not lost, and files are whole."""

import os
from pathlib import Path

import pytest

from bench import overhead, run, scale_suite
from bench.peers import OURS
from bench.record import write_whole
from tests.test_bench_scale import invented
from tests.test_faults import one_line, small_files


def test_results_that_cannot_be_written_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the bench extra")
    pytest.importorskip("tqdm", reason="the progress bar needs the bench extra")
    (tmp_path / "file").touch()
    arguments = ["--suite", "decode", "--quick", "--device", "cpu", "--threads", "1", "--cases", "b2 k64 gqa4"]
    assert run.main([*arguments, "--peers", OURS, "--out", str(tmp_path / "file" / "out")]) == 5
    out, err = capsys.readouterr()
    assert "| 8 / 2           |     2 |   64 |" in out and err.rstrip().splitlines()[-1].startswith("cannot write")
    (tmp_path / "decode.json").write_text("{")
    assert run.main([*arguments, "--peers", OURS, "--out", str(tmp_path), "--resume"]) == 2
    assert "cannot resume from" in one_line(capsys)
    assert (tmp_path / "decode.json").read_text() == "{"


@pytest.mark.slow
def test_suites_of_their_own_print_what_they_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the bench extra")
    (tmp_path / "file").touch()
    monkeypatch.setattr(overhead, "pretend", lambda: None)
    monkeypatch.setattr(overhead, "rows", lambda device: {})
    monkeypatch.setattr(overhead, "rounds_of", lambda rows: {"scaled_dot_product_attention": [1.5, 1.6]})
    monkeypatch.setattr(scale_suite, "measured", lambda *settings, **options: invented())
    for suite, words in (("overhead", "scaled_dot_product_attention"), ("scale", "What is simulated")):
        assert run.main(["--suite", suite, "--out", str(tmp_path / "file" / "out")]) == 5
        out, err = capsys.readouterr()
        assert words in out and err.count("\n") == 1 and err.startswith("cannot write")


def test_a_record_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_whole(path, "old")
    with small_files(1000), pytest.raises(OSError, match="too large"):
        write_whole(path, "new" * 1000)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]
