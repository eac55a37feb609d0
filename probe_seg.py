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
import dataclasses
import datetime
import filecmp
import math
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import checkpoint
import vit
from shapes import CLASSES, FINGERPRINT, Shapes

# What --data selects. Shapes are not augmented: one frozen forward is kept and the heads train on it.
PAPER = dict(iters=40_000, batch_size=16, crop=512, workers=10, save_every=1000, log_every=100)
RECIPES = {
    "voc": dict(PAPER, short_side=512),
    "ade20k": dict(PAPER, short_side=512),
    "cityscapes": dict(PAPER, short_side=1024),
    "shapes": dict(iters=1_000, batch_size=16, workers=0, save_every=500, log_every=200),
}
LONG_SIDE = {"voc": 4, "ade20k": math.inf, "cityscapes": 2}         # at most so many short sides
STRIDE = 341 / 512                                                  # of a window
RATE, WEIGHT_DECAY = 1e-3, 1e-4
WARMUP = 1_500 / 40_000                                             # share of the iterations
IGNORE = 255                                                        # label of pixels that count nowhere
NAMES = {
    "voc": "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
           "pottedplant sheep sofa train tvmonitor".split(),
    "ade20k": [str(k) for k in range(1, 151)],                      # as its own objectInfo150.txt numbers them
    "cityscapes": "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, "
                  "person, rider, car, truck, bus, train, motorcycle, bicycle".split(", "),
    "shapes": ["background", *CLASSES],
}
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)     # of NAMES, in order
TREE = {
    "voc": "VOCdevkit/VOC2012/{JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/Segmentation/{train,val}.txt}",
    "ade20k": "ADEChallengeData2016/{images/*.jpg, annotations/*.png}, each below training/ and validation/",
    "cityscapes": "leftImg8bit/{train,val}/<city>/*_leftImg8bit.png and gtFine/.../*_gtFine_labelIds.png",
}
EXPECTED = {"voc": {"train": 1_464, "val": 1_449}, "ade20k": {"train": 20_210, "val": 2_000},
            "cityscapes": {"train": 2_975, "val": 500}}
PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
ORDER, CROP = range(2)                                              # streams of random numbers


# ------------------------------------------------------------------------------------------- command line
def parse_args(argv=None):
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--data", default="shapes")
    recipe = RECIPES.get(first.parse_known_args(argv)[0].data, {})

    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # weights
    p.add_argument("--weights", nargs="+", required=True, metavar="FILE",
                   help="checkpoints of train.py, official DINO files, a run folder (its numbered files), or random")
    p.add_argument("--which", choices=["teacher", "student"], default="teacher", help="DINO evaluates the teacher")
    p.add_argument("--like", help="checkpoint whose architecture --weights random takes; default ViT-S/16")
    p.add_argument("--heads", type=int, help="attention heads, of a file that does not say; default "
                   "width / 64, as in DINO")
    # data
    p.add_argument("--data", choices=list(RECIPES), default="shapes")
    p.add_argument("--root", help="folder that holds VOCdevkit/, ADEChallengeData2016/, or leftImg8bit/ and gtFine/")
    p.add_argument("--voc-list", metavar="FILE", help="names of train images in place of train.txt, such as trainaug's "
                   "10,582; SegmentationClassAug/ comes before SegmentationClass/")
    p.add_argument("--allow-partial", action="store_true", help="accept fewer images than the data set holds")
    p.add_argument("--crop", type=int, help="side of train crops and windows, pixels")
    p.add_argument("--stride", type=int, help="between windows, pixels; default 2/3 of --crop, 341 of 512")
    p.add_argument("--short-side", type=int, help="of pictures, pixels; times 0.5 to 2 in training")
    # heads
    p.add_argument("--blocks", nargs="+", default=["-1"], help="0-based, -1 is the last; or all")
    p.add_argument("--concat-cls", choices=["no", "yes", "both"], default="no",
                   help="put [CLS] of the block beside each of its patches")
    p.add_argument("--iters", type=int, help="iterations; the schedule scales with them")
    p.add_argument("--batch-size", type=int, help="images per iteration; at most so many windows per forward")
    p.add_argument("--seeds", type=int, default=1, help="head initialisations trained at once, from --seed on")
    # run
    p.add_argument("--seed", type=int, default=0, help="of heads, crops and order of images; of --weights random")
    p.add_argument("--amp", choices=list(PRECISION), help="of the frozen forward; default bf16 on CUDA, off on CPU")
    p.add_argument("--workers", type=int, help="loader processes")
    p.add_argument("--eval-every", type=int, help="iterations between evaluations; default 1/8 of --iters")
    p.add_argument("--save-every", type=int, help="iterations between saves of the heads")
    p.add_argument("--log-every", type=int, help="iterations between progress lines")
    p.add_argument("--save-images", type=int, default=0, metavar="N", help="draw the first N val images with label and "
                   "prediction, into <out without .json>.png")
    p.add_argument("--out", help="result file; default <weights without .pt>.seg.<data>.json")
    p.set_defaults(**recipe)
    args = p.parse_args(argv)
    check_args(p, args)
    return args


