"""The sandbox's own process: builds the walls around itself, then runs the code within them.

Started by `outside` with a job on stdin. It makes namespaces; a child becomes process 1 of them, sees
only the new root, gives up all privileges, and starts the code. When process 1 ends, the kernel
kills whatever the code left behind.

A root user's code runs as another user: root's files stay closed to it, and the kernel does not
hold root to a limit on processes. The user namespace made at the end counts this sandbox's alone.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys

from kiln_common.sandbox import syscalls
from kiln_common.sandbox.call_filter import filter_program
from kiln_common.sandbox.model import Task
from kiln_common.sandbox.root_folder import CODE_PATH, WORK_PATH, build_and_enter

SETUP_FAILED = 70
_NICENESS = 10  # whoever serves on this machine goes first
_OTHER_NAMESPACES = (
    syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUTS
)
_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": WORK_PATH,
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONPATH": WORK_PATH,
}


def main(status_fd: int) -> int:
    task = Task(**json.load(sys.stdin))
    os.set_inheritable(status_fd, False)
    status = socket.socket(fileno=status_fd)
    try:
        if os.geteuid() != 0:
            _enter_user_namespace(task)
        syscalls.unshare(_OTHER_NAMESPACES)
        syscalls.die_with_parent()  # after the last change of privileges, which undoes it
        first_process = os.fork()
    except OSError as error:
        return _give_up(status, error)
    if first_process == 0:
        os._exit(_be_first_process(task, status))
    status.send(json.dumps({"first_process_id": first_process}).encode())
    _, wait_status = os.waitpid(first_process, 0)
    return _exit_code(wait_status)


def _be_first_process(task: Task, status: socket.socket) -> int:
    try:
        is_root = os.geteuid() == 0 and task.user_id != 0
        build_and_enter(
            task.mount_point,
            python_prefix=task.python_prefix,
            work_folder=task.work_folder,
            code=task.code,
        )
        if is_root:
            os.setgroups([])
            os.setresgid(task.group_id, task.group_id, task.group_id)
            os.setresuid(task.user_id, task.user_id, task.user_id)
            syscalls.set_dumpable(True)  # /proc/self belongs to root otherwise
            _enter_user_namespace(task)
        _give_up_privileges(task)
        proc_fd = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    except (OSError, KeyError, ValueError) as error:
        return _give_up(status, error)
    socket.send_fds(status, [b"{}"], [proc_fd])
    os.close(proc_fd)
    return _run_code(task.command)


def _enter_user_namespace(task: Task) -> None:
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{task.user_id} {task.user_id} 1"),
        ("gid_map", f"{task.group_id} {task.group_id} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _give_up_privileges(task: Task) -> None:
    with open("/proc/sys/user/max_user_namespaces", "w", encoding="ascii") as file:
        file.write("0")  # no privileges over namespaces of its own either
    for kind, most in (
        (resource.RLIMIT_AS, task.address_space_bytes),
        (resource.RLIMIT_FSIZE, task.file_bytes),
        (resource.RLIMIT_NPROC, task.num_processes),
        (resource.RLIMIT_NOFILE, 128),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    os.nice(_NICENESS)
    os.chdir(WORK_PATH)
    syscalls.drop_capabilities()
    syscalls.set_dumpable(False)  # the code cannot look into or steer this process
    syscalls.die_with_parent()
    syscalls.install_filter(filter_program(os.uname().machine))


def _run_code(command: list[str]) -> int:
    """Start the code and bury its orphans until it ends."""
    main_process = os.fork()
    if main_process == 0:
        try:
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            os.execve(command[0], [*command, f"{CODE_PATH}/main"], _ENVIRONMENT)
        except OSError as error:
            os.write(2, f"{command[0]} cannot be started: {error.strerror}\n".encode())
            os._exit(127)
    while True:
        process, wait_status = os.wait()
        if process == main_process:
            return _exit_code(wait_status)


def _exit_code(wait_status: int) -> int:
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code


def _give_up(status: socket.socket, error: Exception) -> int:
    reason = error.strerror if isinstance(error, OSError) else repr(error)
    status.send(json.dumps({"error": reason}).encode())
    return SETUP_FAILED


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
