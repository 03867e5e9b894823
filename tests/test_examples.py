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


def ran(example: str, *options: str) -> str:
    """What an example prints."""
    ended = subprocess.run(
        [sys.executable, "-m", f"examples.{example}", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.integrations
def test_lora_runs() -> None:
    out = ran("lora", "--steps", "3", "--seqlen", "96", "--device", "cpu")
    difference = re.search(r"largest difference of the losses: (\S+)", out)
    assert difference is not None and float(difference[1]) < 1e-5, out  # nats; rounding of three steps in float32
    losses = re.findall(r"loss (\S+) -> (\S+)", out)
    assert len(losses) == 2 and all(float(last) < float(first) for first, last in losses), out


@pytest.mark.integrations
def test_embed_long_documents_runs() -> None:
    out = ran("embed_long_documents", "--lengths", "600", "530", "70", "--device", "cpu")
    difference = re.search(r"largest difference of the embeddings: (\S+)", out)
    assert difference is not None and float(difference[1]) < 1e-6, out  # of vectors of length 1, float32
    peaks = [float(x) for x in re.findall(r"peak memory (\d+) MB", out)]
    assert len(peaks) == 2 and peaks[1] < peaks[0] / 2, out
