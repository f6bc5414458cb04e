"""What a reader of a foreign format gives, and what readers share: opening weights, reading settings, naming classes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.pretrained.safetensors_file import open_safetensors
from vgpt_jax.pretrained.torch_file import StoredTensor, open_torch_file

WRAPPERS = ("module.", "_orig_mod.")  # what data-parallel training and torch.compile put before each name
REQUIRED = object()
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a section"}


@dataclass(frozen=True)
class Converted:
    """A module that was made of a checkpoint.

    A reader is a function ``read_<format>(paths, *, image_size=None)`` that yields these one after the other, a tokenizer before
    the generator of its tokens, so that only one has to be in memory.

    Attributes:
      kind: a key of ``training.saved_model.KINDS``.
      model: the module.
      arguments: of its constructor, without ``rngs``; JSON values.
      metadata: JSON values for ``save_model``: of a tokenizer ``value_range``; of a generator ``class_names`` and
        ``token_shape``; of a classifier ``class_names``; of all ``source``.
    """

    kind: str
    model: nnx.Module
    arguments: dict[str, Any]
    metadata: dict[str, Any]


def source_of(format_name: str, files: Sequence[Path]) -> dict[str, Any]:
    """The metadata ``source``: the format, and the names of the files without their folders."""
    return {"format": format_name, "files": [file.name for file in files]}


def open_state_dict(path: Path, parts: Sequence[str] = ("state_dict",)) -> dict[str, StoredTensor]:
    """The tensors of a PyTorch or safetensors file by name, each to be read when it is used.

    Args:
      path: of the file; one whose name ends in ``.safetensors`` is read as such.
      parts: under which key a PyTorch file holds them; the first that is there counts, and without any the file is all tensors.

    Raises:
      UserError: the file cannot be read, or holds something else.
    """
    if path.suffix == ".safetensors":
        return _without_wrappers(open_safetensors(path))
    found = open_torch_file(path)
    part = next((part for part in parts if isinstance(found, dict) and isinstance(found.get(part), dict)), None)
    found = found if part is None else found[part]
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path} holds no tensors by name, but a {type(found).__name__}")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
            raise UserError(f"{path} holds no state dict: its {name!r} is a {type(tensor).__name__}, not a tensor")
    return _without_wrappers(found)


def _without_wrappers(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    tensors = dict(tensors)
    while prefix := next((p for p in WRAPPERS if tensors and all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def below(tensors: Mapping[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (ValueError, OSError) as error:  # a file that is no text raises a ValueError
        raise UserError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, but an object of settings is needed")
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """An object in a YAML file of plain values. Errors as `read_json`."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as YAML ({reason})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no settings")
    return found


def setting(config: Mapping[str, Any], field: str, kind: type, file: Path, default: Any = REQUIRED) -> Any:
    """A value of nested settings.

    Args:
      config: the settings.
      field: with dots between the levels.
      kind: int, float, bool, str, list (of ints) or dict.
      file: that they are from, for messages.
      default: where there is none, or null. Left out: there must be one.

    Raises:
      UserError: it is missing, or of another kind.
    """
    value: Any = config
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        if default is REQUIRED:
            raise UserError(f"{file} does not say {field}")
        return default
    accepted = (int, float) if kind is float else (list, tuple) if kind is list else kind
    fits = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    if not fits or (kind is list and not all(type(item) is int for item in value)):
        wanted = WORDS.get(kind, "a list of whole numbers")
        raise UserError(f"{file} says {field} is {value!r}, but it must be {wanted}")
    return list(value) if kind is list else value


def numbered_class_names(count: int) -> list[str]:
    """Names for classes that have none: ``class_0``, ``class_1``, ...; of 1000 those of ImageNet, in its order."""
    if count == 1000:
        from vgpt_jax.imagenet import imagenet_class_names

        return list(imagenet_class_names())
    return [f"class_{i}" for i in range(count)]
