"""Pretrain a ViT with DINO; softmax or entmax-1.5 attention, registers, CLS/patch specialization.

    torchrun train.py --attn entmax15                                       embedded shapes: 3 minutes on two CPU cores
    torchrun --nproc-per-node 8 train.py --attn entmax15 --data IMAGENET    the paper's: ViT-S/16, 200 epochs
    python train.py --attn entmax15 --data PICTURES --recipe small          own pictures, on a CPU or an old GPU

One process without torchrun, many with it, several nodes: the same code, and for the same --batch-size the same loss.
Writes --out (default runs/<data>_<method>_s<seed>): checkpoint.pt (latest, complete), checkpoint_0000.pt ... (by
epochs done), log.jsonl. Run the same command again, or --resume RUN, and it goes on from checkpoint.pt, bit for bit.
Asked to end (SIGTERM, Ctrl-C), it saves and exits with 128 + the signal. torchrun --max-restarts takes that for a
failure and starts the run again, unless the signal reached torchrun itself, as that of scancel or Ctrl-C does.

    B images per micro-batch, V views, K prototypes
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import io
import itertools
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import data
import dino
import vit
from data import counted
from entmax import HAS_TRITON
from shapes import FINGERPRINT, Shapes

# What --recipe selects. "paper" is Caron et al.'s for ViT-S/16 at the paper's 200 epochs (its own is unstated).
RECIPES = {
    "paper": dict(
        arch="small", patch_size=16, image_size=224, local_size=96, local_crops=8, drop_path=0.1,
        epochs=200, batch_size=1024, lr=5e-4, min_lr=1e-6, warmup_epochs=10, weight_decay=0.04, weight_decay_end=0.4,
        momentum=0.996, out_dim=65536, hidden_dim=2048, bottleneck_dim=256, freeze_last_layer=1, center_momentum=0.9,
        teacher_temp=0.07, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=30, norm_last_layer=False,
        save_every=20, save_steps=500, log_every=50, workers=10,
    ),
    # In so short a run the centre must catch up before the learning rate does, or all images get nearly one output.
    "shapes": dict(
        dim=64, depth=4, heads=2, patch_size=8, image_size=64, local_size=32, local_crops=2, drop_path=0.0,
        epochs=24, batch_size=32, lr=8e-3, min_lr=1e-6, warmup_epochs=2, weight_decay=0.04, weight_decay_end=0.1,
        momentum=0.98, out_dim=512, hidden_dim=256, bottleneck_dim=64, freeze_last_layer=1, center_momentum=0.5,
        teacher_temp=0.04, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=0, norm_last_layer=False,
        save_every=4, save_steps=200, log_every=50, workers=0,
    ),
    # Own pictures on a CPU or an old GPU: a quarter of the rate and a slower average than "shapes", which are simpler
    # than photographs. 1,475 steps, the 5 epochs of 9,469 pictures, take about 13 minutes of one core.
    "small": dict(
        arch="tiny", dim=96, depth=4, heads=3, patch_size=8, image_size=64, local_size=32, local_crops=4, drop_path=0.0,
        epochs=5, batch_size=32, lr=2e-3, min_lr=1e-6, warmup_epochs=1, weight_decay=0.04, weight_decay_end=0.1,
        momentum=0.99, out_dim=1024, hidden_dim=512, bottleneck_dim=128, freeze_last_layer=1, center_momentum=0.9,
        teacher_temp=0.04, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=0, norm_last_layer=True,
        save_every=1, save_steps=200, log_every=50, workers=2,
    ),
}
PATIENCE = 5                                                        # seconds in which all processes are asked to end
MODELS = {"tiny": vit.vit_tiny, "small": vit.vit_small, "base": vit.vit_base}


# ------------------------------------------------------------------------------------------- networks and one step
class Distiller(torch.nn.Module):
    """A backbone and its head as one module: DistributedDataParallel wants one forward per step, with all crops."""

    def __init__(self, config, args):
        super().__init__()
        self.backbone = vit.VisionTransformer(config)
        self.head = dino.DINOHead(config.dim, args.out_dim, args.hidden_dim, args.bottleneck_dim, args.norm_last_layer)

    def forward(self, views):
        return dino.forward_crops(self.backbone, self.head, views)


class Run:
    """All that changes while training and that a checkpoint holds. Nothing random is in it: see data.generator."""

    def __init__(self, args, device, rank=0, world=1):
        self.args, self.rank = args, rank
        torch.manual_seed(args.seed)                                # the same on every process: nothing else would make
        self.student = Distiller(args.config, args).to(device)      # the teachers equal
        self.teacher = Distiller(dataclasses.replace(args.config, drop_path=0.0), args).to(device).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.loss = dino.DINOLoss(args.out_dim, args.student_temp, args.center_momentum).to(device)
        self.optimizer = torch.optim.AdamW(dino.param_groups(self.student), fused=device.type == "cuda")
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.bad_step = torch.tensor(-1, device=device)             # the first step that left something not finite
        self.saved = 0                                              # step of the last checkpoint
        choose_kernels(args, self.student, self.teacher)
        self.ddp = None                                             # averages the student's gradients over processes
        if world > 1:
            self.ddp = DistributedDataParallel(self.student, [device.index] if device.type == "cuda" else None)


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


def train_step(run, micro_batches, multicrop, step, now, freeze_last_layer):
    """One step of DINO (Caron et al., Alg. 1) on --accum micro-batches; `now` holds what `schedules` gives for it.

    Returns device tensors and waits for none of them: loss and gradient norm (scalars); logits and first global views
    of the last micro-batch, for the log.
    """
    args, device = run.args, run.loss.center.device
    jitter_order = data.generator(data.JITTER_ORDER, args.seed, step).permutation(4)
    loss, teacher_mean = 0, 0

    for k, crops in enumerate(micro_batches):
        views = teacher = student = None                            # the last one's: this one needs the room
        data.seed_torch(data.DROP_PATH, args.seed, step, run.rank, k)       # a run that goes on drops the same blocks
        views = multicrop.photometric(*(x.to(device, non_blocking=True) for x in crops), jitter_order)
        last_micro_batch = k == len(micro_batches) - 1              # gradients travel between processes with it alone
        with contextlib.nullcontext() if last_micro_batch or not run.ddp else run.ddp.no_sync():
            with checkpoint.autocast(device, args.amp):
                with torch.no_grad():
                    teacher = run.teacher(views[:2])                # (2, B, K): only global crops reach the teacher
                student = (run.ddp or run.student)(views)           # (V, B, K): one forward for all crops
            micro_loss = run.loss(student, teacher, now["temp"]) / len(micro_batches)
            run.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
        teacher_mean += teacher.float().mean((0, 1), keepdim=True) / len(micro_batches)

    decayed, undecayed = run.optimizer.param_groups
    decayed["lr"] = undecayed["lr"] = now["lr"]
    decayed["weight_decay"] = now["wd"]
    run.scaler.unscale_(run.optimizer)
    grad_norm = dino.clip_each(run.student.parameters(), args.clip_grad)
    if freeze_last_layer:
        for p in run.student.head.last_layer.parameters():
            p.grad = None                                           # not zero: AdamW would still decay them
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.loss.update_center(teacher_mean)                            # after the loss, which used the old one
    dino.ema_update(run.teacher, run.student, now["momentum"])
    note_bad_step(run, step, loss, grad_norm)
    return loss, grad_norm, student.detach(), teacher, views[0]


# ------------------------------------------------------------------------------------------- the loop
def train(args, rank, world, device, stop):
    """The run, from the first line printed to the last checkpoint; `stop` fills with the signals that ask it to end."""
    is_main, out = rank == 0, Path(args.out)
    source, first_line = open_data(args)
    per_epoch = args.images // args.batch_size                      # the rest of an epoch is left out, as in DINO
    total = args.epochs * per_epoch
    _lock, resumed, start = open_folder(out, args, is_main)         # the lock is held until this function returns
    log = checkpoint.Log(out, is_main, start)
    log.say(first_line)
    after = next_command(args, out / "checkpoint.pt")               # now that the data are there
    if start == total:
        log.say(f"{out}: finished, {counted(args.epochs, 'epoch')} done; nothing to do. "
                "Give another --out to train again")
        return

    run = Run(args, device, rank, world)
    if resumed:
        with checkpoint.one_line(out):
            checkpoint.restore_run(run, resumed, out / "checkpoint.pt")
        del resumed
    multicrop = data.MultiCrop(args.image_size, args.local_size, args.local_crops, args.global_scale, args.local_scale)
    loader = data.load(source, multicrop, args, rank, world, start, device, checkpoint.deaf_worker)
    if is_main:
        log.record(checkpoint.provenance(args, device, world))
    log.say(f"{sum(p.numel() for p in run.student.backbone.parameters()):,} parameters, {counted(total, 'step')} of "
            f"{counted(args.batch_size, 'image')} on {world} x {device.type}, peak lr "
            f"{args.lr * args.batch_size / 256:.3g}, amp {args.amp}, in {out}"
            + f", going on from step {start:,}" * (start > 0))
    if args.data != "shapes" and total < 1000:
        log.say(f"few steps; --epochs {math.ceil(1500 / per_epoch)} make the 1,500 in which recipe small was seen to "
                "learn")
    check_kernel(run, world, device, log.say)
    if start == 0:
        save(run, out, 0, per_epoch)
    reads, meter = data.Reads(), Meter(log, args, per_epoch)

    for step in range(start, total):
        batches = [next(loader) for _ in range(args.accum)]
        reads.add(args.batch_size // world, [name for batch in batches for name in batch[-1]])
        now = schedules(args, step, per_epoch)
        loss, grad_norm, *last = train_step(run, [batch[:-1] for batch in batches], multicrop, step, now,
                                            freeze_last_layer=step < args.freeze_last_layer * per_epoch)
        # Nothing up to here waits for the device. What follows does, on log lines and before saves.
        meter.add(loss)
        done = step + 1
        if done % args.log_every == 0 or done in (start + 1, per_epoch, total):
            with checkpoint.one_line(args.data):
                bad_files = reads.report(log.say, epoch_over=done >= start + per_epoch, gather=dino.all_gather)
            meter.report(done, diagnose(run, *last, now["temp"]), grad_norm, now, bad_files)
            check_finite(run, out)
        del last                                                    # the logits, before the next step needs the room
        due = done % args.save_steps == 0 or done % (args.save_every * per_epoch) == 0 or done == total
        asked = stop[:1]                                            # a signal that comes after this counts next time
        if due or (asked and is_main):
            save(run, out, done, per_epoch)
        if asked and leaves(rank, world, start, done, loss):
            log.say(f"stopped by signal {asked[0]} after step {done}, saved; run the same command again to go on")
            sys.exit(128 + asked[0])

    log.say(f"done: {out / 'checkpoint.pt'}; next: {after}")


@torch.no_grad()
def diagnose(run, student, teacher, view, temp):
    """What reveals failure, of the last micro-batch, with the centre and teacher that the step left: loss, teacher
    entropy and KL(teacher || student) in nats, centre norm, the mean support of the teacher's last block: the share of
    attention weights that are not zero; and the effective rank of the teacher's [CLS]."""
    loss = run.loss(student, teacher, temp)
    entropy = dino.entropy(run.loss.targets(teacher, temp))         # loss = entropy + KL, pair by pair
    with checkpoint.autocast(view.device, run.args.amp):            # the precision that trains
        support = (run.teacher.backbone.attention(view[:16], -1) > 0).float().mean()
        rank = dino.effective_rank(run.teacher.backbone(view))
    loss, entropy, kl, support = dino.all_mean(torch.stack([loss, entropy, loss - entropy, support])).tolist()
    return dict(loss=loss, entropy=entropy, kl=kl, support=support, rank=rank, center=run.loss.center.norm().item())


