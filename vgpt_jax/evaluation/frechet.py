"""The Fréchet distance between the features of two sets of pictures, as normal distributions; float64 NumPy on the host.

With Inception's features it is FID (Heusel et al. 2017, arXiv 1706.08500, section 4 and appendix A1). With those of another
network it is another number: say which beside it. Few pictures make it too large; it is compared between sets of one size.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vgpt_jax.errors import UserError
from vgpt_jax.training.sharding import replicated, shard_batch


@dataclass(frozen=True)
class FeatureStatistics:
    """What is kept of features that have been seen.

    Attributes:
      count: examples M.
      mean: ``[D]`` float64.
      scatter: ``[D, D]`` float64, the sum over examples of the outer product of their difference from the mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "FeatureStatistics":
        """Of features ``[M, D]``."""
        features = np.asarray(features, np.float64)
        mean = features.mean(axis=0) if len(features) else np.zeros(features.shape[1])
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Of both together. Sums about 0 would lose the small differences of large features; these do not."""
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(apart, apart) * (self.count * other.count / count)
        return FeatureStatistics(count, self.mean + apart * (other.count / count), scatter)

    @property
    def covariance(self) -> np.ndarray:
        """``[D, D]`` float64, the unbiased estimate, as ``numpy.cov``.

        Raises:
          UserError: there are fewer than two examples.
        """
        if self.count < 2:
            raise UserError(f"a Fréchet distance needs at least 2 pictures of each set, but there are {self.count}")
        return self.scatter / (self.count - 1)


def feature_statistics(
    features: Callable[[Any, dict], jax.Array], state: Any, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh
) -> FeatureStatistics:
    """The statistics of the features of all examples, of all processes.

    Args:
      features: ``(state, batch) -> [B, D]``, traced.
      state: given to it, replicated on the mesh.
      batches: this process's part of each, with "mask" ``[B]``, which of them count; every process has as many.
      mesh: over whose first axis batches are split.

    Raises:
      UserError: there is no batch, or a feature is no finite number.
    """

    @jax.jit
    def step(state: Any, batch: dict) -> tuple[jax.Array, jax.Array]:
        return jax.lax.with_sharding_constraint((features(state, batch), batch["mask"]), replicated(mesh))

    total, waiting = None, None
    for batch in itertools.chain(batches, [None]):
        computed = None if batch is None else step(state, shard_batch(mesh, batch))
        if waiting is not None:  # the device has the next batch to do
            found, mask = (np.asarray(x) for x in waiting)
            new = FeatureStatistics.of(found[mask])
            total = new if total is None else total + new
        waiting = computed
    if total is None:
        raise UserError("a Fréchet distance needs pictures, but there are none")
    if not np.isfinite(total.scatter).all():
        raise UserError(
            "features of some pictures are no finite numbers: look at the pictures and at the network's weights"
        )
    return total


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """``|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 sqrt(cov1 cov2))``: from 0 up, in squared units of the features.

    The trace of the root is the sum of the singular values of ``root1.T @ root2`` for any ``cov = root @ root.T``: real and
    exact also where the covariances have no inverse, as those of fewer pictures than features. The root of the product itself
    would be of half as many digits there, and complex.

    Args:
      mean1, mean2: ``[D]``.
      cov1, cov2: ``[D, D]``, symmetric.

    Raises:
      UserError: the shapes do not fit, or a number is not finite.

    Reference: Dowson and Landau 1982, "The Fréchet distance between multivariate normal distributions".
    """
    mean1, cov1, mean2, cov2 = (np.asarray(x, np.float64) for x in (mean1, cov1, mean2, cov2))
    shapes = [x.shape for x in (mean1, cov1, mean2, cov2)]
    if mean1.ndim != 1 or shapes != 2 * [mean1.shape, 2 * mean1.shape]:
        raise UserError(f"means and covariances of shapes {shapes} do not fit: they must be of the same features")
    if not all(np.isfinite(x).all() for x in (mean1, cov1, mean2, cov2)):
        raise UserError("a mean or a covariance has numbers that are not finite")
    roots = np.linalg.svd(_root(cov1).T @ _root(cov2), compute_uv=False)
    distance = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * np.sum(roots)
    return float(max(distance, 0.0))


def _root(cov: np.ndarray) -> np.ndarray:
    """A matrix that times its transpose is ``cov`` ``[D, D]``, without the eigenvalues that rounding has made negative."""
    values, vectors = np.linalg.eigh(cov)
    return vectors * np.sqrt(np.maximum(values, 0.0))
