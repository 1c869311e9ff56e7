"""What the benchmark scripts share: a Markdown table, the machine's name, and the section of BENCHMARKS.md that a script owns."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "BENCHMARKS.md"
HEAD = """# Benchmarks

Every number was printed by the command above it. Ratios compare candidates that took turns within one run.
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(device: str) -> str:
    """The accelerator, or the processor with its cores."""
    import torch

    if device == "cuda":
        return f"one {torch.cuda.get_device_name()}"
    return f"a CPU, {os.cpu_count()} cores ({_processor()})"


def record(title: str, text: str) -> None:
    """Put a section in, in place of the one of the same title."""
    import torch

    command = f"python {Path(sys.argv[0]).parent.name}/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip()
    head = f"## {title}\n\n`{command}`, {datetime.date.today().isoformat()}, torch {torch.__version__}\n\n"
    before = FILE.read_text(encoding="utf-8") if FILE.exists() else HEAD
    intro, *sections = before.split("\n## ")
    kept = [section for section in sections if section.splitlines()[0] != title]
    kept.append((head + text)[3:])
    FILE.write_text(intro.rstrip() + "\n" + "".join(f"\n## {section.strip()}\n" for section in kept), encoding="utf-8")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()