def next_command(args, weights):
    """What to run after training: a probe of the data that was trained on, or pictures where it has no classes."""
    weights = shlex.quote(str(weights))
    if args.data == "shapes":
        return f"python probe_linear.py --knn --weights {weights}"
    top = os.path.join(args.data, "train")
    top, root = (top, args.data) if os.path.isdir(top) else (args.data, args.data)
    if top != root and not os.path.isdir(os.path.join(root, "val")):
        root = top
    if sum(entry.is_dir() and entry.name[0] != "." for entry in os.scandir(top)) > 1:
        return f"python probe_linear.py --knn --data folder --root {shlex.quote(root)} --weights {weights}"
    return f"python -m paper.figures pca --weights {weights} --images FILE ..."


# ------------------------------------------------------------------------------------------- set-up
def choose_kernels(args, student, teacher):
    """--no-fused and --compile"""
    if args.no_fused:
        leave_out_kernel(student, teacher)
    if args.compile:
        # Or stochastic depth's rate becomes an input of the graph, and torch (2.8 to 2.14) fails to cut that for
        # DistributedDataParallel. Without the cuts, no gradient would travel before the backward pass is over.
        torch._dynamo.config.specialize_float = True
        student.compile()
        teacher.compile()
        if next(student.parameters()).is_cuda:                      # 110 of the 229 launches that colours take
            data.JITTER = tuple(map(torch.compile, data.JITTER))


