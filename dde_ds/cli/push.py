"""``dde-ds push``: upload an export to the Hugging Face hub."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from dde_ds.push import push

OPTIONS = frozenset(inspect.signature(push).parameters)


def add_commands(commands: Any) -> None:
    upload = commands.add_parser("push", help="upload an export to the Hugging Face hub, with a complete model card")
    upload.add_argument("folder", type=Path, help="diffusers folder or folder of adapters from dde-ds export, or a run folder")
    upload.add_argument("repo", help="OWNER/NAME on the hub; made where it is not there")
    upload.add_argument("--license", metavar="ID", help="the hub's name of the licence, which is the base's; needed")
    upload.add_argument("--license-name", metavar="NAME", help="of a licence that has no id: with --license other")
    upload.add_argument("--license-link", metavar="URL", help="likewise")
    upload.add_argument("--base-model", metavar="HUB_ID", help="default: the export's, where that is a hub id")
    upload.add_argument("--datasets", nargs="+", default=[], metavar="HUB_ID", help="data sets that the pairs came from")
    upload.add_argument("--tags", nargs="+", default=[], metavar="TAG", help="beside those of the export")
    upload.add_argument("--comparison", type=Path, help="folder of dde-ds evaluate or compare: its results go into the card")
    upload.add_argument("--model", metavar="NAME", help="the export's name in the comparison; needed where it compares several")
    upload.add_argument("--pictures", type=int, default=4, help="how many prompts are shown; 0 shows none")
    upload.add_argument("--private", action="store_true", help="only into a repository that others cannot see")
    upload.add_argument("--branch", help="default: main; made where it is not there")
    upload.add_argument("--message", help="of the commit")
    upload.add_argument("--dry-run", action="store_true", help="print the card and the files, and upload nothing")
    upload.set_defaults(act=lambda args: push(**{name: value for name, value in vars(args).items() if name in OPTIONS}))
