"""On a card, which pytest hides from all other tests: pytest tests -m gpu. No machine of ours has run these."""

import json

import pytest
import torch

import pib
import probe_depth
import probe_linear
import probe_seg
import train
from shapes import Shapes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, and -m gpu")]
TINY = ("--dim 64 --depth 4 --heads 2 --length 64 --epochs 3 --warmup-epochs 1 --batch-size 16 --log-every 1 "
        "--save-every 1").split()


def trained(out, *flags):
    train.main([*TINY, *flags, "--out", str(out)])
    return torch.load(out / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("flags", ["--attn entmax15", "--attn entmax15 --registers 4 --specialize", "--attn softmax",
                                   "--attn entmax15 --compile", "--attn entmax15 --no-fused --accum 2"])
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_training_goes_on_from_its_checkpoint(tmp_path, amp, flags):
    """To what the run is that nothing happened to, but for the rounding of sums in another order."""
    flags = [*flags.split(), "--amp", amp]
    whole = trained(tmp_path / "whole", *flags)
    with pytest.MonkeyPatch.context() as patch:                     # leave after the second epoch
        patch.setattr(train, "schedules", lambda args, step, per_epoch, f=train.schedules: (
            f(args, step, per_epoch) if step < 2 * per_epoch else exit(3)))
        with pytest.raises(SystemExit):
            trained(tmp_path / "parts", *flags, "--save-steps", "8")
    parts = trained(tmp_path / "parts", *flags, "--save-steps", "8")
    assert parts["step"] == whole["step"] == 12
    for name, x in whole["teacher"].items():
        assert x.isfinite().all() and torch.allclose(x.float(), parts["teacher"][name].float(), rtol=0.05, atol=0.02)
    first, *_, last = map(json.loads, (tmp_path / "whole/log.jsonl").read_text().splitlines()[1:])
    assert first["step"] == 1 and last["step"] == 12 and last["memory_gib"] > 0


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_every_probe_measures_what_it_does_on_a_cpu(tmp_path, monkeypatch, amp):
    trained(tmp_path, "--attn", "entmax15")
    for module in (probe_linear, probe_seg, probe_depth, pib):
        monkeypatch.setattr(module, "Shapes", lambda split, size, n, cards=1: Shapes(split, size, n // 10, cards))
    weights = ["--weights", str(tmp_path / "checkpoint_0003.pt"), "--amp", amp]
    for module, flags, metric, slack in (
            (probe_linear, "--knn", "top1", 5), (pib, "", "chance", 1e-6), (probe_seg, "--iters 50", "miou", 5),
            (probe_depth, "--iters 50", "rmse", 0.5)):
        found = []
        for card in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.cuda, "is_available", lambda card=card: card)
                out = tmp_path / f"{module.__name__}{card}.json"
                module.main([*(weights if card else weights[:2]), *flags.split(), "--out", str(out)])
            found.append(json.loads(out.read_text())["metrics"][metric])
        assert abs(found[0] - found[1]) <= slack, (module.__name__, found)
