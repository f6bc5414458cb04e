"""A folder with a folder of pictures for each class: ``DIR/class/*.jpg|jpeg|png|webp``."""

import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vgpt_jax.data.sources import chosen_cache_dir, identity_of
from vgpt_jax.errors import UserError
from vgpt_jax.files import written_whole
from vgpt_jax.progress import progress

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp"})
ON_CORRUPT = ("error", "skip")


@dataclass(frozen=True)
class FolderSource:
    """Pictures that are read when they are asked for. Attributes: ``paths``, ``labels`` ``[M]`` int32, ``class_names``."""

    paths: tuple[Path, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def identity(self) -> str:
        """Differs where other pictures, labels or another order would; where the folder lies does not count."""
        names = [f"{path.parent.name}/{path.name}" for path in self.paths]
        return identity_of(self.class_names, names, self.labels)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        return {"image": read_image(self.paths[index]), "label": int(self.labels[index])}


def read_image(path: Path) -> np.ndarray:
    """A picture as ``[H, W, 3]`` uint8: turned upright by its EXIF tag, transparency on white.

    Raises:
      UserError: the file cannot be read as a picture.
    """
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I;16"):  # 16-bit grey, which convert("RGB") would clip
                picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                canvas = Image.new("RGBA", picture.size, "white")
                canvas.alpha_composite(picture)
                picture = canvas
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture ({error})") from error


def load_image_folder(
    folder: str, *, held_out_percent: int = 10, on_corrupt: str = "error", cache_dir: str | None = None
) -> tuple[FolderSource, FolderSource]:
    """The training and the held-out part of a folder.

    Every picture is read once to see that it can be; what was found is remembered by name, size and time of change.

    Args:
      folder: DIR; its folders are the classes, in alphabetical order.
      held_out_percent: share that is held out, by a hash of the picture's class and name.
      on_corrupt: "error", or "skip" to leave unreadable pictures out, naming and counting them on standard error.
      cache_dir: where it is remembered. None or "": `chosen_cache_dir`.

    Raises:
      UserError: no such folder, no classes, a class without pictures, an unreadable picture, or an empty part.
    """
    root = Path(folder).expanduser()
    if on_corrupt not in ON_CORRUPT:
        raise UserError(f"data.on_corrupt is {on_corrupt!r}, but must be one of {', '.join(ON_CORRUPT)}")
    if not folder or not root.is_dir():
        raise UserError(
            f"data.folder {folder!r} is not a folder: give one that has a folder of pictures for each class"
        )
    class_names = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not class_names:
        raise UserError(f"{root} has no folders in it: put the pictures of each class in a folder of its own")

    files = []
    for label, name in enumerate(class_names):
        of_class = sorted(p for p in (root / name).rglob("[!.]*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        if not of_class:
            raise UserError(
                f"class {name!r} has no pictures in {root / name} (looked for {', '.join(sorted(EXTENSIONS))})"
            )
        files += [(path, label) for path in of_class]

    corrupt = _find_corrupt([path for path, _ in files], chosen_cache_dir(cache_dir))
    if corrupt and on_corrupt == "error":
        path, reason = next(iter(corrupt.items()))
        raise UserError(
            f"{len(corrupt)} of {len(files)} pictures cannot be read, the first is {path} ({reason}): "
            "mend or remove them, or set data.on_corrupt to 'skip'"
        )
    for path, reason in corrupt.items():
        print(f"skipped: {path} ({reason})", file=sys.stderr)
    if corrupt:
        print(f"skipped {len(corrupt)} of {len(files)} pictures that cannot be read", file=sys.stderr)
    files = [(path, label) for path, label in files if str(path.absolute()) not in corrupt]
    left = {label for _, label in files}
    missing = [name for label, name in enumerate(class_names) if label not in left]
    if missing:
        raise UserError(f"class {missing[0]!r} has no picture that can be read")

    def part(held_out: bool) -> FolderSource:
        chosen = [f for f in files if _is_held_out(f[0].relative_to(root), held_out_percent) == held_out]
        if not chosen:
            raise UserError(
                f"the {'held-out' if held_out else 'training'} part of {root} is empty ({len(files)} pictures, "
                f"data.held_out_percent {held_out_percent}): add pictures or change the share"
            )
        return FolderSource(
            tuple(p for p, _ in chosen), np.array([label for _, label in chosen], np.int32), class_names
        )

    return part(False), part(True)


def _is_held_out(relative: Path, percent: int) -> bool:
    digest = hashlib.sha256(relative.as_posix().encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < percent


def _find_corrupt(paths: list[Path], cache_dir: Path) -> dict[str, str]:
    """Path and reason of every picture that cannot be decoded to its end."""
    listing = [(str(p.absolute()), s.st_size, s.st_mtime_ns) for p in paths for s in (p.stat(),)]
    key = hashlib.sha256(repr(listing).encode()).hexdigest()[:16]
    remembered = cache_dir / f"folder-scan-{key}.json"
    try:
        return json.loads(remembered.read_text())
    except (OSError, ValueError):
        pass  # not scanned yet, or not whole: scanned below

    def reason(path: Path) -> str | None:
        try:
            with Image.open(path) as picture:
                picture.getexif()  # `read_image` turns pictures upright by it
                picture.draft("RGB", (64, 64))  # JPEG: reads to the end, but decodes an eighth
                picture.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return str(error).splitlines()[0] if str(error) else type(error).__name__
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = list(progress(pool.map(reason, paths), f"checking {len(paths)} pictures"))
    corrupt = {str(path.absolute()): r for path, r in zip(paths, reasons, strict=True) if r is not None}
    try:
        with written_whole(remembered) as unfinished:
            unfinished.write_text(json.dumps(corrupt))
    except OSError as error:
        print(f"the check of {len(paths)} pictures could not be remembered in {cache_dir} ({error})", file=sys.stderr)
    return corrupt
