"""data.py against torchvision's crops and Pillow's colours; folders as people have them; the order of batches."""
import argparse
import colorsys
import itertools
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

import data
import vit
from data import DRAWS, MultiCrop, crop_box, recolour

KINDS = {"global1": (1.0, 0.0), "global2": (0.1, 0.2), "local": (0.5, 0.0)}    # shares of blur and of solarize
ORDERS = [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- where crops lie

def picture(height, width, seed=0):
    """uint8 (3, H, W): smooth in the large, textured in the small, all the colours of a photograph."""
    g = torch.Generator().manual_seed(seed)
    x = sum(share * F.interpolate(torch.rand(1, 3, n, n, generator=g), size=(height, width), mode="bicubic")[0]
            for n, share in ((2, 0.5), (7, 0.35), (40, 0.15)))
    return ((x - x.amin()) / (x.amax() - x.amin()) * 255).round().byte()


def to_pil(x):
    return Image.fromarray(x.permute(1, 2, 0).contiguous().numpy())


def from_pil(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def ks_distance(a, b):
    """Largest gap between two empirical distribution functions."""
    at = np.concatenate([a, b])
    share_a, share_b = (np.searchsorted(np.sort(x), at, "right") / len(x) for x in (a, b))
    return abs(share_a - share_b).max()


@pytest.mark.parametrize("scale", [(0.4, 1), (0.05, 0.4)])
@pytest.mark.parametrize("height, width", [(375, 500), (600, 200)])
def test_boxes_are_distributed_as_torchvisions(height, width, scale):
    """Kolmogorov-Smirnov at the 0.1 % level, n = 2000 each, on area share, shape and position."""
    rng, image = np.random.default_rng(0), torch.empty(3, height, width, dtype=torch.uint8)
    ours = np.array([crop_box(height, width, scale, rng) for _ in range(2000)], float)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(2000)], float)
    views = [(h * w, h / w, y / np.maximum(height - h, 1), x / np.maximum(width - w, 1), y + h / 2, x + w / 2)
             for y, x, h, w in (ours.T, theirs.T)]
    for a, b in zip(*views, strict=True):
        assert ks_distance(a, b) < 1.95 * math.sqrt(2 / 2000)


def test_area_share_and_log_ratio_are_uniform():
    """A picture so large that every try is accepted: three means and deviations of uniform variables."""
    rng = np.random.default_rng(1)
    y, x, h, w = np.array([crop_box(10**6, 10**6, (0.05, 0.4), rng) for _ in range(4000)], float).T
    for value, low, high in ((h * w / 1e12, 0.05, 0.4), (np.log(w / h), math.log(3 / 4), math.log(4 / 3)),
                             (y / (1e6 - h), 0, 1), (x / (1e6 - w), 0, 1)):
        u = (value - low) / (high - low)
        assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * 4000) and abs(u.var() - 1 / 12) < 4 / math.sqrt(180 * 4000)
        assert -1e-4 < u.min() and u.max() < 1 + 1e-4


@pytest.mark.parametrize("height, width", [(1, 1), (1, 50), (50, 1), (2, 3), (7, 900), (900, 7), (3, 4), (224, 224)])
def test_boxes_lie_inside_pictures_of_any_shape(height, width):
    rng = np.random.default_rng(2)
    for scale in ((0.4, 1), (0.05, 0.4), (1, 1), (1e-9, 1e-9)):
        for top, left, h, w in (crop_box(height, width, scale, rng) for _ in range(200)):
            assert h > 0 and w > 0 and 0 <= top <= height - h and 0 <= left <= width - w


def test_boxes_reach_every_edge():
    rng, offsets = np.random.default_rng(3), {}
    for _ in range(3000):
        top, left, h, w = crop_box(6, 7, (0.2, 1), rng)
        offsets.setdefault((6, h), set()).add(top), offsets.setdefault((7, w), set()).add(left)
    assert all(seen == set(range(side - cut + 1)) for (side, cut), seen in offsets.items())


