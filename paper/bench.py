"""Speed and memory of the operator, of attention, of a training step and of the data path; on CUDA and on a CPU.

    python -m paper.bench check             the kernel on this card, right and faster than without it? run this first
    python -m paper.bench operator          entmax-1.5 against softmax, and deep-spin's `entmax` if installed
    python -m paper.bench attention         fused and eager entmax attention against scaled_dot_product_attention
    python -m paper.bench step --data ANY   a training step of either map; flags of train.py, no picture is read
    python -m paper.bench data --data DIR   is it the loader or the step that limits training, and what would help
    python -m paper.bench data --pixels 4000 3000      the same for photographs as a camera makes them

Every variant of a case takes its turn in every round. Given are medians over the rounds, the quartiles low and high,
and the median ratio to the baseline of the same round, since what slows the machine for a moment slows all alike.
Memory: `kept` is what backward needs beyond the inputs, `peak` the most that is allocated at a time beyond them.
"""
import argparse
import contextlib
import copy
import functools
import importlib.util
import json
import math
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")                       # or the profiler reports its start on stderr,
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")                 # and every block it did not see allocated

import numpy as np  # noqa: E402
import PIL  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import torchvision  # noqa: E402
from PIL import Image, ImageFilter, ImageOps  # noqa: E402
from torchvision import transforms  # noqa: E402

import checkpoint  # noqa: E402
import data  # noqa: E402
import train  # noqa: E402
import vit  # noqa: E402
from entmax import HAS_TRITON, entmax15, entmax15_attention  # noqa: E402


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("what", choices=["check", "operator", "attention", "step", "data"])
    p.add_argument("--repeats", type=int, default=25, help="rounds; fewer of step and data")
    p.add_argument("--compiled", action="store_true", help="also what torch.compile makes of operator and attention")
    p.add_argument("--pixels", type=int, nargs=2, default=[500, 375], metavar=("WIDTH", "HEIGHT"), help="data: of the "
                   "pictures that are drawn where no --data is given; ImageNet's usual. A camera's: 4000 3000")
    p.add_argument("--profile", action="store_true", help="step: where the time of one step goes")
    p.add_argument("--out", help="also write the numbers to this file, as JSON")
    args, rest = p.parse_known_args(argv)
    if args.repeats < 1:
        p.error(f"--repeats {args.repeats}: must be at least 1")
    if rest and args.what in ("check", "operator", "attention"):
        p.error(f"unrecognized arguments: {' '.join(rest)}")
    return args, rest


# ------------------------------------------------------------------------------------------- measuring
def timed(f, device):
    """Milliseconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        f()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)                                     # keeps the device busy while the host runs ahead,
    start.record()                                                    # so that launching is not what is measured
    for _ in range(4):
        f()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 4


def peak_bytes(f, device):
    """The most bytes allocated at a time during f() beyond those before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        f()
    size = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            size += event.nbytes()
            peak = max(peak, size)
    return peak


def kept_bytes(f, inputs):
    """Bytes that autograd holds between forward and backward, beyond those of the inputs."""
    known, kept = {x.untyped_storage().data_ptr() for x in inputs}, {}

    def note(x):
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = f(*inputs)                                              # noqa: F841, alive: no address is given out twice
    return sum(kept.values())


def compare(case, variants, baseline, repeats, device):
    """Rows, a variant each, of {name: function}; times are medians over rounds in which each variant has its turn."""
    for f in variants.values():
        for _ in range(3):
            f()
    times = {name: [] for name in variants}
    for _ in range(repeats):
        for name, f in variants.items():
            times[name].append(timed(f, device))
    rows = []
    for name, ms in times.items():
        low, mid, high = statistics.quantiles(ms, n=4) if len(ms) > 1 else ms * 3
        ratio = statistics.median(a / b for a, b in zip(ms, times[baseline], strict=True))
        rows.append(dict(case=case, variant=name, ms=mid, low=low, high=high, ratio=ratio, baseline=baseline))
    return rows


def forward_backward(f, inputs, dout):
    """A call of f and its backward; the function that does it and its memory, as parts of a row."""
    inputs = [x.detach().requires_grad_() for x in inputs]

    def run():
        for x in inputs:
            x.grad = None
        f(*inputs).backward(dout)
    return run, lambda device: dict(kept_mb=kept_bytes(f, inputs) / 1e6, peak_mb=peak_bytes(run, device) / 1e6)


