"""Images are written while they are made, in formats that others read."""

import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advkd.cache.errors import UsageError
from advkd.stages.pictures import to_pixels
from advkd.stages.student.samples import Images, check_folder, sample, write_folder, write_npy, write_npz
from tests.stages.test_hub import make_student


def parts_of(images: Images) -> Iterator[Images]:
    """Three batches; fails if more than one of the earlier ones is still in memory when the next is asked for."""
    alive: list[weakref.ref[Images]] = []
    for part in np.array_split(images, 3):
        assert sum(reference() is not None for reference in alive) <= 1
        batch = part.copy()
        alive.append(weakref.ref(batch))
        yield batch
        del batch


@pytest.mark.parametrize("channels", [1, 3])
def test_streamed_files_are_those_of_numpy(tmp_path: Path, channels: int) -> None:
    images = np.random.default_rng(0).normal(size=(10, channels, 4, 6)).astype(np.float32)
    write_npy(tmp_path / "a.npy", parts_of(images), images.shape)
    np.save(tmp_path / "b.npy", images)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    write_npz(tmp_path / "a.npz", parts_of(images), images.shape)
    with np.load(tmp_path / "a.npz") as archive:
        assert archive.files == ["arr_0"] and archive["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(archive["arr_0"], to_pixels(images))
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:  # evaluation suites stream the member
        assert archive.testzip() is None and archive.namelist() == ["arr_0.npy"]
    write_folder(tmp_path / "a", parts_of(images), range(7, 17))
    for index, path in enumerate(sorted((tmp_path / "a").iterdir())):
        assert path.name == f"{index + 7:06d}.png"
        np.testing.assert_array_equal(np.asarray(Image.open(path)), to_pixels(images)[index])


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    def failing() -> Iterator[Images]:
        yield np.zeros((2, 1, 4, 4), np.float32)
        raise KeyboardInterrupt

    for write in (write_npy, write_npz):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "a", failing(), (4, 1, 4, 4))
    assert not list(tmp_path.iterdir())


def test_batches_are_the_seeds_own_images() -> None:
    student = make_student()
    whole = np.concatenate(list(sample(student, range(3, 10), 7)))
    parts = np.concatenate(list(sample(student, range(3, 10), 2)))
    np.testing.assert_allclose(whole, parts, atol=1e-5)
    np.testing.assert_allclose(whole[4:5], student(student.noise([7])).numpy(), atol=1e-5)


def test_a_folder_takes_images_of_other_seeds_alone(tmp_path: Path) -> None:
    check_folder(tmp_path / "none", range(4))
    write_folder(tmp_path / "a", [np.zeros((2, 1, 4, 4), np.float32)], range(2))
    (tmp_path / "a/000002.png.partial").touch()  # another process is writing it
    check_folder(tmp_path / "a", range(2, 4))
    with pytest.raises(UsageError, match="1 of these images, the first of seed 1"):
        check_folder(tmp_path / "a", range(1, 4))
    (tmp_path / "a/thesis.txt").touch()
    with pytest.raises(UsageError, match=r"not empty \(thesis.txt\)"):
        check_folder(tmp_path / "a", range(2, 4))
