"""What `kiln` ends with, so that scripts can tell apart what went wrong."""

from __future__ import annotations

import os

from kiln_common.errors import ErrorKind, KilnError

DONE = 0
NO = 1  # it ran, and the answer is no: a job that failed, a check that did not pass
USAGE = 2  # refused before anything was asked: wrong options, files, settings
UNREACHABLE = 3  # nothing answers, or a service behind it is away (503); worth trying again
REFUSED = 4  # the server refused the request (4xx)
SERVER_FAILED = 5  # the server failed, or did not get it done in time (500, 504)
NOT_BUILT = 6  # part of the contract, and not built yet (501)
MISCONFIGURED = (
    os.EX_CONFIG
)  # that of the service; written here, so that the command need not load its settings
INTERRUPTED = 130

MEANINGS = {
    DONE: "done",
    NO: "it ran, and the answer is no: a job failed, a gate, a check or an evaluation did not pass",
    USAGE: "wrong usage: options, files or settings; nothing was sent",
    UNREACHABLE: "the server cannot be reached, or a service behind it is away; trying again may help",
    REFUSED: "the server refused the request",
    SERVER_FAILED: "the server failed, or did not get it done in time",
    NOT_BUILT: "not built yet",
    MISCONFIGURED: "`kiln up`: a service cannot start with this model or these settings, however often it is tried",
    INTERRUPTED: "interrupted",
}


def of_own_error(error: KilnError) -> int:
    """The exit code of an error found on this side."""
    if error.kind is ErrorKind.UNAVAILABLE:
        return UNREACHABLE
    if error.kind is ErrorKind.NOT_IMPLEMENTED:
        return NOT_BUILT
    return NO if error.kind is ErrorKind.INTERNAL else USAGE


def of_client_error(error: BaseException) -> int:
    """The exit code of an error of the Python client."""
    import kiln

    codes: tuple[tuple[type[BaseException], int], ...] = (
        (kiln.JobFailed, NO),
        (kiln.JobCancelled, NO),
        (kiln.GateNotPassed, NO),
        (kiln.ConnectionFailed, UNREACHABLE),
        (kiln.UnavailableError, UNREACHABLE),
        (kiln.NotBuiltError, NOT_BUILT),
        (kiln.ServerTimeoutError, SERVER_FAILED),
        (kiln.ServerError, SERVER_FAILED),
        (kiln.ApiError, REFUSED),
    )
    return next((code for kind, code in codes if isinstance(error, kind)), NO)
