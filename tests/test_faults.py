"""What must survive: kills, full disks, damaged files, lost processes. Slow; FAULTS=20 tries twenty times as often.

Runs are children of a server that has imported torch already, so that one starts in a tenth of a second.
"""
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import checkpoint as disk
import train

pytestmark = pytest.mark.slow
MANY = int(os.environ.get("FAULTS", 1))
ROOT = Path(train.__file__).parent
SIZES = ("--dim 32 --depth 2 --heads 2 --patch-size 8 --image-size 32 --local-size 16 --out-dim 64 --hidden-dim 32 "
         "--bottleneck-dim 16 --batch-size 8").split()
# 3 epochs of 16 steps, every option on; checkpoint.pt falls in the middle of epochs
RUN = [*SIZES, *"--attn entmax15 --registers 2 --specialize --drop-path 0.1 --length 128 --epochs 3 --warmup-epochs 1 "
                "--log-every 1 --save-every 1 --save-steps 5".split()]
TRAINED = ("student", "teacher", "student_head", "teacher_head", "center", "step", "epoch")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train", "probe_linear"])


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def counts():
    """{what: number}, printed at the end: what README's table holds."""
    counts = {}
    yield counts
    print("\n" + "\n".join(f"{what}: {number}" for what, number in counts.items()))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A child computes with one thread, and so must what it is compared with."""
    before, os.environ["OMP_NUM_THREADS"] = torch.get_num_threads(), "1"
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(folder, seconds) of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert Child(folder / "first").status() == 0                      # the server starts with it, in seconds
    start = time.perf_counter()
    assert Child(folder / "run").status() == 0
    assert_as_uninterrupted(folder / "run", folder / "first")
    return folder / "run", time.perf_counter() - start


def body(argv, fault, output):
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    torch.set_num_threads(1)
    if fault:
        fault[0](*fault[1:])
    train.main(argv)


class Child:
    """A training in a process of its own, with the fault (function, arguments) planted in it first."""

    def __init__(self, out, fault=None, flags=()):
        self.output = Path(f"{out}.txt")
        argv = [*RUN, "--out", str(out), *flags]
        self.process = CONTEXT.Process(target=body, args=(argv, fault, str(self.output)))
        self.process.start()

    def status(self, timeout=120):
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"hangs: {self.output.read_text()}"
        return self.process.exitcode

    def text(self):
        return self.output.read_text()


def load(path):
    return torch.load(path, weights_only=True)


def leaves(tree, path=""):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if items is None:
        yield path, tree
    else:
        for key, value in items:
            yield from leaves(value, f"{path}.{key}")


def equal(a, b, keys=(*TRAINED, "optimizer")):
    a, b = (dict(leaves({key: state[key] for key in keys})) for state in (a, b))
    return a.keys() == b.keys() and all(torch.equal(x, b[k]) if torch.is_tensor(x) else x == b[k] for k, x in a.items())


def assert_intact(out):
    """Every checkpoint there is loads, and is whole."""
    for path in out.glob("checkpoint*.pt"):
        state = disk.read_checkpoint(path)
        disk.load_backbone(path)
        assert set(TRAINED) < state.keys(), path


def assert_as_uninterrupted(out, reference):
    assert equal(load(out / "checkpoint.pt"), load(reference / "checkpoint.pt"))
    for epoch in range(4):
        name = f"checkpoint_{epoch:04d}.pt"
        assert equal(load(out / name), load(reference / name), TRAINED), name
    steps = [[(r["step"], r["loss"]) for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
              if "step" in r] for folder in (out, reference)]
    assert steps[0] == steps[1] and [step for step, _ in steps[0]] == list(range(1, 49))


# ---- kills

def die_in_write(number, place, share):
    """SIGKILL in the number-th write of a checkpoint: in the middle of it, before it is synced, renamed, or after."""
    left, save, sync, rename = [number], torch.save, os.fsync, os.replace

    def killed(here):
        if here == place and left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_save(content, file):
        left[0] -= 1
        start = file.tell()
        save(content, file)
        if place == "write" and left[0] <= 0:
            file.flush()
            os.ftruncate(file.fileno(), start + int(share * (file.tell() - start)))
            killed("write")

    def dying_sync(descriptor):
        killed("sync")
        sync(descriptor)

    def dying_rename(old, new):
        killed("rename")
        rename(old, new)
        killed("after")
    torch.save, os.fsync, os.replace = dying_save, dying_sync, dying_rename


def test_killed_at_any_moment_nothing_is_lost(uninterrupted, counts):
    """Runs that are killed by the clock, over and over, until they end: then they are bit-equal to one never killed."""
    (reference, seconds), draw = uninterrupted, random.Random(0)
    kills = resumes = 0
    for i in range(3 * MANY):
        out, status, before = Path(f"run{i}"), None, -1
        while status != 0:
            child = Child(out)
            if draw.random() < 0.8:
                time.sleep(draw.uniform(0, 1.1 * seconds))
                child.process.kill()
            status = child.status()
            assert status in (0, -signal.SIGKILL), child.text()
            kills += status != 0
            assert_intact(out)
            if (out / "checkpoint.pt").exists():
                step = load(out / "checkpoint.pt")["step"]
                resumes += status != 0
                assert step >= before                               # never a step back behind what was saved
                before = step
        assert_as_uninterrupted(out, reference)
    counts["SIGKILL at random moments: kills"], counts["  of which resumed"] = kills, resumes
    assert kills > 0


def test_killed_while_writing_a_checkpoint_nothing_is_lost(uninterrupted, counts):
    reference, draw, kills = uninterrupted[0], random.Random(1), 0
    for i in range(3 * MANY):
        for place in ("write", "sync", "rename", "after"):
            out, number = Path(f"run{i}_{place}"), draw.randint(1, 14)
            child = Child(out, (die_in_write, number, place, draw.random()))
            assert child.status() == -signal.SIGKILL, child.text()
            kills += 1
            assert_intact(out)
            assert number == 1 or (out / "checkpoint_0000.pt").exists()
            assert Child(out).status() == 0
            assert_as_uninterrupted(out, reference)
    counts["SIGKILL inside a checkpoint's write: kills"] = kills


def test_stopped_by_sigterm_and_ctrl_c(uninterrupted, counts):
    """A run that is asked to end saves first, says so and exits with 128 + the signal; again and again, if need be."""
    (reference, seconds), draw, stops = uninterrupted, random.Random(2), {signal.SIGTERM: 0, signal.SIGINT: 0}
    for i in range(2 * MANY):
        for number in stops:
            out, status = Path(f"run{i}_{number.name}"), None
            while status != 0:
                child, log = Child(out), out / "log.jsonl"
                lines = log.read_bytes().count(b"\n") if log.exists() else 0
                while child.process.is_alive() and not (log.exists() and log.read_bytes().count(b"\n") > lines + 1):
                    time.sleep(0.002)                                 # until it trains
                time.sleep(draw.uniform(0, 0.5) * seconds)
                child.process.is_alive() and os.kill(child.process.pid, number)
                status = child.status()
                if status == -number:                                 # it had ended, and given the signal back
                    assert load(out / "checkpoint.pt")["step"] == 48
                    continue
                assert status in (0, 128 + number), child.text()
                if status:
                    stops[number] += 1
                    step = load(out / "checkpoint.pt")["step"]
                    assert f"stopped by signal {int(number)} after step {step}, saved" in child.text()
                    assert "Traceback" not in child.text()
                assert_intact(out)
            assert_as_uninterrupted(out, reference)
    assert min(stops.values()) > 0
    counts["SIGTERM and Ctrl-C: stops"] = sum(stops.values())


# ---- disks

def full_disk(number, share):
    """ENOSPC after a share of the number-th write of a checkpoint."""
    left, save = [number], torch.save

    def failing_save(content, file):
        left[0] -= 1
        save(content, file)
        if left[0] <= 0:
            file.flush()
            os.ftruncate(file.fileno(), int(share * file.tell()))
            raise OSError(28, "No space left on device")
    torch.save = failing_save


def small_files(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def assert_stopped_cleanly(out, child, status):
    text = child.text()
    assert status == 1, text
    last = text.strip().splitlines()[-1]
    assert "not written" in last and str(out) in last and "make room and run the same command again" in last
    assert "Traceback" not in text and not list(out.glob("*.tmp"))
    assert_intact(out)


def test_disk_that_fills_up_while_saving(uninterrupted, counts):
    reference, draw, tries = uninterrupted[0], random.Random(3), 4 * MANY
    for i in range(tries):
        out = Path(f"run{i}")
        child = Child(out, (full_disk, draw.randint(1, 14), draw.random()))
        assert_stopped_cleanly(out, child, child.status())
        assert Child(out).status() == 0
        assert_as_uninterrupted(out, reference)
    counts["disk full while saving (ENOSPC)"] = tries


def test_files_that_may_not_grow(uninterrupted, counts):
    """RLIMIT_FSIZE, as a quota works: numbered checkpoints fit, the complete one, which is larger, does not."""
    reference, _ = uninterrupted
    small, large = ((reference / name).stat().st_size for name in ("checkpoint_0001.pt", "checkpoint.pt"))
    for limit in (small // 2, (small + large) // 2):
        out = Path(f"limit{limit}")
        child = Child(out, (small_files, limit))
        assert_stopped_cleanly(out, child, child.status())
        assert Child(out).status() == 0
        assert_as_uninterrupted(out, reference)
    counts["file size limit (RLIMIT_FSIZE)"] = 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    child = Child(tmp_path / "closed/run")
    assert child.status() == 1 and "Permission denied" in child.text() and "Traceback" not in child.text()


# ---- damaged checkpoints

def test_truncated_and_flipped_checkpoints_are_refused_or_whole(uninterrupted, tmp_path, counts):
    """A damaged file is refused by its name with a way out, or, where the damage hit a byte that means nothing, read
    as it was. Never is it read as something else."""
    reference, draw, refused, harmless = uninterrupted[0], random.Random(4), 0, 0
    whole = (reference / "checkpoint.pt").read_bytes()
    expected, path = load(reference / "checkpoint.pt"), tmp_path / "checkpoint.pt"
    args = train.parse_args([*RUN, "--out", str(tmp_path)])
    args.images, args.fingerprint = 128, expected["args"]["fingerprint"]
    tries = 100 * MANY
    for i in range(tries):
        data = bytearray(whole)
        if i % 2:
            data = data[:draw.randrange(len(data))]
        else:
            # every other flip at either end: the pickle, the names and the directory are a small part of the file
            ends = draw.randrange(20_000), -1 - draw.randrange(9000)
            at = draw.randrange(len(data)) if i % 4 else draw.choice(ends)
            data[at] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            state, message = disk.resume_run(tmp_path, disk.plain(args))
        except ValueError as error:
            state, message = None, str(error)
        if message:                                                   # perhaps of another flag: the flip was in args
            assert message.count(str(path)) >= 1 and "\n" not in message.strip() and "--out" in message
            refused += 1
        else:
            assert equal(state, expected), f"try {i}: read as something else"
            harmless += 1
    counts["damaged checkpoints: refused"], counts["  read, the damage hit nothing"] = refused, harmless
    assert refused + harmless == tries and refused > 0.9 * tries


# ---- torchrun

def torchrun(processes, out, *flags, script="train.py", restarts=0):
    """(exit status, all that was printed)"""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes,
                "--max-restarts", restarts]
    done = subprocess.run(list(map(str, [*launcher, ROOT / script, *RUN, "--out", out, *flags])), text=True,
                          capture_output=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    return done.returncode, done.stdout + done.stderr


def faulty(source):
    """Path of a script that plants a fault and then trains."""
    path = Path("faulty.py").absolute()
    path.write_text(source)
    return path


# one process gets a signal, once
STRUCK = """
import os, signal, train
honest, struck = train.train_step, os.path.abspath("struck")
number = iter(range(99))
def step(run, *args, **kw):
    result = honest(run, *args, **kw)
    if next(number) == 21 and run.rank == {rank} and not os.path.exists(struck):
        open(struck, "w").close()
        os.kill(os.getpid(), signal.{signal})
    return result
