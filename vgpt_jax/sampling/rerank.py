"""Best of n, by a classifier or by any score."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vgpt_jax.errors import UserError
from vgpt_jax.pretrained.rerankers import EFFICIENTNET, NONE, OWN, load_reranker
from vgpt_jax.sampling.class_names import matching_labels, shown_name
from vgpt_jax.sampling.completion import Completion
from vgpt_jax.sampling.cond_visual_gpt import CondVisualGPT, Samples
from vgpt_jax.sampling.program import ClassifierScore, Score
from vgpt_jax.sampling.request import Drawing


class ClassConditionedRejectionSampler:
    """Draws ``accept_n`` candidates for every picture, and keeps the one with the highest score.

    Args:
      model: draws the candidates.
      classifier: a module from images to logits, whose softmax score of the class counts; or a function `sampling.program.Score`,
        from images ``[B, H, W, 3]`` in 0..1 and labels ``[B]`` to scores ``[B]``, that JAX can trace (`jax.pure_callback` lets it
        call anything else); or None, which keeps what comes.
      labels: of a module: the names of what it knows, found for each of the model's classes by `matching_labels`. None: it knows
        the model's classes, in their order.
      value_range: of the images that a module is given. None: that of the model's tokenizer.

    Raises:
      UserError: the classifier knows another number of classes.
    """

    def __init__(
        self,
        model: CondVisualGPT,
        classifier: nnx.Module | Score | None,
        *,
        labels: Sequence[str] | None = None,
        value_range: Sequence[float] | None = None,
    ):
        self.model, self.classifier, self.score = model, classifier, classifier
        self.labels, self.matches = labels, None
        if isinstance(classifier, nnx.Module):
            expected = model.class_names if labels is None else labels
            size = model.tokenizer.image_size
            known = nnx.eval_shape(lambda c: c(np.zeros((1, size, size, 3), np.float32)), classifier)
            if known.shape[-1] != len(expected):
                whose = "the generator" if labels is None else "its list of labels"
                raise UserError(f"the classifier knows {known.shape[-1]} classes, {whose} {len(expected)}")
            if labels is not None:
                self.matches = matching_labels(model.class_names, labels)
            self.score = ClassifierScore(classifier, tuple(value_range or model.value_range), self.matches)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, mesh: Mesh | None = None, classifier: str | None = None
    ) -> "ClassConditionedRejectionSampler":
        """Loads generator, tokenizer and classifier from a workdir of `vgpt_jax.main`, or what `vgpt_jax.convert` wrote.

        Args:
          directory: the workdir.
          mesh: devices that share the pictures of a request.
          classifier: a name or a folder, as `load_reranker` takes them, or "none". None: the workdir's own where there is one,
            else "efficientnet".

        Raises:
          UserError: one is missing or damaged, or the workdir's own classifier and generator know other classes.
        """
        directory = Path(directory)
        model = CondVisualGPT.from_pretrained(directory, mesh)
        if classifier == NONE:
            return cls(model, None)
        if classifier is None:
            classifier = OWN if (directory / "classifier").exists() else EFFICIENTNET
        reranker = load_reranker(classifier, directory)
        if reranker.labels == model.class_names:
            return cls(model, reranker.classifier, value_range=reranker.value_range)
        if reranker.value_range is None:  # it was trained on the generator's data, or what was taken for it
            raise UserError(
                f"the classifier in {directory} was trained on other classes than the generator: train it again, or choose "
                "another classifier"
            )
        return cls(model, reranker.classifier, labels=reranker.labels, value_range=reranker.value_range)

    def sample(self, cond: Sequence[str | int] | None, *, num: int = 1, accept_n: int = 10, **options: Any) -> Samples:
        """Draws ``num`` pictures of each class, each the best of ``accept_n`` of its own.

        Args:
          cond: class names or indices; None: ``num`` pictures without a class, where no module scores.
          num: pictures kept of each class.
          accept_n: candidates for each picture. 1 keeps what comes.
          **options: ``completion``, and the options of `Drawing`.

        Raises:
          UserError: as `CondVisualGPT.sample`; or there is no class for the classifier to score, or one that it does not know.
        """
        return Samples.joined(list(self.stream(cond, num=num, accept_n=accept_n, **options)))

    def stream(
        self,
        cond: Sequence[str | int] | None,
        *,
        num: int = 1,
        accept_n: int = 10,
        completion: Completion | None = None,
        **options: Any,
    ) -> Iterator[Samples]:
        """`sample` in batches, for requests that do not fit into memory. Errors come at the call."""
        return self.draw(self.model.labels(cond, num), Drawing.of(**options), accept_n=accept_n, completion=completion)

    def draw(
        self,
        labels: np.ndarray,
        drawing: Drawing,
        *,
        accept_n: int = 1,
        completion: Completion | None = None,
        indices: np.ndarray | None = None,
    ) -> Iterator[Samples]:
        """`CondVisualGPT.draw` with this classifier's scores. Errors come at the call."""
        if isinstance(self.classifier, nnx.Module):
            if (labels < 0).any():
                raise UserError("cond is None, but the classifier scores how much a picture is of its class: name one")
            self._check_known(labels)
        return self.model.draw(
            labels, drawing, accept_n=accept_n, score=self.score, completion=completion, indices=indices
        )

    def _check_known(self, labels: np.ndarray) -> None:
        if self.matches is None:
            return
        unknown = sorted({int(label) for label in labels if not self.matches[label].any()})
        if unknown:
            names = ", ".join(shown_name(self.model.class_names[label]) for label in unknown[:5])
            raise UserError(
                f"the classifier has no label for {names}{' and others' if len(unknown) > 5 else ''}: choose another "
                "(--classifier), or none and --accept_n 1"
            )