def check_args(p, args):
    """Refuse what cannot run, in one line and before anything is written; fill in what follows from other values."""
    if (args.root is None) != (args.data == "shapes"):
        p.error(f"--data {args.data} needs --root, a folder with {TREE[args.data]}" if args.root is None else
                "--data shapes takes no --root; its scenes are embedded")
    if args.data == "shapes" and (args.crop or args.stride or args.short_side):
        p.error("--data shapes takes no --crop, --stride or --short-side; its scenes are taken whole")
    if args.voc_list and args.data != "voc":
        p.error(f"--voc-list goes with --data voc, not {args.data}")
    if args.voc_list and not os.path.isfile(args.voc_list):
        sys.exit(f"{args.voc_list}: no such file; --voc-list takes a text file with the name of an image per line")
    if args.like and args.weights != ["random"]:
        p.error("--like goes with --weights random: a checkpoint brings its own architecture")
    try:
        args.blocks = None if args.blocks == ["all"] else [int(block) for block in args.blocks]
    except ValueError:
        p.error(f"--blocks {' '.join(args.blocks)}: must be all, or whole numbers")
    if args.data != "shapes":
        args.stride = round(args.crop * STRIDE) if args.stride is None else args.stride
        if args.stride > args.crop:
            p.error(f"--stride {args.stride}: must be at most --crop {args.crop}, or pixels are missed")
    if args.eval_every is None:
        args.eval_every = max(1, round(args.iters / 8))
    for name in ("iters batch_size crop stride short_side seeds heads workers seed eval_every save_every log_every "
                 "save_images").split():
        value, least = getattr(args, name), {"workers": 0, "seed": 0, "save_images": 0, "short_side": 2}.get(name, 1)
        if value is not None and value < least:
            p.error(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.seed >= 2**63:
        p.error(f"--seed {args.seed}: must be below 2^63")
    try:
        args.weights = checkpoint.list_checkpoints(args.weights)
    except OSError as error:
        sys.exit(str(error))
    if args.out and len(args.weights) > 1:
        p.error(f"--out names one file and --weights {len(args.weights)}; leave it out for one result beside each")
    if args.amp is None:
        args.amp = "off"
        if torch.cuda.is_available():                               # older cards only emulate bfloat16, slowly
            args.amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


# ------------------------------------------------------------------------------------------- data
class Scenes:
    """The embedded data set as (uint8 image, uint8 label): 2,000 train scenes as in train.py's default, 1,000 val."""

    def __init__(self, split, size):
        self.scenes = Shapes(split, size, {"train": 2000, "val": 1000}[split])

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, i):
        scene = self.scenes[i]
        return scene["image"], scene["mask"]


def read_picture(path, load=vit.read_image):
    try:
        return load(path)
    except Exception as error:                                      # Pillow's own messages mostly lack the name
        raise ValueError(f"{path}: unreadable ({error}); mend or remove it") from error


def load_mask(path):
    with Image.open(path) as image:
        if image.mode not in ("P", "L"):
            raise ValueError(f"mode {image.mode}; labels are 8-bit class numbers, mode P or L")
        return np.array(image)                                      # of a palette image: the numbers


def label_table(data):
    """(256,) uint8: number in a label file -> class. What is neither a class nor IGNORE has no place in the files."""
    table = np.arange(256, dtype=np.uint8)                          # voc: as they are, the white border is 255
    if data == "ade20k":
        table = np.where(np.isin(table, (0, 255)), IGNORE, table - 1).astype(np.uint8)     # 0 is "other"
    if data == "cityscapes":
        table[[*range(34), 255]] = IGNORE                           # no other number is in its files
        table[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES_IDS))
    return table


