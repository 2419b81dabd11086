# Copied from cifar10/train.py with cifar10.yml->cifar100.yml
"""Train QKFormer on CIFAR.

Usage:
    python train.py                                            # the published run, cifar100.yml
    python train.py -c quickstart.yml                          # on a CPU, with a data set that is already there
    python -m torch.distributed.launch --nproc_per_node=8 train.py
"""

import json
import signal
import time

import timm
import torch
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.utils import dispatch_clip_grad, distribute_bn, random_seed

import data
import model as models
import ms
import options
from checkpoint import (
    load_checkpoint,
    load_weights,
    make_folder,
    open_log,
    open_run,
    resolve_semantics,
    save_checkpoint,
)
from config import UserError, load_config
from engine import LossMeter, check_weights, evaluate, make_autocast, progress
from fused import available
from lif import resolve_backend
from runtime import Ranks, StopSignal, get_rng_state, logger, peak_memory_mb, run, set_rng_state, set_up_log


def build_model(cfg, cross_sample_lif, ranks):
    """The configuration's model, on this rank's device."""
    if cfg.compile and cfg.checkpoint_stages:
        raise UserError("compile and checkpoint_stages do not go together; leave one of them out")
    names = [name for file in (models, ms) for name in timm.list_models(module=file.__name__)]
    if cfg.model not in names:
        raise UserError(f"model is {cfg.model!r}; there are {', '.join(names)}")
    channels, height, width = data.image_size(cfg)
    if height % 4 or width % 4:
        raise UserError(f"images of {height} x {width}: img_size (or input_size) must be a multiple of 4")
    try:
        resolve_backend(cfg.backend, ranks.device.type, torch.float32)  # now, not in the first step
        if cfg.fused:
            available(ranks.device.type, torch.float32, cfg.backend)  # likewise
        model = timm.create_model(
            cfg.model,
            T=cfg.time_step,
            img_size_h=height,
            img_size_w=width,
            patch_size=cfg.patch_size,
            in_channels=channels,
            num_classes=cfg.num_classes,
            embed_dims=cfg.dim,
            num_heads=cfg.num_heads,
            mlp_ratios=cfg.mlp_ratio,
            depths=cfg.layer,
            attention=tuple(cfg.attention),
            drop_path=cfg.drop_path or 0.0,
            cross_sample_lif=cross_sample_lif,
            backend=cfg.backend,
            fused=cfg.fused,
            checkpoint_stages=cfg.checkpoint_stages,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from None
    layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
    model = model.to(ranks.device, memory_format=layout)
    if cfg.compile:
        model.compile(dynamic=False)  # T*B is a number of steps where the release's neuron runs over both
    return model


def build_optimizer(cfg, model):
    """(timm's optimizer, its schedule per epoch, number of epochs with the cooldown); 1-D parameters do not decay."""
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg))
        scheduler, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(cfg))
    except (ValueError, RuntimeError, TypeError, AssertionError, AttributeError) as error:
        raise UserError(f"opt {cfg.opt} with sched {cfg.sched}: {error}") from None
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"opt is {cfg.opt}, which needs second derivatives; the surrogate gradient has none")
    return optimizer, scheduler, num_epochs


