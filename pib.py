"""Point-in-box: does the patch most like [CLS] lie on the object? Other signs of semantic diffusion (Fig. 2a).

    python pib.py --weights runs/shapes_entmax15_s0                                  every numbered checkpoint of a run
    python pib.py --weights random --like runs/shapes_entmax15_s0/checkpoint.pt      the untrained control
    python pib.py --weights dino_deitsmall16_pretrain.pth --data folder --root ILSVRC2012/val --boxes ILSVRC2012/bbox

PiB is the share of images whose patch of highest cosine similarity to [CLS] overlaps the box of the object, for every
block: its output through the model's final norm (--raw: without). Kept are images with one object whose box covers less
than 25 % of the picture, as in LaSt-ViT, from which the paper takes the measure. Registers are no candidates.
Two numbers belong beside it: chance, the share of patches that overlap the box, and centre, the share of images whose
box overlaps the central patch (mean of the central four on an even grid), as objects mostly lie there.

From the same forward, per block: attention support (number of non-zero weights of a row, per head), attention mass from
patches to [CLS] and to registers, share of high-norm patches (> 5 x the median of their image, before the norm), mean
cosine of [CLS] with the patches inside and outside the box. The last line printed for each file is its result as JSON,
also written to --out.

Leaked meaning, of --data shapes only and not in the paper, which shows diffusion by PiB, masks and probes. For every
block: what a linear readout tells from one patch in scenes of several cards at twice the side.
    own           the class that fills half of the patch
    other         from such a patch, the classes in the scene that are not near it: within two patches, at most
    background    the classes in the scene, from a patch without a card near
The score is an AUC within patches: of two classes, one there and one not, how often has the first the higher score?
Classes of cards are independent, so what lies near tells nothing of which are farther off, and chance is 50. It does
tell how many are left to find, which an AUC over patches, class by class, would count: `other` is 58 then from the
classes near the patch, 60 from their number and 56 from its position alone, and 48.5 to 50 here.

    B images, T tokens = 1 + R + N, H heads, h x w grid of patches; M or m patches, C classes
"""

import argparse
import collections
import dataclasses
import functools
import math
import os
import sys
import xml.etree.ElementTree as ElementTree

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

import checkpoint
import vit
from shapes import CLASSES, FINGERPRINT, Shapes

HIGH = 5                                                            # times the median norm of the image's patches
DAMAGED = "its features are not finite; the weights are damaged"
# leaked meaning
CARDS, SCENES = 5, dict(train=600, val=600)                         # at most in a scene; to fit and to measure
WINDOW = 5                                                          # patches across, what counts as near the middle one
RIDGE = 1e-3                                                        # times the squared weights: the penalty on the MSE


# ------------------------------------------------------------------------------------------- the measure
def point_in_box(similarity, inside):
    """(B,) bool: the largest of the (B, h, w) similarities, the first of equals, lies in the (B, h, w) boxes."""
    top = similarity.flatten(1).argmax(1, keepdim=True)
    return inside.flatten(1).gather(1, top)[:, 0]


