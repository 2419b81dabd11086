"""The CUDA kernels run on this processor, a thread for each of CUDA's, with the grids, blocks and
sizes of memory of traced steps: under the address and undefined-behaviour sanitizers, and every
element of what a kernel writes is written once.
"""

import re
import shutil
import subprocess

import pytest
import torch

import fakecuda
from conftest import load

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not fakecuda.POSSIBLE, reason="needs a newer PyTorch for CUDA"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]
cifar10 = load("cifar10")
fused, kernels = cifar10.ops, cifar10.compiler
TYPES = {"__half": "_Float16", "__nv_bfloat16": "__bf16", "float": "float"}

MAIN = r"""
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
#define __CUDACC_RTC__
#define __device__
#define __forceinline__ inline
#define __global__
#define __shared__ static
#define __fdividef(x, y) ((x) / (y))
struct Index { int x, y; };
static thread_local Index threadIdx, blockIdx;
static Index blockDim, gridDim;
static std::barrier<>* gate;
static void __syncthreads() { gate->arrive_and_wait(); }
static void team(Index grid, Index block, auto kernel) {
    std::barrier<> barrier(block.x * block.y);
    gridDim = grid, blockDim = block, gate = &barrier;
    std::vector<std::thread> threads;
    for (int i = 0; i < block.x * block.y; ++i)
        threads.emplace_back([=] {
            threadIdx = {i % block.x, i / block.x};
            for (int b = 0; b < grid.x * grid.y; ++b) {
                blockIdx = {b % grid.x, b / grid.x};
                kernel();
                __syncthreads();
            }
        });
    for (auto& thread : threads) thread.join();
}
// A pointer that counts how often each element is written; `times` is null for a thread's own.
template <class T> struct Place {
    T* at;
    std::atomic<int>* times;
    void count() const { if (times) ++*times; }
    operator T() const { return *at; }
    void operator=(T value) const { *at = value; count(); }
    void operator+=(T value) const { *at += value; count(); }
};
template <class T> struct Watched {
    T* at;
    std::atomic<int>* times = nullptr;
    Watched(T* at, std::atomic<int>* times = nullptr) : at(at), times(times) {}
    explicit operator bool() const { return at; }
    Watched operator+(long long i) const { return {at + i, times ? times + i : times}; }
    Place<T> operator[](long long i) const { return {at + i, times ? times + i : times}; }
};
template <class T> struct Memory {  // of its size to the byte, so that the sanitizer sees its ends
    long long size;
    T* data;
    std::vector<std::atomic<int>> times;
    Memory(long long size) : size(size), data((T*)std::malloc(size * sizeof(T))), times(size) {
        for (long long i = 0; i < size; ++i)
            data[i] = T(sizeof(T) == 1 ? std::rand() % 9 : std::rand() % 1000 / 400.0f + 0.1f);
    }
    ~Memory() { std::free(data); }
    Watched<T> watched() { return {data, times.data()}; }
    void once(const char* name, long long rows, long long columns, long long stride) {
        std::vector<int> wanted(size);
        for (long long r = 0; r < rows; ++r)
            for (long long c = 0; c < columns; ++c) ++wanted[r * stride + c];
        for (long long i = 0; i < size; ++i)
            if (times[i] != wanted[i]) {
                std::printf("%s[%lld] is written %d times\n", name, i, int(times[i]));
                std::exit(1);
            }
    }
};
@SOURCE@
template <class Scalar> void store(Watched<Scalar> place, const auto& pack) {
    *reinterpret_cast<std::remove_cvref_t<decltype(pack)>*>(place.at) = pack;
    for (int k = 0; place.times && k < LANES; ++k) ++place.times[k];
}
int main() {
@CALLS@
}
"""


def watched_source():
    """fused.cu with pointers that count, in the place of those that are written through."""
    source = re.sub(r"INLINE void store\(.*", "", kernels.Build(torch.float32).source())
    source = re.sub(r"#include <cuda_.*>", "", source)
    kinds = "scalar_t|byte_t|real_t"
    source = re.sub(rf"(?<!const )\b({kinds})\* (\w+)(?=[,)])", r"Watched<\1> \2", source)
    declared = "template <class Scalar> void store(Watched<Scalar> place, const auto& pack);\n"
    return source.replace("#define EACH_LANE", declared + "#define EACH_LANE", 1)


