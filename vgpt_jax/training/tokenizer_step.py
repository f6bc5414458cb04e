"""The tokenizer's training step: one forward of the autoencoder, cotangents at the image, one pullback.

What the losses want of the reconstructed image is found first, as gradients with respect to that image; the reconstruction
losses give one, the discriminator another. The adaptive weight compares what the two would do to the decoder's last layer,
which costs that layer's gradient alone. Then one backward pass through the autoencoder carries their weighted sum. The
discriminator judges the reconstructions once, and both players learn from that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax import Array
from jax.sharding import Mesh

from vgpt_jax.losses import (
    ADVERSARIAL_LOSSES,
    RECONSTRUCTION_LOSSES,
    adaptive_weight,
    lecam,
    moving_average,
    r1_penalty,
)
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.quantizers.output import QuantizerOutput
from vgpt_jax.training.diff_augment import diff_augment
from vgpt_jax.training.remat import economical, in_parts
from vgpt_jax.training.state import (
    TrainState,
    apply_gradients,
    merge_model,
    skip_counts,
    skip_if_not_finite,
    update_averages,
)

LECAM_DECAY = 0.99


@struct.dataclass
class DiscriminatorState:
    """The other player.

    Attributes:
      params, buffers, opt_state: as in `TrainState`.
      real_average, fake_average: float32 scalars, moving averages of its logits, for LeCam.
    """

    params: nnx.State
    buffers: nnx.State
    opt_state: optax.OptState
    real_average: Array
    fake_average: Array

    @classmethod
    def of(cls, fresh: TrainState) -> "DiscriminatorState":
        """The discriminator's part of a state of step 0 that was created for it."""
        return cls(fresh.params, fresh.buffers, fresh.opt_state, jnp.zeros(()), jnp.zeros(()))


@struct.dataclass
class TokenizerState(TrainState):
    """`TrainState` of a tokenizer. Attributes: ``discriminator``, None where there is none."""

    discriminator: DiscriminatorState | None


@dataclass(frozen=True)
class Recipe:
    """How a tokenizer learns to reconstruct.

    Attributes:
      graph: of the tokenizer.
      optimizer: of its parameters.
      reconstruction: "l1" or "l2".
      perceptual: graph of a perceptual distance (`models.perceptual`), whose frozen weights the step is given; or None.
      perceptual_weight: of the mean distance.
      ema_decay: of the averaged parameters; 0: there are none.
      remat: what is kept of the autoencoder's forward pass for the backward pass, a name in `remat.POLICIES`.
      accumulate: parts of a batch that are computed one after the other, each with an adaptive weight, and a batch norm of the
        discriminator, of its own; codebook surgery sees the whole batch.
      mesh: devices; None: the parameters are whole on every device.
    """

    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    reconstruction: str = "l1"
    perceptual: nnx.GraphDef | None = None
    perceptual_weight: float = 1.0
    ema_decay: float = 0.0
    remat: str = "none"
    accumulate: int = 1
    mesh: Mesh | None = None


@dataclass(frozen=True)
class Adversary:
    """How a discriminator takes part.

    Attributes:
      graph: of the discriminator.
      optimizer: of its parameters.
      loss: a name in ``ADVERSARIAL_LOSSES``.
      weight: of the adversarial loss, times the adaptive weight.
      max_adaptive_weight: bound of the adaptive weight; 0: there is none, ``weight`` is all.
      heard_from: steps done before the autoencoder hears the discriminator, which learns until then.
      ramp_steps: in how many steps the weight then rises from 0, linearly.
      lecam_weight: of LeCam's regularisation (arXiv 2104.03310).
      r1_weight: of the gradient penalty on real images (arXiv 1801.04406).
      diff_augment: names of the augmentations that it sees real and fake images through (arXiv 2006.10738).
      value_range: of the images.
    """

    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    loss: str = "hinge"
    weight: float = 0.8
    max_adaptive_weight: float = 1e4
    heard_from: int = 0
    ramp_steps: int = 0
    lecam_weight: float = 0.0
    r1_weight: float = 0.0
    diff_augment: Sequence[str] = ()
    value_range: tuple[float, float] = (0.0, 1.0)


