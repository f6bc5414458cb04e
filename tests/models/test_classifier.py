import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from quick_compile import jit
from vgpt_jax import ConvClassifier, UserError
from vgpt_jax.losses import cross_entropy


def make(**options):
    """A classifier with weights by NumPy: JAX would compile an initialiser for every shape."""
    arguments = {"num_classes": 3, "widths": (8, 16)} | options
    graph, state = nnx.split(nnx.eval_shape(lambda: ConvClassifier(**arguments, rngs=nnx.Rngs(0))))
    rng, filled = np.random.default_rng(0), []
    for path, variable in nnx.to_flat_state(state):
        spread = np.prod(variable.shape[:-1]) ** -0.5 if path[-1] == "kernel" else 0.0
        value = (path[-1] == "scale") + spread * rng.normal(size=variable.shape)
        filled.append((path, variable.replace(jnp.asarray(value, variable.dtype))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def pure(classifier):
    graph, state = nnx.split(classifier)
    return jit(lambda images, key: nnx.merge(graph, state)(images, key))


def uniform(*shape):
    return np.random.default_rng(0).uniform(size=shape).astype(np.float32)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0, 255)])
def test_the_value_range_does_not_change_the_logits(low, high):
    images = uniform(2, 8, 8, 3)
    expected = pure(make(value_range=(0.0, 1.0)))(images, None)
    logits = pure(make(value_range=(low, high)))(low + (high - low) * images, None)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert np.std(logits) > 0.01


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (0, 255)])
def test_the_network_sees_minus_one_to_one(low, high):
    classifier = make(value_range=(low, high))
    first = classifier.strided[0]
    seen = []

    def spy(x):
        seen.append(x)
        return first(x)

    def first_input(images):
        classifier(images)
        return seen[-1]

    classifier.strided[0] = spy
    images = np.linspace(low, high, 5, dtype=np.float32)[:, None, None, None] * np.ones((5, 8, 8, 3), np.float32)
    np.testing.assert_allclose(jit(first_input)(images)[:, 0, 0, 0], [-1.0, -0.5, 0.0, 0.5, 1.0], atol=1e-6)


def test_mean_and_maximum_over_positions_reach_the_head():
    classifier = make(widths=(4,))
    tap = np.zeros((4, 4, 3, 4))
    tap[1, 1, 0, 0] = 1.0
    classifier.strided[0].kernel[...] = tap
    classifier.convs[0].kernel[...] = np.zeros((3, 3, 4, 4))
    images = uniform(2, 8, 8, 3)
    seen = np.asarray(2.0 * images[:, ::2, ::2, 0] - 1.0)  # the tap at the even pixels
    swish = seen / (1.0 + np.exp(-seen))
    for feature, expected in ((0, swish.mean(axis=(1, 2))), (4, swish.max(axis=(1, 2)))):
        head = np.zeros((8, 3))
        head[feature] = [1.0, -2.0, 0.0]
        classifier.head.kernel[...] = head
        np.testing.assert_allclose(pure(classifier)(images, None), expected[:, None] * head[feature], atol=1e-5)


@pytest.mark.parametrize("side", [8, 16])
def test_logits_for_any_image_size(side):
    logits = jax.eval_shape(make(num_classes=7), jnp.zeros((2, side, side, 3)))
    assert logits.shape == (2, 7)
    assert logits.dtype == jnp.float32


def test_dropout_needs_a_key():
    images, call = uniform(2, 8, 8, 3), pure(make(dropout=0.5))
    plain = call(images, None)
    np.testing.assert_allclose(plain, pure(make(dropout=0.0))(images, jax.random.key(1)), atol=1e-6)
    first, again, other = (call(images, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 1e-3
    assert np.abs(first - other).max() > 1e-3


def test_two_classes_are_learned_in_a_few_steps():
    rng = np.random.default_rng(0)
    labels = np.arange(32) % 2
    images = rng.uniform(size=(32, 8, 8, 3)).astype(np.float32)
    images[labels == 1, :, :4] *= 0.5  # the second class is darker on the left
    graph, params = nnx.split(make(num_classes=2))
    optimizer = optax.adam(1e-2)

    @jit
    def step(params, opt_state, key):
        def loss(params):
            return jnp.mean(cross_entropy(nnx.merge(graph, params)(images, key), labels))

        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, losses = optimizer.init(params), []
    for i in range(25):
        params, opt_state, loss = step(params, opt_state, jax.random.key(i))
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]
    logits = pure(nnx.merge(graph, params))(images, None)
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), labels)


def test_no_widths_are_refused():
    with pytest.raises(UserError, match="widths is empty"):
        make(widths=())
