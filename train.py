"""Pretrain a ViT with DINO; softmax or entmax-1.5 attention, registers, CLS/patch specialization.

    torchrun train.py --attn entmax15                                       embedded shapes: 3 minutes on two CPU cores
    torchrun --nproc-per-node 8 train.py --attn entmax15 --data IMAGENET    the paper's: ViT-S/16, 200 epochs

One process without torchrun, many with it, several nodes: the same code, and for the same --batch-size the same loss.
Writes --out (default runs/<data>_<method>_s<seed>): checkpoint.pt (latest, complete), checkpoint_0000.pt ... (by
epochs done), log.jsonl. Run the same command again, or --resume RUN, and it goes on from checkpoint.pt, bit for bit.

    B images per step, V views, K prototypes
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, default_collate

import checkpoint
import dino
import vit
from shapes import FINGERPRINT, Shapes

# What --data selects. "folder" is Caron et al.'s recipe for ViT-S/16 at the paper's 200 epochs (its own is unstated).
RECIPES = {
    "folder": dict(
        arch="small", patch_size=16, image_size=224, local_size=96, local_crops=8, drop_path=0.1,
        epochs=200, batch_size=1024, lr=5e-4, min_lr=1e-6, warmup_epochs=10, weight_decay=0.04, weight_decay_end=0.4,
        momentum=0.996, out_dim=65536, hidden_dim=2048, bottleneck_dim=256, freeze_last_layer=1, center_momentum=0.9,
        teacher_temp=0.07, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=30,
        save_every=20, save_steps=500, log_every=50, workers=10,
    ),
    # In so short a run the centre must catch up before the learning rate does, or all images get nearly one output.
    "shapes": dict(
        dim=64, depth=4, heads=2, patch_size=8, image_size=64, local_size=32, local_crops=2, drop_path=0.0,
        epochs=24, batch_size=32, lr=8e-3, min_lr=1e-6, warmup_epochs=2, weight_decay=0.04, weight_decay_end=0.1,
        momentum=0.98, out_dim=512, hidden_dim=256, bottleneck_dim=64, freeze_last_layer=1, center_momentum=0.5,
        teacher_temp=0.04, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=0,
        save_every=4, save_steps=200, log_every=50, workers=0,
    ),
}
MODELS = {"tiny": vit.vit_tiny, "small": vit.vit_small, "base": vit.vit_base}
CHECKPOINT = dict(config=dict, student=dict, teacher=dict, student_head=dict, teacher_head=dict, center=torch.Tensor,
                  optimizer=dict, scaler=dict, step=int, epoch=int, args=dict)
MAY_CHANGE = ("out", "workers", "log_every", "save_every", "save_steps")  # on resume, and the place of the data
FACTS = ("images", "fingerprint")                                   # in args, but no flags
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
# Streams of random numbers. Each draw is a function of its stream and a few integers: nothing random is ever stored.
ORDER, CROPS, REPLACEMENT, JITTER, DROP_PATH = range(1, 6)


def rng(stream, *key):
    return np.random.default_rng((stream, *key))


# ------------------------------------------------------------------------------------------- command line
def parse_args(argv=None):
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in dict(data="shapes", arch=None, resume=None).items():
        first.add_argument(flag(name), default=default)
    choice = first.parse_known_args(argv)[0]
    if choice.resume is not None:
        argv = [*flags_of_run(choice.resume), *(sys.argv[1:] if argv is None else argv)]
        choice = first.parse_known_args(argv)[0]
    recipe = dict(RECIPES["shapes" if choice.data == "shapes" else "folder"])
    if choice.arch:                                                 # it stands for these three
        recipe = {name: value for name, value in recipe.items() if name not in ("dim", "depth", "heads")}

    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # data
    p.add_argument("--data", default="shapes", help="shapes (embedded), or a folder of images, of which hidden ones "
                   "(.name) and those in hidden folders are left out")
    p.add_argument("--length", type=int, default=2000, help="scenes in the embedded data set")
    p.add_argument("--image-size", type=int, help="side of the global crops, pixels")
    p.add_argument("--local-size", type=int, help="side of the local crops, pixels")
    p.add_argument("--local-crops", type=int, help="local crops per image")
    p.add_argument("--global-scale", type=float, nargs=2, default=[0.4, 1.0], help="area of a global crop, share")
    p.add_argument("--local-scale", type=float, nargs=2, default=[0.05, 0.4], help="area of a local crop, share")
    p.add_argument("--workers", type=int, help="loader processes per training process")
    # model
    p.add_argument("--attn", choices=["softmax", "entmax15"], default="softmax", help="map from scores to weights")
    p.add_argument("--registers", type=int, default=0, help="register tokens; 4 in the paper")
    p.add_argument("--specialize", action="store_true", help="separate norms and early QKV for [CLS] and patches")
    p.add_argument("--arch", choices=list(MODELS), help="width, depth and heads in one word")
    p.add_argument("--dim", type=int, help="width; overrides --arch, as --depth and --heads do")
    p.add_argument("--depth", type=int, help="blocks")
    p.add_argument("--heads", type=int, help="attention heads")
    p.add_argument("--patch-size", type=int, help="pixels")
    p.add_argument("--drop-path", type=float, help="stochastic depth rate of the student's last block")
    # head and loss
    p.add_argument("--out-dim", type=int, help="prototypes K")
    p.add_argument("--hidden-dim", type=int, help="width of the head's MLP")
    p.add_argument("--bottleneck-dim", type=int, help="width before the prototypes")
    p.add_argument("--norm-last-layer", action="store_true", help="keep the prototypes at length 1")
    p.add_argument("--student-temp", type=float, default=0.1, help="student temperature")
    p.add_argument("--teacher-temp", type=float, help="teacher temperature after warm-up; above 0.07 is often unstable")
    p.add_argument("--warmup-teacher-temp", type=float, help="teacher temperature at the start")
    p.add_argument("--warmup-teacher-temp-epochs", type=int, help="epochs from the one to the other")
    p.add_argument("--center-momentum", type=float, help="moving average of the centre")
    # optimisation
    p.add_argument("--epochs", type=int, help="passes over the data")
    p.add_argument("--batch-size", type=int, help="images per step over all processes")
    p.add_argument("--accum", type=int, default=1, help="micro-batches per step and process")
    p.add_argument("--lr", type=float, help="peak learning rate per 256 images")
    p.add_argument("--min-lr", type=float, help="learning rate at the end")
    p.add_argument("--warmup-epochs", type=int, help="epochs of linear learning-rate warm-up")
    p.add_argument("--weight-decay", type=float, help="at the start")
    p.add_argument("--weight-decay-end", type=float, help="at the end")
    p.add_argument("--clip-grad", type=float, default=3.0, help="largest gradient norm of each tensor; 0 = off")
    p.add_argument("--freeze-last-layer", type=int, help="epochs in which the prototypes stay fixed")
    p.add_argument("--momentum", type=float, help="teacher's moving average at the start; 0.9995 for batches near 256")
    # run
    p.add_argument("--seed", type=int, default=0, help="of everything random")
    p.add_argument("--amp", choices=["bf16", "fp16", "off"], help="autocast; default bf16 on CUDA, off on CPU")
    p.add_argument("--no-fused", action="store_true", help="entmax attention without its CUDA kernel")
    p.add_argument("--compile", action="store_true", help="torch.compile the two networks")
    p.add_argument("--out", help="run folder; default runs/<data>_<method>_s<seed>")
    p.add_argument("--resume", metavar="RUN", help="go on with the run in this folder and its flags; beside it, only "
                   "what may change: " + ", ".join(map(flag, ("data", *MAY_CHANGE[1:]))))
    p.add_argument("--save-every", type=int, help="epochs between numbered checkpoints")
    p.add_argument("--save-steps", type=int, help="steps between writes of checkpoint.pt")
    p.add_argument("--log-every", type=int, help="steps between log lines")
    p.set_defaults(**recipe)
    args = p.parse_args(argv)
    if args.resume not in (None, args.out):
        p.error(f"--resume {args.resume} goes on in that folder; drop --out {args.out}")
    del args.resume
    check_args(p, args)
    return args


def flag(name):
    return "--" + name.replace("_", "-")


def as_flags(args):
    """{name: [words of the command line]} of arguments; [] for what is not given."""
    def words(name, value):
        values = [] if value is True else value if isinstance(value, list) else [value]
        return [] if value is None or value is False else [flag(name), *map(str, values)]

    return {name: words(name, value) for name, value in args.items() if name not in FACTS}


def flags_of_run(run):
    """The command line that --resume stands for."""
    state = open_state(Path(run) / "checkpoint.pt")
    if state is None:
        sys.exit(f"{run}: holds no checkpoint.pt; --resume takes the folder of a run that has begun")
    return [*sum(as_flags(state["args"]).values(), []), "--out", run]


def check_args(p, args):
    """Refuse what cannot run, in one line and before anything is written; fill in what follows from other values."""
    for names, fits, rule in (
        ("length image_size local_size patch_size out_dim hidden_dim bottleneck_dim epochs batch_size accum "
         "save_every save_steps log_every", lambda x: x >= 1, "must be at least 1"),
        ("local_crops registers workers seed warmup_epochs warmup_teacher_temp_epochs freeze_last_layer min_lr "
         "weight_decay weight_decay_end clip_grad", lambda x: 0 <= x < 2**63, "must not be negative, and below 2^63"),
        ("student_temp teacher_temp warmup_teacher_temp lr", lambda x: 0 < x < math.inf, "must be positive and finite"),
        ("momentum center_momentum", lambda x: 0 <= x <= 1, "must be between 0 and 1"),
    ):
        for name in names.split():
            if not fits(getattr(args, name)):
                p.error(f"{flag(name)} {getattr(args, name)}: {rule}")
    for name in "global_scale local_scale".split():
        low, high = getattr(args, name)
        if not 0 < low <= high <= 1:
            p.error(f"{flag(name)} {low} {high}: two shares, 0 < first <= second <= 1")
    for name in ("image_size", "local_size"):
        if getattr(args, name) % args.patch_size:
            p.error(f"{flag(name)} {getattr(args, name)} is not a multiple of --patch-size {args.patch_size}")
    if args.warmup_epochs >= args.epochs:
        p.error(f"--warmup-epochs {args.warmup_epochs} leaves nothing of --epochs {args.epochs}")
    try:
        _, world, _ = launched()
    except ValueError as error:
        p.error(str(error))
    if args.batch_size % (world * args.accum):
        p.error(f"--batch-size {args.batch_size} is not divisible by {counted(world, 'process')} x --accum "
                f"{args.accum}")
    if args.no_fused and args.attn != "entmax15":
        p.error("--no-fused is about the kernel of --attn entmax15; drop it, or add that")
    if args.amp == "fp16" and not torch.cuda.is_available():
        p.error("--amp fp16 needs CUDA; use --amp off or bf16")
    if args.amp is None:
        args.amp = "off"
        if torch.cuda.is_available():                               # older cards only emulate bfloat16, slowly
            args.amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if args.data != "shapes":
        args.data = os.path.abspath(args.data)
    if args.out is None:
        args.out = f"runs/{os.path.basename(args.data)}_{checkpoint.method(args)}_s{args.seed}"
    try:
        args.config = model_config(args)
    except ValueError as error:
        p.error(str(error))


def counted(n, what):
    """'1 epoch', '2,000 images', '2 processes'"""
    return f"{n:,} {what}" + ("" if n == 1 else "es" if what.endswith("s") else "s")


def plain(args):
    """The arguments as plain types, for checkpoint and log; the config has a place of its own in both."""
    return {name: value for name, value in vars(args).items() if name != "config"}


def model_config(args):
    """ViTConfig of the command line: --arch, then whatever is given by itself."""
    names = ["patch_size", "image_size", "attn", "registers", "specialize", "drop_path", "dim", "depth", "heads"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    with torch.device("meta"):
        return MODELS[args.arch or "small"](**given).config


# ------------------------------------------------------------------------------------------- data
def list_images(root):
    """Sorted paths of the pictures below a folder (its train/ if it has one), in class folders or not; links count,
    hidden files and folders (macOS' ._*, .ipynb_checkpoints, .Trash) do not."""
    def refuse(error):                                              # os.walk alone would pass over it in silence
        sys.exit(f"{error.filename}: {error.strerror}; make it readable, or move it out of {root}")

    root = os.path.join(root, "train") if os.path.isdir(os.path.join(root, "train")) else root
    found, seen = [], set()
    for folder, below, names in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in seen:                                            # a loop of links, or the same folder twice
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if name[0] != ".")     # of two links every machine takes the same one
        found += [os.path.join(folder, name) for name in names if name[0] != "." and name.lower().endswith(SUFFIXES)]
    return sorted(found)


