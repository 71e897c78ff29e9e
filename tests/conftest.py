from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PHOTOS = sorted((ROOT / "tests" / "photos").glob("*.jpg"))  # in colour
OLD = sorted((ROOT / "examples").glob("*.jpg"))  # black and white


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(params=PHOTOS, ids=lambda p: p.stem)
def photo(request) -> Path:
    return request.param
