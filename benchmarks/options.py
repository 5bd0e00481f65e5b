"""What every benchmark is told, and the names there are."""

from __future__ import annotations

from dataclasses import dataclass

NAMES = (
    "swap",
    "dormant",
    "active",
    "reuse",
    "restart",
    "zoo",
    "morph",
    "cache",
    "telemetry",
    "sizes",
    "kernels",
    "gpu",
)
#: Left out of `all` where there is no GPU.
NEED_GPU = ("kernels", "gpu")
MODELS = ("transformer", "cnn")


@dataclass(frozen=True)
class Options:
    """What every benchmark is told.

    Attributes:
        models: Which of the two models, in this order.
        quick: Few rounds: to see that it runs, not for figures to report.
        seed: Of the models, the data and the order of sides.
        compiled: Compare what is compiled with eager (``zoo`` only).
        device: Where the models are (``cache`` only): ``cpu`` or ``cuda``.
    """

    models: tuple[str, ...] = MODELS
    quick: bool = False
    seed: int = 0
    compiled: bool = False
    device: str = "cpu"