@pytest.mark.parametrize("height, width, box", [
    (900, 90, (390, 0, 120, 90)), (90, 900, (0, 390, 90, 120)), (90, 100, (0, 0, 90, 100)),
])
def test_largest_central_box_when_nothing_fits(height, width, box):
    assert crop_box(height, width, (1e-9, 1e-9), np.random.default_rng(0)) == box


@pytest.mark.parametrize("height, width", [(120, 160), (90, 61), (20, 300)])
def test_crops_are_pillows(height, width):
    image, rng = picture(height, width), np.random.default_rng(3)
    large, small, _ = MultiCrop(64, 32, 6)(image, np.random.default_rng(3))
    for crop, size, scale in [(x, 64, (0.4, 1)) for x in large] + [(x, 32, (0.05, 0.4)) for x in small]:
        top, left, h, w = crop_box(height, width, scale, rng)
        expected = to_pil(image).crop((left, top, left + w, top + h)).resize((size, size), Image.BICUBIC)
        gap = (crop.int() - from_pil(expected).int()).abs()
        assert gap.float().mean() < 0.3 and gap.max() <= 2


@pytest.mark.parametrize("local_crops", [0, 3])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 50), (40, 30)])
def test_crops_have_their_sizes_and_one_row_of_draws_each(height, width, local_crops):
    large, small, draws = MultiCrop(48, 16, local_crops)(picture(height, width), np.random.default_rng(0))
    assert large.shape == (2, 3, 48, 48) and small.shape == (local_crops, 3, 16, 16)
    assert large.dtype == small.dtype == torch.uint8
    assert draws.shape == (2 + local_crops, len(DRAWS)) and draws.dtype == torch.float32
    assert len({tuple(row) for row in draws.tolist()}) == len(draws)        # every view has its own


def test_one_generator_decides_everything():
    multicrop, image = MultiCrop(48, 16, 2), picture(60, 80)
    def flat(seed):
        return torch.cat([x.flatten().float() for x in multicrop(image, np.random.default_rng([0, seed]))])
    first, state = flat(5), torch.get_rng_state()
    assert not torch.equal(first, flat(6))
    np.random.seed(7), torch.manual_seed(7)
    assert torch.equal(first, flat(5))                              # and no hidden generator
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)                # nor one disturbed


def test_memory_layout_of_the_picture_changes_nothing():
    image = picture(60, 80)
    interleaved = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)      # what np.array(pil) gives
    assert not interleaved.is_contiguous()
    crops = [MultiCrop(48, 16, 4)(x, np.random.default_rng(1)) for x in (image, interleaved)]
    assert all(torch.equal(a, b) for a, b in zip(*crops, strict=True))


# ---- what colours them

def row(**draws):
    identity = dict.fromkeys(DRAWS, 0.0) | dict(brightness=1.0, contrast=1.0, saturation=1.0)
    return torch.tensor([(identity | draws)[name] for name in DRAWS])


def grey_levels(views):
    """Normalised views back to 0..255."""
    return (views * torch.tensor(vit.STD).view(3, 1, 1) + torch.tensor(vit.MEAN).view(3, 1, 1)) * 255


def recoloured(x, order=(0, 1, 2, 3), **draws):
    return grey_levels(recolour(x[None], row(**draws)[None], order))[0]


def pillow(image, draws, order=(0, 1, 2, 3)):
    """Oracle: the published pipeline with Pillow and torchvision's adjust_hue, rounding to uint8 after every op."""
    d = dict(zip(DRAWS, draws.tolist(), strict=True))
    jitter = (
        lambda im: ImageEnhance.Brightness(im).enhance(d["brightness"]),
        lambda im: ImageEnhance.Contrast(im).enhance(d["contrast"]),
        lambda im: ImageEnhance.Color(im).enhance(d["saturation"]),
        lambda im: TF.adjust_hue(im, d["hue"]) if d["hue"] else im,
    )
    image = ImageOps.mirror(image) if d["flip"] else image
    for k in order:
        image = jitter[k](image)
    image = ImageOps.grayscale(image).convert("RGB") if d["grey"] else image
    image = image.filter(ImageFilter.GaussianBlur(d["sigma"])) if d["sigma"] else image
    return ImageOps.solarize(image) if d["solarize"] else image


