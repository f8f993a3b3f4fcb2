"""Mutual TLS between services, with certificates made by the openssl command."""

import asyncio
import contextlib
import shutil
import subprocess

import pytest

from kiln_common.clients.registry import RegistryClient
from kiln_common.errors import RegistryUnavailable
from kiln_common.rpc import tls
from kiln_common.rpc.healthcheck import is_serving
from kiln_registry.bootstrap import start_registry
from kiln_registry.settings import RegistrySettings

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made with openssl")

NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]


def make_authority(folder, name):
    run("req", "-x509", *NEW_KEY, "-subj", f"/CN={name}", "-keyout", folder / f"{name}.key", "-out",
        folder / f"{name}.pem")  # fmt: skip


def make_certificate(folder, name, authority, host="localhost"):
    run(
        "req",
        *NEW_KEY,
        "-subj",
        f"/CN={name}",
        "-keyout",
        folder / f"{name}.key",
        "-out",
        folder / f"{name}.csr",
    )
    (folder / "san").write_text(f"subjectAltName=DNS:{host}")
    run("x509", "-req", "-in", folder / f"{name}.csr", "-CA", folder / f"{authority}.pem", "-CAkey",
        folder / f"{authority}.key", "-CAcreateserial", "-days", "2", "-extfile", folder / "san", "-out",
        folder / f"{name}.pem")  # fmt: skip


def run(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("ours", "theirs"):
        make_authority(folder, name)
    make_certificate(folder, "service", "ours")
    make_certificate(folder, "stranger", "theirs")
    make_certificate(folder, "elsewhere", "ours", host="other.example")
    return folder


@pytest.fixture
def use(folder, monkeypatch):
    """`use(name)`: from here on this process shows that certificate, and trusts our authority."""
    monkeypatch.setattr(tls, "_certificates", None)

    def use(name):
        monkeypatch.setenv("KILN_TLS_CERT_FILE", str(folder / f"{name}.pem"))
        monkeypatch.setenv("KILN_TLS_KEY_FILE", str(folder / f"{name}.key"))
        monkeypatch.setenv("KILN_TLS_CA_FILE", str(folder / "ours.pem"))
        tls.configure_tls()

    return use


@contextlib.asynccontextmanager
async def serving(folder):
    """A registry's address."""
    registry = await start_registry(
        RegistrySettings(listen="localhost:0", state_dir=folder, stop_grace_s=0.1)
    )
    try:
        yield f"localhost:{registry.port}"
    finally:
        await registry.stop()


async def ask(address):
    client = RegistryClient(address, timeout_s=2.0)
    try:
        return await client.get_default()
    finally:
        await client.close()


async def test_services_with_certificates_talk_and_nobody_else_is_heard(tmp_path, use, monkeypatch):
    use("service")
    async with serving(tmp_path) as address:
        assert await ask(address) is None
        assert await asyncio.to_thread(is_serving, address)
        use("stranger")
        with pytest.raises(RegistryUnavailable):
            await ask(address)
        monkeypatch.setattr(tls, "_certificates", None)
        with pytest.raises(RegistryUnavailable):
            await ask(address)


async def test_a_server_under_another_name_is_not_believed(tmp_path, use):
    use("elsewhere")
    async with serving(tmp_path) as address:
        with pytest.raises(RegistryUnavailable):
            await ask(address)


def test_half_a_configuration_stops_the_start(monkeypatch, capsys, folder):
    monkeypatch.setattr(tls, "_certificates", None)
    monkeypatch.setenv("KILN_TLS_CERT_FILE", str(folder / "service.pem"))
    with pytest.raises(SystemExit):
        tls.configure_tls()
    assert "KILN_TLS_KEY_FILE" in capsys.readouterr().err
    monkeypatch.setenv("KILN_TLS_KEY_FILE", str(folder / "missing.key"))
    monkeypatch.setenv("KILN_TLS_CA_FILE", str(folder / "ours.pem"))
    with pytest.raises(tls.TlsFileUnreadable):
        tls.configure_tls()
