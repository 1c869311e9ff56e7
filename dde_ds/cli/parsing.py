"""The argument parser of all commands, and the names of their options in messages."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

from dde_ds import __version__


class Parser(argparse.ArgumentParser):
    """Takes options by their whole names alone, and what the deepspeed launcher adds."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.add_argument("--version", action="version", version=f"dde_ds {__version__}")
        self.add_argument("--local_rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def options_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the options of a parser by the names of their Python arguments: ``{"max_shard_size": "--max-shard-size", …}``."""
    named = [action for action in parser._actions if action.option_strings]
    return {action.dest: max(action.option_strings, key=len) for action in named}


def with_options(message: str, options: Mapping[str, str]) -> str:
    """Name options as they are typed. Functions below the command line name their arguments: they know of no options.

    ``prompts p.txt: no such file`` becomes ``--prompts p.txt: no such file``. An argument is what a message begins with, or a word
    with an underscore anywhere in it.
    """
    first = re.match(r"([a-z]\w*)(?: and ([a-z]\w*))?(?=[ :])", message)
    if first and first[1] in options:
        words = [options.get(word, word) for word in first.groups() if word]
        message = " and ".join(words) + message[first.end() :]
    return re.sub(r"(?<![\w./-])[a-z]+(?:_[a-z]+)+(?![\w./=-])", lambda word: options.get(word[0], word[0]), message)