def make_train_step(recipe: Recipe, adversary: Adversary | None = None) -> Callable:
    """The pure step ``(state, batch, frozen) -> (state, metrics)``.

    ``batch["image"]`` is ``[B, H, W, 3]`` float32 in the value range, ``frozen`` the weights of the perceptual distance (None
    without one).

    Args:
      recipe: of the autoencoder.
      adversary: None: the discriminator, if the state has one, is left alone.
    """

    def train_step(state: TokenizerState, batch: dict, frozen: nnx.State | None = None) -> tuple[TokenizerState, dict]:
        _, surgery_key, _ = jax.random.split(state.step_key(), 3)
        (gradients, of_discriminator, metrics), quantized = in_parts(
            lambda images, key: _gradients(recipe, adversary, state, images, frozen, key),
            batch["image"],
            state.step_key(),
            recipe.accumulate,
            recipe.mesh,
        )
        after, norms = apply_gradients(state, gradients, recipe.optimizer), [optax.tree.norm(gradients)]
        if adversary is not None:
            norms.append(optax.tree.norm(of_discriminator))
            metrics |= {"discriminator_gradient_norm": norms[1]}
            after = after.replace(discriminator=learn(adversary, state.discriminator, of_discriminator, metrics))
        after = operate(recipe, after, quantized, surgery_key)
        state = skip_if_not_finite(state, after, metrics["loss"], *norms)
        return state, metrics | {"gradient_norm": norms[0]} | skip_counts(state)

    return train_step


def _gradients(
    recipe: Recipe, adversary: Adversary | None, state: TokenizerState, images: Array, frozen, key: Array
) -> tuple[tuple, QuantizerOutput]:
    """What a batch of images asks of the autoencoder and of the discriminator (None without one), as gradients, and metrics;
    and what its latents became, for codebook surgery."""
    forward_key, _, augment_key = jax.random.split(key, 3)

    def forward(params):
        output = nnx.merge(recipe.graph, params, state.buffers)(images, forward_key)
        return (output.reconstruction, output.quantized.loss), output

    (reconstruction, quantizer_loss), pullback, output = jax.vjp(
        economical(forward, recipe.remat, recipe.mesh), state.params, has_aux=True
    )
    (total, losses), cotangent = jax.value_and_grad(reconstruction_losses, argnums=1, has_aux=True)(
        recipe, reconstruction, images, frozen
    )
    metrics, of_discriminator = losses | output.quantized.losses, None
    if adversary is not None:
        last_layer = last_layer_gradient(merge_model(recipe.graph, state), output.features)
        wanted, weight, of_discriminator, found = play(
            adversary, state, images, reconstruction, cotangent, last_layer, augment_key
        )
        cotangent = cotangent + weight * wanted
        total = total + weight * found["adversarial"]
        metrics |= found
    (gradients,) = pullback((cotangent, jnp.ones_like(quantizer_loss)))
    metrics = {"loss": total + quantizer_loss, **metrics}
    return (gradients, of_discriminator, metrics), without_losses(output.quantized)


def without_losses(quantized: QuantizerOutput) -> QuantizerOutput:
    """What a quantizer returned, as far as it has a row for each example."""
    return quantized.replace(losses={}, loss=None, parts=tuple(without_losses(part) for part in quantized.parts))


def reconstruction_losses(recipe: Recipe, reconstruction: Array, images: Array, frozen) -> tuple[Array, dict]:
    """The weighted sum of the losses that compare pictures, and each by its name."""
    losses = {"reconstruction": RECONSTRUCTION_LOSSES[recipe.reconstruction](reconstruction, images)}
    total = losses["reconstruction"]
    if recipe.perceptual is not None:
        distance = nnx.merge(recipe.perceptual, frozen).distance(reconstruction, images)
        losses["perceptual"] = jnp.mean(distance)
        total = total + recipe.perceptual_weight * losses["perceptual"]
    return total, losses


def last_layer_gradient(tokenizer: Tokenizer, features: Array) -> Callable[[Array], list[Array]]:
    """From a gradient with respect to the image ``[B, H, W, 3]`` to that of the kernels of the decoder's last layer."""
    graph, params, rest = nnx.split(tokenizer.decoder.last_layer, nnx.Param, ...)
    _, pullback = jax.vjp(lambda p: nnx.merge(graph, p, rest)(features).astype(jnp.float32), params)
    return lambda cotangent: [leaf for leaf in jax.tree.leaves(pullback(cotangent)[0]) if leaf.ndim > 1]


