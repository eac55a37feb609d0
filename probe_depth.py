"""Depth probe: RMSE in metres of a linear head on four frozen blocks of patches and [CLS].

    python probe_depth.py --weights runs/shapes_entmax15_s0/checkpoint.pt
    python probe_depth.py --weights random --like runs/shapes_entmax15_s0/checkpoint.pt     the untrained control
    python probe_depth.py --weights dino_deitsmall16_pretrain.pth --data nyu --root NYU                 kitti alike
    python probe_depth.py --weights dino_deitsmall16_pretrain.pth --data sunrgbd --root SUN --train-root NYU

The "lin. 4" protocol of DINOv2 (Oquab et al. 2024): 38,400 iterations of 16 crops, AdamW, the scale-invariant loss of
Eigen et al. (2014), depth as the weighted mean of 256 fixed bins; the paper's learning rate, and its best RMSE over
the evaluations. Beside it: the RMSE of one constant for all pixels, which any probe must beat.
The last line printed is the result as JSON, also written to --out; an interrupted probe goes on where it was saved.

    B images, D width, h w patches, K bins, H W pixels, S head seeds; depth is in metres, 0 where not measured
"""

import argparse
import dataclasses
import functools
import math
import os
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

# What --data selects. Shapes are not augmented: one frozen forward is kept and the heads train on it.
PAPER = dict(iters=38_400, batch_size=16, lr=1e-3, evaluations=24, save_every=800, log_every=100,
             workers=min(10, os.cpu_count() or 1))
RECIPES = {
    "nyu": dict(PAPER, crop=(416, 544)),
    "kitti": dict(PAPER, crop=(352, 704)),
    "sunrgbd": dict(PAPER, crop=(416, 544)),
    # Not yet converged: RMSE 2.45 m after 1,000 iterations, 2.25 after these, falling. At rates of 0.01 and 0.1 it is
    # higher after as many. Chosen on one untrained and one softmax network alone.
    "shapes": dict(PAPER, iters=2_000, batch_size=4, lr=3e-2, evaluations=1, workers=0, save_every=500, log_every=200,
                   crop=None),
}
SCENES = dict(train=1_000, val=500, cards=5)                        # of shapes; so many cards at most
BINS, MIN_DEPTH, MAX_NORM = 256, 1e-3, 35.0             # bins from MIN_DEPTH to MAX_DEPTH; norm of a head's gradient
MAX_DEPTH = {"nyu": 10.0, "kitti": 80.0, "sunrgbd": 10.0, "shapes": 10.0}
CAP = {"sunrgbd": 8.0}                                              # metres that truth and prediction are clipped at
# Rows and columns that are evaluated, half-open. Eigen et al. 2014, for SUN RGB-D at native size; and Garg et al. 2016,
# 0.40810811 to 0.99189189 of the 352 rows and 0.03594771 to 0.96405229 of the 1216 columns.
WINDOW = {"nyu": (45, 471, 41, 601), "sunrgbd": (45, 471, 41, 601), "kitti": (143, 349, 43, 1172)}


# ------------------------------------------------------------------------------------------- what it computes
class Head(nn.Module):
    """1x1 convolution to K bins; depth is the mean of theirs with weights relu(.) + 0.1, so it lies between them."""

    def __init__(self, dim, max_depth, seed):
        super().__init__()
        draws, bound = torch.Generator().manual_seed(seed), (8 * dim) ** -0.5       # torch's default of a convolution
        self.weight = nn.Parameter(torch.empty(BINS, 8 * dim).uniform_(-bound, bound, generator=draws))
        self.bias = nn.Parameter(torch.empty(BINS).uniform_(-bound, bound, generator=draws))
        bins = torch.linspace(MIN_DEPTH, max_depth, BINS)
        self.register_buffer("moments", torch.stack([bins, torch.ones(BINS)], 1), persistent=False)     # (K, 2)

    def forward(self, cls, patches):
        """(B, 4h, 4w) metres. The convolution comes before the x4 upsampling: both are linear, so the logits are the
        same, at 1/16 of the cost."""
        x = torch.cat([patches, cls[:, :, None, None].expand_as(patches)], -1)      # (B, 4, h, w, 2D)
        logits = F.linear(x.permute(0, 2, 3, 1, 4).flatten(3), self.weight, self.bias)      # (B, h, w, K)
        relu = F.interpolate(logits.permute(0, 3, 1, 2), scale_factor=4, mode="bilinear").relu_()
        # (B, 4h, 4w, 2): sums over the bins of weight x depth, and of weight
        sums = relu.permute(0, 2, 3, 1) @ self.moments + 0.1 * self.moments.sum(0)
        return sums[..., 0] / sums[..., 1]


