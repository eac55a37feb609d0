import argparse
import collections
import colorsys
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import checkpoint as disk
import probe_seg
import shapes
import vit
from probe_seg import IGNORE, Head, fit, learning_rate, predict, windows

CONFIG = vit.ViTConfig(image_size=32, patch_size=8, dim=24, depth=2, heads=2, attn="entmax15", registers=2)
KEYS = set("probe data root weights weights_sha256 which config epochs run_seed recipe seed metrics protocol".split())
CITYSCAPES = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
              27: 14, 28: 15, 31: 16, 32: 17, 33: 18}


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(path, seed=7, epoch=3):
    """A checkpoint with the keys that a probe reads; teacher and student differ."""
    networks = {}
    for which in ("teacher", "student"):
        torch.manual_seed(seed)
        networks[which] = vit.VisionTransformer(CONFIG).state_dict()
        seed += 100
    torch.save(dict(config=dataclasses.asdict(CONFIG), **networks, epoch=epoch), path)
    return str(path)


@pytest.fixture
def checkpoint(tmp_path):
    return save(tmp_path / "tiny.pt")


@functools.cache
def scenes(split, size, length, cards):
    """Rendered once for all tests, which only read them."""
    return list(shapes.Shapes(split, size, length, cards))


@pytest.fixture
def few_scenes(monkeypatch):
    """40 train and 20 val scenes in place of 1,000 and 500."""
    monkeypatch.setattr(probe_seg, "Shapes",
                        lambda split, size, length, cards: scenes(split, size, length // 25, cards))


# ---- the data sets as they lie on disk ------------------------------------------------------------------------------

SIZES = [(50, 40), (61, 37), (40, 83), (37, 37)]                    # (width, height)


def picture(path, size, seed, grey=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0]) if grey else (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def blocks_of(values, size, seed):
    """(height, width) uint8: 6 x 6 patches of values."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice(np.array(values, np.uint8), (size[1] // 6 + 1, size[0] // 6 + 1))
    return coarse.repeat(6, 0).repeat(6, 1)[:size[1], :size[0]]


def mask(path, ids, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids)
    if palette:                                                     # VOC's files: numbers into a table of colours
        image = image.convert("P")
        image.putdata(ids.ravel().tolist())
        image.putpalette([(37 * i + 11) % 256 for i in range(768)])
    image.save(path)


def draw_voc(root, train=4, val=3):
    folder = root / "VOCdevkit/VOC2012"
    (folder / "ImageSets/Segmentation").mkdir(parents=True)
    for split, n in (("train", train), ("val", val)):
        names = [f"2007_{split}{i}" for i in range(n)]
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))       # no final newline
        for i, name in enumerate(names):
            picture(folder / f"JPEGImages/{name}.jpg", SIZES[i], i, grey=i == 1)
            ids = blocks_of([0, 3, 20], SIZES[i], i)
            ids[:2] = ids[:, -1] = 255
            mask(folder / f"SegmentationClass/{name}.png", ids, palette=True)
    return root


def draw_ade20k(root, train=4, val=3):
    for split, folder, n in (("train", "training", train), ("val", "validation", val)):
        for i in range(n):
            name = f"ADE_{split}_{i:08d}"
            picture(root / f"ADEChallengeData2016/images/{folder}/{name}.jpg", SIZES[i], i, grey=i == 1)
            mask(root / f"ADEChallengeData2016/annotations/{folder}/{name}.png",
                 blocks_of([0, 1, 77, 150], SIZES[i], i))
    return root


def draw_cityscapes(root, train=4, val=3):
    for split, n in (("train", train), ("val", val)):
        for i in range(n):
            city = ("ulm", "aachen")[i % 2]
            stem = f"{city}_{i:06d}_000019"
            picture(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", (48, 24), i + 10 * (split == "val"))
            mask(root / f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png", blocks_of(range(34), (48, 24), i))
            mask(root / f"gtFine/{split}/{city}/{stem}_gtFine_color.png", blocks_of([200], (48, 24), i))
    return root


DRAW = {"voc": draw_voc, "ade20k": draw_ade20k, "cityscapes": draw_cityscapes}
SMALL = "--crop 32 --short-side 40 --iters 4 --batch-size 2 --eval-every 2 --workers 0 --allow-partial".split()


def opened(data, root, *flags):
    args = probe_seg.parse_args(["--weights", "random", "--data", data, "--root", str(root), *SMALL, *flags])
    return probe_seg.open_data(args, 32)[:2]


def result(capsys, file):
    """The result file, which is also the last line of stdout."""
    text = Path(file).read_text()
    assert text == capsys.readouterr().out.splitlines()[-1] + "\n"
    return json.loads(text)


def exits(capsys, *argv):
    """(exit status, the line that says why); a str code is what sys.exit prints before status 1."""
    with pytest.raises(SystemExit) as stop:
        probe_seg.main(list(map(str, argv)))
    code = stop.value.code
    return (1, code) if isinstance(code, str) else (code, capsys.readouterr().err.splitlines()[-1])


def test_voc_labels_are_the_palette_numbers_with_the_border_ignored(tmp_path):
    train, val = opened("voc", draw_voc(tmp_path))
    assert (len(train), len(val)) == (4, 3)
    for i, size in enumerate(SIZES[:3]):
        expected = blocks_of([0, 3, 20], size, i)
        expected[:2] = expected[:, -1] = 255
        assert np.array_equal(val.read(i)[1].numpy(), expected)


def test_ade20k_labels_move_down_by_one_and_zero_is_ignored(tmp_path):
    train, val = opened("ade20k", draw_ade20k(tmp_path))
    assert (len(train), len(val)) == (4, 3)
    to_class = {0: 255, 1: 0, 77: 76, 150: 149, 255: 255}
    for i in range(3):
        ids = blocks_of([0, 1, 77, 150], SIZES[i], i)
        assert val.read(i)[1].tolist() == [[to_class[k] for k in row] for row in ids.tolist()]
    assert [int(probe_seg.label_table("ade20k")[k]) for k in to_class] == list(to_class.values())


def test_cityscapes_ids_become_train_ids_and_all_others_are_ignored(tmp_path):
    train, val = opened("cityscapes", draw_cityscapes(tmp_path))
    assert [pair[0].parent.name for pair in train.pairs] == ["aachen", "aachen", "ulm", "ulm"]      # sorted
    for i, drawn_as in enumerate((1, 0, 2)):
        ids = blocks_of(range(34), (48, 24), drawn_as)
        assert val.read(i)[1].tolist() == [[CITYSCAPES.get(k, 255) for k in row] for row in ids.tolist()]
    table = probe_seg.label_table("cityscapes").tolist()
    assert [table[k] for k in [*range(34), 255]] == [CITYSCAPES.get(k, 255) for k in [*range(34), 255]]


def test_voc_list_takes_the_augmented_mask_before_the_original(tmp_path):
    folder = draw_voc(tmp_path) / "VOCdevkit/VOC2012"
    mask(folder / "SegmentationClassAug/2007_train2.png", np.full(SIZES[2][::-1], 7, np.uint8))
    mask(folder / "SegmentationClassAug/2007_val0.png", np.full(SIZES[0][::-1], 7, np.uint8))
    (tmp_path / "trainaug.txt").write_text("2007_train2\n2007_train1\n\n")
    train, val = opened("voc", tmp_path, "--voc-list", "trainaug.txt")
    assert [pair[0].stem for pair in train.pairs] == ["2007_train2", "2007_train1"]
    assert (train.read(0)[1] == 7).all() and (train.read(1)[1] == 20).any()
    assert len(val) == 3 and not (val.read(0)[1] == 7).any()        # val stays what it is


# ---- augmentation ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width, long, short, expected", [
    (375, 500, 2048, 512, (512, 683)),                              # 682.67
    (500, 375, 2048, 512, (683, 512)),
    (1024, 2048, 2048, 1024, (1024, 2048)),
    (360, 480, 2048, 1024, (1024, 1365)),                           # 1365.33
    (100, 1000, 2048, 512, (205, 2048)),                            # the long side decides: 204.8
    (100, 1000, math.inf, 512, (512, 5120)),
    (3, 4, 10, 2.5, (3, 3)),                                        # 2.5 and 3.33: half goes up
])
def test_resized_sides(height, width, long, short, expected):
    assert fit(height, width, long, short) == expected


TWO_ROUNDINGS = 0.5 + 0.5 + 0.02                                    # columns, then rows, to 8 bits; weights of 14 bits


def bilinear_by_hand(image, size):
    """Four neighbours of the pixel's centre, float64, one pixel at a time."""
    h, w = image.shape[:2]
    out = np.zeros((*size, 3))
    for i in range(size[0]):
        for j in range(size[1]):
            y, x = max((i + 0.5) * h / size[0] - 0.5, 0), max((j + 0.5) * w / size[1] - 0.5, 0)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            a, b = y - y0, x - x0
            out[i, j] = ((1 - a) * ((1 - b) * image[y0, x0] + b * image[y0, x1])
                         + a * ((1 - b) * image[y1, x0] + b * image[y1, x1]))
    return out


@pytest.mark.parametrize("size", [(9, 7), (31, 29)])
def test_resize_equals_four_neighbours_by_hand(size):
    image = np.random.default_rng(0).integers(0, 256, (15, 20, 3)).astype(np.uint8)
    ours = probe_seg.resize(torch.from_numpy(image).permute(2, 0, 1)[None], size)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - bilinear_by_hand(image.astype(float), size)).max() <= TWO_ROUNDINGS


def in_eight_bits(value):
    """Rounded, half up; None where float errors of colorsys could decide."""
    return None if abs(value % 1 - 0.5) < 1e-3 else int(value + 0.5)


@pytest.mark.parametrize("saturation, hue", [(1.0, 0), (0.6, 0), (1.5, 0), (1.0, -18), (1.0, 17)])
def test_hue_and_saturation_equal_colorsys_in_eight_bits(saturation, hue):
    rng, checked = np.random.default_rng(0), 0
    rgb = np.concatenate([rng.integers(0, 256, (3000, 3)), np.repeat(rng.integers(0, 256, (50, 1)), 3, 1),
                          [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 0, 1], [255, 255, 0], [9, 9, 8]]])
    for before, after in zip(rgb, probe_seg.change_hsv(rgb.astype(np.uint8), saturation, hue), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before / 255)
        h, s = in_eight_bits(180 * h), in_eight_bits(255 * s)
        if h is not None and s is not None:
            s = min(int(s * np.float32(saturation)), 255)
            expected = [255 * c for c in colorsys.hsv_to_rgb((h + hue) % 180 / 180, s / 255, v)]
            assert np.abs(after - np.array(expected)).max() <= 0.5 + 1e-3, before
            checked += 1
    assert checked > 0.95 * len(rgb)


