"""Checkpoints: what is restored is what was saved, also when the device's buffers are reused at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.training.checkpoint import CheckpointStore
from vgpt_jax.training.sharding import make_mesh, replicate
from vgpt_jax.training.state import create_state


def fresh_state(features: int = 4):
    optimizer = optax.adam(1e-2)
    _, state = create_state(nnx.Linear(features, 3, rngs=nnx.Rngs(0)), optimizer, seed=1)
    return replicate(make_mesh(), state)


@jax.jit
def changed(state):
    return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state)


def test_a_checkpoint_brings_back_state_and_data_position(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    state = changed(fresh_state())
    store.save(state, {"next_index": 17})
    store.close()
    restored, position = CheckpointStore(tmp_path, keep=2).restore(fresh_state())
    assert position == {"next_index": 17}
    assert int(restored.step) == 1
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, state)


def test_saving_does_not_see_what_the_next_steps_write(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    state = fresh_state(512)
    expected = jax.tree.map(np.array, state)
    step = jax.jit(changed, donate_argnums=0)
    store.save(state, {})
    for _ in range(20):
        state = step(state)
    store.close()
    restored, _ = CheckpointStore(tmp_path, keep=2).restore(fresh_state(512))
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_only_the_newest_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    state = fresh_state()
    for _ in range(4):
        state = changed(state)
        store.save(state, {})
    store.close()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["3", "4"]
    assert CheckpointStore(tmp_path, keep=2).latest_step() == 4


def test_an_unfinished_checkpoint_does_not_count(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(changed(fresh_state()), {})
    store.close()
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()  # what a kill in the middle of a save leaves
    assert CheckpointStore(tmp_path, keep=2).latest_step() == 1


def test_a_state_of_another_shape_is_refused(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(changed(fresh_state()), {})
    store.close()
    with pytest.raises(UserError, match="checkpoint 1 in"):
        CheckpointStore(tmp_path, keep=2).restore(fresh_state(5))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        CheckpointStore(tmp_path / "file" / "checkpoints", keep=2)
