"""A folder with a folder of pictures for each class, ``DIR/class/*.jpg|jpeg|png|webp``, or of pictures without labels."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vgpt_jax.data.pictures import (
    EXTENSIONS,
    UNLABELLED,
    check_on_corrupt,
    read_image,
    report_corrupt,
    split_by_name,
    why_unreadable,
)
from vgpt_jax.data.sources import chosen_cache_dir, identity_of, remembered
from vgpt_jax.errors import UserError
from vgpt_jax.progress import progress


@dataclass(frozen=True)
class FolderSource:
    """Pictures that are read when they are asked for. Attributes: ``paths``, ``labels`` ``[M]`` int32, ``class_names``."""

    paths: tuple[Path, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def identity(self) -> str:
        """Differs where other pictures, labels or another order would; where the folder lies does not count."""
        unlabelled = self.class_names == (UNLABELLED,)
        names = [path.name if unlabelled else f"{path.parent.name}/{path.name}" for path in self.paths]
        return identity_of(self.class_names, names, self.labels)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        return {"image": read_image(self.paths[index]), "label": int(self.labels[index])}


def load_image_folder(
    folder: str, *, held_out_percent: int = 10, on_corrupt: str = "error", cache_dir: str | None = None
) -> tuple[FolderSource, FolderSource]:
    """The training and the held-out part of a folder.

    Every picture is read once to see that it can be; what was found is remembered by name, size and time of change.

    Args:
      folder: DIR; its folders are the classes, in alphabetical order. Where it has none, its pictures are without labels: one
        class, "picture".
      held_out_percent: share that is held out, by a hash of the picture's class and name.
      on_corrupt: "error", or "skip" to leave unreadable pictures out, naming and counting them on standard error.
      cache_dir: where it is remembered. None or "": `chosen_cache_dir`.

    Raises:
      UserError: no such folder, nothing in it, a class without pictures, an unreadable picture, or an empty part.
    """
    check_on_corrupt(on_corrupt)
    root = Path(folder).expanduser()
    if not folder or not root.is_dir():
        raise UserError(
            f"data.folder {folder!r} is not a folder: give one that has a folder of pictures for each class"
        )
    class_names = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if class_names:
        files = [(path, label) for label, name in enumerate(class_names) for path in _pictures_of_class(root, name)]
    else:
        files = [(path, 0) for path in _pictures(root.glob("[!.]*"))]
        class_names = (UNLABELLED,)
    if not files:
        raise UserError(
            f"{root} has neither folders nor pictures in it: put the pictures of each class in a folder of its own"
        )

    corrupt = _find_corrupt([path for path, _ in files], chosen_cache_dir(cache_dir))
    report_corrupt(corrupt, len(files), on_corrupt)
    files = [(path, label) for path, label in files if str(path.absolute()) not in corrupt]
    left = {label for _, label in files}
    missing = [name for label, name in enumerate(class_names) if label not in left]
    if missing:
        raise UserError(f"class {missing[0]!r} has no picture that can be read")

    names = [path.relative_to(root).as_posix() for path, _ in files]
    training, held_out = (
        FolderSource(tuple(files[i][0] for i in part), np.array([files[i][1] for i in part], np.int32), class_names)
        for part in split_by_name(names, held_out_percent, str(root))
    )
    return training, held_out


def _pictures(paths: Iterable[Path]) -> list[Path]:
    return sorted(p for p in paths if p.suffix.lower() in EXTENSIONS and p.is_file())


def _pictures_of_class(root: Path, name: str) -> list[Path]:
    found = _pictures((root / name).rglob("[!.]*"))
    if not found:
        raise UserError(f"class {name!r} has no pictures in {root / name} (looked for {', '.join(sorted(EXTENSIONS))})")
    return found


def _find_corrupt(paths: list[Path], cache_dir: Path) -> dict[str, str]:
    """Path and reason of every picture that cannot be decoded to its end."""
    listing = [(str(p.absolute()), s.st_size, s.st_mtime_ns) for p in paths for s in (p.stat(),)]
    key = hashlib.sha256(repr(listing).encode()).hexdigest()[:16]

    def scan() -> dict[str, str]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            reasons = list(progress(pool.map(why_unreadable, paths), f"checking {len(paths)} pictures"))
        return {str(path.absolute()): r for path, r in zip(paths, reasons, strict=True) if r is not None}

    return remembered(cache_dir / f"folder-scan-{key}.json", scan, f"the check of {len(paths)} pictures")