train.train_step = step
train.main()
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_lost_process_is_restarted_and_the_run_completes(tmp_path, counts, rank):
    """Two processes, one dies in the middle: torchrun starts both again and they go on from the checkpoint."""
    script, what = faulty(STRUCK.format(rank=rank, signal="SIGKILL")), "torchrun: processes killed and restarted"
    status, text = torchrun(2, tmp_path / "never killed")
    assert status == 0, text
    for i in range(1 + MANY // 4):
        (tmp_path / "struck").unlink(missing_ok=True)
        status, text = torchrun(2, tmp_path / f"run{i}", script=script, restarts=1)
        assert status == 0, text
        assert (tmp_path / "struck").exists() and "going on from step 20" in text
        one, other = load(tmp_path / f"run{i}/checkpoint.pt"), load(tmp_path / "never killed/checkpoint.pt")
        assert one["step"] == 48 and equal(one, other)
        counts[what] = counts.get(what, 0) + 1


def test_a_second_run_of_several_processes_is_kept_out_in_one_line(tmp_path):
    first = Child(tmp_path / "run", flags=["--epochs", "400"])
    try:
        while not (tmp_path / "run/checkpoint_0001.pt").exists():
            assert first.process.is_alive(), first.text()
            time.sleep(0.01)
        os.kill(first.process.pid, signal.SIGSTOP)
        files = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        status, text = torchrun(2, tmp_path / "run", "--epochs", "400", restarts=1)
        assert status == 1 and text.count(f"{tmp_path / 'run'}: another process is writing there") == 2, text
        assert "RuntimeError" not in text                             # once in each life, and nothing else of ours
        assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == files
    finally:
        first.process.kill()
        first.process.join()


# Every two values of two options meet; the networks are large enough for several of DDP's buckets. Inductor draws
# random numbers of its own, unless it is told not to.
@pytest.mark.parametrize("processes, drop_path, accum, attn", [
    (1, "0", 1, "softmax"), (1, "0.5", 2, "entmax15"), (2, "0", 2, "entmax15"), (2, "0.5", 1, "entmax15"),
    (2, "0.5", 2, "softmax"),
])
def test_compiled_runs_are_the_plain_ones(tmp_path, processes, drop_path, accum, attn):
    flags = [*"--dim 128 --depth 3 --length 32 --epochs 1 --warmup-epochs 0 --lr 1e-3 --clip-grad 0".split(),
             "--drop-path", drop_path, "--accum", accum, "--attn", attn]
    script = faulty("import torch._inductor.config, train\ntorch._inductor.config.fallback_random = True\ntrain.main()")
    logs = []
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        status, text = torchrun(processes, tmp_path / name, *flags, *more, script=script)
        assert status == 0, text
        logs.append([json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()[1:]])
    for plain, compiled in zip(*logs, strict=True):
        exact = 1e-4 if plain["step"] == 1 else 2e-2                  # later, Adam has blown rounding up to weights
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=exact), plain["step"]
        assert compiled["grad_norm"] == pytest.approx(plain["grad_norm"], rel=10 * exact), plain["step"]


