# SPDX-License-Identifier: Apache-2.0
"""Which rank failed first, as each failing rank finds out."""

import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from nemo_dsv4_cp.checks.failure_attribution import first_failure

OF_GLOO = RuntimeError("[third_party/gloo/transport/tcp/pair.cc:538] Connection closed by peer")
OF_NCCL = dist.DistBackendError("NCCL communicator was aborted")


class Store(dist.HashStore):
    """A store that goes on when all failing ranks have written, however busy the machine is."""

    def __init__(self, ranks):
        super().__init__()
        self._all_wrote = threading.Barrier(ranks)

    def append(self, key, value):
        super().append(key, value)
        self._all_wrote.wait()


def call(errors, *, size):
    """Return what every failing rank reports; the others are silent."""
    store = Store(len(errors))

    def one(rank):
        return first_failure(errors[rank], store, rank=rank, size=size, answer_seconds=0.5)

    with ThreadPoolExecutor(len(errors)) as threads:
        return dict(zip(errors, threads.map(one, errors), strict=True))


@pytest.mark.parametrize("of_a_collective", [OF_GLOO, OF_NCCL])
def test_a_rank_that_raises_is_named_by_those_that_wait_with_what_it_raised(of_a_collective):
    found = call({2: ValueError("odd\nlayer"), 0: of_a_collective}, size=4)
    assert found[0] == (
        "rank 2 raised ValueError: odd layer, and this rank waited for it in a collective"
    )
    assert found[2] is None  # its own traceback names it


def test_a_rank_that_gives_no_sign_is_named_by_those_that_wait():
    found = call({0: OF_GLOO, 2: OF_NCCL, 3: OF_GLOO}, size=4)
    for rank in (0, 2, 3):
        assert found[rank].startswith("rank 1 gave no sign for 0.5 s: killed, stopped or hanging")


def test_all_are_named_that_give_no_sign():
    assert "rank 1, 3 gave no sign" in call({0: OF_GLOO, 2: OF_GLOO}, size=4)[0]


def test_nobody_is_blamed_where_all_fail_in_a_collective():
    assert call({0: OF_GLOO, 1: OF_GLOO}, size=2) == {0: None, 1: None}


def test_an_error_raised_from_one_of_a_collective_is_one():
    wrapped = KeyError("lost on the way")
    wrapped.__cause__ = OF_GLOO
    assert "rank 1 gave no sign" in call({0: wrapped}, size=2)[0]


ALONE = textwrap.dedent("""
    import sys
    from nemo_dsv4_cp.checks import failure_attribution
    from nemo_dsv4_cp.automodel import patches

    before = sys.excepthook
    failure_attribution.install()
    ours = sys.excepthook
    failure_attribution.install()
    assert sys.excepthook is ours is not before
    sys.excepthook = on_top = lambda *error: ours(*error)  # as torch does with a process group
    failure_attribution.install()
    assert sys.excepthook is on_top
    patches.undo()
    assert sys.excepthook is before
    failure_attribution.install()
    raise ValueError("alone")
""")


def test_a_process_without_others_ends_as_ever():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: alone\n")
    assert "rank" not in done.stderr
