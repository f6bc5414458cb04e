"""The PyTorch peer of drawing a picture: generate with Hugging Face, decode, classify, write the GIF with imageio.

For the benchmark beside our sampler and its test. PyTorch, transformers and imageio are no dependencies of the package.
"""

from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgpt_jax.benchmarks.torch_networks import Tokenizer, conv3x3, group_norm


class Classifier(nn.Module):
    """Images ``[B, 3, H, W]`` in 0..1 to logits, as `vgpt_jax.models.classifier.ConvClassifier`."""

    def __init__(self, *, num_classes: int, widths: tuple[int, ...]):
        super().__init__()
        pairs = list(zip((3, *widths[:-1]), widths, strict=True))
        self.strided = nn.ModuleList([nn.Conv2d(i, o, 4, stride=2, padding=1) for i, o in pairs])
        self.norms = nn.ModuleList([group_norm(o) for _, o in pairs])
        self.convs = nn.ModuleList([conv3x3(o, o) for _, o in pairs])
        self.head = nn.Linear(2 * widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = 2 * images - 1
        for strided, norm, conv in zip(self.strided, self.norms, self.convs, strict=True):
            x = strided(x)
            x = x + conv(F.silu(norm(x)))
        x = F.silu(x)
        return self.head(torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1))


@torch.no_grad()
def decode_and_score(
    tokenizer: Tokenizer, classifier: Classifier, token_ids: Tensor, label: int
) -> tuple[Tensor, Tensor]:
    """Token ids ``[B, h, w]`` to images ``[B, 3, H, W]`` in 0..1 and the classifier's softmax score of the label ``[B]``."""
    z_q = tokenizer.quantizer.codebook[token_ids]
    images = tokenizer.decoder(tokenizer.post_quant(z_q).permute(0, 3, 1, 2)).clamp(0, 1)
    return images, classifier(images).softmax(dim=1)[:, label]


def write_gif(image: np.ndarray, grid: tuple[int, int], path: Path) -> None:
    """A picture ``[H, W, 3]`` uint8 uncovered patch by patch, a frame each, on white."""
    rows, columns = image.shape[0] // grid[0], image.shape[1] // grid[1]
    canvas, frames = np.full_like(image, 255), []
    for place in range(grid[0] * grid[1]):
        row, column = divmod(place, grid[1])
        at = np.s_[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
        canvas[at] = image[at]
        frames.append(canvas.copy())
    imageio.mimsave(path, frames, duration=20, loop=0)