def leave_out_kernel(*networks):
    for block in itertools.chain(*(network.backbone.blocks for network in networks)):
        block.attn.attend = functools.partial(block.attn.attend, fused=False)


def check_kernel(run, world, device, say):
    """On CUDA the kernel of entmax proves itself on this run's shapes before the first step, or the run goes on without
    it, in every process."""
    args = run.args
    if device.type != "cuda" or args.attn != "entmax15" or args.no_fused or not HAS_TRITON:
        return
    import entmax_triton  # where nothing can use it, nothing needs it

    good, images = True, args.batch_size // (world * args.accum)
    for side, crops in (args.image_size, 2), (args.local_size, args.local_crops):
        if crops:
            tokens = 1 + args.registers + (side // args.patch_size) ** 2
            shape = crops * images, args.config.heads, tokens, args.config.dim // args.config.heads
            right, line = entmax_triton.check(shape, checkpoint.PRECISION[args.amp], device)
            good &= right
            say(line)
    if not all(dino.all_gather(good)):
        leave_out_kernel(run.student, run.teacher)


def open_data(args):
    """(the images of --data, a line about them); what tells them from others goes to args, and so into the
    checkpoint."""
    if args.data == "shapes":
        args.images, args.fingerprint, others, way_out = args.length, FINGERPRINT, {}, "raise --length"
    elif not os.path.isdir(args.data):
        sys.exit(f"{args.data}: no such folder; --data takes a folder of images, or shapes")
    else:
        with checkpoint.one_line(args.data):
            paths, others = data.list_images(args.data)
        args.images, small = len(paths), RECIPES["small"]["batch_size"]
        way_out = (f"counted {' '.join(vit.SUFFIXES)} in it and below" if not paths else
                   f"give --recipe small or --batch-size {small}" if small <= args.images else
                   "give " + "--recipe small " * (args.batch_size > small) + f"--batch-size {args.images}")
    most = [f"{n:,} {suffix}" for suffix, n in sorted(others.items(), key=lambda item: -item[1])[:3]]
    passed_over = f" (passed over: {', '.join(most)}{', ...' * (len(others) > 3)})" * bool(others)
    if args.images < args.batch_size:
        sys.exit(f"{args.data}: {counted(args.images, 'image')}{passed_over}, fewer than --batch-size "
                 f"{args.batch_size}; {way_out}")
    if args.data == "shapes":                                       # rendered once: 2,000 scenes of 64 px are 24 MB
        return (torch.stack([scene["image"] for scene in Shapes("train", args.image_size, args.length)]),
                "shapes, embedded; " + ("the paper's recipe needs --data DIR" if args.recipe in (None, "shapes") else
                                        f"recipe {args.recipe} where no flag says otherwise"))
    # below the deepest common folder: data that moved, or whose train/ is given by itself, stay the same
    args.fingerprint = checkpoint.fingerprint(os.path.commonpath(paths), paths)
    recipe = "the flags of the run" if args.recipe is None else f"recipe {args.recipe} where no flag says otherwise"
    recipe += "; it is for GPUs, --recipe small for a CPU" * (args.recipe == "paper")
    return data.Pictures(paths), f"{args.data}, {counted(args.images, 'image')}{passed_over}; {recipe}"


def open_folder(out, args, is_main):
    """(lock on the run folder, state of the run in it or None, its step or 0), the latter the same in every process.

    A second run is kept out before it reads or writes anything; one of other flags or pictures would mix two runs."""
    lock = refused = None
    try:
        lock = checkpoint.lock(out) if is_main else None
    except ValueError as error:
        refused = str(error)
    refused, *_ = dino.all_gather(refused)
    if refused:
        sys.exit(refused)
    with checkpoint.one_line(out):
        resumed, other_flags = checkpoint.resume_run(out, checkpoint.plain(args))
    if other_flags:
        with one_says_why():
            print(f"train.py: error: {other_flags}", file=sys.stderr)
            sys.exit(2)
    start = resumed["step"] if resumed else 0
    views = dino.all_gather((start, args.images, args.fingerprint))
    if len(set(views)) > 1:
        sys.exit(f"{out}: (step of checkpoint.pt, images, fingerprint) differ between processes: {views}; every node "
                 "must see the same --out and --data")
    return lock, resumed, start


# ------------------------------------------------------------------------------------------- log
class Meter:
    """What a log line sums up: the steps since the last one."""

    def __init__(self, log, args, per_epoch):
        self.log, self.args, self.per_epoch = log, args, per_epoch
        self.history, self.warned = [], None
        self.loss_sum, self.steps, self.clock = 0, 0, time.perf_counter()

    def add(self, loss):
        self.loss_sum, self.steps = self.loss_sum + loss, self.steps + 1

    def report(self, done, facts, grad_norm, now, bad_files):
        args, total, log_k = self.args, self.args.epochs * self.per_epoch, math.log(self.args.out_dim)
        record = dict(step=done, epoch=done / self.per_epoch, **facts)
        record["loss"] = dino.all_mean(self.loss_sum / self.steps).item()       # so entropy + kl do not add up to it
        record["loss_per_log_k"] = record["loss"] / log_k
        seconds = time.perf_counter() - self.clock
        peak_gib = torch.cuda.max_memory_allocated() / 2**30 if grad_norm.is_cuda else peak_memory() / 2**30
        record |= dict(grad_norm=grad_norm.item(), **now, images_per_s=self.steps * args.batch_size / seconds,
                       memory_gib=peak_gib, eta_s=(total - done) * seconds / self.steps, bad_files=bad_files)
        end_of_epoch = done // self.per_epoch > (done - self.steps) // self.per_epoch       # since the last line
        self.log.record(record, as_line(record, args.epochs), stays=end_of_epoch or done == total)
        self.history.append(record)
        warning = dino.collapse(self.history, log_k)
        if warning and warning != self.warned:                      # once for each time it comes up
            self.log.say(f"warning: {warning}")
        self.warned = warning
        self.loss_sum, self.steps, self.clock = 0, 0, time.perf_counter()


def keep_memory():
    """On a CPU: let glibc keep what a step frees for the next one. It would give the pages back to the system and take
    them again, filled with zeros, which is a tenth of a step's time."""
    with contextlib.suppress(AttributeError, OSError, TypeError):   # other systems' C libraries have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)                                     # M_MMAP_THRESHOLD, bytes
        libc.mallopt(-1, 2**31 - 1)                                 # M_TRIM_THRESHOLD


def peak_memory():
    """Bytes that this process has held at most; 0 where the system does not say."""
    try:
        import resource  # not at the top: Windows has none
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def as_line(r, epochs):
    """A log record for the eye, at most 79 columns: what finds no room, and all the rest, is in log.jsonl."""
    parts = [checkpoint.time_left(r["eta_s"]), f"loss {r['loss']:6.3f}",
             f"epoch {r['epoch']:{len(str(epochs)) + 3}.2f}/{epochs}"]
    parts += [shown.format(r[name]) for name, shown in (("rank", "rank {:<4.3g}"), ("support", "support {:.3f}"),
              ("kl", "kl {:.3f}"), ("images_per_s", "{:.0f} img/s")) if r.get(name) is not None]
    while len("  ".join(parts)) > 79:
        parts.pop()
    return "  ".join(parts)


# ------------------------------------------------------------------------------------------- checkpoints
def save(run, out, step, per_epoch):
    """checkpoint.pt, and the numbered copy where one is due; never a state that is not finite."""
    check_finite(run, out)
    run.saved, (epochs, rest) = step, divmod(step, per_epoch)
    if run.rank == 0:
        due = rest == 0 and (epochs % run.args.save_every == 0 or epochs == run.args.epochs)
        with checkpoint.one_line(out):
            checkpoint.write_run(run, out, step, epochs, numbered=due)


def note_bad_step(run, step, loss, grad_norm):
    """Keep the first step that left something not finite, on the device: nothing waits for it here."""
    finite = run.loss.center.sum().isfinite()
    if run.args.amp != "fp16":                                      # there the scaler skips such a step by itself
        finite = finite & loss.isfinite() & grad_norm.isfinite()
    run.bad_step = torch.where((run.bad_step < 0) & ~finite, step + 1, run.bad_step)        # as in the log


def check_finite(run, out):
    """Stop a run whose state is not finite. Every process comes to the same verdict: gradients are shared."""
    last_good = f"last good: {out / 'checkpoint.pt'}, step {run.saved}"
    if run.bad_step >= 0:
        sys.exit(f"{out}: loss, gradient or centre is not finite at step {int(run.bad_step)}; {last_good}. "
                 "Try --amp off or bf16, a lower --lr or --clip-grad")
    if run.args.amp == "fp16" and run.scaler.get_scale() < 1:
        sys.exit(f"{out}: the fp16 loss scale fell below 1: every step overflows; {last_good}. "
                 "Try --amp bf16 or off, or a lower --lr")


# ------------------------------------------------------------------------------------------- processes
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


def leaves(rank, world, start, done, loss):
    """Whether a process that was asked to end leaves after this step: all together, or NCCL would wait for who is gone.

    Each notes in the store of the run the step at which it was asked, and trains on until it sees that all have. They
    leave one step after the largest: none finishes that before the last one asked has begun it, and so has noted.
    If some are not asked within PATIENCE seconds, the main process leaves; the others go when they find it gone.
    """
    if world == 1:
        return True
    loss.item()                                                     # the device is here, too, not just the host
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")          # what an earlier one noted says nothing
    store, keys = dist.distributed_c10d._get_default_store(), [f"leaves {attempt} {start} {k}" for k in range(world)]
    if not store.check([keys[rank]]):
        store.set(keys[rank], f"{done} {time.time()}")
    if not store.check(keys):
        return rank == 0 and time.time() > float(store.get(keys[0]).split()[1]) + PATIENCE
    if done <= max(int(store.get(key).split()[0]) for key in keys):
        return False
    dist.destroy_process_group()
    return True


@contextlib.contextmanager
def one_says_why(asked=()):
    """The first process of each machine prints the error. The others wait for torchrun, which ends all as soon as one
    has failed: none may fail before the first has spoken. If nothing ends them, they print it, too. `asked`: signals
    that have come already."""
    local, said = os.environ.get("LOCAL_RANK", ""), io.StringIO()
    if not os.environ.get("RANK") or not local.isdecimal() or int(local) == 0:
        yield
        return
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except SystemExit as error:
        if error.code and asked:
            sys.exit()
        if error.code:                                              # not so after --help
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())    # as 0, which torchrun's report leaves out
            time.sleep(5)                                           # longer than torchrun takes to notice
            print(said.getvalue(), end="", file=sys.stderr)
        raise


