"""Files that come with the project, found from any working directory."""

from __future__ import annotations

import re
from pathlib import Path

# Beside the package in a checkout, inside it where it was installed as a wheel.
_PACKAGE = Path(__file__).parent
_FOLDERS = (_PACKAGE / "ds_configs", _PACKAGE.parent / "ds_configs")


def deepspeed_file(name: str | Path) -> Path:
    """Return the DeepSpeed configuration that ``name`` means: a file that is there, or a shipped one, as ``ds_configs/zero2.json``,
    ``zero2.json`` or ``zero2``. What is neither is returned as it is."""
    shipped = re.fullmatch(r"(?:ds_configs/)?(\w+)(?:\.json)?", str(name))
    if shipped and not Path(name).is_file():
        for folder in _FOLDERS:
            if (folder / f"{shipped[1]}.json").is_file():
                return folder / f"{shipped[1]}.json"
    return Path(name)


def deepspeed_names() -> list[str]:
    """Return the names of the shipped DeepSpeed configurations, such as ``zero2``."""
    return sorted(path.stem for path in next((folder for folder in _FOLDERS if folder.is_dir()), _PACKAGE).glob("*.json"))
