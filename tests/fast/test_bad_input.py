"""Bad input at every public door: an error of ours that names what is wrong, and nothing has changed."""

from __future__ import annotations

import copy
import math
import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import esper_fx
from esper_fx import (
    AdapterError,
    ArgumentError,
    ArtifactStore,
    BlueprintError,
    EsperError,
    Germination,
    KasminaStateLayout,
    KernelCache,
    KernelCompiler,
    KernelKey,
    LineageError,
    MorphError,
    OptimizerError,
    SettingsError,
    SiteError,
    Stage,
    UnknownBlueprintError,
    UnknownSiteError,
)
from esper_fx.blueprints import get, names, registry
from esper_fx.checks import cause, shown
from esper_fx.growth import Order
from esper_fx.state import StateError

KEY = KernelKey.of(graph="a")
LONGEST = 1600

X = torch.arange(8.0).reshape(2, 4)

# What is handed over, by the name that the table below calls it by.
VALUES: Mapping[str, Any] = {
    "None": None,
    "5": 5,
    "-1": -1,
    "text": "x",
    "bytes": b"",
    "list": [],
    "dict": {},
    "object": object(),
    "nan": math.nan,
    "inf": math.inf,
    "class": nn.Linear,
    "True": True,
    "2.5": 2.5,
    "tensor": torch.zeros(4, 3),
    "[5]": [5],
    "{5: 5}": {5: 5},
}


class World:
    """A model in the middle of its life: LoRA incubates at "0", an optimizer is attached, an adapter lies beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.model = esper_fx.morph(self.net, sites="*", example_inputs=(X,))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.attachment = esper_fx.attach(self.optimizer, self.model)
        self.live, self.asleep = self.model.seeds["0"], self.model.seeds["1"]
        self.live.germinate("low_rank", rank=2, reads="input")
        self.store = ArtifactStore(folder / "store")
        self.cache = KernelCache()
        esper_fx.save_adapter(self.model, folder / "adapter")
        self.live.prune()
        self.optimizer.step()
        for _ in range(esper_fx.settings().embargo_steps):
            self.optimizer.step()
        assert self.live.stage is Stage.DORMANT
        self.unused = Germination(self.asleep)
        self.unused.settle()

    def grow(self) -> None:
        """Let LoRA incubate at "0"."""
        self.live.germinate("low_rank", rank=2, reads="input")

    def snapshot(self) -> Any:
        """All that a refused call might have changed."""
        model = self.model
        return (
            repr([model.state.rows(i) for i in range(len(model.seeds))]),
            list(model.ledger),
            model.morphology,
            model.clock,
            model.pending,
            [(s.stage, s.body, s.blueprint, s.live, s.error, dict(s.config)) for s in model.seeds.values()],
            [{**group, "params": [id(p) for p in group["params"]]} for group in self.optimizer.param_groups],
            {key: value for key, value in vars(self.optimizer).items() if key == "_esper_models"},
            list(model.state_dict()),
            model.growth.attachment,
            esper_fx.settings(),
            names(),
            sorted(os.walk(self.folder)),
            len(self.cache),
            torch.get_rng_state().tolist(),
        )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], World]:
    """Makes worlds; what tests register as blueprints is gone afterwards, and relative paths are in a folder of the test's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    (tmp_path / "store").mkdir(mode=0o700)
    return lambda: World(tmp_path)


@dataclass(frozen=True)
class Door:
    """One argument of one public callable.

    Attributes:
        name: The callable and the argument.
        call: Calls it in a world, with a value for that argument.
        fine: Names of the values that it takes.
        grown: Whether LoRA should be live at "0".
    """

    name: str
    call: Callable[[World, Any], Any]
    fine: str = ""
    grown: bool = False


def _configured(name: str, value: Any) -> None:
    with esper_fx.configure(**{name: value}):
        pass


def _attach_anew(world: World, **options: Any) -> None:
    other = torch.optim.SGD(world.model.parameters(), lr=0.1)
    world.model.growth.attachment = None
    try:
        esper_fx.attach(other, world.model, **options)
    finally:
        world.model.growth.attachment = world.attachment
    assert len(other.param_groups) == 2


def _register(value: Any, name: Any = "test_bad_input") -> None:
    esper_fx.blueprint(name, replace=True)(value)


def _body(site: esper_fx.SiteSpec) -> nn.Module:
    return nn.Identity()


REAL = "5 -1 2.5"
SECONDS = "None 5 -1 inf 2.5"

