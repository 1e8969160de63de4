"""The flags of xla_dist.py."""

from __future__ import annotations

import argparse
import difflib
import re
from pathlib import Path
from typing import NoReturn

from xla_dist_hosts import UsageError

LAUNCHER_ENV = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NNODES", "MASTER_ADDR", "MASTER_PORT")
HEARTBEAT_HELP = (
    "end all when a host has given no sign of life for so many seconds, or its command has been stopped (SIGSTOP) for "
    "as many; 0: never; default: 60"
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parser() -> Parser:
    """Return the parser of the flags before `--`."""
    made = Parser(
        prog="xla_dist.py",
        usage="xla_dist.py (--tpu NAME --zone Z | --hosts H1,H2 | --hostfile FILE | --local N) [flags] -- COMMAND ...",
        description="Run one command on many hosts, one rank each, and end all of them when one fails (docs/pods.md).",
        allow_abbrev=False,
    )
    where = made.add_argument_group("where (one of them)")
    where.add_argument("--tpu", metavar="NAME", help="all workers of a Cloud TPU, through gcloud")
    where.add_argument("--hosts", metavar="H1,H2", help="hosts for ssh: HOST, USER@HOST or USER@HOST:PORT")
    where.add_argument("--hostfile", metavar="FILE", help="the same, one a line; # begins a comment")
    where.add_argument("--local", metavar="N", type=whole, help="N processes on this machine")
    add = made.add_argument
    add("--zone", help="with --tpu: its zone")
    add("--project", help="with --tpu: its project; default: gcloud's")
    add("--workdir", default="", help="where the command runs; default: the home directory, with --local this one")
    add("--sync", action="store_true", help="first copy this directory to --workdir on each host, by rsync")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable for the command; repeatable")
    add("--ssh_option", action="append", default=[], metavar="NAME=VALUE", help="as after ssh's -o; repeatable")
    add("--gcloud_flag", action="append", default=[], metavar="FLAG", help="as =--internal-ip, for gcloud; repeatable")
    add("--python", help="the Python for the wrapper on the hosts; default: python3")
    add("--master_addr", help="MASTER_ADDR; default: rank 0's host")
    add("--master_port", type=whole, help="MASTER_PORT; default: 29500, with --local a free one")
    add("--connect_timeout", type=seconds, help="until all hosts must have answered; default: 30, with --tpu 120")
    add("--heartbeat", type=seconds, default=60.0, help=HEARTBEAT_HELP)
    add("--max_silence", type=seconds, default=0.0, help="end all if a command prints nothing so long; 0: never")
    add("--log_dir", type=Path, help="a file per rank and stream goes there; default: a new one in ./xla_dist_logs")
    add("--dry_run", action="store_true", help="print the commands and start none")
    return made


def whole(text: str) -> int:
    """Return a whole number from 1."""
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, at least 1")
    return int(text)


def seconds(text: str) -> float:
    """Return a time that is not negative."""
    if not re.fullmatch(r"[0-9]*\.?[0-9]+|[0-9]+\.", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected seconds")
    return float(text)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags and the command. Raises UsageError for whatever contradicts or is missing."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    made = parser()
    options, unknown = made.parse_known_args(arguments[:split])
    if unknown:
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("-"):
            raise UsageError(f"unknown argument {flag}; the command comes after --")
        near = difflib.get_close_matches(flag, made._option_string_actions, 1)
        raise UsageError(
            f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else "; --help lists the flags")
        )
    command = arguments[split + 1 :]
    if not command:
        raise UsageError("no command; give it after --, as in: xla_dist.py --local 2 -- python3 example_xla.py")
    check(options)
    return options, command


def check(options: argparse.Namespace) -> None:
    """Raise UsageError for flags that contradict each other."""
    places = [name for name in ("tpu", "hosts", "hostfile", "local") if getattr(options, name) is not None]
    if len(places) != 1:
        got = " and ".join(f"--{name}" for name in places) or "none"
        raise UsageError(f"got {got}, expected one of --tpu, --hosts, --hostfile, --local")
    (place,) = places
    for name in ("zone", "project", "gcloud_flag"):
        if getattr(options, name) and place != "tpu":
            raise UsageError(f"--{name} is for --tpu, got --{place}")
    if place == "tpu" and not options.zone:
        raise UsageError("--tpu needs --zone")
    for name in ("tpu", "zone", "project"):
        if getattr(options, name) is not None and not re.fullmatch(r"[A-Za-z0-9][\w.:@-]*", getattr(options, name)):
            raise UsageError(f"--{name}: got {getattr(options, name)!r}, expected a name")
    if options.sync and (place == "local" or not options.workdir):
        raise UsageError("--sync is not for --local" if place == "local" else "--sync needs --workdir")
    if options.local and options.local > 1024:
        raise UsageError(f"--local: got {options.local}, expected at most 1024")
    if options.master_port and options.master_port > 65535:
        raise UsageError(f"--master_port: got {options.master_port}, expected at most 65535")
    if options.connect_timeout is None:
        options.connect_timeout = 120.0 if place == "tpu" else 30.0
    if options.connect_timeout < 1:
        raise UsageError(f"--connect_timeout: got {options.connect_timeout:g}, expected at least 1")
    if place != "local":
        options.workdir = options.workdir[2:] if options.workdir.startswith("~/") else options.workdir  # from the home
    options.workdir = options.workdir.rstrip("/") or options.workdir[:1]
    options.given = given_env(options.env)


def given_env(pairs: list[str]) -> dict[str, str]:
    """Return --env as a dict. Raises UsageError for what is none or what the launcher sets."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, flags=re.ASCII):
            raise UsageError(f"--env: got {pair!r}, expected NAME=VALUE")
        if name in LAUNCHER_ENV:
            cure = f"; use --{name.lower()}" if name.startswith("MASTER") else ""
            raise UsageError(f"--env: {name} is set by the launcher{cure}")
        found[name] = value
    return found
