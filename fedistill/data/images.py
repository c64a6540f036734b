"""Pictures stored as bytes (png, jpeg, WebP) in a column."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.data.extras import optional
from fedistill.data.labels import Where
from fedistill.errors import DataError


def decode_images(pictures: Iterable[bytes | None], where: Where) -> npt.NDArray[np.float32]:
    """``[n, channels, h, w]`` in [0, 255]; grey pictures have one channel, all others three."""
    pillow = optional("PIL.Image", "parquet", "reading images", package="pillow")
    decoded: list[npt.NDArray[np.uint8]] = []
    for row, picture in enumerate(pictures):
        pixels = _decode(pillow, picture, where(row))
        if decoded and pixels.shape != decoded[0].shape:
            raise DataError(
                f"{where(row)}: expected an image of shape {decoded[0].shape} as in the first row, "
                f"found {pixels.shape}: bring all images to one size and colour mode"
            )
        decoded.append(pixels)
    return np.stack(decoded).astype(np.float32)


def _decode(pillow: Any, picture: bytes | None, place: str) -> npt.NDArray[np.uint8]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = pillow.open(io.BytesIO(picture or b""))
            grey = image.mode in ("1", "L")
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    # Decoders of a dozen formats raise what they like, and their errors share no root.
    except Exception:
        raise DataError(
            f"{place}: expected an image, found bytes that cannot be decoded: mend the row or "
            "leave it out"
        ) from None
    return pixels[None] if grey else np.ascontiguousarray(pixels.transpose(2, 0, 1))