class Script:
    """Stands in for a generator: coins and draws as written down, in the order asked for."""

    def __init__(self, coins, draws):
        self.coins, self.draws, self.ranges = iter(coins), iter(draws), []

    def random(self):
        return 0.0 if next(self.coins) else 0.9

    def uniform(self, low, high):
        self.ranges.append((low, high))
        return next(self.draws)

    def integers(self, low, high):
        self.ranges.append((low, high - 1))
        return next(self.draws)


GREY_AND_RED = np.array([[[100, 100, 100], [200, 40, 40], [250, 10, 10]]], np.uint8)


@pytest.mark.parametrize("coins, draws, ranges, expected", [
    # coins: brightness, contrast, whether it comes early, saturation, hue
    ((0, 0, 0, 0, 0), (), [], [[100, 100, 100], [200, 40, 40], [250, 10, 10]]),
    ((1, 0, 0, 0, 0), (-20.0,), [(-32, 32)], [[80, 80, 80], [180, 20, 20], [230, 0, 0]]),
    ((0, 1, 0, 0, 0), (1.5,), [(0.5, 1.5)], [[150, 150, 150], [255, 60, 60], [255, 15, 15]]),
    ((0, 0, 0, 1, 0), (0.5,), [(0.5, 1.5)], [[100, 100, 100], [200, 120, 120], [250, 131, 131]]),
    ((0, 0, 0, 0, 1), (-15,), [(-18, 17)], [[100, 100, 100], [200, 40, 120], [250, 10, 130]]),     # 30 degrees back
    # 1.5 x first clips red at 255; with the red lost, half the saturation is another colour than the other way round
    ((0, 1, 1, 1, 0), (1.5, 0.5), [(0.5, 1.5)] * 2, [[150, 150, 150], [255, 158, 158], [255, 135, 135]]),
    ((0, 1, 0, 1, 0), (1.5, 0.5), [(0.5, 1.5)] * 2, [[150, 150, 150], [255, 180, 180], [255, 196, 196]]),
])
def test_distortion_step_by_step(coins, draws, ranges, expected):
    rng = Script(coins, draws)
    assert np.abs(probe_seg.distort(GREY_AND_RED, rng).astype(int) - [expected]).max() <= 1       # HSV of 8 bits
    assert rng.ranges == ranges and not list(rng.coins)


def test_crops_avoid_a_class_that_fills_three_quarters():
    """A picture of one class but for a corner: only crops that touch the corner are taken while draws last."""
    label = np.zeros((64, 64), np.uint8)
    label[40:, 40:] = 1
    label[:, :4] = IGNORE
    rng, share = np.random.default_rng(0), []
    for _ in range(200):
        top, left = probe_seg.place_crop(label, 20, rng)
        part = label[top:top + 20, left:left + 20]
        counts = [(part == c).sum() for c in (0, 1)]
        share.append(max(counts) < 0.75 * sum(counts))
    # 20 of 45 x 45 places and more pass; eleven draws find one nearly always, a single draw rarely
    places = [(top, left) for top in range(45) for left in range(45)]
    good = np.mean([max(n := [(label[y:y + 20, x:x + 20] == c).sum() for c in (0, 1)]) < 0.75 * sum(n)
                    for y, x in places])
    expected = 1 - (1 - good) ** 11
    assert abs(np.mean(share) - expected) < 4 * math.sqrt(expected * (1 - expected) / 200)
    assert probe_seg.place_crop(np.zeros((15, 64), np.uint8), 20, rng)[0] == 0      # smaller than the crop, one class


def as_drawn(crop):
    """(uint8 picture, label) of a crop without what is filled up, which must be 0 and IGNORE."""
    image, label = crop
    assert image.dtype == torch.float32 and label.dtype == torch.uint8 and image.shape[1:] == label.shape
    there = (image != 0).any(0)
    height, width = int(there.any(1).sum()), int(there.any(0).sum())
    assert not there[height:].any() and not there[:, width:].any()
    assert (label[height:] == IGNORE).all() and (label[:, width:] == IGNORE).all()
    mean, std = (torch.tensor(values)[:, None, None] for values in (vit.MEAN, vit.STD))
    return ((image * std + mean) * 255).round().to(torch.uint8)[:, :height, :width], label[:height, :width]


def test_a_crop_is_the_resized_flipped_picture_with_its_label_and_the_rest_is_filled(tmp_path, monkeypatch):
    """Picture = label in colour: after resize, crop and flip the two must still lie on each other."""
    colour = np.array([[10, 0, 0], [0, 120, 0], [0, 0, 240]], np.uint8)
    monkeypatch.setattr(probe_seg, "distort", lambda rgb, rng: rgb)
    draw_voc(tmp_path, train=1)
    ids = np.arange(3, dtype=np.uint8).repeat(60)[None].repeat(90, 0)      # three columns of 60 x 90
    ids[:10] = 255
    folder = tmp_path / "VOCdevkit/VOC2012"
    mask(folder / "SegmentationClass/2007_train0.png", ids, palette=True)
    Image.fromarray(colour[np.minimum(ids, 2)]).save(folder / "JPEGImages/2007_train0.jpg", "png")
    train, _ = opened("voc", tmp_path)
    crops = probe_seg.TrainCrops(train, 64, seed=0)
    flips, sizes = set(), set()
    for epoch in range(60):
        assert crops[epoch, 0][0].shape == (3, 64, 64)
        view, classes = as_drawn(crops[epoch, 0])
        (height, width), view = classes.shape, view.permute(1, 2, 0)
        kept = classes != IGNORE
        off = (view[kept].int() - torch.from_numpy(colour)[classes[kept].long()].int()).abs().amax(-1) > 2
        assert off.float().mean() < 0.15                            # but where bilinear meets nearest, along two edges
        row = classes[-1][classes[-1] != IGNORE].int()
        flips.add(int((row[-1] - row[0]).sign()))
        sizes.add((height, width))
        assert height >= 20 and (height == 64 or width == 64 or 2 * height - width in (0, 1, -1))       # 90 : 180
    assert {-1, 1} <= flips and len(sizes) > 10


def test_a_crop_larger_than_the_picture_holds_all_of_it(tmp_path, monkeypatch):
    """0.5 to 2 times the short side of 40, in whole pixels; picture from four neighbours, label from the one that
    OpenCV's nearest takes, which is not the one under the centre; or mirrored."""
    monkeypatch.setattr(probe_seg, "distort", lambda rgb, rng: rgb)
    train, _ = opened("voc", draw_voc(tmp_path))
    crops, mirrored, ratios = probe_seg.TrainCrops(train, 200, seed=0), [], []
    for epoch in range(12):
        view, classes = as_drawn(crops[epoch, 0])
        (h, w), (H, W) = classes.shape, SIZES[0][::-1]
        source, ids = train.read(0)
        assert h == int(40 * np.random.default_rng((1, 0, epoch, 0)).uniform(0.5, 2))       # of mmcv, which truncates
        rows, columns = [int(i * np.float32(H / h)) for i in range(h)], [int(j * np.float32(W / w)) for j in range(w)]
        expected = ids[rows][:, columns]
        mirrored.append(not torch.equal(classes, expected))
        if mirrored[-1]:
            view, classes = view.flip(-1), classes.flip(-1)
        assert torch.equal(classes, expected)
        if epoch < 3:                                               # a plain loop is slow
            by_hand = bilinear_by_hand(source.permute(1, 2, 0).numpy().astype(float), (h, w))
            assert np.abs(view.permute(1, 2, 0).numpy() - by_hand).max() <= TWO_ROUNDINGS
        ratios.append(h / 40)
    assert {True, False} == set(mirrored) and 0.5 <= min(ratios) < 0.9 and 1.4 < max(ratios) <= 2


def test_crops_are_a_function_of_seed_epoch_and_index(tmp_path):
    train, _ = opened("voc", draw_voc(tmp_path))
    crops = probe_seg.TrainCrops(train, 32, seed=0)
    torch.manual_seed(0)
    first = [crops[0, i] for i in range(4)]
    torch.manual_seed(1)
    again = [crops[0, i] for i in reversed(range(4))][::-1]
    assert all(torch.equal(x, y) for a, b in zip(first, again, strict=True) for x, y in zip(a, b, strict=True))
    for other in (crops[1, 0], probe_seg.TrainCrops(train, 32, seed=1)[0, 0]):
        assert not torch.equal(first[0][0], other[0])


# ---- schedule, loss, head -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("t, rate", [(0, 1e-9), (1, 6.676e-7), (750, 4.9063e-4), (1499, 9.6188e-4), (1500, 9.625e-4),
                                     (20_000, 5e-4), (39_999, 2.5e-8)])
def test_learning_rate(t, rate):
    assert learning_rate(t, argparse.Namespace(iters=40_000, lr=1e-3)) == pytest.approx(rate, rel=1e-4)


def test_learning_rate_scales_with_the_iterations_and_the_rate_of_the_recipe():
    short, shorter = (argparse.Namespace(iters=iters, lr=1e-3) for iters in (400, 2))
    assert learning_rate(15, short) == pytest.approx(9.625e-4) and learning_rate(0, short) == pytest.approx(1e-9)
    assert [learning_rate(t, shorter) for t in range(2)] == [1e-3, 5e-4]   # no warm-up of less than half an iteration
    scenes = probe_seg.parse_args(["--weights", "random"])          # 2,000 iterations at 3e-2, the first 75 warm-up
    assert [learning_rate(t, scenes) for t in (0, 75, 1000, 1999)] == pytest.approx([3e-8, 2.8875e-2, 1.5e-2, 1.5e-5])


def test_loss_on_two_pixels_in_closed_form():
    """-log softmax of the labelled pixel, over both pixels."""
    logits = torch.tensor([[[[1.0, 5.0]], [[0.0, 7.0]]]])           # (1, 2, 1, 2)
    assert probe_seg.pixel_loss(logits, torch.tensor([[[0, IGNORE]]], dtype=torch.uint8)).item() == pytest.approx(
        math.log(1 + math.exp(-1)) / 2)


