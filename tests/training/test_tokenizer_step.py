"""The tokenizer's step against PyTorch's, and ten steps of it: on eight devices, past broken batches, in bfloat16."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from quick_compile import jit
from vgpt_jax.models.layers import DTYPES
from vgpt_jax.models.patchgan import PatchGAN
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.training.diff_augment import diff_augment
from vgpt_jax.training.sharding import make_mesh, replicate, shard_batch
from vgpt_jax.training.state import create_state
from vgpt_jax.training.tokenizer_step import (
    Adversary,
    DiscriminatorState,
    Recipe,
    TokenizerState,
    learn,
    make_train_step,
    play,
)

from .torch_gan_step import HINGE, NON_SATURATING, discriminator_gradients, gan_step

ARCHITECTURE_ARGS = {  # norms have groups of 3 channels: of 1, they would undo the bias of the convolution before
    "vqgan": {"z_channels": 4, "ch": 12, "ch_mult": (1, 2), "num_res_blocks": 1},
    "vqvae": {"z_channels": 4, "ch": 8, "num_downsamplings": 2, "num_res_blocks": 1, "res_channels": 4},
}


class Distance(nnx.Module):
    """A perceptual distance with two layers of features; PyTorch's is `torch_gan_step.distance`."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(3, 4, (3, 3), strides=2, padding=1, rngs=rngs)
        self.conv2 = nnx.Conv(4, 6, (3, 3), strides=2, padding=1, rngs=rngs)

    def distance(self, images, references):
        total, pair = 0.0, (images, references)
        for conv in (self.conv1, self.conv2):
            pair = [jnp.tanh(conv(x)) for x in pair]
            total = total + jnp.mean((pair[0] - pair[1]) ** 2, axis=(1, 2, 3))
        return total


def drawn(create):
    """The module that ``create`` makes, with weights by NumPy: JAX would compile an initialiser for every shape."""
    graph, state = nnx.split(nnx.eval_shape(create))
    rng, filled = np.random.default_rng(0), {}
    for path, variable in nnx.to_flat_state(state):
        name, shape = path[-1], variable.shape
        if name in ("steps", "countdown"):
            value = np.full(shape, 3 if name == "countdown" else 0)
        elif name in ("u", "v"):
            value = rng.normal(size=shape)
            value = value / np.linalg.norm(value)
        else:
            spread = {"kernel": np.prod(shape[:-1]) ** -0.5, "bias": 0.1, "scale": 0.3, "codebook": 0.5}.get(name, 0.0)
            value = (name in ("scale", "ema_counts")) + spread * rng.normal(size=shape)
        filled[path] = variable.replace(jnp.asarray(value, variable.dtype))
        if name == "ema_sums":
            filled[path] = variable.replace(filled[(*path[:-1], "codebook")][...])
    return nnx.merge(graph, nnx.from_flat_state(list(filled.items())))


def make_tokenizer(architecture="vqvae", dtype="float32", **quantizer_args):
    defaults = {"num_codewords": 32, "embedding_dim": 4, "pretrain_steps": 0, "penalty_weight": 0.0}
    return drawn(
        lambda: Tokenizer(
            image_size=16,
            architecture=architecture,
            architecture_args=ARCHITECTURE_ARGS[architecture],
            quantizer_args=defaults | quantizer_args,
            dtype=dtype,
            rngs=nnx.Rngs(0),
        )
    )


def make_patchgan(**options):
    return drawn(lambda: PatchGAN(ndf=4, num_layers=2, **options, rngs=nnx.Rngs(0)))


def make_distance():
    return drawn(lambda: Distance(nnx.Rngs(0)))


def fresh(model, optimizer, averaged=False):
    """A model's graph and its state of step 0."""
    graph, state = nnx.split(model)
    create = jit(lambda state: create_state(nnx.merge(graph, state), optimizer, 0, averaged=averaged)[1])
    return graph, create(state)


def gradients_as_state():
    """An optimizer that moves nothing and keeps the last gradients."""
    zeros = partial(jax.tree.map, jnp.zeros_like)
    return optax.GradientTransformation(zeros, lambda gradients, _, params: (zeros(gradients), gradients))


def pictures(seed, batch=16):
    return np.random.default_rng(seed).random((batch, 16, 16, 3), np.float32)


