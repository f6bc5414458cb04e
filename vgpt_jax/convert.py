"""Turns PyTorch checkpoints into models of ours, without PyTorch:

    python -m vgpt_jax.convert --format llamagen vq_ds16_c2i.pt c2i_B_256.pt --out DIR
    python -m vgpt_jax.convert --format visual_gpt FOLDER --out DIR --image_size 256

``DIR`` is then what a finished training leaves: ``vgpt_jax.sample``, ``CondVisualGPT.from_pretrained`` and ``init_from`` read it.
The name of a public checkpoint (``--list``) stands for its files and their format.
"""

import argparse
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from vgpt_jax.command_line import CommandParser
from vgpt_jax.errors import UserError, check_range, choose, close_names, exit_on_user_error
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.pretrained.converted import Converted
from vgpt_jax.pretrained.efficientnet_lite0 import read_efficientnet_lite0
from vgpt_jax.pretrained.hf_vit import read_hf_vit
from vgpt_jax.pretrained.inception import read_inception
from vgpt_jax.pretrained.known import KNOWN, describe_known, fetch_known
from vgpt_jax.pretrained.llamagen import read_llamagen
from vgpt_jax.pretrained.maskgit import read_maskgit
from vgpt_jax.pretrained.taming import read_taming
from vgpt_jax.pretrained.vgg16 import read_lpips
from vgpt_jax.pretrained.visual_gpt import read_visual_gpt
from vgpt_jax.training.saved_model import abstract_model, read_metadata, save_model

FORMATS: Mapping[str, Callable[..., Iterator[Converted]]] = {
    "visual_gpt": read_visual_gpt,
    "taming": read_taming,
    "llamagen": read_llamagen,
    "maskgit": read_maskgit,
    "hf_vit": read_hf_vit,
    "efficientnet_lite0": read_efficientnet_lite0,
    "inception": read_inception,
    "lpips": read_lpips,
}

ROOMS = {  # where in DIR each kind of model lives
    "tokenizer": "tokenizer",
    "gpt": "generator",
    "classifier": "classifier",
    "vit": "classifier",
    "efficientnet_lite0": "classifier",
    "vgg16": "vgg16",
    "inception": "inception",
}

MAX_IMAGE_SIZE = 2**14  # pixels


@dataclass(frozen=True)
class TokensOf:
    """What a generator needs to know of the tokenizer whose tokens it writes."""

    fingerprint: str
    num_codes: int
    token_shape: tuple[int, ...]
    where: str


def convert(
    format_name: str, paths: Sequence[Path], out: Path, image_size: int | None = None
) -> dict[str, dict[str, Any]]:
    """Converts a checkpoint into ``out``, all of it or nothing.

    Args:
      format_name: a name in ``FORMATS``.
      paths: files or folders, as the reader of that format takes them.
      out: the folder; models of other kinds may be in it already.
      image_size: in pixels, for formats whose files leave it open.

    Returns:
      The metadata of each model by its kind, as written.

    Raises:
      UserError: a file is missing, damaged, of another model or does not fit; ``out`` cannot be written or holds such a model
        already; or a generator comes without its tokenizer.
    """
    read = choose("--format", format_name, FORMATS)
    if image_size is not None:
        check_range("--image_size", image_size, least=1, most=MAX_IMAGE_SIZE)
    written = {}
    with _staging_folder(out) as staging:
        tokens = _tokens_in(out)
        for converted in read([Path(path).expanduser() for path in paths], image_size=image_size):
            room = out / choose("the kind of a converted model", converted.kind, ROOMS)
            if room.exists():
                raise UserError(f"{room} is there already: give another --out, or remove it to have it converted again")
            metadata = dict(converted.metadata)
            if converted.kind == "gpt":
                metadata["tokenizer_fingerprint"] = _checked(converted, tokens, out).fingerprint
            print(f"writing {_described(converted)}", flush=True)
            _check_space(staging, converted.model)
            place = staging / room.name / "model"
            saved = save_model(place, converted.kind, converted.model, converted.arguments, **metadata)
            if converted.kind == "tokenizer":
                tokens = _tokens_of(converted.model, saved, "the tokenizer given with it")
            written[converted.kind] = saved
            del converted  # or it would be in memory while the next is read
        _move_rooms(staging, out)
    return written


@contextmanager
def _staging_folder(out: Path) -> Iterator[Path]:
    """A folder inside ``out`` for what is not whole yet. Afterwards it is gone, and so is what was made for it and is empty."""
    made, staging = [], None
    try:
        try:
            made = [folder for folder in (out, *out.parents) if not folder.exists()]
            out.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=".converting-", dir=out))
            yield staging
        except OSError as error:
            raise UserError(f"--out {out} cannot be written ({error.strerror or error})") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _check_space(folder: Path, model: nnx.Module) -> None:
    """Raises `OSError` where a model has no room: Orbax finds out too, but says it in a thousand lines."""
    needed, disk = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model))), shutil.disk_usage(folder)
    if disk.total and disk.free < needed:  # some file systems know neither
        raise OSError(f"{needed / 1e6:,.1f} MB are needed, but {disk.free / 1e6:,.1f} MB are free")


