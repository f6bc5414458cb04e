"""Pictures in archives: ``.tar`` and ``.zip`` files that hold class folders, or the WebDataset layout, read at random.

An archive is gone through once. Where each picture begins and ends is remembered, so that a picture is then read by its offset
alone, from any thread and without opening the archive as one.
"""

import glob
import hashlib
import io
import itertools
import json
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

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

SUFFIXES = (".tar", ".zip")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
LABEL_EXTENSIONS = (".cls", ".json", ".txt")  # the first that is beside a picture counts
LABEL_KEYS = ("label", "cls", "class")
MAX_CLASSES = 2**20  # each has a row of weights, whether a picture is of it or not
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


@dataclass(frozen=True, slots=True)  # there may be millions
class Member:
    """A file in an archive: the archive's number, the name in it, where its bytes lie, and how they are packed."""

    shard: int
    name: str
    offset: int
    size: int
    method: int = STORED

    def read(self, shards: tuple[Path, ...]) -> bytes:
        """Its content.

        Raises:
          UserError: the archive is gone, or does not hold at this place what it held when it was gone through.
        """
        try:
            with shards[self.shard].open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
            return zlib.decompress(content, -zlib.MAX_WBITS) if self.method == DEFLATED else content
        except (OSError, zlib.error) as error:
            raise UserError(f"{shards[self.shard]}: {self.name} cannot be read ({error})") from error


@dataclass(frozen=True)
class ShardSource:
    """Pictures in archives. Attributes: ``shards``, ``members``, ``labels`` ``[M]`` int32, ``class_names``."""

    shards: tuple[Path, ...]
    members: tuple[Member, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def identity(self) -> str:
        """Differs where other pictures, labels or another order would; where the archives lie does not count."""
        names = [f"{self.shards[m.shard].name}/{m.name}" for m in self.members]
        return identity_of(self.class_names, names, self.labels)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> dict:
        member = self.members[index]
        name = f"{self.shards[member.shard]}: {member.name}"
        return {"image": read_image(io.BytesIO(member.read(self.shards)), name), "label": int(self.labels[index])}


def find_shards(folder: str) -> tuple[Path, ...]:
    """The archives that ``data.folder`` means, in the order of their names; none where it means a folder of pictures.

    Args:
      folder: an archive, a folder of archives, or a pattern with ``{000..009}``, ``{a,b}``, ``*``, ``?`` or ``[0-9]``.

    Raises:
      UserError: a compressed archive, or a pattern that fits no file.
    """
    path = Path(folder).expanduser()
    if folder and path.is_dir():
        inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        if any(p.is_dir() for p in inside):  # of classes, whatever lies beside them
            return ()
        found = [p for p in inside if p.name.lower().endswith((*SUFFIXES, *COMPRESSED))]
    elif path.is_file():
        found = [path]
    elif any(c in folder for c in "{*?["):
        found = [Path(name) for pattern in expand_braces(str(path)) for name in sorted(glob.glob(pattern)) or [pattern]]
        missing = [p for p in found if not p.is_file()]
        if missing:
            raise UserError(f"data.folder {folder!r} means {len(found)} archives, but there is no {missing[0]}")
    else:
        found = []
    for shard in found:
        if shard.name.lower().endswith(COMPRESSED):
            raise UserError(
                f"{shard} is compressed as a whole, so no picture in it can be read without unpacking all before it: "
                "unpack it to a .tar (gunzip, bunzip2, unxz or unzstd)"
            )
        if not shard.name.lower().endswith(SUFFIXES):
            raise UserError(
                f"data.folder {folder!r} means {shard}, but must be a folder, or archives {', '.join(SUFFIXES)}"
            )
        if not shard.is_file():
            raise UserError(f"{shard} is no file, or a link to none: bring it again, or take it out of data.folder")
    return tuple(found)


def expand_braces(pattern: str) -> list[str]:
    """All strings that a pattern with ``{000..009}`` or ``{a,b}`` stands for; numbers are as wide as the first."""
    pieces = []
    for piece in re.split(r"(\{[^{}]*\})", pattern):
        steps = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece)
        if steps:
            first, last = steps.groups()
            pieces.append([f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)])
        else:
            pieces.append(piece[1:-1].split(",") if piece.startswith("{") else [piece])
    return ["".join(chosen) for chosen in itertools.product(*pieces)]


