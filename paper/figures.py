"""Pictures of what a model has learnt, drawn with Pillow alone: PCA of patches, attention, heat maps, curves.

    python -m paper.figures pca --weights A.pt B.pt --images *.jpg --size 448             Fig. 1: input | A | B
    python -m paper.figures pca --weights RUN/checkpoint.pt --images FOLDER --count 6     six pictures, spread over it
    python -m paper.figures attention --weights A.pt B.pt --data shapes --count 1         where [CLS] looks, by head
    python pib.py --weights RUN; python -m paper.figures heatmap --results RUN/*.pib.*.json   Fig. 2
    python -m paper.figures heatmap --results A_s?/*.seg.*.json --minus B_s?/*.seg.*.json   A - B, mean over seeds
    python -m paper.figures curves --runs RUN_A RUN_B --keys loss entropy                 log.jsonl of several runs

Each writes one PNG, --out; the same input gives the same bytes on one machine.
PCA: the patches of the last block after the final norm; their first three components, each from its least to its
greatest value, are red, green and blue. Every model has a basis of its own, so colours are not comparable between
columns, nor between rows without --joint. With --foreground, patches not above 0 on the first component are black, and
a second PCA is of the others, as in DINOv2 (Oquab et al. 2024, Fig. 1).

    D width, H heads, T tokens = 1 + R + h w, h x w grid of patches, n patches fitted together
"""

import argparse
import functools
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import checkpoint
import data
import vit
from shapes import Shapes


# ------------------------------------------------------------------------------------------- pca
def fit_pca(x):
    """mean (D,), unit components (3, D) and their shares of the variance (3,) of float64 patches (n, D).

    A component and its negative are as good: taken is the one whose projections have a positive sum of cubes, on a tie
    the one whose first loading is positive. One within float32's rounding of the features is noise, and 0 instead.
    """
    mean = x.mean(0)
    _, s, directions = np.linalg.svd(x - mean, full_matrices=False)
    components, shares = np.zeros((3, x.shape[1])), np.zeros(3)
    for k in range(min(3, (s > 1e-6 * np.linalg.norm(x)).sum())):
        cubes = ((x - mean) @ directions[k]) ** 3
        skew = cubes.sum()
        if abs(skew) <= 1e-9 * abs(cubes).sum():                    # a tie, up to rounding
            skew = directions[k][abs(directions[k]) > 1e-9][0]
        components[k], shares[k] = np.sign(skew) * directions[k], s[k] ** 2 / (s**2).sum()
    return mean, components, shares


def pca_colours(maps, foreground=False):
    """uint8 (h, w, 3) of every float64 map (h, w, D), with one basis and colour range; the components' shares of the
    variance (3,); and the share of patches that are foreground."""
    x = np.concatenate([m.reshape(-1, m.shape[-1]) for m in maps])  # (n, D)
    inside = np.ones(len(x), bool)
    if foreground:
        mean, components, _ = fit_pca(x)
        inside = (x - mean) @ components[0] > 0
    pixels, shares = np.zeros((len(x), 3)), np.zeros(3)
    if inside.any():                                                # not so on a constant map
        mean, components, shares = fit_pca(x[inside])
        values = (x[inside] - mean) @ components.T                  # (n, 3)
        low, span = values.min(0), np.ptp(values, 0)
        pixels[inside] = np.where(span > 0, (values - low) / np.where(span > 0, span, 1), 0.5)
    ends = np.cumsum([m.shape[0] * m.shape[1] for m in maps])
    parts = np.split((255 * pixels).round().astype(np.uint8), ends[:-1])
    return [part.reshape(*m.shape[:2], 3) for part, m in zip(parts, maps, strict=True)], shares, inside.mean()


