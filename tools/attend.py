"""Pictures of attention: what the masks of Q-K attention let pass, what a token of SSA looks at.

Usage, from anywhere:
    python tools/attend.py cifar10/output/quickstart/best.pth 8           # test sample 8
    python tools/attend.py best.pth photos/ --folder imagenet

WHAT is the number of a test sample, an image, of event data a file .npz with `frames`, or a folder
of such files. Each gives attention/NAME.png beside the checkpoint. For each stage it
shows the last block: the masks of all heads over the
time steps, and the spikes of q, of k and of what is left of k, for the head that has most of these.
SSA has no mask: there it shows the weights q k^T of one token, by which q (k^T v) adds up the v of
all tokens, and the spikes of q, k and v.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset
from torchvision.datasets.folder import IMG_EXTENSIONS

import models

stage_of = models.load("cifar10").meters.stage_of
TILE = 72  # pixels of a tile's longer side, at least
COLUMNS = 600  # of a raster, at most
ON, OFF, MARK = (1.0, 0.55, 0.1), (0.8, 0.8, 0.8), (0.1, 0.9, 1.0)
BLUE, GREEN, PURPLE, ORANGE = (0.1, 0.4, 0.7), (0.1, 0.55, 0.3), (0.5, 0.25, 0.65), (0.9, 0.4, 0)
COLORS = {"q": BLUE, "k": GREEN, "v": PURPLE, "masked k": ORANGE}


def find(modules, tested, what):
    """(name, sample, label or None) of each that `what` names."""
    cfg, data, UserError = tested.cfg, modules.data, modules.log.UserError
    if what.isdecimal():
        dataset = data.build_dataset(cfg, False, tested.ranks)
        if int(what) >= len(dataset):
            raise UserError(f"sample {what}: the test set ends with sample {len(dataset) - 1}")
        loader, _ = models.test_batches(modules, tested, Subset(dataset, [int(what)]))
        for samples, labels in loader:
            yield f"test-{what}", samples[0], labels.item()
        return
    shape, to_input, path = data.input_shape(cfg), data.input_transform(cfg), Path(what)
    if len(shape) == 4:
        remedy = f"attend takes an .npz with `frames` of shape {list(shape)}"
        read, suffixes = partial(data.load_frames, T=cfg.time_step, remedy=remedy), (".npz",)
    else:
        read, suffixes = modules.images.read_image, IMG_EXTENSIONS
    files = [path] if path.is_file() else []
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
    if not files:
        kinds = f"nor a file or folder of {', '.join(suffixes)}"
        raise UserError(f"{what}: no number of a test sample, {kinds}")
    for file in files:
        yield file.stem, to_input(read(file)).to(tested.ranks.device), None


class Probe:
    """Within it, the spikes of each stage's last attention are kept for one pass of a model."""

    def __init__(self, model):
        modules = model.named_modules()
        self.blocks = {stage_of(name): m for name, m in modules if hasattr(m, "k_lif")}
        self.seen, self.hooks = {}, []

    def __enter__(self):
        for stage, module in self.blocks.items():
            for kind in ("q", "k", "v", "attn"):
                if hasattr(module, f"{kind}_lif"):
                    hook = self._keep(stage, kind)
                    self.hooks.append(getattr(module, f"{kind}_lif").register_forward_hook(hook))
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def _keep(self, stage, kind):
        def hook(module, args, output):
            self.seen[stage, kind] = output.float().cpu()

        return hook

    def of(self, stage):
        """{"q", "k", and "v" or "mask": [T, heads, channels, H, W]} of the batch's first sample."""
        heads = self.blocks[stage].num_heads
        kinds = [kind for kind in ("q", "k", "v") if (stage, kind) in self.seen]
        spikes = {kind: self.seen[stage, kind][:, 0].unflatten(1, (heads, -1)) for kind in kinds}
        if "v" not in spikes and (stage, "attn") not in self.seen:
            raise SystemExit(f"error: {stage}: its attention calls no attn_lif, so it has no mask")
        if "v" not in spikes:
            # [T, H, W, heads, channels], of one channel or of one token
            spikes["mask"] = self.seen[stage, "attn"][:, 0].movedim((3, 4), (1, 2))
        return {kind: value.numpy() for kind, value in spikes.items()}