@pytest.mark.parametrize("concat_cls", [False, True])
def test_head_is_batchnorm_and_a_linear_map_patch_by_patch(concat_cls):
    """Each patch, beside it the [CLS] of its picture; then batch statistics in training, running ones in evaluation."""
    head, dim = Head(1, concat_cls, seed=3, dim=4, classes=3), 8 if concat_cls else 4
    assert sum(p.numel() for p in head.parameters()) == 2 * dim + dim * 3 + 3
    assert head.conv.bias.eq(0).all()
    draw = torch.empty(3, dim, 1, 1).normal_(0, 0.01, generator=torch.Generator().manual_seed(3))
    assert torch.equal(head.conv.weight, draw)

    rng = np.random.default_rng(0)
    cls, patches = rng.normal(1, 2, (2, 4)), rng.normal(-1, 3, (2, 2, 3, 4))       # B = 2, grid 2 x 3
    gain, shift, weight, bias = (rng.normal(size=size) for size in (dim, dim, (3, dim), 3))
    parameters = head.norm.weight, head.norm.bias, head.conv.weight, head.conv.bias
    for parameter, values in zip(parameters, (gain, shift, weight, bias), strict=True):
        parameter.data = torch.from_numpy(values).float().view(parameter.shape)
    x = np.zeros((2, 2, 3, dim))
    for b, y, z in np.ndindex(2, 2, 3):
        x[b, y, z] = [*patches[b, y, z], *cls[b]] if concat_cls else patches[b, y, z]
    mean, var = x.reshape(12, dim).mean(0), x.reshape(12, dim).var(0)
    running_mean, running_var = 0.1 * mean, 0.9 + 0.1 * var * 12 / 11      # momentum 0.1, from 0 and 1; unbiased

    model_gives = torch.from_numpy(patches).float().permute(0, 3, 1, 2)
    features = {0: None, 1: (torch.from_numpy(cls).float(), model_gives)}
    for mode, m, v in (("train", mean, var), ("eval", running_mean, running_var)):
        expected = np.zeros((2, 3, 2, 3))
        for b, y, z in np.ndindex(2, 2, 3):
            expected[b, :, y, z] = weight @ (gain * (x[b, y, z] - m) / np.sqrt(v + 1e-5) + shift) + bias
        out = head.train(mode == "train")(features)
        torch.testing.assert_close(out.detach().double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    # the same whatever the layout in memory, and never the layout that costs twice the time
    torch.testing.assert_close(head({1: (features[1][0], model_gives.contiguous())}), out)
    head.norm.register_forward_pre_hook(lambda _, given: layouts.append(given[0].stride()))
    layouts = []
    head(features)
    assert layouts == [(6 * dim, 1, 3 * dim, dim)]                  # channels last


# ---- windows and the metric -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, crop, stride, rows, columns", [
    ((512, 683), 512, 341, [0], [0, 171]),
    ((1024, 2048), 512, 341, [0, 341, 512], [0, 341, 682, 1023, 1364, 1536]),
    ((300, 512), 512, 341, [0], [0]),
    ((300, 853), 512, 341, [0], [0, 341]),
    ((300, 854), 512, 341, [0], [0, 341, 342]),
    ((96, 128), 96, 64, [0], [0, 32]),
])
def test_window_grid(size, crop, stride, rows, columns):
    assert windows(*size, crop, stride) == [(y, x) for y in rows for x in columns]


def lerp_map(values, size):
    """Bilinear resize of a (h, w) array, one pixel at a time."""
    stacked = np.repeat(values[..., None], 3, -1)
    return bilinear_by_hand(stacked, size)[..., 0]


def test_sliding_prediction_equals_a_plain_loop():
    """Picture 20 x 30, windows of 16 every 11 (2 x 3, overlapping), patch grid 2 x 2, label 25 x 33."""
    corners = windows(20, 30, 16, 11)
    assert len(corners) == 6
    features = {0: (torch.randn(6, 4), torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(0)))}
    head = Head(0, False, seed=0, dim=4, classes=3).eval()
    ours = predict(head, features, corners, (16, 16), (20, 30), (25, 33))
    logits = head(features).detach().double().numpy()
    total, count = np.zeros((3, 20, 30)), np.zeros((20, 30))
    for n, (top, left) in enumerate(corners):
        for c in range(3):
            total[c, top:top + 16, left:left + 16] += lerp_map(logits[n, c], (16, 16))
        count[top:top + 16, left:left + 16] += 1
    assert count.min() == 1 and count.max() == 6
    full = np.stack([lerp_map(t / count, (25, 33)) for t in total])
    assert np.array_equal(ours[0].numpy(), full.argmax(0))


def test_a_batch_of_pictures_is_predicted_as_one_by_one():
    head, corners = Head(0, True, seed=0, dim=4, classes=3).eval(), [(0, 0), (0, 4)]
    cls, patches = torch.randn(2, 5, 4), torch.randn(2, 5, 4, 2, 2)       # 2 windows of 5 pictures
    together = predict(head, {0: (cls.flatten(0, 1), patches.flatten(0, 1))}, corners, (8, 8), (8, 12), (8, 12))
    for i in range(5):
        alone = predict(head, {0: (cls[:, i], patches[:, i])}, corners, (8, 8), (8, 12), (8, 12))
        assert torch.equal(together[i], alone[0])


def test_iou_by_hand():
    """Labels 0 0 1 1, predictions 0 1 1 1: 1/2 and 2/3; a class that is only predicted has 0, an absent one nan."""
    confusion = torch.zeros(4, 4, dtype=torch.int64)
    for label, prediction in ((0, 0), (0, 1), (1, 1), (1, 1)):
        confusion[label, prediction] += 1
    assert probe_seg.iou(confusion).tolist()[:2] == pytest.approx([50, 200 / 3])
    assert probe_seg.iou(confusion).isnan().tolist() == [False, False, True, True]
    confusion[1, 2] += 1
    assert probe_seg.iou(confusion).tolist()[:3] == pytest.approx([50, 50, 0])
    assert probe_seg.constant_miou(confusion) == pytest.approx(100 * 3 / 5 / 2)


def miou_by_hand(labels, predictions, classes):
    """Sets of pixels, class by class."""
    pixels = collections.Counter((y, p) for label, guess in zip(labels, predictions, strict=True)
                                 for y, p in zip(label.flatten().tolist(), guess.flatten().tolist(), strict=True)
                                 if y != 255)
    values = []
    for c in range(classes):
        union = sum(n for (y, p), n in pixels.items() if y == c or p == c)
        values.append(100 * pixels[c, c] / union if union else math.nan)
    return values


def identity_head(classes):
    """Logits = the first `classes` features."""
    head = Head(0, False, seed=0, dim=classes, classes=classes)
    head.conv.weight.data = torch.eye(classes)[..., None, None]
    return head


def test_confusion_equals_sets_of_pixels():
    generator = torch.Generator().manual_seed(0)
    heads = torch.nn.ModuleList([identity_head(5), Head(0, False, 1, 5, 5)])
    views, truth = [], []
    for size in ((6, 7), (9, 4), (5, 5)):
        label = torch.randint(0, 4, size, generator=generator).to(torch.uint8)
        label[torch.rand(size, generator=generator) < 0.3] = IGNORE
        patches = torch.randn(1, 5, *size, generator=generator)
        patches[:, 4] = -9                                          # never predicted, never a label
        views.append((torch.zeros(1, 3, *size), label[None], [(0, 0)], size, {0: (torch.zeros(1, 5), patches)}))
        truth.append((label, patches[0].argmax(0)))
    confusion = probe_seg.confusion_matrices(heads, views)
    assert confusion.dtype == torch.int64 and confusion[0].sum() == sum((label != IGNORE).sum() for label, _ in truth)
    expected = miou_by_hand(*zip(*truth, strict=True), 5)
    assert probe_seg.iou(confusion)[0].tolist() == pytest.approx(expected, nan_ok=True) and math.isnan(expected[4])


def test_each_seed_counts_with_its_own_best_evaluation():
    iou = torch.tensor([[[10.0, 30], [50, math.nan]], [[40, 20], [40, 20]], [[5, 5], [0, 40]]], dtype=torch.double)
    metrics = probe_seg.head_metrics(iou)                           # (3 evaluations, 2 seeds, 2 classes)
    assert metrics["miou_seeds"] == [30, 50] and metrics["miou"] == 40
    assert metrics["miou_sd"] == pytest.approx(math.sqrt(200))
    assert metrics["miou_last_seeds"] == [5, 20] and metrics["miou_last"] == 12.5
    assert metrics["iou"] == [45, 20]                               # of evaluations 2 and 1; nan counts nowhere
    single = probe_seg.head_metrics(iou[:1, 1:])
    assert single["iou"] == [50, None] and single["miou_sd"] is None


# ---- learning -------------------------------------------------------------------------------------------------------

class Cells:
    """Pictures of 8 x 8 cells, whose grey value is the class of the cell; or of another cell. Only the middle of a cell
    is labelled: further out, upsampling mixes the cells. In training, at a quarter of the side, that is all of it."""

    shuffled = False

    def __init__(self, split, size, length, cards):
        rng, side = np.random.default_rng(len(split)), size // 8
        classes = rng.integers(0, 11, (40, 8, 8)).astype(np.uint8)
        shown = rng.permutation(classes.ravel()).reshape(classes.shape) if self.shuffled else classes
        self.images = torch.from_numpy(shown.repeat(side, 1).repeat(side, 2))[:, None].repeat(1, 3, 1, 1)
        middle = abs((np.arange(size) + 0.5) / side % 1 - 0.5) < 0.3
        labels = np.where(middle[:, None] & middle, classes.repeat(side, 1).repeat(side, 2), IGNORE)
        self.labels = torch.from_numpy(labels)

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return dict(image=self.images[i], mask=self.labels[i])


@pytest.mark.parametrize("shuffled", [False, True])
def test_planted_features_are_found_and_shuffled_ones_are_chance(monkeypatch, checkpoint, capsys, tmp_path, shuffled):
    def one_hot(model, images, blocks, args):
        grey = (images * torch.tensor(vit.STD)[:, None, None] + torch.tensor(vit.MEAN)[:, None, None]) * 255
        patches = F.one_hot(grey[:, 0, ::8, ::8].round().long(), 24).permute(0, 3, 1, 2).float()
        return {block: (torch.zeros(len(images), 24), patches) for block in blocks}

    monkeypatch.setattr(Cells, "shuffled", shuffled)
    monkeypatch.setattr(probe_seg, "Shapes", Cells)
    monkeypatch.setattr(probe_seg, "frozen", one_hot)
    probe_seg.main(["--weights", checkpoint, "--iters", "200"])
    miou = result(capsys, tmp_path / "tiny.seg.shapes.json")["metrics"]["miou"]
    assert miou < 10 if shuffled else miou == 100                   # chance: 1/11 right is an IoU of 1/21, 4.8 %


