"""Every option of the quantizer, and every pair of options, compiles once and trains."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from quick_compile import jit
from vgpt_jax import VectorQuantize


def make(**options):
    defaults = {"num_codewords": 8, "embedding_dim": 4, "pretrain_steps": 0, "penalty_weight": 0.0}
    return VectorQuantize(**(defaults | options), rngs=nnx.Rngs(0))


OPTIONS = {
    "cos_dist": {"cos_dist": True},
    "proj_dim": {"proj_dim": 3},
    "random_proj": {"random_proj": True},
    "replace_freq": {"replace_freq": 3},
    "penalty_weight": {"penalty_weight": 0.25},
    "pretrain_steps": {"pretrain_steps": 5},
    "kaiming": {"init_method": "kaiming"},
    "latent_random": {"init_method": "latent_random"},
    "fixed": {"init_method": "fixed"},
}
LATER = {  # alone, and with what a recipe would always have on
    "l2_norm": {"l2_norm": True},
    "ema": {"learning": "ema"},
    "alternating": {"learning": "alternating"},
    "kmeans": {"init_method": "kmeans"},
    "rotation": {"estimator": "rotation"},
    "sync_nu": {"sync_nu": 0.5},
    "learned_affine": {"affine": "learned"},
    "statistics_affine": {"affine": "statistics"},
    "entropy_weight": {"entropy_weight": 0.1, "entropy_temperature": 1.0},
    "orthogonality_weight": {"orthogonality_weight": 0.1},
}
# Every other pair by default, with ``-m long`` the others too.
PAIRS = [pair for pair in combinations(OPTIONS, 2) if len({key for name in pair for key in OPTIONS[name]}) == 2]
COMBINATIONS = (
    [(name,) for name in OPTIONS] + [pytest.param(pair, marks=pytest.mark.long) for pair in PAIRS[1::2]] + PAIRS[::2]
)
COMBINATIONS += [(name,) for name in LATER] + [(name, "replace_freq", "pretrain_steps") for name in LATER]
OPTIONS |= LATER


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_options_compile_once_and_train(names):
    options = {key: value for name in names for key, value in OPTIONS[name].items()}
    graph, codebook, buffers = nnx.split(make(**options), nnx.Param, ...)
    rng = np.random.default_rng(0)
    data = np.repeat(rng.normal(size=(8, 6)), 4, axis=0) + 0.1 * rng.normal(size=(32, 6))
    data = data.astype(np.float32)  # eight clusters for eight codes
    maps = {"encode": 0.5 * rng.normal(size=(6, 4)), "decode": 0.5 * rng.normal(size=(4, 6))}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), maps) | {"quantizer": codebook}
    optimizer = optax.adam(0.03)
    traces = []

    def total_loss(params, buffers):
        output = nnx.merge(graph, params["quantizer"], buffers)(data @ params["encode"])
        error = jnp.mean((output.z_q @ params["decode"] - data) ** 2)
        return error + output.loss, (error, output)

    @jit
    def step(params, opt_state, buffers, key):
        traces.append(names)
        (loss, (error, output)), grads = jax.value_and_grad(total_loss, has_aux=True)(params, buffers)
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        quantizer = nnx.merge(graph, params["quantizer"], buffers)
        quantizer.surgery(output, key)
        _, codebook, buffers = nnx.split(quantizer, nnx.Param, ...)
        return params | {"quantizer": codebook}, opt_state, buffers, loss, error

    opt_state, losses, errors = optimizer.init(params), [], []
    for i in range(40):
        params, opt_state, buffers, loss, error = step(params, opt_state, buffers, jax.random.key(i))
        losses.append(float(loss))
        errors.append(float(error))
    assert len(traces) == 1
    assert np.isfinite(losses).all()
    warm = options.get("pretrain_steps", 0)
    assert np.mean(errors[-3:]) < 0.9 * np.mean(errors[warm : warm + 3])
