"""Compiles a training step for a TPU slice that is not here, and says what it will need there.

  python -m vgpt_jax.compile_ahead --config=configs/imagenet.py --stage=generator --topology=v5e:16x16
  python -m vgpt_jax.compile_ahead --config=configs/imagenet.py --stage=gpt --topology=v6e:4x4 --sample --config.gpt.size=XL

The compiler is the one that a TPU host runs (the package libtpu: pip install 'vgpt-jax[tpu]'), the program is the one that
vgpt_jax.main runs, on the same mesh: a batch that does not fit into a chip's memory does not fit here. The times are what the
arithmetic, the memory and the interconnect would take at the rates of the chip's data sheet, each by itself. The greatest is a
bound, not a promise. Any field of the config can be changed: --config.generator_training.batch_size=512.
"""

import argparse
import json
import os
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vgpt_jax.command_line import CommandParser
from vgpt_jax.configuration import read_flags
from vgpt_jax.data.datasets import DATASETS
from vgpt_jax.data.emoji import read_emoji_list
from vgpt_jax.data.tfds_source import check_features, make_builder
from vgpt_jax.errors import UserError, check_range, choose, close_names, exit_on_user_error
from vgpt_jax.files import written_whole
from vgpt_jax.hardware import ACCELERATORS
from vgpt_jax.models.classifier import ConvClassifier
from vgpt_jax.models.gpt import GPT
from vgpt_jax.sampling.parallel import group_sizes
from vgpt_jax.sampling.program import Batch, ClassifierScore, Plan, draw_pictures
from vgpt_jax.training import generator_stage
from vgpt_jax.training.compile_report import Job, advice, compiled_report, table
from vgpt_jax.training.from_config import classifier_arguments, gpt_arguments, trained_tokenizer
from vgpt_jax.training.sharding import bytes_of, make_mesh, num_shards, of_batches, of_state
from vgpt_jax.training.stages import STAGES
from vgpt_jax.training.state import TrainState, abstract

EXAMPLES = "v5e:2x2, v5e:16x16, v6e:4x4, v4:2x2x2, v5p:4x4x4"

PICTURES_A_CHIP = 8

ENVIRONMENT = {  # what libtpu asks for where there is no TPU, and JAX told to leave one alone where there is
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # of this host, not of the slice; without one it complains
}


def slice_devices(topology: str, slices: int = 1) -> list[Any]:
    """The devices of a TPU slice that is not here, or of several.

    Args:
      topology: "TYPE:AxB" or "TYPE:AxBxC", in chips.
      slices: how many of them.

    Raises:
      UserError: there is no libtpu, or no such slice.
    """
    from jax.experimental import topologies

    if find_spec("libtpu") is None:
        raise UserError("there is no libtpu, the compiler for TPUs: pip install 'vgpt-jax[tpu]'")
    check_range("--slices", slices, least=1)
    os.environ.update(ENVIRONMENT)
    options = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # its two cores are one device, as on a TPU VM
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise UserError(
            f"--topology={topology} is no TPU slice ({reason}); there are, for example, {EXAMPLES}"
        ) from error
    chip = devices[0].device_kind
    if chip not in ACCELERATORS:
        raise UserError(
            f"--topology={topology} is of chips ({chip}) whose rates are not known: take one such as {EXAMPLES}"
        )
    return devices


def num_classes_of(data) -> int:
    """The number of classes of a config's data set, without its data.

    Raises:
      UserError: only the data says it.
    """
    if data.name == "emoji":
        return len({getattr(e, data.emoji_label) for e in read_emoji_list(data.emoji_skin_tones)})
    if data.name in DATASETS:
        raise UserError(f"how many classes {data.name} has only its data says: give --num_classes")
    features = make_builder(data.name, data.data_dir, tuple(DATASETS)).info.features
    check_features(data.name, features)
    return features["label"].num_classes


def parts_of_state(state: TrainState) -> dict[str, int]:
    """Bytes of a device for the parts of a training state."""
    parts = {"parameters": state.params, "optimizer": state.opt_state, "averages": state.averages}
    found = {name: bytes_of(tree) for name, tree in parts.items()}
    found["discriminator"] = bytes_of(getattr(state, "discriminator", None))
    return found | {"other state": bytes_of(state) - sum(found.values())}


def step_jobs(stage: str, config, mesh: Mesh, num_classes: int, workdir: Path) -> list[Job]:
    """The steps that a stage's training takes: of some stages another from some step on.

    Raises:
      UserError: the config is not sound.
    """
    program = STAGES[stage].program(config, mesh, num_classes, workdir)
    given = (program.state, program.batch, program.frozen)
    parts = parts_of_state(program.state) | {
        "frozen weights": bytes_of(program.frozen),
        "batch": bytes_of(program.batch),
    }
    pictures = next(iter(program.batch.values())).shape[0]
    several = len(program.train_steps) > 1
    return [
        Job(f"{stage} step{f' from {first} on' if several else ''}", pictures, parts, partial(step.lower, *given))
        for first, step in program.train_steps.items()
    ]


