"""What goes to disk and comes back: whole, checked, or refused by name.

    model = load_backbone("runs/imagenet_entmax15_s0/checkpoint.pt")    or an official DINO file

    python -m checkpoint RUN --export FILE      a bare state dict under DINO's names, for timm and other people's code

To use weights of your own or other people's, this call is all you need; the rest serves this project's scripts:

    weights     `read_checkpoint` runs no code that a file brings; `open_weights` is the probes' way in
    results     the probes' flags; `claim` keeps results of different protocols, data or weights apart, and
                `resume_heads` does so for half-trained heads
    data        `fingerprint` tells the data that a number was measured on from any other
    files       `write_whole` writes all or nothing; `lock` keeps a run folder to one process
    signals     `noted_signals` lets a process that is asked to end save first
    progress    `progress` rewrites a line on a terminal
    runs        the state of a training run in its folder, the flags it was begun with, its log
"""

import argparse
import contextlib
import dataclasses
import datetime
import filecmp
import glob
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision

import vit

# ---------------------------------------------------------------------------------------------------------------------
# Weights

def load_backbone(path, which="teacher", device="cpu", heads=None):
    """Frozen float32 VisionTransformer, in eval mode, of a checkpoint of train.py, DINO's own file or timm's of DINO. A
    run folder stands for its checkpoint.pt.

    A bare state dict counts as the teacher, which is what DINO published. Every key must fit, or ValueError names it;
    only DINO's projection head (`head.*` beside `backbone.*`) is dropped. A classifier's `head.*` is an error: those
    weights are not DINO's. `heads` is for a file that does not say; what is assumed without it is printed.
    """
    path = Path(path, "checkpoint.pt") if Path(path).is_dir() else path
    content = read_checkpoint(path)
    bare = not {"teacher", "student", "config"} & content.keys()
    weights = {"teacher": content} if bare else content
    if which not in weights:
        raise ValueError(f"{path}: holds no {which} weights; it holds "
                         + ("one bare state dict, to be loaded as which='teacher'" if bare else listed(weights)))
    try:
        state = unwrap(weights[which])
        refuse_odd_arrays(state)
        config = vit.ViTConfig(**content["config"]) if "config" in content else infer_config(state, heads)
        if heads not in (None, config.heads):
            raise ValueError(f"heads={heads} is given, and the file says {config.heads}; leave out --heads")
        if config.depth > len(state):                               # or a hostile depth would be built block by block
            raise ValueError(f"depth={config.depth}, with {listed(state)}")
        with torch.device("meta"):                                  # no initialisation: slow, and draws random numbers
            model = vit.VisionTransformer(config).float().requires_grad_(False).eval()
    except (TypeError, ValueError, RuntimeError, LookupError, ArithmeticError) as error:    # an unknown field; no shape
        raise ValueError(f"{path}: cannot tell the architecture: {str(error).splitlines()[0]}") from error
    refuse_misfits(path, state, model.state_dict())
    model.to_empty(device=device).load_state_dict(state)
    if "config" not in content:
        print(f"{printable(path)}: softmax attention " + (f"and {config.heads} heads assumed (width / 64, as in DINO); "
              "--heads N if it has others" if heads is None else "assumed"))
    return model


def open_weights(path, which="teacher", like=None, seed=0, device="cpu", heads=None):
    """(frozen backbone, facts about its weights that go into every result) of a file, or of path "random".

    "random" is the untrained control: fresh weights from `seed` in the architecture of the checkpoint `like`, or of
    ViT-S/16 without it. `heads`: see load_backbone. Facts of the pretraining are `run_seed` and `recipe`, the arguments
    of train.py but for its seed, the place of its data and what decides no number; None of other people's files.
    """
    if path == "random":
        config = load_backbone(like, heads=heads).config if like else vit.ViTConfig(heads=6 if heads is None else heads)
        torch.manual_seed(seed)
        model = vit.VisionTransformer(config).to(device).eval().requires_grad_(False)
        return model, dict(weights="random", weights_sha256=None, which=None, epochs=0, run_seed=seed, recipe=None)
    before = hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else None
    model, content = load_backbone(path, which, device, heads), read_checkpoint(path)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if digest != before:                                            # the number would be one file's, its hash another's
        raise ValueError(f"{path}: was replaced while it was read; run the same command again")
    epochs = content["epoch"] if isinstance(content.get("epoch"), int) else None        # of another family: anything
    args = content["args"] if is_ours(content) else None
    recipe = args and {name: value for name, value in args.items() if name not in NOT_OF_THE_RECIPE}
    return model, dict(weights=str(path), weights_sha256=digest, which=which, epochs=epochs,
                       run_seed=args and args["seed"], recipe=recipe)


def is_ours(content):
    """Whether train.py wrote it: its arguments are plain, and say on which images it was trained."""
    args = content.get("args")
    return isinstance(args, dict) and {"fingerprint", "images"} <= args.keys() and isinstance(args.get("seed"), int)


