"""Keeps the model libraries' chatter off the terminal; warnings that matter to a run are raised by us as errors."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Errors only from diffusers, transformers and DeepSpeed; no progress bars of theirs."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
