"""scripts/xla_dist.py over sshd on ports of this machine, over a gcloud that runs commands here, and on this machine.

What a run started is known by process ids, which the commands write to files.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ssh_hosts
import yaml
from commands import ROOT
from ssh_hosts import SshServer

from llama.ranks import Ranks, current_ranks

sys.path.insert(0, str(ROOT / "scripts"))

import xla_dist
import xla_dist_flags
import xla_dist_hosts

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "scripts" / "xla_dist.py"
TIMEOUT_S = 60
NOISE = "Welcome! No newline follows"
LINE = r"\d\d:\d\d:\d\d\.\d\d\d {name} \({rank}\) {text}"
ODD = ["a b", "", "'\"\\", "$HOME `id` !x *", "two\nlines\n", "é 日本 \udcff", "--", "-n", "%s;&|<>#~"]
# prints, then waits; its file names the command, a child, a child in another session, and the two wrapper processes
WAITER = """
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "1000"])
daemon = subprocess.Popen(["sleep", "1000"], start_new_session=True)
outer = open(f"/proc/{os.getppid()}/stat").read().rpartition(")")[2].split()[1]
folder, rank = sys.argv[1], os.environ["RANK"]
pids = [os.getpid(), child.pid, daemon.pid, os.getppid(), outer]
open(f"{folder}/{rank}.new", "w").write(" ".join(map(str, pids)))
print("rank", rank, "waits", flush=True)
os.rename(f"{folder}/{rank}.new", f"{folder}/{rank}.pids")
time.sleep(1000)
"""
COMMAND, INNER, OUTER = 0, 3, 4  # places of process ids in these files


class Done:
    """An ended launcher."""

    def __init__(self, code: int, out: bytes, err: bytes) -> None:
        self.code, self.out, self.err = code, out, (err or b"").decode(errors="replace")


class Launcher:
    """A running launcher, whose log directory and process id files are below `folder`."""

    def __init__(self, folder: Path, arguments: list[str], **options: Any) -> None:
        self.folder = folder
        given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "cwd": folder}
        self.process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments], **{**given, **options})

    def pids(self, count: int) -> list[list[int]]:
        """The process ids of the ranks, once all of them wait."""
        wait_until(lambda: len(list(self.folder.glob("*.pids"))) == count, 20, "a WAITER did not start")
        return [[int(pid) for pid in (self.folder / f"{rank}.pids").read_text().split()] for rank in range(count)]

    def end(self, limit_s: float = TIMEOUT_S) -> Done:
        out, err = self.process.communicate(timeout=limit_s)
        return Done(self.process.returncode, out, err)


def wait_until(is_true: Callable[[], bool], limit_s: float, message: str) -> None:
    ends = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < ends, message
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def assert_gone(ranks: list[list[int]], limit_s: float = 10) -> None:
    pids = [pid for rank in ranks for pid in rank]
    wait_until(lambda: not any(map(is_alive, pids)), limit_s, f"left: {[pid for pid in pids if is_alive(pid)]}")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[SshServer]]:
    """Three hosts. The third's login shell prints something, and has no newline at its end."""
    ssh_hosts.install()
    folder = tmp_path_factory.mktemp("ssh")
    ssh_hosts.make_keys(folder)
    noisy = f"ForceCommand printf '{NOISE}'; eval \"$SSH_ORIGINAL_COMMAND\""
    with ssh_hosts.sshd(folder) as first, ssh_hosts.sshd(folder) as second, ssh_hosts.sshd(folder, noisy) as third:
        yield [first, second, third]


@pytest.fixture(scope="module")
def key(servers: list[SshServer]) -> Path:
    return servers[0].folder / "user_key"


@pytest.fixture
def over_ssh(servers: list[SshServer], key: Path) -> list[str]:
    """Flags for the three hosts."""
    return ssh_flags([server.name for server in servers], key)


def ssh_flags(names: list[str], key: Path) -> list[str]:
    settings = [f"IdentityFile={key}", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
    return ["--hosts", ",".join(names), *[f"--ssh_option={setting}" for setting in settings]]


def launch(folder: Path, *arguments: str, **options: Any) -> Done:
    return Launcher(folder, list(arguments), **options).end()


def python(code: str, *arguments: str) -> list[str]:
    return ["--", sys.executable, "-S", "-c", code, *arguments]


def waiters(folder: Path, flags: list[str], **options: Any) -> Launcher:
    return Launcher(folder, [*flags, *python(WAITER, str(folder))], **options)


def test_every_rank_knows_its_place(over_ssh: list[str], servers: list[SshServer], tmp_path: Path) -> None:
    """Rank 0's stdout is stdout; all else has time, host and rank in front; the log holds each stream."""
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "NNODES", "MASTER_ADDR", "MASTER_PORT"]
    code = f"import os; print(*[os.environ[name] for name in {names}])"
    done = launch(tmp_path, *over_ssh, "--log_dir", "logs", "--master_port", "1234", *python(code))
    assert (done.code, done.out) == (0, b"0 3 0 3 127.0.0.1 1234\n")
    for rank in (1, 2):
        text = f"{rank} 3 0 3 127.0.0.1 1234"
        name = f"127.0.0.1:{servers[rank].port}"
        assert re.search(rf"^{LINE.format(name=name, rank=rank, text=text)}$", done.err, re.MULTILINE), done.err
        assert (tmp_path / f"logs/rank{rank}.stdout").read_text() == text + "\n"
    assert (tmp_path / "logs/rank2.transport").read_text() == NOISE


