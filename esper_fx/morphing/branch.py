"""The branch that morphing adds to a model's tree: the state arrays and the seeds, and what a checkpoint holds of them."""

from __future__ import annotations

import keyword
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from esper_fx.checkpoint.manifest import Manifest
from esper_fx.errors import CheckpointError

if TYPE_CHECKING:
    from esper_fx.growth import Growth

NAMESPACE = "esper"
"""Name of the branch in the model."""


class Branch(nn.Module):
    """The state arrays as ``state``, the seeds as ``seeds``; its extra state is the checkpoint's manifest.

    Attributes:
        growth: The life of the seeds.
        accepted: The manifest that is being loaded, from when :mod:`esper_fx.checkpoint` deals with it until it is loaded.
        restored: Whether the structure was restored and waits for its tensors.
    """

    def __init__(self, growth: Growth) -> None:
        super().__init__()
        self.growth = growth
        self.accepted: Any = None
        self.restored = False
        seeds = nn.Module()
        self.add_module("state", growth.state)
        self.add_module("seeds", seeds)
        for item in growth.by_index:
            seeds.add_module(mangled(item.name), item)

    def get_extra_state(self) -> Tensor:
        """The manifest, uint8 ``[bytes]``; keyed ``esper._extra_state`` in ``state_dict()``.

        Raises:
            CheckpointError: A parameter of a blueprint has a value that a checkpoint cannot hold.
        """
        return Manifest.of(self.growth).to_tensor()

    def set_extra_state(self, state: Any) -> None:
        """Called by ``load_state_dict`` when the structure has been restored already.

        Raises:
            CheckpointError: It has not, because only this branch is loaded.
        """
        if state is not self.accepted:
            raise CheckpointError(
                f"{NAMESPACE!r} cannot be loaded by itself: call load_state_dict of the whole model, or of a module that "
                "holds it"
            )


def mangled(site: str) -> str:
    """A site's name as that of a submodule; never a word that generated code would take for something else."""
    return f"{site}/" if keyword.iskeyword(site) else site.replace(".", "/")
