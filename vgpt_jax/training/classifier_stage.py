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
from vgpt_jax.training.from_config import classifier_arguments
from vgpt_jax.training.optimizer import make_optimizer
from vgpt_jax.training.saved_model import save_model
from vgpt_jax.training.sharding import check_batch_size
from vgpt_jax.training.stage import Stage
from vgpt_jax.training.state import (
    TrainState,
    apply_gradients,
    create_replicated_state,
    merge_model,
    skip_counts,
    skip_if_not_finite,
    start_from,
)


def make_train_step(graph: nnx.GraphDef, optimizer: optax.GradientTransformation, label_smoothing: float):
    """The pure step; the batch has ``image`` ``[B, H, W, 3]`` in the value range and ``label`` ``[B]``."""

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        def loss(params):
            logits = nnx.merge(graph, params, state.buffers)(batch["image"], state.step_key())
            return jnp.mean(cross_entropy(logits, batch["label"], label_smoothing)), logits

        (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"])
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
    check_batch_size(mesh, training.batch_size, "classifier_training.batch_size")
    check_range("classifier_training.label_smoothing", training.label_smoothing, least=0, most=0.99)
    arguments = classifier_arguments(config, num_classes)
    images = jax.ShapeDtypeStruct((1, config.data.image_size, config.data.image_size, 3), jnp.float32)
    nnx.eval_shape(lambda x: ConvClassifier(**arguments, rngs=nnx.Rngs(0))(x), images)
    return arguments, make_optimizer(num_steps=training.num_steps, **training.optimizer)


def build(config, mesh: Mesh, workdir: Path, sources: tuple[Any, Any]) -> Stage:
    """The classifier's stage, on a training and a held-out source.

    Raises:
      UserError: as `plan`.
    """
    training = config.classifier_training
    train_source, held_out = sources
    arguments, optimizer = plan(config, mesh, len(train_source.class_names), workdir)
    transform = make_transform(config.data)
    graph, state = create_replicated_state(
        lambda rngs: ConvClassifier(**arguments, rngs=rngs), optimizer, config.seed, mesh
    )
    eval_sums = summed(lambda state, batch: held_out_metrics(merge_model(graph, state), batch))

    def evaluate(state: TrainState) -> Evaluation:
        batches = evaluation_batches(held_out, transform.evaluate, batch_size=training.batch_size)
        means = mean_over(eval_sums, state, batches, mesh)
        return Evaluation({name: float(value) for name, value in means.items()})

    def finish(state: TrainState) -> None:
        save_model(
            workdir / "classifier" / "model",
            "classifier",
            merge_model(graph, state),
            arguments,
            class_names=list(train_source.class_names),
            steps=int(state.step),
        )

    return Stage(
        name="classifier",
        state=state,
        start=lambda state: start_from(state, training.init_from, "classifier", mesh),
        identity={"data": train_source.identity},
        train_steps={0: jax.jit(make_train_step(graph, optimizer, training.label_smoothing), donate_argnums=0)},
        batches=training_batches(train_source, transform.train, batch_size=training.batch_size, seed=config.seed),
        num_steps=training.num_steps,
        evaluate=evaluate,
        finish=finish,
    )