def test_local_ranks_share_a_node(tmp_path: Path) -> None:
    code = "import os; print(*[os.environ[n] for n in 'RANK WORLD_SIZE LOCAL_RANK NNODES MASTER_ADDR'.split()])"
    done = launch(
        tmp_path, "--local", "2", "--env", "PJRT_DEVICE=TPU", *python(f"{code}; print(os.environ['TPU_VISIBLE_CHIPS'])")
    )
    assert (done.code, done.out) == (0, b"0 2 0 1 127.0.0.1\n0\n")
    assert "localhost (1) 1 2 1 1 127.0.0.1\n" in done.err
    (logs,) = (tmp_path / "xla_dist_logs").iterdir()
    assert (logs / "rank1.stdout").read_text() == "1 2 1 1 127.0.0.1\n1\n"


@pytest.mark.parametrize("place", ["local", "ssh", "gcloud"])
def test_arguments_and_variables_arrive_exactly(place: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Spaces, quotes, newlines, $, unicode, and bytes that are not unicode; a directory with all of these."""
    flags = {"local": ["--local", "1"], "ssh": None, "gcloud": ["--tpu", "pod", "--zone", "z"]}[place]
    environment = None
    if place == "gcloud":
        environment = request.getfixturevalue("gcloud")
    workdir = tmp_path / 'it\'s $HOME "é"'
    workdir.mkdir()
    code = "import os, sys; print(os.getcwdb(), [os.fsencode(a) for a in sys.argv[1:]], os.environb[b'ODD'])"
    done = launch(
        tmp_path,
        *(flags or request.getfixturevalue("over_ssh")),
        *("--workdir", str(workdir), f"--env=ODD={ODD[5]}=$x'\n"),
        *python(code, *ODD),
        env=environment,
    )
    expected = (
        f"{os.fsencode(workdir)} {[os.fsencode(a) for a in ODD]} {os.fsencode(ODD[5] + '=$x' + chr(39) + chr(10))}\n"
    )
    assert (done.code, done.out.decode()) == (0, expected), done.err


def test_stdout_of_rank_0_is_exact(over_ssh: list[str], tmp_path: Path) -> None:
    """All bytes, more than any buffer, no newline at the end; it can be piped."""
    code = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 20000 + b'end')"
    done = launch(tmp_path, *over_ssh, "--log_dir", "logs", *python(code))
    assert done.code == 0
    assert done.out == bytes(range(256)) * 20000 + b"end"
    assert (tmp_path / "logs/rank1.stdout").read_bytes() == done.out


def test_much_output_of_one_rank_does_not_block_a_slow_one(over_ssh: list[str], tmp_path: Path) -> None:
    """50 MB from rank 1, in lines and without a newline, while rank 0 prints slowly."""
    code = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    for _ in range(25): sys.stdout.write('x' * 10**6 + ('y' * 999 + chr(10)) * 1000)\n"
        "elif os.environ['RANK'] == '0':\n"
        "    for i in range(5): time.sleep(0.1); print(i, flush=True)\n"
    )
    with open(tmp_path / "err", "wb") as err:
        done = Launcher(tmp_path, [*over_ssh, "--log_dir", "logs", *python(code)], stderr=err)
        out = done.process.communicate(timeout=TIMEOUT_S)[0]
    assert (done.process.returncode, out) == (0, b"0\n1\n2\n3\n4\n")
    assert (tmp_path / "logs/rank1.stdout").stat().st_size == 50 * 10**6
    assert (tmp_path / "err").stat().st_size > 50 * 10**6


@pytest.mark.alone
def test_slow_readers_of_the_launcher_are_no_hang(tmp_path: Path) -> None:
    """The heartbeats of a rank wait behind its output while nobody reads the launcher's stdout."""
    code = "import sys; sys.stdout.write('x' * 10**6)"
    running = Launcher(tmp_path, ["--local", "1", "--heartbeat", "1", *python(code)])
    time.sleep(2)
    done = running.end()
    assert (done.code, len(done.out)) == (0, 10**6), done.err


def test_a_failed_rank_ends_all(over_ssh: list[str], tmp_path: Path) -> None:
    """The exit code is that rank's; its last lines come last, with those of stdout and without a newline."""
    code = f"import os, sys\nif os.environ['RANK'] != '1': exec({WAITER!r})\n"
    code += "print('half a line', end=''); sys.stdout.flush(); print('bad luck', file=sys.stderr); sys.exit(7)"
    began = time.monotonic()
    running = Launcher(tmp_path, [*over_ssh, *python(code, str(tmp_path))])
    done = running.end(12)
    assert done.code == 7
    assert time.monotonic() - began < 10
    last = done.err[done.err.index("its last lines") :]
    assert "exit code 7" in done.err
    assert "half a line" in last
    assert "bad luck" in last
    found = [[int(pid) for pid in path.read_text().split()] for path in tmp_path.glob("*.pids")]
    assert_gone(found)


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (["sh", "-c", "kill -9 $$"], 137, "killed by SIGKILL"),
        (["sh", "-c", "kill -11 $$"], 139, "killed by SIGSEGV"),
        (["sh", "-c", "exit 255"], 255, "exit code 255"),
        (["no-such-command"], 127, "cannot start the command: No such file or directory: no-such-command"),
        (["/etc/passwd"], 126, "cannot start the command: Permission denied: /etc/passwd"),
    ],
)
def test_exit_codes_are_the_command_s(command: list[str], code: int, words: str, tmp_path: Path) -> None:
    done = launch(tmp_path, "--local", "2", "--", *command)
    assert done.code == code
    assert words in done.err
    assert done.err.splitlines()[-1].endswith(
        f"exit code {code}; logs: {next((tmp_path / 'xla_dist_logs').glob('*')).relative_to(tmp_path)}"
    )


def test_a_missing_workdir_is_named(tmp_path: Path) -> None:
    done = launch(tmp_path, "--local", "1", "--workdir", "no-such-dir", "--", "true")
    assert done.code == 127
    assert "No such file or directory: no-such-dir" in done.err


