"""Turn preference pairs into shards on many GPUs: ``dde-ds shard`` as one rank, for launchers that start a script.

    deepspeed --hostfile hosts launchers/encode.py --input 'pickapic_v2/data/train-*.parquet' \\
        --model stabilityai/stable-diffusion-xl-base-1.0 --output /shared/shards/sdxl

Each rank makes its own shards and waits for no other rank. The output must be a folder that every node sees. The rank that ends
last writes the manifest. After a kill or a failure, start the run again with the same options, on any number of ranks.
"""

from __future__ import annotations

import sys

from dde_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["shard", *sys.argv[1:]]))
