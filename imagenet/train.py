"""Train QKFormer on ImageNet.

Usage:
    torchrun --nproc_per_node=8 train.py --data_path /data/imagenet      # the published HST-10-384
    torchrun --nproc_per_node=8 train.py -c hst_10_768.yml --resume auto      # starts, or goes on
    torchrun --nproc_per_node=8 train.py -c finetune_384.yml --finetune hst_10_768.pth
    python train.py --eval --finetune hst_10_384.pth
    python train.py -c quickstart.yml                               # a minute on a CPU, no download

python -m torch.distributed.launch and srun (one task a GPU) work as torchrun does.
"""

import contextlib
import time
from pathlib import Path

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3, random_seed

import data
import optim
import options
from build import load_model, measure, settle
from harness.checkpoint import check_optimizer, load_checkpoint, load_weights, number
from harness.config import UserError, load_config
from harness.engine import Progress, Skips, check_weights, make_autocast
from harness.graph import graphed
from harness.loop import Run
from harness.loss import TET
from harness.ranks import Ranks
from harness.runs import open_run, shown
from harness.runtime import (
    StopSignal,
    get_rng_state,
    logger,
    run,
    set_deterministic,
    set_rng_state,
    set_up_log,
)


class Trainer(Run):
    """Model, data and optimizer of one run, and where the run stands.

    Args:
        cfg, given: the configuration, and what of it was set where.
        ranks, folder: of this run.
        model, cross_sample_lif: what load_model gives.
    """

    data = data

    def __init__(self, cfg, given, ranks, folder, model, cross_sample_lif):
        self.cfg, self.given, self.ranks, self.folder = cfg, given, ranks, folder
        self.model, self.cross_sample_lif = model, cross_sample_lif
        self.train_set = data.build_dataset(cfg, True, ranks)
        self.test_set = data.build_dataset(cfg, False, ranks)
        self.classes = self.train_set.classes
        self.micro_batch = cfg.batch_size * ranks.world_size
        self.global_batch = optim.images_per_step(cfg, ranks.world_size)
        if self.global_batch > len(self.train_set):
            batches = f"batch_size {cfg.batch_size} x accum_iter {cfg.accum_iter}"
            whole = f"{batches} x {ranks.world_size} ranks"
            found = f"{whole} is more than the {len(self.train_set)} training images"
            raise UserError(f"{found}; make batch_size or accum_iter smaller")
        if cfg.batch_size * cfg.time_step * (cfg.input_size // 16) ** 2 == 1:
            small = f"batch_size 1 at input_size {cfg.input_size} and time_step 1"
            raise UserError(
                f"{small} leaves BatchNorm a single value a channel; make one of them larger"
            )
        self.micro_steps = (
            len(self.train_set) // self.micro_batch
        )  # of an epoch, with those left over at its end
        self.steps = len(self.train_set) // self.global_batch  # of the optimizer
        self.lr = optim.peak_lr(cfg, ranks.world_size)
        self.ddp = graphed(model, cfg, ranks, training=True)
        if ranks.world_size > 1:
            # Running statistics are each rank's own in training; test() makes them alike.
            self.ddp = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        self.ema = None
        if cfg.model_ema:  # after DDP has sent rank 0's weights: each rank keeps the same average
            self.ema = ModelEmaV3(
                model, decay=cfg.model_ema_decay, device="cpu" if cfg.model_ema_force_cpu else None
            )
        self.optimizer = optim.build_optimizer(cfg, model)
        self.criterion = (
            SoftTargetCrossEntropy()
            if data.mixes(cfg)
            else LabelSmoothingCrossEntropy(cfg.smoothing)
        )
        if cfg.loss == "tet":
            self.criterion, self.model.per_step = TET(self.criterion, cfg.tet_weight), True
        scaled = cfg.amp and ranks.device.type == "cuda" and cfg.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=scaled)
        self.skips = Skips(self.optimizer)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.num_epochs = cfg.epochs
        self.epoch, self.best, self.meter = cfg.start_epoch, -1.0, self.new_meter()
        self.saved = time.monotonic()

        logger.info(
            f"{cfg.model}, T = {cfg.time_step}: {self.parameters:,} parameters; {ranks.device}, "
            f"{ranks.world_size} rank(s); writing to {shown(folder)}"
        )
        logger.info(
            f"{self.global_batch} images a step (batch_size {cfg.batch_size} x accum_iter "
            f"{cfg.accum_iter} x "
            f"{ranks.world_size} ranks), lr {self.lr:g}, last epoch {cfg.epochs - 1}"
        )
        if (note := optim.differences(cfg, ranks.world_size)) is not None:
            logger.info(note)
        if cfg.amp and ranks.device.type != "cuda" and cfg.amp_dtype == "float16":
            logger.info(
                "amp: float16 needs a GPU; this run is in float32 (amp_dtype: bfloat16 works on a "
                "CPU)"
            )

    def state(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
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
            "classes": list(self.classes),
            **({"model_ema": self.ema.module.state_dict()} if self.ema else {}),
        }

    def resume(self, checkpoint, path):
        """Go on where the checkpoint was written, within an epoch too; one of the release's starts
        its next epoch.
        """
        self.epoch = number(checkpoint, "epoch", -1, path) + 1
        self.best = number(checkpoint, "best", -1.0, path)
        had = number(checkpoint, "global_batch", self.global_batch, path, low=1)
        if had != self.global_batch:
            keep = (
                f"; accum_iter: {had // self.micro_batch} would keep that"
                if had % self.micro_batch == 0
                else ""
            )
            logger.info(f"warning: {self.global_batch} images a step, but {path} had {had}{keep}")
        if steps := number(checkpoint, "step", 0, path, low=0):
            # The epoch's order of images is the same for every batch size and number of ranks.
            self.meter.steps = steps * had // self.global_batch
            total = number(checkpoint, "loss_total", 0.0, path)
            self.meter.total = total * (self.meter.steps / steps)  # to the bit where they are equal
            if self.meter.steps > self.steps:
                raise UserError(
                    f"{path}: can't be resumed: its step is {steps}; an epoch has {self.steps} here"
                )
        try:
            optim.load_optimizer(self.optimizer, checkpoint["optimizer"])
            if checkpoint.get("scaler"):  # empty where the run was not in float16
                self.scaler.load_state_dict(checkpoint["scaler"])
            check_optimizer(self.optimizer, checkpoint.get("scaler"))
        except Exception as error:  # whatever the file has there
            reason = f"no {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
            why = f"no fitting optimizer state ({reason}); --finetune takes its weights alone"
            raise UserError(f"{path}: {why}") from None
        if self.ema:
            if "model_ema" in checkpoint:
                load_weights(self.ema.module, {"model": checkpoint["model_ema"]}, path)
            else:
                logger.info(
                    f"{path}: holds no averaged weights; model_ema starts with its plain ones"
                )
        set_rng_state(checkpoint.get("rng", []), self.ranks, path)
        logger.info(f"resuming {path} at epoch {self.epoch}, step {self.meter.steps}")

    def save_within_epoch(self):
        """Write last.pth every save_minutes, by rank 0's clock, since all ranks must take part."""
        minutes = self.cfg.save_minutes
        if minutes and self.ranks.from_main(lambda: time.monotonic() - self.saved >= 60 * minutes):
            check_weights(self.model, self.meter.steps)
            self.save("last.pth")
            self.saved = time.monotonic()

    def train_step(self, batches, autocast):
        """One step of the optimizer on the next accum_iter batches; returns their mean loss on this
        rank.
        """
        total = 0.0
        for left in reversed(range(self.cfg.accum_iter)):
            images, targets = next(batches)
            # Ranks exchange gradients only in the backward pass of the last batch.
            with (
                self.ddp.no_sync()
                if left and self.ranks.world_size > 1
                else contextlib.nullcontext()
            ):
                with autocast():
                    loss = self.criterion(self.ddp(images), targets)
                self.scaler.scale(loss / self.cfg.accum_iter).backward()
            total += loss.detach()
        if self.cfg.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip_grad)
        self.skips.step(self.scaler, self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model)
        return total / self.cfg.accum_iter

    def train_epoch(self):
        """The rest of this epoch. Returns images per second; ends early, with meter.stop set, on a
        signal.
        """
        cfg, meter, first = self.cfg, self.meter, self.meter.steps
        loader = data.train_loader(cfg, self.train_set, self.epoch, first, self.ranks)
        batches = iter(loader)
        autocast = make_autocast(cfg, self.ranks)
        self.ddp.train()
        self.optimizer.zero_grad()
        bar = Progress(range(first, self.steps), self, "images", cfg.log_interval)
        for step in bar:
            lr = optim.learning_rate(
                cfg, self.lr, self.epoch, step * cfg.accum_iter, self.micro_steps
            )
            optim.set_lr(self.optimizer, lr)
            self.point("lr", lr, step)
            loss = self.train_step(batches, autocast)
            meter.update(loss, self.stop or loader.loader.fault)
            if bar.show(step + 1, lr) and step + 1 < self.steps:
                self.save_within_epoch()
            if meter.stop:
                break
        meter.flush()
        check_weights(self.model, meter.steps)
        self.fault = loader.loader.fault
        return bar.speed(meter.steps)

    def own_record(self):
        lr = optim.mean_lr(self.cfg, self.lr, self.epoch, self.micro_steps)
        return {"train_lr": lr, "n_parameters": self.parameters}

    def epoch_done(self):
        self.saved = time.monotonic()


