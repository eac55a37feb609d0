"""Segmentation probe: mIoU of a linear classifier on the frozen patch features, of any blocks, with or without [CLS].

    python probe_seg.py --weights runs/shapes_entmax15_s0/checkpoint.pt
    python probe_seg.py --weights random --like runs/shapes_entmax15_s0/checkpoint.pt       the untrained control
    python probe_seg.py --weights dino_deitsmall16_pretrain.pth --data voc --root DIR       DIR holds VOCdevkit/
    python probe_seg.py --weights RUN_FOLDER --data voc --root DIR --blocks all --concat-cls both           Fig. 2b

The protocol of DINOv2 (Oquab et al. 2024), which the paper follows, without mmsegmentation: BatchNorm and a 1x1
convolution on the patches after the final norm, 40,000 iterations of 16 crops of 512 px, AdamW, sliding windows; mIoU
at the labels' own resolution, best over the evaluations of the training, and last.
The last line printed is the result as JSON, also written to --out; an interrupted probe goes on where it was saved.

    B images, D width, C classes, K heads = S head seeds x (blocks, with and without [CLS]), E evaluations
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset

import checkpoint
import vit
from shapes import FINGERPRINT, Shapes

# What --data selects, and what is in it. Shapes are not augmented: one frozen forward is kept, the heads train on it,
# until they have converged: twice the iterations change the mIoU by less than the head's seed does (+0.11 and -0.03
# points, sd of three seeds 0.17 and 0.34; 1,000 give 0.5 less). Chosen on one untrained and one softmax network alone.
PAPER = dict(iters=40_000, batch_size=16, lr=1e-3, evaluations=8, crop=512, save_every=1000, log_every=100,
             workers=min(10, os.cpu_count() or 1))
RECIPES = {                                                         # aspect: at most so many short sides long
    "voc": dict(PAPER, short_side=512, aspect=4, classes=21, train=1_464, val=1_449),
    "ade20k": dict(PAPER, short_side=512, aspect=math.inf, classes=150, train=20_210, val=2_000),
    "cityscapes": dict(PAPER, short_side=1024, aspect=2, classes=19, train=2_975, val=500),
    "shapes": dict(iters=2_000, batch_size=16, lr=3e-2, evaluations=1, workers=0, save_every=1000, log_every=500,
                   classes=11, train=1_000, val=500),
}
CARDS, COARSE = 5, 4            # shapes: at most in a scene; labels of training are rendered at a quarter of the side
STRIDE = 341 / 512                                                  # of a window
WEIGHT_DECAY = 1e-4
WARMUP = 1_500 / 40_000                                             # share of the iterations
IGNORE = 255                                                        # label of pixels that count nowhere
PALETTE = np.array([[sum((k >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3)]
                    for k in range(256)], np.uint8)                 # colours of PASCAL VOC
ORDER, CROP = range(2)                                              # streams of random numbers


# ------------------------------------------------------------------------------------------- what the probe computes
class Head(nn.Module):
    """BatchNorm and 1x1 convolution on the patches of one block, each beside the block's [CLS] if `concat_cls`."""

    def __init__(self, block, concat_cls, seed, dim, classes):
        super().__init__()
        self.block, self.concat_cls = block, concat_cls
        self.norm = nn.BatchNorm2d(dim * (1 + concat_cls))
        self.conv = nn.Conv2d(dim * (1 + concat_cls), classes, 1)
        nn.init.normal_(self.conv.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.conv.bias)

    def forward(self, features):                                    # -> (B, C, h, w)
        cls, patches = features[self.block]
        if self.concat_cls:
            beside = cls[..., None, None].expand_as(patches)
            # channels last in memory, as the model gives them: twice as fast as what cat makes of an expanded tensor
            patches = torch.cat([x.permute(0, 2, 3, 1) for x in (patches, beside)], -1).permute(0, 3, 1, 2)
        return self.conv(self.norm(patches))


def resize(x, size):
    """(B, C, h, w) to `size`; uint8 as OpenCV's bilinear does it: four neighbours, also where it shrinks."""
    return F.interpolate(x, size, mode="bilinear")


def pixel_loss(logits, labels):
    """Cross-entropy, divided by the number of all pixels, also of those without a label, as in mmsegmentation."""
    logits = resize(logits, labels.shape[-2:])
    return F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="sum") / labels.numel()


