"""What a process and its children cost, read from /proc: CPU seconds and peak memory."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from devstack.processes import descendants

# Places in /proc/PID/stat behind the name: user and system time, and those of ended children.
USER, CHILDREN_USER = 11, 13


@dataclass(frozen=True)
class Cost:
    """CPU seconds used so far, by group of processes."""

    cpu_s: dict[str, float]

    def since(self, before: "Cost") -> dict[str, float]:
        """Return the CPU seconds used between two readings."""
        return {name: round(now - before.cpu_s[name], 4) for name, now in self.cpu_s.items()}


def cost(groups: dict[str, int]) -> Cost:
    """Return what each process (by name: its pid) and its living descendants have used."""
    return Cost({name: tree_cpu_s(pid) for name, pid in groups.items()})


def tree_cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process, its living descendants and those it has waited for."""
    # A database's short-lived backends are among those that its postmaster has waited for.
    return sum(cpu_s(found) for found in descendants(pid)) + _ticks_s(pid, CHILDREN_USER, 2)


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of all threads a process ever had, to 10 ms; 0 when it is gone."""
    return _ticks_s(pid, USER, 2)


def peak_memory_mib(pid: int) -> float | None:
    """Return the largest resident set that a process ever had; None when it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    return None


def _ticks_s(pid: int, field: int, count: int) -> float:
    with suppress(OSError):
        # The name in parentheses may hold anything; fields are fixed after the last one.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return sum(map(int, fields[field : field + count])) / os.sysconf("SC_CLK_TCK")
    return 0.0
