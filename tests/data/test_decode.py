import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from uhml.data import decode
from uhml.data.decode import UnreadablePicture, find_unreadable, load_rgb
from uhml.data.formats import FORMATS
from uhml.errors import UserError

GRADIENT = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))


def saved(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def pixel(path, at=(0, 0)):
    image = load_rgb(path)
    assert image.mode == "RGB"
    return image.getpixel(at)


@pytest.mark.parametrize("suffix", ["png", "tiff", "bmp", "pgm", "gif", "webp", "jpg"])
def test_grey(tmp_path, suffix):
    path = saved(tmp_path, Image.fromarray(GRADIENT), f"grey.{suffix}")
    difference = np.asarray(load_rgb(path)).astype(int) - GRADIENT[..., None]
    assert abs(difference).max() <= (8 if suffix in ("webp", "jpg") else 0)


@pytest.mark.skipif(".avif" not in FORMATS, reason="this Pillow cannot decode AVIF")
def test_avif(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (32, 24), (200, 30, 70)), "photo.avif")
    assert np.allclose(pixel(path, (8, 8)), (200, 30, 70), atol=4)


def test_black_and_white(tmp_path):
    assert pixel(saved(tmp_path, Image.new("1", (4, 4), 1), "one_bit.png")) == (255, 255, 255)


