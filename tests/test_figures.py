import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint as disk
import vit
from paper import figures
from paper.figures import fit_pca, pca_colours, ticks, whole_patches
from shapes import Shapes

CONFIG = vit.ViTConfig(image_size=32, patch_size=8, dim=24, depth=3, heads=2, attn="entmax15", registers=2,
                       specialize=True)


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(path, seed=7, epoch=3, **overrides):
    """A checkpoint with the keys that are read, far enough from its initial values that entmax gives zeros."""
    torch.manual_seed(seed)
    config = dataclasses.replace(CONFIG, **overrides)
    model = vit.VisionTransformer(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    torch.save(dict(config=dataclasses.asdict(config), teacher=model.state_dict(), epoch=epoch), path)
    return str(path)


@pytest.fixture
def checkpoint(tmp_path):
    return save(tmp_path / "tiny.pt")


def picture(path, size, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def draw(out, *argv):
    """(height, width, 3) integers of the PNG that a command writes."""
    figures.main([*map(str, argv), "--out", str(out)])
    with Image.open(out) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.array(image).astype(int)


def exits(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        figures.main([*map(str, argv)])
    code, error = stop.value.code, capsys.readouterr().err
    return (1, code) if isinstance(code, str) else (code, error.strip().splitlines()[-1])


def wide(columns):
    """--width of a sheet whose pictures are 180 pixels wide."""
    return "--width", figures.GAP + columns * (180 + figures.GAP)


def tiles(image, columns, size=180):
    """[row][column] of the square pictures of a sheet, found as what is not white: (size, size, 3) each."""
    left = [figures.GAP + c * (size + figures.GAP) for c in range(columns)]
    full = (image[:, left[0]:left[0] + size] != 255).any(2).mean(1) > 0.9       # rows of pixels without text
    starts = [y for y in range(1, len(full)) if full[y] and not full[y - 1]]
    return [[image[y:y + size, x:x + size] for x in left] for y in starts]


# ---- pca ------------------------------------------------------------------------------------------------------------

def planted(n=200, D=12, seed=0):
    """Patches whose spectrum is well separated and whose projections are skewed."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(D, D)))[0]
    return (rng.exponential(size=(n, D)) * 2.0 ** -np.arange(D)) @ axes + rng.normal(size=D)


def test_components_equal_the_eigenvectors_of_the_covariance():
    x = planted()
    mean, components, shares = fit_pca(x)
    values, vectors = np.linalg.eigh(np.cov(x.T))                   # ascending
    np.testing.assert_allclose(mean, x.mean(0))
    for k in range(3):
        v = vectors[:, -1 - k]
        if sum(sum(v[d] * (row[d] - mean[d]) for d in range(12)) ** 3 for row in x) < 0:
            v = -v
        np.testing.assert_allclose(components[k], v, atol=1e-10)
        assert shares[k] == pytest.approx(values[-1 - k] / values.sum())


def test_the_sign_is_that_of_the_skew():
    x = np.zeros((5, 4))
    x[:, 2] = [4, -1, -1, -1, -1]                                   # sum of cubes 60 about the mean 0
    assert fit_pca(x)[1][0].tolist() == pytest.approx([0, 0, 1, 0])
    assert fit_pca(-x)[1][0].tolist() == pytest.approx([0, 0, -1, 0])


@pytest.mark.parametrize("flip", [1, -1])
def test_on_a_tie_the_first_loading_that_is_not_0_is_positive(flip):
    x = np.outer([3, 1, -1, -3], [0, -2, 1, 2]) * flip / 3.0
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        assert fit_pca(x[order])[1][0].tolist() == pytest.approx([0, 2 / 3, -1 / 3, -2 / 3])


def test_what_has_no_variance_is_grey_and_not_noise():
    rng = np.random.default_rng(0)
    line = np.outer(np.linspace(0, 1, 9), rng.normal(size=5)) + 100 * rng.normal(size=5)
    line = line.astype(np.float32).astype(float).reshape(3, 3, 5)
    (pixels,), shares, _ = pca_colours([line])
    assert {0, 255} < set(pixels[..., 0].ravel().tolist()) and (pixels[..., 1:] == 128).all()
    assert shares.tolist() == [pytest.approx(1), 0, 0]
    (pixels,), shares, _ = pca_colours([np.full((2, 2, 5), 0.1)])
    assert (pixels == 128).all() and not shares.any()
    (pixels,), _, inside = pca_colours([np.full((2, 2, 5), 0.1)], foreground=True)
    assert inside == 0 and not pixels.any()


def test_colours_are_the_projections_between_their_extremes():
    x = planted()
    (pixels,), _, inside = pca_colours([x.reshape(10, 20, 12)])
    assert pixels.shape == (10, 20, 3) and inside == 1
    mean, components, _ = fit_pca(x)
    for k in range(3):
        values = [sum(components[k][d] * (row[d] - mean[d]) for d in range(12)) for row in x]
        expected = [255 * (v - min(values)) / (max(values) - min(values)) for v in values]
        assert np.abs(pixels[..., k].ravel() - expected).max() <= 0.5 + 1e-6


def test_joint_is_one_basis_and_range():
    maps = [planted(seed=1).reshape(10, 20, 12), 3 * planted(n=30, seed=2).reshape(5, 6, 12)]
    together, _, _ = pca_colours(maps)
    (one,), _, _ = pca_colours([np.concatenate([maps[0].reshape(-1, 12), maps[1].reshape(-1, 12)])[None]])
    assert np.array_equal(np.concatenate([p.reshape(-1, 3) for p in together]), one[0])
    assert [p.shape for p in together] == [(10, 20, 3), (5, 6, 3)]
    assert not np.array_equal(together[0], pca_colours(maps[:1])[0][0])


def test_foreground_is_the_smaller_of_two_clusters_and_coloured_by_itself():
    rng = np.random.default_rng(3)
    x = 0.1 * rng.normal(size=(8, 8, 6))
    mask = np.zeros((8, 8), bool)
    mask[2:6, 3:6] = True
    for side in (5, -5):
        (pixels,), shares, inside = pca_colours([x + side * mask[..., None]], foreground=True)
        assert inside == 12 / 64 and not pixels[~mask].any()
        (alone,), expected, _ = pca_colours([(x + side * mask[..., None])[mask][None]])
        assert np.array_equal(pixels[mask], alone[0]) and shares.tolist() == expected.tolist()
        assert pixels[mask].min(0).tolist() == [0, 0, 0] and pixels[mask].max(0).tolist() == [255, 255, 255]


@pytest.mark.parametrize("width, height, size, patch, expected", [
    (500, 375, 448, 16, (592, 448)),                                # 597.3 is 37.3 patches
    (375, 500, 448, 16, (448, 592)),
    (500, 375, 450, 16, (608, 448)),                                # 600 is 37.5, 450 is 28.1
    (64, 64, 100, 8, (96, 96)),                                     # 12.5, to even
    (64, 64, 3, 8, (8, 8)),
    (100, 40, 24, 14, (56, 28)),                                    # 60 is 4.3, 24 is 1.7
])
def test_sizes_are_whole_patches(width, height, size, patch, expected):
    assert whole_patches(width, height, size, patch) == expected


def test_pca_does_not_depend_on_the_order_of_pictures_unless_joint(tmp_path, checkpoint, capsys):
    a, b = picture(tmp_path / "a.png", (40, 40), 1), picture(tmp_path / "b.png", (40, 40), 2)
    alone = {}
    for flags in ([], ["--foreground"], ["--joint"]):
        pca = "pca", "--weights", checkpoint, *wide(2), *flags
        ab, ba = (tiles(draw(tmp_path / "x.png", *pca, "--images", *pair), 2) for pair in ((a, b), (b, a)))
        if flags != ["--joint"]:                                    # each picture by its own name
            said = [line for line in capsys.readouterr().out.splitlines() if "variance" in line][-4:]
            assert said[:2] == said[:1:-1] and ", a.png: " in said[0] and ", b.png: " in said[1]
            assert said[0].partition("variance")[2] != said[1].partition("variance")[2]
        assert len(ab) == 2 and all(np.array_equal(*p) for p in zip(ab[0] + ab[1], ba[1] + ba[0], strict=True))
        alone[" ".join(flags)] = tiles(draw(tmp_path / "x.png", *pca, "--images", a), 2)[0][1]
        assert np.array_equal(alone[" ".join(flags)], ab[0][1]) == (flags != ["--joint"])
    assert "all pictures: explained variance" in capsys.readouterr().out
    assert not np.array_equal(alone[""], alone["--foreground"]) and np.array_equal(alone[""], alone["--joint"])


def test_pca_draws_final_norm_patches_where_they_are(tmp_path, checkpoint, capsys):
    """The sheet against the model's public features, cell by cell; both sizes from --size."""
    name = picture(tmp_path / "a.png", (50, 50), 1)
    shown = tiles(draw(tmp_path / "x.png", "pca", "--weights", checkpoint, "--images", name, "--size", 38, *wide(2)), 2)
    model = disk.load_backbone(checkpoint)
    pixels = Image.open(name).resize((40, 40), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
    with torch.no_grad():
        patches = model.features(vit.normalize(x))[-1].patches[0].double().numpy()
    (expected,), shares, _ = pca_colours([patches])
    assert expected.shape == (5, 5, 3)
    centres = shown[0][1].reshape(5, 36, 5, 36, 3)
    assert np.array_equal(centres[:, 0, :, 0], expected) and np.array_equal(centres[:, 35, :, 35], expected)
    assert np.abs(shown[0][0].mean((0, 1)) - np.array(pixels).mean((0, 1))).max() < 3
    assert f"a.png: explained variance {shares[0]:.1%}" in capsys.readouterr().out


def test_pca_repeats_its_bytes_and_labels_its_columns(tmp_path, checkpoint, capsys):
    other = save(tmp_path / "other.pt", 8, 0, attn="softmax", registers=0, specialize=False)
    for name in ("one", "two"):
        draw(tmp_path / f"{name}.png", "pca", "--weights", checkpoint, other, "random", "--like", other, "--data",
             "shapes", "--count", "1", "--smooth")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", scene 0:")[0] for line in lines[:3]] == [
        "entmax15 + 2 registers + specialize, 3 epochs", "softmax, untrained", "softmax, untrained"]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("command, columns", [("pca", 2), ("attention", 3)])
def test_scenes_are_those_of_val(tmp_path, checkpoint, command, columns, capsys):
    flags = command, "--weights", checkpoint, "--data", "shapes", "--count", 2, "--size", 40, *wide(columns)
    rows, said = tiles(draw(tmp_path / "x.png", *flags), columns), capsys.readouterr().out
    assert len(rows) == 2 and ", scene 0" in said and ", scene 1" in said
    for i, row in enumerate(rows):
        for split in ("train", "val"):
            pixels = Shapes(split, 40, 2)[i]["image"].permute(1, 2, 0).numpy()
            assert np.array_equal(row[0], figures.tile(pixels, 180)) == (split == "val")


@pytest.mark.parametrize("width", [301, 500])
def test_pictures_fill_the_width(tmp_path, checkpoint, width):
    """To less than a pixel for each of the columns."""
    for command, columns in (("pca", 2), ("attention", 3)):
        image = draw(tmp_path / "x.png", command, "--weights", checkpoint, "--data", "shapes", "--width", width)
        assert 0 <= width - image.shape[1] < columns
    files = [result(tmp_path / f"r{e}.json", e) for e in (0, 1, 2)]
    assert 0 <= width - draw(tmp_path / "x.png", "heatmap", "--results", *files, "--width", width).shape[1] < 3


def test_every_flag_reaches_the_picture(tmp_path, checkpoint):
    """Against the library, and each unlike the default: student, seed, bilinear, heads of a file that does not say."""
    state = torch.load(checkpoint, weights_only=True)
    state["student"] = {key: value + 0.1 * torch.randn(value.shape) for key, value in state["teacher"].items()}
    torch.save(state, checkpoint)
    plain = dataclasses.replace(CONFIG, dim=192, heads=4, attn="softmax")
    torch.save(vit.VisionTransformer(plain).state_dict(), "bare.pt")
    image = Shapes("val", 32, 1)[0]["image"]

    def expected(path, smooth=Image.Resampling.NEAREST, **how):
        model = disk.open_weights(path, **how)[0]
        x = model.features(vit.normalize(image[None]))[-1].patches[0].double().numpy()
        return np.array(Image.fromarray(pca_colours([x])[0][0]).resize((180, 180), smooth))

    def shown(path, *flags):
        return tiles(draw("x.png", "pca", "--weights", path, "--data", "shapes", "--count", 1, "--size", 32, *wide(2),
                          *flags), 2)[0][1]

    for path, flags, how in (
            (checkpoint, ["--which", "student"], dict(which="student")),
            (checkpoint, ["--smooth"], dict(smooth=Image.Resampling.BILINEAR)),
            ("bare.pt", ["--heads", "4"], dict(heads=4)),
            ("random", ["--like", checkpoint, "--seed", "3"], dict(like=checkpoint, seed=3))):
        like = ["--like", checkpoint] if path == "random" else []
        assert np.array_equal(shown(path, *flags), expected(path, **how)), flags
        assert not np.array_equal(shown(path, *flags), shown(path, *like)), flags


# ---- attention ------------------------------------------------------------------------------------------------------

def test_exactly_zero_is_grey_and_nothing_else_is():
    weights = np.array([[0, 1e-30], [0.5, 1]], np.float32)
    shown = np.array(figures.overlay(Image.new("RGB", (4, 4), (10, 200, 90)), weights)).astype(int)
    spread = np.ptp(shown, axis=2)
    assert (spread[:2, :2] == 0).all() and (spread[:2, 2:] > 20).all() and (spread[2:] > 20).all()
    assert not np.array(figures.overlay(Image.new("RGB", (4, 4)), np.zeros((2, 2), np.float32))).std()
    luma = shown @ (0.299, 0.587, 0.114)
    assert luma[0, 3] < luma[3, 0] < luma[3, 3] and luma[0, 0] > 200        # more weight is lighter, zero is pale


def test_attention_shows_the_cls_row_of_every_head(tmp_path, checkpoint, capsys):
    dense = save(tmp_path / "dense.pt", attn="softmax", registers=0, specialize=False)
    name = picture(tmp_path / "a.png", (32, 32), 1)
    image = draw(tmp_path / "x.png", "attention", "--weights", checkpoint, dense, "--images", name, "--block", "1",
                 *wide(3))
    shown, out = tiles(image, 3), capsys.readouterr().out
    x = vit.normalize(torch.from_numpy(np.array(Image.open(name))).permute(2, 0, 1)[None])
    for row, path in enumerate((checkpoint, dense)):
        model = disk.load_backbone(path)
        skip = 1 + model.config.registers
        for head in range(2):
            weights = model.attention(x, 1)[0, head, 0].numpy()
            zeros = sum(weights[skip + i] == 0 for i in range(16))
            assert f"head {head + 1}: weight 0 on {zeros} of 16 patches" in out.splitlines()[2 * row + head]
            assert 0 < zeros < 16 if row == 0 else zeros == 0
            for i in range(16):
                cell = shown[row][1 + head][i // 4 * 45:][:45, i % 4 * 45:][:, :45]
                assert (np.ptp(cell, axis=2).max() == 0) == (weights[skip + i] == 0)
            brightest = weights[skip:].argmax()
            yellow = (shown[row][1 + head][..., 0] - shown[row][1 + head][..., 2]).reshape(4, 45, 4, 45).mean((1, 3))
            assert yellow.argmax() == brightest


# ---- heatmap --------------------------------------------------------------------------------------------------------

def result(path, epochs, probe="pib", protocol=(), config=(), **changes):
    depth = 3
    e = epochs or 0
    metrics = dict(pib=[10.0 * b + e for b in range(depth)], chance=12.5, n=1234, tokens=19,
                   support=[[b, b + 2.0 + e] for b in range(depth)], cos_inside=[0.25, None, 0.5])
    if probe == "seg":
        heads = [dict(block=b, concat_cls=c, miou=b + e + 50.0 * c, iou=[1.0, None]) for b in range(depth)
                 for c in (False, True)]
        metrics = dict(miou=1.0, heads=heads)
    content = dict(probe=probe, data="shapes", which="teacher", epochs=epochs, metrics=metrics,
                   protocol=dict(probe=probe, size=32) | dict(protocol),
                   config=dataclasses.asdict(CONFIG) | dict(config)) | changes
    path.write_text(json.dumps(content) + "\n")
    return str(path)


def runs_of_colour(line):
    """Colours of a line of pixels as [(colour, length)], without white."""
    found = []
    for pixel in map(tuple, line.tolist()):
        if found and found[-1][0] == pixel:
            found[-1][1] += 1
        else:
            found.append([pixel, 1])
    return [tuple(run) for run in found if run[0] != (255, 255, 255)]


def cells(values, low=None, high=None):
    """Colours of a map's cells, read from its pixels, in the order of `values`; and those of the colour bar."""
    values = np.array(values, float)
    low, high = np.nanmin(values) if low is None else low, np.nanmax(values) if high is None else high
    image = figures.draw_map(values, [b + 1 for b in range(len(values))], list(range(values.shape[1])), "title", low,
                             high, 800)
    image = np.array(image)
    bar = image[:, image.shape[1] - 84 + 16 + 8]                    # a column of pixels in the middle of the bar
    inside = np.flatnonzero((bar != 255).any(1))
    rows = []
    for r in range(len(values)):
        y = inside[0] + 34 * (len(values) - 1 - r) + 2              # above the text
        line = runs_of_colour(image[y, 58:image.shape[1] - 84])
        assert len({length for _, length in line}) == 1
        rows.append([fill for fill, _ in line])
    return rows, bar[inside].astype(int)


def test_differences_have_signs_stars_and_colours_about_0(monkeypatch):
    written = []
    monkeypatch.setattr(figures, "write", lambda canvas, x, y, text, *how, **more: written.append(text))
    values = np.array([[-2.0, 0.0, 1.0, math.nan], [0.004, 2.0, -1.0, 3.0]])
    image = figures.draw_map(values, [1, 2], [0, 1, 2, 3], "t", -2, 2, 800, values == 2)
    assert written[2:6] == ["-2.00", "+0.00", "+1.00", "-"] and written[7:11] == ["+0.00", "+2.00*", "-1.00", "+3.00"]
    assert written[-3:] == ["-2.00", "0.00", "2.00"]
    pixels, table = np.array(image), figures.RED_BLUE
    cell, top = (800 - 58 - 84) // 4, image.height - 48 - 2 * 34
    fills = [[pixels[top + 34 * (1 - r) + 2, 58 + c * cell + 2].tolist() for c in range(4)] for r in range(2)]
    assert fills[0] == [*table[:3:2].tolist(), table[3].tolist(), list(figures.RULE)] and fills[1][1:3] == table[
        [4, 1]].tolist()
    assert fills[1][3] == table[4].tolist() and np.ptp(table[2]) == 0       # above the range; 0 is grey


def test_cells_run_from_one_end_of_the_map_to_the_other():
    rng = np.random.default_rng(5)
    values = rng.permutation(20).reshape(4, 5) * 3.7 - 8
    rows, bar = cells(values)
    fills = np.array(rows)
    luma = fills @ (0.299, 0.587, 0.114)
    assert fills.shape == (4, 5, 3) and (np.diff(luma.ravel()[values.ravel().argsort()]) > 3).all()
    for value, end, at in ((values.min(), (68, 1, 84), bar[-1]), (values.max(), (253, 231, 37), bar[0])):
        assert tuple(fills[values == value][0]) == end == tuple(at)
    assert (np.diff(bar @ (0.299, 0.587, 0.114)) < 0.6).all()       # darker downwards, up to rounding


def test_a_given_range_and_missing_values():
    rows, _ = cells([[0, 5, math.nan, 20]], -5, 15)
    assert rows[0][2] == figures.RULE and rows[0][3] == (253, 231, 37)
    assert rows[0][1] == (33, 144, 141) and rows[0][0] == (59, 81, 139)     # a half and a quarter
    assert cells([[3, 3]])[0][0][0] == cells([[3, 3]])[0][0][1]


def test_heatmap_reads_results_in_the_order_of_epochs(tmp_path, monkeypatch, capsys):
    seen = []
    real = figures.draw_map
    monkeypatch.setattr(figures, "draw_map", lambda *args: seen.append(args) or real(*args))
    files = [result(tmp_path / f"r{e}.json", e) for e in (20, 0, 100)]
    draw(tmp_path / "x.png", "heatmap", "--results", *files)
    values, blocks, epochs, title, low, high, width, stars = seen[-1]
    assert width == 800 and stars is None
    assert values.tolist() == [[0, 20, 100], [10, 30, 110], [20, 40, 120]]
    assert blocks == [0, 1, 2] and epochs == [0, 20, 100] and (low, high) == (0, 120)
    assert title.endswith("shapes, entmax15 + 2 registers + specialize; chance 12.5 %, 1,234 images")
    draw(tmp_path / "x.png", "heatmap", "--results", *files, "--metric", "support", "--range", "-1", "7")
    assert seen[-1][0].tolist() == [[1, 11, 51], [2, 12, 52], [3, 13, 53]] and seen[-1][4:6] == (-1, 7)
    assert "chance" not in seen[-1][3]
    draw(tmp_path / "x.png", "heatmap", "--results", *files, "--metric", "cos_inside")
    assert np.isnan(seen[-1][0][1]).all() and seen[-1][4:6] == (0.25, 0.5)

    files = [result(tmp_path / f"s{e}.json", e, "seg") for e in (4, 0)]
    draw(tmp_path / "x.png", "heatmap", "--results", *files)
    assert seen[-1][0].tolist() == [[0, 4], [1, 5], [2, 6]] and seen[-1][3].endswith("head on patches")
    draw(tmp_path / "x.png", "heatmap", "--results", *files, "--concat-cls", "yes")
    assert seen[-1][0].tolist() == [[50, 54], [51, 55], [52, 56]] and seen[-1][3].endswith("head on patches and [CLS]")


def seeded(folder, epochs, seeds, probe="seg", **changes):
    """Files of runs, each with a value of its own in every block: (files, values (seeds, blocks, epochs))."""
    rng = np.random.default_rng([2, *seeds])
    values, files = rng.normal(size=(len(seeds), 3, len(epochs))), []
    folder.mkdir(exist_ok=True)
    for s, seed in enumerate(seeds):
        for e, epoch in enumerate(epochs):
            heads = [dict(block=b, concat_cls=False, miou=values[s, b, e]) for b in range(3)]
            metrics = dict(heads=heads) if probe == "seg" else dict(
                pib=values[s, :, e].tolist(), auc_own=(10 * values[s, :, e]).tolist(), chance=12.5, n=1234)
            path = folder / f"s{seed}_{epoch}.json"
            files.append(result(path, epoch, probe, metrics=metrics, run_seed=seed, **changes))
    return files[::-1], values


@pytest.fixture
def drawn(monkeypatch):
    seen = []
    real = figures.draw_map
    monkeypatch.setattr(figures, "draw_map", lambda *args: seen.append(args) or real(*args))
    return seen


def test_one_run_is_drawn_as_it_is_with_a_seed_or_without(tmp_path, drawn):
    for name, change in (("new", dict(run_seed=3)), ("null", dict(run_seed=None)), ("old", {})):
        files = [result(tmp_path / f"{name}{e}.json", e, **change) for e in (0, 20)]
        draw(tmp_path / f"{name}.png", "heatmap", "--results", *files)
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in ("new", "null", "old")}) == 1
    title = "Point-in-box, %; shapes, entmax15 + 2 registers + specialize; chance 12.5 %, 1,234 images"
    expected = figures.draw_map(np.array([[0, 20], [10, 30], [20, 40.0]]), [0, 1, 2], [0, 20], title, 0, 40, 800)
    expected.save("expected.png", optimize=True)
    assert (tmp_path / "new.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


def test_runs_of_several_seeds_are_averaged(tmp_path, drawn):
    files, values = seeded(tmp_path / "a", (0, 4), (11, 2, 5))
    draw(tmp_path / "x.png", "heatmap", "--results", *files)
    draw(tmp_path / "y.png", "heatmap", "--results", *files[::-1])
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()
    shown, blocks, epochs, title, low, high, _, stars = drawn[0]
    for b in range(3):
        for e in range(2):
            assert shown[b, e] == pytest.approx((values[0, b, e] + values[1, b, e] + values[2, b, e]) / 3)
    assert (blocks, epochs, stars) == ([0, 1, 2], [0, 4], None) and (low, high) == (shown.min(), shown.max())
    assert title == ("mIoU, %, best evaluation; shapes, entmax15 + 2 registers + specialize, mean of 3 seeds, "
                     "head on patches")
    files, values = seeded(tmp_path / "p", (0, 4), (1, 2), "pib")
    draw(tmp_path / "x.png", "heatmap", "--results", *files)
    assert drawn[-1][3].endswith(" + specialize, mean of 2 seeds; chance 12.5 %, 1,234 images")
    draw(tmp_path / "x.png", "heatmap", "--results", *files, "--metric", "auc_own")
    np.testing.assert_allclose(drawn[-1][0], 5 * (values[0] + values[1]))
    assert drawn[-1][3].startswith("Own card's class read from its patches, AUC, %; ")
    assert drawn[-1][3].endswith("mean of 2 seeds; chance 50 %")


def test_a_value_that_one_seed_lacks_is_not_averaged(tmp_path, drawn):
    files = [result(tmp_path / f"{seed}.json", 0, run_seed=seed) for seed in (0, 1)]
    draw(tmp_path / "x.png", "heatmap", "--results", *files, "--metric", "cos_inside")
    np.testing.assert_array_equal(drawn[0][0], [[0.25], [math.nan], [0.5]])
    content = json.loads((tmp_path / "1.json").read_text())
    content["metrics"]["cos_inside"] = [None, 1.0, 1.0]
    (tmp_path / "1.json").write_text(json.dumps(content))
    draw(tmp_path / "x.png", "heatmap", "--results", *files, "--metric", "cos_inside")
    np.testing.assert_array_equal(drawn[1][0], [[math.nan], [math.nan], [0.75]])


def test_differences_are_of_equal_seeds(tmp_path, drawn):
    plain = dict(registers=0, specialize=False)
    a, first = seeded(tmp_path / "a", (0, 4), (0, 1, 10, 2), config=plain)
    b, second = seeded(tmp_path / "b", (0, 4), (10, 3, 0, 2), config=dict(plain, attn="softmax"))
    draw(tmp_path / "x.png", "heatmap", "--results", *a, "--minus", *b)
    shown, blocks, epochs, title, low, high, _, stars = drawn[0]
    pairs = np.stack([first[i] - second[j] for i, j in ((0, 2), (2, 0), (3, 3))])   # seeds 0, 10, 2
    np.testing.assert_allclose(shown, pairs.mean(0))
    assert stars.tolist() == [[(pairs[:, b, e] > 0).all() or (pairs[:, b, e] < 0).all() for e in range(2)]
                              for b in range(3)]
    assert 0 < stars.sum() < 6 and (blocks, epochs) == ([0, 1, 2], [0, 4])
    assert high == -low == abs(shown).max()
    assert title == ("mIoU, %, best evaluation; shapes, entmax15 - softmax, mean of 3 seeds (*: all of one sign, by "
                     "chance 1 in 4), head on patches")
    draw(tmp_path / "x.png", "heatmap", "--results", *b, "--minus", *a, "--range", -3, 3)
    np.testing.assert_allclose(drawn[1][0], -shown)
    assert drawn[1][4:6] == (-3, 3) and np.array_equal(drawn[1][7], stars)
    one, minus = [[f for f in files if "s10_" in f] for files in (a, b)]
    draw(tmp_path / "x.png", "heatmap", "--results", *one, "--minus", *minus)
    assert not drawn[2][7].any() and "mean" not in drawn[2][3] and "*" not in drawn[2][3]
    np.testing.assert_allclose(drawn[2][0], pairs[1])


def test_differences_of_pib_name_compound_methods_and_no_chance(tmp_path, drawn):
    a = [result(tmp_path / f"a{seed}.json", 4, run_seed=seed) for seed in (0, 1)]
    b = [result(tmp_path / f"b{seed}.json", 4, config=dict(registers=0, specialize=False), run_seed=seed)
         for seed in (0, 1)]
    draw(tmp_path / "x.png", "heatmap", "--results", *a, "--minus", *b)
    assert drawn[0][3] == ("Point-in-box, %; shapes, (entmax15 + 2 registers + specialize) - entmax15, mean of 2 seeds "
                           "(*: all of one sign, by chance 1 in 2)")
    assert not drawn[0][0].any() and not drawn[0][7].any() and drawn[0][4:6] == (-1, 1)     # 0 has no sign


@pytest.mark.parametrize("change, message", [
    (dict(protocol=dict(size=64)), "b.json: protocol size is 64, and 32 in a.json; a map is of one protocol"),
    (dict(config=dict(depth=4)), "b.json: config depth is 4, and 3 in a.json"),
    (dict(which="student"), "b.json: which is student, and teacher in a.json"),
    (dict(recipe=dict(attn="softmax", lr=2.0)), "b.json: recipe lr is 2.0, and 1.0 in a.json"),
    (dict(epochs=4), "b.json: epochs [4], of a.json [0], run_seed of both [1]"),
    (dict(run_seed=2), "b.json: epochs [0], of a.json [0], run_seed of both []; a difference is of equal"),
    (dict(run_seed=None), "run_seed of both []"),
    (dict(metrics=dict(heads=[dict(block=1, concat_cls=False, miou=1.0)])), "b.json: blocks is [1], and [0, 1, 2] in"),
])
def test_differences_of_more_than_the_method_are_refused(tmp_path, capsys, change, message):
    change = dict(change)
    result(tmp_path / "a.json", 0, "seg", run_seed=1, recipe=dict(attn="entmax15", lr=1.0))
    other = dict(attn="softmax", registers=0, specialize=False)
    result(tmp_path / "b.json", change.pop("epochs", 0), "seg", config=other | change.pop("config", {}),
           **dict(run_seed=1, recipe=dict(attn="softmax", lr=1.0)) | change)
    status, line = exits(capsys, "heatmap", "--results", "a.json", "--minus", "b.json")
    assert status == 1 and message in line and "\n" not in line and not (tmp_path / "heatmap.png").exists()


def test_runs_of_unknown_seeds_are_no_pair(tmp_path, capsys):
    result(tmp_path / "a.json", 0)
    result(tmp_path / "b.json", 0, config=dict(attn="softmax"))
    status, line = exits(capsys, "heatmap", "--results", "a.json", "--minus", "b.json")
    assert status == 1 and "b.json: epochs [0], of a.json [0], run_seed of both []" in line


@pytest.mark.parametrize("change, message", [
    (dict(protocol=dict(size=64)), "b.json: protocol size is 64, and 32 in a.json"),
    (dict(protocol=dict(raw=True)), "b.json: protocol raw is True, and None in a.json"),
    (dict(config=dict(attn="softmax")), "b.json: config attn is softmax, and entmax15 in a.json"),
    (dict(data="folder"), "b.json: data is folder, and shapes in a.json"),
    (dict(which="student"), "b.json: which is student, and teacher in a.json"),
    (dict(probe="seg"), "b.json: probe is seg, and pib in a.json"),
    (dict(probe="linear"), "b.json: of probe linear"),
    (dict(epochs=0), "b.json: run_seed None after 0 epochs, as a.json"),
    (dict(epochs=0, run_seed=None), "b.json: run_seed None after 0 epochs, as a.json"),
    (dict(run_seed=1), "a.json: beside it is no run_seed 1 after 0 epochs, run_seed None after 4 epochs; give"),
    (dict(epochs=None), "b.json: its weights do not say"),
])
def test_results_of_two_kinds_are_refused(tmp_path, capsys, change, message):
    change = dict(change)
    result(tmp_path / "a.json", 0)
    result(tmp_path / "b.json", change.pop("epochs", 4), **change)
    status, line = exits(capsys, "heatmap", "--results", "a.json", "b.json")
    assert status == 1 and message in line and "\n" not in line and not (tmp_path / "heatmap.png").exists()


# ---- curves ---------------------------------------------------------------------------------------------------------

def log(path, points, key="loss", tail=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"args": {}, "device": "CPU"})]
    lines += [json.dumps({"step": i, "epoch": x, key: y}) for i, (x, y) in enumerate(points)]
    path.write_text("\n".join(lines) + "\n" + tail)
    return str(path.parent)