def test_another_number_of_processes_may_go_on(tmp_path, counts):
    """The batch is that of all processes, so a run may go on with more or fewer. Stochastic depth draws by process:
    without it the result is the same up to rounding."""
    flags, script = ["--drop-path", "0"], faulty(ASKED.format(after={0: 21, 1: 21}, patience=60, lost="raise"))
    assert Child(tmp_path / "whole", flags=flags).status() == 0
    whole = load(tmp_path / "whole/checkpoint.pt")
    status, text = torchrun(2, tmp_path / "run", *flags, script=script)
    assert status != 0 and load(tmp_path / "run/checkpoint.pt")["step"] == 22, text
    status, text = torchrun(4, tmp_path / "run", *flags)
    assert status == 0 and "going on from step 22" in text, text
    state = load(tmp_path / "run/checkpoint.pt")
    assert state["step"] == whole["step"] == 48
    torch.testing.assert_close(state["center"], whole["center"], rtol=1e-2, atol=1e-3)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("run", "whole")]
    losses = [{r["step"]: r["loss"] for r in log if "step" in r} for log in logs]
    for step, loss in losses[1].items():
        assert losses[0][step] == pytest.approx(loss, rel=1e-3), step
    counts["torchrun: resumed with another number of processes"] = 1


# clipping would hide a gradient that is wrong by a factor; a small lr keeps Adam from blowing rounding up to weights
EXACT = "--drop-path 0 --freeze-last-layer 0 --clip-grad 0 --lr 1e-3 --warmup-epochs 0 --epochs 1".split()


