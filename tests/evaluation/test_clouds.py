"""Readers of point clouds: ModelNet40 and ScanObjectNN, tiny and made up."""

from __future__ import annotations

import builtins
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipkernels.data import depth_maps
from clipkernels.evaluation import read_dataset
from tests.evaluation.cloud_layouts import POINTS, modelnet40, scanobjectnn, shape, write_clouds

h5py = pytest.importorskip("h5py", reason="h5py is not installed")
FAULT = "expected an HDF5 file of point clouds, got .*ply_data_test0.h5"


def test_modelnet40_is_read(tmp_path: Path) -> None:
    home = modelnet40(tmp_path)
    data = read_dataset("modelnet40", home)
    assert data.classes == ("ball", "long stick", "plate")
    assert data.templates == ("point cloud depth map of a {}.",) and data.views == 6
    assert data.layout == "HDF5 files of modelnet40_ply_hdf5_2048"
    assert data.notes == (
        "a cloud gives 6 depth maps of 224×224 pixels",
        "the val split is a seeded part of the training clouds, 6 of 30",
    )
    assert list(data.splits) == ["train", "val", "test"]
    test = data.splits["test"]
    assert test.names[:7] == (*(f"ply_data_test0.h5#0:{view}" for view in range(1, 7)), "ply_data_test0.h5#1:1")
    assert test.labels == tuple(label for label in [0, 1, 2] * 4 for _ in range(6))
    assert test.packed == (str(home / "ply_data_test0.h5"),)
    assert read_dataset("modelnet40", tmp_path) == data


def test_pictures_are_depth_maps(tmp_path: Path) -> None:
    for views in (6, 10):
        data = read_dataset("modelnet40", modelnet40(tmp_path), views=views)
        test = pickle.loads(pickle.dumps(data.splits["test"]))
        expected = depth_maps(torch.from_numpy(shape(1, 904))[None], views)[0]
        for view in (0, views - 1):
            image = test.read(f"ply_data_test0.h5#4:{view + 1}")
            assert image.mode == "RGB" and image.size == (224, 224)
            actual = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
            torch.testing.assert_close(actual, expected[view], atol=0.51 / 255, rtol=0)


def test_the_validation_split_is_a_seeded_part_of_train(tmp_path: Path) -> None:
    data = read_dataset("modelnet40", modelnet40(tmp_path))
    train, val = (data.splits[split] for split in ("train", "val"))
    assert Counter(val.labels) == dict.fromkeys(range(3), 2 * 6)
    assert Counter(train.labels) == dict.fromkeys(range(3), 8 * 6)
    assert not set(train.names) & set(val.names)
    files = [f"ply_data_train{number}.h5#{cloud}:{view + 1}" for number in range(2) for cloud in range(15)
             for view in range(6)]  # fmt: skip
    assert {*train.names, *val.names} == set(files)
    alone = read_dataset("modelnet40", tmp_path, splits=["val"])
    assert alone.splits == {"val": val}


def test_classes_of_few_clouds_are_not_split(tmp_path: Path) -> None:
    data = read_dataset("modelnet40", modelnet40(tmp_path, train=4))
    assert list(data.splits) == ["train", "test"] and data.notes[-1] == "there is no val split"


def test_modelnet40_without_its_lists_is_read_by_name(tmp_path: Path) -> None:
    home = modelnet40(tmp_path)
    expected = read_dataset("modelnet40", home)
    for split in ("train", "test"):
        (home / f"{split}_files.txt").unlink()
    assert read_dataset("modelnet40", home) == expected


def test_missing_files_are_noted(tmp_path: Path) -> None:
    home = modelnet40(tmp_path)
    (home / "ply_data_train1.h5").unlink()
    data = read_dataset("modelnet40", home)
    assert data.notes[1:] == (
        "there is no 'ply_data_train1.h5'",
        "the val split is a seeded part of the training clouds, 3 of 15",
    )
    (home / "ply_data_train0.h5").unlink()
    data = read_dataset("modelnet40", home)
    assert list(data.splits) == ["test"] and data.notes[-1] == "there is no train and no val split"
    (home / "ply_data_test0.h5").unlink()
    with pytest.raises(ValueError, match=r"expected point clouds of the splits 'train', 'val', 'test', got .*: compl"):
        read_dataset("modelnet40", home)


