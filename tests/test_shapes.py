"""The scenes: reproducible, the same at every size, and consistent between image, box, mask and depth."""

import time

import pytest
import torch

import shapes
from shapes import CLASSES, Shapes


@pytest.fixture(scope="module")
def scenes():
    data = Shapes("train", 64, 1000)
    return [data[i] for i in range(len(data))]


def same(a, b):
    return all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


def floor_of(scene):
    """(S,) depth of the background on each row, NaN where the card hides the whole row."""
    return scene["depth"].masked_fill(scene["mask"] > 0, torch.nan).nanmedian(1).values


def test_a_scene_depends_on_split_and_index_alone(scenes):
    other = Shapes("train", 64, 40)
    for i in torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist():
        assert same(other[i], scenes[i])


def test_train_and_val_share_no_scene(scenes):
    val = Shapes("val", 64, 500)
    images = {scene["image"].numpy().tobytes() for scene in [*scenes[:500], *val]}
    assert len(images) == 1000
    assert len(set(shapes.STREAMS.values())) == len(shapes.STREAMS)


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="test.*train, val"):
        Shapes("test")


def test_iteration_ends_at_length():
    assert len(list(Shapes("val", 16, 3))) == 3


@pytest.mark.parametrize("size", [37, 64, 224])
def test_types_and_ranges(size):
    data = Shapes("val", size, 8)
    for i in range(8):
        scene = data[i]
        assert scene["image"].shape == (3, size, size) and scene["image"].dtype == torch.uint8
        assert scene["mask"].shape == scene["depth"].shape == (size, size)
        assert scene["mask"].dtype == torch.uint8 and scene["depth"].dtype == scene["box"].dtype == torch.float32
        assert set(scene["mask"].unique().tolist()) == {0, 1 + scene["label"]}
        assert 0 < scene["depth"].min() and scene["depth"].max() <= 10


def test_box_is_the_tight_bound_of_the_mask(scenes):
    for scene in scenes:
        x0, y0, x1, y1 = scene["box"].int().tolist()
        mask = scene["mask"] == 1 + scene["label"]
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        for edge in (mask[y0, :], mask[y1 - 1, :], mask[:, x0], mask[:, x1 - 1]):
            assert edge.any()


def test_the_floor_is_a_plane_that_recedes_upwards(scenes):
    for scene in scenes[:200]:
        floor = floor_of(scene)
        background = scene["mask"] == 0
        assert torch.equal(scene["depth"][background], floor[:, None].expand(64, 64)[background])  # one depth per row
        seen = ~floor.isnan()
        assert (floor[seen].diff() <= 0).all() and floor[seen][0] == 10
        rows = torch.nonzero(floor < 10)[:, 0].double()             # a plane's inverse depth is linear in the row
        slope = (1 / floor[floor < 10].double()).diff() / rows.diff()
        assert torch.allclose(slope, torch.full_like(slope, 1 / 64 / 1.2), rtol=1e-3)    # 1 / (S focal height)


def test_the_card_stands_on_the_floor(scenes):
    for scene in scenes[:200]:
        card = scene["depth"][scene["mask"] > 0]
        assert (card == card[0]).all()
        floor = floor_of(scene)
        rows = (scene["mask"] > 0).any(1) & ~floor.isnan()
        assert (card[0] <= floor[rows] * 1.01).all()                # in front of the floor it hides; 1 % is half a row
        below = floor[int(scene["box"][3]) + 2:]                    # 2 rows of slack: a thin tip may miss pixel centres
        assert (card[0] >= below).all()                             # behind the floor that lies before its foot


@pytest.mark.parametrize("size", [128, 224])
def test_every_size_shows_the_same_scene(size):
    small, large = Shapes("val", 64, 30), Shapes("val", size, 30)
    at = ((torch.arange(64) + 0.5) * size / 64).long()              # large pixel that holds each small pixel's centre
    for i in range(30):
        a, b = small[i], large[i]
        assert a["label"] == b["label"]
        assert (a["mask"] == b["mask"][at][:, at]).float().mean() > 0.97
        assert (a["box"] * size / 64 - b["box"]).abs().max() <= 3 * size / 64
        assert (a["depth"].max(), b["depth"].max()) == (10, 10)


def test_classes_are_equally_frequent(scenes):
    counts = torch.bincount(torch.tensor([s["label"] for s in scenes]), minlength=len(CLASSES)).double()
    chi2 = ((counts - 100) ** 2 / 100).sum()
    assert chi2 < 27.9                                              # 99.9 % point of chi-square, 9 degrees of freedom


def nearest_class_mean(features, labels):
    """Accuracy on the second half of the nearest class mean of the first half, in standardised features."""
    features = (features - features.mean(0)) / features.std(0)
    half = len(labels) // 2
    means = torch.stack([features[:half][labels[:half] == c].mean(0) for c in range(len(CLASSES))])
    return (torch.cdist(features[half:], means).argmin(1) == labels[half:]).float().mean()


def test_background_colour_says_nothing_and_mean_colour_not_all(scenes):
    labels = torch.tensor([s["label"] for s in scenes])
    image = torch.stack([s["image"] for s in scenes]).double()
    away = torch.stack([s["mask"] == 0 for s in scenes]).double()
    away[:, 24:] = 0                                                # above the contact shadow
    backdrop = (image * away[:, None]).sum((2, 3)) / away.sum((1, 2)).clamp_min(1)[:, None]
    assert nearest_class_mean(backdrop, labels) < 0.1 + 4 * (0.1 * 0.9 / 500) ** 0.5     # chance + 4 standard errors
    assert nearest_class_mean(image.mean((2, 3)), labels) < 0.6     # measured: 0.46, the card's hue through the mottle


def test_rendering_is_fast_enough():
    data, threads = Shapes("train", 64, 300), torch.get_num_threads()
    torch.set_num_threads(1)
    data[0]
    start = time.process_time()                                     # CPU time: a busy machine must not fail this
    for i in range(len(data)):
        data[i]
    rate = len(data) / (time.process_time() - start)
    torch.set_num_threads(threads)
    print(f"{rate:.0f} scenes/s at 64 px on one core")
    assert rate > 150
