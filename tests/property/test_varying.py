"""A program that is laid out for one number of rows computes what it should for others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper_fx.engine.plan import Layout
from esper_fx.passes.carry_sizes import carry_sizes
from tests.support import programs
from tests.support.examples import examples
from tests.support.networks import assert_same
from tests.support.plans import Scale, ambient, gradients_of, run_plan
from tests.support.programs import Instruction, instructions

pytestmark = pytest.mark.property


@examples(15)
@given(
    instructions(),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sets(st.integers(0, 2)),
    st.sampled_from([None, 0, 3]),
    st.lists(st.integers(2, 9), min_size=2, max_size=4),
)
def test_what_was_laid_out_for_some_rows_computes_the_program_for_others(
    program: tuple[Instruction, ...],
    grad: tuple[bool, bool, bool],
    live: set[int],
    directions: int | None,
    numbers: list[int],
) -> None:
    bodies = {site: Scale(site) for site in live if site < programs.count_seeds(program)}
    host = programs.Host(bodies)
    first, *others = numbers
    module = programs.with_rows(programs.build(program, host.handle), first)
    layout = Layout(module, _arguments(program, grad, first), ambient(), blocks=True, vary=True)
    assert layout.module.graph.find_nodes(op="call_method", target="size") == []
    assert not carry_sizes(layout.module.graph)
    for rows in (first, *others):
        args = _arguments(program, grad, rows)
        leaves = [*(a for a in args if isinstance(a, Tensor) and a.requires_grad), *(b.weight for b in bodies.values())]
        expected = module(*args)
        try:
            expected_gradients = gradients_of(expected, leaves)
        except RuntimeError as error:  # the program itself has no backward pass
            assert "modified by an inplace operation" in str(error)
            return
        for plan in layout.plans:
            sampler: Any = SimpleNamespace(sampling=True, directions=directions, take=lambda taken: None)
            outputs = run_plan(layout, plan, args, bodies, None if directions is None else sampler)
            assert_same(list(outputs[:3]), list(expected[:3]))
            assert outputs[3:] == expected[3:]
            assert_same(gradients_of(outputs, leaves), expected_gradients)


def _arguments(program: tuple[Instruction, ...], grad: tuple[bool, bool, bool], rows: int) -> list[Any]:
    return [*programs.arguments(program, grad=grad, rows=rows), rows]
