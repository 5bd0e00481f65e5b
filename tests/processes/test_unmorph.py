"""A plain model in a process without esper_fx."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import esper_fx
from tests.support.cases import small_cnn, small_transformer
from tests.support.growing import grow
from tests.support.processes import REPOSITORY

WITHOUT_ESPER_FX = """
import sys
sys.modules["esper_fx"] = None
sys.path.insert(0, {repository!r})
import torch
plain = torch.load({folder!r} + "/plain.pt", weights_only=False)
x = torch.load({folder!r} + "/x.pt")
again = torch.load({folder!r} + "/copied.pt", weights_only=False)
again.load_state_dict(torch.load({folder!r} + "/state.pt"))
import copy, io
second = io.BytesIO()
torch.save(copy.deepcopy(plain), second)
second.seek(0)
outputs = [m(*x) for m in (plain, again, copy.deepcopy(plain), torch.load(second, weights_only=False))]
outputs[0].sum().backward()
torch.save((outputs, plain.lineage, [p.grad for p in plain.parameters()]), {folder!r} + "/out.pt")
assert not [name for name in sys.modules if name.startswith("esper_fx.")]
"""


@pytest.mark.parametrize("kind", ["transformer", "cnn"])
def test_it_loads_and_runs_where_esper_fx_cannot_be_imported(kind: str, tmp_path: Path) -> None:
    example = small_transformer() if kind == "transformer" else small_cnn()
    model = esper_fx.morph(example.model, sites=["blocks.*", "head"], example_inputs=example.inputs)
    for number, (site, seed) in enumerate(model.seeds.items()):
        names = [name for name in seed.fits() if name in ("attention", "conv", "gated_mlp", "channel_gate", "affine")]
        grow(model, site, names[number % len(names)], seed=number)
    plain = esper_fx.unmorph(model.eval())
    saved = {"plain": plain, "copied": copy.deepcopy(plain), "state": plain.state_dict(), "x": example.inputs}
    for name, value in saved.items():
        torch.save(value, tmp_path / f"{name}.pt")
    source = WITHOUT_ESPER_FX.format(repository=str(REPOSITORY), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    outputs, lineage, gradients = torch.load(tmp_path / "out.pt", weights_only=False)
    expected = plain(*example.inputs)
    for output in outputs:
        torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    assert lineage == plain.lineage
    expected.sum().backward()
    torch.testing.assert_close(gradients, [p.grad for p in plain.parameters()], rtol=1e-5, atol=1e-5)