def list_checkpoints(weights):
    """Files that --weights names: a run folder stands for its numbered checkpoints, in the order of epochs."""
    files = []
    for name in weights:
        numbered = [path for path in Path(name).glob("checkpoint_*.pt")
                    if re.fullmatch("checkpoint_[0-9]{4,}", path.stem)]
        if Path(name).is_dir() and not numbered:
            raise FileNotFoundError(f"{name}: holds no checkpoint_0000.pt ...; give a run folder of train.py or a file")
        files += map(str, sorted(numbered, key=lambda path: int(path.stem[11:]))) if numbered else [name]
    return files


# What a file may hold besides tensors and plain containers. Official full checkpoints store their arguments as a
# Namespace and, because DINO's schedules are numpy arrays, learning rates as numpy floats (of numpy 1 or 2). Neither
# can run code; anything else is refused unopened.
NUMPY_SCALAR = np.float64(0).__reduce__()[0]
SAFE = [argparse.Namespace, np.dtype, type(np.dtype("float64")),
        (NUMPY_SCALAR, "numpy.core.multiarray.scalar"), (NUMPY_SCALAR, "numpy._core.multiarray.scalar")]


class Refused(Exception):
    """Why a file is no checkpoint, in words that a user can act on."""


def read_checkpoint(path):
    """The dict that a file of torch or safetensors holds; FileNotFoundError or ValueError names a file that is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; give a checkpoint of train.py or an official DINO .pth")
    try:
        content = read_safetensors(path)
        if content is None:
            check_bytes(path)
            with torch.serialization.safe_globals(SAFE), warnings.catch_warnings():
                warnings.simplefilter("ignore")                     # what torch thinks of other people's files
                content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise Refused(f"it holds a {type(content).__name__}, not a dict of weights")
    except Exception as error:                                      # the unpickler fails in a dozen ways on other bytes
        forbidden = str(error).partition("GLOBAL ")[2].split(" ")[0]
        cause = (str(error) if isinstance(error, Refused)
                 else f"it holds {forbidden}, and unpickling that could run code; save its state_dict() alone"
                 if forbidden else "a TorchScript archive, as CLIP's; save its state_dict() alone"
                 if "TorchScript" in str(error) else f"damaged, or no torch file ({type(error).__name__})")
        raise ValueError(f"{path}: not a checkpoint: {cause}") from error
    return content


def check_bytes(path):
    """What torch.load leaves unchecked: it reads a flipped bit as another weight, and unpacks whatever it is given."""
    with open(path, "rb") as file:
        start = file.read(99).lstrip()
    if start.startswith(b"version https://git-lfs"):
        raise Refused("a pointer of git-lfs; git lfs pull brings the file")
    if start.startswith(b"<"):
        raise Refused("a web page; download the file again")
    if not zipfile.is_zipfile(path):                                # torch's format before 1.6, or no torch file
        return
    with zipfile.ZipFile(path) as archive:
        unpacked, size = sum(entry.file_size for entry in archive.infolist()), os.path.getsize(path)
        if unpacked > 1.1 * size:
            raise Refused(f"its {size:,} bytes unpack to {unpacked:,}; torch never compresses")
        # A bit that no checksum covers makes an entry a folder to torch: its weights are then what the memory held.
        if archive.testzip() or any(entry.external_attr & 0x10 for entry in archive.infolist()):
            raise Refused("damaged: what it holds does not match its checksums; restore it from a copy")


def read_safetensors(path):
    """The tensors of a file that is one by its content, whatever its name: a length, then that much JSON; else None."""
    with open(path, "rb") as file:
        length, start = int.from_bytes(file.read(8), "little"), file.read(1)
    if start != b"{" or length > os.path.getsize(path) - 8:
        return None
    try:
        from safetensors.torch import load_file  # not at the top: it is no requirement
    except ImportError as error:
        raise Refused("a safetensors file; pip install safetensors, or convert it with torch.save") from error
    return load_file(path)


# Of a state dict that does not fit: a pattern in its keys, whose it is, and what can be done.
ALONE, ELSE = "save its encoder alone, under DINO's names", "another network, which cannot be loaded here"
FOREIGN = [(r"decoder_blocks", "MAE with its decoder", ALONE), (r"masked_embed", "iBOT's student", ALONE),
           (r"base_encoder", "MoCo v3 with two encoders", f"{ALONE}; its ViT-S has 12 heads"),
           (r"\.ls1\.", "DINOv2's or another ViT with LayerScale", ELSE), (r"storage_tokens", "DINOv3's ViT", ELSE),
           (r"relative_position_bias_table", "BEiT or Swin", ELSE), (r"\bvisual\.", "CLIP", ELSE),
           (r"vision_model", "CLIP or SigLIP", ELSE),
           (r"\.query\.|patch_embeddings\.", "Hugging Face's ViT, with names of its own", "take the same weights "
            "from timm or DINO's own page, or give its keys DINO's names"),
           (r"encoder_layer_0", "torchvision's ViT", ELSE), (r"\blayer1\.0\.", "a ResNet", ELSE),
           (r"\bstages\.", "a network of stages, as ConvNeXt", ELSE), (r"dist_token", "distilled DeiT", ELSE),
           (r"reg_token", "timm's ViT with registers", ELSE), (r"norm_pre", "CLIP's ViT in timm", ELSE),
           (r"fc_norm|attn_pool", "timm's ViT that pools its patches, not one that reads [CLS]", ELSE),
           (r"\.q_norm\.", "a ViT that normalises queries and keys", ELSE),
           (r"mask_token", "a masked-image model", ALONE)]
CLASSIFIER = f"; it looks like a classifier, trained with labels: give self-supervised weights, or {ALONE}"


def advice(keys):
    """'; ...': what keys that do not fit may belong to, and the way out; '' if it is not known."""
    for pattern, what, way_out in FOREIGN:
        if any(re.search(pattern, key) for key in keys):
            return f"; it looks like {what}: {way_out}"
    prefixes = [key.removesuffix("cls_token") for key in keys if key.endswith(".cls_token")]
    if prefixes:
        return f"; save what is below {' or '.join(prefixes)} alone, without that prefix"
    return CLASSIFIER if any(key.startswith("head.") for key in keys) else ""


def unwrap(content):
    """State dict in {'state_dict': ...}, {'model': ...} and the like, at any depth, without the prefixes that DDP,
    torch.compile and frameworks put before every key; DINO's head, `head.*` beside `backbone.*`, is dropped."""
    if not isinstance(content, dict):
        raise ValueError(f"the weights are a {type(content).__name__}, not a dict of tensors")
    for _ in range(4):
        inside = [key for key, value in content.items() if holds_network(value)]
        if len(inside) > 1:
            raise ValueError(f"it holds several networks, {listed(inside)}; save the one to be measured alone")
        content = content[inside[0]] if inside else content
    state, prefix = {str(key): value for key, value in content.items()}, None
    while prefix != "":
        if any(key.startswith("backbone.") for key in state):
            state = {key: value for key, value in state.items() if not key.startswith("head.")}
        prefix = next((prefix for prefix in ("module.", "_orig_mod.", "encoder.", "model.", "backbone.")
                       if state and all(key.startswith(prefix) for key in state)), "")
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def holds_network(value, depth=4):
    """Whether a dict, or one in it, is a ViT's; down to a depth, as a file may hold loops."""
    return depth > 0 and isinstance(value, dict) and any(
        str(name).endswith("cls_token") if isinstance(part, torch.Tensor) else holds_network(part, depth - 1)
        for name, part in value.items())


