import dataclasses
import hashlib
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint as disk
import pib
import vit
from pib import overlap, point_in_box, through_eval_transform

CONFIG = vit.ViTConfig(image_size=32, patch_size=8, dim=24, depth=3, heads=2, attn="entmax15", registers=2,
                       specialize=True)
KEYS = {"probe", "data", "root", "weights", "weights_sha256", "which", "run_seed", "recipe", "config", "epochs", "seed",
        "metrics", "protocol"}


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pib, "SCENES", dict(train=12, val=8))
    pib.crowds.cache_clear()


def save(path, seed=7, epoch=3):
    """A checkpoint with the keys that a probe reads; norms and registers are away from their initial values."""
    torch.manual_seed(seed)
    model = vit.VisionTransformer(CONFIG).requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    state = model.state_dict()
    torch.save(dict(config=dataclasses.asdict(CONFIG), teacher=state, student=state, epoch=epoch), path)
    return str(path)


@pytest.fixture
def checkpoint(tmp_path):
    return save(tmp_path / "tiny.pt")


def voc(path, size, *boxes):
    path.parent.mkdir(parents=True, exist_ok=True)
    names = "xmin", "ymin", "xmax", "ymax"
    corners = ["".join(f"<{name}>{v}</{name}>" for name, v in zip(names, box, strict=True)) for box in boxes]
    objects = "".join(f"<object><name>n</name><bndbox>{box}</bndbox></object>" for box in corners)
    path.write_text(f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{objects}</annotation>")


def picture(path, size, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Six pictures at different depths: 0 and 1 are kept by default, then two objects, none, a large box, no XML."""
    root, boxes = tmp_path / "val", tmp_path / "xml"
    for i, size in enumerate([(60, 40), (40, 70), (50, 50), (50, 50), (50, 50), (50, 50)]):
        picture(root / f"n{i % 2}" / f"im{i}.png", size, "L" if i == 1 else "RGB")
    voc(boxes / "im0.xml", (60, 40), (20, 10, 35, 22))
    voc(boxes / "deep/im1.xml", (40, 70), (0, 0, 10, 10))           # above the centre crop: missed
    voc(boxes / "im2.xml", (50, 50), (5, 5, 15, 15), (30, 30, 45, 45))
    voc(boxes / "im3.xml", (50, 50))
    voc(boxes / "im4.xml", (50, 50), (10, 10, 35, 35))              # 25 %, which is not below
    voc(boxes / "stray.xml", (50, 50), (1, 1, 2, 2))
    return "--data", "folder", "--root", str(root), "--boxes", str(boxes), "--workers", "0"


def run(capsys, *argv):
    pib.main([*map(str, argv)])
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1]), lines


def exits(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        pib.main([*map(str, argv)])
    code = stop.value.code
    return (1, code) if isinstance(code, str) else (code, capsys.readouterr().err.splitlines()[-1])


# ---- boxes ----------------------------------------------------------------------------------------------------------

def test_worked_example():
    """A 500 x 375 picture and the box (100, 80, 250, 200) at 224: columns 0 to 7, rows 2 to 7."""
    box = through_eval_transform((100, 80, 250, 200), 500, 375, 224)
    assert box == pytest.approx((10.27, 38.61, 112.67, 120.53), abs=0.005)
    expected = torch.zeros(14, 14, dtype=torch.bool)
    expected[2:8, 0:8] = True
    assert torch.equal(overlap([box], 14, 16), expected) and expected.sum() == 48


def overlap_by_hand(box, width, height, size, patch):
    """Every patch against the box in exact fractions: do two half-open rectangles share area?"""
    short = round(size * 256 / 224)
    scale = Fraction(short, min(width, height))
    offset = []
    for side in (width, height):
        resized = short * side // min(width, height)
        offset.append(round(Fraction(resized - size, 2)))
    x0, x1 = (scale * Fraction(v) - offset[0] for v in (box[0], box[2]))
    y0, y1 = (scale * Fraction(v) - offset[1] for v in (box[1], box[3]))
    n = size // patch

    def shares(low, high, i):
        return min(high, (i + 1) * patch) > max(low, i * patch)

    return torch.tensor([[shares(x0, x1, c) and shares(y0, y1, r) for c in range(n)] for r in range(n)])


@pytest.mark.parametrize("width, height", [(500, 375), (375, 500), (1600, 300), (90, 700), (224, 224), (256, 256)])
def test_boxes_match_exact_arithmetic(width, height):
    rng, seen = np.random.default_rng(width), 0
    for _ in range(60):
        x, y = (np.sort(rng.choice(side + 1, 2, replace=False)) for side in (width, height))
        if rng.random() < 0.3:                                      # tiny
            x, y = [x[0], x[0] + 1], [y[0], y[0] + 1]
        box = [int(x[0]), int(y[0]), int(x[1]), int(y[1])]
        for size, patch in ((224, 16), (64, 8)):
            expected = overlap_by_hand(box, width, height, size, patch)
            got = overlap([through_eval_transform(box, width, height, size)], size // patch, patch)
            assert torch.equal(got, expected), (box, size)
            seen += bool(expected.any())
    assert seen > 20


def test_boxes_lie_where_the_eval_transform_puts_them():
    """A white rectangle through the real transform; Resize rounds the long side, so edges may be 1 pixel off."""
    for width, height, box in [(500, 375, (120, 90, 260, 200)), (300, 640, (30, 220, 200, 400)),
                               (1000, 400, (420, 30, 600, 300))]:
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[box[1]:box[3], box[0]:box[2]] = 255
        white = vit.eval_transform(224)(Image.fromarray(pixels))[0] > 127
        rows, columns = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
        x0, y0, x1, y1 = through_eval_transform(box, width, height, 224)
        seen = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        assert np.abs(np.array(seen) - np.clip((x0, y0, x1, y1), 0, 224)).max() <= 1


def test_edges_are_half_open_and_boxes_outside_hit_nothing():
    def cells(*box):
        return overlap([box], 4, 8).nonzero().tolist()

    assert cells(8, 8, 16, 16) == [[1, 1]]                          # ends where the next patch begins
    assert cells(7.5, 8, 16.5, 16) == [[1, 0], [1, 1], [1, 2]]
    assert cells(3, 3, 3.1, 3.1) == [[0, 0]]
    for outside in [(-9, 0, 0, 32), (32, 0, 40, 32), (0, -5, 32, 0), (0, 32, 32, 99), (-20, -20, -10, -10)]:
        assert cells(*outside) == []
    assert len(cells(-100, -100, 100, 100)) == 16
    two = overlap([(0, 0, 1, 1), (31, 31, 32, 32)], 4, 8)
    assert two.nonzero().tolist() == [[0, 0], [3, 3]]


# ---- the measure ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def some_boxes():
    rng = np.random.default_rng(4)
    maps = []
    for _ in range(50):
        x0, y0 = rng.integers(0, 100, 2)
        maps.append(overlap([(x0, y0, x0 + rng.integers(5, 80), y0 + rng.integers(5, 80))], 8, 16))
    return torch.stack(maps)


def test_a_perfect_map_gives_a_hundred_percent(some_boxes):
    assert point_in_box(some_boxes.float(), some_boxes).all()
    assert not point_in_box(-some_boxes.float(), some_boxes).any()


def test_random_maps_give_chance(some_boxes):
    maps = torch.rand(200, 50, 8, 8, generator=torch.Generator().manual_seed(0))
    draws = torch.stack([point_in_box(scores, some_boxes).double().mean() for scores in maps])
    chance = some_boxes.double().mean()
    assert abs(draws.mean() - chance) < 2 * draws.std() / math.sqrt(200)


def test_a_corner_map_gives_what_the_boxes_say(some_boxes):
    corner = torch.zeros(50, 8, 8)
    corner[:, 0, 0] = 1
    assert torch.equal(point_in_box(corner, some_boxes), some_boxes[:, 0, 0])
    assert 0 < some_boxes[:, 0, 0].sum() < 50


def test_the_first_of_equals_counts(some_boxes):
    assert torch.equal(point_in_box(torch.zeros(50, 8, 8), some_boxes), some_boxes[:, 0, 0])


@pytest.mark.parametrize("side, central", [(5, [(2, 2)]), (4, [(1, 1), (1, 2), (2, 1), (2, 2)]), (1, [(0, 0)])])
def test_centre_is_the_mean_of_the_central_patches(side, central):
    inside = torch.rand(30, side, side, generator=torch.Generator().manual_seed(1)) < 0.5
    assert pib.centre(inside).tolist() == [sum(bool(one[at]) for at in central) / len(central) for one in inside]


@pytest.mark.parametrize("raw", [False, True])
def test_every_sign_equals_plain_loops(checkpoint, folder, raw):
    """One image and block at a time, from the model's public features and attention."""
    args = pib.parse_args(["--weights", checkpoint, *folder, "--max-area", "1", "--batch-size", "2"] + ["--raw"] * raw)
    model = disk.load_backbone(checkpoint)
    images = pib.PicturesWithBoxes(args, CONFIG.image_size, CONFIG.patch_size)
    assert len(images) == 3
    means, counts = pib.measure(model, images, args, torch.device("cpu"))
    for b in range(3):
        seen = {name: [] for name in means}
        for image, inside in images:
            x = vit.normalize(image)[None]
            f, before = model.features(x, [b], norm=not raw)[0], model.features(x, [b], norm=False)[0]
            cls, cosines = f.cls[0], torch.zeros(4, 4)
            for r in range(4):
                for c in range(4):
                    patch = f.patches[0, r, c]
                    cosines[r, c] = (patch @ cls) / (patch.norm() * cls.norm())
            r, c = divmod(int(cosines.argmax()), 4)
            seen["pib"].append(float(inside[r, c]))
            seen["cos_inside"].append(cosines[inside].mean().item())    # nan for the box that the crop misses
            seen["cos_outside"].append(cosines[~inside].mean().item())
            lengths = [patch.norm().item() for patch in before.patches[0].reshape(16, -1)]
            median = sorted(lengths)[7]                             # the lower one, as torch's
            seen["high_norm"].append(sum(length > 5 * median for length in lengths) / 16)
            weights = model.attention(x, b)[0]                      # (H, T, T), T = 1 + 2 + 16
            seen["to_cls"].append(weights[:, 3:, 0].mean().item())
            seen["to_registers"].append((weights[:, 3:, 1] + weights[:, 3:, 2]).mean().item())
            seen["support"].append([np.count_nonzero(head.numpy()) / 19 for head in weights])
        for name, values in seen.items():
            expected = np.nanmean(np.array(values), 0)
            np.testing.assert_allclose(means[name][b].numpy(), expected, rtol=1e-4, atol=1e-6, err_msg=f"{name} {b}")
    assert 3 < means["support"].min() < 19                          # sparse, so that counting zeros is tested
    assert counts["n"] == 3 and counts["missed"] == 1 and counts["tokens"] == 19


@pytest.mark.parametrize("raw", [False, True])
def test_high_norm_patches_are_counted_before_the_norm(raw):
    model = vit.VisionTransformer(CONFIG)
    x = torch.ones(2, 19, 24)
    x[0, 5] *= 5.1; x[0, 7] *= 4.9; x[0, 0] *= 9; x[0, 1] *= 9     # [CLS] and registers are no patches
    inside = torch.zeros(2, 4, 4, dtype=torch.bool)
    signs = pib.block_signs(torch.rand(2, 2, 19, 19), x, model, inside, raw)
    assert signs["high_norm"].tolist() == [1 / 16, 0]


# ---- leaked meaning -------------------------------------------------------------------------------------------------

def test_card_maps_equal_loops_over_pixels():
    seen = torch.zeros(3)
    for scene in pib.Shapes("val", 128, 4, cards=5):
        mask, h = scene["mask"].numpy(), 16
        own, near, present = pib.card_maps(scene["mask"], 8).unflatten(1, (h, h))
        for r in range(h):
            for c in range(h):
                pixels = mask[8 * r:8 * r + 8, 8 * c:8 * c + 8]
                window = mask[max(0, 8 * (r - 2)):8 * (r + 3), max(0, 8 * (c - 2)):8 * (c + 3)]
                assert own[r, c].tolist() == [(pixels == k + 1).sum() >= 32 for k in range(10)]
                assert near[r, c].tolist() == [k + 1 in window for k in range(10)]
                assert present[r, c].tolist() == [k + 1 in mask for k in range(10)]
        asked = pib.questions(*(maps.flatten(0, 1) for maps in (own, near, present)))
        seen += torch.tensor([where.sum() for where, *_ in asked.values()])
    assert (seen > 50).all()


def test_half_a_patch_is_enough_and_background_is_no_class():
    mask = torch.zeros(4, 4, dtype=torch.uint8)
    mask[0, :2], mask[2:, :2], mask[2, 2:] = 4, 10, 1
    mask[2, 0] = 1
    own, near, present = pib.card_maps(mask, 2)
    assert [row.nonzero()[:, 0].tolist() for row in own] == [[3], [], [9], [0]]
    assert torch.equal(near, present) and present[0].nonzero()[:, 0].tolist() == [0, 3, 9]


def test_who_is_asked_about_what():
    """Patches of one scene in three classes: two of a card, one of its rim, one of the background near, one far."""
    own = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]).bool()
    near = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    present = torch.tensor([[1, 1, 0]] * 5).bool()
    asked = {kind: [values.int().tolist() for values in rest] for kind, rest in
             pib.questions(own, near, present).items()}
    assert asked == dict(own=[[1, 1, 0, 0, 0], [[1], [1]], [[1, 0, 0], [0, 1, 0]]],
                         other=[[1, 1, 0, 0, 0], [[0, 1, 1], [0, 0, 1]], [[1, 1, 0], [1, 1, 0]]],
                         background=[[0, 0, 0, 0, 1], [[1]], [[1, 1, 0]]])


