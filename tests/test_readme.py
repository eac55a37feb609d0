"""Every command in README is one that its script takes: the real parsers read all of them."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

README = re.sub(r"\\\n +", "", (Path(__file__).parent.parent / "README.md").read_text())     # joins continued lines
README = re.sub(r"(\.py|paper\.\w+) +--", r"\1 --", README)         # aligned for the eye
# lines of code blocks; what follows two spaces is an explanation
LINES = re.findall(r"^    ((?:python|torchrun) (?:.*\.py|-m paper\.\w+).*)", README, re.M)
COMMANDS = sorted({line.split("  ")[0] for line in LINES})


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command_is_accepted(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py") or word.startswith("paper."))
    args = importlib.import_module(words[script].removesuffix(".py")).parse_args(words[script + 1:])
    assert vars(args)


def test_readme_shows_every_script():
    shown = {re.search(r"(\w+)\.py|paper\.(\w+)", command)[0].removesuffix(".py") for command in COMMANDS}
    assert {"train", "probe_linear", "probe_seg", "probe_depth", "pib", "paper.figures"} <= shown
