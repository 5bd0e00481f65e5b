"""The registry of blueprints: recipes for the module that a seed can become."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import nn

from esper_fx.blueprints.cost import Cost, measure
from esper_fx.checks import cause, shown
from esper_fx.errors import BlueprintError, UnknownBlueprintError
from esper_fx.ops import reads_source
from esper_fx.site import SiteSpec

BuildFunction = TypeVar("BuildFunction", bound=Callable[..., nn.Module])
FitsFunction = Callable[[SiteSpec], "str | None"]

logger = logging.getLogger(__name__)

_REGISTRY: dict[str, Blueprint] = {}


@dataclass(frozen=True)
class Blueprint:
    """A registered recipe.

    Attributes:
        name: The name it is registered under.
        function: ``function(site, **config)`` builds the body, a module that maps ``x`` to a delta of the same shape,
            dtype and device, and that is zero at birth.
        fits_function: Says why a site cannot take the body, or None if it can. Default: every site can.
    """

    name: str
    function: Callable[..., nn.Module]
    fits_function: FitsFunction | None = None

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """What a config may contain, by name, in the order of the function's signature."""
        return dict(list(inspect.signature(self.function).parameters.items())[1:])

    def bind(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config with defaults filled in, in the order of the function's signature.

        Raises:
            BlueprintError: If a parameter is unknown or missing.
        """
        parameters = self.parameters
        if not isinstance(config, Mapping):
            raise BlueprintError(
                f"the config of blueprint {self.name!r} is {shown(config)}: expected a dict, with {_accepted(parameters)}"
            )
        for name, value in config.items():
            if name not in parameters:
                raise BlueprintError(
                    f"blueprint {self.name!r} has no parameter {name!r} (given {name}={shown(value)}): "
                    f"it accepts {_accepted(parameters)}{_nearest(name, parameters)}"
                )
        for name, parameter in parameters.items():
            if parameter.default is parameter.empty and name not in config:
                raise BlueprintError(
                    f"blueprint {self.name!r} needs the parameter {name!r}, which is missing: "
                    f"it accepts {_accepted(parameters)}"
                )
        return {name: config.get(name, parameter.default) for name, parameter in parameters.items()}

    def config_key(self, config: Mapping[str, Any]) -> Hashable:
        """A hashable form of the config: equal for configs that build the same body, and for no others.

        Types count (1, 1.0 and True differ); the order of parameters does not, nor whether a default is spelled out.

        Raises:
            BlueprintError: If a parameter is unknown or missing, or a value cannot be hashed.
        """
        return tuple((name, self._freeze(name, value)) for name, value in self.bind(config).items())

    def fits(self, site: SiteSpec) -> str | None:
        """Why this site cannot take the body, or None if it can.

        Raises:
            BlueprintError: It is no `SiteSpec`.
        """
        if not isinstance(site, SiteSpec):
            raise BlueprintError(
                f"blueprint {self.name!r} was asked about {shown(site)}: expected a SiteSpec, such as model.seeds[name].site"
            )
        if site.odd is not None:
            return f"its values have different numbers of features, such as those of shapes {site.shape} and {site.odd}"
        try:
            reason: object = None if self.fits_function is None else self.fits_function(site)
        except Exception as error:  # it must not be in the way of others, which are asked as well
            logger.debug("the fits function of blueprint %r failed", self.name, exc_info=True)
            return f"its fits function failed with {cause(error)}"
        if reason is None or isinstance(reason, str):
            return reason
        return (
            f"its fits function returned {shown(reason)}, expected None where it fits and else a text that says why not"
        )

    def build(self, site: SiteSpec, config: Mapping[str, Any], *, seed: int) -> nn.Module:
        """Build the body for a site, on the site's device and in its dtype.

        The same seed gives the same initial values on every device, because modules that do not ask for a device are
        built on the CPU and moved. The global random state is as before afterwards; random numbers that other threads
        draw meanwhile are not kept apart.

        Args:
            site: Where the body will sit.
            config: Parameters for the blueprint.
            seed: Seed of the initialisation.

        Returns:
            The body, in training mode.

        Raises:
            BlueprintError: If the site does not fit, a parameter is unknown, missing or rejected, or what was built is
                not an `nn.Module`.
        """
        arguments = self.bind(config)
        reason = self.fits(site)
        if reason is not None:
            raise BlueprintError(f"blueprint {self.name!r} does not fit site {site.name!r}: {reason}")
        described = ", ".join(f"{name}={shown(value)}" for name, value in arguments.items())
        try:
            # Also for a caller in inference mode: the body is there to be trained.
            with torch.inference_mode(False), torch.enable_grad(), _on_cpu(), seeded(site.device, seed):
                body = self.function(site, **arguments)
        except BlueprintError:
            raise
        except Exception as error:
            raise BlueprintError(
                f"blueprint {self.name!r} failed to build a body for site {site.name!r} {list(site.shape)} "
                f"with {described or 'no parameters'}: {cause(error)}"
            ) from error
        if not isinstance(body, nn.Module):
            raise BlueprintError(
                f"blueprint {self.name!r} returned {type(body).__name__} for site {site.name!r}: expected an nn.Module"
            )
        if reads_source(body) and site.source is None:
            raise BlueprintError(
                f"blueprint {self.name!r} built a body that reads the input of the module at its site, which is not known of "
                f"site {site.name!r}: expected the output of a linear map or a convolution"
            )
        if _is_placed(body, site):  # to() would go through all of it to find that out
            return body
        with torch.inference_mode(False):
            return body.to(site.device, site.dtype)

    def cost(self, site: SiteSpec, **config: Any) -> Cost:
        """What one forward of the body costs at a site. It is built on the CPU and run on tensors without data.

        Args:
            site: Where the body would sit; the costs are for its whole shape, batch included.
            **config: Parameters for the blueprint.

        Raises:
            BlueprintError: As in ``build``, or if the body does not run on a value of the site's shape.
        """
        if isinstance(site, SiteSpec):  # build says what is wrong with others
            site = dataclasses.replace(site, device=torch.device("cpu"))
        body = self.build(site, config, seed=0)
        try:
            return measure(body, site)
        except Exception as error:
            raise BlueprintError(
                f"the body of blueprint {self.name!r} fails at site {site.name!r} {list(site.shape)}: {cause(error)}"
            ) from error

    def _freeze(self, name: str, value: Any) -> Hashable:
        kind = type(value).__name__
        if isinstance(value, Mapping):
            items = sorted(((str(key), self._freeze(name, item)) for key, item in value.items()), key=lambda kv: kv[0])
            return (kind, tuple(items))
        if isinstance(value, list | tuple):
            return (kind, tuple(self._freeze(name, item) for item in value))
        if isinstance(value, float):
            return (kind, value.hex())  # tells -0.0 from 0.0, and takes one NaN for another
        try:
            hash(value)
        except TypeError as error:
            raise BlueprintError(
                f"parameter {name!r} of blueprint {self.name!r} is {shown(value)}, which cannot be hashed: "
                "expected numbers, strings, and lists or dicts of them"
            ) from error
        return (kind, value)


def blueprint(
    name: str, *, fits: FitsFunction | None = None, replace: bool = False
) -> Callable[[BuildFunction], BuildFunction]:
    """Register a function as a blueprint; the function itself is returned unchanged.

    The function takes a `SiteSpec` first, and its parameters by name. It returns a module that maps ``x`` to a delta of
    the same shape and dtype, which is zero at birth: zero-initialise the last layer, and only the last.

    A module with an attribute ``reads_source`` that is true is given the source of the value instead, which is the input of
    the linear map or convolution at the site (``site.source``); its delta is still one of the value.

    Args:
        name: Name to germinate it by.
        fits: Says why a site cannot take the body, or None if it can.
        replace: Register it in place of an earlier one of that name.

    Raises:
        BlueprintError: If the name is taken or empty, ``fits`` is no function, or the function's signature does not do.
    """
    if not isinstance(name, str) or not name:
        raise BlueprintError(
            f"a blueprint's name is a non-empty string, not {shown(name)}: write @blueprint('my_adapter')"
        )
    if fits is not None and not callable(fits):
        raise BlueprintError(
            f"fits={shown(fits)} of blueprint {name!r}: expected a function of a site that returns None where the body fits, "
            "and else a text that says why not"
        )

    def register(function: BuildFunction) -> BuildFunction:
        if name in _REGISTRY and not replace:
            raise BlueprintError(
                f"a blueprint {name!r} is already registered ({_REGISTRY[name].function.__qualname__}): "
                "choose another name, or pass replace=True"
            )
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError) as error:
            raise BlueprintError(
                f"blueprint {name!r} is {shown(function)}: expected a function, def {name}(site, *, ...), whose parameters can "
                "be read"
            ) from error
        if not parameters or parameters[0].kind not in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        ):
            raise BlueprintError(
                f"blueprint {name!r} must take the site as its first argument: def {name}(site, *, ...)"
            )
        for parameter in parameters[1:]:
            if parameter.kind not in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
                described = str(parameter.replace(annotation=parameter.empty))
                raise BlueprintError(
                    f"blueprint {name!r} takes {described}: expected parameters with names of their own, "
                    "because they identify the body"
                )
        _REGISTRY[name] = Blueprint(name, function, fits)
        return function

    return register


def get(name: str) -> Blueprint:
    """The blueprint registered under a name.

    Raises:
        UnknownBlueprintError: If there is none.
    """
    if not isinstance(name, str) or name not in _REGISTRY:
        raise UnknownBlueprintError(
            f"no blueprint is registered under {shown(name)}: there are {', '.join(names())}{_nearest(name, _REGISTRY)}"
        )
    return _REGISTRY[name]


def names() -> tuple[str, ...]:
    """The names of all registered blueprints, sorted."""
    return tuple(sorted(_REGISTRY))


def _accepted(parameters: Mapping[str, inspect.Parameter]) -> str:
    return ", ".join(str(p.replace(annotation=p.empty)) for p in parameters.values()) or "no parameters"


def _nearest(name: str, candidates: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(shown(name).strip("'"), candidates, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _on_cpu() -> AbstractContextManager[Any]:
    """Within it the CPU is the default device; nothing where it is already, because such a mode slows every operation."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _is_placed(body: nn.Module, site: SiteSpec) -> bool:
    """Whether all tensors of a body are on the site's device, and those that are not whole numbers in its dtype."""
    for tensor in (*body.parameters(), *body.buffers()):
        fractional = tensor.is_floating_point() or tensor.is_complex()
        if tensor.device != site.device or (fractional and tensor.dtype != site.dtype):
            return False
    return True


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the CPU's generator and the device's own within the block; every generator is as before after it."""
    # Not torch.manual_seed: it reseeds all devices, and only those that are forked get their state back.
    if device.type in ("cpu", "meta"):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
        return
    module = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    with torch.random.fork_rng(devices=[index], device_type=device.type), module.device(index):
        torch.default_generator.manual_seed(seed)
        module.manual_seed(seed)
        yield
