"""Make random weights of InceptionV3 in the layout of the published weights, and images for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

# The architecture of the graph of 2015. For every convolution: channels in, channels out, and the kernel's height and width.
STEM = {
    "Conv2d_1a_3x3": (3, 32, 3, 3),
    "Conv2d_2a_3x3": (32, 32, 3, 3),
    "Conv2d_2b_3x3": (32, 64, 3, 3),
    "Conv2d_3b_1x1": (64, 80, 1, 1),
    "Conv2d_4a_3x3": (80, 192, 3, 3),
}


def layers() -> dict[str, tuple[int, int, int, int]]:
    shapes = dict(STEM)
    for block, channels, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        shapes |= _named(block, channels, {
            "1x1": [(64, 1, 1)], "5x5": [(48, 1, 1), (64, 5, 5)], "3x3dbl": [(64, 1, 1), (96, 3, 3), (96, 3, 3)],
            "_pool": [(pool, 1, 1)],
        })  # fmt: skip
    shapes |= _named("6a", 288, {"3x3": [(384, 3, 3)], "3x3dbl": [(64, 1, 1), (96, 3, 3), (96, 3, 3)]})
    for block, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        shapes |= _named(block, 768, {
            "1x1": [(192, 1, 1)], "7x7": [(width, 1, 1), (width, 1, 7), (192, 7, 1)],
            "7x7dbl": [(width, 1, 1), (width, 7, 1), (width, 1, 7), (width, 7, 1), (192, 1, 7)], "_pool": [(192, 1, 1)],
        })  # fmt: skip
    shapes |= _named("7a", 768, {
        "3x3": [(192, 1, 1), (320, 3, 3)], "7x7x3": [(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)],
    })  # fmt: skip
    for block, channels in (("7b", 1280), ("7c", 2048)):
        shapes |= _named(block, channels, {"1x1": [(320, 1, 1)], "3x3": [(384, 1, 1)], "3x3dbl": [(448, 1, 1), (384, 3, 3)],
                                          "_pool": [(192, 1, 1)]})  # fmt: skip
        shapes[f"Mixed_{block}.branch3x3_1"] = shapes.pop(f"Mixed_{block}.branch3x3")
        for branch in ("3x3_2", "3x3dbl_3"):
            shapes |= {f"Mixed_{block}.branch{branch}a": (384, 384, 1, 3), f"Mixed_{block}.branch{branch}b": (384, 384, 3, 1)}
    return shapes


def _named(block: str, channels: int, branches: dict) -> dict[str, tuple[int, int, int, int]]:
    """Name the layers of a block. The layers of a branch follow each other, and are numbered if there are several."""
    shapes = {}
    for branch, steps in branches.items():
        into = channels
        for number, (out, height, width) in enumerate(steps, 1):
            shapes[f"Mixed_{block}.branch{branch}" + (f"_{number}" if len(steps) > 1 else "")] = (into, out, height, width)
            into = out
    return shapes


def save_inception(path: Path) -> Path:
    """Save random weights. They are the same on every machine, because NumPy draws them.

    Their size is such that an image has an effect on the logits.
    """
    random = np.random.Generator(np.random.Philox(key=3))

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.from_numpy((scale * random.standard_normal(shape)).astype(np.float32))

    weights = {}
    for name, (into, out, height, width) in layers().items():
        weights[f"{name}.conv.weight"] = normal(out, into, height, width, scale=(2 / (into * height * width)) ** 0.5)
        weights[f"{name}.bn.weight"] = 1 + normal(out, scale=0.1)
        weights[f"{name}.bn.bias"] = normal(out, scale=0.1)
        weights[f"{name}.bn.running_mean"] = normal(out, scale=0.1)
        weights[f"{name}.bn.running_var"] = 1 + normal(out, scale=0.1).abs()
        weights[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    weights |= {"fc.weight": normal(1008, 2048, scale=0.5), "fc.bias": normal(1008, scale=1.0)}
    torch.save(weights, path)
    return path


def picture(size: tuple[int, int], key: int = 7) -> Image.Image:
    """Return an image of coarse patches. Even a network of random weights can tell such images apart."""
    random = np.random.Generator(np.random.Philox(key=key))
    return Image.fromarray(random.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize(size, Image.Resampling.NEAREST)
