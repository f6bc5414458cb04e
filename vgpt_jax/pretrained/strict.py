"""The strict loader: every tensor of a foreign checkpoint goes somewhere, and every variable of ours is filled."""

from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vgpt_jax.errors import UserError

Module = TypeVar("Module", bound=nnx.Module)

Table = Mapping[str, tuple[Callable[..., np.ndarray], tuple[str, ...]]]
"""For each of our variables, by its path ("blocks.0.project.kernel"): a function, and the names of the tensors that it is
given."""


def conv_kernel(tensor: np.ndarray) -> np.ndarray:
    """PyTorch's kernel of a convolution, ``[out, in, height, width]``, as ours, ``[height, width, in, out]``."""
    return tensor.transpose(2, 3, 1, 0)


def linear_kernel(tensor: np.ndarray) -> np.ndarray:
    """PyTorch's ``[out, in]``, or that of a 1x1 convolution, as ours, ``[in, out]``."""
    return tensor.reshape(tensor.shape[:2]).T


def unchanged(tensor: np.ndarray) -> np.ndarray:
    return tensor


def load_strictly(
    create: Callable[[], Module],
    tensors: Mapping[str, np.ndarray],
    table: Table,
    source: str,
    ignored: Collection[str] = (),
) -> Module:
    """The module that ``create`` makes, with the values of a checkpoint; none is drawn.

    Args:
      create: without arguments. It is traced, not run.
      tensors: of the checkpoint, by its own names.
      table: what goes where.
      source: the checkpoint's name, for messages.
      ignored: names of tensors that no table needs, where they are there.

    Raises:
      UserError: a tensor has no place, one is missing, a variable is left unfilled, or a shape differs; the message lists
        them all.
    """
    graph, state = nnx.split(nnx.eval_shape(create))
    variables = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    used = {name for _, names in table.values() for name in names}
    problems = [f"{name} has no place in ours" for name in tensors if name not in used and name not in ignored]
    problems += [f"{name} is missing" for name in sorted(used - set(tensors))]
    problems += [f"our {path} is not filled" for path in variables if path not in table]
    problems += [f"there is no {path} in ours" for path in table if path not in variables]
    filled = []
    for path, (convert, names) in table.items():
        if path in variables and all(name in tensors for name in names):
            place, variable = variables[path]
            value = convert(*(tensors[name] for name in names))
            if value.shape != variable.shape:
                problems.append(f"{' and '.join(names)} give {value.shape} for our {path} of {variable.shape}")
            filled.append((place, variable.replace(jnp.asarray(value, variable.dtype))))
    if problems:
        raise UserError(f"{source} does not fit: " + "; ".join(problems))
    return nnx.merge(graph, nnx.from_flat_state(filled))