@pytest.mark.parametrize("draws, mean, most", [                     # measured distance x 1.5 or so
    (dict(flip=1), 1e-3, 1e-2),
    (dict(brightness=0.6), 0.6, 1.01), (dict(brightness=1.4), 0.6, 1.01),
    (dict(contrast=0.6), 0.7, 1.5), (dict(contrast=1.4), 0.7, 1.5),
    (dict(saturation=0.8), 0.6, 1.5), (dict(saturation=1.2), 0.6, 1.5),
    (dict(hue=-0.1), 1.0, 12), (dict(hue=0.03), 1.0, 12), (dict(hue=0.1), 1.0, 12),    # Pillow's HSV has 8 bits
    (dict(grey=1), 0.5, 0.51),
    (dict(sigma=0.1), 0.1, 0.5), (dict(sigma=0.7), 1.0, 4), (dict(sigma=2.0), 1.0, 9),  # Pillow blurs by three boxes
    (dict(solarize=1), 0.01, 1.01),
])
def test_each_operation_is_pillows(draws, mean, most):
    for s in range(3):
        x = picture(64, 64, s)
        gap = (recoloured(x, **draws) - from_pil(pillow(to_pil(x), row(**draws)))).abs()
        assert gap.mean() < mean and gap.max() < most


def test_contrast_turns_about_the_mean_grey_of_the_picture():
    x = torch.zeros(3, 8, 8, dtype=torch.uint8)
    x[0, :, :4], x[1, :, 4:] = 100, 200                             # half red, half green: 0.299 50 + 0.587 100
    pivot = 0.299 * 50 + 0.587 * 100
    expected = (pivot + 0.5 * (x.float() - pivot)).clamp(0, 255)
    torch.testing.assert_close(recoloured(x, contrast=0.5), expected, rtol=0, atol=1e-3)


def test_hue_is_colorsys():
    x = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    x[:, 0] = torch.tensor([[255, 0, 0, 255, 0, 255, 7, 7],         # pure colours, ties and greys
                            [0, 255, 0, 255, 255, 0, 7, 9],
                            [0, 0, 255, 0, 255, 255, 7, 9]])
    for turn in (-0.1, 0.037, 0.1, 0.5, 1 / 3):
        expected = torch.zeros(3, 8, 8)
        for i, j in itertools.product(range(8), range(8)):
            h, s, v = colorsys.rgb_to_hsv(*(x[:, i, j] / 255).tolist())
            expected[:, i, j] = 255 * torch.tensor(colorsys.hsv_to_rgb((h + turn) % 1, s, v))
        torch.testing.assert_close(recoloured(x, hue=turn), expected, rtol=0, atol=1e-2)


def test_hue_full_circle_and_grey_pixels():
    x = picture(16, 16)
    for turn in (1.0, -1.0):
        torch.testing.assert_close(recoloured(x, hue=turn), x.float(), rtol=0, atol=1e-3)
    grey = x[:1].expand(3, -1, -1)
    torch.testing.assert_close(recoloured(grey, hue=0.1), grey.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [1, 5, 40])
@pytest.mark.parametrize("sigma", [0.1, 0.6, 1.1, 2.0])
def test_blur_is_a_gaussian_with_repeated_edges(size, sigma):
    x = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    wide = F.pad(x[None].float(), [50] * 4, mode="replicate")
    expected = TF.gaussian_blur(wide, 81, sigma)[0, :, 50:-50, 50:-50]
    # ours cuts the repeated edge after 6 pixels: at sigma 2 the rest is 0.1 of a grey level
    torch.testing.assert_close(recoloured(x, sigma=sigma), expected, rtol=0, atol=0.1 if sigma == 2 else 2e-3)