DOORS = [
    Door("morph net", lambda w, v: esper_fx.morph(v, sites="0")),
    Door("morph sites", lambda w, v: esper_fx.morph(w.net, sites=v), "class"),
    Door("morph sites, one of several", lambda w, v: esper_fx.morph(w.net, sites=["0", v]), "text class"),
    Door("morph example_inputs", lambda w, v: esper_fx.morph(w.net, sites="0", example_inputs=v), "None"),
    Door("morph max_sites", lambda w, v: esper_fx.morph(w.net, sites="0", max_sites=v), "5"),
    Door(
        "morph feature_dim",
        lambda w, v: esper_fx.morph(w.net, sites="0", feature_dim=v, example_inputs=(X,)),
        "None -1 dict",
    ),
    Door("morph seed", lambda w, v: esper_fx.morph(w.net, sites="0", seed=v), "5 -1"),
    Door("KasminaSeed.germinate blueprint", lambda w, v: w.asleep.germinate(v)),
    Door("KasminaSeed.germinate weights", lambda w, v: w.asleep.germinate("low_rank", weights=v), "None"),
    Door(
        "KasminaSeed.germinate weights, a tensor",
        lambda w, v: w.asleep.germinate("affine", weights={"scale": v, "shift": torch.zeros(4)}),
    ),
    Door("KasminaSeed.germinate alpha", lambda w, v: w.asleep.germinate("affine", alpha=v), f"None {REAL}"),
    Door("KasminaSeed.germinate rank", lambda w, v: w.asleep.germinate("low_rank", rank=v), "5"),
    Door("KasminaSeed.germinate activation", lambda w, v: w.asleep.germinate("low_rank", activation=v), "None"),
    Door("KasminaSeed.germinate reads", lambda w, v: w.asleep.germinate("low_rank", reads=v)),
    Door("KasminaSeed.germinate scale", lambda w, v: w.asleep.germinate("low_rank", scale=v), REAL),
    Door("KasminaSeed.germinate parts", lambda w, v: w.asleep.germinate("sequence", parts=v)),
    Door("KasminaSeed.germinate parts, one", lambda w, v: w.asleep.germinate("sequence", parts=[v])),
    Door("KasminaSeed.blend to", lambda w, v: w.live.blend(to=v), REAL, grown=True),
    Door("KasminaSeed.blend steps", lambda w, v: w.live.blend(steps=v), "5", grown=True),
    Door("KasminaSeed.blend schedule", lambda w, v: w.live.blend(schedule=v), grown=True),
    Door("KasminaSeed.prune why", lambda w, v: w.live.prune(v), "text", grown=True),
    Door("Germination.wait timeout", lambda w, v: w.unused.wait(v), SECONDS),
    Door("Germination.exception timeout", lambda w, v: w.unused.exception(v), SECONDS),
    Door("MorphableModel.settle timeout", lambda w, v: w.model.settle(v), SECONDS),
    Door("MorphableModel.seeds, one", lambda w, v: w.model.seeds[v]),
    Door("attach optimizer", lambda w, v: esper_fx.attach(v, w.model)),
    Door("attach model", lambda w, v: esper_fx.attach(w.optimizer, v)),
    Door("synchronize_growth model", lambda w, v: esper_fx.synchronize_growth(v)),
    Door(
        "synchronize_growth process_group", lambda w, v: v is None or esper_fx.synchronize_growth(w.model, v), "None"
    ),  # None means all processes
    Door("attach lr", lambda w, v: _attach_anew(w, lr=v), f"{REAL} inf"),
    Door("attach params", lambda w, v: _attach_anew(w, params=v)),
    Door("attach an option that there is not", lambda w, v: _attach_anew(w, learning_rate=v)),
    Door("unmorph model", lambda w, v: esper_fx.unmorph(v)),
    Door("write_lineage path", lambda w, v: esper_fx.write_lineage(v, w.model), "text"),
    Door("write_lineage model", lambda w, v: esper_fx.write_lineage("lineage.json", v)),
    Door("adapter_modules path", lambda w, v: esper_fx.adapter_modules(v)),
    Door("load_adapter model", lambda w, v: esper_fx.load_adapter(v, "adapter")),
    Door("load_adapter path", lambda w, v: esper_fx.load_adapter(w.model, v)),
    Door("load_adapter alpha", lambda w, v: esper_fx.load_adapter(w.model, "adapter", alpha=v), f"None {REAL}"),
    Door("save_adapter model", lambda w, v: esper_fx.save_adapter(v, "copy")),
    Door("save_adapter path", lambda w, v: esper_fx.save_adapter(w.model, v), "text", grown=True),
    Door("save_adapter sites", lambda w, v: esper_fx.save_adapter(w.model, "copy", sites=v), "None", grown=True),
    Door("save_adapter sites, one", lambda w, v: esper_fx.save_adapter(w.model, "copy", sites=[v]), grown=True),
    Door(
        "save_adapter base_model_name_or_path",
        lambda w, v: esper_fx.save_adapter(w.model, "copy", base_model_name_or_path=v),
        "None text",
        grown=True,
    ),
    Door("save_adapter prefix", lambda w, v: esper_fx.save_adapter(w.model, "copy", prefix=v), "None text", grown=True),
    Door("unload_adapter model", lambda w, v: esper_fx.unload_adapter(v)),
    Door("unload_adapter sites", lambda w, v: esper_fx.unload_adapter(w.model, v), "None list dict", grown=True),
    Door("unload_adapter sites, one", lambda w, v: esper_fx.unload_adapter(w.model, [v]), grown=True),
    Door("configure cache_dir", lambda w, v: _configured("cache_dir", v), "None text"),
    Door("Settings cache_dir", lambda w, v: esper_fx.Settings(cache_dir=v), "None text"),
    *(
        Door(f"configure {n}", lambda w, v, n=n: _configured(n, v), "True")
        for n in ("store", "blocks", "fused_kernels")
    ),
    *(
        Door(f"configure {n}", lambda w, v, n=n: _configured(n, v), "5")
        for n in (
            "workers",
            "worker_nice",
            "worker_threads",
            "max_entries",
            "max_bytes",
            "store_bytes",
            "embargo_steps",
        )
    ),
    Door("configure job_timeout", lambda w, v: _configured("job_timeout", v), "5 2.5"),
    Door("configure incubation_alpha", lambda w, v: _configured("incubation_alpha", v), REAL),
    Door("KernelCache max_entries", lambda w, v: KernelCache(max_entries=v), "5"),
    Door("KernelCache max_bytes", lambda w, v: KernelCache(max_bytes=v), "5"),
    Door("KernelCache store", lambda w, v: KernelCache(store=v), "None"),
    Door("KernelCache compiler", lambda w, v: KernelCache(compiler=v), "None"),
    Door("KernelCache.get key", lambda w, v: w.cache.get(v)),
    Door("KernelCache.peek key", lambda w, v: w.cache.peek(v)),
    Door("KernelCache.put key", lambda w, v: w.cache.put(v, 1, nbytes=1)),
    Door("KernelCache.put nbytes", lambda w, v: w.cache.put(KEY, 1, nbytes=v), "5"),
    Door("KernelCache.fetch key", lambda w, v: w.cache.fetch(v, load=len, build=dict)),  # type: ignore[arg-type]
    Door("KernelCache.pin key", lambda w, v: w.cache.pin(v)),
    Door("KernelCache.unpin key", lambda w, v: w.cache.unpin(v)),
    Door("KernelCache, key in it", lambda w, v: v in w.cache),
    Door("ArtifactStore root", lambda w, v: ArtifactStore("own" if v is None else v), "None text"),
    Door("ArtifactStore.get key", lambda w, v: w.store.get(v)),
    Door("ArtifactStore.contains key", lambda w, v: w.store.contains(v)),
    Door("ArtifactStore.delete key", lambda w, v: w.store.delete(v)),
    Door("ArtifactStore.put key", lambda w, v: w.store.put(v, b"1", metadata={})),
    Door("ArtifactStore.put data", lambda w, v: w.store.put(KEY, v, metadata={}), "bytes"),
    Door("ArtifactStore.put metadata", lambda w, v: w.store.put(KEY, b"1", metadata=v), "dict"),
    Door("ArtifactStore.trim max_bytes", lambda w, v: w.store.trim(v), "5"),
    *(
        Door(f"KernelCompiler {n}", lambda w, v, n=n: KernelCompiler(**{n: v}), "5")
        for n in ("workers", "nice", "threads")
    ),
    Door("KernelCompiler environment", lambda w, v: KernelCompiler(environment=v), "dict"),
    Door("KernelCompiler warm", lambda w, v: KernelCompiler(warm=v), "None"),
    Door("KernelCompiler job_timeout", lambda w, v: KernelCompiler(job_timeout=v), "None 5 inf 2.5"),
    Door("KernelCompiler.submit job", lambda w, v: KernelCompiler().submit(v)),
    Door("KernelKey digest", lambda w, v: KernelKey(v)),
    Door("KernelKey parts", lambda w, v: KernelKey("0" * 64, v)),
    Door(
        "KernelKey.of a part",
        lambda w, v: KernelKey.of(part=v),
        "None 5 -1 text bytes list dict nan inf True 2.5 [5]",
    ),
    Door("blueprint name", lambda w, v: _register(_body, v), "text"),
    Door("blueprint fits", lambda w, v: esper_fx.blueprint("own", fits=v, replace=True)(_body), "None class"),
    Door("blueprint function", lambda w, v: _register(v), "class"),
    Door("Blueprint.build site", lambda w, v: get("low_rank").build(v, {}, seed=0)),
    Door("Blueprint.build config", lambda w, v: get("low_rank").build(w.live.site, v, seed=0), "dict"),
    Door("Blueprint.bind config", lambda w, v: get("low_rank").bind(v), "dict"),
    Door("Blueprint.config_key config", lambda w, v: get("low_rank").config_key(v), "dict"),
    Door("Blueprint.fits site", lambda w, v: get("low_rank").fits(v)),
    Door("Blueprint.cost site", lambda w, v: get("low_rank").cost(v)),
    Door("KasminaStateLayout n_seeds", lambda w, v: KasminaStateLayout(v), "5"),
    Door("KasminaStateLayout names", lambda w, v: KasminaStateLayout(2, names=v), "None"),
    Door("KasminaStateLayout.read field", lambda w, v: w.model.state.read(v, 0)),
    Door("KasminaStateLayout.read i", lambda w, v: w.model.state.read("alpha", v)),
    Door("KasminaStateLayout.rows i", lambda w, v: w.model.state.rows(v)),
    Door("KasminaStateLayout.view i", lambda w, v: w.model.state.view("alpha", v)),
    Door("KasminaStateLayout.write i", lambda w, v: w.model.state.write(v, alpha=1.0)),
    Door("KasminaStateLayout.write alpha", lambda w, v: w.model.state.write(0, alpha=v), REAL),
    Door("KasminaStateLayout.write stage", lambda w, v: w.model.state.write(0, stage=v), "5"),
]


