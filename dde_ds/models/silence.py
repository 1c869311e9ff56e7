"""Keep the model libraries' log lines off the terminal.

This project itself raises errors for the conditions that matter to a run.
"""

from __future__ import annotations

import logging
import warnings


def silence_libraries() -> None:
    """Show only errors of diffusers, transformers, bitsandbytes and DeepSpeed, and no progress bars of diffusers and
    transformers.

    DeepSpeed is silenced only if it has been imported already.
    """
    # Before the imports: on a CPU, bitsandbytes logs at its import which kernels it lacks.
    for library in ("DeepSpeed", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)

    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
