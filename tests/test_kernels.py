"""paper/kernels.py: that kernels fit the cards, that what it compiles is what is launched, and its verdict."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton comes with torch for Linux alone")
import entmax_triton  # noqa: E402
from entmax import entmax15_attention  # noqa: E402
from paper import kernels  # noqa: E402

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


@pytest.mark.skipif(not PTXAS.exists(), reason="this Triton has no ptxas")
def test_kernels_compile_fit_and_do_not_spill():
    """For the H100, with either Triton (that of torch 2.8 spills on others). In a process without the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "paper.kernels", *"--arch 90 --dtype fp16 --tokens 41 37 197 --width 64".split()]
    said = subprocess.run(command, cwd=Path(entmax_triton.__file__).parent, env=env, text=True, capture_output=True)
    assert said.returncode == 0, said.stdout + said.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.stdout.splitlines() if "sm_90 " in line]
    assert [(row[3], row[4]) for row in rows] == [(T, name) for T in ("41, 37", "197")
                                                  for name in ("forward", "queries", "keys")]
    for row in rows:
        registers, spilled, (shared, _, limit) = int(row[6]), int(row[7]), row[8].split()
        assert 32 < registers <= 255 and spilled == 0 and 0 < int(shared) <= int(limit) == 227
    assert "6 compiled; the longest took" in said.stdout


@pytest.mark.parametrize("T, D, dtype", [(197, 64, "fp16"), (37, 32, "fp32")])
def test_a_launch_passes_what_is_compiled(monkeypatch, T, D, dtype):
    """The arguments of all three launches: types, constants, and what is a multiple of 16."""
    launched, cases = {}, kernels.cases(kernels.parse_args(
        ["--arch", "90", "--dtype", dtype, "--tokens", str(T), "--width", str(D)]))

    class Instead:
        def __init__(self, name):
            self.name, self.real = name, getattr(entmax_triton, f"{name}_kernel")
            monkeypatch.setattr(entmax_triton, f"{name}_kernel", self)

        def __getitem__(self, grid):
            return lambda *values, **named: launched.update({self.name: (self.real, values, named)})
    for name in ("forward", "queries", "keys"):
        Instead(name)
    monkeypatch.setenv("TRITON_INTERPRET", "1")                       # or a CPU is refused
    qkv = torch.randn(2, T, 3, 6, D).to(kernels.DTYPES[dtype])
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in qkv.unbind(2))
    entmax15_attention(q, k, v, fused=True).sum().backward()
    assert [name for _, _, name, *_ in cases] == list(launched)
    for _, _, name, constants, options in cases:
        kernel, values, named = launched[name]
        constants, options = dict(constants), dict(options)
        types, whole = kernels.signature(kernel, dtype, constants)
        assert named == constants | options
        assert [types.get(name) for name in constants] == ["constexpr"] * len(constants)
        assert len(values) == len(types) - len(constants)             # constants come last
        for i, (kind, value) in enumerate(zip(types.values(), values, strict=False)):
            if kind[0] == "*":
                assert value.dtype == kernels.DTYPES[kind[1:]] and value.data_ptr() % 16 == 0 and (i,) in whole
            else:
                assert type(value) is dict(i32=int, fp32=float)[kind] and ((i,) not in whole or value % 16 == 0)
        assert len(whole) == sum(kind[0] == "*" for kind in types.values()) + 3 * (4 if name == "forward" else 5)


@pytest.mark.parametrize("found, status, text", [
    ((200, 0, 40 * 1024, 1.5), None, "all fit, and nothing in half types spills up to 257 tokens"),
    ((255, 8, 40 * 1024, 1.5), "queries, sm_86, bf16, D 64, T 257: spills 8 bytes", None),
    ((200, 0, 100 * 1024, 1.5), "queries, sm_86, bf16, D 64, T 257: 100 KiB of shared memory, 99 allowed", None),
    (RuntimeError("ptxas\nfatal"), "queries, sm_86, bf16, D 64, T 257: does not compile: ptxas fatal", None)])
def test_verdict(monkeypatch, capsys, found, status, text):
    """Of the pass over queries with 257 tokens; with 577 it may spill, as all may in float32."""
    def compiled(arch, dtype, name, constants, options):
        tiles = dict(constants)["TILES"]
        if name == "queries" and dtype == "bf16" and tiles == 9 and isinstance(found, Exception):
            raise found
        return found if name == "queries" and dtype == "bf16" and tiles == 9 else (
            255, 100 if dtype == "fp32" or tiles > 9 else 0, 99 * 1024, 3.25 if name == "keys" else 1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.setattr(kernels, "compiled", compiled)
    command = "--arch 86 --dtype bf16 fp32 --tokens 257 577 --width 64".split()
    if status is None:
        kernels.main(command)
    else:
        with pytest.raises(SystemExit) as left:
            kernels.main(command)
        assert left.value.code == status
    said = capsys.readouterr().out
    assert (text or "") in said and "the longest took 3.2 s: keys, sm_86" in said
    assert f"{8 if isinstance(found, Exception) else 9} compiled" in said       # float32 up to 512 tokens


@pytest.mark.parametrize("command, message", [("--tokens 4096 --width 64", "--tokens [4096] --width [64]: the kernel"),
                                              ("--arch 90", "TRITON_INTERPRET=1: nothing is compiled")])
def test_nothing_to_compile(monkeypatch, command, message):
    monkeypatch.setenv("TRITON_INTERPRET", str(int("arch" in command)))
    with pytest.raises(SystemExit) as left:
        kernels.main(command.split())
    assert left.value.code.startswith(message)
