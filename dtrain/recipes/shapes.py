"""Drawings of circles, squares and triangles, as a folder of images to begin with."""

import contextlib
import random
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

SIDES = {"circle": 0, "square": 4, "triangle": 3}
SIZE = 32  # pixels, each way


def draw_shapes(folder: Path, each: int = 120) -> None:
    """Draws `folder/circle/0.png`, ...: so many grey images of each shape, the same ones each time.

    The folder is there whole or not at all, also where several ranks draw it at once.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)  # noqa: S311 - no secret
    with tempfile.TemporaryDirectory(dir=folder.parent) as part:
        for name, sides in SIDES.items():
            Path(part, name).mkdir()
            for number in range(each):
                _draw(chance, sides).save(Path(part, name, f"{number}.png"))
        Path(part).chmod(0o755)  # a temporary folder is its owner's alone
        with contextlib.suppress(OSError):  # another rank was first, with the same drawings
            Path(part).rename(folder)


def _draw(chance: random.Random, sides: int) -> Image.Image:
    """One shape in a random place, size, turn and shade; no sides are a circle."""
    image = Image.new("L", (SIZE, SIZE), chance.randint(0, 100))
    x, y, radius = chance.randint(12, 19), chance.randint(12, 19), chance.randint(8, 11)
    pen, shade, turn = ImageDraw.Draw(image), chance.randint(150, 255), chance.randint(-15, 15)
    if sides:
        pen.regular_polygon((x, y, radius), sides, turn, fill=shade)
    else:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)
    return image