def pca(args):
    cell = share_width(args.width, 1 + len(args.weights))
    between = Image.Resampling.BILINEAR if args.smooth else Image.Resampling.NEAREST
    titles, rows, size = ["input"], None, args.size
    for path, label, model in open_models(args):
        titles.append(label)
        size = size or model.config.image_size
        images = open_images(args, size, model.config.patch_size)
        maps = [look(lambda m, x: m.features(x, [-1])[0].patches, model, image, path).astype(float)
                for _, image in images]
        rows = rows or [[(tile(image.permute(1, 2, 0).numpy(), cell), [fitted(name, SMALL, cell)])]
                        for name, image in images]
        for group in [range(len(maps))] if args.joint else [[i] for i in range(len(maps))]:
            pictures, shares, inside = pca_colours([maps[i] for i in group], args.foreground)
            print(f"{label}, {'all pictures' if args.joint else images[group[0]][0]}: explained variance "
                  + ", ".join(f"{share:.1%}" for share in shares)
                  + f" of the foreground, which is {inside:.1%} of the patches" * args.foreground)
            for i, picture in zip(group, pictures, strict=True):
                rows[i].append((Image.fromarray(picture).resize(rows[i][0][0].size, between), []))
    footer = ("First three principal components of the patches as red, green and blue, fitted "
              + ("to all pictures" if args.joint else "to each picture")
              + " (foreground only)" * args.foreground + ". Colours are not comparable between columns.")
    save(sheet(titles, rows, footer), args.out)


# ------------------------------------------------------------------------------------------- attention
def overlay(picture, weights):
    """The picture in grey, pale where the patch's weight (h, w) is exactly 0, else under the colour of weight / max."""
    grey = np.asarray(picture.convert("L"), float)[..., None]       # (height, width, 1)
    weights = np.asarray(Image.fromarray(weights).resize(picture.size, Image.Resampling.NEAREST))
    painted = 0.35 * grey + 0.65 * colour(weights / (weights.max() or 1))
    return Image.fromarray(np.where(weights[..., None] == 0, 150 + 0.4 * grey, painted).round().astype(np.uint8))


def attention(args):
    found, size = [], args.size
    for path, label, model in open_models(args):
        P, block = model.config.patch_size, model.index(args.block)
        size = size or model.config.image_size
        label += f", block {block} of 0 to {model.config.depth - 1}"
        for name, image in open_images(args, size, P):
            weights = look(lambda m, x, b=block: m.attention(x, b)[:, :, 0], model, image, path)        # (H, T)
            maps = weights[:, 1 + model.config.registers:].reshape(len(weights), -1, image.shape[2] // P)
            found.append((label, name, image.permute(1, 2, 0).numpy(), maps))
            for head, (row, m) in enumerate(zip(weights, maps, strict=True), 1):
                print(f"{label}, {name}, head {head}: weight 0 on {(m == 0).sum()} of {m.size} patches; of the whole "
                      f"weight {m.sum():.3f} is on patches, {row[0]:.3f} on [CLS] itself")
    titles = ["input"] + [f"head {head + 1}" for head in range(max(len(maps) for *_, maps in found))]
    cell = share_width(args.width, len(titles))
    rows = []
    for label, name, pixels, maps in found:
        picture = tile(pixels, cell)
        rows.append([(picture, [fitted(name, SMALL, cell)] + wrap(label.replace(", ", "\n"), SMALL, cell))])
        for m in maps:
            zeros = (m == 0).sum()
            lines = [f"{zeros / m.size:.0%} zeros, {zeros} of {m.size}", f"greatest {m.max():.2g}"]
            rows[-1].append((overlay(picture, m), lines))
    footer = ("Attention weights of [CLS] to the patches. Grey: exactly 0. Colour: from just above 0, dark, to the "
              "greatest weight of the head in the picture, yellow.")
    save(sheet(titles, rows, footer), args.out)


# ------------------------------------------------------------------------------------------- heatmap
METRICS = {
    "pib": "Point-in-box, %", "high_norm": "High-norm patches, %", "support": "Non-zero weights of a row",
    "to_cls": "Attention of patches to [CLS], %", "to_registers": "Attention of patches to registers, %",
    "cos_inside": "Cosine of [CLS] and patches in the box", "cos_outside": "Cosine of [CLS] and patches off the box",
    "miou": "mIoU, %, best evaluation", "miou_last": "mIoU, %, last evaluation",
    "auc_own": "Own card's class read from its patches, AUC, %",
    "auc_other": "Class of another card read from a card's patches, AUC, %",
    "auc_background": "Classes of cards read from background patches, AUC, %",
}


def read_result(path):
    """What a map needs of a result of pib.py or probe_seg.py, and its path."""
    try:
        content = json.loads(Path(path).read_text())
        result = {name: content[name] for name in ("probe", "data", "which", "epochs", "config", "protocol", "metrics")}
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}; give result JSONs of pib.py or probe_seg.py") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no result of a probe ({error}); give JSONs of pib.py or probe_seg.py") from error
    if result["probe"] not in ("pib", "seg"):
        raise ValueError(f"{path}: of probe {result['probe']}; give result JSONs of pib.py or probe_seg.py")
    if result["epochs"] is None:
        raise ValueError(f"{path}: its weights do not say after how many epochs; take checkpoints of train.py")
    recipe = {name: value for name, value in (content.get("recipe") or {}).items() if name not in result["config"]}
    return dict(result, path=path, run_seed=content.get("run_seed"), recipe=recipe)     # how it was trained


