"""Reading a config from the command line, and the config that a workdir belongs to.

Whatever the file, the command line or the workdir says: a config that is returned has the fields of ``configs/default.py``,
all of them and no others, and each holds a value of the kind that it holds there.
"""

import importlib.util
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from vgpt_jax.errors import UserError, close_names
from vgpt_jax.files import written_whole

FREE_FIELDS = (
    "logging",
    "mesh",
    "stages",
    "sampling",
    "data.cache_dir",
    "data.data_dir",
    "data.manual_dir",
    "max_skipped_steps",
    *(
        f"{stage}_training.{name}"
        for stage in ("tokenizer", "generator", "classifier")
        for name in ("remat", "model_from")
    ),
)
"""What may change between a run and its resumption, as it changes no weight."""

DEFAULT = Path(__file__).parents[1] / "configs" / "default.py"
LARGEST = 2**32 - 1
KINDS = {
    bool: "True or False",
    int: f"a whole number from -{LARGEST} to {LARGEST}",
    float: "a finite number",
    str: "a text without line breaks",
    tuple: "a row of texts, or of numbers",
}
"""What a field may hold by the type that it has in ``DEFAULT``; where there is nothing, nothing too."""

MOST = {
    **dict.fromkeys(("num_layers", "num_res_blocks", "num_quantizers", "num_bits", "kmeans_iterations"), 200),
    **dict.fromkeys(("ch", "max_ch", "ndf", "z_channels", "res_channels", "embedding_dim", "proj_dim"), 2**14),
    **dict.fromkeys(("image_size", "resize_size", "widths"), 2**13),
    **dict.fromkeys(("d_model", "num_groups", "num_phi", "cache_random_views", "num"), 2**16),
    **dict.fromkeys(("batch_size", "mlp_width", "num_positions"), 2**20),
    "num_codewords": 2**24,
}
"""The greatest value of sizes, by a field's last name. What is beyond is a slip, which the machine would find out only after
hours, or by running out of memory."""


def read_flags(argv: list[str]) -> tuple[ConfigDict, Path]:
    """Reads ``--config``, ``--workdir``, ``--manual_dir`` (short for ``--config.data.manual_dir``) and ``--config.FIELD=VALUE``
    from a command line.

    Args:
      argv: the program's name, then its arguments.

    Returns:
      The config with its changed fields, and the workdir.

    Raises:
      UserError: a flag is missing or unknown, there is no such config file or it cannot be read, a field is unknown
        (with close ones) or missing, or a value of the wrong type.
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
    _check_fields(config.value, _load(str(DEFAULT)))
    return config.value, Path(workdir.value).expanduser()


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Checks that a workdir is new or belongs to this config; writes nothing.

    Raises:
      UserError: it belongs to a config with other values, which the message lists, or its config cannot be read.
    """
    if not os.path.lexists(workdir / "config.json"):
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
    """The config that a workdir belongs to. What one of an earlier version does not say is as in ``configs/default.py``.

    Raises:
      UserError: the folder is no workdir, or its config is damaged.
    """
    path = Path(workdir) / "config.json"
    config = _load(str(DEFAULT))
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("it holds no fields")
        _fill(config, found)
        _check_fields(config, _load(str(DEFAULT)))
    except (OSError, ValueError, RecursionError) as error:  # a file that is no text raises a ValueError
        raise UserError(f"{workdir} is not a workdir of vgpt_jax.main ({path}: {error})") from error
    return config


def _fill(config: ConfigDict, found: Mapping[str, Any]) -> None:
    """Puts what was found into a config, whatever its type; what has no place there is left out."""
    for name in config.keys() & found.keys():
        if isinstance(config[name], ConfigDict) and isinstance(found[name], dict):
            _fill(config[name], found[name])
        else:
            with config.ignore_type():
                config[name] = found[name]


def _check_fields(config: ConfigDict, default: ConfigDict, prefix: str = "") -> None:
    """Raises `UserError` where a config has other fields than the default one, or a value of another kind."""
    for name in config:
        if name not in default:
            raise UserError(f"the config has a field that nothing reads, {prefix}{name}: {close_names(name, default)}")
    for name, usual in default.items():
        if name not in config:
            raise UserError(f"the config has no {prefix}{name}: let it change what configs/default.py returns")
        value, kind = config[name], default.get_type(name)
        if isinstance(usual, ConfigDict):
            if not isinstance(value, ConfigDict):
                raise UserError(f"{prefix}{name} is {_shown(value)}, but must be a section of the config")
            _check_fields(value, usual, f"{prefix}{name}.")
        elif not (_fits(value, kind, usual or ()) or (value is None and usual is None)):
            raise UserError(f"{prefix}{name} is {_shown(value)}, but must be {KINDS[kind]}")
        elif name in MOST and any(item > MOST[name] for item in (value if kind is tuple else [value or 0])):
            raise UserError(f"{prefix}{name} is {_shown(value)}, but must be at most {MOST[name]}")


def _fits(value: Any, kind: type, usual: Any = ()) -> bool:
    """Whether a field of a type may hold a value; the items of a row are of the type of the ``usual`` ones, if there are any."""
    if kind is tuple:
        kinds = {type(item) for item in usual} or {int, float, str}
        return isinstance(value, (list, tuple)) and all(any(_fits(item, k) for k in kinds) for item in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) <= 1e300 and math.isfinite(value)
    if kind is int:
        return type(value) is int and abs(value) <= LARGEST
    return type(value) is kind and (kind is not str or value.isprintable())


def _shown(value: Any) -> str:
    """A value for a message, which it shall not fill."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number that is too long to show"
    return text if len(text) <= 60 else f"{text[:57]}..."


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
        config = module.get_config()
    except (Exception, SystemExit) as error:  # whatever a user's own file raises
        raise UserError(f"--config={path} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={path} cannot be read: its get_config() returns {_shown(config)}, not a ConfigDict")
    return config