@pytest.mark.parametrize("place", [".", "h5_files", "h5_files/main_split"])
def test_scanobjectnn_is_read(tmp_path: Path, place: str) -> None:
    scanobjectnn(tmp_path)
    data = read_dataset("scanobjectnn", tmp_path / place)
    assert len(data.classes) == 15 and data.classes[:3] == ("bag", "bin", "box") and data.classes[14] == "toilet"
    assert data.templates == ("point cloud depth map of a {}.",)
    assert data.layout == "main_split, objectdataset.h5"
    assert data.splits["test"].labels == tuple(label for label in [0, 1, 2] * 3 for _ in range(6))
    assert {split: len(items.names) for split, items in data.splits.items()} == {"train": 144, "val": 36, "test": 54}
    image = data.splits["test"].read("test_objectdataset.h5#2:1")
    expected = depth_maps(torch.from_numpy(shape(2, 2))[None])[0, 0]
    torch.testing.assert_close(torch.from_numpy(np.array(image))[..., 0] / 255, expected[0], atol=0.51 / 255, rtol=0)


def test_variants_of_scanobjectnn_are_told_apart(tmp_path: Path) -> None:
    hardest, other = "objectdataset_augmentedrot_scale75.h5", "objectdataset_augmented25rot.h5"
    home = scanobjectnn(tmp_path, hardest)
    data = read_dataset("scanobjectnn", home)
    assert data.layout == f"main_split, {hardest}"
    assert data.notes[1] == "a perturbed variant holds several clouds of an object, which may fall into train and val"
    scanobjectnn(tmp_path, other)
    with pytest.raises(ValueError, match=r"expected test_objectdataset\.h5 or one variant alone in .*: move the files"):
        read_dataset("scanobjectnn", home)
    scanobjectnn(tmp_path)
    data = read_dataset("scanobjectnn", home)
    assert data.layout == "main_split, objectdataset.h5"
    assert data.notes[1] == f"left out the variants '{other}', '{hardest}'"
    assert not any("perturbed" in note for note in data.notes)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected shape_names\.txt in .*: unpack modelnet40_ply_hdf5_2048\.zip"):
        read_dataset("modelnet40", tmp_path)
    with pytest.raises(ValueError, match=r"expected test_objectdataset\.h5 in .*: unpack h5_files\.zip"):
        read_dataset("scanobjectnn", tmp_path)
    for views in (7, True, "6"):
        with pytest.raises(ValueError, match="views must be 6 or 10"):
            read_dataset("modelnet40", tmp_path, views=views)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"data": None}, "with no array 'data'"),
        ({"label": None}, "with no array 'label'"),
        ({"data": np.zeros((3, POINTS, 2), np.float32)}, r"with data \(3,150,2\) float32 instead of floats"),
        ({"data": np.zeros((3, 1, 3), np.float32)}, r"with data \(3,1,3\) float32"),
        ({"data": np.zeros((3, POINTS, 3), np.int32)}, r"with data \(3,150,3\) int32"),
        ({"data": np.zeros((1, 2**20 + 1, 3), np.float16)}, r"with data \(1,1048577,3\) of more than 1048576"),
        ({"data": np.zeros((4, POINTS, 3), np.float32)}, r"with label \(3,1\) uint8 instead of integers \(4,1\)"),
        ({"label": np.zeros((3, 1), np.float32)}, r"with label \(3,1\) float32"),
        ({"label": np.array([[0], [1], [3]])}, "with labels from 0 to 3 for 3 classes"),
        ({"label": np.array([0, -1, 2])}, "with labels from -1 to 2 for 3 classes"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, replaced: dict[str, Any], message: str) -> None:
    home = modelnet40(tmp_path)
    write_clouds(home / "ply_data_test0.h5", [0, 1, 2], **replaced)
    with pytest.raises(ValueError, match=f"{FAULT} {message}.*: get it anew") as error:
        read_dataset("modelnet40", home)
    assert "\n" not in str(error.value)


