"""Attach an optimizer: seeds' parameters join it when they germinate and leave it, with their state, when pruned."""

from __future__ import annotations

import math
import time
import weakref
from itertools import compress
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from esper_fx.checks import nearest, real, shown
from esper_fx.errors import OptimizerError
from esper_fx.morphing.branch import NAMESPACE, mangled
from esper_fx.optimizer_state import add_names, match_names, match_what_was_loaded

if TYPE_CHECKING:
    from esper_fx.growth import Growth
    from esper_fx.model import MorphableModel
    from esper_fx.seed import KasminaSeed


def attach(optimizer: Optimizer, model: MorphableModel, **options: Any) -> Attachment:
    """Let the parameters of the model's seeds join and leave ``optimizer`` by themselves.

    A germinated seed's parameters join the parameter group that holds its site's own parameters (else the first group), so
    they follow its learning rate, and schedulers made before or after keep working. With ``options`` they get a group of
    their own instead, made now; do that before any scheduler is made. The model's clock then counts the optimizer's steps.

    Args:
        optimizer: An optimizer over parameters of ``model``.
        model: A morphed model, or what `torch.compile` has made of one.
        **options: Options of a group for the seeds, such as ``lr`` or ``weight_decay``.

    Raises:
        OptimizerError: The optimizer holds none of the model's parameters, one is attached already, it was loaded with a
            state of other parameters, or it has no such option. Nothing has changed then.
    """
    from esper_fx.model import morphed

    model = morphed(model, "attach", OptimizerError)
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(f"attach() needs a torch.optim.Optimizer, not a {type(optimizer).__name__}")
    growth: Growth = model.growth
    if growth.attachment is not None and growth.attachment.optimizer is not None:
        raise OptimizerError(
            f"an optimizer ({type(growth.attachment.optimizer).__name__}) is attached to this model already; call "
            "detach() on what attach() returned first"
        )
    mine = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in mine for group in optimizer.param_groups for parameter in group["params"]):
        raise OptimizerError(
            f"this {type(optimizer).__name__} holds none of the model's parameters; make it from model.parameters()"
        )
    for name, value in options.items():
        _check_option(optimizer, name, value)
    return Attachment(optimizer, model, options)


def _check_option(optimizer: Optimizer, name: str, value: Any) -> None:
    """Refuse an option that the optimizer's groups do not have, or what is no number where theirs is one."""
    known = {key for group in (optimizer.defaults, *optimizer.param_groups) for key in group}
    known -= {"params", "param_names"}
    if name not in known:
        raise OptimizerError(
            f"attach({name}={shown(value)}): a group of {type(optimizer).__name__} has no option {name!r}; the nearest are: "
            f"{nearest(name, sorted(known))}"
        )
    number = real(value)
    is_number = (isinstance(value, Tensor) and value.numel() == 1) or (number is not None and not math.isnan(number))
    if real(optimizer.defaults.get(name)) is not None and not is_number:
        raise OptimizerError(f"attach({name}={shown(value)}) for {type(optimizer).__name__}: expected a number")


class Attachment:
    """The tie between an optimizer and a model's seeds.

    The optimizer's ``state_dict()`` then holds the names of its parameters, and its ``load_state_dict()`` goes by them.

    Attributes:
        optimizer: The optimizer, or None when it is gone.
    """

    def __init__(self, optimizer: Optimizer, model: MorphableModel, options: dict[str, Any]) -> None:
        models = vars(optimizer).setdefault("_esper_models", [])  # one optimizer may train several models
        match_what_was_loaded(optimizer, [*_alive(models), model])
        self._optimizer = weakref.ref(optimizer)
        self._model = weakref.ref(model)
        self._growth = weakref.ref(model.growth)
        self._own: int | None = None
        if options:
            named = any("param_names" in group for group in optimizer.param_groups)
            optimizer.add_param_group({"params": [], **({"param_names": []} if named else {}), **options})
            self._own = len(optimizer.param_groups) - 1  # the group itself is another one after load_state_dict
        self._models: list[weakref.ref[MorphableModel]] = models
        models.append(self._model)
        self._hooks = _hook(optimizer, models, self._growth)
        model.growth.attachment = self
        for seed in model.growth.by_index:
            if seed.body is not None:
                self.join(seed)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, or None when it is gone."""
        return self._optimizer()

    def detach(self) -> None:
        """Untie: parameters that have joined stay, later ones do not join; the clock counts forward calls again."""
        for hook in self._hooks:
            hook.remove()
        if self._model in self._models:
            self._models.remove(self._model)
        growth = self._growth()
        if growth is not None and growth.attachment is self:
            growth.attachment = None

    def join(self, seed: KasminaSeed) -> None:
        """Add the parameters of a seed's body to their group; those that get no gradient stay outside."""
        optimizer = self.optimizer
        if optimizer is None or seed.body is None:
            return
        present = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        own = seed.body.named_parameters()
        joining = {name: p for name, p in own if p.requires_grad and id(p) not in present}
        group = optimizer.param_groups[self._own] if self._own is not None else self._group_of(seed, optimizer)
        group["params"].extend(joining.values())
        if "param_names" in group:
            group["param_names"].extend(f"{NAMESPACE}.seeds.{mangled(seed.name)}.body.{name}" for name in joining)

    def leave(self, seed: KasminaSeed) -> None:
        """Remove the parameters of a seed's body together with their state."""
        optimizer = self.optimizer
        if optimizer is None or seed.body is None:
            return
        leaving = {id(parameter) for parameter in seed.body.parameters()}
        for group in optimizer.param_groups:
            stay = [id(parameter) not in leaving for parameter in group["params"]]
            for key in {"params", "param_names"} & group.keys():
                group[key][:] = compress(group[key], stay)
        for parameter in seed.body.parameters():
            optimizer.state.pop(parameter, None)

    def _group_of(self, seed: KasminaSeed, optimizer: Optimizer) -> dict[str, Any]:
        """The group of the parameters nearest to the seed's site: its module's, else that module's parent's, and so on."""
        model = self._model()
        path = seed.name
        while model is not None and path:
            near = {id(parameter) for parameter in _module(model, path).parameters()}
            for group in optimizer.param_groups:
                if any(id(parameter) in near for parameter in group["params"]):
                    return group
            path = path.rpartition(".")[0]
        return optimizer.param_groups[0]


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return nn.Module()


def _hook(optimizer: Optimizer, models: list[weakref.ref[MorphableModel]], growth: weakref.ref[Growth]) -> list[Any]:
    """Have the optimizer's steps move the clock, and its state go by names. The hooks keep neither model nor seeds alive."""

    def tick(*_: Any) -> None:
        target = growth()
        if target is not None:
            started = time.perf_counter()
            target.tick()
            if target.replicas is not None:
                target.replicas.end_step()
            target.changes.count_host_time(time.perf_counter() - started)

    return [
        optimizer.register_step_post_hook(tick),
        optimizer.register_state_dict_post_hook(lambda owner, saved: add_names(owner, saved, _alive(models))),
        optimizer.register_load_state_dict_pre_hook(lambda owner, saved: match_names(owner, saved, _alive(models))),
    ]


def _alive(models: list[weakref.ref[MorphableModel]]) -> list[MorphableModel]:
    return [model for model in (reference() for reference in models) if model is not None]
