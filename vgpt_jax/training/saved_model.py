"""A trained model in a folder: what it is, in JSON, and its weights, in Orbax's format. The hand-over between stages.

    DIR/metadata.json    kind, constructor arguments, what the next stage derives from (grid, classes, value range, ...)
    DIR/weights/         the state of the module

A folder is written beside its place and renamed, so it is there whole or not at all.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.models.classifier import ConvClassifier
from vgpt_jax.models.efficientnet_lite0 import EfficientNetLite0
from vgpt_jax.models.gpt import GPT
from vgpt_jax.models.inception import InceptionV3
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.models.vgg16 import VGG16
from vgpt_jax.models.vit import ViT
from vgpt_jax.training.manifest import MANIFEST, damage, shapes_of, write_manifest
from vgpt_jax.training.processes import first_does, together
from vgpt_jax.training.sharding import on_every_host

FORMAT_VERSION = 1
KINDS = {
    "tokenizer": Tokenizer,
    "gpt": GPT,
    "classifier": ConvClassifier,
    "vit": ViT,
    "efficientnet_lite0": EfficientNetLite0,
    "vgg16": VGG16,
    "inception": InceptionV3,
}


def save_model(
    directory: Path, kind: str, model: nnx.Module, arguments: dict[str, Any], **metadata: Any
) -> dict[str, Any]:
    """Writes a model; one that is there already is replaced once the new one is whole.

    Args:
      directory: the folder to be.
      kind: a key of `KINDS`.
      model: a module of that kind.
      arguments: what its constructor was called with, without ``rngs``.
      **metadata: JSON values that later stages need.

    Returns:
      The metadata as written, with the ``fingerprint`` of weights and arguments.

    Raises:
      OSError: it cannot be written; ``directory`` is as it was.
    """
    import orbax.checkpoint as ocp

    state = nnx.to_pure_dict(nnx.state(model))
    written = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "arguments": arguments,
        "fingerprint": fingerprint(arguments, state),
        **metadata,
    }
    directory = Path(directory).absolute()
    unfinished = directory.with_name(directory.name + ".unfinished")

    def clear() -> None:
        if unfinished.exists():
            shutil.rmtree(unfinished)

    def write() -> None:
        try:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler(save_concurrent_gb=_room_for(state))) as checkpointer:
                checkpointer.save(unfinished / "weights", args=ocp.args.StandardSave(state))
        except OSError:
            raise
        except Exception as error:  # of tensorstore, which has its own for what the system refuses
            for _ in range(3):  # and which may for a moment still be writing
                time.sleep(0.1)
                shutil.rmtree(unfinished, ignore_errors=True)
            code = re.search(r"os_error_code='(\d+)'", str(error))
            if code is None:
                raise OSError(str(error)) from error
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error

    def put_in_place() -> None:
        (unfinished / "metadata.json").write_text(json.dumps(written, indent=2) + "\n")
        write_manifest(unfinished / "weights", shapes_of(state))
        if directory.exists():
            shutil.rmtree(directory)
        unfinished.rename(directory)

    first_does(clear)
    together(write)
    first_does(put_in_place)
    return written


def _room_for(state: Any) -> float:
    """Gigabytes that Orbax may hold while it writes, room for the largest array. It would hold a second copy of them all."""
    return max([0.3, *(1.1e-9 * x.nbytes for x in jax.tree.leaves(state))])


def read_metadata(directory: Path, kind: str | Sequence[str]) -> dict[str, Any]:
    """What a model folder says of itself.

    Args:
      directory: where `save_model` wrote.
      kind: that it must be, or several that it may be, what they are in general first.

    Raises:
      UserError: there is no such folder, its ``metadata.json`` is damaged, of another kind, or of a later format.
    """
    path = Path(directory) / "metadata.json"
    kinds = (kind,) if isinstance(kind, str) else kind
    kind = kinds[0]
    try:
        metadata = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"there is no trained {kind} in {directory}: train one with vgpt_jax.main, or give another folder"
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not isinstance(metadata, dict):
        raise UserError(f"{path} is damaged: it holds a {type(metadata).__name__}, not an object")
    if metadata.get("kind") not in kinds:
        raise UserError(f"{directory} holds a {metadata.get('kind')}, but a {kind} is needed")
    version = metadata.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(f"{directory} has format {version}; this vgpt_jax reads up to {FORMAT_VERSION}: update it")
    for name, wanted in (("format_version", int), ("arguments", dict), ("fingerprint", str)):
        if not isinstance(metadata.get(name), wanted):
            raise UserError(f"{path} is damaged: {name} is {metadata.get(name)!r}")
    return metadata


def abstract_model(directory: Path, metadata: dict[str, Any]) -> nnx.Module:
    """The module that a model folder describes, without its weights (``nnx.eval_shape``).

    Args:
      directory: where `save_model` wrote, for messages.
      metadata: as `read_metadata` gives it.

    Raises:
      UserError: the arguments are not those of such a module.
    """
    kind, arguments = metadata["kind"], metadata["arguments"]
    try:
        return nnx.eval_shape(lambda: KINDS[kind](**arguments, rngs=nnx.Rngs(0)))
    except Exception as error:  # the constructors check values, not types
        raise UserError(f"{directory}/metadata.json is damaged: its arguments make no {kind} ({error})") from error


def load_model(
    directory: Path,
    kind: str | Sequence[str],
    sharding: jax.sharding.Sharding | Callable[[Any], Any] | None = None,
) -> tuple[nnx.Module, dict[str, Any]]:
    """Reads a model back: the module with its weights, and its metadata.

    Args:
      directory: where `save_model` wrote.
      kind: a key of `KINDS`, or several that it may be.
      sharding: of all weights, or what makes a tree of them of the tree of weights. None: on the first device.

    Raises:
      UserError: as `read_metadata`, or the weights cannot be read or do not fit.
    """
    import orbax.checkpoint as ocp

    metadata = read_metadata(directory, kind)
    graph, state = nnx.split(abstract_model(directory, metadata))
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    weights = nnx.to_pure_dict(state)
    shardings = sharding(weights) if callable(sharding) else jax.tree.map(lambda _: sharding, weights)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), weights, shardings)
    first_does(lambda: _check_whole(Path(directory)))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            weights = checkpointer.restore(Path(directory).absolute() / "weights", abstract)
    except Exception as error:  # Orbax and tensorstore raise what they like for files that are not whole
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the weights in {directory} cannot be read: {reason:.300}") from error
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, state), metadata


def _check_whole(directory: Path) -> None:
    """Raises `UserError` where weights are not as they were written, which Orbax does not see of every bit. In a folder of an
    earlier version nothing tells."""
    if (directory / "weights" / MANIFEST).is_file() and (wrong := damage(directory / "weights")):
        raise UserError(f"the weights in {directory} are damaged ({wrong}): bring them back, or train or convert again")


def fingerprint(arguments: dict[str, Any], state: Any) -> str:
    """Sixteen hexadecimal digits that differ where arguments or any bit of the weights differ."""
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode())
    for path, value in jax.tree.leaves_with_path(state):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(on_every_host(value).tobytes())
    return digest.hexdigest()[:16]
