"""A small labelled data set of drawn scenes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.scene_files import scenes_in


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes as files: train, val and test, each with a folder per class."""
    return scenes_in(tmp_path_factory.mktemp("scenes"))