def fit(height, width, long, short):
    """(height, width) with the sides' ratio kept and as large as a long and a short side allow."""
    factor = min(long / max(height, width), short / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def resize(image, size):
    """uint8 (3, h, w) to `size` as OpenCV's bilinear does it: four neighbours, also where it shrinks."""
    return F.interpolate(image[None], size, mode="bilinear")[0]


class Pictures:
    """Item i for evaluation: uint8 picture (3, h, w), resized; uint8 label (H, W), as it is on disk."""

    def __init__(self, pairs, args):
        self.pairs, self.data = pairs, args.data
        self.table, self.classes = label_table(args.data), len(NAMES[args.data])
        self.sides = args.short_side * LONG_SIDE[args.data], args.short_side

    def __len__(self):
        return len(self.pairs)

    def numbers(self, i):
        """Of label file i as they are, uint8 (H, W)."""
        ids = read_picture(mask := self.pairs[i][1], load_mask)
        wrong = ids[(self.table[ids] >= self.classes) & (self.table[ids] != IGNORE)]
        if wrong.size:
            raise ValueError(f"{mask}: holds label {wrong.max()}; {self.data} has {self.classes} classes; is it the "
                             "label file of another data set?")
        return ids

    def read(self, i):
        (picture, mask), ids = self.pairs[i], self.numbers(i)
        image = np.array(read_picture(picture))
        if ids.shape != image.shape[:2]:
            raise ValueError(f"{mask}: {ids.shape[1]} x {ids.shape[0]} pixels, but {picture} has {image.shape[1]} x "
                             f"{image.shape[0]}; they must be equal")
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(self.table[ids])

    def __getitem__(self, i):
        image, label = self.read(i)
        return resize(image, fit(*label.shape, *self.sides)), label


def place_crop(label, crop, rng):
    """(top, left) of a random crop; drawn again, ten times at most, while one class fills 75 % of its labelled part."""
    for _ in range(11):
        top, left = (int(rng.integers(max(side - crop, 0) + 1)) for side in label.shape)
        counts = np.bincount(label[top:top + crop, left:left + crop].ravel(), minlength=256)[:IGNORE]
        if counts.max() < 0.75 * counts.sum():
            break
    return top, left


def rgb_to_hsv(rgb):
    """uint8 (..., 3) -> OpenCV's 8-bit HSV: hue in steps of 2 degrees, 0..179; saturation and value 0..255."""
    r, g, b = np.moveaxis(rgb.astype(np.float32), -1, 0)
    value = np.maximum(np.maximum(r, g), b)
    chroma = value - np.minimum(np.minimum(r, g), b)
    sixth = np.where(value == r, g - b, np.where(value == g, b - r, r - g)) / np.maximum(chroma, 1)
    hue = np.floor(30 * (sixth + np.where(value == r, 0, np.where(value == g, 2, 4))) + 0.5) % 180
    saturation = np.floor(255 * chroma / np.maximum(value, 1) + 0.5)
    return np.stack([hue, saturation, value], -1).astype(np.uint8)


def hsv_to_rgb(hsv):
    h, s, v = np.moveaxis(hsv.astype(np.float32), -1, 0)
    k = [(n + h / 30) % 6 for n in (5, 3, 1)]                       # how far the hue is from that of r, g, b
    rgb = [v * (1 - s / 255 * np.clip(np.minimum(k, 4 - k), 0, 1)) for k in k]
    return np.round(np.stack(rgb, -1)).astype(np.uint8)


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
        hsv = rgb_to_hsv(rgb)
        hsv[..., 1] = linear(hsv[..., 1], rng.uniform(0.5, 1.5))
        rgb = hsv_to_rgb(hsv)
    if coin():
        hsv = rgb_to_hsv(rgb)
        hsv[..., 0] = (hsv[..., 0].astype(int) + rng.integers(-18, 18)) % 180
        rgb = hsv_to_rgb(hsv)
    return rgb if early else linear(rgb, contrast)


class Crops:
    """Random size (0.5 to 2), crop, flip and distortion of a train image, a function of (seed, epoch, index): uint8
    (3, S, S), uint8 label (S, S), and the height and width that are filled; the rest is 0 and IGNORE."""

    def __init__(self, images, size, seed):
        self.images, self.size, self.seed = images, size, seed

    def __getitem__(self, key):
        rng = np.random.default_rng((CROP, self.seed, *key))
        image, label = self.images.read(key[1])
        ratio = rng.uniform(0.5, 2)
        size = fit(*label.shape, *np.floor(ratio * np.array(self.images.sides)))        # whole sides, as mmcv's
        image, label = resize(image, size), F.interpolate(label[None, None], size, mode="nearest")[0, 0]
        top, left = place_crop(label.numpy(), self.size, rng)
        image, label = (x[..., top:top + self.size, left:left + self.size] for x in (image, label))
        if rng.random() < 0.5:
            image, label = image.flip(-1), label.flip(-1)
        image = torch.from_numpy(distort(image.permute(1, 2, 0).numpy(), rng)).permute(2, 0, 1)
        height, width = label.shape
        padding = (0, self.size - width, 0, self.size - height)
        return F.pad(image, padding), F.pad(label, padding, value=IGNORE), torch.tensor([height, width])


class Draws:
    """Batch sampler: batches of (epoch, index) from iteration `start` on; each epoch has an order of its own."""

    def __init__(self, n, args, start):
        self.n, self.args, self.start = n, args, start

    def __iter__(self):
        size, epoch = self.args.batch_size, None
        for t in range(self.start, self.args.iters):
            keys = []
            for position in range(t * size, (t + 1) * size):
                if position // self.n != epoch:
                    epoch = position // self.n
                    order = np.random.default_rng((ORDER, self.args.seed, epoch)).permutation(self.n).tolist()
                keys.append((epoch, order[position % self.n]))
            yield keys


def list_voc(root, split, names):
    folder, pairs = root / "VOCdevkit/VOC2012", []
    file = Path(names or folder / f"ImageSets/Segmentation/{split}.txt")
    kinds = ["SegmentationClassAug", "SegmentationClass"] if names else ["SegmentationClass"]
    for n, line in enumerate(file.read_text("utf-8-sig", "surrogateescape").split("\n"), 1):
        columns = {os.path.basename(word).removesuffix(".jpg").removesuffix(".png") for word in line.split()}
        if not columns:
            continue
        name = columns.pop()
        if columns:
            raise ValueError(f"{file}: line {n}: {line.strip()}: not the name of one image, as 2007_000032, or its "
                             "picture and its label, as JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png")
        masks = [folder / kind / f"{name}.png" for kind in kinds]
        pairs.append((folder / f"JPEGImages/{name}.jpg", next((path for path in masks if path.is_file()), masks[-1])))
        for path in pairs[-1]:
            if not path.is_file():
                raise ValueError(f"{file}: line {n}: {name}: no file {path}; complete the data, or mend the list")
    return pairs


def visible(paths):
    """In order, without what macOS and others leave beside the data: ._a.jpg, and folders such as .cache."""
    return [path for path in sorted(paths) if not path.name.startswith(".") and not path.parent.name.startswith(".")]


def list_ade20k(root, split, _):
    folder, name = root / "ADEChallengeData2016", {"train": "training", "val": "validation"}[split]
    return [(picture, folder / "annotations" / name / f"{picture.stem}.png")
            for picture in visible((folder / "images" / name).iterdir()) if picture.suffix.lower() in (".jpg", ".jpeg")]


def list_cityscapes(root, split, _):
    folder = root / "gtFine" / split
    return [(picture, folder / picture.parent.name / picture.name.replace("_leftImg8bit", "_gtFine_labelIds"))
            for picture in visible((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))]


LISTS = {"voc": list_voc, "ade20k": list_ade20k, "cityscapes": list_cityscapes}


def check_apart(source, train, val):
    """What was trained on is not val: the same file, also through links, or a copy under the same name."""
    files, names = {os.path.realpath(path) for path, _ in train}, {path.name: path for path, _ in train}
    shared = [path for path, _ in val if os.path.realpath(path) in files
              or path.name in names and filecmp.cmp(path, names[path.name], shallow=False)]
    if shared:
        raise ValueError(f"{source}: {len(shared):,} of the {len(val):,} val images are among the train images, the "
                         f"first is {shared[0].stem}; take them out of the train images")


def check_labels(images, split):
    """Labels that are no labels are refused before hours of training: some 64 maps tell, or all if these are void."""
    n, (_, first) = len(images), images.pairs[0]
    for step in (math.ceil(n / 64), 1):
        count = sum(np.bincount(images.numbers(i).ravel(), minlength=256) for i in range(0, n, step))
        if (images.table[count > 0] != IGNORE).any():
            break
    else:
        raise ValueError(f"{first}: void everywhere, like all {n:,} {split} labels; of pictures whose labels are kept "
                         "back, or of another data set?")
    if images.data == "cityscapes" and count[255] and not count[19:34].any():
        raise ValueError(f"{first}: holds trainIds (0 to 18, and 255) under the name of labelIds, like other {split} "
                         "labels; give gtFine as it is downloaded")


def open_data(args, size):
    """(train, val, fingerprint): data sets of (uint8 picture, uint8 label)."""
    if args.data == "shapes":
        return Scenes("train", size), Scenes("val", size), FINGERPRINT
    splits = []
    for split in ("train", "val"):
        names, cause = args.voc_list if split == "train" else None, f"no {split} pictures"
        try:
            pairs = LISTS[args.data](Path(args.root), split, names)
        except OSError as error:
            pairs, cause = [], f"{error.filename}: {error.strerror}"
        if not pairs:
            found = sorted(os.listdir(args.root))[:8] if os.path.isdir(args.root) else "no such folder"
            sys.exit(f"{cause}; {args.root} must hold {TREE[args.data]}, and holds {found}")
        for picture, mask in pairs:
            if not mask.is_file():
                raise ValueError(f"{picture}: its label {mask} is missing; complete the data, or remove the picture")
        expected = len(pairs) if names else EXPECTED[args.data][split]
        print(f"{args.data} {split}: {len(pairs):,} images, {len(NAMES[args.data])} classes")
        if len(pairs) < expected and not args.allow_partial:
            sys.exit(f"{args.root}: {len(pairs):,} {split} images of {expected:,}; complete it, or give "
                     "--allow-partial")
        splits.append(Pictures(pairs, args))
        check_labels(splits[-1], split)
    check_apart(args.voc_list or args.root, *(images.pairs for images in splits))
    pictures, masks = zip(*splits[0].pairs, *splits[1].pairs, strict=True)
    return *splits, checkpoint.fingerprint(Path(args.root), pictures, masks)


# ------------------------------------------------------------------------------------------- frozen features
@torch.no_grad()                                                    # inference tensors could not enter a backward
def frozen(model, images, blocks, args):
    """{block: ([CLS] (B, D), patches (B, D, h, w))} float32, after the final norm, of normalised (B, 3, H, W)."""
    outputs = {block: [] for block in blocks}
    for part in vit.pad_to_patches(images, model.config.patch_size).split(args.batch_size):
        with torch.autocast(images.device.type, PRECISION[args.amp], enabled=args.amp != "off"):
            for block, output in zip(blocks, model.features(part, blocks), strict=True):
                outputs[block].append((output.cls.float(), output.patches.float().permute(0, 3, 1, 2)))
    return {block: tuple(map(torch.cat, zip(*parts, strict=True))) for block, parts in outputs.items()}


def extract(model, images, blocks, args, device):
    """Features and labels (N, S, S) of all images, in the order of the data set."""
    x, y = (torch.stack(items).to(device) for items in zip(*images, strict=True))
    return frozen(model, vit.normalize(x), blocks, args), y


def fill(images, sizes):
    """Normalised images, 0 beyond the height and width that each of them fills from the top left; sizes (B, 2)."""
    height, width = sizes.T[..., None, None, None]
    row, column = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    return vit.normalize(images) * ((row[:, None] < height) & (column < width))


def batches(model, train, blocks, args, device, start):
    """(features, labels (B, S, S)) from iteration `start` on. `train`: images, or (features, labels) of all of them
    where there is no augmentation."""
    if isinstance(train, tuple):
        for keys in Draws(len(train[1]), args, start):
            i = torch.tensor([i for _, i in keys], device=device)
            yield {block: (cls[i], patches[i]) for block, (cls, patches) in train[0].items()}, train[1][i]
        return
    crops = Crops(train, args.crop, args.seed)
    for batch in DataLoader(crops, batch_sampler=Draws(len(train), args, start), num_workers=args.workers,
                            worker_init_fn=checkpoint.deaf_worker, pin_memory=device.type == "cuda"):
        x, y, sizes = (part.to(device, non_blocking=True) for part in batch)
        yield frozen(model, fill(x, sizes), blocks, args), y


def windows(height, width, crop, stride):
    """Top left corners of the sliding windows; those that would pass the lower or right edge are moved back to it."""
    def starts(side):
        n = max(side - crop + stride - 1, 0) // stride + 1
        return [max(min(i * stride, side - crop), 0) for i in range(n)]
    return [(top, left) for top in starts(height) for left in starts(width)]


def val_views(model, val, blocks, args, device):
    """(pictures (B, 3, h, w), labels (B, H, W), corners and size of their n windows, features of the B n windows)."""
    alike = 100 if args.data == "shapes" else 1                     # pictures of one size, which can go together
    for images, labels in DataLoader(val, alike, num_workers=args.workers, worker_init_fn=checkpoint.deaf_worker,
                                     pin_memory=device.type == "cuda"):
        x = vit.normalize(images.to(device, non_blocking=True))
        crop = args.crop or max(x.shape[2:])
        corners = windows(*x.shape[2:], crop, args.stride or crop)
        views = [x[..., top:top + crop, left:left + crop] for top, left in corners]
        features = frozen(model, torch.cat(views), blocks, args)
        yield images, labels.to(device, non_blocking=True), (corners, views[0].shape[2:]), features


# ------------------------------------------------------------------------------------------- heads
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
            patches = torch.cat([patches, cls[..., None, None].expand_as(patches)], 1)
        return self.conv(self.norm(patches))


def upsample(logits, size):
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def pixel_loss(logits, labels):
    """Cross-entropy, divided by the number of all pixels, also of those without a label, as in mmsegmentation."""
    logits = upsample(logits, labels.shape[-2:])
    return F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="sum") / labels.numel()