@pytest.mark.parametrize("processes, accum", [(2, 1), (4, 1), (4, 2), (1, 4)])
def test_any_split_of_the_batch_is_the_batch(tmp_path, counts, processes, accum):
    """Loss, centre and gradients (Adam's first moments are a linear function of them) of one process on the whole."""
    assert Child(tmp_path / "whole", flags=EXACT).status() == 0
    if processes == 1:
        assert Child(tmp_path / "split", flags=[*EXACT, "--accum", str(accum)]).status() == 0
    else:
        status, text = torchrun(processes, tmp_path / "split", *EXACT, "--accum", accum)
        assert status == 0, text
    whole, split = (load(tmp_path / name / "checkpoint.pt") for name in ("whole", "split"))
    torch.testing.assert_close(split["center"], whole["center"], rtol=1e-4, atol=1e-6)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()][1:]
            for name in ("split", "whole")]
    for ours, reference in zip(*logs, strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-3)
    moments = [[m["exp_avg"] for m in state["optimizer"]["state"].values()] for state in (split, whole)]
    for ours, reference in zip(*moments, strict=True):
        # the gradient of a key's bias is rounding alone: measured by the largest of all
        assert (ours - reference).norm() <= 1e-3 * reference.norm() + 1e-6
    counts["splits of the batch over processes"] = counts.get("splits of the batch over processes", 0) + 1