def check_same(results, free=()):
    """ValueError unless the results differ in the epoch, the seed of the run and what is `free` alone."""
    def deciding(result):
        nested = {f"{part} {name}": result[part][name] for part in ("protocol", "config", "recipe")
                  for name in result[part]}
        blocks = {head["block"] for head in result["metrics"].get("heads", [])}
        return {name: result[name] for name in ("probe", "data", "which")} | nested | {"blocks": sorted(blocks)}

    one, first = results[0]["path"], deciding(results[0])
    for result in results[1:]:
        other = deciding(result)
        for name in first | other:
            if first.get(name) != other.get(name) and name not in free:
                raise ValueError(f"{result['path']}: {name} is {other.get(name)}, and {first.get(name)} in {one}; "
                                 "a map is of one protocol" + " and method" * (not free))


def read_runs(paths):
    """(results, epochs, seeds) of the runs of one method: a result for every epoch and seed, in this order."""
    results = sorted(map(read_result, paths), key=lambda result: (result["epochs"], str(result["run_seed"])))
    check_same(results)
    keys = [(result["epochs"], result["run_seed"]) for result in results]
    for a, b, (epochs, seed) in zip(results, results[1:], keys, strict=False):
        if (b["epochs"], b["run_seed"]) == (epochs, seed):
            raise ValueError(f"{b['path']}: run_seed {seed} after {counted(epochs, 'epoch')}, as {a['path']}; take one")
    epochs, seeds = (list(dict.fromkeys(part)) for part in zip(*keys, strict=True))
    if missing := [f"run_seed {s} after {counted(e, 'epoch')}" for e in epochs for s in seeds if (e, s) not in keys]:
        raise ValueError(f"{results[0]['path']}: beside it is no {', '.join(missing)}; give every seed the same epochs")
    return results, epochs, seeds


def block_values(result, metric, concat_cls):
    """{0-based block: value}, NaN where it could not be measured; of several values, as of the heads, the mean."""
    if result["probe"] == "pib":
        found = {name: dict(enumerate(value)) for name, value in result["metrics"].items() if isinstance(value, list)}
    else:
        heads = [head for head in result["metrics"]["heads"] if head["concat_cls"] == (concat_cls == "yes")]
        if not heads:
            raise ValueError(f"{result['path']}: no heads with --concat-cls {concat_cls}; give the other value")
        found = {name: {head["block"]: head[name] for head in heads} for name in heads[0]}
    if metric not in found:
        raise ValueError(f"{result['path']}: no {metric} by block; give --metric one of {', '.join(sorted(found))}")
    return {block: np.array(value, float).mean() for block, value in found[metric].items()}