def test_compare_equals_a_loop_over_pairs():
    rng = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (40, 5), generator=rng).float()    # with many ties
    part, answers = (torch.rand(40, 5, generator=rng) < share for share in (0.8, 0.4))
    won = [1 if s[i] > s[j] else 0.5 if s[i] == s[j] else 0
           for s, p, a in zip(scores, part, answers, strict=True)
           for i in range(5) for j in range(5) if p[i] and p[j] and a[i] and not a[j]]
    lead, pairs = pib.compare(scores, part, answers).tolist()
    assert pairs == len(won) > 100 and won.count(0.5) > 20
    assert 0.5 + 0.5 * lead / pairs == pytest.approx(np.mean(won), abs=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_readout_equals_ridge_regression_of_stacked_standardised_features(shared):
    """By least squares on the features with sqrt(n ridge) I below them, which is the same."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(300, 6, generator=rng) @ torch.randn(6, 6, generator=rng) + 20 * torch.randn(6, generator=rng)
    x[:, 4] = 1.7                                                   # constant: tells nothing
    x[:, 5] *= 1e3
    part = torch.rand(300, 1 if shared else 4, generator=rng) < (2 if shared else 0.7)
    answers = torch.rand(300, 4, generator=rng) < torch.tensor([0.1, 0.3, 0.5, 0.0])
    answers[:, 2] |= x[:, 0] > x[:, 0].mean()
    readout = pib.Readout()
    ones = torch.cat([x, torch.ones(300, 1)], 1).double()
    for batch in torch.arange(300).split(70):
        readout.add(ones[batch], part[batch], answers[batch])
    got = readout.solve()
    x = x.double().numpy()
    for k in range(4):
        p = part.expand(300, 4)[:, k].numpy()
        z = (x[p] - x[p].mean(0)) / np.where(np.arange(6) == 4, 1, x[p].std(0))
        y = answers[:, k].double().numpy()[p]
        below = math.sqrt(p.sum() * pib.RIDGE) * np.eye(6)
        w = np.linalg.lstsq(np.vstack([z, below]), np.concatenate([y - y.mean(), np.zeros(6)]), rcond=None)[0]
        np.testing.assert_allclose((ones @ got[:, k]).numpy()[p], z @ w, atol=1e-9)
    assert got[:, 2].abs().max() > 0.01


def several_cards(scenes, rng):
    """Maps (3, M, C) of scenes of 14 x 14 patches: three cards of 2 x 2, whose classes and places are independent."""
    masks = torch.zeros(scenes, 14, 14, dtype=torch.uint8)
    for mask in masks:
        for label, row, column in torch.cat([torch.randint(1, 11, (3, 1), generator=rng),
                                             torch.randint(0, 13, (3, 2), generator=rng)], 1).tolist():
            mask[row:row + 2, column:column + 2] = label
    return torch.stack([pib.card_maps(mask, 1) for mask in masks], 1).flatten(1, 2)


@pytest.fixture(scope="module")
def crowd():
    rng = torch.Generator().manual_seed(0)
    return several_cards(2000, rng), several_cards(1000, rng)


# Over eight draws of so many scenes an AUC at chance, 50, had sds of at most 0.30, 0.78 and 0.08. Four of them:
CHANCE = dict(own=1.2, other=3.2, background=0.32)


@pytest.mark.parametrize("feature, expected", [
    (lambda own, near, present: own, dict(own=100, other=50, background=50)),
    (lambda own, near, present: present, dict(other=100, background=100)),
    (lambda own, near, present: present * ~near, dict(other=100, background=100)),
    (lambda own, near, present: 0 * own, dict(own=50, other=50, background=50)),
    # what one can see from a patch: which cards are near, and so, roughly, how many are not
    (lambda own, near, present: near, dict(other=50, background=50)),
    (lambda own, near, present: near.sum(1, keepdim=True), dict(other=50, background=50)),
])
def test_planted_meaning_is_read_and_nothing_else(crowd, feature, expected):
    batches, rng = [], torch.Generator().manual_seed(1)
    for maps in crowd:
        x = feature(*maps).float()
        batches.append([([torch.randn(x.shape, generator=rng), x + 0.01 * torch.randn(x.shape, generator=rng)], maps)])
    found = pib.read_classes(*batches)
    for kind, values in found.items():
        assert values[0] == pytest.approx(50, abs=CHANCE[kind]), kind          # a block of noise
        if kind in expected:
            assert values[1] == pytest.approx(expected[kind], abs=1e-9 if expected[kind] == 100 else CHANCE[kind]), kind


@pytest.mark.parametrize("raw", [False, True])
def test_leaked_meaning_is_of_the_features_of_scenes_at_twice_the_side(checkpoint, raw):
    """One scene at a time, from the model's public features; the batches of the measure are of five."""
    args = pib.parse_args(["--weights", checkpoint, "--batch-size", "5"] + ["--raw"] * raw)
    model = disk.load_backbone(checkpoint)
    got = pib.leaked_meaning(model, args, torch.device("cpu"))

    def by_hand(split, length):
        for scene in pib.Shapes(split, 64, length, cards=5):
            features = model.features(vit.normalize(scene["image"])[None], norm=not raw)
            yield [f.patches[0].flatten(0, 1) for f in features], pib.card_maps(scene["mask"], 8)

    expected = pib.read_classes(by_hand("train", 12), by_hand("val", 8))
    assert set(got) == {f"auc_{kind}" for kind in expected} == {"auc_own", "auc_other", "auc_background"}
    for kind, values in expected.items():
        assert len(values) == 3 and got[f"auc_{kind}"] == pytest.approx(values, abs=0.1)    # a pair in a thousand
        assert max(values) - min(values) > 0.5                      # blocks differ


# ---- end to end -----------------------------------------------------------------------------------------------------

def test_folder_end_to_end(tmp_path, checkpoint, folder, capsys):
    r, lines = run(capsys, "--weights", checkpoint, *folder)
    assert "6 pictures, 5 with boxes, kept 2; left out 2 with not exactly one object, 1 with a box of 25 %" in lines[0]
    assert json.loads((tmp_path / "tiny.pib.folder.json").read_text()) == r
    assert set(r) == KEYS and r["probe"] == "pib" and r["epochs"] == 3
    assert r["weights_sha256"] == hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()
    m = r["metrics"]
    assert m["n"] == 2 and m["missed"] == 1 and len(m["pib"]) == 3 and set(m["pib"]) <= {0.0, 50.0}
    covered = overlap_by_hand((20, 10, 35, 22), 60, 40, 32, 8).sum().item()
    assert m["chance"] == pytest.approx(100 * covered / 16 / 2)
    hit = overlap_by_hand((20, 10, 35, 22), 60, 40, 32, 8)[1:3, 1:3].double().mean().item()
    assert m["centre"] == pytest.approx(100 * hit / 2) and hit > 0            # the other box misses the crop
    assert f"chance {m['chance']:.1f} %" in lines[1] and f"centre {m['centre']:.1f} %" in lines[1]
    assert r["protocol"]["max_area"] == 0.25 and r["protocol"]["all_objects"] is False
    assert json.loads(json.dumps(r), parse_constant=pytest.fail) == r       # no NaN
    assert not [name for name in [*m, *r["protocol"]] if "auc" in name or "leak" in name] and "auc" not in lines[2]


def test_all_objects_and_max_area(checkpoint, folder, capsys):
    r, lines = run(capsys, "--weights", checkpoint, *folder, "--all-objects")
    assert r["metrics"]["n"] == 3 and "left out 1 with no object" in lines[0]
    assert run(capsys, "--weights", checkpoint, *folder, "--max-area", "0.26")[0]["metrics"]["n"] == 3
    r, lines = run(capsys, "--weights", checkpoint, *folder, "--max-area", "0.065")
    assert r["metrics"]["n"] == 1 and "2 with a box of 6.5 % or more" in lines[0]


def test_parts_of_an_object_are_no_objects(tmp_path, checkpoint, folder, capsys):
    """VOC's person layout: head and hands have boxes of their own inside the object."""
    one = run(capsys, "--weights", checkpoint, *folder, "--all-objects")[0]["metrics"]
    for name in "im0", "im2":
        path = tmp_path / f"xml/{name}.xml"
        part = "<part><bndbox><xmin>0</xmin><ymin>0</ymin><xmax>60</xmax><ymax>40</ymax></bndbox></part>"
        path.write_text(path.read_text().replace("</object>", f"{part * 3}</object>"))
    r, lines = run(capsys, "--weights", checkpoint, *folder)
    assert r["metrics"]["n"] == 2 and "left out 2 with not exactly one object, 1 with a box" in lines[0]
    assert run(capsys, "--weights", checkpoint, *folder, "--all-objects")[0]["metrics"] == one


def test_names_and_suffixes_as_people_have_them(tmp_path, checkpoint, folder, capsys):
    """.JPG and .XML count; what macOS and Jupyter leave does not, neither as a second file of the name."""
    expected = run(capsys, "--weights", checkpoint, *folder, "--out", "a.json")[0]["metrics"]
    (tmp_path / "val/n0/im0.png").rename(tmp_path / "val/n0/im0.PNG")
    (tmp_path / "xml/im0.xml").rename(tmp_path / "xml/im0.XML")
    for name in "val/n0/._im0.png", "xml/._im0.xml", "val/.hidden/im0.png", "xml/.ipynb_checkpoints/im0.xml":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no data")
    r, lines = run(capsys, "--weights", checkpoint, *folder, "--out", "b.json")
    assert r["metrics"] == expected and lines[0].startswith("folder: 6 pictures, 5 with boxes, kept 2")


# ---- whose result it is ---------------------------------------------------------------------------------------------

def test_a_finished_result_is_read_and_one_of_other_data_keeps_its_place(tmp_path, checkpoint, folder, capsys):
    first, _ = run(capsys, "--weights", checkpoint, *folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit.VisionTransformer, "embed", None)         # whatever would look at a picture, fails
        again, lines = run(capsys, "--weights", checkpoint, *folder)
        assert again == first and lines[-2] == "finished before: result read from tiny.pib.folder.json".replace(
            "tiny", checkpoint.removesuffix(".pt"))
        for name in "val", "xml":                                   # another place is no other data
            (tmp_path / name).rename(tmp_path / f"moved_{name}")
        moved = [word.replace(f"{tmp_path}/", f"{tmp_path}/moved_") for word in folder]
        assert run(capsys, "--weights", checkpoint, *moved)[0] == first
    voc(tmp_path / "moved_xml/im0.xml", (60, 40), (21, 11, 34, 21))     # as many bytes, boxes and pictures
    other, lines = run(capsys, "--weights", checkpoint, *moved)
    assert other["protocol"]["fingerprint"] != first["protocol"]["fingerprint"] and other["root"] == moved[3]
    assert {**other["protocol"], "fingerprint": 0} == {**first["protocol"], "fingerprint": 0}
    fresh = run(capsys, "--weights", checkpoint, *moved, "--out", "fresh.json")[0]
    assert fresh["metrics"] == other["metrics"]
    files = sorted(tmp_path.glob("tiny.pib.folder*.json"))
    assert len(files) == 2 and [json.loads(file.read_text()) for file in files] in ([first, other], [other, first])
    picture(tmp_path / "moved_val/n0/im0.png", (60, 40), "L")
    assert run(capsys, "--weights", checkpoint, *moved)[0]["protocol"]["fingerprint"] not in (
        first["protocol"]["fingerprint"], other["protocol"]["fingerprint"])


@pytest.mark.parametrize("flags", ["--all-objects", "--amp bf16", "--raw", "--max-area 0.2", "--which student"])
def test_every_flag_that_decides_the_number_tells_two_results_apart(checkpoint, folder, capsys, flags):
    first, _ = run(capsys, "--weights", checkpoint, *folder)
    other, lines = run(capsys, "--weights", checkpoint, *folder, *flags.split())
    assert "finished before" not in lines[-2]
    if flags != "--which student":
        assert other["protocol"] != first["protocol"]
    assert run(capsys, "--weights", checkpoint, *folder)[0] == first


def test_every_xml_counts_and_linked_folders_are_followed(tmp_path, checkpoint, folder, capsys):
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    (tmp_path / "val").mkdir()
    for path in (tmp_path / "elsewhere").iterdir():
        (tmp_path / "val" / path.name).symlink_to(path)
    (tmp_path / "val/loop").symlink_to(tmp_path / "val")
    seen, n = set(), None
    for path in sorted((tmp_path / "xml").rglob("*.xml")):
        result, _ = run(capsys, "--weights", checkpoint, *folder)
        n = n or result["metrics"]["n"]
        seen.add(result["protocol"]["fingerprint"])
        path.write_text(path.read_text() + "\n")                    # the same boxes, other bytes
    seen.add(run(capsys, "--weights", checkpoint, *folder)[0]["protocol"]["fingerprint"])
    assert len(seen) == len(list((tmp_path / "xml").rglob("*.xml"))) and n > 1       # one of them has no picture


def test_heads_of_a_foreign_file(tmp_path, folder, capsys):
    torch.manual_seed(0)
    model = vit.VisionTransformer(vit.ViTConfig(image_size=32, patch_size=8, dim=64, depth=2, heads=4))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    torch.save(dict(config=dataclasses.asdict(model.config), teacher=model.state_dict()), tmp_path / "ours.pt")
    ours = run(capsys, "--weights", tmp_path / "ours.pt", *folder)[0]
    bare = run(capsys, "--weights", tmp_path / "bare.pt", "--heads", 4, *folder)[0]
    assert bare["config"] == ours["config"] and bare["metrics"] == ours["metrics"]


def test_a_picture_of_another_size_than_its_xml_is_left_out(tmp_path, checkpoint, folder, capsys):
    picture(tmp_path / "val/n0/im0.png", (61, 40))
    r, lines = run(capsys, "--weights", checkpoint, *folder)
    assert r["metrics"]["n"] == 1 and "1 of another size than their XML states" in lines[0]
    assert r["metrics"]["cos_inside"] == [None] * 3                 # the one that is left misses the crop


def test_shapes_run_folder_and_random(tmp_path, capsys, monkeypatch):
    drawn = []

    def few(split, size, length, real=pib.Shapes, **cards):
        drawn.append((split, size, length))
        return real(split, size, 40, **cards)

    monkeypatch.setattr(pib, "Shapes", few)
    (tmp_path / "run").mkdir()
    for epoch in (0, 2):
        save(tmp_path / f"run/checkpoint_{epoch:04d}.pt", epoch, epoch)
    last, lines = run(capsys, "--weights", tmp_path / "run")
    results = [json.loads(line) for line in lines if line.startswith("{")]
    assert [r["epochs"] for r in results] == [0, 2] and results[1] == last
    assert drawn == [("val", 32, 1000), ("train", 64, 12), ("val", 64, 8)]      # once for all checkpoints
    assert last["protocol"]["leak"] == dict(cards=5, train=12, val=8, size=64, window=5, ridge=1e-3,
                                            score="AUC within patches")
    header, *blocks = lines[-5:-1]
    assert "auc_own %  auc_other %  auc_background %" in header and "AUC by chance 50 %" in lines[-6]
    for b, row in enumerate(blocks):
        expected = [last["metrics"][f"auc_{kind}"][b] for kind in ("own", "other", "background")]
        assert row.split()[0] == str(b) and row.split()[7:10] == [f"{value:.1f}" for value in expected]
    assert (tmp_path / "run/checkpoint_0002.pib.shapes.json").exists()
    kept = [s for s in pib.Shapes("val", 32, 40)
            if (s["box"][2] - s["box"][0]) * (s["box"][3] - s["box"][1]) < 256]
    assert last["metrics"]["n"] == len(kept) and 10 < len(kept) < 40
    chance = np.mean([overlap_by_inclusion(s["box"].tolist()) for s in kept])
    assert last["metrics"]["chance"] == pytest.approx(100 * chance / 16)
    r, _ = run(capsys, "--weights", "random", "--like", tmp_path / "run/checkpoint_0000.pt", "--seed", 3)
    assert r["weights"] == "random" and r["seed"] == 3
    assert (tmp_path / "runs/random/pib.shapes.entmax15_r2_spec.s3.json").exists()


def test_a_question_that_no_patch_is_asked_has_no_answer(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(pib, "WINDOW", 15)                          # the whole of 8 x 8 patches is near
    m = run(capsys, "--weights", checkpoint)[0]["metrics"]
    assert m["auc_background"] == m["auc_other"] == [None] * 3 and None not in m["auc_own"]


def overlap_by_inclusion(box):
    """Number of 8-pixel patches of 32 x 32 that hold a pixel of a box with whole-numbered corners."""
    pixels = np.zeros((32, 32), bool)
    x0, y0, x1, y1 = map(int, box)
    pixels[y0:y1, x0:x1] = True
    return pixels.reshape(4, 8, 4, 8).any((1, 3)).sum()


def test_workers_and_batches_change_nothing(checkpoint, folder, capsys):
    one = run(capsys, "--weights", checkpoint, *folder, "--max-area", "1", "--batch-size", "1")[0]
    two = run(capsys, "--weights", checkpoint, *folder, "--max-area", "1", "--workers", "1")[0]
    for name, values in one["metrics"].items():
        np.testing.assert_allclose(two["metrics"][name], values, rtol=1e-5, atol=1e-7)


# ---- mistakes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    ("--weights random --root pictures", "--data shapes takes no --root"),
    ("--weights random --boxes xml", "--data shapes takes no --boxes"),
    ("--weights random --max-area 1.5", "--max-area 1.5: a share"),
    ("--weights a.pt --like b.pt", "--like goes with --weights random"),
    ("--weights a.pt b.pt --out c.json", "--out names one file"),
    ("--weights random --heads 0", "--heads 0: must be at least 1"),
])
def test_usage_errors(capsys, flags, message):
    status, line = exits(capsys, *flags.split())
    assert status == 2 and message in line and "error: " in line


