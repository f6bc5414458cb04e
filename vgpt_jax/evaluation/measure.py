"""Measures what a folder holds: a finished training, or models that were converted; whatever of the three there is."""

import collections
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vgpt_jax.data.datasets import load_sources, make_transform
from vgpt_jax.data.loader import evaluation_batches
from vgpt_jax.data.token_cache import TokenSource, read_token_cache
from vgpt_jax.data.transforms import to_uint8
from vgpt_jax.errors import UserError, choose
from vgpt_jax.evaluation.frechet import FeatureStatistics, feature_statistics, frechet_distance
from vgpt_jax.evaluation.metrics import codebook_metrics
from vgpt_jax.evaluation.runner import mean_over, summed
from vgpt_jax.models.preprocessed import Preprocessed
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.pretrained.efficientnet_lite0 import PREPROCESSING, load_efficientnet_lite0
from vgpt_jax.pretrained.inception import load_inception
from vgpt_jax.sampling.class_names import class_key, shown_name
from vgpt_jax.sampling.cond_visual_gpt import encode
from vgpt_jax.sampling.program import ClassifierScore
from vgpt_jax.sampling.rerank import ClassConditionedRejectionSampler
from vgpt_jax.training import classifier_stage, generator_stage, tokenizer_stage
from vgpt_jax.training.processes import progress_once
from vgpt_jax.training.saved_model import load_model
from vgpt_jax.training.sharding import (
    local_rows,
    make_mesh,
    num_shards,
    on_every_host,
    place_on,
    replicate,
    shard_batch,
)
from vgpt_jax.visualization.grid import enlarge, make_grid, scale_for

BATCH_SIZE = 32
CLASSES_SHOWN = 12
FRECHET = ("none", "efficientnet", "inception")


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
      num: pictures drawn of each class.
      accept_n: candidates for each.
      seed: of the sampling.
      classifier: that chooses among them, as `load_reranker` takes it; None: the folder's own where there is one.
      frechet: network of the Fréchet distances, one of ``FRECHET``.
      inception_file: of Inception: its file or folder; "": the cache folder, or else it is fetched.
    """

    num: int
    accept_n: int
    seed: int
    classifier: str | None = None
    frechet: str = "none"
    inception_file: str = ""


@dataclass(frozen=True)
class Measured:
    """Figures by name, pictures ``[H, W, 3]`` uint8 by name, and what could not be measured and why."""

    figures: dict[str, float]
    pictures: dict[str, np.ndarray]
    left_out: list[str]


def measure(workdir: Path, config, request: Request) -> Measured:
    """All figures of a folder, on the held-out part of a config's data.

    Images are of the size and range of the tokenizer in the folder, whatever the config says.

    Raises:
      UserError: there is no tokenizer, the parts do not fit each other, or the data is not there.
    """
    choose("--frechet", request.frechet, dict.fromkeys(FRECHET))
    mesh = make_mesh()
    tokenizer, metadata = load_model(workdir / "tokenizer" / "model", "tokenizer")
    size = tokenizer.image_size
    resize_size = math.ceil(config.data.resize_size * size / config.data.image_size)  # the same share is cut off
    config.data.update(image_size=size, resize_size=resize_size, value_range=tuple(metadata["value_range"]))
    run = _Run(mesh, config, tokenizer, load_sources(config.data), make_transform(config.data))
    embed = _feature_network(request)
    figures, left_out = _of_tokenizer(run, embed), []
    graph, state = nnx.split(tokenizer)
    reconstruct = jax.jit(lambda images: nnx.merge(graph, state)(images).reconstruction)
    pictures = {"reconstructions": tokenizer_stage.reconstructions(run.held_out, run.transform, reconstruct)}
    if not (workdir / "generator" / "model").is_dir():
        return Measured(figures, pictures, ["the generator and its samples: there is none"])

    sampler, accept_n = _sampler(run, workdir, request)
    training_tokens, held_out_tokens = _tokens(run, workdir, metadata["fingerprint"])
    figures |= _codes(run.tokenizer, training_tokens, held_out_tokens)
    labels = _labels_of(sampler.model.class_names, run.held_out.class_names)
    if labels is None:
        left_out.append(
            "the generator's nats and the classifier's accuracy: the data has classes that it does not know"
        )
    else:
        figures |= _of_generator(run, sampler, training_tokens, _relabelled(held_out_tokens, labels))
        if sampler.score is not None:
            figures["classifier/accuracy"] = _accuracy(run, sampler, labels)
    if sampler.score is None and request.classifier is None:
        left_out.append("scores: there is no classifier that knows all classes (--classifier)")
    sampled, grid = _of_samples(run, sampler, accept_n, request, embed)
    return Measured(figures | sampled, pictures | {"samples": grid}, left_out)


@dataclass(frozen=True)
class _Run:
    mesh: Mesh
    config: Any
    tokenizer: Tokenizer
    sources: tuple[Any, Any]
    transform: Any

    @property
    def held_out(self) -> Any:
        return self.sources[1]

    def batches(self, source: Any, view: Callable | None = None) -> Iterator[dict]:
        size = BATCH_SIZE * num_shards(self.mesh)
        rows = local_rows(self.mesh, size)
        return evaluation_batches(source, view or self.transform.evaluate, batch_size=size, rows=rows)

    def means(self, modules: Any, metrics: Callable, source: Any, view: Callable | None = None) -> dict[str, float]:
        """The means over a source of ``metrics(modules, batch)``."""
        graph, state = nnx.split(modules)
        sums = summed(lambda state, batch: metrics(nnx.merge(graph, state), batch))
        return mean_over(sums, replicate(self.mesh, state), self.batches(source, view), self.mesh)

    def statistics(self, modules: Any, features: Callable, batches: Iterator[dict]) -> FeatureStatistics:
        """Of ``features(modules, batch)``."""
        graph, state = nnx.split(modules)
        of_state = lambda state, batch: features(nnx.merge(graph, state), batch)  # noqa: E731
        return feature_statistics(of_state, replicate(self.mesh, state), batches, self.mesh)

    def unit(self, images: Any) -> Any:
        """Images in the tokenizer's range to 0..1, clipped."""
        low, high = self.config.data.value_range
        return (images.clip(low, high) - low) / (high - low)


