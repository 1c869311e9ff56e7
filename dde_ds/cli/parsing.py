"""The argument parser of all commands, and the replacement of argument names by options in messages."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from dde_ds import __version__
from dde_ds.text import printable, without_passwords


class Parser(argparse.ArgumentParser):
    """Accept options by their whole names only. Also accept ``--local_rank``, which the deepspeed launcher adds."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.add_argument("--version", action="version", version=f"dde_ds {__version__}")
        self.add_argument("--local_rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        """End with a line about the arguments, of which one may be a file's name that a glob found."""
        super().error(without_passwords(printable(message)))


def options_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return a parser's options by the names of their Python arguments: ``{"max_shard_size": "--max-shard-size", …}``."""
    named = [action for action in parser._actions if action.option_strings]
    return {action.dest: max(action.option_strings, key=len) for action in named}


def with_options(message: str, options: Mapping[str, str]) -> str:
    """Replace argument names in a message by the options that a user types.

    Functions below the command line know no options, so their messages name arguments. ``prompts p.txt: no such file`` becomes
    ``--prompts p.txt: no such file``. A word counts as an argument's name if it begins the message, or if it has an underscore.
    Words that are not in ``options`` stay.
    """
    first = re.match(r"([a-z]\w*)(?: and ([a-z]\w*))?(?=[ :])", message)
    if first and first[1] in options:
        words = [options.get(word, word) for word in first.groups() if word]
        message = " and ".join(words) + message[first.end() :]
    return re.sub(r"(?<![\w./-])[a-z]+(?:_[a-z]+)+(?![\w./=-])", lambda word: options.get(word[0], word[0]), message)
