"""The state of a run on a model of three numbers: averages, skipped steps, and what may share memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from vgpt_jax import UserError
from vgpt_jax.quantizers.quantizer import Buffer
from vgpt_jax.training import state as state_module
from vgpt_jax.training.sharding import make_mesh, replicate
from vgpt_jax.training.state import (
    apply_gradients,
    averaged_model,
    create_sharded_state,
    create_state,
    merge_model,
    skip_counts,
    skip_if_not_finite,
    start_from,
    update_averages,
)
from vgpt_jax.training.tokenizer_step import DiscriminatorState, TokenizerState


class Line(nnx.Module):
    """``slope * x + offset``, and how often it was asked."""

    def __init__(self, rngs: nnx.Rngs):
        self.slope = nnx.Param(jax.random.normal(rngs.params(), (2,)))
        self.offset = nnx.Param(jnp.float32(1.0))
        self.asked = Buffer(jnp.int32(0))

    def __call__(self, x):
        return self.slope[...] * x + self.offset[...]


def make(averaged=True, optimizer=None):
    return create_state(Line(nnx.Rngs(0)), optimizer or optax.adam(0.1), 7, averaged=averaged)


def filled(like, slope, offset):
    """Parameters of these values."""
    copy = jax.tree.map(lambda x: x, like)
    copy["slope"][...], copy["offset"][...] = jnp.float32(slope), jnp.float32(offset)
    return copy


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# Creation


def test_a_fresh_state_is_of_step_0_and_averages_what_it_starts_with():
    graph, state = make()
    assert [int(x) for x in (state.step, state.skipped, state.skipped_in_a_row)] == [0, 0, 0]
    assert bits(state.averages) == bits(state.params)
    assert [str(path[-1]) for path, _ in nnx.to_flat_state(state.params)] == ["offset", "slope"]
    assert [str(path[-1]) for path, _ in nnx.to_flat_state(state.buffers)] == ["asked"]
    np.testing.assert_array_equal(state.key, jax.random.key_data(jax.random.key(7)))
    np.testing.assert_array_equal(merge_model(graph, state)(2.0), Line(nnx.Rngs(0))(2.0))
    assert make(averaged=False)[1].averages is None


def test_every_step_has_a_key_of_its_own_that_depends_on_nothing_else():
    state = make()[1]
    keys = [jax.random.key_data(state.replace(step=jnp.int32(i)).step_key()).tobytes() for i in range(20)]
    assert len(set(keys)) == 20
    other = state.replace(step=jnp.int32(3), params=None, skipped=jnp.int32(5))
    assert jax.random.key_data(other.step_key()).tobytes() == keys[3]


@pytest.mark.parametrize("devices", [1, 8])
def test_no_two_arrays_of_a_fresh_state_share_memory(devices):
    """A step donates its state, and no memory can be given away twice."""
    mesh = make_mesh(devices=jax.devices()[:devices])
    _, state = create_sharded_state(Line, optax.adam(0.1), 0, mesh, averaged=True)
    discriminator = replicate(mesh, DiscriminatorState.of(create_sharded_state(Line, optax.adam(0.1), 1, mesh)[1]))
    state = TokenizerState(**vars(state), discriminator=discriminator)
    shards = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(state)]
    assert len({shard.unsafe_buffer_pointer() for shard in shards}) == len(shards)


def test_a_replicated_state_is_the_same_on_every_device():
    _, state = create_sharded_state(Line, optax.adam(0.1), 7, make_mesh(), averaged=True)
    np.testing.assert_allclose(state.params["slope"][...], Line(nnx.Rngs(7)).slope[...], rtol=1e-6)
    assert bits(state.averages) == bits(state.params)
    assert bits(state.key) == bits(make()[1].key)
    for leaf in jax.tree.leaves(state):
        assert {np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards} == {np.asarray(leaf).tobytes()}
        assert len(leaf.addressable_shards) == 8


# Updates and averages


def test_one_update_is_the_optimizers():
    _, state = make(optimizer=optax.sgd(0.5))
    gradients = filled(state.params, [1.0, -2.0], 4.0)
    after = apply_gradients(state, gradients, optax.sgd(0.5))
    np.testing.assert_allclose(
        after.params["slope"][...], state.params["slope"][...] - np.array([0.5, -1.0]), rtol=1e-6
    )
    np.testing.assert_allclose(after.params["offset"][...], 1.0 - 2.0)
    assert int(after.step) == 1
    assert bits(after.averages) == bits(state.averages)


def test_averages_are_numpys_through_and_past_their_warm_up():
    """With a decay of 0.5 the warm-up ends at step 8, where (1 + 8) / (10 + 8) is as much."""
    _, state = make()
    rng, update = np.random.default_rng(0), jax.jit(update_averages, static_argnums=1)
    expected = np.append(np.asarray(state.params["slope"][...], np.float64), 1.0)
    for step in range(1, 15):
        *slope, offset = numbers = rng.normal(size=3)
        state = update(state.replace(step=jnp.int32(step), params=filled(state.params, slope, offset)), 0.5)
        decay = (1 + step) / (10 + step) if step < 8 else 0.5
        expected = decay * expected + (1 - decay) * numbers
        found = np.append(state.averages["slope"][...], state.averages["offset"][...])
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(state.params["slope"][...], slope, rtol=1e-6)
    assert state.averages["slope"][...].dtype == jnp.float32


def test_the_averaged_model_has_averages_and_the_buffers_of_the_moment():
    graph, state = make()
    state = state.replace(averages=filled(state.params, [2.0, 3.0], 5.0))
    state.buffers["asked"][...] = jnp.int32(4)
    averaged, trained = averaged_model(graph, state), merge_model(graph, state)
    np.testing.assert_array_equal(averaged(10.0), [25.0, 35.0])
    np.testing.assert_array_equal(trained(10.0), Line(nnx.Rngs(0))(10.0))
    assert int(averaged.asked[...]) == int(trained.asked[...]) == 4
    without = averaged_model(graph, state.replace(averages=None))
    np.testing.assert_array_equal(without(10.0), trained(10.0))


@pytest.mark.parametrize("merge", [merge_model, averaged_model])
@pytest.mark.parametrize("averaged", [True, False])
def test_what_is_written_to_a_merged_model_does_not_reach_the_state(merge, averaged):
    graph, state = make(averaged)
    before = bits(state)
    model = merge(graph, state)
    model.slope[...] = jnp.zeros(2)
    model.asked[...] = jnp.int32(9)
    assert bits(state) == before


def test_averages_start_again_from_a_loaded_model(monkeypatch):
    loaded = Line(nnx.Rngs(5))
    loaded.asked[...] = jnp.int32(3)
    monkeypatch.setattr(state_module, "load_model", lambda *_: (loaded, {}))
    for averaged in (True, False):
        state = make(averaged)[1]
        started = start_from(state, "a/folder", "line", make_mesh())
        np.testing.assert_array_equal(started.params["slope"][...], loaded.slope[...])
        assert int(started.buffers["asked"][...]) == 3
        assert bits(started.opt_state) == bits(state.opt_state)
        assert bits(started.averages) == (bits(started.params) if averaged else [])
    assert started.averages is None
    with pytest.raises(UserError, match="a line with other shapes: .*slope"):
        start_from(state, "a/folder", "line", make_mesh(), lambda there, *_: jax.tree.map(jnp.atleast_2d, there))
    assert start_from(state, "", "line", make_mesh()) is state


# Skipped steps


@pytest.fixture(scope="module")
def step():
    """Moves everything that a state holds, and skips where one of ``values`` is not finite."""
    optimizer = optax.adam(0.1)

    @jax.jit
    def step(state, values):
        gradients = jax.tree.map(lambda p: p * values[0] + values[1], state.params)
        after = update_averages(apply_gradients(state, gradients, optimizer), 0.9)
        after = after.replace(buffers=jax.tree.map(lambda x: x + 1, state.buffers))
        state = skip_if_not_finite(state, after, *values)
        return state, skip_counts(state)

    return step


GOOD = np.array([0.5, 1.0], np.float32)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("position", [0, 1])
def test_a_value_that_is_not_finite_leaves_everything_but_the_counts(step, bad, position):
    _, state = make()
    state, _ = step(state, GOOD)
    broken = GOOD.copy()
    broken[position] = bad
    seen, current = [], state
    for values in (broken, broken, GOOD, broken):
        before = current
        current, counts = step(before, values)
        seen.append((int(current.step), int(counts["skipped"]), int(counts["skipped_in_a_row"])))
        names = ("step", "skipped", "skipped_in_a_row")
        untouched = current.replace(**{name: getattr(before, name) for name in names})
        assert (bits(untouched) == bits(before)) == (values is broken)
    assert seen == [(2, 1, 1), (3, 2, 2), (4, 2, 0), (5, 3, 1)]
    # The good step did what it would have done without the broken ones, but as step 4.
    expected, _ = step(state.replace(step=jnp.int32(3)), GOOD)
    assert bits((expected.params, expected.opt_state, expected.averages, expected.buffers)) == bits(
        (before.params, before.opt_state, before.averages, before.buffers)
    )


def test_states_without_averages_are_skipped_too():
    _, state = make(averaged=False)
    after = skip_if_not_finite(state, state.replace(step=state.step + 1), jnp.float32(np.nan))
    assert after.averages is None and int(after.skipped) == 1


def test_a_great_but_finite_value_is_not_skipped(step):
    _, state = make()
    state, counts = step(state, np.array([1.0, 3e18], np.float32))
    assert (int(counts["skipped"]), int(counts["skipped_in_a_row"])) == (0, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
