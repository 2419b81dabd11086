# Copied from dvs128-gesture/train.py with DVS128 Gesture->CIFAR10-DVS, dvs128-gesture.yml->cifar10-dvs.yml
"""Train QKFormer on CIFAR10-DVS.

Usage:
    python train.py --data-path ./data           # the published run, cifar10-dvs.yml
    python train.py --data-path ./data --T 10
    python train.py -c quickstart.yml            # minutes on a CPU, no download
    python -m torch.distributed.launch --nproc_per_node=2 train.py
"""

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.utils import ModelEmaV3, random_seed

import data
import options
from build import load_model, measure, settle
from harness.checkpoint import check_optimizer, load_checkpoint, load_weights, number
from harness.config import UserError, load_config
from harness.engine import Progress, Skips, check_weights, load_optimizer, make_autocast
from harness.graph import graphed
from harness.loop import Run
from harness.loss import TET
from harness.ranks import Ranks
from harness.runs import find_checkpoint, find_run, open_run, shown
from harness.runtime import (
    StopSignal,
    get_rng_state,
    logger,
    run,
    set_deterministic,
    set_rng_state,
    set_up_log,
)


# Copied from cifar10/train.py
def build_optimizer(cfg, model):
    """(timm's optimizer, its schedule per epoch, number of epochs including the cooldown).

    timm gives 1-D parameters no weight decay. UserError for settings that it does not take.
    """
    # The fused kernel sees on the GPU that float16 has overflowed, and skips the step. Without it
    # the scaler has to wait for the GPU at every step to know.
    fused = {"fused": True} if cfg.opt == "adamw" and next(model.parameters()).is_cuda else {}
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg), **fused)
        scheduler, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(cfg))
    except Exception as error:  # an optimizer of timm fails in its own way on settings
        settings = f"opt {cfg.opt} with opt_betas {cfg.opt_betas} and sched {cfg.sched}"
        raise UserError(f"{settings}: {error}") from None
    if getattr(optimizer, "is_second_order", False):
        raise UserError(
            f"opt is {cfg.opt}, which needs second derivatives; the surrogate gradient has none"
        )
    return optimizer, scheduler, num_epochs


