"""Inception V3 as the Fréchet Inception distance uses it (Heusel et al. 2017, arXiv 1706.08500): pictures to 2048 features.

The network of 2015-12-05 (Szegedy et al. 2015, arXiv 1512.00567), in the parts that lead to its last pooling. Two things differ
from the paper and from torchvision, and are part of the distance: an average over 3x3 positions counts only those inside the
map, and the last block takes the maximum instead. There is no BatchNorm here: its scale and shift are part of the kernels and
biases. Where the weights come from is no concern of this file.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import UserError

IMAGE_SIZE = 299
"""Pixels, to which pictures are resized."""
LEAST_SIZE = 75
"""Pixels, below which nothing is left of a map at the end."""


class Layer(NamedTuple):
    """A convolution and a ReLU: channels at the output, height and width of the kernel, stride; padded to keep the size?"""

    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True


class Branch(NamedTuple):
    """Layers one after the other; of a fork, the last two are both given what is before them."""

    name: str
    layers: tuple[Layer, ...]
    fork: bool = False

    def layer_names(self) -> list[str]:
        """As published: numbered where there are several."""
        count = len(self.layers)
        if self.fork:
            return [f"{self.name}_{i + 1}" for i in range(count - 2)] + [f"{self.name}_{count - 1}{x}" for x in "ab"]
        return [self.name] if count == 1 else [f"{self.name}_{i + 1}" for i in range(count)]


class Block(NamedTuple):
    """Branches whose outputs are put side by side, and behind them ``pool``, a name in ``POOLS``, with a layer or alone."""

    branches: tuple[Branch, ...]
    pool: str
    pool_layer: tuple[Layer, ...] = ()

    def all_branches(self) -> tuple[Branch, ...]:
        return (*self.branches, Branch("branch_pool", self.pool_layer))


def _block_a(pooled: int) -> Block:
    wide = Layer(96, (3, 3))
    branches = (
        Branch("branch1x1", (Layer(64),)),
        Branch("branch5x5", (Layer(48), Layer(64, (5, 5)))),
        Branch("branch3x3dbl", (Layer(64), wide, wide)),
    )
    return Block(branches, "average", (Layer(pooled),))


def _block_c(inner: int) -> Block:
    row, column = (1, 7), (7, 1)
    doubled = (Layer(inner), Layer(inner, column), Layer(inner, row), Layer(inner, column), Layer(192, row))
    branches = (
        Branch("branch1x1", (Layer(192),)),
        Branch("branch7x7", (Layer(inner), Layer(inner, row), Layer(192, column))),
        Branch("branch7x7dbl", doubled),
    )
    return Block(branches, "average", (Layer(192),))


def _block_e(pool: str) -> Block:
    pair = (Layer(384, (1, 3)), Layer(384, (3, 1)))
    branches = (
        Branch("branch1x1", (Layer(320),)),
        Branch("branch3x3", (Layer(384), *pair), fork=True),
        Branch("branch3x3dbl", (Layer(448), Layer(384, (3, 3)), *pair), fork=True),
    )
    return Block(branches, pool, (Layer(192),))


def _strided(channels: int) -> Layer:
    return Layer(channels, (3, 3), stride=2, padded=False)


STEM: dict[str, Layer | None] = {  # None: a maximum over 3x3 positions, stride 2
    "Conv2d_1a_3x3": _strided(32),
    "Conv2d_2a_3x3": Layer(32, (3, 3), padded=False),
    "Conv2d_2b_3x3": Layer(64, (3, 3)),
    "maxpool1": None,
    "Conv2d_3b_1x1": Layer(80),
    "Conv2d_4a_3x3": Layer(192, (3, 3), padded=False),
    "maxpool2": None,
}
BLOCKS = {  # by their published names
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": Block(
        (
            Branch("branch3x3", (_strided(384),)),
            Branch("branch3x3dbl", (Layer(64), Layer(96, (3, 3)), _strided(96))),
        ),
        "halve",
    ),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": Block(
        (
            Branch("branch3x3", (Layer(192), _strided(320))),
            Branch("branch7x7x3", (Layer(192), Layer(192, (1, 7)), Layer(192, (7, 1)), _strided(192))),
        ),
        "halve",
    ),
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("maximum"),
}
SAME = ((1, 1), (1, 1))
POOLS = {  # over 3x3 positions
    "average": lambda x: nnx.avg_pool(x, (3, 3), padding=SAME, count_include_pad=False),
    "maximum": lambda x: nnx.max_pool(x, (3, 3), padding=SAME),
    "halve": lambda x: nnx.max_pool(x, (3, 3), strides=(2, 2)),
}


def make_conv(in_channels: int, layer: Layer, rngs: nnx.Rngs) -> nnx.Conv:
    padding = tuple((side // 2, side // 2) if layer.padded else (0, 0) for side in layer.kernel)
    return nnx.Conv(in_channels, layer.channels, layer.kernel, strides=layer.stride, padding=padding, rngs=rngs)


class InceptionBlock(nnx.Module):
    """One of ``BLOCKS``, by name; its convolutions by theirs."""

    def __init__(self, in_channels: int, name: str, rngs: nnx.Rngs):
        self.name = name
        convs, self.out_channels = {}, 0
        for branch in BLOCKS[name].all_branches():
            widths = [in_channels, *(layer.channels for layer in branch.layers)]
            for i, (conv_name, layer) in enumerate(zip(branch.layer_names(), branch.layers, strict=True)):
                second_of_fork = branch.fork and i == len(branch.layers) - 1
                convs[conv_name] = make_conv(widths[i - 1 if second_of_fork else i], layer, rngs)
            self.out_channels += sum(widths[-2:]) if branch.fork else widths[-1]
        self.convs = nnx.Dict(convs)

    def __call__(self, x: Array) -> Array:
        block = BLOCKS[self.name]
        outputs = []
        for branch in block.all_branches():
            y = POOLS[block.pool](x) if branch.name == "branch_pool" else x
            layers = [self.convs[name] for name in branch.layer_names()]
            for conv in layers[:-2] if branch.fork else layers:
                y = jax.nn.relu(conv(y))
            outputs += [jax.nn.relu(conv(y)) for conv in layers[-2:]] if branch.fork else [y]
        return jnp.concatenate(outputs, axis=-1)


class InceptionV3(nnx.Module):
    """Pictures to what the Fréchet Inception distance compares. Float32 at full precision, whatever the device's default.

    Args:
      rngs: ``params``.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        width, stem, blocks = 3, {}, {}
        for name, layer in STEM.items():
            if layer is not None:
                stem[name] = make_conv(width, layer, rngs)
                width = layer.channels
        for name in BLOCKS:
            blocks[name] = InceptionBlock(width, name, rngs)
            width = blocks[name].out_channels
        self.stem, self.blocks = nnx.Dict(stem), nnx.Dict(blocks)

    def __call__(self, images: Array) -> Array:
        """Images ``[B, H, W, 3]`` in 0..1, of any size, to features ``[B, 2048]`` float32, not negative.

        They are resized to 299 pixels by bilinear interpolation between four pixels, whether they grow or shrink, which is how
        pytorch-fid does it: other ways give other distances.
        """
        x = images.astype(jnp.float32)
        x = jax.image.resize(x, (len(x), IMAGE_SIZE, IMAGE_SIZE, 3), "linear", antialias=False)
        return self.features(2.0 * x - 1.0)

    def features(self, x: Array) -> Array:
        """Pictures ``[B, H, W, 3]`` in -1..1 as they are, to ``[B, 2048]``: the mean over positions of the last map.

        Raises:
          UserError: they are smaller than 75 pixels.
        """
        if min(x.shape[1:3]) < LEAST_SIZE:
            raise UserError(f"Inception needs pictures of at least {LEAST_SIZE} pixels, but was given {x.shape[1:3]}")
        with jax.default_matmul_precision("float32"):
            for name, layer in STEM.items():
                x = POOLS["halve"](x) if layer is None else jax.nn.relu(self.stem[name](x))
            for name in BLOCKS:
                x = self.blocks[name](x)
        return jnp.mean(x, axis=(1, 2))