def sampler_job(config, mesh: Mesh, num_classes: int, workdir: Path, pictures: int) -> Job:
    """The program that draws pictures as the config's ``sampling`` says, with the scores of the classifier where one is trained.

    Args:
      config: of the models.
      mesh: over which the pictures are split.
      num_classes: of the data.
      workdir: its tokenizer is taken, if it is there.
      pictures: for each of the chips that share a batch.

    Raises:
      UserError: the config is not sound.
    """
    tokenizer, scorer = trained_tokenizer(config, workdir), None
    arguments = gpt_arguments(config, tokenizer, num_classes)
    gpt = nnx.eval_shape(lambda: GPT(**arguments, rngs=nnx.Rngs(0)))
    drawing, value_range = generator_stage.drawing_of(config, config.seed), tuple(config.data.value_range)
    drawing.check(gpt)
    if "classifier" in config.stages:
        of_classifier = classifier_arguments(config, num_classes)
        scorer = nnx.eval_shape(lambda: ClassifierScore(ConvClassifier(**of_classifier, rngs=nnx.Rngs(0)), value_range))
    graph, weights = nnx.split((gpt, tokenizer, scorer))
    weights = abstract(weights, of_state(mesh, weights))
    shards, sizes = num_shards(mesh), ()
    if drawing.num_steps:
        sizes = tuple(map(int, group_sizes(gpt.num_tokens, drawing.num_steps)))
    count = pictures * shards
    rows = jax.ShapeDtypeStruct((count,), np.int32, sharding=of_batches(mesh))
    plan = Plan(count, drawing.order == "random" or bool(sizes), sizes, devices=shards)
    given = (graph, weights, Batch(rows, rows, rows), np.uint32(0), drawing.options(gpt), None, value_range)
    lower = partial(draw_pictures.lower, *given, score=None, plan=plan)
    return Job("sampler", count, {"parameters": bytes_of(weights)}, lower)


def chosen_stages(name: str, sample: bool) -> list[str]:
    """The stages that ``--stage`` names.

    Raises:
      UserError: there is none of that name; or a sampler is asked for without the generator.
    """
    stage = choose("--stage", name, {stage: stage for stage in STAGES} | {"gpt": "generator", "all": ""})
    stages = [stage] if stage else list(STAGES)
    if sample and "generator" not in stages:
        raise UserError(
            f"--sample draws with the generator, but --stage is {name}: give --stage=generator or --stage=all"
        )
    return stages


def read_arguments(argv: list[str]) -> tuple[argparse.Namespace, Any]:
    """The command line's own flags, and the config.

    Raises:
      UserError: as `vgpt_jax.configuration.read_flags`; or a flag is missing or unknown.
    """
    parser = CommandParser("compile_ahead", __doc__)
    add = parser.add_argument
    add("--stage", required=True, help=f"{', '.join(STAGES)} (or gpt), or all")
    add("--topology", required=True, help=f"of the slice: {EXAMPLES}")
    add("--slices", type=int, default=1, metavar="N", help="so many of them, which share the work of a step")
    add(
        "--sample",
        type=int,
        nargs="?",
        const=PICTURES_A_CHIP,
        metavar="N",
        help=f"the sampler too, at N ({PICTURES_A_CHIP}) pictures a chip",
    )
    add("--num_classes", type=int, help="of the data, where only the data says")
    add("--workdir", default=os.devnull, help="of a run whose tokenizer is trained: the generator is for that one")
    add("--json", type=Path, metavar="FILE", help="the same to be read by programs")
    add("--dump_hlo", type=Path, metavar="DIR", help="for the texts of the compiled programs")
    options, others = parser.parse_known_args(argv[1:])
    for argument in others:
        name = argument.split("=")[0].lstrip("-").split(".")[0]
        if argument.startswith("-") and name != "config":
            raise UserError(f"unknown flag {argument.split('=')[0]}: {close_names(name, [*vars(options), 'config'])}")
    config, _ = read_flags([argv[0], *others, f"--workdir={options.workdir}"])
    return options, config


@exit_on_user_error
def main(argv: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot hold programs for devices that are not here
    options, config = read_arguments(argv)
    stages = chosen_stages(options.stage, options.sample is not None)
    for name in ("sample", "num_classes"):
        if vars(options)[name] is not None:
            check_range(f"--{name}", vars(options)[name], least=1)
    workdir = Path(options.workdir).expanduser()
    mesh = make_mesh(**config.mesh, devices=slice_devices(options.topology, options.slices))
    num_classes = num_classes_of(config.data) if options.num_classes is None else options.num_classes
    jobs = [job for stage in stages for job in step_jobs(stage, config, mesh, num_classes, workdir)]
    if options.sample is not None:
        jobs.append(sampler_job(config, mesh, num_classes, workdir, options.sample))
    reports = []
    try:
        for job in jobs:
            reports.append(compiled_report(job, mesh, options.dump_hlo))
            print(table(reports[-1]), flush=True)
        if options.json:
            with written_whole(options.json) as unfinished:
                unfinished.write_text(json.dumps([report.as_dict() for report in reports], indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--json or --dump_hlo cannot be written: {error}") from error
    if too_big := [advice(report) for report in reports if not report.fits]:
        raise UserError("; ".join(too_big))


if __name__ == "__main__":
    main(sys.argv)
