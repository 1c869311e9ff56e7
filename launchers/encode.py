"""tools/shard_pickapic.py on many GPUs: each rank makes its own shards, and none waits for another. The same as ``dde-ds shard``.

    deepspeed --hostfile hosts launchers/encode.py --input 'pickapic_v2/data/train-*.parquet' \\
        --model stabilityai/stable-diffusion-xl-base-1.0 --output /shared/shards/sdxl

The output must be a folder that every node sees. The rank that ends last writes the manifest. A killed or failed run is started
again with the same options, at any number of ranks.
"""

from __future__ import annotations

import sys

from dde_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["shard", *sys.argv[1:]]))