@pytest.mark.parametrize(
    ("place", "code", "words"),
    [
        ("connection", 255, "its connection dropped"),
        (COMMAND, 137, "killed by SIGKILL"),
        (INNER, 137, "the wrapper of its command was ended"),
        (OUTER, 143, "killed by SIGTERM"),
    ],
)
def test_kill_9_on_a_host_ends_all(
    place: str | int, code: int, words: str, over_ssh: list[str], servers: list[SshServer], tmp_path: Path
) -> None:
    running = waiters(tmp_path, over_ssh)
    pids = running.pids(3)
    if isinstance(place, int):
        os.kill(pids[1][place], signal.SIGKILL)
    else:
        for process in psutil.Process(servers[1].process.pid).children():
            process.kill()
    done = running.end(12)
    assert (done.code, words in done.err, f"{servers[1].port} (1)" in done.err) == (code, True, True), done.err
    assert_gone(pids)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("places", "code", "words"),
    [
        ([COMMAND], 128 + signal.SIGSTOP, "its command has been stopped for 1 s"),
        ([INNER], 255, "no sign of life for 1 s"),
        ([INNER, COMMAND], 255, "no sign of life for 1 s"),
    ],
)
def test_a_stopped_process_is_a_hang(
    places: list[int], code: int, words: str, over_ssh: list[str], tmp_path: Path
) -> None:
    running = waiters(tmp_path, [*over_ssh, "--heartbeat", "1"])
    pids = running.pids(3)
    for place in places:
        os.kill(pids[1][place], signal.SIGSTOP)
    done = running.end(10)
    assert (done.code, words in done.err) == (code, True), done.err
    assert_gone(pids)


@pytest.mark.alone
def test_a_frozen_host_ends_its_command_when_it_thaws(over_ssh: list[str], tmp_path: Path) -> None:
    """As when a virtual machine is paused: the others end, and it ends by itself once it runs again."""
    running = waiters(tmp_path, [*over_ssh, "--heartbeat", "1"])
    pids = running.pids(3)
    for pid in pids[0]:
        os.kill(pid, signal.SIGSTOP)
    assert running.end(12).code == 255
    assert_gone(pids[1:])
    assert is_alive(pids[0][COMMAND])
    for pid in pids[0]:
        os.kill(pid, signal.SIGCONT)
    assert_gone(pids)


@pytest.mark.alone
def test_a_quiet_command_is_no_hang_unless_asked(tmp_path: Path) -> None:
    assert launch(tmp_path, "--local", "2", "--heartbeat", "1", "--", "sleep", "2").code == 0
    done = launch(tmp_path, "--local", "2", "--max_silence", "0.5", "--", "sleep", "100")
    assert done.code == 124
    assert "no output for 0.5 s" in done.err


@pytest.mark.alone
def test_a_suspended_launcher_blames_nobody(tmp_path: Path) -> None:
    """As by Ctrl-Z, or on a laptop that sleeps: the time in which the launcher did not run does not count."""
    running = Launcher(tmp_path, ["--local", "2", "--heartbeat", "1", "--", "sleep", "3.5"])
    time.sleep(1)
    running.process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    running.process.send_signal(signal.SIGCONT)
    done = running.end()
    assert done.code == 0, done.err


def test_time_in_which_the_launcher_did_not_run_does_not_count(tmp_path: Path) -> None:
    options, _ = xla_dist_flags.parse(["--local", "1", "--heartbeat", "3", "--", "x"])
    output, events = xla_dist.Output(tmp_path), xla_dist.Events()
    for forgiven, code in ((0, 255), (4, 0)):
        rank = xla_dist.Rank(xla_dist_hosts.LocalHost(0), ["x"], {}, "mark", output, "rank")
        supervisor = xla_dist.Supervisor([rank], options, output, events)
        rank.is_ready = rank.is_running = True
        rank.heard -= 5
        supervisor._forgive(forgiven)
        supervisor._check(time.monotonic())
        assert supervisor.code == code
    output.close(None)


@pytest.mark.alone
def test_hosts_do_not_wait_for_a_silent_launcher_for_ever(tmp_path: Path) -> None:
    """No connection tells of a dead network: a command ends after ten times --heartbeat without the launcher."""
    running = waiters(tmp_path, ["--local", "2", "--heartbeat", "0.4"])
    pids = running.pids(2)
    running.process.send_signal(signal.SIGSTOP)
    time.sleep(1)
    assert all(map(is_alive, pids[0]))
    assert_gone(pids, 8)
    running.process.send_signal(signal.SIGCONT)
    assert running.end().code == 128 + signal.SIGTERM


def test_another_python_can_be_named(servers: list[SshServer], key: Path, tmp_path: Path) -> None:
    """A python3 that does not work comes first on a host's PATH: that host is named, and nothing runs on the other."""
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'SyntaxError: invalid syntax' >&2\nexit 1\n")
    fake.chmod(0o755)
    with ssh_hosts.sshd(key.parent, f'ForceCommand PATH={fake.parent}:$PATH; eval "$SSH_ORIGINAL_COMMAND"') as other:
        flags = ssh_flags([servers[0].name, other.name], key)
        done = launch(tmp_path, *flags, "--", "touch", str(tmp_path / "ran"))
        assert done.code == 1
        assert f"{other.port} (1): the wrapper did not start" in done.err
        assert "--python names another" in done.err
        assert "SyntaxError" in done.err
        assert not (tmp_path / "ran").exists()
        done = launch(tmp_path, *flags, "--python", "/no/python", "--", "true")
        assert (done.code, "is /no/python there" in done.err) == (127, True), done.err
        done = launch(tmp_path, *flags, "--python", sys.executable, "--", "touch", str(tmp_path / "ran"))
        assert (done.code, (tmp_path / "ran").exists()) == (0, True), done.err


