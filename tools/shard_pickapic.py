"""Turn preference pairs into shards of VAE latents and text embeddings.

    python tools/shard_pickapic.py --input 'pickapic_v2/data/train-*.parquet' --model stabilityai/stable-diffusion-xl-base-1.0 \\
        --output shards/sdxl

Keeps the decided pairs (label_0 is 1 or 0), winner first. May be stopped and started again: shards that are whole are kept.
With many GPUs: `deepspeed launchers/encode.py` and the same options. tools/README.md is the guide.
"""

from __future__ import annotations

import sys

from dde_ds.data.sharding import parser, run

if __name__ == "__main__":
    sys.exit(run(parser(__doc__).parse_args()))
