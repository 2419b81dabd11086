"""What NVRTC makes of the CUDA kernels: registers, spilled bytes and instructions of each.

Usage:
    python tools/registers.py                          # a table: sm_90, T 1, 4, 16, 64, all types
    python tools/registers.py --arch sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 --T 4 --json f.json

The kernels are those that a training step and an evaluation of cifar10/ launch (fakecuda.py), with
the options that they are compiled with there. No GPU is needed. Instructions are those of the
compiled code up to its last exit: what comes behind it are the slow cases of divisions. The last
column is the longest loop that reads memory, which is that over rows, divided by the values that
a pass of it takes: T steps of each of a thread's channels (lanes).
"""

import argparse
import functools
import json
import re
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

import fakecuda
import models

TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# Operations, in the lowest 12 bits of an instruction's 16 bytes, from sm_75 to sm_120.
EXIT, BRANCH, LOAD = 0x94D, 0x947, 0x981


class Code(NamedTuple):
    """A compiled kernel; stack and spills in bytes."""

    registers: int
    stack: int
    spills: int
    instructions: int
    loop: int


@functools.cache
def compiled(source, options, arch):
    """{kernel: Code} of a source, compiled as CuPy does it; RuntimeError with NVRTC's words."""
    from cuda.bindings import nvrtc
    from cupy._core.core import assemble_cupy_compiler_options

    def ask(size, get):
        text = bytes(size(program)[1] + 1)  # written in place: not one of Python's shared bytes
        get(program, text)
        return text

    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], [])
    options = [f"--gpu-architecture={arch}", *assemble_cupy_compiler_options(options)]
    options = [option.encode() for option in (*options, "--ptxas-options=-v")]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = ask(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode()
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(log)
    sizes = instructions(ask(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), arch)
    nvrtc.nvrtcDestroyProgram(program)
    found = {}
    for part in log.split("Compiling entry function ")[1:]:
        kernel = part.split("'")[1]
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        registers = re.search(r"Used (\d+) registers", part)[1]
        code = Code(int(registers), int(stack), int(stores) + int(loads), *sizes[kernel])
        found[kernel] = code
    return found


def instructions(cubin, arch):
    """{kernel: (its instructions up to its last exit, those of its longest loop that
    reads memory)}, of an ELF file.
    """
    start, count, strings = (
        struct.unpack_from("<Q", cubin, 40)[0],
        struct.unpack_from("<H", cubin, 60)[0],
        struct.unpack_from("<H", cubin, 62)[0],
    )
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + 64 * i) for i in range(count)]
    table = headers[strings][4]
    found = {}
    for name, _, _, _, offset, size in headers:
        text = cubin[table + name : cubin.index(b"\0", table + name)].decode()
        if text.startswith(".text."):
            words = struct.unpack_from(f"<{size // 8}Q", cubin, offset)[::2]
            operations = [word & 0xFFF for word in words]
            end = max(i for i, operation in enumerate(operations) if operation == EXIT) + 1
            loops = [0]
            for i in range(end):
                first = i + 1 + jump(words[i], arch)
                if operations[i] == BRANCH and LOAD in operations[first : i + 1]:
                    loops.append(i + 1 - first)
            found[text.removeprefix(".text.")] = end, max(loops)
    return found


def jump(word, arch):
    """How many instructions a branch goes on, from the one behind it; negative: back."""
    bits, width, unit = word >> 32, 32, 16  # bytes
    if int(arch.removeprefix("sm_")) >= 90:  # groups of 4 bytes
        bits, width, unit = (word >> 34) << 8 | word >> 16 & 0xFF, 38, 4
    return (bits - (1 << width) if bits >> width - 1 else bits) // unit


def at_once(launch):
    """Values that a thread takes at once, all steps of its channels; None where it loops over
    steps, and of kernels that work on channels alone.
    """
    if fakecuda.signature(launch)[0][1] != "rows" or launch.name.startswith("integrate"):
        return None
    defines = launch.module.defines
    steps = int(defines.get("STEPS", 1)) if launch.name.startswith("fire") else 1
    return steps * int(defines.get("LANES", 1))


def launched(dtype, T, width=384, folder="cifar10"):
    """{(kernel, its options): Launch} of a training step and an evaluation."""
    modules = models.load(folder)
    model = modules.model.QKFormer(T=T, embed_dims=width, depths=3)
    with fakecuda.Machine(vars(modules).values()) as machine:
        machine.move(model)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            fakecuda.backward(model.train()(machine.randn(2, 3, 32, 32)).float().sum())
            with torch.inference_mode():
                model.eval()(machine.randn(2, 3, 32, 32))
        return {(one.name, one.module.options): one for one in machine.launches}


def table(archs, Ts, types):
    """Rows {kernel, arch, dtype, T, lanes, registers, stack, spills, instructions, per_value}."""
    for dtype in types:
        for T in Ts:
            found = launched(TYPES[dtype], T)
            for arch in archs:
                for (name, _), one in sorted(found.items(), key=lambda item: item[0]):
                    module = one.module
                    code = compiled(module.code, module.options, arch)[name]
                    row = {"kernel": name, "arch": arch, "dtype": dtype, "T": T}
                    row |= {"lanes": int(module.defines.get("LANES", 1)), **code._asdict()}
                    values = at_once(one)
                    yield row | {"per_value": values and code.loop / values}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=["sm_90"], choices=ARCHS)
    parser.add_argument("--T", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--dtype", nargs="+", default=list(TYPES), choices=TYPES)
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    print(f"{'kernel':20} {'arch':7} {'dtype':9} {'T':>3} {'lanes':>5} ", end="")
    print(f"{'registers':>9} {'spilled':>7} {'instructions':>12} {'a value':>8}", flush=True)
    rows = []
    for row in table(arguments.arch, arguments.T, arguments.dtype):
        rows.append(row)
        print(
            f"{row['kernel']:20} {row['arch']:7} {row['dtype']:9} {row['T']:3} {row['lanes']:5} "
            f"{row['registers']:9} {max(row['spills'], row['stack']):7} "
            f"{row['instructions']:12} " + (f"{row['per_value']:8.1f}" if row["per_value"] else ""),
            flush=True,
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