def load_shards(
    shards: tuple[Path, ...], *, held_out_percent: int = 10, on_corrupt: str = "error", cache_dir: str | None = None
) -> tuple[ShardSource, ShardSource]:
    """The training and the held-out part of archives.

    Either in folders, ``class/picture.jpg``, where a folder around all of them does not count; or in the layout of WebDataset,
    ``key.jpg`` beside ``key.cls``, ``key.json`` (with "label", "cls" or "class") or ``key.txt``, which hold a name or a number;
    or without labels: one class, "picture". The names of numbers are read from ``classes.txt`` (one a line) or
    ``class_names.json`` (a list) beside the first archive, or else are "class_0", "class_1", ...

    Every picture is read once to see that it can be; what was found is remembered by the archives' names,
    sizes and times of change.

    Args:
      shards: `find_shards`.
      held_out_percent: share that is held out, by a hash of class and name, or of archive and name without class folders.
      on_corrupt: "error", or "skip" to leave unreadable pictures out, naming and counting them on standard error.
      cache_dir: where it is remembered. None or "": `chosen_cache_dir`.

    Raises:
      UserError: a damaged archive, no pictures, pictures without labels among others, an unreadable picture, or an empty part.
    """
    check_on_corrupt(on_corrupt)
    listing = [(str(p.absolute()), s.st_size, s.st_mtime_ns) for p in shards for s in (p.stat(),)]
    key = hashlib.sha256(repr(listing).encode()).hexdigest()[:16]
    found = remembered(
        chosen_cache_dir(cache_dir) / f"shard-scan-{key}.json",
        lambda: _scan(shards),
        f"what is in {len(shards)} archives",
    )
    members = [Member(*fields) for fields in found["members"]]
    if not members:
        raise UserError(
            f"no pictures in {shards[0]} or the {len(shards)} archives (looked for {', '.join(sorted(EXTENSIONS))})"
        )
    names, labels = _names_and_labels(shards, members, found["labels"])
    class_names, numbers = _classes(labels, shards[0].parent)

    corrupt = {int(i): reason for i, reason in found["corrupt"].items()}
    called = {f"{shards[members[i].shard]}: {members[i].name}": reason for i, reason in corrupt.items()}
    report_corrupt(called, len(members), on_corrupt)
    kept = [i for i in range(len(members)) if i not in corrupt]
    lost = {labels[i] for i in corrupt} - {labels[i] for i in kept}
    if lost:
        raise UserError(f"class {min(map(str, lost))!r} has no picture that can be read")
    parts = split_by_name([names[i] for i in kept], held_out_percent, f"the {len(shards)} archives from {shards[0]}")
    training, held_out = (
        ShardSource(
            shards,
            tuple(members[kept[i]] for i in part),
            np.array([numbers[kept[i]] for i in part], np.int32),
            class_names,
        )
        for part in parts
    )
    return training, held_out


def _scan(shards: tuple[Path, ...]) -> dict:
    """What `load_shards` remembers: the pictures' members, the labels beside them or None, and why some cannot be read."""
    members, labels = [], []
    for number, shard in enumerate(progress(shards, f"going through {len(shards)} archives")):
        inside = {m.name: m for m in _members(shard, number)}
        for name, member in inside.items():
            path = PurePosixPath(name)
            if path.suffix.lower() not in EXTENSIONS or path.name.startswith(".") or "__MACOSX" in path.parts:
                continue
            beside = (inside[n] for n in (f"{_key(name)}{e}" for e in LABEL_EXTENSIONS) if n in inside)
            members.append(member)
            labels.append(next((label for m in beside if (label := _label_in(m, shards)) is not None), None))

    def reason(member: Member) -> str | None:
        try:
            return why_unreadable(io.BytesIO(member.read(shards)))
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = list(progress(pool.map(reason, members), f"checking {len(members)} pictures"))
    return {
        "members": [[m.shard, m.name, m.offset, m.size, m.method] for m in members],
        "labels": labels,
        "corrupt": {str(i): r for i, r in enumerate(reasons) if r is not None},
    }