def test_an_old_python_is_named() -> None:
    """Python 2.7 would run this line, too."""
    code = xla_dist_hosts.bootstrap("mark")
    assert not set(code) & set("\\'\n!")
    old = f"import sys\nsys.version_info, sys.version = (2, 7), '2.7.18 (x)'\nexec({code!r})"
    done = subprocess.run([sys.executable, "-c", old], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "got Python 2.7.18, expected 3.6 or newer\n")
    for name, version in (("_wrapper", (3, 6)), ("", (3, 8)), ("_flags", (3, 8)), ("_hosts", (3, 8))):
        ast.parse((ROOT / f"scripts/xla_dist{name}.py").read_text(encoding="utf-8"), feature_version=version)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_an_unreachable_host_is_named(servers: list[SshServer], key: Path, silent_port: int, tmp_path: Path) -> None:
    """Nothing is started on the others, neither for a closed port nor for a host that never answers."""
    command = ["--", "touch", str(tmp_path / "ran")]
    closed = ssh_hosts.free_port()
    done = launch(tmp_path, *ssh_flags([servers[0].name, f"127.0.0.1:{closed}"], key), *command)
    assert done.code == 255
    assert f"127.0.0.1:{closed} (1): it cannot be reached" in done.err
    assert "Connection refused" in done.err
    began = time.monotonic()
    flags = ["--connect_timeout", "1.5", *ssh_flags([f"127.0.0.1:{silent_port}", servers[0].name], key)]
    done = launch(tmp_path, *flags, *command)
    assert time.monotonic() - began < 6
    assert done.code == 255
    assert f"127.0.0.1:{silent_port} (0)" in done.err
    assert not (tmp_path / "ran").exists()
    wait_until(lambda: not servers[0].connections(), 10, "a connection is left")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_every_process(number: signal.Signals, over_ssh: list[str], tmp_path: Path) -> None:
    running = waiters(tmp_path, over_ssh)
    pids = running.pids(3)
    running.process.send_signal(number)
    done = running.end(10)
    assert done.code == 128 + number
    assert f"got {number.name}" in done.err
    assert_gone(pids, 2)


def test_commands_get_the_launcher_s_signal(tmp_path: Path) -> None:
    """So a command can end well by itself, as on Ctrl-C."""
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: (print('saved', flush=True), sys.exit(130)))\n"
        "open(sys.argv[1], 'w')\n"
        "time.sleep(1000)"
    )
    running = Launcher(tmp_path, ["--local", "1", *python(code, str(tmp_path / "ready"))])
    wait_until((tmp_path / "ready").exists, 10, "did not start")
    running.process.send_signal(signal.SIGINT)
    done = running.end(10)
    assert (done.code, done.out) == (130, b"saved\n")


def test_ctrl_c_while_hosts_connect(servers: list[SshServer], key: Path, silent_port: int, tmp_path: Path) -> None:
    running = Launcher(
        tmp_path, [*ssh_flags([servers[0].name, f"127.0.0.1:{silent_port}"], key), "--", "sleep", "1000"]
    )
    wait_until(lambda: bool(servers[0].connections()), 10, "did not connect")
    started = psutil.Process(running.process.pid).children(recursive=True)
    running.process.send_signal(signal.SIGINT)
    assert running.end(10).code == 130
    assert_gone([[process.pid for process in started]])
    wait_until(lambda: not servers[0].connections(), 10, "a connection is left")


def test_ctrl_c_while_nobody_reads_stderr(tmp_path: Path) -> None:
    """As in a pager: what the launcher has to say must not keep it from ending."""
    running = Launcher(tmp_path, ["--local", "2", "--", "sh", "-c", "while echo x >&2; do :; done"])
    time.sleep(1)
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(5) == 130
    running.end()


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    """A command that ignores SIGINT and SIGTERM has some seconds, or none after a second signal."""
    code = f"import signal\nfor n in (2, 15): signal.signal(n, signal.SIG_IGN)\n{WAITER}"
    running = Launcher(tmp_path, ["--local", "2", *python(code, str(tmp_path))])
    pids = running.pids(2)
    running.process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    assert all(is_alive(rank[COMMAND]) for rank in pids)
    running.process.send_signal(signal.SIGINT)
    assert running.end(3).code == 130
    assert_gone(pids)


def test_a_command_that_ignores_signals_is_killed(over_ssh: list[str], tmp_path: Path) -> None:
    """Within 10 s of another rank's end."""
    code = "import signal, os, sys\n"
    code += (
        "if os.environ['RANK'] == '1':\n    while not os.path.exists(sys.argv[1] + '/0.pids'): pass\n    sys.exit(3)\n"
    )
    code += f"for n in (2, 15): signal.signal(n, signal.SIG_IGN)\n{WAITER}"
    running = Launcher(tmp_path, [*over_ssh, *python(code, str(tmp_path))])
    wait_until(lambda: len(list(tmp_path.glob("*.pids"))) >= 1, 10, "did not start")
    began = time.monotonic()
    assert running.end(12).code == 3
    assert time.monotonic() - began < 10
    assert_gone([[int(pid) for pid in path.read_text().split()] for path in tmp_path.glob("*.pids")], 1)


