"""load_state_dict of a model that grows does what a user of PyTorch expects of it."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper_fx
from esper_fx import _torch
from esper_fx.errors import CheckpointError
from tests.support.checkpoints import MANIFEST, checkpoint_of, computed, grown, grown_otherwise, identities
from tests.support.training import Net, assert_same, carried, copied, growth_of, new_model


def test_not_strict_loads_what_is_there() -> None:
    run, other = grown(), grown_otherwise()
    saved = checkpoint_of(run.model)
    left_out = ["c.bias", "esper.seeds.a.body.down.weight"]
    for key in left_out:
        del saved[key]
    saved["foreign"] = torch.zeros(1)
    host = other.model.c.bias.clone()
    result = other.model.load_state_dict(saved, strict=False)
    assert sorted(result.missing_keys) == left_out
    assert result.unexpected_keys == ["foreign"]
    assert_same(growth_of(other.model), growth_of(run.model))
    assert torch.equal(other.model.c.bias, host)
    twin = new_model()
    twin.seeds["a"].germinate("low_rank", rank=2)
    expected = run.model.state_dict() | {
        "c.bias": host,
        left_out[1]: twin.state_dict()[left_out[1]],  # as at birth
    }
    assert_same(copied(dict(other.model.state_dict())), copied(dict(expected)))


def test_not_strict_leaves_growth_alone_where_the_checkpoint_cannot_say_what_had_grown() -> None:
    saved = checkpoint_of(grown().model)
    for key in (MANIFEST, "esper.state.stage"):
        other = grown_otherwise()
        before, who = growth_of(other.model), identities(other)
        partial = {name: value for name, value in saved.items() if name != key}
        result = other.model.load_state_dict(partial, strict=False)
        assert result.missing_keys == [key]
        assert result.unexpected_keys == [name for name in partial if name.startswith("esper.")]
        assert_same(growth_of(other.model), before)
        assert identities(other) == who
        assert torch.equal(other.model.a.weight, saved["a.weight"])


def test_assigning_takes_the_checkpoints_tensors() -> None:
    run, model = grown(), new_model(seed=1)
    saved = checkpoint_of(run.model)
    model.load_state_dict(saved, assign=True)
    assert model.a.weight.data_ptr() == saved["a.weight"].data_ptr()
    inner = model.seeds["a"].body.get_parameter("down.weight")
    assert inner.data_ptr() == saved["esper.seeds.a.body.down.weight"].data_ptr()
    assert_same(growth_of(model), growth_of(run.model))
    x = torch.randn(4, 4)
    assert torch.equal(computed(model, x), computed(run.model, x))
    assert model.load_state_dict(carried(Net().state_dict()), assign=True).missing_keys == []
    assert_same(growth_of(model)["seeds"], growth_of(run.model)["seeds"] | {})


def test_a_model_without_data_is_filled_by_assigning() -> None:
    run = grown()
    with torch.device("meta"):
        model = esper_fx.morph(Net(), sites=["a", "b", "c"], example_inputs=(torch.zeros(8, 4),))
    model.load_state_dict(checkpoint_of(run.model), assign=True)
    x = torch.randn(4, 4)
    assert torch.equal(computed(model, x), computed(run.model, x))
    assert_same(growth_of(model)["seeds"], {k: (*v[:-1], False) for k, v in growth_of(run.model)["seeds"].items()})


def test_a_site_of_which_nothing_is_known_yet_is_known_from_the_checkpoint() -> None:
    run = grown()
    model = esper_fx.morph(Net(), sites=["a", "b", "c"])
    broken = checkpoint_of(run.model)
    del broken["a.bias"]
    with pytest.raises(CheckpointError):
        model.load_state_dict(broken)
    assert all(seed._spec is None for seed in model.seeds.values())
    model.load_state_dict(checkpoint_of(run.model))
    assert {name: seed.site for name, seed in model.seeds.items()} == {
        name: seed.site for name, seed in run.model.seeds.items()
    }


def test_bodies_are_built_where_and_as_what_the_model_has_become() -> None:
    run = grown()
    model = new_model().double()
    assert model.seeds["a"].site.dtype == torch.float64
    model.load_state_dict(checkpoint_of(run.model))
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
    x = torch.randn(4, 4)
    torch.testing.assert_close(computed(model, x.double()).float(), computed(run.model, x))


def test_a_checkpoint_in_half_precision_loads() -> None:
    run, model = grown(), new_model()
    model.load_state_dict({key: value.half() for key, value in checkpoint_of(run.model).items()})
    assert model.morphology == run.model.morphology
    torch.testing.assert_close(model.a.weight, run.model.a.weight, rtol=1e-3, atol=1e-3)


# Inside other modules.


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"deep": inner})


def _wrapped(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="esper")  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [(Outer, "inner.deep."), (_wrapped, "_orig_mod."), (lambda m: Outer(_wrapped(m)), "inner.deep._orig_mod.")],
)
def test_a_model_is_restored_wherever_it_sits(wrap: Callable[[nn.Module], nn.Module], prefix: str) -> None:
    run, other = grown(), grown_otherwise()
    saved = checkpoint_of(wrap(run.model))
    assert f"{prefix}{MANIFEST}" in saved
    outer = wrap(other.model)
    for key in (f"{prefix}norm.num_batches_tracked", f"{prefix}c.bias", f"{prefix}esper.seeds.a.body.down.weight"):
        truncated = copy.copy(saved)
        truncated._metadata = saved._metadata  # type: ignore[attr-defined]
        del truncated[key]
        before, who = other.facts(), identities(other)
        with pytest.raises(CheckpointError, match="nothing of it was loaded") as caught:
            outer.load_state_dict(truncated)
        assert f'"{key}"' in str(caught.value)
        assert_same(other.facts(), before)
        assert identities(other) == who
        assert wrap(new_model()).load_state_dict(truncated, strict=False).missing_keys == [key]
    assert str(outer.load_state_dict(saved)) == "<All keys matched successfully>"
    assert_same(growth_of(other.model), growth_of(run.model))
    bare = {key: value for key, value in saved.items() if not key.startswith(f"{prefix}esper.")}
    assert str(outer.load_state_dict(bare)) == "<All keys matched successfully>"


def test_hooks_of_the_users_own_see_the_checkpoint_once_each_time() -> None:
    calls: list[str] = []

    class Renamed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.version = 0
            self.register_load_state_dict_pre_hook(self._rename)
            self.norm.register_load_state_dict_post_hook(self._note)

        @staticmethod
        def _rename(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
            for key in [key for key in state_dict if key.startswith("old_")]:
                state_dict[key.removeprefix("old_")] = state_dict.pop(key)

        def _note(self, module: nn.Module, _: Any) -> None:
            calls.append(type(self).__name__)

        def get_extra_state(self) -> Tensor:
            return torch.tensor(self.version)

        def set_extra_state(self, state: Tensor) -> None:
            self.version = int(state)

    model = esper_fx.morph(Renamed(), sites=["a", "b"], example_inputs=(torch.zeros(8, 4),))
    model.seeds["a"].germinate("affine")
    saved = {f"old_{key}": value for key, value in checkpoint_of(model).items()}
    saved["old__extra_state"] = torch.tensor(7)
    other = esper_fx.morph(Renamed(), sites=["a", "b"], example_inputs=(torch.zeros(8, 4),))
    broken = {key: value for key, value in saved.items() if key != "old_c.bias"}
    with pytest.raises(CheckpointError, match="c.bias"):
        other.load_state_dict(broken)
    assert other.version == 0  # the rehearsal was a replica's
    other.load_state_dict(saved)
    assert other.version == 7
    assert other.morphology == model.morphology
    assert set(calls) <= {"Renamed", "MorphableRenamed", "TracedRenamed"}


def test_what_cannot_be_copied_is_no_obstacle() -> None:
    run = grown()
    run.model.stream = iter(())
    run.model.norm.lock = threading.Lock()
    run.model.load_state_dict(checkpoint_of(run.model))


def test_without_a_load_in_progress_loading_is_strict() -> None:
    assert _torch.load_in_progress() == (True, None)


def test_loading_warns_of_nothing() -> None:
    run, saved = grown_otherwise(), checkpoint_of(grown().model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.model.load_state_dict(saved)


def test_tied_parameters_stay_tied() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.twin = nn.Linear(4, 6)
            self.twin.weight = self.a.weight

    model = esper_fx.morph(Tied(), sites=["a"], example_inputs=(torch.zeros(8, 4),))
    model.seeds["a"].germinate("affine")
    other = esper_fx.morph(Tied(), sites=["a"], example_inputs=(torch.zeros(8, 4),))
    other.load_state_dict(checkpoint_of(model))
    assert other.twin.weight is other.a.weight
    assert torch.equal(other.a.weight, model.a.weight)