def heatmap(args):
    results, epochs, seeds = read_runs(args.results)
    one, others = results[0], []
    metric, concat = args.metric or {"pib": "pib", "seg": "miou"}[one["probe"]], args.concat_cls or "no"
    if args.concat_cls and one["probe"] == "pib":
        raise ValueError(f"{one['path']}: of pib.py; --concat-cls chooses between heads of probe_seg.py")
    if args.minus:
        others, other_epochs, other_seeds = read_runs(args.minus)
        check_same([one, others[0]], ["config attn", "config registers", "config specialize"])
        seeds = [seed for seed in seeds if seed in other_seeds and seed is not None]
        if epochs != other_epochs or not seeds:
            raise ValueError(f"{others[0]['path']}: epochs {other_epochs}, of {one['path']} {epochs}, run_seed of both "
                             f"{seeds}; a difference is of equal epochs and seeds")
    columns = [block_values(result, metric, concat) for result in results + others if result["run_seed"] in seeds]
    blocks = sorted(columns[0])
    values = np.array([[c[b] for b in blocks] for c in columns]).reshape(-1, len(epochs), len(seeds), len(blocks))
    values = (values[0] - values[1] if others else values[0]).transpose(1, 2, 0)    # (seeds, blocks, epochs)
    stars = abs(np.sign(values).sum(0)) == max(2, len(seeds)) if others else None
    values = values.mean(0)
    if np.isnan(values).all():
        raise ValueError(f"{one['path']}: {metric} could not be measured for any block; take another --metric")
    names = [describe(vit.ViTConfig(**first["config"])) for first in [one] + others[:1]]
    names = " - ".join(f"({name})" if others and "+" in name else name for name in names)
    title = f"{METRICS.get(metric, metric)}; {one['data']}, {names}"
    if len(seeds) > 1:
        title += f", mean of {len(seeds)} seeds"
        title += f" (*: all of one sign, by chance 1 in {2 ** len(seeds) // 2})" * bool(others)
    title += (", head on patches" + " and [CLS]" * (concat == "yes")) * (one["probe"] == "seg")
    if metric == "pib" and not others:
        title += f"; chance {one['metrics']['chance']:.1f} %, {counted(one['metrics']['n'], 'image')}"
    elif metric.startswith("auc_") and not others:
        title += "; chance 50 %"
    high = np.nanmax(abs(values)) or 1.0
    low, high = args.range or ((-high, high) if others else (np.nanmin(values), np.nanmax(values)))
    save(draw_map(values, blocks, epochs, title, low, high, args.width, stars), args.out)


