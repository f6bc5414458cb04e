"""Checkpoints: what is restored is what was saved, wherever it goes; what is damaged is named, put aside and done without."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from vgpt_jax.errors import UserError
from vgpt_jax.training import checkpoint, manifest
from vgpt_jax.training.checkpoint import CheckpointStore
from vgpt_jax.training.manifest import MANIFEST, STAMPED, damage
from vgpt_jax.training.sharding import make_mesh
from vgpt_jax.training.state import create_state


def fresh_state(features: int = 4, mesh=None, seed: int = 0):
    """A linear layer and Adam's moments, each matrix split over "fsdp" and "tensor" where the mesh has them."""
    optimizer = optax.adam(1e-2)
    _, state = create_state(nnx.Linear(features, 4, rngs=nnx.Rngs(seed)), optimizer, seed=1)
    mesh = mesh or make_mesh()
    split = PartitionSpec("fsdp", "tensor")
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, split if x.ndim == 2 else PartitionSpec())), state
    )


@jax.jit
def changed(state):
    return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state)


def after(steps: int, state=None):
    state = fresh_state() if state is None else state
    for _ in range(steps):
        state = changed(state)
    return state


def write(directory, *steps: int, keep: int = 3, data=None) -> None:
    """Saves checkpoints of these steps."""
    store, state = CheckpointStore(directory, keep), fresh_state()
    for step in range(1, max(steps) + 1):
        state = changed(state)
        if step in steps:
            store.save(state, {"step": step} if data is None else data)
    store.close()


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A folder with checkpoints of steps 1 and 2. Not to be written to."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    write(directory, 1, 2)
    return directory


@pytest.fixture
def two(two_checkpoints, tmp_path):
    """A copy of it."""
    return shutil.copytree(two_checkpoints, tmp_path / "checkpoints")


def shardings(state) -> list:
    return [x.sharding for x in jax.tree.leaves(state)]


def folders(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_checkpoint_brings_back_state_and_data_position(tmp_path):
    state = after(1)
    store = CheckpointStore(tmp_path, keep=2)
    assert store.restore(state) is None
    store.save(state, {"next_index": 17})
    store.close()
    restored, position = CheckpointStore(tmp_path, keep=2).restore(fresh_state())
    assert position == {"next_index": 17}
    assert int(restored.step) == 1
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert shardings(restored) == shardings(fresh_state())


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


@pytest.mark.parametrize("writer", [(8, 1, 1), (2, 2, 2), (1, 1, 1)])
def test_a_checkpoint_is_restored_onto_any_mesh(tmp_path, writer):
    def on(shape):
        return make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])

    store = CheckpointStore(tmp_path, keep=2)
    state = after(1, fresh_state(8, on(writer), seed=3))
    store.save(state, {})
    store.close()
    for reader in ((1, 1, 1), (2, 2, 2), (8, 1, 1)):
        wanted = fresh_state(8, on(reader))
        restored, _ = CheckpointStore(tmp_path, keep=2).restore(wanted)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        assert shardings(restored) == shardings(wanted)


def test_the_newest_and_the_best_are_kept(tmp_path):
    store, state = CheckpointStore(tmp_path, keep=2, keep_best=1, best="least"), fresh_state()
    for step, value in enumerate((5.0, 2.0, 3.0, np.nan, 2.0, 4.0, None, 6.0), 1):
        state = changed(state)
        if value is not None:
            store.rate(step, value)
        store.save(state, {"step": step})
    store.wait()
    assert folders(tmp_path) == ["5", "7", "8"]  # of equal ones the latest
    best, data = store.restore_best(fresh_state())
    assert (int(best.step), data) == (5, {"step": 5})
    store.close()
    assert store.latest_step() == 8


def test_greatest_can_be_best_and_values_are_of_use_before_and_after_a_restart(tmp_path):
    write(tmp_path, 1, 2)
    store = CheckpointStore(tmp_path, keep=1, keep_best=2, best="greatest")
    state, _ = store.restore(fresh_state())
    for step, value in ((1, 9.0), (2, 8.0), (3, 7.0)):
        store.rate(step, value)
    store.save(changed(state), {})
    store.wait()
    assert folders(tmp_path) == ["1", "2", "3"]
    assert int(store.restore_best(fresh_state())[0].step) == 1
    store.close()


def test_a_step_that_is_saved_is_not_saved_again(tmp_path):
    write(tmp_path, 1)
    store = CheckpointStore(tmp_path, keep=2)
    state, _ = store.restore(fresh_state())
    store.save(state, {"step": "other"})
    store.close()
    assert CheckpointStore(tmp_path, keep=2).restore(fresh_state())[1] == {"step": 1}