def test_files_that_are_no_hdf5_are_refused(tmp_path: Path) -> None:
    home = modelnet40(tmp_path)
    file = home / "ply_data_test0.h5"
    whole = file.read_bytes()
    for content in (b"", b"no HDF5", whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{FAULT} with .*: get it anew"):
            read_dataset("modelnet40", home)
    file.unlink()
    file.mkdir()
    assert "there is no 'ply_data_test0.h5'" in read_dataset("modelnet40", home).notes


@pytest.mark.parametrize("kind", ["external link", "soft link", "external data", "virtual data", "a group"])
def test_values_in_other_files_are_not_read(tmp_path: Path, kind: str) -> None:
    home = modelnet40(tmp_path)
    other = write_clouds(tmp_path / "other.h5", [0, 1, 2])
    file = write_clouds(home / "ply_data_test0.h5", [0, 1, 2], data=None)
    with h5py.File(file, "a") as content:
        if kind == "external link":
            content["data"] = h5py.ExternalLink(str(other), "/data")
        elif kind == "soft link":
            content["data"] = h5py.SoftLink("/label")
        elif kind == "external data":
            raw = tmp_path / "raw"
            raw.write_bytes(bytes(3 * POINTS * 12))
            content.create_dataset("data", (3, POINTS, 3), np.float32, external=[(str(raw), 0, 3 * POINTS * 12)])
        elif kind == "virtual data":
            layout = h5py.VirtualLayout((3, POINTS, 3), np.float32)
            layout[:] = h5py.VirtualSource(str(other), "data", (3, POINTS, 3))
            content.create_virtual_dataset("data", layout)
        else:
            content.create_group("data")
    with pytest.raises(ValueError, match=f"{FAULT} with 'data' that is no array of its own"):
        read_dataset("modelnet40", home)


def test_faulty_lists_and_names_are_refused(tmp_path: Path) -> None:
    home = modelnet40(tmp_path)
    (home / "test_files.txt").write_text("../ply_data_test0.h5\n")
    with pytest.raises(ValueError, match=r"expected a list of ModelNet40's files, got .* with the path"):
        read_dataset("modelnet40", home)
    for split, file in (("test", "test0"), ("test", "train1"), ("train", "train0")):
        modelnet40(tmp_path)
        with open(home / f"{split}_files.txt", "a") as lines:
            lines.write(f"data/other_folder/ply_data_{file}.h5\n")
        with pytest.raises(ValueError, match=rf"expected every file once .* got 'ply_data_{file}\.h5' again: splits"):
            read_dataset("modelnet40", home)
    (home / "shape_names.txt").write_text("ball\nball\n")
    with pytest.raises(ValueError, match="expected two or more distinct class names, a line each, got"):
        read_dataset("modelnet40", home)


def test_clouds_without_a_depth_map_are_errors(tmp_path: Path) -> None:
    home = modelnet40(tmp_path)
    data = np.stack([shape(label, label) for label in (0, 1, 2)])
    data[0, 3, 1], data[1] = np.nan, 0.5
    write_clouds(home / "ply_data_test0.h5", [0, 1, 2], data=data)
    items = read_dataset("modelnet40", home).splits["test"]
    with pytest.raises(ValueError, match="points must be finite"):
        items.read("ply_data_test0.h5#0:1")
    with pytest.raises(ValueError, match="got all 150 in one place: leave it out"):
        items.read("ply_data_test0.h5#1:2")
    items.read("ply_data_test0.h5#2:6")
    with pytest.raises(ValueError, match=r"expected cloud 3 in .*, got a file without it"):
        items.read("ply_data_test0.h5#3:1")


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8"])
def test_every_width_of_floats_is_read(tmp_path: Path, dtype: str) -> None:
    home = modelnet40(tmp_path)
    data = np.stack([shape(label, label) for label in (0, 1, 2)]).astype(dtype)
    data += 1e8 if dtype.endswith("8") else 0  # where fp32 is in steps of 8
    write_clouds(home / "ply_data_test0.h5", [0, 1, 2], data=data)
    image = read_dataset("modelnet40", home).splits["test"].read("ply_data_test0.h5#1:1")
    expected = depth_maps(torch.from_numpy(data[1].astype(data.dtype.newbyteorder("=")))[None])[0, 0, 0] * 255
    # A picture in fp16 has steps of 1/2048, an eighth of a grey level.
    np.testing.assert_allclose(np.array(image)[..., 0], expected.float().numpy(), atol=0.63)
    assert (np.array(image) > 0).mean() > 0.005


def test_labels_of_a_small_file_of_many_clouds_are_refused(tmp_path: Path) -> None:
    home = modelnet40(tmp_path)
    with h5py.File(home / "ply_data_test0.h5", "w") as file:  # values that were never written take no room
        file.create_dataset("data", (10**11, 10, 3), np.float32, chunks=(1, 10, 3))
        file.create_dataset("label", (10**11,), np.uint8, chunks=(1000,))
    with pytest.raises(ValueError, match=rf"{FAULT} with data \(100000000000,10,3\) of more than 1048576 clouds"):
        read_dataset("modelnet40", home)


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    home = modelnet40(tmp_path)
    items = read_dataset("modelnet40", home).splits["test"]
    before = np.array(items.read("ply_data_test0.h5#0:1"))
    write_clouds(home / "ply_data_test0.h5", [2, 1, 0, 0])
    assert not np.array_equal(np.array(items.read("ply_data_test0.h5#0:1")), before)


def test_without_h5py_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, load = modelnet40(tmp_path), builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "h5py":
            raise ImportError("No module named 'h5py'")
        return load(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"expected h5py to be installed \(pip install 'clipkernels\[clouds\]'\)"):
        read_dataset("modelnet40", home)
