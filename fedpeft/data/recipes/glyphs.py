"""Letters and digits in hundreds of fonts, 32x32; a natural client is a font, a natural shift is from text to display.

Each of 62 characters is drawn with Pillow at 64 px, cropped to its ink, scaled to 24 px on the longer side and
centred. That makes c and C alike, so the label is the character without case (36 classes); the column `character` has
the case. Fonts that lack one of the characters are left out. A fixed quarter of the fonts is for test.
"""

from __future__ import annotations

import io
import string
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.data.recipe import Package, Recipe, held_out, read_members, write_parts

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
SIZE, INK, DRAWN = 32, 24, 64
UNASSIGNED = "\U000e0080"  # no font has it, so it draws the font's mark for a missing character
STYLES = (".ttf", ".otf")


def draw(content: bytes) -> np.ndarray | None:
    """uint8 [62, 32, 32] of a font file, or None where a character is missing or empty."""
    from PIL import ImageFont

    # The other engine is not in every build of Pillow, and would place glyphs otherwise.
    font = ImageFont.truetype(io.BytesIO(content), DRAWN, layout_engine=ImageFont.Layout.BASIC)
    missing = bytes(font.getmask(UNASSIGNED))
    glyphs = []
    for character in CHARACTERS:
        mask = font.getmask(character)
        box = mask.getbbox()
        if box is None or bytes(mask) == missing:
            return None
        ink = np.frombuffer(bytes(mask), dtype=np.uint8).reshape(mask.size[::-1])[box[1] : box[3], box[0] : box[2]]
        glyphs.append(_centre_ink(ink))
    return np.stack(glyphs)


def _centre_ink(ink: np.ndarray) -> np.ndarray:
    from PIL import Image

    scale = INK / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    small = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.LANCZOS))
    page = np.zeros((SIZE, SIZE), dtype=np.uint8)
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    page[top : top + height, left : left + width] = small
    return page


def build(files: dict[str, Path], target: Path) -> dict[str, Any]:
    """Write a drawn image of each character and font; whole fonts are held out, unusable ones counted."""
    import pandas

    rows, dropped = [], 0
    for package, path in sorted(files.items()):
        for name, content in read_members(path, lambda name: name.lower().endswith(STYLES)):
            glyphs = draw(content)
            if glyphs is None:
                dropped += 1
                continue
            rows += [
                (glyph.tobytes(), character.upper(), character, Path(name).stem, package)
                for glyph, character in zip(glyphs, CHARACTERS, strict=True)
            ]
    frame = pandas.DataFrame(rows, columns=["image", "label", "character", "font", "package"])
    counts = write_parts(target, frame, [held_out(font) for font in frame["font"]])
    return {
        "counts": counts,
        "classes": frame["label"].nunique(),
        "fonts": frame["font"].nunique(),
        "fonts_left_out": dropped,
        "image_shape": [SIZE, SIZE, 1],
    }


GLYPHS = Recipe(
    summary="characters drawn in about 540 fonts, 32x32, 36 classes; columns font, package and character",
    kind="image",
    license="aenigma, dustin: free to use and modify; URW: AGPL, FreeFont: GPL, with font exceptions; Noto: OFL",
    sources=(
        Package("debian", "fonts-aenigma", "0.0.20080511+dfsg-4", "fonts-aenigma_*.deb", "c7f33a4e5932af82"),
        Package("debian", "fonts-urw-base35", "20200910-7", "fonts-urw-base35_*.deb", "93e4997c99c4c31e"),
        Package("debian", "fonts-noto-core", "20201225-1", "fonts-noto-core_*.deb", "58f4f0bb6720f919"),
        Package("debian", "fonts-freefont-ttf", "20120503-10", "fonts-freefont-ttf_*.deb", "4ca1c21ebc479198"),
        Package("debian", "fonts-dustin", "20030517-14", "fonts-dustin_*.deb", "4f74523ed2f39872"),
    ),
    build=build,
)
