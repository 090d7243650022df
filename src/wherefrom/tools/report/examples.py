"""How an example is shown on the page: a caption, and a picture, a text or a row of a table."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from wherefrom import Scores
from wherefrom.errors import MissingExtraError, expected

LARGEST = 320  # pixels; larger pictures are scaled down so that the page stays small


@dataclass(frozen=True)
class Example:
    """A training example or a query, as a reader should see it.

    Args:
        caption: its label, in a few words.
        image: (H, W) grey or (H, W, 3) colour, uint8 or floats in [0, 1]; a tensor or an array.
        text: its text.
        row: its columns and values.
        detail: a second, quieter line.
        mark: one word that sets it apart, shown as a badge.
        tokens: its text in pieces, for scores that are split over them.
        marked: where in these a part begins that is set apart, such as a completion after its prompt.

    Raises:
        InputError: if it has more than one of image, text and row.
    """

    caption: str
    image: Any = None
    text: str | None = None
    row: Mapping[str, object] | None = None
    detail: str | None = None
    mark: str | None = None
    tokens: Sequence[str] | None = None
    marked: int | None = None

    def __post_init__(self) -> None:
        given = [what for what in ("image", "text", "row") if getattr(self, what) is not None]
        if len(given) > 1:
            raise expected("Example", "shown as one of image, text and row", " and ".join(given))

    @property
    def kind(self) -> str:
        """What it is shown as: "image", "text", "row" or "plain"."""
        for what in ("image", "text", "row"):
            if getattr(self, what) is not None:
                return what
        return "plain"

    def picture(self) -> dict[str, object] | None:
        """Encode the image as a PNG data URI with its width and height; None if there is no image.

        Raises:
            InputError: if the image has another shape or values outside its range.
            MissingExtraError: if Pillow is not installed.
        """
        if self.image is None:
            return None
        try:
            from PIL import Image
        except ImportError as error:
            raise missing_package("pillow") from error
        pixels = _to_pixels(self.image)
        image = Image.fromarray(pixels)
        image.thumbnail((LARGEST, LARGEST))
        out = io.BytesIO()
        image.save(out, "PNG", optimize=True)
        uri = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
        return {"uri": uri, "width": image.width, "height": image.height, "tiny": max(image.size) < 64}


def check_count(what: str, examples: Sequence[Example], count: int, scores: Scores) -> None:
    """Refuse examples of another number than the scores have rows or columns.

    Raises:
        InputError: if there is not one for each.
    """
    if len(examples) != count:
        wanted = f"one for each of the {count} of the scores {tuple(scores.values.shape)}"
        raise expected(what, wanted, len(examples))


def missing_package(package: str) -> MissingExtraError:
    """Return the error for a package of the extra that is not installed."""
    return MissingExtraError(f'A report needs {package}, which is not installed. Run: pip install "wherefrom[report]"')


def _to_pixels(image: Any) -> np.ndarray:
    """Return the image as uint8; floats are scaled from [0, 1]."""
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    is_grey, is_color = array.ndim == 2, array.ndim == 3 and array.shape[2] == 3
    if array.size == 0 or not (is_grey or is_color):
        advice = "Channels come last: x.permute(1, 2, 0)."
        raise expected("An example's image", "(H, W) or (H, W, 3)", array.shape, advice)

    if array.dtype == np.uint8:
        return array
    # A comparison with NaN is false, so an image with one is refused as well.
    in_range = array.min() >= 0 and array.max() <= 1
    if array.dtype.kind != "f" or not in_range:
        got = f"{array.dtype} in {array.min()}..{array.max()}"
        raise expected("An example's image", "uint8, or floats in [0, 1]", got, "Undo its normalisation.")
    return np.round(array * 255).astype(np.uint8)
