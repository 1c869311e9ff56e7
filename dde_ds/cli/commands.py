"""Align text-to-image diffusion models with preference pairs: make shards, plan, train, export, evaluate."""

from __future__ import annotations

from typing import Any

from dde_ds.cli import (
    demo,
    doctor,
    evaluate,
    explain,
    export,
    inspect_shards,
    plan,
    push,
    recipe,
    relabel,
    shard,
    suggest_beta,
    train,
    validate,
    verify_shards,
)
from dde_ds.cli.parsing import Parser, options_of
from dde_ds.cli.reporting import report_errors

COMMANDS = (
    train,
    demo,
    recipe,
    shard,
    relabel,
    verify_shards,
    inspect_shards,
    validate,
    plan,
    explain,
    suggest_beta,
    export,
    doctor,
    evaluate,
    push,
)


def run(arguments: list[str]) -> int:
    """Parse and run one command, and return its exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments from one stretch of words only. Overrides that stand behind an option are left over.
    may_be_left = args.command == "train"  # for train, the configuration is one of the overrides and has no "="
    if unknown := [
        word for word in rest if not hasattr(args, "overrides") or word.startswith("-") or not ("=" in word or may_be_left)
    ]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    # A command for one process must not read the launcher's variables, because only some of them may be set.
    how: dict[str, Any] = (
        {"over_ranks": False} | getattr(args, "report", {}) | ({"over_ranks": False} if getattr(args, "alone", False) else {})
    )
    return report_errors(lambda: args.act(args), options=args.options, **how)


def build_parser() -> Parser:
    parser = Parser(prog="dde-ds", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for module in COMMANDS:
        module.add_commands(commands)
    for command in commands.choices.values():
        command.set_defaults(options=options_of(command))
    return parser
