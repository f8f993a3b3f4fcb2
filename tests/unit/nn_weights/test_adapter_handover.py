"""An adapter's file goes from one process's sealed memory to an inbox, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest
import torch

from kiln_nn.errors import InvalidAdapter, ShareRefused
from kiln_nn.lora import LoraSpec, serialize_adapter
from kiln_nn.sharing import AdapterInbox, AdapterRefused, HandedAdapter, SealedAdapter
from kiln_nn.sharing.wire import receive_message, send_message
from tests.support.tiny_models import random_adapter, tiny_config

CONFIG = tiny_config()
SPEC = LoraSpec(rank=4, alpha=8.0)


def sealed() -> SealedAdapter:
    return SealedAdapter(random_adapter(CONFIG, SPEC), SPEC, "tiny")


class Taking:
    """An inbox in a folder of its own, and what it took."""

    def __init__(self, folder: Path) -> None:
        self.taken: list[HandedAdapter] = []
        self.error: Exception | None = None
        self.inbox = AdapterInbox(folder / "private" / "adapters.sock")
        self.inbox.serve(self._take)
        self.path = str(self.inbox.socket_path)

    def _take(self, adapter: HandedAdapter) -> str:
        if self.error is not None:
            raise self.error
        self.taken.append(adapter)
        return hashlib.sha256(adapter.content).hexdigest()


@pytest.fixture
def taking(tmp_path):
    taking = Taking(tmp_path)
    yield taking
    taking.inbox.close()


def test_sealed_files_are_those_that_safetensors_writes():
    config_json, weights = serialize_adapter(random_adapter(CONFIG, SPEC), SPEC, "tiny")
    adapter = sealed()
    assert adapter.config_json == config_json
    assert adapter.view() == weights


def test_what_is_handed_over_arrives_and_outlives_its_sender(taking):
    adapter = sealed()
    wanted = bytes(adapter.view())
    for _ in range(2):
        assert adapter.hand_over(taking.path, "helper", 5) == hashlib.sha256(wanted).hexdigest()
    adapter.close()
    assert [taken.name for taken in taking.taken] == ["helper", "helper"]
    assert taking.taken[0].config_json == adapter.config_json
    assert taking.taken[0].content == wanted


def test_a_refusal_travels_back_with_its_code(taking):
    taking.error = AdapterRefused("all slots are in use", "adapter_slots_full")
    with pytest.raises(ShareRefused, match=r"in use.*adapter_slots_full"):
        sealed().hand_over(taking.path, "helper", 5)
    taking.error = None
    sealed().hand_over(taking.path, "helper", 5)


def test_a_failure_ends_one_handover_and_not_the_inbox(taking):
    taking.error = RuntimeError("no memory left")
    with pytest.raises(ShareRefused, match=r"no memory left.*internal"):
        sealed().hand_over(taking.path, "helper", 5)
    taking.error = None
    assert sealed().hand_over(taking.path, "helper", 5)


def exchange(path: str, message: dict, fd: int | None) -> dict:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect(path)
        send_message(connection, message, fd)
        return receive_message(connection)[0]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"name": "a", "config_json": "{}", "nbytes": 4}, "sealed"),
        ({"name": "a", "config_json": "{}", "nbytes": 0}, "0 bytes"),
        ({"name": "a", "config_json": "{}"}, "malformed"),
        ({"name": 1, "config_json": "{}", "nbytes": 4}, "malformed"),
    ],
)
def test_what_could_still_change_or_says_nothing_is_refused(taking, message, said):
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(fd, b"1234")
    answer = exchange(taking.path, message, fd)
    os.close(fd)
    assert said in answer["error"]
    assert "descriptor" in exchange(taking.path, message, None)["error"]
    assert taking.taken == []


def test_a_sender_that_goes_away_leaves_the_inbox_open(taking):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(taking.path)
    assert sealed().hand_over(taking.path, "helper", 5)


def test_without_an_inbox_the_sender_is_told(tmp_path):
    with pytest.raises(ShareRefused, match="no engine"):
        sealed().hand_over(str(tmp_path / "nobody.sock"), "helper", 5)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "no tensors"),
        ({"m": (torch.zeros(5, 64), torch.zeros(48, 4))}, "of rank 4"),
        ({"m": (torch.zeros(4, 64).half(), torch.zeros(48, 4))}, "float16"),
        (
            {"m": (torch.zeros(4, 64), torch.full((48, 4), float("inf")))},
            "m.lora_B.weight holds NaN or infinity",
        ),
    ],
)
def test_unsound_adapters_are_not_sealed(tensors, said):
    with pytest.raises(InvalidAdapter, match=said):
        SealedAdapter(tensors, SPEC, "tiny")