@pytest.mark.parametrize("size", [1, 5, 40])
def test_blur_by_matrix_is_the_same_blur(size):
    x = torch.rand(7, 3, size, size) * 255
    sigma = torch.tensor([0, 0.1, 0.4, 0.8, 1.2, 1.6, 2]).view(-1, 1, 1, 1)
    torch.testing.assert_close(data.blur_by_matrix(x, sigma), data.blur(x, sigma), rtol=0, atol=0.1)


def test_gpus_way_is_the_cpus_way():
    """All crops through every operation, selected afterwards, against picked crops in pieces that fit the cache."""
    multicrop = MultiCrop(48, 24, 3)
    large, _, draws = zip(*(multicrop(picture(80, 100, i), np.random.default_rng([9, i])) for i in range(50)),
                          strict=True)
    large, draws = torch.cat(large), torch.cat([rows[:2] for rows in draws])
    assert large.numel() > data.IN_CACHE                            # several pieces
    x, y = (recolour(large, draws, (2, 0, 3, 1), batched) for batched in (False, True))
    # apart by rounding, but for a pixel at the edge of solarizing, which goes to either side of it
    assert ((x - y).abs() > 2e-3).float().mean() < 1e-4


def test_operations_follow_each_other_as_published():
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(3, 32, 16)
    blurred = recoloured(stripes, sigma=2.0, solarize=1)[:, 8:-8, 8:-8]
    assert (blurred - 127.5).abs().max() < 1                        # solarized before the blur it would be black
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).repeat(1, 8, 8)
    expected = from_pil(pillow(to_pil(red), row(hue=0.1, grey=1)))
    assert (recoloured(red, hue=0.1, grey=1) - expected).abs().max() < 5
    assert (recoloured(red, grey=1) - expected).abs().min() > 50    # greyed before the jitter it would have no hue