def cut_short(tmp_path):
    path = tmp_path / "val/n0/im0.png"
    path.write_bytes(path.read_bytes()[:3000])


@pytest.mark.parametrize("break_it, message", [
    (lambda t: (t / "xml/im0.xml").write_text("<annotation><size>"), "xml/im0.xml: no VOC-style boxes"),
    (lambda t: (t / "xml/im0.xml").write_text("<a><object/></a>"), "xml/im0.xml: no VOC-style boxes"),
    *((lambda t, size=size, box=box: voc(t / "xml/im0.xml", size, box), f"xml/im0.xml: box {message}")
      for size, box, message in [
          ((0, 0), (20, 10, 35, 22), "20, 10, 35, 22 has no area in a picture of 0 x 0; mend"),
          *(((60, 40), box, f"{', '.join(map(str, box))} has no area in a picture of 60 x 40") for box in [
              (35, 22, 20, 10), (35, 10, 20, 22), (20, 22, 35, 10), (20, 10, 20, 22), (20, 10, 35, 10),
              ("nan", 10, 35, 22), (20, 10, 35, "nan"), (-35, 10, -20, 22), (20, 40, 35, 52)])]),
    (lambda t: voc(t / "xml/im3.xml", (0, 40)), "xml/im3.xml: box 0, 0, 0, 40 has no area in a picture of 0 x 40"),
    (lambda t: (t / "xml/im0.xml").write_text("<annotation><size><width>60</width><height>40</height></size><object/>"
                                              "</annotation>"), "xml/im0.xml: no VOC-style boxes"),
    (lambda t: (t / "xml").rename(t / "elsewhere"), "xml: no such folder"),
    (lambda t: (t / "val").rename(t / "elsewhere"), "val: no such folder"),
    (lambda t: picture(t / "val/n9/im0.png", (60, 40)), "two files of one name"),
    (lambda t: [f.rename(f.with_name("x" + f.name)) for f in (t / "xml").rglob("*.xml")], "none is named like"),
    (lambda t: [voc(f, (50, 50)) for f in (t / "xml").rglob("*.xml")], "no image is left"),
    (lambda t: (t / "val/n0/im0.png").write_text("no picture"), "im0.png: unreadable"),
    (cut_short, "im0.png: unreadable"),
    (lambda t: (t / "tiny.pt").write_text("no checkpoint"), "tiny.pt: not a checkpoint"),
])
def test_data_errors_are_one_line(tmp_path, capsys, checkpoint, folder, break_it, message):
    break_it(tmp_path)
    workers = "1" if break_it is cut_short else "0"                   # from a loader process as from this one
    status, line = exits(capsys, "--weights", checkpoint, *folder, "--workers", workers)
    assert status == 1 and "\n" not in line and message in line
    assert not list(tmp_path.glob("*.json"))


def test_features_that_are_not_finite_are_refused(checkpoint, folder, capsys):
    state = torch.load(checkpoint, weights_only=True)
    state["teacher"]["cls_token"][0, 0, 0] = 3e38                     # finite, and the features overflow
    torch.save(state, checkpoint)
    status, line = exits(capsys, "--weights", checkpoint, *folder)
    assert status == 1 and line == f"{checkpoint}: its features are not finite; the weights are damaged"