@pytest.mark.parametrize("place", ["local", "ssh"])
def test_kill_9_of_the_launcher_ends_every_process(place: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    flags = ["--local", "3"] if place == "local" else request.getfixturevalue("over_ssh")
    running = waiters(tmp_path, flags)
    pids = running.pids(3)
    transports = [process.pid for process in psutil.Process(running.process.pid).children(recursive=True)]
    running.process.kill()
    assert running.end().code == -signal.SIGKILL
    assert_gone([*pids, transports], 4)  # at once, not when the outer process of a wrapper loses its patience


def test_kill_9_of_the_launcher_while_hosts_connect(
    servers: list[SshServer], key: Path, silent_port: int, tmp_path: Path
) -> None:
    names = [servers[0].name, f"127.0.0.1:{silent_port}"]
    running = Launcher(tmp_path, [*ssh_flags(names, key), "--connect_timeout", "2", "--", "sleep", "1000"])
    wait_until(lambda: bool(servers[0].connections()), 10, "did not connect")
    started = [process.pid for process in psutil.Process(running.process.pid).children(recursive=True)]
    running.process.kill()
    running.end()
    assert_gone([started])
    wait_until(lambda: not servers[0].connections(), 10, "a connection is left")


def test_what_a_command_leaves_in_the_background_is_ended(over_ssh: list[str], tmp_path: Path) -> None:
    """A daemon in a session of its own, whose parent has ended; its last output is not lost."""
    script = f"(setsid sh -c 'echo $$ > {tmp_path}/$RANK.daemon; exec sleep 1000' &); sleep 0.3; echo done"
    done = launch(tmp_path, *over_ssh, "--", "bash", "-c", script)
    assert (done.code, done.out) == (0, b"done\n")
    assert_gone([[int((tmp_path / f"{rank}.daemon").read_text()) for rank in range(3)]], 1)


def test_a_closed_stdout_ends_all(tmp_path: Path) -> None:
    """As by `| head -n 1`."""
    running = Launcher(tmp_path, ["--local", "2", "--", "sh", "-c", "while echo x; do :; done"])
    assert running.process.stdout is not None
    assert running.process.stdout.readline() == b"x\n"
    running.process.stdout.close()
    running.process.stdout = None
    assert running.end().code == 128 + signal.SIGPIPE
    with open("/dev/full", "wb") as full:
        done = Launcher(tmp_path, ["--local", "1", "--", "echo", "x"], stdout=full).end()
    assert (done.code, "stdout cannot be written: [Errno 28]" in done.err) == (1, True)


def test_closed_streams_do_no_harm(tmp_path: Path) -> None:
    """With stdin, stdout and stderr closed, no output ends up in a connection."""
    script = f"exec {sys.executable} {SCRIPT} --local 2 --log_dir logs -- sh -c 'echo $RANK; echo e >&2' <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", script], cwd=tmp_path, check=False, timeout=TIMEOUT_S).returncode == 0
    assert (tmp_path / "logs/rank1.stdout").read_text() == "1\n"
    assert (tmp_path / "logs/rank0.stderr").read_text() == "e\n"


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank0.stdout").symlink_to("/dev/full")
    done = launch(tmp_path, "--local", "1", "--log_dir", "logs", "--", "echo", "x")
    assert (done.code, done.out) == (0, b"x\n")
    assert "No space left on device" in done.err


