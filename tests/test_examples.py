"""The examples run as their docstrings say, and what they claim shows."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples import gpt

ROOT = Path(__file__).resolve().parents[1]


def run(example: str, *options: str) -> str:
    """What an example prints, on a CPU and one thread."""
    ended = subprocess.run(
        [sys.executable, "-m", f"examples.{example}", "--device", "cpu", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def number(pattern: str, text: str) -> float:
    """The number that the pattern's group finds."""
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1].replace(",", ""))


def test_gpt_runs() -> None:
    text = run("gpt", "--seqlen", "64", "--block", "32", "32")
    assert 0 < number(r"largest difference of the logits: (\S+)", text) < 1e-5  # float32, and not the same code
    assert number(r"parameters: (\S+)", text) == 6_800_000


def test_generate_runs() -> None:
    text = run("generate", "--steps", "4", "--count", "20", "--temperature", "1")
    assert "the same tokens: yes" in text
    (line,) = re.findall(r"^The return statement(.*)$", text, re.MULTILINE | re.DOTALL)
    assert len(set(line.partition("\nthe same")[0])) > 5  # not a model that repeats itself


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [72, 80])
def test_vit_block_runs(head_dim: int) -> None:
    options = ["--size", "32", "--steps", "4", "--heads", "2", "--layers", "1", "--head-dim", str(head_dim)]
    assert number(r"largest difference of the losses: (\S+)", run("vit_block", *options)) < 1e-5  # nats, float32


@pytest.mark.slow
def test_flash_attention_demo_runs() -> None:
    text = run("flash_attention_demo", "--lengths", "1024", "--threads", "1")
    # three matrices of scores of 4 heads in float32 stand beside the flash tiles
    assert number(r"1024 +(\S+) MB", text) > 2 * 4 * 4 * 1024**2 / 1e6
    assert 50 < number(r"(\d+) %", text) < 100


TINY = gpt.Options(layers=2, width=32, heads=4, heads_k=2, vocabulary=17, max_seqlen=32)


@pytest.mark.parametrize("rope_base", [None, 100.0])
@pytest.mark.parametrize("attention", list(gpt.ATTENTIONS))
def test_a_gpt_writes_with_its_cache_what_it_writes_without(attention: str, rope_base: float | None) -> None:
    model = gpt.GPT(replace(TINY, rope_base=rope_base, dropout=0.5), attention).double()
    tokens = torch.randint(17, (3, 5))
    found = gpt.generate(model, tokens, 9)
    assert model.training
    model.eval()
    for _ in range(9):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, tokens)


def test_a_gpt_is_wrapped_as_it_is(tmp_path: Path) -> None:
    """By DDP and by FSDP, here with one process."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    plain = gpt.GPT(TINY)
    tokens = torch.randint(17, (2, 9))
    want = torch.autograd.grad(plain(tokens).square().sum(), list(plain.parameters()))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        sharded = gpt.GPT(TINY)
        sharded.load_state_dict(plain.state_dict())
        torch.nn.parallel.DistributedDataParallel(plain)(tokens).square().sum().backward()
        for block in sharded.blocks:
            fully_shard(block)
        fully_shard(sharded)(tokens).square().sum().backward()
        grads = [[p.grad for p in plain.parameters()], [p.grad.full_tensor() for p in sharded.parameters()]]
    finally:
        dist.destroy_process_group()
    for got in grads:
        torch.testing.assert_close(got, list(want))


@pytest.mark.slow
def test_the_same_training_with_both_attentions_has_the_same_losses(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs the bench extra")
    picture = tmp_path / "curves.png"
    model = tmp_path / "model.pt"
    options = ["--steps", "3", "--seqlen", "256", "--out", str(picture), "--save", str(model)]
    text = run("train_char_lm", *options)
    assert number(r"largest difference of the losses: (\S+)", text) < 1e-5  # nats; rounding of three steps in float32
    assert len(re.findall(r"\d s, peak memory \d+ MB", text)) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "the same tokens: yes" in run("generate", "--checkpoint", str(model), "--count", "5")


@pytest.mark.integrations
def test_lora_runs() -> None:
    text = run("lora", "--steps", "3", "--seqlen", "96")
    assert number(r"largest difference of the losses: (\S+)", text) < 1e-5  # nats; rounding of three steps in float32
    losses = re.findall(r"loss (\S+) -> (\S+)", text)
    assert len(losses) == 2 and all(float(last) < float(first) for first, last in losses), text


@pytest.mark.integrations
def test_embed_long_documents_runs() -> None:
    text = run("embed_long_documents", "--lengths", "600", "530", "70")
    assert number(r"largest difference of the embeddings: (\S+)", text) < 1e-6  # of vectors of length 1, float32
    peaks = [float(x) for x in re.findall(r"peak memory (\d+) MB", text)]
    assert len(peaks) == 2 and peaks[1] < peaks[0] / 2, text
