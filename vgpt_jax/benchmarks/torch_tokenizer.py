"""The PyTorch peer of the tokenizer's training step: losses, gradients and both optimizers, as fast as we can make them.

For the benchmark beside our step and for the tests of parity. PyTorch is no dependency of the package: only the benchmarks
and the tests import this.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from vgpt_jax.benchmarks.torch_networks import EfficientNetDistance, PatchGAN, Tokenizer


class TokenizerTraining:
    """A tokenizer, a discriminator and their optimizers, with one step of training.

    Args:
      image_size, architecture_args, quantizer_args: of the `Tokenizer`.
      discriminator_args: of the `PatchGAN`.
      value_range: of the images.
      perceptual_weight: of the mean perceptual distance in the reconstruction loss.
      adversarial_weight: of the adversarial loss, times the adaptive weight.
      max_adaptive_weight: bound of the adaptive weight.
      learning_rate, betas: of both Adams.
    """

    def __init__(
        self,
        *,
        image_size: int,
        architecture_args: dict[str, Any],
        quantizer_args: dict[str, Any],
        discriminator_args: dict[str, Any],
        value_range: tuple[float, float] = (0.0, 1.0),
        perceptual_weight: float = 1.0,
        adversarial_weight: float = 0.8,
        max_adaptive_weight: float = 1e4,
        learning_rate: float = 1e-4,
        betas: tuple[float, float] = (0.5, 0.9),
    ):
        self.tokenizer = Tokenizer(
            image_size=image_size, architecture_args=architecture_args, quantizer_args=quantizer_args
        )
        self.discriminator = PatchGAN(**discriminator_args)
        self.perceptual = EfficientNetDistance(value_range)
        for network in (self.tokenizer, self.discriminator, self.perceptual):
            network.to(memory_format=torch.channels_last)
        self.perceptual_weight = perceptual_weight
        self.adversarial_weight = adversarial_weight
        self.max_adaptive_weight = max_adaptive_weight
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=learning_rate, betas=betas, fused=True)
            for network in (self.tokenizer, self.discriminator)
        ]

    def step(self, images: np.ndarray, apply: bool = True) -> dict[str, float]:
        """Gradients of both networks, into ``.grad``, and the optimizers' updates.

        The gradients of the reconstruction and of the adversarial loss are taken with respect to the reconstructed image;
        the decoder's last layer gives the adaptive weight; one backward pass through the autoencoder takes their weighted
        sum. The discriminator sees each image once.

        Args:
          images: ``[B, H, W, 3]`` float32 in the value range.
          apply: False leaves out the updates.

        Returns:
          The losses by name as our training step calls them, unweighted, and the weight of the adversarial one.
        """
        real = to_torch(images)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with record_function("autoencoder, forward"):
            reconstruction, _, quantizer_losses = self.tokenizer(real)
            fake = reconstruction.detach().requires_grad_()
        with record_function("perceptual, forward"):
            l1, distance = (fake - real).abs().mean(), self.perceptual(fake, real).mean()
        with record_function("perceptual, backward"):
            (wanted,) = torch.autograd.grad(l1 + self.perceptual_weight * distance, fake)
        with record_function("discriminator, forward of fake images"):
            fake_logits = self.discriminator(fake)
            adversarial = -fake_logits.mean()
        with record_function("discriminator, backward to the image"):
            (wanted_by_discriminator,) = torch.autograd.grad(adversarial, fake, retain_graph=True)

        with record_function("adaptive weight"):
            last = self.tokenizer.decoder.conv_out.weight
            norm, adversarial_norm = (
                torch.autograd.grad(reconstruction, last, gradient, retain_graph=True)[0].norm()
                for gradient in (wanted, wanted_by_discriminator)
            )
            adaptive = (norm / (adversarial_norm + 1e-4)).clamp(0.0, self.max_adaptive_weight)
            weight = self.adversarial_weight * adaptive
        with record_function("autoencoder, backward"):
            weights = self.tokenizer.quantizer.weights
            quantizer_loss = sum(weights[name] * loss for name, loss in quantizer_losses.items())
            torch.autograd.backward([reconstruction, quantizer_loss], [wanted + weight * wanted_by_discriminator, None])

        with record_function("discriminator, forward of real images"):
            real_logits = self.discriminator(real)
        with record_function("discriminator, backward to its parameters"):
            discriminator_loss = 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())
            discriminator_loss.backward(inputs=list(self.discriminator.parameters()))
        if apply:
            with record_function("optimizers"):
                for optimizer in self.optimizers:
                    optimizer.step()

        total = l1 + self.perceptual_weight * distance + weight * adversarial + quantizer_loss
        metrics = {"loss": total, "reconstruction": l1, "perceptual": distance, **quantizer_losses}
        metrics |= {"adversarial": adversarial, "adversarial_weight": weight, "discriminator": discriminator_loss}
        metrics |= {"real_logits": real_logits.mean(), "fake_logits": fake_logits.mean()}
        return {name: value.item() for name, value in metrics.items()}

    @torch.no_grad()
    def reconstruct(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images ``[B, H, W, 3]`` to the encoder's output ``[B, h, w, C]``, token ids and the reconstruction, NHWC."""
        latents = self.tokenizer.encoder(to_torch(images))
        reconstruction, token_ids, _ = self.tokenizer(to_torch(images))
        return latents.permute(0, 2, 3, 1).numpy(), token_ids.numpy(), reconstruction.permute(0, 2, 3, 1).numpy()

    def load_from(self, tokenizer: nnx.Module, discriminator: nnx.Module) -> None:
        """Copies every parameter of our ``Tokenizer`` ("vqgan", `VectorQuantize`) and of our ``PatchGAN``.

        Raises:
          RuntimeError: a parameter is left over, is missing, or has another shape.
        """
        copy_parameters(tokenizer, self.tokenizer)
        copy_parameters(discriminator, self.discriminator)

    def gradients(self) -> dict[tuple[str | int, ...], np.ndarray]:
        """Every ``.grad`` in our layout, by "tokenizer" or "discriminator" and the path of `nnx.to_flat_state`."""
        networks = {"tokenizer": self.tokenizer, "discriminator": self.discriminator}
        gradients = {}
        for first, network in networks.items():
            for name, param in network.named_parameters():
                path, gradient = our_parameter(name, param.grad.numpy())
                gradients[(first, *path)] = gradient
        return gradients