def learning_rate(t, args):
    """Of iteration t (0-based): linear from the recipe's lr to 0, times a linear warm-up from 1e-6."""
    warmup = round(args.iters * WARMUP)
    ramp = 1 - (1 - t / warmup) * (1 - 1e-6) if t < warmup else 1
    return args.lr * (1 - t / args.iters) * ramp


def windows(height, width, crop, stride):
    """Top left corners of the sliding windows; those that would pass the lower or right edge are moved back to it."""
    def starts(side):
        n = max(side - crop + stride - 1, 0) // stride + 1
        return [max(min(i * stride, side - crop), 0) for i in range(n)]
    return [(top, left) for top in starts(height) for left in starts(width)]


@torch.no_grad()
def predict(head, features, corners, window_size, size, label_size):
    """(B, H, W) classes of pictures of (h, w) = `size`: logits of the n windows added up, divided by how many cover a
    pixel, resized to the labels' (H, W), argmax."""
    logits, (height, width) = head(features).unflatten(0, (len(corners), -1)), window_size      # (n, B, C, h', w')
    total, count = logits.new_zeros(*logits.shape[1:3], *size), logits.new_zeros(size)
    for (top, left), window in zip(corners, logits, strict=True):
        total[..., top:top + height, left:left + width] += resize(window, window_size)
        count[top:top + height, left:left + width] += 1
    return resize(total / count, label_size).argmax(1)


def confusion_matrices(heads, views):
    """(K, C, C) numbers of pixels by label and prediction over all of val_views."""
    heads.eval()
    C = heads[0].conv.out_channels
    confusion = torch.zeros(len(heads), C, C, dtype=torch.int64, device=heads[0].conv.weight.device)
    for images, labels, corners, window_size, features in views:
        labelled = labels != IGNORE
        rows = C * labels[labelled].long()
        for k, head in enumerate(heads):
            predicted = predict(head, features, corners, window_size, images.shape[2:], labels.shape[1:])
            confusion[k] += torch.bincount(rows + predicted[labelled], minlength=C * C).view(C, C)
    heads.train()
    return confusion.cpu()


def iou(confusion):
    """(..., C) percent, of pixel counts (..., C, C); nan for a class that is neither a label nor predicted."""
    hits = confusion.diagonal(dim1=-2, dim2=-1).double()
    return 100 * hits / (confusion.sum(-1) + confusion.sum(-2) - hits)


def constant_miou(confusion):
    """mIoU, in percent, of predicting the most frequent class everywhere."""
    pixels = confusion.sum(-1)                                      # (C,) of labels
    return 100 * (pixels.max() / pixels.sum() / (pixels > 0).sum()).item()


# ------------------------------------------------------------------------------------------- frozen features, training
@torch.no_grad()                                                    # inference tensors could not enter a backward
def frozen(model, images, blocks, args):
    """{block: ([CLS] (B, D), patches (B, D, h, w))} float32, after the final norm, of normalised (B, 3, H, W)."""
    outputs = {block: [] for block in blocks}
    for part in vit.pad_to_patches(images, model.config.patch_size).split(args.batch_size):
        with checkpoint.autocast(images.device, args.amp):
            for block, output in zip(blocks, model.features(part, blocks), strict=True):
                outputs[block].append((output.cls.float(), output.patches.float().permute(0, 3, 1, 2)))
    return {block: tuple(map(torch.cat, zip(*parts, strict=True))) for block, parts in outputs.items()}


def train_step(heads, optimizer, batch, t, args):
    """Iteration t of every head; returns the mean of their losses."""
    optimizer.param_groups[0]["lr"] = learning_rate(t, args)
    (features, labels), total = batch, 0
    for head in heads:                                              # one at a time: full-size logits are large
        loss = pixel_loss(head(features), labels)
        loss.backward()
        total = total + loss.detach() / len(heads)
    optimizer.step(); optimizer.zero_grad()
    return total


