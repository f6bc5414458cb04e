"""From a config to the constructor arguments of the models. What can be derived is: K, N and the classes are not in it, and
a model that starts from a trained one is built as that one was."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from vgpt_jax.errors import UserError, check_range, choose
from vgpt_jax.models.gpt import SIZES
from vgpt_jax.models.layers import DTYPES
from vgpt_jax.models.patchgan import PatchGAN
from vgpt_jax.models.stylegan_discriminator import StyleGANDiscriminator
from vgpt_jax.models.tokenizer import ARCHITECTURES, Tokenizer
from vgpt_jax.quantizers import QUANTIZERS
from vgpt_jax.training.remat import POLICIES
from vgpt_jax.training.saved_model import abstract_model, read_metadata
from vgpt_jax.training.sharding import check_batch_size

DISCRIMINATORS = {"patchgan": PatchGAN, "stylegan_discriminator": StyleGANDiscriminator}

OF_TRAINING = {"dtype", "dropout", "drop_path", "commitment_weight", "codebook_weight", "penalty_weight"} | {
    f"{name}_dropout" for name in ("embedding", "residual", "attention", "token", "class")
}
"""Arguments that change neither the shapes nor what a trained model computes: the config's count also where a model starts
from a trained one."""


MODEL_FROM = ("last", "best")


def check_training(mesh: Mesh, name: str, config: Any) -> None:
    """Raises `UserError` where what all ``*_training`` sections have is not sound, on this mesh."""
    training = config[name]
    check_range(f"{name}.accumulate", training.accumulate, least=1)
    check_batch_size(mesh, training.batch_size, f"{name}.batch_size", training.accumulate)
    choose(f"{name}.remat", training.remat, POLICIES)
    choose(f"{name}.model_from", training.model_from, dict.fromkeys(MODEL_FROM))
    if training.model_from == "best" and config.logging.keep_best < 1:
        raise UserError(
            f'{name}.model_from is "best", but logging.keep_best is {config.logging.keep_best}: keep at least 1'
        )


def tokenizer_arguments(config) -> dict[str, Any]:
    """The arguments of `Tokenizer` but ``rngs``: the config's, or those of the tokenizer that it starts from, but the image size
    and what is ``OF_TRAINING``.

    Raises:
      UserError: the config names an architecture or a quantizer that is not there, or a tokenizer to start from that is not there
        or is for images in another range.
    """
    names, size = config.tokenizer, config.data.image_size
    choose("tokenizer.architecture", names.architecture, ARCHITECTURES)
    arguments = {
        "image_size": size,
        "architecture_args": config[names.architecture].to_dict(),
        "quantizer_args": quantizer_arguments(config, names.quantizer, "tokenizer.quantizer"),
        **names.to_dict(),
    }
    directory = config.tokenizer_training.init_from
    if not directory:
        return arguments
    metadata = read_metadata(Path(directory), "tokenizer")
    check_value_range(config, metadata, directory)
    there = metadata["arguments"]
    return at_image_size(_continued(there, arguments), size)


def check_value_range(config, of_tokenizer: Mapping[str, Any], directory: str | Path) -> None:
    """Raises `UserError` unless a trained tokenizer is for images in the config's range."""
    mine, there = list(config.data.value_range), list(of_tokenizer["value_range"])
    if mine != there:
        raise UserError(
            f"data.value_range is {mine} in the config, but {there} in the tokenizer in {directory}: "
            f"--config.data.value_range='({there[0]}, {there[1]})'"
        )


def at_image_size(arguments: dict[str, Any], image_size: int) -> dict[str, Any]:
    """The arguments of a tokenizer for images of another size: its levels have attention where they had it.

    Raises:
      UserError: a level's resolution would be no whole number.
    """
    before, inner = arguments["image_size"], dict(arguments["architecture_args"])
    if inner.get("attn_resolutions"):
        scaled = [resolution * image_size / before for resolution in inner["attn_resolutions"]]
        if any(resolution % 1 for resolution in scaled):
            raise UserError(
                f"a tokenizer for {before} px with attention at {inner['attn_resolutions']} px cannot be one for {image_size} px"
            )
        inner["attn_resolutions"] = [int(resolution) for resolution in scaled]
    return arguments | {"image_size": image_size, "architecture_args": inner}


def _continued(there: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, Any]:
    """``there`` with what is ``OF_TRAINING`` taken from ``mine``, where both have it."""
    found = {}
    for name, value in there.items():
        if isinstance(value, Mapping) and isinstance(mine.get(name), Mapping):
            found[name] = _continued(value, mine[name])
        else:
            found[name] = mine[name] if name in OF_TRAINING and name in mine else value
    return found


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


def trained_tokenizer(config, workdir: Path) -> Tokenizer:
    """The tokenizer that the generator is for, with shapes for weights: the workdir's where it is finished, also one that was put
    there, or else the one that the config describes.

    Raises:
      UserError: it cannot be built, or is for other images than the config's.
    """
    directory = workdir / "tokenizer" / "model"
    if not (directory / "metadata.json").is_file():
        return abstract_tokenizer(config)
    metadata = read_metadata(directory, "tokenizer")
    there = metadata["arguments"]["image_size"]
    if config.data.image_size != there:
        raise UserError(
            f"data.image_size is {config.data.image_size} in the config, but {there} in the tokenizer in {workdir}: "
            f"--config.data.image_size={there}"
        )
    check_value_range(config, metadata, workdir)
    return abstract_model(directory, metadata)


def gpt_arguments(config, tokenizer: Tokenizer, num_classes: int) -> dict[str, Any]:
    """The arguments of `GPT` but ``rngs``, for a tokenizer, abstract or not: the config's, or those of the generator that it
    starts from, but the number of classes and what is ``OF_TRAINING``.

    Raises:
      UserError: the config names a size that is not there, or a generator to start from that is not there or is for other tokens.
    """
    sizes = {"num_codes": tokenizer.num_codes, "num_classes": num_classes, "num_tokens": tokenizer.num_tokens}
    sizes["grid"] = list(tokenizer.grid) if tokenizer.token_shape == tuple(tokenizer.grid) else []
    arguments = config.gpt.to_dict()
    size = arguments.pop("size")
    arguments = sizes | arguments | (choose("gpt.size", size, SIZES) if size else {})
    directory = config.generator_training.init_from
    if not directory:
        return arguments
    there = read_metadata(Path(directory), "gpt")["arguments"]
    for name in ("num_codes", "num_tokens"):
        if there[name] != sizes[name]:
            raise UserError(
                f"init_from {directory} holds a generator of {name} {there[name]}, but the tokenizer has {sizes[name]}: it can "
                "only go on with the tokens that it was trained on"
            )
    return _continued(there, arguments) | {"num_classes": num_classes}


def classifier_arguments(config, num_classes: int) -> dict[str, Any]:
    """The arguments of `ConvClassifier` but ``rngs``: the config's, or those of the classifier that it starts from.

    Raises:
      UserError: the classifier to start from is not there, or knows another number of classes.
    """
    arguments = {
        "num_classes": num_classes,
        "value_range": list(config.data.value_range),
        **config.classifier.to_dict(),
    }
    directory = config.classifier_training.init_from
    if not directory:
        return arguments
    there = read_metadata(Path(directory), "classifier")["arguments"]
    for name in ("num_classes", "value_range"):
        if there[name] != arguments[name]:
            raise UserError(
                f"init_from {directory} holds a classifier with {name} {there[name]}, but the data has {arguments[name]}"
            )
    return _continued(there, arguments)