# ---- end to end -----------------------------------------------------------------------------------------------------

def run(capsys, tmp_path, checkpoint, data, *flags, out="out"):
    """(result, content of the head file) of a few iterations on the drawn data set."""
    root = tmp_path / data
    if data != "shapes" and not root.exists():
        DRAW[data](root)
    where = [*SMALL, "--root", str(root)] if data != "shapes" else "--iters 4 --batch-size 2 --eval-every 2".split()
    probe_seg.main(["--weights", checkpoint, "--data", data, *where, "--out", f"{out}.json", *flags])
    return result(capsys, tmp_path / f"{out}.json"), torch.load(tmp_path / f"{out}.head.pt", weights_only=True)


def same(a, b):
    """Bit-equal nested containers of tensors, numbers (nan equals nan) and strings."""
    if torch.is_tensor(a):
        return torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def miou_of_head_by_hand(model, state, pairs, table, classes, short, long, crop, stride):
    """The last mIoU from a saved head: windows, BatchNorm and linear map written out, one window at a time."""
    labels, guesses = [], []
    scale = state["0.norm.weight"] / (state["0.norm.running_var"] + 1e-5).sqrt()
    for picture_path, mask_path in pairs:
        image, ids = Image.open(picture_path).convert("RGB"), np.asarray(Image.open(mask_path))
        factor = min(short / min(image.size), long / max(image.size))
        w, h = (int(side * factor + 0.5) for side in image.size)
        x = F.interpolate(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None], (h, w), mode="bilinear")[0]
        x = (x / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
            [0.229, 0.224, 0.225])[:, None, None]
        total, count = torch.zeros(classes, h, w), torch.zeros(h, w)
        for i in range(max(h - crop + stride - 1, 0) // stride + 1):
            for j in range(max(w - crop + stride - 1, 0) // stride + 1):
                bottom, right = min(i * stride + crop, h), min(j * stride + crop, w)
                window = x[:, max(bottom - crop, 0):bottom, max(right - crop, 0):right]
                patches = model.features(window[None], [-1])[0].patches[0]
                y = (patches - state["0.norm.running_mean"]) * scale + state["0.norm.bias"]
                y = (y @ state["0.conv.weight"][..., 0, 0].T + state["0.conv.bias"]).permute(2, 0, 1)
                y = F.interpolate(y[None], window.shape[1:], mode="bilinear", align_corners=False)[0]
                total[:, max(bottom - crop, 0):bottom, max(right - crop, 0):right] += y
                count[max(bottom - crop, 0):bottom, max(right - crop, 0):right] += 1
        full = F.interpolate((total / count)[None], ids.shape, mode="bilinear", align_corners=False)[0]
        labels.append(torch.tensor([[table(k) for k in row] for row in ids.tolist()]))
        guesses.append(full.argmax(0))
    return miou_by_hand(labels, guesses, classes)


def constant_by_hand(labels):
    """mIoU of the most frequent label everywhere: its share for that class, 0 for the others."""
    counts = np.bincount(torch.cat([label.flatten() for label in labels]).numpy(), minlength=256)[:IGNORE]
    return 100 * counts.max() / counts.sum() / (counts > 0).sum()


TABLES = {"voc": lambda k: k, "ade20k": lambda k: 255 if k == 0 else k - 1,
          "cityscapes": lambda k: CITYSCAPES.get(k, 255)}
LONG = {"voc": 160, "ade20k": math.inf, "cityscapes": 80}


@pytest.mark.parametrize("data, classes", [("voc", 21), ("ade20k", 150), ("cityscapes", 19)])
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_end_to_end(tmp_path, checkpoint, capsys, data, classes, which):
    r, saved = run(capsys, tmp_path, checkpoint, data, "--which", which)
    model = disk.load_backbone(checkpoint, which)
    _, val = opened(data, tmp_path / data)
    ious = miou_of_head_by_hand(model, saved["heads"], val.pairs, TABLES[data], classes, 40, LONG[data], 32, 21)
    assert saved["history"][-1]["iou"][0].tolist() == pytest.approx(ious, abs=0.5, nan_ok=True)       # a tie or two
    assert r["metrics"]["miou_last"] == pytest.approx(float(np.nanmean(ious)), abs=0.1)
    assert r["metrics"]["miou"] == max(entry["iou"].nanmean().item() for entry in saved["history"])
    assert [entry["iteration"] for entry in saved["history"]] == [2, 4]
    assert r["metrics"]["miou_constant"] == pytest.approx(constant_by_hand(val.read(i)[1] for i in range(3)))
    assert set(r) == KEYS and (r["probe"], r["data"], r["which"], r["epochs"]) == ("seg", data, which, 3)
    assert r["root"] == str(tmp_path / data)
    assert r["weights_sha256"] == hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()
    assert r["config"] == dataclasses.asdict(CONFIG) and len(r["metrics"]["iou"]) == classes
    p = r["protocol"]
    assert (p["train"], p["val"], p["classes"], p["partial"], p["crop"], p["stride"], p["short_side"]) == (
        4, 3, classes, True, 32, 21, 40)
    assert p["long_side"] == (None if data == "ade20k" else LONG[data])


def test_pictures_smaller_than_the_crop_and_odd_to_the_patch_are_padded(tmp_path, checkpoint, capsys):
    r, _ = run(capsys, tmp_path, checkpoint, "voc", "--crop", "44", "--short-side", "29")      # windows 29 x 44 at most
    assert 0 <= r["metrics"]["miou"] <= 100 and r["protocol"]["stride"] == 29
    model, args = disk.load_backbone(checkpoint), probe_seg.parse_args(["--weights", "random"])
    images = torch.randn(2, 3, 29, 44)
    cls, patches = probe_seg.frozen(model, images, [1], args)[1]
    by_hand = torch.zeros(2, 3, 32, 48)
    by_hand[:, :, 1:30, 2:46] = images
    expected = model.features(by_hand, [1])[0]
    assert torch.equal(cls, expected.cls) and torch.equal(patches, expected.patches.permute(0, 3, 1, 2))


def test_shapes_end_to_end(few_scenes, tmp_path, checkpoint, capsys):
    r, saved = run(capsys, tmp_path, checkpoint, "shapes", *"--iters 40 --batch-size 8 --eval-every 20".split())
    model, state = disk.load_backbone(checkpoint), saved["heads"]
    labels, guesses = [], []
    for scene in scenes("val", 64, 20, 5):
        patches = model.features(vit.normalize(scene["image"])[None], [-1])[0].patches[0]
        y = (patches - state["0.norm.running_mean"]) / (state["0.norm.running_var"] + 1e-5).sqrt()
        y = (y * state["0.norm.weight"] + state["0.norm.bias"]) @ state["0.conv.weight"][..., 0, 0].T
        y = (y + state["0.conv.bias"]).permute(2, 0, 1)[None]
        labels.append(scene["mask"])
        guesses.append(F.interpolate(y, (64, 64), mode="bilinear")[0].argmax(0))
    assert r["metrics"]["miou_last"] == pytest.approx(float(np.nanmean(miou_by_hand(labels, guesses, 11))), abs=0.01)
    assert r["metrics"]["miou_constant"] == pytest.approx(constant_by_hand(labels))
    assert (r["protocol"]["classes"], r["protocol"]["crop"], r["protocol"]["train"]) == (11, 64, 40)


def test_training_equals_a_plain_loop(few_scenes, tmp_path, checkpoint, capsys):
    """Order of images, frozen features, loss over all pixels, AdamW's settings and the schedule, written out."""
    _, saved = run(capsys, tmp_path, checkpoint, "shapes", "--iters", "30", "--batch-size", "16", "--eval-every", "30")
    model, drawn, coarse = disk.load_backbone(checkpoint), scenes("train", 64, 40, 5), scenes("train", 16, 40, 5)
    weight = torch.empty(11, 24, 1, 1).normal_(0, 0.01, generator=torch.Generator().manual_seed(0))
    parameters = [torch.ones(24), torch.zeros(24), weight, torch.zeros(11)]
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in parameters], betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=1e-4)
    order = [i for epoch in range(12) for i in np.random.default_rng((0, 0, epoch)).permutation(40).tolist()]
    for t in range(30):
        batch = order[16 * t:16 * (t + 1)]
        x = model.features(torch.stack([vit.normalize(drawn[i]["image"]) for i in batch]), [-1])[0].patches
        x = (x - x.mean((0, 1, 2))) / (x.var((0, 1, 2), correction=0) + 1e-5).sqrt() * parameters[0] + parameters[1]
        logits = (x @ parameters[2][..., 0, 0].T + parameters[3]).permute(0, 3, 1, 2)
        logits = F.interpolate(logits, (16, 16), mode="bilinear", align_corners=False).log_softmax(1)
        labels = torch.stack([coarse[i]["mask"] for i in batch]).long()
        optimizer.zero_grad()
        (-logits.gather(1, labels[:, None]).sum() / (16 * 16 * 16)).backward()
        optimizer.param_groups[0]["lr"] = 3e-2 * (1 - t / 30) * (1e-6 if t == 0 else 1)       # warm-up of 1.1, so 1
        optimizer.step()
    for ours, name in zip(parameters, ("norm.weight", "norm.bias", "conv.weight", "conv.bias"), strict=True):
        torch.testing.assert_close(ours.detach(), saved["heads"][f"0.{name}"], rtol=1e-4, atol=1e-5)
    group = saved["optimizer"]["param_groups"][0]                   # a decay of 1e-4 hardly shows in 30 iterations
    assert {name: group[name] for name in ("betas", "eps", "weight_decay", "amsgrad")} == {
        "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4, "amsgrad": False}


PAPER = dict(crop=512, stride=341, iters=40_000, batch_size=16, lr=1e-3, weight_decay=1e-4, warmup=1_500,
             eval_every=5_000, optimizer="AdamW 0.9 0.999", ignore=255, label_resolution="original", seeds=1,
             partial=False, train_list="train", block=1, concat_cls=False, probe="seg", fingerprint="f",
             feature="patches, final norm", head="BatchNorm, 1x1 convolution", precision="off",
             schedule="linear to 0, warm-up from 1e-6", loss="cross-entropy / all pixels",
             augmentation="resize 0.5-2, crop 0.75, flip 0.5, photometric", padding="to whole patches, zeros around",
             reported="best over evaluations, of each head seed")
PROTOCOL = {                                                        # section 6 of the method's description
    "voc": dict(PAPER, short_side=512, long_side=2048, classes=21, train=1_464, val=1_449),
    "ade20k": dict(PAPER, short_side=512, long_side=None, classes=150, train=20_210, val=2_000),
    "cityscapes": dict(PAPER, short_side=1024, long_side=2048, classes=19, train=2_975, val=500),
    "shapes": dict(PAPER, short_side=None, long_side=None, stride=None, crop=64, classes=11, train=1_000, val=500,
                   iters=2_000, lr=3e-2, eval_every=2_000, warmup=75, fingerprint=shapes.FINGERPRINT,
                   augmentation="none", cards=5, train_labels="rendered at 1/4 of the side"),
}


def opened_scenes(size):
    return probe_seg.open_data(probe_seg.parse_args(["--weights", "random"]), size)[:2]


def test_scenes_hold_several_cards_and_the_labels_of_training_are_every_fourth_row_and_column(few_scenes):
    train, val = opened_scenes(64)
    assert (len(train), len(val)) == (40, 20)
    for split, ours in (("train", train), ("val", val)):
        classes, alone = [], shapes.Shapes(split, 64, 40)
        for i, (scene, drawn) in enumerate(zip(ours, shapes.Shapes(split, 64, len(ours), cards=5), strict=True)):
            assert torch.equal(scene["image"], drawn["image"]) and not torch.equal(scene["image"], alone[i]["image"])
            classes.append(len(drawn["mask"][drawn["mask"] > 0].unique()))
            if split == "val":
                assert torch.equal(scene["mask"], drawn["mask"])    # of all pixels
        assert max(classes) > 3 and np.mean([n > 1 for n in classes]) > 0.9 and max(classes) <= 5
    quarter, exact = shapes.Shapes("train", 16, 40, cards=5), []
    for scene, small, drawn in zip(train, quarter, shapes.Shapes("train", 64, 40, cards=5), strict=True):
        assert scene["mask"].shape == (16, 16) and torch.equal(scene["mask"], small["mask"])
        # the middle of a pixel of 4 x 4 is where its four inner ones meet
        inner = torch.stack([drawn["mask"][y::4, x::4] for y in (1, 2) for x in (1, 2)])
        agree = (inner == inner[0]).all(0)
        assert torch.equal(scene["mask"][agree], inner[0][agree])
        exact.append((scene["mask"] == inner[3]).float().mean())
    assert np.mean(exact) > 0.97                                    # all but pixels on edges


def test_scenes_are_drawn_once_for_all_checkpoints(tmp_path, checkpoint, capsys, monkeypatch):
    drawn = collections.Counter()

    class Counted(shapes.Shapes):
        def __init__(self, split, size, length, cards):
            super().__init__(split, size, length // 100, cards)

        def __getitem__(self, i):
            scene = super().__getitem__(i)                          # past the end, nothing is drawn
            drawn[self.split, self.size, self.cards, i] += 1
            return scene

    monkeypatch.setattr(probe_seg, "Shapes", Counted)
    other = save(tmp_path / "other.pt", seed=8)
    probe_seg.main(["--weights", checkpoint, other, *"--iters 2 --eval-every 1 --batch-size 2 --save-images 1".split()])
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]) == 2
    assert drawn == {(split, size, 5, i): 1 for split, size, n in (("train", 64, 10), ("train", 16, 10), ("val", 64, 5))
                     for i in range(n)}


