"""Reads files in the safetensors format: named tensors and nothing that could be executed."""

from pathlib import Path

import ml_dtypes
import numpy as np

from vgpt_jax.errors import UserError
from vgpt_jax.pretrained.stored_tensor import StoredTensor

DTYPES = {  # the format's name
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BOOL": np.dtype("?"),
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}


def open_safetensors(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name, of the dtypes that they are stored in (``ml_dtypes`` has bfloat16).

    Each is read when it is asked for, so the file has to stay where it is.

    Raises:
      UserError: there is no such file, it is damaged or of another kind, or it holds a dtype that is none of ``DTYPES``.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")

    def stored(name: str) -> StoredTensor:
        found = file.get_slice(name)
        if found.get_dtype() not in DTYPES:
            raise UserError(f"{path} holds {name} as {found.get_dtype()}, but what is read is {', '.join(DTYPES)}")
        return StoredTensor(tuple(found.get_shape()), DTYPES[found.get_dtype()], lambda: file.get_tensor(name))

    try:
        file = safe_open(path, framework="numpy")
        return {name: stored(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged, or no safetensors file ({error})") from error
