"""Trains a small vision transformer whose heads are 72 or 80 wide, with standard attention and with flash.nn's block.

    python -m examples.vit_block --head-dim 72

Such widths (SigLIP's 72, ViT-H's 80) are no powers of two; flash_attention takes any from 1 to 512 and pads nothing
in memory. The images are synthetic: stripes at an angle, and the model learns which of four angles.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash.nn import TransformerBlock

CLASSES = 4


class StandardBlock(TransformerBlock):
    """The same parameters and the same block, its attention with every score in memory."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x [batch, patches, width] -> the same shape."""
        heads = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind()
        o = (q @ k.mT * self.head_dim**-0.5).softmax(-1) @ v
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class ViT(nn.Module):
    """Patches, blocks, a mean and a linear layer."""

    def __init__(self, block: type[TransformerBlock], head_dim: int, heads: int, layers: int, size: int, patch: int):
        super().__init__()
        width = heads * head_dim
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(block(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """images [batch, 1, size, size] -> logits [batch, CLASSES]."""
        x = self.patches(images).flatten(2).mT + self.position
        return self.head(self.blocks(x).mean(1))


def stripes(batch: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Noisy stripes [batch, 1, size, size] and which angle they have."""
    labels = torch.randint(CLASSES, (batch,))
    angles = labels[:, None, None] * torch.pi / CLASSES
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    phases = 2 * torch.pi * torch.rand(batch, 1, 1)
    images = torch.sin(0.8 * (x * angles.cos() + y * angles.sin()) + phases) + 0.3 * torch.randn(batch, size, size)
    return images[:, None].to(device), labels.to(device)


def main() -> None:
    """Trains once with each attention from one seed and compares the losses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--head-dim", type=int, default=72)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--size", type=int, default=64, help="of an image, in pixels; a patch has 4")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    losses: dict[str, list[float]] = {}
    for name, block in (("standard", StandardBlock), ("flash", TransformerBlock)):
        torch.manual_seed(0)
        model = ViT(block, args.head_dim, args.heads, args.layers, args.size, 4).to(args.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[name] = []
        for _ in range(args.steps):
            images, labels = stripes(16, args.size, args.device)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
        print(f"{name:>9}  loss {losses[name][0]:.4f} -> {losses[name][-1]:.4f}", flush=True)
    difference = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    print(f"largest difference of the losses: {difference:.1e}")


if __name__ == "__main__":
    main()