# ---- long runs

def long_run(folder, steps):
    """Train with nothing but the loop, and write memory, open files and time every 500 steps."""
    notes, clock = open(Path(folder, "notes"), "w"), [time.perf_counter()]
    honest = train.schedules

    def schedules(args, step, per_epoch):
        if step % 500 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            now = time.perf_counter()
            print(json.dumps(dict(step=step, mib=pages * resource.getpagesize() / 2**20, seconds=now - clock[0],
                                  files=len(os.listdir("/proc/self/fd")))), file=notes, flush=True)
            clock[0] = now
        return honest(args, step, per_epoch)
    train.schedules = schedules


def test_memory_files_log_and_speed_stay_what_they_are(tmp_path, counts):
    epochs = 150 * MANY + 50                                          # of 20 steps
    child = Child(tmp_path / "run", (long_run, str(tmp_path), epochs * 20), ["--length", "160", "--epochs", str(epochs),
                  "--log-every", "10", "--save-every", "100000", "--save-steps", "200", "--out-dim", "32"])
    assert child.status(timeout=3600) == 0, child.text()
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    warm, last = notes[2], notes[-1]                                  # a thousand steps in, and the end
    assert last["mib"] - warm["mib"] < 8, notes
    assert last["files"] <= warm["files"], notes
    first_thousand = notes[3]["seconds"] + notes[4]["seconds"]
    last_thousand = notes[-1]["seconds"] + notes[-2]["seconds"]
    assert last_thousand < 1.25 * first_thousand, notes
    log = (tmp_path / "run/log.jsonl").read_text().splitlines()
    lines = [len(line) for line in log[1:]]
    assert max(lines) < 700 and len(lines) <= epochs * 20 / 10 + 3
    counts["long run: steps"] = epochs * 20
    counts["  memory after 1,000 steps and at the end, MiB"] = f"{warm['mib']:.0f}, {last['mib']:.0f}"


def processes_of(session):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("end", ["finished", "SIGKILL", "SIGTERM", "SIGINT", "bad pictures", "full disk",
                                 "worker fails"])
