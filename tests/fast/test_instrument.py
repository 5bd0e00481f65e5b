"""Probes measure what flows through the sites of a program, both ways, and change nothing of what it computes."""

from __future__ import annotations

from collections import defaultdict

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from esper_fx import ops
from esper_fx.engine.plan import Layout
from esper_fx.engine.probes import Taken
from esper_fx.ops.probe import GRADIENTS, VALUES
from esper_fx.ops.sensor import omega
from esper_fx.passes.instrument import instrument
from esper_fx.passes.specialize import specialize
from tests.support import programs
from tests.support.examples import examples
from tests.support.plans import Scale, ambient, gradients_of, run_plan
from tests.support.programs import SEED, Host, Instruction, instructions


class Keeper:
    """A sampler that keeps what it is given."""

    sampling = True

    def __init__(self, directions: int = 0) -> None:
        self.directions = directions
        self.values: dict[int, Tensor] = {}
        self.parts: list[Taken] = []

    def begin_step(self, clock: int) -> None: ...

    def join_step(self, clock: int) -> None: ...

    def forget(self) -> None: ...

    def take(self, taken: Taken) -> None:
        assert taken.values.dtype == torch.float64
        self.values |= dict(zip(taken.seeds, taken.values, strict=True))
        if taken.leaf is not None:
            self.parts.append(taken)


class Recorder(Host):
    """A host that notes what flows through its sites, by hooks of autograd."""

    def __init__(self, bodies: dict[int, Scale]) -> None:
        super().__init__(bodies)
        self.changed: dict[int, bool] = {}
        self.values: dict[int, tuple[Tensor, Tensor]] = {}
        self.gradients: dict[int, Tensor] = {}

    def run_seed(self, site: int, x: Tensor, alpha: Tensor, gate: Tensor, source: Tensor | None = None) -> Tensor:
        y = super().run_seed(site, x, alpha, gate, source)
        self.values[site] = (x.detach().double().clone(), y.detach().double().clone())
        if y.requires_grad and torch.is_grad_enabled() and not self.changed[site]:
            y = y.clone()
            y.register_hook(lambda gradient: self.gradients.update({site: gradient.double()}))
        return y


def values_of(x: Tensor, y: Tensor) -> Tensor:
    """What `VALUES` says, of finite values."""
    m2 = (x - x.mean()).square().sum()
    assert len(VALUES) == 6
    return torch.stack(
        [torch.tensor(float(x.numel())), x.mean(), m2, x.abs().max(), x.new_zeros(()), (y - x).norm() ** 2]
    )


def gradient_of(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """What `GRADIENTS` says."""
    assert len(GRADIENTS) == 4
    return torch.stack([g.norm() ** 2, g.abs().max(), (g * x).sum(), (g * (y - x)).sum()])


@examples(20)
@given(
    instructions(),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sets(st.integers(0, 2)),
    st.sampled_from([0, 3]),
)
def test_probes_of_every_plan_measure_what_flows_and_change_nothing(
    program: tuple[Instruction, ...], grad: tuple[bool, bool, bool], live: set[int], directions: int
) -> None:
    bodies = {site: Scale(site) for site in live if site < programs.count_seeds(program)}
    host = Recorder(bodies)
    module = programs.build(program, host.handle)
    args = programs.arguments(program, grad=grad)
    layout = Layout(module, args, ambient(), blocks=True)
    host.changed = {slot.site: slot.changed for slot in layout.slots}
    leaves = [*(arg for arg in args if arg.requires_grad), *(body.weight for body in bodies.values())]
    expected = module(*args)
    try:
        expected_gradients = gradients_of(expected, leaves)
    except RuntimeError as error:  # the program itself has no backward pass
        assert "modified by an inplace operation" in str(error)
        return
    for plan in layout.plans:
        keeper = Keeper(directions)
        outputs = run_plan(layout, plan, args, bodies, keeper)
        assert torch.equal(outputs[0], expected[0])
        assert torch.equal(outputs[1], expected[1])
        assert [o.requires_grad for o in outputs[:2]] == [o.requires_grad for o in expected[:2]]
        assert keeper.values.keys() == host.values.keys()
        for site, row in keeper.values.items():
            torch.testing.assert_close(row, values_of(*host.values[site]), rtol=1e-6, atol=1e-9)
        probes = [leaf for part in keeper.parts for leaf in (part.leaf, *part.sketches) if leaf is not None]
        gradients = gradients_of(outputs, [*leaves, *probes])
        by_leaf = dict(zip(map(id, probes), gradients[len(leaves) :], strict=True))
        for mine, theirs in zip(gradients, expected_gradients, strict=False):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
        rows: dict[int, Tensor] = defaultdict(lambda: torch.zeros(len(GRADIENTS), dtype=torch.float64))
        sketches: dict[int, Tensor | None] = {}
        for part in keeper.parts:
            table = by_leaf[id(part.leaf)]
            rows |= {} if table is None else {part.seeds[row]: table[row] for row in part.rows}
            assert set(part.rows) <= set(part.sensors) if directions else not part.sketches
            sketches |= {
                part.seeds[row]: by_leaf[id(leaf)] for row, leaf in zip(part.sensors, part.sketches, strict=True)
            }
        for site, gradient in host.gradients.items():
            expected_row = gradient_of(gradient, *host.values[site])
            torch.testing.assert_close(rows.pop(site), expected_row, rtol=1e-3, atol=1e-4)
            if directions:
                x, _ = host.values[site]
                expected_sketch = omega(0, x.shape[1], directions).t() @ x.t() @ gradient
                torch.testing.assert_close(sketches[site], expected_sketch.float(), rtol=1e-3, atol=1e-3)
        assert all(not row.any() for row in rows.values())


def graph_of_a_site(*, then: str = "neg") -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    seed = graph.call_function(SEED.default, (x, x, x, 0, 0, True))
    graph.output((graph.call_method(then, (seed,)), x))
    return graph


def test_users_of_the_seed_see_the_probe_and_those_of_the_value_do_not() -> None:
    graph = specialize(instrument(graph_of_a_site(), [True]), [None])
    module = fx.GraphModule(torch.nn.Module(), graph)
    leaf = torch.zeros(1, len(GRADIENTS), dtype=torch.float64, requires_grad=True)
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y, same, _ = module(x, leaf)
    assert same is x
    (y * 3.0 + same * 5.0).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0]
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[18.0, 3.0, 3.0, 0.0]]  # of -3, and not of -3 + 5


def test_where_the_value_is_changed_in_place_only_the_value_is_measured() -> None:
    graph = instrument(graph_of_a_site(then="mul_"), [False])
    assert [n.target for n in graph.nodes if n.target is ops.probe.site_gradient] == []
    assert [n.target for n in graph.nodes if n.target is ops.probe.site_values] == [ops.probe.site_values]


def test_the_template_stays_as_it_was() -> None:
    template = graph_of_a_site()
    before = str(template)
    instrument(template, [True])
    assert str(template) == before
