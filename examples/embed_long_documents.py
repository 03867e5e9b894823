"""Embeds documents far longer than 512 tokens with a BERT, by its own attention and by flash_attention.

    pip install "flash-triton[transformers]"
    python -m examples.embed_long_documents

A batch of documents of different lengths is padded; an embedding is the mean of the last hidden states of a document's
own tokens. `enable(model, min_seqlen=512)` leaves short inputs to the model's own attention, which has little to gain
there, and serves the long ones, where standard attention needs memory for [seqlen, seqlen] scores of every head.

The model has random weights and long position embeddings, so that nothing is downloaded: put a pretrained long-context
embedding model in its place. Each run has a process of its own, so that its peak memory is its own.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertModel

from examples.train_char_lm import memory
from flash.integrations.transformers import enable

ATTENTIONS = ("standard", "flash")


@dataclass(frozen=True)
class Run:
    """What a run leaves: the embeddings [documents, width], seconds, and bytes above where it began."""

    embeddings: Tensor
    seconds: float
    peak_bytes: int | None


def documents(lengths: tuple[int, ...]) -> list[Tensor]:
    """Bytes of the language reference behind `help()`, one document for each length."""
    text = torch.frombuffer(bytearray("\n".join(topics.values()), "utf-8"), dtype=torch.uint8).long()
    return [text[1000 * n : 1000 * n + length] for n, length in enumerate(lengths)]


def embed(model: BertModel, batch: list[Tensor]) -> Tensor:
    """Mean of the hidden states of each document's own tokens, of length 1: [documents, width]."""
    device = next(model.parameters()).device
    ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(device)
    lengths = torch.tensor([len(document) for document in batch], device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    with torch.inference_mode():
        hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / lengths[:, None]
    return F.normalize(mean, dim=-1)


def run(attention: str, device: str, lengths: tuple[int, ...], min_seqlen: int) -> Run:
    """Embed the documents with one attention; the weights are the same each time."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        max_position_embeddings=max(lengths),
    )  # fmt: skip
    model = BertModel._from_config(config, attn_implementation="eager").eval().to(device)
    if attention == "flash":
        enable(model, min_seqlen=min_seqlen)
    batch = documents(lengths)
    embed(model, [document[:16] for document in batch])  # what is set up once is not counted
    before, start = memory(device), time.perf_counter()
    embeddings = embed(model, batch).cpu()
    seconds, after = time.perf_counter() - start, memory(device)
    return Run(embeddings, seconds, after[1] - before[0] if before and after else None)


def main() -> None:
    """Embeds with each attention, in a process of its own, and compares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 1500, 900, 600])
    parser.add_argument("--min-seqlen", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()

    runs = {}
    for attention in ATTENTIONS:
        # A started process, not a forked one: a fork begins with its parent's memory.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            found = process.submit(run, attention, args.device, tuple(args.lengths), args.min_seqlen).result()
        runs[attention] = found
        peak = "not readable" if found.peak_bytes is None else f"{found.peak_bytes / 1e6:.0f} MB"
        print(f"{attention:>9}  {found.seconds:.2f} s, peak memory {peak}")
    difference = (runs["standard"].embeddings - runs["flash"].embeddings).abs().max()
    print(f"largest difference of the embeddings: {difference:.1e}")


if __name__ == "__main__":
    main()
