"""CIFAR: the binary version, folders of images, the pickled version."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from clipkernels.evaluation import read_dataset
from tests.evaluation.layouts import cifar_file, class_folders

TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(root: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """CIFAR-10's binary version with six training images and two test images; its folder and pixels."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    (folder / "batches.meta.txt").write_text("\n".join(TEN) + "\n\n")
    pixels = [cifar_file(folder / f"data_batch_{i}.bin", [i, 9] if i == 5 else [i], 1, i) for i in range(1, 6)]
    test = cifar_file(folder / "test_batch.bin", [0, 9], 1, 6)
    return folder, {"train": np.concatenate(pixels), "test": test}


def test_the_binary_version_of_cifar10_is_read(tmp_path: Path) -> None:
    folder, pixels = cifar10(tmp_path)
    data = read_dataset("cifar10", folder)
    assert data.classes == TEN and data.templates == ("a photo of a {}.",)
    assert (data.layout, data.notes) == ("binary version cifar-10-batches-bin", ("there is no val split",))
    assert data.splits["train"].labels == (1, 2, 3, 4, 5, 9)
    assert data.splits["train"].names[3:] == ("data_batch_4.bin#0", "data_batch_5.bin#0", "data_batch_5.bin#1")
    assert data.splits["test"].names == ("test_batch.bin#0", "test_batch.bin#1")
    assert data.splits["test"].labels == (0, 9)
    for split, expected in pixels.items():
        items = pickle.loads(pickle.dumps(data.splits[split]))
        images = [items.read(name) for name in items.names]
        assert {image.mode for image in images} == {"RGB"}
        assert np.array_equal(np.stack([np.asarray(image) for image in images]), expected)
    assert read_dataset("cifar10", tmp_path) == data


def test_the_binary_version_of_cifar100_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    names = [f"fine_{i}" for i in range(100)]
    folder.mkdir()
    (folder / "fine_label_names.txt").write_text("\n".join(names))
    (folder / "coarse_label_names.txt").write_text("\n".join(f"coarse_{i}" for i in range(20)))
    pixels = cifar_file(folder / "test.bin", [99, 0], 2, 1)
    data = read_dataset("cifar100", tmp_path, splits=["test"])
    assert data.classes[:2] == ("fine 0", "fine 1") and len(data.classes) == 100
    items = data.splits["test"]
    assert items.labels == (99, 0) and items.names == ("test.bin#0", "test.bin#1")
    assert np.array_equal(np.asarray(items.read("test.bin#1")), pixels[1])
    with pytest.raises(ValueError, match=r"expected 'train.bin' in '.*cifar-100-binary', got none"):
        read_dataset("cifar100", tmp_path, splits=["train"])
    with pytest.raises(ValueError, match="expected a train or test split in"):
        read_dataset("cifar100", tmp_path, splits=["val"])


def test_missing_batches_are_noted(tmp_path: Path) -> None:
    folder, _ = cifar10(tmp_path)
    (folder / "data_batch_2.bin").unlink()
    data = read_dataset("cifar10", folder)
    assert data.splits["train"].labels == (1, 3, 4, 5, 9)
    assert data.notes[1] == "there is no 'data_batch_2.bin'"


def test_faulty_files_are_refused(tmp_path: Path) -> None:
    folder, _ = cifar10(tmp_path)
    file = folder / "test_batch.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"images of 3073 bytes each, got .*test_batch.bin of 6145 bytes: unpack"):
        read_dataset("cifar10", folder)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="of 0 bytes"):
        read_dataset("cifar10", folder)
    file.write_bytes(bytes([10]) + whole[1:])
    with pytest.raises(ValueError, match=r"expected labels below 10, got 10 in .*test_batch.bin"):
        read_dataset("cifar10", folder)
    file.write_bytes(whole)
    items = read_dataset("cifar10", folder).splits["test"]
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"expected image 1 in test_batch\.bin, got a file that ends before it"):
        items.read("test_batch.bin#1")
    (folder / "batches.meta.txt").write_text("airplane\n")
    with pytest.raises(ValueError, match=r"expected 10 class names, got 1 in .*batches.meta.txt"):
        read_dataset("cifar10", folder)
    (folder / "batches.meta.txt").unlink()
    with pytest.raises(ValueError, match=r"expected batches.meta.txt in .*: unpack cifar-10-binary.tar.gz again"):
        read_dataset("cifar10", folder)


def test_the_pickled_version_is_refused_unopened(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return trap.touch, ()

    for name in ("batches.meta", "data_batch_1", "test_batch"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    for path in (tmp_path, folder):
        with pytest.raises(
            ValueError, match=r"got pickled files in .*: unpack cifar-10-batches-bin of cifar-10-binary"
        ):
            read_dataset("cifar10", path)
    assert not trap.exists()
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "meta").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"unpack cifar-100-binary of cifar-100-binary\.tar\.gz instead"):
        read_dataset("cifar100", tmp_path)


def test_cifar_in_folders_is_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        class_folders(tmp_path / split, dict.fromkeys(TEN, 1))
    data = read_dataset("cifar10", tmp_path)
    assert data.classes == TEN and data.splits["train"].labels == tuple(range(10))
    assert data.layout == "folder of folders in train/, test/" and data.notes == ("there is no val split",)


def test_too_few_class_folders_are_noted(tmp_path: Path) -> None:
    data = read_dataset("cifar10", class_folders(tmp_path, {"cat": 1, "dog": 1}))
    assert data.notes[-1] == "2 of the 10 classes have images"
