"""Trains every stage of a config: ``python -m vgpt_jax.main --config=configs/emoji.py --workdir=DIR``.

Stages that are finished are skipped, an interrupted one goes on from its newest checkpoint. Any field of the config can
be changed on the command line: ``--config.generator_training.num_steps=500``. ``--manual_dir=DIR`` holds archives of the data set
that were downloaded by hand (`vgpt_jax.prepare`).

SIGTERM saves and ends it with status 75; the same command goes on from there. ``--profile`` writes a trace of five steps of each
stage, or of those that ``--profile=FIRST:COUNT`` names, to DIR/STAGE/profile.

Several processes are found by themselves on TPUs and under Slurm; elsewhere each is told ``--coordinator=HOST:PORT
--num_processes=N --process_id=I``.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax

from vgpt_jax.command_line import CommandParser, add_process_flags
from vgpt_jax.configuration import check_workdir, claim_workdir, read_flags
from vgpt_jax.data.datasets import load_sources, make_views
from vgpt_jax.data.tfds_prepare import QUIET_TENSORFLOW
from vgpt_jax.errors import UserError, check_range, choose, exit_on_user_error
from vgpt_jax.host_memory import accelerator_is_installed, collect_garbage_rarely, keep_freed_memory
from vgpt_jax.progress import clock
from vgpt_jax.training.loop import train
from vgpt_jax.training.preemption import listening
from vgpt_jax.training.processes import first_does, join, say, together
from vgpt_jax.training.sharding import check_memory, describe, make_mesh
from vgpt_jax.training.stages import STAGES
from vgpt_jax.training.trace import check_profiler
from vgpt_jax.training.workdir_lock import claimed


def train_all(config, workdir: Path, profile: tuple[int, int] | None = None) -> None:
    """Trains the stages of ``config.stages`` in order, in ``workdir``.

    Everything that the config alone can get wrong is found out before the workdir is claimed and anything trained. With several
    processes, all call this.

    Args:
      config: what to train.
      workdir: where, a folder that all processes see.
      profile: the first step, counted from the start of each stage, and the number of the steps to trace; None: none.

    Raises:
      UserError: the config is not sound, the workdir belongs to another, or it cannot be written.
    """
    names = [name for entry in config.stages for name in entry.split(",")]  # --config.stages=a,b arrives as one entry
    modules = {name: choose("an entry of stages", name, STAGES) for name in names}
    check_workdir(workdir, config)
    for name in modules:
        if is_finished(workdir / name):
            say(f"{name}: finished before, in {workdir / name}")
    modules = {name: module for name, module in modules.items() if not is_finished(workdir / name)}
    if not modules:
        return

    check_range("seed", config.seed, least=0, most=2**32 - 1)
    check_range("max_skipped_steps", config.max_skipped_steps, least=0)
    for field in ("log_every", "eval_every", "checkpoint_every", "keep_checkpoints"):
        check_range(f"logging.{field}", config.logging[field], least=1)
    check_range("logging.keep_best", config.logging.keep_best, least=0)
    make_views(config.data, config.seed)
    mesh, sources = make_mesh(**config.mesh), _load_sources(config)
    for name, module in modules.items():
        check_memory(name, module.program(config, mesh, len(sources[0].class_names), workdir).state)
    with claimed(workdir):
        first_does(lambda: claim_workdir(workdir, config))
        try:
            for name, module in modules.items():
                begun = time.monotonic()
                stage = module.build(config, mesh, workdir, sources)
                first_does(partial((workdir / name).mkdir, parents=True, exist_ok=True))
                say(f"{name}: {stage.num_steps} steps on {describe(mesh)}")
                train(
                    stage,
                    directory=workdir / name,
                    mesh=mesh,
                    logging=config.logging,
                    config=config.to_dict(),
                    max_skipped_steps=config.max_skipped_steps,
                    model_from=config[f"{name}_training"].model_from,
                    profile=profile,
                )
                say(f"{name}: finished in {clock(time.monotonic() - begun)}")
        except OSError as error:
            raise UserError(f"{workdir} cannot be written ({error}): what was saved before is whole") from error
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith("RESOURCE_EXHAUSTED"):
                raise
            raise UserError(
                f"{name}: the memory does not suffice ({str(error).splitlines()[0]:.200}): take smaller batches, accumulate, "
                "remat, a smaller model, or more devices; what was saved before is whole"
            ) from error


def _load_sources(config) -> tuple[Any, Any]:
    """The data, which the first process may have to prepare, or to draw, before the others read it."""
    found = []
    first_does(lambda: found.append(load_sources(config.data)))
    together(lambda: None if found else found.append(load_sources(config.data)))
    return found[0]


def is_finished(directory: Path) -> bool:
    """Whether the stage of that folder has left its model, which it does last."""
    return os.path.isfile(directory / "model" / "metadata.json")  # unlike Path's, also where a name is too long for one


def read_profile(text: str | None) -> tuple[int, int] | None:
    """``FIRST:COUNT`` as numbers.

    Raises:
      UserError: it is something else.
    """
    if text is None:
        return None
    first, _, count = text.partition(":")
    if not (first.isdigit() and count.isdigit() and int(count)):
        raise UserError(f"--profile is {text!r}, but must be FIRST:COUNT, such as 10:5 for five steps after the tenth")
    return int(first), int(count)


@exit_on_user_error
def main(argv: list[str]) -> None:
    if {"--help", "-h", "-help"} & set(argv):
        print(f"{__doc__}\nconfigs/default.py names and explains every field.")
        return
    collect_garbage_rarely()
    if not accelerator_is_installed():  # there one arena would only hold up the threads that load data
        keep_freed_memory()
    for name, value in QUIET_TENSORFLOW.items():  # the metric writers import tensorflow
        os.environ.setdefault(name, value)
    parser = CommandParser("main", __doc__)
    add_process_flags(parser)
    parser.add_argument("--profile", nargs="?", const="10:5", metavar="FIRST:COUNT")
    arguments, rest = parser.parse_known_args(argv[1:])
    config, workdir = read_flags([argv[0], *rest])
    join(arguments.coordinator, arguments.num_processes, arguments.process_id)
    profile = read_profile(arguments.profile)
    if profile:
        check_profiler()
    with listening():
        train_all(config, workdir, profile)


if __name__ == "__main__":
    main(sys.argv)
