"""Reading a config from the command line, and the config that a workdir belongs to."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from vgpt_jax.errors import UserError, close_names
from vgpt_jax.files import written_whole

FREE_FIELDS = (
    "logging",
    "stages",
    "sampling",
    "data.cache_dir",
    "data.data_dir",
    "data.manual_dir",
    "max_skipped_steps",
)
"""What may change between a run and its resumption, as it changes no weight."""


def read_flags(argv: list[str]) -> tuple[ConfigDict, Path]:
    """Reads ``--config``, ``--workdir``, ``--manual_dir`` (short for ``--config.data.manual_dir``) and ``--config.FIELD=VALUE``
    from a command line.

    Args:
      argv: the program's name, then its arguments.

    Returns:
      The config with its changed fields, and the workdir.

    Raises:
      UserError: a flag is missing or unknown, there is no such config file or it cannot be read, a field is unknown
        (with close ones) or a value of the wrong type.
    """
    own = flags.FlagValues()  # not absl's global ones, to which libraries add theirs
    config = config_flags.DEFINE_config_file("config", None, "configs/NAME.py", flag_values=own)
    workdir = flags.DEFINE_string("workdir", None, "folder of checkpoints, models and pictures", flag_values=own)
    manual_dir = flags.DEFINE_string(
        "manual_dir", None, "folder of downloaded archives of the data set", flag_values=own
    )
    path = _config_path(argv)
    fields = set(_field_names(_load(path))) if path else set()
    try:
        leftover = own(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(
            f"unknown flag --{error.flagname}: {close_names(error.flagname, ['config', 'workdir', 'manual_dir'])}"
        ) from error
    except (AttributeError, KeyError) as error:
        given = [a.removeprefix("--config.").split("=")[0] for a in argv if a.startswith("--config.")]
        unknown = [name for name in given if name not in fields]
        if not unknown:
            raise
        raise UserError(f"the config has no field {unknown[0]!r}: {close_names(unknown[0], fields)}") from error
    except (flags.Error, TypeError, ValueError) as error:
        wrong = re.search(r"config\.([\w.]+)", str(error))
        where = f" in config.{wrong.group(1)}" if wrong else ""
        raise UserError(f"wrong value{where}: {str(error).splitlines()[0]}") from error
    if leftover:
        raise UserError(f"{leftover[0]!r} is no flag: did you mean --{leftover[0].lstrip('-')}?")
    for name, value, example in (("config", path, "configs/emoji.py"), ("workdir", workdir.value, "runs/emoji")):
        if not value:
            raise UserError(f"--{name} is needed, for example --{name}={example}")
    if manual_dir.value:
        config.value.data.manual_dir = manual_dir.value
    return config.value, Path(workdir.value).expanduser()


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Checks that a workdir is new or belongs to this config; writes nothing.

    Raises:
      UserError: it belongs to a config with other values, which the message lists, or its config cannot be read.
    """
    if not (workdir / "config.json").is_file():
        return
    there, mine = json.loads(read_config(workdir).to_json_best_effort()), json.loads(config.to_json_best_effort())
    changed = [
        f"{name} ({its_value!r} there, {my_value!r} here)"
        for name, its_value, my_value in _differences(there, mine)
        if not any(name == field or name.startswith(f"{field}.") for field in FREE_FIELDS)
    ]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"{workdir} belongs to a run with another config: {', '.join(changed[:5])}{more}; give another --workdir"
        )


def claim_workdir(workdir: Path, config: ConfigDict) -> None:
    """Writes the config into a workdir, which belongs to it from then on.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        with written_whole(workdir / "config.json") as unfinished:
            unfinished.write_text(json.dumps(json.loads(config.to_json_best_effort()), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{workdir} cannot be written ({error.strerror}): give another --workdir") from error


def read_config(workdir: Path) -> ConfigDict:
    """The config that a workdir belongs to.

    Raises:
      UserError: the folder is no workdir, or its config is damaged.
    """
    path = Path(workdir) / "config.json"
    try:
        return ConfigDict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir} is not a workdir of vgpt_jax.main ({path}: {error})") from error


def _field_names(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _field_names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _differences(there: dict, mine: dict, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    for name in there | mine:
        a, b = there.get(name), mine.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            yield prefix + name, a, b


def _config_path(argv: list[str]) -> str | None:
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        if argument in ("--config", "-config"):
            return following
        if argument.startswith("--config="):
            return argument.split("=", 1)[1]
    return None


def _load(path: str) -> ConfigDict:
    """The config of a file, without changes from the command line."""
    name = path.split(":")[0]
    if not Path(name).is_file():
        raise UserError(f"--config={path}: there is no such file")
    try:
        spec = importlib.util.spec_from_file_location("config", name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config()
    except Exception as error:  # whatever a user's own file raises
        raise UserError(f"--config={path} cannot be read ({type(error).__name__}: {error})") from error