def refuse_odd_arrays(state):
    """ValueError for what is no dense array of floats among the weights of a ViT: int8, sparse, meta, ..."""
    odd = []
    for key, value in state.items():
        kind = (type(value).__name__ if not isinstance(value, torch.Tensor) else "nested" if value.is_nested
                else "meta" if value.is_meta else value.dtype if value.layout == torch.strided else value.layout)
        if kind not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) and re.match(
                "(cls_token|pos_embed|register_tokens|patch_embed|blocks|norm|norm_cls)\\b", key):
            odd.append(f"{key} {str(kind).removeprefix('torch.')}")
    if odd:
        raise ValueError(f"weights are dense arrays of floats, not {listed(odd)}; convert them{advice(state)}")


def refuse_misfits(path, state, expected):
    """ValueError unless every key is there with its shape, no other is, and all numbers are finite."""
    misfits = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [f"{key} {tuple(state[key].shape)} for {tuple(expected[key].shape)}" for key in expected
                             if key in state and state[key].shape != expected[key].shape],
    }
    if any(misfits.values()):
        raise ValueError(f"{path}: the weights do not fit the model: "
                         + "; ".join(f"{listed(keys)} {what}" for what, keys in misfits.items() if keys)
                         + advice(misfits["unexpected"]))
    bad = [key for key in expected if not state[key].float().isfinite().all()]
    if bad:
        raise ValueError(f"{path}: not finite: {listed(bad)}; its run diverged, give an earlier checkpoint")


def infer_config(state, heads=None):
    """ViTConfig of a bare state dict. Shapes tell neither the attention, which is taken as softmax, nor the number of
    heads: DINO's widths have one per 64 unless it is given, of others it must be."""
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.0.mlp.fc1.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        raise ValueError(f"{listed(missing)} of a DINO ViT missing; the file holds {listed(state)}{advice(state)}")
    dim, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    patches = state["pos_embed"].numel() // dim - 1
    grid = math.isqrt(patches)
    if grid * grid != patches:
        raise ValueError(f"the {patches} position embeddings of patches must form a square, beside one of [CLS]"
                         + advice(state))
    if heads is None and dim not in (192, 384, 768, 1024):          # tiny, small, base; large has 16 in every family
        raise ValueError(f"width {dim} is none of DINO's and does not tell the number of heads; give it: --heads N, in "
                         "Python heads=N")
    return vit.ViTConfig(
        image_size=grid * patch, patch_size=patch, dim=dim, heads=dim // 64 if heads is None else heads,
        depth=sum(key.endswith(".norm1.weight") for key in state),
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].numel() // dim**2,
        registers=state["register_tokens"].numel() // dim if "register_tokens" in state else 0,
        specialize="norm_cls.weight" in state,
    )


