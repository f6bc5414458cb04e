"""Attention, the MLPs and the residual block against NumPy by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quick_compile import jit
from vgpt_jax.models.rotary import rotary_table
from vgpt_jax.models.transformer import GELU, NORMS, Attention, Block, SwiGLU

WIDTH, HEADS, LENGTH, EPSILON = 16, 4, 5, 1e-5
ATTENTION = {
    "d_model": WIDTH,
    "num_heads": HEADS,
    "num_kv_heads": 2,
    "qk_norm": False,
    "bias": True,
    "dropout_rate": 0.0,
    "residual_stddev": 0.02,
    "epsilon": EPSILON,
    "dtype": jnp.float32,
}
BLOCK = {
    "norm": "rms_norm",
    "mlp": "gelu",
    "mlp_width": 24,
    "adaptive": False,
    "residual_dropout": 0.0,
    "drop_path": 0.0,
}

run = jit(lambda module, *arguments: module(*arguments))


def randomize(module: nnx.Module, seed: int = 0) -> nnx.Module:
    """Moves every parameter, so that zeros and ones hide nothing."""
    rng = np.random.default_rng(seed)
    move = lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    nnx.update(module, jax.tree.map(move, nnx.state(module, nnx.Param)))
    return module


def random(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPSILON) * scale


def linear(module: nnx.Linear, x: np.ndarray) -> np.ndarray:
    bias = 0 if module.bias is None else np.asarray(module.bias[...])
    return x @ np.asarray(module.kernel[...]) + bias


def attention_by_hand(module: Attention, x: np.ndarray, num_kv_heads: int, rotation=None) -> np.ndarray:
    """One head and one position after the other, ``[T, D] -> [T, D]``."""
    head_dim = WIDTH // HEADS
    heads = linear(module.qkv, x).reshape(len(x), HEADS + 2 * num_kv_heads, head_dim)
    found = np.zeros((len(x), HEADS, head_dim))

    def prepare(vectors: np.ndarray, norm) -> np.ndarray:
        if norm is not None:
            vectors = rms(vectors, np.asarray(norm.scale[...]))
        if rotation is None:
            return vectors
        (cos, sin), (a, b) = rotation, np.split(vectors, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    for head in range(HEADS):
        shared = HEADS + head * num_kv_heads // HEADS  # the first queries share the first keys
        query, keys = prepare(heads[:, head], module.query_norm), prepare(heads[:, shared], module.key_norm)
        values = heads[:, shared + num_kv_heads]
        for t in range(len(x)):
            weights = np.exp(query[t] @ keys[: t + 1].T / np.sqrt(head_dim))
            found[t, head] = weights @ values[: t + 1] / weights.sum()
    return linear(module.out, found.reshape(len(x), WIDTH))


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_equals_numpy(num_kv_heads, qk_norm):
    arguments = ATTENTION | {"num_kv_heads": num_kv_heads, "qk_norm": qk_norm, "bias": num_kv_heads != 1}
    attention = randomize(Attention(**arguments, rngs=nnx.Rngs(0)))
    rotation = rotary_table("rotary", LENGTH - 1, (), WIDTH // HEADS, 10.0) if qk_norm else None
    x = random(2, LENGTH, WIDTH)
    expected = [attention_by_hand(attention, example, num_kv_heads, rotation) for example in x]
    batched = None if rotation is None else tuple(table[None] for table in rotation)
    np.testing.assert_allclose(run(attention, x, batched, None), expected, atol=1e-5)


@jit
def extend(attention, x, cache, index, mask):
    return attention.extend(x, cache, index, mask, None)


@pytest.mark.parametrize("rows", [1, 2])
def test_extended_attention_sees_what_the_mask_says(rows):
    """To hide an entry of the cache is to attend to the others alone."""
    attention = randomize(Attention(**ATTENTION, rngs=nnx.Rngs(0)))
    x, position, hidden = random(1, LENGTH, WIDTH), LENGTH - rows, 1
    empty = (jnp.zeros((2, WIDTH // HEADS, 8)), jnp.zeros((2, 8, WIDTH // HEADS)))
    causal = np.arange(8)[None] <= np.arange(LENGTH)[:, None]
    _, cache = extend(attention, x[:, :position], empty, 0, causal[:position])
    mask = causal[position:] & (np.arange(8) != hidden)
    y, (keys, values) = extend(attention, x[:, position:], cache, position, mask)
    expected = attention_by_hand(attention, np.delete(x[0], hidden, axis=0), 2)[-rows:]
    np.testing.assert_allclose(y[0], expected, atol=1e-5)
    assert keys.shape == (2, WIDTH // HEADS, 8) and values.shape == (2, 8, WIDTH // HEADS)
    np.testing.assert_array_equal(keys[:, :, LENGTH:], 0.0)  # what is not written yet stays empty
    np.testing.assert_array_equal(values[:, LENGTH:], 0.0)


@pytest.mark.parametrize("rows", [1, 2])
def test_attention_weights_are_float32_in_bfloat16(rows, monkeypatch):
    """Rounded to bfloat16, weights of about 1/300 do not add up to 1."""
    weigh, seen = Attention.weigh, []

    def remember(attention, scores, mask):
        seen.append(weigh(attention, scores, mask))
        return seen[-1]

    monkeypatch.setattr(Attention, "weigh", remember)
    attention = Attention(**ATTENTION | {"dtype": jnp.bfloat16}, rngs=nnx.Rngs(0))
    empty = (jnp.zeros((2, 4, 300), jnp.bfloat16), jnp.zeros((2, 300, 4), jnp.bfloat16))
    x = jnp.ones((1, rows, WIDTH), jnp.bfloat16)
    attention.extend(x, empty, 0, jnp.ones((rows, 300), bool), None)
    attention(x, None, None)
    assert [weights.dtype for weights in seen] == [jnp.float32] * 2
    np.testing.assert_allclose(jnp.sum(seen[0], axis=-1), 1.0, atol=1e-5)


def test_gelu_equals_numpy():
    mlp = randomize(GELU(WIDTH, 24, 0.02, True, jnp.float32, nnx.Rngs(0)))
    x = random(2, LENGTH, WIDTH)
    inner = linear(mlp.fc, x)
    inner = inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3))) / 2
    np.testing.assert_allclose(run(mlp, x), linear(mlp.out, inner), atol=1e-5)


def test_swiglu_equals_numpy():
    mlp = randomize(SwiGLU(WIDTH, 24, 0.02, False, jnp.float32, nnx.Rngs(0)))
    x = random(2, LENGTH, WIDTH)
    gate, up = np.split(linear(mlp.gate_and_up, x), 2, axis=-1)
    np.testing.assert_allclose(run(mlp, x), linear(mlp.out, gate / (1 + np.exp(-gate)) * up), atol=1e-5)


def test_default_widths():
    assert [GELU.default_width(d) for d in (32, 768)] == [128, 3072]
    assert [SwiGLU.default_width(d) for d in (32, 768, 1024, 3200, 4096)] == [256, 2048, 2816, 8704, 11008]


@pytest.mark.parametrize("name", sorted(NORMS))
def test_norms_equal_numpy_and_are_float32(name):
    norm = randomize(NORMS[name](WIDTH, 0.1, nnx.Rngs(0)))
    x = 3 + random(2, WIDTH)
    centred = x - np.mean(x, axis=-1, keepdims=True) if name == "layer_norm" else x
    expected = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 0.1) * np.asarray(norm.scale[...])
    if name == "layer_norm":
        expected += np.asarray(norm.bias[...])
    np.testing.assert_allclose(norm(x), expected, atol=1e-5)
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.float32


def make_block(**changed) -> Block:
    return Block(**ATTENTION | BLOCK | changed, rngs=nnx.Rngs(0))


def block_by_hand(block: Block, x: np.ndarray, modulation: np.ndarray) -> np.ndarray:
    """``[T, D]`` with shift, scale and gate of attention, then of the MLP: six rows of ``[D]``."""
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation
    y = rms(x, np.asarray(block.norm1.scale[...])) * (1 + scale1) + shift1
    x = x + gate1 * attention_by_hand(block.attention, y, 2)
    y = rms(x, np.asarray(block.norm2.scale[...])) * (1 + scale2) + shift2
    return x + gate2 * np.asarray(block.mlp(y))


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_block_equals_numpy(adaptive):
    block = randomize(make_block(adaptive=adaptive))
    x, conditions = random(2, LENGTH, WIDTH), random(2, WIDTH, seed=5)
    modulation = block.modulation(conditions)
    by_hand = np.broadcast_to(np.array([0, 0, 1, 0, 0, 1.0])[None, :, None], (2, 6, WIDTH))
    if adaptive:
        by_hand = linear(block.modulate, conditions).reshape(2, 6, WIDTH)
        np.testing.assert_allclose(np.concatenate(modulation, axis=1), by_hand, atol=1e-5)
    expected = [block_by_hand(block, *each) for each in zip(x, by_hand, strict=True)]
    np.testing.assert_allclose(run(block, x, modulation, None, None), expected, atol=1e-5)


def test_an_adaptive_block_starts_as_the_identity_and_its_gates_learn():
    block, x, conditions = make_block(adaptive=True), random(2, LENGTH, WIDTH), random(2, WIDTH, seed=5)

    @jit
    def both(block):
        call = lambda block: block(x, block.modulation(conditions), None, None)  # noqa: E731
        return call(block), nnx.grad(lambda block: jnp.sum(call(block) ** 2))(block)

    y, gradients = both(block)
    np.testing.assert_array_equal(y, x)
    reach = np.abs(gradients.modulate.kernel[...]).sum(axis=0).reshape(6, WIDTH)
    np.testing.assert_array_equal((reach > 0).all(axis=1), [False, False, True, False, False, True])


def test_drop_path_leaves_a_branch_out_for_whole_examples_and_keeps_its_expectation():
    block = make_block(drop_path=0.25)
    block.mlp.out.kernel[...] *= 0  # leaves attention's branch alone
    x = np.broadcast_to(random(1, LENGTH, WIDTH), (4096, LENGTH, WIDTH))
    whole = np.asarray(run(block, x[:1], (), None, None) - x[:1])
    added = np.asarray(run(block, x, (), None, jax.random.key(0))) - x
    kept = np.abs(added).max(axis=(1, 2)) > 0
    np.testing.assert_allclose(added[kept], np.broadcast_to(whole / 0.75, added[kept].shape), atol=1e-5)
    assert abs(kept.mean() - 0.75) < 0.03  # 4 standard deviations
    np.testing.assert_allclose(added.mean(axis=0, keepdims=True), whole, atol=0.05 * np.abs(whole).max())


def test_the_two_branches_are_dropped_apart():
    block = randomize(make_block(drop_path=0.5))
    x = np.broadcast_to(random(1, LENGTH, WIDTH), (256, LENGTH, WIDTH))
    y = np.asarray(run(block, x, (), None, jax.random.key(0)))
    assert len(np.unique(np.round(y[:, 0, 0], 4))) == 4