def predict(head, cls, patches, size, mirrored=False):
    """(B, *size) metres. Of a mirrored pair of images, (1, *size): the mean of the two, the second turned back."""
    depth = F.interpolate(head(cls, patches)[:, None], size=tuple(size), mode="bilinear")[:, 0]
    return torch.stack([depth[0], depth[1].flip(-1)]).mean(0, keepdim=True) if mirrored else depth


def sig_loss(prediction, target, warmup):
    """Mean over pairs of images (DINOv2's batch is 8 x 2) of sqrt(var g + 0.15 (mean g)^2), with g = log(p + 0.001) -
    log(t + 0.001) on the measured pixels of both, also beyond the last bin, as DINOv2's released configurations have
    it; in the warm-up without var g. Pairs with fewer than two do not count."""
    losses = []
    for p, t in zip(prediction.split(2), target.split(2), strict=True):
        valid = t > 0
        g = (p[valid] + 0.001).log() - (t[valid] + 0.001).log()
        if len(g) > 1:
            losses.append(((0 if warmup else g.var()) + 0.15 * g.mean().square()).sqrt())
    return torch.stack(losses).mean() if losses else 0 * prediction.sum()


def learning_rate(t, args):
    """Cosine from the recipe's lr to 1e-8 of it, in the first third of the iterations times a line from 0.001 to 1."""
    cosine = 1e-8 + (1 - 1e-8) * (1 + math.cos(math.pi * t / args.iters)) / 2
    return args.lr * cosine * (1 - 0.999 * max(0, 1 - 3 * t / args.iters))


def scored(depth, data):
    """bool (..., H, W): the pixels whose depth is known, in range and inside the window."""
    if data == "shapes":
        return depth > 0                                            # the backdrop, at 10 m, counts
    top, bottom, left, right = WINDOW[data]
    inside = torch.zeros_like(depth, dtype=torch.bool)
    inside[..., top:bottom, left:right] = True
    return inside & (depth > MIN_DEPTH) & (depth < MAX_DEPTH[data])


def errors(p, t):
    """(3,) RMSE in metres, mean |p - t| / t, and percent of pixels within a factor of 1.25."""
    near = torch.maximum(p / t, t / p) < 1.25
    return torch.stack([(p - t).square().mean().sqrt(), ((p - t).abs() / t).mean(), 100 * near.double().mean()])


@torch.no_grad()
def measure(heads, batches, constant, args):
    """({metric: mean over images, of each head}, depth maps (H, W) that the first head predicts for those to draw).
    `batches`: val_batches. An image without a pixel to score is left out."""
    table, maps, seen, skipped, cap = [], [], 0, 0, CAP.get(args.data, math.inf)
    for cls, patches, target in batches:
        target = target.clamp(max=cap)
        predictions = [predict(head, cls, patches, target.shape[1:], args.data != "shapes") for head in heads]
        maps += [depth.cpu() for i, depth in enumerate(predictions[0], seen) if i in args.drawn]
        seen += len(target)
        predictions.append(torch.full_like(target, constant))       # as if a head
        for i, valid in enumerate(scored(target, args.data)):
            if valid.any():
                t = target[i][valid].double()
                table.append(torch.stack([errors(p[i][valid].double().clamp(max=cap), t) for p in predictions]))
            skipped += not valid.any()
    rmse, abs_rel, d1 = torch.stack(table).mean(0).T.tolist()       # S + 1 values each
    return dict(rmse=rmse[:-1], abs_rel=abs_rel[:-1], d1=d1[:-1], rmse_constant=rmse[-1], constant=constant,
                skipped=skipped), maps


def best_constant(train, args, most=500):
    """Mean in metres of the depths of at most 500 evenly spread train maps: no constant has less square error there."""
    if isinstance(train, tuple):                                    # of extract
        maps = train[2]
    else:
        some = np.linspace(0, len(train) - 1, min(len(train), most)).round().astype(int).tolist()
        maps = (item["depth"] for item in DataLoader(Subset(train, some), batch_size=None, num_workers=args.workers))
    total, pixels = 0.0, 0
    for depth in maps:
        valid = depth[(depth > 0) & (depth <= MAX_DEPTH[args.data])]
        total, pixels = total + valid.double().sum().item(), pixels + len(valid)
    return total / pixels


