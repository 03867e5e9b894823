"""Writes text with a small GPT and a cache of keys and values: standard attention, flash_attention, and a paged cache.

    python -m examples.train_char_lm --save model.pt
    python -m examples.generate --checkpoint model.pt --prompt "The return statement" --count 200

Without a checkpoint a model is trained here first, for --steps steps on the same text. Exact attention picks the same
tokens; all three are timed and compared. The first two concatenate their caches at every step; flash_attention_decode
appends to pages in place (flash.paged.PagedCache). `examples.continuous_batching` has many requests in one such cache.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from examples import gpt
from examples.train_char_lm import text_of_python


def load(path: Path) -> tuple[gpt.Options, str, dict[str, torch.Tensor]]:
    """Options, alphabet and parameters that train_char_lm has saved."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    return gpt.Options(**saved["options"]), saved["alphabet"], saved["state"]


def train(steps: int, device: str) -> tuple[gpt.Options, str, dict[str, torch.Tensor]]:
    """The same of a model with rotary positions and shared key heads, after some steps with flash attention."""
    text = text_of_python()
    alphabet = "".join(sorted(set(text)))
    data = torch.tensor([alphabet.index(character) for character in text[:200_000]])
    options = replace(gpt.PRESETS["tiny"], vocabulary=len(alphabet))
    model = gpt.GPT(options).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        windows = data.unfold(0, 129, 1)[torch.randint(len(data) - 128, (8,))].to(device)
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4}  loss {loss.item():.4f}", flush=True)
    return options, alphabet, {name: x.cpu() for name, x in model.state_dict().items()}


def main() -> None:
    """Generates with each attention and compares the tokens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="what train_char_lm --save wrote; otherwise one is trained")
    parser.add_argument("--steps", type=int, default=200, help="of that training")
    parser.add_argument("--prompt", default="The return statement")
    parser.add_argument("--count", type=int, default=200, help="characters to write")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest character")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    options, alphabet, state = load(args.checkpoint) if args.checkpoint else train(args.steps, args.device)
    if any(character not in alphabet for character in args.prompt):
        parser.error(f"the prompt must be of the characters that the model knows: {alphabet!r}")
    prompt = torch.tensor([[alphabet.index(character) for character in args.prompt]], device=args.device)

    written = {}
    for name in (*gpt.ATTENTIONS, "paged"):
        model = gpt.GPT(options, "flash" if name == "paged" else name).to(args.device)
        model.load_state_dict(state)
        length = prompt.shape[1] + args.count
        pages = gpt.Pages(model, -(-length // 16)) if name == "paged" else None
        torch.manual_seed(0)
        start = time.perf_counter()
        written[name] = gpt.generate(model, prompt, args.count, args.temperature, pages)
        print(f"{name:>9}  {1e3 * (time.perf_counter() - start) / args.count:.1f} ms a character")
    print("".join(alphabet[token] for token in written["flash"][0].tolist()))
    same = all(torch.equal(tokens, written["standard"]) for tokens in written.values())
    print(f"the same tokens: {'yes' if same else 'no'}")


if __name__ == "__main__":
    main()