@pytest.mark.parametrize("door", DOORS, ids=[door.name for door in DOORS])
def test_a_wrong_value_is_refused_and_changes_nothing(door: Door, world: Callable[[], World]) -> None:
    here = world()
    if door.grown:
        here.grow()
    output = here.model(X)
    before = here.snapshot()
    fine = door.fine.split()
    assert set(fine) <= set(VALUES)
    for name in [name for name in VALUES if name not in fine]:
        with pytest.raises(EsperError) as refusal:
            door.call(here, VALUES[name])
        assert isinstance(refusal.value, TypeError | ValueError | KeyError | OSError), name
        assert 20 < len(str(refusal.value)) < LONGEST, name
        assert "tensor([" not in str(refusal.value), name
        assert here.snapshot() == before, name
    here.optimizer.param_groups[0]["lr"] = 0.0
    assert torch.equal(here.model(X), output)
    here.optimizer.step()  # and training goes on
    assert here.model.clock == before[3] + 1


@pytest.mark.parametrize("door", [door for door in DOORS if door.fine], ids=lambda door: door.name)
def test_what_is_fine_is_taken(door: Door, world: Callable[[], World]) -> None:
    for name in door.fine.split():
        here = world()
        if door.grown:
            here.grow()
        door.call(here, VALUES[name])