def draw_map(values, blocks, epochs, title, low, high, width, stars=None):
    """(blocks, epochs) values, the first block at the bottom, in the colours of a bar from `low` to `high`."""
    table, sign = (VIRIDIS, "") if stars is None else (RED_BLUE, "+")   # of differences: which to mark
    left, right, row = 58, 84, 34
    cell = (width - left - right) // len(epochs)
    if cell < 16:
        raise ValueError(f"--width {width}: too narrow for {counted(len(epochs), 'epoch')}; give {len(epochs) * 60}")
    width, height = left + cell * len(epochs) + right, row * len(blocks)
    lines = wrap(title, TEXT, width - 2 * GAP)
    top = len(lines) * (TEXT + 5) + 2 * GAP
    canvas = Image.new("RGB", (width, top + height + 48), "white")
    pen, decimals = ImageDraw.Draw(canvas), 1 if max(abs(low), abs(high)) >= 10 else 2
    for i, line in enumerate(lines):
        write(canvas, width // 2, GAP + i * (TEXT + 5), line, anchor="ma")
    unmeasured = np.isnan(values)
    fills = colour(np.where(unmeasured, 0, (values - low) / ((high - low) or 1)), table)
    fills[unmeasured] = RULE
    for r, block in enumerate(blocks):
        y = top + height - (r + 1) * row
        write(canvas, left - 8, y + row // 2, str(block), anchor="rm")
        for c, fill in enumerate(fills[r]):
            x, text = left + c * cell, "-" if unmeasured[r, c] else f"{values[r, c]:{sign}.{decimals}f}"
            text += "*" * bool(stars is not None and stars[r, c])
            pen.rectangle((x, y, x + cell - 2, y + row - 2), tuple(fill.tolist()))
            ink = "white" if fill @ (0.299, 0.587, 0.114) < 105 else "black"        # luma, ITU-R BT.601
            write(canvas, x + cell // 2 - 1, y + row // 2 - 1, text, min(TEXT, cell // (4 if sign else 3)), "mm", ink)
    for c, epoch in enumerate(epochs):
        write(canvas, left + c * cell + cell // 2, top + height + 4, str(epoch), min(TEXT, cell // 2), "ma")
    write(canvas, left + cell * len(epochs) // 2, top + height + 24, "epochs of pretraining", anchor="ma")
    upright = Image.new("RGB", (60, TEXT + 6), "white")
    write(upright, 30, 0, "block", anchor="ma")
    canvas.paste(upright.rotate(90, expand=True), (8, top + height // 2 - 30))

    bar, last = width - right + 16, height - 2                      # as high as the cells
    canvas.paste(Image.fromarray(np.repeat(colour(np.linspace(1, 0, last + 1), table)[:, None], 16, 1)), (bar, top))
    for share in (0, 0.5, 1) if len(blocks) > 1 else (0, 1):
        label = f"{low + share * (high - low):.{decimals}f}"
        write(canvas, bar + 21, top + (1 - share) * last, label, SMALL, "lm")
    return canvas


# ------------------------------------------------------------------------------------------- curves
KEYS = {
    "loss": "loss, nats", "entropy": "entropy of the teacher, nats", "kl": "KL(teacher || student), nats",
    "support": "share of attention weights that are not 0, last block",
}


def read_log(run):
    """Records of log.jsonl, without the first, on where the run took place, which has no epoch."""
    path = Path(run, "log.jsonl") if Path(run).is_dir() else Path(run)
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}; give run folders of train.py or their log.jsonl") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number < len(lines):                                 # the last may be cut short, or half written
                raise ValueError(f"{path}: line {number} is no JSON ({error}); give a train.py log") from error
        else:
            records += [record] if "epoch" in record else []
    if not records:
        raise ValueError(f"{path}: no log records; leave the run out, or wait for its first")
    return records


def ticks(low, high):
    """Multiples of 1, 2 or 5 x 10^k from at or below `low` to at or above `high`, in three to six steps."""
    about = ((high - low) or abs(high) or 1) / 5
    power = 10 ** math.floor(math.log10(about))
    step = next(m * power for m in (1, 2, 5, 10) if m * power > about * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def draw_panel(canvas, box, title, lines):
    """A frame `box` = (left, top, right, bottom) with axes, and a line with a dot at its end through each of the
    [(epoch, value), ...]."""
    left, top, right, bottom = box
    pen = ImageDraw.Draw(canvas)
    points = [point for line in lines for point in line]
    across, up = (ticks(min(values), max(values)) for values in zip(*points, strict=True))

    def place(x, y):
        return (left + (x - across[0]) / (across[-1] - across[0]) * (right - left),
                bottom - (y - up[0]) / (up[-1] - up[0]) * (bottom - top))

    for value in up:
        y = round(place(across[0], value)[1])
        pen.line((left, y, right, y), RULE)
        write(canvas, left - 5, y, f"{value:.6g}", SMALL, "rm")
    for value in across:
        x = round(place(value, up[0])[0])
        pen.line((x, top, x, bottom), RULE)
        write(canvas, x, bottom + 4, f"{value:.6g}", SMALL, "ma")
    pen.rectangle(box, outline=GREY)
    write(canvas, left, top - 20, title)
    write(canvas, (left + right) // 2, bottom + 18, "epoch", SMALL, "ma")
    fine, rim = 4, 4                                                # Pillow's lines have steps: draw large, shrink
    for line, fill in zip(lines, LINES, strict=False):
        points = [((x - left + rim + 0.5) * fine, (y - top + rim + 0.5) * fine) for x, y in (place(*p) for p in line)]
        mask = Image.new("L", ((right - left + 2 * rim + 1) * fine, (bottom - top + 2 * rim + 1) * fine))
        if points:                                                  # not every run has this key
            ImageDraw.Draw(mask).line(points, 255, 2 * fine, "curve")
            ImageDraw.Draw(mask).circle(points[-1], 3 * fine, 255)
        canvas.paste(fill, (left - rim, top - rim), mask.reduce(fine))


def curves(args):
    paths = [Path(os.path.abspath(run)) for run in args.runs]
    folders = [path.parent.name if path.is_file() else path.name for path in paths]
    names = args.labels or (folders if len(set(folders)) == len(folders) else args.runs)
    logs, panels = [read_log(run) for run in args.runs], []
    for key in args.keys:
        lines = [[(r["epoch"], r[key]) for r in log if math.isfinite(r.get(key, math.nan))] for log in logs]
        if not any(lines):
            known = sorted({name for log in logs for record in log for name in record} - {"epoch"})
            raise ValueError(f"{', '.join(args.runs)}: no finite {key}; give --keys of {', '.join(known)}")
        panels.append((KEYS.get(key, key), lines))
        for name, log, line in zip(names, logs, lines, strict=True):
            if len(line) < len(log):
                print(f"{name}: {len(log) - len(line)} of {counted(len(log), 'record')} without a finite {key}")

    legend, x, y = [], GAP, 2 * GAP
    for name in names:
        length = round(font(TEXT).getlength(name)) + 46
        if x > GAP and x + length > args.width:
            x, y = GAP, y + TEXT + GAP
        legend.append((x, y))
        x += length
    top, columns, row = y + TEXT + 4 * GAP, min(2, len(panels)), 236
    cell = args.width // columns
    canvas = Image.new("RGB", (args.width, top + math.ceil(len(panels) / columns) * row - 20), "white")
    for (x, y), name, fill in zip(legend, names, LINES, strict=False):
        ImageDraw.Draw(canvas).line((x, y + 8, x + 20, y + 8), fill, 3)
        write(canvas, x + 26, y, name)
    for i, (title, lines) in enumerate(panels):
        left, upper = i % columns * cell, top + i // columns * row
        draw_panel(canvas, (left + 54, upper + 8, left + cell - 18, upper + row - 62), title, lines)
    save(canvas, args.out)


# ------------------------------------------------------------------------------------------- models and pictures
def open_models(args):
    """(path, label, frozen model) of every --weights, one at a time."""
    for i, path in enumerate(args.weights):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, facts = checkpoint.open_weights(path, args.which, args.like, args.seed, device, args.heads)
        epochs = facts["epochs"]
        age = Path(path).stem if epochs is None else counted(epochs, "epoch") if epochs else "untrained"
        yield path, args.labels[i] if args.labels else f"{describe(model.config)}, {age}", model


def describe(config):
    """'entmax15 + 4 registers + specialize'"""
    registers = f" + {counted(config.registers, 'register')}" * (config.registers > 0)
    return config.attn + registers + " + specialize" * config.specialize


def whole_patches(width, height, size, patch):
    """(width, height) with the short side scaled to `size`, then both to the nearest whole patches, at least one."""
    scale = size / min(width, height) / patch
    return max(1, round(width * scale)) * patch, max(1, round(height * scale)) * patch


def list_pictures(images, count):
    """[(name, path)] of files, and of `count` pictures of every folder: spread over its sorted paths, or they would
    mostly be of its first class."""
    pictures = []
    for path in images:
        files = data.list_images(path)[0] if os.path.isdir(path) else [path]
        if not files:
            raise ValueError(f"{path}: holds no picture ({' '.join(vit.SUFFIXES)})")
        for i in checkpoint.spread(len(files), count):
            name = os.path.relpath(files[i], path) if os.path.isdir(path) else os.path.basename(path)
            pictures.append((" ".join(checkpoint.printable(name).split()), files[i]))
    return pictures


def open_images(args, size, patch):
    """[(name, uint8 (3, height, width))], both sides in whole patches."""
    if args.data == "shapes":
        scenes = Shapes("val", whole_patches(1, 1, size, patch)[0], args.count)
        return [(f"scene {i}", scenes[i]["image"]) for i in range(args.count)]
    images = []
    for name, path in args.images:
        picture = vit.read_image(path)
        picture = picture.resize(whole_patches(*picture.size, size, patch), Image.Resampling.BICUBIC)
        images.append((name, torch.from_numpy(np.array(picture)).permute(2, 0, 1)))
    return images


@torch.inference_mode()
def look(function, model, image, path):
    """Numpy array of what `function(model, normalised images)` says of one uint8 image: alone, so that it depends on
    no other."""
    values = function(model, vit.normalize(image[None].to(model.cls_token.device)))[0]
    if not values.isfinite().all():
        raise ValueError(f"{path}: its features are not finite; the weights are damaged")
    return values.cpu().numpy()


# ------------------------------------------------------------------------------------------- drawing
VIRIDIS = np.array([                                                # van der Walt & Smith 2015, in eighths
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
    (170, 220, 50), (253, 231, 37)], float)
RED_BLUE = np.array([(202, 0, 32), (244, 165, 130), (247, 247, 247), (146, 197, 222), (5, 113, 176)], float)  # Brewer
LINES = [                                                           # Okabe & Ito 2008: colour-blind people see eight
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (0, 0, 0),
    (150, 150, 150)]
GREY, RULE = (110, 110, 110), (225, 225, 225)
TEXT, SMALL, GAP = 14, 12, 6                                        # pixels


@functools.cache
def font(size):
    return ImageFont.load_default(size)


def counted(number, noun):
    """'1 epoch', '1,234 images'"""
    return f"{number:,} {noun}" + "s" * (number != 1)


def write(canvas, x, y, text, size=TEXT, anchor="la", fill="black"):
    ImageDraw.Draw(canvas).text((x, y), checkpoint.printable(text), fill, font(size), anchor)


def wrap(text, size, width):
    """Lines of whole words, at most `width` pixels wide unless a word is wider; line breaks in the text are kept."""
    lines = []
    for part in text.split("\n"):
        lines.append("")
        for word in part.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and font(size).getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    return lines


def fitted(text, size, width):
    """The text, or its end, which tells files apart, where all of it would be wider than `width` pixels."""
    start = next((i for i in range(len(text)) if font(size).getlength(".." * (i > 0) + text[i:]) <= width), len(text))
    return ".." * (start > 0) + text[start:]


def colour(share, table=VIRIDIS):
    """uint8 (..., 3) of the table at shares (...); its ends below 0 and above 1."""
    place = np.linspace(0, 1, len(table))
    return np.stack([np.interp(share, place, c) for c in table.T], -1).round().astype(np.uint8)


def share_width(width, columns):
    """Pixels of one of the columns of a sheet."""
    cell = (width - GAP) // columns - GAP
    if cell < 16:
        raise ValueError(f"--width {width}: too narrow for {columns} columns; give {columns * 60}, or fewer columns")
    return cell


def tile(pixels, width):
    """uint8 (h, w, 3) as a picture `width` pixels wide."""
    height = max(1, round(width * pixels.shape[0] / pixels.shape[1]))
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def sheet(titles, rows, footer):
    """Rows of (picture, lines of text below it), one for each of the titles above; all pictures are equally wide."""
    cell, line = rows[0][0][0].width, TEXT + 4
    titles = [wrap(title.replace(", ", "\n"), TEXT, cell) for title in titles]
    width, y = GAP + len(titles) * (cell + GAP), GAP + max(map(len, titles)) * line
    footer = wrap(footer, SMALL, width - 2 * GAP)
    heights = [max(picture.height + len(lines) * line + GAP for picture, lines in row) for row in rows]
    canvas = Image.new("RGB", (width, y + sum(heights) + len(footer) * line + GAP), "white")
    left = range(GAP, width, cell + GAP)
    for x, lines in zip(left, titles, strict=True):
        for i, text in enumerate(reversed(lines), 1):
            write(canvas, x + cell // 2, y - i * line, text, anchor="ma")
    for row, height in zip(rows, heights, strict=True):
        for x, (picture, lines) in zip(left, row, strict=False):    # a model with fewer heads has fewer pictures
            canvas.paste(picture, (x, y))
            for i, text in enumerate(lines):
                write(canvas, x, y + picture.height + 2 + i * line, text, SMALL, fill=GREY)
        y += height
    for i, text in enumerate(footer):
        write(canvas, GAP, y + i * line, text, SMALL, fill=GREY)
    return canvas


def save(canvas, out):
    checkpoint.room_for(out)
    checkpoint.write_whole(out, lambda file: canvas.save(file, "PNG", optimize=True))
    print(f"{out}: {canvas.width} x {canvas.height} pixels, {os.path.getsize(out) / 1000:.0f} kB")


# ------------------------------------------------------------------------------------------- command line
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = p.add_subparsers(dest="command", required=True)
    about = {
        "pca": "a row per picture: input, then for every checkpoint the PCA of its patches as RGB, with colours that "
               "are not comparable between columns",
        "attention": "a row per checkpoint and picture: input, then the [CLS] row of every head, grey where exactly 0",
        "heatmap": "block x epoch from results of pib.py or probe_seg.py, one per checkpoint; mean over runs",
        "curves": "log.jsonl of several runs, a panel per key",
    }
    subs = {name: commands.add_parser(name, help=text, description=text, allow_abbrev=False,
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
            for name, text in about.items()}
    for name in ("pca", "attention"):
        sub = subs[name]
        # weights
        sub.add_argument("--weights", nargs="+", required=True, metavar="FILE", help="checkpoints of train.py, "
                         "official DINO files, a run folder (its numbered files), or random")
        sub.add_argument("--labels", nargs="+", help="one for each checkpoint; default: method and epochs")
        sub.add_argument("--which", choices=["teacher", "student"], default="teacher", help="DINO shows the teacher")
        sub.add_argument("--like", help="checkpoint whose architecture --weights random takes; default ViT-S/16")
        sub.add_argument("--seed", type=int, default=0, help="of --weights random")
        sub.add_argument("--heads", type=int, help="attention heads, of a file that does not say; default width / 64, "
                         "as in DINO")
        # pictures
        source = sub.add_mutually_exclusive_group(required=True)
        source.add_argument("--images", nargs="+", metavar="FILE", help="pictures, or folders of them")
        source.add_argument("--data", choices=["shapes"], help="the first --count embedded val scenes")
        sub.add_argument("--count", type=int, help="scenes of --data shapes, or pictures of each folder, "
                         "spread over it; default 4")
        sub.add_argument("--size", type=int, help="short side of the model's input in pixels; both sides go to the "
                         "nearest whole patches; default: what the first checkpoint was trained on")
    subs["pca"].add_argument("--joint", action="store_true", help="one basis and colour range over all pictures")
    subs["pca"].add_argument("--foreground", action="store_true", help="second PCA, of the patches above 0 on the "
                             "first component; by its sign rule mostly the smaller side")
    subs["pca"].add_argument("--smooth", action="store_true", help="bilinear between patches")
    subs["attention"].add_argument("--block", type=int, default=-1, help="0-based, -1 is the last")
    subs["heatmap"].add_argument("--results", nargs="+", required=True, metavar="JSON", help="of runs of one method")
    subs["heatmap"].add_argument("--minus", nargs="+", metavar="JSON", help="of another method, to subtract by seed")
    subs["heatmap"].add_argument("--metric", help="default: pib or miou")
    subs["heatmap"].add_argument("--concat-cls", choices=["no", "yes"], help="heads of probe_seg.py; default no")
    subs["heatmap"].add_argument("--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of the colours, the "
                                 "same for maps that are to be compared; default: of the values")
    subs["curves"].add_argument("--runs", nargs="+", required=True, metavar="RUN", help="folders, or log.jsonl files")
    subs["curves"].add_argument("--keys", nargs="+", default=["loss", "entropy", "kl", "support"], help="of log.jsonl")
    subs["curves"].add_argument("--labels", nargs="+", help="one for each run; default: the folder's name")
    for name, sub in subs.items():
        sub.add_argument("--width", type=int, default=800, help="of the PNG at most, in pixels")
        sub.add_argument("--out", default=f"{name}.png", help="PNG to write")
    args = p.parse_args(argv)
    check_args(subs[args.command], args)
    return args


def check_args(p, args):
    """Refuse what cannot run, in one line and before anything is written; fill in what follows from other values."""
    if args.width < 300:
        p.error(f"--width {args.width}: must be at least 300")
    if args.command == "heatmap":
        if args.range and (not args.range[0] < args.range[1] or args.minus and sum(args.range)):
            p.error(f"--range {args.range[0]:g} {args.range[1]:g}: the first must be the lower one"
                    + ", and with --minus the negative of the second" * bool(args.minus))
        return
    if args.command == "curves":
        if len(args.runs) > len(LINES):
            p.error(f"--runs {len(args.runs)}: there are only {len(LINES)} colours")
    else:
        if args.like and "random" not in args.weights:
            p.error("--like goes with --weights random: a checkpoint brings its own architecture")
        if args.images and args.count is not None and not any(map(os.path.isdir, args.images)):
            p.error("--count goes with --data shapes or a folder; all files of --images are drawn")
        args.count = 4 if args.count is None else args.count
        for name in ("count", "size", "heads"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                p.error(f"--{name} {getattr(args, name)}: must be at least 1")
        if not 0 <= args.seed < 2**63:
            p.error(f"--seed {args.seed}: must be at least 0 and below 2^63")
        try:
            args.weights = checkpoint.list_checkpoints(args.weights)
            args.images = args.images and list_pictures(args.images, args.count)
        except (OSError, ValueError) as error:
            sys.exit(str(error))
    labelled = args.runs if args.command == "curves" else args.weights
    if args.labels and len(args.labels) != len(labelled):
        p.error(f"--labels {len(args.labels)}: needs {len(labelled)}, one for each of {', '.join(labelled)}")


COMMANDS = {"pca": pca, "attention": attention, "heatmap": heatmap, "curves": curves}


def main(argv=None):
    checkpoint.print_any_path()
    args = parse_args(argv)
    with checkpoint.one_line(args.out):
        COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