def flat(state):
    """``{path: array}`` of a model's state."""
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in nnx.to_flat_state(state)}


def tensors(state, requires_grad=True):
    return {name: torch.tensor(x, dtype=torch.float64, requires_grad=requires_grad) for name, x in flat(state).items()}


def assert_gradients(ours, theirs, tolerance=1e-4):
    """Each to ``tolerance`` of its greatest entry, or of a thousandth of the network's: a key's bias has only rounding."""
    ours = flat(ours)
    assert ours.keys() == theirs.keys()
    theirs = {name: gradient.numpy() for name, gradient in theirs.items()}
    least = 1e-3 * max(np.abs(gradient).max() for gradient in theirs.values())
    for name, expected in theirs.items():
        scale = max(np.abs(expected).max(), least)
        np.testing.assert_allclose(ours[name], expected, atol=tolerance * scale, rtol=0, err_msg=name)


def assert_same(ours, expected):
    """Every leaf, to the bit."""
    leaves, others = jax.tree.leaves_with_path(ours), jax.tree.leaves(expected)
    for (path, leaf), other in zip(leaves, others, strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes(), jax.tree_util.keystr(path)


def assert_skipped(before, after):
    """A step was counted as done and as skipped, and nothing else is changed by a bit."""
    counts = ("step", "skipped", "skipped_in_a_row")
    assert [int(getattr(after, name)) for name in counts] == [int(getattr(before, name)) + 1 for name in counts]
    assert_same(after.replace(**{name: getattr(before, name) for name in counts}), before)


# Parity of the whole step with PyTorch: the discriminator is heard from step 1


@pytest.fixture(scope="module", params=["vqgan", "vqvae"])
def parity(request):
    """The states after a step at which the discriminator is not heard (0) and one at which it is (1), and PyTorch's."""
    vqgan, optimizer = request.param == "vqgan", gradients_as_state()
    graph, state = fresh(make_tokenizer(request.param, commitment_weight=0.25), optimizer)
    d_graph, d_state = fresh(make_patchgan(norm="batch" if vqgan else "none"), optimizer)
    perceptual, frozen = nnx.split(make_distance()) if vqgan else (None, None)
    state = TokenizerState(**vars(state), discriminator=DiscriminatorState.of(d_state))
    loss = "hinge" if vqgan else "non_saturating"
    adversary = Adversary(d_graph, optimizer, loss, weight=0.8, heard_from=1)
    step = jit(make_train_step(Recipe(graph, optimizer, "l1", perceptual, perceptual_weight=0.7), adversary))
    images = pictures(1, batch=4)
    ours = [step(state.replace(step=jnp.int32(i)), {"image": images}, frozen) for i in (0, 1)]
    peer = partial(
        gan_step,
        architecture=request.param,
        losses=HINGE if vqgan else NON_SATURATING,
        perceptual=tensors(frozen, requires_grad=False) if vqgan else None,
        perceptual_weight=0.7,
    )
    images = torch.tensor(images, dtype=torch.float64)
    theirs = [peer(tensors(state.params), tensors(d_state.params), images=images, weight=w) for w in (0.0, 0.8)]
    return SimpleNamespace(ours=ours, theirs=theirs)


@pytest.mark.parametrize("heard", [False, True])
def test_losses_weight_and_gradients_are_pytorchs(parity, heard):
    (state, metrics), (their_metrics, of_tokenizer, of_discriminator) = parity.ours[heard], parity.theirs[heard]
    assert metrics.keys() == their_metrics.keys() | {"skipped", "skipped_in_a_row"}
    assert (their_metrics["adversarial_weight"] > 0.01) == heard
    for name, expected in their_metrics.items():
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-4, atol=1e-6, err_msg=name)
    assert_gradients(state.opt_state, of_tokenizer)
    assert_gradients(state.discriminator.opt_state, of_discriminator)


def test_which_loss_moves_what(parity):
    """The adversarial loss moves the encoder and the decoder, through the codes to neither codebook nor discriminator."""
    (unheard, _), (heard, _) = parity.ours
    assert_same(unheard.discriminator, heard.discriminator)
    for name, gradient in flat(unheard.opt_state).items():
        same = np.array_equal(gradient, flat(heard.opt_state)[name])
        assert same == (name == "quantizer.codebook"), name


