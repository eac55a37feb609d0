import dataclasses
import json
import math
import multiprocessing
import os
import re
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import checkpoint as disk
import probe_depth
import shapes
import vit

CONFIG = vit.ViTConfig(image_size=16, patch_size=8, dim=16, depth=4, heads=2, registers=1)      # scenes of 32 pixels
COARSE = vit.ViTConfig(image_size=64, patch_size=32, dim=16, depth=5, heads=2)      # 480 x 640 in 300 tokens
KEYS = "probe data root weights weights_sha256 which epochs run_seed recipe config seed metrics protocol".split()
PROTOCOL = ("probe data train_on train val size fingerprint partial blocks precision feature iters batch_size crop "
            "seeds bins max_depth lr optimizer schedule loss loss_warmup eval_every augmentation mirrored cap window "
            "padding reported").split()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(path, config):
    torch.manual_seed(7)
    model = vit.VisionTransformer(config)
    for block in model.blocks:                                      # features that differ from patch to patch
        torch.nn.init.normal_(block.mlp.fc2.weight, std=0.5)
    state = model.state_dict()
    torch.save(dict(config=dataclasses.asdict(config), teacher=state, student=state, epoch=3), path)
    return str(path)


@pytest.fixture
def fine(tmp_path):
    return save(tmp_path / "fine.pt", CONFIG)


@pytest.fixture
def coarse(tmp_path):
    return save(tmp_path / "coarse.pt", COARSE)


@pytest.fixture
def few_scenes(monkeypatch):
    """20 train and 10 val scenes in place of 1,000 and 500."""
    monkeypatch.setattr(probe_depth, "Shapes", lambda split, size, length, cards:
                        shapes.Shapes(split, size, length // 50, cards))


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=1)


def scene(i, h, w):
    """Smooth picture and depth in metres, 1.5 to 6, larger for larger i."""
    y, x = np.mgrid[:h, :w] / 300
    grey = 120 + 60 * np.sin(3 * x + i) + 40 * np.cos(2 * y * (1 + i))
    return np.stack([grey, grey / 2, 255 - grey], -1).astype(np.uint8), 1.5 + i + x + y / 2


def nyu(root, train=3, val=2):
    for split, n, slash in (("train", train, "/"), ("test", val, "")):
        lines = []
        for i in range(n):
            image, depth = scene(i, 480, 640)
            depth[:, :10] = 0
            write(root / f"{split}_room/rgb_{i:05}.png", image)
            write(root / f"{split}_room/sync_depth_{i:05}.png", (1000 * depth).astype(np.uint16))
            lines.append(f"{slash}{split}_room/rgb_{i:05}.png {slash}{split}_room/sync_depth_{i:05}.png 518.8579")
        (root / f"nyu_{split}.txt").write_text("\n".join(lines))    # no final newline
    return root


def kitti(root, train=2, val=2, size=(360, 1225)):
    for split, n in (("train", train), ("test", val)):
        lines = [f"day/{split}/none.png None 721.5377"]
        for i in range(n):
            image, depth = scene(i, *size)
            sparse = np.where(np.indices(size).sum(0) % 7 == 0, 8 * depth, 0)
            write(root / f"input/day/{split}/{i}.png", image)
            write(root / f"gt_depth/{split}/{i}.png", (256 * sparse).astype(np.uint16))
            lines.append(f"day/{split}/{i}.png {split}/{i}.png 721.5377")
        (root / f"kitti_eigen_{split}.txt").write_text("\n".join(lines))
    return root


def rotate_bits(millimetres):
    """SUN RGB-D's files: the 16 bits turned left by three."""
    d = millimetres.astype(np.int64)
    return (d * 8 % 65536 + d // 8192).astype(np.uint16)


def sun(root, train=2, val=2):
    lines = []
    for i, size in enumerate([(427, 561), (530, 730), (441, 591), (480, 640)][:train + val]):
        image, depth = scene(i % 2 * 3, *size)
        folder = root / f"SUNRGBD/kv{i}/set/{i:06}"
        write(folder / f"image/{i}.jpg", image)
        write(folder / f"depth/{i}.png", rotate_bits(1000 * depth * 1.3))
        write(folder / f"depth_bfx/{i}.png", rotate_bits(np.full(size, 9999)))
        if i < val:
            lines.append(f"{folder.relative_to(root)}/image/{i}.jpg {folder.relative_to(root)}/depth/{i}.png")
    (root / "SUNRGBD_val_splits.txt").write_text("\n".join(lines))
    return root


def run(*argv):
    probe_depth.main([str(arg) for arg in argv])


def result(capsys, file):
    """The result file, which is also the last line of stdout."""
    text = Path(file).read_text()
    assert text == capsys.readouterr().out.splitlines()[-1] + "\n"
    return json.loads(text)


def exits(capsys, *argv):
    """(exit status, the line that says why); a str code is what sys.exit prints before status 1."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    code = stop.value.code
    return (1, code) if isinstance(code, str) else (code, capsys.readouterr().err.splitlines()[-1])


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the head -------------------------------------------------------------------------------------------------------

def depth_by_hand(head, cls, patches, most):
    """DINOv2 as it is written: each block's patches and its [CLS], upsampled by 4, joined, a convolution, bins."""
    maps = []
    for block in range(4):
        x = patches[:, block].permute(0, 3, 1, 2)
        x = torch.cat([x, cls[:, block, :, None, None].expand_as(x)], 1)
        maps.append(F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False))
    logits = F.conv2d(torch.cat(maps, 1), head.weight[:, :, None, None], head.bias)
    w = torch.relu(logits) + 0.1
    w = w / w.sum(1, keepdim=True)
    bins = torch.tensor([0.001 + k * (most - 0.001) / 255 for k in range(256)], dtype=w.dtype)
    return (w * bins.view(1, -1, 1, 1)).sum(1)


def test_convolution_before_upsampling_is_the_same():
    head = probe_depth.Head(6, 10.0, seed=3).double()
    cls, patches = 5 * draws(2, 4, 6).double(), 5 * draws(2, 4, 3, 5, 6, seed=1).double()
    with torch.no_grad():
        ours, expected = head(cls, patches), depth_by_hand(head, cls, patches, 10.0)
    assert ours.shape == (2, 12, 20) and expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)   # the bins are float32
    torch.testing.assert_close(head.moments[[0, -1], 0], torch.tensor([0.001, 10.0]).double(), rtol=1e-6, atol=0)


def test_init_is_that_of_a_convolution():
    torch.manual_seed(11)
    conv, head = torch.nn.Conv2d(8 * 6, 256, 1), probe_depth.Head(6, 80.0, seed=11)
    torch.testing.assert_close(head.weight, conv.weight.flatten(1))
    torch.testing.assert_close(head.bias, conv.bias)


@pytest.mark.parametrize("depth, blocks", [(12, [2, 5, 8, 11]), (8, [1, 3, 5, 7]), (5, [0, 1, 2, 4])])
def test_blocks_are_evenly_spaced(depth, blocks):
    assert probe_depth.four_blocks(depth) == blocks


def test_features_lack_the_final_norm(coarse):
    model = disk.load_backbone(coarse)
    images = (draws(2, 3, 40, 70) * 50 + 120).clamp(0, 255).to(torch.uint8)
    cls, patches = probe_depth.frozen(model, images, types.SimpleNamespace(amp="off"))
    assert cls.shape == (2, 4, 16) and patches.shape == (2, 4, 2, 3, 16)        # 40 x 70 padded to 64 x 96
    x = model.embed(F.pad(vit.normalize(images), (13, 13, 12, 12)))
    for i, block in enumerate(model.blocks):
        x = block(x)
        if i in (0, 1, 2, 4):
            torch.testing.assert_close(cls[:, min(i, 3)], x[:, 0])
            torch.testing.assert_close(patches[:, min(i, 3)].flatten(1, 2), x[:, 1:])


# ---- loss and schedule ----------------------------------------------------------------------------------------------

def test_loss_on_two_pixels():
    p, t = torch.tensor([[[2.0, 5.0]]]).double(), torch.tensor([[[1.0, 8.0]]]).double()
    a, b = math.log(2.001 / 1.001), math.log(5.001 / 8.001)
    variance, mean = (a - b) ** 2 / 2, (a + b) / 2
    assert probe_depth.sig_loss(p, t, False).item() == pytest.approx(math.sqrt(variance + 0.15 * mean**2))
    assert probe_depth.sig_loss(p, t, True).item() == pytest.approx(math.sqrt(0.15) * abs(mean))