def _of_tokenizer(run: _Run, embed: nnx.Module | None) -> dict[str, float]:
    value_range = run.config.data.value_range
    found = run.means(
        (run.tokenizer, tokenizer_stage.perceptual_metrics(run.config)),
        lambda m, batch: tokenizer_stage.held_out_metrics(m[0], batch, value_range, m[1]),
        run.held_out,
    )
    names = {"psnr": "psnr_db"} | {name: name for name in ("ssim", "l1", "feature_distance", "lpips")}
    figures = {f"tokenizer/{ours}": found[name] for name, ours in names.items() if name in found}
    figures |= {f"tokenizer/held_out_{name}": value for name, value in codebook_metrics(found["counts"]).items()}
    if embed is not None:
        before = run.statistics(embed, lambda m, batch: m(run.unit(batch["image"])), run.batches(run.held_out))
        after = run.statistics(
            (embed, run.tokenizer),
            lambda m, batch: m[0](run.unit(m[1](batch["image"]).reconstruction)),
            run.batches(run.held_out),
        )
        figures |= {"tokenizer/frechet": _distance(before, after), "tokenizer/frechet_pictures": before.count}
    return figures


def _tokens(run: _Run, workdir: Path, fingerprint: str) -> tuple[TokenSource | None, TokenSource]:
    """The token cache; or, where there is none, the held-out part encoded now."""
    if (workdir / "token_cache").is_dir():
        return read_token_cache(workdir / "token_cache", fingerprint=fingerprint)
    graph, state = nnx.split(place_on(run.mesh, run.tokenizer))
    ids, labels = [], []
    for local in run.batches(run.held_out):
        batch = shard_batch(run.mesh, local)
        found, of_batch, mask = on_every_host((encode(graph, state, batch["image"]), batch["label"], batch["mask"]))
        ids.append(found[mask])
        labels.append(of_batch[mask])
    ids = np.concatenate(ids)
    return None, TokenSource((ids.reshape(1, len(ids), -1),), np.concatenate(labels), run.held_out.class_names)


def _codes(tokenizer: Tokenizer, training: TokenSource | None, held_out: TokenSource) -> dict[str, float]:
    figures = {}
    for part, source in (("held_out", held_out), ("training", training)):
        if source is not None:
            metrics = codebook_metrics(source.counts(tokenizer.num_codes))
            figures |= {f"tokenizer/{part}_{name}": value for name, value in metrics.items()}
    return figures


def _labels_of(class_names: tuple[str, ...], of_data: tuple[str, ...]) -> np.ndarray | None:
    """The generator's label of each class of the data, ``[C]`` int32; None where it does not know one."""
    known = {class_key(name): i for i, name in reversed(list(enumerate(class_names)))}
    found = [known.get(class_key(name)) for name in of_data]
    return None if None in found else np.array(found, np.int32)


def _relabelled(tokens: TokenSource, labels: np.ndarray) -> TokenSource:
    return TokenSource(tokens.shards, labels[tokens.labels], tokens.class_names)


def _of_generator(
    run: _Run, sampler: ClassConditionedRejectionSampler, training: TokenSource | None, held_out: TokenSource
) -> dict[str, float]:
    found = run.means(sampler.model.gpt, generator_stage.held_out_metrics, held_out, lambda example: example)
    nats = found["nats_per_token"]
    unigram = generator_stage.unigram_nats(held_out if training is None else training, run.tokenizer.num_codes)
    return {f"generator/{name}": value for name, value in found.items()} | {
        "generator/bits_per_token": nats / math.log(2),
        "generator/unigram_nats": unigram,
        "generator/share_below_unigram": 1 - nats / unigram,
    }


