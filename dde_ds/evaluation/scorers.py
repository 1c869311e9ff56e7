"""Scorers of images: how well an image fits its prompt, or how much people would like it.

clip       100 max(cos, 0) of CLIP's embeddings of image and prompt (arXiv 2104.08718, times 100 instead of 2.5)
pickscore  exp(logit scale) · cos of a CLIP that was tuned on Pick-a-Pic (arXiv 2305.01569)
hps_v2     100 cos of a CLIP that was tuned on HPD v2 (arXiv 2306.09341), in the unit of the tables of its benchmark
hps_v2.1   the same with the weights of 2024; it has another scale, so do not compare it with hps_v2
aesthetic  LAION's predictor: a head on CLIP's embedding of the image, tuned on people's marks from 1 to 10; it ignores the prompt
inception  the Inception Score of the whole set of images, not of one image (:mod:`.inception`)
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dde_ds.errors import UserError, nearest
from dde_ds.evaluation import clip_loading as files
from dde_ds.evaluation.inception import NAME as INCEPTION
from dde_ds.evaluation.inception import InceptionScorer
from dde_ds.evaluation.user_scorer import UserScorer
from dde_ds.user_file import split_name


class Scorer(Protocol):
    name: str
    digest: str
    """SHA-256 of weights, processors and formula. Scores with different digests cannot be compared."""

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Score N images, each with its prompt: (N,) float64 on the CPU; higher is better. The first call loads the model."""
        ...


@dataclass(frozen=True)
class Kind:
    model: str
    processor: str | None
    """The folder or hub id of the processor. None takes the model's own."""
    weights: str | None = None
    """The name of the weights file, for weights of open_clip. Then the processor comes with the architecture's config.json."""


LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
KINDS = {
    "clip": Kind("openai/clip-vit-large-patch14", None),
    "pickscore": Kind("yuvalkirstain/PickScore_v1", LAION_H),
    "hps_v2": Kind("xswu/HPSv2", LAION_H, "HPS_v2_compressed.pt"),
    "hps_v2.1": Kind("xswu/HPSv2", LAION_H, "HPS_v2.1_compressed.pt"),
    "aesthetic": Kind("shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE", None),
}


def build_scorers(specifications: Sequence[str], device: torch.device) -> list[Scorer | InceptionScorer]:
    """Return the scorers of specifications ``NAME[=MODEL[,PROCESSOR]]`` or ``FILE.py:NAME``.

    The second kind executes the user's own file. For the first, this finds and digests the scorers' files, but does not load their models yet.

    Raises:
        UserError: a name is unknown or given twice, or files are missing.
    """
    scorers: dict[str, Scorer | InceptionScorer] = {}
    for specification in specifications:
        own = split_name(specification)
        name, _, sources = (own[1], "", "") if own else specification.partition("=")
        if own and name in (*KINDS, INCEPTION):
            raise UserError(f"scorers {specification}: {name} is the name of a scorer of the project; give the class another name")
        if not own and split_name(name):
            raise UserError(
                f"scorers {specification}: a scorer of your own file takes nothing after '='; let the file name its model"
            )
        if not own and name not in (*KINDS, INCEPTION):
            raise UserError(f"scorers {name!r}{nearest(name, (*KINDS, INCEPTION))}")
        if name in scorers:
            raise UserError(f"scorers: {name} is given twice")
        if own:
            scorers[name] = UserScorer(*own, device)
            continue
        if name == INCEPTION:
            scorers[name] = InceptionScorer(sources or None, device)
            continue
        model, _, processor = (sources, "", "") if Path(sources).expanduser().exists() else sources.partition(",")
        kind = OpenClipScorer if KINDS[name].weights else AestheticScorer if name == "aesthetic" else ClipScorer
        scorers[name] = kind(name, model or None, processor or None, device)
    return list(scorers.values())


class ClipScorer:
    """``clip`` and ``pickscore``: transformers CLIP models, stored as safetensors."""

    def __init__(self, name: str, model: str | None, processor: str | None, device: torch.device):
        kind, self.name, self._key, self._device = KINDS[name], name, f"scorers {name}", device
        self._folder = files.resolve(model or kind.model, files.CONFIG + files.WEIGHTS + files.PROCESSOR, self._key)
        if not self._folder.is_dir():
            raise UserError(f"{self._key} {self._folder}: is a file, expected the folder of a transformers CLIP model")
        files.require(self._folder, ("model*.safetensors",), self._key, "save the model with save_pretrained")
        self._processor = self._folder
        has_processor = (self._folder / "preprocessor_config.json").is_file()
        if source := processor or (None if has_processor else kind.processor):
            self._processor = files.resolve(source, files.PROCESSOR, self._key)
        files.require(self._processor, files.PROCESSOR[:2], self._key, "name its processor: NAME=MODEL,PROCESSOR")
        weights = files.files_digest(self._folder, files.CONFIG + files.WEIGHTS)
        self.digest = files.scorer_digest(name, weights, files.files_digest(self._processor, files.PROCESSOR))
        self._loaded: tuple[Any, Any, Any] | None = None

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        if self._loaded is None:
            model = files.load_clip(self._folder, self._key).to(self._device)
            self._loaded = (model, *files.load_processors(self._processor, self._key))
        model, tokenizer, processor = self._loaded
        pixels = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
        cosine = _cosine(model, tokenizer, pixels.to(self._device), prompts)
        if self.name == "pickscore":
            return cosine * model.logit_scale.double().exp().cpu()
        return 100 * cosine.clamp_min(0)


