"""Stage 2: the generator learns to write the token grids of the frozen tokenizer."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from vgpt_jax.data.datasets import make_views
from vgpt_jax.data.loader import evaluation_batches, training_batches
from vgpt_jax.data.token_cache import TokenSource, read_token_cache, write_token_cache
from vgpt_jax.data.transforms import to_uint8
from vgpt_jax.errors import UserError, check_range
from vgpt_jax.evaluation.metrics import entropy
from vgpt_jax.evaluation.runner import Evaluation, mean_over, summed
from vgpt_jax.losses import cross_entropy
from vgpt_jax.models.gpt import GPT
from vgpt_jax.models.tokenizer import Tokenizer
from vgpt_jax.sampling.class_names import class_key, shown_name
from vgpt_jax.sampling.cond_visual_gpt import CondVisualGPT, Samples
from vgpt_jax.sampling.request import Drawing
from vgpt_jax.training.from_config import check_training, gpt_arguments, trained_tokenizer
from vgpt_jax.training.optimizer import make_optimizer
from vgpt_jax.training.processes import together
from vgpt_jax.training.remat import economical, in_parts
from vgpt_jax.training.saved_model import load_model, save_model
from vgpt_jax.training.sharding import local_rows, make_mesh, of_batches, replicated
from vgpt_jax.training.stage import Program, Stage
from vgpt_jax.training.state import (
    TrainState,
    apply_gradients,
    averaged_model,
    compiled_step,
    planned_model_state,
    skip_counts,
    skip_if_not_finite,
    start_from,
    update_averages,
)
from vgpt_jax.visualization.grid import enlarge, make_grid, scale_for

ENCODE_BATCH = 32
MAX_CLASSES_SHOWN = 12


RandomShare = Callable[[jax.Array], jax.Array]
"""The number of a step to the share of the pictures whose order of writing is random."""


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    *,
    ema_decay: float = 0.0,
    random_share: RandomShare | None = None,
    remat: str = "none",
    accumulate: int = 1,
):
    """The pure step ``(state, batch, frozen) -> (state, metrics)``; the batch has ``token_ids`` ``[B, N]`` and ``label`` ``[B]``,
    ``frozen`` is None. The loss is over image tokens only.

    Args:
      graph: of the GPT.
      optimizer: of its parameters.
      mesh: devices; None: the parameters are whole on every device.
      ema_decay: of the averaged parameters; 0: there are none.
      random_share: for generators of random order (RAR, arXiv 2411.00776); None: raster order.
      remat: what is kept for the backward pass, a name in `remat.POLICIES`.
      accumulate: parts of a batch that are computed one after the other.
    """

    def train_step(state: TrainState, batch: dict, frozen: None = None) -> tuple[TrainState, dict]:
        def of_part(part: dict, key: jax.Array):
            dropout_key, order_key = jax.random.split(key)
            orders = None
            if random_share is not None:
                orders = draw_orders(order_key, part["token_ids"].shape, random_share(state.step))

            def loss(params):
                gpt = nnx.merge(graph, params, state.buffers)
                conditions = gpt.condition_ids(part["label"], len(part["label"]))
                return jnp.mean(token_losses(gpt, conditions, part["token_ids"], dropout_key, orders))

            return jax.value_and_grad(economical(loss, remat, mesh))(state.params), ()

        (value, gradients), _ = in_parts(of_part, batch, state.step_key(), accumulate, mesh)
        norm = optax.tree.norm(gradients)
        after = apply_gradients(state, gradients, optimizer)
        if ema_decay:
            after = update_averages(after, ema_decay)
        state = skip_if_not_finite(state, after, value, norm)
        return state, {"nats_per_token": value, "gradient_norm": norm} | skip_counts(state)

    return train_step


def draw_orders(key: jax.Array, shape: tuple[int, int], share: jax.Array | float) -> jax.Array:
    """Orders of writing ``[B, N]``: for about a share of the examples a permutation of their own, for the others raster order."""
    pick_key, order_key = jax.random.split(key)
    random = jax.random.bernoulli(pick_key, share, shape[:1])
    return jnp.where(random[:, None], jnp.argsort(jax.random.uniform(order_key, shape), axis=1), jnp.arange(shape[1]))


def annealed(num_steps: int, random_until: float, raster_from: float) -> RandomShare:
    """A share that is 1 up to ``random_until`` of the training, and falls evenly to 0 at ``raster_from``."""
    first, last = random_until * num_steps, raster_from * num_steps
    return lambda step: jnp.where(step < first, 1.0, jnp.clip((last - step) / max(last - first, 1.0), 0.0, 1.0))


def token_losses(
    gpt: GPT,
    conditions: jax.Array,
    token_ids: jax.Array,
    dropout_key: jax.Array | None = None,
    orders: jax.Array | None = None,
) -> jax.Array:
    """Cross-entropy in nats of every image token given its condition ``[B]`` and the tokens before it: ``[B, N]``, in the order
    of writing, ``orders`` ``[B, N]`` or raster."""
    if orders is not None:
        token_ids = jnp.take_along_axis(token_ids, orders, axis=1)
    inputs = jnp.concatenate([conditions[:, None], token_ids[:, :-1]], axis=1)
    return cross_entropy(gpt(inputs, dropout_key, orders), token_ids)


def held_out_metrics(gpt: GPT, batch: dict) -> dict:
    """Each example conditioned on its class: ``nats_per_token`` ``[B]``, and for generators of random order
    ``random_order_nats_per_token`` ``[B]``, in the same orders at every evaluation."""
    conditions, token_ids = gpt.condition_ids(batch["label"], len(batch["label"])), batch["token_ids"]
    metrics = {"nats_per_token": jnp.mean(token_losses(gpt, conditions, token_ids), axis=1)}
    if gpt.random_order:
        orders = draw_orders(jax.random.key(0), token_ids.shape, 1.0)
        random = token_losses(gpt, conditions, token_ids, orders=orders)
        metrics["random_order_nats_per_token"] = jnp.mean(random, axis=1)
    return metrics


def unigram_nats(tokens: TokenSource, num_codes: int) -> float:
    """Entropy in nats of the distribution of single tokens: what a model that has learnt nothing else would reach."""
    return entropy(tokens.counts(num_codes))


def token_sources(
    config, tokenizer: Tokenizer, fingerprint: str, workdir: Path, sources: tuple[Any, Any]
) -> tuple[TokenSource, TokenSource]:
    """Both parts of the token cache, of which what is missing is written first: by every process its own shards.

    Raises:
      UserError: the cache is of another tokenizer, of other data or views, or damaged.
    """
    directory = workdir / "token_cache"
    graph, state = nnx.split(tokenizer)
    mine = make_mesh(devices=jax.local_devices())
    state = jax.device_put(jax.device_get(state), replicated(mine))
    encode = jax.jit(lambda state, images: nnx.merge(graph, state).encode(images))
    write = partial(
        write_token_cache,
        directory,
        lambda images: encode(state, jax.device_put(images, of_batches(mine))),
        sources,
        make_views(config.data, config.seed),
        batch_size=ENCODE_BATCH * mine.size,
        num_codes=tokenizer.num_codes,
        token_shape=tokenizer.token_shape,
        fingerprint=fingerprint,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    together(write)
    return read_token_cache(directory, fingerprint=fingerprint)


def drawing_of(config, seed: int) -> Drawing:
    """How the config's ``sampling`` section draws.

    Raises:
      UserError: the section has a field that is no option.
    """
    options = config.sampling.to_dict()
    del options["num"]
    return Drawing.of(**options, seed=seed)


def plan(config, mesh: Mesh, num_classes: int, workdir: Path) -> tuple[dict[str, Any], optax.GradientTransformation]:
    """The model's arguments, for the tokenizer in the workdir or else the one that the config describes, and the optimizer.

    Raises:
      UserError: the config is not sound; the message names the field.
    """
    training = config.generator_training
    check_training(mesh, "generator_training", config)
    check_range("generator_training.random_until", training.random_until, least=0, most=1)
    check_range("generator_training.raster_from", training.raster_from, least=training.random_until, most=1)
    check_range("generator_training.ema_decay", training.ema_decay, least=0, most=0.999999)
    check_range("sampling.num", config.sampling.num, least=1)
    arguments = gpt_arguments(config, trained_tokenizer(config, workdir), num_classes)
    gpt = nnx.eval_shape(lambda: GPT(**arguments, rngs=nnx.Rngs(0)))
    try:
        drawing_of(config, 0).check(gpt)
    except UserError as error:
        raise UserError(f"in the config's sampling section, {error}") from error
    return arguments, make_optimizer(num_steps=training.num_steps, **training.optimizer)


def known_classes(
    class_names: Sequence[str], there: nnx.State, fresh: nnx.State, metadata: dict[str, Any]
) -> nnx.State:
    """The parameters of a trained generator for other classes: those that it knows by name keep their vectors, new ones begin
    with fresh ones.

    Args:
      class_names: C of them.
      there: parameters of the trained generator.
      fresh: parameters of the generator for ``class_names``.
      metadata: of the trained generator.
    """
    num_codes, old = metadata["arguments"]["num_codes"], [class_key(name) for name in metadata["class_names"]]
    known = [(i, old.index(class_key(name))) for i, name in enumerate(class_names) if class_key(name) in old]
    mine, theirs = (np.array([pair[side] for pair in known], np.int32) + num_codes for side in (0, 1))

    def adapted(path, table, start):
        if not any(name in jax.tree_util.keystr(path) for name in ("token_embedding", "'head'")):
            return table
        start = start.at[:num_codes].set(table[:num_codes]).at[-2:].set(table[-2:])
        return start.at[mine].set(table[theirs])

    return jax.tree.map_with_path(adapted, there, fresh)


def phases(config) -> dict[int, RandomShare | None]:
    """The step that each phase of the training begins with, and its share of random orders; None: raster order alone."""
    training = config.generator_training
    raster = int(np.ceil(training.raster_from * training.num_steps))
    if not config.gpt.random_order or raster == 0:
        return {0: None}
    random = {0: annealed(training.num_steps, training.random_until, training.raster_from)}
    return random | ({raster: None} if raster < training.num_steps else {})


def program(config, mesh: Mesh, num_classes: int, workdir: Path) -> Program:
    """What the generator's stage computes.

    Raises:
      UserError: as `plan`.
    """
    training = config.generator_training
    arguments, optimizer = plan(config, mesh, num_classes, workdir)
    graph, state, create = planned_model_state(
        lambda rngs: GPT(**arguments, rngs=rngs), optimizer, config.seed, mesh, averaged=training.ema_decay > 0
    )
    options = {"ema_decay": training.ema_decay, "remat": training.remat, "accumulate": training.accumulate}
    steps = {
        first: compiled_step(make_train_step(graph, optimizer, mesh, random_share=random_share, **options), state, mesh)
        for first, random_share in phases(config).items()
    }
    size, over = training.batch_size, of_batches(mesh)
    batch = {
        "token_ids": jax.ShapeDtypeStruct((size, arguments["num_tokens"]), np.int32, sharding=over),
        "label": jax.ShapeDtypeStruct((size,), np.int32, sharding=over),
    }
    return Program(arguments, graph, state, None, batch, steps, create)


def build(config, mesh: Mesh, workdir: Path, sources: tuple[Any, Any]) -> Stage:
    """The generator's stage, on the tokens of a training and a held-out source.

    Raises:
      UserError: as `plan`; or there is no tokenizer, or it does not fit the config or the token cache.
    """
    training = config.generator_training
    planned = program(config, mesh, len(sources[0].class_names), workdir)
    graph, arguments = planned.graph, planned.arguments
    tokenizer, of_tokenizer = load_model(workdir / "tokenizer" / "model", "tokenizer", replicated(mesh))
    train_tokens, held_out = token_sources(config, tokenizer, of_tokenizer["fingerprint"], workdir, sources)
    unigram = unigram_nats(train_tokens, tokenizer.num_codes)
    rows = local_rows(mesh, training.batch_size)
    eval_sums = summed(lambda state, batch: held_out_metrics(averaged_model(graph, state), batch))
    shown = [shown_name(name) for name in train_tokens.class_names[:MAX_CLASSES_SHOWN]]

    def evaluate(state: TrainState) -> Evaluation:
        batches = evaluation_batches(held_out, lambda example: example, batch_size=training.batch_size, rows=rows)
        means = {name: float(value) for name, value in mean_over(eval_sums, state, batches, mesh).items()}
        model = CondVisualGPT(
            tokenizer,
            averaged_model(graph, state),
            class_names=train_tokens.class_names,
            value_range=of_tokenizer["value_range"],
            mesh=mesh,
        )
        labels = model.labels(range(len(shown)), config.sampling.num)
        drawn = Samples.joined(list(model.draw(labels, drawing_of(config, config.seed))))
        pictures = enlarge(to_uint8(drawn.images, (0, 1)), scale_for(tokenizer.image_size, 96))
        grid = make_grid(pictures, config.sampling.num, row_names=shown)
        scalars = means | {"bits_per_token": means["nats_per_token"] / np.log(2), "unigram_nats": unigram}
        return Evaluation(scalars, {"samples": grid})

    def finish(state: TrainState) -> None:
        save_model(
            workdir / "generator" / "model",
            "gpt",
            averaged_model(graph, state),
            arguments,
            class_names=list(train_tokens.class_names),
            token_shape=list(tokenizer.token_shape),
            tokenizer_fingerprint=of_tokenizer["fingerprint"],
            steps=int(state.step),
        )

    return Stage(
        name="generator",
        state=planned.create(),
        start=lambda state: start_from(
            state, training.init_from, "gpt", mesh, partial(known_classes, train_tokens.class_names)
        ),
        identity={"data": train_tokens.identity, "tokenizer": of_tokenizer["fingerprint"]},
        train_steps=planned.train_steps,
        frozen=None,
        batches=training_batches(
            train_tokens, lambda example, _: example, batch_size=training.batch_size, seed=config.seed, rows=rows
        ),
        batch_size=training.batch_size,
        num_steps=training.num_steps,
        evaluate=evaluate,
        best=("nats_per_token", "least"),
        finish=finish,
    )
