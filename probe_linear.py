"""k-NN top-1 of frozen [CLS] features, the quickest sign that a backbone has learnt something. No training, no knobs.

    python probe_linear.py --knn --weights runs/shapes_entmax15_s0/checkpoint.pt
    python probe_linear.py --knn --weights random --like runs/shapes_entmax15_s0/checkpoint.pt         the control
    python probe_linear.py --knn --weights dino_deitsmall16_pretrain.pth --data imagenet --root ILSVRC2012

DINO's weighted vote (Caron et al. 2021, app. F; Wu et al. 2018): the k train images of highest cosine similarity s
vote for their class with weight exp(s / 0.07). The last line printed is the result as JSON, also written to --out.

    N images, D width, C classes
"""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import vit
from shapes import CLASSES, Shapes

NEIGHBOURS = (10, 20, 100, 200)                                     # 20 is the headline, as in DINO
TEMPERATURE = 0.07
TREE = "train/<class>/*.jpg and val/<class>/*.jpg"
EXPECTED = {"imagenet": {"train": 1_281_167, "val": 50_000}}


# ------------------------------------------------------------------------------------------- command line
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--knn", action="store_true", required=True, help="k-NN")
    # weights
    p.add_argument("--weights", nargs="+", required=True, metavar="FILE",
                   help="checkpoints of train.py, official DINO files, a run folder (its numbered files), or random")
    p.add_argument("--which", choices=["teacher", "student"], default="teacher", help="DINO evaluates the teacher")
    p.add_argument("--like", help="checkpoint whose architecture --weights random takes; default ViT-S/16")
    # data
    p.add_argument("--data", choices=["shapes", "imagenet", "folder"], default="shapes", help="folder: any classes")
    p.add_argument("--root", help="folder that holds train/ and val/, each with a folder per class")
    p.add_argument("--allow-partial", action="store_true", help="accept fewer images than the data set holds")
    # run
    p.add_argument("--batch-size", type=int, default=256, help="images per forward")
    p.add_argument("--workers", type=int, default=min(10, os.cpu_count()), help="loader processes")
    p.add_argument("--seed", type=int, default=0, help="of --weights random")
    p.add_argument("--out", help="result file; default <weights without .pt>.knn.<data>.json")
    args = p.parse_args(argv)
    if (args.root is None) != (args.data == "shapes"):
        p.error(f"--data {args.data} needs --root, a folder with {TREE}" if args.root is None else
                "--data shapes takes no --root; its scenes are embedded")
    args.weights = [file for weights in args.weights for file in
                    (sorted(map(str, Path(weights).glob("checkpoint_*.pt"))) or [weights])]
    if args.like and args.weights != ["random"]:
        p.error("--like goes with --weights random: a checkpoint brings its own architecture")
    if args.out and len(args.weights) > 1:
        p.error(f"--out names one file and --weights {len(args.weights)}; leave it out for one result beside each")
    for name in ("batch_size", "workers", "seed"):
        if getattr(args, name) < (name == "batch_size"):
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)} is too small")
    return args


# ------------------------------------------------------------------------------------------- weights
def load_model(path, args, device):
    """(frozen backbone, facts about the weights for the result)."""
    if path != "random":
        epochs = vit.read_checkpoint(path).get("epoch")
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        return vit.load_backbone(path, args.which, device), dict(
            weights=path, weights_sha256=digest, which=args.which, epochs=epochs)
    config = vit.load_backbone(args.like).config if args.like else vit.ViTConfig()
    torch.manual_seed(args.seed)
    model = vit.VisionTransformer(config).to(device).eval().requires_grad_(False)
    return model, dict(weights="random", weights_sha256=None, which=None, epochs=0)


# ------------------------------------------------------------------------------------------- data
class LabelledScenes:
    """The embedded data set as (uint8 image, label): 2,000 train scenes as in train.py's default, 1,000 val scenes."""

    def __init__(self, split, size):
        self.scenes = Shapes(split, size, {"train": 2000, "val": 1000}[split])

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, i):
        scene = self.scenes[i]
        return scene["image"], scene["label"]


def read_picture(path):
    try:
        return vit.read_image(path)
    except Exception as error:                                      # Pillow's own messages mostly lack the name
        raise ValueError(f"{path}: unreadable ({error}); mend or remove it") from error


