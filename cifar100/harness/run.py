"""A run from its first epoch to its last: begin or resume, train, test, log, save, stop.

How an epoch is trained is train.py's, whose Trainer is a Run.
"""

import os
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from timm.utils import ModelEmaV3, distribute_bn

from .batches import LostWorker
from .build import check_classes, convert_all, load_model, names_in, other_class, recorded_values
from .checkpoint import load_checkpoint, load_optimizer, load_weights, number, save_checkpoint
from .config import Config
from .firing import firing_rates, spread
from .folder import RunLog, open_run, read_args, write_args, write_whole
from .graph import graphed
from .log import UserError, logger, set_up_log, typed
from .loss import TET
from .meters import LossMeter, evaluate, make_autocast, peak_memory_mb
from .parts import digest_of_files, divide
from .process import Ranks, StopSignal
from .seeds import get_rng_state, set_rng_state

SMALLEST_SCALE = 1e-10  # of the gradients: some 50 steps in a row were left out then


class Start(NamedTuple):
    """Where a run starts from."""

    cfg: Config
    given: dict  # the yml behind cfg, as checkpoints record it
    ranks: Ranks
    folder: Path
    checkpoint: dict | None
    path: Path | None  # of the checkpoint
    resumed: bool  # its run goes on; else its weights are fine-tuned


def enter(settings) -> Ranks:
    """This process's place among the ranks, with its log."""
    ranks = Ranks(settings.device, settings.timeout_minutes)
    set_up_log(ranks)
    for note in settings.notes:
        logger.info(note)
    return ranks


def prepare_data(settings, data) -> int:
    """Download, check and convert what a run would read. Returns the exit code, 0."""
    ranks, cfg = enter(settings), settings.resolve()
    data.check(cfg)
    train, test = (len(data.build_dataset(cfg, train, ranks)) for train in (True, False))
    where = Path(cfg.data_path).absolute()
    logger.info(f"{cfg.dataset}: {train:,} training and {test:,} test samples are ready in {where}")
    return 0


def begin(settings, options) -> Start:
    """The ranks, the run's folder, the checkpoint and the whole configuration. See folder.find_run,
    build.recorded_values for what a checkpoint brings back, and Settings.resolve.
    """
    ranks = enter(settings)
    folder, last, going_on = ranks.from_main(lambda: open_run(settings))
    args = read_args(folder) if going_on else {}
    path = last or settings.finetune or args.get("finetune")
    path = Path(path) if path else None
    checkpoint = load_checkpoint(path) if path else None
    given = {"file": settings.file.name, "yml": settings.yml}
    # A run that goes on keeps its name, whatever its folder is called.
    name = {"experiment": str(args.get("experiment") or settings.name or settings.file.stem)}
    if going_on and not last:  # it ended before its first checkpoint
        for key in {"cross_sample_lif", "start_epoch"} & args.keys() - settings.said.keys():
            name[key] = options.KEYS[key].convert(args[key])
        recorded = convert_all(options, args, folder / "args.yaml")
        cfg = settings.resolve("resume", recorded, folder / "args.yaml", **name)
    elif checkpoint:
        recorded = recorded_values(options, checkpoint, path, data=bool(last))
        before = checkpoint.get("given")
        cfg = settings.resolve("resume" if last else "finetune", recorded, path, before, **name)
        if last and before and before["file"] != given["file"]:
            given = before
    else:
        cfg = settings.resolve(**name)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)  # of kernels that differ
    return Start(cfg, given, ranks, folder, checkpoint, path, bool(last))


