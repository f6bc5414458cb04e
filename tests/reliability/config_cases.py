"""Configs and command lines that are wrong: in their form, and in their values."""

from pathlib import Path

import numpy as np
from damage import HOSTILE, choice, spoil
from house import SHORT, Case, House, measure, sample_arguments, write_config

STAGES_OF = {  # the sections that only some stages read
    "gpt": ("tokenizer", "generator"),
    "generator_training": ("tokenizer", "generator"),
    "classifier": ("classifier",),
    "classifier_training": ("classifier",),
    "data": ("classifier",),
    "sampling": ("tokenizer", "generator"),
}
UNREAD = (  # sections that the tiny config has no use for
    *("vqgan", "maskgit_vqgan", "simvq", "ibq", "diveq", "fsq", "lfq", "bsq", "patchgan", "stylegan_discriminator"),
    *("grouped_quantize", "residual_quantize", "multi_scale_quantize"),
)
OUT_OF_RANGE = {  # of the type that a field has
    bool: (True, False),
    int: (-1, 0, 1, 2, 7, 1000, 2**14, 10**6, 2**31 - 1, 2**32),
    float: (-0.5, 0.0, 1e-30, 0.3, 1.0, 1.5, 7.0, 1e30, 1e300),
    str: ("", "none", "l2", "cosine", "../..", "x" * 300, "float16", "random"),
    tuple: ((), (0,), (1,), (-1, 1), (3, 2, 1), (2,) * 40, (10**9,), (0.5, 0.1), (0.0, 1e30), ("cutout", "none")),
    type(None): (-1, 0, 1, 10**9),
}
LONG_RUNS = ("num_steps", "max_skipped_steps", "batch_size")
"""Fields of which a great value is a great request, not a wrong one."""


def _fields(config: dict, before: str = "") -> dict[str, object]:
    """All fields of a config by their dotted names."""
    found = {}
    for name, value in config.items():
        found |= _fields(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return found


def _hostile_field(house: House, rng: np.random.Generator) -> tuple[str, object, tuple[str, ...]]:
    """A field, a value that it should perhaps not have, and the stages that read it."""
    from configs import emoji

    fields = _fields(emoji.get_config().to_dict())
    left_out = ("logging.wandb", "data.cache_dir", "stages") + (UNREAD if rng.random() < 0.9 else ())
    name = choice(rng, sorted(n for n in fields if not n.startswith(left_out)))
    values = OUT_OF_RANGE[type(fields[name])] if rng.random() < 0.6 else HOSTILE
    great = name.split(".")[-1] in LONG_RUNS
    value = choice(rng, [v for v in values if not (great and type(v) in (int, float) and v > 1000)])
    return name, value, STAGES_OF.get(name.split(".")[0], ("tokenizer",))


def config_file(house: House, folder: Path, rng: np.random.Generator) -> Case:
    name, value, stages = _hostile_field(house, rng)
    fields = house.tiny | SHORT | {"stages": stages}
    way = choice(rng, ("value", "value", "value", "bytes", "lines"))
    if way == "value":
        free = rng.random() < 0.5  # a ConfigDict refuses other types than it has, unless it is told not to
        assign = f"config.{name} = {value!r}".replace("nan", "float('nan')").replace("inf", "float('inf')")
        flag = write_config(folder, fields, ("with config.ignore_type():", f"    {assign}") if free else (assign,))
        what = f"{assign:.70} {'whatever its type' if free else ''}"
    else:
        flag = write_config(folder, fields)
        path = folder / "config.py"
        whole = path.read_text()
        lines = {
            "no get_config": whole.replace("get_config():", "make_config():"),
            "get_config with an argument": whole.replace("get_config():", "get_config(name):"),
            "nothing is returned": whole.replace("return config", "pass"),
            "a dict is returned": whole.replace("return config", "return config.to_dict()"),
            "a number is returned": whole.replace("return config", "return 7"),
            "it exits": whole.replace("return config", "raise SystemExit(3)"),
            "it recurses": whole.replace("return config", "return get_config()"),
            "a section is gone": whole.replace("return config", f"del config.{name.split('.')[0]}; return config"),
            "a field is gone": whole.replace("return config", f"del config.{name}; return config"),
            "a section is a number": whole.replace(
                "return config", f"config['{name.split('.')[0]}'] = 3; return config"
            ),
            "an unknown field": whole.replace("return config", "config.gpt.d_modle = 3; return config"),
            "an import that fails": whole.replace("import emoji", "import emojy"),
            "another encoding": "# \u00e9\n" + whole,
        }
        what = choice(rng, lines)
        path.write_text(lines[what], encoding="latin-1" if what == "another encoding" else "utf-8")
        if way == "bytes":
            path.write_text(whole)
            what = spoil(rng, path)
    return Case(what, "main", [flag, f"--workdir={folder / 'run'}"], ("run", "cache"))


def command_line(house: House, folder: Path, rng: np.random.Generator) -> Case:
    text = str(
        choice(rng, [*HOSTILE, "1e400", "--", "-", "=", "\u0661", "0x10", "1_000", "(1,", "{'a': 1}", "lambda: 0"])
    )
    way = choice(rng, ("main", "main", "sample", "evaluate"))
    if way == "main":
        name, value, stages = _hostile_field(house, rng)
        if rng.random() < 0.5 or name.split(".")[-1] in LONG_RUNS:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        flag = (
            f"--config.{name}={text}"
            if rng.random() < 0.9
            else choice(rng, (f"--{text}", text, f"--config.{text}=1", "--workdir="))
        )
        fields = house.tiny | SHORT | {"stages": stages}
        arguments = [write_config(folder, fields), f"--workdir={folder / 'run'}", _as_argument(flag)]
        return Case(f"{flag:.70}", "main", arguments, ("run", "cache"))
    if way == "evaluate":
        run = house.copy_run(folder)
        case = measure(house, run, "", False)
        option = choice(
            rng, ("--num", "--accept_n", "--seed", "--classifier", "--frechet", "--workdir", "--config.gpt.d_model")
        )
    else:
        case = Case("", "sample", sample_arguments(house.run, folder / "out"), ("out",))
        numbers = (
            "num",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "guidance",
            "seed",
            "num_steps",
            "z_shape",
            "accept_n",
        )
        names = (
            "order",
            "guidance_schedule",
            "guidance_power",
            "cls_name",
            "classifier",
            "view",
            "from_pretrained",
            "complete",
            "again",
        )
        option = "--" + choice(rng, numbers + names)
    great = option in ("--num", "--accept_n") and text.lstrip("-").isdigit() and int(text) > 1000
    text = "-7" if great else _as_argument(text)
    case.arguments += [option, text] if rng.random() < 0.5 else [f"{option}={text}"]
    case.what = " ".join(case.arguments[-2:])[-80:]
    return case


def _as_argument(text: str) -> str:
    """What can be an argument: no zeros, and of what is no text only bytes that are not UTF-8."""
    return text.replace("\0", "\u2400").replace("\ud800", "\udcff")
