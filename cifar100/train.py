# Copied from cifar10/train.py with cifar10.yml->cifar100.yml
"""Train QKFormer on CIFAR.

Usage:
    python train.py                                            # the published run, cifar100.yml
    python train.py -c quickstart.yml                          # minutes on a CPU, no download
    python -m torch.distributed.launch --nproc_per_node=8 train.py
    python train.py --resume auto                              # go on after a stop or a crash
"""

import harness  # noqa: F401  # isort: skip  # sets what torch reads from the environment

from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.utils import dispatch_clip_grad

import data
import options
from harness.config import read_settings
from harness.log import telling
from harness.meters import Progress, make_autocast
from harness.process import run
from harness.run import Run, prepare_data


class Trainer(Run):
    """The recipe: loss, optimizer, schedule, and a training step. The rest is harness/run.py's."""

    def prepare(self):
        cfg = self.cfg
        reprob, device = 0.0 if cfg.no_aug else cfg.reprob, str(self.ranks.device)
        self.erase = RandomErasing(reprob, mode=cfg.remode, max_count=cfg.recount, device=device)
        self.criterion = LabelSmoothingCrossEntropy(cfg.smoothing)
        if data.mixes(cfg):
            self.criterion = SoftTargetCrossEntropy()
        self.optimizer, self.scheduler, self.num_epochs = build_optimizer(cfg, self.model)

    def train_epoch(self) -> float:
        """Train to the end of this epoch, or to a signal (meter.stop); gives images per second."""
        cfg, ranks, meter, optimizer = self.cfg, self.ranks, self.meter, self.optimizer
        loader = data.train_loader(cfg, self.train_set, self.epoch, meter.steps, ranks, self.seed)
        autocast = make_autocast(cfg, ranks)
        self.ddp.train()
        lr = optimizer.param_groups[0]["lr"]
        progress = Progress(self)
        for step, (images, targets) in enumerate(loader, start=meter.steps + 1):
            with autocast():
                loss = self.criterion(self.ddp(self.erase(images)), targets)
            optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            if cfg.clip_grad is not None:
                self.scaler.unscale_(optimizer)
                dispatch_clip_grad(self.model.parameters(), cfg.clip_grad, cfg.clip_mode)
            self.scaler.step(optimizer)
            self.scaler.update()
            if self.ema:
                self.ema.update(self.model)
            self.add_point("lr", lr, step - 1)
            meter.update(loss, self.stop)
            progress.show(step, lr)
            if meter.stop:
                break
        meter.flush()
        return progress.speed(meter.steps)


def build_optimizer(cfg, model):
    """timm's (optimizer, schedule per epoch, epochs with cooldown); 1-D weights do not decay."""
    # Fused, it skips a step where float16 overflowed; else the scaler waits for the GPU each time.
    fused = {"fused": True} if cfg.opt == "adamw" else {}
    settings = f"opt {cfg.opt} with opt_betas {cfg.opt_betas} and sched {cfg.sched}"
    with telling(f"{settings}: "):  # an optimizer of timm fails in its own way on settings
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg), **fused)
        return optimizer, *create_scheduler_v2(optimizer, **scheduler_kwargs(cfg))


def main(argv=None):
    settings = read_settings(options, argv, "train", "Train QKFormer on CIFAR.")
    if settings.prepare:
        return prepare_data(settings, data)
    return Trainer(settings, data, options).fit()


if __name__ == "__main__":
    run(main)
