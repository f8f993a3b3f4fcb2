"""From what the user typed to checked options; nothing is started before this succeeds."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path

from kiln_cli.errors import ModelNotFound, PortInUse, StateDirInUse
from kiln_cli.up.specs import UpOptions
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
            f"the demo model is not at {folder}", hint="Name a model: kiln up --model FOLDER."
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


class StateDirLock:
    """Holds a state folder for one `kiln up`; released when the process ends, however it ends."""

    def __init__(self, state_dir: Path) -> None:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = (state_dir / "lock").open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StateDirInUse(f"another kiln up uses {state_dir}") from None

    def release(self) -> None:
        self._file.close()


def make_run_dir(state_dir: Path) -> Path:
    """A private folder for Unix sockets: below the state folder where their paths fit, else in /tmp."""
    run_dir = state_dir / "run"
    if len(os.fsencode(run_dir)) > _MAX_RUN_DIR_BYTES:
        return Path(tempfile.mkdtemp(prefix="kiln-"))
    run_dir.mkdir(exist_ok=True)
    run_dir.chmod(0o700)
    return run_dir


def build_options(
    *,
    model: str | None,
    host: str,
    port: int,
    state_dir: Path | None,
    served_model_name: str | None,
    device: str | None,
) -> UpOptions:
    """Check everything that can be wrong before the first process starts.

    Raises:
        ModelNotFound, ModelFolderMissing, PortInUse: as named.
    """
    path, is_demo = resolve_model(model)
    check_port(host, port)
    folder = (state_dir or default_state_dir()).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return UpOptions(
        model=str(path),
        is_demo_model=is_demo,
        host=host,
        port=port,
        state_dir=folder,
        run_dir=make_run_dir(folder),
        served_model_name=served_model_name,
        device=device,
        redis_url=os.environ.get("KILN_REDIS_URL"),
    )