class Trainer:
    """Model, data, optimizer and schedule of one run, and where the run stands."""

    def __init__(self, cfg, ranks, stop, folder, checkpoint, path):
        self.cfg, self.ranks, self.stop, self.folder = cfg, ranks, stop, folder
        self.cross_sample_lif, semantics = resolve_semantics(cfg.cross_sample_lif, checkpoint, path)
        self.train_set = data.build_dataset(cfg, True, ranks)
        self.test_set = data.build_dataset(cfg, False, ranks)
        self.model = build_model(cfg, self.cross_sample_lif, ranks)
        if checkpoint:
            load_weights(self.model, checkpoint, path)
        if cfg.sync_bn and ranks.world_size > 1 and ranks.device.type == "cuda":
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.ddp = self.model
        if ranks.world_size > 1:
            self.ddp = torch.nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False)
        self.optimizer, self.scheduler, self.num_epochs = build_optimizer(cfg, self.model)
        self.criterion = SoftTargetCrossEntropy() if data.mixes(cfg) else LabelSmoothingCrossEntropy(cfg.smoothing)
        self.erase = RandomErasing(
            0.0 if cfg.no_aug else cfg.reprob, mode=cfg.remode, max_count=cfg.recount, device=str(ranks.device)
        )
        scaled = cfg.amp and ranks.device.type == "cuda" and cfg.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=scaled)
        self.global_batch = cfg.batch_size * ranks.world_size
        self.epoch, self.best, self.meter = 0, -1.0, LossMeter(ranks)

        logger.info(semantics)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        logger.info(
            f"{cfg.model}: {parameters:,} parameters; {ranks.device}, {ranks.world_size} rank(s), "
            f"{self.global_batch} images a step, lr {cfg.lr:g}, {self.num_epochs} epochs; writing to {folder}"
        )
        if cfg.amp and ranks.device.type != "cuda" and cfg.amp_dtype == "float16":
            logger.info("amp: float16 needs a GPU; this run is in float32 (amp_dtype: bfloat16 works on a CPU)")
        if cfg.sync_bn and ranks.device.type != "cuda":
            logger.info("sync_bn needs GPUs; BatchNorm takes its statistics per rank")

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
            "cross_sample_lif": self.cross_sample_lif,
        }

    def resume(self, checkpoint, path):
        """Go on where the checkpoint was written, within an epoch too; one of the release's starts its next epoch."""
        cfg = self.cfg
        self.epoch = checkpoint.get("epoch", -1) + 1
        theirs = checkpoint.get("metric", checkpoint.get("max_test_acc1"))  # timm's name, the event scripts' name
        self.best = checkpoint.get("best", theirs if isinstance(theirs, float) else -1.0)
        if cfg.start_epoch is not None and cfg.start_epoch != self.epoch:
            self.epoch = cfg.start_epoch
        elif checkpoint.get("step"):
            # The epoch's order of samples is the same for every batch size and number of ranks.
            share = checkpoint["global_batch"] / self.global_batch
            self.meter.steps = int(checkpoint["step"] * share)
            self.meter.total = checkpoint["loss_total"] / checkpoint["step"] * self.meter.steps
            if share != 1:
                logger.info(f"warning: {self.global_batch} images a step, but {path} had {checkpoint['global_batch']}")
        if not cfg.no_resume_opt:
            settings = [{**group, "params": None} for group in self.optimizer.param_groups]
            try:
                if checkpoint.get("config", vars(cfg))["opt"] != cfg.opt:
                    raise ValueError(f"it is of {checkpoint['config']['opt']}, opt is {cfg.opt}")
                self.optimizer.load_state_dict(checkpoint["optimizer"])
                if checkpoint.get("scaler"):  # empty where the run was not in float16
                    self.scaler.load_state_dict(checkpoint["scaler"])
            except (KeyError, ValueError, RuntimeError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
                raise UserError(f"{path}: no fitting optimizer state ({reason}); no_resume_opt does without") from None
            for group, values in zip(self.optimizer.param_groups, settings, strict=True):
                group.update({**values, "params": group["params"]})  # the configuration may have changed
        self.scheduler.step(self.epoch)
        rng = checkpoint.get("rng", [])
        if len(rng) == self.ranks.world_size:
            set_rng_state(rng[self.ranks.rank], self.ranks.device)
        logger.info(f"resuming {path} at epoch {self.epoch}, step {self.meter.steps}")

    def save(self, *names):
        state = self.state()
        self.ranks.from_main(lambda: [save_checkpoint(state, self.folder / name) for name in names])

    def train_epoch(self):
        """The rest of this epoch. Returns images per second; ends early, with meter.stop set, on a signal."""
        cfg, meter, optimizer = self.cfg, self.meter, self.optimizer
        loader = data.train_loader(cfg, self.train_set, self.epoch, meter.steps, self.ranks)
        autocast = make_autocast(cfg, self.ranks)
        self.ddp.train()
        start, first, last = time.perf_counter(), meter.steps, meter.steps + len(loader)
        bar = progress(loader, f"epoch {self.epoch}", self.ranks)
        for step, (images, targets) in enumerate(bar, start=first + 1):
            images = self.erase(images)
            if cfg.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with autocast():
                loss = self.criterion(self.ddp(images), targets)
            optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            if cfg.clip_grad is not None:
                self.scaler.unscale_(optimizer)
                dispatch_clip_grad(self.model.parameters(), cfg.clip_grad, cfg.clip_mode)
            self.scaler.step(optimizer)
            self.scaler.update()
            meter.update(loss, self.stop)
            if step % cfg.log_interval == 0 or step == last:
                speed = (step - first) * self.global_batch / (time.perf_counter() - start)
                text = f"loss {meter.mean:.4f}, {speed:.0f} images/s"
                if bar.disable:
                    logger.info(f"epoch {self.epoch}, step {step}/{last}: {text}")
                bar.set_postfix_str(text)
            if meter.stop:
                break
        meter.flush()
        check_weights(self.model, meter.steps)
        return (meter.steps - first) * self.global_batch / (time.perf_counter() - start)

    def fit(self):
        """Train to the last epoch. Returns the exit code: 0, or 128 + the number of the signal that ended the run."""
        cfg = self.cfg
        test_loader = data.test_loader(cfg, self.test_set, self.ranks)
        eval_autocast = make_autocast(cfg, self.ranks, cfg.eval_amp)
        if self.epoch >= self.num_epochs:
            logger.info(f"nothing to do: all {self.num_epochs} epochs are done")
        self.ranks.from_main(lambda: make_folder(self.folder, cfg))
        if self.ranks.main:
            log, board = open_log(self.folder, self.epoch)
        while self.epoch < self.num_epochs:
            start = time.perf_counter()
            lr = self.optimizer.param_groups[0]["lr"]
            try:
                speed = self.train_epoch()
            except FloatingPointError as error:
                last = self.folder / "last.pth"
                kept = f"{last} is as it was" if last.is_file() else "nothing was saved yet"
                raise UserError(f"{error} of epoch {self.epoch}, learning rate {lr:g}; {kept}") from None
            test = None
            if not self.meter.stop:
                if self.ranks.world_size > 1:
                    distribute_bn(self.model, self.ranks.world_size, reduce=cfg.dist_bn == "reduce")
                test = evaluate(self.model, test_loader, self.ranks, eval_autocast, self.stop)
            if test is None:
                self.save("last.pth")
                number = self.stop.number or signal.SIGTERM
                where = f"in epoch {self.epoch} after step {self.meter.steps}"
                logger.info(f"{signal.Signals(number).name}: stopped {where}; resume: auto goes on from there")
                return 128 + number

            record = {
                "epoch": self.epoch,
                "lr": lr,
                "train_loss": self.meter.mean,
                "test_loss": test.loss,
                "test_acc1": test.top1,
                "test_acc5": test.top5,
                "seconds": round(time.perf_counter() - start, 2),
                "images_per_second": round(speed, 1),
                "peak_memory_mb": peak_memory_mb(self.ranks.device),
            }
            is_best, self.best = test.top1 > self.best, max(test.top1, self.best)
            if self.ranks.main:
                with open(log, "a") as file:
                    file.write(json.dumps(record) + "\n")
                for name, value in record.items():
                    board.add_scalar(name, value, self.epoch)
                board.flush()
            logger.info(
                f"epoch {self.epoch}: train loss {self.meter.mean:.4f}, test loss {test.loss:.4f}, "
                f"top-1 {test.top1:.2f} % (best {self.best:.2f} %), top-5 {test.top5:.2f} %, {record['seconds']:.0f} s"
            )
            self.scheduler.step(self.epoch + 1, test.top1)
            self.meter = LossMeter(self.ranks)
            self.epoch += 1
            self.save(*(["best.pth"] if is_best else []), "last.pth")
        return 0


def main(argv=None):
    cfg, notes, _ = load_config(
        options.KEYS, options.NO_EFFECT, options.DEFAULT_CONFIG, argv, "Train QKFormer on CIFAR."
    )
    if data.mixes(cfg) and cfg.batch_size % 2:
        raise UserError(f"batch_size is {cfg.batch_size}; mixup and cutmix need an even one")
    if cfg.cutmix_minmax and cfg.cutmix_minmax[0] >= cfg.cutmix_minmax[1]:
        raise UserError(f"cutmix_minmax is {cfg.cutmix_minmax}; the first must be smaller than the second")
    ranks = Ranks(cfg.device)
    set_up_log(ranks)
    for note in notes:
        logger.info(note)
    stop = StopSignal()
    folder, resume = ranks.from_main(lambda: open_run(cfg, cfg.output))
    path = resume or cfg.initial_checkpoint
    checkpoint = load_checkpoint(path) if path else None
    random_seed(cfg.seed, ranks.rank)
    torch.backends.cudnn.benchmark = True
    trainer = Trainer(cfg, ranks, stop, folder, checkpoint, path)
    if resume:
        trainer.resume(checkpoint, resume)
    elif cfg.start_epoch:
        trainer.epoch = cfg.start_epoch
        trainer.scheduler.step(cfg.start_epoch)
    return trainer.fit()


if __name__ == "__main__":
    run(main)