@pytest.mark.parametrize("data", PROTOCOL)
def test_the_defaults_are_the_protocol(tmp_path, checkpoint, monkeypatch, data):
    class Full(list):
        """As many pictures as the data set has."""
        def read(self, i):
            return None, torch.zeros(2, 2, dtype=torch.uint8)

    def claim(out, default, result):
        assert result["protocol"] == dict(PROTOCOL[data], data=data)       # nothing else is in it
        assert (out, default, result["data"]) == (None, str(tmp_path / f"tiny.seg.{data}.json"), data)
        raise ValueError("seen")

    counts = {split: PROTOCOL[data][split] for split in ("train", "val")}
    assert {split: probe_seg.RECIPES[data][split] for split in counts} == counts
    if data == "shapes":                                            # without the time that drawing takes
        monkeypatch.setattr(probe_seg, "Shapes", lambda split, size, length, cards: [dict(mask=None)] * length)
    else:
        monkeypatch.setattr(probe_seg, "open_data", lambda args, size: (*(Full([0] * n) for n in counts.values()), "f"))
    monkeypatch.setattr(disk, "claim", claim)
    with pytest.raises(SystemExit, match="seen"):
        probe_seg.main(["--weights", checkpoint, "--data", data, "--amp", "off"] + ["--root", "."] * (data != "shapes"))


@pytest.mark.parametrize("data, flags, n, crop, views", [
    ("voc", "", 16, 512, 2), ("ade20k", "", 16, 512, 2), ("cityscapes", "", 16, 512, 3 * 6), ("shapes", "", 16, 64, 20),
    ("voc", "--batch-size 3 --crop 96 --short-side 128", 3, 96, 2 * 2), ("shapes", "--batch-size 3", 3, 64, 20)])
def test_what_the_protocol_says_is_what_is_fed(few_scenes, tmp_path, checkpoint, monkeypatch, data, flags, n, crop,
                                               views):
    """Batches of 16 crops of 512 px, windows of 512 px; scenes of twice image_size, whole, labels of training a quarter
    of their side; by their shapes, with features that cost nothing."""
    frozen, labelled = [], []

    def features(model, images, blocks, args):
        frozen.append((len(images), *images.shape[2:]))
        return {1: (images[:, :1, 0, 0].repeat(1, 24), images[:, :1, ::64, ::64].repeat(1, 24, 1, 1))}

    def loss(logits, labels):
        labelled.append(tuple(labels.shape))
        return logits.mean()

    monkeypatch.setattr(probe_seg, "frozen", features)
    monkeypatch.setattr(probe_seg, "pixel_loss", loss)
    where = []
    if data != "shapes":
        where = ["--root", str(DRAW[data](tmp_path / data, 2, 1)), "--allow-partial", "--workers", "0"]
    probe_seg.main(["--weights", checkpoint, "--data", data, *where, "--iters", "1", *flags.split()])
    assert labelled == [(n, 16, 16) if data == "shapes" else (n, crop, crop)]
    assert frozen == [*((min(n, 40 - i), crop, crop) for i in range(0, 40 if data == "shapes" else 1, n)),
                      (views, crop, crop)]                          # of scenes once


def test_every_epoch_has_its_own_order_and_crops(tmp_path, checkpoint, capsys, monkeypatch):
    """Four pictures, batches of four; every picture has one class, which tells it in the batch."""
    root, seen, orders = draw_voc(tmp_path / "voc"), [], []
    for i, size in enumerate(SIZES):
        mask(voc(root, f"SegmentationClass/2007_train{i}.png"), np.full(size[::-1], i, np.uint8), palette=True)
    frozen, loss = probe_seg.frozen, probe_seg.pixel_loss

    def watched(model, images, blocks, args):
        seen.append(images)
        return frozen(model, images, blocks, args)

    def order(logits, labels):
        orders.append([int(label[label != IGNORE].unique()) for label in labels])
        return loss(logits, labels)

    monkeypatch.setattr(probe_seg, "frozen", watched)
    monkeypatch.setattr(probe_seg, "pixel_loss", order)
    run(capsys, tmp_path, checkpoint, "voc", "--batch-size", "4", "--iters", "6", "--eval-every", "6")
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in orders) and len({tuple(epoch) for epoch in orders}) > 2
    crops = [images[epoch.index(0)] for images, epoch in zip(seen, orders, strict=False)]
    assert not any(torch.equal(a, b) for i, a in enumerate(crops) for b in crops[:i])


