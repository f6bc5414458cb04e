"""Stage 3: the classifier learns the classes of the same pictures; it scores samples."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from vgpt_jax.data.datasets import make_transform
from vgpt_jax.data.loader import evaluation_batches, training_batches
from vgpt_jax.errors import check_range
from vgpt_jax.evaluation.runner import Evaluation, mean_over, summed
from vgpt_jax.losses import cross_entropy
from vgpt_jax.models.classifier import ConvClassifier
from vgpt_jax.training.from_config import check_training, classifier_arguments
from vgpt_jax.training.optimizer import make_optimizer
from vgpt_jax.training.remat import economical, in_parts
from vgpt_jax.training.saved_model import save_model
from vgpt_jax.training.sharding import local_rows, of_batches
from vgpt_jax.training.stage import Program, Stage
from vgpt_jax.training.state import (
    TrainState,
    apply_gradients,
    compiled_step,
    merge_model,
    planned_model_state,
    skip_counts,
    skip_if_not_finite,
    start_from,
)


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    *,
    label_smoothing: float,
    remat: str = "none",
    accumulate: int = 1,
):
    """The pure step ``(state, batch, frozen) -> (state, metrics)``; the batch has ``image`` ``[B, H, W, 3]`` in the value range
    and ``label`` ``[B]``, ``frozen`` is None. ``remat`` and ``accumulate`` are those of the generator's step."""

    def train_step(state: TrainState, batch: dict, frozen: None = None) -> tuple[TrainState, dict]:
        def of_part(part: dict, key: jax.Array):
            def loss(params):
                logits = nnx.merge(graph, params, state.buffers)(part["image"], key)
                return jnp.mean(cross_entropy(logits, part["label"], label_smoothing)), logits

            (value, logits), gradients = jax.value_and_grad(economical(loss, remat, mesh), has_aux=True)(state.params)
            return (value, jnp.mean(jnp.argmax(logits, axis=-1) == part["label"]), gradients), ()

        (value, accuracy, gradients), _ = in_parts(of_part, batch, state.step_key(), accumulate, mesh)
        norm = optax.tree.norm(gradients)
        state = skip_if_not_finite(state, apply_gradients(state, gradients, optimizer), value, norm)
        metrics = {"cross_entropy": value, "accuracy": accuracy, "gradient_norm": norm}
        return state, metrics | skip_counts(state)

    return train_step


def held_out_metrics(classifier: ConvClassifier, batch: dict) -> dict:
    """``{"cross_entropy": [B], "accuracy": [B]}``, without label smoothing."""
    logits = classifier(batch["image"])
    hits = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
    return {"cross_entropy": cross_entropy(logits, batch["label"]), "accuracy": hits}


def plan(config, mesh: Mesh, num_classes: int, workdir: Path) -> tuple[dict[str, Any], optax.GradientTransformation]:
    """The model's arguments and the optimizer; ``workdir`` does not matter to this stage.

    Raises:
      UserError: the config is not sound; the message names the field.
    """
    training = config.classifier_training
    check_training(mesh, "classifier_training", config)
    check_range("classifier_training.label_smoothing", training.label_smoothing, least=0, most=0.99)
    arguments = classifier_arguments(config, num_classes)
    images = jax.ShapeDtypeStruct((1, config.data.image_size, config.data.image_size, 3), jnp.float32)
    nnx.eval_shape(lambda x: ConvClassifier(**arguments, rngs=nnx.Rngs(0))(x), images)
    return arguments, make_optimizer(num_steps=training.num_steps, **training.optimizer)


def program(config, mesh: Mesh, num_classes: int, workdir: Path) -> Program:
    """What the classifier's stage computes.

    Raises:
      UserError: as `plan`.
    """
    training = config.classifier_training
    arguments, optimizer = plan(config, mesh, num_classes, workdir)
    graph, state, create = planned_model_state(
        lambda rngs: ConvClassifier(**arguments, rngs=rngs), optimizer, config.seed, mesh
    )
    options = {name: training[name] for name in ("label_smoothing", "remat", "accumulate")}
    step = compiled_step(make_train_step(graph, optimizer, mesh, **options), state, mesh)
    size, over = config.data.image_size, of_batches(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((training.batch_size, size, size, 3), jnp.float32, sharding=over),
        "label": jax.ShapeDtypeStruct((training.batch_size,), jnp.int32, sharding=over),
    }
    return Program(arguments, graph, state, None, batch, {0: step}, create)


def build(config, mesh: Mesh, workdir: Path, sources: tuple[Any, Any]) -> Stage:
    """The classifier's stage, on a training and a held-out source.

    Raises:
      UserError: as `plan`.
    """
    training = config.classifier_training
    train_source, held_out = sources
    planned = program(config, mesh, len(train_source.class_names), workdir)
    graph, transform, rows = planned.graph, make_transform(config.data), local_rows(mesh, training.batch_size)
    eval_sums = summed(lambda state, batch: held_out_metrics(merge_model(graph, state), batch))

    def evaluate(state: TrainState) -> Evaluation:
        batches = evaluation_batches(held_out, transform.evaluate, batch_size=training.batch_size, rows=rows)
        means = mean_over(eval_sums, state, batches, mesh)
        return Evaluation({name: float(value) for name, value in means.items()})

    def finish(state: TrainState) -> None:
        save_model(
            workdir / "classifier" / "model",
            "classifier",
            merge_model(graph, state),
            planned.arguments,
            class_names=list(train_source.class_names),
            steps=int(state.step),
        )

    return Stage(
        name="classifier",
        state=planned.create(),
        start=lambda state: start_from(state, training.init_from, "classifier", mesh),
        identity={"data": train_source.identity},
        train_steps=planned.train_steps,
        frozen=None,
        batches=training_batches(
            train_source, transform.train, batch_size=training.batch_size, seed=config.seed, rows=rows
        ),
        batch_size=training.batch_size,
        num_steps=training.num_steps,
        evaluate=evaluate,
        best=("cross_entropy", "least"),
        finish=finish,
    )
