"""From a config to the constructor arguments of the models. What can be derived is: K, N and the classes are not in it."""

from typing import Any

from flax import nnx

from vgpt_jax.errors import choose
from vgpt_jax.models.gpt import SIZES
from vgpt_jax.models.layers import DTYPES
from vgpt_jax.models.patchgan import PatchGAN
from vgpt_jax.models.stylegan_discriminator import StyleGANDiscriminator
from vgpt_jax.models.tokenizer import ARCHITECTURES, Tokenizer
from vgpt_jax.quantizers import QUANTIZERS

DISCRIMINATORS = {"patchgan": PatchGAN, "stylegan_discriminator": StyleGANDiscriminator}


def tokenizer_arguments(config) -> dict[str, Any]:
    """The arguments of `Tokenizer` but ``rngs``.

    Raises:
      UserError: the config names an architecture or a quantizer that is not there.
    """
    names = config.tokenizer
    choose("tokenizer.architecture", names.architecture, ARCHITECTURES)
    return {
        "image_size": config.data.image_size,
        "architecture_args": config[names.architecture].to_dict(),
        "quantizer_args": quantizer_arguments(config, names.quantizer, "tokenizer.quantizer"),
        **names.to_dict(),
    }


def quantizer_arguments(config, name: str, field: str) -> dict[str, Any]:
    """The arguments of a quantizer but ``rngs``; a composed one's hold those of the quantizer that it names.

    Raises:
      UserError: there is no quantizer of that name, which ``field`` gives.
    """
    choose(field, name, QUANTIZERS)
    arguments = config[name].to_dict()
    if "quantizer" in arguments:
        inner = arguments["quantizer"]
        arguments["quantizer_args"] = quantizer_arguments(config, inner, f"{name}.quantizer")
    return arguments


def discriminator_arguments(config, name: str) -> dict[str, Any]:
    """The arguments of a discriminator but ``rngs``.

    Raises:
      UserError: there is none of that name.
    """
    choose("adversarial.discriminator", name, DISCRIMINATORS | {"none": None})
    arguments = config[name].to_dict()
    arguments["dtype"] = choose(f"{name}.dtype", arguments["dtype"], DTYPES)
    return arguments | ({"image_size": config.data.image_size} if name == "stylegan_discriminator" else {})


def abstract_tokenizer(config) -> Tokenizer:
    """The tokenizer of a config with shapes for weights.

    Raises:
      UserError: it cannot be built.
    """
    arguments = tokenizer_arguments(config)
    return nnx.eval_shape(lambda: Tokenizer(**arguments, rngs=nnx.Rngs(0)))


def gpt_arguments(config, tokenizer: Tokenizer, num_classes: int) -> dict[str, Any]:
    """The arguments of `GPT` but ``rngs``, for a tokenizer, abstract or not.

    Raises:
      UserError: the config names a size that is not there.
    """
    sizes = {"num_codes": tokenizer.num_codes, "num_classes": num_classes, "num_tokens": tokenizer.num_tokens}
    sizes["grid"] = list(tokenizer.grid) if tokenizer.token_shape == tuple(tokenizer.grid) else []
    arguments = config.gpt.to_dict()
    size = arguments.pop("size")
    return sizes | arguments | (choose("gpt.size", size, SIZES) if size else {})


def classifier_arguments(config, num_classes: int) -> dict[str, Any]:
    """The arguments of `ConvClassifier` but ``rngs``."""
    return {"num_classes": num_classes, "value_range": list(config.data.value_range), **config.classifier.to_dict()}