def test_log_lines_give_the_mean_since_the_last_and_the_time_left(few_scenes, checkpoint, capsys, monkeypatch):
    """The loss of iteration n is n and takes two seconds; 2 to 10 are 6 in the mean; also of heads side by side."""
    clock = {"now": 0.0, "calls": 0}

    def loss(logits, labels):
        clock["now"] += 1
        clock["calls"] += 1
        return logits.sum() * 0 + (clock["calls"] + 1) // 2         # two heads

    monkeypatch.setattr(probe_seg, "pixel_loss", loss)
    monkeypatch.setattr(disk.time, "perf_counter", lambda: clock["now"])
    flags = "--log-every 10 --save-every 13 --iters 25 --eval-every 25 --seeds 2".split()

    def lines():
        return re.findall(r"eta (\S+) +loss (\S+)  iteration (\d+)/25", capsys.readouterr().out)

    where = ["--weights", checkpoint, "--batch-size", "2", *flags]
    probe_seg.main(where)
    assert lines() == [("0:00:48", "1.0000", "1"), ("0:00:30", "6.0000", "10"), ("0:00:10", "15.5000", "20"),
                       ("0:00:00", "23.0000", "25")]
    clock["calls"] = 0
    write = disk.write_checkpoint

    def killed(path, content):
        write(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(disk, "write_checkpoint", killed)
    with pytest.raises(SystemExit):
        probe_seg.main([*where, "--out", "b.json"])
    monkeypatch.setattr(disk, "write_checkpoint", write)
    lines()
    probe_seg.main([*where, "--out", "b.json"])                     # from 13 on
    assert lines() == [("0:00:22", "14.0000", "14"), ("0:00:10", "17.5000", "20"), ("0:00:04", "22.0000", "23"),
                       ("0:00:00", "24.5000", "25")]


@pytest.mark.parametrize("data", ["voc", "shapes"])
def test_a_head_does_not_depend_on_the_heads_beside_it(few_scenes, tmp_path, checkpoint, capsys, data):
    r, together = run(capsys, tmp_path, checkpoint, data, "--blocks", "all", "--concat-cls", "both", "--seeds", "2")
    order = [(1, False), (1, True), (0, False), (0, True)]          # the headline comes first in the file
    assert r["metrics"]["miou_seeds"] == [max(entry["iou"][k].nanmean().item() for entry in together["history"])
                                          for k in (0, 1)]
    assert [(h["block"], h["concat_cls"]) for h in r["metrics"]["heads"]] == sorted(order)
    for kind, concat in ((1, False), (1, True), (0, True)):
        alone_r, alone = run(capsys, tmp_path, checkpoint, data, "--blocks", str(kind), "--concat-cls",
                             "yes" if concat else "no", out=f"alone{kind}{concat}")
        k = 2 * order.index((kind, concat))
        state = {name.removeprefix(f"{k}."): value for name, value in together["heads"].items()
                 if name.startswith(f"{k}.")}
        assert same(state, {name.removeprefix("0."): value for name, value in alone["heads"].items()})
        for a, b in zip(together["history"], alone["history"], strict=True):
            assert same(a["iou"][k], b["iou"][0])
        entry = r["metrics"]["heads"][sorted(order).index((kind, concat))]
        assert entry["miou_seeds"][0] == alone_r["metrics"]["miou"]
        if (kind, concat) == order[0]:                              # so a table may mix the two results
            assert dict(alone_r["protocol"], seeds=2) == r["protocol"]
        else:
            assert dict(alone_r["protocol"], seeds=2) != r["protocol"]
    assert {name: r["metrics"][name] for name in ("miou", "miou_last", "iou")} == {
        name: r["metrics"]["heads"][2][name] for name in ("miou", "miou_last", "iou")}         # block 1 without [CLS]


def test_head_seed_k_is_the_only_head_of_its_own_seed(few_scenes, tmp_path, checkpoint, capsys, monkeypatch):
    """The order of images belongs to --seed; with that held, seeds 4 and 5 are those two heads alone."""
    _, both = run(capsys, tmp_path, checkpoint, "shapes", "--seed", "4", "--seeds", "2")
    order = probe_seg.batch_order

    def of_seed_four(n, args, start):
        return order(n, probe_seg.argparse.Namespace(**vars(args) | {"seed": 4}), start)

    monkeypatch.setattr(probe_seg, "batch_order", of_seed_four)
    for k, seed in enumerate("45"):
        _, alone = run(capsys, tmp_path, checkpoint, "shapes", "--seed", seed, out=f"alone{seed}")
        assert all(torch.equal(value, both["heads"][name.replace("0.", f"{k}.", 1)])
                   for name, value in alone["heads"].items())
    assert not torch.equal(both["heads"]["0.conv.weight"], both["heads"]["1.conv.weight"])


@pytest.mark.parametrize("data, workers", [("voc", "0"), ("voc", "1"), ("shapes", "0")])
def test_resume_is_bit_equal(few_scenes, tmp_path, checkpoint, capsys, monkeypatch, data, workers):
    flags = "--seeds 2 --concat-cls yes --save-every 1 --save-images 1".split()
    whole = run(capsys, tmp_path, checkpoint, data, *flags)
    write = disk.write_checkpoint

    def killed(path, content):
        write(path, content)
        if content["iteration"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(disk, "write_checkpoint", killed)
    with pytest.raises(SystemExit):
        run(capsys, tmp_path, checkpoint, data, *flags, "--workers", workers, out="parts")
    monkeypatch.setattr(disk, "write_checkpoint", write)
    parts = run(capsys, tmp_path, checkpoint, data, *flags, "--workers", "0", out="parts")
    assert same(whole, parts) and len(parts[1]["history"]) == 2
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "parts.png").read_bytes()


@pytest.mark.parametrize("data, workers", [("voc", 0), ("voc", 1), ("shapes", 0)])
@pytest.mark.parametrize("number, where", [(signal.SIGTERM, "pixel_loss"), (signal.SIGINT, "predict")])
def test_a_signal_saves_and_the_same_command_goes_on(few_scenes, tmp_path, checkpoint, capsys, monkeypatch, data,
                                                     workers, number, where):
    """In iteration 8, or within the last evaluation; loader processes get the signal, too, as from a terminal."""
    flags = ["--save-images", "1", "--workers", str(workers), "--iters", "12", "--eval-every", "6"]
    whole = run(capsys, tmp_path, checkpoint, data, *flags)
    work, calls = getattr(probe_seg, where), []

    def signalled(*inputs):
        calls.append(number)
        for child in multiprocessing.active_children():
            os.kill(child.pid, number)
        if len(calls) == (8 if where == "pixel_loss" else 4 if data == "voc" else 2):       # three val pictures
            os.kill(os.getpid(), number)
        return work(*inputs)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(probe_seg, where, signalled)
        with pytest.raises(SystemExit) as stop:
            run(capsys, tmp_path, checkpoint, data, *flags, out="parts")
    assert stop.value.code == 128 + number and signal.getsignal(number) == before
    saved = torch.load(tmp_path / "parts.head.pt", weights_only=True)
    assert saved["iteration"] == (8 if where == "pixel_loss" else 12)
    evaluated = [6, 12] if (where, data) == ("predict", "shapes") else [6]      # the scenes are one batch
    assert [entry["iteration"] for entry in saved["history"]] == evaluated and not (tmp_path / "parts.json").exists()
    if (where, data) != ("predict", "voc"):
        assert capsys.readouterr().out.splitlines()[-1] == (
            f"stopped by signal {int(number)} after iteration {saved['iteration']}, saved; run the same command again "
            "to go on")
    assert same(whole, run(capsys, tmp_path, checkpoint, data, *flags, out="parts"))
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "parts.png").read_bytes()


def relabel(root, split):
    mask(voc(root, f"SegmentationClass/2007_{split}0.png"), blocks_of([3, 20], SIZES[0], 9), palette=True)


def repaint(root, split):
    picture(voc(root, f"JPEGImages/2007_{split}0.jpg"), SIZES[0], 99)


@pytest.mark.parametrize("change", [relabel, repaint])
@pytest.mark.parametrize("split", ["train", "val"])
def test_other_data_of_the_same_names_and_counts_is_measured_anew(tmp_path, checkpoint, capsys, change, split):
    """Heads and result of the old data are neither read nor overwritten."""
    where = ["--weights", checkpoint, "--data", "voc", "--root", str(draw_voc(tmp_path / "voc")), *SMALL]
    probe_seg.main(where)
    old = result(capsys, tmp_path / "tiny.seg.voc.json")
    change(tmp_path / "voc", split)
    status, line = exits(capsys, *where, "--out", "tiny.seg.voc.json")
    assert status == 1 and re.search("tiny.seg.voc.json: .*fingerprint.*another --out", line)
    probe_seg.main(where)
    (new,) = set(tmp_path.glob("tiny.seg.voc.*.json"))
    new = result(capsys, new)
    assert json.loads((tmp_path / "tiny.seg.voc.json").read_text()) == old
    fresh, heads = run(capsys, tmp_path, checkpoint, "voc", out="fresh")
    assert new == fresh and new["metrics"] != old["metrics"]
    torch.save(heads | {"iteration": 2}, tmp_path / "fresh.head.pt")
    (tmp_path / "fresh.json").unlink()
    change(tmp_path / "voc", {"train": "val", "val": "train"}[split])
    status, line = exits(capsys, *where, "--out", "fresh.json")
    assert status == 1 and re.match("fresh.head.pt: holds unfinished heads with fingerprint", line)


@pytest.mark.parametrize("flags", ["--seed 1", "--which student", "--weights other.pt", "--blocks 0"])
def test_heads_of_another_question_are_not_taken_and_lost_only_once_evaluated(few_scenes, tmp_path, checkpoint, capsys,
                                                                              flags):
    save(tmp_path / "other.pt", seed=8)
    fresh = run(capsys, tmp_path, checkpoint, "shapes", *flags.split(), out="fresh")
    first, saved = run(capsys, tmp_path, checkpoint, "shapes")
    (tmp_path / "out.json").unlink()
    torch.save(saved | {"history": saved["history"][:-1]}, tmp_path / "out.head.pt")     # cut in the last evaluation
    argv = ["--weights", checkpoint, *"--iters 4 --batch-size 2 --eval-every 2".split(), *flags.split()]
    status, line = exits(capsys, *argv, "--out", "out.json")
    assert status == 1 and line.startswith("out.head.pt: holds unreported heads with ")
    assert same((first, saved), run(capsys, tmp_path, checkpoint, "shapes"))
    (tmp_path / "out.json").unlink()
    assert same(fresh, run(capsys, tmp_path, checkpoint, "shapes", *flags.split()))


def test_results_of_other_blocks_do_not_meet(few_scenes, tmp_path, checkpoint, capsys):
    def probe(*flags):
        probe_seg.main(["--weights", checkpoint, *"--iters 4 --batch-size 2 --eval-every 2".split(), *flags])
        out = capsys.readouterr().out.splitlines()
        return json.loads(out[-1]), out[-2].startswith("finished before: result read from ")

    last, first = probe()[0], probe("--blocks", "0")[0]
    assert (last["protocol"]["block"], first["protocol"]["block"]) == (1, 0)
    files = sorted(tmp_path.glob("tiny.seg.shapes*.json"), key=lambda file: len(file.name))
    assert [json.loads(file.read_text()) for file in files] == [last, first]
    assert probe() == (last, True) and probe("--blocks", "0") == (first, True)
    both, read = probe("--blocks", "all")                           # its headline is the last block's
    assert not read and [head["block"] for head in both["metrics"]["heads"]] == [0, 1]
    assert both["metrics"]["miou"] == last["metrics"]["miou"]
    assert probe("--blocks", "-1") == (both, True)                  # all of it, and more
    status, line = exits(capsys, "--weights", checkpoint, *"--iters 4 --batch-size 2 --eval-every 2".split(),
                         "--concat-cls", "both")                    # one of its heads, and another
    assert status == 1 and "holds heads of other blocks, which would be lost" in line


def test_pictures_of_a_finished_probe(few_scenes, tmp_path, checkpoint, capsys):
    first = run(capsys, tmp_path, checkpoint, "shapes", "--save-images", "2")
    sheet = (tmp_path / "out.png").read_bytes()
    (tmp_path / "out.png").unlink()
    probe_seg.main(["--weights", checkpoint, *"--iters 4 --batch-size 2 --eval-every 2 --out out.json".split(),
                    "--save-images", "2"])
    assert "out.json: no pictures drawn, nothing is evaluated again; remove it to draw them" in capsys.readouterr().out
    (tmp_path / "out.json").unlink()
    assert same(first, run(capsys, tmp_path, checkpoint, "shapes", "--save-images", "2"))
    assert (tmp_path / "out.png").read_bytes() == sheet