@pytest.mark.parametrize("warmup", [False, True])
def test_loss_is_the_mean_over_pairs_of_images(warmup):
    p, t = 5 + draws(7, 3, 4, seed=1).tanh(), (3 * draws(7, 3, 4) + 5).clamp(min=0)
    t[0, 0] = 11                                                    # beyond NYU's last bin, and it counts
    t[2:4], t[2, 1, 1] = 0, 5                                       # a pair with a single valid pixel
    expected = []
    for pair in ([0, 1], [4, 5], [6]):
        g = [math.log(a + 0.001) - math.log(b + 0.001) for i in pair
             for a, b in zip(p[i].flatten().tolist(), t[i].flatten().tolist(), strict=True) if b > 0]
        mean = sum(g) / len(g)
        variance = 0 if warmup else sum((x - mean) ** 2 for x in g) / (len(g) - 1)
        expected.append(math.sqrt(variance + 0.15 * mean**2))
    assert probe_depth.sig_loss(p, t, warmup).item() == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_batch_without_valid_pixels_has_no_gradient():
    p = torch.ones(2, 3, 3, requires_grad=True)
    probe_depth.sig_loss(p, torch.zeros(2, 3, 3), False).backward()
    assert p.grad.count_nonzero() == 0


@pytest.mark.parametrize("t, rate", [(0, 1e-6), (6400, 4.66973e-4), (12799, 7.49977e-4), (12800, 7.5e-4),
                                     (20000, 4.67298e-4), (38399, 1e-11 + 1.673e-12)])
def test_schedule(t, rate):
    for lr in (1e-3, 2e-3):
        args = types.SimpleNamespace(iters=38_400, lr=lr)
        assert probe_depth.learning_rate(t, args) == pytest.approx(lr / 1e-3 * rate, rel=2e-5 if t != 38399 else 1e-3)


def test_schedules_scale_with_iters():
    args = probe_depth.parse_args("--weights random --data nyu --root x --iters 2400".split())
    paper = types.SimpleNamespace(iters=38_400, lr=1e-3)
    assert args.eval_every == 100 and args.crop == (416, 544) and args.lr == 1e-3
    for t in (0, 100, 799, 800, 2399):
        assert probe_depth.learning_rate(t, args) == pytest.approx(probe_depth.learning_rate(16 * t, paper), rel=1e-12)


# ---- evaluation -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("data, size, count, corners", [
    ("nyu", (480, 640), 238_560, [(45, 41), (470, 600)]),
    ("kitti", (352, 1216), 206 * 1129, [(143, 43), (348, 1171)]),
    ("sunrgbd", (427, 561), (427 - 45) * (561 - 41), [(45, 41), (426, 560)]),
    ("sunrgbd", (530, 730), 238_560, [(45, 41), (470, 600)]),
])
def test_windows(data, size, count, corners):
    valid = probe_depth.scored(torch.full(size, 2.0), data)
    rows, columns = valid.nonzero().T
    assert valid.sum() == count
    assert [(rows.min(), columns.min()), (rows.max(), columns.max())] == corners


def test_garg_window_is_a_share_of_the_picture():
    shares = (0.40810811 * 352, 0.99189189 * 352, 0.03594771 * 1216, 0.96405229 * 1216)
    assert probe_depth.WINDOW["kitti"] == tuple(map(int, shares))


def test_range_is_open():
    depth = torch.full((1, 480, 640), 2.0)
    depth[0, 100, 100:105] = torch.tensor([0.0, 0.001, 0.0011, 9.999, 10.0])
    assert probe_depth.scored(depth, "nyu")[0, 100, 100:105].tolist() == [False, False, True, True, False]
    assert probe_depth.scored(torch.full((2, 2), 10.0), "shapes").all()         # the backdrop


def test_errors_by_hand():
    p, t = torch.tensor([2.0, 3.0, 10.0, 1.0]).double(), torch.tensor([1.0, 3.0, 8.0, 1.2]).double()
    assert probe_depth.errors(p, t).tolist() == pytest.approx(
        [math.sqrt((1 + 0 + 4 + 0.04) / 4), (1 + 0 + 0.25 + 0.2 / 1.2) / 4, 50.0])


def test_sun_is_clipped_at_eight_metres():
    truth, args = torch.full((1, 60, 60), 9.5), types.SimpleNamespace(data="sunrgbd", drawn=())
    truth[0, 50, 50] = 7
    row, _ = probe_depth.measure([lambda *_: torch.full((2, 4, 4), 9.0)], [(None, None, truth)], 12.0, args)
    n = 15 * 19                                                     # of rows 45 to 59, columns 41 to 59
    assert row["rmse"] == [pytest.approx(math.sqrt(1 / n))] and row["rmse_constant"] == pytest.approx(math.sqrt(1 / n))


def test_best_is_chosen_for_each_seed():
    rows = [([3.0, 1.0], [0.3, 0.1], [30.0, 90.0]), ([2.0, 4.0], [0.5, 0.4], [50.0, 40.0]),
            ([2.5, 2.0], [0.2, 0.2], [60.0, 70.0])]
    history = [dict(iteration=10 * i, rmse=r, abs_rel=a, d1=d, rmse_constant=5.0, constant=2.0, skipped=1)
               for i, (r, a, d) in enumerate(rows, 1)]
    assert probe_depth.best_metrics(history) == dict(
        rmse=1.5, abs_rel=0.3, d1=70.0, rmse_sd=pytest.approx(math.sqrt(0.5)), rmse_last=2.25, rmse_constant=5.0,
        constant=2.0, skipped=1, rmse_seeds=[2.0, 1.0], abs_rel_seeds=[0.5, 0.1], d1_seeds=[50.0, 90.0],
        rmse_last_seeds=[2.5, 2.0], best_iterations=[20, 10])


# ---- files ----------------------------------------------------------------------------------------------------------

def test_sixteen_bits_are_read_without_loss(tmp_path):
    raw = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    write(tmp_path / "all.png", raw)
    write(tmp_path / "turned.png", rotate_bits(raw))
    assert (probe_depth.read_depth(tmp_path / "all.png", "nyu") == (raw / 1000).astype(np.float32)).all()
    assert (probe_depth.read_depth(tmp_path / "all.png", "kitti") == raw / 256).all()
    assert (probe_depth.read_depth(tmp_path / "turned.png", "sunrgbd") == (raw / 1000).astype(np.float32)).all()


def coded(root, h, w):
    """A picture whose red and green name its row and column, with a depth map of row + column / 1000 + 1."""
    y, x = np.mgrid[:h, :w]
    write(root / "x.png", np.stack([y % 251, x % 241, y * 0], -1).astype(np.uint8))
    write(root / "d.png", (1 + 100 * (y % 10) + x % 100).astype(np.uint16))
    return [(root / "x.png", root / "d.png")]


@pytest.mark.parametrize("source, split, size, rows, columns", [
    ("nyu", "train", (480, 640), slice(45, 472), slice(43, 608)),
    ("nyu", "val", (480, 640), slice(0, 480), slice(0, 640)),
    ("kitti", "train", (375, 1242), slice(23, 375), slice(13, 1229)),
    ("kitti", "val", (370, 1225), slice(18, 370), slice(4, 1220)),
])
def test_fixed_crops(tmp_path, source, split, size, rows, columns):
    pairs = coded(tmp_path, *size)
    image, depth = probe_depth.DepthPictures(source, split, pairs)[0].values()
    assert (image.permute(1, 2, 0).numpy() == np.asarray(Image.open(pairs[0][0]))[rows, columns]).all()
    raw = np.asarray(Image.open(pairs[0][1])).astype(np.float32)[rows, columns]
    assert (depth.numpy() == raw / np.float32(256 if source == "kitti" else 1000)).all()


def test_sun_is_resized(tmp_path):
    pairs = coded(tmp_path, 240, 320)                               # half of 480 x 640: nearest doubles every pixel
    val, train = (probe_depth.DepthPictures("sunrgbd", split, pairs)[0] for split in ("val", "train"))
    assert val["image"].shape == (3, 480, 640) and torch.equal(val["image"], train["image"])
    assert val["depth"].shape == (240, 320)
    assert torch.equal(train["depth"], val["depth"].repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_sun_shrinks_by_four_neighbours(tmp_path):
    """As the original's OpenCV: at half the size a pixel is the mean of 2 x 2, not of a smooth filter's 4 x 4."""
    noise = np.random.default_rng(0).integers(0, 256, (960, 1280, 3), dtype=np.uint8)
    write(tmp_path / "x.png", noise)
    write(tmp_path / "d.png", np.full((960, 1280), 999, np.uint16))
    image = probe_depth.DepthPictures("sunrgbd", "val", [(tmp_path / "x.png", tmp_path / "d.png")])[0]["image"]
    expected = noise.reshape(480, 2, 640, 2, 3).mean((1, 3)) + 0.5
    assert (image.permute(1, 2, 0).numpy() == expected.astype(np.uint8)).all()


def test_values_beyond_sixteen_bits_are_refused(tmp_path):
    wide = np.full((4, 4), 1500, np.int32)
    Image.fromarray(wide).save(tmp_path / "a.tif")
    assert (probe_depth.read_depth(tmp_path / "a.tif", "nyu") == np.float32(1.5)).all()
    for value in (65536 + 1500, -1):
        wide[1, 1] = value
        Image.fromarray(wide).save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match=f"a.tif: values from .*{value}.*, not a 16-bit depth map"):
            probe_depth.read_depth(tmp_path / "a.tif", "nyu")


