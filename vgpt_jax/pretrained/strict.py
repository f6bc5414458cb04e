"""The strict loader: every tensor of a foreign checkpoint goes somewhere, and every variable of ours is filled."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.pretrained.stored_tensor import StoredTensor
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
    tensors: MutableMapping[str, np.ndarray | StoredTensor],
    table: Table,
    source: str,
    ignored: Collection[str] = (),
) -> Module:
    """The module that ``create`` makes or is, with the values of a checkpoint; none is drawn.

    Args:
      create: without arguments; it is traced, not run. Or what tracing it gave (``nnx.eval_shape``).
      tensors: of the checkpoint, by its own names. None is read before all fit; then each is taken out when it is used for the
        last time, so that its memory is free before the next one is read.
      table: what goes where.
      source: the checkpoint's name, for messages.
      ignored: names of tensors that no table needs, where they are there.

    Raises:
      UserError: a tensor has no place, one is missing or holds no real numbers, a variable is left unfilled, or a shape differs;
        the message lists them all. Or a value is not finite in float32.
    """
    graph, state = nnx.split(create if isinstance(create, nnx.Module) else nnx.eval_shape(create))
    variables = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    uses = Counter(name for _, names in table.values() for name in names)
    problems = [f"{name} has no place in ours" for name in tensors if name not in uses and name not in ignored]
    problems += [f"{name} is missing" for name in sorted(uses.keys() - tensors.keys())]
    problems += [f"our {path} is not filled" for path in variables if path not in table]
    problems += [f"there is no {path} in ours" for path in table if path not in variables]
    strange = [words for name in sorted(uses) if name in tensors and (words := _strange(name, tensors[name]))]
    if not strange:  # or it could take any amount of memory to find the shapes
        problems += _misfits(table, tensors, variables)
    if problems or strange:
        raise UserError(f"{source} does not fit: " + "; ".join(problems + strange))
    filled = []
    large = sum(tensor.nbytes for tensor in tensors.values()) >= WORTH_A_BAR
    for path, (convert, names) in progress(table.items(), f"reading {source}") if large else table.items():
        place, variable = variables[path]
        given = [_finite(name, tensors[name], source) for name in names]
        uses.subtract(names)
        for name in set(names):
            if not uses[name]:
                del tensors[name]
        filled.append((place, variable.replace(jnp.asarray(convert(*given), variable.dtype))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _strange(name: str, tensor: np.ndarray | StoredTensor) -> str:
    """Why a tensor can be no weight whatever its shape is, or nothing."""
    if getattr(tensor, "repeats", False):
        return f"{name} {tensor.shape} has more values than are stored of it"
    real = jnp.issubdtype(tensor.dtype, jnp.number) and not jnp.issubdtype(tensor.dtype, jnp.complexfloating)
    return "" if real or tensor.dtype == bool else f"{name} holds {tensor.dtype}, but real numbers are needed"


def _misfits(
    table: Table, tensors: Mapping[str, np.ndarray | StoredTensor], variables: Mapping[str, tuple]
) -> list[str]:
    """What would be of another shape than ours, of the tensors that are there; found without reading them."""
    found = []
    for path, (convert, names) in table.items():
        if path not in variables or not all(name in tensors for name in names):
            continue
        shape = variables[path][1].shape
        given = [np.broadcast_to(np.zeros((), tensors[name].dtype), tensors[name].shape) for name in names]
        try:
            value = convert(*given)
        except (ValueError, IndexError, TypeError):  # of other dimensions than the function expects
            shapes = " and ".join(f"{name} {array.shape}" for name, array in zip(names, given, strict=True))
            found.append(f"{shapes} cannot become our {path} of {shape}")
            continue
        if value.shape != shape:
            found.append(f"{' and '.join(names)} give {value.shape} for our {path} of {shape}")
    return found


def _finite(name: str, tensor: np.ndarray | StoredTensor, source: str) -> np.ndarray:
    """The array of a tensor. Its extremes tell: a NaN is both."""
    array = np.asarray(tensor)
    if array.size and jnp.issubdtype(array.dtype, jnp.floating):
        with np.errstate(over="ignore", invalid="ignore"):
            extremes = np.array([array.min(), array.max()], np.float32)
        if not np.isfinite(extremes).all():
            raise UserError(f"{source} does not fit: {name} has values that are NaN or infinite in float32")
    return array
