"""Docker and the images for the tests of this folder, and of others that need an image.

The images are built where they are missing, which takes minutes the first time. What they are built
on, and by which network, the environment says: `DRIFTMILL_BASE_IMAGE`, `DRIFTMILL_BUILD_NETWORK`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from driftmill import images
from driftmill.images import Built, ImageError, Unreachable


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever is in this folder needs Docker, and may have to build an image first."""
    folder = Path(__file__).parent
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.docker)
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def docker() -> str:
    """Path of a Docker client whose daemon answers; skips where there is none."""
    try:
        images.inspect("driftmill-is-docker-there")
    except ImageError as error:
        pytest.skip(f"no Docker to test with: {error}")
    return images.client()


@pytest.fixture(scope="session")
def image(docker: str) -> Callable[[str], str]:
    """Gives the full name of an image, `image("monitor")`, and builds it where this machine does
    not have it. Skips where what it is made of cannot be fetched."""

    @functools.cache
    def build(name: str) -> Built | Unreachable:
        try:
            return images.build(name)
        except Unreachable as error:
            return error

    def full(name: str) -> str:
        built = build(name)
        if isinstance(built, Unreachable):
            pytest.skip(f"no image to test: {built}")
        return built.reference

    return full