def opened(data, root, *flags):
    flags = ["--weights", "random", "--data", data, "--root", str(root), "--allow-partial", *flags]
    return probe_depth.open_data(probe_depth.parse_args(flags), None)


@pytest.mark.parametrize("change", [
    lambda text: "\n" + text.replace("\n", "\n  \n\n") + "\n\n", lambda text: text.replace("\n", "\r\n") + "\r\n",
    lambda text: "\ufeff" + text, lambda text: text.replace(" 518.8579", ""), lambda text: text.replace(" ", "\t")])
def test_lists_as_editors_leave_them(tmp_path, change):
    root = nyu(tmp_path / "nyu", 3, 1)
    train, val, fingerprint = opened("nyu", root)
    for name in ("nyu_train.txt", "nyu_test.txt"):
        (root / name).write_bytes(change((root / name).read_text()).encode())
    again = opened("nyu", root)
    assert (again[0].pairs, again[1].pairs, again[2]) == (train.pairs, val.pairs, fingerprint)
    assert [len(train), len(val)] == [3, 1]


@pytest.mark.parametrize("data, moves", [
    ("kitti", [("gt_depth/train", "gt_depth/train/train"), ("gt_depth/test", "gt_depth/val/test")]),
    ("kitti", [("gt_depth", "data_depth_annotated/val")]),
    ("kitti", [("gt_depth/train", "train/train"), ("gt_depth/test", "val/test")]),
    ("nyu", [("test_room", "official_splits/test/test_room"), ("train_room", "sync/train_room")]),
])
def test_layouts_as_unpacked(tmp_path, data, moves):
    root = {"kitti": kitti, "nyu": nyu}[data](tmp_path / "data", 2, 1)
    before = [list(split) for split in opened(data, root)[:2]]
    for old, new in moves:
        (root / "aside").mkdir()
        (root / old).rename(root / "aside/x")
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / "aside/x").rename(root / new)
        (root / "aside").rmdir()
    assert equal([list(split) for split in opened(data, root)[:2]], before)


def test_sun_frames_are_what_users_call_frames(tmp_path):
    root = sun(tmp_path / "sun", 2, 1)
    flags = "--train-on", "sunrgbd"
    (frame,) = root.glob("SUNRGBD/kv1/set/*")
    whole = list(opened("sunrgbd", root, *flags)[0])
    for name in (".ipynb_checkpoints", ".Trash/frame"):
        write(root / f"SUNRGBD/{name}/depth/1.png", np.ones((9, 9), np.uint16))
        write(root / f"SUNRGBD/{name}/image/1.jpg", np.ones((9, 9, 3), np.uint8))
    for name in ("depth/._1.png", "image/._1.jpg", "image/._0.jpg"):
        (frame / name).write_bytes(b"Mac OS X")
    (frame / "image/1.jpg").rename(frame / "image/1.JPG")
    (frame / "depth/1.png").rename(frame / "depth/1.PNG")
    (root / "SUNRGBD/kv2").rename(tmp_path / "elsewhere")
    (root / "SUNRGBD/kv2").symlink_to(tmp_path / "elsewhere")       # another disk
    (root / "SUNRGBD/kv1/again").symlink_to(root / "SUNRGBD")       # a loop, and each frame twice
    assert equal(list(opened("sunrgbd", root, *flags)[0]), whole) and len(whole) == 2


def link(root):
    os.symlink(root / "test_room/rgb_00001.png", root / "train_room/link.png")
    with (root / "nyu_train.txt").open("a") as file:
        file.write("\n/train_room/link.png /test_room/sync_depth_00001.png 518.8579\n")


@pytest.mark.parametrize("data, share, message", [
    ("nyu", lambda root: (root / "nyu_train.txt").write_text((root / "nyu_test.txt").read_text()),
     "2 of 2 val pictures are train pictures, the first is .*test_room/rgb_00000.png;"),
    ("nyu", link, "1 of 2 val pictures are train pictures, the first is .*test_room/rgb_00001.png;"),
    ("kitti", lambda root: (root / "kitti_eigen_train.txt").write_text((root / "kitti_eigen_test.txt").read_text()),
     "2 of 2 val pictures are train pictures, the first is .*day/test/0.png;"),
    ("sunrgbd", lambda root: ((root / "SUNRGBD/new/image").mkdir(parents=True), (root / "SUNRGBD/new/depth").symlink_to(
        root / "SUNRGBD/kv0/set/000000/depth"), (root / "SUNRGBD/new/image/0.jpg").symlink_to(
        root / "SUNRGBD/kv0/set/000000/image/0.jpg")),
     "1 of 2 val pictures are train pictures, the first is .*000000/image/0.jpg"),
])
def test_no_picture_is_in_train_and_val(tmp_path, capsys, coarse, data, share, message):
    root = {"nyu": nyu, "kitti": kitti, "sunrgbd": sun}[data](tmp_path / "data", 2, 2)
    share(root)
    flags = ["--train-on", "sunrgbd"] if data == "sunrgbd" else []
    flags += "--allow-partial --iters 1 --batch-size 2 --crop 64 64 --workers 0".split()
    status, line = exits(capsys, "--weights", coarse, "--data", data, "--root", root, *flags)
    assert status == 1 and re.search(message, line) and not list(tmp_path.glob("*.*.json"))


@pytest.mark.parametrize("split, value, rows, message", [
    ("train", 0, slice(None), r"train_room/sync_depth_00000.png: no valid pixel: depths from 0 to 0 m, none in "
     r"\(0, 10\]; so all of 2 depth maps"),
    ("train", 10_001, slice(None), r"train_room/sync_depth_00000.png: no valid pixel: depths from 10.001 to 10.001 m"),
    ("test", 0, slice(None), "test_room/sync_depth_00000.png: no valid pixel: depths from 0 to 0 m"),
    ("test", 0, slice(45, 471), r"test_room/sync_depth_00000.png: no valid pixel: .*\(0, 10\] inside the window"),
])
def test_void_split_is_refused_before_training(tmp_path, capsys, coarse, monkeypatch, split, value, rows, message):
    monkeypatch.setattr(probe_depth, "train_heads", None)
    root = nyu(tmp_path / "nyu", 2, 2)
    for path in root.glob(f"{split}_room/sync*"):
        depth = np.array(Image.open(path))
        depth[rows] = value
        write(path, depth)
    status, line = exits(capsys, "--weights", coarse, "--data", "nyu", "--root", root, "--allow-partial")
    assert status == 1 and re.search(message, line), line


def test_void_maps_among_others_do_no_harm(tmp_path, capsys, coarse):
    """In train they add nothing to a loss, in val they are left out. One good map is enough, wherever it is."""
    flags = ["--weights", coarse, "--data", "nyu", "--allow-partial", *"--iters 1 --batch-size 2 --crop 64 64".split(),
             "--workers", 0, "--root"]
    run(*flags, nyu(tmp_path / "nyu", 2, 1), "--out", "one.json")
    one = result(capsys, "one.json")["metrics"]
    root = nyu(tmp_path / "nyu", 2, 2)
    write(root / "test_room/sync_depth_00001.png", np.zeros((480, 640), np.uint16))
    run(*flags, root, "--out", "two.json")
    text = capsys.readouterr().out
    assert "; 1 image without a pixel to score left out" in text
    two = json.loads(text.splitlines()[-1])["metrics"]
    assert (two.pop("skipped"), one.pop("skipped")) == (1, 0) and one == two

    maps = torch.zeros(400, 3, 3)
    maps[233] = 5
    split = type("Split", (list,), dict(source="nyu", split="train", pairs=[(i, i) for i in range(400)]))
    probe_depth.refuse_void(split(dict(depth=depth) for depth in maps))


