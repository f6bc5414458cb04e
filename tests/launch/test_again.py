"""launch/again.sh: after which exit statuses a command is run once more, and what a signal does."""

import signal

import pytest

from .conftest import first_line

ONE_AFTER_THE_OTHER = (
    "n=$(cat runs 2> /dev/null || echo 0); echo $((n + 1)) > runs; set -- $STATUSES; shift $n; exit $1"
)


def run(launchers, statuses, **variables):
    """The exit status, and how many runs there were."""
    launchers.stub("sleep", "exit 0")
    status, _, err = launchers.run(
        "again.sh", "bash", "-c", ONE_AFTER_THE_OTHER, STATUSES=" ".join(map(str, statuses)), **variables
    )
    return status, int((launchers.root / "runs").read_text()), err


@pytest.mark.parametrize(
    ("statuses", "variables", "expected"),
    [
        ([0], {}, (0, 1)),
        ([2], {}, (2, 1)),
        ([127], {}, (127, 1)),
        ([75, 75, 75, 0], {"CRASHES": "0"}, (0, 4)),
        ([75], {"ON_75": "end"}, (75, 1)),
        ([9, 137, 0], {}, (0, 3)),
        ([9, 9, 2], {}, (2, 3)),
        ([9, 9, 8], {"CRASHES": "2"}, (8, 3)),
        ([9, 75, 9, 75, 9, 0], {"CRASHES": "1"}, (0, 6)),  # never two in a row
        ([9, 9, 9, 0], {"CRASHES": "1", "STEADY": "0"}, (0, 4)),  # each after a run that was long enough
    ],
)
def test_what_is_run_again(launchers, statuses, variables, expected):
    assert run(launchers, statuses, **variables)[:2] == expected


def test_pauses_double_up_to_five_minutes(launchers):
    status, runs, err = run(launchers, [9] * 8, CRASHES="7", PAUSE="10")
    assert (status, runs) == (9, 8)
    assert [call[1] for call in launchers.calls("sleep")] == ["10", "20", "40", "80", "160", "300", "300"]
    assert err.splitlines()[-1] == "again: crash 8 in a row (status 9): that is the end"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_as_term_and_nothing_is_started_after_it(launchers, number):
    saves = 'trap "echo saved; exit 75" TERM; echo started; while :; do sleep 0.05; done'
    process = launchers.start("again.sh", "bash", "-c", saves)
    assert first_line(process) == "started\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (75, "saved\n")


def test_a_signal_ends_a_pause(launchers):
    process = launchers.start("again.sh", "bash", "-c", "exit 9", PAUSE="300")
    assert process.stderr.readline() == "again: crash 1 in a row of at most 5 (status 9): once more in 300 s\n"
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 9


def test_a_dry_run_prints_the_command(launchers):
    assert launchers.dry_run("again.sh", "kubectl", "a b") == [["kubectl", "a b"]]


def test_what_is_not_sound_is_said(launchers):
    assert "no command" in launchers.error("again.sh")
    assert "CRASHES is 'many'" in launchers.error("again.sh", "true", CRASHES="many")
    assert "ON_75 is 'stop', but must be one of: again end" in launchers.error("again.sh", "true", ON_75="stop")