class Run:
    """What the Trainers of all data sets have in common.

    A Trainer adds the recipe: it sets criterion, optimizer, num_epochs and, if it has one,
    scheduler, and calls prepare(). It has train_epoch(); course(), the learning rates; and
    own_record(), what its log.txt has besides.

    start: what begin() gives. data, options: the folder's modules.
    """

    samples = "images"  # what a batch is of
    accum_iter = 1  # batches behind a step of the optimizer
    scheduler = log = None  # rank 0 has a log
    tested = "validation"  # what chooses best.pth

    def __init__(self, start, data, options):
        self.start, self.data = start, data
        self.cfg, self.ranks, self.folder = cfg, ranks, _ = start.cfg, start.ranks, start.folder
        whole = data.build_dataset(cfg, True, ranks)
        self.part_seed = cfg.seed  # of the parts of the training set, which stay
        if start.resumed:
            self.part_seed = number(start.checkpoint, "part_seed", cfg.seed, start.path, low=0)
        self.train_set, self.test_set = divide(cfg, data, whole, self.part_seed)
        if self.test_set is None:
            self.tested, self.test_set = "test", data.build_dataset(cfg, False, ranks)
        self.classes = list(self.train_set.classes)
        if start.resumed:
            check_classes(start.checkpoint, start.path, self.classes)
        had, num_classes = len(self.classes), cfg.num_classes or len(self.classes)
        if had > num_classes:
            raise UserError(f"num_classes is {num_classes}, but the data has {had} classes")
        size, shape = len(self.train_set), " x ".join(map(str, data.input_shape(cfg)))
        sizes = f"{size:,} training and {len(self.test_set):,} {self.tested} {self.samples}"
        parts = "" if self.train_set is whole else f" (of {len(whole):,} to train with)"
        logger.info(f"data: {cfg.dataset}, {sizes} of {had} classes, {shape}{parts}")
        self.model, self.cross_sample_lif, self.semantics = load_model(
            cfg, options, data, ranks, num_classes, start.checkpoint, start.path, not start.resumed
        )
        names = names_in(start.checkpoint.get("classes")) if start.checkpoint else []
        other = other_class(names, self.classes) if len(names) == num_classes else None
        if other and not start.resumed:
            logger.info(f"warning: {start.path}: {other}; its head is kept all the same")
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        if cfg.freeze:
            self.model.freeze(cfg.freeze)
            learns = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            kept = f"stages 1 to {cfg.freeze} and their BatchNorm stay as they are"
            logger.info(f"freeze: {kept}; {learns:,} of {self.parameters:,} parameters learn")
        if getattr(cfg, "sync_bn", False) and ranks.world_size > 1 and ranks.device.type == "cuda":
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.ddp = graphed(self.model, cfg, ranks, training=True)
        if ranks.world_size > 1:
            # Running statistics are each rank's own in training; test() makes them alike.
            self.ddp = torch.nn.parallel.DistributedDataParallel(self.ddp, broadcast_buffers=False)
        self.ema = None
        if cfg.model_ema:  # after DDP has sent rank 0's weights: each rank keeps the same average
            device = "cpu" if cfg.model_ema_force_cpu else None
            self.ema = ModelEmaV3(self.model, decay=cfg.model_ema_decay, device=device)
        self.reduce_bn = getattr(cfg, "dist_bn", "") == "reduce"
        scaled = cfg.amp and ranks.device.type == "cuda" and cfg.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=scaled)
        self.micro_batch = cfg.batch_size * ranks.world_size
        self.global_batch = self.micro_batch * self.accum_iter
        self.batch = f"batch_size {cfg.batch_size}"  # what a step is made of
        self.batch += f" x accum_iter {self.accum_iter}" if self.accum_iter > 1 else ""
        self.batch += f" x {ranks.world_size} ranks" if ranks.world_size > 1 else ""
        self.steps = size // self.global_batch
        if self.steps == 0:
            raise UserError(f"{self.batch} is more than the {size} training samples; make it less")
        self.epoch, self.best = cfg.start_epoch or 0, -1.0
        # A step's loss is a point of a curve.
        self.new_meter = partial(LossMeter, ranks, partial(self.add_point, "loss"))
        self.meter = self.new_meter()
        self.lr = cfg.lr  # at its peak
        self.files = digest_of_files(self.train_set)
        self.seed = cfg.seed  # of the order and augmentation of this epoch

    def prepare(self):
        """Say what the run is, and go on where the checkpoint was written."""
        cfg, device = self.cfg, self.ranks.device
        if cfg.loss == "tet":
            self.criterion, self.model.per_step = TET(self.criterion, cfg.tet_weight), True
        network = f"{cfg.model}, T = {cfg.time_step}, {self.parameters:,} parameters"
        logger.info(f"network: {network}, on {device}")
        logger.info(self.semantics)
        epochs = f"{self.num_epochs} epoch{'s' * (self.num_epochs > 1)} of {self.steps} steps"
        step = f"{self.global_batch} {self.samples} a step ({self.batch})"
        logger.info(f"training: {epochs}, {step}, learning rate {self.schedule()}")
        logger.info(f"writing to {typed(self.folder)}")
        if cfg.amp and device.type != "cuda" and cfg.amp_dtype == "float16":
            logger.info("amp: float16 needs a GPU; this run is in float32 (bfloat16 would work)")
        if getattr(cfg, "sync_bn", False) and device.type != "cuda":
            logger.info("sync_bn needs GPUs; BatchNorm takes its statistics per rank")
        if self.start.resumed:
            self.resume(self.start.checkpoint, self.start.path)
        if self.scheduler:
            self.scheduler.step(self.epoch)

    def schedule(self):
        """The learning rate's course in words; UserError where it does not come down."""
        cfg, rates = self.cfg, self.course()
        peak, first, last = max(rates, key=rates.get), min(rates), max(rates)
        text = f"from {rates[first]:.3g}, peak {rates[peak]:.3g} at epoch {peak:g}, "
        text += f"to {rates[last]:.3g} at epoch {last:g}, by {getattr(cfg, 'sched', 'cosine')}"
        stays = rates[last] == rates[peak] and len(rates) > 1 and cfg.min_lr != self.lr
        if 0 < cfg.warmup_epochs >= cfg.epochs or cfg.min_lr > self.lr or stays:
            said = f"epochs {cfg.epochs}, warmup_epochs {cfg.warmup_epochs:g}, lr {self.lr:g}"
            said = f"{said} and min_lr {cfg.min_lr:g}: the learning rate never comes down ({text})"
            raise UserError(f"{said}; warmup_epochs must be below epochs, min_lr at most lr")
        return text

    def add_point(self, name, value, step):
        """A point of a curve over the run's steps; `step` counts those of this epoch from 0."""
        if self.log:
            self.log.add_point(name, value, self.epoch * self.steps + step)

    # State ----------------------------------------------------------------------------------------

    def state(self):
        """What a checkpoint holds."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **({"scheduler": self.scheduler.state_dict()} if self.scheduler else {}),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch - 1,
            "step": self.meter.steps,
            "loss_total": self.meter.total,
            "global_batch": self.global_batch,
            "samples": len(self.train_set),
            "files": self.files,
            "seed": self.seed,
            "part_seed": self.part_seed,
            "best": self.best,
            "rng": self.ranks.gather(get_rng_state(self.ranks.device, self.statistics())),
            "config": vars(self.cfg),
            "given": self.start.given,
            "cross_sample_lif": self.cross_sample_lif,
            "classes": self.classes,
            **({"model_ema": self.ema.module.state_dict()} if self.ema else {}),
        }

    def resume(self, checkpoint, path):
        """Go on within an epoch too; a file of the release's starts its next epoch."""
        cfg = self.cfg
        self.epoch = number(checkpoint, "epoch", -1, path) + 1
        self.best = number(checkpoint, "best", -1.0, path)
        had = number(checkpoint, "global_batch", self.global_batch, path, low=1)
        steps = number(checkpoint, "step", 0, path, low=0)
        size, before = len(self.train_set), checkpoint.get("samples", len(self.train_set))
        if cfg.start_epoch is not None and self.start_again():
            self.epoch = cfg.start_epoch
        elif steps and (before != size or checkpoint.get("files", self.files) != self.files):
            others = " others" if before == size else ""
            now = f"{before} training {self.samples}, now there are {size}{others}"
            logger.info(f"warning: {path} is of {now}: epoch {self.epoch} begins again")
        elif steps:
            self.seed = number(checkpoint, "seed", cfg.seed, path, low=0)
            if self.seed != cfg.seed:
                logger.info(f"seed {cfg.seed} counts from the next epoch on")
            # The epoch's order of samples is the same for every batch size and number of ranks.
            self.meter.steps = steps * had // self.global_batch
            total = number(checkpoint, "loss_total", 0.0, path)
            self.meter.total = total * (self.meter.steps / steps)  # to the bit where they are equal
            if self.meter.steps > self.steps:
                raise UserError(f"{path}: its step is {steps}; an epoch has {self.steps} here")
        if had != self.global_batch:
            now = f"{self.global_batch} {self.samples} a step"
            logger.info(f"warning: {now}, but {path} had {had}")
        if not getattr(cfg, "no_resume_opt", False):
            opt = getattr(cfg, "opt", "adamw")
            load_optimizer(self.optimizer, self.scaler, checkpoint, path, opt)
        if self.ema and "model_ema" in checkpoint:
            load_weights(self.ema.module, checkpoint["model_ema"], path)
        elif self.ema:
            logger.info(f"{path}: holds no averaged weights; model_ema starts with its plain ones")
        set_rng_state(checkpoint.get("rng", []), self.ranks, path, self.statistics())
        logger.info(f"resuming {typed(path)} at epoch {self.epoch}, step {self.meter.steps}")

    def start_again(self):
        """Whether to obey start_epoch. Not with resume: auto: each restart would go back."""
        return self.cfg.resume != "auto" and self.cfg.start_epoch != self.epoch

    def statistics(self):
        """This rank's running statistics within an epoch of dist_bn: reduce; else []."""
        models = [self.model, *([self.ema.module] if self.ema else [])]
        within = self.reduce_bn and self.meter.steps
        named = (pair for model in models for pair in model.named_buffers() if within)
        return [buffer for name, buffer in named if "running_" in name]

    def save(self, *names):
        state = self.state()
        self.ranks.from_main(lambda: [save_checkpoint(state, self.folder / n) for n in names])

    def keep_best(self, path):
        """Copy best.pth to a run's new folder. Returns the best top-1, -1 without it; rank 0's."""
        old, new = path.parent / "best.pth", self.folder / "best.pth"
        if self.best >= 0 and not new.is_file():
            if not old.is_file():
                logger.info(f"{old} is missing: best.pth will be the best from here on")
                return -1.0
            write_whole(new, old.read_bytes())
        return self.best

    # The loop -------------------------------------------------------------------------------------

    def test(self, loader, autocast, stop):
        """[Metrics of the model, and of its averaged weights]; None on a signal."""
        tested = []
        averaged = [self.ema.module] if self.ema and not self.cfg.model_ema_force_cpu else []
        for model in (self.model, *averaged):
            if self.ranks.world_size > 1:
                distribute_bn(model, self.ranks.world_size, reduce=self.reduce_bn)
            # Captured anew each time: between tests a graph would only hold memory.
            model = graphed(model, self.cfg, self.ranks)
            tested.append(evaluate(model, loader, self.ranks, autocast, stop))
            if tested[-1] is None:
                return None
        return tested

    def check_weights(self):
        """FloatingPointError for weights that are not finite, or gradients step after step."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise FloatingPointError(f"weights are not finite after step {self.meter.steps}")
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            step = self.meter.steps
            raise FloatingPointError(f"gradients are not finite any more at step {step}")

    def stopped(self, why):
        """Save; returns a line that says where the run is, and the command that goes on."""
        self.save("last.pth")
        last, ranks = typed(self.folder / "last.pth"), self.ranks.world_size
        launcher = ["torchrun", f"--nproc_per_node={ranks}"] if ranks > 1 else ["python"]
        if ranks > int(os.environ.get("LOCAL_WORLD_SIZE", ranks)):  # several nodes
            launcher = ["..."]
        words = [*launcher, os.path.relpath(sys.argv[0]), "--resume", str(last)]
        if self.ranks.device.type == "cpu" and torch.cuda.is_available():
            words += ["--device", "cpu"]
        where = f"stopped in epoch {self.epoch} after step {self.meter.steps}"
        return f"{why}: {where}; to go on: {shlex.join(words)}"

    def fit(self) -> int:
        """Train to the last epoch. Returns the exit code: 0, or 128 + a signal that stopped it."""
        with StopSignal() as self.stop:
            try:
                return self._fit(self.stop)
            except FloatingPointError as error:
                last, lr = self.folder / "last.pth", self.optimizer.param_groups[-1]["lr"]
                kept = f"{last} is as it was" if last.is_file() else "nothing was saved yet"
                said = f"{error} of epoch {self.epoch}, learning rate {lr:g}; {kept}"
                raise UserError(f"{said}; a smaller lr, or amp_dtype: bfloat16, may help") from None

    def _fit(self, stop):
        cfg, ranks, few = self.cfg, self.ranks, None
        autocast = make_autocast(cfg, ranks, cfg.eval_amp)
        test_loader = self.data.test_loader(cfg, self.test_set, ranks)
        if self.epoch >= self.num_epochs:
            logger.info(f"nothing to do: all {self.num_epochs} epochs are done")

        def open_files():
            write_args(self.folder, {**vars(cfg), "resume": None}, self.classes)
            self.log = RunLog(self.folder, self.epoch, self.epoch * self.steps + self.meter.steps)

        ranks.from_main(open_files)
        if self.start.resumed:
            self.best = ranks.from_main(lambda: self.keep_best(self.start.path))
        while self.epoch < self.num_epochs:
            start = time.perf_counter()
            try:
                speed = self.train_epoch()
                self.check_weights()
                tested = None if self.meter.stop else self.test(test_loader, autocast, stop)
                if tested and ranks.main and few is None:
                    loader = self.data.test_loader(cfg, spread(self.test_set), ranks)
                    few = [images for images, _ in loader]
            except LostWorker as error:
                if ranks.world_size > 1:  # the others wait for this one within a step
                    raise
                self.meter.flush()
                self.check_weights()
                raise UserError(self.stopped(str(error))) from None
            if tested is None:
                why = signal.Signals(stop.number).name if stop else "another rank"
                logger.info(self.stopped(why))
                return 128 + (stop.number or signal.SIGTERM)
            test, *averaged = tested
            of = "val" if self.tested == "validation" else "test"
            record = {
                "epoch": self.epoch,
                **self.own_record(),
                "train_loss": self.meter.mean,
                f"{of}_loss": test.loss,
                f"{of}_acc1": test.top1,
                f"{of}_acc5": test.top5,
                **({"ema_acc1": averaged[0].top1} if averaged else {}),
                "seconds": round(time.perf_counter() - start, 2),
                "images_per_second": round(speed, 1),
                "peak_memory_mb": peak_memory_mb(ranks.device),
                "firing_rate": firing_rates(self.model, few, autocast) if few else {},
            }
            is_best, self.best = test.top1 > self.best, max(test.top1, self.best)
            ranks.from_main(lambda record=record: self.log.epoch(record))
            tops = f"top-1 {test.top1:.2f} % (best {self.best:.2f} %), top-5 {test.top5:.2f} %"
            tops += "".join(f", averaged weights {metrics.top1:.2f} %" for metrics in averaged)
            losses = f"train loss {self.meter.mean:.4f}, {self.tested} loss {test.loss:.4f}"
            logger.info(f"epoch {self.epoch}: {losses}, {tops}, {record['seconds']:.0f} s")
            self.meter, self.epoch, self.seed = self.new_meter(), self.epoch + 1, cfg.seed
            if self.scheduler:
                self.scheduler.step(self.epoch)
            self.save(*["best.pth"] * is_best, "last.pth")
        if self.best >= 0:
            best, path = f"best top-1 {self.best:.2f} %", typed(self.folder / "best.pth")
            logger.info(f"{best}{' in validation' * (self.tested != 'test')}: {path}")
        return 0
