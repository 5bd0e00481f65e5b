"""KasminaSeed, the module spliced in at a site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from esper_fx import _torch, blueprints, ops
from esper_fx.checks import shown
from esper_fx.errors import ArgumentError, SiteError
from esper_fx.feature_dim import resolved
from esper_fx.lifecycle import Stage
from esper_fx.site import ConvolutionSpec, SiteSpec, SourceSpec, convolution_spec, is_transposed_linear

if TYPE_CHECKING:
    from esper_fx.engine.bodies import Recorded
    from esper_fx.germination import Germination
    from esper_fx.growth import Growth
    from esper_fx.passes.metas import TensorMeta


class KasminaSeed(nn.Module):
    """A seed: the identity while it sleeps, ``x + alpha * body(x)`` once its body is live.

    Attributes:
        name: Name of its site.
        index: Its row in the state arrays.
        body: The module it has become, mapping ``x`` to a delta of the same shape; None without one.
        live: Whether the body takes part in the computation.
        error: Why it is in stage ERROR or was quarantined last, or None.
        blueprint: Name of its body's blueprint, or None.
        config: Parameters of its body's blueprint.
        container: The class of the tuple or list whose first item flows through the site; None where it is a tensor.
        seen: Whether anything has flowed through the site since the model was made.
    """

    body: nn.Module | None
    name: str
    index: int
    growth: Growth
    live: bool
    error: BaseException | None
    blueprint: str | None
    config: dict[str, Any]
    recorded: dict[tuple[TensorMeta, bool], Recorded]
    container: type | None
    seen: bool
    _spec: SiteSpec | None
    _feature_dim: int | None
    _channel_first: bool
    _transposed: bool
    _convolution: ConvolutionSpec | None
    _feature_last: bool

    def __init__(
        self, name: str, index: int, growth: Growth, producer: nn.Module | None, feature_dim: int | None = None
    ) -> None:
        super().__init__()
        self.register_module("body", None)
        feature_last = nn.Linear | nn.LayerNorm | nn.Embedding | nn.MultiheadAttention
        transposed = is_transposed_linear(producer)
        # Past nn.Module's way of setting attributes, which is most of what making a seed would take.
        vars(self).update(
            name=name,
            index=index,
            growth=growth,
            live=False,
            error=None,
            blueprint=None,
            config={},
            recorded={},
            container=None,
            seen=False,
            _spec=None,
            _feature_dim=feature_dim,
            _channel_first=isinstance(producer, _torch.CHANNEL_FIRST_LAYERS),
            _transposed=transposed,
            _convolution=convolution_spec(producer),
            _feature_last=transposed or isinstance(producer, feature_last),
        )

    def forward(self, x: Any, alpha: Tensor, gate: Tensor, source: Tensor | None = None) -> Any:
        """Apply the seed to the value at its site.

        Args:
            x: The value, floating. Of a tuple or a list the first item is taken, and the others are handed through.
            alpha: The state array ``alpha``, float32 ``[n_seeds]``.
            gate: The state array ``gate``, float32 ``[n_seeds]``.
            source: Input of the module whose output ``x`` is, where that is a linear map or a convolution.
        """
        if not isinstance(x, Tensor):
            return self._on_first(x, alpha, gate)
        if torch.compiler.is_dynamo_compiling():
            if _torch.compiling_for_esper():
                more = (source,) if isinstance(source, Tensor) else ()
                result: Tensor = torch.ops.esper.seed(
                    x, alpha, gate, self.growth.handle, self.index, self.training, *more
                )
                return result
        elif not torch.compiler.is_compiling() and not self._knows(tuple(x.shape)):
            self.note_value(
                tuple(x.shape), x.dtype, x.device, tuple(source.shape) if isinstance(source, Tensor) else None
            )
        y = x
        if self.live and self.body is not None:
            y = ops.seed_forward(x, self.body, alpha[self.index].clone(), gate[self.index].clone(), source)
        return y if torch.compiler.is_compiling() else self.growth.measured(self.index, x, y)

    def _on_first(self, value: Any, alpha: Tensor, gate: Tensor) -> Any:
        """Apply the seed to the first item of a tuple or list."""
        if value is None and self._spec is not None:
            return None  # a module that returns something else at times
        if not (isinstance(value, tuple | list) and value and isinstance(value[0], Tensor)):
            raise SiteError(
                f"site {self.name!r} returns a {type(value).__name__}, but a seed needs one floating tensor, or a tuple that "
                "begins with one. Choose a submodule that returns a tensor."
            )
        if torch.compiler.is_dynamo_compiling():
            _note_container(self.growth.handle, self.index, type(value))
        else:
            self.container = type(value)
        items = (self(value[0], alpha, gate), *value[1:])
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

    def note_value(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        source: tuple[int, ...] | None = None,
        feature_dim: int | None = None,
        *,
        seen: bool = True,
    ) -> None:
        """Learn what flows through the site, from the first value seen; of later ones, only whether one does not go with it.

        Args:
            shape: Shape of the value.
            dtype: Its dtype.
            device: Its device.
            source: Shape of the input of the module whose output it is, where that is known.
            feature_dim: Which dimension holds features, where neither the user has said so nor the producer is to tell.
            seen: Whether the value has flowed here, and is not only told of by a checkpoint.

        Raises:
            SiteError: The value is not floating, or has not the dimension that the user says holds features.
        """
        self.seen = self.seen or seen
        if self._spec is None:
            if not dtype.is_floating_point:
                raise SiteError(
                    f"site {self.name!r} carries {dtype} values, but a seed needs a floating tensor; choose another site"
                )
            natural = self._natural_feature_dim(len(shape))
            dim = self.feature_dim_of(shape)
            if dim is None:
                dim = natural if feature_dim is None else feature_dim
            # A body that reads the source returns features where the module that reads it does.
            spec = self._source_spec(source) if dim == natural else None
            self._spec = SiteSpec(self.name, shape, dtype, device, dim, spec)
        elif not self._spec.has_features_of(shape) and self._spec.odd is None:
            self._spec = replace(self._spec, odd=shape)

    def _knows(self, shape: tuple[int, ...]) -> bool:
        """Whether a value of this shape would teach nothing new."""
        spec = self._spec
        return self.seen and spec is not None and (spec.odd is not None or spec.has_features_of(shape))

    def feature_dim_of(self, shape: tuple[int, ...]) -> int | None:
        """Which dimension holds features as far as that is settled: by the user, or by a value seen; else None.

        Args:
            shape: Shape of the value.

        Raises:
            SiteError: There is no such dimension.
        """
        if self._spec is not None:
            return self._spec.feature_dim
        return None if self._feature_dim is None else resolved(self._feature_dim, shape, self.name)

    def sketched_dim(self, shape: tuple[int, ...]) -> int | None:
        """Which dimension of a value of this shape a sensor takes for features; None: it has not those of the site."""
        return None if self._spec is None or not self._spec.shape else self._spec.feature_dim_of(shape)

    def _natural_feature_dim(self, ndim: int) -> int:
        last = self._feature_last or (not self._channel_first and ndim <= 3)
        return ndim - 1 if last else 1

    def _source_spec(self, shape: tuple[int, ...] | None) -> SourceSpec | None:
        if not shape:
            return None
        feature_dim = 1 if self._convolution is not None else len(shape) - 1
        return SourceSpec(shape, feature_dim, self._convolution, self._transposed)

    @property
    def site(self) -> SiteSpec:
        """What flows through the site.

        Raises:
            SiteError: Nothing has flowed yet and ``morph`` was given no ``example_inputs``.
        """
        if self._spec is None:
            raise SiteError(
                f"nothing is known of site {self.name!r} yet: pass example_inputs to morph(), or run the model once"
            )
        return self._spec

    @property
    def stage(self) -> Stage:
        """Where the seed is in its life."""
        return Stage(int(self.growth.state.read("stage", self.index)))

    @property
    def alpha(self) -> float:
        """The factor on the body's output."""
        return float(self.growth.state.read("alpha", self.index))

    @property
    def health(self) -> float:
        """The last measured health, NaN where none was measured."""
        return float(self.growth.state.read("health", self.index))

    def fits(self) -> tuple[str, ...]:
        """Names of the blueprints that fit this site."""
        return tuple(name for name in blueprints.names() if blueprints.get(name).fits(self.site) is None)

    def germinate(
        self,
        blueprint: str,
        *,
        weights: Mapping[str, Tensor] | None = None,
        alpha: float | None = None,
        **config: Any,
    ) -> Germination:
        """Give the seed a body. It goes live, by itself, at the first step boundary after its kernels are ready.

        Args:
            blueprint: Name of a registered blueprint.
            weights: A ``state_dict`` for the body; with it the seed goes straight to ACTIVE.
            alpha: Alpha once live. Default: ``incubation_alpha`` of the settings; 1.0 with ``weights``.
            **config: Parameters of the blueprint.

        Raises:
            LifecycleError: The seed is not DORMANT.
            UnknownBlueprintError: There is no such blueprint.
            BlueprintError: The blueprint does not fit the site, or rejects the parameters, or its module does not keep
                shape and dtype, or ``weights`` do not fit it. Nothing has changed then.
            StateError: ``alpha`` is no finite number; a LifecycleError and a ValueError. Nothing has changed then.
        """
        return self.growth.germinate(self, blueprint, weights=weights, alpha=alpha, config=config)

    def blend(self, to: float = 1.0, steps: int = 100, schedule: str = "cosine") -> None:
        """Open the gate and move alpha to ``to`` within ``steps`` clock ticks; then the seed is ACTIVE.

        Args:
            to: Target of alpha.
            steps: Clock ticks until it is reached.
            schedule: ``constant`` (jump), ``linear`` or ``cosine``.

        Raises:
            LifecycleError: The seed is neither INCUBATING nor ACTIVE.
            StateError: An argument is out of range; a LifecycleError and a ValueError. Nothing has changed then.
        """
        self.growth.blend(self, to=to, steps=steps, schedule=schedule)

    def fossilize(self) -> None:
        """Keep the seed for good: it can no longer be pruned."""
        self.growth.fossilize(self)

    def prune(self, why: str = "pruned by the user") -> None:
        """Silence the seed at once and take its body away; after the embargo its site may germinate again.

        Args:
            why: For the ledger.

        Raises:
            LifecycleError: The seed has no body, or is FOSSILIZED.
            ArgumentError: ``why`` is no text.
        """
        if not isinstance(why, str):
            raise ArgumentError(
                f"prune(why={shown(why)}) at site {self.name!r}: expected a text that says why, for the ledger"
            )
        self.growth.prune(self, why)

    def kernel_inputs(self) -> Callable[[], list[Tensor]]:
        """A function that returns what a kernel with this body takes: alpha and gate (0-dim), parameters, buffers.

        Tensors are looked up at every call, so one that was replaced is found.
        """
        assert self.body is not None
        body, growth, index = self.body, self.growth, self.index
        owners = [_owner(body, name, "_parameters") for name, _ in body.named_parameters()]
        owners += [_owner(body, name, "_buffers") for name, _ in body.named_buffers()]
        device = None if self._spec is None else self._spec.device
        generation = -1
        scalars: list[Tensor] = []

        def inputs() -> list[Tensor]:
            nonlocal generation, scalars
            state = growth.state
            if generation != state.generation:
                generation, scalars = state.generation, [state.view("alpha", index), state.view("gate", index)]
            # A scheduled alpha moves while a backward pass may still need what it was.
            first = [scalar.clone() for scalar in scalars] if growth.scheduled else scalars
            if device is not None and first[0].device != device:
                first = [scalar.to(device, non_blocking=True) for scalar in first]
            return [*first, *[tensors[name] for tensors, name in owners]]

        return inputs

    def set_body(self, body: nn.Module | None, blueprint: str | None, config: Mapping[str, Any]) -> None:
        """Put a body in, or take it out. For the engine."""
        self.body = body
        self.blueprint = blueprint
        self.config = dict(config)
        self.recorded = {}  # after the body: whoever reads them does so in the other order

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KasminaSeed:
        """Follow the model to another device or dtype: what flows through the site goes there too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._spec is not None:
            with torch.inference_mode(False):
                moved = fn(torch.empty((), dtype=self._spec.dtype, device=self._spec.device))
            self._spec = replace(self._spec, dtype=moved.dtype, device=moved.device)
        return self

    def extra_repr(self) -> str:
        return f"site={self.name!r}, stage={self.stage.name}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "recorded": {}, "error": None}


@torch.compiler.assume_constant_result
def _note_container(handle: int, index: int, kind: type) -> bool:
    """Tell a seed that its site's value comes in a tuple or list, while Dynamo traces."""
    host: Any = ops.hosts.get(handle)
    if host is not None:
        host.by_index[index].container = kind
    return True


def _owner(body: nn.Module, name: str, kind: str) -> tuple[dict[str, Tensor], str]:
    """The dictionary that holds a tensor and its name there: reading it again finds a tensor that was replaced."""
    path, _, leaf = name.rpartition(".")
    return getattr(body.get_submodule(path), kind), leaf
