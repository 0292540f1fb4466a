"""Example images with the worst image found for each, and what is known of it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from swiftsure.errors import SoundnessError
from swiftsure.report._run import Run

VERDICTS = {
    "certified": "certified",
    "unproven": "robust to attacks, unproven",
    "broken": "broken by an attack",
    "wrong": "wrong before any attack",
}
_PER_PAGE = 24
_LONGEST_SIDE = 96
_IMAGE_BYTES = 700_000
"""What the images of one run may weigh, before base64 adds a third: a page stays well under 2 MB."""


@dataclass(frozen=True)
class Example:
    """One card: two data URIs and the words under them. `verdict` is a key of VERDICTS."""

    index: int
    verdict: str
    image: str
    adversarial: str
    label: str
    prediction: str
    adversarial_prediction: str
    margin: float | None
    pixelated: bool


def examples(run: Run, most: int = _PER_PAGE) -> list[Example]:
    """Up to `most` examples of a run, the four verdicts taken in turn so that the rare ones are seen.

    Raises:
        SoundnessError: an example is certified and broken.
    """
    arrays = run.examples
    if arrays is None:
        return []
    verdicts = [_verdict(arrays, place) for place in range(len(arrays["label"]))]
    cards: list[Example] = []
    weight = 0
    for place in _in_turn(verdicts)[:most]:
        clean, adversarial = _png(arrays["x"][place]), _png(arrays["x_adv"][place])
        weight += len(clean) + len(adversarial)
        if weight > _IMAGE_BYTES:
            break
        margin = float(arrays["margin"][place])
        cards.append(
            Example(
                index=int(arrays["index"][place]),
                verdict=verdicts[place],
                image=_data_uri(clean),
                adversarial=_data_uri(adversarial),
                label=run.class_name(int(arrays["label"][place])),
                prediction=run.class_name(int(arrays["clean_prediction"][place])),
                adversarial_prediction=run.class_name(int(arrays["adversarial_prediction"][place])),
                margin=margin if np.isfinite(margin) else None,
                pixelated=max(arrays["x"].shape[2:]) <= 64,
            )
        )
    order = list(VERDICTS)
    return sorted(cards, key=lambda card: (order.index(card.verdict), card.index))


def _verdict(arrays: dict[str, NDArray[Any]], place: int) -> str:
    broken, certified = bool(arrays["attack_broke"][place]), bool(arrays["certified"][place])
    if broken and certified:
        raise SoundnessError(f"sample {arrays['index'][place]} is certified and an attack breaks it")
    if arrays["clean_prediction"][place] != arrays["label"][place]:
        return "wrong"
    return "broken" if broken else "certified" if certified else "unproven"


def _in_turn(verdicts: list[str]) -> list[int]:
    """Places ordered so that every prefix holds as even a share of each verdict as can be."""
    rank: dict[str, int] = {}
    keyed = []
    for place, verdict in enumerate(verdicts):
        rank[verdict] = rank.get(verdict, -1) + 1
        keyed.append((rank[verdict], place))
    return [place for _, place in sorted(keyed)]


def _png(image: NDArray[Any]) -> bytes:
    """One (C, H, W) image, uint8 or float in [0, 1], as a PNG no longer than the page needs."""
    pixels = image if image.dtype == np.uint8 else np.clip(np.nan_to_num(image) * 255, 0, 255).round()
    pixels = pixels.astype(np.uint8).transpose(1, 2, 0)
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
