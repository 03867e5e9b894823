"""Requests of any length join a running batch and leave it, in one paged cache; each gets the text that it gets alone.

    python -m examples.continuous_batching --requests 12 --running 4 --pages 12

A request joins as soon as there is a place in the batch and there are pages for its prompt, which goes through the
model once; then every step gives each running request one token. Where pages run out, the request that joined last
waits again, and what it has so far is its prompt when it joins.
"""

import argparse
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from examples import gpt
from flash.paged import OutOfPages


@dataclass
class Request:
    """A prompt, and how long it shall become."""

    name: int
    tokens: list[int]  # the prompt, then what is written
    length: int  # of prompt and answer together
    sequence: int = -1  # in the cache, while it runs


@torch.no_grad()
def serve(
    model: gpt.GPT, requests: Sequence[Request], pages: gpt.Pages, running: int, say: Callable[[str], None] = print
) -> int:
    """Lengthen every request by its likeliest tokens, at most so many at a time; returns how many steps it took.

    Raises:
        OutOfPages: there are too few pages for a request that runs alone.
    """
    cache, device = pages.cache, model.token.weight.device
    waiting, batch = deque(requests), list[Request]()
    steps = 0

    def advance(batch: list[Request], new: int) -> list[Request]:
        """Give each request of a batch a token, from its last so many; returns those that want more."""
        layers = pages.layers([request.sequence for request in batch], new)
        tokens = torch.tensor([request.tokens[-new:] for request in batch], device=device)
        for request, token in zip(batch, model(tokens, layers)[:, -1].argmax(-1).tolist(), strict=True):
            request.tokens.append(token)
        for request in batch:
            if len(request.tokens) == request.length:
                cache.free(request.sequence)
                say(f"step {steps:3}  request {request.name} leaves with {request.length} tokens")
        return [request for request in batch if len(request.tokens) < request.length]

    while waiting or batch:
        while waiting and len(batch) < running:
            request = waiting[0]
            request.sequence = cache.allocate()
            try:
                more = advance([request], len(request.tokens))
            except OutOfPages:
                cache.free(request.sequence)
                if not batch:
                    raise
                break
            say(f"step {steps:3}  request {request.name} joined {len(batch)} others")
            waiting.popleft()
            batch += more
        while batch:
            try:
                batch = advance(batch, 1)
                steps += 1
                break
            except OutOfPages:
                if len(batch) == 1:
                    raise
                request = batch.pop()
                cache.free(request.sequence)
                waiting.appendleft(request)
                say(f"step {steps:3}  request {request.name} waits: no page is free")
    return steps


def main() -> None:
    """Serves random prompts to a model that nobody trained, and each again by itself."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--running", type=int, default=4, help="requests in the batch at most")
    parser.add_argument("--pages", type=int, default=12, help="of 16 positions, for all of them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    # float64: sums of a batch are not the sums of a request alone, and rounding must not choose between two tokens
    model = gpt.GPT(replace(gpt.PRESETS["tiny"], vocabulary=512)).to(args.device, torch.float64).eval()
    for parameter in model.blocks.parameters():
        parameter.data *= 5 if parameter.dim() > 1 else 1  # as it begins, a model repeats the last token
    sizes = torch.stack([torch.randint(3, 60, (args.requests,)), torch.randint(5, 40, (args.requests,))], 1).tolist()
    prompts = [torch.randint(512, (prompt,)).tolist() for prompt, _ in sizes]
    requests = [Request(i, list(prompt), sum(sizes[i])) for i, prompt in enumerate(prompts)]
    pages = gpt.Pages(model, args.pages)
    steps = serve(model, requests, pages, args.running)
    same = []
    for prompt, (_, count), request in zip(prompts, sizes, requests, strict=True):
        alone = gpt.generate(model, torch.tensor([prompt], device=args.device), count)
        same.append(alone[0].tolist() == request.tokens)
    print(f"{steps} steps in place of {sum(count - 1 for _, count in sizes)}; free pages: {pages.cache.free_pages}")
    print(f"the same text as alone: {'yes' if all(same) else 'no'}")


if __name__ == "__main__":
    main()