def frame(image):
    """(left, top, right, bottom) of the first panel: the first long grey lines."""
    grey = (image == figures.GREY).all(2)
    ys, xs = np.flatnonzero(grey.sum(1) > 150), np.flatnonzero(grey.sum(0) > 100)
    return xs[0], ys[0], xs[-1], ys[-1]


@pytest.mark.parametrize("points", [[(0, 2), (10, 4)], [(0, 4), (5, 2), (10, 3)], [(2, 2), (4, 4), (10, 2.4), (0, 3)]])
def test_points_land_where_the_axes_say(tmp_path, points):
    """Both axes start and end at a tick, so the frame is [0, 10] x [2, 4]."""
    run = log(tmp_path / "run/log.jsonl", points)
    image = draw(tmp_path / "x.png", "curves", "--runs", run, "--keys", "loss")
    left, top, right, bottom = frame(image)
    blue = (np.abs(image - figures.LINES[0]) < 60).all(2)
    blue[:top - 4] = False                                          # the legend
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        for share in (0, 0.3, 0.5, 0.9, 1):
            x = left + (x0 + share * (x1 - x0)) / 10 * (right - left)
            y = bottom - (y0 + share * (y1 - y0) - 2) / 2 * (bottom - top)
            assert blue[max(0, round(y) - 1):round(y) + 2, max(0, round(x) - 1):round(x) + 2].any(), (x, y)
    if len(points) == 2:                                            # and nowhere else
        ys, xs = np.nonzero(blue)
        distance = np.abs((bottom - ys) * (right - left) - (xs - left) * (bottom - top)) / np.hypot(right - left,
                                                                                                    bottom - top)
        assert distance.max() < 4.5 and len(ys) > 300