def test_identity_draws_only_normalise():
    x = torch.randint(0, 256, (5, 3, 24, 24), dtype=torch.uint8)
    for order in ORDERS:                                            # hue rounds: 2e-4 of a grey level
        torch.testing.assert_close(recolour(x, row().expand(5, -1), order), vit.normalize(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_jitter_follows_the_order_given(order):
    draws = dict(brightness=1.4, contrast=1.4, saturation=0.8, hue=0.1)
    x, gap = picture(64, 64) // 2 + 128, {}                         # bright: clipping makes the order visible
    for other in ORDERS:
        expected = from_pil(pillow(to_pil(x), row(**draws), other))
        gap[other] = (recoloured(x, order, **draws) - expected).abs().mean().item()
    assert gap.pop(order) < 0.7
    assert min(gap.values()) > 2


@pytest.mark.parametrize("order", ORDERS)
def test_views_are_pillows_pipeline_in_crop_order(order):
    multicrop, B = MultiCrop(48, 24, 4), 6
    crops = [multicrop(picture(80, 100, i), np.random.default_rng([9, i])) for i in range(B)]
    large, small, draws = (torch.stack(x) for x in zip(*crops, strict=True))
    views = multicrop.photometric(large, small, draws, order)
    assert [tuple(v.shape) for v in views] == [(B, 3, 48, 48)] * 2 + [(B, 3, 24, 24)] * 4
    for b in range(B):
        alone = multicrop.photometric(large[b:b + 1], small[b:b + 1], draws[b:b + 1], order)
        for v, crop in enumerate([*large[b], *small[b]]):
            torch.testing.assert_close(views[v][b], alone[v][0], rtol=0, atol=1e-5)
            expected = from_pil(pillow(to_pil(crop), draws[b, v], order))
            assert (grey_levels(views[v][b]) - expected).abs().mean() < 3


def test_no_local_crops():
    multicrop = MultiCrop(48, 24, 0)
    large, small, draws = multicrop(picture(60, 60), np.random.default_rng(0))
    views = multicrop.photometric(large[None], small[None], draws[None])
    assert len(views) == 2
    with_locals = MultiCrop(48, 24, 1).photometric(
        large[None], torch.zeros(1, 1, 3, 24, 24, dtype=torch.uint8), torch.cat([draws, row()[None]])[None])
    assert all(torch.equal(a, b) for a, b in zip(views, with_locals, strict=False))


# ---- how often

N = 4000


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_and_ranges(kind):
    rng, (blur_share, solarize_share) = np.random.default_rng(4), KINDS[kind]
    draws = dict(zip(DRAWS, np.stack([data.photometric_draws(kind, rng) for _ in range(N)]).T, strict=True))
    jitter = np.stack([draws["brightness"] != 1, draws["contrast"] != 1, draws["saturation"] != 1, draws["hue"] != 0])
    assert (jitter == jitter[0]).all()                              # all four or none
    events = dict(flip=(draws["flip"], 0.5), jitter=(jitter[0], 0.8), grey=(draws["grey"], 0.2),
                  blur=(draws["sigma"] > 0, blur_share), solarize=(draws["solarize"], solarize_share))
    for happened, p in events.values():
        assert set(np.unique(happened)) <= {0, 1}
        assert abs(happened.mean() - p) <= 4 * math.sqrt(p * (1 - p) / N)
    for (a, p), (b, q) in itertools.combinations(events.values(), 2):       # pairwise independent
        assert abs((a * b).mean() - p * q) <= 4 * math.sqrt(p * q * (1 - p * q) / N)
    for name, applied, low, high in (("brightness", jitter[0], 0.6, 1.4), ("contrast", jitter[0], 0.6, 1.4),
                                     ("saturation", jitter[0], 0.8, 1.2), ("hue", jitter[0], -0.1, 0.1),
                                     ("sigma", events["blur"][0], 0.1, 2.0)):
        u = (draws[name][applied].astype(float) - low) / (high - low)       # uniform on 0..1
        assert -1e-6 <= u.min() and u.max() <= 1 + 1e-6
        assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * len(u)) and abs(u.var() - 1 / 12) < 4 / math.sqrt(180 * len(u))


def test_crops_draw_as_their_kind():
    """global1 always blurs and never solarizes, global2 alone does, locals blur half the time."""
    multicrop, image, rng = MultiCrop(2, 2, 2), picture(4, 4), np.random.default_rng(5)
    draws = torch.stack([multicrop(image, rng)[2] for _ in range(400)])
    blur, solarize = ((draws[..., DRAWS.index(name)] > 0).double().mean(0) for name in ("sigma", "solarize"))
    for got, expected in ((blur, (1, 0.1, 0.5, 0.5)), (solarize, (0, 0.2, 0, 0))):
        for share, p in zip(got.tolist(), expected, strict=True):
            assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / 400)


# ---- folders of images

