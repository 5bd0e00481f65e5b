"""Adapters against PEFT itself, both ways: outputs within 1e-6, gradients within 1e-5.

PEFT and transformers take seconds to import: that is why this is not in the fast lane, and why they are imported by the tests
and not by the file, which every lane collects.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper_fx
from esper_fx.lifecycle import Stage


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def llama(kind: str = "LlamaModel") -> tuple[nn.Module, Tensor]:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    return getattr(transformers, kind)(config), torch.randint(32, (2, 5))


def gpt2() -> tuple[nn.Module, Tensor]:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=32,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.GPT2Model(config), torch.randint(32, (2, 5))


def arguments(x: Tensor) -> dict[str, Any]:
    """What the networks of this file take: features, or token ids by the name that transformers has for them."""
    return {"x": x} if x.is_floating_point() else {"input_ids": x, "use_cache": False}


def run(model: nn.Module, x: Tensor) -> Tensor:
    result: Any = model(**arguments(x))
    hidden: Tensor = result if isinstance(result, Tensor) else result[0]
    return hidden


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.block = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12, bias=False))
        self.second = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.second(x + self.block(x))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, (3, 5), stride=2, padding=(1, 2), bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.same = nn.Conv2d(12, 8, 3, padding="same", dilation=2)
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.down(torch.relu(self.stem(x))))))
        return self.head(self.circular(torch.tanh(self.same(x))).mean(dim=(2, 3)))


@dataclass(frozen=True)
class Case:
    """A network, and settings of LoRA for it."""

    make: Callable[[], tuple[nn.Module, Tensor]]
    config: dict[str, Any]


LLAMA = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]}
GPT2 = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
CASES = {
    "llama": Case(llama, {"r": 4, "lora_alpha": 16, **LLAMA}),
    "llama, ranks and alphas by pattern": Case(
        llama,
        {
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 8},
            "alpha_pattern": {"v_proj": 3, "layers.0.self_attn.q_proj": 5},
            "use_rslora": True,
            **LLAMA,
        },
    ),
    "llama, all linear": Case(llama, {"r": 2, "target_modules": "all-linear"}),
    "llama, by regular expression": Case(llama, {"r": 1, "target_modules": r".*layers\.1\..*(up|down)_proj"}),
    "gpt2": Case(gpt2, {"r": 4, "lora_alpha": 16, **GPT2}),
    "gpt2, rank stabilised": Case(gpt2, {"r": 8, "lora_alpha": 3, "use_rslora": True, **GPT2}),
    "perceptron": Case(
        lambda: (Perceptron(), torch.randn(5, 6)),
        {"r": 3, "lora_alpha": 7, "target_modules": ["first", "block.0", "2"]},
    ),
    "images": Case(
        lambda: (Images(), torch.randn(2, 3, 9, 9)),
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["stem", "down", "grouped", "same", "circular", "head"],
            "rank_pattern": {"grouped": 6, "stem": 2},
        },
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def trained(net: nn.Module, config: dict[str, Any]) -> Any:
    """PEFT's model of a copy of a network, with matrices that are not zero."""
    import peft

    model = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model


def in_peft(net: nn.Module, folder: Path) -> Any:
    """PEFT's model of a copy of a network with the adapter in a folder."""
    import peft

    return peft.PeftModel.from_pretrained(copy.deepcopy(net), str(folder))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    run(model, x).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def by_module(found: dict[str, Tensor], model: esper_fx.MorphableModel) -> dict[str, Tensor]:
    """Gradients of seeds' bodies under the names that PEFT has for them."""
    names = {
        id(parameter): f"base_model.model.{site}.{half}.default.weight"
        for site, seed in model.seeds.items()
        if seed.body is not None
        for half, parameter in (("lora_A", seed.body.down.weight), ("lora_B", seed.body.up.weight))
    }
    parameters = dict(model.named_parameters())
    return {names[id(parameters[key])]: g for key, g in found.items() if id(parameters[key]) in names}


