"""The threads that send webhooks from each trainer; one slow receiver keeps one of them."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import httpx
import structlog

from kiln_common.errors import KilnError
from kiln_common.pb import trainer_pb2
from kiln_trainer.jobs.claimed_job import REDIS_FAILURES
from kiln_trainer.webhooks.addresses import Network, Resolve, Target, checked_target, resolve
from kiln_trainer.webhooks.outbox import Delivery, WebhookOutbox
from kiln_trainer.webhooks.signing import message, signed_headers

log = structlog.get_logger()

_NUM_THREADS = 4
_MAX_ATTEMPTS = 10
_LONGEST_WAIT_S = 3600.0
_POLL_S = 1.0
_TIMEOUT_S = 10.0  # of a receiver that says nothing
_ATTEMPT_S = 30.0  # of one that says a byte now and then
# Longer than an attempt takes, with what the system's resolver may exceed its time by.
_LEASE_S = 60.0
_GONE = 410


class WebhookSender:
    """Sends what the outbox holds.

    `first_wait_s`: from the first attempt to the second; each wait after it is twice as long.
    `attempt_s`: the longest that one attempt may take in all.
    `allowed`: networks beyond the public internet to which webhooks may go.
    """

    def __init__(
        self,
        outbox: WebhookOutbox,
        read_job: Callable[[str], trainer_pb2.Job],
        *,
        allowed: Sequence[Network],
        first_wait_s: float,
        resolve: Resolve = resolve,
        attempt_s: float = _ATTEMPT_S,
    ) -> None:
        self._outbox = outbox
        self._read_job = read_job
        self._allowed = allowed
        self._first_wait_s = first_wait_s
        self._resolve = resolve
        self._attempt_s = attempt_s
        self._tls = httpx.create_ssl_context(trust_env=False)
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(
                target=contextvars.copy_context().run, args=(self._run,), name="webhooks", daemon=True
            )
            for _ in range(_NUM_THREADS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> None:
        """An attempt that takes longer dies with the process; another trainer makes it again."""
        self._stopping.set()
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def send_one(self) -> bool:
        """Attempt the next webhook that is due; whether there was one."""
        delivery = self._outbox.take(time.time(), _LEASE_S)
        if delivery is None:
            return False
        error, is_final = self._attempt(delivery)
        num_attempts = delivery.num_attempts + 1
        if not error:
            self._outbox.settle(delivery, "delivered", "", None)
        elif is_final or num_attempts >= _MAX_ATTEMPTS:
            self._outbox.settle(delivery, "failed", error, None)
        else:
            wait_s = min(self._first_wait_s * 2**delivery.num_attempts, _LONGEST_WAIT_S)
            self._outbox.settle(delivery, "pending", error, time.time() + wait_s)
        log.info("webhook_attempted", job_id=delivery.job_id, attempt=num_attempts, error=error or None)
        return True

    def _attempt(self, delivery: Delivery) -> tuple[str, bool]:
        """What went wrong, "" for nothing, and whether to leave it at that."""
        deadline_s = time.monotonic() + self._attempt_s
        try:
            target = checked_target(delivery.webhook.url, self._allowed, self._resolve)
            job = self._read_job(delivery.job_id)
            body = message(job)
            message_id = f"{job.id}-{job.status}"
            headers = signed_headers(message_id, body, delivery.webhook.secret, int(time.time()))
            status = asyncio.run(self._post(target, headers, body, deadline_s))
        except KilnError as error:
            return f"{error} ({error.code})", True
        except (httpx.HTTPError, OSError) as error:
            return f"{type(error).__name__}: {error}"[:500], False
        if httpx.codes.is_success(status):
            return "", True
        return f"the receiver answered {status}", status == _GONE

    async def _post(self, target: Target, headers: Mapping[str, str], body: bytes, deadline_s: float) -> int:
        """The status of the answer; what it says is not read. Raises httpx.HTTPError, OSError."""
        # No proxy from the environment: it would resolve the name again, and go where it leads.
        client = httpx.AsyncClient(
            timeout=_TIMEOUT_S, follow_redirects=False, trust_env=False, verify=self._tls
        )
        try:
            async with (
                asyncio.timeout(deadline_s - time.monotonic()),
                client,
                client.stream(
                    "POST",
                    target.url,
                    content=body,
                    headers={**headers, "host": target.host, "content-type": "application/json"},
                    extensions={"sni_hostname": target.server_name},
                ) as answer,
            ):
                return answer.status_code
        except TimeoutError:
            raise TimeoutError(f"there was no answer within {self._attempt_s:g} s") from None

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                if not self.send_one():
                    self._stopping.wait(_POLL_S)
            except REDIS_FAILURES:
                self._stopping.wait(_POLL_S)
            except Exception as error:  # the thread outlives whatever one message brings
                log.error("webhook_sender_failed", exc_info=error)
                self._stopping.wait(_POLL_S)
