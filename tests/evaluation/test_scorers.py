"""Each scorer against its published formula, written here once more, on random weights of the true architecture."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import CLIPModel

from dde_ds.errors import UserError
from dde_ds.evaluation.scorers import CLIP_DEVIATION, CLIP_MEAN, build_scorers, hps_pixels
from tests.support.pipelines import make_tokenizer
from tests.support.scorers import SIDE, open_clip, save_aesthetic, save_clip, save_hps, save_processor

CPU = torch.device("cpu")
PROMPTS = ["red fire", "a dagger in the snow", "red fire", "penguin"]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    random = np.random.Generator(np.random.Philox(key=7))
    sizes = ((64, 64), (48, 96), (96, 48), (SIDE, SIDE))
    # Coarse blocks: noise would be gone after the scaling.
    return [
        Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC) for size in sizes
    ]


def clip_pixels(image: Image.Image) -> torch.Tensor:
    """CLIP's own preprocessing by PIL: short side to 32, bicubic, the centre's square, normalised."""
    width, height = image.size
    short = min(width, height)
    image = image.resize((SIDE * width // short, SIDE * height // short), Image.Resampling.BICUBIC)
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    square = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float64) / 255
    return torch.from_numpy((square - CLIP_MEAN) / CLIP_DEVIATION).permute(2, 0, 1)


def tokens_of(prompt: str) -> torch.Tensor:
    return torch.tensor([make_tokenizer()(prompt, truncation=True)["input_ids"]])


def cosines(folder, images) -> tuple[list[float], float]:
    """cos of the two projected embeddings one by one in float64, from the towers and projections themselves; and exp(logit scale)."""
    model = CLIPModel.from_pretrained(folder).double().eval()
    found = []
    with torch.no_grad():
        for image, prompt in zip(images, PROMPTS, strict=True):
            vision = model.visual_projection(model.vision_model(clip_pixels(image)[None]).pooler_output)[0]
            text = model.text_projection(model.text_model(tokens_of(prompt)).pooler_output)[0]
            found.append(float(vision @ text / (vision.norm() * text.norm())))
        return found, float(model.logit_scale.exp())


def test_clip_score(tmp_path, images):
    folder = save_clip(tmp_path / "clip")
    (scorer,) = build_scorers([f"clip={folder}"], CPU)
    expected, _ = cosines(folder, images)
    assert scorer.score(images, PROMPTS).tolist() == pytest.approx([100 * max(c, 0.0) for c in expected], abs=1e-3)
    assert len({round(c, 3) for c in expected}) == 4, "a model that tells nothing apart would pass as well"
    assert min(expected) < 0 < max(expected), "both sides of the clamp"


def test_pickscore_takes_its_processor_from_elsewhere(tmp_path, images):
    folder, processor = save_clip(tmp_path / "pickscore", processor=False), save_processor(tmp_path / "processor")
    (scorer,) = build_scorers([f"pickscore={folder},{processor}"], CPU)
    expected, scale = cosines(folder, images)
    assert scale == pytest.approx(1 / 0.07, rel=1e-2)
    assert scorer.score(images, PROMPTS).tolist() == pytest.approx([scale * c for c in expected], abs=1e-3)


def test_hps_is_open_clip_under_other_names(tmp_path, images):
    weights, processor = save_hps(tmp_path)
    (scorer,) = build_scorers([f"hps_v2.1={weights},{processor}"], CPU)
    model = open_clip().double()
    expected = []
    with torch.no_grad():
        for image, prompt in zip(images, PROMPTS, strict=True):
            tokens = tokens_of(prompt)
            pixels = hps_pixels(image, SIDE).double()
            expected.append(100 * float(model(pixels[None], tokens, torch.tensor([tokens.shape[1] - 1]))))
    assert scorer.score(images, PROMPTS).tolist() == pytest.approx(expected, abs=1e-3)
    assert len({round(c, 2) for c in expected}) == 4


@pytest.mark.parametrize("version", [1, 2])
def test_aesthetic_is_a_head_on_the_normalised_embedding(tmp_path, images, version):
    folder = save_aesthetic(tmp_path / "aesthetic", version)
    (scorer,) = build_scorers([f"aesthetic={folder}"], CPU)
    vision = CLIPModel.from_pretrained(folder / "clip").double().eval()
    weights = {name: value.double() for name, value in safetensors.torch.load_file(folder / "model.safetensors").items()}
    expected = []
    with torch.no_grad():
        for image in images:
            x = vision.visual_projection(vision.vision_model(clip_pixels(image)[None]).pooler_output)[0]
            x = x / x.norm()
            for name in ["predictor"] if version == 1 else [f"layers.{number}" for number in (0, 2, 4, 6, 7)]:
                x = weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]
            expected.append(float(x))
    assert scorer.score(images, PROMPTS).tolist() == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 4) for value in expected}) == 4
    assert torch.equal(scorer.score(images, PROMPTS), scorer.score(images, PROMPTS[::-1])), "the prompt does not count"

    safetensors.torch.save_file({"layers.3.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"no linear aesthetic predictor: its head is layers\.3"):
        build_scorers([f"aesthetic={folder}"], CPU)[0].score(images, PROMPTS)


def test_hps_pixels_pad_and_do_not_crop():
    white = Image.new("RGB", (64, 32), "white")
    pixels = hps_pixels(white, SIDE) * torch.tensor(CLIP_DEVIATION).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)
    expected = torch.zeros(3, SIDE, SIDE)
    expected[:, 8:24] = 1
    assert torch.allclose(pixels, expected, atol=1e-5)


def test_html_entities_are_what_they_stand_for(tmp_path, images):
    weights, processor = save_hps(tmp_path)
    (scorer,) = build_scorers([f"hps_v2.1={weights},{processor}"], CPU)
    plain, escaped = (scorer.score(images[:1], [text]) for text in ("a-b", "a&amp;#45;b"))
    assert torch.equal(plain, escaped)


def test_a_scores_neighbours_do_not_matter(tmp_path, images):
    (scorer,) = build_scorers([f"clip={save_clip(tmp_path / 'clip')}"], CPU)
    alone = torch.cat([scorer.score([image], [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)])
    assert torch.allclose(scorer.score(images, PROMPTS), alone, atol=1e-4)


def test_the_digest_is_that_of_weights_processor_and_kind(tmp_path):
    save_clip(tmp_path / "a")
    save_clip(tmp_path / "b", seed=1)
    (tmp_path / "a" / "README.md").write_text("a file that does not matter")

    def digest(*specification: str) -> str:
        return build_scorers(specification, CPU)[0].digest

    first = digest(f"clip={tmp_path / 'a'}")
    assert first == digest(f"clip={save_clip(tmp_path / 'a again')}")
    assert first != digest(f"clip={tmp_path / 'b'}")
    assert first != digest(f"pickscore={tmp_path / 'a'}")
    config = tmp_path / "a" / "preprocessor_config.json"
    config.write_text(config.read_text().replace('"resample": 3', '"resample": 2'))
    assert first != digest(f"clip={tmp_path / 'a'}")


class Payload:
    def __reduce__(self):
        return (open, ("/tmp/never-written-by-a-checkpoint", "w"))


def test_what_cannot_be_loaded(tmp_path):
    weights, processor = save_hps(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    bare = save_clip(tmp_path / "bare", processor=False)
    for specification, named in (
        ("hsp_v2", "did you mean 'hps_v2'"),
        (f"clip={empty}", r"holds no model\*.safetensors"),
        (f"clip={bare}", "name its processor"),
        ("clip=/nowhere/clip", "no such file or folder"),
        (f"hps_v2={empty}", "holds no HPS_v2_compressed.pt"),
        (f"hps_v2={weights},{bare / 'nothing'}", "no such file or folder"),
    ):
        with pytest.raises(UserError, match=named):
            build_scorers([specification], CPU)
    with pytest.raises(UserError, match="given twice"):
        build_scorers([f"clip={bare},{processor}"] * 2, CPU)

    picture = [Image.new("RGB", (SIDE, SIDE))]
    torch.save({"state_dict": Payload()}, weights)
    with pytest.raises(UserError, match="not loadable as plain weights"):
        build_scorers([f"hps_v2.1={weights},{processor}"], CPU)[0].score(picture, ["fire"])
    torch.save({"state_dict": {"visual.conv1.weight": torch.zeros(2, 3, 4, 4)}}, weights)
    with pytest.raises(UserError, match="does not hold the weights of"):
        build_scorers([f"hps_v2.1={weights},{processor}"], CPU)[0].score(picture, ["fire"])
