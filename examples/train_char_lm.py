"""Trains a small GPT on characters twice from the same seed: with standard attention and with flash_attention.

    python -m examples.train_char_lm

The model is examples/gpt.py, the text the English that every Python carries: the language reference behind `help()`.
Exact attention must give the same training, so the two loss curves lie on each other; what differs is the memory, which
standard attention needs for its [seqlen, seqlen] scores, and the time. Each training runs in a fresh process, so that
its peak memory is its own. With --save the model is kept for examples/generate.py.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F

from examples import gpt


@dataclass(frozen=True)
class Options:
    """What is trained, on what, for how long."""

    device: str
    steps: int
    seqlen: int
    batch: int = 2
    width: int = 128
    heads: int = 4
    layers: int = 2
    learning_rate: float = 5e-4
    seed: int = 0
    threads: int = 2


@dataclass(frozen=True)
class Training:
    """What a training leaves: the loss of each step (nats a character), seconds, and bytes above where it began."""

    losses: list[float]
    seconds: float
    peak_bytes: int | None


def memory(device: str) -> tuple[int, int] | None:
    """Bytes held now and at most so far; None where the system does not say."""
    if device == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    now, most = (1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return now, most


def text_of_python() -> str:
    """The language reference behind `help()`."""
    return "\n".join(topics.values())


def train(name: str, options: Options, save: Path | None = None) -> Training:
    """One training with one attention; everything random comes from the seed, so that all trainings see the same."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    text = text_of_python()
    alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
    data = torch.tensor([alphabet[character] for character in text])

    made = gpt.Options(
        options.layers, options.width, options.heads, options.heads, len(alphabet), options.seqlen, rope_base=None
    )
    model = gpt.GPT(made, name).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    before = memory(options.device)
    losses = []
    start = time.perf_counter()
    for step in range(options.steps):
        starts = torch.randint(len(data) - options.seqlen - 1, (options.batch,)).tolist()
        window = torch.stack([data[i : i + options.seqlen + 1] for i in starts]).to(options.device)
        logits = model(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == options.steps - 1:
            print(f"{name:>9}  step {step:4}  loss {losses[-1]:.4f}", flush=True)
    seconds = time.perf_counter() - start
    after = memory(options.device)
    if save is not None:
        torch.save({"options": asdict(made), "alphabet": "".join(alphabet), "state": model.state_dict()}, save)
    return Training(losses, seconds, after[1] - before[0] if before and after else None)


def draw(trainings: dict[str, Training], options: Options, path: Path) -> None:
    """Losses on each other, time and memory side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), dpi=130, layout="constrained")
    curves, seconds, memory = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    colours = {"standard": "#000000", "flash": "#D55E00"}
    for name, style in (("standard", "-"), ("flash", "--")):
        curves.plot(trainings[name].losses, style, color=colours[name], label=name)
    curves.set(xlabel="step", ylabel="loss, nats a character", title="Training loss")
    curves.legend()
    for axes, title, unit, values in (
        (seconds, "Time of a step", "ms", [1e3 * t.seconds / len(t.losses) for t in trainings.values()]),
        (memory, "Peak memory of training", "MB", [(t.peak_bytes or 0) / 1e6 for t in trainings.values()]),
    ):
        drawn = axes.bar(list(trainings), values, color=[colours[name] for name in trainings])
        axes.bar_label(drawn, fmt="%.0f")
        axes.margins(y=0.1)
        axes.set(title=title, ylabel=unit)
    figure.suptitle(
        f"GPT on characters: {options.layers} layers, {options.heads} heads, seqlen {options.seqlen}, "
        f"batch {options.batch}, {options.device}, {options.threads} threads, torch {torch.__version__}",
        fontsize=11,
    )
    figure.savefig(path)


def main() -> None:
    """Trains once with each attention, compares, draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--save", type=Path, help="keep the model that flash attention trained")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"), help="the picture")
    args = parser.parse_args()
    options = Options(args.device, args.steps, args.seqlen)

    trainings = {}
    for name in gpt.ATTENTIONS:
        # A started process, not a forked one: a fork begins with its parent's memory.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            trainings[name] = process.submit(train, name, options, args.save if name == "flash" else None).result()

    pairs = zip(trainings["standard"].losses, trainings["flash"].losses, strict=True)
    print(f"largest difference of the losses: {max(abs(a - b) for a, b in pairs):.1e}")
    for name, training in trainings.items():
        peak = "not readable" if training.peak_bytes is None else f"{training.peak_bytes / 1e6:.0f} MB"
        print(f"{name:>9}  {training.seconds:.1f} s, peak memory {peak}")
    draw(trainings, options, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
