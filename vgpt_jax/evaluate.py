"""Measures a finished training: ``python -m vgpt_jax.evaluate --workdir DIR``.

Prints a table of figures, and writes to ``DIR/evaluation``: ``metrics.json``, ``table.md``, ``reconstructions.png``,
``samples.png`` and ``curves.png``.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from vgpt_jax.configuration import read_config
from vgpt_jax.data.datasets import load_sources, make_transform
from vgpt_jax.data.loader import evaluation_batches
from vgpt_jax.data.token_cache import read_token_cache
from vgpt_jax.data.transforms import to_uint8
from vgpt_jax.errors import UserError, exit_on_user_error
from vgpt_jax.evaluation.metrics import codebook_metrics
from vgpt_jax.evaluation.runner import mean_over, summed
from vgpt_jax.sampling.cond_visual_gpt import Samples
from vgpt_jax.sampling.rerank import ClassConditionedRejectionSampler
from vgpt_jax.training import classifier_stage, generator_stage, tokenizer_stage
from vgpt_jax.training.metric_log import curves
from vgpt_jax.training.saved_model import read_metadata
from vgpt_jax.training.sharding import make_mesh, replicate
from vgpt_jax.visualization.grid import enlarge, make_grid, save_png, scale_for
from vgpt_jax.visualization.plots import plot_curves

BATCH_SIZE = 32
PLOTTED = {
    "tokenizer: reconstruction loss": ("tokenizer", "reconstruction", None),
    "tokenizer: PSNR, dB": ("tokenizer", None, "held_out/psnr"),
    "tokenizer: feature distance": ("tokenizer", None, "held_out/feature_distance"),
    "tokenizer: share of codes in use": ("tokenizer", None, "held_out/code_use"),
    "generator: nats a token": ("generator", "nats_per_token", "held_out/nats_per_token"),
    "classifier: cross-entropy, nats": ("classifier", "cross_entropy", "held_out/cross_entropy"),
    "classifier: accuracy": ("classifier", "accuracy", "held_out/accuracy"),
}


def measure(workdir: Path, *, num: int, accept_n: int, seed: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """All figures of a workdir, and its pictures.

    Args:
      workdir: of a finished `vgpt_jax.main`.
      num: pictures drawn of each class.
      accept_n: candidates for each.
      seed: of the sampling.

    Returns:
      Figures by name, and pictures by name, ``[H, W, 3]`` uint8.

    Raises:
      UserError: a stage is not finished, or the parts do not fit each other.
    """
    config = read_config(workdir)
    mesh = make_mesh()
    sampler = ClassConditionedRejectionSampler.from_pretrained(workdir, mesh)
    model = sampler.model
    _, held_out = load_sources(config.data)
    transform = make_transform(config.data)
    fingerprint = read_metadata(workdir / "tokenizer" / "model", "tokenizer")["fingerprint"]
    tokens, held_out_tokens = read_token_cache(workdir / "token_cache", fingerprint=fingerprint)

    def mean_of(modules: Any, metrics, source, view) -> dict[str, float]:
        graph, state = nnx.split(modules)
        state = replicate(mesh, state)
        sums = summed(lambda state, batch: metrics(nnx.merge(graph, state), batch))
        batches = evaluation_batches(source, view, batch_size=BATCH_SIZE * mesh.size)
        return mean_over(sums, state, batches, mesh)

    reconstructed = mean_of(
        (model.tokenizer, tokenizer_stage.perceptual_metrics(config)),
        lambda m, b: tokenizer_stage.held_out_metrics(m[0], b, model.value_range, m[1]),
        held_out,
        transform.evaluate,
    )
    generated = mean_of(model.gpt, generator_stage.held_out_metrics, held_out_tokens, lambda e: e)
    nats = generated["nats_per_token"]
    classified = mean_of(sampler.classifier, classifier_stage.held_out_metrics, held_out, transform.evaluate)
    unigram = generator_stage.unigram_nats(tokens)

    begun = time.monotonic()
    labels, drawing = model.labels(range(len(model.class_names)), num), generator_stage.drawing_of(config, seed)
    samples = Samples.joined(list(model.draw(labels, drawing, accept_n=accept_n, score=sampler.score)))
    seconds = time.monotonic() - begun

    figures = {
        "tokenizer/psnr_db": reconstructed["psnr"],
        "tokenizer/ssim": reconstructed["ssim"],
        "tokenizer/l1": reconstructed["l1"],
    }
    figures |= {
        f"tokenizer/{name}": reconstructed[name] for name in ("feature_distance", "lpips") if name in reconstructed
    }
    for part, source in (("held_out", held_out_tokens), ("training", tokens)):
        counts = np.bincount(source.token_ids.ravel(), minlength=model.tokenizer.num_codes)
        figures |= {f"tokenizer/{part}_{name}": value for name, value in codebook_metrics(counts).items()}
    figures |= {
        **{f"generator/{name}": value for name, value in generated.items()},
        "generator/bits_per_token": nats / np.log(2),
        "generator/unigram_nats": unigram,
        "generator/share_below_unigram": 1 - nats / unigram,
        "classifier/accuracy": classified["accuracy"],
        "sampling/score_of_one": samples.candidate_scores.mean(),
        "sampling/score_of_best": samples.scores.mean(),
        "sampling/accept_n": accept_n,
        "sampling/candidates": samples.candidate_scores.size,
        "sampling/seconds": seconds,
    }

    graph, state = nnx.split(model.tokenizer)
    reconstruct = jax.jit(lambda images: nnx.merge(graph, state)(images).reconstruction)
    drawn = enlarge(to_uint8(samples.images, (0, 1)), scale_for(model.tokenizer.image_size, 96))
    pictures = {
        "reconstructions": tokenizer_stage.reconstructions(held_out, transform, reconstruct),
        "samples": make_grid(drawn, num, row_names=model.class_names),
    }
    return {name: float(value) for name, value in figures.items()}, pictures


def table(figures: dict[str, float]) -> str:
    """The figures that a reader wants first, as a Markdown table."""
    f = figures

    def codes(part: str) -> str:
        use, perplexity, share = (f[f"tokenizer/{part}_{name}"] for name in ("code_use", "perplexity", "code_entropy"))
        return f"{use:.1%}, perplexity {perplexity:.1f}, entropy {share:.3f} of log K"

    nats, bits, unigram = (f[f"generator/{name}"] for name in ("nats_per_token", "bits_per_token", "unigram_nats"))
    below, seconds = f["generator/share_below_unigram"], f["sampling/seconds"]
    reconstruction = f"PSNR {f['tokenizer/psnr_db']:.2f} dB, SSIM {f['tokenizer/ssim']:.3f}"
    reconstruction += f", feature distance {f['tokenizer/feature_distance']:.3f}"
    if "tokenizer/lpips" in f:
        reconstruction += f", LPIPS {f['tokenizer/lpips']:.3f}"
    rows = {
        "reconstruction of held-out pictures": reconstruction,
        "codes in use, held-out token cache": codes("held_out"),
        "codes in use, training token cache": codes("training"),
        "generator, held-out": f"{nats:.3f} nats ({bits:.3f} bits) a token",
        **(
            {"the same, in random order": f"{f['generator/random_order_nats_per_token']:.3f} nats a token"}
            if "generator/random_order_nats_per_token" in f
            else {}
        ),
        "entropy of single training tokens": f"{unigram:.3f} nats; the generator is {below:.1%} below",
        "classifier, held-out accuracy": f"{f['classifier/accuracy']:.1%}",
        "classifier's score of the class, one sample": f"{f['sampling/score_of_one']:.3f}",
        f"the same, best of {f['sampling/accept_n']:.0f}": f"{f['sampling/score_of_best']:.3f}",
        "sampling, decoding and scoring": f"{f['sampling/candidates']:.0f} pictures in {seconds:.1f} s, compilation included",
    }
    return "\n".join(["| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows.items())])


def plot_training(workdir: Path, path: Path) -> None:
    """Draws the curves that tell a training best, from the stages' metric logs."""
    panels = {}
    for title, (stage, training, held_out) in PLOTTED.items():
        found = curves(workdir / stage)
        panels[title] = {"training": found.get(training, []), "held out": found.get(held_out, [])}
        if "nats a token" in title:
            panels[title]["single tokens"] = found.get("held_out/unigram_nats", [])
    plot_curves(panels, path)


@exit_on_user_error
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m vgpt_jax.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=Path, required=True, help="of a finished vgpt_jax.main")
    parser.add_argument("--num", type=int, default=8, help="pictures drawn of each class (default 8)")
    parser.add_argument("--accept_n", type=int, default=16, help="candidates for each picture (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    arguments = parser.parse_args(argv)
    figures, pictures = measure(arguments.workdir, num=arguments.num, accept_n=arguments.accept_n, seed=arguments.seed)
    directory = arguments.workdir / "evaluation"
    try:
        for name, picture in pictures.items():
            save_png(picture, directory / f"{name}.png")
        plot_training(arguments.workdir, directory / "curves.png")
        (directory / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
        (directory / "table.md").write_text(table(figures) + "\n")
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror})") from error
    print(table(figures))
    print(f"written: {directory}")


if __name__ == "__main__":
    main(sys.argv[1:])
