"""Ways to train and to sample a generator, under one budget: ``python -m vgpt_jax.benchmarks.generators``.

``--workdir`` is a finished training of ``configs/emoji.py`` (or another config), whose tokenizer, token cache and classifier are
used. Each variant of the generator is trained for as many steps, from the same seed, and sampled in several ways. Written to
``--out``: ``table.md``, ``results.json``, and for each variant and way a picture of samples with the nearest training picture
beside each, so that memorisation is visible. What is trained, or in ``results.json``, already is not done again.

Distances are 1 - cosine of EfficientNet-Lite0's embeddings at 112 px: not comparable with figures of other networks.
"""

import argparse
import functools
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from vgpt_jax.benchmarks.emoji_runs import markdown_table
from vgpt_jax.configuration import read_config
from vgpt_jax.data.datasets import load_sources, make_transform
from vgpt_jax.data.transforms import to_uint8
from vgpt_jax.errors import UserError, check_range, exit_on_user_error
from vgpt_jax.files import written_whole
from vgpt_jax.host_memory import accelerator_is_installed, keep_freed_memory
from vgpt_jax.models.gpt import BLOCKS
from vgpt_jax.pretrained.efficientnet_lite0 import load_efficientnet_lite0
from vgpt_jax.progress import progress
from vgpt_jax.sampling.class_names import slug
from vgpt_jax.sampling.cond_visual_gpt import CondVisualGPT, Samples
from vgpt_jax.sampling.program import ClassifierScore
from vgpt_jax.sampling.request import Drawing
from vgpt_jax.training import generator_stage
from vgpt_jax.training.loop import train
from vgpt_jax.training.metric_log import curves
from vgpt_jax.training.saved_model import load_model
from vgpt_jax.training.sharding import make_mesh
from vgpt_jax.visualization.grid import enlarge, make_grid, save_png, scale_for

RASTER: dict[str, Any] = {"gpt.class_dropout": 0.1}
RANDOM = RASTER | {"gpt.random_order": True}
LLAMA = {f"gpt.{name}": value for name, value in BLOCKS["llama"].items()} | {"gpt.mlp_width": 344}  # as many parameters

VARIANTS: dict[str, dict[str, Any]] = {
    "raster": RASTER,
    "random, annealed to raster (RAR)": RANDOM,
    "random throughout": RANDOM | {"generator_training.random_until": 1.0, "generator_training.raster_from": 1.0},
    "raster, Llama's blocks": RASTER | LLAMA,
}

GUIDED = [{}, {"guidance": 1.5}, {"guidance": 2.5}, {"guidance": 4.0, "guidance_schedule": "power_cosine"}]
FEWER_STEPS = [{"order": "random"}, *({"num_steps": steps} for steps in (72, 48, 32, 20, 10))]
WAYS: dict[str, list[dict[str, Any]]] = dict.fromkeys(VARIANTS, GUIDED)
WAYS["random throughout"] = FEWER_STEPS + [{"num_steps": 32, "guidance": 1.5}]

EMBEDDING_SIZE = 112
BATCH_SIZE = 64
SHOWN = 4
"""Samples of a class in the pictures."""


@dataclass(frozen=True)
class Figures:
    """What is measured of samples.

    Attributes:
      share: the classifier's softmax of the class that was asked for, on average.
      correct: the share of samples that it puts into that class.
      diversity: the mean distance of two samples of a class.
      nearest: the mean distance to the nearest training picture.
      nearest_least: the least.
    """

    share: float
    correct: float
    diversity: float
    nearest: float
    nearest_least: float