class AestheticScorer(ClipScorer):
    """``aesthetic``: the vision half of a transformers CLIP and the head, in one safetensors."""

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        if self._loaded is None:
            vision, head = files.load_aesthetic(self._folder, self._key)
            self._loaded = (vision.to(self._device), head.to(self._device), files.load_image_processor(self._processor, self._key))
        vision, head, processor = self._loaded
        pixels = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
        embedding = vision(pixel_values=pixels.to(self._device)).image_embeds
        return head(F.normalize(embedding, dim=1))[:, 0].double().cpu()


class OpenClipScorer:
    """``hps_v2`` and ``hps_v2.1``: open_clip weights in one file, tokenizer and architecture from elsewhere."""

    def __init__(self, name: str, model: str | None, processor: str | None, device: torch.device):
        kind, self.name, self._key, self._device = KINDS[name], name, f"scorers {name}", device
        assert kind.weights and kind.processor  # open_clip's weights come without a processor
        source = files.resolve(model or kind.model, (kind.weights,), self._key)
        self._weights = source if source.is_file() else source / kind.weights
        if not self._weights.is_file():
            raise UserError(f"{self._key} {source}: holds no {kind.weights}; name the file itself if it is called otherwise")
        needed = files.CONFIG + files.TOKENIZER
        self._folder = files.resolve(processor or kind.processor, needed, self._key)
        files.require(self._folder, files.CONFIG, self._key, "its processor must carry the architecture's config.json")
        self.digest = files.scorer_digest(name, files.files_digest(self._weights, ()), files.files_digest(self._folder, needed))
        self._loaded: tuple[Any, Any] | None = None

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        if self._loaded is None:
            from transformers import CLIPTokenizer

            model = files.load_open_clip(self._weights, self._folder, self._key).to(self._device)
            self._loaded = model, CLIPTokenizer.from_pretrained(self._folder)
        model, tokenizer = self._loaded
        side = model.config.vision_config.image_size
        pixels = torch.stack([hps_pixels(image, side) for image in images])
        # open_clip's tokenizer replaces HTML entities by their characters, twice.
        texts = [html.unescape(html.unescape(prompt)) for prompt in prompts]
        return 100 * _cosine(model, tokenizer, pixels.to(self._device), texts)


def hps_pixels(image: Image.Image, side: int) -> Tensor:
    """Return an image as HPS v2 sees it, (3,side,side) float32.

    The longest side is scaled to ``side``, and the image is centred on black. It is scaled as a tensor, bicubic and with
    antialiasing, as the package of HPS v2 does with torchvision 0.17 and newer.
    """
    pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32).copy()).permute(2, 0, 1) / 255
    height, width = pixels.shape[1:]
    scale = side / max(height, width)
    if scale != 1:
        size = (round(height * scale), round(width * scale))
        pixels = F.interpolate(pixels[None], size, mode="bicubic", align_corners=False, antialias=True)[0]
        rows, columns = side - size[0], side - size[1]
        pixels = F.pad(pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_DEVIATION))
    return (pixels - mean) / deviation


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def _cosine(model: Any, tokenizer: Any, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the cosines of images and their prompts, (N,) float64 on the CPU. Each distinct prompt is embedded once."""
    distinct = list(dict.fromkeys(prompts))
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(distinct, padding=True, truncation=True, max_length=length, return_tensors="pt").to(pixels.device)
    text = _features(model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]))
    vision = _features(model.get_image_features(pixel_values=pixels))
    row = {prompt: number for number, prompt in enumerate(distinct)}
    return F.cosine_similarity(vision, text[[row[prompt] for prompt in prompts]], dim=1).cpu()


def _features(output: Any) -> Tensor:
    """Return the projected embeddings in float64. Early releases of transformers 5 give a tensor, later ones an output object."""
    return (output if isinstance(output, Tensor) else output.pooler_output).double()