def main(argv=None):
    description = "Train QKFormer on ImageNet."
    cfg, notes, given = load_config(
        options.KEYS, options.NO_EFFECT, options.DEFAULT_CONFIG, argv, description
    )
    if data.mixes(cfg) and cfg.batch_size % 2:
        raise UserError(f"batch_size is {cfg.batch_size}; mixup and cutmix need an even one")
    if cfg.cutmix_minmax and cfg.cutmix_minmax[0] >= cfg.cutmix_minmax[1]:
        raise UserError(
            f"cutmix_minmax is {cfg.cutmix_minmax}; the first must be smaller than the second"
        )
    ranks = Ranks(cfg.device, cfg.timeout_minutes)
    set_up_log(ranks)
    for note in notes:
        logger.info(note)
    if cfg.eval:
        path = cfg.finetune if cfg.resume in (None, "auto") else cfg.resume
        if path is None:
            raise UserError("eval needs the path of a checkpoint: --finetune PATH or --resume PATH")
        measure(cfg, given, ranks, Path(path))
        return 0
    if cfg.deterministic:
        set_deterministic()
    random_seed(cfg.seed, ranks.rank)
    torch.backends.cudnn.benchmark = not cfg.deterministic
    folder, resume = ranks.from_main(lambda: open_run(cfg, cfg.output_dir))
    path = resume or (Path(cfg.finetune) if cfg.finetune else None)
    if cfg.start_epoch and not path:
        raise UserError(
            f"start_epoch is {cfg.start_epoch}, but neither finetune nor resume names weights to "
            f"go on from"
        )
    checkpoint = load_checkpoint(path) if path else None
    if checkpoint:
        settle(cfg, given, checkpoint, path, "resume" if resume else "finetune")
    model, cross_sample_lif = load_model(cfg, ranks, checkpoint, path, new_head=not resume)
    trainer = Trainer(cfg, given, ranks, folder, model, cross_sample_lif)
    if resume:
        trainer.resume(checkpoint, resume)
        trainer.best = ranks.from_main(lambda: trainer.keep_best(resume))
    with StopSignal() as trainer.stop:
        return trainer.fit()


if __name__ == "__main__":
    run(main)
