"""What the two READMEs show is what the scripts take: the real parsers read all commands, and the Python lines run."""

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vit

ROOT = Path(__file__).parent.parent
TEXTS = {name: re.sub(r"\\\n +", "", (ROOT / name).read_text()) for name in ("README.md", "paper/README.md")}
# lines of code blocks, aligned for the eye; what follows two spaces is an explanation
LINES = re.findall(r"^    ((?:.*=.* )?(?:python|torchrun|paper/reproduce\.sh) ?.*)", "\n".join(TEXTS.values()), re.M)
LINES = [re.sub(r"(\.py|paper\.\w+) +--", r"\1 --", line) for line in LINES]
COMMANDS = sorted({line.split("  ")[0] for line in LINES if re.search(r"\.py|-m paper\.", line)})


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command_is_accepted(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py") or word.startswith("paper."))
    name = words[script].removesuffix(".py")
    if "--resume" in words:                                           # reads the run, which is not there
        with pytest.raises(SystemExit, match="RUN"):
            importlib.import_module(name).parse_args(words[script + 1:])
        return
    parsed = importlib.import_module(name).parse_args(words[script + 1:])
    assert vars(parsed[0] if isinstance(parsed, tuple) else parsed)


def test_readmes_show_every_script():
    shown = {re.search(r"(\w+)\.py|paper\.(\w+)", command)[0].removesuffix(".py") for command in COMMANDS}
    assert {"train", "probe_linear", "probe_seg", "probe_depth", "pib", "paper.figures", "paper.table1"} <= shown


def test_readme_takes_five_minutes():
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


def test_files_that_are_linked_or_listed_are_there():
    for name, text in TEXTS.items():
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / name).parent.joinpath(link).exists(), f"{name}: {link}"
    for listed in re.findall(r"^\| (`.*?) \|", TEXTS["README.md"], re.M):
        for path in re.findall(r"`([\w/]+(?:\.py|/))`", listed):
            assert (ROOT / path).exists(), path


def own_code():
    """The Python lines of README, with a run's checkpoint at the place they name."""
    block = re.search(r"## Use it in your own code\n\n(.*?)\n\n\S", TEXTS["README.md"], re.S)[1]
    return "\n".join(line.removeprefix("    ") for line in block.split("\n"))


def test_python_lines_run_from_elsewhere_beside_another_entmax(tmp_path):
    """As README says, with this folder first on the path: deep-spin's package has the name of our file."""
    (tmp_path / "site/entmax").mkdir(parents=True)
    (tmp_path / "site/entmax/__init__.py").write_text("def entmax15(x, dim): raise AssertionError('theirs')")
    config = vit.ViTConfig(image_size=32, patch_size=8, dim=32, depth=2, heads=2, attn="entmax15")
    weights = vit.VisionTransformer(config).state_dict()
    (tmp_path / "runs/shapes_entmax15_s0").mkdir(parents=True)
    torch.save(dict(config=dataclasses.asdict(config), teacher=weights, student=weights),
               tmp_path / "runs/shapes_entmax15_s0/checkpoint.pt")
    given = ("import torch; scores = torch.randn(5, 7); q = k = v = torch.randn(2, 3, 5, 8)\n"
             "images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)\n")
    shown = "\nprint(*out.shape, *cls.shape, *registers.shape, *patches.shape, *weights.shape)"
    (tmp_path / "mine.py").write_text(given + own_code() + shown)
    said = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, text=True, capture_output=True,
                          env={"PYTHONPATH": f"{ROOT}:{tmp_path / 'site'}", "PATH": ""})
    assert said.stdout.split() == "2 3 5 8 2 32 2 0 32 2 4 4 32 2 2 17 17".split(), said.stderr
