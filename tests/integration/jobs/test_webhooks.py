"""Webhooks from the end of a job to a receiver: real Redis, real sockets."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kiln_common.bus import keys
from kiln_trainer.jobs.records import JobFailure
from kiln_trainer.webhooks.outbox import WebhookOutbox
from kiln_trainer.webhooks.sender import WebhookSender
from tests.integration.jobs.test_trainer_service import code_of, stack, watch_all
from tests.support.jobs import grpo_request, wait_until

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)
SECRET = "a secret of the receiver"


class Receiver:
    """Answers with `statuses` one after another, then with 200; keeps every request."""

    def __init__(self):
        self.statuses, self.requests = [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.requests.append((dict(self.headers), body))
                self.send_response(outer.statuses.pop(0) if outer.statuses else 200)
                self.send_header("location", "http://127.0.0.1:1/elsewhere")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receiver():
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


def told(url, adapter="helper"):
    request = grpo_request(adapter)
    request.webhook.url, request.webhook.secret = url, SECRET
    return request


def sender(client, store, *, allowed=LOOPBACK, first_wait_s=0.0, **options):
    return WebhookSender(
        WebhookOutbox(client), store.get, allowed=allowed, first_wait_s=first_wait_s, **options
    )


def failed(store, url):
    job_id = store.submit(told(url))
    store.fail(store.claim_next(60, 0), JobFailure("oops", "m", "h"))
    return job_id


def assert_signed(headers, body):
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    digest = hmac.new(SECRET.encode(), signed, hashlib.sha256).digest()
    assert headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()
    assert abs(time.time() - int(headers["webhook-timestamp"])) < 60


async def test_a_receiver_hears_once_of_each_end_and_can_check_who_says_so(redis_server, tmp_path, receiver):
    url = f"http://127.0.0.1:{receiver.port}/hook"
    async with stack(redis_server.url, tmp_path, webhook_allowed_networks="127.0.0.0/8") as (client, _, _):
        job = await client.submit(told(url))
        assert (job.webhook.url, job.webhook.status) == (url, "pending")
        await asyncio.wait_for(watch_all(client, job.id), 60)
        await asyncio.to_thread(wait_until, lambda: receiver.requests)
        for _ in range(100):
            job = await client.get(job.id)
            if job.webhook.status == "delivered":
                break
            await asyncio.sleep(0.05)
        assert (job.webhook.status, job.webhook.num_attempts) == ("delivered", 1)
    ((headers, body),) = receiver.requests
    assert_signed(headers, body)
    assert headers["webhook-id"] == f"{job.id}-succeeded"
    assert json.loads(body)["data"]["result"]["version"] == 1


async def test_a_webhook_to_a_private_address_is_refused_and_nothing_queued(
    redis_server, redis_client, tmp_path
):
    async with stack(redis_server.url, tmp_path) as (client, _, _):
        for host in ("127.0.0.1", "10.0.0.1", "169.254.169.254", "[::1]", "localhost"):
            assert await code_of(client.submit(told(f"http://{host}/"))) == "webhook_address_refused"
        assert await code_of(client.submit(told("gopher://a.example/"))) == "invalid_webhook"
        assert await client.list() == []


def test_a_receiver_that_fails_is_asked_again(store, redis_client, receiver):
    receiver.statuses = [500, 302]
    job_id = failed(store, f"http://127.0.0.1:{receiver.port}/")
    sending = sender(redis_client, store)
    states = []
    while sending.send_one():
        states.append((store.get(job_id).webhook.status, store.get(job_id).webhook.error))
    assert states == [
        ("pending", "the receiver answered 500"),
        ("pending", "the receiver answered 302"),  # not followed
        ("delivered", ""),
    ]
    ids = {headers["webhook-id"] for headers, _ in receiver.requests}
    assert ids == {f"{job_id}-failed"}
    assert not redis_client.exists(keys.WEBHOOKS)


def test_a_receiver_that_drips_does_not_keep_its_thread(store, redis_client):
    """Each byte comes well within the timeout of a read; the headers never end."""
    has_ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nx-slow: ")
                while not has_ended.wait(0.02):
                    connection.sendall(b"x")

        dripping = threading.Thread(target=drip)
        dripping.start()
        job_id = failed(store, f"http://127.0.0.1:{server.getsockname()[1]}/")
        assert sender(redis_client, store, attempt_s=0.4).send_one()  # which ends
        has_ended.set()
        dripping.join(60)
    state = store.get(job_id).webhook
    assert (state.status, state.error) == ("pending", "TimeoutError: there was no answer within 0.4 s")


def test_waits_grow_and_end(store, redis_client):
    job_id = failed(store, "http://127.0.0.1:1/")  # nobody listens there
    sending = sender(redis_client, store, first_wait_s=100.0)
    waits = []
    for _ in range(10):
        redis_client.zadd(keys.WEBHOOKS, {job_id: 0}, xx=True)
        assert sending.send_one()
        due = redis_client.zscore(keys.WEBHOOKS, job_id)
        waits.append(due and round((due - time.time()) / 100))
    assert waits == [1, 2, 4, 8, 16, 32, 36, 36, 36, None]
    state = store.get(job_id).webhook
    assert (state.status, state.num_attempts) == ("failed", 10)


def test_a_gone_receiver_is_left_alone(store, redis_client, receiver):
    receiver.statuses = [410]
    job_id = failed(store, f"http://127.0.0.1:{receiver.port}/")
    sending = sender(redis_client, store)
    assert sending.send_one()
    assert (store.get(job_id).webhook.status, sending.send_one()) == ("failed", False)


def test_a_name_that_leads_elsewhere_by_the_time_of_sending_is_not_followed(store, redis_client, receiver):
    """Checked when the job was accepted, and private since: the address is checked as it is connected to."""
    job_id = failed(store, f"http://name.example:{receiver.port}/")
    asked = []

    def rebound(host, port):
        asked.append(host)
        return [ipaddress.ip_address("127.0.0.1")]

    assert sender(redis_client, store, allowed=(), resolve=rebound).send_one()
    state = store.get(job_id).webhook
    assert (state.status, receiver.requests) == ("failed", [])
    assert "webhook_address_refused" in state.error
    job_id = failed(store, f"http://name.example:{receiver.port}/")
    assert sender(redis_client, store, resolve=rebound).send_one()
    ((headers, _),) = receiver.requests
    assert headers["host"] == f"name.example:{receiver.port}"
    assert asked == ["name.example"] * 2  # once for each attempt


def test_a_sender_that_dies_is_followed_by_another(store, redis_client, receiver):
    job_id = failed(store, f"http://127.0.0.1:{receiver.port}/")
    outbox = WebhookOutbox(redis_client)
    assert outbox.take(time.time(), 60.0).job_id == job_id  # and never heard of again
    sending = sender(redis_client, store)
    assert not sending.send_one()
    redis_client.zadd(keys.WEBHOOKS, {job_id: time.time() - 1})  # the lease is over
    assert sending.send_one()
    assert store.get(job_id).webhook.status == "delivered"


def test_only_jobs_that_ask_for_it_are_told_of_and_each_end_counts_once(store, redis_client, receiver):
    store.submit(grpo_request("quiet"))
    store.succeed(store.claim_next(60, 0), {})
    job_id = store.submit(told(f"http://127.0.0.1:{receiver.port}/"))
    store.cancel(job_id)
    store.cancel(job_id)
    sending = sender(redis_client, store)
    assert [sending.send_one(), sending.send_one()] == [True, False]
    assert json.loads(receiver.requests[0][1])["type"] == "training.job.cancelled"


def test_a_job_that_expired_is_forgotten(store, redis_client):
    job_id = failed(store, "http://127.0.0.1:1/")
    redis_client.delete(keys.job(job_id))
    assert not sender(redis_client, store).send_one()
    assert not redis_client.exists(keys.WEBHOOKS)
