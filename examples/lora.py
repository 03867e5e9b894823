"""Fine-tunes a small Llama with LoRA twice from the same seed: with its own attention, and with flash_attention.

    pip install "flash-triton[transformers]" peft
    python -m examples.lora

One line differs, `enable(model)`, and the losses do not. The model has random weights, so that nothing is downloaded:
put a pretrained one in its place. The text is the English that every Python carries, a token a byte.
"""

import argparse
import time
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from flash.integrations.transformers import enable


def small_llama(seqlen: int) -> LlamaForCausalLM:
    """A Llama of 8 query and 2 key heads, with random weights and the attention of its authors."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=seqlen, use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def fine_tune(flash: bool, device: str, steps: int, seqlen: int, batch: int = 2) -> list[float]:
    """The loss of each step, in nats a byte."""
    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(small_llama(seqlen), lora).to(device)
    if flash:
        enable(model)
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    text = torch.frombuffer(bytearray("\n".join(topics.values()), "utf-8"), dtype=torch.uint8)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - seqlen, (batch,)).tolist()
        ids = torch.stack([text[i : i + seqlen] for i in starts]).long().to(device)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Fine-tunes with each attention and compares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()

    losses = {}
    for name, flash in (("standard", False), ("flash", True)):
        start = time.perf_counter()
        losses[name] = fine_tune(flash, args.device, args.steps, args.seqlen)
        seconds = time.perf_counter() - start
        print(f"{name:>9}  loss {losses[name][0]:.4f} -> {losses[name][-1]:.4f}  {seconds:.1f} s")
    pairs = zip(losses["standard"], losses["flash"], strict=True)
    print(f"largest difference of the losses: {max(abs(a - b) for a, b in pairs):.1e}")


if __name__ == "__main__":
    main()