def _members(shard: Path, number: int) -> Iterator[Member]:
    """All files in an archive.

    Raises:
      UserError: the archive is damaged, or packed in a way that cannot be read at random.
    """
    try:
        if shard.suffix.lower() == ".tar":
            with tarfile.open(shard, "r:") as archive:
                yield from (Member(number, m.name, m.offset_data, m.size) for m in archive if m.isfile())
                archive.fileobj.seek(archive.offset)  # the tarfile module takes a damaged header for the end, too
                if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"neither a file nor the end mark at byte {archive.offset}")
            return
        with zipfile.ZipFile(shard) as archive, shard.open("rb") as file:
            for info in archive.infolist():
                if info.flag_bits & 1 or info.compress_type not in (STORED, DEFLATED):
                    raise zipfile.BadZipFile(
                        f"{info.filename} is encrypted, or packed with another method than deflate"
                    )
                file.seek(
                    info.header_offset + 26
                )  # the lengths of name and extra field may differ from the directory's
                start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                if not info.is_dir():
                    yield Member(number, info.filename, start, info.compress_size, info.compress_type)
    except (OSError, tarfile.TarError, zipfile.BadZipFile, struct.error) as error:
        raise UserError(f"{shard} is damaged ({error}): bring it again, or take it out of data.folder") from error


def _key(name: str) -> str:
    """What a picture's name has in common with its label's: all up to the first dot behind the last slash."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.split('.')[0]}"


def _label_in(member: Member, shards: tuple[Path, ...]) -> str | int | None:
    """The name or number in a file beside a picture, None where it has none."""
    try:
        text = member.read(shards).decode().strip()
        value = json.loads(text) if member.name.endswith(".json") else text
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shards[member.shard]}: {member.name} cannot be read ({error})") from error
    if isinstance(value, dict):
        value = next((value[k] for k in LABEL_KEYS if k in value), None)
    if value is None or value == "":
        return None
    if not re.fullmatch(r"[0-9]+", str(value)):
        return str(value)
    digits = str(value).lstrip("0") or "0"
    if len(digits) > len(str(MAX_CLASSES)) or int(digits) >= MAX_CLASSES:
        where = f"{shards[member.shard]}: {member.name}"
        raise UserError(f"{where} says class {digits:.20}, but a number of a class must be below {MAX_CLASSES}")
    return int(digits)


def _names_and_labels(
    shards: tuple[Path, ...], members: list[Member], beside: list[str | int | None]
) -> tuple[list[str], list[str | int]]:
    """Of every picture the name that the split goes by, and its label."""
    if any(label is not None for label in beside):
        if None in beside:
            bare = members[beside.index(None)]
            raise UserError(
                f"{shards[bare.shard]}: {bare.name} has no label beside it ({', '.join(LABEL_EXTENSIONS)}), others have"
            )
        return [f"{shards[m.shard].name}/{m.name}" for m in members], beside
    paths = [PurePosixPath(m.name).parts for m in members]
    around = len(os.path.commonprefix([p[:-1] for p in paths]))
    paths = [p[around:] for p in paths]
    labelled = [len(p) > 1 for p in paths]
    if any(labelled) and not all(labelled):
        bare = members[labelled.index(False)]
        raise UserError(f"{shards[bare.shard]}: {bare.name} is in no folder, others are in folders of their class")
    if not any(labelled):  # their archives count, as in each of them the numbers may begin anew
        return [f"{shards[m.shard].name}/{m.name}" for m in members], [UNLABELLED] * len(members)
    return ["/".join(p) for p in paths], [p[0] for p in paths]


def _classes(labels: list[str | int], beside: Path) -> tuple[tuple[str, ...], list[int]]:
    """The classes' names, and the number of every label."""
    kinds = {type(label) for label in labels}
    if kinds == {str}:
        names = tuple(sorted(set(labels)))
        number_of = {name: i for i, name in enumerate(names)}
        return names, [number_of[label] for label in labels]
    if len(kinds) > 1:
        raise UserError("the labels are names for some pictures and numbers for others")
    count = max(labels) + 1
    names = tuple(f"class_{i}" for i in range(count))
    for file in (beside / "classes.txt", beside / "class_names.json"):
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
            names = tuple(map(str, json.loads(text))) if file.suffix == ".json" else tuple(text.split("\n"))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{file} cannot be read ({error})") from error
        names = tuple(name.strip() for name in names if name.strip())
        if len(names) < count:
            raise UserError(f"{file} names {len(names)} classes, but the pictures' labels go up to {count - 1}")
        break
    return names, labels
