"""Kinds of image: each decoded as PIL decodes and resizes it; and every image that cannot serve is named."""

import numpy as np
import pytest
from conftest import assert_says
from image_sets import as_dataset, encode, pixels_of, random_images, read, reference, store
from PIL import Image as PILImage

from ddpm_diffusers import data, image_decoding
from ddpm_diffusers.data import load_images
from ddpm_diffusers.image_decoding import decode_image, decode_images, size_of_all


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pixels_are_what_pil_decodes_and_resizes(mode, tmp_path):
    images = random_images(5, mode, (12, 12))
    source = store(images, tmp_path / "source")
    for channels in (1, 3):
        for resolution in (12, 7):
            decoded = load_images(**source, resolution=resolution, channels=channels)
            expected = reference(images, resolution, channels)
            np.testing.assert_array_equal(read(decoded, resolution, channels), expected)


def test_center_crop_takes_the_central_square_of_each(tmp_path):
    sizes = [(12, 8), (8, 15), (9, 9), (20, 21)]
    images = [random_images(1, size=size, seed=i)[0] for i, size in enumerate(sizes)]
    decoded = load_images(**store(images, tmp_path / "source"), resolution=8, center_crop=True)
    crops = [(0, 2, 8), (3, 0, 8), (0, 0, 9), (0, 0, 20)]  # top, left, side
    squares = [np.asarray(image)[t : t + s, x : x + s] for image, (t, x, s) in zip(images, crops, strict=True)]
    np.testing.assert_array_equal(read(decoded, 8), reference(map(PILImage.fromarray, squares), 8))


# kinds of image


def decode(image, channels=1):
    """One image of 8x8 as `load_images` decodes it, (C, H, W)."""
    table = as_dataset([image]).select_columns("image").with_format("arrow")[:]
    pixels = decode_images(table, [0], "image", 8, channels, (8, 8)).column("image")
    return pixels.to_numpy()[0].reshape(channels, 8, 8)


@pytest.mark.parametrize(("format", "dtype"), [("png", "<u2"), ("tiff", "<u2"), ("tiff", ">u2")])
def test_sixteen_bit_grey_is_scaled_not_clipped(format, dtype):
    values = np.linspace(0, 65535, 64).round().astype(dtype).reshape(8, 8)
    image = PILImage.frombytes("I;16B" if dtype == ">u2" else "I;16", (8, 8), values.tobytes())
    for channels in (1, 3):
        expected = np.broadcast_to(np.round(values / 65535 * 255), (channels, 8, 8))
        np.testing.assert_array_equal(decode(encode(image, format), channels), expected)


def test_the_transparent_value_of_sixteen_bit_grey_shows_black():
    values = np.linspace(0, 65535, 64).round().astype("<u2").reshape(8, 8)
    image = PILImage.frombytes("I;16", (8, 8), values.tobytes())
    decoded = decode(encode(image, transparency=int(values[7, 7])))  # white
    values[7, 7] = 0
    np.testing.assert_array_equal(decoded[0], np.round(values / 65535 * 255))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_show_black(mode):
    pixels = pixels_of((8, 8, len(mode)))
    pixels[:4, :, -1] = np.where(np.arange(8) < 4, 0, 255)  # wholly clear, and wholly opaque
    expected = pixels[..., :-1].astype(float) * pixels[..., -1:] / 255
    difference = decode(PILImage.fromarray(pixels), len(mode) - 1) - expected.transpose(2, 0, 1)
    assert np.abs(difference).max() <= 1 and not difference[:, :4].any()


@pytest.mark.parametrize("options", [{}, {"transparency": 5}])
def test_palette_images_are_looked_up(options):
    colours, indices = pixels_of((16, 3)), pixels_of((8, 8)) % 16
    palette = PILImage.fromarray(indices, "L")
    palette.putpalette(colours.tobytes())
    decoded = decode(encode(palette, **options), 3)
    if options:
        colours[5] = 0
    np.testing.assert_array_equal(decoded, colours[indices].transpose(2, 0, 1))


def test_bilevel_images_are_black_and_white():
    bits = pixels_of((8, 8)) > 127
    np.testing.assert_array_equal(decode(PILImage.fromarray(bits))[0], bits * 255)