def test_every_epoch_has_its_own_order_and_crops(tmp_path, monkeypatch):
    pairs = []
    for i in range(4):
        image, depth = scene(i, 480, 640)
        write(tmp_path / f"{i}.png", image)
        write(tmp_path / f"d{i}.png", (1000 * depth).astype(np.uint16))
        pairs.append((tmp_path / f"{i}.png", tmp_path / f"d{i}.png"))
    pictures = probe_depth.DepthPictures("nyu", "train", pairs)
    monkeypatch.setattr(probe_depth, "frozen", lambda model, x, args: (x, x))

    def epochs(seed):
        args = types.SimpleNamespace(batch_size=2, iters=6, seed=seed, crop=(40, 50), workers=0)
        keys = [key for batch in probe_depth.BatchOrder(4, args, 0) for key in batch]
        crops = torch.cat([depth for _, _, depth in probe_depth.batches(None, pictures, args, CPU, 0)])
        assert [epoch for epoch, _ in keys] == 4 * [0] + 4 * [1] + 4 * [2] and crops.shape == (12, 40, 50)
        orders = [tuple(i for e, i in keys if e == epoch) for epoch in range(3)]
        assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
        return orders, {key: crop for key, crop in zip(keys, crops, strict=True)}

    orders, crops = epochs(0)
    assert len({*orders, *epochs(1)[0]}) == 6                       # of 24
    assert equal(crops, epochs(0)[1])
    seen = [*crops.values(), *epochs(1)[1].values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_constant_is_of_maps_spread_over_the_train_set():
    maps = [dict(depth=torch.full((2, 2), 0.001 * i)) for i in [*range(1, 9001), 11_000]]
    constant = probe_depth.best_constant(maps, types.SimpleNamespace(data="nyu", workers=0))
    assert constant == pytest.approx(4.5, rel=0.01)


def test_augmented_picture_and_depth_stay_aligned():
    y, x = np.mgrid[:60, :80]
    depth = (100 + y + x).astype(np.float32)
    image = np.stack([depth, depth, depth], -1).astype(np.uint8)
    seen = dict(rotated=0, mirrored=0, coloured=0, offsets=set())
    for key in range(200):
        a, d = probe_depth.augment(np.random.default_rng(key), image, depth, (50, 76), 0.25)
        assert a.shape == (50, 76, 3) and a.dtype == np.uint8 and d.shape == (50, 76)
        assert np.isin(d, np.append(depth, 0)).all()                # no depth in between is made up
        inner = d[10:40, 10:66]
        slope = inner[0, -1] - inner[0, 0]
        seen["mirrored"] += slope < 0
        rotated = len(np.unique(np.diff(inner))) > 1
        seen["rotated"] += rotated
        error = np.abs(a[10:40, 10:66].astype(float) - inner[..., None]).max()
        if error > 2:                                               # nearest and bilinear differ by less
            seen["coloured"] += 1
        if not rotated and slope > 0:
            seen["offsets"].add(int(d[0, 0]) - 100)
    assert all(75 <= seen[name] <= 125 for name in ("mirrored", "coloured")) and seen["rotated"] > 40, seen
    assert min(seen["offsets"]) <= 1 and max(seen["offsets"]) >= 13 and max(seen["offsets"]) <= 14      # 10 + 4


def test_rotation_is_within_two_and_a_half_degrees():
    depth, angles = np.zeros((401, 401), np.float32), []
    depth[200:202, 200:] = 1                                        # a hand that points right
    image = np.zeros((401, 401, 3), np.uint8)
    for key in range(120):
        _, d = probe_depth.augment(np.random.default_rng(key), image, depth, (401, 401), 0.25)
        rows = np.flatnonzero(d[:, 390] + d[:, 10])
        angles.append(math.degrees(math.atan((rows.mean() - 200.5) / 190)))
    assert min(angles) < -2 and max(angles) > 2 and max(map(abs, angles)) < 2.7
    assert 40 <= sum(abs(a) < 0.01 for a in angles) <= 80


@pytest.mark.parametrize("source, brightness", [("kitti", 0.1), ("nyu", 0.25)])
def test_colours(source, brightness):
    grey = np.full((8, 8, 3), 100, np.uint8), np.ones((8, 8), np.float32)
    crops = probe_depth.TrainCrops(types.SimpleNamespace(source=source, read=lambda i: grey), (8, 8), 0)
    colours = np.stack([crops[0, key]["image"][:, 4, 4].numpy() for key in range(600)])
    changed = colours[(colours != 100).any(1)]
    low, high = 100**0.9 * (1 - brightness) * 0.9, 100**1.1 * (1 + brightness) * 1.1
    assert low - 0.5 <= changed.min() < 1.2 * low and high / 1.2 < changed.max() <= high + 0.5
    assert 240 <= len(changed) <= 360
    ratios = changed[:, 0] / changed[:, 1]
    assert 0.9 / 1.1 - 0.02 <= ratios.min() < 0.87 and 1.15 < ratios.max() <= 1.1 / 0.9 + 0.02


@pytest.mark.parametrize("end, value", [("low", 100**0.9 * 0.75 * 0.9), ("high", 100**1.1 * 1.25 * 1.1)])
def test_colour_formula(end, value):
    """No rotation, no flip, and every colour draw at one end of its range: 42.6 and 217.9."""
    chances = iter([0.9, 0.9, 0.1])
    rng = types.SimpleNamespace(
        random=lambda: next(chances), integers=lambda n: 0,
        uniform=lambda low, high, n=None: (low if end == "low" else high) * (1.0 if n is None else np.ones(n)))
    image, _ = probe_depth.augment(rng, np.full((4, 4, 3), 100, np.uint8), np.ones((4, 4), np.float32), (4, 4), 0.25)
    assert (image == round(value)).all()


# ---- end to end -----------------------------------------------------------------------------------------------------

def window_by_hand(data, depth):
    keep = np.zeros(depth.shape, bool)
    if data == "kitti":
        keep[143:349, 43:1172] = True
    else:
        keep[45:471, 41:601] = True
    return keep & (depth > 0.001) & (depth < (80 if data == "kitti" else 10))


def predict_by_hand(model, head, image, size, most):
    """Mean of the prediction and of the turned-back prediction of the mirror image."""
    total = 0
    for mirrored in (False, True):
        x = image[:, ::-1].copy() if mirrored else image
        x = vit.pad_to_patches(vit.normalize(torch.from_numpy(x.copy()).permute(2, 0, 1)[None]), 32)
        features = model.features(x, [0, 1, 2, 4], norm=False)
        cls, patches = (torch.stack([getattr(f, name) for f in features], 1) for name in ("cls", "patches"))
        depth = F.interpolate(depth_by_hand(head, cls, patches, most)[None], size, mode="bilinear")[0, 0]
        total = total + (depth.flip(1) if mirrored else depth) / 2
    return total.numpy().astype(np.float64)


def four_neighbours(image, h, w):
    """uint8 (H, W, 3) -> (h, w, 3): each pixel from the four whose centres are around its own."""
    sides = []
    for n, m in zip(image.shape, (h, w), strict=False):
        x = ((np.arange(m) + 0.5) * n / m - 0.5).clip(0, n - 1)
        low = np.floor(x).astype(int)
        sides.append((low, np.minimum(low + 1, n - 1), x - low))
    (top, bottom, v), (left, right, u) = sides
    v, u, image = v[:, None, None], u[:, None], image.astype(np.float64)
    rows = [image[i][:, left] * (1 - u) + image[i][:, right] * u for i in (top, bottom)]
    return (rows[0] * (1 - v) + rows[1] * v + 0.5).astype(np.uint8)


def pairs_by_hand(data, root):
    """(train depth maps as trained on, val (picture, depth)) read plainly."""
    def read(path, per_metre):
        return np.asarray(Image.open(path)).astype(np.float32) / per_metre

    def picture(path):
        return np.asarray(Image.open(path).convert("RGB"))

    if data == "nyu":
        train = [read(p, 1000)[45:472, 43:608] for p in sorted(root.glob("train_room/sync*.png"))]
        val = [(picture(p), read(str(p).replace("rgb", "sync_depth"), 1000))
               for p in sorted(root.glob("test_room/rgb*"))]
    elif data == "kitti":
        train = [read(p, 256)[8:, 4:1220] for p in sorted(root.glob("gt_depth/train/*.png"))]
        val = [(picture(p)[8:, 4:1220], read(root / "gt_depth/test" / p.name, 256)[8:, 4:1220])
               for p in sorted(root.glob("input/day/test/*.png"))]
    else:
        def turned(path):
            d = np.asarray(Image.open(path)).astype(np.int64)
            return ((d // 8 + d % 8 * 8192) / 1000).astype(np.float32)

        files = sorted(root.glob("SUNRGBD/*/set/*/depth/*.png"))
        train = [np.asarray(Image.fromarray(turned(p)).resize((640, 480), Image.Resampling.NEAREST)) for p in files[2:]]
        val = [(four_neighbours(np.asarray(Image.open(p.parent.parent / "image" / (p.stem + ".jpg"))), 480, 640),
                np.minimum(turned(p), 8)) for p in files[:2]]
    return train, val


@pytest.mark.parametrize("data", ["nyu", "kitti", "sunrgbd", "zero-shot"])
def test_result_equals_the_evaluation_by_hand(tmp_path, coarse, capsys, data):
    root, flags, train_root = tmp_path / "data", [], None
    {"nyu": nyu, "kitti": kitti, "sunrgbd": sun, "zero-shot": sun}[data](root)
    if data == "zero-shot":
        data, train_root = "sunrgbd", nyu(tmp_path / "other")
        flags = ["--train-root", train_root]
    elif data == "sunrgbd":
        flags = ["--train-on", "sunrgbd"]
    run("--weights", coarse, "--data", data, "--root", root, *flags, "--allow-partial", "--iters", 3, "--batch-size", 3,
        "--crop", 64, 96, "--workers", 0, "--eval-every", 2, "--save-images", 2)
    r = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(r) == KEYS and list(r["protocol"]) == PROTOCOL
    assert r == json.loads((tmp_path / f"coarse.depth.{data}.json").read_text())

    most, model = 80.0 if data == "kitti" else 10.0, disk.load_backbone(coarse)
    weights = torch.load(tmp_path / f"coarse.depth.{data}.head.pt")["heads"]
    head = types.SimpleNamespace(weight=weights["0.weight"], bias=weights["0.bias"])
    train, val = pairs_by_hand(data, root)
    if train_root:
        train = pairs_by_hand("nyu", train_root)[0]
    pooled = np.concatenate([d[(d > 0) & (d <= most)].astype(np.float64) for d in train])
    constant, squares, rows = pooled.mean(), [], []
    for image, depth in val:
        keep = window_by_hand(data, depth)
        t = depth[keep].astype(np.float64)
        p = predict_by_hand(model, head, image, depth.shape, most)[keep]
        if data == "sunrgbd":
            p = np.minimum(p, 8)
        squares.append((p - t) ** 2)
        rows.append([np.sqrt(squares[-1].mean()), (abs(p - t) / t).mean(),
                     100 * (np.maximum(p / t, t / p) < 1.25).mean(), np.sqrt(((constant - t) ** 2).mean())])
    rmse, abs_rel, d1, rmse_constant = np.mean(rows, 0)
    assert r["metrics"]["rmse_last"] == pytest.approx(rmse, rel=1e-5)
    assert r["metrics"]["rmse_constant"] == pytest.approx(rmse_constant, rel=1e-6)
    assert r["metrics"]["constant"] == pytest.approx(constant, rel=1e-6)
    if r["metrics"]["best_iterations"] == [3]:
        assert r["metrics"]["rmse"] == r["metrics"]["rmse_last"]
        assert [r["metrics"]["abs_rel"], r["metrics"]["d1"]] == pytest.approx([abs_rel, d1], rel=1e-4)
    assert abs(np.sqrt(np.concatenate(squares).mean()) - rmse) > 1e-3 * rmse    # pooling would be another number
    assert r["protocol"]["partial"] is True and r["protocol"]["crop"] == [64, 96]
    assert Image.open(tmp_path / f"coarse.depth.{data}.png").width == 3 * 404


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_training_equals_a_plain_loop(few_scenes, fine, monkeypatch):
    """AdamW written out, with a clipping that acts and a loss whose warm-up ends after the first of four iterations."""
    monkeypatch.setattr(probe_depth, "MAX_NORM", 0.02)
    args = probe_depth.parse_args(["--weights", fine, "--iters", "4", "--batch-size", "2"])
    model = disk.load_backbone(fine)
    args.loss_warmup = 1
    train, val, _ = probe_depth.open_data(args, 32)
    probe_depth.train_heads(model, train, val, args, CPU, "a.head.pt", dict(iters=4))
    ours = torch.load("a.head.pt")["heads"]

    torch.manual_seed(0)
    conv = torch.nn.Conv2d(8 * 16, 256, 1)
    head = types.SimpleNamespace(weight=conv.weight.detach().flatten(1).requires_grad_(),
                                 bias=conv.bias.detach().requires_grad_())
    state = {name: [torch.zeros_like(x), torch.zeros_like(x)] for name, x in vars(head).items()}
    order, scenes, norms = np.random.default_rng((0, 0, 0)).permutation(20), shapes.Shapes("train", 32, 20, 5), []
    for t in range(4):
        pair = [scenes[int(i)] for i in order[2 * t:2 * t + 2]]
        features = model.features(vit.normalize(torch.stack([scene["image"] for scene in pair])), norm=False)
        cls, patches = (torch.stack([getattr(f, name) for f in features], 1) for name in ("cls", "patches"))
        p = F.interpolate(depth_by_hand(head, cls, patches, 10.0)[:, None], (32, 32), mode="bilinear")[:, 0]
        g = (p + 0.001).log() - (torch.stack([scene["depth"] for scene in pair]) + 0.001).log()
        ((g.var() if t else 0) + 0.15 * g.mean() ** 2).sqrt().backward()
        norms.append(math.sqrt(sum(x.grad.square().sum().item() for x in vars(head).values())))
        rate = 3e-2 * (1 + math.cos(math.pi * t / 4)) / 2 * (0.001 + 0.999 * min(1, t / (4 / 3)))
        with torch.no_grad():
            for name, x in vars(head).items():
                grad, (m, v) = x.grad * min(1, 0.02 / norms[-1]), state[name]
                m.mul_(0.9).add_(0.1 * grad)
                v.mul_(0.999).add_(0.001 * grad**2)
                x -= rate * 0.01 * x + rate * (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
                x.grad = None
    assert min(norms) > 0.02
    off = torch.cat([ours["0.weight"] - head.weight, (ours["0.bias"] - head.bias)[:, None]], 1).abs().amax(1)
    assert (off < 3e-6).sum() >= 248, off.sort()                    # of 256 bins: some have a pixel on the ReLU's kink


@pytest.mark.parametrize("data", ["shapes", "nyu"])
def test_resumed_probe_is_bit_equal(tmp_path, few_scenes, fine, coarse, capsys, monkeypatch, data):
    flags = ["--weights", fine, "--iters", 7, "--batch-size", 4, "--seeds", 2]
    if data == "nyu":
        flags = ["--weights", coarse, "--data", "nyu", "--root", nyu(tmp_path / "nyu", 3, 1), "--allow-partial",
                 "--crop", 64, 96, "--iters", 5, "--batch-size", 2]
    flags += ["--eval-every", 2, "--save-every", 3, "--log-every", 2]
    run(*flags, "--workers", 0, "--out", "whole.json")
    original = probe_depth.learning_rate

    def stop(t, args):
        if t == 4:
            raise KeyboardInterrupt
        return original(t, args)

    monkeypatch.setattr(probe_depth, "learning_rate", stop)
    with pytest.raises(SystemExit):
        run(*flags, "--workers", 0, "--out", "parts.json")
    monkeypatch.setattr(probe_depth, "learning_rate", original)
    run(*flags, "--workers", 1 if data == "nyu" else 0, "--out", "parts.json")     # nor do workers change anything
    assert "going on from iteration 4" in capsys.readouterr().out
    assert equal(torch.load("whole.head.pt"), torch.load("parts.head.pt"))
    assert Path("whole.json").read_text() == Path("parts.json").read_text()
    done = [row["iteration"] for row in torch.load("whole.head.pt")["history"]]
    assert done == ([2, 4, 6, 7] if data == "shapes" else [2, 4, 5])


def test_finished_probe_is_not_repeated(few_scenes, fine, capsys, monkeypatch):
    flags = ["--weights", fine, "--iters", 2, "--batch-size", 2, "--out", "a.json"]
    run(*flags)
    before = result(capsys, "a.json")
    monkeypatch.setattr(probe_depth, "train_heads", None)
    run(*flags)
    assert result(capsys, "a.json") == before


def test_unfinished_heads_of_other_settings_are_refused(few_scenes, fine, capsys):
    run("--weights", fine, "--iters", 2, "--batch-size", 2, "--out", "a.json")
    state = torch.load("a.head.pt")
    Path("a.json").unlink()
    torch.save(dict(state, iteration=1), "a.head.pt")
    status, line = exits(capsys, "--weights", fine, "--iters", 2, "--batch-size", 3, "--out", "a.json")
    assert status == 1 and "a.head.pt: holds unfinished heads with batch_size 2, now 3" in line
    torch.save(dict(state, history=[]), "a.head.pt")                # done, but cut in the last evaluation
    status, line = exits(capsys, "--weights", fine, "--iters", 2, "--batch-size", 3, "--out", "a.json")
    assert status == 1 and "a.head.pt: holds unreported heads with batch_size 2, now 3" in line
    torch.save(state, "a.head.pt")
    run("--weights", fine, "--iters", 2, "--batch-size", 3, "--out", "a.json")
    assert result(capsys, "a.json")["protocol"]["batch_size"] == 3


@pytest.mark.parametrize("data, crop, most, cap, window, counts", [
    ("nyu", (416, 544), 10.0, None, (45, 471, 41, 601), (24_231, 654)),
    ("kitti", (352, 704), 80.0, None, (143, 349, 43, 1172), (23_158, 652)),
    ("sunrgbd", (416, 544), 10.0, 8.0, (45, 471, 41, 601), (24_231, 5_050)),
    ("shapes", None, 10.0, None, None, None),
])
def test_recipe_is_the_papers_and_is_trained(tmp_path, coarse, few_scenes, monkeypatch, data, crop, most, cap, window,
                                             counts):
    make, flags = {"nyu": nyu, "kitti": kitti, "sunrgbd": sun, "shapes": None}[data], ["--weights", coarse]
    if make:
        flags += ["--data", data, "--root", make(tmp_path / "data", 2, 1), "--allow-partial"]
    if data == "sunrgbd":
        flags += ["--train-root", nyu(tmp_path / "nyu", 2, 1)]

    def catch(model, train, val, args, device, file, stamp):
        raise SystemExit(stamp)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(probe_depth, "train_heads", catch)
        run(*flags)
    stamp = stop.value.code
    expected = dict(iters=38_400, batch_size=16, lr=1e-3, eval_every=1600, loss_warmup=100, seeds=1, bins=256,
                    crop=crop, max_depth=most, cap=cap, window=window,
                    train_on="nyu" if data == "sunrgbd" else data)
    if data == "shapes":
        expected |= dict(iters=2_000, batch_size=4, lr=3e-2, eval_every=2_000, loss_warmup=5, train=20, val=10,
                         size=2 * 64, cards=5)
    assert {name: stamp[name] for name in expected} == expected
    assert (probe_depth.MAX_NORM, probe_depth.MIN_DEPTH, probe_depth.BINS) == (35, 0.001, 256)
    if counts:
        layouts = probe_depth.LAYOUTS
        assert (layouts[stamp["train_on"]]["train"][1], layouts[data]["val"][1]) == counts
        assert layouts["sunrgbd"]["train"][1] == 5_285

    batches, loss = [], probe_depth.sig_loss
    monkeypatch.setattr(probe_depth, "sig_loss", lambda p, t, w: (batches.append((p.shape, t.shape)), loss(p, t, w))[1])
    run(*flags, "--iters", 1, "--workers", 0)
    assert batches == [2 * ((expected["batch_size"], *(crop or (128, 128))),)]


def test_logged_loss_is_the_mean_since_the_last_line(few_scenes, fine, capsys, monkeypatch):
    losses, loss, rate = [], probe_depth.sig_loss, probe_depth.learning_rate
    monkeypatch.setattr(probe_depth, "sig_loss", lambda *a: (x := loss(*a), losses.append(x.item()))[0])

    def stop(t, args):
        if t == 4 and len(losses) == 2 * 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(t, args)

    monkeypatch.setattr(probe_depth, "learning_rate", stop)
    flags = ["--weights", fine, *"--iters 10 --batch-size 2 --seeds 2 --log-every 4 --out a.json".split()]
    with pytest.raises(SystemExit):
        run(*flags)
    run(*flags)
    assert len(losses) == 2 * 10
    logged = re.findall(r"eta \S+ +loss ([\d.]+)  iteration (\d+)/10", capsys.readouterr().out)
    means = {end: sum(losses[2 * start:2 * end]) / (2 * (end - start))
             for start, end in [(0, 1), (1, 4), (5, 6), (6, 8), (8, 10)]}
    assert {int(t): float(x) for x, t in logged} == pytest.approx(means, abs=1e-4)
    assert max(means.values()) - min(means.values()) > 1e-3


@pytest.mark.parametrize("number, where, done", [(signal.SIGTERM, "training", 5), (signal.SIGINT, "evaluation 2", 4),
                                                 (signal.SIGINT, "evaluation 4", 7)])
@pytest.mark.parametrize("data", ["shapes", "nyu"])
def test_asked_to_end_it_saves(tmp_path, few_scenes, fine, coarse, capsys, monkeypatch, number, where, done, data):
    """At any moment, the last evaluation included; it goes on to the bits of a probe that nobody asked."""
    if data == "nyu" and where == "evaluation 2":
        pytest.skip("as on shapes")
    flags = ["--weights", fine, "--batch-size", 4, "--seeds", 2]
    if data == "nyu":                                               # with workers, which Ctrl-C reaches, too
        flags = ["--weights", coarse, "--data", "nyu", "--root", nyu(tmp_path / "nyu", 3, 2), "--allow-partial",
                 "--crop", 64, 96, "--batch-size", 2, "--workers", 1]
    flags += ["--iters", 7, "--eval-every", 2, "--save-every", 99, "--out"]
    run(*flags, "whole.json")
    rate, measure, calls = probe_depth.learning_rate, probe_depth.measure, []

    def ask():
        for process in [*(child.pid for child in multiprocessing.active_children()), os.getpid()]:
            os.kill(process, number)

    def asked_in_training(t, args):
        if (where, t) == ("training", 4):
            ask()
        return rate(t, args)

    def asked_in_evaluation(*a):
        calls.append(0)
        if where == f"evaluation {len(calls)}":
            ask()
        return measure(*a)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(probe_depth, "learning_rate", asked_in_training)
        patch.setattr(probe_depth, "measure", asked_in_evaluation)
        run(*flags, "parts.json")
    assert stop.value.code == 128 + number and not Path("parts.json").exists()
    state = torch.load("parts.head.pt")
    assert state["iteration"] == done
    assert [row["iteration"] for row in state["history"]] == [t for t in (2, 4, 6) if t < done or where == "training"][
        :{5: 2, 4: 1, 7: 3}[done]]
    assert not multiprocessing.active_children()
    text = capsys.readouterr().out
    line = "stopped by signal 15 after iteration 5, saved; run the same command again to go on"
    assert (line in text.splitlines()) == (where == "training")
    run(*flags, "parts.json")
    assert ("going on from iteration" in capsys.readouterr().out) == (done < 7)
    assert equal(torch.load("whole.head.pt"), torch.load("parts.head.pt"))
    assert Path("whole.json").read_text() == Path("parts.json").read_text()


def test_old_heads_are_not_taken_for_other_weights_seeds_or_data(tmp_path, few_scenes, fine, coarse, capsys):
    state = torch.load(fine)
    state["student"] = {key: tensor * 1.5 for key, tensor in state["student"].items()}
    torch.save(state, "fine.pt")
    torch.save(state | dict(teacher=state["student"]), "other.pt")
    root = nyu(tmp_path / "nyu", 2, 1)
    picture = ["--weights", coarse, "--data", "nyu", "--root", root, "--allow-partial", "--crop", 64, 64]

    def halve(split):
        for path in root.glob(f"{split}_room/sync*"):
            write(path, np.asarray(Image.open(path)) // 2)

    for before, after, change in [
        (["--weights", "fine.pt"], ["--weights", "fine.pt", "--which", "student"], None),
        (["--weights", "fine.pt"], ["--weights", "fine.pt", "--seed", 1], None),
        (["--weights", "fine.pt"], ["--weights", "other.pt"], None),
        (picture, picture, "train"),
        (picture, picture, "test"),
    ]:
        flags = ["--iters", 2, "--batch-size", 2, "--workers", 0, "--out"]
        run(*before, *flags, "a.json")
        first = result(capsys, "a.json")
        if change:
            halve(change)
        run(*after, *flags, "fresh.json")
        fresh = result(capsys, "fresh.json")
        Path("a.json").unlink()                                     # the heads are still there
        run(*after, *flags, "a.json")
        assert result(capsys, "a.json") == fresh != first
        assert fresh["metrics"]["rmse"] != first["metrics"]["rmse"]
        for path in tmp_path.glob("*.json"):
            path.unlink()
    stamp = torch.load("a.head.pt")["stamp"]
    assert stamp["fingerprint"] == fresh["protocol"]["fingerprint"] and stamp["weights_sha256"] and stamp["seed"] == 0


def test_other_depths_under_the_same_names_are_another_result(tmp_path, coarse, capsys):
    root = nyu(tmp_path / "nyu", 2, 2)
    flags = ["--weights", coarse, "--data", "nyu", "--root", root, "--allow-partial", "--iters", 2, "--batch-size", 2,
             "--crop", 64, 64, "--workers", 0]
    run(*flags, "--save-images", 1)
    first = result(capsys, "coarse.depth.nyu.json")
    run(*flags, "--save-images", 1)
    text = capsys.readouterr().out
    assert json.loads(text.splitlines()[-1]) == first and first["root"] == str(root)
    assert "finished before: result read from coarse.depth.nyu.json" in text.replace(f"{tmp_path}/", "")
    assert "so nothing is drawn" in text and "iteration" not in text.partition("{")[0]
    for path in root.rglob("sync_depth*"):
        write(path, np.asarray(Image.open(path)) // 2)
    run(*flags)
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert second["metrics"]["constant"] == pytest.approx(first["metrics"]["constant"] / 2, rel=1e-3)
    assert json.loads(Path("coarse.depth.nyu.json").read_text()) == first
    assert len(list(tmp_path.glob("coarse.depth.nyu*.json"))) == 2
    status, line = exits(capsys, *flags, "--out", "coarse.depth.nyu.json")
    assert status == 1 and "not to be overwritten (fingerprint" in line


def test_heads_of_a_foreign_file_are_given(tmp_path, few_scenes, capsys):
    model = vit.VisionTransformer(dataclasses.replace(CONFIG, dim=192, registers=0))
    torch.save(model.state_dict(), "foreign.pt")
    rmse = {}
    for flags, heads in (([], 3), (["--heads", 4], 4)):
        run("--weights", "foreign.pt", "--iters", 2, "--batch-size", 2, *flags, "--out", f"{heads}.json")
        found = result(capsys, f"{heads}.json")
        assert found["config"]["heads"] == heads
        rmse[heads] = found["metrics"]["rmse"]
    assert rmse[3] != rmse[4]


def test_head_of_a_seed_is_that_of_a_probe_alone(few_scenes, fine, monkeypatch, capsys):
    monkeypatch.setattr(probe_depth, "MAX_NORM", 0.02)              # clipped, and each head by its own norm
    flags = ["--weights", fine, "--iters", 3, "--batch-size", 4]
    run(*flags, "--seeds", 2, "--out", "two.json")
    together = result(capsys, "two.json")["metrics"]
    init = probe_depth.Head
    for k in (0, 1):                                                # the same order of images, another head
        monkeypatch.setattr(probe_depth, "Head", lambda dim, most, seed, k=k: init(dim, most, seed + k))
        run(*flags, "--out", f"one{k}.json")
        alone = result(capsys, f"one{k}.json")["metrics"]
        assert torch.equal(torch.load(f"one{k}.head.pt")["heads"]["0.weight"],
                           torch.load("two.head.pt")["heads"][f"{k}.weight"])
        assert alone["rmse"] == together["rmse_seeds"][k]
    assert together["rmse_seeds"][0] != together["rmse_seeds"][1]
    assert together["rmse"] == pytest.approx(sum(together["rmse_seeds"]) / 2)
    assert together["rmse_sd"] == pytest.approx(abs(np.subtract(*together["rmse_seeds"])) / math.sqrt(2))


@pytest.mark.parametrize("planted", [True, False])
def test_planted_depth_is_found_and_shuffled_depth_is_not(tmp_path, fine, capsys, monkeypatch, planted):
    """Patches say which of five depths their image has; shuffled, nothing beats the constant by more than luck."""
    levels = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0])

    def extract(model, scenes, args, device):
        n = len(scenes)
        which = torch.randint(5, (n,), generator=torch.Generator().manual_seed(n))      # train and val differ
        said = which if planted else which[torch.randperm(n, generator=torch.Generator().manual_seed(5))]
        patches = 3000 * F.one_hot(said, 16).float()[:, None, None, None].expand(n, 4, 2, 2, 16)
        return torch.zeros(n, 4, 16), patches, levels[which].view(n, 1, 1).expand(n, 16, 16)

    monkeypatch.setattr(probe_depth, "Shapes", lambda split, size, length, cards: range(length // 5))
    monkeypatch.setattr(probe_depth, "extract", extract)
    run("--weights", fine, "--iters", 300, "--batch-size", 16, "--out", "a.json")
    metrics = result(capsys, "a.json")["metrics"]
    if planted:
        assert metrics["rmse_last"] < 0.05 * metrics["rmse_constant"] and metrics["d1"] == 100
    else:
        assert metrics["rmse_last"] > 0.95 * metrics["rmse_constant"]


def test_shapes_end_to_end(few_scenes, fine, capsys):
    run("--weights", fine, "--iters", 4, "--batch-size", 4, "--save-images", 2)
    r = result(capsys, "fine.depth.shapes.json")
    assert list(r) == KEYS and r["protocol"]["train"] == 20 and r["protocol"]["val"] == 10
    assert list(r["protocol"]) == [*PROTOCOL, "cards"] and r["protocol"]["cards"] == 5 and r["protocol"]["size"] == 32
    assert r["protocol"]["partial"] is False and r["protocol"]["mirrored"] is False
    val = list(shapes.Shapes("val", 32, 10, 5))
    constant = torch.stack([scene["depth"].double() for scene in shapes.Shapes("train", 32, 20, 5)]).mean()
    expected = sum((scene["depth"] - constant).square().mean().sqrt() for scene in val) / 10
    assert r["metrics"]["rmse_constant"] == pytest.approx(expected.item(), rel=1e-6)
    weights = torch.load("fine.depth.shapes.head.pt")["heads"]
    head = types.SimpleNamespace(weight=weights["0.weight"], bias=weights["0.bias"])
    model, values = disk.load_backbone(fine), []
    for scene in val:
        features = model.features(vit.normalize(scene["image"])[None], norm=False)
        cls, patches = (torch.stack([getattr(f, name) for f in features], 1) for name in ("cls", "patches"))
        p = F.interpolate(depth_by_hand(head, cls, patches, 10.0)[None], (32, 32), mode="bilinear")[0, 0]
        values.append((p - scene["depth"]).square().mean().sqrt().item())
    assert r["metrics"]["rmse_last"] == pytest.approx(sum(values) / 10, rel=1e-5)


def test_shapes_are_a_thousand_and_five_hundred_scenes_of_up_to_five_cards(fine, monkeypatch):
    monkeypatch.setattr(probe_depth, "Shapes", lambda *given: [given])
    found = probe_depth.open_data(probe_depth.parse_args(["--weights", fine]), 64)
    assert found == ([("train", 64, 1_000, 5)], [("val", 64, 500, 5)], shapes.FINGERPRINT)


def test_scenes_of_several_cards_are_rendered_once_for_all_checkpoints(tmp_path, few_scenes, fine, monkeypatch):
    """At twice the side that the models were trained at."""
    render, heads, drawn, seen = shapes.Shapes.__getitem__, probe_depth.train_heads, [], []

    def counted(scenes, i):
        scene = render(scenes, i)
        drawn.append((scenes.size, scenes.split, i))
        return scene

    monkeypatch.setattr(shapes.Shapes, "__getitem__", counted)
    monkeypatch.setattr(probe_depth, "train_heads", lambda *given: (seen.append(given[1:3]), heads(*given))[1])
    same = save(tmp_path / "same.pt", dataclasses.replace(CONFIG, dim=24))
    wide = save(tmp_path / "wide.pt", dataclasses.replace(CONFIG, image_size=24))
    run("--weights", fine, same, wide, "--iters", 1, "--batch-size", 2)
    assert drawn == [(size, split, i) for size in (32, 48) for split, n in (("train", 20), ("val", 10))
                     for i in range(n)]
    assert seen[0][0] is seen[1][0] and seen[0][1] is seen[1][1]
    for split, found in zip(("train", "val"), seen[0], strict=True):
        cards = [len(scene["depth"][scene["mask"] > 0].unique()) for scene in found]    # each has one depth
        assert min(cards) >= 2 and max(cards) == 5                  # one may be hidden
        for scene, expected in zip(found, shapes.Shapes(split, 32, len(found), 5), strict=True):
            assert torch.equal(scene["image"], expected["image"]) and torch.equal(scene["depth"], expected["depth"])


def test_pictures_show_both_depths_on_the_scale_of_the_label(tmp_path, capsys):
    label, guess = torch.tensor([[65.0, 4.0], [8.0, 2.0]]), torch.tensor([[8.0, 8.0], [16.0, 4.0]])     # 65: no depth
    val = [dict(image=torch.full((3, 2, 2), 77, dtype=torch.uint8), depth=label)]
    probe_depth.draw_images(tmp_path / "a.png", val, [guess], 10.0)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (404, 1212, 3) and (sheet[200, 200] == 77).all()
    assert "a.png: 1 val image with label" in capsys.readouterr().out
    black, dark, middle, bright = (0, 0, 0), (59, 82, 139), (33, 145, 140), (253, 231, 37)     # of 0, 1/4, 1/2, 1
    for x, expected in ((404, [black, middle, bright, dark]), (808, [bright, bright, bright, middle])):
        tiles = [sheet[100, x + 100], sheet[100, x + 300], sheet[300, x + 100], sheet[300, x + 300]]
        assert [tuple(tile) for tile in tiles] == expected


def test_pictures_are_of_val(tmp_path, coarse, capsys):
    """Of its first and its last picture, each beside its own label."""
    root = nyu(tmp_path / "nyu", 2, 3)
    for i in range(3):                                              # the label's one depth fills the left half
        write(root / f"test_room/sync_depth_{i:05}.png", np.full((480, 640), 2000, np.uint16) // (1 + np.indices(
            (480, 640))[1] * (i + 1) // 640).astype(np.uint16))
    run("--weights", coarse, "--data", "nyu", "--root", root, "--allow-partial", "--iters", 1, "--batch-size", 2,
        "--crop", 64, 64, "--workers", 0, "--save-images", 2, "--out", "a.json")
    sheet = Image.open("a.png")
    for row, i in enumerate((0, 2)):
        tile = Image.open(root / f"test_room/rgb_{i:05}.png").resize((400, 300), Image.Resampling.BICUBIC)
        assert (np.asarray(sheet.crop((0, 304 * row, 400, 304 * row + 300))) == np.asarray(tile)).all()
        label = np.asarray(sheet.crop((404, 304 * row, 804, 304 * row + 300)))
        assert len(np.unique(label[150], axis=0)) == i + 1


def test_sparse_labels_can_be_seen(tmp_path):
    """One of 25 pixels is measured, and every pixel of the picture stands for 6 x 6 of them."""
    label = torch.zeros(600, 2400)
    label[2::5, 2::5] = 40
    label[2::5, 1202::5] = 80
    val = [dict(image=torch.zeros(3, 600, 2400, dtype=torch.uint8), depth=label)]
    probe_depth.draw_images(tmp_path / "a.png", val, [label], 80.0)
    tile = np.asarray(Image.open(tmp_path / "a.png"))[:100, 404:804]
    assert (tile[:, :200] == (33, 145, 140)).all() and (tile[:, 201:] == (253, 231, 37)).all()


def test_picture_without_a_pixel_in_the_window_is_left_out(tmp_path, coarse, capsys):
    root = kitti(tmp_path / "kitti", 1, 2)
    depth = np.zeros((360, 1225), np.uint16)
    depth[-1, 600] = 256 * 5                                        # the last row is outside of Garg's window
    write(root / "gt_depth/test/1.png", depth)
    run("--weights", coarse, "--data", "kitti", "--root", root, "--allow-partial", "--iters", 1, "--batch-size", 2,
        "--crop", 64, 64, "--workers", 0, "--out", "two.json")
    two = result(capsys, "two.json")["metrics"]
    (root / "kitti_eigen_test.txt").write_text("day/test/0.png test/0.png 1.0\n")
    run("--weights", coarse, "--data", "kitti", "--root", root, "--allow-partial", "--iters", 1, "--batch-size", 2,
        "--crop", 64, 64, "--workers", 0, "--out", "one.json")
    one = result(capsys, "one.json")["metrics"]
    assert (two.pop("skipped"), one.pop("skipped")) == (1, 0) and one == two


# ---- mistakes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    ("--weights random --root pictures", "--data shapes takes no --root"),
    ("--weights random --crop 8 8", "--data shapes takes no --crop"),
    ("--weights random --data nyu", "--data nyu needs --root"),
    ("--weights random --data sunrgbd --root x", "needs --train-root"),
    ("--weights random --data sunrgbd --root x --train-on sunrgbd --train-root y", "--train-root goes with"),
    ("--weights random --data nyu --root x --train-root y", "--train-root goes with"),
    ("--weights random --data nyu --root x --train-on nyu", "--train-on goes with --data sunrgbd"),
    ("--weights random --data nyu --root x --crop 0 8", "--crop 0 8"),
    ("--weights random --eval-every 0", "--eval-every 0"),
])
def test_usage_errors(capsys, flags, message):
    status, line = exits(capsys, *flags.split())
    assert status == 2 and message in line and "error: " in line


def zeros(root):
    write(root / "train_room/sync_depth_00000.png", np.zeros((480, 640), np.uint16))


def eight_bits(root):
    write(root / "test_room/sync_depth_00000.png", np.ones((480, 640), np.uint8))


def narrow(root):
    write(root / "train_room/sync_depth_00000.png", np.ones((480, 600), np.uint16))


def cut_short(root):
    path = root / "test_room/rgb_00000.png"
    path.write_bytes(path.read_bytes()[:3000])


@pytest.mark.parametrize("break_it, message, workers", [
    (lambda root: (root / "nyu_test.txt").unlink(), r"nyu_test.txt: no such file; .* must hold nyu_train.*holds \[", 0),
    (lambda root: (root / "train_room/rgb_00000.png").unlink(), "nyu_train.txt, line 1: .*_room/rgb_00000.png: no", 0),
    (lambda root: (root / "nyu_train.txt").write_text("a.jpg\n"), "nyu_train.txt, line 1: 'a.jpg' names no", 0),
    (lambda root: (root / "nyu_train.txt").write_text(""), "nyu_train.txt: 0 train images", 0),
    (zeros, "train_room/sync_depth_00000.png: no valid pixel: depths from 0 to 0 m", 0),
    (eight_bits, "test_room/sync_depth_00000.png: .*mode L, not a 16-bit depth map", 0),
    (narrow, "sync_depth_00000.png: 600x480 pixels, its picture .*rgb_00000.png 640x480", 0),
    (cut_short, "test_room/rgb_00000.png: unreadable", 1),
])
def test_data_errors_are_one_line(tmp_path, capsys, coarse, monkeypatch, break_it, message, workers):
    if workers:                                                     # met by a loader process, in a map not looked at
        monkeypatch.setattr(probe_depth, "refuse_void", lambda pictures: None)
    root = nyu(tmp_path / "nyu", 1, 1)
    break_it(root)
    status, line = exits(capsys, "--weights", coarse, "--data", "nyu", "--root", root, "--allow-partial", "--iters", 1,
                         "--batch-size", 1, "--crop", 64, 64, "--workers", workers)
    assert status == 1 and "\n" not in line
    assert re.search(message, line), line
    assert not list(tmp_path.glob("*.json"))


def test_more_data_errors(tmp_path, capsys, fine, coarse):
    flags = ["--iters", 1, "--batch-size", 1, "--workers", 0]
    nyu_root = ["--weights", coarse, "--data", "nyu", "--root", nyu(tmp_path / "nyu", 1, 1)]
    kitti_root = ["--weights", coarse, "--data", "kitti", "--root", kitti(tmp_path / "small", 1, 1, (300, 1000))]
    sun_root = ["--weights", coarse, "--data", "sunrgbd", "--train-on", "sunrgbd", "--root", sun(tmp_path / "s", 0, 2)]
    (tmp_path / "text.pt").write_text("no checkpoint")
    for argv, message in [
        (nyu_root, "nyu_train.txt: 1 train image of 24,231; .*--allow-partial"),
        (nyu_root + ["--allow-partial", "--crop", 480, 64], "rgb_00000.png: 565x427 pixels to crop 64x480 from"),
        (nyu_root[:-1] + ["nowhere"], "nowhere must hold .*no such folder"),
        (kitti_root + ["--allow-partial"], "0.png: 1000x300 pixels, smaller than KITTI's crop"),
        (sun_root + ["--allow-partial"], "SUNRGBD_val_splits.txt: 0 train images"),
        (["--weights", "text.pt"], "text.pt: "),
        (["--weights", save(tmp_path / "flat.pt", dataclasses.replace(CONFIG, depth=3))], "flat.pt: 3 blocks"),
    ]:
        status, line = exits(capsys, *argv, *flags)
        assert status == 1 and "\n" not in line and re.search(message, line), line


@pytest.mark.parametrize("data, names", [
    ("nyu", ("nyudepthv2_train_files_with_gt.txt", "nyudepthv2_test_files_with_gt.txt")),
    ("kitti", ("eigen_train_files_with_gt.txt", "eigen_test_files_with_gt.txt"))])
def test_layouts_and_lists_of_bts(tmp_path, data, names):
    """Its lists have names of their own, and its KITTI pictures no input/; PowerShell saves UTF-16."""
    root = {"kitti": kitti, "nyu": nyu}[data](tmp_path / "data", 2, 1)
    before = [list(split) for split in opened(data, root)[:2]]
    for old, new in zip((probe_depth.LAYOUTS[data][split][0] for split in ("train", "val")), names, strict=True):
        (root / new).write_bytes((root / old).read_text().encode("utf-16"))
        (root / old).unlink()
    if data == "kitti":
        (root / "input/day").rename(root / "day")
    again = opened(data, root)
    assert equal([list(split) for split in again[:2]], before)


def test_pictures_of_kitti_may_be_jpegs(tmp_path):
    root = kitti(tmp_path / "kitti", 1, 1)
    before = opened("kitti", root)[2]
    for path in root.glob("input/day/*/*.png"):
        Image.open(path).save(path.with_suffix(".jpg"), quality=95)
        path.unlink()
    train, val, fingerprint = opened("kitti", root)
    assert [split.pairs[0][0].suffix for split in (train, val)] == [".jpg"] * 2 and fingerprint != before
    assert val[0]["image"].shape == (3, 352, 1216)