def test_runs_have_colours_of_their_own_and_lines_may_be_missing(tmp_path, capsys):
    a = log(tmp_path / "a/log.jsonl", [(0, 1.0), (1, 2.0), (2, math.nan)], tail='{"step": 4, "epo')
    b = log(tmp_path / "b/log.jsonl", [(0.5, 2.0)])
    c = log(tmp_path / "c/log.jsonl", [(0, 1.0), (2, 2.0)], key="kl")
    image = draw(tmp_path / "x.png", "curves", "--runs", a, b, c + "/log.jsonl", "--keys", "loss", "kl")
    out = capsys.readouterr().out
    assert "a: 1 of 3 records without a finite loss" in out and "c: 2 of 2 records without a finite loss" in out
    left, top, right, bottom = frame(image)
    half = image[top - 4:, :image.shape[1] // 2], image[top - 4:, image.shape[1] // 2:]
    seen = [[int((panel == colour).all(2).sum()) for colour in figures.LINES[:3]] for panel in half]
    assert seen[0][0] > 50 and 10 < seen[0][1] < 60 and seen[0][2] == 0     # the single record is a dot
    assert seen[1][:2] == [0, 0] and seen[1][2] > 50


@pytest.mark.parametrize("low, high, expected", [
    (0, 10, [0, 2, 4, 6, 8, 10]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (4.31, 6.38, [4, 4.5, 5, 5.5, 6, 6.5]),
    (-3, 41, [-10, 0, 10, 20, 30, 40, 50]), (0, 1e-4, [0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4]), (0, 0, [0, 0.2]),
    (5, 5, [5, 6]),
])
def test_ticks_are_round_and_cover(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_a_log_of_train_is_drawn(tmp_path, capsys):
    """With the keys that train.py writes; the default panels."""
    record = dict(step=1, epoch=0.5, loss=5.4, entropy=4.3, kl=1.6, support=1.0, center=1.2, lr=0.0)
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, [dict(args={}), record, record | dict(epoch=1)])))
    assert draw(tmp_path / "x.png", "curves", "--runs", tmp_path).shape[1] == 800
    assert (tmp_path / "x.png").stat().st_size < 300_000