def _move_rooms(staging: Path, out: Path) -> None:
    """Puts every room in its place; if one cannot be, none is."""
    moved = []
    try:
        for room in sorted(staging.iterdir()):
            room.rename(out / room.name)
            moved.append(room)
    except OSError:
        for room in moved:
            (out / room.name).rename(room)
        raise


def _tokens_in(out: Path) -> TokensOf | None:
    """Of the tokenizer that ``out`` holds, if it does."""
    folder = out / "tokenizer" / "model"
    if not folder.exists():
        return None
    metadata = read_metadata(folder, "tokenizer")
    return _tokens_of(abstract_model(folder, metadata), metadata, f"the tokenizer in {out}")


def _tokens_of(tokenizer: Tokenizer, metadata: Mapping[str, Any], where: str) -> TokensOf:
    return TokensOf(metadata["fingerprint"], tokenizer.num_codes, tuple(tokenizer.token_shape), where)


def _checked(converted: Converted, tokens: TokensOf | None, out: Path) -> TokensOf:
    """The tokens that a generator writes.

    Raises:
      UserError: there is no tokenizer, or it does not fit.
    """
    if tokens is None:
        raise UserError(
            f"a generator is of no use without its tokenizer, and {out} has none: give the tokenizer's file too, or convert it "
            "into the same --out first"
        )
    mine = converted.model.num_codes, tuple(converted.metadata["token_shape"])
    if mine != (tokens.num_codes, tokens.token_shape):
        raise UserError(
            f"the generator writes {_grid(mine[1])} tokens of {mine[0]} codes, but {tokens.where} has "
            f"{_grid(tokens.token_shape)} of {tokens.num_codes}: give the tokenizer that it was trained with, and if only the "
            "number of tokens differs, --image_size"
        )
    return tokens


def _grid(token_shape: Sequence[int]) -> str:
    return "x".join(map(str, token_shape))


def _described(converted: Converted) -> str:
    """One line: what it is, how large, and what it works on."""
    model = converted.model
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    line = f"{ROOMS[converted.kind]}: {parameters:,} parameters"
    if converted.kind == "tokenizer":
        size = f"{model.image_size}x{model.image_size} pixels"
        return f"{line}, {size} as {_grid(model.token_shape)} tokens of {model.num_codes:,} codes"
    if converted.kind == "gpt":
        line += f", {_grid(converted.metadata['token_shape'])} tokens of {model.num_codes:,} codes"
    names = converted.metadata.get("class_names")
    return f"{line}, {len(names):,} classes ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" if names else line


def files_of(names: Sequence[str], format_name: str | None, out: Path) -> tuple[str, list[Path]]:
    """The format and the files that the command line means.

    Args:
      names: of files, folders or public checkpoints.
      format_name: None: that of the public checkpoints.
      out: a tokenizer that is there is not fetched again for a generator that needs one.

    Raises:
      UserError: there is no such file, no format, or several; or something cannot be fetched.
    """
    formats, paths = {format_name} - {None}, []
    for name in names:
        if name not in KNOWN or Path(name).expanduser().exists():
            paths.append(Path(name).expanduser())
            continue
        needed = KNOWN[name].needs
        is_there = os.path.exists(out / "tokenizer")  # unlike Path.exists, also where a name is too long for one
        wanted = [needed, name] if needed and needed not in names and not is_there else [name]
        for known in wanted:
            formats.add(KNOWN[known].format)
            paths += fetch_known(known)
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"there is no file or folder {path}, nor a public checkpoint of that name (see --list)")
    if len(formats) != 1:
        given = f"{', '.join(sorted(formats))} were given" if formats else "give one"
        raise UserError(f"--format must be one of {', '.join(sorted(FORMATS))}: {given}")
    return formats.pop(), paths


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parses the command line.

    Raises:
      UserError: it is wrong.
    """
    parser = CommandParser("convert", __doc__)
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="files or folders of a checkpoint, or the name of a public one")
    add("--format", metavar="FORMAT", help=f"of the files: {', '.join(FORMATS)}")
    add("--out", metavar="DIR", help="folder that the models are written to")
    add("--image_size", type=int, help="of the pictures, in pixels (default: what the files say)")
    add("--list", action="store_true", help="list the public checkpoints that are known by name, and stop")
    arguments = parser.parse_args(argv)
    if not arguments.list:
        for name, value in (("PATH", arguments.paths), ("--out", arguments.out)):
            if not value:
                parser.error(f"{name} is needed")
        if arguments.format is not None and arguments.format not in FORMATS:
            parser.error(f"--format is {arguments.format!r}: {close_names(arguments.format, FORMATS)}")
    return arguments


@exit_on_user_error
def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    if arguments.list:
        print(describe_known())
        return
    out = Path(arguments.out).expanduser()
    format_name, paths = files_of(arguments.paths, arguments.format, out)
    written = convert(format_name, paths, out, arguments.image_size)
    print(f"written: {', '.join(str(out / ROOMS[kind] / 'model') for kind in written)}")
    if "gpt" in written:
        name = written["gpt"]["class_names"][0]
        line = ["python", "-m", "vgpt_jax.sample", "--from_pretrained", str(out), "--cls_name", name]
        if not (out / "classifier").exists() and not re.match(r"n\d{8}-", name):
            line += ["--classifier", "none"]  # the one that is installed knows ImageNet's classes only
        print(f"draw pictures with: {shlex.join(line)}")


if __name__ == "__main__":
    main(sys.argv[1:])