def open_data(args, size):
    """(train, val) data sets of (uint8 (3, size, size), label), and the number of classes."""
    if args.data == "shapes":
        return LabelledScenes("train", size), LabelledScenes("val", size), len(CLASSES)
    splits = []
    for split in ("train", "val"):
        folder = Path(args.root, split)
        try:
            images = ImageFolder(folder, vit.eval_transform(size), loader=read_picture)
        except (FileNotFoundError, NotADirectoryError) as error:
            found = sorted(os.listdir(args.root))[:8] if os.path.isdir(args.root) else "no such folder"
            sys.exit(f"{folder}: {error}; {args.root} must hold {TREE}, and holds {found}")
        expected = EXPECTED.get(args.data, {}).get(split, len(images))
        print(f"{args.data} {split}: {len(images):,} images, {len(images.classes):,} classes")
        if len(images) < expected and not args.allow_partial:
            sys.exit(f"{folder}: {len(images):,} images of {expected:,}; complete it, or give --allow-partial")
        splits.append(images)
    train, val = splits
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        sys.exit(f"{args.root}: {', '.join(odd[:5])} not in both train/ and val/, which must hold the same classes")
    return train, val, len(train.classes)


@torch.inference_mode()
def extract(model, images, args, device):
    """(N, D) float32 unit-length [CLS] features and (N,) labels, in the order of the data set."""
    loader = DataLoader(images, args.batch_size, num_workers=args.workers)
    features, labels = [], []
    for x, y in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            cls = model(vit.normalize(x.to(device)))
        features.append(F.normalize(cls.float(), dim=-1))
        labels.append(y.to(device))
    return torch.cat(features), torch.cat(labels)


# ------------------------------------------------------------------------------------------- k-NN
def knn(bank, bank_labels, queries, labels, classes, neighbours=NEIGHBOURS, chunk=256):
    """{k: top-1 in percent} of DINO's weighted vote; unit-length features (N, D). k is capped at the bank's size."""
    correct = dict.fromkeys(neighbours, 0)
    most = min(max(neighbours), len(bank))
    for q, y in zip(queries.split(chunk), labels.split(chunk), strict=True):    # (chunk, N) similarities at a time
        similarity, index = (q @ bank.T).topk(most)                 # (chunk, most), best first
        votes = (similarity / TEMPERATURE).exp()
        classes_of = bank_labels[index]
        for k in neighbours:
            tally = torch.zeros(len(q), classes, device=q.device)
            tally.scatter_add_(1, classes_of[:, :k], votes[:, :k])
            correct[k] += (tally.argmax(1) == y).sum().item()
    return {k: 100 * n / len(queries) for k, n in correct.items()}


def evaluate(path, args, device, opened):
    """k-NN of one file of weights: prints it and writes the result beside the weights. `opened`: data sets by size."""
    model, facts = load_model(path, args, device)
    size = model.config.image_size
    if size not in opened:                                          # listing ImageNet takes minutes: once
        opened[size] = open_data(args, size)
    train, val, classes = opened[size]
    start = time.perf_counter()
    top1 = knn(*extract(model, train, args, device), *extract(model, val, args, device), classes)
    print(f"{path}: " + ", ".join(f"k={k} {value:.2f} %" for k, value in top1.items())
          + f"; chance {100 / classes:.1f} %; {time.perf_counter() - start:.0f} s")

    result = dict(
        probe="knn", data=args.data, **facts, config=dataclasses.asdict(model.config), seed=args.seed,
        metrics=dict(top1=top1[20], **{f"top1_k{k}": top1[k] for k in NEIGHBOURS}),
        protocol=dict(probe="knn", data=args.data, train=len(train), val=len(val), classes=classes, size=size,
                      partial=args.allow_partial, neighbours=NEIGHBOURS, temperature=TEMPERATURE,
                      feature="[CLS], final norm", precision="bf16" if device.type == "cuda" else "fp32"),
    )
    default = (f"runs/random/knn.{args.data}.s{args.seed}.json" if path == "random" else
               f"{path.removesuffix('.pt')}.knn.{args.data}.json")
    out = Path(args.out or default)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


def main(argv=None):
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = {}
    for path in args.weights:
        try:
            evaluate(path, args, device, opened)
        except (ValueError, OSError) as error:                      # of the weights or of a picture, with its name
            sys.exit(str(error).strip().splitlines()[-1])           # a loader process prefixes its traceback


if __name__ == "__main__":
    main()
