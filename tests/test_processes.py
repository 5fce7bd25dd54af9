# SPDX-License-Identifier: Apache-2.0
"""What bounds the tests' own processes: whether they go on, never how long they take."""

import os
import signal
import sys
import time

import pytest

from tests.processes import Progress, Stuck, run_to_log
from tests.ranks import RankError


def test_a_command_may_take_any_time_while_its_log_grows():
    progress = Progress(start=0, still_seconds=60)
    seen = [(50, 5), (100, 9), (160, 9), (220, 10), (281, 10)]
    assert [progress.has_ended(*now) for now in seen] == [False, False, False, False, True]


def test_a_command_that_stands_still_is_ended(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(100_000)"]
    with pytest.raises(Stuck, match=r"nothing new for 0\.2 s"):
        run_to_log(command, tmp_path / "log", still_seconds=0.2)


def test_a_commands_status_and_both_streams_are_told(tmp_path):
    script = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    assert run_to_log([sys.executable, "-c", script], tmp_path / "log") == 3
    assert set((tmp_path / "log").read_text().split()) == {"out", "err"}


def one_dies(group, rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100_000)


def rank_of(group, rank):
    return rank


def test_a_rank_that_dies_is_told_at_once_and_the_next_job_has_new_ranks(ranks):
    with pytest.raises(RankError, match="rank 1 of 2 died"):
        ranks.run(one_dies, 2)
    assert ranks.run(rank_of, 2) == [0, 1]
