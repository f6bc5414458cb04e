"""The token cache: every picture's ids, written once by the frozen tokenizer, so that the generator never sees a pixel.

DIR/training.npz     token_ids [2, M, N] (as it is, and flipped), labels [M]
DIR/held_out.npz     token_ids [1, M, N], labels [M]
DIR/metadata.json    the tokenizer's fingerprint, the shape of a picture's tokens, K, the class names
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vgpt_jax.data.loader import evaluation_batches
from vgpt_jax.data.sources import identity_of
from vgpt_jax.data.transforms import ImageTransform
from vgpt_jax.errors import UserError
from vgpt_jax.progress import progress

PARTS = ("training", "held_out")


@dataclass(frozen=True)
class TokenSource:
    """Sequences in memory, a source for the loader: example ``i`` is view ``i // M`` of picture ``i % M``.

    Attributes: ``token_ids`` ``[views, M, N]``, ``labels`` ``[M]`` int32, ``class_names``.
    """

    token_ids: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def identity(self) -> str:
        """Differs where any id, label or class does."""
        names = hashlib.sha256(np.ascontiguousarray(self.token_ids).tobytes()).hexdigest()
        return identity_of(self.class_names, names, self.labels)

    def __len__(self) -> int:
        return self.token_ids.shape[0] * self.token_ids.shape[1]

    def __getitem__(self, index: int) -> dict:
        view, picture = divmod(index, self.token_ids.shape[1])
        return {"token_ids": self.token_ids[view, picture].astype(np.int32), "label": np.int32(self.labels[picture])}


def write_token_cache(
    directory: Path,
    encode: Callable[[np.ndarray], np.ndarray],
    training: Any,
    held_out: Any,
    transform: ImageTransform,
    *,
    batch_size: int,
    num_codes: int,
    token_shape: tuple[int, ...],
    fingerprint: str,
) -> None:
    """Runs the tokenizer over both parts of a data set and writes the cache, whole or not at all.

    Args:
      directory: the folder to be.
      encode: images ``[B, S, S, 3]`` float32 to ids ``[B, *token_shape]``.
      training, held_out: the sources. The training part is written as it is and flipped, the held-out one as it is.
      transform: whose evaluation form (centre crop) is applied.
      batch_size: pictures given to ``encode`` at once.
      num_codes, token_shape, fingerprint: of the tokenizer.
    """
    directory = Path(directory)
    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    dtype = np.uint16 if num_codes <= 1 << 16 else np.int32
    for part, source, flips in ((PARTS[0], training, (False, True)), (PARTS[1], held_out, (False,))):
        views, labels = [[] for _ in flips], []
        batches = evaluation_batches(source, transform.evaluate, batch_size=batch_size)
        for batch in progress(batches, f"token cache, {part}"):
            labels.append(batch["label"][batch["mask"]])
            for view, flipped in zip(views, flips, strict=True):
                images = batch["image"][:, :, ::-1] if flipped else batch["image"]
                ids = np.asarray(encode(images))
                view.append(ids.reshape(len(ids), -1)[batch["mask"]].astype(dtype))
        np.savez(
            unfinished / f"{part}.npz",
            token_ids=np.stack([np.concatenate(v) for v in views]),
            labels=np.concatenate(labels),
        )
    metadata = {
        "fingerprint": fingerprint,
        "num_codes": num_codes,
        "token_shape": list(token_shape),
        "class_names": list(training.class_names),
    }
    (unfinished / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(unfinished, directory)


def read_token_cache(directory: Path, *, fingerprint: str) -> tuple[TokenSource, TokenSource]:
    """The training and the held-out part of a cache.

    Args:
      directory: where `write_token_cache` wrote.
      fingerprint: of the tokenizer that the ids must be of.

    Raises:
      UserError: there is none, it is damaged, or it was written by another tokenizer.
    """
    directory = Path(directory)
    try:
        metadata = json.loads((directory / "metadata.json").read_text())
        if metadata["fingerprint"] != fingerprint:
            raise UserError(
                f"the token cache in {directory} was written by tokenizer {metadata['fingerprint']}, but the tokenizer here "
                f"is {fingerprint}: delete the cache to have it written again, or bring back its tokenizer"
            )
        parts = []
        for part in PARTS:
            with np.load(directory / f"{part}.npz") as arrays:
                parts.append(
                    TokenSource(arrays["token_ids"], arrays["labels"].astype(np.int32), tuple(metadata["class_names"]))
                )
    except UserError:
        raise
    except Exception as error:  # whatever NumPy, zipfile or json raise for a file that is not whole
        raise UserError(
            f"the token cache in {directory} cannot be read ({error}): delete it to have it written again"
        ) from error
    return parts[0], parts[1]
