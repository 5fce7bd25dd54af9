# SPDX-License-Identifier: Apache-2.0
import os
import signal
import socket
import tempfile
from pathlib import Path

import pytest

from nemo_dsv4_cp.exchange.collectives import barrier, cp_size, process_group
from nemo_dsv4_cp.tools import local_ranks
from nemo_dsv4_cp.tools.local_ranks import RankFailed


@pytest.fixture(autouse=True)
def temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def answering(group, rank, text):
    barrier(group)
    print("printed by a rank")
    return [rank, cp_size(group), text * 100_000]  # more than a pipe holds


def raising(group, rank):
    if rank == 1:
        raise ValueError("the first line\nand another")
    barrier(group)  # rank 0 fails of this, for rank 1 is gone


def killed(group, rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    barrier(group)


def test_rank_0s_result_is_returned_and_no_log_left(tmp_path, capfd):
    assert local_ranks.run(answering, 2, "ab") == [0, 2, "ab" * 100_000]
    assert list(tmp_path.iterdir()) == []
    assert "printed by a rank" not in "".join(capfd.readouterr())


def test_an_error_is_reported_in_a_line_and_its_traceback_logged(forked_local_ranks, capfd):
    with pytest.raises(RankFailed) as failed:
        local_ranks.run(raising, 2)
    error = failed.value
    assert (error.rank, error.error) == (1, "ValueError: the first line")
    assert str(error) == f"rank 1 failed: ValueError: the first line (log: {error.log})"
    log = Path(error.log).read_text()
    assert log.startswith("rank 1:\nTraceback (most recent call last):")
    assert "ValueError: the first line\nand another" in log
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_killed_rank_is_named_and_not_the_one_that_missed_it(forked_local_ranks):
    with pytest.raises(RankFailed, match=r"rank 1 failed: its process ended with signal SIGKILL"):
        local_ranks.run(killed, 2)


def test_no_other_socket_takes_the_port_before_the_store_listens():
    with local_ranks._reserved_port() as port, socket.socket() as other:
        with pytest.raises(OSError, match="Address already in use"):
            other.bind(("127.0.0.1", port))
        with process_group("gloo", rank=0, size=1, port=port) as group:
            assert cp_size(group) == 1
