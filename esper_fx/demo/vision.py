"""Handwritten digits (scikit-learn's own copy, 1,797 images of 8x8) and a network that is too simple for them.

The network looks at the image in patches of 2x2 pixels and never lets one patch see another: all its layers after the
first are 1x1 convolutions, and the answer is the mean over all places. It knows which strokes there are, not how they
lie to each other. A depthwise convolution gives it just that; a channel gate does not.

Shape letters: B batch, C channels, H and W image sides.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper_fx.demo.task import DemoError, Labelled, Task, Trial

_TRAINING, _VALIDATION = 1200, 297
_BATCH = 256
_CHANNELS = 16


class PatchBlock(nn.Module):
    """A residual multilayer perceptron over the channels of each place, [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.widen = nn.Conv2d(channels, 2 * channels, 1)
        self.narrow = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        delta_BCHW: Tensor = self.narrow(torch.relu(self.widen(self.norm(x_BCHW))))
        return x_BCHW + delta_BCHW


class PatchNet(nn.Module):
    """Classifies a bag of 2x2 patches, float [B, 1, 8, 8] -> logits [B, 10]."""

    def __init__(self, channels: int = _CHANNELS, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 2)
        self.blocks = nn.ModuleList(PatchBlock(channels) for _ in range(depth))
        self.head = nn.Linear(channels, 10)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW: Tensor = self.stem(images_BCHW)
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        logits: Tensor = self.head(x_BCHW.mean(dim=(2, 3)))
        return logits


def digits_task(seed: int) -> Task:
    """The digits, split by a fixed seed whatever `seed` is; `seed` starts the network's weights.

    Raises:
        DemoError: scikit-learn is not installed.
    """
    training, validation, test = _split(*_load())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = PatchNet()

    def sample(generator: torch.Generator) -> Labelled:
        chosen = torch.randint(len(training[0]), (_BATCH,), generator=generator)
        return training[0][chosen], training[1][chosen]

    return Task(
        title="handwritten digits, a network that sees 2x2 patches one by one",
        score=f"{len(test[0])} test images",
        net=net,
        sites="blocks.*",
        trials=(
            Trial("blocks.0", "depthwise_conv", {"kernel_size": 3}),
            Trial("blocks.1", "channel_gate", {"reduction": 4}),
        ),
        learning_rate=2e-3,
        steps=1200,
        sample=sample,
        validation=validation,
        test=test,
    )


def _load() -> Labelled:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DemoError('the digits come with scikit-learn: pip install "esper-fx[demo]"') from error
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)


def _split(images: Tensor, classes: Tensor) -> tuple[Labelled, Labelled, Labelled]:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = order.tensor_split([_TRAINING, _TRAINING + _VALIDATION])
    training, validation, test = ((images[part], classes[part]) for part in parts)
    return training, validation, test
