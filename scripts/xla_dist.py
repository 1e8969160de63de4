#!/usr/bin/env python3
"""Run one command on many hosts, one rank each, and end all of them when one fails.

    scripts/xla_dist.py --tpu my-pod --zone us-central2-b --workdir llama -- .venv/bin/llama-xla generate --prompt Hi
    scripts/xla_dist.py --hosts user@h1,h2:2222 --workdir llama --sync -- .venv/bin/llama-xla generate --prompt Hi
    scripts/xla_dist.py --local 2 -- llama-xla generate --prompt Hi

Standard library only, here and on the hosts: each host gets xla_dist_wrapper.py over its connection, and needs Python
3.6 and an ssh server. What is detected, what ends when, and what is promised: docs/pods.md.

Data flow, for each host: the launcher starts a transport (ssh, gcloud, or Python on this machine). The wrapper at its
other end says hello. When all have, each gets its command, and sends output, heartbeats and the exit code as frames.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import queue
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from xla_dist_flags import parse
from xla_dist_hosts import Host, LocalHost, UsageError, find_hosts, wrapper_line
from xla_dist_wrapper import GRACE_S, HEADER, MAX_FRAME_BYTES

TICK_S = 0.1
PATIENCE = 10  # a host ends its command after so many times --heartbeat without a sign of life from the launcher
TAIL_LINES = 20
MAX_LINE_BYTES = 1 << 16
UNREACHABLE = 255  # the exit code that ssh has for it
LOG_NAMES = {b"O": "stdout", b"E": "stderr", b"T": "transport"}  # transport: what ssh or gcloud says itself


class Output:
    """Rank 0's stdout goes to stdout as it is, everything else to stderr in lines with time and host, all to files."""

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self.is_stdout_open = True
        self.is_ending = False  # by a signal, or for a closed stdout: a slow stderr may not delay it
        self._lines: queue.Queue[bytes | None] = queue.Queue(256)  # full: the ranks wait
        self._printer = threading.Thread(target=self._print, daemon=True)
        self._printer.start()

    def open_log(self, name: str) -> int:
        """Open a file of the log directory; -1 without space or permission, which is said once."""
        try:
            return os.open(self.log_dir / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as error:
            self.say(f"no log: {error}")
            return -1

    def log(self, fd: int, data: bytes) -> int:
        """Write to a log; return its descriptor, or -1 after an error such as a full disk."""
        try:
            while fd >= 0 and data:
                data = data[os.write(fd, data) :]
        except OSError as error:
            self.say(f"{self.log_dir}: {error}; the run goes on without this log")
            return -1
        return fd

    def write_stdout(self, data: bytes) -> None:
        """Write rank 0's stdout. Raises OSError when it cannot be written."""
        while data and self.is_stdout_open:
            try:
                data = data[os.write(1, data) :]
            except BlockingIOError:
                select.select([], [1], [])
            except OSError:
                self.is_stdout_open = False
                raise

    def show(self, label: str, lines: list[bytes], last_s: float = 0) -> None:
        """Print lines on stderr; wait while it is slow, but only `last_s` seconds once the launcher is to end."""
        text = prefixed(label, lines)
        while True:
            is_last = self.is_ending
            with contextlib.suppress(queue.Full):
                self._lines.put(text, timeout=last_s if is_last else TICK_S)
                return
            if is_last:
                return

    def say(self, text: str) -> None:
        """Print a line of the launcher's own."""
        self.show("xla_dist", [text.encode(errors="surrogateescape")], 0.2)

    def close(self, limit_s: float | None) -> None:
        """Print what is left, within a time limit if there is one."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=limit_s)
        self._printer.join(limit_s)

    def _print(self) -> None:
        is_open = True
        while (data := self._lines.get()) is not None:
            while data and is_open:
                try:
                    data = data[os.write(2, data) :]
                except BlockingIOError:
                    select.select([], [2], [])
                except OSError:
                    is_open = False


def prefixed(label: str, lines: list[bytes]) -> bytes:
    """Return lines with the time of day and a label in front."""
    now = time.time()
    front = f"{time.strftime('%H:%M:%S', time.localtime(now))}.{int(now * 1000) % 1000:03d} {label} ".encode()
    return b"".join(front + line + b"\n" for line in lines)


Events = queue.SimpleQueue  # of (rank or None, event, value); a signal handler may put, too


class Rank:
    """One host's connection. Its threads put (rank, event, value) into `events`.

    Events: mark, hello, exit (code), closed (the transport's exit code), garbled, unwritable (an OSError of stdout).
    """

    def __init__(
        self, host: Host, argv: list[str], spec: dict[str, object], mark: str, output: Output, log: str
    ) -> None:
        self.host, self.argv, self.spec, self.mark, self.output = host, argv, spec, mark.encode(), output
        self.log = f"{log}{host.rank}"
        self.owns_stdout = self.log == "rank0"
        self.label = f"{host.name} ({host.rank})"
        self.tail: collections.deque[bytes] = collections.deque(maxlen=TAIL_LINES)
        self.is_ready = self.is_running = self.is_closed = False
        self.code: int | None = None
        self.is_handing_on = False  # the launcher's own output is slow: not the host's fault
        self.heard = self.printed = time.monotonic()
        self.stopped: float | None = None  # since when a process of the command is stopped
        self.process: subprocess.Popen[bytes] | None = None
        self._partial = dict.fromkeys(LOG_NAMES, b"")  # what came behind the last newline
        self._lock = threading.Lock()  # of these and the logs
        self._stdin: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def start(self, events: Events) -> None:
        """Start the transport, in a session of its own, which the terminal's Ctrl-C does not reach."""
        self._logs = {kind: self.output.open_log(f"{self.log}.{name}") for kind, name in LOG_NAMES.items()}
        self._events = events
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(self.argv, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        stderr_reader = threading.Thread(target=self._read_stderr, daemon=True)
        stderr_reader.start()
        threading.Thread(target=self._write_stdin, daemon=True).start()
        threading.Thread(target=self._read_frames, args=(stderr_reader,), daemon=True).start()

    def send(self, line: bytes) -> None:
        """Send a line to the wrapper."""
        self._stdin.put(line)

    def hang_up(self) -> None:
        """Kill the transport, if there is one. The wrapper notices and ends its command."""
        if self.process is not None and not self.is_closed:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def _write_stdin(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.process.stdin.write(self._stdin.get())
                self.process.stdin.flush()

    def _read_stderr(self) -> None:
        while data := os.read(self.process.stderr.fileno(), 1 << 16):
            self._hand_on(b"T", data)

    def _read_frames(self, stderr_reader: threading.Thread) -> None:
        fd, data, is_marked = self.process.stdout.fileno(), b"", False
        while more := os.read(fd, 1 << 16):
            data += more
            if not is_marked:  # before the mark: what the login shell's profile prints
                noise, found, rest = data.partition(self.mark + b"\n")
                if not found:
                    continue
                is_marked, data = True, rest
                self._hand_on(b"T", noise)
                self._events.put((self, "mark", None))
            data = self._read_whole_frames(data)
        stderr_reader.join(2)
        for kind in self._partial:
            self._hand_on(kind, b"", is_last=True)
        self._events.put((self, "closed", self.process.wait()))

    def _read_whole_frames(self, data: bytes) -> bytes:
        start = 0
        while len(data) - start >= HEADER.size:
            kind, length = HEADER.unpack_from(data, start)
            # another mark is no frame: gcloud has connected again after its connection dropped
            if kind not in b"HOEBX" or length > MAX_FRAME_BYTES:
                self._events.put((self, "garbled", None))
                return b""
            end = start + HEADER.size + length
            if len(data) < end:
                break
            self._take(kind, data[start + HEADER.size : end])
            start = end
        return data[start:]

    def _take(self, kind: bytes, payload: bytes) -> None:
        self.heard = time.monotonic()
        if kind in (b"O", b"E"):
            self.is_handing_on = True
            self._hand_on(kind, payload)
            self.heard = self.printed = time.monotonic()
            self.is_handing_on = False
        elif kind == b"B":
            self.stopped = (self.stopped or self.heard) if payload == b"T" else None
        else:
            self._events.put((self, "hello", None) if kind == b"H" else (self, "exit", int(payload)))

    def _hand_on(self, kind: bytes, data: bytes, is_last: bool = False) -> None:
        """Log and print a stream's bytes; keep its last lines."""
        with self._lock:
            self._logs[kind] = self.output.log(self._logs[kind], data)
            *lines, rest = re.split(rb"\r?\n|\r(?!\Z)", self._partial[kind] + data)
            if rest and (is_last or len(rest) > MAX_LINE_BYTES):
                lines, rest = [*lines, rest], b""
            self._partial[kind] = rest
            self.tail.extend(lines)
            if self.owns_stdout and kind == b"O":
                try:
                    self.output.write_stdout(data)
                except OSError as error:
                    self._events.put((self, "unwritable", error))
            elif lines:
                self.output.show(self.label, lines)


class Supervisor:
    """Runs the ranks until all ended, or ends all of them when one fails or a signal comes."""

    def __init__(self, ranks: list[Rank], options: argparse.Namespace, output: Output, events: Events) -> None:
        self.ranks, self.options, self.output, self.events = ranks, options, output, events
        self.failed: Rank | None = None
        self.code = 0
        self.reason = ""
        self.deadline: float | None = None  # when connections are cut that are still open
        self.began = self.beaten = time.monotonic()

    def run(self) -> int:
        """Return the exit code: 0, the first failed rank's, or 128 + the signal that ended the launcher."""
        try:
            for rank in self.ranks:
                rank.start(self.events)
            self._loop()
        except OSError as error:
            self._fail(None, f"cannot start {self.ranks[0].argv[0]}: {error}", 127)
        finally:
            for rank in self.ranks:
                rank.hang_up()
        if self.code:
            self._report()
        return self.code

    def _loop(self) -> None:
        tick = time.monotonic()
        while not all(rank.is_closed for rank in self.ranks):
            with contextlib.suppress(queue.Empty):
                self._handle(*self.events.get(timeout=TICK_S))
            now = time.monotonic()
            if now - tick > 10 * TICK_S:  # the launcher itself was stopped, or the machine slept
                self._forgive(now - tick)
            tick = now
            self._beat(now)
            if self.deadline is None:
                self._check(now)
            elif now > self.deadline + 1:
                return
            elif now > self.deadline:
                for rank in self.ranks:
                    rank.hang_up()

    def _handle(self, rank: Rank | None, event: str, value: object) -> None:
        if event == "signal":
            self._interrupt(int(str(value)))
        elif event == "mark":
            rank.send(wrapper_line())
        elif event == "hello":
            rank.is_ready = True
            if all(each.is_ready for each in self.ranks) and self.deadline is None:
                self._go()
        elif event == "exit":
            rank.code = int(str(value))
            if rank.code:
                self._fail(rank, *described(rank.code))
            elif all(each.code is not None for each in self.ranks):
                self.deadline = self.deadline or time.monotonic() + GRACE_S
        elif event == "garbled":
            self._fail(rank, "its connection dropped", UNREACHABLE)
        elif event == "unwritable":
            self.output.is_ending = is_pipe = isinstance(value, BrokenPipeError)
            self._fail(None, f"stdout cannot be written: {value}", 128 + signal.SIGPIPE if is_pipe else 1)
        elif event == "closed":
            rank.is_closed = True
            if rank.code is None:
                self._fail(rank, *self._lost(rank, int(str(value))))

    def _beat(self, now: float) -> None:
        if now - self.beaten > beat_interval(self.options):
            self.beaten = now
            for rank in self.ranks:
                if rank.is_running and rank.code is None:
                    rank.send(b"0\n")

    def _go(self) -> None:
        now = time.monotonic()
        for rank in self.ranks:
            rank.is_running, rank.heard, rank.printed = True, now, now
            rank.send(json.dumps(rank.spec).encode() + b"\n")

    def _lost(self, rank: Rank, code: int) -> tuple[str, int]:
        """Return why a connection ended without the command's exit code, and the exit code for it."""
        if code == UNREACHABLE or code < 0 or (rank.is_running and code in (0, 1)):
            what = "its connection dropped" if rank.is_ready else "it cannot be reached"
            return f"{what} ({rank.argv[0]}: exit code {code})", UNREACHABLE
        if rank.is_running:
            return f"the wrapper of its command was ended (exit code {code})", code
        python = self.options.python or "python3"
        cure = f"is {python} there Python 3.6 or newer? --python names another"
        return f"the wrapper did not start ({rank.argv[0]}: exit code {code}); {cure}", code or 1

    def _check(self, now: float) -> None:
        """Fail for hosts that do not answer in time and for what counts as a hang."""
        limit = self.options.heartbeat
        late = [rank for rank in self.ranks if not rank.is_ready]
        if late and now - self.began > self.options.connect_timeout:
            names = ", ".join(rank.label for rank in late)
            self._fail(late[0], f"no answer within {self.options.connect_timeout:g} s from {names}", UNREACHABLE)
        for rank in self.ranks:
            if not rank.is_running or rank.code is not None or rank.is_handing_on or self.deadline is not None:
                continue
            if limit and now - rank.heard > limit:
                self._fail(rank, f"no sign of life for {limit:g} s: its host or network hangs", UNREACHABLE)
                rank.hang_up()
            elif limit and rank.stopped is not None and now - rank.stopped > limit:
                self._fail(rank, f"its command has been stopped for {limit:g} s", 128 + signal.SIGSTOP)
            elif self.options.max_silence and now - rank.printed > self.options.max_silence:
                self._fail(rank, f"no output for {self.options.max_silence:g} s", 124)

    def _forgive(self, seconds: float) -> None:
        self.began += seconds
        for rank in self.ranks:
            rank.heard += seconds
            rank.printed += seconds
            rank.stopped = None

    def _interrupt(self, number: int) -> None:
        self.output.is_ending = True
        if self.deadline is not None and self.reason:
            number, grace = signal.SIGKILL, 0.5
        else:
            self.reason, self.code, grace = f"got {signal.Signals(number).name}", 128 + number, GRACE_S + 1
        self._end(number, grace)
        self.output.say(f"{self.reason}: ending all ranks" + ("" if grace < 1 else "; once more kills them"))

    def _fail(self, rank: Rank | None, reason: str, code: int) -> None:
        """Take the first failure as the run's, and end the other ranks."""
        if self.reason:
            return
        self.failed, self.reason, self.code = rank, reason, code
        self._end(signal.SIGTERM, GRACE_S + 1)
        self.output.say(f"{f'{rank.label}: ' if rank else ''}{reason}; ending all ranks")

    def _end(self, number: int, grace: float) -> None:
        self.deadline = time.monotonic() + grace
        for rank in self.ranks:
            if rank.is_running:
                rank.send(b"%d\n" % number)
            else:
                rank.hang_up()

    def _report(self) -> None:
        """Print the last lines of the rank that failed, and who did not confirm its end."""
        for rank in self.ranks:
            if rank.is_running and rank.code is None and rank is not self.failed:
                self.output.say(f"{rank.label}: no answer; it ends its command when it notices the closed connection")
        if self.failed is not None:
            lines = list(self.failed.tail)
            what = "its last lines:" if lines else "it printed nothing"
            self.output.say(f"{self.failed.label}: {self.reason}; {what}")
            self.output.show(self.failed.label, lines)
        self.output.say(f"exit code {self.code}; logs: {self.output.log_dir}")


def described(code: int) -> tuple[str, int]:
    """Return a command's end in words, and its exit code as a shell has it."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}", 128 - code
        return f"killed by signal {-code}", 128 - code
    return f"exit code {code}", code


def rank_env(host: Host, hosts: list[Host], options: argparse.Namespace) -> dict[str, str]:
    """Return the variables of a rank: the launcher's, what PJRT needs, and --env."""
    count, is_local = str(len(hosts)), isinstance(host, LocalHost)
    return {
        "RANK": str(host.rank),
        "WORLD_SIZE": count,
        "LOCAL_RANK": str(host.rank) if is_local else "0",
        "LOCAL_WORLD_SIZE": count if is_local else "1",
        "NNODES": "1" if is_local else count,
        "MASTER_ADDR": options.master_addr or hosts[0].address,
        "MASTER_PORT": str(options.master_port),
        "PYTHONUNBUFFERED": "1",
        **host.env(options.given),
        **options.given,
    }


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def beat_interval(options: argparse.Namespace) -> float:
    """Return the seconds between two signs of life, in either direction."""
    return min(options.heartbeat / 4, 5) or 5


def make_spec(argv: list[str], env: dict[str, str], workdir: str, options: argparse.Namespace) -> dict[str, object]:
    """Return what the wrapper reads; texts are bytes, written as latin-1, so that they arrive exactly."""

    def exact(text: str) -> str:
        return os.fsencode(text).decode("latin-1")

    return {
        "argv": [exact(argument) for argument in argv],
        "env": {exact(name): exact(value) for name, value in env.items()},
        "workdir": exact(workdir),
        "interval": beat_interval(options),
        "patience": PATIENCE * options.heartbeat,
    }


def print_commands(hosts: list[Host], command: list[str], options: argparse.Namespace) -> None:
    """Print what would run, as lines for a shell."""
    lines = []
    for host in hosts if options.sync else ():
        lines += [f"# copy this directory to {host.name}", shlex.join(host.sync_command(options))]
    for host in hosts:
        env = [f"{name}={value}" for name, value in rank_env(host, hosts, options).items()]
        there = f"cd {shlex.quote(options.workdir)} && " if options.workdir else ""
        lines += [f"# rank {host.rank}: connect to {host.name}", shlex.join(host.command(options, "xla_dist"))]
        lines += [f"# rank {host.rank}: run there", there + shlex.join(["env", *env, *command])]
    with contextlib.suppress(BrokenPipeError):
        os.write(1, ("\n".join(lines) + "\n").encode(errors="surrogateescape"))


def launch(hosts: list[Host], command: list[str], options: argparse.Namespace, output: Output) -> int:
    """Copy the directory if asked for, then run the command; return the exit code."""
    events = Events()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda n, _: events.put((None, "signal", n)))
    if options.sync:
        here = argparse.Namespace(**{**vars(options), "python": None, "max_silence": 0})  # rsync is silent
        if code := Supervisor(sync_ranks(hosts, here, output), here, output, events).run():
            return code
    mark = new_mark()
    ranks = []
    for host in hosts:
        spec = make_spec(command, rank_env(host, hosts, options), options.workdir, options)
        ranks.append(Rank(host, host.command(options, mark), spec, mark, output, "rank"))
    return Supervisor(ranks, options, output, events).run()


def sync_ranks(hosts: list[Host], options: argparse.Namespace, output: Output) -> list[Rank]:
    """Return an rsync for each host, as commands of this machine that end with the launcher."""
    mark, ranks = new_mark(), []
    for host in hosts:
        here = LocalHost(host.rank, f"rsync {host.name}")
        spec = make_spec(host.sync_command(options), {}, "", options)
        ranks.append(Rank(here, here.command(options, mark), spec, mark, output, "sync"))
    return ranks


def new_mark() -> str:
    """Return a word that no other program prints."""
    return f"xla_dist-{os.urandom(8).hex()}"


def open_standard_streams() -> None:
    """Open /dev/null for each of stdin, stdout and stderr that is closed, so that no pipe takes its number."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def main(arguments: list[str]) -> int:
    """Return the exit code: 2 for flags that cannot be used."""
    open_standard_streams()
    try:
        options, command = parse(arguments)
        hosts = find_hosts(options)
        options.master_port = options.master_port or (free_port() if options.local else 29500)
        if options.dry_run:
            print_commands(hosts, command, options)
            return 0
        output = Output(make_log_dir(options))
        code = launch(hosts, command, options, output)
        output.close(1 if output.is_ending else None)
    except UsageError as error:
        print(f"xla_dist.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before anything was started
        return 128 + signal.SIGINT
    return code


def make_log_dir(options: argparse.Namespace) -> Path:
    """Return --log_dir or a new directory. Raises UsageError."""
    found = options.log_dir or Path("xla_dist_logs", f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    try:
        found.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--log_dir: {error}") from None
    return found


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
