"""Ways to spoil files: bytes of any file, values of JSON, pictures, and the values of a config. All drawn from a generator."""

import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ONCE = ("zeros", "garbage", "append", "empty", "remove", "folder", "loop", "dangling")
WAYS = ("cut", "cut", "flip", "flip", "flip", *ONCE)
HOSTILE = (
    *(None, True, False, -1, 0, 1, 3, 2**31, 10**18, 10**30, -0.5, 1e-300, 1e308, float("nan"), float("inf")),
    *("", "none", "0", "../..", "\u2603\ufdfa\U0001f600", "a\nb", "a\0b", "\ud800", "x" * 300, "~", "%s{}"),
    *([], {}, [[]], [0], [-1, 1], [1e308, float("nan")], ["a", 3], {"a": {"b": None}}, [2] * 40),
)


def choice(rng: np.random.Generator, options: Any) -> Any:
    """One of ``options``, as it is (NumPy's would make an array of them)."""
    options = list(options)
    return options[int(rng.integers(len(options)))]


def files_in(folder: Path) -> list[Path]:
    """All files in a folder and those below, in an order that depends as little as can be on the names that Orbax draws."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(files, key=lambda path: (path.parent, path.stat().st_size, path.name))


def spoil(rng: np.random.Generator, path: Path, ways: tuple[str, ...] = WAYS) -> str:
    """Spoils a file in one of some ways, and says how."""
    way, content = choice(rng, ways), path.read_bytes()
    size = len(content)
    if way == "flip" and size:
        spoilt = bytearray(content)
        for bit in rng.integers(8 * size, size=choice(rng, (1, 1, 2, 8, 100))):
            spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoilt)
    elif way in ("zeros", "garbage"):
        start = int(rng.integers(size + 1))
        count = int(rng.integers(1, 200))
        new = bytes(count) if way == "zeros" else rng.bytes(count)
        path.write_bytes(content[:start] + new + content[start + count :])
    elif way == "append":
        path.write_bytes(content + rng.bytes(int(rng.integers(1, 1000))))
    elif way == "cut":
        path.write_bytes(content[: int(rng.integers(size))] if size else b"")
    elif way in ("flip", "empty"):
        path.write_bytes(b"")
    else:
        path.unlink()
        if way == "folder":
            path.mkdir()
        elif way == "loop":
            path.symlink_to(path.name)
        elif way == "dangling":
            path.symlink_to("nowhere")
    return f"{way} {path.name}"


def spoil_json(rng: np.random.Generator, path: Path) -> str:
    """Replaces, renames or takes out one value of a JSON file, at any depth; or nests it too deep to be read."""
    found = json.loads(path.read_text())
    if rng.random() < 0.04:
        path.write_text("[" * 10**5)
        return f"nested without end: {path.name}"
    holders, at = [], [found]
    while at:
        value = at.pop()
        if isinstance(value, (dict, list)) and value:
            holders.append(value)
            at += value.values() if isinstance(value, dict) else value[:50]
    if not holders or rng.random() < 0.03:
        path.write_text(json.dumps(choice(rng, HOSTILE)))
        return f"another value: {path.name}"
    holder = choice(rng, holders)
    key = choice(rng, holder if isinstance(holder, dict) else range(len(holder)))
    way = choice(rng, ("replace", "replace", "replace", "remove", "rename"))
    if way == "remove":
        del holder[key]
    elif way == "rename" and isinstance(holder, dict):
        holder[f"{key}\u2603"] = holder.pop(key)
    else:
        value = choice(rng, HOSTILE)
        holder[key] = value
        way = f"replace by {value!r:.40}"
    path.write_text(json.dumps(found))
    return f"{way} {key!r:.40} in {path.name}"


def picture(seed: int, height: int = 24, width: int = 20, mode: str = "RGB") -> Image.Image:
    """A picture of noise."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _bomb(side: int) -> bytes:
    """A PNG that says it has ``side`` x ``side`` black pixels, in some kilobytes."""
    rows = zlib.compress(bytes((side // 8 + 1) * min(side, 20_000)), 9)
    head = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + _png_chunk(b"IDAT", rows) + _png_chunk(b"IEND", b"")


def _text_bomb() -> bytes:
    """A PNG with a comment that is a hundred megabytes when it is unpacked."""
    whole = encoded(picture(1), "PNG")
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(100)) + packer.flush()
    return whole[:33] + _png_chunk(b"zTXt", b"Comment\0\0" + packed) + whole[33:]


CONTENTS = {
    "jpeg": lambda: encoded(picture(2), "JPEG"),
    "png": lambda: encoded(picture(3), "PNG"),
    "webp": lambda: encoded(picture(4), "WEBP"),
    "jpeg of four inks": lambda: encoded(picture(5, mode="CMYK"), "JPEG"),
    "png of a palette": lambda: encoded(picture(6, mode="P"), "PNG", transparency=3),
    "png of 16 bits": lambda: encoded(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(30, 20) * 100), "PNG"),
    "png of one bit": lambda: encoded(picture(7, mode="1"), "PNG"),
    "png of grey and transparency": lambda: encoded(picture(7, mode="LA"), "PNG"),
    "floating-point tiff": lambda: encoded(picture(7, mode="F"), "TIFF"),
    "bmp": lambda: encoded(picture(8), "BMP"),
    "moving gif": lambda: encoded(picture(9), "GIF", save_all=True, append_images=[picture(10), picture(11)]),
    "one pixel": lambda: encoded(picture(12, 1, 1), "PNG"),
    "a line": lambda: encoded(picture(13, 1, 30_000), "PNG"),
    "bomb of 900 megapixels": lambda: _bomb(30_000),
    "bomb of 49 megapixels": lambda: _bomb(7_000),
    "bomb in a comment": _text_bomb,
    "text": lambda: b"<html>404</html>",
    "nothing": lambda: b"",
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EOF\n",
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
}


def write_hostile_picture(rng: np.random.Generator, path: Path) -> str:
    """Writes to ``path`` what is no picture, an odd or a spoilt one, or no file at all, and says what."""
    way = choice(rng, ("odd", "odd", "spoilt", "spoilt", "no file"))
    if way == "no file":
        kind = choice(rng, ("folder", "loop", "dangling", "pipe", "endless"))
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to({"loop": path.name, "dangling": "nowhere", "endless": "/dev/zero"}[kind])
        return f"{kind} as {path.name!r:.40}"
    kind = choice(rng, CONTENTS if way == "odd" else ("jpeg", "png", "webp", "moving gif", "png of a palette"))
    path.write_bytes(CONTENTS[kind]())
    how = "" if way == "odd" else spoil(rng, path, ("cut", "cut", "flip", "zeros", "garbage")).split()[0] + " "
    return f"{how}{kind} as {path.name!r:.40}"