def test_a_finished_probe_is_neither_trained_nor_evaluated_again(few_scenes, tmp_path, checkpoint, capsys, monkeypatch):
    first = run(capsys, tmp_path, checkpoint, "shapes")
    with monkeypatch.context() as patch:
        patch.delattr(probe_seg, "frozen")
        assert same(first, run(capsys, tmp_path, checkpoint, "shapes"))
    (tmp_path / "out.json").unlink()
    other, _ = run(capsys, tmp_path, checkpoint, "shapes", "--iters", "6")
    assert other["protocol"]["iters"] == 6                          # finished heads of other settings make way


def test_unfinished_heads_of_other_settings_are_refused(few_scenes, tmp_path, checkpoint, capsys):
    _, saved = run(capsys, tmp_path, checkpoint, "shapes")
    torch.save(saved | {"iteration": 2}, tmp_path / "out.head.pt")
    (tmp_path / "out.json").unlink()
    status, line = exits(capsys, "--weights", checkpoint, "--iters", "4", "--batch-size", "3", "--eval-every", "2",
                         "--out", "out.json")
    assert status == 1 and re.fullmatch("out.head.pt: holds unfinished heads with batch_size 2, now 3; .*", line)


def test_every_evaluation_happens_once_and_the_end_is_evaluated(few_scenes, tmp_path, checkpoint, capsys):
    _, saved = run(capsys, tmp_path, checkpoint, "shapes", "--iters", "5", "--eval-every", "2")
    assert [entry["iteration"] for entry in saved["history"]] == [2, 4, 5]
    assert probe_seg.parse_args(["--weights", "random", "--data", "voc", "--root", "."]).eval_every == 5_000
    assert probe_seg.parse_args(["--weights", "random", "--iters", "30"]).eval_every == 30      # shapes: once


def test_saved_pictures_show_input_label_and_prediction(tmp_path, checkpoint, capsys):
    palette = probe_seg.PALETTE
    known = {0: (0, 0, 0), 1: (128, 0, 0), 3: (128, 128, 0), 20: (0, 64, 128), 255: (224, 224, 192)}     # VOC's own
    assert all(tuple(palette[k]) == colour for k, colour in known.items())
    label, guess = torch.tensor([[1, 255], [3, 0]]), torch.tensor([[1, 20], [3, 0]])
    image = torch.tensor([[[9, 8], [7, 6]]] * 3, dtype=torch.uint8)
    patches = F.one_hot(guess, 21).permute(2, 0, 1).float()
    views = [(torch.stack([image] * 2), torch.stack([label] * 2), [(0, 0)], (2, 2),
              {0: (torch.zeros(2, 21), torch.stack([patches] * 2))})]
    probe_seg.draw_images(tmp_path / "a.png", identity_head(21), views)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    half = sheet.shape[0] // 2
    assert np.array_equal(sheet[:half], sheet[half:]) and sheet.shape[1] == 3 * half
    for column, view in enumerate((np.array([[(c, c, c) for c in row] for row in ((9, 8), (7, 6))]),
                                   palette[label.numpy()], palette[guess.numpy()])):
        tile = sheet[:half, column * half:(column + 1) * half]
        assert [tile[y, x].tolist() for y in (50, 200) for x in (50, 200)] == view.reshape(4, 3).tolist()