def listed(keys):
    """'5 keys (a, b, c, ...)'"""
    keys = [str(key) for key in keys]
    return f"{len(keys)} key{'s' * (len(keys) != 1)} ({', '.join(keys[:3])}{', ...' * (len(keys) > 3)})"


# ---------------------------------------------------------------------------------------------------------------------
# Results of probes: one JSON line in one file, which belongs to one protocol, one data set and one network

PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}      # of --amp


def add_flags(p, probe):
    """The flags that all probes share, for parser `p`."""
    p.add_argument("--weights", nargs="+", required=True, metavar="FILE",
                   help="checkpoints of train.py, official DINO files, a run folder (its numbered files), or random")
    p.add_argument("--which", choices=["teacher", "student"], default="teacher", help="DINO evaluates the teacher")
    p.add_argument("--like", help="checkpoint whose architecture --weights random takes; default ViT-S/16")
    p.add_argument("--heads", type=int, help="attention heads, of a file that does not say; default width / 64: DINO's")
    p.add_argument("--seed", type=int, default=0, help="of all that is random, and of --weights random")
    p.add_argument("--amp", choices=list(PRECISION), help="of the frozen forward; default bf16 on CUDA, off on CPU")
    p.add_argument("--workers", type=int, help="loader processes")
    p.add_argument("--out", help=f"result file; default <weights without .pt>.{probe}.<data>.json")


