"""The parts that the benchmark scripts share: turns, Markdown tables, the machine's name, and sections of BENCHMARKS.md."""

from __future__ import annotations

import datetime
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "BENCHMARKS.md"
HEAD = """# Benchmarks

Every number was printed by the command above it. Ratios compare candidates that took turns within one run.
"""

LAST = "Not measured"


def take_turns(
    candidates: Mapping[str, Callable[[], object]],
    turns: int,
    device: str,
    least_seconds: float = 0.0,
    warm_seconds: float = 0.0,
    warm_turns: int = 3,
) -> dict[str, list[float]]:
    """Time the candidates in turns, and return the seconds of each candidate in each turn.

    In a turn, each candidate runs once. So whatever slows the machine for a while slows all candidates. The order changes from turn
    to turn, through all orders, because a candidate finds the caches as the candidate before it left them.

    Args:
        turns: the least number of turns.
        device: for "cuda", the GPU is waited for before and after each call.
        least_seconds: the least time of all turns together. Calls of microseconds need it, so that their median is not that of one
            moment.
        warm_seconds, warm_turns: the least time and number of warm turns. Warm turns come first and do not count: they take what is
            compiled, cached or woken up at first.
    """
    import torch

    synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    orders = list(itertools.permutations(candidates))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    began, warm, done = time.perf_counter(), 0, 0
    while warm < warm_turns or time.perf_counter() - began < warm_seconds:
        for run in candidates.values():
            run()
        warm += 1
    began = time.perf_counter()
    while done < turns or time.perf_counter() - began < least_seconds:
        for name in orders[done % len(orders)]:
            synchronize()
            started = time.perf_counter()
            candidates[name]()
            synchronize()
            times[name].append(time.perf_counter() - started)
        done += 1
    return times


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the lower quartile and the upper quartile of the ratios within each turn."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(numerator, denominator, strict=True)], n=4)
    return middle, low, high


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(device: str) -> str:
    """Return the name of the GPU, or of the processor with the number of its cores."""
    import torch

    if device == "cuda":
        return f"one {torch.cuda.get_device_name()}"
    return f"a CPU, {os.cpu_count()} cores ({_processor()})"


def record(title: str, text: str) -> None:
    """Write a section into BENCHMARKS.md.

    It replaces the section of the same title. A new section goes before the one on what was not measured, :data:`LAST`.
    """
    import torch

    command = f"python {Path(sys.argv[0]).parent.name}/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip()
    head = f"## {title}\n\n`{command}`, {datetime.date.today().isoformat()}, torch {torch.__version__}\n\n"
    before = FILE.read_text(encoding="utf-8") if FILE.exists() else HEAD
    intro, *sections = before.split("\n## ")
    titles = [section.splitlines()[0] for section in sections]
    if title in titles:
        sections[titles.index(title)] = (head + text)[3:]
    else:
        sections.insert(titles.index(LAST) if LAST in titles else len(titles), (head + text)[3:])
    FILE.write_text(intro.rstrip() + "\n" + "".join(f"\n## {section.strip()}\n" for section in sections), encoding="utf-8")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()