# ------------------------------------------------------------------------------------------- command line
def parse_args(argv=None):
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in dict(data="shapes", recipe=None, arch=None, resume=None).items():
        first.add_argument(checkpoint.flag(name), default=default)
    choice = first.parse_known_args(argv)[0]
    if choice.resume is not None:
        with checkpoint.one_line(choice.resume):
            argv = [*checkpoint.flags_of_run(choice.resume), *(sys.argv[1:] if argv is None else argv)]
        choice = first.parse_known_args(argv)[0]
    by_data = "shapes" if choice.data == "shapes" else "paper"
    recipe = dict(RECIPES.get(choice.recipe, RECIPES[by_data]))     # what is no name of one is refused below
    recipe["workers"] = min(recipe["workers"], cores())
    if choice.arch:                                                 # it stands for these three
        recipe = {name: value for name, value in recipe.items() if name not in ("dim", "depth", "heads")}

    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage="%(prog)s [--flag VALUE ...]; --help lists "
                                "the flags", allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--recipe", choices=list(RECIPES), default=by_data, help="gives all defaults; without it shapes for "
                   "--data shapes, and paper for a folder; small: own pictures on a CPU or an old GPU")
    # data
    p.add_argument("--data", default="shapes", help="shapes (embedded), or a folder of images, without its hidden ones")
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
    p.add_argument("--drop-path", type=float, help="stochastic depth of the student: from 0 in the first block to this")
    # head and loss
    p.add_argument("--out-dim", type=int, help="prototypes K")
    p.add_argument("--hidden-dim", type=int, help="width of the head's MLP")
    p.add_argument("--bottleneck-dim", type=int, help="width before the prototypes")
    p.add_argument("--norm-last-layer", action=argparse.BooleanOptionalAction, help="keep the prototypes at length 1")
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
                   "what may change: " + ", ".join(map(checkpoint.flag, ("data", *checkpoint.MAY_CHANGE[1:]))))
    p.add_argument("--save-every", type=int, help="epochs between numbered checkpoints")
    p.add_argument("--save-steps", type=int, help="steps between writes of checkpoint.pt")
    p.add_argument("--log-every", type=int, help="steps between log lines")
    p.set_defaults(**recipe)
    args = p.parse_args(argv)
    if args.resume not in (None, args.out):
        p.error(f"--resume {args.resume} goes on in that folder; drop --out {args.out}")
    if args.resume is not None and choice.recipe:
        p.error(f"--resume {args.resume} goes on with the values of that run; drop --recipe {choice.recipe}")
    args.recipe = None if args.resume else choice.recipe or by_data
    del args.resume
    check_args(p, args)
    return args