# One round of the game by itself

ROUNDS = {
    "plain": {},
    "bounded": {"max_adaptive_weight": 0.1},
    "unbalanced": {"max_adaptive_weight": 0.0},
    "lecam": {"lecam_weight": 0.3},
    "r1": {"r1_weight": 2.0},
    "augmented": {"diff_augment": ("color", "translation"), "value_range": (-1.0, 1.0)},
}


@pytest.fixture(scope="module")
def rounds():
    """``play`` under each of `ROUNDS`, the weights around its ramp, and what augmentation should come to."""
    key, optimizer = jax.random.key(5), gradients_as_state()
    graph, state = fresh(make_patchgan(), optimizer)
    before = DiscriminatorState.of(state).replace(real_average=jnp.float32(0.4), fake_average=jnp.float32(-0.2))
    real, fake, rec_cotangent = pictures(1, 4), pictures(2, 4), pictures(3, 4)
    steps = np.array([0, 5, 6, 7, 8, 9, 10, 100])

    def augmented(params):
        """The hinge loss and the generator's of augmented pictures, and what the latter wants of the fake ones."""
        real_key, fake_key = jax.random.split(key)
        through = partial(diff_augment, policy=ROUNDS["augmented"]["diff_augment"], value_range=(-1.0, 1.0))
        judge = nnx.merge(graph, params, before.buffers)
        real_logits = judge(through(real_key, real))
        generator, wanted = jax.value_and_grad(lambda x: -jnp.mean(judge(through(fake_key, x))))(fake)
        fake_logits = judge(through(fake_key, fake))
        hinge = jnp.mean(jnp.maximum(1 - real_logits, 0)) / 2 + jnp.mean(jnp.maximum(1 + fake_logits, 0)) / 2
        return hinge, (generator, wanted)

    @jit
    def run(before):
        def play_at(step, ramp_steps=4, **options):
            state = SimpleNamespace(step=step, discriminator=before)
            adversary = Adversary(graph, optimizer, weight=0.8, heard_from=6, ramp_steps=ramp_steps, **options)
            # The last layer's gradient is three times that of the image.
            wanted, weight, gradients, metrics = play(
                adversary, state, real, fake, rec_cotangent, lambda g: [3.0 * g], key
            )
            after = learn(adversary, before, gradients, metrics)
            return wanted, weight, after, metrics | {GRADIENT: optax.tree.norm(gradients)}

        played = {name: play_at(100, **options) for name, options in ROUNDS.items()}
        ramp = jax.vmap(lambda step: play_at(step)[1])(steps)
        no_ramp = jax.vmap(lambda step: play_at(step, ramp_steps=0)[1])(steps)
        return played, ramp, no_ramp, jax.value_and_grad(augmented, has_aux=True)(before.params)

    played, ramp, no_ramp, expected = run(before)
    return SimpleNamespace(
        before=before, real=real, fake=fake, rec_cotangent=rec_cotangent,
        played=played, ramp=ramp, no_ramp=no_ramp, augmented=expected,
    )  # fmt: skip


def test_the_weight_ramps_up_from_where_the_discriminator_is_heard(rounds):
    full = rounds.played["plain"][1]
    np.testing.assert_allclose(rounds.ramp / full, [0, 0, 0.25, 0.5, 0.75, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(rounds.no_ramp / full, [0, 0, 1, 1, 1, 1, 1, 1], rtol=1e-6)


def test_the_weight_balances_the_gradients_of_the_last_layer_up_to_a_bound(rounds):
    wanted, weight, *_ = rounds.played["plain"]
    norms = [3.0 * np.linalg.norm(np.asarray(x, np.float64)) for x in (rounds.rec_cotangent, wanted)]
    np.testing.assert_allclose(weight, 0.8 * norms[0] / (norms[1] + 1e-4), rtol=1e-5)
    assert weight > 0.8
    np.testing.assert_allclose(rounds.played["bounded"][1], 0.8 * 0.1, rtol=1e-6)
    np.testing.assert_allclose(rounds.played["unbalanced"][1], 0.8, rtol=1e-6)


WEIGHT, GRADIENT = "adversarial_weight", "discriminator_gradient_norm"


@pytest.mark.parametrize(
    ("name", "changed"), [("bounded", WEIGHT), ("unbalanced", WEIGHT), ("lecam", GRADIENT), ("r1", GRADIENT)]
)
def test_weights_and_regularisation_leave_the_rest_of_the_game_alone(rounds, name, changed):
    wanted, _, after, metrics = rounds.played[name]
    plain_wanted, _, plain_after, plain_metrics = rounds.played["plain"]
    np.testing.assert_allclose(wanted, plain_wanted, rtol=1e-6, atol=1e-9)
    assert metrics.keys() - plain_metrics.keys() == ({"r1"} if name == "r1" else set())
    for metric, value in plain_metrics.items():
        assert np.allclose(metrics[metric], value, rtol=1e-6) == (metric != changed), metric
    if changed == GRADIENT:
        after = after.replace(opt_state=plain_after.opt_state)  # the gradients, which are compared with PyTorch's
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9), after, plain_after)


