"""The demo's judge: a small classifier of Noto and Twemoji images, trained on real images and never on the policy's."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn


class Judge(nn.Module):
    """Map images (N,3,64,64) in [-1,1] to logits (N,). A positive logit means Noto, the preferred vendor."""

    def __init__(self, width: int = 16):
        super().__init__()
        layers, channels = [], 3
        for size in (width, 2 * width, 4 * width):
            for stride in (2, 1):
                layers += [nn.Conv2d(channels, size, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(size), nn.ReLU()]
                channels = size
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, 1)

    def features(self, images: Tensor) -> Tensor:
        """Return the features in which the Fréchet distance is measured, (N,64)."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images)).squeeze(1)


def read_vendors(parquet: Path) -> tuple[Tensor, Tensor]:
    """Read the preferred and the other images of a parquet file's pairs, each (N,3,64,64) in [-1,1]."""
    sides: tuple[list, list] = ([], [])
    for row in pq.read_table(parquet, columns=["jpg_0", "jpg_1", "label_0"]).to_pylist():
        images = (row["jpg_0"], row["jpg_1"]) if row["label_0"] == 1 else (row["jpg_1"], row["jpg_0"])
        for side, data in zip(sides, images, strict=True):
            side.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    preferred, other = (torch.from_numpy(np.stack(side)).permute(0, 3, 1, 2).float() / 127.5 - 1 for side in sides)
    return preferred, other


def train_judge(preferred: Tensor, other: Tensor, steps: int = 600, batch: int = 64, seed: int = 0) -> Judge:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    images = torch.cat([preferred, other])
    labels = torch.cat([torch.ones(len(preferred)), torch.zeros(len(other))])
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(judge(_augment(images[chosen], generator)), labels[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(judge: Judge, preferred: Tensor, other: Tensor) -> float:
    return float(torch.cat([judge(preferred) > 0, judge(other) < 0]).float().mean())


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror and shift the images, and add a little noise.

    So the judge looks at the drawing, not at the traces of a file format or a decoder.
    """
    if torch.rand((), generator=generator) < 0.5:
        images = images.flip(3)
    images = images.roll(torch.randint(-3, 4, (2,), generator=generator).tolist(), dims=(2, 3))
    return images + 0.03 * torch.rand((), generator=generator) * torch.randn(images.shape, generator=generator)