def test_no_loader_worker_is_left_behind(tmp_path, counts, end):
    """Ten seconds after any kind of end no process of the run is alive."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(40):
        Image.effect_noise((40, 40), 60).convert("RGB").save(folder / f"{i}.jpg")
    if end == "bad pictures":
        for i in range(8):
            (folder / f"bad{i}.jpg").write_text("no picture")
    epochs = "2" if end in ("finished", "bad pictures") else "400"
    argv = [*SIZES, *"--warmup-epochs 1 --warmup-teacher-temp-epochs 0 --local-crops 2 --workers 2 --log-every 1 "
            "--save-every 1 --save-steps 100000".split(),
            "--data", folder, "--epochs", epochs, "--out", tmp_path / "run"]
    script = ROOT / "train.py"
    if end == "full disk":
        script = faulty("import train, torch\nhonest, left = torch.save, [3]\ndef save(content, file):\n"
                        "    left[0] -= 1\n    if not left[0]: raise OSError(28, 'No space left')\n"
                        "    honest(content, file)\ntorch.save = save\ntrain.main()\n")
    if end == "worker fails":
        script = faulty("import data, time, train\n"
                        "def fail(self, key): time.sleep(0.5); raise RuntimeError('of a worker')\n"
                        "data.Crops.__getitem__ = fail\ntrain.main()\n")
    with open(tmp_path / "text", "w") as text:
        process = subprocess.Popen(list(map(str, [sys.executable, script, *argv])), stdout=text, stderr=text,
                                   start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    session, log = process.pid, tmp_path / "run/log.jsonl"
    seen = 0
    while process.poll() is None:
        seen = max(seen, len(processes_of(session)))
        if end.startswith("SIG") and log.exists() and log.read_bytes().count(b"\n") > 3:
            process.send_signal(getattr(signal, end))
            break
        time.sleep(0.05)
    process.wait(60)
    deadline = time.monotonic() + 10
    while processes_of(session) and time.monotonic() < deadline:
        time.sleep(0.2)
    left = processes_of(session)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"{len(left)} processes outlive the run: {(tmp_path / 'text').read_text()}"
    assert seen >= 3, (tmp_path / "text").read_text()                 # the run and its two workers were there
    counts["ends after which no worker was left"] = counts.get("ends after which no worker was left", 0) + 1


# ---- leaving together

# Each process is asked to end after a step of its own; one that finds a peer gone waits, as with NCCL, for ever.
ASKED = """
import os, signal, sys, time, train
honest, number, after = train.train_step, iter(range(1, 999)), {after}
train.PATIENCE = {patience}
def step(run, *args, **kw):
    try:
        result = honest(run, *args, **kw)
    except RuntimeError:
        {lost}
    if next(number) == after.get(run.rank):
        os.kill(os.getpid(), signal.SIGTERM)
    return result
train.train_step = step
train.main()
"""


def pair(out, script, *flags):
    """[(exit status, what it printed)] of two processes that nobody but this test looks after."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [subprocess.Popen(list(map(str, [sys.executable, script, *RUN, "--out", out, *flags])), text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RANK": str(rank),
                                  "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                                  "MASTER_PORT": str(port)}) for rank in range(2)]
    try:
        return [(process.wait(120), process.stdout.read()) for process in both]
    finally:
        for process in both:
            process.kill()


@pytest.mark.parametrize("after", [{0: 9, 1: 12}, {0: 13, 1: 9}])
def test_processes_that_are_asked_to_end_leave_together(tmp_path, counts, after):
    script = faulty(ASKED.format(after=after, patience=60, lost="time.sleep(999)"))
    results = pair(tmp_path / "run", script)
    assert [status for status, _ in results] == [128 + signal.SIGTERM] * 2, results
    step = max(after.values()) + 1
    assert load(tmp_path / "run/checkpoint.pt")["step"] == step
    assert f"stopped by signal 15 after step {step}, saved" in results[0][1]
    assert "Traceback" not in results[0][1] + results[1][1]
    counts["processes that left together"] = counts.get("processes that left together", 0) + 2


def test_main_process_that_alone_is_asked_to_end_leaves(tmp_path):
    (status, text), (other, _) = pair(tmp_path / "run", faulty(ASKED.format(after={0: 9}, patience=0, lost="raise")))
    assert status == 128 + signal.SIGTERM and other == 1, text
    assert load(tmp_path / "run/checkpoint.pt")["step"] in (9, 10)
    assert_intact(tmp_path / "run")