def check_flags(p, args, positive="", natural=""):
    """Refuse what cannot run, list the checkpoints, choose the precision. `positive`, `natural`: further flags that
    must be at least 1 or 0."""
    for names, least in ((f"heads {positive}", 1), (f"workers seed {natural}", 0)):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and value < least:
                p.error(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.seed >= 2**63:
        p.error(f"--seed {args.seed}: must be below 2^63")
    if args.like and args.weights != ["random"]:
        p.error("--like goes with --weights random: a checkpoint brings its own architecture")
    with one_line(args.weights[0]):
        args.weights = list_checkpoints(args.weights)
    if args.out and len(args.weights) > 1:
        p.error(f"--out names one file and --weights {len(args.weights)}; leave it out for one result beside each")
    args.amp = args.amp or best_amp()


def best_amp():
    """--amp where it is not given."""
    if not torch.cuda.is_available():
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"    # older cards emulate it


def autocast(device, amp):
    """Context of a frozen forward with --amp."""
    return torch.autocast(device.type, PRECISION[amp], enabled=amp != "off")


@contextlib.contextmanager
def one_line(path):
    """What goes wrong with the weights or the data of `path` ends the program with a line that names it."""
    try:
        yield
    except (ValueError, OSError) as error:
        line = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")     # after a loader worker's traceback
        progress.end()
        sys.exit(line if ": " in line else f"{path}: {line}")
    except KeyboardInterrupt:                                       # where there is nothing to save yet
        sys.exit(130)


def method(config):
    """'softmax', 'entmax15', 'softmax_r4', 'softmax_spec', ...: of a ViTConfig or of train.py's arguments."""
    return config.attn + f"_r{config.registers}" * (config.registers > 0) + "_spec" * config.specialize


def result_path(weights, probe, data, config, seed):
    """Where the result of a probe goes without --out."""
    if weights == "random":
        return f"runs/random/{probe}.{data}.{method(config)}.s{seed}.json"
    return f"{str(weights).removesuffix('.pt')}.{probe}.{data}.json"


def identity(result):
    """{name: value} of all that decides a number, apart from the training of the weights: a result may replace one of
    the same identity, and no other. (The config is not the file's alone: --heads may be given for a foreign one.)"""
    return dict(result["protocol"], seed=result["seed"], which=result["which"], config=result["config"])


def claim(out, default, result):
    """(file, finished): where `result`, all of it but its metrics, will go; and what is there already, if it is the
    result of just these weights, else None.

    A result of the same protocol, data and file of weights is replaced if that file has changed since. Any other is
    kept: without --out (None) the new one gets a name of its own, with it ValueError names what differs.
    """
    mine, path = json.loads(json.dumps(identity(result))), Path(out or default)         # as it will be read: no tuples
    room_for(path)
    for attempt in range(2):
        if not path.exists():
            return path, None
        try:
            old = json.loads(path.read_text())
            theirs, same_weights = identity(old), old["weights_sha256"] == result["weights_sha256"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: holds no result of a probe ({type(error).__name__}); give another --out, or "
                             "remove it") from error
        differing = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
        if out and not same_weights and old["weights"] != result["weights"]:
            differing.insert(0, "weights"); mine["weights"], theirs["weights"] = result["weights"], old["weights"]
        if not differing:
            return path, old if same_weights else None
        cause = ", ".join(f"{name} {theirs.get(name)}, now {mine.get(name)}" for name in differing[:3])
        if out or attempt:
            raise ValueError(f"{path}: holds a result that is not to be overwritten ({cause}); give another --out")
        digest = hashlib.blake2b(json.dumps(mine, sort_keys=True).encode(), digest_size=4).hexdigest()
        print(f"{path}: holds a result with {cause}; this one goes to {beside(path, f'.{digest}.json').name}")
        path = beside(path, f".{digest}.json")


def mean_sd(values):
    """(mean, sample standard deviation or None of a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def say_finished(path, finished):
    """Prints a result that is there already, as if it had just been measured."""
    print(f"finished before: result read from {path}")
    print(json.dumps(finished), flush=True)


def write_result(path, result):
    """The last line of every probe, and the same in its file; `claim` once more, for another process may have come
    first."""
    path, _ = claim(None, path, result)
    line = json.dumps(result, allow_nan=False)                      # not a number is not a result
    print(line, flush=True)                                         # first: a file that fails loses nothing
    write_whole(path, lambda file: file.write(f"{line}\n".encode()))


def resume_heads(file, stamp, heads, optimizer):
    """(iterations done, evaluations) of a probe whose heads are in `file`, which are loaded: (0, []) without a file.

    `stamp` holds every setting that decides the result. Heads of other settings are to be overwritten once they have
    been evaluated, or their result is written; else ValueError refuses.
    """
    if not Path(file).exists():
        return 0, []
    try:
        state = read_checkpoint(file)
        old = state["stamp"]
        differing = [name for name in sorted(old.keys() | stamp.keys()) if old.get(name) != stamp.get(name)]
        done, last = state["iteration"] >= old["iters"], [entry["iteration"] for entry in state["history"][-1:]]
        if differing and done and (last == [old["iters"]] or is_reported(file, old)):
            return 0, []
        if not differing:
            heads.load_state_dict(state["heads"])
            optimizer.load_state_dict(state["optimizer"])
            if state["iteration"] < stamp["iters"]:
                print(f"{file}: going on from iteration {state['iteration']:,}")
            return state["iteration"], state["history"]
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:       # of a file of something else
        cause = str(error).removeprefix(f"{file}: ") if isinstance(error, ValueError) else type(error).__name__
        raise ValueError(f"{file}: holds no heads of this probe ({cause}); remove it, or give another --out") from error
    name = differing[0]
    raise ValueError(f"{file}: holds {'unreported' if done else 'unfinished'} heads with {name} "
                     f"{old.get(name)}, now {stamp.get(name)}; go on with the old value, remove the file, or give "
                     "another --out")


def is_reported(file, stamp):
    """Whether the result of the heads in `file`, of this stamp, lies beside them."""
    path = Path(str(file).removesuffix(".head.pt"))
    try:
        result = json.loads((path if path.is_file() else beside(path, ".json")).read_text())
        stamp = json.loads(json.dumps(stamp))
        return dict(stamp, **identity(result), weights_sha256=result["weights_sha256"]) == stamp
    except (OSError, ValueError, KeyError, TypeError):
        return False


def beside(out, suffix):
    """The path of what belongs to the result file `out`: its name with another end."""
    return Path(str(out).removesuffix(".json") + suffix)


# ---------------------------------------------------------------------------------------------------------------------
# Data: which pictures and labels a number belongs to

def fingerprint(root, pictures, labels=()):
    """16 hex digits that tell a data set from any other: order, names below `root` and sizes of all its files, and
    content: of all pictures and all labels, or of as many evenly spread ones as have 256 MiB and 1 GiB together.

    The place of the data is not in it: a copy has the same. ImageNet takes seconds.
    """
    def size(path):
        try:
            return os.stat(path).st_size
        except OSError:                                             # who reads it will say so
            return -1

    digest, above = hashlib.blake2b(digest_size=8), os.path.join(root, "")
    with ThreadPoolExecutor(16) as pool:                            # a network file system answers after a while
        for paths, budget in ((pictures, 2**28), (labels, 2**30)):
            paths = [os.fspath(path) for path in paths]
            parts = (paths[i:i + 500] for i in range(0, len(paths), 500))
            sizes = [n for part in pool.map(lambda part: [*map(size, part)], parts) for n in part]
            for path, n in zip(paths, sizes, strict=True):
                name = path[len(above):] if path.startswith(above) else os.path.relpath(path, root)     # it is slow
                digest.update(os.fsencode(f"{name}\0{n}\0"))
            for path in paths[::max(1, math.ceil(sum(sizes) / budget))]:
                with contextlib.suppress(OSError):
                    digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def refuse_trained_on(source, train, val, copies=True):
    """What was trained on measures nothing: ValueError if files of val are files of train, through links too, or if
    more than a tenth of val (of up to 1,000 looked at) are `copies` under the same name. Fewer copies are said."""
    files, named = set(), {}
    for path in train:
        stat = os.stat(path)
        files.add((stat.st_dev, stat.st_ino))
        named.setdefault((Path(path).name, stat.st_size), []).append(path)
    looked, stats = val, [os.stat(path) for path in val]
    shared = [path for path, stat in zip(val, stats, strict=True) if (stat.st_dev, stat.st_ino) in files]
    if copies and not shared:
        step = math.ceil(len(val) / 1000)
        looked = val[::step]
        twins = [path for path, stat in zip(looked, stats[::step], strict=True) if any(
            filecmp.cmp(path, twin, shallow=False) for twin in named.get((Path(path).name, stat.st_size), []))]
        shared = twins if len(twins) > max(1, len(looked) / 10) else []
        if twins and not shared:
            print(f"{source}: {len(twins):,} of {len(looked):,} val pictures are train pictures, too, as {twins[0]}")
    if shared:
        raise ValueError(f"{source}: {len(shared):,} of {len(looked):,} val pictures are train pictures, the first is "
                         f"{shared[0]}; take them out of train or val")


def read_lines(path):
    """Of a list of files as editors save it: UTF-8, with a byte-order mark or without, or PowerShell's UTF-16."""
    with open(path, "rb") as file:
        utf_16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    return Path(path).read_text("utf-16" if utf_16 else "utf-8-sig", "surrogateescape").split("\n")


def spread(n, count):
    """`count` of n places, or all of fewer, evenly from the first to the last."""
    return np.linspace(0, n - 1, min(n, count)).round().astype(int).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Files: room for them, written whole, kept to one process; printable names

def room_for(out):
    """Make the folder of a file that is to be written; ValueError says what is in the way, before hours are spent."""
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        trial = Path(f"{out}.{os.getpid()}.tmp")
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(f"{out}: {error.strerror}; give another --out") from error


def write_whole(path, write):
    """write(binary file), whole or not at all: a killed job or a full disk leaves what was there. OSError says what
    to do."""
    half = Path(f"{path}.{os.getpid()}.tmp")                        # of its own: two processes may write one file
    for left in Path(path).parent.glob(f"{glob.escape(Path(path).name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:           # of a process that was killed while it wrote
                left.unlink()
    try:
        with half.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, path)
    except (OSError, RuntimeError) as error:                        # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            half.unlink()
        way = "give another --out" if isinstance(error, (PermissionError, FileNotFoundError)) else "make room"
        raise OSError(f"{path}: not written: {' '.join(str(error).split())}; what was there is untouched; {way} and "
                      "run the same command again") from error


def write_checkpoint(path, content):
    write_whole(path, lambda file: torch.save(content, file))


def lock(folder):
    """Make `folder`, and keep it to this process until it ends, however it ends: an open file, or ValueError where
    another process holds it. Nothing is left to clear away."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}; give another --out") from error
    if os.name != "posix":
        return None
    import fcntl  # not at the top: Windows has none

    with contextlib.suppress(OSError):                              # not writable, or no locks there: nobody's to keep
        file = open(Path(folder, ".lock"), "a")  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)        # of the process: its workers do not inherit it
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"{folder}: another process is writing there; wait for it, stop it, or give another "
                             "--out") from error
        return file


def printable(name):
    """A path or the name of one as text that can be printed and drawn, also where it is no UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def print_any_path():
    """Let stdout escape what is no UTF-8 in a path; a run that is fine would end where it is printed."""
    with contextlib.suppress(AttributeError):                       # a notebook's stdout has no such setting
        sys.stdout.reconfigure(errors="backslashreplace")


# ---------------------------------------------------------------------------------------------------------------------
# Being asked to end: save first

@contextlib.contextmanager
def noted_signals():
    """List of the signals (SIGINT, SIGTERM) that have asked this process to end: it saves, then goes. A third one ends
    it at once. Loader workers that are left at the end are ended, too."""
    if threading.current_thread() is not threading.main_thread():   # Python allows handlers to the main thread alone
        yield []
        return
    asked, others = [], set(multiprocessing.active_children())

    def note(number, frame):
        asked.append(number)
        if len(asked) > 2:                                          # somebody means it: leave without saving
            sys.exit(128 + number)

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        # An exiting Python sends its children SIGTERM, to which these are deaf, and waits: after an error, for ever.
        if hasattr(signal, "SIGCHLD"):                              # Windows has none; torch's would call them lost
            handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
            child.join()
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


def leave(asked, where):
    progress.say(f"stopped by signal {asked[0]} {where}, saved; run the same command again to go on")
    sys.exit(128 + asked[0])


def until_asked(asked, items):
    """The items of an evaluation, one by one; SystemExit as soon as a signal has been noted. Save before it."""
    for item in items:
        if asked:
            leave(asked, "within an evaluation")
        yield item


def deaf_worker(_):
    """Loader workers leave Ctrl-C and SIGTERM to the process that owns them, or it could not finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------------------
# Progress, for the eye

class Progress:
    """The last line of stdout: rewritten in place on a terminal, in a file one after the other. What is said in between
    leaves it as it is, and begins below it."""

    def __init__(self):
        self.open = False                                           # a line of a terminal that waits to be rewritten

    def show(self, text, stays=False):
        if not sys.stdout.isatty():
            print(text, flush=True)
            return
        width = shutil.get_terminal_size().columns - 1              # a line that wraps could not be taken back
        print(f"\r{text[:width]}\033[K", end="\n" * stays, flush=True)
        self.open = not stays

    def say(self, text):
        self.end()
        print(printable(text), flush=True)

    def end(self, last="\n"):
        print(last * self.open, end="", flush=True)
        self.open = False

    def of(self, items, what):
        """The items, one by one; if they take long, how many are done: always on a terminal, which forgets it at the
        end, and after 5, 15, 35, ... seconds in a file."""
        total, tty = len(items), sys.stdout.isatty()
        eta, clock, pause, shown = Eta(0, total), time.perf_counter(), 0.1 if tty else 5, False
        try:
            for done, item in enumerate(items, 1):
                yield item
                left = eta(done)
                if time.perf_counter() - clock >= pause:
                    self.show(f"{left}  {what} {done:,}/{total:,}")
                    clock, pause, shown = time.perf_counter(), pause if tty else 2 * pause, True
        finally:
            if shown:
                self.end("\r\033[K")


progress = Progress()                                               # of the process, as its terminal is


class Eta:
    """eta(done) -> 'eta 0:12:34' of a loop that began at `done` and goes to `total`, at its mean pace since the first
    call, which waited for loaders to start."""

    def __init__(self, done, total):
        self.done, self.total, self.clock, self.started = done, total, time.perf_counter(), False

    def __call__(self, done):
        now = time.perf_counter()
        seconds = (now - self.clock) / max(1, done - self.done) * (self.total - done)
        if not self.started:
            self.done, self.clock, self.started = done, now, True
        return time_left(seconds)


def time_left(seconds):
    """'eta 0:12:34', 'eta 12d 03h'; equally wide up to 999 days."""
    days, rest = divmod(round(seconds), 86_400)
    return f"eta {f'{days}d {rest // 3600:02}h' if days else str(datetime.timedelta(seconds=rest)):8}"


# ---------------------------------------------------------------------------------------------------------------------
# A run of train.py in its folder: its state, the flags it was begun with, its log

RUN = dict(config=dict, student=dict, teacher=dict, student_head=dict, teacher_head=dict, center=torch.Tensor,
           optimizer=dict, scaler=dict, step=int, epoch=int, args=dict)
NOT_OF_THE_RECIPE = ("seed", "data", "out", "resume", "workers", "log_every", "save_every", "save_steps")
MAY_CHANGE = ("out", "workers", "log_every", "save_every", "save_steps")    # on resume, and the place of the data
FACTS = ("images", "fingerprint")                                   # in args, but no flags


def flag(name):
    return "--" + name.replace("_", "-")


def as_flags(args):
    """{name: [words of the command line]} of arguments; [] for what is not given."""
    def words(name, value):
        values = [] if value is True else value if isinstance(value, list) else [value]
        if name == "norm_last_layer" and value is False:            # a recipe may turn it on
            return ["--no-norm-last-layer"]
        return [] if value is None or value is False else [flag(name), *map(str, values)]

    return {name: words(name, value) for name, value in args.items() if name not in FACTS}


def plain(args):
    """The arguments as plain types, for checkpoint and log, without what the others say, too."""
    return {name: value for name, value in vars(args).items() if name not in ("config", "recipe")}


def write_run(run, folder, step, epoch, numbered):
    """checkpoint.pt of a train.Run, after the numbered file where one is due: a kill between the two repeats both."""
    state = {
        "config": dataclasses.asdict(run.args.config),
        "student": run.student.backbone.state_dict(), "teacher": run.teacher.backbone.state_dict(),
        "student_head": run.student.head.state_dict(), "teacher_head": run.teacher.head.state_dict(),
        "center": run.loss.center, "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(),
        "step": step, "epoch": epoch,
        "args": plain(run.args),
    }
    if numbered:
        weights = {key: value for key, value in state.items() if key not in ("optimizer", "scaler")}
        write_checkpoint(folder / f"checkpoint_{epoch:04d}.pt", weights)
    write_checkpoint(folder / "checkpoint.pt", state)


def restore_run(run, state, path):
    """Load the state into a train.Run, or ValueError names what does not fit."""
    try:
        for name, network in (("student", run.student), ("teacher", run.teacher)):
            network.backbone.load_state_dict(state[name])
            network.head.load_state_dict(state[name + "_head"])
        run.loss.load_state_dict({"center": state["center"]})
        for group in state["optimizer"]["param_groups"]:            # of this device, not of the one it was saved on
            group["fused"] = run.optimizer.defaults["fused"]
        run.optimizer.load_state_dict(state["optimizer"])
        run.scaler.load_state_dict(state["scaler"])
        for p, moments in run.optimizer.state.items():              # which torch does not compare
            if any(moment.shape not in (p.shape, ()) for moment in moments.values()):
                raise ValueError(f"optimizer state for another shape than {tuple(p.shape)}")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:    # torch's, of foreign states
        raise ValueError(f"{path}: cannot be resumed: {type(error).__name__}: {' '.join(str(error).split())[:300]}; "
                         "give another --out, or remove the folder to start over") from error
    if not all(p.isfinite().all() for p in (*run.student.parameters(), *run.teacher.parameters(), run.loss.center)):
        raise ValueError(f"{path}: cannot be resumed: it holds weights that are not finite; give another --out")


def open_run(folder):
    """What checkpoint.pt of a run holds, or None without one; ValueError if the run cannot go on from it."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        state = read_checkpoint(path)
    except ValueError as error:
        cause = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: cannot be resumed: {cause}; give another --out, or remove the folder to start "
                         "over") from error
    missing = [name for name in RUN if not isinstance(state.get(name), RUN[name])]
    if missing:
        raise ValueError(f"{path}: cannot be resumed: it lacks {', '.join(missing)}; give another --out, or remove the "
                         "folder")
    return state


