"""Every key of the event recipe; the defaults are the published run (dvs128-gesture.yml).

A TrainKey is used by train.py alone, a TestKey by test.py alone; a yml may hold both.
"""

from pathlib import Path

import model
from harness.build import learns_tau, ssa_stages
from harness.config import Key, MachineKey, NetworkKey, TestKey, TrainKey, grouped, same

DEFAULT_CONFIG = "dvs128-gesture.yml"
DATA_SET = "event data"  # as in harness/build.py
# @register_model of timm puts a model's name into its file's __all__.
MODELS = {name: getattr(file, name) for file in (model,) for name in file.__all__}

# fmt: off
MODEL = {
    "model": NetworkKey(str, "QKFormer", "model of model.py", fixed=same),
    "time_step": NetworkKey(int, 16, "frames of a sample, which are the time steps", flags=("-T",),
        aliases=("T",), low=1, high=1024),
    "layer": NetworkKey(int, 2, "blocks in all; stage 2 has one fewer", low=2, high=100,
        fixed=same),
    "dim": NetworkKey(int, 256, "D, the width of stage 2", low=16, high=8192, fixed=same),
    "num_heads": NetworkKey(int, 16, "heads of every attention", low=1, high=1024),
    "mlp_ratio": NetworkKey(float, 4, "hidden channels of an MLP over the channels of its input",
        low=0.1, high=64, fixed=same),
    "attention": NetworkKey([str], ["token", "ssa"],
        "attention of each stage: token, channel or ssa",
        choices=("token", "channel", "ssa"), length=(2, 2), fixed=ssa_stages),
    "drop_path": TrainKey(float, 0.0, "rate of stochastic depth at the last block",
        low=0, high=0.99),
    "cross_sample_lif": Key(str, "auto", "true: the last neuron of SSA runs on from one image of "
        "the batch into the next, as in the release; auto: as the checkpoint was trained, false "
        "without one", choices=("auto", "true", "false"), back=""),
    "neuron": NetworkKey(str, "lif",
        "neuron of the whole network: lif, if (without a leak) or plif (each "
        "layer learns its time constant)", choices=("lif", "if", "plif"), fixed=learns_tau),
    "tau": NetworkKey(float, 2.0,
        "membrane time constant of lif, in steps and above 1; of plif, the one "
        "that it starts from", low=1, high=1e6),
    "v_threshold": NetworkKey(float, 1.0,
        "membrane potential at which a neuron fires; attn_lif does at "
        "half of it", low=1e-6, high=1e6),
    "surrogate_alpha": NetworkKey(float, 4.0, "slope of the sigmoid whose gradient a spike has",
        low=1e-6, high=1e6, scripts=("train",)),
    "backend": MachineKey(str, "auto", "what computes the neurons",
        choices=("auto", "torch", "cupy", "spikingjelly")),
    "fused": MachineKey(bool, True,
        "BatchNorm and neuron in one kernel; false computes module by module"),
    "byte_spikes": TrainKey(bool, True, "spikes wait for the backward pass as bytes; false takes "
        "more memory and, on a GPU, less time"),
    "compile": MachineKey(bool, False, "the model goes through torch.compile"),
    "cuda_graph": MachineKey(bool, False,
        "a GPU gets all kernels of a pass in one call; several ranks "
        "train without"),
    "checkpoint_stages": TrainKey([int], [],
        "stages that are computed again in the backward pass, to save memory", low=1, high=2,
        length=(0, 2)),
    "sync_bn": TrainKey(bool, False, "BatchNorm takes its statistics over all ranks, on GPUs"),
    "dist_bn": TrainKey(str, "broadcast", "running statistics that are tested and saved: those of "
        "rank 0 (broadcast) or the mean over the ranks (reduce)",
        choices=("", "broadcast", "reduce")),
}

