"""The hosts that xla_dist.py runs a command on, and the commands that reach them."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Union

NOT_SYNCED = (".git/", ".venv/", "__pycache__/", "xla_dist_logs/")
GCLOUD = ("gcloud", "compute", "tpus", "tpu-vm")


class UsageError(Exception):
    """Flags, a host file or a TPU that cannot be used: one line, exit code 2."""


def wrapper_line() -> bytes:
    """Return the wrapper's source as one line for `bootstrap`."""
    return base64.b64encode(Path(__file__).with_name("xla_dist_wrapper.py").read_bytes()) + b"\n"


def bootstrap(mark: str) -> str:
    """Return Python code, of any version, that prints the mark and runs the line that it then reads.

    It has no newline, backslash, single quote or exclamation mark, so every login shell takes it in single quotes.
    """
    return (
        "import base64, sys; sys.path = [p for p in sys.path if p]; "
        'sys.version_info < (3, 6) and sys.exit("got Python " + sys.version.split()[0] + ", expected 3.6 or newer"); '
        f'print("{mark}"); sys.stdout.flush(); exec(base64.b64decode(sys.stdin.buffer.readline()))'
    )


@dataclasses.dataclass(frozen=True)
class LocalHost:
    """A process of this machine."""

    rank: int
    name: str = "localhost"
    address = "127.0.0.1"

    def command(self, options: argparse.Namespace, mark: str) -> list[str]:
        """Return the command that starts the wrapper there."""
        return [options.python or sys.executable, "-c", bootstrap(mark)]

    def env(self, given: dict[str, str]) -> dict[str, str]:
        """Return what PJRT needs; several processes on one TPU host get a chip each."""
        if {**os.environ, **given}.get("PJRT_DEVICE") != "TPU":
            return {}
        alone = {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1"}
        return {**alone, "TPU_VISIBLE_CHIPS": str(self.rank)}


def remote_command(options: argparse.Namespace, mark: str) -> str:
    """Return the line for the host's login shell that starts the wrapper."""
    return f"exec {shlex.quote(options.python or 'python3')} -c '{bootstrap(mark)}'"


def rsync_command(options: argparse.Namespace, shell: str, host: str) -> list[str]:
    """Return the command that copies the current directory's content to the host's workdir; it deletes nothing."""
    excludes = [f"--exclude={name}" for name in NOT_SYNCED]
    there = f"mkdir -p {shlex.quote(options.workdir)} && rsync"
    return ["rsync", "-azs", *excludes, f"--rsync-path={there}", "-e", shell, "./", f"{host}:{options.workdir}/"]


@dataclasses.dataclass(frozen=True)
class SshHost:
    """A host that ssh reaches."""

    rank: int
    target: str  # host or user@host
    port: int | None = None

    @property
    def address(self) -> str:
        return self.target.rpartition("@")[2]

    @property
    def name(self) -> str:
        return self.address if self.port is None else f"{self.address}:{self.port}"

    def ssh(self, options: argparse.Namespace) -> list[str]:
        """Return ssh with its options: no prompts, no shared connection, and an end when the network is dead."""
        found = [
            "BatchMode=yes",
            f"ConnectTimeout={options.connect_timeout:.0f}",
            "ControlMaster=no",
            "ControlPath=none",
        ]
        if options.heartbeat:
            found += [f"ServerAliveInterval={max(1, options.heartbeat // 3):.0f}", "ServerAliveCountMax=3"]
        flags = [word for option in options.ssh_option + found for word in ("-o", option)]
        return ["ssh", "-T", *flags, *(["-p", str(self.port)] if self.port is not None else [])]

    def command(self, options: argparse.Namespace, mark: str) -> list[str]:
        """Return the command that starts the wrapper there."""
        return [*self.ssh(options), "--", self.target, remote_command(options, mark)]

    def sync_command(self, options: argparse.Namespace) -> list[str]:
        """Return the command that copies the current directory there."""
        user, _, address = self.target.rpartition("@")
        host = f"[{address}]" if ":" in address else address
        shell = " ".join(rsync_word(word) for word in self.ssh(options))
        return rsync_command(options, shell, f"{user}@{host}" if user else host)

    def env(self, given: dict[str, str]) -> dict[str, str]:
        """Return what PJRT needs: --env says which device."""
        return {}


def rsync_word(word: str) -> str:
    """Quote a word of rsync's -e, where two quotes within quotes mean one."""
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word) else '"' + word.replace('"', '""') + '"'


