"""The order of a run, its batches, and broken files in them."""

import shutil
from pathlib import Path

import pytest
import torch

from pixeldip import UserError
from pixeldip.data import Batches, EpochOrder, PositionSampler, TrainingImages, open_source
from pixeldip.data.order import is_flipped
from pixeldip.recipe import DataSection

from .conftest import QUIET, encoded, folder_images, make_picture


def test_pictures_that_are_enlarged_are_told(picture_folder: Path) -> None:
    def told(resolution: int | tuple[int, int]) -> list[str]:
        section = DataSection(source=str(picture_folder), resolution=resolution)
        return TrainingImages(open_source(section), section, seed=0).warnings()

    make_picture(0, 8, 60).save(picture_folder / "ant" / "small.png")
    (picture_folder / "bee" / "broken.png").write_bytes(b"no picture")
    (warning,) = told(40)
    assert "1 of 13 images are smaller than 40x40 (one is 8x60); they are enlarged" in warning
    assert "12 of 13 images" in told((8, 56))[0] and not told((8, 48))


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order() -> None:
    order = EpochOrder(50, seed=1)
    epochs = [[order[50 * e + i] for i in range(50)] for e in range(2)]
    for e, epoch in enumerate(epochs):
        assert {number for number, _ in epoch} == {e}
        assert sorted(index for _, index in epoch) == list(range(50))
    assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]
    assert EpochOrder(50, seed=1)[77] == order[77] and EpochOrder(50, seed=2)[77] != order[77]


def test_processes_share_a_batch_without_overlap() -> None:
    whole = [p for part in PositionSampler(8, 3, 5, 1, 0, 1) for p in part]
    assert whole == list(range(24, 40))
    shares = [list(PositionSampler(8, 3, 5, 2, rank, 2)) for rank in range(2)]
    assert all(len(share) == len(PositionSampler(8, 3, 5, 2, 0, 2)) == 4 for share in shares)
    assert sorted(p for share in shares for part in share for p in part) == whole


@pytest.fixture
def damaged_folder(picture_folder: Path) -> Path:
    """The twelve pictures and four files that are none."""
    whole = encoded(make_picture(0, 200, 200), "JPEG")
    (picture_folder / "ant" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (picture_folder / "ant" / "empty.png").write_bytes(b"")
    (picture_folder / "bee" / "text.png").write_text("not a picture")
    shutil.copy(picture_folder / "bee" / "0.png", picture_folder / "bee" / "cut.png")
    with (picture_folder / "bee" / "cut.png").open("r+b") as file:
        file.truncate(60)
    return picture_folder


@pytest.mark.parametrize("in_memory", [True, False])
def test_broken_files_are_named_and_replaced(damaged_folder: Path, in_memory: bool) -> None:
    images = folder_images(damaged_folder, max_broken=0.5, in_memory=in_memory, workers=0)
    if in_memory:
        images.load_into_memory(QUIET)
    broken: dict[int, str] = {}
    for batch in Batches(images, PositionSampler(4, 0, 4, 1, 0, 1), pin_memory=False):
        assert batch.images.shape == (4, 3, 16, 16) and batch.images.dtype == torch.uint8
        broken |= batch.broken
    assert sorted(Path(why.split(": ")[0]).name for why in broken.values()) == [
        "cut.jpg",
        "cut.png",
        "empty.png",
        "text.png",
    ]


def test_a_worker_that_finds_too_many_broken_says_it_in_one_message(damaged_folder: Path) -> None:
    images = folder_images(damaged_folder, max_broken=0, in_memory=False, workers=1)
    with pytest.raises(UserError, match=r"^data.source .*: 1 of 16 images cannot be read, more than .*\n[^\n]*$"):
        list(Batches(images, PositionSampler(4, 0, 4, 1, 0, 1), pin_memory=False))


def test_where_nothing_can_be_read_the_search_ends(damaged_folder: Path) -> None:
    for path in (damaged_folder / "bee").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="8 of 8 images cannot be read"):
        folder_images(damaged_folder / "bee", max_broken=1.0)[0]


def test_what_is_too_large_for_the_memory_is_not_kept_there(picture_folder: Path) -> None:
    def kept(resolution: int, in_memory: bool | None = None) -> bool:
        section = DataSection(source=str(picture_folder), resolution=resolution, in_memory=in_memory)
        return TrainingImages(open_source(section), section, seed=0).fits_in_memory()

    assert kept(16) and not kept(8192)  # twelve images: 9 kB and 2.4 GB
    assert kept(8192, in_memory=True) and not kept(16, in_memory=False)


def test_in_memory_or_not_the_run_is_the_same(damaged_folder: Path) -> None:
    kept, read = (folder_images(damaged_folder, max_broken=0.5, flip=True) for _ in range(2))
    kept.load_into_memory(QUIET)
    for position in range(40):
        a, b = kept[position], read[position]
        assert (a[0] == b[0]).all() and a[1:] == b[1:]


def test_flips_change_between_epochs_and_are_fair(picture_folder: Path) -> None:
    plain, flipped = folder_images(picture_folder), folder_images(picture_folder, flip=True)
    mirrored = [not (plain[p][0] == flipped[p][0]).all() for p in range(240)]
    assert 80 < sum(mirrored) < 160
    shown = {(flipped.order[position][1], was) for position, was in enumerate(mirrored)}
    assert len(shown) == 2 * 12  # each picture, as it is and mirrored
    assert mirrored != [is_flipped(1, *flipped.order[position]) for position in range(240)]  # by another seed
    for position, was in enumerate(mirrored):
        if was:
            assert (plain[position][0][:, ::-1] == flipped[position][0]).all()


@pytest.mark.parametrize("in_memory", [True, False])
def test_too_many_broken_files_stop_the_run(damaged_folder: Path, in_memory: bool) -> None:
    images = folder_images(damaged_folder, max_broken=0.05, in_memory=in_memory)
    with pytest.raises(UserError, match=r"cannot be read, more than data.max_broken = 0.05 allows(.|\n)*\.(jpg|png)"):
        if in_memory:
            images.load_into_memory(QUIET)
        for position in range(16):
            images[position]


def test_worker_processes_give_the_same_batches(picture_folder: Path) -> None:
    alone, helped = (folder_images(picture_folder, flip=True, workers=w, in_memory=False) for w in (0, 1))
    sampler = PositionSampler(4, 2, 5, 1, 0, 1)
    for a, b in zip(Batches(alone, sampler, False), Batches(helped, sampler, False), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.positions == b.positions
