"""The 8x8 digits that come inside scikit-learn: nothing to download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from swiftsure.data.splits import OfficialParts, balanced_draw

FILE = "digits.csv.gz"
CLASSES = tuple("0123456789")
TEST_SIZE = 360
# Of the test draw alone. It is no recipe's seed: the test images must be the same whatever the recipe says.
_TEST_SEED = 1797


def place() -> str:
    """The folder in which scikit-learn keeps its small sets, found without importing it."""
    spec = find_spec("sklearn")
    package = Path(spec.origin).parent if spec is not None and spec.origin else Path("scikit-learn")
    return str(package / "datasets" / "data")


def missing(folder: Path) -> list[str]:
    """Whether scikit-learn, or its file, is missing."""
    return [] if (folder / FILE).is_file() else [FILE]


def read(_: Path) -> OfficialParts:
    """1,797 images of 1x8x8. The set has no official test part: 360 images, 36 a class, drawn once for all.

    Its pixels count the 0 to 16 dark dots of a 4x4 cell; they become 0 to 255, rounded.
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = np.rint(bundle.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bundle.target.astype(np.int64)
    test, train = balanced_draw(labels, (TEST_SIZE,), len(CLASSES), _TEST_SEED)
    return OfficialParts(images[train], labels[train], images[test], labels[test], CLASSES)
