"""The state of a training run: one pytree that is donated, sharded, saved and restored as a whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax import Array
from jax.sharding import Mesh

from vgpt_jax.errors import UserError
from vgpt_jax.training.saved_model import load_model
from vgpt_jax.training.sharding import replicated


@struct.dataclass
class TrainState:
    """Everything a step reads and writes.

    Attributes:
      step: int32 scalar, steps done.
      params: what gradients move.
      buffers: what else the model holds (codebook counters, statistics).
      opt_state: the optimizer's.
      key: ``[2]`` uint32, the base of all randomness; a step folds its number into it.
    """

    step: Array
    params: nnx.State
    buffers: nnx.State
    opt_state: Any
    key: Array

    def step_key(self) -> Array:
        """The PRNG key of this step."""
        return jax.random.fold_in(jax.random.wrap_key_data(self.key), self.step)


def create_state(
    model: nnx.Module, optimizer: optax.GradientTransformation, seed: int
) -> tuple[nnx.GraphDef, TrainState]:
    """Splits a fresh model into its graph and the state of step 0. Works under ``jax.eval_shape``."""
    graph, params, buffers = nnx.split(model, nnx.Param, ...)
    key = jax.random.key_data(jax.random.key(seed))
    return graph, TrainState(jnp.zeros((), jnp.int32), params, buffers, optimizer.init(params), key)


def apply_gradients(state: TrainState, gradients: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """One update of the parameters; counts the step."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)


def merge_model(graph: nnx.GraphDef, state: TrainState) -> nnx.Module:
    """The model with the state's parameters and buffers."""
    return nnx.merge(graph, state.params, state.buffers)


def create_replicated_state(
    build: Callable[[nnx.Rngs], nnx.Module], optimizer: optax.GradientTransformation, seed: int, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState]:
    """`create_state` of ``build(rngs)``, compiled, with a copy on every device of the mesh."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(seed))))
    create = jax.jit(lambda: create_state(build(nnx.Rngs(seed)), optimizer, seed)[1], out_shardings=replicated(mesh))
    return graph, create()


def start_from(state: TrainState, directory: str, kind: str, arguments: dict[str, Any], mesh: Mesh) -> TrainState:
    """Puts the weights of a trained model into the state of step 0, if ``directory`` is not "".

    Raises:
      UserError: there is no such model, or it was built with other arguments.
    """
    if not directory:
        return state
    model, metadata = load_model(Path(directory), kind, replicated(mesh))
    given, there = (json.loads(json.dumps(a)) for a in (arguments, metadata["arguments"]))
    other = [name for name in given | there if given.get(name) != there.get(name)]
    if other:
        raise UserError(
            f"init_from {directory} holds a {kind} with other {', '.join(other)}: make the config agree, or start from scratch"
        )
    _, params, buffers = nnx.split(model, nnx.Param, ...)
    return state.replace(params=params, buffers=buffers)
