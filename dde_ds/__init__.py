"""Aligns text-to-image diffusion models with human preference pairs by Denoised Distribution Estimation (arXiv 2411.14871).

The names below are the public API. They are imported on first use, so that ``import dde_ds`` pulls in neither torch nor
DeepSpeed.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "NoiseSchedule": "dde_ds.objective.schedule",
    "Objective": "dde_ds.objective.objective",
    "ObjectiveOutput": "dde_ds.objective.objective",
    "build_objective": "dde_ds.objective.objective",
    "RunConfig": "dde_ds.config",
    "load_config": "dde_ds.config",
    "UserError": "dde_ds.errors",
    "initialize": "dde_ds.engine.zero",
    "train": "dde_ds.training.loop",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'dde_ds' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