# ------------------------------------------------------------------------------------------- frozen features, training
def four_blocks(depth):
    """0-based indices of four evenly spaced blocks, the last one included."""
    return [depth * i // 4 - 1 for i in (1, 2, 3, 4)]


@torch.no_grad()                                                    # inference tensors could not enter a backward
def frozen(model, images, args):
    """float32 [CLS] (B, 4, D), patches (B, 4, h, w, D) of four blocks, no final norm, of uint8 images (B, 3, H, W)."""
    images = vit.pad_to_patches(vit.normalize(images), model.config.patch_size)
    with checkpoint.autocast(images.device, args.amp):
        features = model.features(images, four_blocks(model.config.depth), norm=False)
    return torch.stack([f.cls for f in features], 1).float(), torch.stack([f.patches for f in features], 1).float()


def train_step(heads, optimizer, cls, patches, depth, t, args):
    """Step t of every head; returns the mean of their losses."""
    optimizer.param_groups[0]["lr"] = learning_rate(t, args)
    total = 0
    for head in heads:                                              # one graph at a time in memory
        loss = sig_loss(predict(head, cls, patches, depth.shape[1:]), depth, t < args.loss_warmup)
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), MAX_NORM)       # of each alone: a head does not know the others
        total = total + loss.detach() / len(heads)
    optimizer.step(); optimizer.zero_grad()
    return total


def train_heads(model, train, val, args, device, file, stamp):
    """(history of the evaluations, depth maps predicted in the last one for the images to draw) of --iters iterations,
    going on from `file` if it is there. `stamp`: all that they depend on."""
    seeds = range(args.seed, args.seed + args.seeds)
    heads = nn.ModuleList(Head(model.config.dim, MAX_DEPTH[args.data], seed) for seed in seeds).to(device)
    optimizer = torch.optim.AdamW(heads.parameters(), betas=(0.9, 0.999), weight_decay=0.01)
    start, history = checkpoint.resume_heads(file, stamp, heads, optimizer)
    if history and history[-1]["iteration"] == args.iters:
        return history, []
    if args.data == "shapes":
        train, val = extract(model, train, args, device), extract(model, val, args, device)
    constant = best_constant(train, args)
    logs, saves, evaluations = ({*range(every, args.iters, every), args.iters}      # after these iterations
                                for every in (args.log_every, args.save_every, args.eval_every))
    logs |= {start + 1, start + 10}                                 # soon, then now and then
    total, said, eta = 0, start, checkpoint.Eta(start, args.iters)

    def save(done):
        checkpoint.write_checkpoint(file, dict(iteration=done, stamp=stamp, heads=heads.state_dict(),
                                               optimizer=optimizer.state_dict(), history=history))

    with checkpoint.noted_signals() as asked:
        stream = batches(model, train, args, device, start)
        for t in range(start, args.iters + 1):
            if t in evaluations and t not in [row["iteration"] for row in history]:
                seen = checkpoint.until_asked(asked, val_batches(model, val, args, device))
                row, maps = measure(heads, seen, constant, args)
                history.append(dict(iteration=t, **row))
                checkpoint.progress.say(f"iteration {t:,}/{args.iters:,}  RMSE {show(row['rmse'])} m")
                save(t)
            if t == args.iters:
                return history, maps
            total = total + train_step(heads, optimizer, *next(stream), t, args)

            done, ending = t + 1, asked[:1]                         # a signal that comes after this counts next time
            saving = ending or done in saves | evaluations
            if (saving or done in logs) and not math.isfinite(total):
                raise ValueError(f"{file}: the loss is not finite at iteration {done:,}, and nothing of it is saved: "
                                 f"the features overflow with --amp {args.amp}, or the heads diverge")
            if done in logs:
                line = f"{eta(done)}  loss {total / (done - said):.4f}  iteration {done:,}/{args.iters:,}"
                checkpoint.progress.show(line, stays=done in evaluations)
                total, said = 0, done
            if saving:
                save(done)
            if ending:
                checkpoint.leave(ending, f"after iteration {done:,}")


def extract(model, images, args, device, chunk=16):
    """[CLS] (N, 4, D), patches (N, 4, h, w, D) and depth (N, H, W) of all images."""
    parts = [(*frozen(model, batch["image"].to(device), args), batch["depth"].to(device))
             for batch in checkpoint.progress.of(DataLoader(images, chunk, num_workers=args.workers),
                                                 f"features of {len(images):,} images, batch")]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def batches(model, train, args, device, start):
    """([CLS], patches, depth) of the batches from iteration `start` on. `train`: pictures, or the features of all of
    them where there is no augmentation."""
    if isinstance(train, tuple):
        for keys in BatchOrder(len(train[0]), args, start):
            yield tuple(x[[i for _, i in keys]] for x in train)
        return
    crops, order = TrainCrops(train, args.crop, args.seed), BatchOrder(len(train), args, start)
    for batch in DataLoader(crops, batch_sampler=order, num_workers=args.workers, pin_memory=device.type == "cuda",
                            worker_init_fn=checkpoint.deaf_worker):
        image, depth = (batch[name].to(device, non_blocking=True) for name in ("image", "depth"))
        yield *frozen(model, image, args), depth


