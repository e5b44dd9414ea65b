"""A byte-level transformer of half a million parameters in plain torch: pre-norm, causal, rotary positions.

The parameters of block 2 are called `blocks.2.<...>`: that is all `EPIAdamW(layers="block")` needs to find
the layers of a model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

BYTES = 256  # the vocabulary: one token per byte value


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn pairs of channels by an angle that grows with the position: x [..., time, 2 pairs], angles [time, pairs]."""
    left, right = x.chunk(2, -1)
    return torch.cat((left * cosine - right * sine, left * sine + right * cosine), -1)


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions, [batch, time, width] -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Mix every position with those before it."""
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [batch, heads, time, width / heads]
            for project in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(
            rotate(query, *rotation), rotate(key, *rotation), value, is_causal=True
        )
        return self.output(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One pre-norm transformer block, [batch, time, width] -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Attend, then transform each position by itself."""
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.mlp(self.mlp_norm(x))


class ByteTransformer(nn.Module):
    """Byte values [batch, time] (int64, time <= context) -> logits of the next byte [batch, time, 256]."""

    def __init__(self, context: int, width: int = 96, blocks: int = 4, heads: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        pairs = width // heads // 2
        # learned positions need twice the steps before any head finds the byte before; base 100 suits a short context
        angle = torch.outer(torch.arange(context), 100.0 ** (-torch.arange(pairs) / pairs))
        self.register_buffer("cosine", angle.cos(), persistent=False)
        self.register_buffer("sine", angle.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                # below 0.06 or above 0.12 a few hundred steps do not get past letter frequencies
                nn.init.normal_(parameter, std=0.08)

    def forward(self, x: Tensor) -> Tensor:
        """Predict the byte after every position."""
        x = self.embedding(x)
        rotation = self.cosine[: x.shape[1]], self.sine[: x.shape[1]]
        for block in self.blocks:
            x = block(x, rotation)
        return self.head(self.norm(x))
