"""Kinds of image: each decoded as PIL decodes and resizes it; and every image that cannot serve is named."""

import numpy as np
import pytest
from conftest import assert_says
from image_sets import as_dataset, encode, pixels_of, random_images, read, reference, store
from PIL import Image as PILImage

from ddpm_diffusers import data, image_decoding
from ddpm_diffusers.data import load_images
from ddpm_diffusers.image_decoding import decode_image, size_of_all
from ddpm_diffusers.streaming import StreamedBatches, open_stream


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


@pytest.mark.parametrize(("format", "dtype"), [("png", "<u2"), ("tiff", "<u2"), ("tiff", ">u2")])
def test_sixteen_bit_grey_is_scaled_not_clipped(format, dtype, tmp_path):
    values = np.linspace(0, 65535, 64).round().astype(dtype).reshape(8, 8)
    image = PILImage.frombytes("I;16B" if dtype == ">u2" else "I;16", (8, 8), values.tobytes())
    source = store([encode(image, format)], tmp_path / "source")
    for channels in (1, 3):
        decoded = load_images(**source, resolution=8, channels=channels)
        expected = np.broadcast_to(np.round(values / 65535 * 255), (1, channels, 8, 8))
        np.testing.assert_array_equal(read(decoded, 8, channels), expected)


def test_the_transparent_value_of_sixteen_bit_grey_shows_black():
    values = np.linspace(0, 65535, 64).round().astype("<u2").reshape(8, 8)
    image = PILImage.frombytes("I;16", (8, 8), values.tobytes())
    decoded = decode_image(encode(image, transparency=int(values[7, 7])), 0)  # white
    values[7, 7] = 0
    np.testing.assert_array_equal(np.asarray(decoded), np.round(values / 65535 * 255))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_show_black(mode, tmp_path):
    pixels = pixels_of((8, 8, len(mode)))
    pixels[:4, :, -1] = np.where(np.arange(8) < 4, 0, 255)  # wholly clear, and wholly opaque
    source = store([PILImage.fromarray(pixels)], tmp_path / "source")
    decoded = load_images(**source, resolution=8, channels=len(mode) - 1)
    expected = pixels[..., :-1].astype(float) * pixels[..., -1:] / 255
    difference = read(decoded, 8, len(mode) - 1)[0] - expected.transpose(2, 0, 1)
    assert np.abs(difference).max() <= 1 and not difference[:, :4].any()


@pytest.mark.parametrize("transparent", [False, True])
def test_palette_images_are_looked_up(transparent, tmp_path):
    colours, indices = pixels_of((16, 3)), pixels_of((8, 8)) % 16
    palette = PILImage.fromarray(indices, "L")
    palette.putpalette(colours.tobytes())
    image = encode(palette, **({"transparency": 5} if transparent else {}))
    decoded = load_images(**store([image], tmp_path / "source"), resolution=8, channels=3)
    if transparent:
        colours[5] = 0
    np.testing.assert_array_equal(read(decoded, 8, 3)[0], colours[indices].transpose(2, 0, 1))


def test_bilevel_images_are_black_and_white(tmp_path):
    bits = pixels_of((8, 8)) > 127
    decoded = load_images(**store([PILImage.fromarray(bits)], tmp_path / "source"), resolution=8)
    np.testing.assert_array_equal(read(decoded, 8)[0, 0], bits * 255)


def test_images_are_turned_as_their_exif_says():
    (image,) = random_images(1)
    exif = PILImage.Exif()
    exif[0x0112] = 6  # the camera was held on its side: a quarter turn clockwise shows it upright
    decoded = decode_image(encode(image, exif=exif), 0)
    np.testing.assert_array_equal(np.asarray(decoded), np.rot90(np.asarray(image), -1))


# what is told


@pytest.fixture
def told(caplog, monkeypatch):
    monkeypatch.setattr(image_decoding.logger, "handlers", [caplog.handler])
    return lambda: "are in colour and are made grey" in caplog.text


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
def test_colour_that_is_made_grey_is_told(mode, channels, warned, told):
    (image,) = random_images(1, "L" if mode in ("L", "grey as RGB") else "RGB")
    first = as_dataset([image.convert(mode.removeprefix("grey as "))]).with_format("arrow")[:].select(["image"])
    size_of_all(first, channels, center_crop=False)
    assert told() == warned


@pytest.mark.parametrize("streamed", [False, True])
def test_colour_is_looked_for_before_a_data_set_is_decoded_or_streamed(streamed, told, tmp_path):
    source = store(random_images(2, "RGB"), tmp_path / "source")
    if streamed:
        StreamedBatches(open_stream(**source), (1, 8, 8), 1, buffer_size=2, seed=0)
    else:
        load_images(**source, resolution=8)
    assert told()


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


def test_pixels_of_unknown_range():
    for dtype in (np.int32, np.float32):
        with pytest.raises(ValueError) as error:
            decode_image(encode(PILImage.fromarray(np.zeros((8, 8), dtype)), "tiff"), 1)
        assert_says(error, ["Image 1 ", "range is unknown", "8 bits", "convert"])


def test_a_colour_space_without_conversion(tmp_path):
    source = store([*random_images(3), encode(PILImage.new("LAB", (8, 8)), "tiff")], tmp_path / "source")
    with pytest.raises(ValueError) as error:
        load_images(**source, resolution=8)
    assert_says(error, ["Image 3 ", "LAB", "convert it"])


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


@pytest.mark.parametrize("where", DAMAGED)
def test_a_damaged_image(where):
    with pytest.raises(ValueError) as error:
        decode_image({"bytes": DAMAGED[where], "path": None}, 3)
    assert_says(error, ["Image 3 ", "cannot be decoded", "repair or remove it", "synthetic-fashion"])


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
