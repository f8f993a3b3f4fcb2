"""Containers run as a normal user, with a root they cannot write and no rights of root's."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
COMPOSE = ROOT / "docker-compose.yml"
MPS = ROOT / "deploy" / "compose.mps.yml"


def services(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))["services"]


OWN_CONTAINERS = [*services(COMPOSE).items(), ("mps", services(MPS)["mps"])]


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


def test_only_the_proxy_is_published_and_only_on_this_machine():
    published = {name: service["ports"] for name, service in services(COMPOSE).items() if "ports" in service}
    assert published == {"proxy": ["127.0.0.1:8420:8420"]}
