"""Draws pictures of classes: a GIF of their decoding, a grid, and their scores.

    python -m vgpt_jax.sample --from_pretrained DIR --cls_name smileys flags --accept_n 10 --temperature 1.3 --top_k 100 \
        --top_p 0.9 --save_path out.gif

writes ``out.gif``, ``out.png`` (the finished pictures) and ``out.json`` (scores, seeds, token ids and all settings), and with
``--files`` every picture by itself in ``out/``. ``--complete PICTURE --keep top`` keeps a part of a picture and draws the rest;
``--again out.json --pick 3`` makes pictures of a record again.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from vgpt_jax.command_line import CommandParser, add_process_flags
from vgpt_jax.data.transforms import to_uint8
from vgpt_jax.errors import UserError, exit_on_user_error
from vgpt_jax.host_memory import accelerator_is_installed, keep_freed_memory
from vgpt_jax.pretrained.rerankers import NONE
from vgpt_jax.sampling.class_names import shown_name, slug
from vgpt_jax.sampling.completion import Completion, read_completion
from vgpt_jax.sampling.cond_visual_gpt import CondVisualGPT, Samples
from vgpt_jax.sampling.guidance import GUIDANCE_SCHEDULES
from vgpt_jax.sampling.progressive import decode_so_far
from vgpt_jax.sampling.record import Record, read_record
from vgpt_jax.sampling.request import ORDERS, Drawing
from vgpt_jax.sampling.rerank import ClassConditionedRejectionSampler
from vgpt_jax.training.processes import first_does, is_first, join, progress_once, say
from vgpt_jax.training.sharding import make_mesh
from vgpt_jax.visualization.gif import frame_counts, patch_reveal, save_gif
from vgpt_jax.visualization.grid import enlarge, make_grid, save_png, scale_for

VIEWS = ("decoding", "patches", "both")
MAX_FRAMES = 64
IN_GIF, IN_GRID, MAX_COLUMNS = 16, 256, 16
"""Pictures of a request that the GIF and the grid show, the first ones; and how many of a class the grid has in a row."""

DRAWING_OPTIONS = (
    ("temperature", float, "above 0"),
    ("top_k", int, "draw from the k most probable codes only; 0: all"),
    ("top_p", float, "draw from the nucleus of this probability only; 1: all"),
    ("min_p", float, "draw from codes at least so many times as probable as the most probable only; 0: all"),
    ("guidance", float, "scale of classifier-free guidance; 1: none"),
    ("guidance_schedule", str, "how the scale goes over the tokens"),
    ("guidance_power", float, "of the schedule: its exponent, or the share of guided tokens of cut_off"),
    ("order", str, "of writing"),
    ("num_steps", int, "write in so many steps, several tokens each; 0: a token a step"),
    ("seed", int, "same seed, same pictures"),
)
CHOICES = {"guidance_schedule": tuple(GUIDANCE_SCHEDULES), "order": ORDERS}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parses the command line.

    Raises:
      UserError: it is wrong.
    """
    parser = CommandParser("sample", __doc__)
    add = parser.add_argument
    add("--from_pretrained", required=True, metavar="DIR", help="the workdir of a finished training")
    add("--cls_name", nargs="+", metavar="NAME", help="classes: exactly, or a part that fits only one")
    add(
        "--accept_n",
        type=int,
        help="candidates for each picture; the classifier keeps the best (default 10; without a classifier 1)",
    )
    add(
        "--classifier",
        metavar="own|efficientnet|dogs|none|PATH",
        help="what chooses: the workdir's own classifier; EfficientNet-Lite0, which knows ImageNet's classes; visual-gpt's ViT "
        "for dog breeds; nothing; or a folder with a ViT (default: own where there is one, else efficientnet)",
    )
    add("--num", type=int, default=1, help="pictures of each class (default 1)")
    for name, kind, text in DRAWING_OPTIONS:
        default = getattr(Drawing, name)
        add(f"--{name}", type=kind, default=default, choices=CHOICES.get(name), help=f"{text} (default {default})")
    add("--z_shape", type=int, nargs=2, metavar=("h", "w"), help="token grid; must be the one that the model writes")
    add("--complete", metavar="PICTURE", help="keep a part of this picture and draw the rest")
    add(
        "--keep", metavar="top|left|MASK", help="with --complete: the part, or a picture that is white where it is kept"
    )
    add("--again", metavar="PATH.json", help="make the pictures of this record again, without other candidates")
    add("--pick", type=int, nargs="+", metavar="I", help="with --again: which of them, counted from 0 (default all)")
    add(
        "--view",
        choices=VIEWS,
        default="decoding",
        help="GIF: what the decoder makes of the tokens so far (default), the patches of the "
        "finished picture, or both, one above the other",
    )
    add(
        "--files",
        action="store_true",
        help=f"write every picture by itself too, into the folder PATH/; more than {IN_GRID} are always",
    )
    add(
        "--save_path",
        default="samples.gif",
        metavar="PATH.gif",
        help="the grid and the record go beside it (default samples.gif)",
    )
    add_process_flags(parser)
    arguments = parser.parse_args(argv)
    if bool(arguments.cls_name) == bool(arguments.again):
        parser.error("give either --cls_name or --again")
    if bool(arguments.complete) != bool(arguments.keep):
        parser.error("--complete and --keep belong together")
    if arguments.again:
        for name in ("accept_n", "classifier", "num", "complete", *(name for name, *_ in DRAWING_OPTIONS)):
            if getattr(arguments, name) != parser.get_default(name):
                parser.error(f"--again draws what its record drew, and as it did: leave --{name} out")
    if arguments.pick and not arguments.again:
        parser.error("--pick chooses from the pictures of --again")
    if arguments.classifier == NONE and (arguments.accept_n or 1) > 1:
        parser.error(
            f"--accept_n {arguments.accept_n}, but with --classifier none nothing chooses among the candidates"
        )
    return arguments


