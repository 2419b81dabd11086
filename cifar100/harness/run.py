"""A run from its first epoch to its last: begin or resume, train, test, log, save, stop."""

import os
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from timm.utils import ModelEmaV3, distribute_bn, random_seed

from .batches import LostWorker, digest_of_files, divide, get_rng_state, set_rng_state
from .build import check_classes, load_model, recorded_values
from .checkpoint import load_checkpoint, load_optimizer, load_weights, number, save_checkpoint
from .folder import RunLog, is_new, open_run, read_args, write_args
from .graph import graphed
from .log import UserError, logger, set_up_log, typed
from .meters import LossMeter, evaluate, firing_rates, make_autocast, peak_memory_mb, spread, tet
from .process import Ranks, StopSignal

SMALLEST_SCALE = 1e-10  # of the gradients: some 50 steps in a row were left out then


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
    where = os.path.abspath(cfg.data_path)
    logger.info(f"{cfg.dataset}: {train:,} training and {test:,} test samples are ready in {where}")
    return 0


class Run:
    """What the Trainers of all data sets have in common.

    A Trainer, in train.py, has the recipe: prepare() sets criterion, optimizer, num_epochs and, if
    there is one, scheduler; train_epoch() trains. data, options: the folder's modules.
    """

    samples = "images"  # what a batch is of
    scheduler = log = None  # rank 0 has a log
    start_again = True  # whether start_epoch counts in resuming, as in this release

    def __init__(self, settings, data, options):
        self.data, self.ranks = data, enter(settings)
        ranks = self.ranks
        self.folder, last = ranks.from_main(lambda: open_run(settings))
        path = last or settings.finetune
        self.path, self.resumed = path and Path(path), last is not None  # else it is fine-tuned
        checkpoint = load_checkpoint(self.path) if path else {}
        self.cfg = cfg = self.configure(settings, options, checkpoint)
        data.check(cfg)
        set_up_torch(cfg, data, ranks.rank)
        self.load_data(checkpoint)
        num_classes = cfg.num_classes or len(self.classes)
        self.model, self.cross_sample_lif = load_model(
            cfg, options, data, ranks, num_classes, checkpoint, self.path, not self.resumed
        )
        self.wrap_model()
        self.accum_iter = getattr(cfg, "accum_iter", 1)  # batches behind a step of the optimizer
        self.micro_batch = cfg.batch_size * ranks.world_size
        self.global_batch = self.micro_batch * self.accum_iter
        batch = f"batch_size {cfg.batch_size}"  # what a step is made of
        batch += f" x accum_iter {self.accum_iter}" * (self.accum_iter > 1)
        batch += f" x {ranks.world_size} ranks" * (ranks.world_size > 1)
        self.steps = len(self.train_set) // self.global_batch
        if self.steps == 0:
            raise UserError(f"{batch} is more than the {len(self.train_set)} training samples")
        self.epoch, self.best, self.lr = cfg.start_epoch or 0, -1.0, cfg.lr  # at its peak
        self.meter = LossMeter(ranks, partial(self.add_point, "loss"))  # a point of a curve
        self.seed = cfg.seed  # of the order and augmentation of this epoch
        self.prepare()
        check_rates(cfg, self.lr)
        if cfg.loss == "tet":
            self.criterion = partial(tet, self.criterion, cfg.tet_weight)
            self.model.per_step = True
        self.describe(batch)
        if self.resumed:
            self.resume(checkpoint)
        if self.scheduler:
            self.scheduler.step(self.epoch)

    def configure(self, settings, options, checkpoint):
        """See build.recorded_values, for what a checkpoint brings back, and Settings.resolve."""
        purpose, before = "resume" if self.resumed else "finetune", checkpoint.get("given")
        recorded = checkpoint and recorded_values(options, checkpoint, self.path, self.resumed)
        self.given = {"file": settings.file.name, "yml": settings.yml}  # as checkpoints record it
        if self.resumed and before and before.get("file") != self.given["file"]:
            self.given = before
        # A run that goes on keeps its name, whatever its folder is called.
        name = read_args(self.folder).get("experiment") or settings.name
        return settings.resolve(purpose, recorded, self.path, before, experiment=str(name))

    def load_data(self, checkpoint):
        """What trains, and what chooses best.pth."""
        cfg, data, ranks = self.cfg, self.data, self.ranks
        whole, before = data.build_dataset(cfg, True, ranks), checkpoint if self.resumed else {}
        self.part_seed = number(before, "part_seed", cfg.seed, self.path, low=0)  # they stay
        self.train_set, self.test_set = divide(cfg, data, whole, self.part_seed)
        self.tested = "validation" if self.test_set else "test"
        self.test_set = self.test_set or data.build_dataset(cfg, False, ranks)
        self.classes, self.files = [*self.train_set.classes], digest_of_files(self.train_set)
        had = len(self.classes)
        if checkpoint:
            check_classes(checkpoint, self.path, self.classes, strict=self.resumed)
        if had > (cfg.num_classes or had):
            raise UserError(f"num_classes is {cfg.num_classes}, but the data has {had} classes")
        text = f"data: {cfg.dataset}, {len(self.train_set):,} training and {len(self.test_set):,} "
        text += f"{self.tested} {self.samples} of {had} classes, "
        text += " x ".join(map(str, data.input_shape(cfg)))
        logger.info(text + f" (of {len(whole):,} to train with)" * (self.train_set is not whole))

    def wrap_model(self):
        """The model frozen, as a graph, on several ranks, averaged, in mixed precision."""
        cfg, ranks, gpu = self.cfg, self.ranks, self.ranks.device.type == "cuda"
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        if cfg.freeze:
            self.model.freeze(cfg.freeze)
            logger.info(f"stages 1 to {cfg.freeze} and their BatchNorm stay as they are")
        if getattr(cfg, "sync_bn", False) and not gpu:
            logger.info("sync_bn needs GPUs; BatchNorm takes its statistics per rank")
        elif getattr(cfg, "sync_bn", False) and ranks.world_size > 1:
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.ddp = graphed(self.model, cfg, ranks, training=True)
        if ranks.world_size > 1:
            # Running statistics are each rank's own in training; test() makes them alike.
            self.ddp = torch.nn.parallel.DistributedDataParallel(self.ddp, broadcast_buffers=False)
        self.reduce_bn = getattr(cfg, "dist_bn", "") == "reduce"
        self.ema = None
        if cfg.model_ema:  # after DDP has sent rank 0's weights: each rank keeps the same average
            device = "cpu" if cfg.model_ema_force_cpu else None
            self.ema = ModelEmaV3(self.model, decay=cfg.model_ema_decay, device=device)
        half = cfg.amp and cfg.amp_dtype == "float16"
        if half and not gpu:
            logger.info("amp: float16 needs a GPU; this run is in float32 (bfloat16 would work)")
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=half and gpu)

    def describe(self, batch):
        """Say what the run is."""
        network = f"{self.cfg.model}, T = {self.cfg.time_step}, {self.parameters:,} parameters"
        logger.info(f"network: {network}, on {self.ranks.device}")
        epochs = f"{self.num_epochs} epoch{'s' * (self.num_epochs > 1)} of {self.steps} steps"
        step = f"{self.global_batch} {self.samples} a step ({batch})"
        logger.info(f"training: {epochs}, {step}, learning rate {self.lr:.3g} at its peak")
        logger.info(f"writing to {typed(self.folder)}")

    def add_point(self, name, value, step):
        """A point of a curve over the run's steps; `step` counts those of this epoch from 0."""
        if self.log:
            self.log.step(f"step/{name}", value, self.epoch * self.steps + step)

    def state(self):
        """What a checkpoint holds."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch - 1,  # the last one finished
            "step": self.meter.steps,  # done of the next epoch
            "loss_total": self.meter.total,
            "global_batch": self.global_batch,
            "samples": len(self.train_set),
            "files": self.files,
            "seed": self.seed,
            "part_seed": self.part_seed,
            "best": self.best,  # top-1 in %
            "rng": self.ranks.gather(get_rng_state(self.ranks.device, self.statistics())),
            "config": vars(self.cfg),
            "given": self.given,
            "cross_sample_lif": self.cross_sample_lif,
            "classes": self.classes,
            **({"model_ema": self.ema.module.state_dict()} if self.ema else {}),
        }

    def save(self, *names):
        state = self.state()

        def write():
            if self.log:  # a killed run goes on from here, and keeps the points so far
                self.log.flush()
            for name in names:
                save_checkpoint(state, self.folder / name)

        self.ranks.from_main(write)

    def resume(self, checkpoint):
        """Go on within an epoch too; a file of the release's starts its next epoch."""
        cfg, path, size = self.cfg, self.path, len(self.train_set)
        self.epoch = number(checkpoint, "epoch", -1, path) + 1
        self.best = number(checkpoint, "best", -1.0, path)
        had = number(checkpoint, "global_batch", self.global_batch, path, low=1)
        steps = number(checkpoint, "step", 0, path, low=0)
        before = checkpoint.get("samples", size), checkpoint.get("files", self.files)
        if cfg.start_epoch not in (None, self.epoch) and self.start_again and cfg.resume != "auto":
            self.epoch = cfg.start_epoch  # not with auto: each restart would go back
        elif steps and before != (size, self.files):
            said = f"{path} is of {before[0]} training {self.samples}, now there are {size}"
            said += " others" * (before[0] == size)
            logger.info(f"warning: {said}: epoch {self.epoch} begins again")
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
            logger.info(f"warning: {self.global_batch} {self.samples} a step, but {path} had {had}")
        if not getattr(cfg, "no_resume_opt", False):
            opt = getattr(cfg, "opt", "adamw")
            load_optimizer(self.optimizer, self.scaler, checkpoint, path, opt)
        if self.ema and "model_ema" in checkpoint:
            load_weights(self.ema.module, checkpoint["model_ema"], path)
        elif self.ema:
            logger.info(f"{path}: holds no averaged weights; model_ema starts with its plain ones")
        set_rng_state(checkpoint.get("rng", []), self.ranks, path, self.statistics())
        logger.info(f"resuming {typed(path)} at epoch {self.epoch}, step {self.meter.steps}")

    def statistics(self):
        """This rank's running statistics within an epoch of dist_bn: reduce; else []."""
        models = [self.model, *([self.ema.module] if self.ema else [])]
        within = self.reduce_bn and self.meter.steps
        named = (pair for model in models for pair in model.named_buffers() if within)
        return [buffer for name, buffer in named if "running_" in name]

    def fit(self) -> int:
        """Train to the last epoch. Returns the exit code: 0, or 128 + a signal that stopped it."""
        with StopSignal() as self.stop:
            try:
                return self._fit(self.stop)
            except FloatingPointError as error:
                last, lr = self.folder / "last.pth", self.optimizer.param_groups[-1]["lr"]
                said = f"{error} of epoch {self.epoch}, learning rate {lr:g}; {last} is as it was"
                raise UserError(f"{said}; a smaller lr, or amp_dtype: bfloat16, may help") from None

    def _fit(self, stop):
        cfg, ranks, of = self.cfg, self.ranks, {"validation": "val"}.get(self.tested, "test")
        autocast = make_autocast(cfg, ranks, cfg.eval_amp)
        test_loader = self.data.test_loader(cfg, self.test_set, ranks)
        if self.epoch >= self.num_epochs:
            logger.info(f"nothing to do: all {self.num_epochs} epochs are done")
        if ranks.from_main(lambda: is_new(self.folder)):
            self.save("last.pth")  # a run that is killed from here on goes on
        self.best = ranks.from_main(self.open_log)
        few = self.data.test_loader(cfg, spread(self.test_set), ranks) if ranks.main else ()
        few = [images for images, _ in few]  # whose spikes are counted
        while self.epoch < self.num_epochs:
            start = time.perf_counter()
            try:
                speed = self.train_epoch()
                self.check_weights()
                tested = None if self.meter.stop else self.test(test_loader, autocast, stop)
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
            self.meter.total, self.meter.steps = 0.0, 0
            self.epoch, self.seed = self.epoch + 1, cfg.seed
            if self.scheduler:
                self.scheduler.step(self.epoch)
            self.save(*["best.pth"] * is_best, "last.pth")
        if self.best >= 0:
            of = " in validation" * (self.tested != "test")
            logger.info(f"best top-1 {self.best:.2f} %{of}: {typed(self.folder / 'best.pth')}")
        return 0

    def own_record(self):
        """What only this recipe's log.txt has."""
        return {"lr": self.optimizer.param_groups[0]["lr"]}

    def open_log(self):
        """Begin or go on with the folder's files. Returns the top-1 of its best.pth, -1 without."""
        write_args(self.folder, {**vars(self.cfg), "resume": None}, self.classes)
        self.log = RunLog(self.folder, self.epoch, self.epoch * self.steps + self.meter.steps)
        return self.best if (self.folder / "best.pth").is_file() else -1.0

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
        step = self.meter.steps
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise FloatingPointError(f"weights are not finite after step {step}")
        if self.scaler.is_enabled() and not self.scaler.get_scale() >= SMALLEST_SCALE:
            raise FloatingPointError(f"gradients are not finite any more at step {step}")

    def stopped(self, why):
        """Save; returns a line that says where the run is, and the command that goes on."""
        self.save("last.pth")
        ranks, last = self.ranks.world_size, typed(self.folder / "last.pth")
        launcher = ["torchrun", f"--nproc_per_node={ranks}"] if ranks > 1 else ["python"]
        if ranks > int(os.environ.get("LOCAL_WORLD_SIZE", ranks)):  # several nodes
            launcher = ["..."]
        words = [*launcher, os.path.relpath(sys.argv[0]), "--resume", last]
        if self.ranks.device.type == "cpu" and torch.cuda.is_available():
            words += ["--device", "cpu"]
        where = f"stopped in epoch {self.epoch} after step {self.meter.steps}"
        return f"{why}: {where}; to go on: {shlex.join(words)}"


def check_rates(cfg, peak):
    """UserError for a learning rate that never comes down."""
    if 0 < cfg.warmup_epochs >= cfg.epochs:
        said = f"warmup_epochs is {cfg.warmup_epochs:g}, epochs {cfg.epochs}"
        raise UserError(f"{said}; it must be less, or 0")
    if cfg.min_lr > peak:
        raise UserError(f"min_lr is {cfg.min_lr:g}, but lr {peak:g}; it must not be more")


def set_up_torch(cfg, data, rank):
    """Seeds and algorithms; as in the release, those of event data are alike on every rank."""
    events = len(data.input_shape(cfg)) == 4
    random_seed(cfg.seed, 0 if events else rank)
    torch.backends.cudnn.deterministic = events
    torch.backends.cudnn.benchmark = not (events or cfg.deterministic)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)  # of kernels that differ
