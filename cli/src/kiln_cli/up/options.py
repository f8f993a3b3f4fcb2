"""From what the user typed to checked options; nothing is started before this succeeds."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import stat
import tempfile
import time
from pathlib import Path

from kiln_cli.errors import (
    ModelNotFound,
    PortInUse,
    PublicHostWithoutKeys,
    StateDirInUse,
    StateDirUnusable,
)
from kiln_cli.up.specs import UpOptions
from kiln_common.loopback import is_loopback
from kiln_common.model_folder import find_model_folder

# sun_path holds 108 bytes on Linux; the longest socket name below the folder takes 32.
_MAX_RUN_DIR_BYTES = 70


def default_state_dir() -> Path:
    """~/.local/state/kiln, or below XDG_STATE_HOME where that is set."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "kiln"


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
        ModelFolderMissing: there is no such folder, or the hub could not provide it.
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


class StateDirLock:
    """Holds a state folder for one `kiln up` and its services, which inherit `fd`.

    The folder is free again once the last of them has gone, so that no service of a supervisor that
    was killed is still there when the next one starts. Until then a new lock waits, up to `wait_s`;
    it does not wait for a supervisor that is alive.

    Raises:
        StateDirInUse: somebody else has it.
    """

    def __init__(self, state_dir: Path, *, wait_s: float = 60.0) -> None:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = (state_dir / "lock").open("a+")
        deadline = time.monotonic() + wait_s
        while not self._try_lock():
            if _is_alive(self._holder()) or time.monotonic() > deadline:
                self._file.close()
                raise StateDirInUse(f"another kiln up uses {state_dir}")
            time.sleep(0.1)
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    @property
    def fd(self) -> int:
        return self._file.fileno()

    def __enter__(self) -> StateDirLock:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _holder(self) -> int:
        self._file.seek(0)
        text = self._file.read().strip()
        return int(text) if text.isdigit() else 0


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0


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
        PublicHostWithoutKeys, ModelNotFound, ModelFolderMissing, PortInUse: as named.
    """
    check_host(host)
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