@pytest.mark.parametrize("name", ["plain", "lecam", "r1"])
def test_the_discriminators_gradients_are_pytorchs(rounds, name):
    gradients, loss, penalty = discriminator_gradients(
        tensors(rounds.before.params),
        *(torch.tensor(x, dtype=torch.float64) for x in (rounds.real, rounds.fake)),
        lecam_weight=ROUNDS[name].get("lecam_weight", 0.0),
        averages=(0.4, -0.2),
        r1_weight=ROUNDS[name].get("r1_weight", 0.0),
    )
    _, _, after, metrics = rounds.played[name]
    assert_gradients(after.opt_state, gradients)
    np.testing.assert_allclose(metrics["discriminator"], loss.item(), rtol=1e-5)
    if name == "r1":
        np.testing.assert_allclose(metrics["r1"], penalty.item(), rtol=1e-4)


def test_the_averages_of_the_logits_move_by_a_hundredth(rounds):
    _, _, after, metrics = rounds.played["plain"]
    for kind, average in (("real", 0.4), ("fake", -0.2)):
        moved = 0.99 * average + 0.01 * float(metrics[f"{kind}_logits"])
        np.testing.assert_allclose(getattr(after, f"{kind}_average"), moved, rtol=1e-6)


def test_both_players_see_augmented_pictures(rounds):
    wanted, _, after, metrics = rounds.played["augmented"]
    (hinge, (generator, expected)), gradients = rounds.augmented
    np.testing.assert_allclose(metrics["discriminator"], hinge, rtol=1e-5)
    np.testing.assert_allclose(metrics["adversarial"], generator, rtol=1e-5)
    np.testing.assert_allclose(wanted, expected, rtol=1e-4, atol=1e-7)
    assert_gradients(after.opt_state, {name: torch.tensor(g) for name, g in flat(gradients).items()})
    assert not np.allclose(wanted, rounds.played["plain"][0], rtol=0.1)


# Ten steps of everything

HEARD_FROM, NUM_STEPS, DECAY = 2, 10, 0.4


# With this epsilon the rounding of a tiny gradient is no whole step of Adam.
OPTIMIZERS = optax.adam(3e-3, eps=1e-3), optax.adam(1e-3, b1=0.5, eps=1e-3)


def players(dtype="float32"):
    """The tokenizer and the discriminator."""
    quantizer = {"num_codewords": 192, "pretrain_steps": 1, "replace_freq": 3, "penalty_weight": 0.1}
    discriminator = make_patchgan(norm="batch", spectral_norm=True, dtype=DTYPES[dtype])
    return make_tokenizer(dtype=dtype, **quantizer), discriminator


def compiled(dtype="float32", with_adversary=True):
    """The step with every part."""
    graph, d_graph = (nnx.split(player)[0] for player in players(dtype))
    recipe = Recipe(graph, OPTIMIZERS[0], "l1", nnx.split(make_distance())[0], 0.5, ema_decay=DECAY)
    augmentations = ("color", "translation", "cutout")
    adversary = Adversary(
        d_graph, OPTIMIZERS[1], heard_from=HEARD_FROM, ramp_steps=4, lecam_weight=0.1, diff_augment=augmentations
    )
    return jit(make_train_step(recipe, adversary if with_adversary else None))


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def batch(index, mesh=None, broken_by=None):
    images = pictures(100 + index)
    if broken_by is not None:
        images[3, 5, 7, 1] = broken_by
    return shard_batch(mesh or one_device(), {"image": images})


