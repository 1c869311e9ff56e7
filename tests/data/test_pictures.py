"""Pictures as people have them: lying on their side, cut out, in 16 bits, full of text. What is encoded is what a viewer shows."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dde_ds.models.encode import image_size, prepare_image

BLUE = (10, 20, 230)


def seen(data: bytes, side: int = 8, background=(255, 255, 255)) -> np.ndarray:
    """(side,side,3) uint8."""
    pixels = prepare_image(data, side, 1, background).pixels
    return ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def stored(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(depth: int, colour: int, row: bytes, *before, after=()) -> bytes:
    """8x8 pixels of equal rows, with chunks before and after their data."""
    header = struct.pack(">IIBBBBB", 8, 8, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *before, (b"IDAT", zlib.compress((b"\0" + row) * 8)), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in chunks)


def exif(orientation: int) -> Image.Exif:
    record = Image.Exif()
    record[0x0112] = orientation
    return record


RED_THEN_GREEN = bytes([255, 0, 0] * 4 + [0, 255, 0] * 4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_upright_whatever_the_orientation(kind):
    upright = np.zeros((8, 16, 3), dtype=np.uint8)
    upright[:4, :8] = 255  # white at the top left
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    # The array that is stored for the picture above to be seen, by the definition of the tag: where row 0 and column 0 are shown.
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }
    for orientation, array in turned.items():
        data = stored(Image.fromarray(np.ascontiguousarray(array)), kind, exif=exif(orientation), **options)
        prepared = prepare_image(data, 8)
        assert prepared.original_size == (8, 16)
        assert prepared.crop == (0, 4)
        expected = upright[:, 4:12].astype(int)
        assert np.abs(seen(data).astype(int) - expected).max() <= 2, orientation


def test_an_exif_record_that_is_none_turns_nothing():
    image = Image.fromarray(np.full((8, 8, 3), 200, np.uint8))
    for record in (b"Exif\0\0garbage!", b"Exif\0\0II*\0" + b"\xff" * 40, exif(9).tobytes()):
        assert (seen(stored(image, "PNG", exif=record)) == 200).all()


def test_an_exif_record_behind_the_pixels():
    data = png(8, 2, RED_THEN_GREEN, after=[(b"eXIf", exif(6).tobytes()[6:])])
    assert seen(data)[0, 0].tolist() == seen(data)[0, 7].tolist() == [255, 0, 0]
    assert seen(data)[7, 0].tolist() == [0, 255, 0]


def test_transparent_parts_lie_on_the_background():
    """Under them lies a red that nobody ever saw; the other half is opaque black, or red at half strength."""
    cut_out = np.zeros((8, 8, 4), dtype=np.uint8)
    cut_out[:, :4] = (255, 0, 0, 0)
    cut_out[:, 4:, 3] = 255
    image = Image.fromarray(cut_out)
    palette = [(b"PLTE", bytes([255, 0, 0, 0, 0, 0]))]
    indexes = bytes([0] * 4 + [1] * 4)
    for data in (
        stored(image, "PNG"),
        stored(image, "WEBP", lossless=True, exact=True),
        stored(image.convert("LA"), "PNG"),
        png(8, 3, indexes, *palette, (b"tRNS", b"\0")),
        png(8, 3, indexes, *palette, (b"tRNS", b"\0\xff")),
        png(8, 2, bytes([255, 0, 0] * 4 + [0, 0, 0] * 4), (b"tRNS", struct.pack(">HHH", 255, 0, 0))),
        png(16, 2, struct.pack(">24H", *[65535, 0, 0] * 4, *[0] * 12), (b"tRNS", struct.pack(">HHH", 65535, 0, 0))),
        png(16, 6, struct.pack(">32H", *[65535, 0, 0, 0] * 4, *[0, 0, 0, 65535] * 4)),
    ):
        assert seen(data)[0, [0, 7]].tolist() == [[255, 255, 255], [0, 0, 0]]
        assert seen(data, background=BLUE)[0, [0, 7]].tolist() == [list(BLUE), [0, 0, 0]]
    half = png(8, 3, indexes, *palette, (b"tRNS", b"\x80\xff"))
    assert seen(half)[0, 0].tolist() == [255, 127, 127]


def test_a_transparent_colour_of_sixteen_bits_is_that_colour_alone():
    """Others that share its upper bytes are opaque, also where the picture is to be turned and has text that PIL refuses."""
    row = struct.pack(">24H", *[1000, 2000, 3000] * 4, *[1001, 2000, 3000] * 2, *[1000, 2000, 3001] * 2)
    clear, turn = (b"tRNS", struct.pack(">HHH", 1000, 2000, 3000)), (b"eXIf", exif(3).tobytes()[6:])
    expected = [[255, 255, 255]] * 4 + [[3, 7, 11]] * 4
    assert seen(png(16, 2, row, clear))[0].tolist() == expected
    text = (b"zTXt", b"workflow\0\0" + zlib.compress(b"a" * 3_000_000))
    assert seen(png(16, 2, row, clear, text, turn))[0].tolist() == expected[::-1]


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_of_every_depth(depth):
    values = [2**depth - 1] * 4 + [0] * 4
    row = int("".join(f"{value:0{depth}b}" for value in values), 2).to_bytes(depth, "big")
    assert seen(png(depth, 0, row))[0, [0, 7]].tolist() == [[255] * 3, [0] * 3]
    clear = png(depth, 0, row, (b"tRNS", struct.pack(">H", 2**depth - 1)))
    assert seen(clear, background=BLUE)[0, [0, 7]].tolist() == [list(BLUE), [0] * 3]


def test_sixteen_bits_of_grey_are_scaled_to_eight():
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = seen(stored(Image.fromarray(ramp), "PNG"), 256)
    assert np.array_equal(found, np.repeat(np.round(ramp / 257).astype(np.uint8)[..., None], 3, 2))
    assert len(np.unique(found)) == 256


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"zTXt", b"workflow\0\0" + zlib.compress(b"a" * 3_000_000))],
        [(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(b"b" * 3_000_000))],
        [(b"tEXt", b"prompt\0" + b"c" * 900_000)] * 80,
        [(b"iCCP", b"profile\0\0" + zlib.compress(b"d" * 3_000_000))],
    ],
)
def test_text_is_ignored_however_much(chunks):
    assert (seen(png(8, 2, RED_THEN_GREEN, *chunks)) == seen(png(8, 2, RED_THEN_GREEN))).all()
    assert image_size(png(8, 2, RED_THEN_GREEN, *chunks)) == (8, 8)
    turned = png(8, 2, RED_THEN_GREEN, after=[*chunks, (b"eXIf", exif(6).tobytes()[6:])])
    assert seen(turned)[7, 0].tolist() == [0, 255, 0]


def test_the_first_frame_and_four_inks():
    image = Image.frombytes("RGB", (8, 8), RED_THEN_GREEN * 8)
    frames = {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}
    for data in (stored(image, "PNG", **frames), stored(image, "WEBP", lossless=True, **frames)):
        assert seen(data)[0, [0, 7]].tolist() == [[255, 0, 0], [0, 255, 0]]
    red = Image.new("RGB", (8, 8), (255, 0, 0)).convert("CMYK")
    assert np.abs(seen(stored(red, "JPEG", quality=100)).astype(int) - [255, 0, 0]).max() <= 2


def test_opaque_images_are_what_they_were():
    """To the bit: resized and cropped as PIL does, and an opaque alpha changes nothing."""
    random = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    image = Image.fromarray(random)
    expected = np.asarray(image.resize((16, 21), Image.Resampling.LANCZOS).crop((0, 2, 16, 18)))
    opaque = image.copy()
    opaque.putalpha(255)
    for data in (stored(image, "PNG"), stored(opaque, "PNG"), stored(image, "WEBP", lossless=True)):
        assert (seen(data, 16, BLUE) == expected).all()
