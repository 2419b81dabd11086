"""A run from its first epoch to its last: train, test, log, save, stop on a signal.

How an epoch is trained is train.py's, whose Trainer is a Run.
"""

import shutil
import signal
import time

from timm.utils import distribute_bn

from .checkpoint import fault_of, save_checkpoint
from .config import UserError
from .engine import LossMeter, evaluate, make_autocast
from .firing import Peek
from .graph import graphed
from .runs import RunLog, make_folder, shown
from .runtime import logger, peak_memory_mb


class Run:
    """What the Trainers of all data sets have in common.

    A Trainer sets data (the module), cfg, ranks, folder, test_set, model, ema, num_epochs, steps
    (of an epoch), epoch, best and meter, and has train_epoch() and state().
    """

    log = None  # rank 0 has one
    stop, fault = False, None  # a StopSignal in training; what the loader died of
    reduce_bn = False  # running statistics for a test: rank 0's; True: their mean over ranks

    def own_record(self):
        """What this data set's log.txt has besides: the learning rate, for one."""
        return {}

    def epoch_done(self):
        """Called after an epoch, when self.epoch is the next one, before it is saved."""

    def new_meter(self):
        """The loss of an epoch, each step of which is a point of a curve."""
        return LossMeter(self.ranks, lambda step, loss: self.point("loss", loss, step))

    def point(self, name, value, step):
        """A point of a curve over the run's steps; `step` counts those of this epoch from 0."""
        if self.log:
            self.log.point(name, value, self.epoch * self.steps + step)

    def statistics(self):
        """{name: running statistic} of this rank's model and of its averaged weights."""
        modules = {"model": self.model, **({"model_ema": self.ema.module} if self.ema else {})}
        return {
            f"{kind}.{name}": buffer
            for kind, module in modules.items()
            for name, buffer in module.named_buffers()
            if "running_" in name
        }

    def load_statistics(self, checkpoint, path):
        """Within an epoch, go on with those of this rank, if as many ranks as now saved theirs."""
        saved = checkpoint.get("statistics")
        if saved is None or not (self.reduce_bn and self.meter.steps):
            return
        try:
            if len(saved) != self.ranks.world_size:
                return
            for name, buffer in self.statistics().items():
                value = saved[self.ranks.rank][name]
                if fault := fault_of(name, value):
                    raise ValueError(f"{name} {fault}")
                buffer.copy_(value)
        except Exception as error:  # whatever the file has there
            why = f"its statistics are not those of its model ({error})"
            raise UserError(f"{path}: can't be resumed: {why}") from None

    def save(self, *names):
        state = self.state()
        if self.reduce_bn and self.meter.steps:  # within an epoch each rank has its own
            own = {name: buffer.cpu() for name, buffer in self.statistics().items()}
            state["statistics"] = self.ranks.gather(own)

        def write():
            for name in names:
                save_checkpoint(state, self.folder / name)

        self.ranks.from_main(write)

    def open_files(self):
        """The run's folder with its log, and the best checkpoint so far; for rank 0."""
        make_folder(self.folder, self.cfg, self.test_set.classes)
        self.log = RunLog(self.folder, self.epoch, self.epoch * self.steps + self.meter.steps)

    def keep_best(self, path):
        """Copy best.pth to a run's new folder. Returns the best top-1, -1 without it; rank 0's."""
        old, new = path.parent / "best.pth", self.folder / "best.pth"
        if self.best >= 0 and not new.is_file():
            if not old.is_file():
                logger.info(f"{old} is missing: best.pth will be the best from here on")
                return -1.0
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(old, new)
        return self.best

    def test(self, loader, autocast):
        """[Metrics of the model, those of its averaged weights where it has some]; None on a
        signal.
        """
        tested = []
        averaged = [self.ema.module] if self.ema and not self.cfg.model_ema_force_cpu else []
        for model in (self.model, *averaged):
            if self.ranks.world_size > 1:
                distribute_bn(model, self.ranks.world_size, reduce=self.reduce_bn)
            # Captured anew each time: between tests a graph would only hold memory.
            model = graphed(model, self.cfg, self.ranks)
            tested.append(evaluate(model, loader, self.ranks, autocast, self.stop))
            if tested[-1] is None:
                return None
        return tested

    def fit(self):
        """Train to the last epoch. Returns the exit code: 0, or 128 + the number of the signal that
        ended the run.
        """
        cfg = self.cfg
        test_loader = Peek(self.data.test_loader(cfg, self.test_set, self.ranks))
        eval_autocast = make_autocast(cfg, self.ranks, cfg.eval_amp)
        if self.epoch >= self.num_epochs:
            logger.info(f"nothing to do: all {self.num_epochs} epochs are done")
        self.ranks.from_main(self.open_files)
        while self.epoch < self.num_epochs:
            start = time.perf_counter()
            try:
                speed = self.train_epoch()
            except FloatingPointError as error:
                last = self.folder / "last.pth"
                lr = self.optimizer.param_groups[-1]["lr"]
                kept = f"{last} is as it was" if last.is_file() else "nothing was saved yet"
                said = f"{error} of epoch {self.epoch}, learning rate {lr:g}; {kept}"
                raise UserError(f"{said}; a smaller lr, or amp_dtype: bfloat16, may help") from None
            tested = None if self.meter.stop else self.test(test_loader, eval_autocast)
            if tested is None:
                self.save("last.pth")
                where = f"stopped in epoch {self.epoch} after step {self.meter.steps}"
                if self.fault:
                    raise UserError(
                        f"a worker of the loader was lost: {where}; resume: auto goes on"
                    )
                why = signal.Signals(self.stop.number).name if self.stop else "another rank"
                logger.info(f"{why}: {where}; resume: auto goes on from there")
                return 128 + (self.stop.number or signal.SIGTERM)

            test, *averaged = tested
            record = {
                "epoch": self.epoch,
                **self.own_record(),
                "train_loss": self.meter.mean,
                "test_loss": test.loss,
                "test_acc1": test.top1,
                "test_acc5": test.top5,
                **({"ema_acc1": averaged[0].top1} if averaged else {}),
                "seconds": round(time.perf_counter() - start, 2),
                "images_per_second": round(speed, 1),
                "peak_memory_mb": peak_memory_mb(self.ranks.device),
                "firing_rate": test_loader.rates(self.model, eval_autocast)
                if self.ranks.main
                else {},
            }
            is_best, self.best = test.top1 > self.best, max(test.top1, self.best)
            self.ranks.from_main(lambda record=record: self.log.epoch(record))
            logger.info(
                f"epoch {self.epoch}: train loss {self.meter.mean:.4f}, test loss {test.loss:.4f}, "
                f"top-1 {test.top1:.2f} % (best {self.best:.2f} %), top-5 {test.top5:.2f} %"
                + "".join(f", averaged weights {metrics.top1:.2f} %" for metrics in averaged)
                + f", {record['seconds']:.0f} s"
            )
            self.meter = self.new_meter()
            self.epoch += 1
            self.epoch_done()
            self.save(*(["best.pth"] if is_best else []), "last.pth")
        if self.best >= 0:
            logger.info(f"best top-1 {self.best:.2f} %: {shown(self.folder / 'best.pth')}")
        return 0
