"""The examples run as their docstrings say, and what they claim shows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_same_training_with_both_attentions_has_the_same_losses(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs the bench extra")
    picture = tmp_path / "curves.png"
    options = ["--steps", "3", "--seqlen", "256", "--device", "cpu", "--out", str(picture)]
    ended = subprocess.run(
        [sys.executable, "-m", "examples.train_char_lm", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    difference = re.search(r"largest difference of the losses: (\S+)", ended.stdout)
    assert difference is not None, ended.stdout
    assert float(difference[1]) < 1e-5  # nats; rounding of three steps in float32
    assert len(re.findall(r"\d s, peak memory \d+ MB", ended.stdout)) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
