"""Train QKFormer on ImageNet.

Usage:
    torchrun --nproc_per_node=8 train.py --data_path /data/imagenet              # the published HST-10-384 run
    torchrun --nproc_per_node=8 train.py -c hst_10_768.yml --resume auto         # starts, or goes on where it was
    torchrun --nproc_per_node=8 train.py -c finetune_384.yml --finetune hst_10_768.pth
    python train.py --eval --finetune hst_10_384.pth
python -m torch.distributed.launch and srun (one task a GPU) work as torchrun does.
"""

import contextlib
import json
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import distribute_bn, random_seed
from torch.utils.tensorboard import SummaryWriter

import data
import optim
import options
from build import load_model, load_tested, measure, number
from checkpoint import load_checkpoint, make_folder, open_log, open_run, save_checkpoint
from config import UserError, load_config
from engine import LossMeter, check_weights, evaluate, make_autocast, progress
from runtime import Ranks, StopSignal, get_rng_state, logger, peak_memory_mb, run, set_rng_state, set_up_log


@contextlib.contextmanager
def writing(folder):
    """What goes wrong within with a file of the folder, such as on a full disk, becomes one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: can't be written: {error.strerror or error}") from None


class Trainer:
    """Model, data and optimizer of one run, and where the run stands."""

    def __init__(self, cfg, ranks, stop, folder, model, cross_sample_lif):
        self.cfg, self.ranks, self.stop, self.folder = cfg, ranks, stop, folder
        self.model, self.cross_sample_lif = model, cross_sample_lif
        self.train_set, classes = data.build_dataset(cfg, True, ranks)
        self.test_set, test_classes = data.build_dataset(cfg, False, ranks)
        if classes != test_classes:
            other = sorted(set(classes) ^ set(test_classes))[0]
            raise UserError(f"{cfg.data_path}: train/ and val/ are of different classes; only one has {other}")
        self.micro_batch = cfg.batch_size * ranks.world_size
        self.images_per_step = optim.images_per_step(cfg, ranks.world_size)
        if self.images_per_step > len(self.train_set):
            whole = f"batch_size {cfg.batch_size} x accum_iter {cfg.accum_iter} x {ranks.world_size} ranks"
            raise UserError(f"{whole} is more than the {len(self.train_set)} training images")
        if cfg.batch_size * cfg.time_step * (cfg.input_size // 16) ** 2 == 1:
            small = f"batch_size 1 at input_size {cfg.input_size} and time_step 1"
            raise UserError(f"{small} leaves BatchNorm a single value a channel; make one of them larger")
        self.micro_steps = len(self.train_set) // self.micro_batch  # of an epoch, with those left over at its end
        self.steps = len(self.train_set) // self.images_per_step  # of the optimizer
        self.lr = optim.peak_lr(cfg, ranks.world_size)
        self.ddp = model
        if ranks.world_size > 1:
            self.ddp = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        self.optimizer = optim.build_optimizer(cfg, model)
        self.criterion = SoftTargetCrossEntropy() if data.mixes(cfg) else LabelSmoothingCrossEntropy(cfg.smoothing)
        scaled = cfg.amp and ranks.device.type == "cuda" and cfg.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=scaled)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.epoch, self.best, self.meter = cfg.start_epoch, -1.0, LossMeter(ranks)
        self.saved = time.monotonic()
        self.log = self.board = self.steps_board = None

        logger.info(
            f"{cfg.model}: {self.parameters:,} parameters; {ranks.device}, {ranks.world_size} rank(s); "
            f"writing to {folder}"
        )
        logger.info(
            f"{self.images_per_step} images a step (batch_size {cfg.batch_size} x accum_iter {cfg.accum_iter} x "
            f"{ranks.world_size} ranks), lr {self.lr:g}, last epoch {cfg.epochs - 1}"
        )
        if (note := optim.differences(cfg, ranks.world_size)) is not None:
            logger.info(note)
        if cfg.amp and ranks.device.type != "cuda" and cfg.amp_dtype == "float16":
            logger.info("amp: float16 needs a GPU; this run is in float32 (amp_dtype: bfloat16 works on a CPU)")

    def state(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch - 1,
            "step": self.meter.steps,
            "loss_total": self.meter.total,
            "global_batch": self.images_per_step,
            "best": self.best,
            "rng": self.ranks.gather(get_rng_state(self.ranks.device)),
            "config": vars(self.cfg),
            "cross_sample_lif": self.cross_sample_lif,
        }

    def resume(self, checkpoint, path):
        """Go on where the checkpoint was written, within an epoch too; one of the release's starts its next epoch."""
        self.epoch = number(checkpoint, "epoch", -1, path) + 1
        self.best = number(checkpoint, "best", -1.0, path)
        had = number(checkpoint, "global_batch", self.images_per_step, path)
        if had != self.images_per_step:
            keep = f"; accum_iter: {had // self.micro_batch} would keep that" if had % self.micro_batch == 0 else ""
            logger.info(f"warning: {self.images_per_step} images a step, but {path} had {had}{keep}")
        if steps := number(checkpoint, "step", 0, path):
            # The epoch's order of images is the same for every batch size and number of ranks.
            self.meter.steps = steps * had // self.images_per_step
            self.meter.total = number(checkpoint, "loss_total", 0.0, path) / steps * self.meter.steps
        try:
            optim.load_optimizer(self.optimizer, checkpoint["optimizer"])
            if checkpoint.get("scaler"):  # empty where the run was not in float16
                self.scaler.load_state_dict(checkpoint["scaler"])
        except Exception as error:  # whatever the file has there
            reason = f"no {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
            raise UserError(f"{path}: no fitting optimizer state ({reason}); finetune does without") from None
        rng = checkpoint.get("rng") or []
        if len(rng) == self.ranks.world_size:
            set_rng_state(rng[self.ranks.rank], self.ranks.device)
        logger.info(f"resuming {path} at epoch {self.epoch}, step {self.meter.steps}")

    # Copied from cifar10/train.py
    def save(self, *names):
        state = self.state()
        self.ranks.from_main(lambda: [save_checkpoint(state, self.folder / name) for name in names])

    def save_within_epoch(self):
        """Write last.pth where that was save_minutes ago. Rank 0's clock counts, since all ranks have to take part."""
        minutes = self.cfg.save_minutes
        if minutes and self.ranks.from_main(lambda: time.monotonic() - self.saved >= 60 * minutes):
            check_weights(self.model, self.meter.steps)
            self.save("last.pth")
            self.saved = time.monotonic()

    def train_step(self, batches, autocast):
        """One step of the optimizer on the next accum_iter batches; returns their mean loss on this rank."""
        total = 0.0
        for left in reversed(range(self.cfg.accum_iter)):
            images, targets = next(batches)
            # Only with the last one do ranks exchange gradients.
            with self.ddp.no_sync() if left and self.ranks.world_size > 1 else contextlib.nullcontext():
                with autocast():
                    loss = self.criterion(self.ddp(images), targets)
                self.scaler.scale(loss / self.cfg.accum_iter).backward()
            total += loss.detach()
        if self.cfg.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return total / self.cfg.accum_iter

    def show(self, name, value, step):
        """A point of a TensorBoard curve over the run's steps, those of all epochs counted."""
        if self.steps_board:
            with writing(self.folder):
                self.steps_board.add_scalar(name, value, self.epoch * self.steps + step)

    def show_loss(self):
        """Show the loss that the meter read last, at its own step; it reads one at most between two calls."""
        total, steps = self.shown
        if self.meter.steps > steps:
            self.show("loss", self.meter.total - total, steps)
        self.shown = self.meter.total, self.meter.steps

    def train_epoch(self):
        """The rest of this epoch. Returns images per second; ends early, with meter.stop set, on a signal."""
        cfg, meter, first, start = self.cfg, self.meter, self.meter.steps, time.perf_counter()
        batches = iter(data.train_loader(cfg, self.train_set, self.epoch, first, self.ranks))
        autocast = make_autocast(cfg, self.ranks)
        self.shown = meter.total, meter.steps
        self.ddp.train()
        self.optimizer.zero_grad()
        bar = progress(range(first, self.steps), f"epoch {self.epoch}", self.ranks)
        for step in bar:
            lr = optim.learning_rate(cfg, self.lr, self.epoch, step * cfg.accum_iter, self.micro_steps)
            optim.set_lr(self.optimizer, lr)
            self.show("lr", lr, step)
            meter.update(self.train_step(batches, autocast), self.stop)
            self.show_loss()
            done = step + 1
            if done % cfg.log_interval == 0 or done == self.steps:
                meter.flush()
                speed = (done - first) * self.images_per_step / (time.perf_counter() - start)
                left = ((cfg.epochs - self.epoch) * self.steps - done) * self.images_per_step / speed
                left = timedelta(seconds=round(left))
                text = f"loss {meter.mean:.4f}, lr {lr:.3g}, {speed:.0f} images/s, {left} left"
                if bar.disable:
                    logger.info(f"epoch {self.epoch}, step {done}/{self.steps}: {text}")
                bar.set_postfix_str(text)
                if done < self.steps:
                    self.save_within_epoch()
            if meter.stop:
                break
        meter.flush()
        self.show_loss()
        check_weights(self.model, meter.steps)
        return (meter.steps - first) * self.images_per_step / (time.perf_counter() - start)

    def open_files(self):
        """The run's folder with its log, and TensorBoard's writers; for rank 0."""
        make_folder(self.folder, self.cfg)
        with writing(self.folder):
            self.log, self.board = open_log(self.folder, self.epoch)
            # In a folder of its own: of what a resumed run does again, TensorBoard drops all from one x on, and here
            # x is a step, there an epoch.
            here = self.epoch * self.steps + self.meter.steps
            self.steps_board = SummaryWriter(str(self.folder / "steps"), purge_step=here)

    def write_log(self, record):
        """An epoch's line and points; for rank 0."""
        with writing(self.folder):
            with open(self.log, "a") as file:
                file.write(json.dumps(record) + "\n")
            for name in ("test_acc1", "test_acc5", "test_loss", "train_loss", "images_per_second"):
                self.board.add_scalar(f"perf/{name}", record[name], self.epoch)
            self.board.flush()
            self.steps_board.flush()

    def fit(self):
        """Train to the last epoch. Returns the exit code: 0, or 128 + the number of the signal that ended the run."""
        cfg = self.cfg
        test_loader = data.test_loader(cfg, self.test_set, self.ranks)
        eval_autocast = make_autocast(cfg, self.ranks, cfg.eval_amp)
        if self.epoch >= cfg.epochs:
            logger.info(f"nothing to do: all {cfg.epochs} epochs are done")
        self.ranks.from_main(self.open_files)
        while self.epoch < cfg.epochs:
            start = time.perf_counter()
            try:
                speed = self.train_epoch()
            except FloatingPointError as error:
                last = self.folder / "last.pth"
                kept = f"{last} is as it was" if last.is_file() else "nothing was saved yet"
                lr = self.optimizer.param_groups[-1]["lr"]
                raise UserError(f"{error} of epoch {self.epoch}, learning rate {lr:g}; {kept}") from None
            test = None
            if not self.meter.stop:
                if self.ranks.world_size > 1:
                    distribute_bn(self.model, self.ranks.world_size, reduce=False)
                test = evaluate(self.model, test_loader, self.ranks, eval_autocast, self.stop)
            if test is None:
                self.save("last.pth")
                number = self.stop.number or signal.SIGTERM
                where = f"in epoch {self.epoch} after step {self.meter.steps}"
                logger.info(f"{signal.Signals(number).name}: stopped {where}; resume: auto goes on from there")
                return 128 + number

            is_best, self.best = test.top1 > self.best, max(test.top1, self.best)
            record = {
                "train_lr": optim.mean_lr(cfg, self.lr, self.epoch, self.micro_steps),
                "train_loss": self.meter.mean,
                "test_loss": test.loss,
                "test_acc1": test.top1,
                "test_acc5": test.top5,
                "epoch": self.epoch,
                "n_parameters": self.parameters,
                "seconds": round(time.perf_counter() - start, 2),
                "images_per_second": round(speed, 1),
                "peak_memory_mb": peak_memory_mb(self.ranks.device),
            }
            self.ranks.from_main(lambda record=record: self.write_log(record))
            logger.info(
                f"epoch {self.epoch}: train loss {self.meter.mean:.4f}, test loss {test.loss:.4f}, "
                f"top-1 {test.top1:.2f} % (best {self.best:.2f} %), top-5 {test.top5:.2f} %, {record['seconds']:.0f} s"
            )
            self.meter = LossMeter(self.ranks)
            self.epoch += 1
            self.save(*(["best.pth"] if is_best else []), "last.pth")
            self.saved = time.monotonic()
        return 0


