"""The two models that tests and benchmarks share: a causal transformer and a residual CNN.

Both keep their repeated part in an `nn.ModuleList` named `blocks`, so that `sites="blocks.*"` means the same in either.
Every function draws from a seed of its own and leaves the global random state as it was.

Shape letters: B batch, T tokens, D features, V vocabulary, C channels, H and W image sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Example(NamedTuple):
    """A model with one batch and its loss: `loss(model(*inputs))` is a scalar that can be differentiated."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    loss: Callable[[Tensor], Tensor]


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention, [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        qkv = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        result_BTD: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result_BTD


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual, [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        x_BTD = x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))
        return x_BTD


class Transformer(nn.Module):
    """Causal language model, token ids int64 [B, T] -> logits [B, T, V]. No dropout."""

    def __init__(self, *, vocabulary: int, width: int, depth: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD: Tensor = self.token_embedding(ids_BT) + self.position_embedding
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits: Tensor = self.head(self.norm(x_BTD))
        return logits


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a residual, [B, C, H, W] -> [B, C', H / stride, W / stride]."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden = torch.relu(self.norm1(self.conv1(x_BCHW)))
        return torch.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x_BCHW))


class ResidualCNN(nn.Module):
    """Image classifier, float [B, 3, H, W] -> logits [B, classes]. `blocks` holds all stages one after another."""

    def __init__(self, *, channels: tuple[int, ...], blocks_per_stage: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels[0])
        blocks: list[nn.Module] = []
        previous = channels[0]
        for stage, width in enumerate(channels):
            for index in range(blocks_per_stage):
                blocks.append(ResidualBlock(previous, width, stride=2 if stage > 0 and index == 0 else 1))
                previous = width
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(previous, classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = torch.relu(self.stem_norm(self.stem(x_BCHW)))
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        logits: Tensor = self.head(x_BCHW.mean(dim=(2, 3)))
        return logits


def transformer(
    *,
    vocabulary: int = 256,
    width: int = 256,
    depth: int = 6,
    heads: int = 4,
    tokens: int = 64,
    batch: int = 8,
    seed: int = 0,
) -> Example:
    """The benchmark's causal transformer with random token ids; the loss is next-token cross-entropy.

    The defaults are the benchmarked size. Tests pass smaller ones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(vocabulary=vocabulary, width=width, depth=depth, heads=heads, tokens=tokens)
        ids = torch.randint(vocabulary, (batch, tokens))

    def loss(logits_BTV: Tensor) -> Tensor:
        return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids.to(logits_BTV.device)[:, 1:].flatten())

    return Example(model, (ids,), loss)


def residual_cnn(
    *,
    channels: tuple[int, ...] = (32, 64, 128),
    blocks_per_stage: int = 3,
    classes: int = 10,
    size: int = 32,
    batch: int = 32,
    seed: int = 0,
) -> Example:
    """The benchmark's residual CNN with random images and labels; the loss is cross-entropy.

    The defaults are the benchmarked size. Tests pass smaller ones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResidualCNN(channels=channels, blocks_per_stage=blocks_per_stage, classes=classes)
        images = torch.randn(batch, 3, size, size)
        labels = torch.randint(classes, (batch,))

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels.to(logits.device))

    return Example(model, (images,), loss)
