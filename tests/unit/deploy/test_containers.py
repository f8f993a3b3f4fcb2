"""Containers run as a normal user, with a root they cannot write and no rights of root's."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
COMPOSE = ROOT / "docker-compose.yml"
MPS = ROOT / "deploy" / "compose.mps.yml"
GPUS = ROOT / "deploy" / "compose.gpus.yml"


def services(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))["services"]


SECOND = {name: service for name, service in services(GPUS).items() if name.endswith("-2")}
OWN_CONTAINERS = [*services(COMPOSE).items(), ("mps", services(MPS)["mps"]), *SECOND.items()]


@pytest.mark.parametrize(("name", "service"), OWN_CONTAINERS, ids=[name for name, _ in OWN_CONTAINERS])
def test_a_container_can_do_no_more_than_it_needs(name, service):
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    if "build" in service:
        dockerfile = (ROOT / service["build"]["dockerfile"]).read_text(encoding="utf-8")
        user = re.findall(r"^USER (\S+)", dockerfile, re.MULTILINE)[-1]
    else:
        user = service["user"]
    assert user.partition(":")[0].isdigit()
    assert int(user.partition(":")[0]) > 0


@pytest.mark.parametrize(("name", "service"), OWN_CONTAINERS, ids=[name for name, _ in OWN_CONTAINERS])
def test_a_container_comes_back_after_any_end(name, service):
    """A drained engine ends with 0, and a bound would count the failures of all a container's life."""
    assert service["restart"] == "unless-stopped"
    assert "restart_policy" not in service.get("deploy", {})


@pytest.mark.parametrize("name", ["engine", "trainer"])
def test_what_runs_on_a_second_gpu_differs_from_the_first_in_place_alone(name):
    text = yaml.safe_dump({**SECOND[f"{name}-2"], "deploy": None})
    first = yaml.safe_dump({**services(COMPOSE)[name], "deploy": None})
    assert text.replace("engine-2", "engine").replace("weights-2", "weights") == first
    (device,) = SECOND[f"{name}-2"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["device_ids"] == ["1"]


def test_the_gateways_know_the_engines_and_trainers_of_both_gpus():
    told = services(GPUS)["gateway"]["environment"]
    known = services(COMPOSE)["gateway"]["environment"]
    for name, kind in (
        ("KILN_GATEWAY_ENGINE_ADDRESSES", "engine"),
        ("KILN_GATEWAY_TRAINER_ADDRESSES", "trainer"),
    ):
        first = known[name]
        assert told[name] == f"{first},{first.replace(kind, f'{kind}-2')}"


def test_only_the_proxy_is_published_and_only_on_this_machine():
    published = {name: service["ports"] for name, service in services(COMPOSE).items() if "ports" in service}
    assert not any("ports" in service for path in (MPS, GPUS) for service in services(path).values())
    assert published == {"proxy": ["127.0.0.1:8420:8420"]}