def test_nohup_is_respected(tmp_path: Path) -> None:
    running = Launcher(
        tmp_path,
        ["--local", "1", "--", "sleep", "1.5"],
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    time.sleep(0.7)
    running.process.send_signal(signal.SIGHUP)
    assert running.end().code == 0


def test_sync_copies_the_directory(servers: list[SshServer], key: Path, tmp_path: Path) -> None:
    """To a directory that is not there yet, without .git and .venv."""
    over_ssh = ssh_flags([server.name for server in servers[:2]], key)  # rsync takes no shell that prints something
    here, there = tmp_path / "here", tmp_path / "a/b/it's there"
    for name in ("x.txt", "llama/y.py", ".git/config", ".venv/z"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    flags = [*over_ssh, "--sync", "--workdir", str(there), "--log_dir", str(tmp_path / "logs")]
    done = launch(here, *flags, "--", "cat", "x.txt", "llama/y.py")
    assert (done.code, done.out) == (0, b"x.txtllama/y.py"), done.err
    assert sorted(path.name for path in there.iterdir()) == ["llama", "x.txt"]


def test_a_failed_sync_starts_nothing(over_ssh: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    flags = [*over_ssh, "--sync", "--workdir", str(tmp_path / "file/x")]
    done = launch(tmp_path, *flags, "--", "touch", str(tmp_path / "ran"))
    assert done.code not in (0, 1)
    assert "rsync 127.0.0.1" in done.err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_sync_ends_with_the_launcher(number: signal.Signals, over_ssh: list[str], tmp_path: Path) -> None:
    rsync = tmp_path / "bin" / "rsync"
    rsync.parent.mkdir()
    rsync.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/$$.rsync\nexec sleep 1000\n")
    rsync.chmod(0o755)
    environment = {**os.environ, "PATH": f"{rsync.parent}:{os.environ['PATH']}"}
    command = [*over_ssh, "--sync", "--workdir", "x", "--", "touch", str(tmp_path / "ran")]
    running = Launcher(tmp_path, command, env=environment)
    wait_until(lambda: len(list(tmp_path.glob("*.rsync"))) == 3, 10, "rsync did not start")
    running.process.send_signal(number)
    assert running.end(10).code == (130 if number == signal.SIGINT else -9)
    assert_gone([[int(path.stem) for path in tmp_path.glob("*.rsync")]])
    assert not (tmp_path / "ran").exists()


GCLOUD = """#!{python}
import json, os, subprocess, sys
with open({calls!r}, "a") as file: file.write(json.dumps(sys.argv[1:]) + chr(10))
words = sys.argv[1:]
if "describe" in words:
    endpoints = [{{"ipAddress": "10.0.0.7"}}, {{"ipAddress": "10.0.0.8"}}]
    print(os.environ.get("DESCRIBED", json.dumps({{"state": "READY", "networkEndpoints": endpoints}})))
    sys.exit(int(os.environ.get("DESCRIBE_CODE", 0)))
print("Using ssh batch size of 1.", file=sys.stderr, flush=True)
(command,) = [word[10:] for word in words if word.startswith("--command=")]
for attempt in range(3):
    code = subprocess.call([*json.loads(os.environ.get("SSH", '["sh", "-c"]')), command])
    if code != 255: sys.exit(code)
    print("Retrying: SSH command error", file=sys.stderr, flush=True)
"""


@pytest.fixture
def gcloud(tmp_path: Path) -> dict[str, str]:
    """The environment with a gcloud for a TPU of two workers, both here; it tries again as gcloud does on 255."""
    script = tmp_path / "gcloud-bin" / "gcloud"
    script.parent.mkdir()
    script.write_text(GCLOUD.format(python=sys.executable, calls=str(tmp_path / "calls")))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return {**os.environ, "PATH": f"{script.parent}:{os.environ['PATH']}"}


def gcloud_calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def test_a_tpu_s_workers_run_through_gcloud(gcloud: dict[str, str], tmp_path: Path) -> None:
    place = ["--tpu", "my-pod", "--zone", "us-central2-b", "--project", "p", "--gcloud_flag=--internal-ip"]
    code = "import os; print(*[os.environ[n] for n in 'RANK WORLD_SIZE MASTER_ADDR PJRT_DEVICE'.split()])"
    done = launch(tmp_path, *place, *python(code), env=gcloud)
    assert (done.code, done.out) == (0, b"0 2 10.0.0.7 TPU\n"), done.err
    assert re.search(LINE.format(name="my-pod/1", rank=1, text="1 2 10.0.0.7 TPU"), done.err)
    described, *runs = gcloud_calls(tmp_path)
    before = ["compute", "tpus", "tpu-vm"]
    assert described == [
        *before,
        "describe",
        "my-pod",
        "--zone=us-central2-b",
        "--format=json",
        "--quiet",
        "--project=p",
    ]
    for rank, run in enumerate(sorted(runs)):
        assert run[:8] == [*before, "ssh", "my-pod", "--zone=us-central2-b", "--project=p", f"--worker={rank}"]
        assert "--internal-ip" in run
        assert run[-1].startswith("--command=exec python3 -c ")


def test_a_connection_that_gcloud_makes_again_has_dropped(
    gcloud: dict[str, str], servers: list[SshServer], key: Path, tmp_path: Path
) -> None:
    """gcloud starts ssh again when it ends with 255, which must not start the command again."""
    _, _, *settings = ssh_flags([], key)
    options = [f"-o{setting.partition('=')[2]}" for setting in settings]
    ssh = json.dumps(["ssh", *options, "-p", str(servers[0].port), servers[0].name.rpartition(":")[0]])
    running = waiters(tmp_path, ["--tpu", "t", "--zone", "z"], env={**gcloud, "SSH": ssh})
    pids = running.pids(2)
    (tmp_path / "1.pids").unlink()
    (worker,) = [each for each in servers[0].connections() if pids[1][OUTER] in [c.pid for c in each.children()]]
    worker.kill()
    done = running.end(10)
    assert (done.code, "t/1 (1): its connection dropped" in done.err) == (255, True), done.err
    assert_gone(pids)
    assert not (tmp_path / "1.pids").exists()


def test_sync_goes_through_gcloud(gcloud: dict[str, str], tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "new/there is"
    here.mkdir()
    (here / "x").write_text("copied")
    flags = ["--tpu", "t", "--zone", "z", "--sync", "--workdir", str(there), "--log_dir", str(tmp_path / "logs")]
    done = launch(here, *flags, "--", "cat", "x", env=gcloud)
    assert (done.code, done.out) == (0, b"copied"), done.err


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"DESCRIBE_CODE": "1"}, "gcloud says: nothing"),
        ({"DESCRIBED": "no JSON"}, "no networkEndpoints"),
        ({"DESCRIBED": '{"networkEndpoints": []}'}, "expected READY"),
        ({"DESCRIBED": '{"networkEndpoints": [{}], "state": "CREATING"}'}, "got state CREATING"),
        ({"PATH": "/nowhere"}, "gcloud, which is not on PATH"),
    ],
)
def test_a_tpu_that_cannot_be_described(
    environment: dict[str, str], words: str, gcloud: dict[str, str], tmp_path: Path
) -> None:
    done = launch(tmp_path, "--tpu", "t", "--zone", "z", "--", "true", env={**gcloud, **environment})
    assert (done.code, done.err.count("\n"), words in done.err) == (2, 1, True), done.err


