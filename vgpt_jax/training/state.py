"""The state of a training run: one pytree that is donated, sharded, saved and restored as a whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax import Array
from jax.sharding import Mesh, Sharding

from vgpt_jax.errors import UserError
from vgpt_jax.training.saved_model import load_model
from vgpt_jax.training.sharding import of_state, put, replicated


@struct.dataclass
class TrainState:
    """Everything a step reads and writes.

    Attributes:
      step: int32 scalar, steps done.
      params: what gradients move.
      buffers: what else the model holds (codebook counters, statistics).
      opt_state: the optimizer's.
      key: ``[2]`` uint32, the base of all randomness; a step folds its number into it.
      averages: moving average of ``params``, for evaluation and for the model that is saved; None: these are ``params``.
      skipped: int32 scalar, steps so far whose gradients were not finite.
      skipped_in_a_row: int32 scalar, those since the last step that was taken.
    """

    step: Array
    params: nnx.State
    buffers: nnx.State
    opt_state: Any
    key: Array
    averages: nnx.State | None
    skipped: Array
    skipped_in_a_row: Array

    def step_key(self) -> Array:
        """The PRNG key of this step."""
        return jax.random.fold_in(jax.random.wrap_key_data(self.key), self.step)


def create_state(
    model: nnx.Module, optimizer: optax.GradientTransformation, seed: int, *, averaged: bool = False
) -> tuple[nnx.GraphDef, TrainState]:
    """Splits a fresh model into its graph and the state of step 0. Works under ``jax.eval_shape``.

    Args:
      model: fresh.
      optimizer: of its parameters.
      seed: of all randomness of the steps.
      averaged: keep the moving average of the parameters (`update_averages`).
    """
    graph, params, buffers = nnx.split(model, nnx.Param, ...)
    return graph, TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        buffers=buffers,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(jax.random.key(seed)),
        averages=jax.tree.map(jnp.copy, params) if averaged else None,
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
    )


def apply_gradients(state: TrainState, gradients: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """One update of the parameters; counts the step."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)


def update_averages(state: TrainState, decay: float) -> TrainState:
    """Moves the averages towards the parameters, by ``1 - decay``, and faster at first: by at least ``9 / (step + 10)``."""
    decay = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
    averages = jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, state.averages, state.params)
    return state.replace(averages=averages)


def skip_if_not_finite(before: TrainState, after: TrainState, *values: Array) -> TrainState:
    """``after``, or, where a value is not finite, ``before`` with the step counted as done and as skipped.

    Args:
      before: the state that the step was given.
      after: the state that it made.
      *values: scalars that are not finite if any gradient is not, such as norms.
    """
    finite = jnp.all(jnp.isfinite(jnp.stack(values)))
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), after, before)
    bad = 1 - finite.astype(jnp.int32)
    return kept.replace(
        step=after.step, skipped=before.skipped + bad, skipped_in_a_row=(before.skipped_in_a_row + 1) * bad
    )


def merge_model(graph: nnx.GraphDef, state: TrainState) -> nnx.Module:
    """The model with the state's parameters and buffers: what is trained. Its variables are copies, so that what is written
    to them leaves the state as it was."""
    return nnx.merge(graph, state.params, state.buffers, copy=True)


def averaged_model(graph: nnx.GraphDef, state: TrainState) -> nnx.Module:
    """The model with the averaged parameters where there are any: what is evaluated and saved."""
    return nnx.merge(graph, state.params if state.averages is None else state.averages, state.buffers, copy=True)


def planned_state(
    make: Callable[[], tuple[nnx.GraphDef, TrainState]], mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState, Callable[[], TrainState]]:
    """A state as it will be on the mesh, whose devices need not be here, and what makes it there.

    Args:
      make: makes the model's graph and the state of step 0; traced.
      mesh: devices.

    Returns:
      The graph; the state's shapes with their shardings; and a function that gives the state itself.
    """
    graph, shapes = jax.eval_shape(make)
    shardings = of_state(mesh, shapes)
    return graph, abstract(shapes, shardings), jax.jit(lambda: make()[1], out_shardings=shardings)


def abstract(tree: Any, shardings: Any) -> Any:
    """Arrays or shapes as shapes with shardings, one or a tree of them."""
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def planned_model_state(
    build: Callable[[nnx.Rngs], nnx.Module],
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    *,
    averaged: bool = False,
) -> tuple[nnx.GraphDef, TrainState, Callable[[], TrainState]]:
    """`planned_state` of the `create_state` of ``build(rngs)``."""
    return planned_state(lambda: create_state(build(nnx.Rngs(seed)), optimizer, seed, averaged=averaged), mesh)


def create_sharded_state(*args: Any, **options: Any) -> tuple[nnx.GraphDef, TrainState]:
    """The graph and the state of `planned_model_state`, which is given the same, made on the mesh."""
    graph, _, create = planned_model_state(*args, **options)
    return graph, create()


def compiled_step(step: Callable, state: TrainState, mesh: Mesh) -> Callable:
    """A pure step, jitted: it donates its state and leaves the next one where it was; metrics are on every device.

    Args:
      step: ``(state, batch, frozen) -> (state, metrics)``.
      state: with shardings, abstract or not.
      mesh: devices.
    """
    of_next = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(of_next, replicated(mesh)))


def start_from(
    state: TrainState,
    directory: str,
    kind: str,
    mesh: Mesh,
    adapt: Callable[[nnx.State, nnx.State, dict[str, Any]], nnx.State] | None = None,
) -> TrainState:
    """Puts the weights of a trained model into the state of step 0, if ``directory`` is not "".

    Args:
      state: of a model that was built as that one was.
      directory: of the trained model.
      kind: of model.
      mesh: where the state is.
      adapt: ``(its parameters, those of the state, its metadata)`` to parameters of the state's shapes.

    Raises:
      UserError: there is no such model, or its weights are of other shapes.
    """
    if not directory:
        return state
    model, metadata = load_model(Path(directory), kind, lambda weights: of_state(mesh, weights))
    _, params, buffers = nnx.split(model, nnx.Param, ...)
    if adapt is not None:
        params = adapt(params, state.params, metadata)
    for mine, there in ((state.params, params), (state.buffers, buffers)):
        shapes = [
            {jax.tree_util.keystr(p): x.shape for p, x in jax.tree.leaves_with_path(tree)} for tree in (mine, there)
        ]
        other = [name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)]
        if other:
            raise UserError(f"init_from {directory} holds a {kind} with other shapes: {', '.join(other[:5])}")
    params, buffers = (
        put(tree, jax.tree.map(lambda x: x.sharding, mine))
        for tree, mine in ((params, state.params), (buffers, state.buffers))
    )
    averages = None if state.averages is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, buffers=buffers, averages=averages)


def skip_counts(state: TrainState) -> dict[str, Array]:
    """The metrics on skipped steps that the loop expects of every step."""
    return {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