# ---- mistakes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    ("", "required: command"),
    ("pca --data shapes", "required: --weights"),
    ("pca --weights random", "--images --data is required"),
    ("pca --weights random --images a.png --data shapes", "not allowed with"),
    ("pca --weights random --images a.png --count 2", "--count goes with --data shapes or a folder"),
    ("pca --weights random --data shapes --count 0", "--count 0: must be at least 1"),
    ("attention --weights random --data shapes --size 0", "--size 0: must be at least 1"),
    ("attention --weights a.pt --data shapes --heads 0", "--heads 0: must be at least 1"),
    ("pca --weights random --data shapes --width 200", "--width 200: must be at least 300"),
    ("pca --weights random --data shapes --labels a b", "--labels 2: needs 1, one for each of random"),
    ("attention --weights a.pt --like b.pt --data shapes", "--like goes with --weights random"),
    ("heatmap --results a.json --range 2 1", "--range 2 1: the first must be the lower one"),
    ("heatmap --results a.json --minus b.json --range -1 2", "--range -1 2: the first must be the lower one, and with "
                                                             "--minus the negative of the second"),
    ("curves --runs a --labels b c", "--labels 2: needs 1"),
    ("curves --runs 1 2 3 4 5 6 7 8 9", "--runs 9: there are only 8 colours"),
])
def test_usage_errors(capsys, flags, message):
    status, line = exits(capsys, *flags.split())
    assert status == 2 and message in line and "error: " in line


