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
from vgpt_jax.losses import RECONSTRUCTION_LOSSES
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.training.from_config import abstract_tokenizer, tokenizer_arguments
from vgpt_jax.training.optimizer import make_optimizer
from vgpt_jax.training.saved_model import save_model
from vgpt_jax.training.sharding import check_batch_size
from vgpt_jax.training.stage import Stage
from vgpt_jax.training.state import TrainState, apply_gradients, create_replicated_state, merge_model, start_from
from vgpt_jax.visualization.grid import enlarge, pairs_grid, scale_for

NUM_PICTURES = 16


def make_train_step(graph: nnx.GraphDef, optimizer: optax.GradientTransformation, reconstruction: str):
    """The pure step ``(state, batch) -> (state, metrics)``; ``batch["image"]`` is ``[B, H, W, 3]`` in the value range.

    Args:
      graph: of the tokenizer.
      optimizer: of its parameters.
      reconstruction: "l1" or "l2".
    """
    reconstruction_loss = RECONSTRUCTION_LOSSES[reconstruction]

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        dropout_key, surgery_key = jax.random.split(state.step_key())

        def total_loss(params):
            output = nnx.merge(graph, params, state.buffers)(batch["image"], dropout_key)
            losses = {"reconstruction": reconstruction_loss(output.reconstruction, batch["image"])}
            total = sum(losses.values()) + output.quantized.loss
            return total, (losses | output.quantized.losses, output.quantized)

        (total, (losses, quantized)), gradients = jax.value_and_grad(total_loss, has_aux=True)(state.params)
        state = apply_gradients(state, gradients, optimizer)

        tokenizer = merge_model(graph, state)
        tokenizer.quantizer.surgery(quantized, surgery_key)
        _, params, buffers = nnx.split(tokenizer, nnx.Param, ...)
        metrics = {"loss": total, **losses, "gradient_norm": optax.tree.norm(gradients)}
        return state.replace(params=params, buffers=buffers), metrics

    return train_step


def held_out_metrics(tokenizer: Tokenizer, batch: dict, value_range) -> dict:
    """Metrics of each example ``{name: [B]}``, and ``"counts"`` of its codes ``[B, K]``; images are clipped first."""
    low, high = value_range
    output = tokenizer(batch["image"])
    images, reconstruction = ((x.clip(low, high) - low) / (high - low) for x in (batch["image"], output.reconstruction))
    return {
        "psnr": psnr(reconstruction, images),
        "ssim": ssim(reconstruction, images),
        "l1": abs(reconstruction - images).mean(axis=(1, 2, 3)),
        "counts": code_counts(output.quantized.token_ids, tokenizer.num_codes),
    }


def plan(config, mesh: Mesh, num_classes: int) -> tuple[dict[str, Any], optax.GradientTransformation]:
    """The model's arguments and the optimizer; ``num_classes`` does not matter to this stage.

    Raises:
      UserError: the config is not sound; the message names the field. Nothing else is to be found out in training.
    """
    training = config.tokenizer_training
    check_batch_size(mesh, training.batch_size, "tokenizer_training.batch_size")
    choose("tokenizer_training.reconstruction", training.reconstruction, RECONSTRUCTION_LOSSES)
    check_range("data.image_size", config.data.image_size, least=SSIM_WINDOW)
    warm_up = abstract_tokenizer(config).quantizer.pretrain_steps
    if warm_up >= training.num_steps and not training.init_from:
        raise UserError(
            f"vector_quantize.pretrain_steps is {warm_up}, but tokenizer_training.num_steps only {training.num_steps}: "
            "the codebook would never be used"
        )
    return tokenizer_arguments(config), make_optimizer(num_steps=training.num_steps, **training.optimizer)


def build(config, mesh: Mesh, workdir: Path, sources: tuple[Any, Any]) -> Stage:
    """The tokenizer's stage, on a training and a held-out source.

    Raises:
      UserError: as `plan`.
    """
    training = config.tokenizer_training
    train_source, held_out = sources
    arguments, optimizer = plan(config, mesh, len(train_source.class_names))
    transform = make_transform(config.data)
    graph, state = create_replicated_state(lambda rngs: Tokenizer(**arguments, rngs=rngs), optimizer, config.seed, mesh)
    eval_sums = summed(lambda state, batch: held_out_metrics(merge_model(graph, state), batch, config.data.value_range))
    reconstruct = jax.jit(lambda state, images: merge_model(graph, state)(images).reconstruction)

    def evaluate(state: TrainState) -> Evaluation:
        batches = evaluation_batches(held_out, transform.evaluate, batch_size=training.batch_size)
        means = mean_over(eval_sums, state, batches, mesh)
        counts = means.pop("counts")
        scalars = {name: float(value) for name, value in means.items()}
        if not merge_model(graph, state).quantizer.is_warming_up():  # until then no code has been used
            scalars |= codebook_metrics(counts)
        picture = reconstructions(held_out, transform, lambda images: reconstruct(state, images))
        return Evaluation(scalars, {"reconstructions": picture})

    def finish(state: TrainState) -> None:
        save_model(
            workdir / "tokenizer" / "model",
            "tokenizer",
            merge_model(graph, state),
            arguments,
            value_range=list(config.data.value_range),
            data=config.data.to_dict(),
            steps=int(state.step),
        )

    return Stage(
        name="tokenizer",
        state=state,
        start=lambda state: start_from(state, training.init_from, "tokenizer", arguments, mesh),
        identity={"data": train_source.identity},
        train_step=jax.jit(make_train_step(graph, optimizer, training.reconstruction), donate_argnums=0),
        batches=training_batches(train_source, transform.train, batch_size=training.batch_size, seed=config.seed),
        num_steps=training.num_steps,
        evaluate=evaluate,
        finish=finish,
    )


def reconstructions(held_out: Any, transform: ImageTransform, reconstruct: Callable[[np.ndarray], Any]) -> np.ndarray:
    """A picture ``[H', W', 3]`` uint8 of held-out examples over what ``reconstruct`` makes of them, evenly spaced."""
    shown = np.linspace(0, len(held_out) - 1, min(NUM_PICTURES, len(held_out))).astype(int)
    originals = np.stack([transform.evaluate(held_out[int(i)])["image"] for i in shown])
    rows = (to_uint8(x, transform.value_range) for x in (originals, reconstruct(originals)))
    return pairs_grid(*(enlarge(row, scale_for(row.shape[1], 96)) for row in rows), columns=8)
