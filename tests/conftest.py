"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# As `make test`: small networks, several processes at once, and a second thread would wait for the first on a busy
# machine. OpenMP reads this when torch is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

# Without a GPU the Triton kernels are tested by interpreting them; triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile("fixed")  # `pytest --hypothesis-profile thorough` draws other and more examples

from tests.devices import devices  # noqa: E402  imports triton's environment as it is set above

ROOT = Path(__file__).resolve().parent.parent


def shared_folder() -> Path:
    """Folder with real images and weights: YOLOV9_FAST_SHARED, by default `../shared` next to the repository."""
    return Path(os.environ.get("YOLOV9_FAST_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests leave the user's cache of checked images alone; processes that they start inherit this."""
    os.environ["YOLOV9_FAST_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> str:
    """Each device of this machine, "cpu" and "cuda"."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Folder with outputs of the published implementation, see its README.md."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = shared_folder()
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder} (set YOLOV9_FAST_SHARED)")
    return folder


@pytest.fixture(autouse=True, scope="session")
def exact_products() -> None:
    """On a GPU float32 is computed in float32, and convolutions by the same algorithm each time."""
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A command sends the package's log to the console; after the test it goes to pytest again."""
    logger = logging.getLogger("yolov9_fast")
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], level, logger.propagate = before
    logger.setLevel(level)
