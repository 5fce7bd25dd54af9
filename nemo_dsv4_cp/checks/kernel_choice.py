# SPDX-License-Identifier: Apache-2.0
"""Which kernels a job on GPUs trains with: by certificates, one decision for all ranks."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec

from nemo_dsv4_cp.checks import certificate
from nemo_dsv4_cp.checks.certificate import Certificate, Subject
from nemo_dsv4_cp.exchange.collectives import answers_of_all_ranks, is_first_rank

_logger = logging.getLogger(__name__)

TORCH = "torch"
"""The reference. It is timed, and used where nothing else passes."""

CANDIDATES = {"triton": "triton", "tilelang": "tilelang", TORCH: TORCH}
"""What ``kernels: auto`` examines on a GPU, and the module that each needs."""


def choose_kernels(
    asked: str | None,
    subject_of: Callable[[str], Subject],
    *,
    strict: bool,
    seconds: float = certificate.SECONDS,
    candidates: Mapping[str, str] = CANDIDATES,
) -> Certificate:
    """Return the certificate of the kernels to train with; every rank of the job calls this.

    Without ``asked`` that is the fastest of the candidates that passed on every rank. Rank 0 logs
    what was chosen, and warns of each backend that failed.

    Args:
        asked: Kernels that the recipe names.
        subject_of: Returns what to examine for a backend.
        strict: Whether kernels that the recipe names must pass.
        seconds: How long one examination may take.
        candidates: Backends, and the module that each needs.

    Raises:
        ValueError: On all ranks, if the kernels that the recipe names failed on one.
    """
    names = [asked] if asked else installed(candidates)
    mine = [_obtain(name, subject_of, seconds) for name in names]
    waiting = 2 * seconds * len(candidates)  # another machine may have to examine all of them
    answers = answers_of_all_ranks(json.dumps([asdict(each) for each in mine]), waiting)
    found = _worst_of([[Certificate(**each) for each in json.loads(text)] for text in answers])
    failed = [each for each in found if not each.passed]
    passed = sorted((each for each in found if each.passed), key=_milliseconds)
    if asked and failed and strict:
        raise ValueError(
            f"context_parallel.kernels={asked!r} failed on this job's GPUs: {failed[0].error} "
            f"(report: {failed[0].report}); set kernels: auto or torch, or kernels_check: warn to "
            "train with them all the same"
        )
    chosen = (passed or [each for each in found if each.kernels in (asked, TORCH)])[0]
    if is_first_rank():
        for each in failed:
            used = "used all the same, with kernels_check: warn" if asked else "not used"
            _logger.warning(
                "Kernels %s are %s: %s (report: %s)", each.kernels, used, each.error, each.report
            )
        _logger.info(_line(chosen, passed))
    return chosen


def installed(candidates: Mapping[str, str] = CANDIDATES) -> list[str]:
    """Return the backends whose modules are here."""
    return [name for name, module in candidates.items() if _found(module)]


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a stand-in that another package put in its place
        return False


def _obtain(name: str, subject_of: Callable[[str], Subject], seconds: float) -> Certificate:
    """Return the certificate; of what fails without one, such as a full disk, a failed one."""
    try:
        return certificate.obtain(subject_of(name), seconds=seconds)
    except Exception as error:  # the other ranks wait for this one's answer
        line = f"no certificate: {type(error).__name__}: {error}"
        return Certificate(name, 0.0, None, None, line, "none")


def _worst_of(ranks: list[list[Certificate]]) -> list[Certificate]:
    """Return for each backend its worst certificate of any rank, by error and then by time."""
    of_name: dict[str, list[Certificate | None]] = {
        each.kernels: [] for certificates in ranks for each in certificates
    }
    for certificates in ranks:
        by_name = {each.kernels: each for each in certificates}
        for name, found in of_name.items():
            found.append(by_name.get(name))
    worst = []
    for name, found in of_name.items():
        missing = [rank for rank, each in enumerate(found) if each is None]
        failed = [(rank, each) for rank, each in enumerate(found) if each and not each.passed]
        if missing:
            error = f"not installed on rank {missing[0]}"
            worst.append(Certificate(name, 0.0, None, None, error, "none"))
        elif failed:
            rank, each = failed[0]
            worst.append(Certificate(**asdict(each) | {"error": f"on rank {rank}, {each.error}"}))
        else:
            slowest = max((each for each in found if each), key=_milliseconds)
            share = max(each.worst for each in found if each)
            worst.append(Certificate(**asdict(slowest) | {"worst": share}))
    return worst


def _milliseconds(certificate: Certificate) -> float:
    return certificate.milliseconds or 0.0


def _line(chosen: Certificate, passed: list[Certificate]) -> str:
    if not chosen.passed:
        return f"Kernels: {chosen.kernels}"
    others = [f"{each.kernels} {_milliseconds(each):.1f} ms" for each in passed if each != chosen]
    return (
        f"Kernels: {chosen.kernels}, {_milliseconds(chosen):.1f} ms per layer forward and backward "
        f"of 4,096 queries at 32,768 tokens{''.join(f', {other}' for other in others)}; largest "
        f"error {chosen.worst:.0%} of the allowed (report: {chosen.report})"
    )
