"""reproduce.sh with stand-ins for python and torchrun that note what they are asked and leave the files behind that the
real scripts would; the real parsers then read every command."""

import itertools
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

import pib
import probe_depth
import probe_linear
import probe_seg
import train
from paper import figures, table1

SCRIPT = Path(__file__).parent.parent / "paper/reproduce.sh"
PARSERS = {"train.py": train, "pib.py": pib, "probe_linear.py": probe_linear, "probe_seg.py": probe_seg,
           "probe_depth.py": probe_depth, "paper.figures": figures, "paper.table1": table1}
STAND_IN = r"""#!/usr/bin/env bash
[[ $0 != *torchrun ]] || shift 2                                    # --nproc-per-node N
printf -v line '%s\t' "$@"
echo "$line" >> calls
[[ $1 != -m ]] || shift
script=$1
while shift; do case ${1-} in
  --out) out=$2 ;;
  --weights) while [[ ${2-} && ${2-} != -* ]]; do weights+=" $2"; shift; done ;;
  --data) data=$2 ;;
  "${BROKEN:-none}") echo "the cause of it"; exit 1 ;;
esac; done
if [[ ${SLOW-} ]]; then touch pid$$; exec sleep 600; fi
if [[ $script == train.py && ! -e $out ]]; then
  mkdir -p $out
  touch $out/checkpoint_00{00,04,08,12,16,20,24}.pt
elif [[ ${out-} ]]; then
  touch $out
elif [[ ${weights-} ]]; then
  probe=${script#probe_}
  for path in $weights; do [[ -f $path ]] || weights="$path/checkpoint_????.pt"; done
  for path in $weights; do touch ${path%.pt}.${probe%.py}.$data.json; done
fi
"""


def heeds_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)                    # what runs in the background of a shell ignores it