def test_every_public_callable_has_a_door() -> None:
    doors = {re.split(r"[ .,]", door.name)[0] for door in DOORS}
    for name in esper_fx.__all__:
        thing = getattr(esper_fx, name)
        record = isinstance(thing, type) and (
            is_dataclass(thing) or issubclass(thing, Enum | Exception | esper_fx.Ledger)
        )
        alias = name in ("wrap", "unwrap")
        assert name in doors or record or alias or name == "settings", name


# What the errors say.

REFUSED: list[tuple[Callable[[World], Any], type[EsperError], type[Exception], str]] = [
    (
        lambda w: esper_fx.morph(w.net, sites=5),  # type: ignore[arg-type]
        SiteError,
        ValueError,
        "sites=5 is nothing that selects: expected a name or a glob such as 'layers.*', a compiled regular expression, "
        "a module type, a list of these, or a predicate over graph nodes; sites='auto' finds some by itself",
    ),
    (
        lambda w: esper_fx.morph(w.net, sites=["0", 5]),  # type: ignore[list-item]
        SiteError,
        ValueError,
        "5 in sites=['0', 5] is nothing that selects: expected a name or a glob",
    ),
    (
        lambda w: esper_fx.morph(w.net, sites=w.net[0]),
        SiteError,
        ValueError,
        "sites=Linear(in_features=4, out_features=4, bias=True) is nothing that selects: expected a name or a glob",
    ),
    (
        lambda w: esper_fx.morph(w.net, sites=re.compile(b"0")),  # type: ignore[arg-type]
        SiteError,
        ValueError,
        "sites=re.compile(b'0') is nothing that selects",
    ),
    (
        lambda w: esper_fx.morph(w.net, "0", example_inputs=5),  # type: ignore[arg-type]
        MorphError,
        ValueError,
        "example_inputs must be a tuple of arguments, such as (x,), or a dict of keyword arguments by name, not 5",
    ),
    (
        lambda w: esper_fx.morph(w.net, "0", max_sites=0),
        SiteError,
        ValueError,
        "max_sites=0: expected a whole number from 1",
    ),
    (
        lambda w: esper_fx.morph(w.net, "0", seed="a"),  # type: ignore[arg-type]
        MorphError,
        ValueError,
        "seed='a': expected a whole number, which the initial values of grown modules come from",
    ),
    (
        lambda w: esper_fx.morph(w.net, "0", feature_dim=torch.zeros(3, 3)),  # type: ignore[arg-type]
        SiteError,
        ValueError,
        "feature_dim=<Tensor [3, 3], torch.float32>: expected a whole number, such as 1 for maps [N, C, *] or -1 for",
    ),
    (
        lambda w: w.asleep.germinate(["low_rank"]),  # type: ignore[arg-type]
        UnknownBlueprintError,
        KeyError,
        "no blueprint is registered under ['low_rank']: there are affine, ",
    ),
    (
        lambda w: w.asleep.germinate("low_rank", weights=[1]),  # type: ignore[arg-type]
        BlueprintError,
        ValueError,
        "weights=[1] for blueprint 'low_rank' at site '1': expected a state_dict of its body, a dict of tensors by name: "
        "down.weight, up.weight",
    ),
    (
        lambda w: w.asleep.germinate("affine", weights={"scale": 5, "shift": torch.zeros(4)}),  # type: ignore[dict-item]
        BlueprintError,
        ValueError,
        "weights for blueprint 'affine' at site '1' do not fit: ",
    ),
    (
        lambda w: w.asleep.germinate("affine", alpha="a"),  # type: ignore[arg-type]
        StateError,
        ValueError,
        "alpha='a' for the seed at '1': expected a finite number of at most 1e+30",
    ),
    (
        lambda w: w.live.blend(to="a"),  # type: ignore[arg-type]
        StateError,
        ValueError,
        "to='a' for the seed at '0': expected a finite number of at most 1e+30",
    ),
    (
        lambda w: w.live.blend(steps=2.5),  # type: ignore[arg-type]
        StateError,
        ValueError,
        "steps=2.5 for the seed at '0': expected a whole number from 0 to 1048576",
    ),
    (
        lambda w: w.live.blend(schedule=["cosine"]),  # type: ignore[arg-type]
        StateError,
        ValueError,
        "schedule=['cosine'] for the seed at '0': expected one of ['constant', 'linear', 'cosine']",
    ),
    (
        lambda w: w.live.prune(3),  # type: ignore[arg-type]
        ArgumentError,
        TypeError,
        "prune(why=3) at site '0': expected a text that says why, for the ledger",
    ),
    *(
        (
            call,
            ArgumentError,
            TypeError,
            "timeout='a': expected seconds as a number, or None to wait as long as it takes",
        )
        for call in (
            lambda w: w.unused.wait("a"),
            lambda w: w.unused.exception("a"),
            lambda w: w.model.settle("a"),
            lambda w: Germination(w.asleep).wait("a"),  # type: ignore[arg-type]
        )
    ),
    (lambda w: Germination(w.asleep).wait(math.nan), ArgumentError, ValueError, "timeout=nan: expected seconds as a"),
    (
        lambda w: esper_fx.attach(torch.optim.SGD(w.net.parameters()), nn.ReLU()),  # type: ignore[arg-type]
        OptimizerError,
        ValueError,
        "attach() needs a morphed model, not a ReLU; call esper_fx.morph first",
    ),
    (
        lambda w: _attach_anew(w, weigth_decay=0.1),
        OptimizerError,
        ValueError,
        "attach(weigth_decay=0.1): a group of SGD has no option 'weigth_decay'; the nearest are: 'weight_decay', ",
    ),
    (lambda w: _attach_anew(w, lr="fast"), OptimizerError, ValueError, "attach(lr='fast') for SGD: expected a number"),
    (
        lambda w: esper_fx.write_lineage(5, w.model),  # type: ignore[arg-type]
        ArgumentError,
        TypeError,
        "the path of a lineage: expected a path, as text or a pathlib.Path, not 5",
    ),
    (
        lambda w: esper_fx.write_lineage("missing/lineage.json", w.model),
        LineageError,
        OSError,
        "the lineage cannot be written to missing/lineage.json: there is no folder missing (No such file or directory)",
    ),
    (
        lambda w: esper_fx.write_lineage("store", w.model),
        LineageError,
        OSError,
        "the lineage cannot be written to store: that is a folder, give a file's name (Is a directory)",
    ),
    (
        lambda w: esper_fx.load_adapter(w.model, 5),  # type: ignore[arg-type]
        AdapterError,
        ValueError,
        "the folder of an adapter: expected a path, as text or a pathlib.Path, not 5",
    ),
    (
        lambda w: esper_fx.save_adapter(w.model, "copy", sites=5),  # type: ignore[arg-type]
        SiteError,
        ValueError,
        "sites=5: expected a name or several names, not 5",
    ),
    (
        lambda w: esper_fx.save_adapter(w.model, "copy", sites=["0", 5]),  # type: ignore[list-item]
        SiteError,
        ValueError,
        "sites=['0', 5]: expected a name or several names, not 5",
    ),
    (
        lambda w: esper_fx.unload_adapter(w.model, "o"),
        UnknownSiteError,
        KeyError,
        "the model has no site 'o'; it has 3, of which the nearest are: '",
    ),
    (
        lambda w: esper_fx.save_adapter(w.model, "copy", prefix=5),  # type: ignore[arg-type]
        AdapterError,
        ValueError,
        "prefix=5: expected a text",
    ),
    (
        lambda w: _configured("cache_dir", 5),
        SettingsError,
        ValueError,
        "setting cache_dir: expected a path, as text or a pathlib.Path, not 5",
    ),
    (
        lambda w: KernelCache(max_bytes="1GB"),  # type: ignore[arg-type]
        SettingsError,
        ValueError,
        "max_bytes='1GB': expected at least 1, a whole number",
    ),
    (
        lambda w: KernelCache(store="kernels"),  # type: ignore[arg-type]
        SettingsError,
        ValueError,
        "store='kernels': expected an ArtifactStore, such as ArtifactStore(folder), or None",
    ),
    (
        lambda w: KernelCache(store=ArtifactStore),  # type: ignore[arg-type]
        SettingsError,
        ValueError,
        "store=<class 'esper_fx.cache.store.ArtifactStore'>: expected an ArtifactStore, such as",
    ),
    (
        lambda w: KernelCache(compiler=KernelCompiler),  # type: ignore[arg-type]
        SettingsError,
        ValueError,
        "compiler=<class 'esper_fx.cache.compiler.KernelCompiler'>: expected a KernelCompiler, such as",
    ),
    (
        lambda w: w.cache.get("a"),  # type: ignore[arg-type]
        ArgumentError,
        TypeError,
        "'a' is no kernel key: expected a KernelKey, such as KernelKey.of(graph=...)",
    ),
    (
        lambda w: ArtifactStore(5),  # type: ignore[arg-type]
        SettingsError,
        ValueError,
        "the root of an artifact store: expected a path, as text or a pathlib.Path, not 5",
    ),
    (
        lambda w: w.store.put(KEY, "a", metadata={}),  # type: ignore[arg-type]
        ArgumentError,
        TypeError,
        f"data of kernel {KEY}: expected bytes, not 'a'",
    ),
    (
        lambda w: KernelCompiler(nice=2.5),  # type: ignore[arg-type]
        SettingsError,
        ValueError,
        "nice=2.5: expected 0 to 19 (0 is this process's own priority), a whole number",
    ),
    (
        lambda w: KernelCompiler(environment={"THREADS": 1}),  # type: ignore[dict-item]
        SettingsError,
        ValueError,
        "environment={'THREADS': 1}: expected a dict of texts by name, such as {'LANG': 'C'}",
    ),
    (
        lambda w: KernelCompiler().submit("job"),  # type: ignore[arg-type]
        ArgumentError,
        TypeError,
        "submit() needs a Job, such as Job('package.module:function', b''), not 'job'",
    ),
    (
        lambda w: KernelKey("0" * 64, [("a", "b")]),  # type: ignore[arg-type]
        ArgumentError,
        TypeError,
        "kernel key parts [('a', 'b')]: expected a tuple of pairs, name and SHA-256",
    ),
    (
        lambda w: _register(5),
        BlueprintError,
        ValueError,
        "blueprint 'test_bad_input' is 5: expected a function, def test_bad_input(site, *, ...), whose parameters can be read",
    ),
    (
        lambda w: esper_fx.blueprint("test_bad_input", fits="maps"),  # type: ignore[arg-type]
        BlueprintError,
        ValueError,
        "fits='maps' of blueprint 'test_bad_input': expected a function of a site that returns None where the body fits",
    ),
    (
        lambda w: get("low_rank").fits("0"),  # type: ignore[arg-type]
        BlueprintError,
        ValueError,
        "blueprint 'low_rank' was asked about '0': expected a SiteSpec, such as model.seeds[name].site",
    ),
    (
        lambda w: get("low_rank").bind([("rank", 8)]),  # type: ignore[arg-type]
        BlueprintError,
        ValueError,
        "the config of blueprint 'low_rank' is [('rank', 8)]: expected a dict, with rank=8, ",
    ),
    (
        lambda w: w.model.state.write(True, alpha=1.0),
        StateError,
        ValueError,
        "there is no seed True: expected 0 to 2 (3 seeds)",
    ),
    (
        lambda w: KasminaStateLayout(2, names=5),  # type: ignore[arg-type]
        StateError,
        ValueError,
        "names=5: expected a list of the seeds' sites",
    ),
]