def val_batches(model, val, args, device, chunk=16):
    """([CLS], patches, depth) of the val images in order; of pictures, features of each and of its mirror image."""
    if isinstance(val, tuple):
        yield from zip(*(x.split(chunk) for x in val), strict=True)
        return
    loader = DataLoader(val, batch_size=None, num_workers=args.workers, pin_memory=device.type == "cuda",
                        worker_init_fn=checkpoint.deaf_worker)
    for item in checkpoint.progress.of(loader, "evaluation, picture"):
        image, depth = (item[name].to(device, non_blocking=True) for name in ("image", "depth"))
        yield *frozen(model, torch.stack([image, image.flip(-1)]), args), depth[None]


# ------------------------------------------------------------------------------------------- data
# How users have the data sets on disk. train, val: list of the split, number of its images; places: where its pictures
# and depth maps may be: BTS keeps NYU's splits apart, and KITTI's archive of depth maps unpacks into train/ and val/.
# The names of the lists are those of Monocular-Depth-Estimation-Toolbox; BTS has the same lines under names of its own.
BTS_LISTS = {"nyu_train.txt": "nyudepthv2_train_files_with_gt.txt", "nyu_test.txt": "nyudepthv2_test_files_with_gt.txt",
             "kitti_eigen_train.txt": "eigen_train_files_with_gt.txt",
             "kitti_eigen_test.txt": "eigen_test_files_with_gt.txt"}
LAYOUTS = {
    "nyu": dict(
        tree="nyu_train.txt, nyu_test.txt and the <scene>/rgb_*.jpg, <scene>/sync_depth_*.png that they list",
        train=("nyu_train.txt", 24_231), val=("nyu_test.txt", 654), places=2 * [["", "sync", "official_splits/test"]]),
    "kitti": dict(
        tree="kitti_eigen_train.txt, kitti_eigen_test.txt, input/<date>/<drive>_sync/image_02/data/*.png and "
             "gt_depth/<drive>_sync/proj_depth/groundtruth/image_02/*.png",
        train=("kitti_eigen_train.txt", 23_158), val=("kitti_eigen_test.txt", 652),
        places=[["input", ""], [folder + split for split in ("", "/train", "/val") for folder in
                            ("gt_depth", "gt_depth/data_depth_annotated", "data_depth_annotated", ".")]]),
    "sunrgbd": dict(                                                # its list is of val; train: every other frame
        tree="SUNRGBD_val_splits.txt and SUNRGBD/.../<id>/{image/*.jpg,depth/*.png}",
        train=("SUNRGBD_val_splits.txt", 5_285), val=("SUNRGBD_val_splits.txt", 5_050), places=2 * [[""]]),
}
ORDER, CROP = range(2)                                              # streams of random numbers