def flags_of_run(folder):
    """The command line that a run was begun with."""
    state = open_run(folder)
    if state is None:
        raise ValueError(f"{folder}: holds no checkpoint.pt; --resume takes the folder of a run that has begun")
    return [*sum(as_flags(state["args"]).values(), []), "--out", folder]


def resume_run(folder, args):
    """(state of the run in a folder or None, usage error or "") for a command line of these `args`: two runs of other
    flags would mix. ValueError where it is the pictures that are others."""
    state, path = open_run(folder), Path(folder) / "checkpoint.pt"
    if state is None:
        return None, ""
    old, may_change = state["args"], {*MAY_CHANGE, *FACTS}
    if "fingerprint" in old and "shapes" not in (old.get("data"), args["data"]):
        may_change.add("data")                                      # which the fingerprint knows, wherever it lies
    flags = as_flags({name: old.get(name) for name in sorted(old.keys() | args.keys())
                      if name not in may_change and old.get(name) != args.get(name)})
    if flags:
        given = shlex.join(word for words in flags.values() for word in words)
        dropped = " or ".join(flag(name) for name, words in flags.items() if not words)
        way = ", ".join([f"with {given}"] * bool(given) + [f"without {dropped}"] * bool(dropped))
        return None, f"{path}: begun with other flags; go on {way}, or give another --out"
    if old.get("images") != args["images"] or old.get("fingerprint", args["fingerprint"]) != args["fingerprint"]:
        raise ValueError(f"{path}: trained on {old.get('images')} images of {old.get('data')}; of the {args['images']} "
                         f"in {args['data']} some were replaced, added or removed; bring the data back, or "
                         "give another --out")
    return state, ""