@pytest.mark.parametrize(("call", "kind", "builtin", "wording"), REFUSED, ids=[row[3][:50] for row in REFUSED])
def test_the_error_says_what_is_wrong_and_nothing_changes(
    world: Callable[[], World],
    call: Callable[[World], Any],
    kind: type[EsperError],
    builtin: type[Exception],
    wording: str,
) -> None:
    here = world()
    here.grow()
    before = here.snapshot()
    with pytest.raises(kind) as refusal:
        call(here)
    assert type(refusal.value) is kind
    assert isinstance(refusal.value, builtin)
    assert str(refusal.value).startswith(wording)
    assert here.snapshot() == before


def test_a_fits_function_that_is_wrong_is_named_and_in_nobodys_way(world: Callable[[], World]) -> None:
    seed = world().asleep
    esper_fx.blueprint("test_bad_answer", fits=lambda site: True)(_body)  # type: ignore[arg-type, return-value]
    esper_fx.blueprint("test_bad_failure", fits=lambda site: site.nothing)(_body)  # type: ignore[attr-defined]
    assert "affine" in seed.fits()
    assert not {"test_bad_answer", "test_bad_failure"} & set(seed.fits())
    with pytest.raises(
        BlueprintError, match="does not fit site '1': its fits function returned True, expected None where"
    ):
        seed.germinate("test_bad_answer")
    with pytest.raises(BlueprintError, match="does not fit site '1': its fits function failed with AttributeError: "):
        seed.germinate("test_bad_failure")
    assert seed.stage is Stage.DORMANT


