"""Draws pictures of classes: a GIF of their decoding, a grid, and their scores.

    python -m vgpt_jax.sample --from_pretrained DIR --cls_name smileys flags --accept_n 10 --temperature 1.3 --top_k 100 \
        --top_p 0.9 --save_path out.gif

writes ``out.gif``, ``out.png`` (the finished pictures) and ``out.json`` (scores, token ids and all settings).
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from vgpt_jax.data.transforms import to_uint8
from vgpt_jax.errors import UserError, exit_on_user_error
from vgpt_jax.sampling.cond_visual_gpt import CondVisualGPT
from vgpt_jax.sampling.progressive import decode_so_far
from vgpt_jax.sampling.rerank import ClassConditionedRejectionSampler, RankedSamples
from vgpt_jax.visualization.gif import frame_counts, patch_reveal, save_gif
from vgpt_jax.visualization.grid import enlarge, make_grid, save_png, scale_for

VIEWS = ("decoding", "patches", "both")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parses the command line.

    Raises:
      UserError: it is wrong.
    """
    parser = _Parser(prog="python -m vgpt_jax.sample", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--from_pretrained", required=True, metavar="DIR", help="the workdir of a finished training")
    add("--cls_name", nargs="+", required=True, metavar="NAME", help="classes: exactly, or a part that fits only one")
    add(
        "--accept_n",
        type=int,
        default=10,
        help="candidates for each picture; the classifier keeps the best (default 10)",
    )
    add("--num", type=int, default=1, help="pictures of each class (default 1)")
    add("--temperature", type=float, default=1.0, help="above 0 (default 1)")
    add("--top_k", type=int, default=0, help="draw from the k most probable codes only; 0: all (default)")
    add("--top_p", type=float, default=1.0, help="draw from the nucleus of this probability only; 1: all (default)")
    add(
        "--z_shape",
        type=int,
        nargs=2,
        metavar=("h", "w"),
        help="token grid; must be the one that the model was trained on",
    )
    add("--seed", type=int, default=0, help="same seed, same pictures (default 0)")
    add(
        "--view",
        choices=VIEWS,
        default="decoding",
        help="GIF: what the decoder makes of the tokens so far (default), the patches of the "
        "finished picture, or both, one above the other",
    )
    add(
        "--save_path",
        default="samples.gif",
        metavar="PATH.gif",
        help="the grid and the scores go beside it (default samples.gif)",
    )
    return parser.parse_args(argv)


def animation(model: CondVisualGPT, samples: RankedSamples, view: str, max_frames: int = 64) -> np.ndarray:
    """Frames ``[F, H', W', 3]`` uint8 of the decoding, pictures side by side, at most eight in a row."""
    grid = model.tokenizer.grid
    counts = frame_counts(model.tokenizer.num_tokens, max_frames)
    finished = to_uint8(samples.images, (0, 1))
    rows = []
    if view in ("decoding", "both"):
        rows.append(to_uint8(decode_so_far(model, samples.token_ids, counts), (0, 1)))
    if view in ("patches", "both"):
        written = counts * (grid[0] * grid[1]) // model.tokenizer.num_tokens  # positions whose tokens are all there
        rows.append(patch_reveal(finished, grid, written))
    columns = min(8, len(finished))
    scale = scale_for(finished.shape[1])
    return np.stack(
        [
            np.concatenate([make_grid(enlarge(pictures[i], scale), columns) for pictures in rows])
            for i in range(len(counts))
        ]
    )


@exit_on_user_error
def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    path = Path(arguments.save_path).expanduser()
    if path.suffix.lower() != ".gif":
        raise UserError(f"--save_path is {arguments.save_path}, but must end in .gif")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # before anything is drawn for nothing
    except OSError as error:
        raise UserError(f"--save_path {path} cannot be written ({error.strerror})") from error
    sampler = ClassConditionedRejectionSampler.from_pretrained(arguments.from_pretrained)
    model = sampler.model
    if arguments.z_shape and tuple(arguments.z_shape) != tuple(model.tokenizer.grid):
        raise UserError(
            f"--z_shape is {tuple(arguments.z_shape)}, but the model writes grids of {tuple(model.tokenizer.grid)}"
        )

    options = {name: getattr(arguments, name) for name in ("num", "accept_n", "temperature", "top_k", "top_p", "seed")}
    samples = sampler.sample(arguments.cls_name, **options)
    names = [model.class_names[label] for label in samples.labels]

    try:
        pictures = enlarge(to_uint8(samples.images, (0, 1)), scale_for(samples.images.shape[1]))
        row_names = [model.class_names[i] for i in model.class_ids(arguments.cls_name)]
        save_png(make_grid(pictures, arguments.num, row_names=row_names), path.with_suffix(".png"))
        save_gif(animation(model, samples, arguments.view), path)
        record = {
            "from_pretrained": str(arguments.from_pretrained), **options,
            "pictures": [
                {"class": name, "score": float(score), "chosen": int(chosen), "candidate_scores": candidates.tolist(),
                 "token_ids": ids.tolist()}
                for name, score, chosen, candidates, ids in zip(
                    names, samples.scores, samples.chosen, samples.candidate_scores, samples.token_ids, strict=True)
            ],
        }  # fmt: skip
        path.with_suffix(".json").write_text(json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(f"--save_path {path} cannot be written ({error.strerror})") from error

    for name, score, candidates in zip(names, samples.scores, samples.candidate_scores, strict=True):
        print(f"{name}: score {score:.3f}, best of {len(candidates)} (mean {candidates.mean():.3f})")
    print(f"written: {path}, {path.with_suffix('.png')}, {path.with_suffix('.json')}")


if __name__ == "__main__":
    main(sys.argv[1:])
