"""What a training step and inference would cost on a GPU that is not there, part by part;
`bench.py --predict` prints it. A prediction, by this model, and no measurement:

- Launches and bytes are those of the step itself, traced with fake tensors (fakecuda.py): what each
  of PyTorch's operators and of our kernels reads and writes, once. A convolution's backward pass is
  two launches. One that is not in channels_last transposes what it reads and what it writes, as
  cuDNN does in 16 bits.
- A launch takes LAUNCH on the GPU at least, and else as long as memory (BANDWIDTH), arithmetic of
  16 bits (FLOPS) or, for our kernels, instructions need: those of the compiled loop over rows
  (registers.py) for all rows, at HALF of what the processors can issue.
- Time of the host: a narrow model does the same step on this CPU, on images so small that
  arithmetic takes no time, and our kernels are prepared for a launch and not run. To that, HOST for
  what PyTorch or CuPy do for each launch.

The neuron of the release-like path is one kernel, as spikingjelly's is on a GPU.
"""

import contextlib
import functools
import time

import torch
from torch.utils.flop_counter import flop_registry

import fakecuda
import models
import registers
import traffic

GPU = "H100"
ARCH = "sm_90"
BANDWIDTH = 3.0e12  # bytes/s
FLOPS = 700e12  # 1/s, float16
LAUNCH = 3e-6  # s
HALF = 0.5 * 132 * 4 * 32 * 1.7e9  # instructions/s of threads: SMs, warps at a time, lanes, Hz
HOST = {"torch": 3e-6, "cupy": 8e-6}  # s
TRAIN, INFER = "all of a step", "inference"


class Cost:
    """Sums over events of fakecuda.py: launches (of PyTorch's and of ours), bytes, flop, seconds
    on the GPU, in all and by kernel.
    """

    def __init__(self, events=()):
        self.torch = self.cupy = self.bytes = self.flop = self.gpu = 0
        self.kernels = {}  # {name: [launches, seconds]}
        for event in events:
            if isinstance(event, fakecuda.Launch):
                self.add_launch(event)
            elif event.operator.namespace in ("aten", "qkformer_bench"):
                self.add_operation(event)

    def add_launch(self, launch):
        names = [name for _, name, _ in fakecuda.signature(launch)]
        moved = sum(
            traffic.size(arg.tensor)
            for name, arg in zip(names, launch.args, strict=True)
            # of y, a kernel over channels alone reads one row
            if isinstance(arg, fakecuda.Pointer) and (name != "y" or "channels" != names[0])
        )
        seconds = 0
        if registers.at_once(launch):  # rows, then channels
            module, values = launch.module, int(launch.args[0]) * int(launch.args[1])
            code = registers.compiled(module.code, module.options, ARCH)[launch.name]
            seconds = code.loop * values / int(module.defines.get("LANES", 1)) / HALF
        self.cupy += 1
        self.add(launch.name.split("<")[0], 1, moved, 0, seconds)

    def add_operation(self, event):
        operator, args, kwargs, result = event.operator, event.args, event.kwargs, event.result
        moved = traffic.moved(operator, args, kwargs, result)
        if not moved:
            return
        packet, flop = operator._overloadpacket, 0
        if packet in flop_registry:
            flop = flop_registry[packet](*args, **kwargs, out_val=result)
        launches = 1
        if packet in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward):
            backward = packet is torch.ops.aten.convolution_backward
            launches = sum(args[-1][:2]) if backward else 1
            if not is_channels_last(args[0]):
                launches, moved = 3 * launches, 3 * moved
        self.torch += launches
        self.add(packet.__name__, launches, moved, flop)

    def add(self, name, launches, moved, flop, seconds=0):
        seconds = max(launches * LAUNCH, moved / BANDWIDTH, flop / FLOPS, seconds)
        self.bytes, self.flop, self.gpu = self.bytes + moved, self.flop + flop, self.gpu + seconds
        known = self.kernels.setdefault(name, [0, 0.0])
        known[0] += launches
        known[1] += seconds


def is_channels_last(x):
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def events_of(model, x, spikes, machine):
    """{part: events} of a training step in float16, and of inference."""
    found, autocast = {}, functools.partial(torch.autocast, "cuda", torch.float16)
    machine.move(model.train())
    with autocast():
        inputs = traffic.inputs_of(model, x, spikes)
    for kind, run in steps_of_parts(model, inputs, spikes, autocast, fakecuda.backward):
        machine.events.clear()
        run()
        found.setdefault(kind, []).extend(machine.events)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = whole_step(model, x, optimizer, autocast, fakecuda.backward)
    step()  # the optimizer claims its memory
    for kind, run in ((TRAIN, step), (INFER, lambda: inference(model, x, autocast))):
        machine.events.clear()
        run()
        found[kind] = [*machine.events]
    return found


def steps_of_parts(model, inputs, spikes, autocast, backward):
    """(kind, function that runs the part forward and backward)."""

    def run(module, value):
        with autocast():
            out = module(value)
        backward(out, torch.empty_like(out))

    for kind, module in traffic.parts(model):
        value, known = inputs[module]
        if value.stride(0) != 0 and kind != "SPEDS-1":  # the image needs no gradient
            value = spikes.mark(value.requires_grad_(), known)
        yield kind, functools.partial(run, module, value)