def test_of_several_germinations_none_happens_where_one_has_a_bad_alpha(world: Callable[[], World]) -> None:
    here = world()
    before = here.snapshot()
    orders = [Order(here.live, "affine", {}), Order(here.asleep, "affine", {}, alpha=math.nan)]
    with pytest.raises(StateError, match="alpha=nan for the seed at '1': expected a finite number"):
        here.model.growth.germinate_together(orders)
    assert here.snapshot() == before


def test_a_lineage_that_was_there_survives_a_failure(
    world: Callable[[], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = world()
    esper_fx.write_lineage("lineage.json", here.model)
    before, files = Path("lineage.json").read_bytes(), sorted(os.listdir())

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(LineageError, match=r"cannot be written to lineage.json \(No space left on device\)"):
        esper_fx.write_lineage("lineage.json", here.model)
    assert (Path("lineage.json").read_bytes(), sorted(os.listdir())) == (before, files)


# What is no bad input.


def test_numbers_of_numpy_are_numbers(world: Callable[[], World]) -> None:
    here = world()
    whole, real = numpy.int64, numpy.float32
    other = esper_fx.morph(
        here.net, sites="0", example_inputs=(X,), seed=whole(3), max_sites=whole(2), feature_dim=whole(-1)
    )
    same = esper_fx.morph(here.net, sites="0", example_inputs=(X,), seed=3)
    for model in (other, same):
        model.seeds["0"].germinate("low_rank", rank=2, alpha=real(0.5))
    assert torch.equal(other.seeds["0"].body.down.weight, same.seeds["0"].body.down.weight)  # type: ignore
    assert other.seeds["0"].alpha == 0.5
    other.seeds["0"].blend(to=real(0.25), steps=whole(0))
    other(X), other(X)
    assert (other.seeds["0"].alpha, other.seeds["0"].stage) == (0.25, Stage.ACTIVE)
    assert other.settle(real(0.0))
    assert other.state.read("alpha", whole(0)) == 0.25  # type: ignore[arg-type]
    with esper_fx.configure(workers=whole(2), job_timeout=real(8)) as settings:
        assert (settings.workers, settings.job_timeout) == (2, 8.0)
        assert type(settings.workers) is int


def test_a_large_whole_number_is_a_number(world: Callable[[], World]) -> None:
    here = world()
    here.grow()
    here.live.blend(to=10**30, steps=0)
    here.optimizer.step()
    assert here.live.alpha == pytest.approx(1e30)


def test_sites_may_come_from_a_generator() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert list(esper_fx.morph(net, sites=(name for name in ("0", "2"))).seeds) == ["0", "2"]
    assert list(esper_fx.morph(net, sites=(nn.Linear, nn.ReLU)).seeds) == ["0", "1", "2"]


def test_a_negative_timeout_only_looks(world: Callable[[], World]) -> None:
    pending = Germination(world().asleep)
    assert not pending.wait(-1)
    assert pending.exception(-1) is None


# The seeds of a model: a mapping to look up, not to change.


def model_of(*sites: str) -> esper_fx.MorphableModel:
    net = nn.ModuleDict({site: nn.Linear(4, 4) for site in sites})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers.values():
                x = layer(x)
            return x

    return esper_fx.morph(Net(), sites="layers.*", example_inputs=(X,))


def test_an_unknown_site_is_a_key_error_that_names_the_nearest_of_how_many() -> None:
    model = model_of(*(f"block{number}" for number in range(12)), "head")
    with pytest.raises(KeyError) as refusal:
        model.seeds["layers.haed"]
    assert isinstance(refusal.value, UnknownSiteError)
    assert isinstance(refusal.value, SiteError)
    assert str(refusal.value).startswith(
        "the model has no site 'layers.haed'; it has 13, of which the nearest are: 'layers.head', "
    )
    assert model.seeds.get("layers.haed") is None
    assert "layers.haed" not in model.seeds


def test_seeds_are_what_the_dictionary_was() -> None:
    model = model_of("a", "b")
    seeds, raw = model.seeds, model.growth.seeds
    assert isinstance(seeds, Mapping)
    assert (list(seeds), len(seeds), repr(seeds)) == (list(raw), 2, repr(raw))
    assert list(reversed(seeds)) == ["layers.b", "layers.a"]
    assert (list(seeds.keys()), list(seeds.values()), list(seeds.items())) == (
        list(raw.keys()),
        list(raw.values()),
        list(raw.items()),
    )
    assert seeds == raw
    assert seeds["layers.a"] is raw["layers.a"]
    assert dict(seeds) == raw
    assert {**seeds} == raw


def test_seeds_cannot_be_changed() -> None:
    model = model_of("a", "b")
    seeds: Any = model.seeds
    with pytest.raises(TypeError):
        seeds["layers.a"] = None
    with pytest.raises(TypeError):
        del seeds["layers.a"]
    for method in ("pop", "clear", "update", "setdefault", "popitem"):
        assert not hasattr(seeds, method)
    with pytest.raises(AttributeError):
        model.seeds = {}  # type: ignore[misc, assignment]
    assert list(model.growth.seeds) == ["layers.a", "layers.b"]


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda seeds: pickle.loads(pickle.dumps(seeds))], ids=["copy", "pickle"]
)
def test_seeds_are_copied_and_saved_with_what_they_hold(again: Callable[[Any], Any]) -> None:
    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), sites="*", example_inputs=(X,))
    model.seeds["0"].germinate("affine", alpha=0.5)
    copied = again(model.seeds)
    assert (list(copied), copied["0"].alpha, copied["0"].stage) == (["0", "1"], 0.5, Stage.INCUBATING)
    assert copied["0"] is not model.seeds["0"]
    copied["0"].prune()
    assert (copied["0"].alpha, model.seeds["0"].alpha) == (0.0, 0.5)
    whole = copy.deepcopy(model)
    assert whole.seeds["0"] is whole.growth.seeds["0"] is not model.seeds["0"]


