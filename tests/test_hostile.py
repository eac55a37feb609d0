"""Wrong paths, wrong files, wrong flags, for every script: one clear line, exit status 2 (usage) or 1 (data), nothing
executed, nothing left behind."""
import ast
import dataclasses
import importlib
import io
import json
import math
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vit
from shapes import Shapes

ROOT = Path(vit.__file__).parent
CONFIG = vit.ViTConfig(image_size=32, patch_size=8, dim=32, depth=4, heads=2, attn="entmax15")
SIZES = ("--dim 32 --depth 2 --heads 2 --patch-size 8 --image-size 32 --local-size 16 --local-crops 1 --out-dim 16 "
         "--hidden-dim 16 --bottleneck-dim 8 --batch-size 4 --epochs 1 --warmup-epochs 0 --workers 0 "
         "--warmup-teacher-temp-epochs 0")
NEW = os.fsdecode(b"caf\xe9")                                         # Latin-1: no UTF-8 name


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with good weights W.pt and pictures, in which every command runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("probe_linear", "probe_seg", "probe_depth", "pib"):  # a few scenes are as good for this
        monkeypatch.setattr(importlib.import_module(name), "Shapes",
                            lambda split, size, _, cards=1: Shapes(split, size, 20, cards))
    torch.manual_seed(0)
    torch.save(checkpoint(), "W.pt")
    draw("pictures", 8)
    return tmp_path


def checkpoint(**changes):
    weights = vit.VisionTransformer(CONFIG).state_dict()
    return dict(config=dataclasses.asdict(CONFIG), student=weights, teacher=weights, epoch=3, step=9) | changes


def draw(folder, count, size=(40, 30), suffix=".png"):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.effect_noise(size, 60).convert("RGB").save(Path(folder, f"{i:02d}{suffix}"))


def run(command, capsys):
    """(exit status, what a shell would show on stderr) of 'script.py flags', in this process."""
    script, *argv = command.split()
    capsys.readouterr()
    try:
        importlib.import_module(script.removesuffix(".py")).main(argv)
        status, text = 0, ""
    except SystemExit as stop:
        status, text = (1, f"{stop.code}\n") if isinstance(stop.code, str) else (stop.code or 0, "")
    return status, capsys.readouterr().err + text


def listing():
    return sorted(str(path) for path in Path(".").rglob("*"))


def refused(command, status, message, capsys, may_leave=()):
    before = listing()
    got, text = run(command, capsys)
    assert got == status, f"exit status {got}: {text}"
    lines = text.strip().splitlines()
    assert "Traceback" not in text and (len(lines) == 1 or status == 2), text
    assert re.search(message, lines[-1]), text
    new = set(listing()) - set(before)
    may_leave = (*may_leave, ".lock")                               # of a run folder: empty, and nobody's
    assert all(any(Path(path).match(pattern) for pattern in may_leave) for path in new), new


# ---- files of weights

