"""Hosts for tests of ssh: sshd on ports of this machine, with keys and settings of their own."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

SSHD = "/usr/sbin/sshd"
CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
MaxStartups 50
{more}
"""


@dataclass(frozen=True)
class SshServer:
    """A running sshd."""

    port: int
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def name(self) -> str:
        return f"{getpass.getuser()}@127.0.0.1:{self.port}"

    def connections(self) -> list[psutil.Process]:
        """The processes that serve its open connections, or are below one."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []


def install() -> None:
    """Skip the tests, with a warning that names why, where there is no sshd and root cannot install one."""
    needed = [name for name in (SSHD, "ssh", "ssh-keygen", "rsync") if shutil.which(name) is None]
    if needed and os.geteuid() == 0 and shutil.which("apt-get"):
        command = ["apt-get", "install", "-y", "-q", "openssh-server", "openssh-client", "rsync"]
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=120)
        needed = [name for name in needed if shutil.which(name) is None]
    if needed:
        reason = f"NOT TESTED over ssh: {', '.join(needed)} not found; install openssh-server, openssh-client and rsync"
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(reason, stacklevel=2)
        pytest.skip(reason)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_keys(folder: Path) -> None:
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)


@contextlib.contextmanager
def sshd(folder: Path, more: str = "") -> Iterator[SshServer]:
    """Run an sshd whose keys are in the folder; end it with its connections."""
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd separates its privileges
    port = free_port()
    config = folder / f"sshd_config.{port}"
    config.write_text(CONFIG.format(port=port, folder=folder, more=more))
    with open(folder / f"sshd.{port}.log", "wb") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stdin=subprocess.DEVNULL, stderr=log)
    server = SshServer(port, folder, process)
    try:
        wait_for_port(port)
        yield server
    finally:
        for connection in server.connections():
            with contextlib.suppress(psutil.NoSuchProcess):
                connection.kill()
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def wait_for_port(port: int) -> None:
    ends = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < ends, f"nothing listens on port {port}"
            time.sleep(0.02)
