"""Which files are taken for pictures."""

from PIL import features

FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".pbm": "PPM",
    ".pgm": "PPM",
    ".ppm": "PPM",
}
"""What is taken for a picture: the suffixes, in lower case, and Pillow's names of the formats.

Other formats stay out because Pillow opens some of them (EPS) by running other programs.
"""

if features.check("avif"):  # as in the wheels of Pillow since 11.3
    FORMATS[".avif"] = "AVIF"