class Trainer(Run):
    """Model, data, optimizer and schedule of one run, and where the run stands.

    Args:
        cfg, given: the configuration, and what of it was set where.
        ranks, folder: of this run.
        checkpoint, path: weights to start from, or None.
        finetune: whether their head may be of other classes.
    """

    data = data

    def __init__(self, cfg, given, ranks, folder, checkpoint, path, finetune):
        self.cfg, self.given, self.ranks, self.folder = cfg, given, ranks, folder
        self.model, self.cross_sample_lif = load_model(
            cfg, ranks, checkpoint, path, new_head=finetune
        )
        self.train_set = data.build_dataset(
            cfg, True, ranks
        )  # last: to convert recordings can take hours
        self.test_set = data.build_dataset(cfg, False, ranks)
        if cfg.sync_bn and ranks.world_size > 1 and ranks.device.type == "cuda":
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.ddp = graphed(self.model, cfg, ranks, training=True)
        if ranks.world_size > 1:
            # Running statistics are each rank's own in training; test() makes them alike.
            self.ddp = torch.nn.parallel.DistributedDataParallel(
                self.model, broadcast_buffers=False
            )
        self.ema = None
        if cfg.model_ema:  # after DDP has sent rank 0's weights: each rank keeps the same average
            device = "cpu" if cfg.model_ema_force_cpu else None
            self.ema = ModelEmaV3(self.model, decay=cfg.model_ema_decay, device=device)
        self.reduce_bn = cfg.dist_bn == "reduce"
        self.optimizer, self.scheduler, self.num_epochs = build_optimizer(cfg, self.model)
        self.criterion = SoftTargetCrossEntropy()
        if cfg.loss == "tet":
            self.criterion, self.model.per_step = TET(self.criterion, cfg.tet_weight), True
        scaled = cfg.amp and ranks.device.type == "cuda" and cfg.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=scaled)
        self.skips = Skips(self.optimizer)
        self.global_batch = cfg.batch_size * ranks.world_size
        self.steps = len(self.train_set) // self.global_batch  # of an epoch
        self.epoch, self.best, self.meter = 0, -1.0, self.new_meter()

        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        logger.info(
            f"{cfg.model}, T = {cfg.T}: {parameters:,} parameters; {ranks.device}, "
            f"{ranks.world_size} rank(s), "
            f"{self.global_batch} samples a step, lr {cfg.lr:g}; writing to {shown(folder)}"
        )
        cooldown = self.num_epochs - cfg.epochs
        why = (
            f" (epochs {cfg.epochs} + {cooldown} of cooldown_epochs at min_lr)" if cooldown else ""
        )
        epochs = "1 epoch" if self.num_epochs == 1 else f"{self.num_epochs} epochs"
        logger.info(f"{epochs} of {self.steps} steps{why}")
        if cfg.amp and ranks.device.type != "cuda" and cfg.amp_dtype == "float16":
            logger.info(
                "amp: float16 needs a GPU; this run is in float32 (amp_dtype: bfloat16 works on a "
                "CPU)"
            )
        if cfg.sync_bn and ranks.device.type != "cuda":
            logger.info("sync_bn needs GPUs; BatchNorm takes its statistics per rank")

    # Copied from cifar10/train.py
    def state(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch - 1,
            "step": self.meter.steps,
            "loss_total": self.meter.total,
            "global_batch": self.global_batch,
            "best": self.best,
            "rng": self.ranks.gather(get_rng_state(self.ranks.device)),
            "config": vars(self.cfg),
            "given": {"file": self.given.file, "yml": self.given.yml},
            "cross_sample_lif": self.cross_sample_lif,
            "classes": list(self.test_set.classes),
            **({"model_ema": self.ema.module.state_dict()} if self.ema else {}),
        }

    # Copied from cifar10/train.py with images a step->samples a step
    def resume(self, checkpoint, path):
        """Go on where the checkpoint was written, within an epoch too; one of the release's starts
        its next epoch.
        """
        cfg = self.cfg
        self.epoch = number(checkpoint, "epoch", -1, path) + 1
        theirs = checkpoint.get(
            "metric", checkpoint.get("max_test_acc1")
        )  # timm's name, the event scripts' name
        self.best = number(
            {"best": theirs if isinstance(theirs, float) else -1.0, **checkpoint},
            "best",
            -1.0,
            path,
        )
        had, steps = (number(checkpoint, name, 0, path, low=0) for name in ("global_batch", "step"))
        if cfg.start_epoch is not None and cfg.start_epoch != self.epoch:
            self.epoch = cfg.start_epoch
        elif steps > 0:
            # The epoch's order of samples is the same for every batch size and number of ranks.
            self.meter.steps = steps * had // self.global_batch
            total = number(checkpoint, "loss_total", 0.0, path)
            self.meter.total = total * (self.meter.steps / steps)  # to the bit where they are equal
            if self.meter.steps > self.steps:
                raise UserError(
                    f"{path}: can't be resumed: its step is {steps}; an epoch has {self.steps} here"
                )
            if had != self.global_batch:
                logger.info(f"warning: {self.global_batch} samples a step, but {path} had {had}")
        if not cfg.no_resume_opt:
            settings = [{**group, "params": None} for group in self.optimizer.param_groups]
            try:
                if checkpoint.get("config", vars(cfg)).get("opt") != cfg.opt:
                    raise ValueError(
                        f"it is of {checkpoint['config'].get('opt')}, opt is {cfg.opt}"
                    )
                load_optimizer(self.optimizer, checkpoint["optimizer"])
                if checkpoint.get("scaler"):  # empty where the run was not in float16
                    self.scaler.load_state_dict(checkpoint["scaler"])
                check_optimizer(self.optimizer, checkpoint.get("scaler"))
            except Exception as error:  # whatever the file has there
                reason = (
                    f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
                )
                why = f"no fitting optimizer state ({reason}); set no_resume_opt to do without it"
                raise UserError(f"{path}: {why}") from None
            for group, values in zip(self.optimizer.param_groups, settings, strict=True):
                group.update(
                    {**values, "params": group["params"]}
                )  # the configuration may have changed
        self.scheduler.step(self.epoch)
        if self.ema:
            if "model_ema" in checkpoint:
                load_weights(self.ema.module, {"model": checkpoint["model_ema"]}, path)
            else:
                logger.info(
                    f"{path}: holds no averaged weights; model_ema starts with its plain ones"
                )
        self.load_statistics(checkpoint, path)
        set_rng_state(checkpoint.get("rng", []), self.ranks, path)
        logger.info(f"resuming {path} at epoch {self.epoch}, step {self.meter.steps}")

    def train_epoch(self):
        """The rest of this epoch. Returns samples per second; ends early, with meter.stop set, on a
        signal.
        """
        cfg, meter, optimizer = self.cfg, self.meter, self.optimizer
        loader = data.train_loader(cfg, self.train_set, self.epoch, meter.steps, self.ranks)
        autocast = make_autocast(cfg, self.ranks)
        self.ddp.train()
        first, lr = meter.steps, optimizer.param_groups[0]["lr"]
        bar = Progress(loader, self, "samples", cfg.print_freq)
        for step, (frames, targets) in enumerate(bar, start=first + 1):
            self.point("lr", lr, step - 1)
            with autocast():
                loss = self.criterion(self.ddp(frames), targets)
            optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.skips.step(self.scaler, optimizer)
            self.scaler.update()
            if self.ema:
                self.ema.update(self.model)
            meter.update(loss, self.stop or loader.loader.fault)
            bar.show(step, lr)
            if meter.stop:
                break
        meter.flush()
        check_weights(self.model, meter.steps)
        self.fault = loader.loader.fault
        return bar.speed(meter.steps)

    # Copied from cifar10/train.py
    def own_record(self):
        return {"lr": self.optimizer.param_groups[0]["lr"]}

    def epoch_done(self):
        self.scheduler.step(self.epoch)


