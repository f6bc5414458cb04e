"""What a checkpoint must consist of, written into it before it counts: the shapes of its state, size and SHA-256 of its files.

A file that is missing, cut off, or has a bit flipped is found by it, in the manifest itself too.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax

from vgpt_jax.errors import UserError
from vgpt_jax.files import written_whole

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STAMPED = (
    "_CHECKPOINT_METADATA"  # Orbax writes the time into it when the manifest is there already; nothing is read from it
)


def write_manifest(folder: Path, shapes: dict[str, str]) -> None:
    """Writes the manifest of a checkpoint whose other files are there.

    Args:
      folder: of the checkpoint.
      shapes: of the state in it (`shapes_of`).
    """
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, digest_of(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / STAMPED
    }
    content = {"format_version": FORMAT_VERSION, "state": shapes, "files": files}
    with written_whole(folder / MANIFEST) as unfinished:
        unfinished.write_text(json.dumps(content | {"seal": seal_of(content)}))


def shapes_in(folder: Path) -> dict[str, str]:
    """`shapes_of` the state in a checkpoint that is not damaged."""
    return json.loads((folder / MANIFEST).read_text())["state"]


def shapes_of(state: Any) -> dict[str, str]:
    """Name -> dtype and shape of every array of a pytree: ``"float32[4, 3]"``."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}"
        for path, x in jax.tree.leaves_with_path(state)
    }


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None.

    Raises:
      UserError: nothing is, but it is of a later format, or may not be read.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
        if content.pop("seal") != seal_of(content):
            return f"{MANIFEST} was changed"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except PermissionError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    if content["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{folder} has format {content['format_version']}; this vgpt_jax reads up to {FORMAT_VERSION}: update it"
        )
    for name, (size, digest) in content["files"].items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if digest_of(path) != digest:
                return f"{name} was changed"
        except FileNotFoundError:
            return f"{name} is missing"
        except PermissionError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None
