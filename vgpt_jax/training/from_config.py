"""From a config to the constructor arguments of the models. What can be derived is: K, N and the classes are not in it."""

from typing import Any

from flax import nnx

from vgpt_jax.errors import choose
from vgpt_jax.models.tokenizer import ARCHITECTURES, Tokenizer
from vgpt_jax.quantizers import QUANTIZERS


def tokenizer_arguments(config) -> dict[str, Any]:
    """The arguments of `Tokenizer` but ``rngs``.

    Raises:
      UserError: the config names an architecture or a quantizer that is not there.
    """
    names = config.tokenizer
    choose("tokenizer.architecture", names.architecture, ARCHITECTURES)
    choose("tokenizer.quantizer", names.quantizer, QUANTIZERS)
    return {
        "image_size": config.data.image_size,
        "architecture_args": config[names.architecture].to_dict(),
        "quantizer_args": config[names.quantizer].to_dict(),
        **names.to_dict(),
    }


def abstract_tokenizer(config) -> Tokenizer:
    """The tokenizer of a config with shapes for weights.

    Raises:
      UserError: it cannot be built.
    """
    arguments = tokenizer_arguments(config)
    return nnx.eval_shape(lambda: Tokenizer(**arguments, rngs=nnx.Rngs(0)))


def gpt_arguments(config, tokenizer: Tokenizer, num_classes: int) -> dict[str, Any]:
    """The arguments of `GPT` but ``rngs``, for a tokenizer, abstract or not."""
    rows, columns = tokenizer.grid
    sizes = {"num_codes": tokenizer.num_codes, "num_classes": num_classes, "num_tokens": rows * columns}
    return sizes | config.gpt.to_dict()


def classifier_arguments(config, num_classes: int) -> dict[str, Any]:
    """The arguments of `ConvClassifier` but ``rngs``."""
    return {"num_classes": num_classes, "value_range": list(config.data.value_range), **config.classifier.to_dict()}