def test_palette(tmp_path):
    image = Image.new("RGB", (4, 4), (200, 30, 70)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert pixel(saved(tmp_path, image, "palette.png")) == (200, 30, 70)


@pytest.mark.parametrize(
    ("ink", "seen"),
    [((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 0), (255, 255, 255)), ((0, 0, 0, 255), (0, 0, 0))],
)
@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
def test_cmyk(tmp_path, ink, seen, suffix):
    path = saved(tmp_path, Image.new("CMYK", (16, 16), ink), f"cmyk.{suffix}")
    if suffix == "jpg":
        assert b"Adobe" in path.read_bytes()  # Adobe's files hold the inverse of the ink
    assert np.allclose(pixel(path, (8, 8)), seen, atol=3)


@pytest.mark.parametrize(("suffix", "dtype"), [("png", "<u2"), ("tiff", "<u2"), ("tiff", ">u2"), ("pgm", "<u2")])
def test_16_bit_grey_keeps_its_range(tmp_path, suffix, dtype):
    deep = (np.arange(256, dtype=np.uint32) * 257).astype(np.uint16).reshape(16, 16)
    path = tmp_path / f"deep.{suffix}"
    if dtype == ">u2":
        image = Image.frombytes("I;16B", (16, 16), deep.astype(dtype).tobytes())
    else:
        image = Image.fromarray(deep)
    image.save(path)
    assert np.array_equal(np.asarray(load_rgb(path))[..., 1].ravel(), np.arange(256))


def test_transparent_lies_on_white(tmp_path):
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half.putpixel((1, 0), (0, 0, 255, 255))
    half.putpixel((2, 0), (0, 0, 0, 128))
    path = saved(tmp_path, half, "alpha.png")
    assert pixel(path) == (255, 255, 255)
    assert pixel(path, (1, 0)) == (0, 0, 255)
    assert np.allclose(pixel(path, (2, 0)), 127, atol=1)


def test_grey_with_alpha(tmp_path):
    assert pixel(saved(tmp_path, Image.new("LA", (4, 4), (0, 0)), "la.png")) == (255, 255, 255)


def test_palette_with_alpha(tmp_path):
    image = Image.new("RGB", (4, 4), (200, 30, 70)).convert("P", palette=Image.Palette.ADAPTIVE)
    path = saved(tmp_path, image, "palette.png", transparency=bytes(256))
    assert pixel(path) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_transparent_colour(tmp_path, mode):
    black = (0, 0, 0) if mode == "RGB" else 0
    assert pixel(saved(tmp_path, Image.new(mode, (4, 4), black), "t.png", transparency=black)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    upright = Image.fromarray(np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3))
    # What a camera held that way stores: the transposition that the flag undoes.
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, stored, "rotated.png", exif=exif)
    assert np.array_equal(np.asarray(load_rgb(path)), np.asarray(upright))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("block", [b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01", b"Exif\0\0rubbish"])
def test_broken_exif_does_no_harm(tmp_path, suffix, block):
    path = saved(tmp_path, Image.new("RGB", (8, 4)), f"exif.{suffix}", exif=block)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_rgb(path).size == (8, 4)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_shows_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = saved(tmp_path, frames[0], f"moving.{suffix}", save_all=True, append_images=frames[1:])
    red, _, blue = pixel(path)
    assert red > 200
    assert blue < 50


def test_contents_decide_not_the_suffix(tmp_path):
    assert pixel(saved(tmp_path, Image.new("RGB", (4, 4), "lime"), "png.jpg", format="PNG")) == (0, 255, 0)


def test_large_jpeg_is_decoded_smaller(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (4200, 2100), "navy"), "large.jpg")
    assert load_rgb(path).size == (2100, 1050)
    path = saved(tmp_path, Image.new("RGB", (4200, 1500), "navy"), "flat.jpg")
    assert load_rgb(path).size == (4200, 1500)


def png_of(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def jpeg_bytes():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()


def png_bytes():
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


BAD = {
    "empty.jpg": (b"", r"is empty \(0 bytes\)"),
    "text.jpg": (b"no picture\n" * 10, "is in none of the formats"),
    "cut.jpg": (jpeg_bytes()[:-400], r"cannot be decoded \(.*truncated"),
    "cut.png": (png_bytes()[:-400], r"cannot be decoded \(.*truncated"),
    "header_only.jpg": (jpeg_bytes()[:30], "cannot be decoded|in none of the formats"),
    "flipped.png": (flipped(png_bytes(), 200), "cannot be decoded"),
    "giant.png": (png_of(20_000, 20_000), "has more than 178,956,970 pixels"),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is in none of the formats"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_picture_is_refused_by_name(tmp_path, name):
    data, why = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UnreadablePicture, match=f"{name} (is|has|cannot)") as refusal:
        load_rgb(tmp_path / name)
    assert refusal.match(why)
    assert isinstance(refusal.value, UserError)


def test_missing_picture(tmp_path):
    with pytest.raises(UnreadablePicture, match=r"none\.png does not exist"):
        load_rgb(tmp_path / "none.png")


def test_float_and_32_bit_grey_are_refused(tmp_path):
    for name, image in (("f", Image.new("F", (4, 4))), ("i", Image.fromarray(np.full((4, 4), 70_000, np.int32)))):
        with pytest.raises(UnreadablePicture, match="none is agreed to be white"):
            load_rgb(saved(tmp_path, image, f"{name}.tiff"))


def test_pixel_limit_is_pillows():
    assert Image.MAX_IMAGE_PIXELS is not None
    assert 2 * Image.MAX_IMAGE_PIXELS == decode.MAX_PIXELS


@pytest.mark.parametrize("num_workers", [0, 2])
def test_find_unreadable(tmp_path, num_workers):
    paths = []
    for i in range(70):
        paths.append(str(saved(tmp_path, Image.new("RGB", (8, 8)), f"{i}.png")))
    for place, name in zip((3, 40, 69), ("empty.jpg", "text.jpg", "cut.png"), strict=True):
        (tmp_path / name).write_bytes(BAD[name][0])
        paths[place] = str(tmp_path / name)
    found = find_unreadable(paths, num_workers)
    assert [place for place, _ in found] == [3, 40, 69]
    assert found[0][1] == "is empty (0 bytes)"
    assert find_unreadable(paths[:3], num_workers) == []


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "a.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    why = "is a folder" if kind == "folder" else r"cannot be decoded \(it is no regular file\)"
    with pytest.raises(UnreadablePicture, match=why):
        load_rgb(path)
    assert [row for row, _ in find_unreadable([str(path)], num_workers=0)] == [0]