def test_saved_pictures_are_spread_over_val(tmp_path, checkpoint, capsys):
    root, grey = draw_voc(tmp_path / "voc"), {"train": 200, "val": 50}
    for split in grey:
        for i in range(3):
            Image.new("RGB", SIZES[i], (grey[split] + 20 * i,) * 3).save(voc(root, f"JPEGImages/2007_{split}{i}.jpg"))
            ids = np.full(SIZES[i][::-1], i + 5 * (split == "val"), np.uint8)
            mask(voc(root, f"SegmentationClass/2007_{split}{i}.png"), ids, palette=True)
    run(capsys, tmp_path, checkpoint, "voc", "--save-images", "2")
    sheet, palette = np.asarray(Image.open(tmp_path / "out.png")).astype(int), probe_seg.PALETTE
    heights = [round(256 * 40 / 50) + 4, round(256 * 83 / 40) + 4]  # the first and the last of three
    assert sheet.shape == (sum(heights), 3 * 260, 3)
    for i, row in ((0, heights[0] // 2), (2, heights[0] + heights[1] // 2)):
        assert np.abs(sheet[row, 130] - (50 + 20 * i)).max() <= 2   # a JPEG
        assert sheet[row, 390].tolist() == palette[5 + i].tolist()


def test_heads_of_a_file_that_does_not_say(few_scenes, tmp_path, checkpoint, capsys):
    config = dataclasses.replace(CONFIG, dim=192, heads=3, attn="softmax", registers=0)
    torch.save(vit.VisionTransformer(config).state_dict(), tmp_path / "bare.pt")
    for flags, heads in (([], 3), (["--heads", "2"], 2)):
        r, _ = run(capsys, tmp_path, str(tmp_path / "bare.pt"), "shapes", *flags, out=f"heads{heads}")
        assert r["config"]["heads"] == heads
        probe_seg.main(["--weights", "bare.pt", "--iters", "1", *flags])        # the second finds the first's result
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["config"]["heads"] == heads


def test_random_takes_the_architecture_and_the_seed(few_scenes, tmp_path, checkpoint, capsys):
    probe_seg.main(["--weights", "random", "--like", checkpoint, "--seed", "4", "--iters", "1", "--workers", "0"])
    r = result(capsys, tmp_path / "runs/random/seg.shapes.entmax15_r2.s4.json")
    assert set(r) == KEYS and r["seed"] == 4 and r["config"] == dataclasses.asdict(CONFIG)
    assert (r["weights"], r["weights_sha256"], r["which"], r["epochs"], r["run_seed"]) == ("random", None, None, 0, 4)


def test_run_folder_stands_for_its_numbered_checkpoints(few_scenes, tmp_path, capsys):
    for seed, epoch in enumerate((0, 5, 10)):
        (tmp_path / "run").mkdir(exist_ok=True)
        save(tmp_path / f"run/checkpoint_{epoch:04d}.pt", seed, epoch)
    probe_seg.main(["--weights", "run", "--iters", "1", "--workers", "0", "--save-images", "1"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [r["epochs"] for r in lines] == [0, 5, 10] and len({r["metrics"]["miou"] for r in lines}) == 3
    files = [tmp_path / f"run/checkpoint_{epoch:04d}.seg.shapes" for epoch in (0, 5, 10)]
    assert [json.loads(Path(f"{file}.json").read_text()) for file in files] == lines
    assert all(Path(f"{file}.png").is_file() for file in files)


# ---- mistakes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    ("--weights random --root pictures", "--data shapes takes no --root"),
    ("--weights random --crop 96", "--data shapes takes no --crop"),
    ("--weights random --voc-list a.txt", "--voc-list goes with --data voc"),
    ("--weights a.pt --like b.pt", "--like goes with --weights random"),
    ("--weights a.pt b.pt --out c.json", "--out names one file"),
    ("--weights random --eval-every 0", "--eval-every 0"),
    ("--weights random --data voc --root . --stride 0", "--stride 0"),
    ("--weights random --data voc --root . --stride 400 --crop 300", "--stride 400"),
    ("--weights random --heads 0", "--heads 0: must be at least 1"),
    ("--weights random --data voc --root . --short-side 1", "--short-side 1: must be at least 2"),
])
def test_usage_errors(capsys, flags, message):
    """Those of all probes: tests/test_hostile.py."""
    status, line = exits(capsys, *flags.split())
    assert status == 2 and message in line and "error: " in line


def voc(root, path):
    return root / "VOCdevkit/VOC2012" / path


def no_list(root):
    voc(root, "ImageSets/Segmentation/val.txt").unlink()


def wrong_place(root):
    (root / "VOCdevkit").rename(root / "VOC")


def listed_only(root):
    voc(root, "ImageSets/Segmentation/val.txt").write_text("2007_val0\n2007_val9\n")


def empty_list(root):
    voc(root, "ImageSets/Segmentation/train.txt").write_text("")


def other_size(root):
    mask(voc(root, "SegmentationClass/2007_val1.png"), np.zeros((61, 37), np.uint8), palette=True)


def label_above(root):
    mask(voc(root, "SegmentationClass/2007_train2.png"), np.full((83, 40), 21, np.uint8), palette=True)


def colour_mask(root):
    picture(voc(root, "SegmentationClass/2007_val0.png"), SIZES[0], 0)


def cut_short(root):
    path = voc(root, "JPEGImages/2007_val2.jpg")
    path.write_bytes(path.read_bytes()[:2000])


def no_mask(root):
    (root / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png").unlink()


def ade_above(root):
    mask(root / "ADEChallengeData2016/annotations/training/ADE_train_00000000.png", np.full((40, 50), 151, np.uint8))


def void(root, split, data):
    names = {"voc": f"SegmentationClass/2007_{split}*", "cityscapes": f"{split}/*/*labelIds.png",
             "ade20k": "training/*" if split == "train" else "validation/*"}
    for path in root.rglob(names[data]):
        image = np.asarray(Image.open(path))
        mask(path, np.full_like(image, {"voc": 255, "ade20k": 0, "cityscapes": 3}[data]), palette=data == "voc")


def never_there(root):
    mask(root / "gtFine/train/ulm/ulm_000002_000019_gtFine_labelIds.png", blocks_of([7, 34], (48, 24), 0))


def train_ids(root):
    for path in root.rglob("*labelIds.png"):
        mask(path, np.array([CITYSCAPES.get(k, 255) for k in range(34)], np.uint8)[np.asarray(Image.open(path))])


def no_labels(root):
    for path in (root / "gtFine").rglob("*labelIds.png"):
        path.unlink()


@pytest.mark.parametrize("data, break_it, message", [
    ("voc", no_list, "Segmentation/val.txt: No such file.*must hold VOCdevkit/VOC2012/.*holds .'VOCdevkit'."),
    ("voc", wrong_place, "Segmentation/train.txt: No such file.*must hold VOCdevkit/VOC2012/.*holds .'VOC'."),
    ("voc", listed_only, "val.txt: line 2: 2007_val9: no file .*JPEGImages/2007_val9.jpg"),
    ("voc", empty_list, "no train pictures.*must hold"),
    ("voc", other_size, "SegmentationClass/2007_val1.png: 37 x 61 pixels, but .*2007_val1.jpg has 61 x 37"),
    ("voc", label_above, "SegmentationClass/2007_train2.png: holds label 21; voc has 21 classes"),
    ("voc", colour_mask, "SegmentationClass/2007_val0.png: unreadable .mode RGB; labels are"),
    ("voc", cut_short, "JPEGImages/2007_val2.jpg: unreadable"),
    ("ade20k", no_mask, "ADE_val_00000001.jpg: its label .*validation/ADE_val_00000001.png is missing"),
    ("ade20k", ade_above, "ADE_train_00000000.png: holds label 151; ade20k has 150 classes"),
    ("ade20k", wrong_place, "images/training: No such file.*must hold ADEChallengeData2016/.*holds .'VOC'."),
    ("cityscapes", never_there, "train/ulm/ulm_000002_000019_gtFine_labelIds.png: holds label 34; cityscapes has 19"),
    ("cityscapes", train_ids, "train/aachen/aachen_000001_.*Ids.png: holds trainIds .* under the name of labelIds"),
    ("cityscapes", no_labels, "leftImg8bit.png: its label .*_gtFine_labelIds.png is missing"),
])
def test_data_errors_are_one_line(tmp_path, capsys, checkpoint, data, break_it, message):
    draw = DRAW["voc"] if data == "ade20k" and break_it is wrong_place else DRAW[data]
    root = draw(tmp_path / "root")
    break_it(root)
    for workers in "01" if break_it is label_above else "0":        # from a loader process as from this one
        status, line = exits(capsys, "--weights", checkpoint, "--data", data, "--root", root, *SMALL, "--workers",
                             workers)
        assert status == 1 and "\n" not in line
        assert re.search(message, line), line
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("data", DRAW)
@pytest.mark.parametrize("split, n", [("train", 4), ("val", 3)])
def test_labels_void_everywhere_are_refused_before_training(tmp_path, capsys, checkpoint, monkeypatch, data, split, n):
    root = DRAW[data](tmp_path / "root")
    void(root, split, data)
    monkeypatch.delattr(probe_seg, "frozen")
    status, line = exits(capsys, "--weights", checkpoint, "--data", data, "--root", root, *SMALL)
    assert status == 1 and re.match(rf"\S*png: void everywhere, like all {n} {split} labels", line), line


def test_few_labelled_maps_among_many_are_enough(tmp_path):
    root = draw_ade20k(tmp_path, train=1)
    for i in range(150):
        picture(root / f"ADEChallengeData2016/images/training/ADE_train_{i:08d}.jpg", (8, 8), i)
        mask(root / f"ADEChallengeData2016/annotations/training/ADE_train_{i:08d}.png",
             np.full((8, 8), 5 * (i == 148), np.uint8))
    train, _ = opened("ade20k", tmp_path)
    assert len(train) == 150


def leak(root):
    path = voc(root, "ImageSets/Segmentation/train.txt")
    path.write_text(f"{path.read_text()}\n2007_val2\n2007_val1\n")


def same_list(root):
    folder = voc(root, "ImageSets/Segmentation")
    shutil.copy(folder / "val.txt", folder / "train.txt")


def linked_folder(root):
    images = root / "ADEChallengeData2016/images"
    shutil.rmtree(images / "training")
    (images / "training").symlink_to("validation")
    for path in (root / "ADEChallengeData2016/annotations/validation").iterdir():
        shutil.copy(path, root / "ADEChallengeData2016/annotations/training")


def linked_under_another_name(root):
    images = root / "ADEChallengeData2016/images"
    (images / "training/ADE_train_00000002.jpg").unlink()
    (images / "training/ADE_train_00000002.jpg").symlink_to(images / "validation/ADE_val_00000001.jpg")


def copied(root):
    for top in ("leftImg8bit", "gtFine"):
        shutil.copytree(root / top / "val/ulm", root / top / "train/ulm", dirs_exist_ok=True)


@pytest.mark.parametrize("data, break_it, message", [
    ("voc", leak, "2 of 3 val pictures are train pictures, the first is .*/2007_val1.jpg;"),
    ("voc", same_list, "3 of 3 val pictures .*/2007_val0"),
    ("ade20k", linked_folder, "3 of 3 val pictures .*/ADE_val_00000000"),
    ("ade20k", linked_under_another_name, "1 of 3 val pictures .*/ADE_val_00000001"),
    ("cityscapes", copied, "2 of 3 val pictures .*/ulm_000000_000019"),
])
def test_training_on_val_is_refused(tmp_path, capsys, checkpoint, data, break_it, message):
    root = DRAW[data](tmp_path / "root")
    break_it(root)
    status, line = exits(capsys, "--weights", checkpoint, "--data", data, "--root", root, *SMALL)
    assert status == 1 and re.match(f"{root}: {message}", line), line


def test_a_train_list_with_val_names_is_refused(tmp_path, capsys, checkpoint):
    root = draw_voc(tmp_path / "root")
    (tmp_path / "aug.txt").write_text("2007_train0\n2007_val1\n2007_train1\n")
    where = ["--data", "voc", "--root", root, *SMALL, "--voc-list", "aug.txt"]
    status, line = exits(capsys, "--weights", checkpoint, *where)
    assert status == 1 and re.match("aug.txt: 1 of 3 val pictures are train pictures, the first is .*2007_val1", line)


@pytest.mark.parametrize("form", [
    "\ufeff{0}\n{1}\n", "{0}\r\n\r\n{1}\r\n", "  {0} \n\n{1}", "{0}.jpg\n{1}.jpg\n", "{0} {0}\n{1} {1}\n",
    "/JPEGImages/{0}.jpg /SegmentationClass/{0}.png\nJPEGImages/{1}.jpg SegmentationClassAug/{1}.png\n"])
def test_lists_as_people_have_them(tmp_path, form):
    names = "2007_train2", "2007_train1"
    (tmp_path / "list.txt").write_bytes(form.format(*names).encode())
    train, _ = opened("voc", draw_voc(tmp_path), "--voc-list", "list.txt")
    assert [pair[0].stem for pair in train.pairs] == list(names)


def test_a_list_of_another_form_is_refused_with_the_form(tmp_path, capsys, checkpoint):
    (tmp_path / "dog_train.txt").write_text("2007_train0  1\n2007_train1 -1\n")       # of ImageSets/Main
    where = ["--data", "voc", "--root", draw_voc(tmp_path / "root"), *SMALL, "--voc-list", "dog_train.txt"]
    status, line = exits(capsys, "--weights", checkpoint, *where)
    assert status == 1 and re.match("dog_train.txt: line 1: 2007_train0  1: not the name of one image, as 2007_", line)


def test_files_that_are_no_data_are_passed_over_and_those_that_are_are_not(tmp_path):
    root = draw_ade20k(tmp_path)
    images = root / "ADEChallengeData2016/images/training"
    (images / "._ADE_train_00000001.jpg").write_bytes(b"macOS")
    (images / ".ipynb_checkpoints").mkdir()
    (images / "ADE_train_00000001.jpg").rename(images / "ADE_train_00000001.JPG")
    assert [len(split) for split in opened("ade20k", tmp_path)] == [4, 3]
    city = draw_cityscapes(tmp_path) / "leftImg8bit/train"
    (city / "ulm/._ulm_000000_000019_leftImg8bit.png").write_bytes(b"macOS")
    shutil.copytree(city / "aachen", city / ".cache")
    assert [len(split) for split in opened("cityscapes", tmp_path)] == [4, 3]


def test_one_value_per_channel_is_refused_before_training(tmp_path, capsys, checkpoint):
    where = ["--weights", checkpoint, "--data", "voc", "--root", draw_voc(tmp_path / "root"), *SMALL, "--crop", "8"]
    status, line = exits(capsys, *where, "--batch-size", "1")
    assert status == 1 and line.endswith("--batch-size 1 and a crop of one patch: BatchNorm needs two values; raise "
                                         "either")
    probe_seg.main([*map(str, where), "--batch-size", "2"])


@pytest.mark.parametrize("data, counts", [("voc", "4 train images of 1,464"), ("ade20k", "4 train images of 20,210"),
                                          ("cityscapes", "4 train images of 2,975")])
def test_incomplete_data_needs_allow_partial(tmp_path, capsys, checkpoint, data, counts):
    root = DRAW[data](tmp_path / "root")
    status, line = exits(capsys, "--weights", checkpoint, "--data", data, "--root", root, *SMALL[:-1])
    assert status == 1 and counts in line and "--allow-partial" in line


def test_other_mistakes_are_named_in_one_line(tmp_path, capsys, checkpoint):
    root = draw_voc(tmp_path / "root")
    where = ["--data", "voc", "--root", root, *SMALL]
    status, line = exits(capsys, "--weights", checkpoint, *where, "--voc-list", "aug.txt")
    assert status == 1 and line.startswith("aug.txt: no such file")
    status, line = exits(capsys, "--weights", checkpoint, *where, "--blocks", "0", "2")
    assert status == 1 and "block 2 does not exist: the model has 0 to 1" in line
    status, line = exits(capsys, "--weights", checkpoint, "--data", "voc", "--root", "nowhere", *SMALL)
    assert status == 1 and "nowhere" in line and "no such folder" in line
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"head.weight": torch.zeros(3)}, tmp_path / "other.pt")
    for name in ("missing.pt", "text.pt", "other.pt"):
        status, line = exits(capsys, "--weights", name, *where)
        assert status == 1 and line.startswith(f"{name}: ") and "\n" not in line


def test_lists_of_powershell_are_read_and_empty_ones_named(tmp_path, capsys, checkpoint):
    root, where = draw_voc(tmp_path / "root"), tmp_path / "list.txt"
    where.write_bytes("2007_train2\r\n2007_train1\r\n".encode("utf-16"))
    train, _ = opened("voc", root, "--voc-list", "list.txt")
    assert [pair[0].stem for pair in train.pairs] == ["2007_train2", "2007_train1"]
    where.write_text("\n \n")
    flags = ["--data", "voc", "--root", root, *SMALL, "--voc-list", "list.txt"]
    assert exits(capsys, "--weights", checkpoint, *flags) == (1, "list.txt: empty; --voc-list takes a text file with "
                                                              "the name of an image per line")


def test_blocks_have_one_number_in_flags_lines_and_results(few_scenes, checkpoint, capsys):
    probe_seg.main(["--weights", checkpoint, "--iters", "1", "--blocks", "0", "-1"])
    *_, first, last, _, line = capsys.readouterr().out.splitlines()
    assert first.startswith("block 0: mIoU ") and last.startswith("block 1: mIoU ")
    assert [head["block"] for head in json.loads(line)["metrics"]["heads"]] == [0, 1]