def to_torch(images: np.ndarray) -> Tensor:
    """``[B, H, W, 3]`` to ``[B, 3, H, W]`` in the channels-last layout."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)


def copy_parameters(ours: nnx.Module, peer: torch.nn.Module) -> None:
    """Copies every parameter of ours to a network of the same names.

    Raises:
      RuntimeError: a parameter is left over, is missing, or has another shape.
    """
    params = nnx.to_flat_state(nnx.state(ours, nnx.Param))
    peer.load_state_dict(dict(their_parameter(path, np.asarray(param[...])) for path, param in params))


def their_parameter(path: tuple[str | int, ...], array: np.ndarray) -> tuple[str, Tensor]:
    """A parameter of ours by its path to PyTorch's name and layout: HWIO to OIHW, (in, out) to (out, in)."""
    *parents, leaf = map(str, path)
    if leaf == "kernel":
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    name = ".".join([*parents, "weight" if leaf in ("kernel", "scale") else leaf])
    return name, torch.from_numpy(np.array(array))


def our_parameter(name: str, array: np.ndarray) -> tuple[tuple[str | int, ...], np.ndarray]:
    """The inverse of `their_parameter`."""
    *parents, leaf = (int(part) if part.isdigit() else part for part in name.split("."))
    if leaf == "weight":
        leaf = "scale" if array.ndim == 1 else "kernel"
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return (*parents, leaf), array


def time_parts(training: TokenizerTraining, images: np.ndarray, *, num_steps: int = 10) -> dict[str, float]:
    """Seconds of each part of a training step, on average, as PyTorch's profiler sees them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(num_steps):
            training.step(images)
    parts = [event for event in profiler.key_averages() if event.is_user_annotation and "#" not in event.key]
    return {part.key: part.cpu_time_total / num_steps / 1e6 for part in parts}
