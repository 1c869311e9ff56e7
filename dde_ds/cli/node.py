"""The flags that start the ranks of one node, for ``launchers/node.py`` and for ``dde-ds train`` without a launcher.

:mod:`dde_ds.training.node` starts the ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from dde_ds.cli.parsing import Parser
from dde_ds.distributed.environment import DEFAULT_PORT, free_port
from dde_ds.distributed.hostfile import valid_host
from dde_ds.errors import UserError
from dde_ds.training.node import Node, run_node, visible_gpus
from dde_ds.training.signals import listening

# For each option: its variable of Kubeflow Trainer, the default if neither is given, and the help text.
OPTIONS = {
    "nodes": ("PET_NNODES", "1", "number of nodes"),
    "node_rank": ("PET_NODE_RANK", "0", "which of them this is"),
    "ranks": ("PET_NPROC_PER_NODE", "auto", "ranks of this node; auto: one a GPU, or one"),
    "address": ("PET_MASTER_ADDR", "127.0.0.1", "host of node 0"),
    "port": ("PET_MASTER_PORT", "auto", f"free port there; auto: {DEFAULT_PORT}, or on one node any that is free"),
}
RANGES = {"nodes": (1, 10**6), "node_rank": (0, 10**6), "ranks": (1, 1024), "port": (1, 65535)}


def add_node_options(parser: Any) -> None:
    for name, (variable, default, text) in OPTIONS.items():
        parser.add_argument(flag(name), help=f"{text}; default: {variable}, or {default}")


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def node_of(args: argparse.Namespace) -> Node:
    """Return the node that the options describe. An option that is not given takes its variable or its default.

    Raises:
        UserError: a number out of its range, a malformed host, or an address missing on several nodes.
    """
    given = {
        name: os.environ.get(variable, default) if getattr(args, name) is None else getattr(args, name)
        for name, (variable, default, _) in OPTIONS.items()
    }
    if given["ranks"] in ("auto", "gpu"):
        several = "," in os.environ.get("CUDA_VISIBLE_DEVICES", ",")  # counting takes seconds, and one GPU needs none
        given["ranks"] = str(visible_gpus() or 1) if several else "1"
    if given["port"] == "auto":
        given["port"] = str(free_port() if given["nodes"] == "1" else DEFAULT_PORT)
    for name, (low, high) in RANGES.items():
        text = given[name]
        if not (text.isascii() and text.isdecimal() and low <= int(text) <= high):
            raise UserError(f"{flag(name)} {text!r}: expected a whole number, {low} to {high}")
    nodes, number, ranks, port = (int(given[name]) for name in ("nodes", "node_rank", "ranks", "port"))
    if number >= nodes:
        raise UserError(f"--node-rank {number}: nodes are numbered from 0 to {nodes - 1}")
    if not valid_host(given["address"]):
        raise UserError(f"--address {given['address']!r}: expected a host name or an IP address")
    return Node(nodes, number, ranks, given["address"], port)


def main(train: Sequence[str], arguments: list[str], description: str | None = None) -> int:
    """Start the command ``train`` once for each rank of this node, and return the exit code.

    Arguments that are not options of the node go to ``train``.
    """
    with listening():  # a signal that comes while the arguments are read counts too
        try:
            node, rest = read_arguments(arguments, description)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return run_node(node, [*train, *rest])


def read_arguments(arguments: list[str], description: str | None = None) -> tuple[Node, list[str]]:
    """Return the node, and the arguments for the command that the node starts."""
    parser = Parser(description=description)
    add_node_options(parser)
    args, rest = parser.parse_known_args(arguments)
    return node_of(args), rest