def main(argv=None):
    description = "Train QKFormer on ImageNet."
    cfg, notes, _ = load_config(options.KEYS, options.NO_EFFECT, options.DEFAULT_CONFIG, argv, description)
    if data.mixes(cfg) and cfg.batch_size % 2:
        raise UserError(f"batch_size is {cfg.batch_size}; mixup and cutmix need an even one")
    if cfg.cutmix_minmax and cfg.cutmix_minmax[0] >= cfg.cutmix_minmax[1]:
        raise UserError(f"cutmix_minmax is {cfg.cutmix_minmax}; the first must be smaller than the second")
    ranks = Ranks(cfg.device)
    set_up_log(ranks)
    for note in notes:
        logger.info(note)
    if cfg.eval:
        path = cfg.finetune if cfg.resume in (None, "auto") else cfg.resume
        if path is None:
            raise UserError("eval needs the path of a checkpoint: --finetune PATH or --resume PATH")
        model, _, published = load_tested(cfg, ranks, path)
        measure(cfg, ranks, model, path, published)
        return 0
    stop = StopSignal()
    random_seed(cfg.seed, ranks.rank)
    torch.backends.cudnn.benchmark = True
    folder, resume = ranks.from_main(lambda: open_run(cfg, cfg.output_dir))
    path = resume or (Path(cfg.finetune) if cfg.finetune else None)
    if cfg.start_epoch and not path:
        raise UserError(
            f"start_epoch is {cfg.start_epoch}, but neither finetune nor resume names weights to go on from"
        )
    checkpoint = load_checkpoint(path) if path else None
    model, cross_sample_lif = load_model(cfg, ranks, checkpoint, path, new_head=not resume)
    trainer = Trainer(cfg, ranks, stop, folder, model, cross_sample_lif)
    if resume:
        trainer.resume(checkpoint, resume)
    return trainer.fit()


if __name__ == "__main__":
    run(main)