DATA = {
    "dataset": Key(str, "dvs128-gesture", "shapes: recordings that are made in data_path and need "
        "no download; any other word is the data set", flags=("-d",)),
    "data_path": Key(Path, "./data",
        "folder whose download/ has the recordings; the frames are made beside that",
        aliases=("data_dir",)),
    "num_classes": Key(int, None, "number of classes; none: as many as the data has", null=True,
        aliases=("nb_classes",), low=1, high=100_000,
        fixed=same),
    "batch_size": Key(int, 16, "samples of a training batch, per rank", flags=("-b",),
        low=1, high=65536),
    "val_batch_size": Key(int, None, "samples of a test batch; none: batch_size", flags=("-vb",),
        null=True, low=1, high=65536),
    "workers": MachineKey(int, 4, "processes that load data, per rank", flags=("-j",),
        aliases=("num_workers",), low=0, high=256),
}

AUGMENTATION = {
    "no_aug": TrainKey(bool, False, "no augmentation but mixup, cutmix and T_train"),
    "T_train": TrainKey(int, None, "frames drawn of the T for a training batch; none: all",
        null=True, low=1, high=1024),
    "mixup": TrainKey(float, 0.5, "alpha of the mixup Beta distribution; 0 turns mixup off",
        low=0, high=100),
    "cutmix": TrainKey(float, 0.0, "alpha of the cutmix Beta distribution; 0 turns cutmix off",
        low=0, high=100),
    "cutmix_minmax": TrainKey([float], None, "smallest and largest side of the cut, as shares of "
        "the image; turns cutmix on, without its Beta distribution", null=True, low=0, high=1,
        length=(2, 2), rising=True),
    "mixup_prob": TrainKey(float, 0.5, "probability that a batch is mixed, by mixup or cutmix",
        low=0, high=1),
    "mixup_switch_prob": TrainKey(float, 0.5,
        "probability of cutmix instead of mixup, where both are on", low=0, high=1),
    "mixup_mode": TrainKey(str, "batch",
        "one draw of mixup for each batch, pair or element of a batch",
        choices=("batch", "pair", "elem")),
    "mixup_off_epoch": TrainKey(int, 75,
        "first epoch without mixup and cutmix; 0 never turns them off", low=0, high=100_000),
    "smoothing": TrainKey(float, 0.1, "label smoothing", low=0, high=0.99),
}

OPTIMISATION = {
    "epochs": TrainKey(int, 192, "epochs before those of cooldown_epochs", low=1, high=100_000),
    "start_epoch": TrainKey(int, None, "first epoch; none: the one after the checkpoint's",
        null=True, low=0, high=100_000, back=""),
    "opt": TrainKey(str, "adamw", "optimizer, by timm's name"),
    "opt_eps": TrainKey(float, 1e-8, "AdamW epsilon; none: the optimizer's own", null=True,
        low=0, high=1),
    "opt_betas": TrainKey([float], [0.9, 0.999], "AdamW betas; none: the optimizer's own",
        null=True, low=0, high=0.999999, length=(2, 2)),
    "momentum": TrainKey(float, 0.9, "momentum of SGD and of others that have one",
        low=0, high=0.999999),
    "weight_decay": TrainKey(float, 0.06, "weight decay, of all but biases and 1-D parameters",
        low=0, high=100),
    "sched": TrainKey(str, "cosine", "schedule of the learning rate, by timm's name",
        choices=("cosine", "tanh", "step", "poly")),
    "lr": TrainKey(float, 1e-3, "peak learning rate, for any number of ranks", low=1e-10, high=100),
    "min_lr": TrainKey(float, 2e-5, "learning rate at the end of the schedule", low=0, high=100),
    "warmup_lr": TrainKey(float, 1e-5, "learning rate at the start of the warm-up",
        low=0, high=100),
    "warmup_epochs": TrainKey(int, 10, "epochs of the warm-up, from warmup_lr to lr",
        low=0, high=100_000),
    "cooldown_epochs": TrainKey(int, 10, "epochs at min_lr, after the schedule",
        low=0, high=100_000),
    "decay_epochs": TrainKey(float, 20, "epochs between two steps of the step schedule",
        low=1, high=100_000),
    "decay_rate": TrainKey(float, 0.1, "factor of one step of the step schedule", low=0, high=1),
    "lr_noise": TrainKey([float], None,
        "shares of the epochs at which noise of the learning rate begins and ends", null=True,
        low=0, high=1, length=(1, 2), rising=True),
    "lr_noise_pct": TrainKey(float, 0.67, "bound of the learning rate's noise, as a share of it",
        low=0, high=10),
    "lr_noise_std": TrainKey(float, 1.0, "standard deviation of the learning rate's noise",
        low=0, high=10),
    "lr_cycle_mul": TrainKey(float, 1.0, "factor from the length of one cosine cycle to the next",
        low=1, high=100),
    "lr_cycle_limit": TrainKey(int, 1, "number of cosine cycles", low=1, high=1000),
    "loss": TrainKey(str, "ce",
        "cross-entropy of the mean over T (ce), or of each time step too (tet)",
        choices=("ce", "tet")),
    "tet_weight": TrainKey(float, 1.0, "share of the steps' own losses in loss: tet",
        low=0, high=1),
    "model_ema": TrainKey(bool, False, "a moving average of the weights is kept, and tested too"),
    "model_ema_decay": TrainKey(float, 0.9998, "decay of that average, per step", low=0, high=1),
    "model_ema_force_cpu": TrainKey(bool, False,
        "the average is kept on the CPU, and not tested in training"),
    "amp": Key(bool, True, "mixed precision, in training and testing"),
    "amp_dtype": Key(str, "float16", "type of mixed precision; float16 needs a GPU",
        choices=("float16", "bfloat16")),
    "eval_amp": Key(bool, False, "mixed precision in testing, where amp is on"),
}

