"""Adapters: a LoRA checkpoint on a model's seeds and back, and every input that is refused with nothing changed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import esper_fx
from esper_fx.errors import (
    AdapterError,
    AdapterFileError,
    EsperError,
    LifecycleError,
    MissingDependencyError,
    SiteError,
)
from esper_fx.lifecycle import Stage
from tests.support.adapters import PREFIX, write_checkpoint, write_files
from tests.support.linear_kinds import Convolutional, Matrices, Mixed, matrices, with_lora
from tests.support.networks import run

TOKENS = (2, 3, 6)
LINEAR = ["first", "keyword", "transposed", "own", "shared", "head.1"]


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def morphed(net: nn.Module | None = None, sites: Any = LINEAR, shape: tuple[int, ...] = TOKENS) -> Any:
    return esper_fx.morph(net or Mixed(), sites=sites, example_inputs=(torch.randn(shape),))


def loras_for(net: nn.Module, ranks: dict[str, int]) -> dict[str, Matrices]:
    return {name: matrices(net.get_submodule(name), rank, seed=len(name)) for name, rank in ranks.items()}


# Loading.


@pytest.mark.parametrize("folder_type", [str, Path])
def test_a_loaded_adapter_computes_what_its_matrices_say(tmp_path: Path, folder_type: Callable[[Path], Any]) -> None:
    net, x = Mixed(), torch.randn(TOKENS)
    loras = loras_for(net, {"first": 2, "transposed": 4, "shared": 2, "head.1": 1})
    folder = write_checkpoint(tmp_path / "adapter", loras, lora_alpha=6, alpha_pattern={"first": 3})
    model = morphed(net, esper_fx.adapter_modules(folder_type(folder)))
    assert list(model.seeds) == ["first", "transposed", "shared", "head.1"]
    germinations = esper_fx.load_adapter(model, folder_type(folder))
    assert list(germinations) == ["first", "head.1", "shared", "transposed"]
    assert all(germination.done() and germination.exception() is None for germination in germinations.values())
    assert {seed.stage for seed in model.seeds.values()} == {Stage.ACTIVE}
    scales = {"first": 3 / 2, "transposed": 6 / 4, "shared": 6 / 2, "head.1": 6 / 1}
    expected = with_lora(net, {name: replace(lora, scale=scales[name]) for name, lora in loras.items()})(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(model(x), net(x), atol=1e-2)


def test_an_adapter_of_convolutions(tmp_path: Path) -> None:
    net, x = Convolutional(), torch.randn(2, 4, 9, 9)
    loras = loras_for(net, {"strided": 2, "grouped": 4, "same": 3, "pointwise": 1, "head": 2})
    folder = write_checkpoint(tmp_path, loras, lora_alpha=2)
    model = morphed(net, list(loras), (2, 4, 9, 9))
    esper_fx.load_adapter(model, folder)
    scaled = {name: replace(lora, scale=2 / lora.down.shape[0]) for name, lora in loras.items()}
    torch.testing.assert_close(model(x), with_lora(net, scaled)(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"lora_alpha": 8}, [8 / 2, 8 / 4]),
        ({"lora_alpha": 0.5}, [0.5 / 2, 0.5 / 4]),
        ({"lora_alpha": 8, "use_rslora": True}, [8 / math.sqrt(2), 8 / 2]),
        ({"lora_alpha": 8, "alpha_pattern": {"own": 3, "fir.*": 5}}, [5 / 2, 3 / 4]),
        ({"alpha_pattern": {"^own": 3}, "lora_alpha": 1}, [1 / 2, 3 / 4]),
        ({"alpha_pattern": {"wn": 3}, "lora_alpha": 1}, [1 / 2, 1 / 4]),
        ({"alpha_pattern": None, "lora_alpha": 1, "lora_dropout": None}, [1 / 2, 1 / 4]),
    ],
)
def test_the_scale_is_what_peft_makes_of_the_settings(
    tmp_path: Path, config: dict[str, Any], scales: list[float]
) -> None:
    model = morphed()
    loras = loras_for(model, {"first": 2, "own": 4})
    esper_fx.load_adapter(model, write_checkpoint(tmp_path, loras, **config))
    assert [float(model.seeds[name].body.scale) for name in loras] == pytest.approx(scales)
    assert [model.seeds[name].config["rank"] for name in loras] == [2, 4]


@pytest.mark.parametrize("key", ["{}.lora_{}.weight", "base_model.model.{}.lora_{}.default.weight"])
def test_other_spellings_of_the_keys(tmp_path: Path, key: str) -> None:
    model, lora = morphed(), matrices(nn.Linear(6, 8), 2)
    tensors = {key.format("first", "A"): lora.down, key.format("first", "B"): lora.up}
    write_files(tmp_path, {"peft_type": "LORA", "r": 2, "lora_alpha": 2}, tensors)
    esper_fx.load_adapter(model, tmp_path)
    assert torch.equal(model.seeds["first"].body.down.weight, lora.down)


def test_alpha_multiplies_all_that_the_adapter_adds(tmp_path: Path) -> None:
    net, x = Mixed(), torch.randn(TOKENS)
    loras = loras_for(net, {"first": 2, "own": 2})
    model = morphed(net)
    esper_fx.load_adapter(model, write_checkpoint(tmp_path, loras), alpha=0.25)
    scaled = {name: replace(lora, scale=0.25 / 2) for name, lora in loras.items()}
    torch.testing.assert_close(model(x), with_lora(net, scaled)(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trainable", [True, False])
def test_only_a_trainable_adapter_gets_gradients_and_joins_the_optimizer(tmp_path: Path, trainable: bool) -> None:
    model, x = morphed(), torch.randn(TOKENS, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    esper_fx.attach(optimizer, model)
    before = len(optimizer.param_groups[0]["params"])
    esper_fx.load_adapter(
        model, write_checkpoint(tmp_path, loras_for(model, {"first": 2, "own": 3})), trainable=trainable
    )
    _, gradients = run(model, x)
    mine = [name for name in gradients if name.startswith("esper.seeds.")]
    assert len(mine) == (4 if trainable else 0)
    assert len(optimizer.param_groups[0]["params"]) == before + len(mine)
    assert all(parameter.requires_grad is trainable for parameter in model.seeds["own"].body.parameters())


def test_dropout_acts_in_training_and_not_in_evaluation(tmp_path: Path) -> None:
    model, x = morphed(), torch.randn(TOKENS)
    esper_fx.load_adapter(model, write_checkpoint(tmp_path, loras_for(model, {"first": 2}), lora_dropout=0.5))
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("training", [True, False])
def test_seeds_begin_in_the_mode_of_the_modules_they_sit_at(tmp_path: Path, training: bool) -> None:
    net, x = Mixed().train(training), torch.randn(TOKENS)
    net.own.train(not training)
    model = morphed(net)
    esper_fx.load_adapter(model, write_checkpoint(tmp_path, loras_for(model, {"own": 2}), lora_dropout=0.5))
    assert {site: seed.training for site, seed in model.seeds.items()} == {
        site: training is not (site == "own") for site in LINEAR
    }
    assert model.seeds["own"].body.dropout.training is not training
    assert torch.equal(model(x), model(x)) is training


def test_tensors_take_the_dtype_of_their_site(tmp_path: Path) -> None:
    net = Mixed().bfloat16()
    model = esper_fx.morph(net, sites="first", example_inputs=(torch.randn(TOKENS).bfloat16(),))
    lora = matrices(net.first, 2)
    esper_fx.load_adapter(model, write_checkpoint(tmp_path, {"first": Matrices(lora.down.float(), lora.up.float(), 1)}))
    assert model.seeds["first"].body.up.weight.dtype == torch.bfloat16
    assert model(torch.randn(TOKENS).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("rename", "sites"),
    [
        (lambda name: f"model.{name}", ["first", "own"]),
        (lambda name: f"wrapper.model.{name}", ["first", "own"]),
        (lambda name: name.removeprefix("inner."), ["inner.first", "inner.own"]),
    ],
    ids=["of a wrapper", "of a deeper wrapper", "of a part"],
)
def test_names_that_all_differ_by_one_prefix_are_found(
    tmp_path: Path, rename: Callable[[str], str], sites: list[str]
) -> None:
    net: nn.Module = nn.Sequential()
    net.add_module("inner", Mixed())
    net = net if sites[0].startswith("inner") else Mixed()
    model = morphed(net, sites)
    loras = loras_for(net, dict.fromkeys(sites, 2))
    write_checkpoint(tmp_path, {rename(site): lora for site, lora in loras.items()})
    assert sorted(esper_fx.load_adapter(model, tmp_path)) == sites
    for site, lora in loras.items():
        assert torch.equal(model.seeds[site].body.down.weight, lora.down)


# Unloading.


def test_an_unloaded_adapter_leaves_the_model_as_it_was_and_its_sites_free_for_another(tmp_path: Path) -> None:
    net, x = Mixed(), torch.randn(TOKENS)
    model = morphed(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    esper_fx.attach(optimizer, model)
    parameters = list(optimizer.param_groups[0]["params"])
    model.seeds["keyword"].germinate("low_rank", rank=2)
    for i, sites in enumerate((["first", "own"], ["own", "shared"])):
        loras = loras_for(net, dict.fromkeys(sites, 2 + i))
        esper_fx.load_adapter(model, write_checkpoint(tmp_path / str(i), loras, lora_alpha=2 + i), trainable=True)
        torch.testing.assert_close(model(x), with_lora(net, loras)(x), rtol=1e-6, atol=1e-6)
        assert esper_fx.unload_adapter(model) == sites
        assert {model.seeds[site].stage for site in sites} == {Stage.DORMANT}
        torch.testing.assert_close(model(x), net(x), rtol=0, atol=0)
    assert model.seeds["keyword"].stage is Stage.INCUBATING
    assert len(optimizer.param_groups[0]["params"]) == len(parameters) + 2  # those at "keyword"
    assert esper_fx.unload_adapter(model) == []


def test_chosen_sites_are_unloaded_or_none(tmp_path: Path) -> None:
    model = morphed()
    esper_fx.load_adapter(model, write_checkpoint(tmp_path, loras_for(model, {"first": 2, "own": 2, "shared": 2})))
    model.seeds["own"].fossilize()
    for sites, error, wording in (
        (["first", "own"], LifecycleError, "the seed at 'own' is FOSSILIZED and cannot become EMBARGOED"),
        (["first", "second"], SiteError, "the model has no site 'second'; it has 6, of which the nearest are: "),
        (None, LifecycleError, "the seed at 'own' is FOSSILIZED"),
    ):
        refused(model, lambda sites=sites: esper_fx.unload_adapter(model, sites), error, wording)  # type: ignore[misc]
    assert esper_fx.unload_adapter(model, "first") == ["first"]
    assert [model.seeds[site].stage for site in ("first", "shared")] == [Stage.DORMANT, Stage.ACTIVE]
    with pytest.raises(AdapterError, match="unload_adapter.. needs a morphed model, not a Mixed"):
        esper_fx.unload_adapter(Mixed())  # type: ignore[arg-type]


# Bad input: a clear error, and nothing has changed.


def refused(model: Any, load: Callable[[], Any], error: type[EsperError], *wordings: str) -> None:
    """Assert that loading is refused so worded, and that nothing of the model has changed."""
    before = (
        model.morphology,
        len(model.ledger),
        [seed.stage for seed in model.seeds.values()],
        [seed.body for seed in model.seeds.values()],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )
    with pytest.raises(error) as caught:
        load()
    for wording in wordings:
        assert wording in str(caught.value)
    assert (model.morphology, len(model.ledger)) == before[:2]
    assert [seed.stage for seed in model.seeds.values()] == before[2]
    assert [seed.body for seed in model.seeds.values()] == before[3]
    after = model.state_dict()
    assert list(after) == list(before[4])
    assert all(torch.equal(after[name], tensor) for name, tensor in before[4].items() if not tensor.isnan().any())


def test_modules_that_do_not_exist_are_named_with_what_comes_nearest(tmp_path: Path) -> None:
    model = morphed()
    loras = loras_for(model, {"first": 2, "own": 2})
    write_checkpoint(tmp_path, {"first": loras["first"], "frist": loras["first"], "hed.1": loras["own"]})
    refused(
        model,
        lambda: esper_fx.load_adapter(model, tmp_path),
        AdapterError,
        f"the adapter in {tmp_path} does not fit: the model has no module 'frist' (nearest: 'first', ",
        "'hed.1' (nearest: 'head.1', ",
    )


def test_many_missing_modules_are_counted(tmp_path: Path) -> None:
    model, lora = morphed(), matrices(nn.Linear(6, 8), 2)
    write_checkpoint(tmp_path, {f"layer{i}": lora for i in range(8)})
    refused(model, lambda: esper_fx.load_adapter(model, tmp_path), AdapterError, "'layer4'", " and 3 more")


def test_modules_where_no_seed_sits_are_named(tmp_path: Path) -> None:
    model = morphed(sites=["first", "own"])
    write_checkpoint(tmp_path, loras_for(model, {"first": 2, "shared": 2, "head.1": 2}))
    refused(
        model,
        lambda: esper_fx.load_adapter(model, tmp_path),
        AdapterError,
        "no seed sits at 'head.1', 'shared': pass these modules to morph(), for example "
        "sites=esper_fx.adapter_modules(path)",
    )
    loras = loras_for(model, {"first": 2, "shared": 2})
    write_checkpoint(tmp_path, {f"model.{name}": lora for name, lora in loras.items()})
    refused(
        model,
        lambda: esper_fx.load_adapter(model, tmp_path),
        AdapterError,
        "does not fit: no seed sits at 'shared': pass these modules to morph()",
    )


def test_a_prefix_that_is_not_the_only_one_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential()
    net.add_module("a", nn.Sequential(nn.Linear(6, 6)))
    net.add_module("b", nn.Sequential(nn.Linear(6, 6)))
    model = morphed(net, ["a.0", "b.0"])
    write_checkpoint(tmp_path, {"0": matrices(nn.Linear(6, 6), 2)})
    refused(
        model,
        lambda: esper_fx.load_adapter(model, tmp_path),
        AdapterError,
        "does not say which modules it is for: '0' may be 'a.0' or 'b.0'",
    )


@pytest.mark.parametrize(
    ("change", "wording"),
    [
        (
            lambda lora: replace(lora, down=lora.down[:, :5]),
            "module 'first': its lora_A has shape [2, 5], expected [2, 6] for rank 2 there",
        ),
        (
            lambda lora: replace(lora, up=lora.up[:7]),
            "module 'first': its lora_B has shape [7, 2], expected [8, 2] for rank 2 there",
        ),
        (
            lambda lora: replace(lora, up=lora.up[:, :1]),
            "module 'first': its lora_B has shape [8, 1], expected [8, 2] for rank 2 there",
        ),
        (
            lambda lora: replace(lora, down=lora.down[..., None, None], up=lora.up[..., None, None]),
            "module 'first': its lora_A has shape [2, 6, 1, 1], expected [2, 6] for rank 2 there",
        ),
        (lambda lora: replace(lora, down=lora.down[0]), "lora_A of module 'first' has shape [6] and lora_B [8, 2]"),
        (
            lambda lora: replace(lora, down=lora.down.long()),
            "'base_model.model.first.lora_A.weight' has dtype torch.int64, expected a floating one",
        ),
    ],
    ids=["inputs", "outputs", "rank of B", "convolution", "vector", "whole numbers"],
)
def test_shapes_that_do_not_fit_are_refused(
    tmp_path: Path, change: Callable[[Matrices], Matrices], wording: str
) -> None:
    model = morphed()
    loras = loras_for(model, {"first": 2, "own": 2})
    write_checkpoint(tmp_path, {**loras, "first": change(loras["first"])}, r=2, rank_pattern={})
    refused(model, lambda: esper_fx.load_adapter(model, tmp_path), AdapterError, wording)


def test_a_rank_other_than_the_settings_say_is_refused(tmp_path: Path) -> None:
    model = morphed()
    write_checkpoint(tmp_path, loras_for(model, {"first": 2, "own": 3}), r=2, rank_pattern={})
    refused(
        model,
        lambda: esper_fx.load_adapter(model, tmp_path),
        AdapterError,
        "lora_A of module 'own' has shape [3, 8], which is rank 3, but adapter_config.json says rank 2",
    )


def test_a_module_that_is_no_linear_map_is_refused(tmp_path: Path) -> None:
    model = morphed(sites=["first", "head"])
    write_checkpoint(tmp_path, {"first": matrices(model.first, 2), "head": matrices(nn.Linear(8, 5), 2)})
    refused(
        model,
        lambda: esper_fx.load_adapter(model, tmp_path),
        AdapterError,
        "does not fit module 'head': reads='input' for blueprint 'low_rank' does not fit site 'head'",
    )


@pytest.mark.parametrize("grow", ["low_rank", "affine"])
def test_a_seed_that_is_awake_is_refused_before_others_have_changed(tmp_path: Path, grow: str) -> None:
    model = morphed()
    write_checkpoint(tmp_path, loras_for(model, {"first": 2, "own": 2, "shared": 2}))
    model.seeds["own"].germinate(grow)
    refused(
        model,
        lambda: esper_fx.load_adapter(model, tmp_path),
        LifecycleError,
        "needs seeds that are DORMANT, but 'own' is INCUBATING. Take away what is there: unload_adapter(model) frees the "
        "sites of an adapter for the next step, prune() after the embargo",
    )


def test_a_site_of_which_nothing_is_known_yet_is_refused(tmp_path: Path) -> None:
    net = Mixed()
    model = esper_fx.morph(net, sites=["first", "own"])
    write_checkpoint(tmp_path, loras_for(net, {"first": 2, "own": 2}))
    refused(model, lambda: esper_fx.load_adapter(model, tmp_path), SiteError, "nothing is known of site 'first' yet")


def test_a_model_that_is_not_morphed_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, loras_for(Mixed(), {"first": 2}))
    with pytest.raises(AdapterError, match="needs a morphed model, not a Mixed; call esper_fx.morph first"):
        esper_fx.load_adapter(Mixed(), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="save_adapter.. needs a morphed model, not a Mixed"):
        esper_fx.save_adapter(Mixed(), tmp_path)  # type: ignore[arg-type]


def damaged(folder: Path, damage: str) -> Path:
    """A folder whose content is damaged in one way."""
    tensors, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if damage == "missing folder":
        return folder / "elsewhere"
    if damage == "a file":
        return tensors
    if damage == "no config":
        config.unlink()
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "pickle":
        tensors.rename(folder / "adapter_model.bin")
    elif damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif damage == "truncated header":
        tensors.write_bytes(tensors.read_bytes()[:20])
    elif damage == "empty":
        tensors.write_bytes(b"")
    elif damage == "foreign tensors":
        tensors.write_bytes(b"PK\x03\x04 something else entirely" * 9)
    elif damage == "foreign config":
        config.write_bytes(b"\xff\xfe\x00{")
    elif damage == "truncated config":
        config.write_text(config.read_text()[:-20])
    return folder


@pytest.mark.parametrize(
    ("damage", "wording"),
    [
        ("missing folder", "elsewhere is not a folder: expected the one that PEFT's save_pretrained wrote"),
        ("a file", "adapter_model.safetensors is not a folder"),
        ("no config", "adapter_config.json cannot be read (FileNotFoundError"),
        ("no tensors", "adapter_model.safetensors is missing: expected the tensors of the adapter"),
        ("pickle", "There is an adapter_model.bin, which is not read, because loading it would execute code in it."),
        ("truncated", "adapter_model.safetensors cannot be read as safetensors"),
        ("truncated header", "adapter_model.safetensors cannot be read as safetensors"),
        ("empty", "adapter_model.safetensors cannot be read as safetensors"),
        ("foreign tensors", "it is truncated or something else"),
        ("foreign config", "adapter_config.json cannot be read (UnicodeDecodeError"),
        ("truncated config", "adapter_config.json cannot be read (JSONDecodeError"),
    ],
)
def test_files_that_are_missing_truncated_or_foreign_are_refused(tmp_path: Path, damage: str, wording: str) -> None:
    model = morphed()
    folder = damaged(write_checkpoint(tmp_path, loras_for(model, {"first": 2, "own": 2})), damage)
    refused(model, lambda: esper_fx.load_adapter(model, folder), AdapterFileError, wording)
    with pytest.raises(AdapterFileError):
        esper_fx.adapter_modules(folder)


@pytest.mark.parametrize(
    ("config", "wording"),
    [
        ({"peft_type": "IA3"}, "describes no LoRA adapter: peft_type is 'IA3', expected 'LORA'"),
        ({"peft_type": None}, "describes no LoRA adapter: peft_type is None"),
        ({"use_dora": True}, "asks for what is not supported: use_dora=True (DoRA"),
        ({"bias": "all"}, "bias='all' (biases of the model that were trained)"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True (a bias inside LoRA)"),
        ({"modules_to_save": ["head"]}, "modules_to_save=['head'] (modules that were trained whole)"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights='pissa_niter_4' (it changes the model's own weights",
        ),
        ({"layer_replication": [[0, 2]]}, "layer_replication=[[0, 2]]"),
        ({"use_dora": True, "bias": "all"}, "); bias='all'"),
        ({"r": 0}, "r=0: expected a whole number from 1"),
        ({"r": "8"}, "r='8': expected a whole number from 1"),
        ({"lora_alpha": "x"}, "lora_alpha='x': expected a finite number"),
        ({"lora_alpha": None}, "lora_alpha=None: expected a finite number"),
        ({"rank_pattern": ["first"]}, "rank_pattern=['first']: expected an object"),
        ({"rank_pattern": {"first": 1.5}}, "rank_pattern=1.5: expected a whole number from 1"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern has the pattern '(', which is no regular expression"),
        ({"lora_dropout": 1.5}, "dropout=1.5 for blueprint 'low_rank': expected a number from 0 to below 1"),
    ],
)
def test_settings_that_are_not_supported_or_make_no_sense_are_refused(
    tmp_path: Path, config: dict[str, Any], wording: str
) -> None:
    model = morphed()
    write_checkpoint(tmp_path, loras_for(model, {"first": 2, "own": 2}), **config)
    refused(model, lambda: esper_fx.load_adapter(model, tmp_path), AdapterError, wording)


@pytest.mark.parametrize("content", [[], "LORA", 3, None])
def test_settings_of_another_kind_are_refused(tmp_path: Path, content: Any) -> None:
    write_files(tmp_path, content, {f"{PREFIX}first.lora_A.weight": torch.zeros(2, 6)})
    with pytest.raises(AdapterError, match="describes no LoRA adapter: peft_type is None"):
        esper_fx.adapter_modules(tmp_path)


@pytest.mark.parametrize(
    ("extra", "wording"),
    [
        ("first.lora_embedding_A", "LoRA of an embedding, which is not supported"),
        ("first.lora_magnitude_vector.weight", "DoRA, which is not supported"),
        ("first.lora_B.bias", "a bias inside LoRA, which is not supported"),
        ("head.1.weight", "'base_model.model.head.1.weight' (neither lora_A.weight nor lora_B.weight of a module)"),
    ],
)
def test_tensors_that_are_not_lora_are_named(tmp_path: Path, extra: str, wording: str) -> None:
    model, lora = morphed(), matrices(nn.Linear(6, 8), 2)
    tensors = {
        f"{PREFIX}first.lora_A.weight": lora.down,
        f"{PREFIX}first.lora_B.weight": lora.up,
        PREFIX + extra: torch.zeros(3),
    }
    write_files(tmp_path, {"peft_type": "LORA", "r": 2}, tensors)
    refused(
        model,
        lambda: esper_fx.load_adapter(model, tmp_path),
        AdapterError,
        "does not belong to a LoRA adapter",
        wording,
    )


@pytest.mark.parametrize(
    ("keys", "wording"),
    [
        ([], "holds no tensors, expected lora_A.weight and lora_B.weight of some modules"),
        (["first.lora_A"], "lacks lora_B.weight of module 'first'"),
        (["first.lora_B"], "lacks lora_A.weight of module 'first'"),
        (["first.lora_A.one", "first.lora_B.two"], "holds several adapters, ['one', 'two']: expected one"),
    ],
)
def test_tensors_that_are_missing_or_mixed_are_refused(tmp_path: Path, keys: list[str], wording: str) -> None:
    model = morphed()
    write_files(
        tmp_path,
        {"peft_type": "LORA", "r": 2},
        {f"{PREFIX}{key}.weight": torch.zeros((2, 6) if "_A" in key else (8, 2)) for key in keys},
    )
    refused(model, lambda: esper_fx.load_adapter(model, tmp_path), AdapterError, wording)


def test_without_safetensors_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = morphed()
    write_checkpoint(tmp_path, loras_for(model, {"first": 2}))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: esper_fx.load_adapter(model, tmp_path), lambda: esper_fx.save_adapter(model, tmp_path)):
        refused(model, call, MissingDependencyError, "needs the package safetensors: pip install 'esper-fx[adapters]'")


# Saving.


def test_what_is_saved_is_loaded_again_and_computes_the_same(tmp_path: Path) -> None:
    net, x = Mixed(), torch.randn(TOKENS)
    model = morphed(net)
    ranks = {"first": 2, "keyword": 2, "transposed": 3, "head.1": 2}
    for i, (site, lora) in enumerate(loras_for(net, ranks).items()):
        weights = {"down.weight": lora.down, "up.weight": lora.up}
        model.seeds[site].germinate(
            "low_rank", rank=ranks[site], reads="input", scale=1 + i, weights=weights, alpha=0.5 + i / 4
        )
    assert esper_fx.save_adapter(model, tmp_path / "new" / "adapter") == sorted(ranks)
    other = morphed(net, esper_fx.adapter_modules(tmp_path / "new" / "adapter"))
    esper_fx.load_adapter(other, tmp_path / "new" / "adapter")
    torch.testing.assert_close(other(x), model(x), rtol=1e-6, atol=1e-6)
    assert sorted(path.name for path in (tmp_path / "new" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def save(model: Any, folder: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    esper_fx.save_adapter(model, folder, **options)
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def test_the_settings_hold_what_most_modules_share_and_patterns_for_the_others(tmp_path: Path) -> None:
    model = morphed()
    for site, rank, scale in (("first", 4, 2.0), ("own", 4, 2.0), ("transposed", 2, 2.0), ("head.1", 4, 0.3)):
        model.seeds[site].germinate("low_rank", rank=rank, reads="input", scale=scale, dropout=0.1)
    config, tensors = save(model, tmp_path, base_model_name_or_path="mine")
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    assert config["rank_pattern"] == {"^transposed": 2}
    assert config["alpha_pattern"] == {"^transposed": 4, r"^head\.1": pytest.approx(1.2)}
    assert config["target_modules"] == ["first", "head.1", "own", "transposed"]
    assert config["base_model_name_or_path"] == "mine"
    assert config["fan_in_fan_out"] is False
    assert tensors[f"{PREFIX}head.1.lora_A.weight"].shape == (4, 8)
    assert len(tensors) == 8


def test_a_prefix_and_transposed_modules_and_chosen_sites(tmp_path: Path) -> None:
    model = morphed()
    model.seeds["transposed"].germinate("low_rank", rank=2, reads="input")
    model.seeds["own"].germinate("affine")
    config, tensors = save(model, tmp_path, sites="transposed", prefix="model.inner")
    assert config["fan_in_fan_out"] is True
    assert config["base_model_name_or_path"] is None
    assert config["target_modules"] == ["model.inner.transposed"]
    assert sorted(tensors) == [f"{PREFIX}model.inner.transposed.lora_{half}.weight" for half in "AB"]


def test_names_that_are_ends_of_other_names_are_written_as_a_regular_expression(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    model = morphed(net, ["0", "1.0"])
    model.seeds["0"].germinate("low_rank", rank=2, reads="input")
    assert save(model, tmp_path)[0]["target_modules"] == "0"
    model.seeds["1.0"].germinate("low_rank", rank=2, reads="input")
    assert save(model, tmp_path)[0]["target_modules"] == ["0", "1.0"]


@pytest.mark.parametrize(
    ("blueprint", "config", "wording"),
    [
        ("low_rank", {}, "'own' reads the output of its module (reads='output')"),
        ("affine", {}, "'own' has become affine"),
        ("low_rank", {"reads": "input", "activation": "relu"}, "'own' has an activation, 'relu'"),
    ],
)
def test_seeds_that_are_not_lora_are_never_left_out_in_silence(
    tmp_path: Path, blueprint: str, config: dict[str, Any], wording: str
) -> None:
    model = morphed()
    model.seeds["first"].germinate("low_rank", rank=2, reads="input")
    model.seeds["own"].germinate(blueprint, **config)
    with pytest.raises(AdapterError) as error:
        esper_fx.save_adapter(model, tmp_path / "a")
    assert str(error.value) == (
        f"not all seeds can be saved as LoRA: {wording}. Name the sites to save, sites=[…], to leave others out"
    )
    assert not (tmp_path / "a").exists()
    assert esper_fx.save_adapter(model, tmp_path / "a", sites=["first"]) == ["first"]


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    model = morphed()
    with pytest.raises(AdapterError, match="there is nothing to save: no seed of the model has a body"):
        esper_fx.save_adapter(model, tmp_path / "a")
    with pytest.raises(SiteError, match="the model has no site 'second'; it has 6, of which the nearest are: "):
        esper_fx.save_adapter(model, tmp_path / "a", sites=["second"])
    with pytest.raises(AdapterError, match="'own' is DORMANT"):
        esper_fx.save_adapter(model, tmp_path / "a", sites=["own"])
    model.seeds["own"].germinate("low_rank", reads="input")
    model.seeds["first"].germinate("low_rank", reads="input", dropout=0.5)
    with pytest.raises(AdapterError, match="one dropout, but the seeds have several: {'first': 0.5, 'own': 0.0}"):
        esper_fx.save_adapter(model, tmp_path / "a")
    dilated = morphed(nn.Sequential(nn.Conv1d(4, 4, 3, dilation=2)), "0", (2, 4, 9))
    dilated.seeds["0"].germinate("low_rank", reads="input")
    with pytest.raises(AdapterError, match="'0' is a dilated convolution, which PEFT's LoRA does not follow"):
        esper_fx.save_adapter(dilated, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterFileError, match="the adapter cannot be written to"):
        esper_fx.save_adapter(model, tmp_path / "file", sites="own")


def test_pruned_seeds_are_not_saved(tmp_path: Path) -> None:
    model = morphed()
    for site in ("first", "own"):
        model.seeds[site].germinate("low_rank", rank=2, reads="input")
    model.seeds["own"].prune()
    assert esper_fx.save_adapter(model, tmp_path) == ["first"]


# Germinating together.


def test_seeds_that_germinate_together_change_nothing_where_one_cannot() -> None:
    from esper_fx.growth import Order

    model = morphed()
    good = Order(model.seeds["first"], "low_rank", {"rank": 2})
    bad = Order(model.seeds["own"], "low_rank", {"rank": 0})
    refused(model, lambda: model.growth.germinate_together([good, bad]), EsperError, "rank=0 for blueprint 'low_rank'")
    assert model.growth.germinate_together([]) == []
