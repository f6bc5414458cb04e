"""What the command lines share. Each command's own flags are tested with it."""

import pytest

from vgpt_jax.command_line import CommandParser, add_process_flags
from vgpt_jax.errors import UserError


@pytest.fixture
def parser():
    parser = CommandParser("draw", "Draws.\n\n    python -m vgpt_jax.draw --num 3\n")
    parser.add_argument("--number", type=int, required=True)
    add_process_flags(parser)
    return parser


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: --number (see --help)"),
        (["--number", "two"], "argument --number: invalid int value: 'two' (see --help)"),
        (["--number", "2", "--process_id", "x"], "argument --process_id: invalid int value: 'x' (see --help)"),
        (["--number", "2", "--proc", "1"], "unrecognized arguments: --proc 1 (see --help)"),
    ],
)
def test_what_is_wrong_is_a_user_error(parser, arguments, said):
    with pytest.raises(UserError) as caught:
        parser.parse_args(arguments)
    assert str(caught.value) == said


def test_help_shows_the_description_as_it_is(parser, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: python -m vgpt_jax.draw ")
    assert "Draws.\n\n    python -m vgpt_jax.draw --num 3\n" in said


def test_a_process_is_told_where_the_first_is_and_which_it_is(parser):
    line = ["--number", "1", "--coordinator", "10.0.0.1:8476", "--num_processes", "4", "--process_id", "3"]
    found = parser.parse_args(line)
    assert (found.coordinator, found.num_processes, found.process_id) == ("10.0.0.1:8476", 4, 3)
    alone = parser.parse_args(["--number", "1"])
    assert (alone.coordinator, alone.num_processes, alone.process_id) == (None, None, None)
