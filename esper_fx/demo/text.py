"""Python's standard library as text, and a small causal transformer that guesses the next character of it.

The transformer has attention only: it can look characters up but computes little with what it finds, because it has
no feed-forward layers. A bottleneck is one; a channel gate is not.

Shape letters: B batch, T tokens (characters), D features.
"""

from __future__ import annotations

import string
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_fx.demo.task import DemoError, Labelled, Task, Trial

_ALPHABET = "\n" + "".join(sorted(set(string.printable) - set(string.whitespace))) + " "
_OTHER = len(_ALPHABET)
_TOKENS = 64
_BATCH = 16
_EVALUATED_WINDOWS = 256
_LEAST_CHARACTERS = 200_000


class Attention(nn.Module):
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


class Block(nn.Module):
    """Attention with a residual, and no feed-forward layer, [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)

    def forward(self, x_BTD: Tensor) -> Tensor:
        mixed_BTD: Tensor = self.attention(self.norm(x_BTD))
        return x_BTD + mixed_BTD


class CharacterModel(nn.Module):
    """Characters int64 [B, T] -> logits of the next one [B, T, characters]."""

    def __init__(self, width: int = 48, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(_ALPHABET) + 1, width)
        self.position = nn.Parameter(torch.randn(_TOKENS, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(_ALPHABET) + 1)

    def forward(self, characters_BT: Tensor) -> Tensor:
        x_BTD: Tensor = self.embedding(characters_BT) + self.position
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits: Tensor = self.head(self.norm(x_BTD))
        return logits


def text_task(seed: int) -> Task:
    """The standard library's files, every tenth held out for the test; `seed` starts the network's weights.

    Raises:
        DemoError: This Python has no source files of its standard library.
    """
    training, validation, test = _load(Path(sysconfig.get_path("stdlib")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = CharacterModel()

    return Task(
        title="the next character of Python's standard library, a transformer without feed-forward layers",
        score=f"{_EVALUATED_WINDOWS * _TOKENS:,} characters of held-out files",
        net=net,
        sites="blocks.*",
        trials=(Trial("blocks.1", "bottleneck", {"width": 192}), Trial("blocks.0", "channel_gate", {"reduction": 4})),
        learning_rate=2e-3,
        steps=1200,
        sample=lambda generator: _windows(training, _BATCH, generator),
        validation=_windows(validation, _EVALUATED_WINDOWS, torch.Generator().manual_seed(1)),
        test=_windows(test, _EVALUATED_WINDOWS, torch.Generator().manual_seed(2)),
    )


def _load(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Characters of the files: 8 in 10 to train, 1 to decide, 1 to test."""
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for index, path in enumerate(sorted(folder.glob("*.py"))):
        parts[{8: 1, 9: 2}.get(index % 10, 0)].append(path.read_text(encoding="utf-8", errors="replace"))
    training, validation, test = (_encode("\n".join(part)) for part in parts)
    if min(len(training), len(validation) * 8, len(test) * 8) < _LEAST_CHARACTERS:
        raise DemoError(f"{folder} holds too few source files of the standard library; run the demo without --text")
    return training, validation, test


def _encode(text: str) -> Tensor:
    codes = {character: code for code, character in enumerate(_ALPHABET)}
    return torch.tensor([codes.get(character, _OTHER) for character in text], dtype=torch.int64)


def _windows(text: Tensor, count: int, generator: torch.Generator) -> Labelled:
    """`count` random windows, and the same moved on by one character, both [count, T]."""
    starts = torch.randint(len(text) - _TOKENS, (count, 1), generator=generator)
    places = starts + torch.arange(_TOKENS)
    return text[places], text[places + 1]