@pytest.fixture(scope="module")
def run():
    """``states`` after 0 to 10 steps on one device, and the ``metrics`` of each."""
    tokenizer, discriminator = players()
    _, state = fresh(tokenizer, OPTIMIZERS[0], averaged=True)
    _, d_state = fresh(discriminator, OPTIMIZERS[1])
    state = TokenizerState(**vars(state), discriminator=DiscriminatorState.of(d_state))
    state, frozen = replicate(one_device(), (state, nnx.split(make_distance())[1]))
    step, states, metrics, before = compiled(), [state], [], jax.tree.map(np.array, frozen)
    for index in range(NUM_STEPS):
        state, found = step(state, batch(index), frozen)
        states.append(state)
        metrics.append({name: float(value) for name, value in found.items()})
    assert_same(frozen, before)
    return SimpleNamespace(step=step, states=states, metrics=metrics, frozen=frozen)


@pytest.mark.long  # test_sharding.py does it for more meshes
def test_eight_devices_take_the_steps_of_one(run):
    mesh, step = make_mesh(), compiled()
    state, frozen = replicate(mesh, (run.states[0], run.frozen))
    for index, expected in enumerate(run.metrics):
        state, metrics = step(state, batch(index, mesh), frozen)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=f"{name} {index}")
    assert len(state.step.sharding.device_set) == 8
    for (path, eight), one in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(run.states[-1]), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_until_it_is_heard_the_discriminator_learns_and_the_autoencoder_does_as_without_it(run):
    step = compiled(with_adversary=False)
    for index in range(HEARD_FROM + 1):
        before, expected = run.states[index : index + 2]
        state, metrics = step(before, batch(index), run.frozen)
        assert not metrics.keys() & {"adversarial", "discriminator", "adversarial_weight"}
        assert_same(state.discriminator, before.discriminator)
        for name, old in flat(before.discriminator.params).items():
            assert not np.array_equal(old, flat(expected.discriminator.params)[name]), name
        heard = index == HEARD_FROM
        assert (run.metrics[index]["adversarial_weight"] > 0) == heard
        if not heard:
            trees = (s.replace(discriminator=None) for s in (state, expected))
            jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), *trees)
            continue
        for name, value in flat(state.params).items():
            same = np.allclose(value, flat(expected.params)[name], rtol=0, atol=1e-6)
            assert same == (name == "quantizer.codebook"), name


def test_one_iteration_of_the_power_method_follows_each_update(run):
    for before, after in zip(run.states[:-1], run.states[1:], strict=True):
        for index in range(4):
            kernel = np.asarray(after.discriminator.params["convs"][index]["kernel"][...])
            matrix = kernel.reshape(-1, kernel.shape[-1])
            old, new = (s.discriminator.buffers["convs"][index] for s in (before, after))
            v = matrix @ np.asarray(old["u"][...])
            v /= np.linalg.norm(v)
            u = matrix.T @ v
            u /= np.linalg.norm(u)
            np.testing.assert_allclose(new["v"][...], v, atol=1e-5)
            np.testing.assert_allclose(new["u"][...], u, atol=1e-5)
        assert not np.array_equal(new["v"][...], old["v"][...])


