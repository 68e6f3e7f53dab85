"""Built images, and the data that stages run on."""

from __future__ import annotations

from subprocess import CalledProcessError

import pytest

from tests.images.build import CannotBuildError, Engine, build

ENGINE = pytest.StashKey[Engine | Exception]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Builds before the first test, outside of any test's time limit."""
    if session.config.option.collectonly or not any("engine" in item.fixturenames for item in session.items):
        return
    try:
        session.config.stash[ENGINE] = build()
    except (CannotBuildError, CalledProcessError) as error:
        session.config.stash[ENGINE] = error


@pytest.fixture(scope="session")
def engine(request) -> Engine:
    """podman and buildah with all six images built."""
    built = request.config.stash[ENGINE]
    if isinstance(built, CannotBuildError):
        pytest.skip(f"because {built}")
    if isinstance(built, Exception):
        pytest.fail(f"the images do not build: {built}", pytrace=False)
    return built