def main(argv=None):
    cfg, notes, given = load_config(
        options.KEYS,
        options.NO_EFFECT,
        options.DEFAULT_CONFIG,
        argv,
        "Train QKFormer on CIFAR10-DVS.",
    )
    if data.mixes(cfg) and cfg.batch_size % 2:
        raise UserError(f"batch_size is {cfg.batch_size}; mixup and cutmix need an even one")
    if cfg.cutmix_minmax and cfg.cutmix_minmax[0] >= cfg.cutmix_minmax[1]:
        raise UserError(
            f"cutmix_minmax is {cfg.cutmix_minmax}; the first must be smaller than the second"
        )
    if cfg.T_train is not None and cfg.T_train > cfg.T:
        raise UserError(
            f"T_train is {cfg.T_train}; a sample has only T = {cfg.T} frames to draw from"
        )
    ranks = Ranks(cfg.device, cfg.timeout_minutes)
    set_up_log(ranks)
    for note in notes:
        logger.info(note)
    if cfg.test_only:
        _, resume, *_ = find_run(cfg, cfg.output_dir)
        if cfg.resume and resume is None:
            raise UserError(f"resume is auto, but {cfg.experiment} has no last.pth to test")
        measure(cfg, given, ranks, resume or find_checkpoint(cfg, cfg.output_dir))
        return 0
    folder, resume = ranks.from_main(lambda: open_run(cfg, cfg.output_dir))
    path = resume or cfg.finetune
    checkpoint = load_checkpoint(path) if path else None
    if checkpoint:
        settle(cfg, given, checkpoint, path, purpose="resume" if resume else "finetune")
    if cfg.deterministic:
        set_deterministic()
    random_seed(
        cfg.seed, 0
    )  # the same on every rank, as in the release; a batch has a seed of its own
    torch.backends.cudnn.deterministic = True
    trainer = Trainer(cfg, given, ranks, folder, checkpoint, path, finetune=not resume)
    if resume:
        trainer.resume(checkpoint, resume)
        trainer.best = ranks.from_main(lambda: trainer.keep_best(resume))
    elif cfg.start_epoch:
        trainer.epoch = cfg.start_epoch
        trainer.scheduler.step(cfg.start_epoch)
    with StopSignal() as trainer.stop:
        return trainer.fit()


if __name__ == "__main__":
    run(main)
