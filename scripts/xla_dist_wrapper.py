"""What xla_dist.py runs on each host: its text goes there over the connection. Standard library, Python 3.6.

A frame on stdout is a kind (one byte), a length (4 bytes, big-endian) and so many bytes: H hello, O and E the command's
stdout and stderr, B heartbeat (T in it: a process of the command is stopped), X the exit code (negative: a signal).
Lines on stdin: first what to run, as JSON, then the numbers of signals to send.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

GRACE_S = 5.0  # between the signal that asks a command to end and SIGKILL
HEADER = struct.Struct(">cI")
MAX_FRAME_BYTES = 1 << 16
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36  # orphans of the command become this process's children: it can find and end them


def join(threads, limit_s):
    """Wait until the threads end, together not longer than the limit."""
    ends = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0, ends - time.monotonic()))


class Wrapper:
    """Run one command, send its output as frames, and end all of its processes.

    Two processes. The inner one runs the command and sends frames to stdout; lines on stdin tell it what to run
    and which signal to send. It ends the command when stdin closes. The outer one ends what is left when the inner
    one was killed, or is still there GRACE_S after stdin closed, as when it is stopped.
    """

    def __init__(self):
        self.child = None
        self.is_ending = False
        self.is_open = True
        self.heard = time.monotonic()
        self.lock = threading.Lock()

    def run(self):
        alive, ended = os.pipe()
        outer = os.getpid()
        self.prctl(PR_SET_CHILD_SUBREAPER, 1)
        inner = os.fork()
        if not inner:
            os.close(alive)
            try:
                self.prctl(PR_SET_CHILD_SUBREAPER, 1)
                self.die_with_parent(signal.SIGTERM, outer)
                self.run_command()
                sys.stderr.flush()
                os._exit(0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        os.close(ended)
        status = self.watch(inner, alive)
        self.kill_all()
        os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))

    def prctl(self, option, value):
        """Set an attribute of this process, where there is prctl: on Linux."""
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(option, int(value), 0, 0, 0)

    def die_with_parent(self, number, parent):
        self.prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(1)

    def watch(self, inner, alive):
        """Return the inner process's wait status; kill it if it outlives stdin by more than GRACE_S, or is stopped."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: os.kill(inner, signal.SIGTERM))
        poller = select.poll()
        poller.register(0, getattr(select, "POLLRDHUP", 0))  # tells a closed stdin without reading from it
        poller.register(alive, select.POLLIN)
        if alive not in [fd for fd, _ in poller.poll()]:
            poller.unregister(0)
            ends = time.monotonic() + GRACE_S + 1
            while not poller.poll(500):
                if time.monotonic() > ends or self.tree().get(inner, (b"", 0))[0] == b"T":
                    os.kill(inner, signal.SIGKILL)
        return os.waitpid(inner, 0)[1]

    def run_command(self):
        self.send(b"H", json.dumps([socket.gethostname(), sys.version.split()[0]]).encode())
        line = sys.stdin.buffer.readline()
        if not line.endswith(b"\n"):
            return
        spec = json.loads(line.decode())
        try:
            self.start(spec)
        except OSError as error:
            name = os.fsencode(error.filename or "")
            self.send(b"E", b"cannot start the command: %s: %s\n" % (error.strerror.encode(), name))
            self.send(b"X", b"127" if isinstance(error, FileNotFoundError) else b"126")
            return
        signal.signal(signal.SIGTERM, lambda *_: self.end(signal.SIGTERM))
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        pumps = [
            self.thread(self.pump, self.child.stdout.fileno(), b"O"),
            self.thread(self.pump, self.child.stderr.fileno(), b"E"),
        ]
        self.thread(self.beat, spec["interval"])
        self.thread(self.obey)
        if spec["patience"]:
            self.thread(self.expect_launcher, spec["patience"])
        code = self.child.wait()
        join(pumps, 1)  # what the command left behind may still write
        self.kill_all()
        join(pumps, 1)
        self.send(b"X", str(code).encode())

    def start(self, spec):
        def exact(text):
            return text.encode("latin-1")  # bytes, whatever this host's locale is

        environment = dict(os.environb)
        environment.update((exact(name), exact(value)) for name, value in spec["env"].items())
        inner = os.getpid()
        self.child = subprocess.Popen(
            [exact(argument) for argument in spec["argv"]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=exact(spec["workdir"]) or None,
            start_new_session=True,
            preexec_fn=lambda: self.die_with_parent(signal.SIGKILL, inner),
        )

    def thread(self, function, *arguments):
        made = threading.Thread(target=function, args=arguments, daemon=True)
        made.start()
        return made

    def send(self, kind, payload):
        """Write a frame; nothing if the launcher is gone, which `obey` notices."""
        with self.lock:
            data = HEADER.pack(kind, len(payload)) + payload
            try:
                while data and self.is_open:
                    data = data[os.write(1, data) :]
            except OSError:
                self.is_open = False

    def pump(self, fd, kind):
        while True:
            data = os.read(fd, MAX_FRAME_BYTES)
            if not data:
                return
            self.send(kind, data)

    def beat(self, interval):
        """Send a sign of life, with T if a process of the command is stopped; reap orphans."""
        while True:
            time.sleep(interval)
            is_stopped = False
            for pid, (state, parent) in self.tree().items():
                is_stopped |= state == b"T"
                if state == b"Z" and parent == os.getpid() and pid != self.child.pid:
                    with contextlib.suppress(OSError):
                        os.waitpid(pid, os.WNOHANG)
            self.send(b"B", b"T" if is_stopped else b"")

    def obey(self):
        """Send the signals that stdin names, 0 for none; ask the command to end when stdin closes."""
        for line in sys.stdin.buffer:
            self.heard = time.monotonic()
            if int(line):
                self.end(int(line))
        self.end(signal.SIGTERM)

    def expect_launcher(self, patience):
        """End the command when nothing was heard for so many seconds: no connection tells of a dead network."""
        while time.monotonic() - self.heard < patience:
            time.sleep(patience / 20)
        self.end(signal.SIGTERM)
        time.sleep(GRACE_S + 1)
        os._exit(1)

    def end(self, number):
        if number == signal.SIGKILL:
            self.kill_all()
            return
        for pid in self.living():
            with contextlib.suppress(OSError):
                os.kill(pid, number)
                os.kill(pid, signal.SIGCONT)
        if not self.is_ending:
            self.is_ending = True
            timer = threading.Timer(GRACE_S, self.kill_all)
            timer.daemon = True
            timer.start()

    def kill_all(self):
        """Kill every process below this one, with those that they start meanwhile."""
        ends = time.monotonic() + 5
        while time.monotonic() < ends:
            pids = self.living()
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def living(self):
        """Return the processes below this one; without /proc, the command's process group."""
        if os.path.isdir("/proc/self"):
            return [pid for pid, (state, _) in self.tree().items() if state not in (b"Z", b"X")]
        return [-self.child.pid] if self.child is not None and self.child.returncode is None else []

    def tree(self):
        """Return {pid: (state, parent)} of the processes below this one, as /proc shows them."""
        table = {}
        for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
            if name.isdigit():
                with contextlib.suppress(OSError), open("/proc/" + name + "/stat", "rb") as file:
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
                    table[int(name)] = (state, int(parent))
        found, added = set(), {os.getpid()}
        while added:
            found |= added
            added = {pid for pid, (_, parent) in table.items() if parent in found} - found
        return {pid: table[pid] for pid in found if pid in table and pid != os.getpid()}


if __name__ == "__main__":
    Wrapper().run()