def cores():
    """CPU cores that this process may use, shared with the others that torchrun starts here."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, mine // max(1, int(beside))) if beside.isdecimal() else mine


def check_args(p, args):
    """Refuse what cannot run, in one line and before anything is written; fill in what follows from other values."""
    for names, fits, rule in (
        ("length image_size local_size patch_size out_dim hidden_dim bottleneck_dim epochs batch_size accum "
         "save_every save_steps log_every", lambda x: x >= 1, "must be at least 1"),
        ("local_crops registers workers seed warmup_epochs warmup_teacher_temp_epochs freeze_last_layer min_lr "
         "weight_decay weight_decay_end clip_grad", lambda x: 0 <= x < 2**63, "must not be negative, and below 2^63"),
        ("student_temp teacher_temp warmup_teacher_temp lr", lambda x: 0 < x < math.inf, "must be positive and finite"),
        ("momentum center_momentum", lambda x: 0 <= x <= 1, "must be between 0 and 1"),
        ("global_scale local_scale", lambda x: 0 < x[0] <= x[1] <= 1, "two shares, 0 < first <= second <= 1"),
    ):
        for name in names.split():
            if not fits(getattr(args, name)):
                p.error(f"{' '.join(checkpoint.as_flags(vars(args))[name])}: {rule}")
    for name, side in (("--image-size", args.image_size), ("--local-size", args.local_size)):
        if side % args.patch_size:
            p.error(f"{name} {side} is not a multiple of --patch-size {args.patch_size}")
    if args.warmup_epochs >= args.epochs:
        p.error(f"--warmup-epochs {args.warmup_epochs} leaves nothing of --epochs {args.epochs}; give "
                f"--warmup-epochs {args.epochs - 1}")
    network = "patch_size image_size attn registers specialize drop_path dim depth heads".split()
    given = {name: getattr(args, name) for name in network if getattr(args, name) is not None}
    try:
        _, world, _ = launched()
        with torch.device("meta"):
            args.config = MODELS[args.arch or "small"](**given).config
    except ValueError as error:
        p.error(str(error))
    if args.batch_size % (world * args.accum):
        p.error(f"--batch-size {args.batch_size} is not divisible by {counted(world, 'process')} x --accum "
                f"{args.accum}")
    if args.no_fused and args.attn != "entmax15":
        p.error("--no-fused is about the kernel of --attn entmax15; drop it, or add that")
    if args.amp == "fp16" and not torch.cuda.is_available():
        p.error("--amp fp16 needs CUDA; use --amp off or bf16")
    args.amp = args.amp or checkpoint.best_amp()
    if args.data != "shapes":
        args.data = os.path.abspath(args.data)
    if args.out is None:
        args.out = f"runs/{os.path.basename(args.data)}_{checkpoint.method(args)}_s{args.seed}"


def main(argv=None):
    checkpoint.print_any_path()
    with one_says_why():
        args = parse_args(argv)
    rank, world, device = setup_distributed()
    if device.type == "cuda" and args.amp != "off":
        torch.set_float32_matmul_precision("high")                  # TF32 for what autocast leaves in float32
    if device.type == "cpu":
        keep_memory()
    with checkpoint.noted_signals() as stop:
        try:
            train(args, rank, world, device, stop)
            if world > 1:                                           # after an error its peers may sit in a collective
                dist.destroy_process_group()
        except (SystemExit, RuntimeError) as error:
            if isinstance(error, RuntimeError) and rank and stop:   # the main process saved and left mid-collective
                sys.exit(128 + stop[0])
            if isinstance(error, SystemExit) and isinstance(error.code, str):
                with one_says_why(stop):
                    raise
            raise
        finally:
            checkpoint.progress.end()


if __name__ == "__main__":
    main()
