"""Where arrays are, and that it does not matter: steps on every mesh are those of one device."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import quick_compile
from vgpt_jax.errors import UserError
from vgpt_jax.models.gpt import GPT
from vgpt_jax.training.sharding import (
    brought_together,
    check_batch_size,
    describe,
    local_rows,
    make_mesh,
    of_state,
    on_every_host,
    shard_batch,
)
from vgpt_jax.training.stages import STAGES
from vgpt_jax.training.state import create_sharded_state

PASS_ZERO = ("real_logits", "fake_logits", "adversarial", "loss")
"""Means of both signs, which have no relative precision, and what they are added to."""
STEPS = 20


def batch_of(index: int, names) -> dict:
    rng = np.random.default_rng(index)
    batch = {
        "image": rng.random((16, 16, 16, 3), np.float32),
        "label": rng.integers(0, 9, 16).astype(np.int32),
        "token_ids": rng.integers(0, 32, (16, 16)).astype(np.int32),
    }
    return {name: batch[name] for name in names}


def train(stage: str, config, mesh):
    """Twenty steps on random batches: the metrics of each, and the state at the end."""
    planned = STAGES[stage].program(config, mesh, 9, Path("nowhere"))
    state, seen, steps = planned.create(), [], {}
    for index in range(STEPS):
        batch = shard_batch(mesh, batch_of(index, planned.batch))
        first = max(first for first in planned.train_steps if first <= index)
        if first not in steps:
            steps[first] = planned.train_steps[first].lower(state, batch, None).compile(quick_compile.OPTIONS)
        state, metrics = steps[first](state, batch, None)
        seen.append({name: float(value) for name, value in metrics.items()})
    return seen, state


@pytest.fixture(scope="module")
def full_config(tiny_overrides):
    """The tiny config with what makes steps hard to split: surgery, a discriminator, averages, dropout, random orders."""
    from configs import emoji

    config = emoji.get_config()
    config.update_from_flattened_dict(tiny_overrides)
    config.vector_quantize.update(pretrain_steps=3, replace_freq=2, penalty_weight=0.1)
    config.perceptual.name = "none"  # sees each picture by itself, and takes long to compile
    config.adversarial.update(discriminator="patchgan", start=0, warmup_steps=9, ramp_steps=3, lecam_weight=0.01)
    config.patchgan.update(ndf=8, num_layers=1, spectral_norm=True)
    config.tokenizer_training.update(num_steps=STEPS, ema_decay=0.9)
    config.gpt.update(random_order=True, class_dropout=0.1, token_dropout=0.1, drop_path=0.1)
    config.generator_training.update(num_steps=STEPS, ema_decay=0.9)
    return config


_ON_ONE = {}


@pytest.fixture
def on_one(full_config):
    def run(stage: str):
        if stage not in _ON_ONE:
            _ON_ONE[stage] = train(stage, full_config, make_mesh(devices=jax.devices()[:1]))
        return _ON_ONE[stage]

    return run


EVERY = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 1, 2), (1, 4, 2), (2, 4, 1)]
"""data, fsdp, tensor. By default some are tried, with `-m long` the others too."""
SHORT = {
    "tokenizer": [(2, 2, 2)],
    "generator": [(2, 2, 2)],
    "classifier": [(8, 1, 1), (1, 8, 1), (1, 1, 8)],
}


@pytest.mark.parametrize(
    ("stage", "shape"),
    [
        pytest.param(stage, shape, marks=() if shape in SHORT[stage] else pytest.mark.long)
        for stage in STAGES
        for shape in EVERY
    ],
)
def test_every_mesh_takes_the_steps_of_one_device(stage, shape, full_config, on_one):
    """Twenty steps: losses to 1e-5 relative, parameters and averages to 1e-4."""
    mesh = make_mesh(*shape)
    seen, state = train(stage, full_config, mesh)
    expected, of_one = on_one(stage)
    for index, (ours, theirs) in enumerate(zip(seen, expected, strict=True)):
        for name in theirs:
            atol = 1e-6 if name in PASS_ZERO else 0.0
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=atol, err_msg=f"{name}, {index}")
    for field in ("params", "averages"):
        for one, other in zip(*(jax.tree.leaves(getattr(s, field)) for s in (of_one, state)), strict=True):
            np.testing.assert_allclose(other, one, atol=1e-4)
    split = [x for x in jax.tree.leaves(state) if not x.sharding.is_fully_replicated]
    assert bool(split) == (shape[0] < 8)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    assert shardings == of_state(mesh, state)  # the step leaves everything where it was


@pytest.mark.parametrize("stage", STAGES)
def test_optimizer_and_averages_are_split_as_their_parameters(stage, full_config):
    state = STAGES[stage].program(full_config, make_mesh(2, 2, 2), 9, Path("nowhere")).state
    by_name = {}
    for path, x in jax.tree.leaves_with_path((state.params, state.averages, state.opt_state)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for parameter, mine in jax.tree.leaves_with_path(state.params):
            tail = jax.tree_util.keystr(parameter, simple=True, separator="/")
            if name.endswith("/" + tail) and x.shape == mine.shape:
                by_name.setdefault(tail, set()).add(x.sharding.spec)
    assert all(len(specs) == 1 for specs in by_name.values())
    used = {axis for specs in by_name.values() for spec in specs for axis in spec}
    assert used == {None, "fsdp", "tensor"}


def test_pairs_of_layers_are_split_by_column_and_by_row():
    arguments = {"num_codes": 32, "num_classes": 2, "num_tokens": 16, "d_model": 32, "num_layers": 1, "num_heads": 2}
    graph, params = nnx.split(nnx.eval_shape(lambda: GPT(**arguments, rngs=nnx.Rngs(0))))
    shardings = nnx.to_pure_dict(of_state(make_mesh(2, 2, 2), params))
    block = shardings["blocks"][0]
    column, row = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
    assert [block["attention"][name]["kernel"].spec for name in ("qkv", "out")] == [column, row]
    assert [block["mlp"][name]["kernel"].spec for name in ("fc", "out")] == [column, row]
    assert block["mlp"]["fc"]["bias"].spec == PartitionSpec()
    assert shardings["token_embedding"].spec == row  # 36 rows
    odd = {"kernel": jax.ShapeDtypeStruct((3, 6), jnp.float32)}
    assert of_state(make_mesh(1, 2, 4), odd)["kernel"].spec == PartitionSpec()  # neither 3 over 2 nor 6 over 4
    assert of_state(make_mesh(1, 4, 2), odd)["kernel"].spec == PartitionSpec(None, "tensor")


def test_weights_brought_together_keep_their_gradient_split():
    mesh = make_mesh(1, 4, 2)
    weights = jax.device_put({"kernel": jnp.arange(32.0).reshape(8, 4)}, of_state(mesh, {"kernel": jnp.zeros((8, 4))}))

    @jax.jit
    def step(weights):
        def loss(weights):
            whole = brought_together(mesh, weights)
            return jnp.sum(whole["kernel"] ** 2), whole

        return jax.grad(loss, has_aux=True)(weights)

    gradient, whole = step(weights)
    np.testing.assert_array_equal(gradient["kernel"], 2 * np.asarray(weights["kernel"]))
    assert gradient["kernel"].sharding.spec == weights["kernel"].sharding.spec
    assert whole["kernel"].addressable_shards[0].data.shape == (8, 2)


def test_batches_are_split_over_data_and_fsdp_and_come_back_whole():
    mesh = make_mesh(2, 2, 2)
    values = np.arange(48).reshape(8, 6)
    batch = shard_batch(mesh, {"x": values})["x"]
    assert batch.sharding.spec == PartitionSpec(("data", "fsdp"))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 6)}
    np.testing.assert_array_equal(on_every_host({"x": batch})["x"], values)
    np.testing.assert_array_equal(local_rows(mesh, 8), np.arange(8))


def test_mesh_sizes_are_inferred_or_refused():
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(2, -1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert describe(make_mesh()) == "8 cpu devices"
    assert describe(make_mesh(4, 2)) == "8 cpu devices, data 4, fsdp 2"
    for sizes in ((3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (16, 1, 1)):
        with pytest.raises(UserError, match=f"mesh is data {sizes[0]}"):
            make_mesh(*sizes)


def test_a_batch_that_cannot_be_split_is_refused():
    check_batch_size(make_mesh(2, 2, 2), 8, "batch_size", parts=2)
    with pytest.raises(UserError, match="a multiple of the 4 devices"):
        check_batch_size(make_mesh(2, 2, 2), 6, "batch_size")
    with pytest.raises(UserError, match=r"gpt_training.accumulate, 4"):
        check_batch_size(make_mesh(2, 2, 2), 8, "gpt_training.batch_size", parts=4)


def test_a_state_is_the_same_wherever_it_is_drawn():
    import optax

    make = lambda rngs: nnx.Linear(8, 16, rngs=rngs)  # noqa: E731
    states = [create_sharded_state(make, optax.adam(1e-3), 3, make_mesh(*s))[1] for s in ((8, 1, 1), (2, 2, 2))]
    jax.tree.map(np.testing.assert_array_equal, *states)