# How values are shown.


class _Loud:
    def __repr__(self) -> str:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(3, 4), "<Tensor [3, 4], torch.float32>"),
        (numpy.zeros((2, 2)), "<ndarray [2, 2], float64>"),
        (nn.Parameter(torch.zeros(2)), "<Parameter [2], torch.float32>"),
        (torch.tensor(3.0), "tensor(3.)"),
        ({"a": torch.zeros(2)}, "{'a': <Tensor [2], torch.float32>}"),
        (nn.LazyLinear(3).weight, "<UninitializedParameter>"),
        (list(range(9)), "[0, 1, 2, 3, 4, 5, ...]"),
        (_Loud(), "<_Loud>"),
        ("it's", '"it\'s"'),
        (nn.Linear(2, 3), "Linear(in_features=2, out_features=3, bias=True)"),
    ],
)
def test_values_are_shown_short(value: Any, text: str) -> None:
    assert shown(value) == text


def test_a_number_with_more_digits_than_python_writes_is_shown() -> None:
    assert shown(10**6000) == "<int of 19932 bits>"


def test_no_value_and_no_cause_is_shown_at_length() -> None:
    deep: list[Any] = []
    for _ in range(50):
        deep = [deep] * 9
    wide = {f"{number}": torch.zeros(100) for number in range(100)}
    for value in ("x" * 9999, b"x" * 9999, nn.Sequential(*[nn.Linear(2, 2)] * 99), deep, wide, list(wide.values())):
        assert len(shown(value)) < 500
        assert "\n" not in shown(value)
    assert len(cause(ValueError("x" * 9999))) < 900
    assert cause(ValueError("short\nException raised from f at c10.h\nframe #0")) == "ValueError: short"