def test_what_a_killed_run_left_unfinished_is_deleted(two, capsys):
    (two / "3.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (two / "1").rename(two / "1.deleted")
    (two / "9999999999").mkdir()  # no step: a step is an int32
    store = CheckpointStore(two, keep=2)
    assert "checkpoint 3 in" in capsys.readouterr().err
    assert folders(two) == ["2", "9999999999"]
    assert int(store.restore(fresh_state())[0].step) == 2


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [remove, cut, flip])
def test_any_file_that_is_damaged_is_found(two, harm):
    """Whatever file it is, what is wrong is said, and the checkpoint is whole again with the file as it was. Or it is no loss."""
    newest = two / "2"
    paths = [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(paths) > 8
    for path in paths:
        content = path.read_bytes()
        harm(path)
        if path in (newest / STAMPED, newest / "commit_success.txt"):  # written last, and of no use
            assert damage(newest) is None
            assert int(CheckpointStore(two, keep=2).restore(fresh_state())[0].step) == 2
        else:
            assert path.relative_to(newest).as_posix() in damage(newest)
        path.write_bytes(content)
    assert damage(newest) is None


def test_a_damaged_checkpoint_is_named_and_put_aside_and_the_one_before_is_used(two, capsys):
    victim = max((path for path in (two / "2").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    flip(victim)
    (two / "damaged-2").mkdir()  # of an earlier time
    store = CheckpointStore(two, keep=2)
    restored, data = store.restore(fresh_state())
    assert (int(restored.step), data) == (1, {"step": 1})
    jax.tree.map(np.testing.assert_array_equal, restored, after(1))
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert f"checkpoint 2 in {two} is damaged ({victim.relative_to(two / '2')} was changed)" in said[0]
    assert said[0].endswith("put aside as damaged-2-2; going on from 1")
    store.save(changed(restored), {"step": "again"})
    store.close()
    assert folders(two) == ["1", "2", "damaged-2", "damaged-2-2"]
    assert CheckpointStore(two, keep=2).restore(fresh_state())[1] == {"step": "again"}


def test_where_none_is_whole_nothing_is_touched_and_the_run_does_not_begin_again(two):
    for step in ("1", "2"):
        flip(two / step / MANIFEST)
    for _ in range(2):
        with pytest.raises(UserError, match="no checkpoint in .* is whole .*delete the folder"):
            CheckpointStore(two, keep=2).restore(fresh_state())
    assert folders(two) == ["1", "2"]


def test_the_first_that_a_run_has_saved_is_put_aside_and_the_run_begins_again(two, capsys):
    shutil.rmtree(two / "1")
    flip(two / "2" / MANIFEST)
    with pytest.raises(UserError, match="no checkpoint in .* is whole"):
        CheckpointStore(two, keep=1).restore(fresh_state())  # the only one of many, for all that is known
    assert CheckpointStore(two, keep=2).restore(fresh_state()) is None
    assert capsys.readouterr().err.strip().endswith("put aside as damaged-2; beginning again")
    assert folders(two) == ["damaged-2"]


def test_a_state_of_other_shapes_is_refused_and_not_called_damaged(two):
    with pytest.raises(
        UserError, match=r"checkpoint 2 in .* is of another state: .*float32\[4, 4\] there, float32\[5, 4\]"
    ):
        CheckpointStore(two, keep=2).restore(fresh_state(5))
    with pytest.raises(UserError, match=r"averages/bias.* is missing there, float32\[4\] here, and 1 other"):
        state = fresh_state()
        CheckpointStore(two, keep=2).restore(state.replace(averages=state.params))
    assert folders(two) == ["1", "2"]


def test_a_later_format_is_refused_and_not_called_damaged(two):
    content = json.loads((two / "2" / MANIFEST).read_text())
    del content["seal"]
    content["format_version"] = 2
    (two / "2" / MANIFEST).write_text(json.dumps(content | {"seal": manifest.seal_of(content)}))
    with pytest.raises(UserError, match="has format 2; this vgpt_jax reads up to 1: update it"):
        CheckpointStore(two, keep=2).restore(fresh_state())
    assert folders(two) == ["1", "2"]


@pytest.mark.parametrize(
    "content", ["", "[]", "null", '{"seal": 1}', "[" * 100000, "\udcff".encode(errors="surrogateescape")]
)
def test_a_manifest_that_is_none_is_damage(two, content):
    path = two / "2" / MANIFEST
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert MANIFEST in damage(two / "2")


def test_an_error_of_the_background_names_the_folder_and_the_last_good_step(tmp_path, monkeypatch):
    store, state = CheckpointStore(tmp_path / "checkpoints", keep=2), after(1)
    store.save(state, {})
    store.wait()
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(manifest, "digest_of", lambda path: (_ for _ in ()).throw(full))
    state = changed(state)
    store.save(state, {})
    with pytest.raises(UserError, match=r"step 2 .*checkpoints \(No space left on device\), that of step 1 is whole"):
        store.save(changed(state), {})
    store.close()
    assert folders(tmp_path / "checkpoints") == ["1"]


def test_a_process_that_is_gone_is_not_called_a_full_disk(tmp_path, monkeypatch):
    store, gone = CheckpointStore(tmp_path, keep=2), jax.errors.JaxRuntimeError("UNKNOWN: connection reset by peer")
    monkeypatch.setattr(manifest, "digest_of", lambda path: (_ for _ in ()).throw(gone))
    store.save(after(1), {})
    with pytest.raises(jax.errors.JaxRuntimeError, match="connection reset"):
        store.wait()
    store.close()
    assert folders(tmp_path) == []


def test_a_folder_that_went_away_is_named_and_not_made_again(tmp_path):
    store, state = CheckpointStore(tmp_path / "run" / "checkpoints", keep=2), after(1)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match=r"the folder is gone\), there is none before it"):
        store.save(state, {})
    store.close()
    assert folders(tmp_path) == []


def test_what_is_to_be_done_before_is_done_before(tmp_path):
    store, seen = CheckpointStore(tmp_path, keep=2), []
    store.save(after(1), {}, after=lambda: seen.append(folders(tmp_path)))
    store.close()
    assert seen == [[]]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        CheckpointStore(tmp_path / "file" / "checkpoints", keep=2)


def test_tensorstores_words_for_an_error_of_the_system_are_not_needed():
    error = ValueError("RESOURCE_EXHAUSTED: Error writing \"key/0\": Failed to write [os_error_code='28']")
    assert checkpoint.reason(error) == "No space left on device"
    assert checkpoint.reason(ValueError("first\nsecond")) == "first"
    assert checkpoint.reason(ValueError()) == "ValueError"
