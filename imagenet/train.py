"""Train QKFormer on ImageNet.

Usage:
    torchrun --nproc_per_node=8 train.py --data_path /data/imagenet      # the published HST-10-384
    torchrun --nproc_per_node=8 train.py -c hst_10_768.yml --resume auto      # starts, or goes on
    torchrun --nproc_per_node=8 train.py -c finetune_384.yml --finetune hst_10_768.pth
    python train.py --eval --finetune hst_10_384.pth
    python train.py -c quickstart.yml                               # a minute on a CPU, no download

python -m torch.distributed.launch and srun (one task a GPU) work as torchrun does.
"""

import harness  # noqa: F401  # isort: skip  # sets what torch reads from the environment

import contextlib
import time
from pathlib import Path

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

import data
import optim
import options
from harness.config import read_settings
from harness.log import UserError, logger
from harness.meters import Progress, make_autocast
from harness.process import run
from harness.run import Run, enter, prepare_data
from released import measure_released


class Trainer(Run):
    """The recipe: loss, optimizer, schedule, and a training step. The rest is harness/run.py's."""

    start_again = False  # start_epoch is of a run that starts from the weights of finetune

    def prepare(self):
        cfg, world_size = self.cfg, self.ranks.world_size
        self.criterion = LabelSmoothingCrossEntropy(cfg.smoothing)
        if data.mixes(cfg):
            self.criterion = SoftTargetCrossEntropy()
        self.optimizer = optim.build_optimizer(cfg, self.model)
        self.lr = optim.peak_lr(cfg, world_size)
        self.micro_steps = len(self.train_set) // self.micro_batch  # with those left over
        self.num_epochs = cfg.epochs
        if cfg.start_epoch and not self.path:
            start = f"start_epoch is {cfg.start_epoch}"
            raise UserError(f"{start}; finetune or resume must name weights")
        if (note := optim.differences(cfg, world_size)) is not None:
            logger.info(note)

    def train_step(self, batches, autocast):
        """One step of the optimizer on the next accum_iter batches; returns their mean loss on this
        rank.
        """
        total = 0.0
        step = [next(batches) for _ in range(self.accum_iter)]  # whole, before anything changes
        for left, (images, targets) in zip(reversed(range(self.accum_iter)), step, strict=True):
            # Ranks exchange gradients only in the backward pass of the last batch.
            alone = self.ddp.no_sync if left and self.ranks.world_size > 1 else None
            with (alone or contextlib.nullcontext)():
                with autocast():
                    loss = self.criterion(self.ddp(images), targets)
                self.scaler.scale(loss / self.accum_iter).backward()
            total += loss.detach()
        if self.cfg.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model)
        return total / self.accum_iter

    def train_epoch(self) -> float:
        """Train to the end of this epoch, or to a signal (meter.stop); gives images per second."""
        cfg, meter, first = self.cfg, self.meter, self.meter.steps
        loader = data.train_loader(cfg, self.train_set, self.epoch, first, self.ranks, self.seed)
        batches, autocast = iter(loader), make_autocast(cfg, self.ranks)
        self.saved = time.monotonic()
        self.ddp.train()
        self.optimizer.zero_grad()
        progress = Progress(self)
        for step in range(first, self.steps):
            micro_step = step * self.accum_iter
            lr = optim.learning_rate(cfg, self.lr, self.epoch, micro_step, self.micro_steps)
            optim.set_lr(self.optimizer, lr)
            self.add_point("lr", lr, step)
            meter.update(self.train_step(batches, autocast), self.stop)
            if progress.show(step + 1, lr) and step + 1 < self.steps:
                self.save_within_epoch()
            if meter.stop:
                break
        meter.flush()
        return progress.speed(meter.steps)

    def save_within_epoch(self):
        """Write last.pth every save_minutes, by rank 0's clock, since all ranks must take part."""
        minutes = self.cfg.save_minutes
        if minutes and self.ranks.from_main(lambda: time.monotonic() - self.saved >= 60 * minutes):
            self.check_weights()
            self.save("last.pth")
            self.saved = time.monotonic()

    def own_record(self):
        lr = optim.mean_lr(self.cfg, self.lr, self.epoch, self.micro_steps)
        return {"train_lr": lr, "n_parameters": self.parameters}


def main(argv=None):
    settings = read_settings(options, argv, "train", "Train QKFormer on ImageNet.")
    if settings.eval:
        path = settings.finetune if settings.resume in (None, "auto") else settings.resume
        if path is None:
            raise UserError("eval needs the path of a checkpoint: --finetune PATH or --resume PATH")
        measure_released(settings, enter(settings), Path(path))
        return 0
    if settings.prepare:
        return prepare_data(settings, data)
    return Trainer(settings, data, options).fit()


if __name__ == "__main__":
    run(main)