def play(
    adversary: Adversary,
    state: TokenizerState,
    images: Array,
    reconstruction: Array,
    reconstruction_cotangent: Array,
    last_layer: Callable[[Array], list[Array]],
    key: Array,
) -> tuple[Array, Array, nnx.State, dict]:
    """One round between discriminator and autoencoder.

    Args:
      adversary: how it is played.
      state: the discriminator's and the step are read.
      images: ``[B, H, W, 3]``, real.
      reconstruction: ``[B, H, W, 3]``, fake.
      reconstruction_cotangent: gradient of the reconstruction losses with respect to ``reconstruction``.
      last_layer: from such a gradient to that of the decoder's last layer.
      key: PRNG key of the augmentations.

    Returns:
      The gradient of the adversarial loss with respect to ``reconstruction``, its weight, the gradients of the discriminator's
      own loss, and metrics.
    """
    before = state.discriminator
    discriminator_loss, generator_loss = ADVERSARIAL_LOSSES[adversary.loss]
    real_key, fake_key = jax.random.split(key)

    def judge(params: nnx.State, pictures: Array, augment_key: Array) -> Array:
        if adversary.diff_augment:
            pictures = diff_augment(
                augment_key, pictures, policy=adversary.diff_augment, value_range=adversary.value_range
            )
        return nnx.merge(adversary.graph, params, before.buffers)(pictures)

    fake_logits, pull_fake = jax.vjp(lambda p, x: judge(p, x, fake_key), before.params, reconstruction)
    real_logits, pull_real = jax.vjp(lambda p: judge(p, images, real_key), before.params)

    adversarial, cotangent = jax.value_and_grad(generator_loss)(fake_logits)
    _, wanted = pull_fake(cotangent)
    adaptive = jnp.ones(())
    if adversary.max_adaptive_weight:
        adaptive = adaptive_weight(
            last_layer(reconstruction_cotangent), last_layer(wanted), adversary.max_adaptive_weight
        )
    ramp = (state.step - adversary.heard_from + 1) / max(adversary.ramp_steps, 1)
    weight = adversary.weight * adaptive * jnp.clip(ramp, 0.0, 1.0)

    def regularised(real: Array, fake: Array) -> tuple[Array, Array]:
        loss = discriminator_loss(real, fake)
        if not adversary.lecam_weight:
            return loss, loss
        return loss + adversary.lecam_weight * lecam(real, fake, before.real_average, before.fake_average), loss

    (_, loss), (real_cotangent, fake_cotangent) = jax.value_and_grad(regularised, argnums=(0, 1), has_aux=True)(
        real_logits, fake_logits
    )
    gradients = jax.tree.map(jnp.add, pull_real(real_cotangent)[0], pull_fake(fake_cotangent)[0])
    metrics = {}
    if adversary.r1_weight:
        penalty, of_penalty = jax.value_and_grad(lambda p: r1_penalty(lambda x: judge(p, x, real_key), images))(
            before.params
        )
        gradients = jax.tree.map(lambda g, h: g + adversary.r1_weight * h, gradients, of_penalty)
        metrics["r1"] = penalty
    metrics |= {
        "adversarial": adversarial,
        "adversarial_weight": weight,
        "discriminator": loss,
        "real_logits": jnp.mean(real_logits),
        "fake_logits": jnp.mean(fake_logits),
    }
    return wanted, weight, gradients, metrics


def learn(adversary: Adversary, before: DiscriminatorState, gradients: nnx.State, metrics: dict) -> DiscriminatorState:
    """One update of the discriminator, of its spectral norms, and of the averages of its logits."""
    updates, opt_state = adversary.optimizer.update(gradients, before.opt_state, before.params)
    discriminator = nnx.merge(adversary.graph, optax.apply_updates(before.params, updates), before.buffers, copy=True)
    discriminator.update_spectral_norm()
    _, params, buffers = nnx.split(discriminator, nnx.Param, ...)
    return before.replace(
        params=params,
        buffers=buffers,
        opt_state=opt_state,
        real_average=moving_average(before.real_average, metrics["real_logits"], LECAM_DECAY),
        fake_average=moving_average(before.fake_average, metrics["fake_logits"], LECAM_DECAY),
    )


def operate(recipe: Recipe, state: TokenizerState, quantized, key: Array) -> TokenizerState:
    """Codebook surgery, then the averages: a code that surgery has moved is taken over as it is, not averaged."""
    tokenizer = merge_model(recipe.graph, state)
    before = jax.tree.map(lambda x: x, nnx.state(tokenizer.quantizer, nnx.Param))  # surgery writes to the variables
    tokenizer.quantizer.surgery(quantized, key)
    _, params, buffers = nnx.split(tokenizer, nnx.Param, ...)
    state = state.replace(params=params, buffers=buffers)
    if not recipe.ema_decay:
        return state
    state = update_averages(state, recipe.ema_decay)
    moved = nnx.state(tokenizer.quantizer, nnx.Param)
    if not jax.tree.leaves(moved):
        return state
    averages = state.averages
    averages["quantizer"] = jax.tree.map(
        lambda average, old, new: jnp.where(old == new, average, new), averages["quantizer"], before, moved
    )
    return state.replace(averages=averages)
