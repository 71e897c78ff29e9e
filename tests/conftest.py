import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PHOTOS = sorted((ROOT / "tests" / "photos").glob("*.jpg"))  # in colour
OLD = sorted((ROOT / "examples").glob("*.jpg"))  # black and white

LAUNCH = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
# Two gloo processes, with ACCELERATE_USE_CPU, which meet at a port that is free: several tests may run at once.
TWICE = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(params=PHOTOS, ids=lambda p: p.stem)
def photo(request) -> Path:
    return request.param
