"""The command ``dde-ds``: the whole job from a shell. Only this package knows flags; the packages below it do the work.

Each module is imported when it is first needed. So ``dde-ds train`` listens for requests to stop before any slow import.
"""

from __future__ import annotations

import sys
from typing import NoReturn


def command() -> NoReturn:
    """Run the command ``dde-ds`` and end this process with its exit code."""
    if next((word for word in sys.argv[1:] if not word.startswith("-")), None) == "train":
        from dde_ds.training.signals import listen

        listen()
    from dde_ds.distributed.process import end_process

    end_process(main())


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: the words after ``dde-ds``. None takes those that this process was started with.
    """
    from dde_ds.cli.commands import run

    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except BrokenPipeError:
        from dde_ds.cli.reporting import unread, write_nowhere

        if not (outputs := unread()):
            raise
        write_nowhere(outputs)
        return 141  # as a shell calls the end by SIGPIPE
