"""Stage 1: the tokenizer learns to reconstruct pictures through its codebook."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from vgpt_jax.data.datasets import make_transform
from vgpt_jax.data.loader import evaluation_batches, training_batches
from vgpt_jax.data.transforms import ImageTransform, to_uint8
from vgpt_jax.errors import UserError, check_range, choose
from vgpt_jax.evaluation.metrics import SSIM_WINDOW, code_counts, codebook_metrics, psnr, ssim
from vgpt_jax.evaluation.runner import Evaluation, mean_over, summed
from vgpt_jax.losses import ADVERSARIAL_LOSSES, RECONSTRUCTION_LOSSES
from vgpt_jax.models.perceptual import PERCEPTUAL
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.pretrained.load import load_perceptual, vgg16_is_here
from vgpt_jax.training.diff_augment import POLICIES
from vgpt_jax.training.from_config import (
    DISCRIMINATORS,
    abstract_tokenizer,
    check_training,
    discriminator_arguments,
    tokenizer_arguments,
)
from vgpt_jax.training.optimizer import make_optimizer
from vgpt_jax.training.saved_model import save_model
from vgpt_jax.training.sharding import local_rows, of_batches, replicate, replicated
from vgpt_jax.training.stage import Program, Stage
from vgpt_jax.training.state import (
    abstract,
    averaged_model,
    compiled_step,
    create_state,
    merge_model,
    planned_state,
    start_from,
)
from vgpt_jax.training.tokenizer_step import Adversary, DiscriminatorState, Recipe, TokenizerState, make_train_step
from vgpt_jax.visualization.grid import enlarge, pairs_grid, scale_for

NUM_PICTURES = 16


def held_out_metrics(tokenizer: Tokenizer, batch: dict, value_range, distances: dict[str, nnx.Module]) -> dict:
    """Metrics of each example ``{name: [B]}``, and ``"counts"`` of its codes ``[B, K]``; images are clipped first.

    Args:
      tokenizer: what is measured.
      batch: with "image" ``[B, H, W, 3]`` in ``value_range``.
      value_range: of the images.
      distances: perceptual distances (`perceptual_metrics`) by the name of the metric.
    """
    low, high = value_range
    output = tokenizer(batch["image"])
    pair = [x.clip(low, high) for x in (output.reconstruction, batch["image"])]
    reconstruction, images = ((x - low) / (high - low) for x in pair)
    return {
        "psnr": psnr(reconstruction, images),
        "ssim": ssim(reconstruction, images),
        "l1": abs(reconstruction - images).mean(axis=(1, 2, 3)),
        "counts": code_counts(output.quantized.token_ids, tokenizer.num_codes),
    } | {name: module.distance(*pair) for name, module in distances.items()}


def perceptual_metrics(config) -> dict[str, nnx.Module]:
    """The distances that are measured: "feature_distance" always, "lpips" where the VGG16 it needs is there."""
    found = {"feature_distance": load_perceptual("efficientnet", config.data.value_range)}
    if vgg16_is_here(config.perceptual.vgg_file):
        found["lpips"] = load_perceptual("lpips", config.data.value_range, vgg_file=config.perceptual.vgg_file)
    return found


def first_adversarial_step(start: float, num_steps: int) -> int:
    """Steps done before the discriminator begins: ``start`` itself, or below 1 that share of ``num_steps``."""
    check_range("adversarial.start", start, least=0)
    return int(start * num_steps) if start < 1 else int(start)


def plan_adversary(config) -> tuple[dict[str, Any], Adversary, int] | None:
    """The discriminator's arguments, how it takes part, and after how many steps; None where the config has none.

    Raises:
      UserError: the config is not sound; the message names the field.
    """
    section, training = config.adversarial.to_dict(), config.tokenizer_training
    name = section.pop("discriminator")
    if name == "none":
        return None
    arguments = discriminator_arguments(config, name)
    discriminator = nnx.eval_shape(lambda: DISCRIMINATORS[name](**arguments, rngs=nnx.Rngs(0)))
    choose("adversarial.loss", section["loss"], ADVERSARIAL_LOSSES)
    for field in ("weight", "max_adaptive_weight", "warmup_steps", "ramp_steps", "lecam_weight", "r1_weight"):
        check_range(f"adversarial.{field}", section[field], least=0)
    for policy in section["diff_augment"]:
        choose("an entry of adversarial.diff_augment", policy, POLICIES)
    first = first_adversarial_step(section.pop("start"), training.num_steps)
    if first >= training.num_steps:
        raise UserError(
            f"adversarial.start is step {first}, but tokenizer_training.num_steps only {training.num_steps}: let it start "
            'earlier (below 1 it is a share of the training), or set adversarial.discriminator="none"'
        )
    optimizer = make_optimizer(num_steps=training.num_steps - first, **section.pop("optimizer"))
    adversary = Adversary(
        graph=nnx.graphdef(discriminator),
        optimizer=optimizer,
        heard_from=first + section.pop("warmup_steps"),
        value_range=tuple(config.data.value_range),
        **section,
    )
    images = jax.ShapeDtypeStruct((2, config.data.image_size, config.data.image_size, 3), np.float32)
    nnx.eval_shape(lambda module, x: module(x), discriminator, images)
    return arguments, adversary, first


def plan(config, mesh: Mesh, num_classes: int, workdir: Path) -> tuple[dict[str, Any], optax.GradientTransformation]:
    """The model's arguments and the optimizer; ``num_classes`` and ``workdir`` do not matter to this stage.

    Raises:
      UserError: the config is not sound; the message names the field. Nothing else is to be found out in training.
    """
    training = config.tokenizer_training
    check_training(mesh, "tokenizer_training", config)
    choose("tokenizer_training.reconstruction", training.reconstruction, RECONSTRUCTION_LOSSES)
    check_range("data.image_size", config.data.image_size, least=SSIM_WINDOW)
    check_range("tokenizer_training.ema_decay", training.ema_decay, least=0, most=0.999999)
    check_range("perceptual.weight", config.perceptual.weight, least=0)
    choose("perceptual.name", config.perceptual.name, PERCEPTUAL | {"none": None})
    if config.perceptual.vgg_file and not Path(config.perceptual.vgg_file).expanduser().exists():
        raise UserError(f"perceptual.vgg_file is {config.perceptual.vgg_file!r}, but there is no such file or folder")
    plan_adversary(config)
    warm_up = abstract_tokenizer(config).quantizer.pretrain_steps
    if warm_up >= training.num_steps and not training.init_from:
        raise UserError(
            f"the warm start of {config.tokenizer.quantizer} takes {warm_up} steps, but tokenizer_training.num_steps is only "
            f"{training.num_steps}: the codebook would never be used"
        )
    return tokenizer_arguments(config), make_optimizer(num_steps=training.num_steps, **training.optimizer)


def program(config, mesh: Mesh, num_classes: int, workdir: Path) -> Program:
    """What the tokenizer's stage computes.

    Raises:
      UserError: as `plan`.
    """
    training, names = config.tokenizer_training, config.perceptual
    arguments, optimizer = plan(config, mesh, num_classes, workdir)
    planned = plan_adversary(config)

    def make() -> tuple[nnx.GraphDef, TokenizerState]:
        tokenizer = Tokenizer(**arguments, rngs=nnx.Rngs(config.seed))
        graph, state = create_state(tokenizer, optimizer, config.seed, averaged=training.ema_decay > 0)
        discriminator = None
        if planned:
            module = DISCRIMINATORS[config.adversarial.discriminator](**planned[0], rngs=nnx.Rngs(config.seed + 1))
            discriminator = DiscriminatorState.of(create_state(module, planned[1].optimizer, config.seed + 1)[1])
        return graph, TokenizerState(**vars(state), discriminator=discriminator)

    graph, state, create = planned_state(make, mesh)
    perceptual, frozen = None, None
    if names.name != "none":
        distance = lambda: PERCEPTUAL[names.name](value_range=config.data.value_range, rngs=nnx.Rngs(0))  # noqa: E731
        perceptual, frozen = nnx.split(nnx.eval_shape(distance))
        frozen = abstract(frozen, replicated(mesh))
    recipe = Recipe(
        graph,
        optimizer,
        training.reconstruction,
        perceptual,
        names.weight,
        training.ema_decay,
        training.remat,
        training.accumulate,
        mesh,
    )
    steps = {0: make_train_step(recipe)}
    if planned:
        steps[planned[2]] = make_train_step(recipe, planned[1])
    size = config.data.image_size
    batch = {
        "image": jax.ShapeDtypeStruct((training.batch_size, size, size, 3), np.float32, sharding=of_batches(mesh)),
        "label": jax.ShapeDtypeStruct((training.batch_size,), np.int32, sharding=of_batches(mesh)),
    }
    compiled = {first: compiled_step(step, state, mesh) for first, step in steps.items()}
    return Program(arguments, graph, state, frozen, batch, compiled, create)


def build(config, mesh: Mesh, workdir: Path, sources: tuple[Any, Any]) -> Stage:
    """The tokenizer's stage, on a training and a held-out source.

    Raises:
      UserError: as `plan`.
    """
    training, named = config.tokenizer_training, config.perceptual
    train_source, held_out = sources
    planned = program(config, mesh, len(train_source.class_names), workdir)
    graph, arguments, transform = planned.graph, planned.arguments, make_transform(config.data)
    frozen = None
    if named.name != "none":
        distance = load_perceptual(named.name, config.data.value_range, vgg_file=named.vgg_file)
        frozen = replicate(mesh, nnx.state(distance))
    rows = local_rows(mesh, training.batch_size)

    metric_graph, metric_state = nnx.split(perceptual_metrics(config))
    metric_state = replicate(mesh, metric_state)
    eval_sums = summed(
        lambda states, batch: held_out_metrics(
            averaged_model(graph, states[0]), batch, config.data.value_range, nnx.merge(metric_graph, states[1])
        )
    )
    reconstruct = jax.jit(
        lambda state, images: averaged_model(graph, state)(images).reconstruction, out_shardings=replicated(mesh)
    )

    def evaluate(state: TokenizerState) -> Evaluation:
        batches = evaluation_batches(held_out, transform.evaluate, batch_size=training.batch_size, rows=rows)
        means = mean_over(eval_sums, (state, metric_state), batches, mesh)
        counts = means.pop("counts")
        scalars = {name: float(value) for name, value in means.items()}
        if not merge_model(graph, state).quantizer.is_warming_up():  # until then no code has been used
            scalars |= codebook_metrics(counts)
        picture = reconstructions(held_out, transform, lambda images: reconstruct(state, images))
        return Evaluation(scalars, {"reconstructions": picture})

    def finish(state: TokenizerState) -> None:
        save_model(
            workdir / "tokenizer" / "model",
            "tokenizer",
            averaged_model(graph, state),
            arguments,
            value_range=list(config.data.value_range),
            data=config.data.to_dict(),
            steps=int(state.step),
        )

    return Stage(
        name="tokenizer",
        state=planned.create(),
        start=lambda state: start_from(state, training.init_from, "tokenizer", mesh),
        identity={"data": train_source.identity},
        train_steps=planned.train_steps,
        frozen=frozen,
        batches=training_batches(
            train_source, transform.train, batch_size=training.batch_size, seed=config.seed, rows=rows
        ),
        batch_size=training.batch_size,
        num_steps=training.num_steps,
        evaluate=evaluate,
        best=("psnr", "greatest"),
        finish=finish,
    )


def reconstructions(held_out: Any, transform: ImageTransform, reconstruct: Callable[[np.ndarray], Any]) -> np.ndarray:
    """A picture ``[H', W', 3]`` uint8 of held-out examples over what ``reconstruct`` makes of them, evenly spaced."""
    shown = np.linspace(0, len(held_out) - 1, min(NUM_PICTURES, len(held_out))).astype(int)
    originals = np.stack([transform.evaluate(held_out[int(i)])["image"] for i in shown])
    rows = (to_uint8(x, transform.value_range) for x in (originals, reconstruct(originals)))
    return pairs_grid(*(enlarge(row, scale_for(row.shape[1], 96)) for row in rows), columns=8)
