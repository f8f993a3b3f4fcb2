"""Where webhooks may go, and how they are signed."""

import base64
import hashlib
import hmac
import ipaddress
import json

import pytest

from kiln_common.pb import trainer_pb2
from kiln_trainer.webhooks.addresses import (
    InvalidWebhook,
    WebhookAddressRefused,
    check_webhook,
    checked_target,
    is_allowed,
)
from kiln_trainer.webhooks.signing import message, signed_headers

PUBLIC = "93.184.215.14"


def resolving(*addresses):
    return lambda host, port: [ipaddress.ip_address(address) for address in addresses]


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1"),
        *("::1", "::", "fe80::1", "fc00::1", "fd12::1", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::"),
    ],
)
def test_no_address_outside_the_public_internet_is_allowed(address):
    assert not is_allowed(ipaddress.ip_address(address), ())
    with pytest.raises(WebhookAddressRefused) as caught:
        checked_target("https://name.example/x", (), resolving(PUBLIC, address))
    assert str(caught.value) == "webhooks may not go to name.example"  # and not what it means inside


@pytest.mark.parametrize("address", [PUBLIC, "2606:2800:21f::1", "64:ff9b::5db8:d70e"])
def test_public_addresses_are_allowed(address):
    assert is_allowed(ipaddress.ip_address(address), ())


def test_a_network_can_be_allowed():
    networks = [ipaddress.ip_network("10.1.0.0/16"), ipaddress.ip_network("fd00::/8")]
    for address, allowed in (("10.1.2.3", True), ("10.2.0.1", False), ("fd00::1", True), ("::1", False)):
        assert is_allowed(ipaddress.ip_address(address), networks) is allowed
    assert is_allowed(ipaddress.ip_address("::ffff:10.1.2.3"), networks)


def test_the_address_that_was_checked_is_the_one_that_is_connected_to():
    target = checked_target("https://name.example/hook?a=1", (), resolving(PUBLIC))
    assert target.url == f"https://{PUBLIC}:443/hook?a=1"
    assert (target.host, target.server_name) == ("name.example", "name.example")
    target = checked_target("http://name.example:8080", (), resolving("2606:2800:21f::1"))
    assert (target.url, target.host) == ("http://[2606:2800:21f::1]:8080/", "name.example:8080")


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://a.example", "file:///etc/passwd", "a.example", "", "http://", "https://user:pw@a.example"),
        *("http://a.example:99999", "http://a b.example", "http://a.example/\r\nX: y", "http://ä.example"),
        "https://a.example/" + "x" * 2048,
    ],
)
def test_what_is_no_plain_http_address_is_refused(url):
    with pytest.raises(InvalidWebhook):
        checked_target(url, (), resolving(PUBLIC))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0x7f.1", "2130706433", "127.1", "0"])
def test_other_spellings_of_loopback_are_refused_before_a_job_is_accepted(host):
    webhook = trainer_pb2.Webhook(url=f"http://{host}:1/", secret="s" * 16)
    with pytest.raises(WebhookAddressRefused):
        check_webhook(webhook, ())


def test_a_secret_has_a_length():
    for secret in ("s" * 15, "s" * 257):
        with pytest.raises(InvalidWebhook, match="secret"):
            check_webhook(trainer_pb2.Webhook(url=f"https://{PUBLIC}/", secret=secret), ())
    check_webhook(trainer_pb2.Webhook(url=f"https://{PUBLIC}/", secret="s" * 16), ())


@pytest.mark.parametrize(
    ("secret", "key"),
    [
        ("sixteen characters", b"sixteen characters"),
        ("whsec_" + base64.b64encode(b"k" * 24).decode(), b"k" * 24),
        ("whsec_not base64!", b"whsec_not base64!"),
    ],
)
def test_a_receiver_can_check_the_signature(secret, key):
    body = b'{"a": 1}'
    headers = signed_headers("job_1-failed", body, secret, 1700)
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert headers["webhook-timestamp"] == "1700"


def test_a_message_says_how_the_job_ended():
    job = trainer_pb2.Job(id="job_1", kind="sft", status="failed", finished_at_s=5.0)
    job.error.code, job.config.metadata_json = "oops", '{"run": 1}'
    body = json.loads(message(job))
    assert (body["type"], body["timestamp"]) == ("training.job.failed", 5.0)
    assert (body["data"]["error"]["code"], body["data"]["result"]) == ("oops", None)
    assert body["data"]["metadata"] == {"run": 1}
    assert "secret" not in str(body)
