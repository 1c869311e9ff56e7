"""Save scorers' models as the published ones are saved. They have the true architecture, a reduced size and random weights."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from tests.support.pipelines import TOKENS, make_tokenizer

SIDE, PATCH = 32, 8


def config(tokens: int, quick: bool) -> CLIPConfig:
    common = {"num_hidden_layers": 2, "projection_dim": 12, "hidden_act": "quick_gelu" if quick else "gelu"}
    text = {"vocab_size": tokens, "hidden_size": 24, "intermediate_size": 96, "num_attention_heads": 3}
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH}
    tokenizer = make_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return CLIPConfig(
        text_config={**common, **text, **ends, "max_position_embeddings": TOKENS},
        vision_config={**common, **vision},
        projection_dim=12,
    )


def save_clip(folder: Path, seed: int = 0, processor: bool = True, quick: bool = True) -> Path:
    """Save a CLIPModel as safetensors, with its processor beside it if wanted."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = CLIPModel(config(len(tokenizer), quick))
    # Move away from the initialisation, at which all images look alike to the model.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8)
    model.save_pretrained(folder)
    if processor:
        save_processor(folder)
    return folder


def save_aesthetic(folder: Path, version: int = 2) -> Path:
    """Save the vision half of a CLIP with LAION's head, under the published names: ``AestheticsPredictorV2Linear``'s or V1's."""
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(save_clip(folder / "clip"))
    sizes = [12, 1] if version == 1 else [12, 1024, 128, 64, 16, 1]
    names = ["predictor"] if version == 1 else [f"layers.{number}" for number in (0, 2, 4, 6, 7)]
    weights = dict(model.state_dict()) | {"vision_model.embeddings.position_ids": torch.arange((SIDE // PATCH) ** 2 + 1)[None]}
    for name, into, out in zip(names, sizes[:-1], sizes[1:], strict=True):
        layer = nn.Linear(into, out)
        weights |= {f"{name}.{part}": value.detach().contiguous() for part, value in layer.state_dict().items()}
    model.config.save_pretrained(folder)
    safetensors.torch.save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    return save_processor(folder)


def save_processor(folder: Path) -> Path:
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    kind(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_hps(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Save weights in one file, as HPS v2's are, and a folder of its tokenizer and architecture. Return both."""
    model = open_clip(seed)
    processor = save_processor(folder / "processor")
    config(len(make_tokenizer()), quick=False).save_pretrained(processor)
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return folder / "HPS_v2.1_compressed.pt", processor


def open_clip(seed: int = 0) -> OpenClip:
    torch.manual_seed(seed)
    model = OpenClip(len(make_tokenizer())).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.25)
    return model


class Block(nn.Module):
    """A pre-norm transformer block under open_clip's names."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        linear = (("c_fc", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * width, width)))
        self.mlp = nn.Sequential(OrderedDict(linear))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Vision(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2, layers: int = 2, out: int = 12):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((SIDE // PATCH) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Blocks(width, heads, layers)
        self.proj = nn.Parameter(torch.empty(width, out))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """open_clip's CLIP, written from its paper and the names in its checkpoints."""

    def __init__(self, vocabulary: int, width: int = 24, heads: int = 3, layers: int = 2, out: int = 12):
        super().__init__()
        self.visual = Vision()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(TOKENS, width))
        self.transformer = Blocks(width, heads, layers)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, out))
        self.logit_scale = nn.Parameter(torch.empty(()))

    def forward(self, pixels: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
        """Return the cosine of image and text, (N,). ``ends`` are the places of the end-of-text token in the rows of ``tokens``."""
        length = tokens.shape[1]
        mask = torch.full((length, length), -torch.inf, dtype=self.text_projection.dtype).triu(1)
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding[:length], mask)
        text = self.ln_final(x)[torch.arange(len(tokens)), ends] @ self.text_projection
        return F.cosine_similarity(self.visual(pixels), text)
