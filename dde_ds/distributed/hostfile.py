"""Read host names: a hostfile of the deepspeed launcher, and a node list of Slurm."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

from dde_ds.errors import UserError
from dde_ds.warn import reason

HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9_])?")
# "n[01-04,7]" of Slurm: the numbers of one bracket.
BRACKET = re.compile(r"\[(\d+)(?:-\d+)?(?:,\d+(?:-\d+)?)*\]")


def valid_host(text: str) -> bool:
    """Whether ``text`` is a host name or an address: nothing that a shell, ssh or pdsh would read as more."""
    if HOST.fullmatch(text):
        return True
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Ranks of each host of a deepspeed hostfile. The launcher hands these names to ssh and pdsh as they stand, where one such as
    ``-oProxyCommand=…`` is an option that runs a program.

    Raises:
        UserError: no such file, a line that is not ``HOST slots=N``, a host twice, or hosts with different numbers of ranks.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"hostfile {path}: {reason(error).lower()}") from None
    except UnicodeDecodeError:
        raise UserError(f"hostfile {path}: not a text file") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        # As the launcher reads it, which looks at nothing behind the number: a comment, say.
        found = re.fullmatch(r"(\S+)\s+slots=([0-9]{1,4})(?:[\s#].*)?", line)
        if not found or not valid_host(found[1]) or int(found[2]) < 1:
            raise UserError(f"hostfile {path}: line {number} is {line!r}: expected a host name and its GPUs, such as node1 slots=8")
        if found[1] in hosts:
            raise UserError(f"hostfile {path}: line {number}: {found[1]} is there twice")
        hosts[found[1]] = int(found[2])
    if len(set(hosts.values())) != 1:
        counts = ", ".join(f"{host} {count}" for host, count in hosts.items()) or "none"
        raise UserError(f"hostfile {path}: expected hosts with equal numbers of slots, found {counts}")
    return hosts


def first_host(nodes: str, name: str = "SLURM_STEP_NODELIST") -> str:
    """First host of a Slurm list such as ``gpu[003-010,12],login1`` or ``rack[1-2]n[01-04]-ib``.

    Raises:
        UserError: not such a list.
    """
    opened, first = 0, ""
    for character in nodes:  # up to the first comma outside brackets
        opened += (character == "[") - (character == "]")
        if character == "," and not opened:
            break
        first += character
    host = BRACKET.sub(r"\1", first)
    if not HOST.fullmatch(host):
        raise UserError(f"environment: {name}={nodes!r}: expected host names such as node[01-04]")
    return host
