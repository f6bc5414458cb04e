"""What a step keeps and in how many parts it takes a batch changes memory, not what it computes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from quick_compile import jit
from vgpt_jax.models.gpt import GPT
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.training import classifier_stage, generator_stage
from vgpt_jax.training.remat import POLICIES, economical, in_parts
from vgpt_jax.training.sharding import make_mesh, of_batches, shard_batch
from vgpt_jax.training.state import create_state
from vgpt_jax.training.tokenizer_step import Recipe, TokenizerState, make_train_step

GPT_ARGUMENTS = {"num_codes": 32, "num_classes": 3, "num_tokens": 16, "d_model": 32, "num_layers": 3, "num_heads": 2}
GPT_ARGUMENTS |= {f"{name}_dropout": 0.0 for name in ("embedding", "residual", "attention")}


def test_the_mean_over_parts_is_that_of_the_whole_and_rows_keep_their_order():
    batch = {"x": jnp.arange(12.0).reshape(12, 1), "y": jnp.arange(12)}

    def function(part, key):
        rows = {"doubled": 2 * part["y"], "drawn": jax.random.uniform(key, (len(part["y"]),))}
        return {"mean": jnp.mean(part["x"]), "size": len(part["y"]) * jnp.ones(())}, rows

    key = jax.random.key(0)
    for mesh in (None, make_mesh(2, 2, 2)):
        means, rows = jit(lambda b, m=mesh: in_parts(function, b, key, 3, m))(batch)
        assert float(means["mean"]) == 5.5
        assert float(means["size"]) == 4
        np.testing.assert_array_equal(rows["doubled"], 2 * np.arange(12))
        assert len(np.unique(rows["drawn"])) == 12  # each part has a key of its own
    one, _ = in_parts(function, batch, key, 1, None)
    np.testing.assert_array_equal(one["mean"], 5.5)
    np.testing.assert_array_equal(in_parts(function, batch, key, 1, None)[1]["drawn"], jax.random.uniform(key, (12,)))


def test_every_device_has_its_share_of_each_part():
    mesh = make_mesh(8)
    seen = []

    def function(part, key):
        jax.debug.inspect_array_sharding(part, callback=seen.append)
        return jnp.sum(part), part

    x = jax.device_put(np.arange(32.0).reshape(16, 2), of_batches(mesh))
    jit(lambda x: in_parts(function, x, jax.random.key(0), 2, mesh))(x)
    assert all(sharding.shard_shape((8, 2)) == (1, 2) for sharding in seen)
    assert seen


def generator(remat: str, accumulate: int):
    graph, state = create_state(GPT(**GPT_ARGUMENTS, rngs=nnx.Rngs(0)), optax.sgd(1.0), 0)
    step = generator_stage.make_train_step(graph, optax.sgd(1.0), remat=remat, accumulate=accumulate)
    rng = np.random.default_rng(0)
    return state, step, {"token_ids": rng.integers(0, 32, (8, 16)), "label": rng.integers(0, 3, 8)}


def test_gradients_do_not_depend_on_policy_or_parts():
    expected = None
    for remat, accumulate in (("none", 1), ("dots", 1), ("blocks", 4)):
        state, step, batch = generator(remat, accumulate)
        after, metrics = jit(step)(state, batch)
        result = (after.params, metrics["nats_per_token"], metrics["gradient_norm"])
        if expected is None:
            expected = result
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), result, expected)


def test_policies_keep_less_and_compute_more():
    """Counted in the traced gradient: what is kept goes from the forward to the backward pass, and products are done again."""
    products, kept = {}, {}
    for remat in POLICIES:
        state, *_ = generator(remat, 1)
        gpt = nnx.merge(nnx.split(GPT(**GPT_ARGUMENTS, rngs=nnx.Rngs(0)))[0], state.params, state.buffers)
        graph, params = nnx.split(gpt)
        ids = jnp.zeros((8, 16), jnp.int32)
        loss = economical(lambda p: jnp.sum(nnx.merge(graph, p)(ids) ** 2), remat, None)  # noqa: B023 - called at once
        kept[remat] = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)))  # noqa: B023
        products[remat] = str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")
    assert kept["blocks"] < kept["dots"] < kept["none"]
    assert products["blocks"] > products["dots"] >= products["none"]


@pytest.mark.parametrize(
    "quantizer", ["residual_quantize", pytest.param("multi_scale_quantize", marks=pytest.mark.long)]
)
def test_codebook_surgery_sees_the_whole_batch(quantizer):
    """In two parts the gradients are those of the whole batch, and codes are drawn from the same latents."""
    inner = {"num_codewords": 16, "embedding_dim": 8, "pretrain_steps": 0, "replace_freq": 1, "penalty_weight": 0.0}
    inner |= {"learning": "ema", "init_method": "latent_random"}
    composed = {"quantizer": "vector_quantize", "quantizer_args": inner}
    arguments = {
        "image_size": 16,
        "architecture": "vqvae",
        "architecture_args": {"ch": 8, "z_channels": 8, "num_downsamplings": 2, "num_res_blocks": 1, "res_channels": 4},
        "code_factorization": False,
        "quantizer": quantizer,
        "quantizer_args": {
            "vector_quantize": inner,
            "residual_quantize": composed | {"num_quantizers": 2},
            "multi_scale_quantize": composed | {"scales": [1, 2, 4], "num_phi": 2},
        }[quantizer],
    }
    images = np.random.default_rng(0).random((8, 16, 16, 3), np.float32)
    ends = []
    for accumulate in (1, 2):
        optimizer = optax.sgd(0.1)
        graph, state = create_state(Tokenizer(**arguments, rngs=nnx.Rngs(0)), optimizer, 0)
        step = make_train_step(Recipe(graph, optimizer, "l2", accumulate=accumulate))
        state, metrics = jit(step)(TokenizerState(**vars(state), discriminator=None), {"image": images})
        ends.append((state.params, state.buffers, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *ends)


def test_parts_and_policies_work_on_every_mesh(tiny_config):
    """Four parts, the weights in pieces, as little kept as can be: the loss of a plain step on one device."""
    tiny_config.classifier.dropout = 0.0
    losses = []
    for mesh, options in (
        (make_mesh(devices=jax.devices()[:1]), {}),
        (make_mesh(2, 2, 2), {"remat": "blocks", "accumulate": 4}),
    ):
        tiny_config.classifier_training.update(**options)
        planned = classifier_stage.program(tiny_config, mesh, 9, Path("nowhere"))
        rng = np.random.default_rng(0)
        batch = {"image": rng.random((16, 16, 16, 3), np.float32), "label": rng.integers(0, 9, 16).astype(np.int32)}
        state = planned.create()
        for _ in range(3):
            state, metrics = planned.train_steps[0](state, shard_batch(mesh, batch), None)
            losses.append([float(metrics[name]) for name in ("cross_entropy", "accuracy", "gradient_norm")])
    np.testing.assert_allclose(losses[3:], losses[:3], rtol=1e-5)
