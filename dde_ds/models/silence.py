"""Keeps the model libraries' chatter off the terminal; warnings that matter to a run are raised by us as errors."""

from __future__ import annotations

import logging
import warnings


def silence_libraries() -> None:
    """Errors only from diffusers, transformers and bitsandbytes, and from DeepSpeed where it is imported already; no progress bars of theirs."""
    # Before the imports: bitsandbytes says at its own, of a CPU, which of its kernels it lacks.
    for library in ("DeepSpeed", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)

    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