class Judge:
    """The classifier, the embedding, and the embedded training pictures of a workdir."""

    def __init__(self, workdir: Path, config, value_range: tuple[float, float]):
        transform = make_transform(config.data)
        training, self.held_out = (
            [transform.evaluate(source[i]) for i in range(len(source))] for source in load_sources(config.data)
        )
        classifier, _ = load_model(workdir / "classifier" / "model", "classifier")
        networks = nnx.split((ClassifierScore(classifier, value_range), load_efficientnet_lite0()))
        self._judge = functools.partial(_judge, *networks)
        self.unit = lambda images: to_uint8(images, value_range).astype(np.float32) / 255
        self.training = self.unit(np.stack([example["image"] for example in training]))
        _, _, self.embedded = self(self.training, np.array([example["label"] for example in training]))

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shares and whether they are the greatest ``[M]``, and unit embeddings ``[M, 1280]``, of images in 0..1."""
        found = []
        for start in range(0, len(images), BATCH_SIZE):
            at = np.arange(start, start + BATCH_SIZE) % len(images)  # the last batch is filled up with the first images
            judged = self._judge(images[at], labels[at])
            found.append([np.asarray(x)[: len(images) - start] for x in judged])
        share, correct, embedded = (np.concatenate(x) for x in zip(*found, strict=True))
        return share, correct, embedded

    def figures(self, images: np.ndarray, labels: np.ndarray) -> tuple[Figures, np.ndarray]:
        """The figures of images in 0..1, and the number of each one's nearest training picture."""
        share, correct, embedded = self(images, labels)
        distances = np.maximum(1 - embedded @ self.embedded.T, 0)  # [M, training pictures]
        nearest = distances.min(axis=1)
        diversity = np.mean([mean_distance(embedded[labels == label]) for label in np.unique(labels)])
        figures = (share.mean(), correct.mean(), diversity, nearest.mean(), nearest.min())
        return Figures(*map(float, figures)), distances.argmin(axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _judge(graph, state, images: Array, labels: Array) -> tuple[Array, Array, Array]:
    score, network = nnx.merge(graph, state)
    low, high = score.value_range
    guessed = jnp.argmax(score.classifier(images * (high - low) + low), axis=-1)
    enlarged = jax.image.resize(images, (len(images), EMBEDDING_SIZE, EMBEDDING_SIZE, 3), "bilinear")
    embedded = network.embed((enlarged * 255 - 127) / 128)
    return score(images, labels), guessed == labels, embedded / jnp.linalg.norm(embedded, axis=-1, keepdims=True)


def mean_distance(embedded: np.ndarray) -> float:
    """The mean distance of two of the unit vectors ``[M, D]``, M at least 2."""
    count = len(embedded)
    similarity = embedded @ embedded.T
    return float(1 - (similarity.sum() - np.trace(similarity)) / (count * (count - 1)))


def train_variant(config, overrides: Mapping[str, Any], workdir: Path, out: Path) -> dict[str, float]:
    """Trains a generator on the token cache of ``workdir``, in the folder ``out``, or goes on where it was.

    Returns:
      Its held-out figures.
    """
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(dict(overrides))
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer", "token_cache"):
        if not (out / name).exists():
            (out / name).symlink_to((workdir / name).resolve(), target_is_directory=True)
    directory = out / "generator"
    if not (directory / "model").exists():
        directory.mkdir(exist_ok=True)
        mesh = make_mesh()
        stage = generator_stage.build(config, mesh, out, load_sources(config.data))
        options = {"logging": config.logging, "config": config, "max_skipped_steps": config.max_skipped_steps}
        train(stage, directory=directory, mesh=mesh, **options)
    last = {name: curve[-1][1] for name, curve in curves(directory).items() if name.startswith("held_out/") and curve}
    return {name.removeprefix("held_out/"): value for name, value in last.items()}


def describe(drawing: Mapping[str, Any], num_tokens: int) -> dict[str, str]:
    """The cells that say how was sampled."""
    guidance = f"{drawing.get('guidance', 1.0):g}"
    if "guidance_schedule" in drawing:
        guidance += f", {drawing['guidance_schedule'].replace('_', '-')}"
    order = "random" if "order" in drawing or "num_steps" in drawing else "raster"
    return {"guidance": guidance, "order": order, "steps": str(drawing.get("num_steps", num_tokens))}


def cells(figures: Figures) -> dict[str, str]:
    """The cells that say what came."""
    return {
        "classifier's share": f"{figures.share:.3f}",
        "in the class": f"{figures.correct:.1%}",
        "distance in a class": f"{figures.diversity:.3f}",
        "to the nearest training picture": f"{figures.nearest:.3f} (least {figures.nearest_least:.3f})",
    }


def write_table(results: Mapping[str, Any], num_tokens: int, path: Path) -> None:
    """All results as Markdown: first the pictures that were not generated, then each generator's samples."""
    rows = []
    for name, figures in results["references"].items():
        head = {"generator": name, "nats a token, raster": "", "random": "", "guidance": "", "order": "", "steps": ""}
        rows.append(head | cells(Figures(**figures)))
    for name, result in results["variants"].items():
        nats = result["held_out"]
        random = nats.get("random_order_nats_per_token")
        head = {"generator": name, "nats a token, raster": f"{nats['nats_per_token']:.3f}"}
        head["random"] = "" if random is None else f"{random:.3f}"
        for way in result["ways"]:
            rows.append(head | describe(way["drawing"], num_tokens) | cells(Figures(**way["figures"])))
    with written_whole(path) as partial:
        partial.write_text(markdown_table(rows) + "\n")


@exit_on_user_error
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vgpt_jax.benchmarks.generators", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--workdir", type=Path, required=True, help="of a finished vgpt_jax.main")
    parser.add_argument("--out", type=Path, required=True, help="where everything goes")
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="which to train (all)"
    )
    parser.add_argument("--num", type=int, default=32, help="samples of each class for each figure (default 32)")
    arguments = parser.parse_args(argv)
    check_range("--num", arguments.num, least=2)
    if not accelerator_is_installed():
        keep_freed_memory()
    config, workdir, out = read_config(arguments.workdir), arguments.workdir, arguments.out
    tokenizer, metadata = load_model(workdir / "tokenizer" / "model", "tokenizer")
    settings = {"config": config.to_json(), "tokenizer": metadata["fingerprint"], "num": arguments.num}
    path = out / "results.json"
    results = (
        json.loads(path.read_text()) if path.exists() else {"settings": settings, "references": {}, "variants": {}}
    )
    if results["settings"] != settings:
        raise UserError(f"{path} is of another workdir, config or --num: give another --out, or delete it")
    judge = Judge(workdir, config, tuple(metadata["value_range"]))

    def save() -> None:
        with written_whole(path) as partial:
            partial.write_text(json.dumps(results, indent=1) + "\n")
        write_table(results, tokenizer.num_tokens, out / "table.md")

    if not results["references"]:
        labels = np.array([example["label"] for example in judge.held_out])
        images = judge.unit(np.stack([example["image"] for example in judge.held_out]))
        reconstruct = nnx.jit(lambda tokenizer, images: tokenizer(images).reconstruction)
        reconstructed = judge.unit(reconstruct(tokenizer, np.stack([e["image"] for e in judge.held_out])))
        results["references"]["(held-out pictures)"] = asdict(judge.figures(images, labels)[0])
        results["references"]["(the same, reconstructed)"] = asdict(judge.figures(reconstructed, labels)[0])
        save()

    for name in arguments.variants:
        if name in results["variants"]:
            continue
        folder = out / slug(name)
        held_out = train_variant(config, VARIANTS[name], workdir, folder)
        gpt, of_gpt = load_model(folder / "generator" / "model", "gpt")
        model = CondVisualGPT(tokenizer, gpt, class_names=of_gpt["class_names"], value_range=metadata["value_range"])
        labels, ways = model.labels(range(len(model.class_names)), arguments.num), []
        for number, way in enumerate(progress(WAYS[name], f"sampling {name}")):
            drawing = Drawing.of(**(asdict(generator_stage.drawing_of(config, config.seed)) | {"guidance": 1.0} | way))
            samples = Samples.joined(list(model.draw(labels, drawing)))
            figures, nearest = judge.figures(samples.images, labels)
            ways.append({"drawing": way, "figures": asdict(figures)})
            first = np.concatenate([np.flatnonzero(labels == label)[:SHOWN] for label in np.unique(labels)])
            beside = np.stack([samples.images[first], judge.training[nearest[first]]], axis=1)
            pictures = enlarge(
                to_uint8(beside.reshape(-1, *beside.shape[2:]), (0, 1)), scale_for(tokenizer.image_size, 96)
            )
            save_png(make_grid(pictures, 2 * SHOWN, row_names=model.class_names), folder / f"nearest_{number}.png")
        results["variants"][name] = {"held_out": held_out, "ways": ways}
        save()
    print((out / "table.md").read_text(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
