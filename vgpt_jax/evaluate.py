"""Measures a finished training, or converted models: ``python -m vgpt_jax.evaluate --workdir DIR``.

Prints a table of figures, and writes to ``DIR/evaluation``: ``metrics.json``, ``table.md``, ``reconstructions.png``,
``samples.png`` and ``curves.png``. The data is that of the workdir's config; ``--config=configs/stfdogs.py``, with
``--config.FIELD=VALUE``, gives another, as folders need that `vgpt_jax.convert` wrote.
"""

import json
import os
import sys
from dataclasses import fields
from pathlib import Path

from vgpt_jax.command_line import CommandParser, add_process_flags
from vgpt_jax.configuration import read_config, read_flags
from vgpt_jax.errors import UserError, exit_on_user_error
from vgpt_jax.evaluation.measure import FRECHET, Measured, Request, measure
from vgpt_jax.training.metric_log import curves
from vgpt_jax.training.processes import first_does, join, say
from vgpt_jax.visualization.grid import save_png
from vgpt_jax.visualization.plots import plot_curves

PLOTTED = {
    "tokenizer: reconstruction loss": ("tokenizer", "reconstruction", None),
    "tokenizer: PSNR, dB": ("tokenizer", None, "held_out/psnr"),
    "tokenizer: feature distance": ("tokenizer", None, "held_out/feature_distance"),
    "tokenizer: share of codes in use": ("tokenizer", None, "held_out/code_use"),
    "generator: nats a token": ("generator", "nats_per_token", "held_out/nats_per_token"),
    "classifier: cross-entropy, nats": ("classifier", "cross_entropy", "held_out/cross_entropy"),
    "classifier: accuracy": ("classifier", "accuracy", "held_out/accuracy"),
}


def table(figures: dict[str, float], frechet: str) -> str:
    """The figures that a reader wants first, as a Markdown table; ``frechet`` names the network of the Fréchet distances."""
    f, rows = figures, {}

    def codes(part: str) -> str:
        use, perplexity, share = (f[f"tokenizer/{part}_{name}"] for name in ("code_use", "perplexity", "code_entropy"))
        return f"{use:.1%}, perplexity {perplexity:.1f}, entropy {share:.3f} of log K"

    def distance(of: str) -> str:
        return f"{f[f'{of}/frechet']:.2f} (features of {frechet}, {f[f'{of}/frechet_pictures']:.0f} pictures)"

    reconstruction = f"PSNR {f['tokenizer/psnr_db']:.2f} dB, SSIM {f['tokenizer/ssim']:.3f}"
    reconstruction += f", feature distance {f['tokenizer/feature_distance']:.3f}"
    if "tokenizer/lpips" in f:
        reconstruction += f", LPIPS {f['tokenizer/lpips']:.3f}"
    rows["reconstruction of held-out pictures"] = reconstruction
    if "tokenizer/frechet" in f:
        rows["Fréchet distance of reconstructions to held-out pictures"] = distance("tokenizer")
    rows["codes in use, held-out pictures"] = codes("held_out")
    if "tokenizer/training_code_use" in f:
        rows["codes in use, training token cache"] = codes("training")
    if "generator/nats_per_token" in f:
        nats, bits, unigram = (f[f"generator/{name}"] for name in ("nats_per_token", "bits_per_token", "unigram_nats"))
        rows["generator, held-out"] = f"{nats:.3f} nats ({bits:.3f} bits) a token"
        if "generator/random_order_nats_per_token" in f:
            rows["the same, in random order"] = f"{f['generator/random_order_nats_per_token']:.3f} nats a token"
        below = f["generator/share_below_unigram"]
        rows["entropy of single tokens"] = f"{unigram:.3f} nats; the generator is {below:.1%} below"
    if "classifier/accuracy" in f:
        rows["classifier, held-out accuracy"] = f"{f['classifier/accuracy']:.1%}"
    if "sampling/score_of_one" in f:
        rows["classifier's score of the class, one sample"] = f"{f['sampling/score_of_one']:.3f}"
        rows[f"the same, best of {f['sampling/accept_n']:.0f}"] = f"{f['sampling/score_of_best']:.3f}"
    if "sampling/frechet" in f:
        rows["Fréchet distance of samples to training pictures"] = distance("sampling")
    if "sampling/seconds" in f:
        drawn, seconds = f["sampling/candidates"], f["sampling/seconds"]
        rows["sampling, decoding and scoring"] = f"{drawn:.0f} pictures in {seconds:.1f} s, compilation included"
    return "\n".join(["| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows.items())])


def plot_training(workdir: Path, path: Path) -> None:
    """Draws the curves that tell a training best, from the stages' metric logs; nothing where there are none."""
    panels = {}
    for title, (stage, training, held_out) in PLOTTED.items():
        found = curves(workdir / stage)
        panels[title] = {"training": found.get(training, []), "held out": found.get(held_out, [])}
        if "nats a token" in title:
            panels[title]["single tokens"] = found.get("held_out/unigram_nats", [])
    if any(points for panel in panels.values() for points in panel.values()):
        plot_curves(panels, path)


def write(measured: Measured, text: str, workdir: Path, directory: Path) -> None:
    """Writes figures, table, pictures and curves into ``directory``.

    Raises:
      UserError: it cannot be written.
    """
    figures = {name: float(value) for name, value in measured.figures.items()}
    try:
        for name, picture in measured.pictures.items():
            save_png(picture, directory / f"{name}.png")
        plot_training(workdir, directory / "curves.png")
        (directory / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
        (directory / "table.md").write_text(text + "\n")
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror})") from error


@exit_on_user_error
def main(argv: list[str]) -> None:
    parser = CommandParser("evaluate", __doc__)
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="of a finished vgpt_jax.main, or what vgpt_jax.convert wrote")
    add("--num", type=int, default=8, help="pictures drawn of each class (default 8)")
    add("--accept_n", type=int, default=16, help="candidates for each picture (default 16)")
    add("--seed", type=int, default=0, help="of the sampling (default 0)")
    add("--classifier", help="that chooses among them, as in vgpt_jax.sample (default: the workdir's own)")
    add("--frechet", choices=FRECHET, default="none", help="network of Fréchet distances; with inception they are FID")
    add("--inception_file", default="", help="pt_inception-2015-12-05-6726825d.pth, which is fetched otherwise")
    add_process_flags(parser)
    arguments, rest = parser.parse_known_args(argv)
    join(arguments.coordinator, arguments.num_processes, arguments.process_id)
    workdir = arguments.workdir
    other = [argument for argument in rest if argument.startswith("-") and not argument.startswith("--config")]
    if other:
        raise UserError(f"{other[0]!r} is no flag of this (see --help)")
    if rest:
        config = read_flags([parser.prog, *rest, f"--workdir={workdir}"])[0]
    elif os.path.isfile(workdir / "config.json") or not os.path.isdir(workdir / "tokenizer" / "model"):
        config = read_config(workdir)
    else:
        raise UserError(
            f"{workdir} has no config: say which data to measure on, --config=configs/stfdogs.py for example"
        )
    asked = Request(**{field.name: getattr(arguments, field.name) for field in fields(Request)})
    measured = measure(workdir, config, asked)
    text, directory = table(measured.figures, arguments.frechet), workdir / "evaluation"
    first_does(lambda: write(measured, text, workdir, directory))
    say(text)
    for what in measured.left_out:
        say(f"not measured: {what}")
    say(f"written: {directory}")


if __name__ == "__main__":
    main(sys.argv[1:])
