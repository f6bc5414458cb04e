import re

import pytest

from vgpt_jax import progress as progress_module
from vgpt_jax.progress import StepProgress, clock, progress


class Clock:
    """Stands in for the module ``time``: moves ten seconds at each look."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 10.0
        return self.now


@pytest.fixture
def log(monkeypatch):
    monkeypatch.setattr(progress_module, "on_terminal", lambda: False)
    monkeypatch.setattr(progress_module, "time", Clock())


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(progress_module, "on_terminal", lambda: True)


def test_log_has_a_line_at_the_start_and_at_the_end(log, capsys):
    assert list(progress("abc", "reading", seconds_between_lines=1000)) == ["a", "b", "c"]
    written = capsys.readouterr()
    assert re.fullmatch(r"reading \.\.\.\nreading: 3/3 done in [\d.]+ s\n", written.err)
    assert written.out == ""


def test_log_has_lines_on_the_way_where_it_takes_long(log, capsys):
    list(progress([1, 2], "reading", seconds_between_lines=5))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines[:3]] == ["reading ...", "reading: 1/2", "reading: 2/2"]
    assert len(lines) == 4


def test_log_of_items_without_a_length_counts_them(log, capsys):
    assert list(progress((i for i in range(3)), "reading", seconds_between_lines=1000)) == [0, 1, 2]
    assert "reading: 3 done" in capsys.readouterr().err


def test_log_of_nothing(log, capsys):
    assert list(progress([], "reading")) == []
    assert "reading: 0/0 done" in capsys.readouterr().err


def test_items_are_taken_when_they_are_asked_for(log):
    taken = []
    iterator = progress((taken.append(i) or i for i in range(3)), "reading")
    assert next(iterator) == 0
    assert taken == [0]


def test_terminal_has_a_bar(terminal, capsys):
    assert list(progress([1, 2], "reading")) == [1, 2]
    written = capsys.readouterr().err
    assert "reading" in written
    assert "2/2" in written


def test_capture_is_no_terminal(capsys):
    assert not progress_module.on_terminal()


def test_step_line_has_the_metrics_and_the_time_left(log, capsys):
    steps = StepProgress("tokenizer", 20, 100)  # begun at 10 s
    steps.update(60)
    steps.report(60, {"loss": 0.123456, "psnr": 21.0})  # at 20 s: 40 steps in 10 s, so 10 s for the 40 that are left
    written = capsys.readouterr()
    assert written.out == "tokenizer  step 60/100  loss 0.1235  psnr 21  [0:10, 0:10 left]\n"
    assert written.err == ""


def test_step_line_says_what_the_metrics_are_of(log, capsys):
    StepProgress("generator", 0, 10).report(5, {"loss": 1.5}, "held-out")
    assert capsys.readouterr().out == "generator  step 5/10  held-out  loss 1.5  [0:10, 0:10 left]\n"


def test_report_before_the_first_step(log, capsys):
    StepProgress("generator", 0, 10).report(0, {"loss": 1.5})
    assert "step 0/10" in capsys.readouterr().out


def test_bar_goes_on_from_the_step_resumed_at_to_the_last(terminal, capsys):
    steps = StepProgress("tokenizer", 40, 100)
    steps.update(70)
    steps.update(100)
    steps.report(100, {"loss": 0.5})
    steps.close()
    written = capsys.readouterr().err
    assert "40/100" in written
    assert "100/100" in written
    assert "loss 0.5" in written


def test_evaluation_is_written_above_the_bar(terminal, capsys):
    steps = StepProgress("tokenizer", 0, 10)
    steps.report(10, {"loss": 0.5}, "held-out")
    steps.close()
    written = capsys.readouterr()
    assert "tokenizer  step 10/10  held-out  loss 0.5" in written.out + written.err


def test_close_without_a_bar_does_nothing(log, capsys):
    StepProgress("tokenizer", 0, 10).close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (59.6, "1:00"), (187, "3:07"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_clock(seconds, shown):
    assert clock(seconds) == shown