def train_heads(model, train, val, heads, args, device, file, stamp):
    """[{iteration, iou (K, C), constant}] of the evaluations in --iters iterations. Goes on from `file` if it is
    there; `stamp`: all that the heads depend on."""
    blocks = sorted({head.block for head in heads})
    optimizer = torch.optim.AdamW(heads.parameters(), weight_decay=WEIGHT_DECAY)
    start, history = checkpoint.resume_heads(file, stamp, heads, optimizer)
    evaluated = history[-1]["iteration"] if history else 0
    if args.data == "shapes" and evaluated < args.iters:            # no augmentation: features are computed once
        x, y = (torch.stack(part).to(device) for part in zip(*((s["image"], s["mask"]) for s in train), strict=True))
        parts = [frozen(model, vit.normalize(part), blocks, args) for part in
                 checkpoint.progress.of(x.split(args.batch_size), f"features of {len(x):,} images, batch")]
        train = {block: tuple(map(torch.cat, zip(*(part[block] for part in parts), strict=True)))
                 for block in blocks}, y
        val = list(val_views(model, val, blocks, args, device))
    total, logged, eta = 0, start, checkpoint.Eta(start, args.iters)

    def due(done, every):
        return done % every == 0 or done == args.iters

    def save(done):
        checkpoint.write_checkpoint(file, dict(iteration=done, stamp=stamp, heads=heads.state_dict(),
                                               optimizer=optimizer.state_dict(), history=history))

    stream = batches(model, train, blocks, args, device, start)     # ends before its workers are ended
    with checkpoint.noted_signals() as asked, contextlib.closing(stream):
        for done in range(start, args.iters + 1):
            if done > start:
                total = total + train_step(heads, optimizer, next(stream), done - 1, args)
            logs = done > start and (due(done, args.log_every) or done - start in (1, 10))  # soon, then now and then
            evaluates = done > evaluated and due(done, args.eval_every)
            saves = evaluates or done > start and due(done, args.save_every)
            if (logs or saves or asked) and not math.isfinite(total):
                raise ValueError(f"{file}: the loss is not finite at iteration {done:,}, which is not saved: features "
                                 f"overflow with --amp {args.amp}, or the heads diverge")
            if logs:
                line = f"{eta(done)}  loss {total / (done - logged):.4f}  iteration {done:,}/{args.iters:,}"
                checkpoint.progress.show(line, stays=evaluates or done == args.iters)
                total, logged = 0, done
            if evaluates:
                save(done)                                          # the evaluation may be cut
                views = val if args.data == "shapes" else val_views(model, val, blocks, args, device)
                confusion = confusion_matrices(heads, checkpoint.until_asked(asked, views))
                history.append(dict(iteration=done, iou=iou(confusion), constant=constant_miou(confusion[0])))
                miou = history[-1]["iou"][0].nanmean()
                checkpoint.progress.say(f"iteration {done:,}/{args.iters:,}  mIoU {miou:.2f}")
            ending = asked[:1]                                      # a signal that comes after this counts next time
            if saves or ending:
                save(done)
            if ending:
                checkpoint.leave(ending, f"after iteration {done:,}")
    return history


def batches(model, train, blocks, args, device, start):
    """(features, labels (B, S, S)) from iteration `start` on. `train`: images, or (features, labels) of all of them
    where there is no augmentation."""
    if isinstance(train, tuple):
        for keys in batch_order(len(train[1]), args, start):
            i = [i for _, i in keys]
            yield {block: (cls[i], patches[i]) for block, (cls, patches) in train[0].items()}, train[1][i]
        return
    crops, order = TrainCrops(train, args.crop, args.seed), batch_order(len(train), args, start)
    for x, y in DataLoader(crops, batch_sampler=order, num_workers=args.workers, pin_memory=device.type == "cuda",
                           worker_init_fn=checkpoint.deaf_worker):
        yield frozen(model, x.to(device, non_blocking=True), blocks, args), y.to(device, non_blocking=True)


def val_views(model, val, blocks, args, device):
    """(pictures (B, 3, h, w), labels (B, H, W), corners and size of their n windows, features of the n B windows)."""
    size = 100 if args.data == "shapes" else 1                      # pictures of one size can go together
    loader = DataLoader(val, size, num_workers=args.workers, worker_init_fn=checkpoint.deaf_worker)
    for batch in checkpoint.progress.of(loader, f"evaluation of {len(val):,} pictures, batch"):
        x = vit.normalize(batch["image"].to(device))
        crop = args.crop or max(x.shape[2:])
        corners = windows(*x.shape[2:], crop, args.stride or crop)
        views = [x[..., top:top + crop, left:left + crop] for top, left in corners]
        features = frozen(model, torch.cat(views), blocks, args)
        yield batch["image"], batch["mask"].to(device), corners, views[0].shape[2:], features