class Pictures:
    """read(i) -> uint8 (3, H, W), name(i) -> path. One block of bytes, because a million str objects would be copied
    into every worker, page by page, as their reference counts change."""

    def __init__(self, paths):
        names = [os.fsencode(path) for path in paths]
        self.ends = np.cumsum([0] + [len(name) for name in names])
        self.block = np.frombuffer(b"".join(names), np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def name(self, i):
        return os.fsdecode(self.block[self.ends[i]:self.ends[i + 1]].tobytes())

    def read(self, i):
        pixels = np.array(vit.read_image(self.name(i)))             # (H, W, 3); the permuted view keeps channels last,
        return torch.from_numpy(pixels).permute(2, 0, 1)            # which is torch's fast path for uint8 resizing


class Scenes:
    """The embedded data set, rendered once: 2,000 scenes of 64 px are 24 MB."""

    def __init__(self, size, length):
        scenes = Shapes("train", size, length)
        self.images = torch.stack([scenes[i]["image"] for i in range(length)])

    def __len__(self):
        return len(self.images)

    def read(self, i):
        return self.images[i]


class Crops(Dataset):
    """Item (epoch, i) -> (large, small, draws) of MultiCrop and the names of unreadable files met on the way.

    An unreadable file gives way to another, chosen by (seed, epoch, i): the batch stays full and the run repeatable.
    """

    def __init__(self, source, multicrop, seed):
        self.source, self.multicrop, self.seed = source, multicrop, seed

    def __getitem__(self, key):
        epoch, i = key
        candidates, failed = rng(REPLACEMENT, self.seed, epoch, i), []
        image = None
        while image is None:
            try:
                image = self.source.read(i)
            except Exception:                                       # Pillow raises half a dozen types on broken files
                failed.append(self.source.name(i))
                i = int(candidates.integers(len(self.source)))
                if len(failed) == 100:                              # hopeless: grey, until Reads stops the run
                    image = torch.full((3, 8, 8), 128, dtype=torch.uint8)
        return *self.multicrop(image, rng(CROPS, self.seed, *key)), failed


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
                order, shuffled = rng(ORDER, a.seed, epoch).permutation(self.n), epoch
            for k in range(a.accum):
                first = batch * a.batch_size + (self.rank * a.accum + k) * micro
                yield [(epoch, int(i)) for i in order[first:first + micro]]


def collate(items):
    failed = [name for item in items for name in item[-1]]
    return *default_collate([item[:-1] for item in items]), failed


class Reads:
    """Counts reads and unreadable files of all processes, names each such file once, stops a run that has too many."""

    def __init__(self):
        self.total, self.failed, self.fresh, self.reported = 0, 0, [], set()

    def add(self, images, failed):
        self.total += images + len(failed)
        self.failed += len(failed)
        self.fresh += failed

    def report(self, log, epoch_over):
        """At log lines, on every process: exchange news, so that all of them come to the same decision."""
        parts = dino.all_gather((self.total, self.failed, self.fresh))
        total, failed = sum(part[0] for part in parts), sum(part[1] for part in parts)
        for name in dict.fromkeys(name for part in parts for name in part[2]):
            if name not in self.reported:
                self.reported.add(name)
                log.say(f"unreadable, replaced by another: {checkpoint.printable(name)} "
                        f"({failed} of {total} reads so far)")
        self.fresh = []
        if failed > 0.01 * total and (total >= 1000 or epoch_over):
            sys.exit(f"{checkpoint.printable(min(self.reported))}: one of "
                     f"{counted(len(self.reported), 'unreadable file')}; {failed} of {total} reads failed, more "
                     "than 1 %; mend or remove the files named above, then run this again")
        return failed


# ------------------------------------------------------------------------------------------- the run
class Distiller(nn.Module):
    """A backbone and its head as one module: DistributedDataParallel wants one forward per step, with all crops."""

    def __init__(self, config, args):
        super().__init__()
        self.backbone = vit.VisionTransformer(config)
        self.head = dino.DINOHead(config.dim, args.out_dim, args.hidden_dim, args.bottleneck_dim, args.norm_last_layer)

    def forward(self, views):
        return dino.forward_crops(self.backbone, self.head, views)


class Run:
    """All that changes while training and that a checkpoint holds. Nothing random is in it: see `rng`."""

    def __init__(self, args, device):
        self.args = args
        torch.manual_seed(args.seed)                                # the same on every process: nothing else would make
        self.student = Distiller(args.config, args).to(device)      # the teachers equal
        self.teacher = Distiller(dataclasses.replace(args.config, drop_path=0.0), args).to(device).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.loss = dino.DINOLoss(args.out_dim, args.student_temp, args.center_momentum).to(device)
        self.optimizer = torch.optim.AdamW(dino.param_groups(self.student), fused=device.type == "cuda")
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.bad_step = torch.tensor(-1, device=device)             # the first step that left something not finite
        self.saved = 0                                              # step of the last checkpoint
        if args.no_fused:
            for block in (*self.student.backbone.blocks, *self.teacher.backbone.blocks):
                block.attn.attend = functools.partial(block.attn.attend, fused=False)
        if args.compile:
            # Or stochastic depth's rate becomes an input of the graph, and torch (2.8 to 2.14) fails to cut that for
            # DistributedDataParallel. Without the cuts, no gradient would travel before the backward pass is over.
            torch._dynamo.config.specialize_float = True
            self.student.compile()
            self.teacher.compile()

    def state(self, step, epoch):
        return {
            "config": dataclasses.asdict(self.args.config),
            "student": self.student.backbone.state_dict(), "teacher": self.teacher.backbone.state_dict(),
            "student_head": self.student.head.state_dict(), "teacher_head": self.teacher.head.state_dict(),
            "center": self.loss.center, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "step": step, "epoch": epoch,
            "args": plain(self.args),
        }

    def load(self, state, path):
        try:
            for name in ("student", "teacher"):
                getattr(self, name).backbone.load_state_dict(state[name])
                getattr(self, name).head.load_state_dict(state[name + "_head"])
            self.loss.load_state_dict({"center": state["center"]})
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            for p, moments in self.optimizer.state.items():         # which torch does not compare
                if any(moment.shape not in (p.shape, ()) for moment in moments.values()):
                    raise ValueError(f"optimizer state for another shape than {tuple(p.shape)}")
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:    # torch's, of foreign states
            sys.exit(f"{path}: cannot be resumed: {type(error).__name__}: {' '.join(str(error).split())[:300]}; "
                     "give another --out, or remove the folder to start over")
        if not all(p.isfinite().all() for p in (*self.student.parameters(), *self.teacher.parameters(),
                                                self.loss.center)):
            sys.exit(f"{path}: cannot be resumed: it holds weights that are not finite; give another --out")

    def watch(self, step, loss, grad_norm):
        """Note the first bad step, on the device: nothing waits for it here."""
        finite = self.loss.center.sum().isfinite()
        if self.args.amp != "fp16":                                 # there the scaler skips such a step by itself
            finite = finite & loss.isfinite() & grad_norm.isfinite()
        self.bad_step = torch.where((self.bad_step < 0) & ~finite, step + 1, self.bad_step)     # as in the log

    def check(self, out):
        """Stop a run whose state is not finite. Every process comes to the same verdict: gradients are shared."""
        last_good = f"last good: {out / 'checkpoint.pt'}, step {self.saved}"
        if self.bad_step >= 0:
            sys.exit(f"{out}: loss, gradient or centre is not finite at step {int(self.bad_step)}; {last_good}. "
                     "Try --amp off or bf16, a lower --lr or --clip-grad")
        if self.args.amp == "fp16" and self.scaler.get_scale() < 1:
            sys.exit(f"{out}: the fp16 loss scale fell below 1: every step overflows; {last_good}. "
                     "Try --amp bf16 or off, or a lower --lr")

    def save(self, out, step, per_epoch, is_main):
        """checkpoint.pt, and the numbered copy where one is due; never a state that is not finite."""
        self.check(out)
        self.saved, (epochs, rest) = step, divmod(step, per_epoch)
        if not is_main:
            return
        state = self.state(step, epochs)
        try:
            if rest == 0 and (epochs % self.args.save_every == 0 or epochs == self.args.epochs):
                weights = {key: value for key, value in state.items() if key not in ("optimizer", "scaler")}
                # first: a kill here repeats it
                checkpoint.write_checkpoint(out / f"checkpoint_{epochs:04d}.pt", weights)
            checkpoint.write_checkpoint(out / "checkpoint.pt", state)
        except OSError as error:
            sys.exit(str(error))


def open_state(path):
    """What checkpoint.pt of a run holds, or None without one."""
    if not path.exists():
        return None
    try:
        state = checkpoint.read_checkpoint(path)
    except ValueError as error:
        cause = str(error).removeprefix(f"{path}: ")
        sys.exit(f"{path}: cannot be resumed: {cause}; give another --out, or remove the folder to start over")
    missing = [name for name in CHECKPOINT if not isinstance(state.get(name), CHECKPOINT[name])]
    if missing:
        sys.exit(f"{path}: cannot be resumed: it lacks {', '.join(missing)}; give another --out, or remove the folder")
    return state


def read_resume(path, args):
    """State dict of an interrupted run, or None; refuses one of other arguments or pictures: two runs would mix."""
    state = open_state(path)
    if state is None:
        return None
    old, new = state["args"], plain(args)
    free = {*MAY_CHANGE, *FACTS}
    if "fingerprint" in old and "shapes" not in (old.get("data"), args.data):
        free.add("data")                                            # which the fingerprint knows, wherever it lies
    flags = as_flags({name: old.get(name) for name in sorted(old.keys() | new.keys())
                      if name not in free and old.get(name) != new.get(name)})
    if flags:
        given = shlex.join(word for words in flags.values() for word in words)
        dropped = " or ".join(flag(name) for name, words in flags.items() if not words)
        way = ", ".join([f"with {given}"] * bool(given) + [f"without {dropped}"] * bool(dropped))
        print(f"train.py: error: {path}: begun with other flags; go on {way}, or give another --out", file=sys.stderr)
        sys.exit(2)
    if old.get("images") != args.images or old.get("fingerprint", args.fingerprint) != args.fingerprint:
        sys.exit(f"{path}: trained on {old.get('images')} images of {old.get('data')}; of the {args.images} "
                 f"in {args.data} some were replaced, added or removed; bring the data back, or "
                 "give another --out")
    return state


class Log:
    """log.jsonl, and a line for the eye: rewritten in place on a terminal, one after the other in a file. Main only."""

    def __init__(self, folder, is_main, step):
        self.path, self.is_main, self.tty = Path(folder) / "log.jsonl", is_main, sys.stdout.isatty()
        if is_main and self.path.exists():                          # drop what a killed run logged after its checkpoint
            kept = []
            for line in self.path.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, AttributeError, TypeError):    # a line that the kill cut short
                    if json.loads(line).get("step", 0) <= step:
                        kept.append(line + "\n")
            half = self.path.with_suffix(".tmp")
            half.write_text("".join(kept))
            os.replace(half, self.path)

    def record(self, record, line=None):
        if self.is_main:
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                sys.exit(f"{self.path}: not written: {error}; make room and run the same command again")
            if line and self.tty:                                   # a line that wraps could not be taken back
                print(f"\r{line[:shutil.get_terminal_size().columns - 1]}\033[K", end="", flush=True)
            elif line:
                print(line, flush=True)

    def say(self, text):
        if self.is_main:
            print("\n" * self.tty + text, flush=True)


