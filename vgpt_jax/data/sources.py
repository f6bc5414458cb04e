"""What sources share: examples in memory, and the folder for what is derived from data."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vgpt_jax.files import written_whole


@dataclass(frozen=True)
class ArraySource:
    """Examples in memory. Images ``[M, H, W, 3]`` uint8, labels ``[M]`` int32, and a name for each example."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def identity(self) -> str:
        """Differs where other examples, labels or another order would."""
        return identity_of(self.class_names, self.names, self.labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": int(self.labels[index])}


def chosen_cache_dir(cache_dir: str | None) -> Path:
    """``cache_dir``, or else ``$VGPT_JAX_CACHE``, or else ``vgpt_jax`` in the user's cache folder."""
    chosen = cache_dir or os.environ.get("VGPT_JAX_CACHE")
    return (
        Path(chosen).expanduser()
        if chosen
        else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vgpt_jax"
    )


def identity_of(class_names: Sequence[str], names: Sequence[str], labels: np.ndarray) -> str:
    """Sixteen hexadecimal digits that differ where any of these differ."""
    digest = hashlib.sha256(repr((tuple(class_names), tuple(names))).encode())
    digest.update(np.ascontiguousarray(labels, np.int32).tobytes())
    return digest.hexdigest()[:16]


def remembered(path: Path, find_out: Callable[[], Any], what: str) -> Any:
    """What ``find_out`` gave when it was called last: JSON in a file, which is written where it is not there or damaged.

    A folder that cannot be written is no obstacle: that is said on standard error, in the words of ``what``.
    """
    try:
        checksum, _, text = path.read_text().partition("\n")
        if checksum == hashlib.sha256(text.encode()).hexdigest():
            return json.loads(text)
    except (OSError, ValueError):  # a file that is no text raises a ValueError
        pass
    found = find_out()
    text = json.dumps(found)
    try:
        with written_whole(path) as unfinished:
            unfinished.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    except OSError as error:
        print(f"{what} could not be remembered in {path.parent} ({error})", file=sys.stderr)
    return found
