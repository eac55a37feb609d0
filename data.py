"""From files to views: list, read, cut and colour pictures; which of them, in which order, is a function of the seed.

The augmentation is Caron et al.'s (2021) multi-crop in two halves. Cutting a crop needs the decoded picture and shrinks
it, so it stays with the loader's workers. All the rest is arithmetic on small uint8 crops and runs batched on the
device; its random numbers, one row per crop, are drawn in the worker.

    B images per micro-batch, V views = 2 global + L local, S side in pixels (G of a global one), N crops of any kind
"""

import collections
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

import vit

# Streams of random numbers. Each draw is a function of its stream and a few integers: nothing random is ever stored.
ORDER, CROPS, REPLACEMENT, JITTER_ORDER, DROP_PATH = range(1, 6)


def generator(stream, *key):
    return np.random.default_rng((stream, *key))


def seed_torch(stream, *key):
    torch.manual_seed(int(generator(stream, *key).integers(2**62)))


# ---------------------------------------------------------------------------------------------------------------------
# Multi-crop: what is cut in a worker

DRAWS = ("flip", "brightness", "contrast", "saturation", "hue", "grey", "sigma", "solarize")
BLUR_P = {"global1": 1.0, "global2": 0.1, "local": 0.5}
SOLARIZE_P = {"global1": 0.0, "global2": 0.2, "local": 0.0}