def provenance(args, device, world):
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        dirty = bool(subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout)
    except OSError:                                                 # no git on this machine
        commit, dirty = "", False
    return {
        "args": plain(args),
        "config": dataclasses.asdict(args.config), "processes": world,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                     "torchvision": torchvision.__version__, "pillow": PIL.__version__},
        "commit": commit, "dirty": dirty, "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }


def collapse(history, log_k):
    """Text of a warning when the last five log records sit in one of DINO's two collapses, else None."""
    last = list(history)[-5:]
    if len(last) < 5:
        return None
    if all(r["entropy"] < 1e-3 * log_k for r in last):
        return ("teacher entropy is 0: one prototype takes everything. Try a lower --center-momentum, a higher "
                "--teacher-temp or a lower --lr")
    if all(r["entropy"] > (1 - 1e-3) * log_k for r in last) or all(abs(r["loss"] / log_k - 1) < 1e-3 for r in last):
        return ("the loss sits at ln K: the teacher is uniform. Try a lower --center-momentum or --teacher-temp, a "
                "longer --warmup-epochs, a lower --lr, or --norm-last-layer")
    return None


def launched():
    """(rank, world, rank on this machine) as torchrun sets them; without RANK one process, whatever WORLD_SIZE is."""
    if not os.environ.get("RANK"):
        return 0, 1, 0
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"]
    values = {name: os.environ.get(name, "") for name in names[:3 if os.environ.get("WORLD_SIZE") == "1" else 5]}
    if torch.cuda.device_count() < 2:                               # then it decides nothing, and not all set it
        values["LOCAL_RANK"] = values["LOCAL_RANK"] or "0"
    wrong = [name for name, value in values.items() if not (value.isdecimal() or value and name == "MASTER_ADDR")]
    if wrong or int(values["RANK"]) >= int(values["WORLD_SIZE"]):
        raise ValueError(f"RANK={values['RANK']} is set as by torchrun, with "
                         + ", ".join(f"{name}={values[name]}" for name in wrong or ["WORLD_SIZE"])
                         + "; start with torchrun, or unset RANK")
    return tuple(int(values[name]) for name in names[:3])


