"""Which of several processes this is, and how many there are, from the environment that a launcher sets.

The first complete pair of variables counts, the innermost launcher first:

    RANK, WORLD_SIZE                               torchrun, and scripts/xla_dist.py
    OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE     mpirun of Open MPI
    SLURM_PROCID, SLURM_NTASKS                     srun
    JOB_COMPLETION_INDEX, and a count              Kubernetes' indexed Jobs, which have no variable for the count: the
                                                   manifest gives it as WORLD_SIZE, JOB_COMPLETIONS or NNODES
    TPU_WORKER_ID, TPU_WORKER_HOSTNAMES            TPU hosts; the names, separated by commas, are counted

No torch, no network: whether the others run, nobody asks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from llama.errors import ConfigError

COUNTS_OF_A_JOB = ("WORLD_SIZE", "JOB_COMPLETIONS", "NNODES")
PAIRS: tuple[tuple[str, tuple[str, ...]], ...] = (  # a rank's variable, and those that may give the count
    ("RANK", ("WORLD_SIZE",)),
    ("OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",)),
    ("SLURM_PROCID", ("SLURM_NTASKS",)),
    ("JOB_COMPLETION_INDEX", COUNTS_OF_A_JOB),
    ("TPU_WORKER_ID", ("TPU_WORKER_HOSTNAMES",)),
)


@dataclass(frozen=True)
class Ranks:
    """This process among those that work on the same thing.

    Attributes:
        rank: its number, from 0.
        world_size: how many there are.

    Raises:
        ConfigError: a number is out of its range.
    """

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ConfigError(f"world_size: got {self.world_size}, expected at least 1")
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank: got {self.rank}, expected 0 to {self.world_size - 1}")

    @property
    def is_first(self) -> bool:
        """Whether it is the one that prints results."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there are no others."""
        return self.world_size == 1


def current_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """The ranks that an environment gives; one process where it gives none. A variable that is empty counts as absent.

    Args:
        environment: None means this process's own.

    Raises:
        ConfigError: a value that is no such number, a rank without a count or the reverse, a rank that its count does
            not have, or two counts that differ; the message names the variables.
    """
    environment = os.environ if environment is None else environment
    given = {name: value for name, value in environment.items() if value.strip()}
    lonely: str | None = None
    for name, counts in PAIRS:
        if name not in given:
            continue
        rank, sizes = _number(name, given), {count: _count(count, given) for count in counts if count in given}
        if sizes:
            return _agreed(name, rank, _with_world_size(name, sizes, given))
        if rank > 0 or name in ("RANK", "JOB_COMPLETION_INDEX"):  # the others are 0 in shells of one process
            lonely = lonely or name
    if lonely is not None:
        expected = " or ".join(dict(PAIRS)[lonely])
        raise ConfigError(
            f"{lonely}: got {given[lonely]} without {expected}, the number of processes; set both or none"
        )
    if "WORLD_SIZE" in given and _count("WORLD_SIZE", given) > 1:
        raise ConfigError(
            f"WORLD_SIZE: got {given['WORLD_SIZE']} without RANK, this process's number; set both or none"
        )
    return Ranks()


def _with_world_size(name: str, sizes: dict[str, int], given: Mapping[str, str]) -> dict[str, int]:
    """The counts of a pair, and WORLD_SIZE if it is given: a script may have set it beside another launcher's rank."""
    if name != "RANK" and "RANK" not in given and "WORLD_SIZE" in given:
        return {**sizes, "WORLD_SIZE": _count("WORLD_SIZE", given)}
    return sizes


def _agreed(name: str, rank: int, sizes: Mapping[str, int]) -> Ranks:
    """The rank with the count that all variables agree on."""
    if len(set(sizes.values())) > 1:
        got = ", ".join(f"{count}={size}" for count, size in sizes.items())
        raise ConfigError(
            f"the number of processes beside {name}: got {got}, expected one number; leave the wrong one out"
        )
    (count, size), *_ = sizes.items()
    if rank >= size:
        raise ConfigError(f"{name}: got {rank}, expected 0 to {size - 1}, because {count} gives {size} processes")
    return Ranks(rank, size)


def _count(name: str, given: Mapping[str, str]) -> int:
    """The number of processes that a variable gives."""
    if name == "TPU_WORKER_HOSTNAMES":
        return len([host for host in given[name].split(",") if host.strip()]) or 1
    return _number(name, given, least=1)


def _number(name: str, given: Mapping[str, str], least: int = 0) -> int:
    text = given[name].strip()
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise ConfigError(f"{name}: got {given[name]!r:.60}, expected a whole number of {least} or more")
    return int(text)