def test_averages_are_numpys_and_replaced_codes_are_taken_over(run):
    """The decay is 2/11 at first, and at step 5 no longer less than ``DECAY``."""
    averages, counts = flat(run.states[0].averages), {"replaced": 0, "averaged": 0}
    assert_same(run.states[0].averages, run.states[0].params)
    for step in range(1, NUM_STEPS + 1):
        before, after = (flat(s.params) for s in run.states[step - 1 : step + 1])
        decay = min(DECAY, (1 + step) / (10 + step))
        for name, value in after.items():
            averages[name] = decay * averages[name] + (1 - decay) * value
        # What Adam moves, it moves by about its learning rate at most; a code that is replaced goes further.
        moved = np.abs(after["quantizer.codebook"] - before["quantizer.codebook"]).max(axis=1)
        replaced = moved > 0.02
        assert ((moved < 0.01) | replaced).all()
        assert step > 1 or replaced.all()  # the first batch's latents
        averages["quantizer.codebook"][replaced] = after["quantizer.codebook"][replaced]
        counts["replaced"] += (step > 1) * replaced.sum()
        counts["averaged"] += (~replaced & (moved > 1e-4)).sum()
        found = flat(run.states[step].averages)
        for name, value in averages.items():
            np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=f"{name} {step}")
        new = after["quantizer.codebook"][replaced]
        np.testing.assert_array_equal(found["quantizer.codebook"][replaced], new)
    assert min(counts.values()) > 10, counts


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_broken_batch_changes_nothing_but_the_counts(run, value):
    before = run.states[6]
    skipped, metrics = run.step(before, batch(6, broken_by=value), run.frozen)
    assert not np.isfinite(metrics["loss"]) and not np.isfinite(metrics["gradient_norm"])
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 1)
    assert_skipped(before, skipped)

    again, _ = run.step(skipped, batch(7, broken_by=value), run.frozen)
    assert_skipped(skipped, again)
    good, metrics = run.step(again, batch(8), run.frozen)
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (2, 0)
    expected, _ = run.step(before.replace(step=again.step), batch(8), run.frozen)
    assert_same(good.replace(skipped=expected.skipped), expected)
    assert not np.array_equal(flat(good.params)["pre_quant.kernel"], flat(before.params)["pre_quant.kernel"])


def test_a_broken_gradient_of_the_discriminator_stops_the_autoencoder_too(run):
    """Its logits are so great that its gradient's norm overflows, and so great that the adaptive weight is 0."""
    before = jax.tree.map(lambda x: x, run.states[6])
    scale = before.discriminator.params["norms"][1]["scale"]
    before.discriminator.params["norms"][1]["scale"] = scale.replace(scale[...] * 1e30)
    after, metrics = run.step(before, batch(6), run.frozen)
    assert np.isfinite([metrics["loss"], metrics["gradient_norm"]]).all()
    assert not np.isfinite(metrics["discriminator_gradient_norm"])
    assert_skipped(before, after)


def test_bfloat16_keeps_a_float32_state_and_stays_near(run):
    before, expected = run.states[6:8]
    state, metrics = compiled("bfloat16")(before, batch(6), run.frozen)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, expected)
    assert {x.dtype for x in jax.tree.leaves(state)} == {np.dtype(t) for t in (np.float32, np.int32, np.uint32)}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    for name, value in run.metrics[6].items():
        assert metrics[name].dtype in (jnp.float32, jnp.int32)
        np.testing.assert_allclose(metrics[name], value, rtol=0.05, atol=1e-3, err_msg=name)
    assert metrics["reconstruction"] != run.metrics[6]["reconstruction"]  # it did compute in bfloat16
    for part in (lambda state: state.params, lambda state: state.discriminator.params):
        old, *updated = (flat(part(s)) for s in (before, state, expected))
        names = old.keys() - {"quantizer.codebook"}  # in which other codes may have been replaced
        ours, theirs = (np.concatenate([(new[name] - old[name]).ravel() for name in names]) for new in updated)
        assert ours @ theirs > 0.99 * np.linalg.norm(ours) * np.linalg.norm(theirs)


# A codebook that no gradient moves


def test_a_codebook_of_moving_averages_is_surgerys_alone_and_survives_a_broken_batch():
    optimizer = optax.adam(1e-3)
    graph, state = fresh(
        make_tokenizer(learning="ema", init_method="kaiming", replace_freq=3), optimizer, averaged=True
    )
    state = TokenizerState(**vars(state), discriminator=None)
    assert not any("quantizer" in name for name in flat(state.averages))
    step = jit(make_train_step(Recipe(graph, optimizer, "l2", ema_decay=0.9)))
    for index in range(2):
        state, _ = step(state, batch(index), None)
    before, moving = flat(state.buffers), ("codebook", "countdown", "ema_counts", "ema_sums", "steps")
    assert before.keys() == {f"quantizer.{name}" for name in moving}
    skipped, _ = step(state, batch(2, broken_by=np.nan), None)
    assert_skipped(state, skipped)
    after, _ = step(skipped, batch(3), None)
    for name, value in flat(after.buffers).items():
        assert not np.array_equal(value, before[name]), name
        assert np.isfinite(value).all()
