"""State arrays as tests make them: with seeds of some names, and as they are on an accelerator."""

from __future__ import annotations

from torch import Tensor

from esper_fx.state import KasminaStateLayout

KINDS = ("constant", "linear", "cosine")


class WithMirror(KasminaStateLayout):
    """The state as it is on an accelerator: the mirror and the buffers are different tensors."""

    @staticmethod
    def _on_host(name: str, buffer: Tensor) -> Tensor:
        return buffer.clone() if buffer.device.type == "cpu" else KasminaStateLayout._on_host(name, buffer)


def new_state(n_seeds: int, kind: type[KasminaStateLayout] = KasminaStateLayout) -> KasminaStateLayout:
    return kind(n_seeds, names=[f"layers.{i}" for i in range(n_seeds)])