class Log:
    """log.jsonl, and a line for the eye. Of the main process only. What a killed run logged after its checkpoint of
    `step` is dropped."""

    def __init__(self, folder, is_main, step):
        self.path, self.is_main = Path(folder) / "log.jsonl", is_main
        if is_main:
            self.cut(step)

    def cut(self, step):
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, AttributeError, TypeError):    # a line that the kill cut short
                if json.loads(line).get("step", 0) <= step:
                    kept.append(line + "\n")
        write_whole(self.path, lambda file: file.write("".join(kept).encode()))

    def say(self, text):
        if self.is_main:
            progress.say(text)

    def record(self, record, line=None, stays=False):
        if not self.is_main:
            return
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            sys.exit(f"{self.path}: not written: {error}; make room and run the same command again")
        if line:
            progress.show(line, stays)


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


# ---------------------------------------------------------------------------------------------------------------------
# Command line: weights for other people's code

def export(path, which, heads, out):
    """Write the backbone of what load_backbone takes as a bare state dict under DINO's names, and say who reads it."""
    refused = ("is there already; give another --export" if Path(out).exists() else
               "torch.save writes no safetensors; call it .pth" if str(out).endswith(".safetensors") else
               "" if Path(out).absolute().parent.is_dir() else "no such folder; make it, or give another --export")
    if refused:
        raise ValueError(f"{out}: {refused}")
    model = load_backbone(path, which, heads=heads)
    state, c = model.state_dict(), model.config
    write_checkpoint(out, state)
    print(f"{printable(out)}: {len(state)} tensors of {printable(path)}, {which}, under DINO's names")
    own = [f"{c.attn} attention, of which the file says nothing (readers, load_backbone too, take softmax, and get "
           "other features without an error)"] * (c.attn != "softmax")
    own += [f"{c.registers} register_tokens between [CLS] and the patches"] * (c.registers > 0)
    own += ["weights of its own for [CLS], *_cls.*"] * c.specialize
    loaded = f"; model.load_state_dict(torch.load({str(out)!r}))"
    print(f"no plain ViT, so not for timm: {'; '.join(own)}. Here: model = vit.VisionTransformer(vit.{c})" if own else
          f"timm: model = timm.models.VisionTransformer(img_size={c.image_size}, patch_size={c.patch_size}, embed_dim="
          f"{c.dim}, depth={c.depth}, num_heads={c.heads}, mlp_ratio={c.mlp_ratio}, num_classes=0)", end=loaded + "\n")


def main(argv=None):
    print_any_path()
    p = argparse.ArgumentParser(prog="python -m checkpoint", allow_abbrev=False,
                                description="Write a backbone as a bare state dict under DINO's names, for timm.")
    p.add_argument("weights", metavar="RUN", help="run folder of train.py, or any file of weights that the probes take")
    p.add_argument("--export", required=True, metavar="FILE", help="to write, as .pth; nothing is overwritten")
    p.add_argument("--which", choices=["teacher", "student"], default="teacher", help="default teacher, as DINO's")
    p.add_argument("--heads", type=int, help="attention heads, of a file that does not say")
    args = p.parse_args(argv)
    with one_line(args.weights):
        export(args.weights, args.which, args.heads, args.export)


if __name__ == "__main__":
    main()
