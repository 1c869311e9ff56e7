"""tools/shard_pickapic.py on many GPUs: each rank makes its own shards, and none waits for another.

    deepspeed --hostfile hosts launchers/encode.py --input 'pickapic_v2/data/train-*.parquet' \\
        --model stabilityai/stable-diffusion-xl-base-1.0 --output /shared/shards/sdxl

The output must be a folder that every node sees. The rank that ends last writes the manifest. A killed or failed run is started
again with the same options, at any number of ranks.
"""

from __future__ import annotations

import argparse
import sys

from dde_ds.data.sharding import parser, run
from dde_ds.distributed import read_environment
from dde_ds.errors import UserError

if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    args = options.parse_args()
    try:
        ranks = read_environment()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(run(args, ranks.rank, ranks.world, ranks.local_rank))