def animation(
    model: CondVisualGPT, samples: Samples, view: str, num_given: int, max_frames: int = MAX_FRAMES
) -> Iterator:
    """Frames ``[H', W', 3]`` uint8 of the decoding, pictures side by side, at most eight in a row.

    Args:
      model: that drew them.
      samples: the pictures.
      view: one of ``VIEWS``.
      num_given: tokens that were kept of a given picture, and are there from the start.
      max_frames: at most so many frames.
    """
    tokenizer = model.tokenizer
    counts = num_given + frame_counts(tokenizer.num_tokens - num_given, max_frames)
    rows = []
    if view in ("decoding", "both"):
        frames = decode_so_far(model, samples.token_ids, samples.orders, counts)
        rows.append(to_uint8(frame, (0, 1)) for frame in frames)
    if view in ("patches", "both"):
        places, orders = tokenizer.grid[0] * tokenizer.grid[1], samples.orders
        if tokenizer.num_tokens != places:  # several tokens a place: as many places as are finished in raster order
            orders = np.arange(places)[None]
        rows.append(
            patch_reveal(
                to_uint8(samples.images, (0, 1)), tokenizer.grid, orders, counts * places // tokenizer.num_tokens
            )
        )
    for pictures in zip(*rows, strict=True):
        yield np.concatenate([layout(row) for row in pictures])


def layout(pictures: np.ndarray) -> np.ndarray:
    """Pictures ``[M, H, W, 3]`` uint8 side by side, enlarged if they are small."""
    return make_grid(enlarge(pictures, scale_for(pictures.shape[1])), min(8, len(pictures)))