class MultiCrop:
    """The augmentation: 2 global and `local_crops` local crops, then colour. Scales are shares of the picture's area.

    In a worker `multicrop(image, rng)` cuts; on the device `multicrop.photometric(...)` colours the batch.
    """

    def __init__(self, global_size=224, local_size=96, local_crops=8, global_scale=(0.4, 1), local_scale=(0.05, 0.4)):
        self.global_size, self.local_size, self.local_crops = global_size, local_size, local_crops
        self.global_scale, self.local_scale = global_scale, local_scale
        self.kinds = ["global1", "global2"] + ["local"] * local_crops

    def __call__(self, image, rng, whole=None):
        """uint8 (3, H, W) -> uint8 crops (2, 3, G, G) and (L, 3, S, S), draws (2 + L, 8); rng: numpy Generator.

        whole: (height, width) of the picture that `image` is a smaller copy of; the boxes are drawn for that one.
        """
        whole = whole or image.shape[1:]
        n = round(whole[0] / image.shape[1])                        # a pixel of the copy covers n x n of the picture
        crops = []
        for size, (top, left, height, width) in self.boxes(*whole, rng):
            top, bottom, left, right = (round(at / n) for at in (top, top + height, left, left + width))
            crops.append(resized_crop(image, top, left, bottom - top, right - left, (size, size),
                                      InterpolationMode.BICUBIC, antialias=True))
        large, small = torch.stack(crops[:2]), crops[2:]
        small = torch.stack(small) if small else large.new_empty(0, 3, self.local_size, self.local_size)
        return large, small, torch.from_numpy(np.stack([photometric_draws(kind, rng) for kind in self.kinds]))

    def boxes(self, height, width, rng):
        """[(side of the crop, its box in such a picture)], in the order of the views."""
        cuts = [(self.global_size, self.global_scale)] * 2 + [(self.local_size, self.local_scale)] * self.local_crops
        return [(size, crop_box(height, width, scale, rng)) for size, scale in cuts]

    def divisor(self, height, width, rng):
        """8, 4, 2 or 1: how much smaller such a picture may be decoded, and each crop that rng will cut still shrinks,
        so that nothing is lost. ImageNet's usual 500 x 375 are too small for that at 224 px."""
        if min(height, width) < 2 * self.global_size:               # spares small pictures the second draw
            return 1
        room = min(min(box[2:]) // size for size, box in self.boxes(height, width, rng))
        return next(n for n in (8, 4, 2, 1) if n <= max(1, room))

    def photometric(self, large, small, draws, order=(0, 1, 2, 3)):
        """uint8 crops (B, 2, 3, G, G) and (B, L, 3, S, S), draws (B, V, 8) -> V normalised float views (B, 3, S, S).

        `order` permutes brightness, contrast, saturation, hue; one draw per step, so that it can run batched.
        """
        views = []
        for crops, rows in ((large, draws[:, :2]), (small, draws[:, 2:])):
            if crops.shape[1]:
                x = crops.transpose(0, 1).flatten(0, 1)             # (V' B, 3, S, S), view by view
                rows = rows.transpose(0, 1).flatten(0, 1).to(x.device)
                views += recolour(x, rows, order).chunk(crops.shape[1])
        return views


def crop_box(height, width, scale, rng):
    """(top, left, height, width) of a random crop: area share U(scale), aspect ratio log-uniform in 3/4..4/3.

    Ten tries, then the largest central crop of allowed ratio: the rule of torchvision's RandomResizedCrop.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def photometric_draws(kind, rng):
    """float32 (8,) in the order of DRAWS, identities where an operation is not applied. Caron et al.'s frequencies."""
    flip, jitter, grey, blur, solarize = rng.random(5) < (0.5, 0.8, 0.2, BLUR_P[kind], SOLARIZE_P[kind])
    colour = rng.uniform((0.6, 0.6, 0.8, -0.1), (1.4, 1.4, 1.2, 0.1)) if jitter else (1, 1, 1, 0)
    sigma = rng.uniform(0.1, 2.0) if blur else 0
    return np.array([flip, *colour, grey, sigma, solarize], np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Colours: what is computed on the device

IN_CACHE = 2**19    # numbers that a CPU recolours at a time: each operation is a pass over them


def recolour(x, draws, order, batched=None):
    """uint8 (N, 3, S, S), draws (N, 8) -> float (N, 3, S, S): flip, jitter, grey, blur, solarize, normalise.

    batched: all crops go through every operation, which suits a GPU; else each through those that it needs, in pieces
    that fit a CPU's cache. None chooses by device.
    """
    batched = x.device.type != "cpu" if batched is None else batched
    if not batched and x.numel() > IN_CACHE:
        n = max(1, IN_CACHE // x[0].numel())
        return torch.cat([recolour(*part, order, batched) for part in zip(x.split(n), draws.split(n), strict=True)])
    flip, brightness, contrast, saturation, hue, grey, sigma, solarize = draws.view(-1, 8, 1, 1, 1).unbind(1)
    change = change_all if batched else change_in_place

    def jitter(x, *amounts):
        for k in order:
            x = JITTER[k](x, amounts[k])
        return x

    x = change(x if batched else x.float(), flip > 0, lambda x: x.flip(-1)).float()      # bytes are fewer to move
    x = change(x, (brightness != 1) | (contrast != 1) | (saturation != 1) | (hue != 0), jitter,
               brightness, contrast, saturation, hue)
    x = change(x, grey > 0, lambda x: luma(x).expand_as(x))
    x = change(x, sigma > 0, blur_by_matrix if batched else blur, sigma)
    x = change(x, solarize > 0, lambda x: torch.where(x >= 128, 255 - x, x))
    return vit.normalize_grey_levels(x)


def change_in_place(x, need, op, *amounts):
    """x, in which crops that `need` it (N, 1, 1, 1) have become op(crops, *amounts)."""
    some = need.flatten().nonzero().flatten()
    if len(some):
        x[some] = op(x[some], *(amount[some] for amount in amounts))
    return x


def change_all(x, need, op, *amounts):
    """The same in new memory: to pick crops, the host would have to wait until a GPU says how many there are."""
    return torch.where(need, op(x, *amounts), x)


def luma(x):
    """(N, 3, S, S) -> (N, 1, S, S) grey value, ITU-R 601 as in Pillow."""
    r, g, b = x.split(1, 1)
    return (0.299 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


def change_brightness(x, amount):
    return (x * amount).clamp_(0, 255)


def change_contrast(x, amount):
    mean = luma(x).mean((1, 2, 3), keepdim=True)
    return (x - mean).mul_(amount).add_(mean).clamp_(0, 255)


def change_saturation(x, amount):
    grey = luma(x)
    return (x - grey).mul_(amount).add_(grey).clamp_(0, 255)


def shift_hue(x, turn):
    """Rotate the hue of (N, 3, S, S) by `turn` (N, 1, 1, 1) in -1..1 of the circle; HSV value and chroma stay.

    With HSV hue h in sixths of a turn, least channel m and chroma c, the channels are m + c times
    |h - 3| - 1 (red), 2 - |h - 2| (green), 2 - |h - 4| (blue), each clamped to 0..1.
    """
    r, g, b = x.split(1, 1)
    top, least = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    c = top - least
    h = torch.where(top == r, g - b, torch.where(top == g, (b - r).add_(c, alpha=2), (r - g).add_(c, alpha=4)))
    h = h.div_(c + (c == 0)).add_(6 * turn)                         # grey pixels have no hue; any value gives m back
    h.sub_(torch.floor(h / 6), alpha=6)                             # into [0, 6)
    channels = (h - 3).abs_().sub_(1), 2 - (h - 2).abs_(), 2 - (h - 4).abs_()
    return torch.cat([least.addcmul(y.clamp_(0, 1), c) for y in channels], dim=1)


JITTER = (change_brightness, change_contrast, change_saturation, shift_hue)     # Pillow's, without its rounding


def blur(x, sigma):
    """Gaussian blur of (N, 3, S, S), sigma (N, 1, 1, 1) <= 2 pixels, edge pixels repeated: a sum of shifted copies."""
    size, reach = x.shape[-1], 7                                    # at sigma 2 the rest is 2e-4 of the weight
    at = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    # sigma 0 becomes 0.01: exp(-5000) is 0 in float32, so the weights are those of the identity
    weight = torch.exp(-0.5 * (at / sigma.view(-1, 1).clamp_min(0.01)) ** 2)
    weight = (weight / weight.sum(1, keepdim=True)).view(len(x), -1, 1, 1, 1).unbind(1)
    for axis, pad in ((-1, (reach, reach, 0, 0)), (-2, (0, 0, reach, reach))):
        wide = F.pad(x, pad, mode="replicate")
        x = weight[reach] * x
        for k in range(reach):
            x.addcmul_(weight[k], wide.narrow(axis, k, size))
            x.addcmul_(weight[k], wide.narrow(axis, 2 * reach - k, size))
    return x


def blur_by_matrix(x, sigma):
    """The same as products with two banded S x S matrices: six times slower on a CPU, few passes for a GPU."""
    size, reach = x.shape[-1], 7
    at = torch.arange(size, device=x.device, dtype=x.dtype)
    source = torch.arange(-reach, size + reach, device=x.device, dtype=x.dtype)
    weight = torch.exp(-0.5 * ((source[:, None] - at) / sigma.view(-1, 1, 1).clamp_min(0.01)) ** 2)
    weight /= weight.sum(1, keepdim=True)                           # (N, S + 14, S), columns sum to 1
    band = weight[:, reach:-reach].clone()
    band[:, 0] += weight[:, :reach].sum(1)
    band[:, -1] += weight[:, -reach:].sum(1)
    band = band.unsqueeze(1)                                        # (N, 1, S, S)
    return band.mT @ (x @ band)


# ---------------------------------------------------------------------------------------------------------------------
# Files

def list_images(root):
    """Sorted paths of the pictures below a folder (its train/ if it has one), in class folders or not, and a Counter of
    the suffixes of all other files; links count, hidden files and folders (macOS' ._*, .ipynb_checkpoints, .Trash) do
    not."""
    def refuse(error):                                              # os.walk alone would pass over it in silence
        raise ValueError(f"{error.filename}: {error.strerror}; make it readable, or move it out of {root}")

    root = os.path.join(root, "train") if os.path.isdir(os.path.join(root, "train")) else root
    found, others, seen = [], collections.Counter(), set()
    for folder, below, names in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in seen:                                            # a loop of links, or the same folder twice
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if name[0] != ".")     # of two links every machine takes the same one
        for name in names:
            if name[0] != "." and name.lower().endswith(vit.SUFFIXES):
                found.append(os.path.join(folder, name))
            elif name[0] != ".":
                others[os.path.splitext(name)[1].lower() or "without suffix"] += 1
    return sorted(found), others


class Pictures:
    """pictures[i] is uint8 (3, H, W), name(i) its path. One block of bytes, because a million str objects would be
    copied into every worker, page by page, as their reference counts change."""

    def __init__(self, paths):
        names = [os.fsencode(path) for path in paths]
        self.ends = np.cumsum([0] + [len(name) for name in names])
        self.block = np.frombuffer(b"".join(names), np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def name(self, i):
        return os.fsdecode(self.block[self.ends[i]:self.ends[i + 1]].tobytes())

    def __getitem__(self, i):
        return self.read(i)[0]

    def read(self, i, divisor=lambda height, width: 1):
        """(picture i, (height, width) of its file): a JPEG comes smaller by the 1, 2, 4 or 8 of divisor(height, width),
        which takes a fraction of the time."""
        with Image.open(self.name(i)) as image:
            width, height = image.size
            n = divisor(height, width)
            if n > 1:
                image.draft(None, (width // n, height // n))        # leaves all formats but JPEG as they are
            pixels = np.array(vit.to_rgb(image))                    # (H, W, 3); the permuted view keeps channels last,
        return torch.from_numpy(pixels).permute(2, 0, 1), (height, width)   # torch's fast path for uint8 resizing


class Crops(Dataset):
    """Item (epoch, i) -> (large, small, draws) of MultiCrop and the names of unreadable files met on the way.

    An unreadable file gives way to another, chosen by (seed, epoch, i): the batch stays full and the run repeatable.
    """

    def __init__(self, source, multicrop, seed):
        self.source, self.multicrop, self.seed = source, multicrop, seed

    def __getitem__(self, key):
        epoch, i = key
        candidates, failed = generator(REPLACEMENT, self.seed, epoch, i), []
        image = whole = None
        while image is None:
            try:
                if isinstance(self.source, Pictures):
                    image, whole = self.source.read(i, lambda *size: self.multicrop.divisor(*size, self.rng(key)))
                else:
                    image = self.source[i]
            except Exception:                                       # Pillow raises half a dozen types on broken files
                failed.append(self.source.name(i))
                i = int(candidates.integers(len(self.source)))
                if len(failed) == 100:                              # hopeless: grey, until Reads stops the run
                    image = torch.full((3, 8, 8), 128, dtype=torch.uint8)
        return *self.multicrop(image, self.rng(key), whole), failed

    def rng(self, key):
        return generator(CROPS, self.seed, *key)


class Batches:
    """Sampler: the micro-batches of one process from step `start` to the end of training, as lists of (epoch, i).

    The order is a function of (seed, epoch), and each process takes its part of every batch: the union over processes
    and micro-batches is the same for any number of them.
    """

    def __init__(self, n, args, rank, world, start):
        self.n, self.args, self.rank, self.world, self.start = n, args, rank, world, start

    def __iter__(self):
        a, per_epoch = self.args, self.n // self.args.batch_size
        micro, shuffled = a.batch_size // (self.world * a.accum), None
        for step in range(self.start, a.epochs * per_epoch):
            epoch, batch = divmod(step, per_epoch)
            if shuffled != epoch:
                order, shuffled = generator(ORDER, a.seed, epoch).permutation(self.n), epoch
            for k in range(a.accum):
                first = batch * a.batch_size + (self.rank * a.accum + k) * micro
                yield [(epoch, int(i)) for i in order[first:first + micro]]


def collate(items):
    failed = [name for item in items for name in item[-1]]
    return *default_collate([item[:-1] for item in items]), failed


def load(source, multicrop, args, rank, world, start, device, worker_init_fn):
    """Iterator over the micro-batches of one process from step `start`: (large, small, draws, names of unreadable
    files)."""
    return iter(DataLoader(Crops(source, multicrop, args.seed), num_workers=args.workers, collate_fn=collate,
                           batch_sampler=Batches(len(source), args, rank, world, start),
                           pin_memory=device.type == "cuda", worker_init_fn=worker_init_fn))


def counted(n, what):
    """'1 epoch', '2,000 images', '2 processes'"""
    return f"{n:,} {what}" + ("" if n == 1 else "es" if what.endswith("s") else "s")


class Reads:
    """Counts reads and unreadable files of all processes, names each such file once, stops a run that has too many."""

    def __init__(self):
        self.total, self.failed, self.fresh, self.reported = 0, 0, [], set()

    def add(self, images, failed):
        self.total += images + len(failed)
        self.failed += len(failed)
        self.fresh += failed

    def report(self, say, epoch_over, gather=lambda mine: [mine]):
        """Number of unreadable files so far, of all processes: gather(mine) is what each has, or they would not come
        to the same decision."""
        parts = gather((self.total, self.failed, self.fresh))
        total, failed = sum(part[0] for part in parts), sum(part[1] for part in parts)
        for name in dict.fromkeys(name for part in parts for name in part[2]):
            if name not in self.reported:
                self.reported.add(name)
                say(f"unreadable, replaced by another: {name} ({failed} of {total} reads so far)")
        self.fresh = []
        many = len(self.reported) > 10 or failed > 0.1 * total      # a few of a few hundred pictures are no alarm
        if many and failed > 0.01 * total and (total >= 1000 or epoch_over):
            raise ValueError(f"{min(self.reported)}: one of {counted(len(self.reported), 'unreadable file')}; {failed} "
                             f"of {total} reads failed, more than 1 %; mend or remove the files named above, then run "
                             "this again")
        return failed
