"""What every seed of a model is doing, as a structure of arrays that lives beside the model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper_fx.cache._background import ForkSafeLock
from esper_fx.checks import shown, whole
from esper_fx.lifecycle import Stage
from esper_fx.state_fields import (
    FIELDS,
    MAX_SCHEDULE_STEPS,
    TELEMETRY,
    Schedule,
    StateError,
    advance_alpha,
    check_schedule,
    check_value,
)

_FIELDS = tuple(FIELDS)  # asking a tuple is quick, and it can be asked about anything

__all__ = ["FIELDS", "MAX_SCHEDULE_STEPS", "KasminaStateLayout", "Schedule", "StateError"]


class KasminaStateLayout(nn.Module):
    """The state of all seeds: one 1-D buffer ``[n_seeds]`` per field, and the clock they last advanced to.

    The buffers follow the model through ``to``, ``state_dict``, ``deepcopy`` and pickle, but keep their dtypes under
    ``half()`` and its kin. Every write goes to the device and to a mirror in host memory, so a read never waits for the
    device; on the CPU the mirror is the buffer itself. Writes reach the device as kernel arguments, in stream order:
    a step that is already queued keeps the values it was queued with.

    Methods are safe to call from several threads, except those that move, load or copy the module.

    Attributes:
        stage: uint8, a `Stage`.
        blueprint: int32, index of the blueprint or -1.
        alpha: float32, the factor on the body's output.
        alpha_from: float32, alpha when its schedule began.
        alpha_target: float32, alpha when its schedule ends.
        alpha_rate: float32, 1 / steps of the schedule.
        gate: float32, 1 where gradient flows back into the host through the body, 0 where it does not.
        schedule: uint8, a `Schedule`.
        schedule_since: int64, clock at which the schedule began.
        error_count: int32.
        stage_since: int64, clock at which the seed entered its stage.
        embargo_until: int64, clock from which an embargoed seed may sleep again.
        germinations: int32, how often this site has germinated.
        health, value_mean, value_std, value_absmax, nonfinite, change, grad_rms, grad_absmax, grad_value, potential:
            float32, what :mod:`esper_fx.telemetry` has measured, smoothed; NaN until then.
        samples: int64, how often that was.
        sampled_at: int64, clock at which it was last, or -1.
        step: int64, 0-dim, the clock of the last `advance`.
        generation: Increases whenever a tensor from `view` no longer shares memory with the buffers.
    """

    stage: Tensor
    blueprint: Tensor
    alpha: Tensor
    alpha_from: Tensor
    alpha_target: Tensor
    alpha_rate: Tensor
    gate: Tensor
    schedule: Tensor
    schedule_since: Tensor
    error_count: Tensor
    stage_since: Tensor
    embargo_until: Tensor
    germinations: Tensor
    health: Tensor
    value_mean: Tensor
    value_std: Tensor
    value_absmax: Tensor
    nonfinite: Tensor
    change: Tensor
    grad_rms: Tensor
    grad_absmax: Tensor
    grad_value: Tensor
    potential: Tensor
    samples: Tensor
    sampled_at: Tensor
    step: Tensor

    def __init__(self, n_seeds: int, *, names: Sequence[str] | None = None) -> None:
        """Make the state of ``n_seeds`` dormant seeds, on the default device.

        Args:
            n_seeds: Number of seeds, 0 or more.
            names: The seeds' sites, for messages. Default: their numbers.

        Raises:
            StateError: If ``n_seeds`` is negative or does not match ``names``.
        """
        super().__init__()
        number = whole(n_seeds)
        if names is not None and not isinstance(names, Sequence):
            raise StateError(f"names={shown(names)}: expected a list of the seeds' sites")
        if number is None or number < 0 or (names is not None and len(names) != number):
            given = "" if names is None else f" with {len(names)} names"
            raise StateError(f"n_seeds is {shown(n_seeds)}{given}: expected 0 or more, and as many names")
        self.n_seeds = n_seeds = number
        self.names = tuple(str(i) for i in range(n_seeds)) if names is None else tuple(names)
        self.generation = 0
        with torch.inference_mode(False):
            for field, (dtype, value) in FIELDS.items():
                self.register_buffer(field, torch.full((n_seeds,), value, dtype=dtype))
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._lock = ForkSafeLock()
        self._mirror: dict[str, Tensor] | None = None
        self._arrival: torch.Event | None = None
        self._scheduled = False
        self._next_embargo: int | None = None

    # Reading and writing one seed.

    def read(self, field: str, i: int) -> int | float:
        """The value of one field of seed ``i``, from host memory.

        Raises:
            StateError: If there is no such field or seed.
        """
        self._check(field, i)
        value: int | float = self._host()[field][i].item()
        return value

    def rows(self, i: int) -> dict[str, int | float]:
        """All fields of seed ``i``, from host memory.

        Raises:
            StateError: If there is no such seed.
        """
        return {field: self.read(field, i) for field in FIELDS}

    def columns(self) -> dict[str, list[int | float]]:
        """All fields of all seeds, from host memory; a fixed number of operations however many seeds there are."""
        host = self._host()
        return {field: host[field].tolist() for field in FIELDS}

    def write(self, i: int, **fields: int | float) -> None:
        """Set fields of seed ``i`` on the device and in the mirror, all or none.

        Setting alpha ends a running schedule, unless ``schedule`` is given too: the next `advance` would undo it.

        Args:
            i: The seed.
            **fields: New values.

        Raises:
            StateError: If there is no such seed or field, or a value does not fit its field.
        """
        for field, value in fields.items():
            self._check(field, i)
            fields[field] = check_value(self.names[i], field, value)
        if "alpha" in fields:
            fields.setdefault("schedule", Schedule.NONE)
        with self._lock:
            host = self._host()
            if self._arrival is not None and not fields.keys().isdisjoint(TELEMETRY):
                self._arrival.synchronize()  # or else what was recorded before would come after this
            for field, value in fields.items():
                for tensors in self._copies(host):
                    # .data: a backward pass that saved the old alpha is not an error, it goes on with the new one.
                    tensors[field].data[i].fill_(value)
            embargoes = self._next_embargo is not None or fields.get("stage") == Stage.EMBARGOED
            if "schedule" in fields or "embargo_until" in fields or ("stage" in fields and embargoes):
                self._note(host)

    def view(self, field: str, i: int) -> Tensor:
        """A 0-dim tensor that shares memory with the buffer, good until `generation` changes.

        Raises:
            StateError: If there is no such field or seed.
        """
        self._check(field, i)
        return self.get_buffer(field)[i]

    def record(self, values: Mapping[str, Tensor]) -> None:
        """Write what was measured: whole fields, ``[n_seeds]`` each on the arrays' device.

        Never waits for the device: on a GPU the mirror has the values once ``arrived`` is true.
        """
        with self._lock:
            host = self._host()
            for field, value in values.items():
                buffer = self.get_buffer(field)
                buffer.copy_(value)
                if host[field] is not buffer:
                    host[field].copy_(buffer, non_blocking=True)
            if self.step.is_cuda:
                self._arrival = torch.Event(device=self.step.device)
                self._arrival.record()

    @property
    def arrived(self) -> bool:
        """Whether the mirror has what was last recorded."""
        return self._arrival is None or bool(self._arrival.query())

    # Time.

    def schedule_alpha(self, i: int, *, to: float, steps: int, schedule: str, now: int) -> None:
        """Let alpha of seed ``i`` go from where it is to ``to``.

        With p = clip((clock - now) / steps, 0, 1), alpha is from + (to - from) * p where ``schedule`` is "linear", and
        from + (to - from) * (1 - cos(pi p)) / 2 where it is "cosine". "constant", and 0 steps, set it at the next
        `advance`.

        Args:
            i: The seed.
            to: Target, finite.
            steps: Length in clock ticks, 0 to `MAX_SCHEDULE_STEPS`.
            schedule: "constant", "linear" or "cosine".
            now: The clock at which it begins.

        Raises:
            StateError: If there is no such seed, or a value is out of range; nothing has changed then.
        """
        self._check("alpha", i)
        to = check_value(self.names[i], "alpha_target", to, "to")
        kind = check_schedule(self.names[i], schedule, steps)
        with self._lock:
            self.write(
                i,
                alpha_from=self.read("alpha", i),
                alpha_target=to,
                alpha_rate=1.0 / max(steps, 1),
                schedule=kind,
                schedule_since=now,
            )

    def advance(self, now: int) -> list[int]:
        """Set the clock, and alpha of every scheduled seed to its value at that time.

        Takes the same number of vector operations however many seeds there are, and just the clock's write when
        nothing is scheduled. Never waits for the device.

        Args:
            now: The clock.

        Returns:
            The seeds whose schedules ended in this call, in order. Their alpha is the target exactly.
        """
        with self._lock:
            host, step = self._host(), self._buffers["step"]  # nn.Module's way to it takes longer than all else here
            host["step"].fill_(now)
            if step is not None and step is not host["step"]:
                step.fill_(now)
            if not self._scheduled:
                return []
            arrived = [advance_alpha(tensors, now) for tensors in self._copies(host)]
            ended: list[int] = arrived[0].nonzero().flatten().tolist()
            if ended:
                self._note(host)
            return ended

    def expired_embargoes(self, now: int) -> list[int]:
        """The embargoed seeds whose embargo is over at clock ``now``, in order."""
        with self._lock:
            host = self._host()
            if self._next_embargo is None or now < self._next_embargo:
                return []
            over = (host["stage"] == Stage.EMBARGOED) & (host["embargo_until"] <= now)
            seeds: list[int] = over.nonzero().flatten().tolist()
            return seeds

    # Host side.

    def _host(self) -> dict[str, Tensor]:
        """The mirror, made anew after the buffers were moved, loaded or copied."""
        mirror = self._mirror
        if mirror is None:
            with self._lock, torch.inference_mode(False):
                mirror = {name: self._on_host(name, buffer) for name, buffer in self.named_buffers()}
                self._mirror = mirror
                self._note(mirror)
        return mirror

    @staticmethod
    def _on_host(name: str, buffer: Tensor) -> Tensor:
        if buffer.device.type == "cpu":
            return buffer
        if buffer.is_meta:  # no values to mirror: the seeds are as at birth
            return torch.full(buffer.shape, FIELDS[name][1] if name in FIELDS else 0, dtype=buffer.dtype, device="cpu")
        host = torch.empty_like(buffer, device="cpu", pin_memory=buffer.is_cuda)
        return host.copy_(buffer)

    def _copies(self, host: dict[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """The mirror first, then the buffers where they are not the same tensors."""
        return [host] if host["step"] is self._buffers["step"] else [host, dict(self.named_buffers())]

    def _note(self, host: Mapping[str, Tensor]) -> None:
        """Remember whether there is anything to do as time passes, so that most calls need not look."""
        self._scheduled = bool((host["schedule"] != Schedule.NONE).any())
        embargoes = host["embargo_until"][host["stage"] == Stage.EMBARGOED]
        self._next_embargo = int(embargoes.min()) if embargoes.numel() else None

    def _check(self, field: str, i: int) -> None:
        if type(i) is int and 0 <= i < self.n_seeds and field in _FIELDS:
            return
        if field not in _FIELDS:
            raise StateError(f"seeds have no field {shown(field)}: expected one of {', '.join(FIELDS)}")
        number = whole(i)
        if number is None or not 0 <= number < self.n_seeds:
            expected = (
                f"expected 0 to {self.n_seeds - 1} ({self.n_seeds} seeds)"
                if self.n_seeds
                else "this model has no seeds"
            )
            raise StateError(f"there is no seed {shown(i)}: {expected}")

    # Moves, checkpoints and copies.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KasminaStateLayout:
        """Follow device moves only: the dtypes are part of the contract. Values survive "meta" in the mirror."""
        before, host = dict(self.named_buffers()), self._host()
        names = {id(buffer): name for name, buffer in before.items()}

        def move(buffer: Tensor) -> Tensor:
            device = fn(buffer).device
            source = host[names[id(buffer)]] if buffer.is_meta and device.type != "meta" else buffer
            return source.to(device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        self._rebind(before)
        if self.step.is_meta:
            self._mirror = host
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load as any module does; a checkpoint from before the model was morphed leaves the state alone."""
        if prefix and not any(key.startswith(prefix) for key in state_dict):
            return
        before = dict(self.named_buffers())
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, buffer in self.named_buffers():  # with assign=True they have the checkpoint's dtypes and devices
            setattr(self, name, buffer.to(self.step.device, before[name].dtype))
        self._rebind(before)

    def _rebind(self, before: Mapping[str, Tensor]) -> None:
        self._mirror = None
        if any(buffer is not before[name] for name, buffer in self.named_buffers()):
            self.generation += 1

    def __getstate__(self) -> dict[str, Any]:
        left_out = {"_lock", "_arrival"} if self.step.is_meta else {"_lock", "_arrival", "_mirror"}
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = ForkSafeLock()
        self._mirror = state.get("_mirror")
        self._arrival = None
        self.generation += 1

    def extra_repr(self) -> str:
        return f"n_seeds={self.n_seeds}"