def to_rgb(sample):
    """[steps, H, W, 3] in 0..1 of an image [3, H, W] or events [T, 2, H, W], on red, off blue."""
    sample = sample.float().cpu().numpy()
    if sample.ndim == 3:
        low, high = (limit(sample, axis=(1, 2), keepdims=True) for limit in (np.min, np.max))
        return ((sample - low) / np.maximum(high - low, 1e-6)).transpose(1, 2, 0)[None]
    brightest = np.quantile(sample[sample > 0], 0.9) if sample.any() else 1
    off, on = (sample / brightest).clip(0, 1).swapaxes(0, 1)
    return np.stack([on, 0.3 * (on + off), off], axis=-1).clip(0, 1)


def enlarge(array, height, width):
    """Each value of [h, w, ...] repeated to fill [height, width, ...]."""
    rows = np.arange(height) * len(array) // height
    columns = np.arange(width) * array.shape[1] // width
    return array[rows][:, columns]


def tile(frame, weights, mark=None):
    """A frame with its tokens lit by weights [h, w] in 0..1, and the token `mark` outlined."""
    scale = -(-TILE // max(frame.shape[:2]))
    height, width = frame.shape[0] * scale, frame.shape[1] * scale
    gray = enlarge(frame.mean(-1, keepdims=True), height, width)
    lit = enlarge(weights, height, width)[..., None]
    picture = gray * (0.35 + 0.2 * lit) + 0.45 * lit * np.array(ON)
    if mark is not None:
        token = np.zeros(weights.shape, bool)
        token[mark] = True
        token = np.pad(enlarge(token, height, width), 2)
        inner = token[:-4, 2:-2] & token[4:, 2:-2] & token[2:-2, :-4] & token[2:-2, 4:]
        picture[token[2:-2, 2:-2] & ~inner] = MARK
    return picture


def mosaic(frames, weights, mark=None):
    """Input and heads side by side, steps below each other. weights: [T, heads, h, w]."""
    rows = []
    for step, heads in enumerate(weights):
        frame = frames[min(step, len(frames) - 1)]
        tiles = [tile(frame, head, mark) for head in heads]
        tiles = [enlarge(frame, *tiles[0].shape[:2]), *tiles]
        gap = ((2, 2), (2, 2), (0, 0))
        rows.append(np.concatenate([np.pad(t, gap, constant_values=1) for t in tiles], axis=1))
    return np.concatenate(rows)


def looked_at(q, k):
    """((y, x) of the token with the largest weights, these weights q k^T as [T, heads, H, W])."""
    T, heads, _, H, W = q.shape
    q, k = q.reshape(T, heads, -1, H * W), k.reshape(T, heads, -1, H * W)
    token = int((q * k.sum(-1, keepdims=True)).sum(axis=(0, 1, 2)).argmax())
    weights = np.einsum("thc,thcn->thn", q[..., token], k).reshape(T, heads, H, W)
    return divmod(token, W), weights


def raster(axes, spikes, title, color, behind=None):
    """Spikes of one head, [T, channels, H, W]: tokens go right, steps and their channels down."""
    T, channels = spikes.shape[:2]
    tokens = spikes[0, 0].size
    picture = np.ones((T * channels, min(tokens, COLUMNS), 3))
    starts = np.arange(picture.shape[1]) * tokens // picture.shape[1]
    for values, shade in ((behind, OFF), (spikes, color)):
        if values is not None:  # a column of several tokens shows whether one of them fired
            fired = np.maximum.reduceat(values.reshape(T * channels, tokens), starts, axis=1) > 0
            picture[fired] = shade
    extent = (-0.5, tokens - 0.5, T * channels - 0.5, -0.5)
    axes.imshow(picture, aspect="auto", interpolation="nearest", extent=extent)
    for step in range(1, T):
        axes.axhline(step * channels - 0.5, color="0.6", linewidth=0.5)
    axes.set_yticks([(step + 0.5) * channels - 0.5 for step in range(T)], range(1, T + 1))
    axes.tick_params(labelsize=6, length=2)
    axes.set_title(f"{title}: {spikes.mean():.1%} of {spikes.size:,}", fontsize=8, pad=3)


def describe(spikes):
    """(heading, weights of the tiles, marked token or None) of one attention."""
    if "v" in spikes:
        mark, weights = looked_at(spikes["q"], spikes["k"])
        where = f"row {mark[0] + 1}, column {mark[1] + 1}"
        weights = weights / max(weights.max(), 1)
        return f"self-attention: weights q kᵀ of the token at {where}", weights, mark
    mask = spikes["mask"]
    passed = f"{mask.mean():.0%} pass"
    if mask.shape[2] == 1:
        return f"Q-K token attention: tokens that the masks let pass, {passed}", mask[:, :, 0], None
    left = (spikes["k"] * mask).mean(2)
    title = f"Q-K channel attention: spikes of k in channels that the masks let pass, {passed}"
    return title, left / max(left.max(), 1e-6), None


def draw(path, sample, stages, title):
    """Write the PNG: for each stage a mosaic, and three rasters beside it."""
    from matplotlib.figure import Figure

    frames = to_rgb(sample)
    parts = {stage: describe(spikes) for stage, spikes in stages.items()}
    mosaics = {stage: mosaic(frames, *part[1:]) for stage, part in parts.items()}
    heights = [max(8.0 * m.shape[0] / m.shape[1], 3.2) for m in mosaics.values()]
    figure = Figure(figsize=(13, sum(heights) + 0.5 * len(heights) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    rows = figure.subfigures(len(stages), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, (stage, spikes) in zip(rows, stages.items(), strict=True):
        T, heads = spikes["q"].shape[:2]
        left, right = row.subfigures(1, 2, width_ratios=(8, 5))
        row.suptitle(f"{stage}, {parts[stage][0]}", fontsize=10)
        axes = left.subplots()
        axes.imshow(mosaics[stage])
        high, wide = mosaics[stage].shape[0] / T, mosaics[stage].shape[1] / (heads + 1)
        axes.set_yticks([(t + 0.5) * high for t in range(T)], [f"t = {t + 1}" for t in range(T)])
        names = ["input", *(f"head {head + 1}" for head in range(heads))]
        axes.set_xticks([(place + 0.5) * wide for place in range(heads + 1)], names)
        axes.tick_params(labelsize=7 if heads < 9 else 5, length=0)
        axes.spines[:].set_visible(False)
        rasters(right.subplots(3, 1, sharex=True), spikes)
    figure.savefig(path, dpi=110)


def rasters(places, spikes):
    """The spikes of q, k and the third, for the head that has most of the third."""
    name = "v" if "v" in spikes else "masked k"
    third = spikes["v"] if "v" in spikes else spikes["k"] * spikes["mask"]
    head = int(third.sum(axis=(0, 2, 3, 4)).argmax())
    q, k, third = (values[:, head] for values in (spikes["q"], spikes["k"], third))
    raster(places[0], q, f"head {head + 1}: spikes of q", COLORS["q"])
    raster(places[1], k, "of k", COLORS["k"])
    raster(places[2], third, f"of {name}", COLORS[name], behind=k if name == "masked k" else None)
    places[1].set_ylabel("time step, in it the channels", fontsize=7)
    places[2].set_xlabel("tokens", fontsize=7)


@torch.inference_mode()
def picture(model, samples, folder, autocast):
    """Write folder/NAME.png for each (name, sample, label or None), seen alone."""
    model.eval()
    for name, sample, label in samples:
        with Probe(model) as probe, autocast():
            logits = model.forward(sample[None])  # torch.compile's would not call the hooks
        stages = {stage: probe.of(stage) for stage in probe.blocks}
        best = logits.double().softmax(1)[0].max(0)
        title = f"{name}: class {best.indices}, {best.values:.0%}"
        path = folder / f"{name}.png"
        try:
            folder.mkdir(exist_ok=True)
            draw(path, sample, stages, title if label is None else f"{title}, label {label}")
        except ImportError:
            raise SystemExit("error: pictures need matplotlib: pip install matplotlib") from None
        except OSError as error:
            raise SystemExit(f"error: {path} can't be written: {error.strerror}") from None
        print(f"written: {path}")


def main(argv=None):
    argv, flags = models.split(argv)
    parser = models.checkpoint_parser(__doc__)
    parser.add_argument("what", help="number of a test sample, file, or folder of files")
    args = parser.parse_args(argv)
    what = args.what if args.what.isdecimal() else str(Path(args.what).absolute())
    modules, tested = models.open_checkpoint(args.checkpoint, args.folder, flags)
    cfg, folder = tested.cfg, tested.path.parent / "attention"
    autocast = modules.meters.make_autocast(cfg, tested.ranks, cfg.eval_amp)
    with models.one_line(modules):
        picture(tested.model, find(modules, tested, what), folder, autocast)
    return 0


if __name__ == "__main__":
    sys.exit(main())
