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
from examples.continuous_batching import Request, serve
from flash.paged import OutOfPages

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


def test_sharded_sequence_runs() -> None:
    text = run("sharded_sequence", "--ranks", "3", "--seqlen", "301", "--steps", "4")
    assert "3 ranks with [101, 100, 100] of 301 characters" in text
    assert number(r"largest difference: (\S+)", text) < 1e-5
    losses = [float(x) for x in re.findall(r"^step +\d+  loss (\S+)", text, re.MULTILINE)]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_generate_runs() -> None:
    text = run("generate", "--steps", "4", "--count", "20", "--temperature", "1")
    assert "the same tokens: yes" in text
    assert re.findall(r"^ *(\w+) .* ms a character", text, re.MULTILINE) == ["standard", "flash", "paged"]
    (line,) = re.findall(r"^The return statement(.*)$", text, re.MULTILINE | re.DOTALL)
    assert len(set(line.partition("\nthe same")[0])) > 5  # not a model that repeats itself


def test_continuous_batching_runs() -> None:
    text = run("continuous_batching", "--requests", "7", "--pages", "7")
    assert "the same text as alone: yes" in text and "free pages: 7" in text
    steps = re.findall(r"^step +\d+  request (\d+) (joined|leaves|waits)", text, re.MULTILINE)
    joined, leaves, waits = ([int(n) for n, what in steps if what == word] for word in ("joined", "leaves", "waits"))
    assert sorted(leaves) == [*range(7)] != leaves  # not in the order that they came
    assert len(joined) == 7 + len(waits) > 7  # who waited joined again
    assert number(r"(\d+) steps in place", text) < number(r"in place of (\d+)", text)


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


def writer(rope_base: float | None) -> gpt.GPT:
    """A model whose weights are large enough that it does not repeat one token."""
    model = gpt.GPT(replace(TINY, rope_base=rope_base, max_seqlen=64)).double().eval()
    for parameter in model.blocks.parameters():
        parameter.data *= 20 if parameter.dim() > 1 else 1
    return model


@torch.no_grad()
def written(model: gpt.GPT, prompt: list[int], count: int) -> list[int]:
    """A prompt and the likeliest tokens after it, without any cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("rope_base", [None, 100.0])
def test_a_gpt_writes_in_pages_what_it_writes_without(rope_base: float | None, page_size: int) -> None:
    model = writer(rope_base)
    prompts = torch.randint(17, (3, 5)).tolist()
    pages = gpt.Pages(model, 3 * -(-24 // page_size), page_size)
    found = gpt.generate(model, torch.tensor(prompts), 20, pages=pages)
    want = [written(model, prompt, 20) for prompt in prompts]
    assert found.tolist() == want and pages.cache.used_pages == 0
    assert all(len(set(tokens[5:])) > 3 for tokens in want)


@pytest.mark.parametrize("rope_base", [None, 100.0])
@pytest.mark.parametrize("pages, waits", [(30, False), (10, True)])
def test_requests_that_share_a_batch_write_what_they_write_alone(
    pages: int, waits: bool, rope_base: float | None
) -> None:  # fmt: skip
    model = writer(rope_base)
    sizes = [(5, 12), (1, 20), (9, 1), (7, 16), (2, 3), (14, 9), (3, 25)]
    prompts = [torch.randint(17, (length,)).tolist() for length, _ in sizes]
    requests = [Request(i, list(prompt), sum(sizes[i])) for i, prompt in enumerate(prompts)]
    held, said = gpt.Pages(model, pages, 4), list[str]()
    steps = serve(model, requests, held, 3, said.append)
    for prompt, (_, count), request in zip(prompts, sizes, requests, strict=True):
        assert request.tokens == written(model, prompt, count)
    assert any("waits" in line for line in said) == waits
    assert steps < sum(count for _, count in sizes) and held.cache.used_pages == 0


def test_a_request_that_can_never_fit_is_refused() -> None:
    model = writer(None)
    for prompt, length in ((9, 10), (3, 12)):  # at once, and after some steps
        with pytest.raises(OutOfPages):
            serve(model, [Request(0, [1] * prompt, length)], gpt.Pages(model, 2, 4), 3, lambda line: None)


@torch.no_grad()
def test_forks_and_rejected_drafts_write_what_they_write_alone() -> None:
    model = writer(100.0)
    pages = gpt.Pages(model, 12, 4)
    prompt = torch.randint(17, (6,)).tolist()

    def step(sequences: list[int], tokens: list[list[int]]) -> torch.Tensor:
        return model(torch.tensor(tokens), pages.layers(sequences, len(tokens[0])))

    one = pages.cache.allocate()
    step([one], [prompt])
    two = pages.cache.fork(one)
    logits = step([one, two], [[3], [5]])[:, 0]
    for b, token in enumerate((3, 5)):
        torch.testing.assert_close(logits[b], model(torch.tensor([[*prompt, token]]))[0, -1])
    drafted = step([one, two], [[1, 2, 4, 8]] * 2)  # as many at once
    pages.cache.rewind(one, 8)
    pages.cache.rewind(two, 9)
    logits = step([one, two], [[7], [9]])[:, 0]
    for b, tokens in enumerate(([3, 1, 7], [5, 1, 2, 9])):
        torch.testing.assert_close(logits[b], model(torch.tensor([prompt + tokens]))[0, -1])
    torch.testing.assert_close(drafted[0], model(torch.tensor([[*prompt, 3, 1, 2, 4, 8]]))[0, -4:])


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
