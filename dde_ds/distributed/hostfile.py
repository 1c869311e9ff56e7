"""Read host names from a hostfile of the deepspeed launcher or from a node list of Slurm."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

from dde_ds.errors import UserError
from dde_ds.warn import reason

HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9_])?")
# The numbers of one bracket in a Slurm list such as "n[01-04,7]".
BRACKET = re.compile(r"\[(\d+)(?:-\d+)?(?:,\d+(?:-\d+)?)*\]")


def valid_host(text: str) -> bool:
    """Return whether ``text`` is a plain host name or IP address, which shell, ssh and pdsh cannot read as anything
    else.
    """
    if HOST.fullmatch(text):
        return True
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Return the number of ranks of each host in a deepspeed hostfile.

    The launcher passes these names unchanged to ssh and pdsh. They would take a name such as ``-oProxyCommand=…`` for
    an option that runs a program.

    Raises:
        UserError: the file does not exist, a line is not ``HOST slots=N``, a host occurs twice, or hosts have different
            numbers of ranks.
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
        # Like the launcher, ignore what follows the number, such as a comment.
        match = re.fullmatch(r"(\S+)\s+slots=([0-9]{1,4})(?:[\s#].*)?", line)
        if not match or not valid_host(match[1]) or int(match[2]) < 1:
            raise UserError(f"hostfile {path}: line {number} is {line!r}: expected a host name and its GPUs, such as node1 slots=8")
        if match[1] in hosts:
            raise UserError(f"hostfile {path}: line {number}: {match[1]} is there twice")
        hosts[match[1]] = int(match[2])
    if len(set(hosts.values())) != 1:
        counts = ", ".join(f"{host} {count}" for host, count in hosts.items()) or "none"
        raise UserError(f"hostfile {path}: expected hosts with equal numbers of slots, found {counts}")
    return hosts


def first_host(nodes: str, name: str = "SLURM_STEP_NODELIST") -> str:
    """Return the first host of a Slurm list such as ``gpu[003-010,12],login1`` or ``rack[1-2]n[01-04]-ib``.

    Args:
        nodes: the list.
        name: name of the variable that holds the list, for messages.

    Raises:
        UserError: the text is not such a list.
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
