"""What the two READMEs show is what the scripts take: the real parsers read all commands, and the Python lines run."""

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import transforms

import vit
from entmax import entmax15_attention, entmax15_sort

ROOT = Path(__file__).parent.parent
TEXTS = {name: re.sub(r"\\\n +", "", (ROOT / name).read_text()) for name in ("README.md", "paper/README.md")}
# lines of code blocks, aligned for the eye; what follows two spaces is an explanation
LINES = re.findall(r"^    ((?:.*=.* )?(?:python|torchrun|paper/reproduce\.sh) ?.*)", "\n".join(TEXTS.values()), re.M)
LINES = [re.sub(r"(\.py|paper\.\w+) +--", r"\1 --", line) for line in LINES]
COMMANDS = sorted({line.split("  ")[0] for line in LINES if re.search(r"\.py|-m paper\.", line)})


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command_is_accepted(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PICTURES").mkdir()
    (tmp_path / "PICTURES/a.jpg").touch()
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
    """The Python lines of README's own snippet, as printed."""
    block = re.search(r"## Use it in your own code\n\n(.*?)\n\n\S", TEXTS["README.md"], re.S)[1]
    return "\n".join(line.removeprefix("    ") for line in block.split("\n"))


def test_python_lines_run_from_elsewhere_beside_another_entmax(tmp_path):
    """As README says, with this folder first on the path: deep-spin's package has the name of our file. From a file on
    disk to features, which are those of torchvision's own steps; the reader brings scores, q, k and v alone."""
    (tmp_path / "site/entmax").mkdir(parents=True)
    (tmp_path / "site/entmax/__init__.py").write_text("def entmax15(x, dim): raise AssertionError('theirs')")
    config = vit.ViTConfig(image_size=32, patch_size=8, dim=32, depth=2, heads=2, attn="entmax15")
    torch.manual_seed(0)
    model = vit.VisionTransformer(config).eval()
    (tmp_path / "runs/shapes_entmax15_s0").mkdir(parents=True)
    torch.save(dict(config=dataclasses.asdict(config), teacher=model.state_dict(), student=model.state_dict()),
               tmp_path / "runs/shapes_entmax15_s0/checkpoint.pt")
    photo = Image.linear_gradient("L").resize((80, 60)).convert("RGB")
    photo.save(tmp_path / re.search(r'read_image\("(.*?)"\)', own_code())[1])
    given = "import torch; scores = torch.randn(5, 7); q = k = v = torch.randn(2, 3, 5, 8)\n"
    shown = "\ntorch.save((weights, cls, registers, patches, out), 'shown.pt')"
    (tmp_path / "mine.py").write_text(given + own_code() + shown)
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, text=True, capture_output=True,
                          env={"PYTHONPATH": f"{ROOT}:{tmp_path / 'site'}", "PATH": ""})
    assert done.returncode == 0 and not done.stdout, done.stderr
    weights, cls, registers, patches, out = torch.load(tmp_path / "shown.pt")
    with Image.open(next(tmp_path.glob("*.jpg"))) as photo:
        x = transforms.Compose([transforms.Resize(37, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(32),
                                transforms.ToTensor(), transforms.Normalize(vit.MEAN, vit.STD)])(photo.convert("RGB"))
    expected = model.features(x[None])[-1]
    assert out.shape == (2, 3, 5, 8) and registers.shape == (1, 0, 32) and patches.shape == (1, 4, 4, 32)
    for got, want in ((cls, expected.cls), (patches, expected.patches), (weights, model.attention(x[None]))):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_eight_lines_put_it_into_an_attention_module():
    """Those of README, into a module with the names of timm's; against the same with the sort."""
    lines = re.search(r"In somebody's attention module.*?\n\n(.*?)\n\n\S", TEXTS["README.md"], re.S)[1]
    attn = torch.nn.Module()
    attn.qkv, attn.proj, attn.num_heads = torch.nn.Linear(12, 36), torch.nn.Linear(12, 12), 3
    model = types.SimpleNamespace(blocks=[types.SimpleNamespace(attn=attn)])
    exec("\n".join(line.removeprefix("    ") for line in lines.split("\n")),
         dict(entmax15_attention=entmax15_attention, model=model))
    x = torch.randn(2, 5, 12)
    q, k, v = attn.qkv(x).view(2, 5, 3, 3, 4).unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 2
    for mask in None, torch.ones(5, 5, dtype=torch.bool).tril():
        p = entmax15_sort(scores if mask is None else scores.masked_fill(~mask, -torch.inf))
        expected = attn.proj(torch.einsum("bhij,bjhd->bihd", p, v).reshape(2, 5, 12))
        torch.testing.assert_close(attn(x, mask), expected, rtol=0, atol=1e-5)