def table(rows):
    """Markdown: the keys of the first row are the columns."""
    head = list(rows[0])

    def cell(value):
        return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else \
            f"{value:.0f}" if isinstance(value, float) else str(value)
    lines = [head, ["---"] * len(head), *([cell(row.get(key, "")) for key in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(device):
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    return dict(device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU", cpu=cpu,
                cores=os.cpu_count(), threads=torch.get_num_threads(), python=platform.python_version(),
                torch=torch.__version__, torchvision=torchvision.__version__, pillow=PIL.__version__)


# ------------------------------------------------------------------------------------------- check
# T and D of ViT-S/16 with and without registers, crops of 96 px, images of 224 to 512 px, and other widths of a head
SHAPES = [(T, 64) for T in (37, 41, 197, 201, 257, 577, 785, 1025, 2048)] + [(197, 32), (197, 128)]


def bench_check(args, rest, device):
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("check: this machine has no CUDA card, and without one the kernel is not used")
    if not importlib.util.find_spec("triton"):
        raise ValueError("check: Triton is not installed, and without it the kernel is not used")
    import entmax_triton  # not at the top: Triton may be missing

    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for T, D in SHAPES:
            if T <= entmax_triton.LONGEST[dtype]:
                good, line = entmax_triton.check((max(1, 16384 // T), 6, T, D), dtype, device)
                print(line, flush=True)
                rows.append(dict(case=f"{T} x {D} {dtype}", used=good, line=line))
    print(f"used in {sum(row['used'] for row in rows)} of {len(rows)} cases; train.py asks the same before it starts")
    return rows


# ------------------------------------------------------------------------------------------- operator and attention
def deep_spin():
    """activations.py of the published package `entmax`, or None. By its file: our module has the package's name."""
    for folder in sys.path:
        path = Path(folder, "entmax", "activations.py")
        if path.is_file():
            spec = importlib.util.spec_from_file_location("deep_spin_activations", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    return None


def bench_operator(args, rest, device):
    """Forward and backward on N(0, 1) scores, in the shapes of 8 global and 64 local crops of ViT-S/16."""
    theirs, rows = deep_spin(), []
    maps = {"entmax15": entmax15, "softmax": functools.partial(torch.softmax, dim=-1)}
    if args.compiled:
        maps |= {f"{name}, compiled": torch.compile(f, fullgraph=True) for name, f in maps.items()}
    if theirs:
        maps |= {"deep-spin": functools.partial(theirs.entmax15, dim=-1),
                 "deep-spin, k=32": functools.partial(theirs.entmax15, dim=-1, k=32)}
    else:
        print("deep-spin's package is not installed, and left out: pip install entmax==1.3")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((8, 6, 197, 197), (64, 6, 37, 37)):
            torch.manual_seed(0)
            x, dout = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
            runs = {name: forward_backward(f, [x], dout) for name, f in maps.items()}
            case = f"{shape} {str(dtype).removeprefix('torch.')}"
            for row in compare(case, {name: run for name, (run, _) in runs.items()}, "entmax15", args.repeats, device):
                rows.append(row | runs[row["variant"]][1](device))
    return rows


def bench_attention(args, rest, device):
    """Forward and backward of the attention of ViT-S/16, q k v strided as its projection gives them."""
    cuda, rows = device.type == "cuda", []
    cases = [(256, 197), (256, 201), (1024, 37), (16, 1025)] if cuda else [(8, 197), (64, 37)]
    attends = {"sdpa": F.scaled_dot_product_attention,
               "entmax15, eager": functools.partial(entmax15_attention, fused=False)}
    if args.compiled:
        attends["entmax15, eager, compiled"] = torch.compile(attends["entmax15, eager"], fullgraph=True)
    for B, T in cases:
        for dtype in (torch.bfloat16, torch.float32) if cuda else (torch.float32,):
            torch.manual_seed(0)
            qkv = torch.randn(B, T, 3, 6, 64, device=device).to(dtype)
            q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
            dout = torch.randn(B, T, 6, 64, device=device).to(dtype).transpose(1, 2)
            runs = {name: forward_backward(f, (q, k, v), dout) for name, f in attends.items()}
            if cuda and HAS_TRITON:
                import entmax_triton  # not at the top: Triton may be missing

                if entmax_triton.supports(q, k, v):                   # not all cards, nor long rows of float32
                    runs["entmax15, fused"] = forward_backward(functools.partial(entmax15_attention, fused=True),
                                                               (q, k, v), dout)
            case = f"({B}, 6, {T}, 64) {str(dtype).removeprefix('torch.')}"
            for row in compare(case, {name: run for name, (run, _) in runs.items()}, "sdpa", args.repeats, device):
                rows.append(row | runs[row["variant"]][1](device))
    return rows


# ------------------------------------------------------------------------------------------- training step
def stepper(args, device):
    """(function that trains one step on crops of noise that lie on the device, the run)."""
    run, step = train.Run(args, device), iter(range(10**9))
    multicrop = data.MultiCrop(args.image_size, args.local_size, args.local_crops, args.global_scale, args.local_scale)
    rng = np.random.default_rng(0)
    draws = torch.from_numpy(np.stack([[data.photometric_draws(kind, rng) for kind in multicrop.kinds]
                                       for _ in range(args.batch_size // args.accum)]))
    large, small = (torch.randint(256, (len(draws), n, 3, size, size), dtype=torch.uint8, device=device)
                    for n, size in ((2, args.image_size), (args.local_crops, args.local_size)))

    def run_step():
        i = next(step)
        train.train_step(run, [(large, small, draws)] * args.accum, multicrop, i,
                         train.schedules(args, i, per_epoch=1000), freeze_last_layer=False)
    return run_step, run


def bench_step(args, rest, device):
    variants = {"softmax": ["--attn", "softmax"], "entmax15": ["--attn", "entmax15"]}
    if device.type == "cuda":
        variants["entmax15, no kernel"] = ["--attn", "entmax15", "--no-fused"]
    settings = {name: train.parse_args([*rest, *flags]) for name, flags in variants.items()}
    first = settings["softmax"]
    if device.type == "cuda" and first.amp != "off":
        torch.set_float32_matmul_precision("high")                    # as train.py does
    if device.type == "cpu":
        train.keep_memory()
    steps = {name: stepper(a, device)[0] for name, a in settings.items()}
    case = (f"dim {first.config.dim} depth {first.config.depth}, 2 x {first.image_size} + {first.local_crops} x "
            f"{first.local_size}, batch {first.batch_size}, amp {first.amp}{', compiled' * first.compile}")
    rows = compare(case, steps, "softmax", max(3, args.repeats // 5), device)
    for row in rows:
        row |= dict(images_per_s=1e3 * first.batch_size / row["ms"],
                    peak_mb=peak_bytes(steps[row["variant"]], device) / 1e6)
    if args.profile:
        for name, step in steps.items():
            print(f"\n{name}: where one step goes")
            with torch.profiler.profile() as profile:
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
            key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
            print(profile.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60))
    return rows


# ------------------------------------------------------------------------------------------- data
def published_pipeline(args):
    """Caron et al.'s augmentation of an RGB picture, with torchvision's transforms on Pillow images: the baseline."""
    def sometimes(p, f):
        return transforms.Lambda(lambda image: f(image) if random.random() < p else image)

    def blur(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    colour = [transforms.RandomHorizontalFlip(), sometimes(0.8, transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)),
              transforms.RandomGrayscale(0.2)]
    end = [transforms.ToTensor(), transforms.Normalize(vit.MEAN, vit.STD)]

    def view(size, scale, *ops):
        crop = transforms.RandomResizedCrop(size, scale, interpolation=transforms.InterpolationMode.BICUBIC)
        return transforms.Compose([crop, *colour, *ops, *end])
    views = [view(args.image_size, args.global_scale, sometimes(1.0, blur)),
             view(args.image_size, args.global_scale, sometimes(0.1, blur), sometimes(0.2, ImageOps.solarize))]
    views += [view(args.local_size, args.local_scale, sometimes(0.5, blur))] * args.local_crops
    return lambda image: [f(image) for f in views]


def draw_jpegs(folder, count=64, pixels=(500, 375)):
    """Pictures of ImageNet's usual 500 x 375 pixels and 110 kB, for who has no folder at hand; 4000 x 3000 have 5 MB.
    Of large ones a few are drawn, and copied."""
    distinct = max(4, 2**24 // (pixels[0] * pixels[1]))
    for i in range(count):
        if i >= distinct:
            shutil.copyfile(Path(folder, f"{i % distinct:03d}.jpg"), Path(folder, f"{i:03d}.jpg"))
            continue
        rng = np.random.default_rng(i)
        x = sum(np.asarray(Image.fromarray(rng.integers(0, 256, (n * 3 // 4, n, 3), dtype=np.uint8)).resize(
            pixels, Image.Resampling.BICUBIC), float) * share
            for n, share in ((8, 0.5), (40, 0.3), (3 * pixels[0] // 5, 0.2)))
        Image.fromarray(x.clip(0, 255).astype(np.uint8)).save(Path(folder, f"{i:03d}.jpg"), quality=92)


def bench_data(args, rest, device):
    with tempfile.TemporaryDirectory() as folder:
        settings = train.parse_args(["--data", folder, "--batch-size", "32", *rest])      # what is given comes last
        if settings.data == folder:
            print(f"no --data: pictures of {args.pixels[0]} x {args.pixels[1]} are drawn for it")
            draw_jpegs(folder, pixels=args.pixels)
        if settings.data == "shapes":
            sys.exit("shapes: its scenes are in memory, there is nothing to load; give --data DIR, or leave --data out")
        source, _ = train.open_data(settings)
        multicrop = data.MultiCrop(settings.image_size, settings.local_size, settings.local_crops,
                                   settings.global_scale, settings.local_scale)
        rows = per_core(settings, source, multicrop, max(5, args.repeats // 3))
        print(table(rows), end="\n\n")
        return rows + [doctor(settings, source, multicrop, device, max(3, args.repeats // 5))]


def per_core(settings, source, multicrop, repeats):
    """Rows: images/s of one core, of what a worker does, and with the colours, which run where the model does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = copy.copy(multicrop)
    whole.divisor = lambda height, width, rng: 1
    published, n, turn = published_pipeline(settings), min(16, len(source)), iter(range(10**9))

    def pillow():
        first = next(turn)
        for i in range(n):
            published(vit.read_image(source.name((first + i) % len(source))))

    def worker(multicrop=multicrop):
        first, crops = next(turn), data.Crops(source, multicrop, settings.seed)
        return data.collate([crops[0, (first + i) % len(source)] for i in range(n)])[:-1]

    def worker_and_colours():
        multicrop.photometric(*worker())

    rows = []
    for case, ours in (("decode and crops, the worker's part", worker), ("and colours on the same core",
                                                                        worker_and_colours)):
        variants = {"published pipeline": pillow, "here": ours}
        if ours == worker:                                            # as if no JPEG could come smaller
            variants["here, decoded whole"] = functools.partial(worker, whole)
        rows += compare(case, variants, "published pipeline", repeats, torch.device("cpu"))
    torch.set_num_threads(threads)
    return [dict(case=row["case"], variant=row["variant"], images_per_s=1e3 * n / row["ms"], low=1e3 * n / row["high"],
                 high=1e3 * n / row["low"], times_published=1 / row["ratio"]) for row in rows]


def doctor(settings, source, multicrop, device, repeats):
    """Print images/s of the loader alone, of the step alone and of both, which one is the limit, and the way out."""
    accum, workers = settings.accum, settings.workers

    def batches():
        return data.load(source, multicrop, settings, 0, 1, 0, device, checkpoint.deaf_worker)

    def rate(what, f, n=2 * workers + 1):                             # more batches than may lie ready
        seconds = []
        for i in range(repeats + 1):
            start = time.perf_counter()
            for _ in range(n):
                f()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:                                                     # the first round warms up
                seconds.append((time.perf_counter() - start) / n)
        speed = settings.batch_size / statistics.median(seconds)
        print(f"{what}: {speed:.3g} images/s", flush=True)            # each takes minutes where the model is slow
        return speed

    loader, number = batches(), iter(range(10**9))
    alone = rate(f"loader alone, --workers {workers}", lambda: [next(loader) for _ in range(accum)])
    step, run = stepper(settings, device)
    busy = rate(f"step alone, {device}", step, n=1)
    loader = batches()

    def both():
        i, micro = next(number), [next(loader)[:-1] for _ in range(accum)]
        train.train_step(run, micro, multicrop, i, train.schedules(settings, i, 1000), freeze_last_layer=False)
    together = rate(f"both, {os.cpu_count()} cores", both)
    if workers == 0:
        verdict = "the loader runs inside the training process, so their times add up: give --workers 1 or more"
    elif alone >= busy:
        verdict = "the step is the limit: more workers change nothing"
    else:
        verdict = (f"the loader is the limit: {math.ceil(busy / (alone / workers))} workers, on as many idle cores, "
                   "would keep up with the step")
    print(verdict)
    return dict(case="doctor", loader=alone, step=busy, both=together, workers=workers, verdict=verdict)


def main(argv=None):
    checkpoint.print_any_path()
    args, rest = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    benches = dict(check=bench_check, operator=bench_operator, attention=bench_attention, step=bench_step,
                   data=bench_data)
    facts, bench = machine(device), benches[args.what]
    try:
        if args.out:
            checkpoint.room_for(args.out)
        print(", ".join(f"{key} {value}" for key, value in facts.items()), end="\n\n")
        rows = bench(args, rest, device)
        if args.what not in ("check", "data"):
            print(table(rows))
        if args.out:
            content = dict(bench=args.what, command=sys.argv[1:] if argv is None else list(argv), machine=facts,
                           rows=rows)
            checkpoint.write_whole(args.out, lambda file: file.write(json.dumps(content, indent=1).encode()))
    except (ValueError, OSError) as error:                            # of a picture or of --out, with its name
        sys.exit(str(error))


if __name__ == "__main__":
    main()