class Bomb:
    """Runs a command when it is unpickled by an unpickler that lets it."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def archive(content, compression=zipfile.ZIP_STORED, more=()):
    """A file as torch.save writes it, repacked."""
    buffer, out = io.BytesIO(), io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(out, "w", compression) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
        for name, data in more:
            target.writestr(name, data)
    return out.getvalue()


def bomb_in_archive():
    data, out = archive({"teacher": {}}), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, pickle.dumps(Bomb(), 2) if entry.filename.endswith("data.pkl")
                            else source.read(entry))
    return out.getvalue()


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def flipped():
    data = bytearray(saved(checkpoint()))
    data[data.find(np.float32(vit.VisionTransformer(CONFIG).norm.weight[0].item()).tobytes() * 8) + 2] ^= 1
    return bytes(data)


def with_nan(which="teacher"):
    state = checkpoint()
    state[which] = {key: value.clone() for key, value in state[which].items()}
    state[which]["norm.bias"][3] = math.nan
    return state


HOSTILE = {
    "empty": lambda: b"",
    "text": lambda: b"<html>404 Not Found</html>",
    "pickle bomb": lambda: pickle.dumps(Bomb()),
    "pickle bomb in a zip": bomb_in_archive,
    "foreign object": lambda: saved({"teacher": torch.nn.Linear(2, 2)}),
    "no dict": lambda: saved([1, 2, 3]),
    "truncated": lambda: saved(checkpoint())[:-2000],
    "flipped bit": flipped,
    "zip bomb": lambda: archive(checkpoint(), zipfile.ZIP_DEFLATED, [("archive/zeros", bytes(10**7))]),
    "compressed": lambda: archive({"teacher": {"x": torch.zeros(10**5)}}, zipfile.ZIP_DEFLATED),
    "weights of nothing": lambda: saved({"teacher": {}}),
    "numbers for weights": lambda: saved(checkpoint(teacher={key: 1 for key in checkpoint()["teacher"]})),
    "list for weights": lambda: saved(checkpoint(teacher=[1])),
    "endless depth": lambda: saved(checkpoint(config=dataclasses.asdict(CONFIG) | {"depth": 10**9})),
    "huge width": lambda: saved(checkpoint(config=dataclasses.asdict(CONFIG) | {"dim": 2 * 10**12})),
    "text for a width": lambda: saved(checkpoint(config=dataclasses.asdict(CONFIG) | {"dim": "32"})),
    "fractional width": lambda: saved(checkpoint(config=dataclasses.asdict(CONFIG) | {"dim": 32.0})),
    "unknown field": lambda: saved(checkpoint(config=dataclasses.asdict(CONFIG) | {"gates": 3})),
    "config of a list": lambda: saved(checkpoint(config=[1])),
    "not finite": lambda: saved(with_nan()),
    "only a student": lambda: saved({key: value for key, value in checkpoint().items() if key != "teacher"}),
}
READERS = ["probe_linear.py --knn --weights {}", "probe_seg.py --weights {}", "probe_depth.py --weights {}",
           "pib.py --weights {}", "paper.figures pca --data shapes --weights {}",
           "paper.figures attention --data shapes --weights {}"]


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_weights_are_named_and_never_run(kind, capsys):
    Path("bad.pt").write_bytes(HOSTILE[kind]())
    for reader in READERS:
        refused(reader.format("bad.pt"), 1, r"^bad\.pt: ", capsys)
    refused("probe_linear.py --knn --weights random --like bad.pt", 1, r"^bad\.pt: ", capsys)
    assert not Path("executed").exists()


@pytest.mark.parametrize("kind", [*HOSTILE, "of a probe", "foreign optimizer", "not finite in the student"])
def test_hostile_checkpoint_is_not_resumed(kind, capsys):
    content = HOSTILE.get(kind) or {
        "of a probe": lambda: saved(dict(iteration=3, stamp={}, heads={}, optimizer={})),
        "foreign optimizer": lambda: foreign(
            lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.ones(3))),
        "not finite in the student": lambda: foreign(lambda state: state["student"]["norm.bias"].fill_(math.inf)),
    }[kind]
    data = content()
    Path("run").mkdir(exist_ok=True)
    Path("run/checkpoint.pt").write_bytes(data)
    refused(f"train.py {SIZES} --length 8 --out run", 1, r"^run/checkpoint\.pt: cannot be resumed: .*--out", capsys)
    assert Path("run/checkpoint.pt").read_bytes() == data and not Path("executed").exists()


def foreign(change):
    """A checkpoint of a run one step before its end, changed."""
    import train
    train.main([*SIZES.split(), "--length", "8", "--out", "made"])
    state = torch.load("made/checkpoint.pt", weights_only=True)
    change(state)
    state["step"] = 1
    state["args"]["out"] = "run"
    return saved(state)


@pytest.mark.parametrize("kind", ["text", "pickle bomb", "truncated", "weights of nothing"])
@pytest.mark.parametrize("probe", ["linear", "seg", "depth"])
def test_hostile_heads_are_not_resumed(probe, kind, capsys):
    Path("W.x.head.pt").write_bytes(HOSTILE[kind]())
    refused(f"probe_{probe}.py --weights W.pt --out W.x.json --iters 1 --batch-size 2", 1,
            r"^W\.x\.head\.pt: .*remove it", capsys)
    assert not Path("executed").exists()


# ---- flags: (command, what the line must say); exit status 2

# What each script's own tests try is not tried again here.
NEGATIVE = r"must (not be negative|be positive|be at least)"
PROBES = "probe_linear.py", "probe_seg.py", "probe_depth.py"
PCA = "paper.figures pca --data shapes --weights W.pt"
USAGE = [
    # train.py
    *((f"train.py --{flag} -1", NEGATIVE) for flag in "local-size local-crops save-steps freeze-last-layer".split()),
    *((f"train.py --{flag} 0", NEGATIVE) for flag in "lr image-size out-dim log-every dim heads".split()),
    ("train.py --lr many", "invalid"), ("train.py --lr inf", "finite"), ("train.py --clip-grad inf", "below"),
    ("train.py --epochs 1e3", "invalid int"), ("train.py --no-fused", "--attn entmax15"),
    # what probes and pictures share
    *((f"{script} --weights W.pt --seed {2**63}", "below 2\\^63") for script in (*PROBES, "pib.py")),
    *((f"{script} --weights W.pt --{flag} -1", "must be at least 0")
      for script in (*PROBES, "pib.py") for flag in ("workers", "seed")),
    *((f"{script} --weights W.pt --batch-size 0", "must be at least 1") for script in (*PROBES, "pib.py")),
    *((f"{script} --weights W.pt --{flag}", "must be at least")
      for script in PROBES for flag in ("iters 0", "log-every -1")),
    *((script, "required: --weights") for script in (*PROBES, "pib.py")),
    *((f"{script} --weights W.pt --data mnist", "invalid choice") for script in (*PROBES, "pib.py")),
    *((f"{script} --weights W.pt --data {data}", "needs --root")
      for script, data in zip((*PROBES, "pib.py"), ("folder", "voc", "nyu", "folder"), strict=True)),
    (f"{PCA} --seed {2**63}", "below 2\\^63"), (f"{PCA} --seed -1", "at least 0"),
    # the rest
    (f"train.py --seed {2**63}", "below 2\\^63"),
    ("probe_seg.py --weights W.pt --blocks first", "must be all, or whole numbers"),
    ("probe_seg.py --weights W.pt --data voc --root X --crop 0", "must be at least 1"),
    ("pib.py --weights W.pt --max-area 0", "--max-area"), ("pib.py --weights W.pt --max-area nan", "--max-area"),
    ("paper.figures movie", "invalid choice"), ("paper.figures curves", "required"), ("paper.bench", "required"),
    ("paper.table1 --jsn", "unrecognized"),
]


@pytest.mark.parametrize("command, message", USAGE, ids=lambda value: value if value.startswith(tuple("tpfb")) else "")
def test_usage(command, message, capsys):
    refused(command, 2, message, capsys)


# ---- data: (what to make, command, what the line must say); exit status 1

def loop():
    draw("loop/a", 3)
    Path("loop/a/again").symlink_to(Path("loop").absolute())


def classes(*counts, root="data", size=(40, 30)):
    """A class folder with so many pictures for each count, the same in train/ and val/."""
    for split in ("train", "val"):
        for i, count in enumerate(counts):
            draw(f"{root}/{split}/class{i}", count, size)


def texts(folder="texts", name="{}.jpg"):
    Path(folder).mkdir(parents=True)
    for i in range(8):
        Path(folder, name.format(i)).write_text("no picture")


def boxes(folder="boxes", stems=("00", "01"), text=None):
    Path(folder).mkdir(parents=True)
    for stem in stems:
        Path(folder, f"{stem}.xml").write_text(text or (
            "<annotation><size><width>40</width><height>30</height></size><object><bndbox><xmin>5</xmin><ymin>5</ymin>"
            "<xmax>20</xmax><ymax>15</ymax></bndbox></object></annotation>"))


def voc(pictures=2, labels=None, mask_size=(40, 30)):
    base = Path("data/VOCdevkit/VOC2012")
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / name).mkdir(parents=True)
    for i in range(2 * pictures):
        Image.effect_noise((40, 30), 60).convert("RGB").save(base / f"JPEGImages/{i}.jpg")
        mask = np.full(mask_size[::-1], labels or i % 3, np.uint8)
        Image.fromarray(mask).save(base / f"SegmentationClass/{i}.png")
    for split, first in (("train", 0), ("val", pictures)):
        names = "".join(f"{i}\n" for i in range(first, first + pictures))
        (base / f"ImageSets/Segmentation/{split}.txt").write_text(names)


def below_a_file():
    Path("file").write_text("")


KNN = "probe_linear.py --knn --weights W.pt --workers 0"
SEG = "probe_seg.py --weights W.pt --iters 1 --batch-size 2 --workers 0"
VOC = f"{SEG} --data voc --root data --allow-partial --crop 32 --short-side 32"
DEPTH = "probe_depth.py --weights W.pt --iters 1 --batch-size 2 --workers 0"
PIB = "pib.py --weights W.pt --data folder --workers 0"
DATA = [
    # nowhere, nothing, a file where a folder should be
    *((None, f"{command} nowhere", "(?i)nowhere.*no such") for command in (
        f"train.py {SIZES} --data", f"{KNN} --data folder --root", f"{SEG} --data voc --root",
        f"{SEG} --data ade20k --root", f"{SEG} --data cityscapes --root", f"{DEPTH} --data nyu --root",
        f"{DEPTH} --data kitti --root", f"{DEPTH} --data sunrgbd --train-on sunrgbd --root", f"{PIB} --root",
        "paper.table1", "paper.figures curves --runs", "paper.figures heatmap --results", "paper.bench data --data")),
    *((lambda: Path("void").mkdir(), f"{command} void", "void") for command in (
        f"train.py {SIZES} --data", f"{KNN} --data folder --root", f"{SEG} --data voc --root",
        f"{SEG} --data ade20k --root", f"{SEG} --data cityscapes --root", f"{DEPTH} --data nyu --root",
        f"{DEPTH} --data kitti --root", f"{DEPTH} --data sunrgbd --train-on sunrgbd --root", f"{PIB} --root",
        "paper.table1", "paper.figures curves --runs", "paper.figures heatmap --results", "paper.bench data --data",
        "probe_linear.py --weights", "probe_seg.py --weights", "probe_depth.py --weights", "pib.py --weights",
        "paper.figures pca --data shapes --weights")),
    *((None, f"{command} pictures/00.png", "00.png") for command in (
        f"train.py {SIZES} --data", f"{KNN} --data folder --root", f"{SEG} --data voc --root",
        f"{DEPTH} --data nyu --root", f"{PIB} --root", "paper.table1", "paper.figures heatmap --results",
        "paper.figures curves --runs")),
    # train.py
    (None, f"train.py {SIZES} --data pictures --batch-size 16", "pictures: 8 images, fewer than --batch-size 16"),
    (texts, f"train.py {SIZES} --data texts", "texts/.*unreadable"),
    (below_a_file, f"train.py {SIZES} --length 8 --out file/run", "^file/run: .*another --out"),
    (None, f"train.py {SIZES} --length 3", "3 images, fewer than --batch-size 4"),
    # the linear probe
    (lambda: classes(4), f"{KNN} --data folder --root data", "data.*one class"),
    (lambda: [classes(4, 4), draw("data/val/class2", 2)], f"{KNN} --data folder --root data", "class2 not in both"),
    (lambda: [classes(2, 2), Path("data/val/class0/x.jpg").write_text("no picture")],
     f"{KNN} --data folder --root data", r"class0/x\.jpg: unreadable"),
    (lambda: [classes(2, 2), Path("data/train/class0/again").symlink_to(Path("data/train").absolute())],
     f"{KNN} --data folder --root data", "again/class0: is data/train/class0 again, through a link"),
    (lambda: classes(0, 2), f"{KNN} --data folder --root data", "class0"),
    (lambda: classes(2, 2), f"{KNN} --data imagenet --root data", "4 images of 1,281,167; .*--allow-partial"),
    # the dense probes
    (voc, f"{SEG} --data voc --root data", "2 train images of 1,464; .*--allow-partial"),
    (lambda: voc(labels=77), VOC, "holds label 77"), (lambda: voc(mask_size=(30, 40)), VOC, "must be equal"),
    (lambda: [voc(), Path("data/VOCdevkit/VOC2012/JPEGImages/0.jpg").write_text("no picture")], VOC, "0.jpg: unread"),
    (lambda: [voc(), Path("data/VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_bytes(b"caf\xe9\n\xff\xfe")],
     VOC, "val.txt: line 1: caf"),
    (None, f"{SEG} --blocks 7", "block 7 does not exist"),
    (below_a_file, f"{SEG} --out file/x.json", "file"), (below_a_file, f"{DEPTH} --out file/x.json", "file"),
    (below_a_file, f"{KNN} --out file/x.json", "file"),
    (below_a_file, "probe_linear.py --weights W.pt --iters 1 --out file/x.json", "file"),
    # pib.py
    (boxes, f"{PIB} --root pictures --boxes boxes --max-area 0.01", "pictures: no image is left; raise --max-area"),
    (lambda: boxes(stems=("97",)), f"{PIB} --root pictures --boxes boxes", "none is named like"),
    (lambda: boxes(text="<annotation>"), f"{PIB} --root pictures --boxes boxes", r"0[01]\.xml: no VOC-style boxes"),
    (lambda: boxes(text='<!DOCTYPE a [<!ENTITY b "x"><!ENTITY c "' + "&b;" * 50 + '">]><annotation>&c;</annotation>'),
     f"{PIB} --root pictures --boxes boxes", r"0[01]\.xml: no VOC-style boxes"),
    (lambda: [boxes(), Path("pictures/00.png").write_text("no picture")], f"{PIB} --root pictures --boxes boxes",
     "00.png: unreadable"),
    (lambda: [boxes(), draw("pictures/more", 1)], f"{PIB} --root pictures --boxes boxes", "two files of one name"),
    (below_a_file, "pib.py --weights W.pt --out file/x.json", "file"),
    # paper.figures and paper.table1
    (texts, "paper.figures pca --weights W.pt --images texts/0.jpg", "texts/0.jpg: unreadable"),
    (None, "paper.figures pca --weights W.pt --images nowhere.png", "nowhere.png: unreadable"),
    (None, "paper.figures attention --weights W.pt --data shapes --block 9", "block 9 does not exist"),
    (below_a_file, "paper.figures pca --weights W.pt --data shapes --count 1 --out file/x.png", "file"),
    *((lambda text=text: Path("x.linear.shapes.json").write_text(text), f"{command} x.linear.shapes.json",
       r"x\.linear\.shapes\.json") for text in ("", "{", "[]", "{}", '{"probe": "linear"}', "null", "\x00")
      for command in ("paper.table1", "paper.figures heatmap --results")),
    (lambda: [Path("r").mkdir(), Path("r/log.jsonl").write_text("text")], "paper.figures curves --runs r",
     "r/log.jsonl"),
    (lambda: [Path("r").mkdir(), Path("r/log.jsonl").write_text('{"args": 1}\n')],
     "paper.figures curves --runs r", "r"),
    # paper.bench
    (texts, f"paper.bench data {SIZES} --data texts --repeats 1", "texts/"),
    (below_a_file, "paper.bench operator --repeats 1 --out file/x.json", "file"),
]


@pytest.mark.parametrize("make, command, message", DATA, ids=[command[:90] for _, command, _ in DATA])
def test_data(make, command, message, capsys):
    if make:
        make()
    begun = ["runs", "runs/*", "runs/*/log.jsonl", "runs/*/checkpoint*.pt"]       # bad pictures show in the first epoch
    refused(command, 1, message, capsys, may_leave=begun if command.endswith("--data texts") else ())


def test_odd_data_that_is_no_error(capsys):
    """Symlink loops, names that are no UTF-8, pictures smaller than a patch work, and every picture counts once."""
    loop()
    assert run(f"train.py {SIZES} --data loop/a --batch-size 3 --out looped", capsys) == (0, "")
    assert torch.load("looped/checkpoint.pt", weights_only=True)["args"]["images"] == 3
    draw(f"odd/train/{NEW}0", 2, (3, 2)), draw(f"odd/train/{NEW}1", 2, (3, 2))
    draw(f"odd/val/{NEW}0", 1, (3, 2)), draw(f"odd/val/{NEW}1", 1, (3, 2))
    os.rename("W.pt", f"{NEW}.pt")
    for command in (f"train.py {SIZES} --data odd --out odd_run",
                    f"probe_linear.py --weights {NEW}.pt --data folder --root odd --iters 1 --batch-size 2 --workers 0 "
                    "--save-images 2",
                    f"pib.py --weights {NEW}.pt", f"probe_seg.py --weights {NEW}.pt --iters 1 --batch-size 2",
                    f"probe_depth.py --weights {NEW}.pt --iters 1 --batch-size 2",
                    f"paper.figures pca --weights {NEW}.pt --images odd/val/{NEW}0/00.png",
                    f"paper.figures attention --weights {NEW}.pt --images odd/val/{NEW}0/00.png"):
        assert run(command, capsys) == (0, ""), command
    results = sorted(Path(".").glob("*.json"))
    assert len(results) == 5 and all(json.loads(path.read_text())["weights"] == f"{NEW}.pt" for path in results)
    assert run("paper.table1 . --out table.md", capsys) == (0, "") and Path("table.md").exists()


# ---- in processes of their own

REAL = [
    ("train.py --data nowhere", 1, "nowhere: no such"),
    ("probe_linear.py --weights nowhere.pt", 1, "nowhere.pt: no such"),
    ("probe_seg.py --weights nowhere.pt", 1, "nowhere.pt: no such"), ("paper.table1 nowhere", 1, "nowhere: no such"),
    ("probe_depth.py --weights nowhere.pt", 1, "nowhere.pt: no such"),
    ("pib.py --weights nowhere.pt", 1, "nowhere.pt: no such"), ("paper.bench operator --repeats 0", 2, "--repeats 0"),
    ("paper.figures pca --data shapes --weights nowhere.pt", 1, "nowhere.pt: no such"),
]


def test_every_script_as_a_real_process():
    processes = []
    for command, _, _ in REAL:
        script, *argv = command.split()
        processes.append(subprocess.Popen([sys.executable, "-m", script.removesuffix(".py"), *argv], cwd=ROOT,
                                          text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    for process, (command, status, message) in zip(processes, REAL, strict=True):
        printed, complaint = process.communicate(timeout=600)           # only against hanging
        lines = complaint.strip().splitlines()
        assert process.returncode == status and message in lines[-1], f"{command}: {complaint}"
        assert "Traceback" not in complaint and printed == "" and (len(lines) == 1 or status == 2), command


# ---- numbers that would look right

def overflowing(amount):
    """Finite weights whose features are not."""
    state = checkpoint()
    state["teacher"] = {key: value.clone() for key, value in state["teacher"].items()}
    state["teacher"]["blocks.0.mlp.fc1.weight"][:] = amount           # too large a number for fp16, or its products are
    return state


@pytest.mark.parametrize("amount, amp", [(3e38, " --amp off"), (1e5, " --amp fp16")])
@pytest.mark.parametrize("command", [
    "probe_linear.py --knn --weights huge.pt", "probe_linear.py --iters 3 --batch-size 8 --weights huge.pt",
    "probe_seg.py --iters 3 --batch-size 8 --weights huge.pt",
    "probe_depth.py --iters 3 --batch-size 8 --weights huge.pt", "pib.py --weights huge.pt"])
def test_features_that_overflow_give_no_number(command, amount, amp, capsys):
    torch.save(overflowing(amount), "huge.pt")
    refused(command + amp, 1, r"^huge\.([a-z]+\.shapes\.head\.)?pt: .*not finite", capsys)


@pytest.mark.parametrize("command", ["pca", "attention"])
def test_features_that_overflow_give_no_picture(command, capsys):
    torch.save(overflowing(3e38), "huge.pt")
    refused(f"paper.figures {command} --data shapes --weights huge.pt", 1, r"^huge\.pt: .*not finite", capsys)


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_weights_of_the_other_network_are_not_taken_for_them(which, capsys):
    other = {"teacher": "student", "student": "teacher"}[which]
    torch.save({key: value for key, value in checkpoint().items() if key != which}, "half.pt")
    for reader in READERS:
        refused(reader.format("half.pt") + f" --which {which}", 1, f"^half.pt: holds no {which} weights", capsys)
    assert run(f"pib.py --weights half.pt --which {other}", capsys) == (0, "")


def test_result_beside_changed_weights_enters_no_table(capsys):
    assert run("probe_linear.py --knn --weights W.pt", capsys) == (0, "")
    assert run("paper.table1 .", capsys) == (0, "")
    torch.save(checkpoint(epoch=4), "W.pt")
    refused("paper.table1 .", 1, r"W\.pt", capsys)


# ---- what the sources never do

def test_sources_neither_evaluate_nor_download_nor_listen():
    """No eval or exec, no shell, no pickle, no unsafe torch.load, no network module, no torch.hub."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("paper/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.name}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                for name in names:
                    assert name.partition(".")[0] not in {
                        "pickle", "socket", "urllib", "http", "requests", "ftplib", "socketserver", "shelve", "marshal",
                        "dill", "joblib"}, where
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}, where
                assert not name.startswith(("torch.hub", "os.exec", "os.spawn")), where
                for keyword in node.keywords:
                    assert keyword.arg != "shell", where
                    assert keyword.arg != "weights_only" or ast.unparse(keyword.value) == "True", where
                if name in ("torch.load", "np.load", "numpy.load"):
                    assert any(keyword.arg == "weights_only" for keyword in node.keywords), where
                if name in ("subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_output"):
                    assert isinstance(node.args[0], ast.List), where          # no text for a shell to read
