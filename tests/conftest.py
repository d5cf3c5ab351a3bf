"""Runs that several modules of launching tests compare with one another."""

from __future__ import annotations

import pytest
from launched_runs import RealRun


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RealRun:
    """A run that was left alone, on this host and without a launcher."""
    root = tmp_path_factory.mktemp("runs-of-two-ranks")
    run = RealRun(root / "undisturbed", root / "data")
    run.train_to_the_end()
    return run


@pytest.fixture
def run(undisturbed: RealRun, request: pytest.FixtureRequest) -> RealRun:
    """One like it for this test."""
    return undisturbed.sibling(request.node.name)
