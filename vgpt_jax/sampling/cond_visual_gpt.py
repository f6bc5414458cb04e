"""A tokenizer and a generator as one thing that draws pictures."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vgpt_jax.errors import UserError
from vgpt_jax.models.gpt import GPT
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.sampling.class_names import find_class
from vgpt_jax.sampling.completion import Completion
from vgpt_jax.sampling.parallel import group_sizes
from vgpt_jax.sampling.program import LEAST, Batch, Plan, Score, draw_pictures
from vgpt_jax.sampling.request import MAX_BATCH, Drawing, bucket
from vgpt_jax.training.saved_model import load_model
from vgpt_jax.training.sharding import num_shards, on_every_host, place_on, replicated, split_over


@dataclass(frozen=True)
class Samples:
    """Pictures that were drawn.

    Attributes:
      images: ``[M, H, W, 3]`` float32 in 0..1.
      token_ids: ``[M, *token_shape]`` int32.
      labels: ``[M]`` int32, -1 where there is no class.
      orders: ``[M, N]`` int32, the places of the tokens as they were written; what was kept of a given picture comes first.
      indices: ``[M]`` int32, the number of each among all candidates: label, number, seed and options draw it again.
      scores: ``[M]`` float32, or None where nothing scores.
      candidate_scores: ``[M, accept_n]`` float32, those of all candidates; or None.
    """

    images: np.ndarray
    token_ids: np.ndarray
    labels: np.ndarray
    orders: np.ndarray
    indices: np.ndarray
    scores: np.ndarray | None = None
    candidate_scores: np.ndarray | None = None

    @property
    def chosen(self) -> np.ndarray | None:
        """``[M]``, which of its candidates each is; None where nothing scores."""
        return None if self.candidate_scores is None else best(self.candidate_scores)

    @staticmethod
    def joined(parts: Sequence["Samples"]) -> "Samples":
        """Several as one."""
        columns = [[getattr(part, field.name) for part in parts] for field in fields(Samples)]
        return Samples(*(None if column[0] is None else np.concatenate(column) for column in columns))


class CondVisualGPT:
    """A class-conditional generator of pictures.

    Args:
      tokenizer: turns token ids into pixels.
      gpt: writes token ids; must have been trained on this tokenizer's.
      class_names: in the order of the generator's classes.
      value_range: least and greatest value of the tokenizer's images.
      mesh: devices that share the pictures of a request; None: the models' own.

    Raises:
      UserError: the two do not fit.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        gpt: GPT,
        *,
        class_names: Sequence[str],
        value_range: Sequence[float],
        mesh: Mesh | None = None,
    ):
        for what, of_gpt, other in (
            ("codes", gpt.num_codes, tokenizer.num_codes),
            ("tokens a picture", gpt.num_tokens, tokenizer.num_tokens),
            ("classes", gpt.num_classes, len(class_names)),
        ):
            if of_gpt != other:
                raise UserError(f"the generator was built for {of_gpt} {what}, but is given {other}")
        self.tokenizer, self.gpt = (
            (tokenizer, gpt) if mesh is None else (place_on(mesh, tokenizer), place_on(mesh, gpt))
        )
        self.class_names = tuple(class_names)
        self.value_range = tuple(value_range)
        self.mesh = mesh

    @classmethod
    def from_pretrained(cls, directory: str | Path, mesh: Mesh | None = None) -> "CondVisualGPT":
        """Loads what `vgpt_jax.main` left in a workdir: ``DIR/tokenizer/model`` and ``DIR/generator/model``.

        Raises:
          UserError: one is missing or damaged, or the generator was trained on another tokenizer's ids.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise UserError(f"there is no folder {directory}: give the workdir of a finished training")
        where = None if mesh is None else replicated(mesh)
        tokenizer, of_tokenizer = load_model(directory / "tokenizer" / "model", "tokenizer", where)
        gpt, of_gpt = load_model(directory / "generator" / "model", "gpt", where)
        if of_gpt["tokenizer_fingerprint"] != of_tokenizer["fingerprint"]:
            raise UserError(
                f"the generator in {directory} was trained on the ids of tokenizer {of_gpt['tokenizer_fingerprint']}, "
                f"but the tokenizer there is {of_tokenizer['fingerprint']}: train the generator again, or restore its tokenizer"
            )
        return cls(
            tokenizer, gpt, class_names=of_gpt["class_names"], value_range=of_tokenizer["value_range"], mesh=mesh
        )

    def class_ids(self, cond: Sequence[str | int]) -> np.ndarray:
        """Class names (`find_class`) or indices to indices ``[M]`` int32.

        Raises:
          UserError: a name that fits no class or several, an index out of range.
        """
        ids = [find_class(c, self.class_names) if isinstance(c, str) else int(c) for c in cond]
        for index in ids:
            if not 0 <= index < len(self.class_names):
                raise UserError(f"class index {index} is not between 0 and {len(self.class_names) - 1}")
        return np.array(ids, np.int32)

    def labels(self, cond: Sequence[str | int] | None, num: int) -> np.ndarray:
        """The labels of ``num`` pictures of each class, those of a class beside each other; -1 where ``cond`` is None.

        Raises:
          UserError: as `class_ids`; or there is nothing to draw.
        """
        if num < 1:
            raise UserError(f"num is {num}, but must be at least 1")
        labels = np.full(num, -1, np.int32) if cond is None else np.repeat(self.class_ids(cond), num)
        if not len(labels):
            raise UserError("no class was given: name at least one, or pass cond=None for pictures without a class")
        return labels

    def sample(
        self,
        cond: Sequence[str | int] | None = None,
        *,
        num: int = 1,
        score: Score | nnx.Module | None = None,
        completion: Completion | None = None,
        **options: Any,
    ) -> Samples:
        """Draws ``num`` pictures of each class of ``cond``, those of a class beside each other.

        Args:
          cond: class names or indices; None draws ``num`` pictures without a class, which a generator can that was
            trained with ``class_dropout`` above 0.
          num: pictures of each.
          score: of the pictures; their scores come with the samples.
          completion: a picture to complete, with the class that is asked for.
          **options: of `Drawing`: ``temperature``, ``top_k``, ``top_p``, ``guidance``, ``seed`` and others.

        Raises:
          UserError: an option out of its range, a class that is not there.
        """
        labels, drawing = self.labels(cond, num), Drawing.of(**options)
        return Samples.joined(list(self.draw(labels, drawing, score=score, completion=completion)))

    def draw(
        self,
        labels: np.ndarray,
        drawing: Drawing,
        *,
        accept_n: int = 1,
        score: Score | nnx.Module | None = None,
        completion: Completion | None = None,
        indices: np.ndarray | None = None,
    ) -> Iterator[Samples]:
        """Draws one picture of each label, in batches, each the best of ``accept_n`` of its own.

        Args:
          labels: ``[M]`` int32, -1 without a class.
          drawing: how.
          accept_n: candidates for each; above 1 something has to score them.
          score: `sampling.program.Score`: a module, whose weights are given to the program, or a function.
          completion: a picture to complete.
          indices: ``[M]`` int32, the number of each picture's first candidate; None: ``0, accept_n, 2 * accept_n, ...``.

        Yields:
          The next of the pictures, at most `MAX_BATCH` at a time.

        Raises:
          UserError: when it is called, before anything is drawn: an option that is out of its range or not for this generator.
        """
        drawing.check(self.gpt)
        if accept_n < 1:
            raise UserError(f"accept_n is {accept_n}, but must be at least 1")
        if accept_n > 1 and score is None:
            raise UserError(f"accept_n is {accept_n}, but there is nothing that scores the candidates")
        given = None if completion is None else self._given(completion)
        if indices is None:
            indices = np.arange(len(labels), dtype=np.int32) * accept_n
        if self.mesh is not None and isinstance(score, nnx.Module):
            score = place_on(self.mesh, score)
        return self._draw(labels, indices, drawing, accept_n, score, given)

    def _draw(self, labels, indices, drawing, accept_n, score, given) -> Iterator[Samples]:
        together = max(1, MAX_BATCH // accept_n)  # pictures whose candidates fit into one batch
        for start in range(0, len(labels), together):
            part = slice(start, start + together)
            if accept_n <= MAX_BATCH:
                yield self._best_of(labels[part], indices[part], accept_n, drawing, score, given)
            else:
                firsts = range(0, accept_n, MAX_BATCH)
                rounds = [
                    self._best_of(
                        labels[part], indices[part] + first, min(MAX_BATCH, accept_n - first), drawing, score, given
                    )
                    for first in firsts
                ]
                every = np.concatenate([r.candidate_scores for r in rounds], axis=1)
                yield replace(rounds[int(best(every)[0]) // MAX_BATCH], candidate_scores=every)

    def _best_of(self, labels, indices, accept_n, drawing, score, given) -> Samples:
        """One program's worth: the best of ``accept_n`` candidates for each label, from numbers ``indices`` on."""
        devices = 1 if self.mesh is None else num_shards(self.mesh)
        count, num_kept = len(labels) * accept_n, bucket(len(labels))
        padding = (0, bucket(count, devices) - count)
        if accept_n == 1:
            num_kept = count + padding[1]  # every candidate is a picture
        slots = np.repeat(np.arange(len(labels)), accept_n)
        numbers = (indices[:, None] + np.arange(accept_n)).ravel().astype(np.int32)
        batch = Batch(
            labels=np.pad(labels[slots], padding, mode="edge"),
            indices=np.pad(numbers, padding, mode="edge"),
            slots=np.pad(slots, padding, constant_values=-1),
        )
        num_given = num_first = 0
        if given is not None:
            num_given, num_first = int(given[1].sum()), int(np.argmin(given[1]))
        sizes = ()
        if drawing.num_steps:
            left = self.gpt.num_tokens - num_given
            sizes = tuple(map(int, group_sizes(left, min(drawing.num_steps, left))))
        plan = Plan(num_kept, drawing.order == "random" or bool(sizes), sizes, num_given, num_first, devices)
        is_module = isinstance(score, nnx.Module)
        if self.mesh is not None:
            batch = split_over(self.mesh, batch)
        graph, state = nnx.split((self.gpt, self.tokenizer, score if is_module else None))
        drawn = draw_pictures(
            graph,
            state,
            batch,
            np.uint32(drawing.seed),
            drawing.options(self.gpt),
            given,
            self.value_range,
            score=None if is_module else score,
            plan=plan,
        )
        kept = on_every_host(drawn)
        scores = kept.get("scores")
        chosen = kept["chosen"][: len(labels)]
        return Samples(
            **{name: kept[name][: len(labels)] for name in ("images", "token_ids", "orders")},
            labels=labels,
            indices=numbers[chosen],
            scores=None if scores is None else scores[chosen],
            candidate_scores=None if scores is None else scores[:count].reshape(-1, accept_n),
        )

    def _given(self, completion: Completion) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and which are kept, ``[N]``, of a picture.

        Raises:
          UserError: picture or grid are of another size, or the tokens are not those of places in a grid.
        """
        tokenizer, shape = self.tokenizer, self.tokenizer.token_shape
        if shape[: len(tokenizer.grid)] != tuple(tokenizer.grid):
            raise UserError(
                f"a picture of this tokenizer has tokens of shape {shape}, of which no part of it can be kept"
            )
        wanted = (tokenizer.image_size, tokenizer.image_size, 3)
        if completion.image.shape != wanted or completion.kept.shape != tuple(tokenizer.grid):
            raise UserError(
                f"a completion has a picture of {completion.image.shape} and a grid of {completion.kept.shape}, but the "
                f"tokenizer's are {wanted} and {tuple(tokenizer.grid)}"
            )
        low, high = self.value_range
        token_ids = on_every_host(encode(*nnx.split(tokenizer), completion.image[None] * (high - low) + low))[0]
        kept = completion.kept.reshape(completion.kept.shape + (1,) * (len(shape) - 2))
        return token_ids.ravel(), np.broadcast_to(kept, shape).ravel()


def best(scores: np.ndarray) -> np.ndarray:
    """The number of the greatest of each row ``[M, accept_n]``, the first at a tie; one that is no number is none."""
    return np.argmax(np.nan_to_num(scores, nan=LEAST), axis=1)


@functools.partial(jax.jit, static_argnums=0)
def encode(graph: nnx.GraphDef, state: nnx.State, images: jax.Array) -> jax.Array:
    """Token ids ``[B, *token_shape]`` of images in the tokenizer's value range."""
    return nnx.merge(graph, state).encode(images)
