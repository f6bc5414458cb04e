"""The classifiers that can choose among samples, by name."""

from dataclasses import dataclass
from pathlib import Path

from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.models.preprocessed import Preprocessed
from vgpt_jax.pretrained.efficientnet_lite0 import read_efficientnet_lite0
from vgpt_jax.pretrained.hf_vit import find_in_hub_cache, read_hf_vit
from vgpt_jax.pretrained.known import fetch_known
from vgpt_jax.training.saved_model import load_model

OWN, EFFICIENTNET, DOGS, NONE = "own", "efficientnet", "dogs", "none"
DOGS_HUB_NAME = "wesleyacheng/dog-breeds-multiclass-image-classification-with-vit"
KNOWN_NAMES = {EFFICIENTNET: "efficientnet-lite0", DOGS: "dog-breeds-vit"}
"""In ``pretrained.known``, where they may be called so too."""
KINDS = ("classifier", "vit", "efficientnet_lite0")


@dataclass(frozen=True)
class Reranker:
    """A classifier with what it knows of itself.

    Attributes:
      classifier: images ``[B, H, W, 3]`` in ``value_range`` to logits ``[B, L]``.
      labels: L names.
      value_range: None: that of the tokenizer that it was trained beside.
    """

    classifier: nnx.Module
    labels: tuple[str, ...]
    value_range: tuple[float, float] | None


def load_reranker(choice: str, directory: Path) -> Reranker:
    """A classifier by name.

    Args:
      choice: "own", that of the workdir; "efficientnet", EfficientNet-Lite0 with ImageNet's 1000 classes, among them 120 breeds
        of dogs, which is installed; "dogs", the ViT with which visual-gpt ranks (`DOGS_HUB_NAME`), from the Hugging Face hub's
        cache or else fetched; another name of the hub, of a ViT that is in its cache; or a folder: a ViT as Hugging Face saves
        it, what `vgpt_jax.convert` made of one, or a workdir.
      directory: the workdir.

    Raises:
      UserError: there is none of that name, or it is damaged.
    """
    choice = {known: name for name, known in KNOWN_NAMES.items()}.get(choice.replace("_", "-"), choice)
    if choice == OWN:
        return _of_folder(directory / "classifier" / "model")
    if choice == EFFICIENTNET:
        return _preprocessed(next(read_efficientnet_lite0([])))
    if choice == DOGS:
        there = find_in_hub_cache(DOGS_HUB_NAME)
        return _preprocessed(next(read_hf_vit([there] if there else fetch_known(KNOWN_NAMES[DOGS]))))
    folder = Path(choice).expanduser()
    for model in (folder, folder / "model", folder / "classifier" / "model"):
        if (model / "metadata.json").is_file():
            return _of_folder(model)
    found = folder if folder.is_dir() else find_in_hub_cache(choice) if choice.count("/") == 1 else None
    if found is None:
        raise UserError(
            f"--classifier is {choice!r}, but must be {OWN}, {EFFICIENTNET}, {DOGS}, {NONE}, a folder with a classifier, or the "
            "name of a ViT in the Hugging Face hub's cache, such as " + DOGS_HUB_NAME
        )
    return _preprocessed(next(read_hf_vit([found])))


def _of_folder(directory: Path) -> Reranker:
    network, metadata = load_model(directory, KINDS)
    labels = tuple(metadata["class_names"])
    if "preprocessing" not in metadata:
        return Reranker(network, labels, None)
    return Reranker(Preprocessed(network, **metadata["preprocessing"]), labels, (0.0, 1.0))


def _preprocessed(converted) -> Reranker:
    metadata = converted.metadata
    return Reranker(
        Preprocessed(converted.model, **metadata["preprocessing"]), tuple(metadata["class_names"]), (0.0, 1.0)
    )
