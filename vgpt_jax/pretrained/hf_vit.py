"""ViT classifiers as Hugging Face saves them: a folder with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``,
and what was done to the pictures in ``preprocessor_config.json``. And where the hub's own cache keeps such folders."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.models.vit import ViT
from vgpt_jax.pretrained.converted import (
    REQUIRED,
    Converted,
    check_count,
    open_state_dict,
    read_json,
    setting,
    shown,
    source_of,
)
from vgpt_jax.pretrained.strict import Table, conv_kernel, linear_kernel, load_strictly, unchanged

ARCHITECTURE = "ViTForImageClassification"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
MIN_MAX_FOLDERS = (  # of the one ViT that visual-gpt ranks with: in the hub's cache, as downloaded, and as `known` calls it
    "models--wesleyacheng--dog-breeds-multiclass-image-classification-with-vit",
    "dog-breeds-multiclass-image-classification-with-vit",
    "dog-breeds-vit",
)
LAYER_NAMES = {  # what transformers calls them since its version 5, in memory: what is in the files that it writes
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
IN_MEMORY = re.compile(r"vit\.layers\.(\d+)\.(.+)\.(weight|bias)")


def read_hf_vit(paths: Sequence[Path], *, image_size: int | None = None) -> Iterator[Converted]:
    """A classifier "vit", with the metadata ``class_names`` and ``preprocessing`` (the arguments of `Preprocessed`).

    ``preprocessing`` says ``min_max`` for the ViT that visual-gpt ranks with, which is known by the name of its folder.

    Args:
      paths: the folder, or files in it.
      image_size: None: the network takes pictures of one size, and no other can be asked for.

    Raises:
      UserError: files are missing or damaged, do not fit each other, or are of another network.
    """
    for path in paths:
        if not path.exists():
            raise UserError(f"there is no file or folder {path}")
    folders = {path if path.is_dir() else path.parent for path in paths}
    if len(folders) != 1:
        raise UserError(f"a ViT is one folder, but {len(folders)} are given")
    (folder,) = folders
    config_file = folder / "config.json"
    config = read_json(config_file)
    if config.get("architectures") != [ARCHITECTURE]:
        found = config.get("architectures") or config.get("model_type")
        raise UserError(f"{config_file} is of {shown(found)}, but what is read is {ARCHITECTURE}")
    class_names = _class_names(config, config_file)
    arguments = _arguments(config, config_file, len(class_names))
    if image_size not in (None, arguments["image_size"]):
        raise UserError(
            f"image_size is {image_size}, but this ViT takes pictures of {arguments['image_size']} px only: leave it out"
        )
    preprocessing = _preprocessing(folder / "preprocessor_config.json", arguments["image_size"])
    file = _weights_file(paths, folder)
    tensors = {_name_in_files(name): tensor for name, tensor in open_state_dict(file).items()}
    check_count("num_hidden_layers", arguments["num_layers"], "vit.encoder.layer.", tensors, str(file))
    ignored = [name for name in tensors if name.startswith("vit.pooler.")]

    def create() -> ViT:
        return ViT(**arguments, rngs=nnx.Rngs(0))

    model = load_strictly(create, tensors, _table(arguments), str(file), ignored)
    metadata = {"class_names": class_names, "preprocessing": preprocessing, "source": source_of("hf_vit", [file])}
    yield Converted("vit", model, arguments, metadata)


def find_in_hub_cache(name: str) -> Path | None:
    """Where the Hugging Face hub's cache has the files of a model, or None.

    Looked for in ``$HF_HUB_CACHE``, ``$HF_HOME/hub`` and ``~/.cache/huggingface/hub``: the snapshot of the main branch, or else
    the newest.

    Args:
      name: on the hub, "organisation/model".
    """
    roots = [os.environ.get("HF_HUB_CACHE"), os.environ.get("HF_HOME") and f"{os.environ['HF_HOME']}/hub"]
    for root in (*filter(None, roots), "~/.cache/huggingface/hub"):
        folder = Path(root).expanduser() / f"models--{name.replace('/', '--')}"
        branch = folder / "refs" / "main"
        main = [folder / "snapshots" / branch.read_text().strip()] if branch.is_file() else []
        for snapshot in main + sorted(folder.glob("snapshots/*"), key=lambda p: p.stat().st_mtime, reverse=True):
            if (snapshot / "config.json").is_file():
                return snapshot
    return None


def _weights_file(paths: Sequence[Path], folder: Path) -> Path:
    """The file with the tensors: that which was given, or else the first of ``WEIGHTS`` that is there."""
    given = [path for path in paths if path.suffix in (".safetensors", ".bin")]
    for file in (*given, *(folder / name for name in WEIGHTS)):
        if file.is_file():
            return file
    raise UserError(f"{folder} has no {' or '.join(WEIGHTS)}")


def _name_in_files(name: str) -> str:
    found = IN_MEMORY.fullmatch(name)
    if found is None:
        return name
    layer, part, kind = found.groups()
    return f"vit.encoder.layer.{layer}.{LAYER_NAMES.get(part, part)}.{kind}"


def _class_names(config: dict[str, Any], file: Path) -> list[str]:
    labels = setting(config, "id2label", dict, file, {str(i): f"LABEL_{i}" for i in range(2)})  # as left out there
    wanted = [str(i) for i in range(len(labels))]
    if set(labels) != set(wanted) or not all(isinstance(label, str) for label in labels.values()):
        raise UserError(f"{file} says id2label, but not a name for each of 0, 1, 2, ... in a row")
    return [labels[i] for i in wanted]


def _arguments(config: dict[str, Any], file: Path, num_classes: int) -> dict[str, Any]:
    def get(field: str, default: Any) -> Any:
        return setting(config, field, type(default), file, default)

    def side(field: str, default: int) -> int:
        value = config.get(field, default)
        sides = value if isinstance(value, list) and len(value) == 2 else [value, value]
        if sides[0] != sides[1] or not isinstance(sides[0], int):
            raise UserError(f"{file} says {field} is {shown(value)}, but only squares can be read")
        return sides[0]

    return {
        "image_size": side("image_size", 224),
        "patch_size": side("patch_size", 16),
        "d_model": get("hidden_size", 768),
        "num_layers": get("num_hidden_layers", 12),
        "num_heads": get("num_attention_heads", 12),
        "mlp_width": get("intermediate_size", 3072),
        "num_classes": num_classes,
        "norm_epsilon": get("layer_norm_eps", 1e-12),
        "qkv_bias": get("qkv_bias", True),
        "activation": get("hidden_act", "gelu"),
    }


def _preprocessing(file: Path, image_size: int) -> dict[str, Any]:
    """The arguments of `Preprocessed`. Without the file: those that Hugging Face's ViTs have unless they say otherwise."""
    config = read_json(file) if file.exists() else {}

    def get(field: str, default: Any) -> Any:
        return setting(config, field, type(default), file, default)

    def colours(field: str) -> np.ndarray:
        values = np.array(config.get(field) or [0.5] * 3, object)
        if values.shape != (3,) or not all(type(value) in (int, float) for value in values):
            raise UserError(
                f"{file} says {field} is {shown(config[field])}, but must be a number for each of 3 colours"
            )
        return values.astype(np.float64)

    size, resize_size = _sizes(config, file, image_size)
    if size != image_size:
        raise UserError(f"{file} makes pictures of {size} px, but the network takes {image_size} px")
    resample = get("resample", 2)
    if resample not in RESAMPLE:
        raise UserError(f"{file} says resample is {resample}, but must be one of {', '.join(map(str, RESAMPLE))}")
    factor = 255.0 * get("rescale_factor", 1 / 255) if get("do_rescale", True) else 255.0
    mean, std = (
        (colours("image_mean"), colours("image_std")) if get("do_normalize", True) else (np.zeros(3), np.ones(3))
    )
    return {
        "image_size": image_size,
        "resize_size": resize_size,
        "method": RESAMPLE[resample],
        "scale": (factor / std).tolist(),
        "shift": (-mean / std).tolist(),
        "min_max": any(part in MIN_MAX_FOLDERS for part in file.absolute().parts),
    }