def test_images_are_turned_as_their_exif_says():
    (image,) = random_images(1)
    exif = PILImage.Exif()
    exif[0x0112] = 6  # the camera was held on its side: a quarter turn clockwise shows it upright
    np.testing.assert_array_equal(decode(encode(image, exif=exif))[0], np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize(
    ("mode", "channels", "warned"),
    [
        ("RGB", 1, True),
        ("RGB", 3, False),
        ("RGBA", 1, True),
        ("P", 1, True),
        ("L", 1, False),
        ("grey as RGB", 1, False),
    ],
)
def test_colour_that_is_made_grey_is_told(mode, channels, warned, caplog, monkeypatch):
    monkeypatch.setattr(image_decoding.logger, "handlers", [caplog.handler])
    (image,) = random_images(1, "L" if mode in ("L", "grey as RGB") else "RGB")
    first = as_dataset([image.convert(mode.removeprefix("grey as "))]).with_format("arrow")[:].select(["image"])
    assert size_of_all(first, channels, center_crop=False) == (8, 8)
    assert ("are in colour and are made grey" in caplog.text) == warned


# images that cannot serve: the message names them and says what to do


@pytest.mark.parametrize(
    ("odd", "rows_at_a_time"),
    [((8, 10), 7), ((10, 10), 100)],  # the odd one in another chunk than the first, and in the same; also a square
)
def test_mixed_sizes(odd, rows_at_a_time, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK_BYTES", rows_at_a_time * 8 * 8)
    images = [*random_images(20), *random_images(1, size=odd), *random_images(1)]
    source = store(images, tmp_path / "source")
    with pytest.raises(ValueError) as error:
        load_images(**source, resolution=8)
    assert_says(error, ["Image 20 of the data set", f" is {odd[0]}x{odd[1]}; ", "the first is 8x8", "`center_crop`"])


def test_images_of_one_size_that_are_not_square(tmp_path):
    with pytest.raises(ValueError) as error:
        load_images(**store(random_images(2, size=(9, 8)), tmp_path / "source"), resolution=8)
    assert_says(error, ["Image 0 of the data set", " is 9x8; ", "square", "`center_crop`"])


@pytest.mark.parametrize("missing", [0, 2])  # the first is looked at before the others are decoded
def test_a_missing_image(missing, tmp_path):
    images = random_images(3)
    images[missing] = None
    source = store(images, tmp_path / "source")
    with pytest.raises(ValueError) as error:
        load_images(**source, resolution=8)
    assert_says(error, [f"Image {missing} ", "missing (null)", "remove the row"])


PNG = encode(random_images(1)[0])["bytes"]
DAMAGED = {
    "empty": b"",
    "text": b"no image",
    "in the header": PNG[:20],
    "in the pixels": PNG[:60],
    "at the end": PNG[:-30],
    "short header": PNG[:8] + b"\0\0\0\1" + PNG[12:],
    "65535x65535": b"GIF89a" + b"\xff" * 20,
}
NUMBERS = [PILImage.fromarray(np.zeros((8, 8), dtype)) for dtype in (np.int32, np.float32)]
UNUSABLE = {
    **{where: ({"bytes": content, "path": None}, ["cannot be decoded", "repair or remove it", "synthetic-fashion"])
       for where, content in DAMAGED.items()},
    **{image.mode: (encode(image, "tiff"), ["range is unknown", "8 bits", "convert"]) for image in NUMBERS},
    "without conversion": (encode(PILImage.new("LAB", (8, 8)), "tiff"), ["LAB", "convert it"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_image_that_cannot_be_used(kind):
    image, words = UNUSABLE[kind]
    with pytest.raises(ValueError) as error:
        decode(image)
    assert_says(error, ["Image 0 ", *words])


def test_damaged_images_are_named_together_up_to_ten(tmp_path):
    for count in (2, 30):
        images = [{"bytes": b"", "path": None} if 3 <= i < 3 + count else image
                  for i, image in enumerate(random_images(40))]  # fmt: skip
        with pytest.raises(ValueError) as error:
            load_images(**store(images, tmp_path / str(count)), resolution=8)
        lines = str(error.value).splitlines()
        assert [line.split(" cannot")[0] for line in lines] == [
            f"Image {3 + i} of the data set" for i in range(min(count, 10))
        ]


@pytest.mark.parametrize("format", ["png", "jpeg", "gif", "webp"])
def test_random_damage_gives_an_image_or_the_error_that_names_it(format):
    rng = np.random.default_rng(0)
    sound = encode(random_images(1, "RGB", (16, 16))[0], format)["bytes"]
    refused = 0
    for _ in range(200):
        damaged = np.frombuffer(sound, np.uint8).copy()
        damaged[rng.integers(len(damaged), size=8)] = rng.integers(0, 256, 8)
        try:
            decode_image({"bytes": damaged.tobytes()[: rng.integers(40, len(damaged))], "path": None}, 4)
        except ValueError as error:
            assert "Image 4 of the data set cannot be decoded" in str(error)
            refused += 1
    assert refused > 20