RUN = {
    "device": Key(str, "auto", "auto (cuda if there is one), cpu, cuda or cuda:N", back=""),
    "timeout_minutes": Key(float, 10, "minutes that a rank waits for another one", low=0.01,
        high=10_000, back=""),
    "deterministic": TrainKey(bool, False,
        "kernels that give the same bits each time; slower on a GPU"),
    "seed": TrainKey(int, 2021, "seed of all random numbers, the same on every rank",
        low=0, high=2**31),
    "output": Key(Path, None, "folder of all runs; none: output/ beside the script", null=True,
        aliases=("output_dir",), back=""),
    "experiment": Key(str, None,
        "name of the run's folder in the output folder; none: the yml's name", null=True, back=""),
    "resume": TrainKey(Path, None,
        "checkpoint of a run to go on with; auto: last.pth of this experiment", null=True, back=""),
    "no_resume_opt": TrainKey(bool, False, "resume does without the state of the optimizer",
        back=""),
    "finetune": TrainKey(Path, None,
        "weights to start from; a head of another number of classes is made new", null=True,
        aliases=("initial_checkpoint",)),
    "checkpoint": TestKey(Path, None, "checkpoint to test; none: the best.pth written last",
        null=True, back=""),
    "use_ema": Key(bool, False, "the averaged weights of the checkpoint are tested", back=""),
    "test_only": TrainKey(bool, False, "test what resume names, as test.py does",
        aliases=("eval",), back=""),
    "log_interval": TrainKey(int, 256, "steps between two lines of progress",
        aliases=("print_freq",), low=1, high=1_000_000),
    "local_rank": Key(int, 0, "set by torch.distributed.launch", low=-1, high=65536, scripts=(),
        back=""),
}
KEYS = grouped(
    model=MODEL, data=DATA, augmentation=AUGMENTATION, optimisation=OPTIMISATION, run=RUN
)
# fmt: on

NO_EFFECT = {
    "attend": "it is a tool now: python tools/attend.py CHECKPOINT",
    "energy": "it is a tool now: python tools/energy.py CHECKPOINT",
    "patience_epochs": "there is no sched: plateau",
    "connect_f": "spikes are added, as in the published run",
    "dist_url": "torchrun and torch.distributed.launch say where rank 0 is",
    "epoch_repeats": "an epoch is one pass over the data",
    "tb": "TensorBoard's events are always written",
    "world_size": "torchrun and torch.distributed.launch set the number of ranks",
}