def _sizes(config: dict[str, Any], file: Path, image_size: int) -> tuple[int, int]:
    """The sides of the pictures that come out, and to which they are resized before the centre is cut out."""

    def side(field: str, default: Any = REQUIRED) -> int:
        value = config.get(field)
        if not isinstance(value, dict):
            return setting(config, field, int, file, default)
        sides = {setting(config, f"{field}.{name}", int, file) for name in value}
        if len(sides) != 1 or not value.keys() <= {"height", "width", "shortest_edge"}:
            raise UserError(f"{file} says {field} is {shown(value)}, but only squares and a shortest_edge can be read")
        return sides.pop()

    resized = side("size", image_size)
    if config.get("do_center_crop"):
        return side("crop_size", image_size), resized
    return resized, resized


def _table(arguments: dict[str, Any]) -> Table:
    def linear(ours: str, theirs: str, bias: bool = True) -> dict:
        biases = {f"{ours}.bias": (unchanged, (f"{theirs}.bias",))} if bias else {}
        return {f"{ours}.kernel": (linear_kernel, (f"{theirs}.weight",))} | biases

    def norm(ours: str, theirs: str) -> dict:
        return {f"{ours}.scale": (unchanged, (f"{theirs}.weight",)), f"{ours}.bias": (unchanged, (f"{theirs}.bias",))}

    embeddings = "vit.embeddings"
    table = {
        "patches.kernel": (conv_kernel, (f"{embeddings}.patch_embeddings.projection.weight",)),
        "patches.bias": (unchanged, (f"{embeddings}.patch_embeddings.projection.bias",)),
        "cls": (lambda x: x[0, 0], (f"{embeddings}.cls_token",)),
        "positions": (lambda x: x[0], (f"{embeddings}.position_embeddings",)),
    }
    for i in range(arguments["num_layers"]):
        ours, theirs = f"blocks.{i}", f"vit.encoder.layer.{i}"
        for name in ("query", "key", "value"):
            table |= linear(f"{ours}.attention.{name}", f"{theirs}.attention.attention.{name}", arguments["qkv_bias"])
        table |= linear(f"{ours}.attention.out", f"{theirs}.attention.output.dense")
        table |= linear(f"{ours}.fc", f"{theirs}.intermediate.dense") | linear(f"{ours}.out", f"{theirs}.output.dense")
        table |= norm(f"{ours}.norm1", f"{theirs}.layernorm_before") | norm(
            f"{ours}.norm2", f"{theirs}.layernorm_after"
        )
    return table | norm("norm", "vit.layernorm") | linear("classifier", "classifier")