def completion_grid(completion: Completion, pictures: np.ndarray, num: int, row_names: list[str]) -> np.ndarray:
    """Each row: the given picture, what is kept of it, and the first of the completions ``[M, H, W, 3]`` uint8 of a class."""
    before = to_uint8(completion.image, (0, 1))
    cells = np.repeat(
        np.repeat(completion.kept, len(before) // len(completion.kept), 0), len(before) // len(completion.kept), 1
    )
    kept = np.where(cells[..., None], before, np.uint8(200))
    columns = min(num, MAX_COLUMNS)
    rows = [np.concatenate([before[None], kept[None], pictures[i : i + columns]]) for i in range(0, len(pictures), num)]
    return make_grid(enlarge(np.concatenate(rows), scale_for(len(before))), columns + 2, row_names=row_names)


def draw_again(
    sampler: ClassConditionedRejectionSampler, record: Record, pick: list[int] | None, completion: Completion | None
) -> Iterator[Samples]:
    """The pictures of a record, or some of them.

    Raises:
      UserError: a picture that is not in the record, or a record of another model.
    """
    for i in pick or ():
        if not 0 <= i < len(record.pictures):
            raise UserError(f"--pick {i}, but the record has pictures 0 to {len(record.pictures) - 1}")
    chosen = [record.pictures[i] for i in pick] if pick else record.pictures
    labels, indices = (np.array([picture[name] for picture in chosen], np.int32) for name in ("label", "index"))
    classes = len(sampler.model.class_names)
    for label in labels:
        if not 0 <= label < classes:
            raise UserError(f"the record is of another model: there is no label {label} among the {classes} classes")
    return sampler.draw(labels, record.drawing, indices=indices, completion=completion)


def completion_of(sampler: ClassConditionedRejectionSampler, settings: dict) -> Completion | None:
    """What ``--complete`` and ``--keep`` ask for, or None."""
    if not settings["complete"]:
        return None
    tokenizer = sampler.model.tokenizer
    return read_completion(settings["complete"], settings["keep"], tokenizer.image_size, tokenizer.grid)


@exit_on_user_error
def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    join(arguments.coordinator, arguments.num_processes, arguments.process_id)
    path = Path(arguments.save_path).expanduser()
    if path.suffix.lower() != ".gif":
        raise UserError(f"--save_path is {arguments.save_path}, but must end in .gif")
    try:
        first_does(lambda: path.parent.mkdir(parents=True, exist_ok=True))  # before anything is drawn for nothing
    except OSError as error:
        raise UserError(f"--save_path {path} cannot be written ({error.strerror})") from error
    before = read_record(Path(arguments.again)) if arguments.again else None
    if not accelerator_is_installed():
        keep_freed_memory()
    chooser = before.settings.get("classifier") if before else arguments.classifier
    accept_n = arguments.accept_n
    if accept_n is None:
        accept_n = 1 if chooser == NONE else 10
    sampler = ClassConditionedRejectionSampler.from_pretrained(arguments.from_pretrained, make_mesh(), chooser)
    model = sampler.model
    if arguments.z_shape and tuple(arguments.z_shape) != tuple(model.tokenizer.grid):
        raise UserError(
            f"--z_shape is {tuple(arguments.z_shape)}, but the model writes grids of {tuple(model.tokenizer.grid)}"
        )

    settings = {
        name: getattr(arguments, name)
        for name in ("from_pretrained", "cls_name", "num", "classifier", "complete", "keep")
    }
    settings["accept_n"] = accept_n
    if before is not None:
        settings = before.settings | {"from_pretrained": arguments.from_pretrained, "accept_n": 1, "num": 1}
    completion = completion_of(sampler, settings)
    if before is not None:
        drawing, total = before.drawing, len(arguments.pick or before.pictures)
        batches = draw_again(sampler, before, arguments.pick, completion)
    else:
        drawing = Drawing(**{name: getattr(arguments, name) for name, *_ in DRAWING_OPTIONS})
        labels = model.labels(arguments.cls_name, arguments.num)
        total = len(labels)
        batches = sampler.draw(labels, drawing, accept_n=accept_n, completion=completion)
    record = Record(settings, drawing, [])
    folder = path.with_suffix("") if arguments.files or total > IN_GRID else None
    try:
        shown = draw(model, batches, total, record, path, folder)
        view = arguments.view
        first_does(lambda: write_pictures(on_one_device(model), shown, record, view, path, completion))
    except OSError as error:
        raise UserError(f"--save_path {path} cannot be written ({error.strerror})") from error
    report(record, before, arguments.pick)
    written = [path, path.with_suffix(".png"), path.with_suffix(".json"), *([folder] if folder else [])]
    say(f"written: {', '.join(map(str, written))}")


def draw(
    model: CondVisualGPT, batches: Iterator[Samples], total: int, record: Record, path: Path, folder: Path | None
) -> Samples:
    """Draws batch after batch; after each its files are on disk.

    The record is written whenever it is a quarter longer than it was, so that a great request does not write it over and over,
    and at the end, also where that comes early.

    Returns:
      As many of the first pictures as the grid shows.
    """
    shown: list[Samples] = []
    count = recorded = 0

    def one_by_one():
        nonlocal count, recorded
        for samples in batches:
            if count < IN_GRID:
                shown.append(samples)
            if folder is not None:
                first_does(partial(save_each, model, samples, folder, count))
            record.add(model, samples)
            count += len(samples.labels)
            if count >= 1.25 * recorded or count == total:
                first_does(partial(record.write, path.with_suffix(".json")))
                recorded = count
            yield from samples.labels

    try:
        for _ in progress_once(one_by_one(), "drawing", total):
            pass
    finally:
        if count > recorded and is_first():
            record.write(path.with_suffix(".json"))
    return Samples.joined(shown)


def save_each(model: CondVisualGPT, samples: Samples, folder: Path, first: int) -> None:
    """Writes every picture by itself, numbered from ``first``."""
    for i, picture in enumerate(to_uint8(samples.images, (0, 1))):
        save_png(picture, folder / f"{first + i:06d}_{slug(model.class_names[samples.labels[i]])}.png")


def on_one_device(model: CondVisualGPT) -> CondVisualGPT:
    """The model with a tokenizer on one device, for what one process alone computes; every device has its arrays whole."""
    graph, state = nnx.split(model.tokenizer)
    tokenizer = nnx.merge(graph, jax.tree.map(lambda x: x.addressable_data(0), state))
    return CondVisualGPT(tokenizer, model.gpt, class_names=model.class_names, value_range=model.value_range)


def write_pictures(
    model: CondVisualGPT, samples: Samples, record: Record, view: str, path: Path, completion: Completion | None
) -> None:
    """The grid and the GIF."""
    pictures = to_uint8(samples.images, (0, 1))[:IN_GRID]
    num = record.settings["num"]
    columns = min(num, MAX_COLUMNS)
    row_names = [shown_name(model.class_names[label]) for label in samples.labels[:IN_GRID:num]]
    if completion is not None:
        grid = completion_grid(completion, pictures, num, row_names)
    else:
        names = row_names if num == columns else []  # otherwise a class has several rows
        grid = make_grid(enlarge(pictures, scale_for(pictures.shape[1])), columns, row_names=names)
    save_png(grid, path.with_suffix(".png"))
    first = Samples(**{name: None if value is None else value[:IN_GIF] for name, value in vars(samples).items()})
    num_given = 0 if completion is None else int(completion.kept.sum()) * (model.gpt.num_tokens // completion.kept.size)
    num_frames = len(frame_counts(model.gpt.num_tokens - num_given, MAX_FRAMES))
    finished = layout(pictures[:IN_GIF])
    save_gif(animation(model, first, view, num_given), path, palette_from=finished, num_frames=num_frames)


def report(record: Record, before: Record | None, pick: list[int] | None) -> None:
    """Prints the scores, and for pictures made again how many have the tokens that they had."""
    if before is not None:
        chosen = [before.pictures[i] for i in pick] if pick else before.pictures
        same = sum(new["token_ids"] == old["token_ids"] for new, old in zip(record.pictures, chosen, strict=True))
        say(f"made again: {same} of {len(chosen)} with the same tokens")
    if not record.pictures or "score" not in record.pictures[0]:
        return
    for picture in record.pictures[:IN_GIF]:
        scores = picture["candidate_scores"]
        say(
            f"{shown_name(picture['class'])}: score {picture['score']:.3f}, best of {len(scores)} (mean {np.mean(scores):.3f})"
        )
    if len(record.pictures) > IN_GIF:
        say(f"mean score of {len(record.pictures)}: {np.mean([p['score'] for p in record.pictures]):.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
