"""Linear probe: top-1 of a linear classifier on the frozen [CLS]; and weighted k-NN, which has nothing to train.

    python probe_linear.py --weights runs/shapes_entmax15_s0/checkpoint.pt                expect 89 %; --knn: k-NN alone
    python probe_linear.py --weights random --like runs/shapes_entmax15_s0/checkpoint.pt  the untrained control
    python probe_linear.py --weights dino_deitsmall16_pretrain.pth --data imagenet --root ILSVRC2012
    python probe_linear.py --weights RUN --knn --data folder --root PICTURES       PICTURES/<class>/*.jpg, split by hash

Linear: the protocol of DINOv2 (Oquab et al. 2024), which the paper follows: [CLS] of the last block after the final
norm, 12,500 iterations of 1,024 random-resized crops, SGD, 13 learning rates side by side, best final top-1.
k-NN: DINO's weighted vote (Caron et al. 2021, app. F; Wu et al. 2018): the k train images of highest cosine similarity
s vote for their class with weight exp(s / 0.07).
The last line printed is the result as JSON, also written to --out x.json; that of k-NN comes before it, and goes to
x.knn.json. A probe that was asked to end saves, and the same command goes on from there.

    B images, D width, C classes, S head seeds, L learning rates
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

import checkpoint
import vit
from shapes import CLASSES, FINGERPRINT, Shapes

# What --data selects. Shapes are not augmented: one frozen forward is kept and the heads train on it in seconds.
PAPER = dict(iters=12_500, batch_size=1024, workers=min(10, os.cpu_count() or 1), save_every=500, log_every=100)
SHAPES = dict(iters=1_000, batch_size=256, workers=0, save_every=500, log_every=200)
RECIPES = {"imagenet": PAPER, "folder": PAPER, "shapes": SHAPES}
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)     # per 256 images
NEIGHBOURS = (10, 20, 100, 200)                                     # k of k-NN; 20 is the headline, as in DINO
TEMPERATURE = 0.07


# ------------------------------------------------------------------------------------------- what it computes
class Heads(nn.Module):
    """S x L linear classifiers in one matrix, so that one product trains them all. The L of a seed start equal; what a
    seed gives does not depend on the others."""

    def __init__(self, dim, classes, seeds):
        super().__init__()
        draws = [0.01 * torch.randn(1, classes, dim, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.weight = nn.Parameter(torch.stack(draws).repeat(1, len(RATES), 1, 1))      # (S, L, C, D)
        self.bias = nn.Parameter(torch.zeros(len(seeds), len(RATES), classes))

    def forward(self, x):                                           # (B, D)
        logits = F.linear(x, self.weight.flatten(0, 2), self.bias.flatten())
        return logits.unflatten(1, self.bias.shape)                 # (B, S, L, C)

    def losses(self, x, labels):
        """(S, L) cross-entropies, each the mean over the images."""
        logits = self(x)
        labels = labels.repeat_interleave(self.bias[..., 0].numel())                            # (B S L,)
        return F.cross_entropy(logits.flatten(0, 2), labels, reduction="none").view(logits.shape[:3]).mean(0)

    @torch.no_grad()
    def predict(self, x, chunk=1024):
        """(N, S, L) classes; -1, which is never right, from a head that diverged."""
        finite = self.weight.isfinite().flatten(2).all(2) & self.bias.isfinite().all(2)        # (S, L)
        return torch.cat([torch.where(finite, self(part).argmax(-1), -1) for part in x.split(chunk)])


def knn(bank, bank_labels, queries, labels, classes, neighbours=NEIGHBOURS, chunk=256):
    """{k: top-1 in percent} of DINO's weighted vote, of features (N, D). k is capped at the bank's size."""
    bank, queries = F.normalize(bank), F.normalize(queries)         # a product of two is their cosine
    correct = dict.fromkeys(neighbours, 0)
    chunks = list(zip(queries.split(chunk), labels.split(chunk), strict=True))  # (chunk, N) similarities at a time
    for q, y in checkpoint.progress.of(chunks, f"k-NN, {chunk} queries each:"):
        similarity, index = (q @ bank.T).topk(min(max(neighbours), len(bank)))  # (chunk, k), best first
        votes = (similarity / TEMPERATURE).exp()
        classes_of = bank_labels[index]
        for k in neighbours:
            tally = torch.zeros(len(q), classes, device=q.device)
            tally.scatter_add_(1, classes_of[:, :k], votes[:, :k])
            correct[k] += (tally.argmax(1) == y).sum().item()
    return {k: 100 * n / len(queries) for k, n in correct.items()}


# ------------------------------------------------------------------------------------------- frozen features, the loop
@torch.no_grad()                                                    # inference tensors could not enter a backward
def frozen(model, images, args):
    """(B, D) float32 [CLS] after the final norm of uint8 images (B, 3, S, S)."""
    with checkpoint.autocast(images.device, args.amp):
        return model(vit.normalize(images)).float()


def train_heads(model, train, classes, args, device, file, stamp):
    """The heads after --iters iterations, going on from `file` if it is there. `stamp`: all that they depend on."""
    heads = Heads(model.config.dim, classes, range(args.seed, args.seed + args.seeds)).to(device)
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    start, _ = checkpoint.resume_heads(file, stamp, heads, optimizer)
    # SGD is linear in the gradient: a factor on the loss of a head is a factor on its learning rate
    rates = torch.tensor(RATES, device=device) * args.batch_size / 256
    total, said, done, eta = 0, start, start, checkpoint.Eta(start, args.iters)
    stream = batches(model, train, args, device, start)     # closed while its workers live: a dead one may hold a lock
    with checkpoint.noted_signals() as asked, contextlib.closing(stream):
        for t in range(start, args.iters):
            optimizer.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * t / args.iters))
            for _ in range(math.ceil(args.batch_size / args.micro_batch)):
                x, y = next(stream)                                 # frozen [CLS] (b, D), labels (b,)
                losses = heads.losses(x, y) * (len(y) / args.batch_size)
                (losses * rates).sum().backward()
                total = total + losses.detach().mean(0)             # (L,), over the iterations since the last line
            optimizer.step(); optimizer.zero_grad()

            done, last = t + 1, asked or t + 1 == args.iters
            if done % args.log_every == 0 or last or done - start in (1, 10):       # soon, then now and then
                show_progress(file, done, total / (done - said), eta(done), args, last)
                total, said = 0, done
            if done % args.save_every == 0 or last:
                checkpoint.write_checkpoint(file, dict(iteration=done, stamp=stamp, history=[],
                                                       heads=heads.state_dict(), optimizer=optimizer.state_dict()))
            if last:
                break
    if asked:
        checkpoint.leave(asked, f"after iteration {done:,}")
    return heads


def show_progress(file, done, losses, left, args, last):
    """The time left and the least of the (L,) losses; ValueError if no head has a finite loss."""
    loss = losses.nan_to_num(math.inf).min()
    if not loss.isfinite():
        raise ValueError(f"{file}: the loss of every head is not finite by iteration {done:,}; the features of the "
                         f"weights overflow with --amp {args.amp}")
    line = f"{left}  loss of the best rate {loss:.4f}  iteration {done:,}/{args.iters:,}"
    checkpoint.progress.show(line, stays=last)


def extract(model, images, args, device):
    """(N, D) float32 [CLS] features and (N,) labels, in the order of the data set."""
    features, labels = [], []
    loader = DataLoader(images, args.micro_batch, num_workers=args.workers)
    for batch in checkpoint.progress.of(loader, f"features of {len(images):,} images, batch"):
        features.append(frozen(model, batch["image"].to(device), args))
        labels.append(batch["label"].to(device))
    features = torch.cat(features)
    if not features.isfinite().all():
        raise ValueError(f"its features are not finite; the weights are damaged, or --amp {args.amp} overflows")
    return features, torch.cat(labels)


def batches(model, train, args, device, start):
    """([CLS] (b, D), labels (b,)) of the micro-batches from iteration `start` on. `train`: images, or (features,
    labels) of all of them where there is no augmentation."""
    if isinstance(train, tuple):
        features, labels = train
        for keys in BatchOrder(len(features), args, start):
            i = torch.tensor([i for _, i in keys], device=device)
            yield features[i], labels[i]
        return
    crops, order = TrainCrops(train, model.config.image_size, args.seed), BatchOrder(len(train), args, start)
    for batch in DataLoader(crops, batch_sampler=order, num_workers=args.workers, pin_memory=device.type == "cuda",
                            worker_init_fn=checkpoint.deaf_worker):
        x, y = (batch[name].to(device, non_blocking=True) for name in ("image", "label"))
        yield frozen(model, x, args), y


# ------------------------------------------------------------------------------------------- data
TREE = "train/<class>/*.jpg and val/<class>/*.jpg, or with --data folder <class>/*.jpg alone"
IMAGENET = {"train": 1_281_167, "val": 50_000}                      # pictures
OTHER_SPLITS = {"train", "val", "training", "valid", "validation", "test", "testing"}           # which are no classes
ORDER, CROP = range(2)                                              # streams of random numbers


def visible(names):
    """Sorted, without what no user put there: .ipynb_checkpoints, ._0.jpg of macOS, __MACOSX of its archives."""
    return sorted(name for name in names if not name.startswith((".", "__MACOSX")))


def class_names(folder):
    return visible(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


class ClassFolders:
    """Pictures below folder/<class>, at any depth. Item: dict(image uint8 (3, size, size), label), as of Shapes."""

    def __init__(self, folder, size):
        self.transform, self.samples, real = vit.eval_transform(size), [], {}
        self.classes = class_names(folder)
        if not self.classes:
            found = visible(os.listdir(folder.parent))[:8] if folder.parent.is_dir() else "no such folder"
            sys.exit(f"{folder}: no class folders; {folder.parent} must hold {TREE}, and holds {found}")
        for label, name in enumerate(self.classes):
            for below, folders, files in os.walk(folder / name, followlinks=True):
                refuse_second_way(below, real)
                folders[:] = visible(folders)
                self.samples += [(os.path.join(below, file), label) for file in visible(files)
                                 if file.lower().endswith(vit.SUFFIXES)]
            if not self.samples or self.samples[-1][1] != label:
                raise ValueError(f"{folder / name}: holds no picture ({' '.join(vit.SUFFIXES)}); add some, or remove "
                                 "it")

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        path, label = self.samples[i]
        return dict(image=self.transform(vit.read_image(path)), label=label)


def hold_out(root, size, args):
    """(train, val) of a folder of classes without a split: val is the share of each class whose names have the lowest
    hashes, so neither order nor seed has a say. A class of two pictures or more is on both sides."""
    args.val_share = args.val_share or 0.2
    train, lonely = ClassFolders(root, size), []
    val, samples = copy.copy(train), train.samples
    odd = [name for name in train.classes if name.lower() in OTHER_SPLITS]
    if odd:
        sys.exit(f"{root}: {', '.join(odd)} cannot be classes, but splits; {root} must hold {TREE}")
    train.samples, val.samples = [], []
    for label, files in itertools.groupby(samples, key=lambda sample: sample[1]):
        files = sorted(files, key=lambda sample: hash_name(os.path.relpath(sample[0], root)))
        held = min(max(round(args.val_share * len(files)), 1), len(files) - 1)
        lonely += [train.classes[label]] * (held == 0)
        val.samples += sorted(files[:held])
        train.samples += sorted(files[held:])
    args.partial |= bool(lonely)
    if lonely and not (args.allow_partial and val.samples):
        sys.exit(f"{root}: one picture each of {', '.join(lonely[:5])}{', ...' * (len(lonely) > 5)}, not enough for "
                 "train and val; add more, remove the class, or give --allow-partial")
    print(f"folder: no train/ and val/ in {checkpoint.printable(root)}; val is {100 * args.val_share:g} % of each "
          f"class, by a hash of its names: train {len(train):,} images, val {len(val):,}, classes {len(val.classes):,}")
    return train, val


def hash_name(name):
    return hashlib.blake2b(os.fsencode(name.replace(os.sep, "/")), digest_size=8).digest()


def refuse_second_way(folder, real):
    """Links are followed: a loop of them, or two to one folder, would count pictures twice or in two classes."""
    first = real.setdefault(os.path.realpath(folder), folder)
    if first != folder:
        raise ValueError(f"{folder}: is {first} again, through a link; remove the link")


class TrainCrops:
    """Random-resized crop (8 to 100 % of the area) and flip of a train image, a function of (seed, epoch, index)."""

    def __init__(self, images, size, seed):
        self.samples, self.seed = images.samples, seed
        crop = transforms.RandomResizedCrop(size, interpolation=transforms.InterpolationMode.BICUBIC)
        self.transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])

    def __getitem__(self, key):
        path, label = self.samples[key[1]]
        with torch.random.fork_rng(devices=[]):                     # torchvision draws from torch's global generator
            torch.manual_seed(int(np.random.default_rng((CROP, self.seed, *key)).integers(2**63)))
            return dict(image=self.transform(vit.read_image(path)), label=label)


class BatchOrder:
    """Batch sampler: micro-batches of (epoch, index) from iteration `start` on; each epoch has an order of its own."""

    def __init__(self, n, args, start):
        self.n, self.args, self.start = n, args, start

    def __iter__(self):
        n, size, micro, seed = self.n, self.args.batch_size, self.args.micro_batch, self.args.seed
        order = functools.lru_cache(1)(lambda epoch: np.random.default_rng((ORDER, seed, epoch)).permutation(n))
        for t in range(self.start, self.args.iters):
            keys = [(at // n, int(order(at // n)[at % n])) for at in range(t * size, (t + 1) * size)]
            yield from (keys[i:i + micro] for i in range(0, size, micro))


def open_data(args, size):
    """(train, val, names of the classes, fingerprint). An item of both is dict(image uint8 (3, size, size), label)."""
    if args.data == "shapes":
        return Shapes("train", size, 2000), Shapes("val", size, 1000), CLASSES, FINGERPRINT      # 2000 as in train.py
    root = Path(args.root)
    has_split = any((root / split).is_dir() for split in IMAGENET)
    if has_split and args.val_share is not None:
        sys.exit(f"{root}: holds train/ or val/, so the split is there; leave out --val-share, or give as --root the "
                 "folder of classes itself")
    if args.data == "folder" and not has_split and class_names(root):
        train, val = hold_out(root, size, args)
    else:
        train, val = (open_split(root, split, size, args) for split in IMAGENET)
    refuse_other_classes(args, train, val)
    val.samples = [(path, train.classes.index(val.classes[label])) for path, label in val.samples]
    files = [[path for path, _ in images.samples] for images in (train, val)]
    checkpoint.refuse_trained_on(root, *files)
    return train, val, train.classes, checkpoint.fingerprint(root, sum(files, []))


def open_split(root, split, size, args):
    images, expected = ClassFolders(root / split, size), IMAGENET[split]
    print(f"{args.data} {split}: images {len(images):,}, classes {len(images.classes):,}")
    args.partial |= args.data == "imagenet" and len(images) < expected
    if args.partial and not args.allow_partial:
        sys.exit(f"{root / split}: {len(images):,} images of {expected:,}; complete it, or give --allow-partial")
    return images


def refuse_other_classes(args, train, val):
    """Labels are places in the list of class folders of train/: val/ must have the same."""
    if len(train.classes) == 1:
        sys.exit(f"{args.root}: one class, {train.classes[0]}; to tell classes apart takes two")
    odd = sorted(set(val.classes) - set(train.classes) if args.allow_partial else set(train.classes) ^ set(val.classes))
    args.partial |= train.classes != val.classes
    if odd:
        sys.exit(f"{args.root}: {', '.join(odd[:5])} not in both train/ and val/, which must hold the same classes"
                 + "; --allow-partial lets val/ lack some" * (set(odd) <= set(train.classes)))


# ------------------------------------------------------------------------------------------- results
def show(values):
    mean, sd = checkpoint.mean_sd(values)
    return f"{mean:.2f} %" if sd is None else f"{mean:.2f} ± {sd:.2f} %"


def grid_metrics(heads, features, labels, args):
    """Prints top-1 of every learning rate; the best of each head seed is the result (the paper: best final top-1)."""
    right = heads.predict(features) == labels[:, None, None]        # (N, S, L)
    top1 = 100 * right.double().mean(0)                             # (S, L)
    grid = [dict(lr=rate, effective=rate * args.batch_size / 256, top1=values)
            for rate, values in zip(RATES, top1.T.tolist(), strict=True)]
    print("learning rate  effective  top-1, final" + f", mean ± sd of {args.seeds} head seeds" * (args.seeds > 1))
    for row in grid:
        print(f"{row['lr']:13.0e}  {row['effective']:9.2e}  {show(row['top1'])}")
    best = top1.amax(1)
    ends = (best > top1[:, 1:-1].amax(1)).sum().item()
    if ends:
        print(f"best rate at an end of the grid, for {ends} of {args.seeds} head seed{'s' * (args.seeds > 1)}: rates "
              "beyond it may do better")
    mean, sd = checkpoint.mean_sd(best.tolist())
    return dict(top1=mean, top1_sd=sd, top1_seeds=best.tolist(), grid=grid)


def draw_images(file, images, names, predicted):
    """Images with their label, and in red what was predicted where that is wrong: {place among the images: class}."""
    tile, line, columns = 144, 34, min(6, len(predicted))
    sheet = Image.new("RGB", (columns * tile, math.ceil(len(predicted) / columns) * (tile + line)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (at, guess) in enumerate(predicted.items()):
        pixels, label = images[at]["image"], images[at]["label"]
        x, y = i % columns * tile, i // columns * (tile + line)
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        sheet.paste(picture.resize((tile - 4, tile - 4), Image.Resampling.BICUBIC), (x + 2, y))
        pen.text((x + 4, y + tile - 2), checkpoint.printable(names[label])[:22], "black")
        if guess != label:
            pen.text((x + 4, y + tile + 12), f"not {checkpoint.printable(names[guess])[:18]}", "red")
    sheet.save(file)
    print(f"{file}: {len(predicted):,} of {len(images):,} val images with label and, where it is wrong, prediction")


def evaluate(path, args, device, data):
    """Both probes of one file of weights: prints them and writes the results beside it. `data(size)`: see open_data."""
    model, facts = checkpoint.open_weights(path, args.which, args.like, args.seed, device, args.heads)
    train, val, names, fingerprint = data(model.config.image_size)
    shared = dict(data=args.data, fingerprint=fingerprint, train=len(train), val=len(val), classes=len(names),
                  size=model.config.image_size, partial=args.partial, feature="[CLS], last block, final norm",
                  precision=args.amp)
    if args.val_share is not None:                                  # not of data that bring a split
        shared |= dict(val_share=args.val_share, split="lowest hashes of the names, by class")
    facts = dict(data=args.data, root=args.root, **facts, config=dataclasses.asdict(model.config), seed=args.seed)

    def claim(probe, out, **protocol):
        result = dict(probe=probe, **facts, metrics=None, protocol=dict(probe=probe, **shared, **protocol))
        default = checkpoint.result_path(path, probe, args.data, model.config, args.seed)
        return result, *checkpoint.claim(out, default, result)

    def report(out, result, what, metrics):
        constant = 100 * features(val)[1].bincount().max().item() / len(val)
        print(f"{path}: {what}; chance {100 / len(names):.1f} %, always the most frequent class {constant:.1f} %; "
              f"{time.perf_counter() - start:.0f} s")
        checkpoint.write_result(out, dict(result, metrics=dict(metrics, top1_constant=constant)))

    out = args.out and Path(args.out)
    nearest, knn_out, finished_knn = claim("knn", out if args.knn else out and checkpoint.beside(out, ".knn.json"),
                                           neighbours=NEIGHBOURS, temperature=TEMPERATURE)
    if not args.knn:
        linear, out, finished = claim(
            "linear", out, iters=args.iters, batch_size=args.batch_size, seeds=args.seeds, rates=RATES,
            optimizer="SGD, momentum 0.9, cosine to 0, rates x batch / 256", reported="best rate, last iteration",
            augmentation="none" if args.data == "shapes" else "random-resized 0.08-1, flip 0.5")
    again = not args.knn and (not finished or args.save_images)     # pictures are drawn from the finished heads
    features, start = functools.cache(lambda images: extract(model, images, args, device)), time.perf_counter()
    if again:
        stamp = dict(checkpoint.identity(linear), weights_sha256=facts["weights_sha256"])
        heads = train_heads(model, features(train) if args.data == "shapes" else train, len(names), args, device,
                            checkpoint.beside(out, ".head.pt"), stamp)

    if finished_knn:
        checkpoint.say_finished(knn_out, finished_knn)
    else:                                                           # after a training, which may want to go on first
        top1 = knn(*features(train), *features(val), len(names))
        report(knn_out, nearest, "k-NN " + ", ".join(f"k={k} {value:.2f} %" for k, value in top1.items()),
               dict(top1=top1[20], **{f"top1_k{k}": top1[k] for k in NEIGHBOURS}))
    if again:
        metrics = grid_metrics(heads, *features(val), args)
        if args.save_images:
            rate = max(range(len(RATES)), key=lambda i: metrics["grid"][i]["top1"][0])
            drawn = checkpoint.spread(len(val), args.save_images)       # folders are sorted by class
            guesses = heads.predict(features(val)[0][drawn])[:, 0, rate].tolist()
            draw_images(checkpoint.beside(out, ".png"), val, names, dict(zip(drawn, guesses, strict=True)))
        spread = f"; ± is the spread of {args.seeds} heads on one backbone, not of pretraining" * (args.seeds > 1)
        report(out, linear, f"linear {show(metrics['top1_seeds'])}, best rate{spread}", metrics)
    elif not args.knn:
        checkpoint.say_finished(out, finished)


# ------------------------------------------------------------------------------------------- command line
def parse_args(argv=None):
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--data", default="shapes")
    recipe = RECIPES.get(first.parse_known_args(argv)[0].data, {})

    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    checkpoint.add_flags(p, "linear")
    p.add_argument("--knn", action="store_true", help="k-NN only; the default of --out has .knn for .linear")
    # data
    p.add_argument("--data", choices=list(RECIPES), default="shapes", help="folder: any classes")
    p.add_argument("--root", help=f"folder that holds {TREE}")
    p.add_argument("--val-share", type=float, help="of each class in a folder of classes without train/ and val/: the "
                   "pictures that are val, by a hash of the names; default 0.2")
    p.add_argument("--allow-partial", action="store_true", help="accept missing images, in val/ missing classes")
    # heads
    p.add_argument("--iters", type=int, help="iterations; the cosine schedule scales with them")
    p.add_argument("--batch-size", type=int, help="images per iteration")
    p.add_argument("--micro-batch", type=int, default=256, help="images per forward")
    p.add_argument("--seeds", type=int, default=1, help="head initialisations trained at once, from --seed on")
    # run
    p.add_argument("--save-every", type=int, help="iterations between saves of the heads")
    p.add_argument("--log-every", type=int, help="iterations between progress lines")
    p.add_argument("--save-images", type=int, default=0, metavar="N",
                   help="draw N val images, spread over the classes, with predictions")
    p.set_defaults(**recipe, partial=False)                        # of the data, as found
    args = p.parse_args(argv)
    check_args(p, args)
    return args


def check_args(p, args):
    """Refuse what cannot run, in one line and before anything is written; fill in what follows from other values."""
    if (args.root is None) != (args.data == "shapes"):
        p.error(f"--data {args.data} needs --root, a folder with {TREE}" if args.root is None else
                "--data shapes takes no --root; its scenes are embedded")
    if args.val_share is not None and (args.data != "folder" or not 0 < args.val_share < 1):
        p.error(f"--val-share {args.val_share:g}: a share of --data folder, above 0 and below 1")
    checkpoint.check_flags(p, args, "iters batch_size micro_batch seeds save_every log_every", "save_images")
    args.micro_batch = min(args.micro_batch, args.batch_size)


def main(argv=None):
    checkpoint.print_any_path()
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = functools.cache(lambda size: open_data(args, size))      # listing ImageNet takes minutes: once
    for path in args.weights:
        with checkpoint.one_line(path):
            evaluate(path, args, device, data)


if __name__ == "__main__":
    main()
