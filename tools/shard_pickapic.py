"""Turn preference pairs into shards of VAE latents and text embeddings: ``dde-ds shard``, in this process alone.

    python tools/shard_pickapic.py --input 'pickapic_v2/data/train-*.parquet' --model stabilityai/stable-diffusion-xl-base-1.0 \\
        --output shards/sdxl

With many GPUs: `deepspeed launchers/encode.py` and the same options. tools/README.md is the guide.
"""

from __future__ import annotations

import sys

from dde_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["shard", "--alone", *sys.argv[1:]]))