def whole_step(model, x, optimizer, autocast, backward):
    scaler = torch.amp.GradScaler(x.device.type)
    target = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)

    def step():
        with autocast():
            loss = torch.nn.functional.cross_entropy(model.train()(x), target)
        optimizer.zero_grad()
        backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()

    return step


@torch.inference_mode()
def inference(model, x, autocast):
    with autocast():
        model.eval()(x)


# Time of the host ---------------------------------------------------------------------------------


@contextlib.contextmanager
def launches_prepared(modules):
    """Layers on CPU tensors do all that a launch on a GPU needs of Python, and launch nothing."""
    with fakecuda.Machine(modules, fake=False) as machine:
        for module in machine.modules:
            if hasattr(module, "resolve_backend"):
                machine.patch(module, "resolve_backend", lambda *args: "cupy")
            if hasattr(module, "MM_TO_FLOAT32"):
                machine.patch(module, "MM_TO_FLOAT32", False)  # which a CPU has not
        yield


class Neuron(torch.autograd.Function):
    """In the place of traffic.neuron: what it costs the host, and nothing computed."""

    @staticmethod
    def forward(ctx, x, tau, v_threshold):
        ctx.save_for_backward(x)
        return torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad, *_):
        return torch.empty_like(*ctx.saved_tensors), None, None


def fastest(function, rounds=5):
    """Seconds of this thread; whatever else the machine does counts little."""
    function()
    seconds = []
    for _ in range(rounds):
        start = time.thread_time()
        function()
        seconds.append(time.thread_time() - start)
    return min(seconds)


def host_seconds(model, x, spikes, modules, fast):
    """{part: seconds} as events_of, on a CPU, of a narrow model and a small x."""
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    found = {}
    with launches_prepared(modules) if fast else contextlib.nullcontext():
        backward = torch.Tensor.backward
        with autocast():
            inputs = traffic.inputs_of(model.train(), x, spikes)
        for kind, run in steps_of_parts(model, inputs, spikes, autocast, backward):
            found[kind] = found.get(kind, 0.0) + fastest(run)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        found[TRAIN] = fastest(whole_step(model, x, optimizer, autocast, backward))
        found[INFER] = fastest(lambda: inference(model, x, autocast))
    return found


def table(name, modules, x, T):
    """Rows {model, part, path, launches, mb, gflop, gpu_ms, host_ms, kernels} of both paths; x has
    the shape of the batch.
    """
    entry, spikes, rows = models.entry(name, modules), modules.spikes, []
    modules, lif = [*vars(modules).values()], modules.neuron
    for path in ("release-like", "fast"):
        fast = path == "fast"
        model = entry(T=T, fused=fast)
        narrow = entry(T=T, fused=fast, embed_dims=48, num_heads=1)
        if not fast:
            neuron = functools.partial(traffic.neuron, membranes=True)
            traffic.stand_in(model, lif.MultiStepLIF, spikes, neuron)
            traffic.stand_in(narrow, lif.MultiStepLIF, spikes, Neuron.apply)
        with fakecuda.Machine(modules) as machine:
            events = events_of(model, machine.randn(*x.shape), spikes, machine)
        small = torch.rand(2, *x.shape[1:-2], 32, 32)
        host = host_seconds(narrow, small, spikes, modules, fast)
        for part, cost in ((part, Cost(found)) for part, found in events.items()):
            launched = HOST["torch"] * cost.torch + HOST["cupy"] * cost.cupy
            row = {"model": name, "part": part, "path": path, "launches": cost.torch + cost.cupy}
            row |= {"mb": cost.bytes / 1e6, "gflop": cost.flop / 1e9, "gpu_ms": 1e3 * cost.gpu}
            row |= {"host_ms": 1e3 * (host[part] + launched), "kernels": cost.kernels}
            rows.append(row)
    return rows


def print_table(rows):
    """Of both paths, by parts; what is not in a part is the head, the loss and the optimizer."""
    columns = {"launches": "launches", "mb": "MB", "gflop": "GFLOP"}
    columns |= {"gpu_ms": "GPU ms", "host_ms": "host ms"}
    paths = {path: {} for path in ("release-like", "fast")}
    for row in rows:
        paths[row["path"]][row["part"]] = [row[name] for name in columns]
    print(f"predicted for an {GPU} (see tools/predict.py), not measured")
    print(f"{rows[0]['model']:18}" + "".join(f"{path:>45}" for path in paths))
    print(f"{'':18}" + "".join(f"{head:>9}" for head in [*columns.values()] * 2))

    def line(name, values):
        digits = (0, 0, 0, 1, 1)
        cells = (f"{v:9,.{d}f}" for row in values for v, d in zip(row, digits, strict=True))
        print(f"{name:18}" + "".join(cells))

    for part in paths["fast"]:
        line(part, [found[part] for found in paths.values()])
        if part == TRAIN:
            rest = []
            for found in paths.values():
                known = [values for part, values in found.items() if part not in (TRAIN, INFER)]
                sums = [sum(column) for column in zip(*known, strict=True)]
                rest.append([a - b for a, b in zip(found[TRAIN], sums, strict=True)])
            line("  of it elsewhere", rest)
    for row in rows:
        if row["path"] == "fast" and row["part"] in (TRAIN, INFER):
            largest = sorted(row["kernels"].items(), key=lambda item: -item[1][1])[:14]
            text = ", ".join(f"{name} {1e3 * t:.2f} ({n})" for name, (n, t) in largest)
            print(f"{row['part']}, fast, ms (launches): {text}")