@pytest.fixture
def tree(tmp_path):
    """A folder as people have them; {path: (height, width, mean colour)} of the readable pictures, and the others."""
    root = tmp_path / "pictures"
    (root / "train/cats/deep er").mkdir(parents=True)
    (root / "val").mkdir()
    readable, broken = {}, []

    def draw(name, mode, colour, expected, size=(40, 30), **options):
        path = root / "train" / name
        Image.new(mode, size, colour).save(path, **options)
        readable[str(path)] = (size[1], size[0], expected)

    draw("top.png", "RGB", (200, 10, 90), (200, 10, 90))
    draw("cats/a.JPG", "RGB", (128, 128, 128), (128, 128, 128))
    draw("cats/deep er/b.jpeg", "L", 77, (77, 77, 77))
    draw("cats/cmyk.jpg", "CMYK", (0, 255, 0, 0), (255, 0, 255))
    draw("cats/really_png.jpg", "RGB", (1, 2, 3), (1, 2, 3), format="PNG")
    draw("cats/deep.png", "I;16", 40_000, (156, 156, 156))
    draw("cats/alpha.png", "RGBA", (9, 8, 7, 30), (9, 8, 7))
    draw("cats/palette.gif", "P", 0, (0, 0, 0))
    draw("cats/dot.png", "RGB", (5, 6, 7), (5, 6, 7), size=(1, 1))
    draw("cats/line.bmp", "RGB", (5, 6, 7), (5, 6, 7), size=(90, 1))
    Image.effect_noise((64, 64), 90).save(root / "train/cats/cut.jpg")
    whole = (root / "train/cats/cut.jpg").read_bytes()
    (root / "train/cats/cut.jpg").write_bytes(whole[:len(whole) // 2])
    (root / "train/text.jpg").write_text("<html>404 Not Found</html>")
    (root / "train/empty.png").touch()
    broken = [str(root / "train" / name) for name in ("cats/cut.jpg", "text.jpg", "empty.png")]
    (root / "train/labels.txt").write_text("no picture")
    Image.new("RGB", (8, 8)).save(root / "val/other.png")
    return root, readable, broken


def test_images_are_found_in_train_at_any_depth(tree):
    root, readable, broken = tree
    assert data.list_images(str(root)) == (sorted([*readable, *broken]), {".txt": 1})


def test_flat_folder_without_train(tmp_path):
    for name in ("b.png", "a.jpeg", "c.txt", "d"):
        (tmp_path / name).touch()
    assert data.list_images(str(tmp_path)) == ([str(tmp_path / "a.jpeg"), str(tmp_path / "b.png")],
                                               {".txt": 1, "without suffix": 1})


def test_hidden_files_and_folders_are_no_pictures(tmp_path):
    for name in (".cache/set/a/x.png", ".cache/set/a/._x.png", ".cache/set/.ipynb_checkpoints/x-checkpoint.png",
                 ".cache/set/.Trash/a/y.png", ".cache/set/.hidden.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    root = tmp_path / ".cache/set"                                  # what lies above the folder does not matter
    assert data.list_images(str(root)) == ([str(root / "a/x.png")], {})


def test_loops_of_links_end_and_links_count(tmp_path):
    (tmp_path / "set/a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for path in ("set/a/x.png", "elsewhere/y.png"):
        (tmp_path / path).touch()
    (tmp_path / "set/a/loop").symlink_to(tmp_path / "set")
    (tmp_path / "set/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/z.png").symlink_to(tmp_path / "set/a/x.png")
    found = [os.path.relpath(path, tmp_path / "set") for path in data.list_images(str(tmp_path / "set"))[0]]
    assert found == ["a/x.png", "again/y.png", "z.png"]             # elsewhere once, under the first of its names


def test_readable_files_are_read_whatever_they_are_called(tree):
    root, readable, _ = tree
    pictures = data.Pictures(sorted(readable))
    assert len(pictures) == len(readable)
    for i in range(len(pictures)):
        image = pictures[i]
        height, width, colour = readable[pictures.name(i)]
        assert image.dtype == torch.uint8 and image.shape == (3, height, width)
        assert (image.float().mean((1, 2)) - torch.tensor(colour)).abs().max() <= 2, pictures.name(i)   # JPEG rounds


def test_every_readable_file_can_be_cropped(tree):
    root, readable, _ = tree
    crops = data.Crops(data.Pictures(sorted(readable)), MultiCrop(32, 16, 2), 0)
    for i in range(len(readable)):
        large, small, draws, failed = crops[0, i]
        assert large.shape == (2, 3, 32, 32) and small.shape == (2, 3, 16, 16) and not failed


def test_unreadable_file_gives_way_to_another_by_seed_epoch_and_index(tree):
    root, readable, broken = tree
    paths, _ = data.list_images(str(root))

    def item(seed, epoch, path):
        return data.Crops(data.Pictures(paths), MultiCrop(32, 16, 2), seed)[epoch, paths.index(path)]

    colours = torch.tensor([colour for *_, colour in readable.values()]).float()
    seen = set()
    for epoch in range(8):
        for path in broken:
            large, small, draws, failed = item(0, epoch, path)
            assert failed[0] == path and set(failed) <= set(broken)
            again = item(0, epoch, path)
            assert all(torch.equal(x, y) for x, y in zip((large, small, draws), again[:3], strict=True))
            assert again[3] == failed
            distance = (large.float().mean((0, 2, 3)) - colours).abs().amax(1)      # flat pictures: known by colour
            assert distance.min() <= 2
            seen.add((path, int(distance.argmin())))
    for path in broken:
        assert len({which for p, which in seen if p == path}) > 1   # another epoch, another replacement


def test_folder_of_nothing_readable_does_not_hang(tmp_path):
    (tmp_path / "a.png").touch()
    large, *_, failed = data.Crops(data.Pictures([str(tmp_path / "a.png")]), MultiCrop(32, 16, 0), 0)[0, 0]
    assert len(failed) == 100 and (large == 128).all()


def test_each_unreadable_file_is_reported_once():
    reads, log = data.Reads(), []
    for _ in range(3):
        reads.add(500, ["a.jpg", "b.jpg"])
        reads.report(log.append, epoch_over=True)
    assert len(log) == 2 and "a.jpg" in log[0] and "b.jpg" in log[1]
    assert (reads.total, reads.failed) == (1506, 6)


@pytest.mark.parametrize("good, bad, epoch_over, stops", [
    (900, 99, False, False),                                        # 999 reads: too early to judge
    (900, 100, False, True),
    (990, 10, True, False),                                         # 1 % is not more than 1 %
    (989, 11, False, True),
    (30, 4, False, False),
    (30, 4, True, True),                                            # small folders are judged after an epoch
    (30, 3, True, False),                                           # and a few files of theirs are no alarm
    (280, 3, True, False),
    (280, 10, True, False),
    (280, 11, True, True),
])
def test_run_stops_when_more_than_one_percent_of_reads_fail(good, bad, epoch_over, stops):
    reads = data.Reads()
    reads.add(good, [f"{i:03d}.jpg" for i in range(bad)])
    if stops:
        with pytest.raises(ValueError, match=f"000.jpg.*{bad} unreadable files?; {bad} of {good + bad} reads.*1 %"):
            reads.report(print, epoch_over)
    else:
        assert reads.report(print, epoch_over) == bad


# ---- the order of batches

def order(n, batch_size, rank=0, world=1, accum=1, start=0, epochs=3, seed=0):
    args = argparse.Namespace(batch_size=batch_size, accum=accum, epochs=epochs, seed=seed)
    return list(data.Batches(n, args, rank, world, start))


@pytest.mark.parametrize("world, accum", [(1, 2), (2, 1), (2, 3), (6, 1)])
def test_parts_of_a_batch_join_to_the_batch(world, accum):
    whole = order(45, 12)
    parts = [order(45, 12, rank, world, accum) for rank in range(world)]
    for step, batch in enumerate(whole):
        joined = [key for part in parts for micro in part[step * accum:(step + 1) * accum] for key in micro]
        assert joined == batch
    assert all(len(part) == len(whole) * accum for part in parts)


def test_an_epoch_is_a_permutation_and_the_next_one_another():
    batches = order(45, 12)
    assert len(batches) == 9                                        # three per epoch; nine pictures sit out
    epochs = [sum(batches[e * 3:e * 3 + 3], []) for e in range(3)]
    for e, keys in enumerate(epochs):
        assert {epoch for epoch, _ in keys} == {e}
        assert len({i for _, i in keys}) == 36 and {i for _, i in keys} <= set(range(45))
    assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]
    assert {i for _, i in epochs[0]} != {i for _, i in epochs[1]}   # and others sit out
    assert order(45, 12, seed=1) != batches


@pytest.mark.parametrize("start", [1, 3, 4, 9])
def test_order_goes_on_from_any_step(start):
    assert order(45, 12, start=start) == order(45, 12)[start:]
    assert order(45, 12, 1, 2, 2, start=start) == order(45, 12, 1, 2, 2)[2 * start:]


# ---- photographs larger than their crops need

def photograph(path, width, height, **options):
    to_pil(picture(height, width)).save(path, **options)
    return data.Pictures([str(path)])


def whole(pictures, multicrop, key, seed=0):
    """What `Crops` gives of picture 0, cut from all of its pixels."""
    return multicrop(from_pil(vit.read_image(pictures.name(0))), np.random.default_rng((data.CROPS, seed, *key)))


@pytest.mark.parametrize("width, height, sizes", [(1600, 1200, (64, 32, 4)), (1203, 1597, (64, 32, 2)),
                                                  (1600, 1200, (224, 96, 2))])
def test_large_jpegs_are_decoded_smaller_and_their_crops_stay_what_they_are(tmp_path, width, height, sizes):
    pictures, multicrop = photograph(tmp_path / "a.jpg", width, height, quality=92), MultiCrop(*sizes)
    gaps, smaller = [], 0
    for epoch in range(8):
        *crops, draws, failed = data.Crops(pictures, multicrop, 0)[epoch, 0]
        *expected, same = whole(pictures, multicrop, (epoch, 0))
        assert torch.equal(draws, same) and not failed
        gap = [(a.float() - b.float()).abs().mean().item() for a, b in zip(crops, expected, strict=True)]
        smaller += gap[0] > 0
        gaps.append(gap)
    assert smaller and (np.mean(gaps, 0) < 2).all() and np.max(gaps) < 3


@pytest.mark.parametrize("name, width, height, sizes", [
    ("a.jpg", 500, 375, (224, 96, 8)), ("a.jpg", 447, 900, (224, 96, 1)), ("a.png", 1200, 900, (64, 32, 2))])
def test_small_pictures_and_other_formats_keep_every_bit(tmp_path, name, width, height, sizes):
    pictures, multicrop = photograph(tmp_path / name, width, height), MultiCrop(*sizes)
    for epoch in range(6):
        crops = data.Crops(pictures, multicrop, 3)[epoch, 0][:3]
        assert all(torch.equal(a, b) for a, b in zip(crops, whole(pictures, multicrop, (epoch, 0), 3), strict=True))


def test_a_picture_is_decoded_as_small_as_its_smallest_crop_allows():
    """By the boxes themselves, drawn once more: twice smaller, one of them would be enlarged."""
    seen = set()
    for s in range(300):
        height, width = (int(x) for x in np.random.default_rng(s).integers(60, 2000, 2))
        multicrop, rng = MultiCrop(64, 16, 3), np.random.default_rng(s)
        n, room = multicrop.divisor(height, width, np.random.default_rng(s)), []
        for size, scale in [(64, (0.4, 1))] * 2 + [(16, (0.05, 0.4))] * 3:
            room.append(min(crop_box(height, width, scale, rng)[2:]) / size)
        assert n == 1 or n <= min(room)
        assert n == 8 or 2 * n > min(room)
        seen.add(n)
    assert seen == {1, 2, 4, 8}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_a_jpeg_of_any_mode_comes_smaller(tmp_path, mode, n):
    to_pil(picture(803, 1201)).convert(mode).save(tmp_path / "a.jpg")
    pictures = data.Pictures([str(tmp_path / "a.jpg")])
    image, size = pictures.read(0, lambda height, width: n if (height, width) == (803, 1201) else 0)
    assert image.shape == (3, -(-803 // n), -(-1201 // n)) and size == (803, 1201)
    expected = F.interpolate(pictures[0].float()[None], image.shape[1:], mode="area")[0]
    assert (image.float() - expected).abs().mean() < 3


def test_a_broken_large_jpeg_gives_way_too(tmp_path):
    photograph(tmp_path / "a.jpg", 800, 600)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:9000])
    paths, _ = data.list_images(str(tmp_path))
    crops = data.Crops(data.Pictures(paths), MultiCrop(64, 32, 1), 0)
    *replaced, failed = crops[0, 1]
    assert set(failed) == {paths[1]} and replaced[0].shape == (2, 3, 64, 64)
    boxes = MultiCrop(64, 32, 1)(from_pil(vit.read_image(paths[0])), np.random.default_rng((data.CROPS, 0, 0, 1)))
    assert (replaced[0].float() - boxes[0].float()).abs().mean() < 2        # cut as item 1, from picture 0
