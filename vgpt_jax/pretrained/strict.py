"""The strict loader: every tensor of a foreign checkpoint goes somewhere, and every variable of ours is filled."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.progress import progress

Module = TypeVar("Module", bound=nnx.Module)

WORTH_A_BAR = 2**29  # bytes of a checkpoint: some seconds

Table = Mapping[str, tuple[Callable[..., np.ndarray], tuple[str, ...]]]
"""For each of our variables, by its path ("blocks.0.project.kernel"): a function, and the names of the tensors that it is
given."""


def conv_kernel(tensor: np.ndarray) -> np.ndarray:
    """PyTorch's kernel of a convolution, ``[out, in, height, width]``, as ours, ``[height, width, in, out]``."""
    return tensor.transpose(2, 3, 1, 0)


def linear_kernel(tensor: np.ndarray) -> np.ndarray:
    """PyTorch's ``[out, in]``, or that of a 1x1 convolution, as ours, ``[in, out]``."""
    return tensor.reshape(tensor.shape[:2]).T


def joined_kernel(*tensors: np.ndarray) -> np.ndarray:
    """Several of PyTorch's linear maps, ``[out, in]``, as one of ours, ``[in, sum of out]``."""
    return np.concatenate(tensors).T


def unchanged(tensor: np.ndarray) -> np.ndarray:
    return tensor


def load_strictly(
    create: Callable[[], Module] | Module,
    tensors: MutableMapping[str, np.ndarray],
    table: Table,
    source: str,
    ignored: Collection[str] = (),
) -> Module:
    """The module that ``create`` makes or is, with the values of a checkpoint; none is drawn.

    Args:
      create: without arguments; it is traced, not run. Or what tracing it gave (``nnx.eval_shape``).
      tensors: of the checkpoint, by its own names: arrays, or what NumPy can make arrays of. Each is taken out when it is used
        for the last time, so that its memory is free before the next one is read.
      table: what goes where.
      source: the checkpoint's name, for messages.
      ignored: names of tensors that no table needs, where they are there.

    Raises:
      UserError: a tensor has no place, one is missing, a variable is left unfilled, or a shape differs; the message lists
        them all.
    """
    graph, state = nnx.split(create if isinstance(create, nnx.Module) else nnx.eval_shape(create))
    variables = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    uses = Counter(name for _, names in table.values() for name in names)
    problems = [f"{name} has no place in ours" for name in tensors if name not in uses and name not in ignored]
    problems += [f"{name} is missing" for name in sorted(uses.keys() - tensors.keys())]
    problems += [f"our {path} is not filled" for path in variables if path not in table]
    problems += [f"there is no {path} in ours" for path in table if path not in variables]
    fits, filled = not problems, []
    large = sum(tensor.nbytes for tensor in tensors.values()) >= WORTH_A_BAR
    for path, (convert, names) in progress(table.items(), f"reading {source}") if large else table.items():
        if path not in variables or not all(name in tensors for name in names):
            continue
        place, variable = variables[path]
        given = [np.asarray(tensors[name]) for name in names]
        uses.subtract(names)
        for name in set(names):
            if not uses[name]:
                del tensors[name]
        shapes = " and ".join(f"{name} {array.shape}" for name, array in zip(names, given, strict=True))
        try:
            value = convert(*given)
        except (ValueError, IndexError, TypeError):  # of other dimensions than the function expects
            problems.append(f"{shapes} cannot become our {path} of {variable.shape}")
            continue
        if value.shape != variable.shape:
            problems.append(f"{' and '.join(names)} give {value.shape} for our {path} of {variable.shape}")
        elif fits:
            filled.append((place, variable.replace(jnp.asarray(value, variable.dtype))))
    if problems:
        raise UserError(f"{source} does not fit: " + "; ".join(problems))
    return nnx.merge(graph, nnx.from_flat_state(filled))
