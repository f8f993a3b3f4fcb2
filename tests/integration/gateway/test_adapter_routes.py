"""Adapters in and out: archives that cannot be trusted leave nothing behind."""

import io
import json
import tarfile
import tempfile

import pytest

from kiln_common.errors import AdapterMismatch
from tests.support.gateway import gateway_rig

CONFIG = json.dumps({"r": 8}).encode()
TENSORS = b"\x10\x00\x00\x00\x00\x00\x00\x00{}              "


@pytest.fixture
async def rig(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    async with gateway_rig(tmp_path, max_upload_bytes=100_000) as rig:
        yield rig
    assert list(scratch.iterdir()) == []


def member(name: str, content: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


GOOD = [
    member("adapter", type=tarfile.DIRTYPE),
    member("adapter/adapter_config.json", CONFIG),
    member("adapter/adapter_model.safetensors", TENSORS),
    member("adapter/README.md", b"hello"),
]


def archive(members, mode="w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


async def upload(rig, *parts, name="mine", **fields):
    files = [("file", (file_name, content, "application/octet-stream")) for file_name, content in parts]
    return await rig.http.post("/v1/adapters/upload", files=files, data={"name": name, **fields})


async def test_an_archive_or_two_files_become_a_version(rig):
    response = await upload(rig, ("adapter.tar.gz", archive(GOOD)), attach="true")
    assert (response.status_code, response.json()["id"]) == (201, "mine@1")
    header, content = rig.registry.published[0]
    assert (header.name, header.config_json, header.attach) == ("mine", CONFIG.decode(), True)
    assert header.base_model_hash == rig.engine.base_model.model_hash
    assert content == TENSORS
    await upload(rig, ("adapter_model.safetensors", TENSORS), ("adapter_config.json", CONFIG))
    assert rig.registry.published[1][1] == TENSORS
    assert (await upload(rig, ("a.tar", archive(GOOD, "w")))).status_code == 201


BAD = {
    "up": ([*GOOD, member("../evil", b"x")], "unsafe_archive"),
    "absolute": ([*GOOD, member("/etc/evil", b"x")], "unsafe_archive"),
    "symlink": (
        [member("adapter_config.json", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
        "unsafe_archive",
    ),
    "hardlink": ([member("a", type=tarfile.LNKTYPE, linkname="b")], "unsafe_archive"),
    "device": ([member("a", type=tarfile.CHRTYPE)], "unsafe_archive"),
    "fifo": ([member("a", type=tarfile.FIFOTYPE)], "unsafe_archive"),
    "many": ([member(f"f{i}") for i in range(100)], "unsafe_archive"),
    "pickle": ([GOOD[1], member("adapter_model.bin", b"x")], "pickle_refused"),
    "disguised": ([GOOD[1], member("adapter_model.safetensors", b"PK\x03\x04....")], "pickle_refused"),
    "twice": ([*GOOD, member("b/adapter_config.json", CONFIG)], "invalid_archive"),
    "no model": ([GOOD[1]], "invalid_archive"),
    "bomb": ([*GOOD, member("zeros", bytes(200_000))], "body_too_large"),
}


@pytest.mark.parametrize("case", BAD)
async def test_archives_that_cannot_be_trusted_are_refused(rig, case):
    members, code = BAD[case]
    response = await upload(rig, ("adapter.tar.gz", archive(members)))
    assert response.json()["error"]["code"] == code
    assert 400 <= response.status_code < 500
    assert response.json()["error"]["hint"]
    assert rig.registry.published == []


async def test_uploads_that_are_no_archive_are_refused(rig):
    cases = [
        ([("adapter.tar.gz", b"not a tar")], {}, "invalid_archive"),
        ([("adapter.tar.gz", archive(GOOD)[:60])], {}, "invalid_archive"),
        ([("adapter_model.bin", b"x")], {}, "pickle_refused"),
        ([("adapter_model.safetensors", TENSORS)], {}, "invalid_archive"),
        ([("notes.txt", b"x")], {}, "invalid_archive"),
        ([("adapter.tar.gz", archive(GOOD))], {"name": "base"}, "reserved_adapter_name"),
        ([("adapter.tar.gz", archive(GOOD))], {"name": ""}, "missing_field"),
        ([("adapter.tar.gz", archive(GOOD))], {"colour": "red"}, "unknown_field"),
        ([("adapter.tar", bytes(150_000))], {}, "body_too_large"),
    ]
    for parts, fields, code in cases:
        response = await upload(rig, *parts, **fields)
        assert response.json()["error"]["code"] == code, code
    response = await rig.post("/v1/adapters/upload", {})
    assert response.json()["error"]["code"] == "invalid_multipart"
    assert rig.registry.published == []


async def test_an_adapter_for_another_model_is_the_registrys_refusal(rig):
    rig.registry.publish_failure = AdapterMismatch("q_proj has 4096 inputs, the model 2560")
    response = await upload(rig, ("adapter.tar.gz", archive(GOOD)))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "adapter_mismatch")


async def test_a_download_can_be_uploaded_again(rig):
    rig.registry.add("mine")
    rig.registry.add("mine")
    response = await rig.http.get("/v1/adapters/mine/download?version=1")
    assert response.headers["content-type"] == "application/gzip"
    with tarfile.open(fileobj=io.BytesIO(response.content)) as tar:
        names = {member.name: tar.extractfile(member).read() for member in tar}
    assert names["mine-1/adapter_model.safetensors"] == b"bytes of mine@1"
    assert (await upload(rig, ("x.tar.gz", response.content), name="copy")).status_code == 201
    assert rig.registry.published[0][1] == b"bytes of mine@1"


async def test_attach_and_detach_change_what_answers(rig):
    rig.registry.add("mine")
    rig.registry.add("mine")
    response = await rig.post("/v1/adapters/mine/attach", {"version": 1})
    assert response.json()["attached"]["id"] == "mine@1"
    assert (await rig.chat()).headers["X-Kiln-Adapter"] == "mine@1"
    assert (await rig.http.post("/v1/adapters/mine/attach")).json()["attached"]["id"] == "mine@2"
    assert (await rig.http.post("/v1/adapters/detach")).json() == {"attached": None}
    assert (await rig.chat()).headers["X-Kiln-Adapter"] == "base"
    listed = (await rig.http.get("/v1/adapters")).json()["data"]
    assert [version["version"] for version in listed[0]["versions"]] == [1, 2]
    assert (await rig.http.delete("/v1/adapters/mine")).json()["versions"] == 2
    assert (await rig.http.get("/v1/adapters/mine")).status_code == 404


async def test_a_rolled_back_name_answers_with_the_older_version(rig):
    rig.registry.add("mine")
    rig.registry.add("mine", attach=True)
    response = await rig.post("/v1/adapters/mine/rollback", {"version": 1})
    body = response.json()
    assert (body["version"]["id"], body["default_moved"]) == ("mine@1", True)
    for fields in ({}, {"model": "mine"}):
        assert (await rig.chat(**fields)).headers["X-Kiln-Adapter"] == "mine@1"
    assert (await rig.chat(model="mine@2")).headers["X-Kiln-Adapter"] == "mine@2"
    for name, sent, status, code, param in (
        ("mine", {"version": 9}, 404, "adapter_not_found", "version"),
        ("nobody", {"version": 1}, 404, "adapter_not_found", "name"),
        ("mine", {}, 400, "missing_field", "version"),
        ("mine", {"version": 0}, 400, "invalid_value", "version"),
    ):
        response = await rig.post(f"/v1/adapters/{name}/rollback", sent)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert (await rig.chat(model="mine")).headers["X-Kiln-Adapter"] == "mine@1"


async def test_attaching_what_is_not_there_names_the_part_at_fault(rig):
    rig.registry.add("mine")
    cases = [("nobody", {}, "name"), ("nobody", {"version": 1}, "name"), ("mine", {"version": 9}, "version")]
    for name, body, param in cases:
        response = await rig.post(f"/v1/adapters/{name}/attach", body)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (404, "adapter_not_found", param)
    assert rig.registry.default is None
