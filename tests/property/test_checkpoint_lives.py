"""Random lives: saved at any moment and resumed in a fresh process's objects, training goes on to the bit."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

import esper_fx
from tests.support.examples import examples
from tests.support.training import KINDS, OPTIMIZERS, SITES, Training, assert_same, carried

sites = st.sampled_from(SITES)
actions = st.one_of(
    st.tuples(st.just("train"), st.integers(1, 4)),
    st.tuples(st.just("germinate"), sites, st.sampled_from(KINDS)),
    st.tuples(
        st.just("blend"),
        sites,
        st.sampled_from([1.0, 0.3, -0.5]),
        st.integers(0, 9),
        st.sampled_from(["cosine", "linear", "constant"]),
    ),
    st.tuples(st.sampled_from(["fossilize", "prune"]), sites),
)
# A life that is likely to grow: what its stages do not allow is left out.
lives = st.lists(actions, min_size=3, max_size=14).map(lambda life: [("germinate", "b", KINDS[0]), *life])


@examples(30)
@given(
    life=lives,
    more=lives,
    before=st.none() | lives,
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    own_group=st.booleans(),
    attach_first=st.booleans(),
)
def test_a_run_that_was_resumed_equals_one_that_never_stopped(
    life: list[Any], more: list[Any], before: list[Any] | None, optimizer: str, own_group: bool, attach_first: bool
) -> None:
    with esper_fx.configure(embargo_steps=3, incubation_alpha=0.5):
        run = Training(optimizer, own_group=own_group)
        run.live(life)
        saved = carried(run.save())
        expected = run.facts()
        if before is None:
            other = Training(optimizer, own_group=own_group, checkpoint=saved, attach_first=attach_first, seed=1)
        else:  # into objects that have a life behind them already
            other = Training(optimizer, own_group=own_group, seed=1)
            other.live(before)
            other.load(saved)
        assert_same(other.facts(), expected)
        other.live(more)
        resumed = other.facts()
        torch.set_rng_state(saved["random"])
        run.live(more)
        assert_same(resumed, run.facts())
