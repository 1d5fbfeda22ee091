"""What a person sees: plain in a file, a bar on a terminal, nothing when quiet."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from pipeline.stage import advance, duration, say, steps

SCRIPT = """
import time
from pipeline.stage import say, steps
say("train      twenty epochs")
with steps("train", 20, "epoch") as shown:
    for epoch in range(1, 21):
        time.sleep(0.02)
        shown.to(epoch, f"elbo {-epoch} " + 90 * "x")
        if epoch == 10:
            say("train      half of it")
say("train      done")
"""


def test_a_file_gets_about_ten_lines_with_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with steps("train", 200, "epoch") as shown:
        for epoch in range(1, 201):
            shown.to(epoch, f"elbo {-epoch}")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == [f"{n}/200" for n in range(20, 201, 20)]
    assert lines[0].startswith("train      epoch  20/200  elbo -20")
    assert lines[0].endswith(" left")
    assert lines[-1] == "train      epoch 200/200  elbo -200"


def test_the_time_left_counts_from_the_start_and_not_what_an_earlier_start_did(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.0, 60.0, 65.0, 0.0, 50.0, 60.0])
    monkeypatch.setattr("pipeline.stage.terminal.time.monotonic", lambda: next(clock))
    with steps("sweep", 12, "trial", lines=12, done=2) as shown:
        shown.to(3)
        shown.to(4)  # of two at a time, so shortly after the other
    with steps("train", 12, "epoch", lines=12, done=None) as shown:
        shown.to(8)  # resumed: how long eight took is not known
        shown.to(9)
    lines = capsys.readouterr().out.splitlines()
    left = [line.partition("/12")[2].strip() for line in lines]
    assert left == ["9 min 0 s left", "4 min 20 s left", "", "30 s left"]


def test_few_steps_get_a_line_each_and_verbose_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with steps("sweep", 4, "trial"):
        for done in range(1, 5):
            advance(done, "x")
    assert len(capsys.readouterr().out.splitlines()) == 4
    monkeypatch.setenv("TIGHTBOUND_VERBOSITY", "verbose")
    with steps("train", 50, "epoch") as shown:
        for epoch in range(1, 51):
            shown.to(epoch)
    assert len(capsys.readouterr().out.splitlines()) == 50


def test_quiet_says_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIGHTBOUND_VERBOSITY", "quiet")
    say("train      begins")
    with steps("train", 3, "epoch") as shown:
        shown.to(3, "elbo")
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_colour_and_a_bar_that_goes_when_it_is_done() -> None:
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=follower, env=environment) as it:
        os.close(follower)
        written = b""
        while True:
            try:
                part = os.read(leader, 4096)
            except OSError:  # the other end is closed
                break
            written += part
            if not part:
                break
    os.close(leader)
    assert it.returncode == 0
    text = written.decode()
    assert "\x1b[1;36mtrain      \x1b[0mtwenty epochs" in text
    assert "epoch 20/20" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert re.search(r"━ epoch \d+/20 \d s left elbo -\d+ x+…\r", plain)  # one line
    assert "━" in text
    for line in ("half of it", "done"):
        assert f"\x1b[1;36mtrain      \x1b[0m{line}" in text
    assert text.rindex("━") < text.rindex("\x1b[2K") < text.rindex("done")


def test_durations_in_words() -> None:
    assert [duration(s) for s in (8.4, 200, 7500)] == ["8 s", "3 min 20 s", "2 h 5 min"]