def centre(inside):
    """(B,) share of the central patch, or of the central four of an even grid, in the (B, h, w) boxes."""
    middle = slice((inside.shape[-1] - 1) // 2, inside.shape[-1] // 2 + 1)
    return inside[:, middle, middle].double().mean((1, 2))


def mean_where(values, mask):
    """(B,) means of (B, h, w) values over a (B, h, w) mask; NaN where it is empty."""
    return (values * mask).sum((1, 2)) / mask.sum((1, 2))


def block_signs(weights, x, model, inside, raw):
    """What one block shows of each image: dict of (B,) float tensors, and support (B, H). x (B, T, D) is its output."""
    R = model.config.registers
    y = x if raw else vit.route(x, model.norm, model.norm_cls)
    cosine = F.cosine_similarity(y[:, :1], y[:, 1 + R:], dim=-1).view(inside.shape)         # (B, h, w)
    norms = x[:, 1 + R:].norm(dim=-1)                               # (B, N), before the norm, which would level them
    from_patches = weights[:, :, 1 + R:].mean((1, 2))               # (B, T): over heads and patches
    return dict(
        pib=point_in_box(cosine, inside).float(),
        cos_inside=mean_where(cosine, inside), cos_outside=mean_where(cosine, ~inside),
        to_cls=from_patches[:, 0], to_registers=from_patches[:, 1:1 + R].sum(1),
        high_norm=(norms > HIGH * norms.median(1, keepdim=True).values).float().mean(1),
        support=(weights > 0).float().sum(-1).mean(-1),
    )


@torch.inference_mode()
def measure(model, images, args, device):
    """(dict of (depth, ...) means over images, dict of counts) in one forward per batch."""
    signs, boxes, finite = [{} for _ in model.blocks], [], True
    loader = DataLoader(images, args.batch_size, num_workers=args.workers)
    for x, inside in checkpoint.progress.of(loader, f"point-in-box of {len(images):,} images, batch"):
        boxes.append(inside)
        x, inside = x.to(device), inside.to(device)
        with checkpoint.autocast(device, args.amp):
            x = model.embed(vit.normalize(x))
            for block, seen in zip(model.blocks, signs, strict=True):
                weights = block.attn.weights(vit.route(x, block.norm1, block.norm1_cls))
                x = block(x)
                for name, values in block_signs(weights, x.float(), model, inside, args.raw).items():
                    seen.setdefault(name, []).append(values.double().cpu())
            finite &= bool(x.isfinite().all())
    if not finite:
        raise ValueError(DAMAGED)
    means = {name: torch.stack([torch.cat(seen[name]).nanmean(0) for seen in signs]) for name in signs[0]}
    boxes = torch.cat(boxes)                                        # (n, h, w)
    overlapped = boxes.flatten(1).sum(1)
    return means, dict(chance=100 * overlapped.double().mean().item() / boxes[0].numel(),
                       centre=100 * centre(boxes).mean().item(), n=len(boxes), missed=int((overlapped == 0).sum()),
                       tokens=weights.shape[-1])


# ------------------------------------------------------------------------------------------- leaked meaning
def card_maps(mask, patch):
    """(3, N, C) bool of an (S, S) mask, 0 = background, 1 + class: the class fills at least half of the patch; has a
    pixel in the patch's window, which the picture's edge cuts; has one in the scene."""
    side = len(mask) // patch
    pixels = F.one_hot(mask.long(), 1 + len(CLASSES)).view(side, patch, side, patch, -1).sum((1, 3))[..., 1:]
    there = pixels > 0                                              # (h, w, C)
    near = F.max_pool2d(there.float().movedim(2, 0), WINDOW, 1, WINDOW // 2).movedim(0, 2) > 0
    return torch.stack([2 * pixels >= patch**2, near, there.any(0).any(0).expand_as(there)]).flatten(1, 2)


def questions(own, near, present):
    """{kind: (patches that are asked (M,), which of them about class c (m, 1 or C), answers (m, C))} of (M, C) maps."""
    card, bare = own.any(1, keepdim=True), ~near.any(1, keepdim=True)
    asked = dict(own=(card, own), other=(card & ~near, present), background=(bare, present))
    return {kind: (part.any(1), part[part.any(1)], answers[part.any(1)]) for kind, (part, answers) in asked.items()}


class Readout:
    """Ridge regression of C answers, 0 or 1, on standardised features, from sums over batches of patches."""

    def __init__(self):
        self.gram = self.cross = 0                                  # (1 or C, D + 1, D + 1), (D + 1, C)

    def add(self, x, part, answers):
        """x (m, D + 1), the last of them 1; part and answers as of `questions`."""
        left_out = [x[~asked] for asked in part.T]                  # few, so cheaper than the product of the others
        self.gram = self.gram + x.T @ x - torch.stack([y.T @ y for y in left_out])
        self.cross = self.cross + x.T @ (part & answers).to(x)

    def solve(self):
        """(D + 1, C): x @ it are scores, of mean 0 for every class, however common it is."""
        n = self.gram[:, -1, -1:].clamp(min=1)                      # (1 or C, 1)
        mean, share = self.gram[:, -1, :-1] / n, self.cross[-1:].T / n          # (1 or C, D), (C, 1)
        covariance = self.gram[:, :-1, :-1] / n[..., None] - mean[:, :, None] * mean[:, None]
        variance = covariance.diagonal(dim1=1, dim2=2)
        # times the variance: the penalty of features that are divided by their deviation. A constant one has none.
        penalty = (RIDGE * variance).where(variance > 1e-12 * mean**2, 1)
        target = self.cross[:-1].T / n - mean * share               # (C, D)
        slopes = torch.linalg.solve(covariance + penalty.diag_embed(), target[..., None])[..., 0]
        return torch.cat([slopes, -(slopes * mean).sum(1, keepdim=True)], 1).T


def compare(scores, part, answers):
    """(2,): pairs of classes, one there and one not, won less lost by the first; all pairs. All (m, C)."""
    pairs = (part & answers)[:, :, None] & (part & ~answers)[:, None]
    return torch.stack([(scores[:, :, None] - scores[:, None]).sign()[pairs].sum(dtype=torch.double), pairs.sum()])


def read_classes(train, val):
    """{kind: [AUC in % of each block]} from batches of ([features (M, D) of each block], maps (3, M, C)) of patches."""
    def asked(batches):
        for blocks, maps in batches:
            for kind, (where, *of_classes) in questions(*maps).items():
                for b, x in enumerate(blocks):
                    yield (kind, b), F.pad(x[where].double(), (0, 1), value=1), *of_classes

    readouts, counts = collections.defaultdict(Readout), collections.defaultdict(int)
    for key, *patches in asked(train):
        readouts[key].add(*patches)
    weights = {key: readout.solve() for key, readout in readouts.items()}
    for key, x, part, answers in asked(val):
        counts[key] += compare((x @ weights[key]).float(), part, answers)       # equal if they are but for rounding
    found = collections.defaultdict(list)
    for (kind, _), (lead, pairs) in counts.items():                 # in the order of the blocks
        found[kind].append((50 + 50 * lead / pairs).item())
    return dict(found)


@functools.lru_cache(maxsize=2)                                     # train and val, not anew for every checkpoint
def crowds(split, length, size, patch):
    """Images (n, 3, S, S) uint8 and maps (n, 3, N, C) of scenes of several cards."""
    pairs = [(s["image"], card_maps(s["mask"], patch)) for s in Shapes(split, size, length, cards=CARDS)]
    return [torch.stack(values) for values in zip(*pairs, strict=True)]


@torch.inference_mode()
def leaked_meaning(model, args, device):
    """dict(auc_own=[% of each block], auc_other, auc_background); NaN where there is no pair."""
    def batches(split):
        scenes = crowds(split, SCENES[split], 2 * model.config.image_size, model.config.patch_size)
        parts = list(zip(*(values.split(args.batch_size) for values in scenes), strict=True))
        for images, maps in checkpoint.progress.of(parts, f"leaked meaning, {split}: {len(scenes[0]):,} scenes, batch"):
            with checkpoint.autocast(device, args.amp):
                outputs = model.features(vit.normalize(images.to(device)), norm=not args.raw)
            blocks = [output.patches.flatten(0, 2) for output in outputs]
            if not all(x.isfinite().all() for x in blocks):
                raise ValueError(DAMAGED)
            yield blocks, maps.to(device).transpose(0, 1).flatten(1, 2)

    return {f"auc_{kind}": values for kind, values in read_classes(batches("train"), batches("val")).items()}


# ------------------------------------------------------------------------------------------- pictures and boxes
def overlap(boxes, grid, patch):
    """(grid, grid) bool: patches whose area any of the half-open pixel boxes (x0, y0, x1, y1) overlaps."""
    start = torch.arange(grid, dtype=torch.float64) * patch         # patch i covers [start_i, start_i + patch)
    hit = torch.zeros(grid, grid, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        columns, rows = ((low < start + patch) & (high > start) for low, high in ((x0, x1), (y0, y1)))
        hit |= rows[:, None] & columns
    return hit


def through_eval_transform(box, width, height, size):
    """A box of a width x height picture in pixels of its vit.eval_transform(size); it may lie partly or all outside."""
    short = round(size * 256 / 224)
    scale = short / min(width, height)
    # what torchvision's Resize and CenterCrop really do with the two sides
    left, top = (round((int(short * side / min(width, height)) - size) / 2) for side in (width, height))
    x0, y0, x1, y1 = (scale * value for value in box)
    return x0 - left, y0 - top, x1 - left, y1 - top


def read_boxes(path):
    """((width, height), [(xmin, ymin, xmax, ymax), ...]) of a VOC-style XML, coordinates as they are."""
    try:
        tree = ElementTree.parse(path)
        size = tuple(int(float(tree.find("size").find(side).text)) for side in ("width", "height"))
        boxes = [tuple(float(box.find(corner).text) for corner in ("xmin", "ymin", "xmax", "ymax"))
                 for box in (thing.find("bndbox") for thing in tree.findall("object"))]      # its parts have some, too
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no VOC-style boxes ({error}); it must hold size/width, size/height and "
                         "object/bndbox/xmin, ymin, xmax, ymax as numbers") from error
    return size, boxes


def refuse_sure_misses(path, size, boxes):
    """A box without area inside its picture is a miss whatever the network does."""
    for left, top, right, bottom in boxes or [(0, 0, *size)]:
        if not (max(left, 0) < min(right, size[0]) and max(top, 0) < min(bottom, size[1])):
            raise ValueError(f"{path}: box {left:g}, {top:g}, {right:g}, {bottom:g} has no area in a picture of "
                             f"{size[0]} x {size[1]}; mend or remove it")


def area(x0, y0, x1, y1):
    return (x1 - x0) * (y1 - y0)


class ShapesBoxes:
    """(uint8 image, overlapped patches) of the embedded val scenes whose box is small enough; prints how many."""

    def __init__(self, args, size, patch):
        self.scenes, self.size, self.patch = Shapes("val", size, 1000), size, patch
        self.kept = [i for i, scene in enumerate(self.scenes) if area(*scene["box"].tolist()) < args.max_area * size**2]
        self.fingerprint = FINGERPRINT
        print(f"shapes: {len(self.scenes):,} scenes, kept {len(self.kept):,} (box below {100 * args.max_area:g} %)")

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, i):
        scene = self.scenes[self.kept[i]]
        return scene["image"], overlap([scene["box"].tolist()], self.size // self.patch, self.patch)


class PicturesWithBoxes:
    """(uint8 image, overlapped patches) of pictures of --root with a small enough box in --boxes; prints how many."""

    def __init__(self, args, size, patch):
        self.size, self.patch, self.transform = size, patch, vit.eval_transform(size)
        pictures = by_stem(args.root, vit.SUFFIXES)
        xmls = by_stem(args.boxes, (".xml",))
        pairs = sorted(pictures.keys() & xmls.keys())
        if not pairs:
            sys.exit(f"{args.boxes}: of its .xml files ({len(xmls):,}) none is named like one of the pictures below "
                     f"{args.root} ({len(pictures):,}); --boxes must hold <name of a picture>.xml")
        self.items, several, large, odd = [], 0, 0, 0
        for stem in pairs:
            (width, height), boxes = read_boxes(xmls[stem])
            if len(boxes) < 2 or args.all_objects:
                refuse_sure_misses(xmls[stem], (width, height), boxes)
            if len(boxes) != 1 and not (args.all_objects and boxes):
                several += 1
            elif max(area(*box) for box in boxes) >= args.max_area * width * height:
                large += 1
            elif picture_size(pictures[stem]) != (width, height):   # its boxes belong to some other picture
                odd += 1
            else:
                self.items.append((pictures[stem], boxes, (width, height)))
        self.fingerprint = "-".join([checkpoint.fingerprint(args.root, [pictures[stem] for stem in pairs]),
                                     checkpoint.fingerprint(args.boxes, (), [xmls[stem] for stem in pairs])])
        print(f"folder: {len(pictures):,} picture{'s' * (len(pictures) > 1)}, {len(pairs):,} with boxes, kept "
              f"{len(self.items):,}; left out {several:,} with "
              f"{'no' if args.all_objects else 'not exactly one'} object, {large:,} with a box of "
              f"{100 * args.max_area:g} % or more, {odd:,} of another size than their XML states", flush=True)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        path, boxes, (width, height) = self.items[i]
        mapped = [through_eval_transform(box, width, height, self.size) for box in boxes]
        return self.transform(vit.read_image(path)), overlap(mapped, self.size // self.patch, self.patch)


def by_stem(folder, suffixes):
    """{file name without suffix: path} of all such files below a folder, less hidden ones: ._0.jpg of macOS, ..."""
    if not os.path.isdir(folder):
        sys.exit(f"{folder}: no such folder")
    found, seen = {}, set()
    for directory, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(directory)
        below[:] = sorted(name for name in below if name[0] != "." and real not in seen)        # nor a loop of links
        seen.add(real)
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in suffixes and not name.startswith("."):
                path = os.path.join(directory, name)
                if stem in found:
                    sys.exit(f"{path} and {found[stem]}: two files of one name; pictures and boxes are paired by it")
                found[stem] = path
    return found


def picture_size(path):
    try:
        with Image.open(path) as image:                             # the header only
            return image.size
    except Exception as error:
        raise ValueError(f"{path}: unreadable ({error}); mend or remove it") from error


# ------------------------------------------------------------------------------------------- results
def print_table(path, means, counts, leaks):
    print(f"{path}: n {counts['n']:,}, {counts['missed']:,} of them with the box outside the crop; PiB by chance "
          f"{counts['chance']:.1f} %, of always the centre {counts['centre']:.1f} %"
          + "; AUC by chance 50 %" * bool(leaks))
    print("block  PiB %  cosine inside  outside  high-norm %  patches attend to [CLS] %  to registers %  "
          + "".join(f"{name} %  " for name in leaks) + f"support of {counts['tokens']} tokens, by head")
    for b in range(len(means["pib"])):
        row = {name: values[b] for name, values in means.items()}
        print(f"{b:5}  {100 * row['pib']:5.1f}  {row['cos_inside']:13.3f}  "
              f"{row['cos_outside']:7.3f}  {100 * row['high_norm']:11.2f}  "
              f"{100 * row['to_cls']:25.2f}  {100 * row['to_registers']:14.2f}  "
              + "".join(f"{values[b]:{len(name) + 2}.1f}  " for name, values in leaks.items())
              + " ".join(f"{value:.1f}" for value in row["support"]))


def evaluate(path, args, device, data):
    """PiB of one file of weights: prints it and writes the result beside the weights. `data(size, patch)`."""
    model, facts = checkpoint.open_weights(path, args.which, args.like, args.seed, device, args.heads)
    images = data(model.config.image_size, model.config.patch_size)
    if not len(images):
        raise ValueError(f"{args.root or args.data}: no image is left; raise --max-area or give --all-objects")
    result = dict(
        probe="pib", data=args.data, root=args.root, **facts, config=dataclasses.asdict(model.config), seed=args.seed,
        metrics=None,
        protocol=dict(probe="pib", data=args.data, fingerprint=images.fingerprint, n=len(images), size=images.size,
                      max_area=args.max_area, all_objects=args.all_objects, precision=args.amp,
                      norm="none" if args.raw else "final norm on every block", hit="patch area overlaps the box"),
    )
    if args.data == "shapes":
        result["protocol"]["leak"] = dict(cards=CARDS, **SCENES, size=2 * images.size, window=WINDOW, ridge=RIDGE,
                                          score="AUC within patches")
    default = checkpoint.result_path(path, "pib", args.data, model.config, args.seed)
    out, finished = checkpoint.claim(args.out, default, result)
    if finished:
        checkpoint.say_finished(out, finished)
        return
    means, counts = measure(model, images, args, device)
    leaks = leaked_meaning(model, args, device) if args.data == "shapes" else {}
    print_table(path, means, counts, leaks)
    percent = ("pib", "to_cls", "to_registers", "high_norm")
    metrics = {name: (values * 100 if name in percent else values).tolist() for name, values in means.items()} | leaks
    for name in ("cos_inside", "cos_outside", *leaks):              # NaN, which is no JSON: every patch on one side
        metrics[name] = [None if math.isnan(value) else value for value in metrics[name]]
    checkpoint.write_result(out, dict(result, metrics=dict(metrics, **counts)))


# ------------------------------------------------------------------------------------------- command line
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                conflict_handler="resolve", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    checkpoint.add_flags(p, "pib")
    # data
    p.add_argument("--data", choices=["shapes", "folder"], default="shapes", help="folder: pictures with VOC-style XML")
    p.add_argument("--root", help="folder of pictures, at any depth")
    p.add_argument("--boxes", help="folder of <picture's name>.xml, at any depth; default --root")
    p.add_argument("--max-area", type=float, default=0.25, help="keep images whose largest box covers less; a share")
    p.add_argument("--all-objects", action="store_true", help="keep images of several objects too; any box is a hit")
    # measure
    p.add_argument("--raw", action="store_true", help="block outputs without the final norm")
    p.add_argument("--batch-size", type=int, default=64, help="images per forward")
    # in place of what all probes have
    p.add_argument("--amp", choices=list(checkpoint.PRECISION), default="off",
                   help="of the forward; bf16 blurs small differences")
    p.add_argument("--workers", type=int, help="loader processes; default 0 for shapes, else up to 10")
    args = p.parse_args(argv)
    check_args(p, args)
    return args


def check_args(p, args):
    """Refuse what cannot run, in one line and before anything is written; fill in what follows from other values."""
    if (args.root is None) != (args.data == "shapes"):
        p.error("--data folder needs --root, a folder of pictures" if args.root is None else
                "--data shapes takes no --root; its scenes are embedded")
    if args.boxes and args.data == "shapes":
        p.error("--data shapes takes no --boxes; its scenes bring them")
    if not 0 < args.max_area <= 1:
        p.error(f"--max-area {args.max_area}: a share of the picture, above 0 and at most 1")
    checkpoint.check_flags(p, args, "batch_size")
    if args.workers is None:
        args.workers = 0 if args.data == "shapes" else min(10, os.cpu_count())
    args.boxes = args.boxes or args.root


def main(argv=None):
    checkpoint.print_any_path()
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = functools.cache(functools.partial(ShapesBoxes if args.data == "shapes" else PicturesWithBoxes, args))
    for path in args.weights:
        with checkpoint.one_line(path):
            evaluate(path, args, device, data)


if __name__ == "__main__":
    main()
