"""Start the ranks of one node, for example in a container, and end with their exit code.

    python launchers/node.py --config launchers/recipes/sdxl_dde.yaml --resume auto output=runs/first
    python launchers/node.py --nodes 2 --node-rank 1 --address node0 --config …

Options that are not listed below go to launchers/train.py. The ranks of a node live and end together. TERM, INT and USR1 reach all of
them as a request to stop. A rank that crashes ends the others too, and no rank outlives this process. The exit code 75 (stopped and
resumable) is passed on; torchrun turns it into 1, and the deepspeed launcher loses it when it gets TERM itself.

Defaults come from PET_NNODES, PET_NODE_RANK, PET_NPROC_PER_NODE, PET_MASTER_ADDR and PET_MASTER_PORT, as Kubeflow Trainer sets them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dde_ds.cli.node import main

if __name__ == "__main__":
    sys.exit(main([sys.executable, str(Path(__file__).with_name("train.py"))], sys.argv[1:], __doc__))
