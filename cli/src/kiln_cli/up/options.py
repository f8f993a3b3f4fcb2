"""From what the user typed to checked options; nothing is started before this succeeds."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from kiln_cli.errors import (
    ModelNotFound,
    PortInUse,
    PublicHostWithoutKeys,
    StateDirUnusable,
)
from kiln_cli.up.specs import ServiceSpec, UpOptions
from kiln_common.base_model_id import check_base_model_id
from kiln_common.loopback import is_loopback
from kiln_common.model_folder import find_model_folder

# Settings of services that `kiln up` makes itself, and what chooses them there.
_CHOSEN_BY = {
    "KILN_GATEWAY_HOST": "--host",
    "KILN_GATEWAY_PORT": "--port",
    "KILN_GATEWAY_MODEL_PATH": "--model",
    "KILN_ENGINE_MODEL_PATH": "--model",
    "KILN_ENGINE_SERVED_MODEL_NAME": "--served-model-name",
    "KILN_ENGINE_DEVICE": "--device",
    "KILN_ENGINE_QUANTIZATION": "--quantization",
    "KILN_REGISTRY_STATE_DIR": "--state-dir",
    "KILN_TRAINER_STATE_DIR": "--state-dir",
    "KILN_REGISTRY_REDIS_URL": "KILN_REDIS_URL",
    "KILN_ENGINE_REDIS_URL": "KILN_REDIS_URL",
    "KILN_TRAINER_REDIS_URL": "KILN_REDIS_URL",
    "KILN_GATEWAY_REDIS_URL": "KILN_REDIS_URL",
}
# sun_path holds 108 bytes on Linux; the longest socket name below the folder takes 32.
_MAX_RUN_DIR_BYTES = 70


def demo_model_dir() -> Path:
    """The committed demo model, served when no model is named.

    Raises:
        ModelNotFound: this installation does not have it.
    """
    folder = Path(__file__).resolve().parents[4] / "demo" / "model"
    if not (folder / "config.json").is_file():
        raise ModelNotFound(
            f"the demo model is not at {folder}",
            hint="Name a model: kiln up --model FOLDER, or make up MODEL=FOLDER.",
        )
    return folder


def resolve_model(model: str | None) -> tuple[Path, bool]:
    """The folder of the model to serve, fetched if it is a hub id; and whether it is the demo model.

    Raises:
        ModelNotFound: the folder has no config.json.
        ModelFolderMissing: there is no such folder.
        HubFailed: the hub could not provide it.
    """
    if model is None:
        return demo_model_dir(), True
    folder = find_model_folder(model).resolve()
    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"{folder} has no config.json")
    return folder, False


def check_port(host: str, port: int) -> None:
    """Raises PortInUse when something already listens on host:port."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUse(f"{host}:{port} cannot be used: {error.strerror}") from None


def reachable_url(host: str, port: int) -> str:
    """How this machine reaches what listens there."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def check_host(host: str) -> None:
    """Refuse to serve other machines by accident; the gateway would refuse it too, but late.

    Raises:
        PublicHostWithoutKeys: `host` is not loopback, and neither keys nor the permission are set.
    """
    allows = os.environ.get("KILN_GATEWAY_ALLOW_PUBLIC_BIND", "").lower() in ("1", "true", "yes", "on")
    has_keys = os.environ.get("KILN_GATEWAY_API_KEYS", "").strip() not in ("", "[]")
    has_keys = has_keys or bool(os.environ.get("KILN_GATEWAY_API_KEYS_FILE"))
    if not (is_loopback(host) or allows or has_keys):
        raise PublicHostWithoutKeys(f"{host} can be reached from other machines, and no API keys are set")


def run_dir_of(state_dir: Path) -> Path:
    """Where the sockets of this state folder are, whether or not there are any."""
    run_dir = state_dir / "run"
    if len(os.fsencode(run_dir)) > _MAX_RUN_DIR_BYTES:
        # Always the same one for this state folder, so that a killed supervisor leaves no more behind.
        name = hashlib.sha256(os.fsencode(state_dir)).hexdigest()[:16]
        run_dir = Path(tempfile.gettempdir()) / f"kiln-{os.getuid()}-{name}"
    return run_dir


def make_run_dir(state_dir: Path) -> Path:
    """A private folder for Unix sockets: below the state folder where their paths fit, else in /tmp.

    Raises:
        StateDirUnusable: the folder in /tmp belongs to somebody else.
    """
    run_dir = run_dir_of(state_dir)
    run_dir.mkdir(exist_ok=True, mode=0o700)
    status = run_dir.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise StateDirUnusable(f"{run_dir} is not a folder of this user")
    run_dir.chmod(0o700)
    return run_dir


def overruled_variables(environment: Mapping[str, str], specs: Iterable[ServiceSpec]) -> list[str]:
    """A line for each variable of the user's that a service will not see, because `kiln up` says otherwise."""
    made = {name: value for spec in specs for name, value in spec.env.items()}
    return [
        f"{name} has no effect here: {chosen_by} chooses that for kiln up"
        for name, chosen_by in _CHOSEN_BY.items()
        if name in environment and name in made and environment[name] != made[name]
    ]


def build_options(
    *,
    model: str | None,
    host: str,
    port: int,
    state_dir: Path,
    served_model_name: str | None,
    device: str | None,
) -> UpOptions:
    """Check everything that can be wrong before the first process starts; call it with the lock held.

    Raises:
        PublicHostWithoutKeys, ReservedModelId, ModelNotFound, ModelFolderMissing, HubFailed, PortInUse: as named.
    """
    check_host(host)
    if served_model_name:
        check_base_model_id(served_model_name)
    path, is_demo = resolve_model(model)
    check_port(host, port)
    return UpOptions(
        model=str(path),
        is_demo_model=is_demo,
        host=host,
        port=port,
        state_dir=state_dir,
        run_dir=make_run_dir(state_dir),
        served_model_name=served_model_name,
        device=device,
        redis_url=os.environ.get("KILN_REDIS_URL"),
    )
