"""The short form of ``malformed_inputs.py``: some cases of every kind, and that it finds what it looks for."""

import os
import shutil
import sys
from pathlib import Path

import pytest

import quick_compile

sys.path.insert(0, str(Path(__file__).parent))

import malformed_inputs  # noqa: E402

# Of every kind, and quick: none trains or measures for long.
NUMBERS = (
    14,
    42,
    238,
    15,
    43,
    225,
    30,
    114,
    226,
    3,
    45,
    116,
    89,
    103,
    174,
    216,
    77,
    231,
    36,
    218,
    232,
    23,
    38,
    136,
    192,
    39,
    235,
)
NUMBERS += (26, 222, 27)

Case, Ended, Worker = malformed_inputs.Case, malformed_inputs.Ended, malformed_inputs.Worker


@pytest.fixture(scope="module")
def worker(tmp_path_factory):  # as the run was that some go on with, or other weights would come of it
    worker = Worker(tmp_path_factory.mktemp("worker"), malformed_inputs.ENVIRONMENT | quick_compile.ENVIRONMENT)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def house(trained, tiny_overrides, worker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    (folder / "cache").mkdir()
    for rendered in Path(os.environ["VGPT_JAX_CACHE"]).glob("emoji-*-18px-*"):
        shutil.copy(rendered, folder / "cache")
    return malformed_inputs.build_house(folder, trained, folder / "cache", tiny_overrides, worker, ("sample",))


@pytest.mark.parametrize("number", NUMBERS)
def test_a_malformed_input_is_refused_or_does_no_harm(house, worker, tmp_path, number):
    verdict = malformed_inputs.run_case(house, worker, tmp_path / "case", 0, number, 120.0)
    assert not verdict.problems, f"{verdict.what}: {verdict.problems}\n{verdict.ended.err}"


def test_every_kind_is_among_them():
    assert {malformed_inputs.kind_of(n) for n in NUMBERS} == set(malformed_inputs.KINDS)


BEFORE = {"run": "folder", "run/a": "1", "run/b": "2"}


@pytest.mark.parametrize(
    ("status", "err", "after", "found"),
    [
        (2, "drawing ...\nerror: the file a is damaged\n", {}, None),
        (0, "", {"run/out/x": "3", "out": "folder"}, None),
        (0, "a was left out\n", {"run/out/x": "3"}, None),
        (None, "", {}, "it did not end"),
        (-9, "", {}, "it ended with status -9"),
        (
            1,
            "Traceback (most recent call last):\nKeyError: 3\n",
            {},
            "it ended with status 1; a traceback, KeyError: 3",
        ),
        (0, "Traceback (most recent call last):\nKeyError: 3\n", {}, "a traceback though it went on"),
        (2, "error: a\nerror: b\n", {}, "2 lines of error"),
        (2, "usage: a\nmain: error: b\n", {}, "0 lines of error, and the last line is main: error: b"),
        (2, "error: a\nbye\n", {}, "1 lines of error, and the last line is bye"),
        (2, f"error: a {'x' * 2000}\n", {}, "a message of 2009 characters"),
        (2, "error: something is wrong\n", {}, "it does not name a"),
        (2, "error: a\n", {"run/out/x": "3"}, "run/out/x was left behind"),
        (2, "error: a\n", {"run/b": "3"}, "run/b was changed"),
        (0, "", {"run/b": None}, "run/b was removed"),
        (0, "", {"run/out/x.unfinished": "3"}, "run/out/x.unfinished is unfinished"),
        (0, "", {"run/out/wrong": "3"}, "other weights"),
    ],
)
def test_what_must_not_be_is_found(status, err, after, found):
    after = {path: what for path, what in (BEFORE | after).items() if what is not None}
    case = Case("", "main", [], ("run/out",), result=lambda: "other weights" * ("run/out/wrong" in after), named=("a",))
    problems = "; ".join(malformed_inputs.problems_of(case, Ended(status, 1.0, "", err), BEFORE, after))
    assert (found in problems) if found else not problems


def test_what_is_moved_aside_must_be_whole():
    case, ended = Case("", "main", [], moves=True), Ended(2, 1.0, "", "error: a\n")
    aside = {"run": "folder", "run/b": "2", "aside": "folder", "aside/a": "1"}
    assert not malformed_inputs.problems_of(case, ended, BEFORE, aside)
    assert malformed_inputs.problems_of(case, ended, BEFORE, aside | {"aside/a": "3"}) == ["run/a was removed"]


def test_a_worker_outlives_its_commands(tmp_path):
    (tmp_path / "odd.py").write_text(
        "import os, signal, sys\n\n"
        "DEEDS = {'exit': lambda: sys.exit(2), 'raise': lambda: 1 / 0, 'die': os.abort, 'hang': signal.pause, 'work': int}\n\n"
        "def main(arguments):\n    print(arguments[0], file=sys.stderr)\n    DEEDS[arguments[0]]()\n"
    )
    worker = Worker(tmp_path / "worker", {"PYTHONPATH": str(tmp_path)})
    for name, status, said in (
        ("work", 0, "work\n"),
        ("exit", 2, "exit\n"),
        ("raise", 1, "ZeroDivisionError: division by zero"),
        ("die", -6, "die\n"),
        ("work", 0, "work\n"),
        ("exit", 2, "exit\n"),
    ):
        ended = worker.run("odd", [name], {}, 60.0)
        assert (ended.status, said in ended.err) == (status, True), ended
    ended = worker.run("odd", ["hang"], {}, 0.5)
    assert ended.status is None
    assert worker.run("odd", ["work"], {}, 60.0).status == 0
    worker.close()


def test_a_case_is_the_same_for_the_same_seed(house, tmp_path):
    made = []
    for seed in (0, 0, 1):
        shutil.rmtree(tmp_path / "case", ignore_errors=True)
        case = malformed_inputs.make_case(house, tmp_path / "case", seed, 2)
        made.append((case.what, case.arguments, malformed_inputs.contents(tmp_path / "case")))
    assert made[0] == made[1] != made[2]
