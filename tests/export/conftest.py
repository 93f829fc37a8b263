"""The exported folder that tests of the runtime share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.export.hand_export import pictures, write_export


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported folder of the bundled model, patched with EViT, and three photographs beside it."""
    folder = write_export(tmp_path_factory.mktemp("export") / "out")
    for index, picture in enumerate(pictures()):
        picture.save(folder.parent / f"{index}.png")
    return folder
