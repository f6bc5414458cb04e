"""The codebook of VQ-VAE, with the options of visual-gpt and those that the field has added since."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import UserError, check_range, choose
from vgpt_jax.quantizers.affine import AFFINE
from vgpt_jax.quantizers.entropy import entropy_loss
from vgpt_jax.quantizers.output import QuantizerOutput
from vgpt_jax.quantizers.quantizer import Buffer, Quantizer, straight_through
from vgpt_jax.quantizers.rotation import rotate_to
from vgpt_jax.quantizers.search import l2_normalize, orthogonality_loss, squared_distances, uniformity_penalty
from vgpt_jax.quantizers.surgery import (
    count_down,
    ema_update,
    init_from_latents,
    kmeans,
    replace_stale,
    step_to_means,
)

INIT_METHODS = ("kaiming", "latent_random", "kmeans", "fixed")
LEARNING = ("gradient", "ema", "alternating")
ESTIMATORS = {"straight_through": straight_through, "rotation": rotate_to}


class VectorQuantize(Quantizer):
    """Replaces each latent by the nearest of K codes.

    The search is for the nearest code in Euclidean distance, after normalising and projecting if asked, in that order;
    what is returned is always the code. `__call__` only searches and computes losses. What else happens to the codebook
    (initialisation, moving averages, replacement of unused codes) is `surgery`, which a training step calls after its
    optimizer's update.

    Args:
      num_codewords: K. More codes reconstruct better and are harder to keep in use and to predict.
      embedding_dim: D, the width of a code. Small ones (4 to 16) keep large codebooks in use (arXiv 2110.04627).
      cos_dist: search by cosine: latents and codes are divided by their norms for the search only.
      proj_dim: P; latents and codes are multiplied by a ``[D, P]`` matrix each for the search. None: no projection.
      random_proj: the two matrices stay as they were drawn, and are one and the same. Otherwise they are parameters; as
        the search itself has no gradient, they learn from penalty and entropy loss alone. Without ``proj_dim`` there are
        none.
      penalty_weight: weight of the loss that pushes the use of codes towards uniform. 0 leaves it out.
      pretrain_steps: warm start: for that many training steps the quantizer is the identity, its losses are 0.
      init_method: "kaiming" (He et al. uniform), "latent_random" (drawn from the latents of the batch that ends the warm
        start, or of the first one where there is none; He's until then), "kmeans" (the same, then ``kmeans_iterations`` of
        k-means over that batch), "fixed" (random points on the unit sphere that no gradient moves; ``replace_freq`` still
        replaces them).
      replace_freq: a code that was not used for that many training steps is replaced by a random latent of the batch.
        0 replaces none.
      replace_noise: norm of the noise that a replaced code gets, as a fraction of the latent's norm.
      commitment_weight: weight of ``mean |z_e - sg(z_q)|^2``, which keeps the encoder near its codes.
      codebook_weight: weight of ``mean |sg(z_e) - z_q|^2``, which moves the codes to their latents. Of no effect where the
        codes do not learn by gradient.
      penalty_temperature: sharpness of the soft assignment in the penalty (`uniformity_penalty`).
      l2_norm: latents and codes are divided by their norms throughout, in search, losses and output (ViT-VQGAN, arXiv
        2110.04627; LlamaGen). The warm start then returns the normalised latents.
      learning: how codes follow their latents: "gradient" (the codebook loss), "ema" (the moving average of the latents
        that chose them, in `surgery`), "alternating" (``alternating_steps`` of assignment and descent on the batch's latents
        in `surgery`, between the optimizer's steps; arXiv 2305.08842, section 3.2).
      ema_decay: of the moving averages. Closer to 1 is steadier and slower.
      ema_epsilon: Laplace smoothing of the counts. It draws a code that is not used to the origin, in a thousand steps or so:
        leave ``replace_freq`` on.
      kmeans_iterations: of ``init_method="kmeans"``.
      alternating_steps: rounds a training step.
      alternating_rate: how far a round moves each used code towards the mean of its latents, in 0..1.
      estimator: gradient to the latents: "straight_through", or "rotation" (the rotation trick, arXiv 2410.06424).
      sync_nu: synchronized update: this share of the task's gradient goes to the codes as well (arXiv 2305.08842, eq. 7).
      affine: "none", or a transformation shared by all codes: "learned", or by running "statistics" of the latents
        (arXiv 2305.08842, section 3.1).
      entropy_weight: weight of the entropy loss, mean entropy of a latent's soft assignment less the entropy of the mean one
        (`entropy_loss` of the negative squared distances): sure choices, codes used alike. 0 leaves it out.
      entropy_temperature: of that soft assignment.
      orthogonality_weight: weight of `orthogonality_loss`, which spreads the directions of the codes. 0 leaves it out.
      rngs: ``params`` for the codebook and the projections.

    Raises:
      UserError: an argument is out of its range, or two exclude each other; the message names them.

    Reference: van den Oord et al. 2017, arXiv 1711.00937; code factorization and cosine search: Yu et al. 2021, arXiv
    2110.04627; replacement, affine, synchronized, alternating: Huh et al. 2023, arXiv 2305.08842.

    Differs from visual-gpt: the losses are taken before the straight-through estimator, so the codebook learns; the
    penalty raises the entropy instead of lowering it; replacement and fixed codes work without a warm start.
    """

    def __init__(
        self,
        num_codewords: int = 1024,
        embedding_dim: int = 256,
        cos_dist: bool = False,
        proj_dim: int | None = None,
        random_proj: bool = False,
        penalty_weight: float = 0.25,
        pretrain_steps: int = 5000,
        init_method: str = "latent_random",
        *,
        replace_freq: int = 0,
        replace_noise: float = 0.01,
        commitment_weight: float = 1.0,
        codebook_weight: float = 1.0,
        penalty_temperature: float = 0.05,
        l2_norm: bool = False,
        learning: str = "gradient",
        ema_decay: float = 0.99,
        ema_epsilon: float = 1e-5,
        kmeans_iterations: int = 10,
        alternating_steps: int = 1,
        alternating_rate: float = 0.1,
        estimator: str = "straight_through",
        sync_nu: float = 0.0,
        affine: str = "none",
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        orthogonality_weight: float = 0.0,
        rngs: nnx.Rngs,
    ):
        for name, value, limits in (
            ("num_codewords", num_codewords, {"least": 2}),
            ("embedding_dim", embedding_dim, {"least": 1}),
            ("proj_dim", 1 if proj_dim is None else proj_dim, {"least": 1}),
            ("pretrain_steps", pretrain_steps, {"least": 0}),
            ("replace_freq", replace_freq, {"least": 0}),
            ("replace_noise", replace_noise, {"least": 0}),
            ("commitment_weight", commitment_weight, {"least": 0}),
            ("codebook_weight", codebook_weight, {"least": 0}),
            ("penalty_weight", penalty_weight, {"least": 0}),
            ("penalty_temperature", penalty_temperature, {"above": 0}),
            ("ema_decay", ema_decay, {"least": 0, "most": 0.999999}),
            ("ema_epsilon", ema_epsilon, {"above": 0}),
            ("kmeans_iterations", kmeans_iterations, {"least": 1}),
            ("alternating_steps", alternating_steps, {"least": 1}),
            ("alternating_rate", alternating_rate, {"above": 0, "most": 1}),
            ("sync_nu", sync_nu, {"least": 0, "most": 1}),
            ("entropy_weight", entropy_weight, {"least": 0}),
            ("entropy_temperature", entropy_temperature, {"above": 0}),
            ("orthogonality_weight", orthogonality_weight, {"least": 0}),
        ):
            check_range(f"vector_quantize.{name}", value, **limits)
        for name, value, known in (("init_method", init_method, INIT_METHODS), ("learning", learning, LEARNING)):
            if value not in known:
                raise UserError(f"VectorQuantize: {name} is {value!r}, but must be one of {', '.join(known)}")
        self._estimate = choose("vector_quantize.estimator", estimator, ESTIMATORS)
        affine_class = choose("vector_quantize.affine", affine, AFFINE)
        learns = learning == "gradient" and init_method != "fixed"
        if init_method == "fixed" and learning != "gradient":
            raise UserError(f'VectorQuantize: codes that are "fixed" do not learn: leave out learning={learning!r}')
        for name, weight in (("sync_nu", sync_nu), ("orthogonality_weight", orthogonality_weight)):
            if weight and not learns:
                raise UserError(f"VectorQuantize: {name} moves codes by gradient, but these do not learn by it")
        if affine_class and (l2_norm or cos_dist):
            raise UserError("VectorQuantize: affine is for Euclidean search: leave out cos_dist and l2_norm")

        self.num_codewords = num_codewords
        self.embedding_dim = embedding_dim
        self.cos_dist = cos_dist
        self.pretrain_steps = pretrain_steps
        self.init_method = init_method
        self.replace_freq = replace_freq
        self.replace_noise = replace_noise
        self.penalty_temperature = penalty_temperature
        self.l2_norm = l2_norm
        self.learning = learning
        self.ema_decay = ema_decay
        self.ema_epsilon = ema_epsilon
        self.kmeans_iterations = kmeans_iterations
        self.alternating_steps = alternating_steps
        self.alternating_rate = alternating_rate
        self.sync_nu = sync_nu
        self.entropy_temperature = entropy_temperature
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight if learns or affine == "learned" else 0.0
        self.penalty_weight = penalty_weight
        self.entropy_weight = entropy_weight
        self.orthogonality_weight = orthogonality_weight

        if init_method == "fixed":
            codes = l2_normalize(jax.random.normal(rngs.params(), (num_codewords, embedding_dim)))
        else:
            he_uniform = jax.nn.initializers.he_uniform(in_axis=-1, out_axis=0)
            codes = he_uniform(rngs.params(), (num_codewords, embedding_dim))
        self.codebook = (nnx.Param if learns else Buffer)(codes)
        self.affine = affine_class(embedding_dim) if affine_class else None

        if proj_dim is None:
            self.z_proj = self.code_proj = None
        else:
            matrix = jax.random.normal(rngs.params(), (embedding_dim, proj_dim)) / proj_dim**0.5
            if random_proj:
                self.z_proj = self.code_proj = Buffer(matrix)
            else:
                self.z_proj, self.code_proj = nnx.Param(matrix), nnx.Param(jnp.copy(matrix))

        self.steps = Buffer(jnp.zeros((), jnp.int32))  # training steps seen, counted by `surgery`
        self.countdown = Buffer(jnp.full((num_codewords,), replace_freq, jnp.int32))
        if learning == "ema":
            self.ema_counts = Buffer(jnp.ones((num_codewords,)))
            self.ema_sums = Buffer(jnp.copy(codes))

    def __call__(self, z_e: Array, key: Array | None = None) -> QuantizerOutput:
        """Quantizes latents.

        Args:
          z_e: ``[..., D]`` of any float dtype; computed on in float32.
          key: not read; nothing is drawn.

        Returns:
          `QuantizerOutput` with the losses "commitment" and, where codes learn by gradient, "codebook" (mean squared
          differences); "penalty" and "entropy" (nats) and "orthogonality" where they have a weight. During the warm start
          ``z_q`` is ``z_e`` and every loss is 0.
        """
        z_e = self._latents(z_e)
        codebook = self.codes()
        distances = self._distances(z_e, codebook)
        token_ids = jnp.argmin(distances, axis=-1).astype(jnp.int32).reshape(z_e.shape[:-1])
        codes = codebook[token_ids]

        warming = self.is_warming_up()
        sg = jax.lax.stop_gradient
        losses = {"commitment": jnp.mean((z_e - sg(codes)) ** 2)}
        if self.codebook_weight:
            losses["codebook"] = jnp.mean((sg(z_e) - codes) ** 2)
        if self.penalty_weight:
            losses["penalty"] = uniformity_penalty(distances, self.penalty_temperature)
        if self.entropy_weight:
            losses["entropy"] = entropy_loss(-distances, self.entropy_temperature)[0]
        if self.orthogonality_weight:
            losses["orthogonality"] = orthogonality_loss(codebook)
        losses = {name: jnp.where(warming, 0.0, value) for name, value in losses.items()}

        z_q = self._estimate(z_e, codes)
        if self.sync_nu:
            z_q = z_q + self.sync_nu * (codes - sg(codes))  # exactly 0, and carries the gradient
        return QuantizerOutput(
            z_q=jnp.where(warming, z_e, z_q),
            token_ids=token_ids,
            z_e=z_e,
            losses=losses,
            loss=sum(getattr(self, f"{name}_weight") * value for name, value in losses.items()),
        )

    def quantize(self, z_e: Array) -> Array:
        """The ids ``[...]`` int32 of the codes nearest to latents ``[..., D]``; a tie goes to the lowest id."""
        distances = self._distances(self._latents(z_e), self.codes())
        return jnp.argmin(distances, axis=-1).astype(jnp.int32).reshape(z_e.shape[:-1])

    def dequantize(self, code: Array) -> Array:
        """The codes ``[..., D]`` float32 of ids ``[...]`` in ``[0, K)``."""
        return self.codes()[code]

    def codes(self) -> Array:
        """All codes ``[K, D]`` float32 as they are searched and returned: normalised or transformed, if asked."""
        return self._transformed(self.codebook[...])

    def is_warming_up(self) -> Array:
        """Whether the quantizer is still the identity, a bool scalar."""
        return self.steps[...] < self.pretrain_steps

    def surgery(self, output: QuantizerOutput, key: Array) -> None:
        """What follows the optimizer's update of a training step: counts it, moves, initialises and replaces codes, in place.

        Args:
          output: of this step's forward pass; its token ids and latents are those of the global batch.
          key: PRNG key of this step.
        """
        init_key, replace_key = jax.random.split(key)
        latents, token_ids = output.z_e.reshape(-1, self.embedding_dim), output.token_ids.reshape(-1)
        codes, steps = self.codebook[...], self.steps[...] + 1
        if self.affine is not None:
            latents = self.affine.inverse(latents)

        counts = jnp.logical_not(self.is_warming_up())
        if self.init_method in ("latent_random", "kmeans"):
            drawn = steps == max(self.pretrain_steps, 1)
            counts = counts & ~drawn  # this step's ids are of the codes before
        if self.learning != "gradient":
            codes = jnp.where(counts, self._follow(codes, latents, output, counts), codes)
        if self.init_method in ("latent_random", "kmeans"):
            codes = self._initialise(init_key, codes, latents, drawn)
        if self.replace_freq:
            countdown = count_down(self.countdown[...], token_ids, replace_freq=self.replace_freq, when=counts)
            stale = countdown <= 0
            codes, self.countdown[...] = replace_stale(
                replace_key, codes, countdown, latents, replace_freq=self.replace_freq, noise=self.replace_noise
            )
            if self.learning == "ema":
                self._restart_averages(codes, jnp.ones_like(self.ema_counts[...]), when=stale)
        if self.affine is not None:
            self.affine.update(output.z_e.reshape(-1, self.embedding_dim), codes, self.steps[...] == 0)
        self.codebook[...] = codes
        self.steps[...] = steps

    def _follow(self, codes: Array, latents: Array, output: QuantizerOutput, when: Array) -> Array:
        """The codes ``[K, D]`` after one step of ``learning`` without gradients; keeps the averages if ``when``."""
        token_ids = output.token_ids.reshape(-1)
        if self.learning == "alternating":
            for round_ in range(self.alternating_steps):
                if round_:
                    token_ids = jnp.argmin(self._distances(output.z_e, self._transformed(codes)), axis=-1)
                codes, _ = step_to_means(codes, latents, token_ids, rate=self.alternating_rate)
        else:
            averages = self.ema_counts[...], self.ema_sums[...]
            moved, *new = ema_update(*averages, latents, token_ids, decay=self.ema_decay, epsilon=self.ema_epsilon)
            faded = jnp.linalg.norm(moved, axis=-1, keepdims=True) < 1e-6  # it has no direction any more
            codes = jnp.where(faded, codes, moved) if self.l2_norm else moved
            self.ema_counts[...], self.ema_sums[...] = jax.tree.map(partial(jnp.where, when), tuple(new), averages)
        return l2_normalize(codes) if self.l2_norm else codes

    def _initialise(self, key: Array, codes: Array, latents: Array, drawn: Array) -> Array:
        """Codes ``[K, D]`` drawn from the batch's latents, and refined by k-means if asked, if ``drawn``."""
        codes, counts = init_from_latents(key, codes, latents, when=drawn), jnp.ones(codes.shape[0])
        if self.init_method == "kmeans":

            def refine(means: Array) -> tuple[Array, Array]:
                return kmeans(means, latents, iterations=self.kmeans_iterations, spherical=self.l2_norm)

            codes, counts = jax.lax.cond(drawn, refine, lambda means: (means, counts), codes)  # once in a training
        if self.learning == "ema":
            self._restart_averages(codes, jnp.maximum(counts, 1.0), when=drawn)
        return codes

    def _restart_averages(self, codes: Array, counts: Array, when: Array) -> None:
        """Sets the moving averages of codes ``[K, D]`` as if each had had ``counts`` latents a step, where ``when``."""
        self.ema_counts[...] = jnp.where(when, counts, self.ema_counts[...])
        self.ema_sums[...] = jnp.where(jnp.reshape(when, (-1, 1)), codes * counts[:, None], self.ema_sums[...])

    def _transformed(self, codes: Array) -> Array:
        """Stored codes ``[K, D]`` as they are searched and returned."""
        if self.l2_norm:
            return l2_normalize(codes)
        return codes if self.affine is None else self.affine(codes)

    def _latents(self, z_e: Array) -> Array:
        """The latents ``[..., D]`` that are quantized, float32, normalised if asked."""
        self.check_width(z_e)
        z_e = jnp.asarray(z_e, jnp.float32)
        return l2_normalize(z_e) if self.l2_norm else z_e

    def _distances(self, z_e: Array, codes: Array) -> Array:
        """Squared distances ``[M, K]`` in the space that is searched, of latents ``[..., D]`` with M vectors."""
        z = z_e.reshape(-1, self.embedding_dim)
        if self.cos_dist:
            z, codes = l2_normalize(z), l2_normalize(codes)
        if self.z_proj is not None:
            z = jnp.matmul(z, self.z_proj[...], precision=jax.lax.Precision.HIGHEST)
            codes = jnp.matmul(codes, self.code_proj[...], precision=jax.lax.Precision.HIGHEST)
        return squared_distances(z, codes)
