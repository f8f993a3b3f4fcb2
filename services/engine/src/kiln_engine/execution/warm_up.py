"""The warm-up of an engine whose kernels may not be compiled yet."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from kiln_nn.kernels.compile_ahead import KernelNotCompiled, compile_ahead, stopping_at_missing_kernels

log = structlog.get_logger()


def warm_up(launch: Callable[[], None], rehearse: Callable[[], None], num_threads: int) -> None:
    """`launch()`, before which its kernels are compiled by several threads if one of them is in no cache.

    `rehearse` launches the same kernels, into memory that may be left with anything. With one thread, or if
    compiling ahead fails, `launch` compiles as it goes. It is begun anew when the first kernel is missed:
    where none is, nothing is spent.

    Raises: whatever `launch` raises.
    """
    if num_threads > 1:
        try:
            with stopping_at_missing_kernels():
                launch()
                return
        except KernelNotCompiled as missing:
            log.info("compiling_kernels", first=str(missing), threads=num_threads)
        _compile(rehearse, num_threads)
    launch()


def _compile(rehearse: Callable[[], None], num_threads: int) -> None:
    effect = "what is missing is compiled one after another"
    try:
        compiled = compile_ahead(rehearse, num_threads, _log_progress)
    except Exception as error:  # if the launches are to blame, they will raise it themselves
        log.warning("kernels_not_compiled_ahead", reason=str(error), effect=effect, exc_info=error)
        return
    log.info("kernels_compiled", kernels=compiled.num_kernels, seconds=round(compiled.seconds, 1))
    if compiled.errors:
        first = compiled.errors[0]
        log.warning(
            "kernels_not_compiled_ahead",
            kernels=len(compiled.errors),
            reason=str(first),
            effect=effect,
            exc_info=first,
        )


def _log_progress(num_done: int, num_kernels: int) -> None:
    log.info("compiling_kernels", done=num_done, of=num_kernels)