def test_a_dry_run_prints_commands_that_work(servers: list[SshServer], key: Path, tmp_path: Path) -> None:
    """A shell that runs the printed lines gets the same arguments; nothing is started and no log is made."""
    flags = [*ssh_flags([server.name for server in servers[:2]], key), "--sync", "--workdir", "some where"]
    code = "import os, sys; print(os.environ['RANK'], os.environ['ODD'], sys.argv[1:])"
    texts = [text for text in ODD if text.isprintable()]
    done = launch(tmp_path, *flags, "--dry_run", "--env", "ODD=a 'b'", *python(code, *texts))
    assert (done.code, done.err, list(tmp_path.iterdir())) == (0, "", [])
    lines = done.out.decode().splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        *(f"# copy this directory to 127.0.0.1:{server.port}" for server in servers[:2]),
        *(
            line
            for rank, server in enumerate(servers[:2])
            for line in (f"# rank {rank}: connect to 127.0.0.1:{server.port}", f"# rank {rank}: run there")
        ),
    ]
    connect = shlex.split(next(line for line in lines if line.startswith("ssh ")))
    assert connect[-2] == servers[0].name.rpartition(":")[0]
    assert connect[-1].startswith("exec python3 -c ")
    (tmp_path / "some where").mkdir()
    script = [line for line in lines if line.startswith("cd ")][1]
    there = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert there.stdout == f"1 a 'b' {texts}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no command; give it after --"),
        (["--local", "2"], "no command"),
        (["--local", "2", "--"], "no command"),
        (["--", "x"], "got none, expected one of --tpu, --hosts, --hostfile, --local"),
        (["--tpu", "t", "--zone", "z", "--hosts", "h", "--", "x"], "got --tpu and --hosts, expected one of"),
        (["--local", "2", "--hosts", "h", "--", "x"], "got --hosts and --local"),
        (["--hostz", "h", "--", "x"], "unknown flag --hostz; did you mean --hosts?"),
        (["--host", "h", "--", "x"], "unknown flag --host; did you mean --hosts?"),
        (["--local", "2", "python3", "--", "x"], "unknown argument python3; the command comes after --"),
        (["--local", "0", "--", "x"], "--local: got '0', expected a whole number, at least 1"),
        (["--local", "two", "--", "x"], "--local: got 'two'"),
        (["--local", "99999", "--", "x"], "expected at most 1024"),
        (["--hosts", "", "--", "x"], "got no host"),
        (["--hosts", "h,,i", "--", "x"], "got '', expected HOST"),
        (["--hosts", "h,h", "--", "x"], "h is there twice"),
        (["--hosts", "a@h,b@h:22", "--", "x"], "h:22 is there twice"),
        (["--hosts", "h:x", "--", "x"], "got 'h:x', expected HOST"),
        (["--hosts", "h:99999", "--", "x"], "got port 99999, expected 1 to 65535"),
        (["--hosts", "-oProxyCommand=x", "--", "x"], "--hosts: expected one argument"),
        (["--hosts=-oProxyCommand=x", "--", "x"], "got '-oProxyCommand=x'"),
        (["--hosts", "h i", "--", "x"], "got 'h i'"),
        (["--hostfile", "no-such-file", "--", "x"], "No such file"),
        (["--hostfile", "/dev/null", "--", "x"], "got no host"),
        (["--tpu", "t", "--", "x"], "--tpu needs --zone"),
        (["--tpu", "-x", "--zone", "z", "--", "x"], "expected one argument"),
        (["--local", "1", "--zone", "z", "--", "x"], "--zone is for --tpu, got --local"),
        (["--local", "1", "--sync", "--workdir", "d", "--", "x"], "--sync is not for --local"),
        (["--hosts", "h", "--sync", "--", "x"], "--sync needs --workdir"),
        (["--local", "1", "--env", "X", "--", "x"], "--env: got 'X', expected NAME=VALUE"),
        (["--local", "1", "--env", "RANK=3", "--", "x"], "RANK is set by the launcher"),
        (["--local", "1", "--env", "MASTER_PORT=3", "--", "x"], "use --master_port"),
        (["--local", "1", "--master_port", "70000", "--", "x"], "expected at most 65535"),
        (["--local", "1", "--heartbeat", "-1", "--", "x"], "--heartbeat"),
        (["--local", "1", "--heartbeat", "nan", "--", "x"], "got 'nan', expected seconds"),
        (["--local", "1", "--connect_timeout", "0", "--", "x"], "expected at least 1"),
        (["--local", "1", "--log_dir", "/dev/null/x", "--", "x"], "--log_dir: "),
    ],
)
def test_flags_that_cannot_be_used(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, exit code 2, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    code = xla_dist.main(arguments)
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n"), err[:13]) == (2, "", 1, "xla_dist.py: "), err
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_a_usage_error_ends_the_process_with_2(tmp_path: Path) -> None:
    done = launch(tmp_path, "--hostz", "h", "--", "x")
    assert (done.code, done.out, done.err) == (2, b"", "xla_dist.py: unknown flag --hostz; did you mean --hosts?\n")


def test_a_killed_wrapper_takes_the_command_with_it(tmp_path: Path) -> None:
    """Both of its processes at once: nobody is left to look for what the command has started."""
    running = waiters(tmp_path, ["--local", "1"])
    (pids,) = running.pids(1)
    for place in (OUTER, INNER):
        os.kill(pids[place], signal.SIGSTOP)
    for place in (OUTER, INNER):
        os.kill(pids[place], signal.SIGKILL)
    assert running.end(10).code == 255
    assert_gone([[pids[COMMAND]]], 1)
    for pid in pids[1:3]:
        os.kill(pid, signal.SIGKILL)


def test_without_ssh_nothing_starts(tmp_path: Path) -> None:
    done = launch(tmp_path, "--hosts", "a,b", "--", "x", env={"PATH": "/nowhere"})
    assert (done.code, "cannot start ssh: [Errno 2]" in done.err) == (127, True), done.err


def test_hosts_are_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two\n\n  user@h1:2222  # first\nh2\n[fe80::1]:22\n::1\n")
    done = launch(tmp_path, "--hostfile", "hosts", "--dry_run", "--", "x")
    connects = [shlex.split(line) for line in done.out.decode().splitlines() if line.startswith("ssh ")]
    assert [words[-2] for words in connects] == ["user@h1", "h2", "fe80::1", "::1"]
    assert [words[words.index("-p") + 1] if "-p" in words else "" for words in connects] == ["2222", "", "22", ""]
    assert "MASTER_ADDR=h1" in done.out.decode()


def test_help_shows_every_flag(tmp_path: Path) -> None:
    done = launch(tmp_path, "--help")
    assert done.code == 0
    assert all(flag in done.out.decode() for flag in ("--tpu", "--hosts", "--env", "--heartbeat", "--dry_run"))


def documented() -> list[list[str]]:
    """The launcher's lines of docs/pods.md, as words without the redirection at the end."""
    page = (ROOT / "docs" / "pods.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line.partition(" > ")[0], comments=True) for line in lines if "xla_dist.py" in line]
    return [words[words.index(next(word for word in words if "xla_dist.py" in word)) + 1 :] for words in found]


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_documented_commands_are_accepted(words: list[str]) -> None:
    _, command = xla_dist_flags.parse(words)
    assert command[0] in ("true", "llama-xla", ".venv/bin/llama-xla", "./scripts/setup_tpu_vm.sh")


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """The environment with an srun and an xpk that write their arguments to a file."""
    for name in ("srun", "xpk"):
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/{name}.txt\n')
        script.chmod(0o755)
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CLUSTER": "c", "IMAGE": "i"}


def test_manifests_start_one_process_on_each_of_four_hosts(stand_ins: dict[str, str], tmp_path: Path) -> None:
    launch_dir = ROOT / "docs" / "examples" / "launch"
    for name in ("slurm.sbatch", "xpk.sh"):
        subprocess.run(["bash", str(launch_dir / name)], env=stand_ins, check=True, timeout=TIMEOUT_S)
    assert "#SBATCH --nodes=4\n#SBATCH --ntasks-per-node=1\n" in (launch_dir / "slurm.sbatch").read_text()
    assert (tmp_path / "srun.txt").read_text().startswith("--kill-on-bad-exit=1\n.venv/bin/llama-xla\nbatch\n")
    assert "\n--env\nWORLD_SIZE=4\n" in (tmp_path / "xpk.txt").read_text()
    service, job = yaml.safe_load_all((launch_dir / "kubernetes.yaml").read_text())
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert environment == {"PJRT_DEVICE": "TPU", "WORLD_SIZE": "4"}
    assert service["metadata"]["name"] == spec["template"]["spec"]["subdomain"]
    assert current_ranks({**environment, "JOB_COMPLETION_INDEX": "3"}) == Ranks(3, 4)


def test_a_tpu_vm_is_prepared_once(tmp_path: Path) -> None:
    """With a stand-in for Python: libtpu is installed by the first run only, and a host without chips is an error."""
    for name in ("setup_tpu_vm.sh", "setup.py", "pyproject.toml"):
        source = ROOT / ("scripts" if name.endswith(".sh") else "") / name
        target = tmp_path / source.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(source, target)
    setup, fake = tmp_path / "scripts/setup.sh", tmp_path / ".venv/bin/python"
    fake.parent.mkdir(parents=True)
    setup.write_text("#!/bin/sh\n")
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$1" != - ] || exec {sys.executable} - \n')
    for script in (setup, fake):
        script.chmod(0o755)
    command = [str(tmp_path / "scripts/setup_tpu_vm.sh")]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": TIMEOUT_S, "check": False}
    done = subprocess.run(command, env={**os.environ, "PJRT_DEVICE": "CPU"}, **options)
    assert (done.returncode, done.stdout) == (0, "PJRT sees 1 CPU devices on this host, 1 on all hosts\n"), done.stderr
    environment = {**os.environ, "PJRT_DEVICE": "TPU", "PYTHONPATH": str(stand_in_for_torch_xla(tmp_path))}
    done = subprocess.run(command, env={**environment, "CHIPS": "4"}, **options)
    assert (done.returncode, done.stdout) == (0, "PJRT sees 4 TPU devices on this host, 16 on all hosts\n"), done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[-1] for call in calls] == [".[tpu]", "-", "-"]
    done = subprocess.run(command, env={**environment, "CHIPS": "0"}, **options)
    assert (done.returncode, "no TPU chip" in done.stderr) == (1, True), done.stderr
    done = subprocess.run([*command, "x"], **options)
    assert (done.returncode, done.stderr) == (2, "setup_tpu_vm.sh: got 'x', expected no arguments\n")


def stand_in_for_torch_xla(folder: Path) -> Path:
    """A torch_xla for one host of a v4-32, with as many chips as CHIPS says."""
    package = folder / "stand_in" / "torch_xla"
    (package / "_internal").mkdir(parents=True)
    for name in ("__init__.py", "_internal/__init__.py"):
        (package / name).touch()
    (package / "_internal/tpu.py").write_text("import os\nnum_available_chips = lambda: int(os.environ['CHIPS'])\n")
    (package / "runtime.py").write_text(
        "addressable_runtime_device_count = lambda: 4\nglobal_runtime_device_count = lambda: 16\n"
    )
    return package.parent


def test_three_hosts_divide_a_batch_and_one_is_killed(over_ssh: list[str], tmp_path: Path) -> None:
    """The demo model on three hosts; a killed one ends the others and costs nothing but the lines it had not finished:
    the next run's file is that of one process without an interruption.
    """
    lines = [{"custom_id": str(n), "prompt": "Once upon a time", "max_gen_len": 120 + n % 9} for n in range(60)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch = [sys.executable, "-m", "llama.cli", "batch", "--input", str(tmp_path / "in.jsonl"), "--batch_invariant"]
    batch += ["True", "--max_batch_size", "1", "--output", str(tmp_path / "out.jsonl")]
    hosts = [*over_ssh, "--env", "PJRT_DEVICE=CPU", "--workdir", str(ROOT)]
    first = Launcher(tmp_path, [*hosts, "--", *batch])
    parts = tmp_path / "out.jsonl.parts"

    def has_begun() -> bool:
        """Whether every rank has answered a line."""
        return sum(part.read_bytes().count(b"\n") > 1 for part in parts.glob("part-*.jsonl")) == 3

    wait_until(has_begun, TIMEOUT_S, "a rank did not begin")
    ranks = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[1:4] == batch[1:4]]
    ours = [p for p in ranks if str(tmp_path / "in.jsonl") in p.cmdline()]
    assert len(ours) == 3
    killed = next(p for p in ours if p.environ()["RANK"] == "1")
    killed.kill()
    ended = first.end(20)
    assert ended.code == 137
    assert re.search(r"rank 1.*killed by SIGKILL|\(1\).*killed by SIGKILL", ended.err), ended.err
    assert_gone([[p.pid for p in ours]])
    done = sum(part.read_bytes().count(b"\n") - 1 for part in parts.glob("part-*.jsonl"))
    assert 3 <= done < len(lines)
    second = Launcher(tmp_path, [*hosts, "--", *batch]).end()
    assert (second.code, second.out) == (0, b""), second.err
    alone = subprocess.run([*batch[:-1], str(tmp_path / "one.jsonl")], cwd=ROOT, capture_output=True, timeout=TIMEOUT_S)
    assert alone.returncode == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert not parts.exists()