class DepthPictures:
    """The listed (picture, depth map) files of one split, cut or resized to the geometry of their data set; items as
    those of Shapes: dict(image uint8 (3, H, W), depth float32 (H', W') metres, 0 where nothing was measured)."""

    def __init__(self, source, split, pairs):
        self.source, self.split, self.pairs = source, split, pairs

    def __len__(self):
        return len(self.pairs)

    def read(self, i):
        """uint8 (H, W, 3) and float32 depth (H, W); the depth of SUN RGB-D's val split keeps its own size."""
        file, depth_file = self.pairs[i]
        image, depth = vit.read_image(file), read_depth(depth_file, self.source)
        (width, height), (h, w) = image.size, depth.shape
        if (h, w) != (height, width):
            raise ValueError(f"{depth_file}: {w}x{h} pixels, its picture {file} {width}x{height}; mend or remove one")
        if self.source == "sunrgbd":
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
            # from four neighbours, as OpenCV's bilinear; Pillow's takes more of them where it shrinks
            pixels = (F.interpolate(pixels, (480, 640), mode="bilinear")[0] + 0.5).byte()
            if self.split == "train":
                depth = np.asarray(Image.fromarray(depth).resize((640, 480), Image.NEAREST))
            return pixels.permute(1, 2, 0).numpy(), depth
        rows, columns = slice(None), slice(None)
        if self.source == "kitti":                                  # the benchmark's crop, at the bottom
            if w < 1216 or h < 352:
                raise ValueError(f"{file}: {w}x{h} pixels, smaller than KITTI's crop 1216x352; take the raw pictures")
            rows, columns = slice(h - 352, h), slice((w - 1216) // 2, (w - 1216) // 2 + 1216)
        elif self.split == "train":                                 # NYU without its white border
            rows, columns = slice(45, 472), slice(43, 608)
        return np.asarray(image)[rows, columns], depth[rows, columns]

    def __getitem__(self, i):
        return as_item(*self.read(i))


def read_depth(path, source):
    """(H, W) float32 metres of a 16-bit depth map; 0 where nothing was measured."""
    try:
        with Image.open(path) as image:
            mode, raw = image.mode, np.asarray(image)
    except Exception as error:
        raise ValueError(f"{path}: unreadable ({error}); mend or remove it") from error
    if not mode.startswith("I") or raw.min() < 0 or raw.max() > 65535:      # I;16, or I of older Pillows
        raise ValueError(f"{path}: values from {raw.min()} to {raw.max()} of mode {mode}, not a 16-bit depth map; take "
                         "the data set's own file")
    raw = raw.astype(np.uint16)
    if source == "sunrgbd":                                         # its files are rotated left by three bits
        raw = (raw >> 3) | (raw << 13)
    return raw.astype(np.float32) / (256 if source == "kitti" else 1000)                 # units per metre


class TrainCrops:
    """Augmented crop of a train picture and its depth map, a function of (seed, epoch, index)."""

    def __init__(self, pictures, crop, seed):
        self.pictures, self.crop, self.seed = pictures, crop, seed

    def __getitem__(self, key):
        image, depth = self.pictures.read(key[1])
        (h, w), (height, width) = depth.shape, self.crop
        if h < height or w < width:
            raise ValueError(f"{self.pictures.pairs[key[1]][0]}: {w}x{h} pixels to crop {width}x{height} from; give a "
                             "smaller --crop H W")
        rng = np.random.default_rng((CROP, self.seed, *key))
        return as_item(*augment(rng, image, depth, self.crop, 0.1 if self.pictures.source == "kitti" else 0.25))


def augment(rng, image, depth, crop, brightness):
    """Rotation, mirror image, crop and colours of BTS (Lee et al. 2019), which DINOv2 took over. uint8 (H, W, 3) and
    float32 (H, W) -> the same two at the size of the crop."""
    if rng.random() < 0.5:
        degrees = rng.uniform(-2.5, 2.5)
        image, depth = (np.asarray(Image.fromarray(x).rotate(degrees, resample)) for x, resample in
                        ((image, Image.BILINEAR), (depth, Image.NEAREST)))    # 0 = unmeasured
    if rng.random() < 0.5:
        image, depth = image[:, ::-1], depth[:, ::-1]
    top, left = (rng.integers(side - part + 1) for side, part in zip(depth.shape, crop, strict=True))
    image, depth = (x[top:top + crop[0], left:left + crop[1]] for x in (image, depth))
    if rng.random() < 0.5:
        image = image.astype(np.float32) ** rng.uniform(0.9, 1.1)   # of 0..255, not 0..1: as in DINOv2
        image = image * rng.uniform(1 - brightness, 1 + brightness) * rng.uniform(0.9, 1.1, 3)
        image = (image.clip(0, 255) + 0.5).astype(np.uint8)         # a quarter of the bytes to the device
    return image, depth


def as_item(image, depth):
    return dict(image=torch.from_numpy(image.copy()).permute(2, 0, 1), depth=torch.from_numpy(depth.copy()))


class BatchOrder:
    """Batch sampler: batches of (epoch, index) from iteration `start` on; each epoch has an order of its own."""

    def __init__(self, n, args, start):
        self.n, self.args, self.start = n, args, start

    def __iter__(self):
        n, size, seed = self.n, self.args.batch_size, self.args.seed
        order = functools.lru_cache(1)(lambda epoch: np.random.default_rng((ORDER, seed, epoch)).permutation(n))
        for t in range(self.start, self.args.iters):
            yield [(at // n, int(order(at // n)[at % n])) for at in range(t * size, (t + 1) * size)]


def open_data(args, size):
    """(train, val) data sets, and the fingerprint of their files."""
    if args.data == "shapes":                                       # rendered once for all checkpoints
        return *(list(Shapes(split, size, SCENES[split], SCENES["cards"])) for split in ("train", "val")), FINGERPRINT
    roots = args.train_root or args.root, args.root
    train, val = open_split(args.train_on, "train", roots[0], args), open_split(args.data, "val", roots[1], args)
    files = ([picture for picture, _ in images.pairs] for images in (train, val))
    checkpoint.refuse_trained_on(args.root, *files, copies=False)   # frames of all scenes have the same names
    return train, val, "-".join(checkpoint.fingerprint(Path(root), *zip(*split.pairs, strict=True))
                                for root, split in zip(roots, (train, val), strict=True))


def open_split(source, split, root, args):
    """Pictures of a split, once their number has been compared with what the data set holds."""
    name, expected = LAYOUTS[source][split]
    file = Path(root, name)
    if not file.is_file() and Path(root, BTS_LISTS.get(name, "")).is_file():
        file = Path(root, BTS_LISTS[name])
    if not file.is_file():
        found = sorted(os.listdir(root))[:8] if os.path.isdir(root) else "no such folder"
        raise FileNotFoundError(f"{file}: no such file; {root} must hold {LAYOUTS[source]['tree']}, and holds {found}")
    pairs = read_list(file, root, LAYOUTS[source]["places"])
    if (source, split) == ("sunrgbd", "train"):
        pairs = unlisted(root, pairs)
    print(f"{source} {split}: {count(len(pairs), 'image')}")
    args.partial |= len(pairs) < expected
    if len(pairs) < (1 if args.allow_partial else expected):
        raise ValueError(f"{file}: {count(len(pairs), f'{split} image')} of {expected:,}; complete them"
                         + ", or give --allow-partial" * (len(pairs) > 0))
    pictures = DepthPictures(source, split, pairs)
    refuse_void(pictures)
    return pictures


def read_list(file, root, places):
    """[(picture, depth map)] of lines 'picture depth-map-or-None [focal length]'. `places`: folders below `root` for
    pictures, and for depth maps; the first that has the file counts."""
    pairs = []
    for number, names in enumerate(map(str.split, checkpoint.read_lines(file)), 1):
        if len(names) == 1:
            raise ValueError(f"{file}, line {number}: {names[0]!r} names no picture and depth map")
        if not names or names[1] == "None":
            continue
        paths = [[Path(root, folder, name.lstrip("/")) for folder in folders]
                 for name, folders in zip(names, places, strict=False)]
        paths[0] += [path.with_suffix(".jpg") for path in paths[0]]     # as KITTI's 175 GB of .png are often kept
        found = [next(filter(Path.is_file, some), None) for some in paths]
        if None in found:
            raise FileNotFoundError(f"{file}, line {number}: {paths[found.index(None)][0]}: no such file; complete it")
        pairs.append(tuple(found))
    return pairs


def unlisted(root, val):
    """The (picture, depth map) of every SUN RGB-D frame below root/SUNRGBD that is not one of the pairs `val`."""
    seen, pairs = {os.path.realpath(depth.parent.parent) for _, depth in val}, []
    for frame, below, _ in os.walk(Path(root, "SUNRGBD"), followlinks=True):
        real = os.path.realpath(frame)
        below[:] = sorted(name for name in below if name[0] != "." and real not in seen)    # nor a loop of links
        seen.add(real)
        if "depth" in below:
            images, maps = (sorted(path for path in Path(frame, folder).glob("[!.]*") if path.suffix.lower() == suffix)
                            for folder, suffix in (("image", ".jpg"), ("depth", ".png")))
            pairs += [(image, depth) for image in images[:1] for depth in maps]
    return pairs


def refuse_void(pictures):
    """Without a pixel to learn from, or one to score, hours of training end in nothing. 64 maps or more are read,
    spread over the split; if all are void, 500. A few void ones do no harm."""
    source, val, most = pictures.source, pictures.split == "val", MAX_DEPTH[pictures.source]
    usable = scored if val else lambda depth, _: (depth > 0) & (depth <= most)      # as best_constant takes them
    some = range(0, len(pictures), math.ceil(len(pictures) / 500))
    void = [not usable(pictures[i]["depth"], source).any() for i in some[::len(some) // 64 or 1]]
    if all(void) and not any(usable(pictures[i]["depth"], source).any() for i in some):
        depth = pictures[0]["depth"]
        raise ValueError(f"{pictures.pairs[0][1]}: no valid pixel: depths from {depth.min():g} to {depth.max():g} m, "
                         f"none in (0, {most:g}]" + " inside the window" * val + f"; so all of "
                         f"{count(len(some), 'depth map')} looked at; take the data set's own files")


def count(n, noun):
    return f"{n:,} {noun}" + "s" * (n != 1)


# ------------------------------------------------------------------------------------------- results
def show(values):
    mean, sd = checkpoint.mean_sd(values)
    return f"{mean:.3f}" + (f" ± {sd:.3f}" if sd is not None else "")


def best_metrics(history):
    """Means over head seeds of the evaluation with the best RMSE (the paper: best validation performance)."""
    seeds, last = range(len(history[0]["rmse"])), history[-1]
    best = [min(history, key=lambda row: row["rmse"][k]) for k in seeds]
    values = {name: [best[k][name][k] for k in seeds] for name in ("rmse", "abs_rel", "d1")}
    values["rmse_last"] = last["rmse"]
    return dict({name: checkpoint.mean_sd(value)[0] for name, value in values.items()},
                **{f"{name}_seeds": value for name, value in values.items()},
                rmse_sd=checkpoint.mean_sd(values["rmse"])[1], best_iterations=[row["iteration"] for row in best],
                **{name: last[name] for name in ("rmse_constant", "constant", "skipped")})


def draw_images(file, items, maps, max_depth, width=400, gap=4):
    """A row for each image: input, label up to `max_depth`, prediction; both depths on the label's scale. A pixel of
    the label shows the farthest of those below it, or the few that KITTI's laser measured would hardly be seen."""
    rows = []
    for item, prediction in zip(items, maps, strict=True):
        label = item["depth"].where(item["depth"] <= max_depth, 0)
        size = width, round(width * label.shape[0] / label.shape[1])
        farthest = F.adaptive_max_pool2d(label[None], size[::-1])[0]
        tiles = [Image.fromarray(item["image"].permute(1, 2, 0).numpy()).resize(size, Image.BICUBIC)]
        tiles += [colour(x.numpy(), label.max().item()).resize(size, Image.NEAREST) for x in (farthest, prediction)]
        rows.append(np.hstack([np.pad(tile, ((0, gap), (0, gap), (0, 0)), constant_values=255) for tile in tiles]))
    Image.fromarray(np.vstack(rows)).save(file)
    print(f"{file}: {count(len(maps), 'val image')} with label and prediction")


def colour(depth, max_depth):
    """PIL picture of depths 0..max_depth in matplotlib's viridis, dark to bright; black where there is none."""
    anchors = np.array([[68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142], [33, 145, 140], [40, 174, 128],
                        [94, 201, 98], [173, 220, 48], [253, 231, 37]])                     # at 0, 1/8, ..., 1
    place = (depth / max_depth).clip(0, 1) * (len(anchors) - 1)
    rgb = np.stack([np.interp(place, range(len(anchors)), channel) for channel in anchors.T], -1)
    return Image.fromarray(np.where(depth[..., None] > 0, rgb + 0.5, 0).astype(np.uint8))


def describe(args, config, train, val, size, fingerprint):
    """The protocol of a result: every value that decides it, apart from seed and weights."""
    return dict(
        probe="depth", data=args.data, train_on=args.train_on, train=len(train), val=len(val), size=size,
        fingerprint=fingerprint, partial=args.partial, blocks=four_blocks(config.depth), precision=args.amp,
        feature="patches and [CLS] of each block, no final norm", iters=args.iters, batch_size=args.batch_size,
        crop=args.crop, seeds=args.seeds, bins=BINS, max_depth=MAX_DEPTH[args.data], lr=args.lr,
        optimizer="AdamW 0.9 0.999, weight decay 0.01, gradient norm of a head at most 35",
        schedule="cosine to lr x 1e-8, linear warm-up from 0.001 over the first third",
        loss="SigLoss, pairs of images, all measured depths", loss_warmup=args.loss_warmup, eval_every=args.eval_every,
        augmentation=args.crop and "rotate 2.5 degrees, flip, crop, gamma, brightness, colour; rounded to 8 bits",
        mirrored=args.data != "shapes", cap=CAP.get(args.data), window=WINDOW.get(args.data),
        padding="zeros to whole patches, predictions stretched over the picture",
        reported="best RMSE over evaluations; errors per image at the size of its depth map, then mean over images",
        **dict(cards=SCENES["cards"]) if args.data == "shapes" else {})


def evaluate(path, args, device, data):
    """The probe of one file of weights: prints it and writes the result beside it. `data`: open_data by size."""
    model, facts = checkpoint.open_weights(path, args.which, args.like, args.seed, device, args.heads)
    size = 2 * model.config.image_size if args.data == "shapes" else None
    if model.config.depth < 4:
        raise ValueError(f"{path}: {count(model.config.depth, 'block')}, this probe reads four; give a deeper model")
    train, val, fingerprint = data(size)
    result = dict(probe="depth", data=args.data, root=args.root, **facts,
                  config=dataclasses.asdict(model.config), seed=args.seed, metrics=None,
                  protocol=describe(args, model.config, train, val, size, fingerprint))
    default = checkpoint.result_path(path, "depth", args.data, model.config, args.seed)
    out, finished = checkpoint.claim(args.out, default, result)
    args.drawn, heads_file = checkpoint.spread(len(val), args.save_images), checkpoint.beside(out, ".head.pt")
    if finished:
        if args.save_images:
            print(f"{out}: finished earlier, so nothing is drawn; remove it and {heads_file.name} to have pictures")
        return checkpoint.say_finished(out, finished)
    stamp = dict(checkpoint.identity(result), weights_sha256=facts["weights_sha256"])
    history, maps = train_heads(model, train, val, args, device, heads_file, stamp)

    metrics = best_metrics(history)
    print(f"{path}: RMSE {show(metrics['rmse_seeds'])} m at the best evaluation, {show(metrics['rmse_last_seeds'])} m "
          f"at the last; abs-rel {show(metrics['abs_rel_seeds'])}, d1 {show(metrics['d1_seeds'])} %; RMSE of "
          f"{metrics['constant']:.2f} m for every pixel {metrics['rmse_constant']:.3f} m"
          + f"; ± is the spread of {args.seeds} heads on one backbone, not of pretraining" * (args.seeds > 1)
          + f"; {count(metrics['skipped'], 'image')} without a pixel to score left out" * (metrics["skipped"] > 0))
    if maps:
        draw_images(checkpoint.beside(out, ".png"), Subset(val, args.drawn), maps, MAX_DEPTH[args.data])
    checkpoint.write_result(out, dict(result, metrics=metrics))


# ------------------------------------------------------------------------------------------- command line
def parse_args(argv=None):
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--data", default="shapes")
    recipe = RECIPES.get(first.parse_known_args(argv)[0].data, {})

    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    checkpoint.add_flags(p, "depth")
    # data
    p.add_argument("--data", choices=list(RECIPES), default="shapes")
    p.add_argument("--root", help="; ".join(f"{name}: {layout['tree']}" for name, layout in LAYOUTS.items()))
    p.add_argument("--train-on", choices=["nyu", "sunrgbd"], help="for --data sunrgbd; default nyu, or all but its val")
    p.add_argument("--train-root", help="NYU's folder, for --data sunrgbd trained on nyu")
    p.add_argument("--allow-partial", action="store_true", help="accept fewer images than the data set holds")
    # heads
    p.add_argument("--iters", type=int, help="iterations; warm-up and cosine schedule scale with them")
    p.add_argument("--batch-size", type=int, help="images per iteration")
    p.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"), help="training crop in pixels")
    p.add_argument("--seeds", type=int, default=1, help="head initialisations trained at once, from --seed on")
    # run
    p.add_argument("--eval-every", type=int, help="iterations between evaluations; default 1,600 of 38,400, "
                   "on shapes all")
    p.add_argument("--save-every", type=int, help="iterations between saves of the heads")
    p.add_argument("--log-every", type=int, help="iterations between progress lines")
    p.add_argument("--save-images", type=int, default=0, metavar="N", help="draw N val images, spread over the list, "
                   "with label and prediction of the last evaluation, into <out without .json>.png")
    p.set_defaults(**recipe, partial=False, drawn=())              # of the data, as found
    args = p.parse_args(argv)
    check_args(p, args)
    return args


def check_args(p, args):
    """Refuse what cannot run, in one line and before anything is written; fill in what follows from other values."""
    if (args.root is None) != (args.data == "shapes"):
        p.error(f"--data {args.data} needs --root, a folder with {LAYOUTS[args.data]['tree']}" if args.root is None else
                "--data shapes takes no --root; its scenes are embedded")
    if args.train_on and args.data != "sunrgbd":
        p.error(f"--train-on goes with --data sunrgbd; {args.data} trains on its own train split")
    args.train_on = args.train_on or ("nyu" if args.data == "sunrgbd" else args.data)
    if (args.train_root is None) != (args.train_on == args.data):
        p.error(f"--data sunrgbd needs --train-root, a folder with {LAYOUTS['nyu']['tree']}, or --train-on sunrgbd"
                if args.train_root is None else "--train-root goes with --data sunrgbd trained on nyu")
    if args.crop and (args.data == "shapes" or min(args.crop) < 1):
        p.error("--data shapes takes no --crop; its scenes are seen whole" if args.data == "shapes" else
                f"--crop {args.crop[0]} {args.crop[1]}: must be at least 1")
    checkpoint.check_flags(p, args, "iters batch_size seeds eval_every save_every log_every", "save_images")
    args.crop = args.crop and tuple(args.crop)                      # as in RECIPES: the stamp compares them
    args.eval_every = args.eval_every or max(1, round(args.iters / args.evaluations))
    args.loss_warmup = round(args.iters * 100 / 38_400)


def main(argv=None):
    checkpoint.print_any_path()
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = functools.cache(lambda size: open_data(args, size))      # looking for 24,000 pairs takes a while: once
    for path in args.weights:
        with checkpoint.one_line(path):
            evaluate(path, args, device, data)


if __name__ == "__main__":
    main()