def learning_rate(t, iters):
    """Of iteration t (0-based): linear to 0, times a linear warm-up from 1e-6."""
    warmup = round(iters * WARMUP)
    ramp = 1 - (1 - t / warmup) * (1 - 1e-6) if t < warmup else 1
    return RATE * (1 - t / iters) * ramp


def train_heads(model, train, val, heads, args, device, file, stamp):
    """[{iteration, iou (K, C), constant}] of the evaluations in --iters iterations, and pictures of the last one. Goes
    on from `file` if it is there. `stamp`: all that the heads depend on."""
    blocks = sorted({head.block for head in heads})
    optimizer = torch.optim.AdamW(heads.parameters(), weight_decay=WEIGHT_DECAY)
    (start, history), pictures = checkpoint.resume_heads(file, stamp, heads, optimizer), []
    if args.save_images:                                            # a last evaluation that was saved has no pictures
        history = [entry for entry in history if entry["iteration"] < args.iters]

    def due(done):
        return done and (done % args.eval_every == 0 or done == args.iters) and (
            not history or history[-1]["iteration"] < done)

    def save(done):
        checkpoint.write_checkpoint(file, dict(iteration=done, stamp=stamp, heads=heads.state_dict(),
                                               optimizer=optimizer.state_dict(), history=history))

    if args.data == "shapes" and (start < args.iters or due(start)):
        train = extract(model, train, blocks, args, device)         # not augmented: features are computed once
        val = list(val_views(model, val, blocks, args, device))
    stream, clock, total = batches(model, train, blocks, args, device, start), time.perf_counter(), 0
    with checkpoint.noted_signals() as asked:
        for done in range(start, args.iters + 1):
            if done > start:
                optimizer.param_groups[0]["lr"] = learning_rate(done - 1, args.iters)
                features, labels = next(stream)
                for head in heads:                                  # one at a time: full-size logits are large
                    loss = pixel_loss(head(features), labels)
                    loss.backward()
                    total = total + loss.detach() / len(heads)      # over the iterations since the last line
                optimizer.step(); optimizer.zero_grad()

            log = done > start and (done % args.log_every == 0 or done == args.iters)
            evaluated = due(done)
            if (log or asked or evaluated or done % args.save_every == 0) and not math.isfinite(total):
                raise ValueError(f"{file}: the loss is not finite at iteration {done:,}, and nothing of it is saved: "
                                 f"the features overflow with --amp {args.amp}, or the heads diverge")
            if log:
                loss = total / (done - max(start, (done - 1) // args.log_every * args.log_every))
                left = (time.perf_counter() - clock) / (done - start) * (args.iters - done)
                print(f"iteration {done:,}/{args.iters:,}  loss {loss:.4f}  "
                      f"eta {datetime.timedelta(seconds=round(left))}", flush=True)
                total = 0
            if evaluated:
                save(done)                                          # the evaluation may be cut
                views = val if args.data == "shapes" else val_views(model, val, blocks, args, device)
                confusion, pictures = score(heads, checkpoint.until_asked(asked, views),
                                            args.save_images if done == args.iters else 0)
                history.append(dict(iteration=done, iou=iou(confusion), constant=constant_miou(confusion[0])))
                miou = history[-1]["iou"].nanmean(-1)
                print(f"iteration {done:,}/{args.iters:,}  mIoU {miou.min():.2f}"
                      + f" to {miou.max():.2f}, {len(heads)} heads" * (len(heads) > 1), flush=True)
            if evaluated or done > start and done % args.save_every == 0:
                save(done)
            if asked:                                               # perhaps only since the line above
                save(done)
                checkpoint.leave(asked, f"after iteration {done:,}")
    return history, pictures


# ------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def predict(head, features, placed, size, label_size, chunk=32):
    """(B, H, W) classes of pictures of (h, w) = `size`: window logits added up at (h, w), divided by how many windows
    cover a pixel, resized to the labels' (H, W), argmax. By `chunk` classes: 150 at once would take gigabytes."""
    corners, (height, width) = placed
    logits, best, classes = head(features).unflatten(0, (len(corners), -1)), [], []     # (n, B, C, h', w')
    for first in range(0, logits.shape[2], chunk):
        part = logits[:, :, first:first + chunk]
        total, count = part.new_zeros(*part.shape[1:3], *size), part.new_zeros(size)
        for (top, left), window in zip(corners, part, strict=True):
            total[..., top:top + height, left:left + width] += upsample(window, (height, width))
            count[top:top + height, left:left + width] += 1
        value, index = upsample(total / count, label_size).max(1)
        best.append(value); classes.append(index + first)
    return torch.stack(classes).gather(0, torch.stack(best).argmax(0, keepdim=True))[0]


def score(heads, views, keep):
    """Confusion matrices (K, C, C), pixels by label and prediction over all of `views`; and (picture, label, what the
    first head predicts) of the first `keep` pictures."""
    heads.eval()
    C = heads[0].conv.out_channels
    confusion, pictures = torch.zeros(len(heads), C, C, dtype=torch.int64, device=heads[0].conv.weight.device), []
    for images, labels, placed, features in views:
        labelled = labels != IGNORE
        cells = C * labels[labelled].long()
        for k, head in enumerate(heads):
            predicted = predict(head, features, placed, images.shape[2:], labels.shape[1:])
            confusion[k] += torch.bincount(cells + predicted[labelled], minlength=C * C).view(C, C)
            if k == 0 and len(pictures) < keep:
                pictures += zip(images, labels.cpu(), predicted.cpu(), strict=True)
    heads.train()
    return confusion.cpu(), pictures[:keep]


def iou(confusion):
    """(..., C) percent, of pixel counts (..., C, C); nan for a class that is neither a label nor predicted."""
    hits = confusion.diagonal(dim1=-2, dim2=-1).double()
    return 100 * hits / (confusion.sum(-1) + confusion.sum(-2) - hits)


def constant_miou(confusion):
    """mIoU, in percent, of predicting the most frequent class everywhere."""
    pixels = confusion.sum(-1)                                      # (C,) of labels
    return 100 * (pixels.max() / pixels.sum() / (pixels > 0).sum()).item()


# ------------------------------------------------------------------------------------------- results
def mean_sd(values):
    """(mean, sample standard deviation or None of a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def show(values):
    mean, sd = mean_sd(values)
    return f"{mean:.2f}" + (f" ± {sd:.2f}" if sd is not None else "") + " %"


def head_metrics(ious):
    """Result of the heads that differ in the seed alone, of their IoU (E, S, C): each seed's best evaluation counts."""
    miou = ious.nanmean(-1)                                         # (E, S)
    best, best_at = miou.max(0)
    per_class = ious[best_at, torch.arange(len(best_at))].nanmean(0).tolist()
    (mean, sd), (mean_last, sd_last) = mean_sd(best.tolist()), mean_sd(miou[-1].tolist())
    return dict(miou=mean, miou_sd=sd, miou_seeds=best.tolist(), miou_last=mean_last, miou_last_sd=sd_last,
                miou_last_seeds=miou[-1].tolist(), iou=[None if math.isnan(value) else value for value in per_class])


def colours():
    """PASCAL VOC's palette (256, 3): bit 0, 3, 6 ... of a class go to the high bits of red, 1, 4, 7 ... to green's."""
    bits = np.arange(256)[:, None, None] >> (3 * np.arange(8) + np.arange(3)[:, None]) & 1      # (256, 3, 8)
    return (bits << np.arange(7, -1, -1)).sum(-1).astype(np.uint8)


def draw_images(file, pictures):
    """A row per picture: the picture, its label, the prediction, both in VOC's colours."""
    tile, palette, rows = 256, colours(), []
    for image, label, predicted in pictures:
        views = [image.permute(1, 2, 0).numpy(), palette[label.numpy()], palette[predicted.numpy()]]
        height = round(tile * image.shape[1] / image.shape[2])
        tiles = [Image.fromarray(view).resize((tile, height), Image.Resampling.NEAREST) for view in views]
        rows.append(np.concatenate([np.pad(t, ((2, 2), (2, 2), (0, 0)), constant_values=255) for t in tiles], axis=1))
    Image.fromarray(np.concatenate(rows)).save(file)
    print(f"{file}: {len(pictures)} val images, each with label and prediction of the last evaluation")


def summarize(history, kinds, args):
    """Metrics of the first kind of head, and below `heads` of every kind."""
    ious = torch.stack([entry["iou"] for entry in history]).unflatten(1, (len(kinds), args.seeds))      # (E, ., S, C)
    results = [head_metrics(ious[:, i]) for i in range(len(kinds))]
    heads = [dict(block=block, concat_cls=concat, **result)
             for (block, concat), result in sorted(zip(kinds, results, strict=True), key=lambda pair: pair[0])]
    return dict(results[0], miou_constant=history[-1]["constant"], heads=heads)


def report(path, metrics, names, args):
    """Prints what the JSON line holds."""
    print("block  [CLS]   mIoU, best of the evaluations, and last"
          + f", mean ± sd of {args.seeds} head seeds" * (args.seeds > 1))
    for head in metrics["heads"]:
        print(f"{head['block']:5}  {'beside' if head['concat_cls'] else 'no':6}  {show(head['miou_seeds'])}, "
              f"{show(head['miou_last_seeds'])}")
    print("IoU at the best: " + ", ".join(f"{name} {'-' if value is None else f'{value:.1f}'}"
                                          for name, value in zip(names, metrics["iou"], strict=True)))
    print(f"{path}: mIoU {show(metrics['miou_seeds'])} best, {show(metrics['miou_last_seeds'])} last; "
          f"{metrics['miou_constant']:.2f} % from the most frequent class everywhere"
          + f"; ± is the spread of {args.seeds} heads on one backbone, not of pretraining" * (args.seeds > 1))


def describe(args, config, train, val, fingerprint, block, concat_cls):
    """Every value that decides the headline. The other heads are not among them: each trains for itself."""
    long = args.short_side and args.short_side * LONG_SIDE[args.data]
    return dict(
        probe="seg", data=args.data, fingerprint=fingerprint, train=len(train), val=len(val),
        classes=len(NAMES[args.data]), partial=args.allow_partial,
        train_list=os.path.basename(args.voc_list or "train"), feature="patches, final norm", block=block,
        concat_cls=concat_cls, crop=args.crop or config.image_size, stride=args.stride, short_side=args.short_side,
        long_side=None if long == math.inf else long, iters=args.iters, batch_size=args.batch_size, seeds=args.seeds,
        head="BatchNorm, 1x1 convolution", optimizer="AdamW 0.9 0.999", lr=RATE, weight_decay=WEIGHT_DECAY,
        schedule="linear to 0, warm-up from 1e-6", warmup=round(args.iters * WARMUP), loss="cross-entropy / all pixels",
        augmentation="none" if args.data == "shapes" else "resize 0.5-2, crop 0.75, flip 0.5, photometric",
        ignore=IGNORE, label_resolution="original", padding="to whole patches, zeros around", precision=args.amp,
        eval_every=args.eval_every, reported="best over evaluations, of each head seed",
    )


def check_batch(args, config):
    crop = args.crop or config.image_size
    if crop <= config.patch_size and args.batch_size == 1:
        raise ValueError(f"--crop {crop} --batch-size 1: one patch of {config.patch_size} pixels, and BatchNorm needs "
                         "two; raise either")


def evaluate(path, args, device, opened):
    """The probe of one file of weights: prints it and writes the result beside it. `opened`: data sets by size."""
    start = time.perf_counter()
    model, facts = checkpoint.open_weights(path, args.which, args.like, args.seed, device, args.heads)
    config = model.config
    check_batch(args, config)
    blocks = sorted({model.index(block) for block in args.blocks or range(config.depth)})
    concats = {"no": [False], "yes": [True], "both": [False, True]}[args.concat_cls]
    kinds = [(block, concat) for block in reversed(blocks) for concat in concats]   # the first one is the headline
    size = config.image_size if args.data == "shapes" else None
    if size not in opened:
        opened[size] = open_data(args, size)
    train, val, fingerprint = opened[size]
    names = NAMES[args.data]
    protocol = describe(args, config, train, val, fingerprint, *kinds[0])
    result = dict(probe="seg", data=args.data, root=args.root, **facts, config=dataclasses.asdict(config),
                  seed=args.seed, metrics=None, protocol=protocol)
    default = checkpoint.result_path(path, "seg", args.data, config, args.seed)
    out, finished = checkpoint.claim(args.out, default, result)
    there = {(head["block"], head["concat_cls"]) for head in finished["metrics"]["heads"]} if finished else set()
    if there - set(kinds) and set(kinds) - there:
        raise ValueError(f"{out}: holds heads of other blocks, which would be lost; ask for all of them together, or "
                         "give another --out")
    if there >= set(kinds):
        if args.save_images:
            print(f"{out}: no pictures drawn, nothing is evaluated again; remove it to draw them")
        checkpoint.say_finished(out, finished)
        return
    stamp = dict(protocol, heads=kinds, seed=args.seed, which=facts["which"], weights_sha256=facts["weights_sha256"],
                 config=dataclasses.asdict(config))
    heads = nn.ModuleList(Head(block, concat, seed, config.dim, len(names)) for block, concat in kinds
                          for seed in range(args.seed, args.seed + args.seeds)).to(device)
    history, pictures = train_heads(model, train, val, heads, args, device, out.with_suffix(".head.pt"), stamp)

    metrics = summarize(history, kinds, args)
    report(path, metrics, names, args)
    print(f"{time.perf_counter() - start:.0f} s")
    if pictures:
        draw_images(out.with_suffix(".png"), pictures)
    checkpoint.write_result(out, dict(result, metrics=metrics))


def main(argv=None):
    checkpoint.print_any_path()
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = {}
    for path in args.weights:
        try:
            evaluate(path, args, device, opened)
        except (ValueError, OSError) as error:                      # of the weights or of a picture, with its name
            line = str(error).strip().splitlines()[-1]              # a loader process puts its traceback before it
            sys.exit(line.removeprefix("ValueError: "))


if __name__ == "__main__":
    main()
