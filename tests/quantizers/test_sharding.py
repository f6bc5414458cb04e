"""Every variant of VectorQuantize takes on eight devices the steps that it takes on one: its statistics and draws are those of
the global batch."""

import jax
import numpy as np
import pytest
from flax import nnx

from quick_compile import jit
from vgpt_jax import VectorQuantize
from vgpt_jax.training.sharding import make_mesh, replicate, shard_batch

NUM_STEPS, D = 5, 4

VARIANTS = {
    "gradient": {"init_method": "latent_random", "pretrain_steps": 2, "penalty_weight": 0.25},
    "kmeans": {"init_method": "kmeans", "kmeans_iterations": 3, "replace_freq": 2},
    "cosine": {"cos_dist": True, "proj_dim": 3, "penalty_weight": 0.25, "init_method": "kaiming", "replace_freq": 1},
    "ema": {"learning": "ema", "init_method": "kmeans", "kmeans_iterations": 3, "pretrain_steps": 2, "replace_freq": 2},
    "ema cosine": {"learning": "ema", "l2_norm": True, "init_method": "latent_random", "replace_freq": 1},
    "ema affine": {"learning": "ema", "affine": "statistics", "init_method": "kaiming"},
    "alternating": {"learning": "alternating", "alternating_steps": 2, "init_method": "latent_random"},
    "affine statistics": {"affine": "statistics", "init_method": "latent_random", "replace_freq": 2},
    "affine learned": {"affine": "learned", "estimator": "rotation", "sync_nu": 0.5, "init_method": "kaiming"},
    "entropy": {"entropy_weight": 0.5, "entropy_temperature": 0.5, "orthogonality_weight": 1.0, "l2_norm": True},
}


def batch(index):
    """Latents ``[16, 3, D]``, two examples a device, whose mean and scale differ from device to device and step to step."""
    rng = np.random.default_rng(index)
    scale, shift = np.exp(0.3 * rng.normal(size=(8, 1, 1))), 0.7 * rng.normal(size=(8, 1, D))
    latents = scale.repeat(2, axis=0) * rng.normal(size=(16, 3, D)) + shift.repeat(2, axis=0)
    return {"latents": latents.astype(np.float32), "weights": rng.normal(size=(16, 3, D)).astype(np.float32)}


def run(options, mesh):
    """Steps of gradient descent and surgery: of each the output, the gradients, and state and codes after it."""
    defaults = {"num_codewords": 16, "embedding_dim": D, "pretrain_steps": 0, "penalty_weight": 0.0}
    graph, params, buffers = nnx.split(VectorQuantize(**(defaults | options), rngs=nnx.Rngs(0)), nnx.Param, ...)

    def scalar(params, latents, buffers, weights):
        output = nnx.merge(graph, params, buffers)(latents)
        return (weights * output.z_q).sum() + output.loss, output

    @jit
    def step(params, buffers, batch, key):
        gradients, output = jax.grad(scalar, argnums=(0, 1), has_aux=True)(
            params, batch["latents"], buffers, batch["weights"]
        )
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradients[0])
        quantizer = nnx.merge(graph, params, buffers)
        quantizer.surgery(output, key)
        codes = quantizer.codes()
        _, params, buffers = nnx.split(quantizer, nnx.Param, ...)
        return params, buffers, output, {"gradients": gradients, "codes": codes}

    params, buffers = replicate(mesh, (params, buffers))
    seen = []
    for index in range(NUM_STEPS):
        key = replicate(mesh, jax.random.key(index))
        params, buffers, output, others = step(params, buffers, shard_batch(mesh, batch(index)), key)
        assert len(output.z_q.sharding.device_set) == mesh.size
        seen.append(others | {"output": output, "params": params, "buffers": buffers})
    return seen


@pytest.mark.parametrize("name", VARIANTS)
def test_eight_devices_take_the_steps_of_one(name):
    one_device = make_mesh(devices=jax.devices()[:1])
    eight_devices = make_mesh()
    assert eight_devices.size == 8
    ones, eights = run(VARIANTS[name], one_device), run(VARIANTS[name], eight_devices)
    for index, step in enumerate(zip(ones, eights, strict=True)):
        for (path, expected), (_, actual) in zip(*map(jax.tree_util.tree_leaves_with_path, step), strict=True):
            where = f"step {index}: {jax.tree_util.keystr(path)}"
            assert np.isfinite(expected).all(), where
            if np.issubdtype(expected.dtype, np.integer):
                np.testing.assert_array_equal(actual, expected, err_msg=where)
            else:
                np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5, err_msg=where)
    assert np.abs(ones[-1]["codes"] - ones[0]["codes"]).max() > 1e-2  # the codebook has moved