@pytest.mark.parametrize("flags, message", [
    ("pca --weights gone.pt --data shapes", "gone.pt: no such file"),
    ("pca --weights empty --data shapes", "empty: holds no checkpoint_0000.pt"),
    ("pca --weights tiny.pt --images gone.png", "gone.png: unreadable"),
    ("pca --weights tiny.pt --images empty", "empty: holds no picture"),
    ("attention --weights tiny.pt --images text", "text: unreadable"),
    ("attention --weights tiny.pt --data shapes --block 3", "block 3 does not exist: the model has 0 to 2"),
    ("pca --weights huge.pt --data shapes", "huge.pt: its features are not finite"),
    ("attention --weights huge.pt --data shapes", "huge.pt: its features are not finite"),
    (f"pca --weights {'tiny.pt ' * 15} --width 300 --data shapes", "--width 300: too narrow for 16 columns"),
    ("heatmap --results gone.json", "gone.json: No such file"),
    ("heatmap --results text", "text: no result of a probe"),
    ("heatmap --results list", "list: no result of a probe"),
    ("heatmap --results pib.json --metric chance", "no chance by block; give --metric one of cos_inside, pib, support"),
    ("heatmap --results pib.json --concat-cls no", "pib.json: of pib.py; --concat-cls chooses"),
    ("heatmap --results seg.json --concat-cls yes", "seg.json: no heads with --concat-cls yes"),
    ("curves --runs gone", "gone: No such file"),
    ("curves --runs empty", "empty/log.jsonl: No such file"),
    ("curves --runs list", "list: no log records"),
    ("curves --runs nothing", "nothing: no log records"),
    ("curves --runs torn", "torn: line 1 is no JSON"),
    ("curves --runs run --keys los", "run: no finite los; give --keys of loss, step"),
])
def test_data_errors_are_one_line(tmp_path, capsys, checkpoint, flags, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no picture")
    (tmp_path / "list").write_text("[]\n")
    (tmp_path / "nothing").write_text("")
    (tmp_path / "torn").write_text('{"epoch": 1, "lo\n{"epoch": 1, "loss": 2}\n')
    log(tmp_path / "run/log.jsonl", [(0, 1)])
    result(tmp_path / "pib.json", 0)
    result(tmp_path / "seg.json", 0, "seg", metrics=dict(heads=[dict(block=0, concat_cls=False, miou=1.0)]))
    state = torch.load(checkpoint, weights_only=True)
    state["teacher"]["cls_token"][0, 0, 0] = 3e38                     # finite, and the features overflow
    torch.save(state, tmp_path / "huge.pt")
    status, line = exits(capsys, *flags.split())
    assert status == 1 and message in line and "\n" not in line
    assert not list(tmp_path.glob("*.png*"))


# ---- names and folders ----------------------------------------------------------------------------------------------

def test_a_folder_stands_for_pictures_spread_over_it(tmp_path, checkpoint, capsys):
    for kind in "ab":
        (tmp_path / "pets" / kind).mkdir(parents=True)
        for i in range(5):
            picture(tmp_path / "pets" / kind / f"{i}.png", (32, 32), i)
    (tmp_path / "pets/notes.txt").write_text("no picture")
    (tmp_path / "pets/.hidden.png").write_text("no picture")
    alone = picture(tmp_path / "alone.png", (32, 32), 7)
    for count, names in ((1, ["a/0"]), (2, ["a/0", "b/4"]), (4, ["a/0", "a/3", "b/1", "b/4"]),
                         (99, [f"{kind}/{i}" for kind in "ab" for i in range(5)])):
        expected = [(f"{name}.png", f"pets/{name}.png") for name in names]
        assert figures.list_pictures(["pets", alone], count) == [*expected, ("alone.png", alone)]
    image = draw("x.png", "pca", "--weights", checkpoint, "--images", "pets", "--size", 32, *wide(2))
    shown, said = tiles(image, 2), capsys.readouterr().out
    assert [line.split(", ")[2].split(":")[0] for line in said.splitlines()[:4]] == [
        "a/0.png", "a/3.png", "b/1.png", "b/4.png"]
    for row, name in zip(shown, ("a/0", "a/3", "b/1", "b/4"), strict=True):
        assert np.array_equal(row[0], figures.tile(np.array(Image.open(f"pets/{name}.png")), 180))


@pytest.mark.parametrize("command", ["pca", "attention"])
def test_names_of_files_stand_below_their_pictures(tmp_path, checkpoint, command, monkeypatch):
    """Whole where they fit, else their end; with what no file should have in its name."""
    files = [picture(tmp_path / name, (32, 32)) for name in ("cat.png", "x" * 60 + "_17.png", "a\nb\udce9.png")]
    written = []
    monkeypatch.setattr(figures, "write", lambda canvas, x, y, text, *how, **more: written.append((x, y, text)))
    draw(tmp_path / "x.png", command, "--weights", checkpoint, "--images", *files, "--width", 390)
    cell = figures.share_width(390, 2 if command == "pca" else 3)
    names = [(y, text) for x, y, text in written if x == figures.GAP and text.endswith(".png")]
    assert [text for _, text in names][::2] == ["cat.png", "a b�.png"] and len(names) == 3
    cut = names[1][1]
    assert cut.startswith("..x") and cut.endswith("x_17.png")
    assert figures.font(figures.SMALL).getlength(cut) <= cell < figures.font(figures.SMALL).getlength("..x" + cut[2:])
    assert names[0][0] < names[1][0] < names[2][0] and names[0][0] > cell


def test_a_name_that_does_not_fit_at_all_is_left_out():
    assert [figures.fitted(text, 12, 5) for text in ("", "i", "wide")] == ["", "i", ".."]
