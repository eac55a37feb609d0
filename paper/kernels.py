"""Compile the kernels of entmax_triton.py for the cards people have, without one: does each fit, does any spill?

    python -m paper.kernels                                           all of it: some 25 minutes of one core
    python -m paper.kernels --arch 90 --dtype bf16 --tokens 197 --width 64

For q, k, v strided as a projection makes them, as this Triton and its ptxas count: registers and spilled bytes of a
thread, and shared memory of a block against what the card allows; compile times are of CPU. The exit status is 1 if
anything does not compile or is over the limit, or if half types spill up to 257 tokens. Nothing runs, so this tells
neither speed nor whether results are right: `python -m paper.bench check` does, on a card.
"""
import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

# By compute capability: KiB of shared memory a block may have (CUDA C++ Programming Guide, technical specifications)
CARDS = {80: ("A100", 163), 86: ("RTX 30, A40", 99), 89: ("RTX 40, L40", 99), 90: ("H100", 227), 100: ("B200", 227),
         120: ("RTX 50", 99)}
DTYPES = dict(fp16=torch.float16, bf16=torch.bfloat16, fp32=torch.float32)
NO_SPILL = 257                                                        # tokens, in half types


def parse_args(argv):
    p = argparse.ArgumentParser(prog="python -m paper.kernels", description=__doc__.splitlines()[0],
                                allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--arch", type=int, nargs="+", choices=CARDS, default=list(CARDS), help="compute capability")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of q, k and v")
    p.add_argument("--tokens", type=int, nargs="+", default=[37, 41, 197, 201, 257, 577, 785, 1025, 2048])
    p.add_argument("--width", type=int, nargs="+", default=[64, 32, 128], help="of a head")
    return p.parse_args(argv)


def signature(kernel, dtype, constants):
    """The type of each argument, and {index: property} of those that are multiples of 16, which Triton compiles in."""
    types = {name: "constexpr" if name in constants else "*fp32" if name in ("tau", "delta") else
             f"*{dtype}" if name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv") else
             "fp32" if name == "scale" else "i32" for name in kernel.arg_names}
    whole = [i for i, (name, kind) in enumerate(types.items()) if kind[0] == "*" or re.fullmatch("[a-z][bht]", name)]
    return types, {(i,): [["tt.divisibility", 16]] for i in whole}


def cases(args):
    """{(arch, dtype, pass, tile, warps, constants, options): lengths}, as many lengths share a kernel."""
    import entmax_triton

    found = {}
    for arch in args.arch:
        for dtype in args.dtype:
            for D in args.width:
                for T in args.tokens:
                    q = torch.empty(1, 1, T, D, dtype=DTYPES[dtype], device="meta")
                    if entmax_triton.supports(q, q, q):
                        for name, size in zip(("forward", "queries", "keys"), entmax_triton.sizes(q), strict=True):
                            more = dict(STEPS=8) if name == "forward" else {}
                            made = (tuple(x.items()) for x in entmax_triton.compiled_for(q, size, **more))
                            found.setdefault((arch, dtype, name, *made), []).append(T)
    return found


def compiled(arch, dtype, name, constants, options):
    """Registers and spilled bytes of a thread, bytes of shared memory of a block, seconds of CPU time to compile."""
    import triton
    from triton.backends.compiler import GPUTarget

    import entmax_triton

    kernel = getattr(entmax_triton, f"{name}_kernel")
    types, whole = signature(kernel, dtype, dict(constants))
    start = sum(os.times()[:4])                                       # ptxas is a child
    made = triton.compile(triton.compiler.ASTSource(kernel, types, dict(constants), whole),
                          target=GPUTarget("cuda", arch, 32), options=dict(options))
    seconds = sum(os.times()[:4]) - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cubin")
        path.write_bytes(made.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", said).groups())      # no arrays: only spills
    return registers, stack, made.metadata.shared, seconds


def main(argv=None):
    args = parse_args(argv)
    if not importlib.util.find_spec("triton"):
        sys.exit("triton: not installed; torch for Linux brings it along")
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1: nothing is compiled in the interpreter; unset it")
    import triton

    todo, faults, times = cases(args), [], []
    if not todo:
        sys.exit(f"--tokens {args.tokens} --width {args.width}: the kernel takes none of these; see its `supports`")
    print(f"triton {triton.__version__}\n")
    print("| card | type | D | T | pass | tile, warps | registers | spilled, B | shared, KiB | compile, s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder                       # nothing comes from an earlier run
        for (arch, dtype, name, constants, options), lengths in todo.items():
            card, limit = CARDS[arch]
            size, T = dict(constants), ", ".join(map(str, lengths))
            what = f"{name}, sm_{arch}, {dtype}, D {size['D']}, T {T}"
            try:
                registers, spilled, shared, seconds = compiled(arch, dtype, name, constants, options)
            except Exception as error:
                faults.append(f"{what}: does not compile: {' '.join(str(error).split())[:300]}")
                continue
            print(f"| sm_{arch} {card} | {dtype} | {size['D']} | {T} | {name} | {size['BM']} x {size['BN']}, "
                  f"{dict(options)['num_warps']} | {registers} | {spilled} | {shared / 1024:.0f} of {limit} | "
                  f"{seconds:.1f} |", flush=True)
            times.append((seconds, what))
            if shared > 1024 * limit:
                faults.append(f"{what}: {shared / 1024:.0f} KiB of shared memory, {limit} allowed")
            if spilled and dtype != "fp32" and min(lengths) <= NO_SPILL:
                faults.append(f"{what}: spills {spilled} bytes")
    if times:
        print(f"\n{len(times)} compiled; the longest took {max(times)[0]:.1f} s: {max(times)[1]}")
    if faults:
        sys.exit("\n".join(faults))
    print(f"all fit, and nothing in half types spills up to {NO_SPILL} tokens")


if __name__ == "__main__":
    main()