def call(launch):
    """C++ that runs a launch on memory of its own and asks what was written."""
    lines, names, checks = [], [], []
    arguments = [*zip(fakecuda.signature(launch), launch.args, strict=True)]
    (channels,) = (int(value) for (_, name, _), value in arguments if name == "channels")
    for (kind, name, pointer), value in arguments:
        if not pointer:
            names.append(f"{kind}({value})")
        elif not isinstance(value, fakecuda.Pointer):
            names.append("nullptr")
        else:
            tensor = value.tensor
            extent = (
                sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            )
            lines.append(f"Memory<{TYPES.get(kind, kind)}> {name}({extent});")
            written = re.search(rf"[(,]\s*(\w+)\* {name}[,)]", head(launch)) and kind != "long long"
            names.append(f"{name}.watched()" if written else f"{name}.data")
            if written:
                rows, stride = (len(tensor), tensor.stride(0)) if tensor.dim() == 2 else (1, 0)
                columns = channels if tensor.dim() == 2 else tensor.numel()
                checks.append(f'{name}.once("{launch.name}: {name}", {rows}, {columns}, {stride});')
    grid, block = (",".join(map(str, pair)) for pair in (launch.grid, launch.block))
    run = f"team({{{grid}}}, {{{block}}}, [&] {{ {launch.name}({', '.join(names)}); }});"
    return "    {\n        " + "\n        ".join([*lines, run, *checks]) + "\n    }"


def head(launch):
    return re.search(rf"ENTRY {launch.name}(\([^)]*\))", launch.module.code)[1]


def key(launch):
    sizes = [
        (tuple(arg.tensor.shape), arg.tensor.stride()) if hasattr(arg, "tensor") else float(arg)
        for arg in launch.args
    ]
    return launch.name, launch.module.options, launch.grid, launch.block, str(sizes)


def different(launches):
    """One of each kind of launch of fused.cu, by definitions."""
    found = {}
    for launch in {key(one): one for one in launches if "lif_" not in one.name}.values():
        found.setdefault(launch.module.options, []).append(launch)
    return found


def run(launches, tmp_path, source):
    """What the program says; RuntimeError with it if a sanitizer or a count stopped it."""
    for i, (options, found) in enumerate(different(launches).items()):
        code = MAIN.replace("@SOURCE@", source).replace("@CALLS@", "\n".join(map(call, found)))
        (tmp_path / f"{i}.cpp").write_text(code)
        defines = [
            f"-D{name}={TYPES.get(value, value)}" for name, value in found[0].module.defines.items()
        ]
        command = "g++ -O0 -g1 -std=c++20 -w -pthread -fsanitize=address,undefined".split()
        # An offset to a null pointer is one that is not read: of bytes or rates that are not there.
        command += ["-fno-sanitize=pointer-overflow", "-fno-sanitize-recover=all", *defines]
        command += [tmp_path / f"{i}.cpp", "-o", tmp_path / f"{i}"]
        subprocess.run(command, check=True)
        done = subprocess.run([tmp_path / f"{i}"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{options}\n{done.stdout}{done.stderr}"[:3000])
    return len(different(launches))


def traced(dtype):
    """Launches of a step and an evaluation with few rows, and of kernels on odd sizes."""
    model = cifar10.model.QKFormer(embed_dims=40, num_heads=1, depths=3)
    with fakecuda.Machine(vars(cifar10).values()) as machine:
        machine.move(model)
        with torch.autocast("cuda", dtype):
            fakecuda.backward(model.train()(machine.randn(3, 3, 8, 12)).sum())
            with torch.inference_mode():
                model.eval()(machine.randn(3, 3, 8, 12))
        for channels, size in ((33, (7, 5)), (24, (1, 4)), (35, (2, 1)), (200, (3, 3))):
            y = machine.randn(2, *size, channels, dtype=dtype).permute(0, 3, 1, 2)
            pooled, taps = fused.pool(y)
            norm = torch.empty(6, channels, device="cuda")
            fused.pool_backward(torch.empty_like(pooled), taps, y, norm[3:])
            fused.gradient_sums(y, y, norm[0])
            fused.normalise(y, norm[3:5])
            for T in (2, 16):
                frames = y.expand(T, *y.shape).movedim(2, -1).contiguous().movedim(-1, 2)
                neuron = (norm[2], "PARAMETRIC sigmoid", 1.0, 1.0)
                fused.fire(frames, T, norm[3:5], *neuron, True)
                args = (torch.empty_like(frames), norm[0], norm[3:5], *neuron, 4.0)
                fused.fire_backward(frames, frames, *args)
        return machine.launches


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_element_is_written_once(dtype, tmp_path):
    launches = traced(dtype)
    entries = set(re.findall(r"^ENTRY (\w+)", kernels.KERNELS, re.M))
    assert {launch.name for launch in launches} >= entries
    assert {launch.module.defines.get("LANES") for launch in launches} >= {"1", "4"}
    assert run(launches, tmp_path, watched_source()) > 3


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("row < rows;", "row < rows + 1;", "heap-buffer-overflow"),
        ("row += gridDim.y * blockDim.y", "row += 1", "times"),
        ("channel < channels)", "channel + LANES < channels)", "is written 0 times"),
        ("load(y + r * channels + c)", "load(y + r * channels + c + (r > 0))", "misaligned"),
    ],
)
def test_it_finds_what_is_wrong(right, wrong, says, tmp_path):
    source = watched_source()
    assert right in source
    launches = [one for one in traced(torch.float16) if one.name == "normalise_backward"]
    launches = [one for one in launches if one.module.defines["LANES"] == "4"][:1]
    with pytest.raises(RuntimeError, match=says):
        run(launches, tmp_path, source.replace(right, wrong))
