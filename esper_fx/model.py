"""MorphableModel: what morph makes of a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain

from torch import fx, nn

from esper_fx._torch import unwrapped
from esper_fx.errors import EsperError, MorphError
from esper_fx.growth import Growth, Morphology
from esper_fx.lifecycle import Ledger
from esper_fx.morphing.branch import NAMESPACE
from esper_fx.morphing.original import Footprint
from esper_fx.passes.pipeline import PassRecord
from esper_fx.passes.trace_report import TraceReport
from esper_fx.seed import KasminaSeed
from esper_fx.seeds import Seeds
from esper_fx.state import KasminaStateLayout
from esper_fx.stats import EngineStats, engine_stats


class MorphableModel(nn.Module):
    """A model whose graph carries seeds. Made by :func:`morph`; never instantiated by hand.

    It is of the original's class as well (except where that is a container), so its methods and attributes are there;
    its forward is the spliced graph. Its own attributes are the ones below.
    """

    growth: Growth
    pass_records: list[PassRecord]
    graphs: dict[str, fx.Graph]
    _trace_report: TraceReport
    _additions: Footprint

    @property
    def seeds(self) -> Mapping[str, KasminaSeed]:
        """The seeds by site; read-only. One that is not there raises an `UnknownSiteError`, a KeyError."""
        return Seeds(self.growth.seeds)

    @property
    def state(self) -> KasminaStateLayout:
        """The state arrays of all seeds."""
        return self.growth.state

    @property
    def morphology(self) -> Morphology:
        """Which seeds have a live body, and which; hashable."""
        return self.growth.morphology

    @property
    def ledger(self) -> Ledger:
        """What has happened to the seeds, in order."""
        return self.growth.ledger

    @property
    def clock(self) -> int:
        """Training steps seen: steps of the attached optimizer, else forward calls."""
        return self.growth.clock

    @property
    def pending(self) -> bool:
        """Whether a change or a better plan is on its way."""
        return self.growth.changes.pending

    @property
    def graph(self) -> fx.Graph:
        """The spliced graph of the forward.

        Raises:
            MorphError: The model's own forward is plain Python, because it cannot be traced; see ``graphs``.
        """
        if "" not in self.graphs:
            raise MorphError(f"the forward of {type(self).__name__} is plain Python; see graphs for its parts")
        return self.graphs[""]

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What `DistributedDataParallel` leaves alone: bodies, which come and go, where their replicas are kept alike."""
        inherited = getattr(super(), "_ddp_params_and_buffers_to_ignore", ())
        names = [*vars(self).get("_ddp_params_and_buffers_to_ignore", inherited)]
        if self.growth.replicas is not None:
            branch = self.get_submodule(NAMESPACE)
            own = [f"{NAMESPACE}.{name}" for name, _ in chain(branch.named_parameters(), branch.named_buffers())]
            names += [*own, *(f"_orig_mod.{name}" for name in own)]
        return names

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: Iterable[str]) -> None:
        vars(self)["_ddp_params_and_buffers_to_ignore"] = list(names)

    def trace_report(self) -> TraceReport:
        """For every module of the original: traced, a leaf of a graph, or kept as plain Python, and why."""
        return self._trace_report

    def settle(self, timeout: float | None = None) -> bool:
        """Block until no background work is left and the best plan runs; call it between steps.

        Returns:
            False if ``timeout`` seconds passed first; 0 or less only looks.

        Raises:
            ArgumentError: ``timeout`` is neither a number nor None.
        """
        return self.growth.changes.settle(timeout)

    def stats(self) -> EngineStats:
        """What the engine has done for this model."""
        return engine_stats(self.growth)

    def reset_stats(self) -> None:
        """Begin to count anew what :meth:`stats` counts for this model; the caches' own statistics go on."""
        self.growth.changes.reset_stats()


def morphed(model: object, caller: str, error: type[EsperError]) -> MorphableModel:
    """The morphed model that a function was given, as it is or as `torch.compile` has made one of it.

    Args:
        model: What it was given.
        caller: Name of the function, for the message.
        error: What to raise.

    Raises:
        EsperError: It is no morphed model; of the class ``error``.
    """
    found = unwrapped(model)
    if not isinstance(found, MorphableModel):
        raise error(f"{caller}() needs a morphed model, not a {type(found).__name__}; call esper_fx.morph first")
    return found


def taken_names(net: nn.Module) -> list[str]:
    """Attributes of a network that a morphed model has of its own, sorted."""
    names = {name for name in {**vars(MorphableModel), **MorphableModel.__annotations__} if not name.startswith("_")}
    if isinstance(net, fx.GraphModule):
        names.remove("graph")  # the same there
    return sorted(name for name in names - set(dir(nn.Module)) if hasattr(net, name))