@pytest.fixture
def reproduce(tmp_path):
    """Runs it in a folder of its own; returns (exit code, commands, what it printed)."""
    for name in ("python", "torchrun"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / SCRIPT.name).write_bytes(SCRIPT.read_bytes())

    def run(background=False, **variables):
        (tmp_path / "calls").unlink(missing_ok=True)
        read = "IMAGENET", "VOC", "METHODS", "SEEDS", "LONG", "JOBS"
        clean = {name: value for name, value in os.environ.items() if name not in read}
        process = subprocess.Popen(
            ["bash", f"paper/{SCRIPT.name}"], cwd=tmp_path, preexec_fn=heeds_interrupts, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=clean | variables | dict(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}"))
        if background:
            return process
        said = process.communicate(timeout=600)[0]
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return process.returncode, [line.removeprefix("-m\t").split("\t")[:-1] for line in calls], said
    return run


def names(calls):
    return [argv[0] for argv in calls]


def parse(calls, folder, monkeypatch):
    """[(script, what its parser makes of the command)]; a flag or value that it does not know is a SystemExit."""
    monkeypatch.chdir(folder)
    parsed = []
    for script, *argv in calls:
        for flag in ("--results", "--minus"):                           # must be there; of one method
            if flag in argv:
                files = [Path(name) for name in itertools.takewhile(lambda x: x[0] != "-", argv[argv.index(flag) + 1:])]
                assert len(files) > 1 and all(f.exists() for f in files)
                assert len({f.parent.name.rpartition("_s")[0] for f in files}) == 1
        parsed.append((script, PARSERS[script].parse_args(argv)))
    return parsed


METHODS = {"softmax": ("softmax", 0, False), "softmax_r4": ("softmax", 4, False), "softmax_spec": ("softmax", 0, True),
           "entmax15": ("entmax15", 0, False)}


def test_the_embedded_data_set(reproduce, tmp_path, monkeypatch):
    """Four methods, five seeds, every probe, controls, Fig. 2, long runs, pictures, table, in flags that exist."""
    code, calls, said = reproduce(JOBS="2")
    assert code == 0, said
    assert {name: names(calls).count(name) for name in PARSERS} == {
        "train.py": 20 + 4, "probe_linear.py": 20 + 4 + 4, "probe_depth.py": 20 + 4, "probe_seg.py": 20 + 4,
        "pib.py": 20 + 4, "paper.figures": 3 + 4 * 3 + 3 + 3 * 2 + 2 * 3 + 2, "paper.table1": 1}
    parsed = parse(calls, tmp_path, monkeypatch)
    trained = {args.out: args for script, args in parsed if script == "train.py"}
    short = {f"runs/shapes_{method}_s{seed}": (*METHODS[method], seed, 24) for seed in range(5) for method in METHODS}
    long = {f"long/shapes_{method}_s{seed}": (*METHODS[method], seed, 120) for seed in range(2)
            for method in ("softmax", "entmax15")}
    assert {out: (a.attn, a.registers, a.specialize, a.seed, a.epochs) for out, a in trained.items()} == short | long
    for out in short:                                               # the folders are those without --out
        assert train.parse_args([*train_flags(trained[out]), "--seed", str(trained[out].seed)]).out == out
    for script in ("probe_linear.py", "probe_depth.py"):
        last = [args.weights for name, args in parsed if name == script and not getattr(args, "knn", False)]
        assert sorted(last) == sorted([f"{out}/checkpoint_{epoch}.pt"] for out in short for epoch in ("0000", "0024")
                                      if epoch == "0024" or "_s0" in out)
    for script in ("probe_seg.py", "pib.py"):                       # untrained, half, whole
        assert sorted(args.weights for name, args in parsed if name == script) == sorted(
            [f"{out}/checkpoint_{epoch:04d}.pt" for epoch in range(0, 25, 4 if out in long else 12)]
            for out in [*short, *long])
    assert sum(name == "probe_linear.py" and args.knn and len(args.weights) == 7 for name, args in parsed) == len(long)
    for name, a in parsed:                                          # the heads of a run are drawn from its seed
        if name in ("probe_linear.py", "probe_seg.py", "probe_depth.py") and not getattr(a, "knn", False):
            assert f"_s{a.seed}/" in a.weights[0]
    assert all(a.blocks is None and a.concat_cls == "both" for name, a in parsed if name == "probe_seg.py")
    differences = [a for name, a in parsed if name == "paper.figures" and getattr(a, "minus", None)]
    assert len(differences) == 3 + 3 + 2
    for a in differences:
        assert sorted(a.minus) == sorted(name.replace("entmax15", "softmax") for name in a.results)
    table = parsed[-1][1]
    assert sorted(table.results) == sorted(short) and table.out == "paper/results/table1.md"


def train_flags(args):
    return ["--attn", args.attn, "--registers", str(args.registers), *["--specialize"] * args.specialize]


def test_the_long_runs_may_be_left_out(reproduce):
    code, calls, said = reproduce(JOBS="2", LONG="", SEEDS="3", METHODS="softmax entmax15")
    assert code == 0 and names(calls).count("train.py") == 2 and "long" not in str(calls), said


def test_what_is_finished_the_probes_decide(reproduce):
    """No result is passed over by its age: its flags or its data may be others. The logs of both times are kept."""
    few = dict(METHODS="softmax", SEEDS="0", LONG="", JOBS="1")
    _, first, _ = reproduce(**few)
    assert names(first).count("probe_linear.py") == 2
    _, second, _ = reproduce(**few, PROBE_FLAGS="--seeds 3")
    heads = ("probe_linear.py", "probe_seg.py", "probe_depth.py")
    assert second == [argv + ["--seeds", "3"] * (argv[0] in heads) for argv in first]


def test_a_run_of_more_than_9999_epochs(reproduce, tmp_path):
    """Its last checkpoint is the one of most epochs, which is not the last by name; heads beside it are none."""
    run = tmp_path / "runs/shapes_softmax_s0"
    run.mkdir(parents=True)
    for name in "0000.pt 9999.pt 10000.pt 20000.pt 20000.seg.shapes.head.pt 9999.linear.shapes.head.pt".split():
        (run / f"checkpoint_{name}").touch()
    code, calls, said = reproduce(METHODS="softmax", SEEDS="0", LONG="", JOBS="1")
    weights = {argv[0]: [name[-8:] for name in argv if name.endswith(".pt")] for argv in reversed(calls)}
    assert code == 0 and weights["probe_linear.py"] == ["20000.pt"], said
    assert weights["probe_seg.py"] == ["_0000.pt", "20000.pt"]      # every third, from the last on


def test_a_failure_stops_the_others_and_shows_its_log(reproduce, tmp_path):
    code, calls, said = reproduce(JOBS="3", LONG="", METHODS="softmax entmax15", BROKEN="entmax15")
    assert code == 1 and "the cause of it" in said and "runs/shapes_entmax15_s0.log" in said
    assert set(names(calls)) == {"train.py"} and not (tmp_path / "results").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_the_jobs(reproduce, tmp_path, number):
    process = reproduce(background=True, JOBS="2", SLOW="1")
    while len(pids := [int(path.name[3:]) for path in tmp_path.glob("pid*")]) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate(timeout=300)[0]                      # well before the jobs end by themselves
    assert process.returncode != 0 and "failed" not in said
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_papers_protocol(reproduce, tmp_path, monkeypatch):
    """With spaces in a root; the flags of users come last."""
    for i in range(5):
        (tmp_path / f"ImageNet 1k/val/n{i}").mkdir(parents=True)
        (tmp_path / f"ImageNet 1k/val/n{i}/{i}.JPEG").touch()
    roots = {name: str(tmp_path / name.lower()) for name in "VOC ADE20K CITYSCAPES NYU SUNRGBD KITTI BOXES".split()}
    code, calls, said = reproduce(IMAGENET=str(tmp_path / "ImageNet 1k"), GPUS="8", PROBE_FLAGS="--seeds 3",
                                  TRAIN_FLAGS="--epochs 100", METHODS="softmax entmax15", **roots)
    assert code == 0, said
    assert "torchrun --nproc-per-node 8 train.py" in said
    parsed = parse(calls, tmp_path, monkeypatch)
    assert [(a.arch or "small", a.epochs, a.attn, a.seed) for name, a in parsed if name == "train.py"] == [
        ("small", 100, "softmax", 0), ("small", 100, "entmax15", 0)]
    probes = [(args.data, args.root, args.seeds) for script, args in parsed if "probe" in script][:7]
    assert probes == [("imagenet", str(tmp_path / "ImageNet 1k"), 3), *(
        (name, roots[name.upper()], 3) for name in ("voc", "ade20k", "cityscapes", "nyu", "sunrgbd", "kitti"))]
    assert names(calls).count("probe_seg.py") == 2 * 3 + 2 * 7      # and no untrained controls
    boxes = [args for script, args in parsed if script == "pib.py"]
    assert [(b.root, b.boxes) for b in boxes] == [(str(tmp_path / "ImageNet 1k/val"), roots["BOXES"])] * 2


def test_real_data_need_imagenet(reproduce):
    code, calls, said = reproduce(VOC="/voc")
    assert code == 2 and not calls and "IMAGENET is not set" in said
