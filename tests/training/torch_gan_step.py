"""VQ-GAN's training step in PyTorch, in the published order: every gradient by a walk through the whole graph.

Networks are functions of a dict of tensors, by the path and in the layout of our parameters; so are the gradients that come
back. Images are ``[B, H, W, 3]`` here too, and ``[B, C, H, W]`` between the layers. Float64, so that it is the truth.

Reference: Esser et al. 2021, arXiv 2012.09841; the loss as published with taming-transformers.
"""

import math

import torch
import torch.nn.functional as F

# Layers. `p` holds the parameters, `name` the path of the layer's.


def conv(p, name, x, stride=1, padding=1):
    return F.conv2d(x, p[f"{name}.kernel"].permute(3, 2, 0, 1).contiguous(), p.get(f"{name}.bias"), stride, padding)


def group_norm(p, name, x):
    channels = x.shape[1]
    return F.group_norm(x, math.gcd(32, channels), p[f"{name}.scale"], p[f"{name}.bias"], eps=1e-6)


def residual(p, name, x):
    y = conv(p, f"{name}.conv1", F.silu(group_norm(p, f"{name}.norm1", x)))
    y = conv(p, f"{name}.conv2", F.silu(group_norm(p, f"{name}.norm2", y)))
    return y + (conv(p, f"{name}.shortcut", x, padding=0) if f"{name}.shortcut.kernel" in p else x)


def attention(p, name, x):
    y = group_norm(p, f"{name}.norm", x)
    query, key, value = (conv(p, f"{name}.{part}", y, padding=0).flatten(2) for part in ("query", "key", "value"))
    weights = torch.softmax(query.mT @ key / x.shape[1] ** 0.5, dim=-1)  # [B, queries, keys]
    return x + conv(p, f"{name}.out", (value @ weights.mT).view(x.shape), padding=0)


def middle(p, name, x):
    return residual(p, f"{name}.block2", attention(p, f"{name}.attention", residual(p, f"{name}.block1", x)))


def level(p, name, x):
    index = 0
    while f"{name}.blocks.{index}.conv1.kernel" in p:
        x = residual(p, f"{name}.blocks.{index}", x)
        index += 1
    return x


# Autoencoders: VQ-GAN's with two levels, VQ-VAE's with two downsamplings and one residual block


def vqgan_encoder(p, x):
    x = level(p, "encoder.levels.0", conv(p, "encoder.conv_in", x))
    x = conv(p, "encoder.levels.0.resample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
    x = middle(p, "encoder.middle", level(p, "encoder.levels.1", x))
    return conv(p, "encoder.conv_out", F.silu(group_norm(p, "encoder.norm_out", x)))


def vqgan_decoder(p, x):
    x = level(p, "decoder.levels.0", middle(p, "decoder.middle", conv(p, "decoder.conv_in", x)))
    x = conv(p, "decoder.levels.0.resample.conv", F.interpolate(x, scale_factor=2.0, mode="nearest"))
    x = level(p, "decoder.levels.1", x)
    return conv(p, "decoder.conv_out", F.silu(group_norm(p, "decoder.norm_out", x)))


def plain_residual(p, name, x):
    return x + conv(p, f"{name}.conv2", F.relu(conv(p, f"{name}.conv1", F.relu(x))), padding=0)


def vqvae_encoder(p, x):
    for index in range(2):
        x = F.relu(conv(p, f"encoder.strided.{index}", x, stride=2))
    x = plain_residual(p, "encoder.blocks.0", conv(p, "encoder.conv", x))
    return conv(p, "encoder.conv_out", F.relu(x), padding=0)


def vqvae_decoder(p, x):
    x = plain_residual(p, "decoder.blocks.0", conv(p, "decoder.conv_in", x))
    for index in range(2):
        x = conv(p, f"decoder.upsamples.{index}.conv", F.relu(x))
        # A pixel's four are the slowest of the channels here, the fastest in PyTorch.
        x = F.pixel_shuffle(x.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2), 2)
    return x


ARCHITECTURES = {
    "vqgan": (vqgan_encoder, vqgan_decoder, "decoder.conv_out.kernel"),
    "vqvae": (vqvae_encoder, vqvae_decoder, "decoder.upsamples.1.conv.kernel"),
}


def vector_quantize(codebook, z):
    """Latents ``[B, D, h, w]`` to what the decoder gets, and the two losses of the codebook."""
    z = z.permute(0, 2, 3, 1)
    codes = codebook[torch.cdist(z.detach().flatten(0, 2), codebook.detach()).argmin(1)].view(z.shape)
    commitment, of_codebook = ((codes.detach() - z) ** 2).mean(), ((codes - z.detach()) ** 2).mean()
    return (z + (codes - z).detach()).permute(0, 3, 1, 2), {"commitment": commitment, "codebook": of_codebook}