@dataclasses.dataclass(frozen=True)
class TpuHost:
    """A worker of a Cloud TPU, which gcloud reaches."""

    rank: int
    tpu: str
    address: str

    @property
    def name(self) -> str:
        return f"{self.tpu}/{self.rank}"

    def ssh(self, options: argparse.Namespace) -> list[str]:
        """Return gcloud's ssh to this worker, without the command to run there."""
        place = [f"--zone={options.zone}", *([f"--project={options.project}"] if options.project else [])]
        ssh_flags = [f"--ssh-flag=-o{option}" for option in options.ssh_option]
        if options.heartbeat:
            ssh_flags += [f"--ssh-flag=-oServerAliveInterval={max(1, options.heartbeat // 3):.0f}"]
        return [*GCLOUD, "ssh", self.tpu, *place, f"--worker={self.rank}", "--quiet", *ssh_flags, *options.gcloud_flag]

    def command(self, options: argparse.Namespace, mark: str) -> list[str]:
        """Return the command that starts the wrapper there."""
        return [*self.ssh(options), f"--command={remote_command(options, mark)}"]

    def sync_command(self, options: argparse.Namespace) -> list[str]:
        """Return the command that copies the current directory there: rsync over gcloud's ssh.

        rsync calls `sh -c SCRIPT sh HOST rsync --server ...`; the words after HOST are the command to run there.
        """
        script = f'shift; exec {" ".join(shlex.quote(word) for word in self.ssh(options))} --command="$*"'
        return rsync_command(options, f"sh -c {rsync_word(script)} sh", self.tpu)

    def env(self, given: dict[str, str]) -> dict[str, str]:
        """Return what PJRT needs; libtpu asks the TPU's metadata server for the rest."""
        return {"PJRT_DEVICE": "TPU"}


Host = Union[LocalHost, SshHost, TpuHost]  # noqa: UP007 - Python 3.8 has no |


def find_hosts(options: argparse.Namespace) -> list[Host]:
    """Return the hosts in the order of their ranks. Raises UsageError."""
    if options.local:
        return [LocalHost(rank) for rank in range(options.local)]
    if options.tpu is not None:
        return tpu_hosts(options)
    if options.hosts is not None:
        names, source = options.hosts.split(","), "--hosts"
    else:
        source = f"--hostfile {options.hostfile}"
        try:
            lines = Path(options.hostfile).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{source}: {error}") from None
        names = [name for line in lines if (name := line.partition("#")[0].strip())]
    if not names or names == [""]:
        raise UsageError(f"{source}: got no host, expected at least one")
    hosts = [ssh_host(rank, name.strip(), source) for rank, name in enumerate(names)]
    seen: set[tuple[str, int]] = set()
    for host in hosts:
        key = (host.address, host.port or 22)
        if key in seen:
            raise UsageError(f"{source}: {host.name} is there twice; a host has one rank, unless the ports differ")
        seen.add(key)
    return list(hosts)


def ssh_host(rank: int, name: str, source: str) -> SshHost:
    """Read HOST, USER@HOST, USER@HOST:PORT, or an IPv6 address, in brackets if a port follows."""
    word = r"[A-Za-z0-9_][\w.%-]*"
    found = re.fullmatch(
        rf"((?:{word}@)?)(?:\[([0-9A-Fa-f:.%\w]+)\]|({word})|([0-9A-Fa-f:]*:[0-9A-Fa-f:.]*:[\w.%]*))(?::([0-9]+))?",
        name,
    )
    if found is None or (found[4] and found[5]):
        raise UsageError(f"{source}: got {name!r}, expected HOST, USER@HOST or USER@HOST:PORT")
    port = int(found[5]) if found[5] else None
    if port is not None and not 0 < port < 65536:
        raise UsageError(f"{source}: {name}: got port {port}, expected 1 to 65535")
    return SshHost(rank, found[1] + (found[2] or found[3] or found[4]), port)


def tpu_hosts(options: argparse.Namespace) -> list[Host]:
    """Ask gcloud for the TPU's workers. Raises UsageError."""
    command = [*GCLOUD, "describe", options.tpu, f"--zone={options.zone}", "--format=json", "--quiet"]
    command += [f"--project={options.project}"] if options.project else []
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=options.connect_timeout)
        if done.returncode:
            raise UsageError(f"--tpu {options.tpu}: gcloud says: {last_line(done.stderr)}")
        found = json.loads(done.stdout)
        addresses = [endpoint.get("ipAddress", options.tpu) for endpoint in found["networkEndpoints"]]
    except FileNotFoundError:
        raise UsageError("--tpu needs gcloud, which is not on PATH") from None
    except subprocess.TimeoutExpired:
        raise UsageError(f"--tpu {options.tpu}: gcloud did not answer within {options.connect_timeout:g} s") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"--tpu {options.tpu}: gcloud describes no networkEndpoints; is it a TPU VM?") from None
    if found.get("state", "READY") != "READY" or not addresses:
        raise UsageError(f"--tpu {options.tpu}: got state {found.get('state')}, expected READY")
    return [TpuHost(rank, options.tpu, address) for rank, address in enumerate(addresses)]


def last_line(text: bytes) -> str:
    """Return the last line that is not empty."""
    return ([line for line in text.decode(errors="replace").splitlines() if line.strip()] or ["nothing"])[-1]
