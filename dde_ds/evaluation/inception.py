"""The Inception Score (arXiv 1606.03498) of a whole set of images: exp(E KL(p(y|x) || p(y))), where y is InceptionV3's class.

The network is that of the original code, a TensorFlow graph of 2015 with 1008 outputs. Another InceptionV3 gives other scores. The
weights are those that torch-fidelity and pytorch-fid converted. Both packages import torchvision, which nothing else here needs. So
the forward pass is written once more here, and a test compares it with torch-fidelity's numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dde_ds.errors import UserError
from dde_ds.evaluation import clip_loading as files
from dde_ds.warn import reason

NAME = "inception"
SOURCE = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SIDE = 299
SPLITS = 10


class InceptionScorer:
    """Compute the features for the score of a set. A set's score has no pairs, no prompts and no win rate."""

    name = NAME

    def __init__(self, weights: str | None, device: torch.device):
        self._key, self._device = f"scorers {NAME}", device
        if not weights or not Path(weights).expanduser().is_file():
            raise UserError(
                f"{self._key} {weights or ''}: name the file of the weights, {NAME}=FILE; they are to be had from {SOURCE}"
            )
        self._file = Path(weights).expanduser()
        self.digest = files.scorer_digest(NAME, files.files_digest(self._file, ()))
        self._weights: dict[str, Tensor] | None = None

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the logits of N images, (N,1008) float32 on the CPU. They lack the bias, as in the original code."""
        if self._weights is None:
            self._weights = self._load()
        pixels = torch.cat([_resized(image) for image in images]).to(self._device)
        return _inception((pixels - 128) / 128, self._weights).cpu()

    def _load(self) -> dict[str, Tensor]:
        weights = files.read_weights(self._file, self._key)
        try:  # checks names and shapes alone, so that a later error of the GPU is not blamed on the file
            _inception(torch.empty(1, 3, SIDE, SIDE, device="meta"), {name: value.to("meta") for name, value in weights.items()})
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{self._key} {self._file}: not the weights of {SOURCE}: {reason(error)[:200]}") from None
        return {name: value.to(self._device) for name, value in weights.items()}


def inception_score(features: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """Return the mean and standard deviation of the score over ``splits`` parts of the set. ``features`` are logits (N,classes).

    Neighbours show the same prompt, so the set is shuffled before it is split. The shuffle and its seed are torch-fidelity's.
    """
    order = torch.from_numpy(np.random.RandomState(2020).permutation(len(features)))
    logs = features[order].double().log_softmax(1)
    scores = []
    for part in range(splits):
        part_logs = logs[part * len(logs) // splits : (part + 1) * len(logs) // splits]
        divergence = part_logs.exp() * (part_logs - part_logs.exp().mean(0, keepdim=True).log())
        scores.append(divergence.sum(1).mean().exp())
    return float(torch.stack(scores).mean()), float(torch.stack(scores).std(correction=0))


def _resized(image: Image.Image) -> Tensor:
    """Resize an image to (1,3,299,299) float32 in 0 … 255, bilinearly, as TensorFlow 1 did.

    Pixel i of n is taken from the place i·(old/n), without antialiasing.
    """
    pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32).copy()).permute(2, 0, 1)
    for dim in (1, 2):
        size = pixels.shape[dim]
        place = torch.arange(SIDE, dtype=torch.float32) * (size / SIDE)
        low = place.long()
        share = (place - low).view(-1, *[1] * (2 - dim))
        first, second = (pixels.index_select(dim, index) for index in (low, (low + 1).clamp_max(size - 1)))
        pixels = torch.lerp(first, second, share)
    return pixels[None]


def _inception(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Return the logits (N,1008), without the bias, of images (N,3,299,299) in [-1,1]. Layers are named as in ``weights``."""

    def unit(x: Tensor, name: str, stride: int = 1, padded: bool = True) -> Tensor:
        kernel = weights[f"{name}.conv.weight"]
        padding = tuple(side // 2 for side in kernel.shape[2:]) if padded else 0
        mean, var, weight, bias = (weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(F.conv2d(x, kernel, stride=stride, padding=padding), mean, var, weight, bias, eps=1e-3))

    def chain(x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = unit(x, name)
        return x

    def pooled(x: Tensor, name: str) -> Tensor:
        return unit(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), name)

    def halved(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2)

    def numbered(name: str, count: int) -> list[str]:
        return [f"{name}_{number}" for number in range(1, count + 1)]

    x = unit(unit(x, "Conv2d_1a_3x3", 2, padded=False), "Conv2d_2a_3x3", padded=False)
    x = halved(unit(x, "Conv2d_2b_3x3"))
    x = halved(unit(unit(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", padded=False))
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        fives, threes = chain(x, *numbered(f"{block}.branch5x5", 2)), chain(x, *numbered(f"{block}.branch3x3dbl", 3))
        x = torch.cat([unit(x, f"{block}.branch1x1"), fives, threes, pooled(x, f"{block}.branch_pool")], 1)
    threes = unit(chain(x, *numbered("Mixed_6a.branch3x3dbl", 2)), "Mixed_6a.branch3x3dbl_3", 2, padded=False)
    x = torch.cat([unit(x, "Mixed_6a.branch3x3", 2, padded=False), threes, halved(x)], 1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        short, long = chain(x, *numbered(f"{block}.branch7x7", 3)), chain(x, *numbered(f"{block}.branch7x7dbl", 5))
        x = torch.cat([unit(x, f"{block}.branch1x1"), short, long, pooled(x, f"{block}.branch_pool")], 1)
    threes = unit(unit(x, "Mixed_7a.branch3x3_1"), "Mixed_7a.branch3x3_2", 2, padded=False)
    sevens = unit(chain(x, *numbered("Mixed_7a.branch7x7x3", 3)), "Mixed_7a.branch7x7x3_4", 2, padded=False)
    x = torch.cat([threes, sevens, halved(x)], 1)
    for block in ("Mixed_7b", "Mixed_7c"):
        parts = [unit(x, f"{block}.branch1x1")]
        for branch, before, last in (("branch3x3", 1, "2"), ("branch3x3dbl", 2, "3")):
            stem = chain(x, *numbered(f"{block}.{branch}", before))
            parts += [unit(stem, f"{block}.{branch}_{last}{side}") for side in "ab"]
        # In its last block alone, the graph pools by the maximum here.
        last = unit(F.max_pool2d(x, 3, 1, 1), f"{block}.branch_pool") if block == "Mixed_7c" else pooled(x, f"{block}.branch_pool")
        x = torch.cat([*parts, last], 1)
    return x.mean((2, 3)) @ weights["fc.weight"].T
