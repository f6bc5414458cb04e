"""What the command lines share: a parser whose errors are one line, and the flags of a run of several processes."""

import argparse

from vgpt_jax.errors import UserError


class CommandParser(argparse.ArgumentParser):
    """Parses the arguments of ``python -m vgpt_jax.NAME``. Flags cannot be shortened; what is wrong with them is a `UserError`.

    Args:
      name: of the module.
      description: its docstring, which ``--help`` shows as it is.
    """

    def __init__(self, name: str, description: str):
        super().__init__(
            prog=f"python -m vgpt_jax.{name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_known_args(self, args=None, namespace=None):
        for argument in args or ():
            if argument.startswith("--") and argument.endswith("=--"):  # argparse gives such an option an empty list
                self.error(f"{argument.removesuffix('--')} needs a value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Adds ``--coordinator``, ``--num_processes`` and ``--process_id``, for `vgpt_jax.training.processes.join`."""
    group = parser.add_argument_group("several processes", "each is started with the same command, but for its number")
    add = group.add_argument
    add("--coordinator", metavar="HOST:PORT", help="of the first process")
    add("--num_processes", type=int, metavar="N", help="of the run")
    add("--process_id", type=int, metavar="I", help="of this process, from 0")
