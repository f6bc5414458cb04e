"""Trains every stage of a config: ``python -m vgpt_jax.main --config=configs/emoji.py --workdir=DIR``.

Stages that are finished are skipped, an interrupted one goes on from its newest checkpoint. Any field of the config can
be changed on the command line: ``--config.generator_training.num_steps=500``. ``--manual_dir=DIR`` holds archives of the data set
that were downloaded by hand (`vgpt_jax.prepare`).
"""

import os
import sys
import time
from pathlib import Path

from vgpt_jax.configuration import check_workdir, claim_workdir, read_flags
from vgpt_jax.data.datasets import load_sources, make_views
from vgpt_jax.data.tfds_prepare import QUIET_TENSORFLOW
from vgpt_jax.errors import UserError, check_range, choose, exit_on_user_error
from vgpt_jax.host_memory import accelerator_is_installed, keep_freed_memory
from vgpt_jax.progress import clock
from vgpt_jax.training import classifier_stage, generator_stage, tokenizer_stage
from vgpt_jax.training.loop import train
from vgpt_jax.training.sharding import make_mesh

STAGES = {"tokenizer": tokenizer_stage, "generator": generator_stage, "classifier": classifier_stage}


def train_all(config, workdir: Path) -> None:
    """Trains the stages of ``config.stages`` in order, in ``workdir``.

    Everything that the config alone can get wrong is found out before the workdir is claimed and anything trained.

    Raises:
      UserError: the config is not sound, the workdir belongs to another, or it cannot be written.
    """
    names = [name for entry in config.stages for name in entry.split(",")]  # --config.stages=a,b arrives as one entry
    modules = {name: choose("an entry of stages", name, STAGES) for name in names}
    check_workdir(workdir, config)
    for name in modules:
        if is_finished(workdir / name):
            print(f"{name}: finished before, in {workdir / name}", flush=True)
    modules = {name: module for name, module in modules.items() if not is_finished(workdir / name)}
    if not modules:
        return

    check_range("seed", config.seed, least=0, most=2**32 - 1)
    check_range("max_skipped_steps", config.max_skipped_steps, least=0)
    for field in ("log_every", "eval_every", "checkpoint_every", "keep_checkpoints"):
        check_range(f"logging.{field}", config.logging[field], least=1)
    make_views(config.data, config.seed)
    mesh, sources = make_mesh(), load_sources(config.data)
    for module in modules.values():
        module.plan(config, mesh, len(sources[0].class_names), workdir)
    claim_workdir(workdir, config)
    try:
        for name, module in modules.items():
            begun = time.monotonic()
            stage = module.build(config, mesh, workdir, sources)
            (workdir / name).mkdir(parents=True, exist_ok=True)
            device = mesh.devices.flat[0].device_kind
            print(f"{name}: {stage.num_steps} steps on {mesh.size} {device} device(s)", flush=True)
            train(
                stage,
                directory=workdir / name,
                mesh=mesh,
                logging=config.logging,
                config=config.to_dict(),
                max_skipped_steps=config.max_skipped_steps,
            )
            print(f"{name}: finished in {clock(time.monotonic() - begun)}", flush=True)
    except OSError as error:
        raise UserError(f"{workdir} cannot be written ({error}): what was saved before is whole") from error


def is_finished(directory: Path) -> bool:
    """Whether the stage of that folder has left its model, which it does last."""
    return (directory / "model" / "metadata.json").is_file()


@exit_on_user_error
def main(argv: list[str]) -> None:
    if {"--help", "-h", "-help"} & set(argv):
        print(f"{__doc__}\nconfigs/default.py names and explains every field.")
        return
    if not accelerator_is_installed():  # there one arena would only hold up the threads that load data
        keep_freed_memory()
    for name, value in QUIET_TENSORFLOW.items():  # the metric writers import tensorflow
        os.environ.setdefault(name, value)
    config, workdir = read_flags(argv)
    train_all(config, workdir)


if __name__ == "__main__":
    main(sys.argv)