# Discriminator and distance


def patchgan(p, images):
    """With two convolutions of stride 2, and with BatchNorm where ``p`` has norms."""
    x = F.leaky_relu(conv(p, "convs.0", images.permute(0, 3, 1, 2), stride=2), 0.2)
    for index, stride in ((1, 2), (2, 1)):
        x = conv(p, f"convs.{index}", x, stride)
        if f"norms.{index - 1}.scale" in p:
            scale, bias = p[f"norms.{index - 1}.scale"], p[f"norms.{index - 1}.bias"]
            x = F.batch_norm(x, None, None, scale, bias, training=True, eps=1e-5)
        x = F.leaky_relu(x, 0.2)
    return conv(p, "convs.3", x)


def distance(p, images, references):
    """A perceptual distance ``[B]`` with two layers of features."""
    total, pair = 0.0, [x.permute(0, 3, 1, 2) for x in (images, references)]
    for name in ("conv1", "conv2"):
        pair = [torch.tanh(conv(p, name, x, stride=2)) for x in pair]
        total = total + ((pair[0] - pair[1]) ** 2).mean(dim=(1, 2, 3))
    return total


# Losses and the step

HINGE = (lambda real, fake: 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean()), lambda fake: -fake.mean())
NON_SATURATING = (
    lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),
    lambda fake: F.softplus(-fake).mean(),
)


def discriminator_gradients(p, real, fake, loss=HINGE, lecam_weight=0.0, averages=(0.0, 0.0), r1_weight=0.0):
    """The gradients of a discriminator's whole loss, its adversarial part, and the gradient penalty.

    ``averages`` are LeCam's, of the logits of real and of fake images.
    """
    real = real.detach().requires_grad_()
    real_logits, fake_logits = patchgan(p, real), patchgan(p, fake.detach())
    total = adversarial = loss[0](real_logits, fake_logits)
    if lecam_weight:
        regularisation = (F.relu(real_logits - averages[1]) ** 2).mean() + (
            F.relu(averages[0] - fake_logits) ** 2
        ).mean()
        total = total + lecam_weight * regularisation
    (slope,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
    penalty = (slope**2).sum(dim=(1, 2, 3)).mean()
    total = total + r1_weight * penalty
    return dict(zip(p, torch.autograd.grad(total, list(p.values())), strict=True)), adversarial, penalty


def gan_step(
    tokenizer, discriminator, perceptual, images, *, architecture, weight, losses=HINGE, perceptual_weight=1.0
):
    """One step: the metrics, the gradients of the autoencoder and those of the discriminator.

    ``weight`` is that of the adversarial loss, before the adaptive weight. ``perceptual`` may be empty.
    """
    encoder, decoder, last_layer = ARCHITECTURES[architecture]
    z = encoder(tokenizer, images.permute(0, 3, 1, 2))
    z = torch.einsum("bchw,cd->bdhw", z, tokenizer["pre_quant.kernel"])
    z_q, metrics = vector_quantize(tokenizer["quantizer.codebook"], z)
    quantizer_loss = 0.25 * metrics["commitment"] + metrics["codebook"]
    z_q = torch.einsum("bdhw,dc->bchw", z_q, tokenizer["post_quant.kernel"])
    reconstruction = decoder(tokenizer, z_q).permute(0, 2, 3, 1)

    rec_loss = metrics["reconstruction"] = (images - reconstruction).abs().mean()
    if perceptual:
        metrics["perceptual"] = distance(perceptual, reconstruction, images).mean()
        rec_loss = rec_loss + perceptual_weight * metrics["perceptual"]
    g_loss = losses[1](patchgan(discriminator, reconstruction))

    last = tokenizer[last_layer]
    rec_norm, g_norm = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (rec_loss, g_loss))
    d_weight = weight * (rec_norm / (g_norm + 1e-4)).clamp(0.0, 1e4).detach()
    total = rec_loss + d_weight * g_loss + quantizer_loss
    total.backward()
    of_tokenizer = {name: tensor.grad for name, tensor in tokenizer.items()}

    real_logits, fake_logits = (patchgan(discriminator, x.detach()).mean() for x in (images, reconstruction))
    of_discriminator, d_loss, _ = discriminator_gradients(discriminator, images, reconstruction, losses)
    metrics |= {"loss": total, "adversarial": g_loss, "adversarial_weight": d_weight, "discriminator": d_loss}
    metrics |= {"real_logits": real_logits, "fake_logits": fake_logits}
    for name, gradients in (("", of_tokenizer), ("discriminator_", of_discriminator)):
        metrics[name + "gradient_norm"] = torch.stack([(g**2).sum() for g in gradients.values()]).sum().sqrt()
    return {name: value.item() for name, value in metrics.items()}, of_tokenizer, of_discriminator