def _accuracy(run: _Run, sampler: ClassConditionedRejectionSampler, labels: np.ndarray) -> float:
    """Of the classifier, as far as it knows the generator's classes."""
    if sampler.matches is None:
        own = run.means(sampler.classifier, classifier_stage.held_out_metrics, run.held_out)
        return own["accuracy"]

    def hits(score: ClassifierScore, batch: dict) -> dict:
        scores = score.class_scores(run.unit(batch["image"]))
        return {"accuracy": (jnp.argmax(scores, axis=-1) == labels[batch["label"]]).astype(jnp.float32)}

    return run.means(sampler.score, hits, run.held_out)["accuracy"]


def _sampler(run: _Run, workdir: Path, request: Request) -> tuple[ClassConditionedRejectionSampler, int]:
    """What draws, and of how many candidates it keeps the best.

    Where no classifier was asked for, none is there, and the one that is installed does not know all classes, nothing chooses.
    """
    sampler = ClassConditionedRejectionSampler.from_pretrained(workdir, run.mesh, request.classifier)
    if request.classifier is None and sampler.matches is not None and not sampler.matches.any(axis=1).all():
        sampler = ClassConditionedRejectionSampler(sampler.model, None)
    return sampler, 1 if sampler.score is None and request.classifier is None else request.accept_n


def _of_samples(
    run: _Run, sampler: ClassConditionedRejectionSampler, accept_n: int, request: Request, embed: nnx.Module | None
) -> tuple[dict[str, float], np.ndarray]:
    """Figures of samples of every class, and those of the first classes in a grid. Pictures come and go in batches."""
    model = sampler.model
    labels = model.labels(range(len(model.class_names)), request.num)
    names = [shown_name(name) for name in model.class_names[:CLASSES_SHOWN]]
    drawing = generator_stage.drawing_of(run.config, request.seed)
    shown, candidate_scores = [], []
    begun = time.monotonic()

    def batches() -> Iterator[dict]:
        left = len(names) * request.num
        draw = sampler.draw(labels, drawing, accept_n=accept_n)
        for samples in draw:
            shown.append(to_uint8(samples.images[: max(left, 0)], (0, 1)))
            left -= len(shown[-1])
            if samples.scores is not None:
                candidate_scores.append(samples.candidate_scores)
            padding = -len(samples.images) % num_shards(run.mesh)
            mask = np.arange(len(samples.images) + padding) < len(samples.images)
            images = np.pad(samples.images, ((0, padding), (0, 0), (0, 0), (0, 0)), mode="edge")
            mine = local_rows(run.mesh, len(images))
            yield {"image": images[mine], "mask": mask[mine]}

    figures = {"sampling/accept_n": accept_n, "sampling/candidates": len(labels) * accept_n}
    drawn = progress_once(batches(), f"drawing {len(labels):,} pictures, batches")
    if embed is None:
        collections.deque(drawn, maxlen=0)
        figures["sampling/seconds"] = time.monotonic() - begun
    else:
        of_samples = run.statistics(embed, lambda m, batch: m(batch["image"]), drawn)
        figures["sampling/seconds"] = time.monotonic() - begun
        real = run.statistics(embed, lambda m, batch: m(run.unit(batch["image"])), run.batches(run.sources[0]))
        figures |= {"sampling/frechet": _distance(real, of_samples), "sampling/frechet_pictures": of_samples.count}
    if candidate_scores:
        scores = np.concatenate(candidate_scores)
        figures |= {"sampling/score_of_one": scores.mean(), "sampling/score_of_best": scores.max(axis=1).mean()}
    pictures = enlarge(np.concatenate(shown), scale_for(model.tokenizer.image_size, 96))
    return figures, make_grid(pictures, request.num, row_names=names)


def _feature_network(request: Request) -> nnx.Module | None:
    """Images ``[B, H, W, 3]`` in 0..1 to features ``[B, D]``."""
    if request.frechet == "inception":
        return load_inception(request.inception_file)
    if request.inception_file:
        raise UserError("--inception_file is for --frechet inception")
    if request.frechet == "efficientnet":
        network = load_efficientnet_lite0()
        size = PREPROCESSING["image_size"]
        return Preprocessed(_Embedding(network), **PREPROCESSING | {"resize_size": size})
    return None


class _Embedding(nnx.Module):
    """What a classifier makes its logits of."""

    def __init__(self, network: nnx.Module):
        self.network = network

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.network.embed(x)


def _distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    return frechet_distance(one.mean, one.covariance, other.mean, other.covariance)