@each_case
def test_an_adapter_from_peft_computes_and_learns_as_in_peft(case: Case, tmp_path: Path) -> None:
    net, x = case.make()
    theirs = trained(net, case.config)
    theirs.save_pretrained(tmp_path)
    net.requires_grad_(False)
    model = esper_fx.morph(net, sites=esper_fx.adapter_modules(tmp_path), example_inputs=arguments(x))
    torch.testing.assert_close(run(model, x), run(net, x), rtol=0, atol=0)
    esper_fx.load_adapter(model, tmp_path, trainable=True)
    for mode in (True, False):
        model.train(mode)
        theirs.train(mode)
        torch.testing.assert_close(run(model, x), run(theirs, x), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(run(model, x), run(net, x), atol=1e-4)
    model.train()
    theirs.train()
    expected = gradients(theirs, x)
    actual = by_module(gradients(model, x), model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@each_case
def test_an_adapter_that_is_saved_computes_the_same_in_peft(case: Case, tmp_path: Path) -> None:
    net, x = case.make()
    trained(net, case.config).save_pretrained(tmp_path / "first")
    model = esper_fx.morph(net, sites=esper_fx.adapter_modules(tmp_path / "first"), example_inputs=arguments(x))
    esper_fx.load_adapter(model, tmp_path / "first", alpha=0.75)
    saved = esper_fx.save_adapter(model, tmp_path / "second")
    assert saved == esper_fx.adapter_modules(tmp_path / "first")
    theirs = in_peft(net, tmp_path / "second")
    model.eval()
    torch.testing.assert_close(run(theirs, x), run(model, x), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(run(model, x), run(net.eval(), x), atol=1e-4)
    adapted = {name.partition(".lora_A")[0] for name, _ in theirs.named_modules() if name.endswith(".lora_A")}
    assert sorted(name.removeprefix("base_model.model.") for name in adapted) == saved
    theirs.save_pretrained(tmp_path / "third")
    again = esper_fx.morph(net, sites=saved, example_inputs=arguments(x)).eval()
    esper_fx.load_adapter(again, tmp_path / "third")
    torch.testing.assert_close(run(again, x), run(model, x), rtol=1e-6, atol=1e-6)


def test_grown_seeds_of_all_ranks_and_names_that_are_ends_of_others_are_saved_for_peft(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 4))
    x = torch.randn(3, 6)
    model = esper_fx.morph(net, sites=["0", "1.0", "2"], example_inputs=(x,))
    for site, rank, scale in (("0", 2, 0.3), ("2", 4, 2.0)):
        model.seeds[site].germinate("low_rank", rank=rank, reads="input", scale=scale)
        nn.init.normal_(model.seeds[site].body.up.weight)
        model.seeds[site].blend(to=0.6, steps=0)
    model(x)
    assert model.seeds["2"].alpha == pytest.approx(0.6)
    for sites in (["0"], ["0", "2"]):
        esper_fx.save_adapter(model, tmp_path, sites=sites)
        theirs = in_peft(net, tmp_path)
        layers = [name for name, _ in theirs.named_modules() if name.endswith(".lora_A")]
        assert layers == [f"base_model.model.{site}.lora_A" for site in sites]
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-6, atol=1e-6)


def test_an_adapter_of_a_wrapper_goes_onto_the_model_inside_and_back(tmp_path: Path) -> None:
    net, ids = llama("LlamaForCausalLM")
    theirs = trained(net, {"r": 2, **LLAMA})
    theirs.save_pretrained(tmp_path / "first")
    model = esper_fx.morph(net.model, sites=["**.*_proj"], example_inputs=arguments(ids))
    esper_fx.load_adapter(model, tmp_path / "first")
    torch.testing.assert_close(run(model, ids), run(theirs.base_model.model.model, ids), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(run(model, ids), run(net.model, ids), atol=1e-4)
    esper_fx.save_adapter(model, tmp_path / "second", prefix="model")
    back = in_peft(net, tmp_path / "second")
    torch.testing.assert_close(run(back, ids), run(theirs.eval(), ids), rtol=1e-6, atol=1e-6)


def test_dropout_is_drawn_where_peft_draws_it(tmp_path: Path) -> None:
    net, x = Perceptron(), torch.randn(5, 6)
    theirs = trained(net, {"r": 2, "lora_dropout": 0.3, "target_modules": ["first", "second"]})
    theirs.save_pretrained(tmp_path)
    model = esper_fx.morph(net, sites=["first", "second"], example_inputs=arguments(x))
    esper_fx.load_adapter(model, tmp_path, trainable=True)
    outputs = []
    for each in (model.train(), theirs.train()):
        torch.manual_seed(3)
        outputs.append(run(each, x))
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "wording"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["second"]}, r"modules_to_save=\['second'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
)
def test_what_peft_writes_of_other_kinds_is_refused(tmp_path: Path, config: dict[str, Any], wording: str) -> None:
    import peft

    net = Perceptron()
    peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(r=2, target_modules=["first"], **config)).save_pretrained(
        tmp_path
    )
    model = esper_fx.morph(net, sites="first", example_inputs=(torch.randn(5, 6),))
    with pytest.raises(esper_fx.AdapterError, match=wording):
        esper_fx.load_adapter(model, tmp_path)
    assert model.seeds["first"].stage is Stage.DORMANT


def test_embeddings_and_other_methods_are_refused(tmp_path: Path) -> None:
    import peft

    net = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4))
    peft.get_peft_model(net, peft.LoraConfig(target_modules=["0", "1"])).save_pretrained(tmp_path / "embedding")
    with pytest.raises(esper_fx.AdapterError, match="LoRA of an embedding, which is not supported"):
        esper_fx.adapter_modules(tmp_path / "embedding")
    other = peft.IA3Config(target_modules=["1"], feedforward_modules=[])
    peft.get_peft_model(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4)), other).save_pretrained(tmp_path / "ia3")
    with pytest.raises(esper_fx.AdapterError, match="peft_type is 'IA3', expected 'LORA'"):
        esper_fx.adapter_modules(tmp_path / "ia3")