# ------------------------------------------------------------------------------------------- data
def fit(height, width, long, short):
    """(height, width) with the sides' ratio kept and as large as a long and a short side allow."""
    factor = min(long / max(height, width), short / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


class LabelledPictures:
    """Item for evaluation: dict(image uint8 (3, h, w), resized; mask uint8 (H, W), classes at the size on disk)."""

    def __init__(self, pairs, args):
        self.pairs, self.data = pairs, args.data
        self.table, self.classes = label_table(args.data), args.classes
        self.sides = args.aspect * args.short_side, args.short_side

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        image, label = self.read(i)
        return dict(image=resize(image[None], fit(*label.shape, *self.sides))[0], mask=label)

    def read(self, i):
        """Picture and classes as large as they are on disk."""
        picture, mask = self.pairs[i]
        image, numbers = np.array(vit.read_image(picture)), self.label_numbers(mask)
        if numbers.shape != image.shape[:2]:
            sizes = [f"{x.shape[1]} x {x.shape[0]}" for x in (numbers, image)]
            raise ValueError(f"{mask}: {sizes[0]} pixels, but {picture} has {sizes[1]}; they must be equal")
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(self.table[numbers])

    def label_numbers(self, mask):
        """What a label file holds, uint8 (H, W)."""
        try:
            with Image.open(mask) as image:
                if image.mode not in ("P", "L"):
                    raise ValueError(f"mode {image.mode}; labels are 8-bit class numbers, mode P or L")
                numbers = np.array(image)                           # of a palette image: no colours
        except Exception as error:                                  # Pillow raises half a dozen types, mostly unnamed
            raise ValueError(f"{mask}: unreadable ({error}); mend or remove it") from error
        wrong = numbers[(self.table[numbers] >= self.classes) & (self.table[numbers] != IGNORE)]
        if wrong.size:
            raise ValueError(f"{mask}: holds label {wrong.max()}; {self.data} has {self.classes} classes")
        return numbers


class TrainCrops:
    """Random size (0.5 to 2), crop, flip and distortion of a train image, a function of (seed, epoch, index): float32
    (3, S, S), normalised, and uint8 label (S, S); where the picture ends before S, 0 and IGNORE."""

    def __init__(self, images, size, seed):
        self.images, self.size, self.seed = images, size, seed

    def __getitem__(self, key):
        rng = np.random.default_rng((CROP, self.seed, *key))
        image, label = self.images.read(key[1])
        size = fit(*label.shape, *np.floor(rng.uniform(0.5, 2) * np.array(self.images.sides)))  # whole sides, as mmcv's
        image, label = resize(image[None], size)[0], F.interpolate(label[None, None], size, mode="nearest")[0, 0]
        top, left = place_crop(label.numpy(), self.size, rng)
        image, label = (x[..., top:top + self.size, left:left + self.size] for x in (image, label))
        if rng.random() < 0.5:
            image, label = image.flip(-1), label.flip(-1)
        image = torch.from_numpy(distort(image.permute(1, 2, 0).numpy(), rng)).permute(2, 0, 1)
        padding = (0, self.size - label.shape[1], 0, self.size - label.shape[0])
        return F.pad(vit.normalize(image), padding), F.pad(label, padding, value=IGNORE)


def place_crop(label, crop, rng):
    """(top, left) of a random crop; drawn again, ten times at most, while one class fills 75 % of its labelled part."""
    for _ in range(11):
        top, left = (int(rng.integers(max(side - crop, 0) + 1)) for side in label.shape)
        counts = np.bincount(label[top:top + crop, left:left + crop].ravel(), minlength=256)[:IGNORE]
        if counts.max() < 0.75 * counts.sum():
            break
    return top, left


def distort(rgb, rng):
    """SSD's photometric distortion (Liu et al. 2016) of uint8 (h, w, 3), in 8 bits between the steps as mmsegmentation:
    brightness, contrast, saturation, hue, each with probability 0.5; contrast comes last every other time."""
    def coin():
        return rng.random() < 0.5

    def linear(x, factor, shift=0.0):
        return (x * np.float32(factor) + np.float32(shift)).clip(0, 255).astype(np.uint8)

    if coin():
        rgb = linear(rgb, 1, rng.uniform(-32, 32))
    contrast, early = rng.uniform(0.5, 1.5) if coin() else 1, coin()
    if early:
        rgb = linear(rgb, contrast)
    if coin():
        rgb = change_hsv(rgb, saturation=rng.uniform(0.5, 1.5))
    if coin():
        rgb = change_hsv(rgb, hue=rng.integers(-18, 18))
    return rgb if early else linear(rgb, contrast)


def change_hsv(rgb, saturation=1.0, hue=0):
    """Saturation times a factor, hue turned by steps of 2 degrees, in OpenCV's 8 bits: hue in whole steps, 0..179, and
    saturation and value 0..255."""
    r, g, b = np.moveaxis(rgb.astype(np.float32), -1, 0)
    value = np.maximum(np.maximum(r, g), b)
    chroma = value - np.minimum(np.minimum(r, g), b)
    sixth = np.where(value == r, g - b, np.where(value == g, b - r, r - g)) / np.maximum(chroma, 1)
    h = (np.floor(30 * (sixth + np.where(value == r, 0, np.where(value == g, 2, 4))) + 0.5) + hue).astype(np.float32)
    s = np.floor((np.floor(255 * chroma / np.maximum(value, 1) + 0.5) * np.float32(saturation)).clip(0, 255))
    away = [(n + h % 180 / 30) % 6 for n in (5, 3, 1)]              # how far the hue is from that of r, g, b
    rgb = [value * (1 - s / 255 * np.clip(np.minimum(k, 4 - k), 0, 1)) for k in away]
    return np.round(np.stack(rgb, -1)).astype(np.uint8)


def batch_order(n, args, start):
    """Batches of (epoch, index) from iteration `start` on; each epoch has an order of its own."""
    @functools.lru_cache(1)
    def order(epoch):
        return np.random.default_rng((ORDER, args.seed, epoch)).permutation(n).tolist()
    for t in range(start, args.iters):
        yield [(at // n, order(at // n)[at % n]) for at in range(t * args.batch_size, (t + 1) * args.batch_size)]


TREE = {
    "voc": "VOCdevkit/VOC2012/{JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/Segmentation/{train,val}.txt}",
    "ade20k": "ADEChallengeData2016/{images/*.jpg, annotations/*.png}, each below training/ and validation/",
    "cityscapes": "leftImg8bit/{train,val}/<city>/*_leftImg8bit.png and gtFine/.../*_gtFine_labelIds.png",
}


def label_table(data):
    """(256,) uint8: number in a label file -> class. What is neither a class nor IGNORE has no place in the files."""
    table = np.arange(256, dtype=np.uint8)                          # voc: as they are, the white border is 255
    if data == "ade20k":
        table[:] = [IGNORE, *range(254), IGNORE]                    # 0 is "other"
    if data == "cityscapes":
        table[[*range(34), 255]] = IGNORE                           # no other number is in its files
        table[[7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]] = range(19)       # road, sidewalk ... bicycle
    return table


def list_pairs(data, root, split, names):
    """[(picture, label file)] without what macOS and others leave beside them: ._a.jpg, .cache/. `names`: --voc-list"""
    if data == "ade20k":
        folder, name = root / "ADEChallengeData2016", {"train": "training", "val": "validation"}[split]
        return [(path, folder / "annotations" / name / f"{path.stem}.png")
                for path in sorted((folder / "images" / name).iterdir())
                if path.suffix.lower() in (".jpg", ".jpeg") and not path.name.startswith(".")]
    if data == "cityscapes":
        return [(path, root / "gtFine" / split / path.parent.name / path.name.replace("leftImg8bit", "gtFine_labelIds"))
                for path in sorted((root / "leftImg8bit" / split).glob("[!.]*/[!.]*_leftImg8bit.png"))]
    folder, pairs = root / "VOCdevkit/VOC2012", []
    file = Path(names or folder / f"ImageSets/Segmentation/{split}.txt")
    for n, line in enumerate(checkpoint.read_lines(file), 1):
        stems = {os.path.basename(word).removesuffix(".jpg").removesuffix(".png") for word in line.split()}
        if len(stems) > 1:
            raise ValueError(f"{file}: line {n}: {line.strip()}: not the name of one image, as 2007_000032")
        for name in stems:                                          # none in an empty line
            more, mask = (folder / kind / f"{name}.png" for kind in ("SegmentationClassAug", "SegmentationClass"))
            pairs.append((folder / f"JPEGImages/{name}.jpg", more if names and more.is_file() else mask))
            for path in pairs[-1]:
                if not path.is_file():
                    raise ValueError(f"{file}: line {n}: {name}: no file {path}; complete the data, or mend the list")
    if names and not pairs:
        raise ValueError(f"{names}: empty; --voc-list takes a text file with the name of an image per line")
    return pairs


def open_data(args, size):
    """(train, val, fingerprint): data sets of dict(image, mask), as of Shapes."""
    if args.data == "shapes":
        scenes = Shapes("train", size, args.train, CARDS), Shapes("train", size // COARSE, args.train, CARDS)
        train = [dict(scene, mask=coarse["mask"]) for scene, coarse in zip(*scenes, strict=True)]
        return train, list(Shapes("val", size, args.val, CARDS)), FINGERPRINT       # rendered once for all checkpoints
    train, val = (open_split(split, args) for split in ("train", "val"))
    files = [[picture for picture, _ in images.pairs] for images in (train, val)]
    checkpoint.refuse_trained_on(args.voc_list or args.root, *files)
    pictures, masks = zip(*train.pairs, *val.pairs, strict=True)
    return train, val, checkpoint.fingerprint(Path(args.root), pictures, masks)


def open_split(split, args):
    """LabelledPictures of a whole split, or of a part with --allow-partial."""
    names, cause = args.voc_list if split == "train" else None, f"no {split} pictures"
    try:
        pairs = list_pairs(args.data, Path(args.root), split, names)
    except OSError as error:
        pairs, cause = [], f"{error.filename}: {error.strerror}"
    if not pairs:
        found = sorted(os.listdir(args.root))[:8] if os.path.isdir(args.root) else "no such folder"
        sys.exit(f"{cause}; {args.root} must hold {TREE[args.data]}, and holds {found}")
    for picture, mask in pairs:
        if not mask.is_file():
            raise ValueError(f"{picture}: its label {mask} is missing; complete the data, or remove the picture")
    print(f"{args.data} {split}: {len(pairs):,} images, {args.classes} classes")
    expected = len(pairs) if names else RECIPES[args.data][split]
    args.partial |= len(pairs) < expected
    if len(pairs) < expected and not args.allow_partial:
        sys.exit(f"{args.root}: {len(pairs):,} {split} images of {expected:,}; complete it, or give --allow-partial")
    images = LabelledPictures(pairs, args)
    refuse_wrong_labels(images, split)
    return images


def refuse_wrong_labels(images, split):
    """Labels that are no labels are refused before hours of training: some 64 maps tell, or all if these are void."""
    n, (_, first) = len(images), images.pairs[0]
    for step in (math.ceil(n / 64), 1):
        count = sum(np.bincount(images.label_numbers(mask).ravel(), minlength=256) for _, mask in images.pairs[::step])
        if (images.table[count > 0] != IGNORE).any():
            break
    else:
        raise ValueError(f"{first}: void everywhere, like all {n:,} {split} labels; kept back, or of another data set?")
    if images.data == "cityscapes" and count[255] and not count[19:34].any():
        raise ValueError(f"{first}: holds trainIds (0 to 18) under the name of labelIds; give gtFine as downloaded")


# ------------------------------------------------------------------------------------------- results
def show(values):
    mean, sd = checkpoint.mean_sd(values)
    return f"{mean:.2f}" + (f" ± {sd:.2f}" if sd is not None else "") + " %"


def head_metrics(ious):
    """Result of the heads that differ in the seed alone, of their IoU (E, S, C): each seed's best evaluation counts."""
    miou = ious.nanmean(-1)                                         # (E, S)
    best, best_at = miou.max(0)
    (mean, sd), (mean_last, sd_last) = map(checkpoint.mean_sd, (best.tolist(), miou[-1].tolist()))
    by_class = ious[best_at, range(len(best_at))].nanmean(0).tolist()
    return dict(miou=mean, miou_sd=sd, miou_seeds=best.tolist(), miou_last=mean_last, miou_last_sd=sd_last,
                miou_last_seeds=miou[-1].tolist(), iou=[None if math.isnan(x) else x for x in by_class])


def summarize(history, kinds, args):
    """Metrics of the first kind of head, and below `heads` of every kind."""
    ious = torch.stack([entry["iou"] for entry in history]).unflatten(1, (len(kinds), args.seeds))      # (E, ., S, C)
    heads = [dict(block=block, concat_cls=concat, **head_metrics(ious[:, kinds.index((block, concat))]))
             for block, concat in sorted(kinds)]
    return dict(head_metrics(ious[:, 0]), miou_constant=history[-1]["constant"], heads=heads)


def describe(args, config, train, val, fingerprint, block, concat_cls):
    """Every value that decides the headline. The other heads are not among them: each trains for itself."""
    scenes = dict(cards=CARDS, train_labels=f"rendered at 1/{COARSE} of the side")
    return dict(
        probe="seg", data=args.data, fingerprint=fingerprint, train=len(train), val=len(val), classes=args.classes,
        partial=args.partial, train_list=os.path.basename(args.voc_list or "train"),
        feature="patches, final norm", block=block, concat_cls=concat_cls, crop=args.crop or 2 * config.image_size,
        stride=args.stride, short_side=args.short_side,
        long_side=args.aspect * args.short_side if args.data in ("voc", "cityscapes") else None, iters=args.iters,
        batch_size=args.batch_size, seeds=args.seeds, head="BatchNorm, 1x1 convolution", lr=args.lr,
        optimizer="AdamW 0.9 0.999", weight_decay=WEIGHT_DECAY, schedule="linear to 0, warm-up from 1e-6",
        warmup=round(args.iters * WARMUP), loss="cross-entropy / all pixels", ignore=IGNORE, precision=args.amp,
        augmentation="none" if args.data == "shapes" else "resize 0.5-2, crop 0.75, flip 0.5, photometric",
        label_resolution="original", padding="to whole patches, zeros around", eval_every=args.eval_every,
        reported="best over evaluations, of each head seed", **scenes if args.data == "shapes" else {})


def draw_images(file, head, views, width=256):
    """A row for each picture: itself, its label and the prediction, both in VOC's colours."""
    head, rows = head.eval(), []
    for images, labels, corners, window_size, features in views:
        predicted = predict(head, features, corners, window_size, images.shape[2:], labels.shape[1:])
        for image, label, guess in zip(images, labels.cpu(), predicted.cpu(), strict=True):
            size = width, round(width * image.shape[1] / image.shape[2])
            tiles = [Image.fromarray(view).resize(size, Image.Resampling.NEAREST)
                     for view in (image.permute(1, 2, 0).numpy(), PALETTE[label.numpy()], PALETTE[guess.numpy()])]
            rows.append(np.hstack([np.pad(tile, ((2, 2), (2, 2), (0, 0)), constant_values=255) for tile in tiles]))
    Image.fromarray(np.vstack(rows)).save(file)


def evaluate(path, args, device, data):
    """The probe of one file of weights: prints it and writes the result beside it. `data`: open_data by size."""
    model, facts = checkpoint.open_weights(path, args.which, args.like, args.seed, device, args.heads)
    config = model.config
    if args.batch_size == 1 and (args.crop or 2 * config.image_size) <= config.patch_size:
        raise ValueError(f"{path}: --batch-size 1 and a crop of one patch: BatchNorm needs two values; raise either")
    blocks = sorted({model.index(block) for block in args.blocks or range(config.depth)})
    concats = {"no": [False], "yes": [True], "both": [False, True]}[args.concat_cls]
    kinds = [(block, concat) for block in reversed(blocks) for concat in concats]   # the first one is the headline
    train, val, fingerprint = data(2 * config.image_size if args.data == "shapes" else None)
    result = dict(probe="seg", data=args.data, root=args.root, **facts, config=dataclasses.asdict(config),
                  seed=args.seed, metrics=None, protocol=describe(args, config, train, val, fingerprint, *kinds[0]))
    default = checkpoint.result_path(path, "seg", args.data, config, args.seed)
    out, finished = checkpoint.claim(args.out, default, result)
    there = {(head["block"], head["concat_cls"]) for head in finished["metrics"]["heads"]} if finished else set()
    if there - set(kinds) and set(kinds) - there:
        raise ValueError(f"{out}: holds heads of other blocks, which would be lost; ask for all, or give another --out")
    if there >= set(kinds):
        if args.save_images:
            print(f"{out}: no pictures drawn, nothing is evaluated again; remove it to draw them")
        return checkpoint.say_finished(out, finished)
    stamp = dict(checkpoint.identity(result), heads=kinds, weights_sha256=facts["weights_sha256"])
    heads = nn.ModuleList(Head(*kind, seed, config.dim, args.classes) for kind in kinds
                          for seed in range(args.seed, args.seed + args.seeds)).to(device)
    history = train_heads(model, train, val, heads, args, device, checkpoint.beside(out, ".head.pt"), stamp)

    metrics = summarize(history, kinds, args)
    for head in metrics["heads"]:
        print(f"block {head['block']}{', [CLS] beside' * head['concat_cls']}: "
              f"mIoU {show(head['miou_seeds'])} at the best evaluation, {show(head['miou_last_seeds'])} at the last")
    print(f"{path}: mIoU {show(metrics['miou_seeds'])}; {metrics['miou_constant']:.2f} % of the most frequent class "
          "everywhere" + f"; ± is over {args.seeds} heads on one backbone, not of pretraining" * (args.seeds > 1))
    if args.save_images:
        drawn = Subset(val, checkpoint.spread(len(val), args.save_images))
        draw_images(checkpoint.beside(out, ".png"), heads[0], val_views(model, drawn, [heads[0].block], args, device))
    checkpoint.write_result(out, dict(result, metrics=metrics))


# ------------------------------------------------------------------------------------------- command line
def parse_args(argv=None):
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--data", default="shapes")
    recipe = RECIPES.get(first.parse_known_args(argv)[0].data, {})

    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    checkpoint.add_flags(p, "seg")
    # data
    p.add_argument("--data", choices=list(RECIPES), default="shapes")
    p.add_argument("--root", help="folder that holds VOCdevkit/, ADEChallengeData2016/, or leftImg8bit/ and gtFine/")
    p.add_argument("--voc-list", metavar="FILE", help="in place of train.txt; labels of SegmentationClassAug/ first")
    p.add_argument("--allow-partial", action="store_true", help="accept fewer images than the data set holds")
    p.add_argument("--crop", type=int, help="side of train crops and windows, pixels")
    p.add_argument("--stride", type=int, help="between windows, pixels; default 2/3 of --crop, 341 of 512")
    p.add_argument("--short-side", type=int, help="of pictures, pixels; times 0.5 to 2 in training")
    # heads
    p.add_argument("--blocks", nargs="+", default=["-1"], help="0-based, -1 is the last; or all")
    p.add_argument("--concat-cls", choices=["no", "yes", "both"], default="no", help="[CLS] beside each patch")
    p.add_argument("--iters", type=int, help="iterations; the schedule scales with them")
    p.add_argument("--batch-size", type=int, help="images per iteration; at most so many windows per forward")
    p.add_argument("--seeds", type=int, default=1, help="head initialisations trained at once, from --seed on")
    # run
    p.add_argument("--eval-every", type=int, help="iterations between evaluations; default 1/8 of --iters, "
                   "on shapes all")
    p.add_argument("--save-every", type=int, help="iterations between saves of the heads")
    p.add_argument("--log-every", type=int, help="iterations between progress lines")
    p.add_argument("--save-images", type=int, default=0, metavar="N",
                   help="of val, spread over its list; <out without .json>.png")
    p.set_defaults(**recipe, partial=False)                        # of the data, as found
    args = p.parse_args(argv)
    check_args(p, args)
    return args


def check_args(p, args):
    """Refuse what cannot run, in one line and before anything is written; fill in what follows from other values."""
    if (args.root is None) != (args.data == "shapes"):
        p.error(f"--data {args.data} needs --root, a folder with {TREE[args.data]}" if args.root is None else
                "--data shapes takes no --root; its scenes are embedded")
    if args.data == "shapes" and {args.crop, args.stride, args.short_side} != {None}:
        p.error("--data shapes takes no --crop, --stride or --short-side; its scenes are taken whole")
    if args.voc_list and args.data != "voc":
        p.error(f"--voc-list goes with --data voc, not {args.data}")
    if args.voc_list and not os.path.isfile(args.voc_list):
        sys.exit(f"{args.voc_list}: no such file; --voc-list takes a text file with the name of an image per line")
    try:
        args.blocks = None if args.blocks == ["all"] else [int(block) for block in args.blocks]
    except ValueError:
        p.error(f"--blocks {' '.join(args.blocks)}: must be all, or whole numbers")
    if args.data != "shapes":
        args.stride = round(args.crop * STRIDE) if args.stride is None else args.stride
        if args.stride > args.crop:
            p.error(f"--stride {args.stride}: must be at most --crop {args.crop}, or pixels are missed")
        if args.short_side < 2:                                     # half of it is the smallest picture in training
            p.error(f"--short-side {args.short_side}: must be at least 2")
    args.eval_every = max(1, round(args.iters / args.evaluations)) if args.eval_every is None else args.eval_every
    checkpoint.check_flags(p, args, "iters batch_size crop stride seeds eval_every save_every log_every", "save_images")


def main(argv=None):
    checkpoint.print_any_path()
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = functools.cache(lambda size: open_data(args, size))      # looking for 22,000 pairs takes a while: once
    for path in args.weights:
        with checkpoint.one_line(path):
            evaluate(path, args, device, data)


if __name__ == "__main__":
    main()