def setup_distributed():
    """(rank, world, device). One process has no process group."""
    cuda = torch.cuda.is_available()
    rank, world, local = launched()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda and local >= torch.cuda.device_count():
        sys.exit(f"--nproc-per-node: process {local} has no GPU, this machine has {torch.cuda.device_count()}")
    if cuda:
        torch.cuda.set_device(device)
    if world == 1:
        return rank, world, device
    store, rank, world = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # After a restart torchrun hands out the store to which the dead processes wrote their addresses, and the new
        # ones may look there first (pytorch issue 135712). Agents of several nodes may have restarted unequally often.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    return rank, world, device


def schedules(args, step, per_epoch):
    """lr, weight decay, teacher momentum and teacher temperature of a 0-based step. Temperature moves by epoch."""
    total, warmup = args.epochs * per_epoch, args.warmup_epochs * per_epoch
    return dict(
        lr=dino.cosine(step, args.lr * args.batch_size / 256, args.min_lr, total, warmup),      # Goyal et al. 2017
        wd=dino.cosine(step, args.weight_decay, args.weight_decay_end, total),
        momentum=dino.cosine(step, args.momentum, 1.0, total),
        temp=dino.teacher_temperature(
            step // per_epoch, args.warmup_teacher_temp_epochs, args.warmup_teacher_temp, args.teacher_temp),
    )


def train_step(run, model, micro_batches, multicrop, step, rank, now, freeze):
    """One step of DINO (Caron et al., Alg. 1) on --accum micro-batches; `model` is the student, perhaps in DDP.

    Returns device tensors and waits for none of them: loss and gradient norm (scalars); logits and first global views
    of the last micro-batch, for the log.
    """
    args, device = run.args, run.loss.center.device
    precision = torch.float16 if args.amp == "fp16" else torch.bfloat16
    order = rng(JITTER, args.seed, step).permutation(4)
    loss, teacher_mean = 0, 0

    for k, crops in enumerate(micro_batches):
        torch.manual_seed(int(rng(DROP_PATH, args.seed, step, rank, k).integers(2**62)))
        views = multicrop.photometric(*(x.to(device, non_blocking=True) for x in crops), order)
        later = model is not run.student and k < len(micro_batches) - 1     # gradients travel with the last one
        with model.no_sync() if later else contextlib.nullcontext():
            with torch.autocast(device.type, precision, enabled=args.amp != "off"):
                with torch.no_grad():
                    teacher = run.teacher(views[:2])                # (2, B, K): only global crops reach the teacher
                student = model(views)                              # (V, B, K): one forward for all crops
            part = run.loss(student, teacher, now["temp"]) / len(micro_batches)
            run.scaler.scale(part).backward()
        loss += part.detach()
        teacher_mean += teacher.float().mean((0, 1), keepdim=True) / len(micro_batches)

    decayed, free = run.optimizer.param_groups
    decayed["lr"] = free["lr"] = now["lr"]
    decayed["weight_decay"] = now["wd"]
    run.scaler.unscale_(run.optimizer)
    grad_norm = dino.clip_each(run.student.parameters(), args.clip_grad)
    if freeze:
        for p in run.student.head.last_layer.parameters():
            p.grad = None                                           # not zero: AdamW would still decay them
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.loss.update_center(teacher_mean)                            # after the loss, which used the old one
    dino.ema_update(run.teacher, run.student, now["momentum"])
    run.watch(step, loss, grad_norm)
    return loss, grad_norm, student.detach(), teacher, views[0]


@torch.no_grad()
def diagnose(run, student, teacher, view, temp):
    """What reveals failure, of one micro-batch: loss, teacher entropy and KL(teacher || student) in nats, centre norm,
    and the mean support of the teacher's last block: the share of attention weights that are not zero."""
    loss = run.loss(student, teacher, temp)
    targets = run.loss.targets(teacher, temp)
    support = (run.teacher.backbone.attention(view[:16], -1) > 0).float().mean()
    spread = dino.entropy(targets)                                  # loss = entropy + KL, pair by pair
    means = dino.all_mean(torch.stack([loss, spread, loss - spread, support])).tolist()
    loss, spread, kl, support = means
    return dict(loss=loss, entropy=spread, kl=kl, support=support, center=run.loss.center.norm().item())


def line(r, args, total):
    """A log record for the eye."""
    eta = datetime.timedelta(seconds=round(r["eta_s"]))
    return (f"epoch {r['epoch']:.2f}/{args.epochs}  step {r['step']}/{total}  loss {r['loss']:.3f}  "
            f"loss/lnK {r['loss_per_log_k']:.3f}  entropy {r['entropy']:.3f}  kl {r['kl']:.3f}  "
            f"centre {r['center']:.3g}  grad {r['grad_norm']:.3g}  support {r['support']:.3f}  lr {r['lr']:.2e}  "
            f"wd {r['wd']:.3f}  ema {r['momentum']:.4f}  {r['images_per_s']:.0f} img/s  {r['memory_gib']:.1f} GiB  "
            f"eta {eta}")


def open_data(args):
    """The images of --data, at least a batch of them; what tells them from others goes to args, which the checkpoint
    remembers."""
    shapes = args.data == "shapes"
    if not shapes and not os.path.isdir(args.data):
        sys.exit(f"{args.data}: no such folder; --data takes a folder of images, or shapes")
    paths = [] if shapes else list_images(args.data)
    args.images = args.length if shapes else len(paths)
    if args.images < args.batch_size:
        way_out = "raise --length" if shapes else f"counted {' '.join(SUFFIXES)} in it and below"
        sys.exit(f"{args.data}: {counted(args.images, 'image')}, fewer than --batch-size {args.batch_size}; {way_out}")
    # below the deepest common folder: data that moved, or whose train/ is given by itself, stay the same
    args.fingerprint = FINGERPRINT if shapes else checkpoint.fingerprint(os.path.commonpath(paths), paths)
    return Scenes(args.image_size, args.length) if shapes else Pictures(paths)


def take(out, is_main):
    """The main process's lock on the run folder: a second run is kept out before it reads or writes anything."""
    lock = refused = None
    try:
        if is_main:
            out.mkdir(parents=True, exist_ok=True)
            lock = checkpoint.lock(out)
    except (OSError, ValueError) as error:
        refused = f"{out}: {error.strerror}; give another --out" if isinstance(error, OSError) else str(error)
    refused, *_ = dino.all_gather(refused)
    if refused:
        sys.exit(refused)
    return lock


def open_resume(out, args):
    """(state of the run in `out` or None, its step or 0), the same in every process."""
    resumed = read_resume(out / "checkpoint.pt", args)
    start = resumed["step"] if resumed else 0
    views = dino.all_gather((start, args.images, args.fingerprint))
    if len(set(views)) > 1:
        sys.exit(f"{out}: (step of checkpoint.pt, images, fingerprint) differ between processes: {views}; every node "
                 "must see the same --out and --data")
    return resumed, start


def train(args, rank, world, device, stop):
    """The run, from the first line printed to the last checkpoint; `stop` fills with the signals that ask it to end."""
    is_main, out = rank == 0, Path(args.out)

    # data, and what is there already
    source = open_data(args)
    per_epoch = args.images // args.batch_size                      # the rest of an epoch is left out, as in DINO
    total, log_k = args.epochs * per_epoch, math.log(args.out_dim)
    _lock = take(out, is_main)                                      # held until this function returns
    resumed, start = open_resume(out, args)
    log = Log(out, is_main, start)
    log.say("shapes, embedded; the paper's recipe needs --data DIR" if args.data == "shapes" else
            f"{args.data}, {counted(args.images, 'image')}; the paper's recipe where no flag says otherwise")
    if start == total:
        log.say(f"{out}: finished, {counted(args.epochs, 'epoch')} done; nothing to do. "
                "Give another --out to train again")
        return

    # networks, loader
    run = Run(args, device)
    if resumed:
        run.load(resumed, out / "checkpoint.pt")
        del resumed
    model, run.saved = run.student, start
    if world > 1:
        model = DistributedDataParallel(run.student, device_ids=[device.index] if device.type == "cuda" else None)
    multicrop = dino.MultiCrop(args.image_size, args.local_size, args.local_crops, args.global_scale, args.local_scale)
    loader = iter(DataLoader(
        Crops(source, multicrop, args.seed), batch_sampler=Batches(args.images, args, rank, world, start),
        num_workers=args.workers, collate_fn=collate, worker_init_fn=checkpoint.deaf_worker,
        pin_memory=device.type == "cuda",
    ))
    if is_main:
        log.record(provenance(args, device, world))
    log.say(f"{sum(p.numel() for p in run.student.backbone.parameters()):,} parameters, {counted(total, 'step')} of "
            f"{counted(args.batch_size, 'image')} on {world} x {device.type}, peak lr "
            f"{args.lr * args.batch_size / 256:.3g}, amp {args.amp}, in {out}"
            + f", going on from step {start:,}" * (start > 0))

    if start == 0:
        run.save(out, 0, per_epoch, is_main)
    reads, history, warned = Reads(), collections.deque(maxlen=5), None
    loss_sum, since, clock = 0, 0, time.perf_counter()

    for step in range(start, total):
        batches = [next(loader) for _ in range(args.accum)]
        reads.add(args.batch_size // world, [name for batch in batches for name in batch[-1]])
        now = schedules(args, step, per_epoch)
        loss, grad_norm, *last = train_step(run, model, [batch[:-1] for batch in batches], multicrop, step, rank, now,
                                            freeze=step < args.freeze_last_layer * per_epoch)
        # Nothing up to here waits for the device. What follows does, on log lines and before saves.
        loss_sum, since, done = loss_sum + loss, since + 1, step + 1

        if done % args.log_every == 0 or done in (start + 1, per_epoch, total):
            bad_files = reads.report(log, epoch_over=done >= start + per_epoch)
            record = dict(step=done, epoch=done / per_epoch, **diagnose(run, *last, now["temp"]))
            record["loss"] = dino.all_mean(loss_sum / since).item()         # mean since the last line
            record["loss_per_log_k"] = record["loss"] / log_k
            seconds = time.perf_counter() - clock
            record |= dict(grad_norm=grad_norm.item(), **now, images_per_s=since * args.batch_size / seconds,
                           memory_gib=memory(device), eta_s=(total - done) * seconds / since, bad_files=bad_files)
            log.record(record, line(record, args, total))
            history.append(record)
            warning = collapse(history, log_k)
            if warning and warning != warned:                       # once for each time it comes up
                log.say(f"warning: {warning}")
            warned = warning
            loss_sum, since, clock, last = 0, 0, time.perf_counter(), None
            run.check(out)
        due = done % args.save_steps == 0 or done % (args.save_every * per_epoch) == 0 or done == total
        if due or (stop and is_main):
            run.save(out, done, per_epoch, is_main)
        if stop and is_main:                                        # the others go when this process is gone
            log.say(f"stopped by signal {stop[0]} after step {done}, saved; run the same command again to go on")
            sys.exit(128 + stop[0])

    log.say(f"done: {out / 'checkpoint.pt'}; next: python probe_linear.py --knn --weights {out / 'checkpoint.pt'}")


def memory(device):
    """Peak GiB of this process: on the device, or resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(argv=None):
    checkpoint.print_any_path()
    args = parse_args(argv)
    rank, world, device = setup_distributed()
    if device.type == "cuda" and args.amp != "off":
        torch.set_float32_matmul_precision("high")                  # TF32 for what autocast leaves in float32
    try:
        with checkpoint.noted_signals() as stop:
            try:
                train(args, rank, world, device, stop)
                if world > 1:                                       # after an error its peers may sit in a collective
                    dist.destroy_process_group()
            except RuntimeError:
                if rank and stop:                                   # the main process saved and left mid-collective
                    sys.exit(128 + stop[0])
                raise
    except SystemExit as error:
        if isinstance(error.code, str) and launched()[2]:
            sys.exit(1)                                             # one process of each node says why
        raise
    finally:
        if rank == 0 and sys.stdout.isatty():
            print()                                                 # leave the progress line


if __name__ == "__main__":
    main()
