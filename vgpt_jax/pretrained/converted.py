"""What a reader of a foreign format gives, and what readers share: opening weights, reading settings, naming classes."""

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.imagenet import imagenet_class_names
from vgpt_jax.pretrained.safetensors_file import open_safetensors
from vgpt_jax.pretrained.stored_tensor import StoredTensor
from vgpt_jax.pretrained.torch_file import open_torch_file

WRAPPERS = ("module.", "_orig_mod.")  # what data-parallel training and torch.compile put before each name
REQUIRED = object()
LARGEST = 2**31 - 1  # whole number of settings, as our counters are int32
LARGEST_FLOAT = 3e38  # and other number, as our computations are float32
WORDS = {float: "a finite number", bool: "true or false", str: "a text", dict: "a section"}


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


def check_count(field: str, count: int, prefix: str, tensors: Mapping[str, StoredTensor], source: str) -> None:
    """Raises `UserError` unless as many numbers follow ``prefix`` in the tensors' names as ``field`` of the settings says."""
    there = count_numbers(prefix, tensors)
    if count != there:
        raise UserError(f"{source} does not fit: its settings say {field} is {count}, but there are {there} {prefix}*")


def count_numbers(prefix: str, tensors: Mapping[str, StoredTensor]) -> int:
    """How many numbers follow ``prefix`` in the tensors' names."""
    pattern = re.compile(re.escape(prefix) + r"([0-9]+)\.")
    return len({found[1] for name in tensors if (found := pattern.match(name))})


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (ValueError, OSError, RecursionError) as error:  # a file that is no text raises a ValueError
        raise UserError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, but an object of settings is needed")
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """An object in a YAML file of plain values. Errors as `read_json`."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as YAML ({reason})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no settings")
    return found


def shown(value: Any) -> str:
    """A value of a file's settings for a message, which it shall not fill."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 100, 100
    try:
        return short.repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a {type(value).__name__} that is too long to show"


def setting(
    config: Mapping[str, Any], field: str, kind: type, file: Path, default: Any = REQUIRED, *, least: int = 0
) -> Any:
    """A value of nested settings.

    Args:
      config: the settings.
      field: with dots between the levels.
      kind: int, float, bool, str, list (of ints) or dict.
      file: that they are from, for messages.
      default: where there is none, or null. Left out: there must be one.
      least: whole numbers are from here to ``LARGEST``.

    Raises:
      UserError: it is missing, of another kind, or out of range.
    """
    value: Any = config
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        if default is REQUIRED:
            raise UserError(f"{file} does not say {field}")
        return default
    if kind is float:
        fits = type(value) in (int, float) and -LARGEST_FLOAT <= value <= LARGEST_FLOAT
    elif kind in (int, list):
        items = value if kind is list and isinstance(value, (list, tuple)) else [value]
        fits = (items is value) == (kind is list) and all(type(n) is int and least <= n <= LARGEST for n in items)
    else:
        fits = isinstance(value, kind)
    if not fits:
        whole = ("a list of whole numbers" if kind is list else "a whole number") + f" from {least} to {LARGEST}"
        raise UserError(f"{file} says {field} is {shown(value)}, but it must be {WORDS.get(kind, whole)}")
    return list(value) if kind is list else value


def numbered_class_names(count: int) -> list[str]:
    """Names for classes that have none: ``class_0``, ``class_1``, ...; of 1000 those of ImageNet, in its order."""
    if count == 1000:
        return list(imagenet_class_names())
    return [f"class_{i}" for i in range(count)]
