# Copied from cifar10/options.py with cifar10.yml->cifar100.yml, = "torch/cifar10->= "torch/cifar100, = 10->= 100
"""Every key of the CIFAR recipe; the defaults are the published run (cifar100.yml).

A TrainKey is used by train.py alone, a TestKey by test.py alone; a yml may hold both.
"""

from pathlib import Path

import model
import ms
from harness.config import Key, MachineKey, NetworkKey, TestKey, TrainKey, by_name, same
from spiking.plain import SURROGATES

DEFAULT_CONFIG = "cifar100.yml"
DATA_SET = "CIFAR"  # as in harness/build.py
# @register_model of timm puts a model's name into its file's __all__.
MODELS = {name: getattr(file, name) for file in (model, ms) for name in file.__all__}
DATASET = "torch/cifar100"
FILTERS = ("bicubic", "bilinear", "nearest", "lanczos")

# fmt: off
MODEL = {
    "model": NetworkKey(str, "QKFormer", "of model.py or ms.py", choices=(*MODELS,), fixed=same),
    "time_step": NetworkKey(int, 4, "T, the time steps", 1, 1024, flags=("-T",), aliases=("T",)),
    "layer": NetworkKey(int, 4, "blocks; stage 3: all but 2", 3, 100, flags=("-L",), fixed=same),
    "dim": NetworkKey(int, 384, "D, the width of stage 3", 8, 8192, fixed=same),
    "num_heads": NetworkKey(int, 8, "heads of every attention", 1, 1024),
    "mlp_ratio": NetworkKey(float, 4, "hidden over input channels of MLPs", 0.1, 64, fixed=same),
    "patch_size": Key(int, 4, "accepted, but not used: the embedding is made for 4", 1, 1024),
    "attention": NetworkKey(str, ["token", "token", "ssa"],
        "attention of each stage: token, channel or ssa", choices=(*model.ATTENTION,),
        length=(3, 3), fixed=lambda kinds: [kind == "ssa" for kind in kinds]),
    "drop_path": TrainKey(float, 0.0, "stochastic depth, at the last block", 0, 0.99, null=True),
    "cross_sample_lif": Key(str, "auto", "true: SSA's last neuron runs on from image to image, as "
        "in the release; auto: as trained, else false", choices=("auto", "true", "false"), back=""),
    "neuron": NetworkKey(str, "lif", "lif, if (without a leak) or plif (learns its tau)",
        choices=("lif", "if", "plif"), fixed=lambda neuron: neuron == "plif"),
    "tau": NetworkKey(float, 2.0, "membrane time constant in steps; of plif, its start", 1, 1e6),
    "v_threshold": NetworkKey(float, 1.0, "potential of a spike; attn_lif: half", 1e-6, 1e6),
    "surrogate": NetworkKey(str, "sigmoid", "whose derivative stands for a spike's",
        choices=(*SURROGATES,), scripts=("train",)),
    "surrogate_alpha": NetworkKey(float, None, "its slope; none: its own, 4 of the sigmoid",
        1e-6, 1e6, scripts=("train",)),
    "backend": MachineKey(str, "auto", "what computes the neurons",
        choices=("auto", "torch", "cupy", "spikingjelly")),
    "fused": MachineKey(bool, True, "BatchNorm and neuron in one kernel; false: module by module"),
    "events": MachineKey(bool, True, "convolutions add up weights where spikes are, on a CPU"),
    "memory": TrainKey(str, "fast", "small: the backward pass computes convolutions again, which "
        "saves most of the memory", choices=("fast", "small")),
    "cuda_graph": MachineKey(bool, False, "a GPU gets all kernels of a pass in one call"),
    "sync_bn": TrainKey(bool, False, "BatchNorm takes its statistics over all ranks, on GPUs"),
    "dist_bn": TrainKey(str, "broadcast", "statistics to test and save: rank 0's (broadcast), the "
        "ranks' mean (reduce)", choices=("", "broadcast", "reduce")),
}

DATA = {
    "dataset": Key(str, DATASET, "data set; digits needs no download, folder is a folder of images",
        flags=("-d",), choices=("torch/cifar10", "torch/cifar100", "digits", "folder")),
    "data_path": Key(Path, "./data", "where the data set is, or is downloaded to; of dataset: "
        "folder that of train/ and val/", flags=("-data-dir",), aliases=("data_dir",)),
    "num_classes": Key(int, None, "number of classes; none: the data's", 1, 100_000,
        aliases=("nb_classes",), fixed=same),
    "img_size": Key(int, 32, "height and width of the network's input", 4, 4096),
    "input_size": Key(int, None, "3, height, width; over img_size", 1, 4096, length=(3, 3)),
    "mean": Key(float, [0.4914, 0.4822, 0.4465], "mean of each colour", 0, 1, length=(3, 3)),
    "std": Key(float, [0.2470, 0.2435, 0.2616], "their deviations", 1e-6, 10, length=(3, 3)),
    "crop_pct": Key(float, 1.0, "share of an image's side that a test keeps", 0.01, 1),
    "interpolation": Key(str, "bicubic", "interpolation in testing", choices=FILTERS),
    "val_split": TrainKey(float, 0.0, "share of the training set, of each class, that chooses "
        "best.pth; 0: the test set does", 0, 0.9, fixed=same),
    "train_share": TrainKey(float, 1.0, "share of the rest that trains", 1e-6, 1),
    "batch_size": TrainKey(int, 64, "images of a batch, per rank", 1, 65536, flags=("-b",)),
    "val_batch_size": Key(int, 64, "images of a test batch", 1, 65536, flags=("-vb",)),
    "workers": MachineKey(int, 8, "processes that load data, per rank", 0, 256, flags=("-j",),
        aliases=("num_workers",)),
    "pin_mem": MachineKey(bool, True, "the loader puts batches for a GPU into pinned memory"),
}

AUGMENTATION = {
    "no_aug": TrainKey(bool, False, "no augmentation but mixup and cutmix"),
    "scale": TrainKey(float, [1.0, 1.0], "a crop's area", 0.01, 1, length=(2, 2), rising=True),
    "ratio": TrainKey(float, [1.0, 1.0], "its aspect", 0.01, 100, length=(2, 2), rising=True),
    "hflip": TrainKey(float, 0.5, "probability of a horizontal flip", 0, 1),
    "vflip": TrainKey(float, 0.0, "probability of a vertical flip", 0, 1),
    "color_jitter": TrainKey(float, 0.0, "colour jitter, without aa only", 0, 10, null=True),
    "aa": TrainKey(str, "rand-m9-n1-mstd0.4-inc1", "timm's automatic augmentation, or none",
        null=True,
        pattern=r"rand(-n\d{1,2}|-(m|p|mstd|mmax|inc)[0-9.]{1,4}|-t(weights|3aw?))*|"
        r"augmix(-(w|d)\d{1,2}|-(m|a|b|mstd)[0-9.]{1,4})*|(original|originalr|v0|v0r|3a)(-mstd[0-9.]+)?",
        words="a policy of timm's, as in rand-m9-n1-mstd0.4-inc1"),
    "train_interpolation": TrainKey(str, "bicubic", "in training", choices=(*FILTERS, "random")),
    "mixup": TrainKey(float, 0.5, "alpha of mixup's Beta distribution; 0: no mixup", 0, 100),
    "cutmix": TrainKey(float, 0.0, "alpha of cutmix's Beta distribution; 0: no cutmix", 0, 100),
    "cutmix_minmax": TrainKey(float, None, "bounds of the cut's side, as shares; turns cutmix on",
        0, 1, length=(2, 2), rising=True),
    "mixup_prob": TrainKey(float, 1.0, "probability of either, for a batch", 0, 1),
    "mixup_switch_prob": TrainKey(float, 0.5, "share of cutmix, where both are on", 0, 1),
    "mixup_mode": TrainKey(str, "batch", "what one draw is for", choices=("batch", "pair", "elem")),
    "mixup_off_epoch": TrainKey(int, 0, "first epoch without either; 0: none", 0, 100_000),
    "smoothing": TrainKey(float, 0.1, "label smoothing", 0, 0.99),
    "reprob": TrainKey(float, 0.25, "probability of random erasing", 0, 1),
    "remode": TrainKey(str, "const", "what erasing leaves", choices=("const", "rand", "pixel")),
    "recount": TrainKey(int, 1, "most rectangles that are erased in an image", 1, 1000),
}

OPTIMISATION = {
    "epochs": TrainKey(int, 400, "epochs before those of cooldown_epochs", 1, 100_000),
    "start_epoch": TrainKey(int, None, "first epoch; none: the next one", 0, 100_000, back=""),
    "opt": TrainKey(str, "adamw", "optimizer, by timm's name", words="timm's, no bnb, fused, "
        "adahessian", pattern=r"(?!(lookahead_)?(bnb|fused|adahessian)).+"),
    "opt_eps": TrainKey(float, 1e-8, "AdamW epsilon; none: the optimizer's own", 0, 1, null=True),
    "opt_betas": TrainKey(float, [0.9, 0.999], "AdamW betas; none: the optimizer's own",
        0, 0.999999, null=True, length=(2, 2)),
    "momentum": TrainKey(float, 0.9, "momentum of SGD and of others that have one", 0, 0.999999),
    "weight_decay": TrainKey(float, 6e-2, "weight decay; 1-D parameters have none", 0, 100),
    "clip_grad": TrainKey(float, None, "bound of the gradient; none: not clipped", 1e-10, 1e10),
    "clip_mode": TrainKey(str, "norm", "what clip_grad bounds; agc: each layer's norm, relative "
        "to its weights", choices=("norm", "value", "agc")),
    "sched": TrainKey(str, "cosine", "lr schedule", choices=("cosine", "tanh", "step", "poly")),
    "lr": TrainKey(float, 1e-3, "peak learning rate, for any number of ranks", 1e-10, 100),
    "min_lr": TrainKey(float, 1e-5, "learning rate at the end of the schedule", 0, 100),
    "warmup_lr": TrainKey(float, 1e-5, "learning rate at the start of the warm-up", 0, 100),
    "warmup_epochs": TrainKey(int, 20, "epochs of the warm-up, from warmup_lr to lr", 0, 100_000),
    "cooldown_epochs": TrainKey(int, 10, "epochs at min_lr, after the schedule", 0, 100_000),
    "decay_epochs": TrainKey(float, 30, "epochs between two steps of sched: step", 1, 100_000),
    "decay_rate": TrainKey(float, 0.1, "factor of one step of sched: step", 0, 1),
    "lr_noise": TrainKey(float, None, "begin, end, as shares", 0, 1, length=(1, 2), rising=True),
    "lr_noise_pct": TrainKey(float, 0.67, "bound of lr_noise, as a share of lr", 0, 10),
    "lr_noise_std": TrainKey(float, 1.0, "standard deviation of lr_noise", 0, 10),
    "lr_cycle_mul": TrainKey(float, 1.0, "factor of a cosine cycle's length", 1, 100),
    "lr_cycle_limit": TrainKey(int, 1, "number of cosine cycles", 1, 1000),
    "loss": TrainKey(str, "ce", "ce; tet: one at each step too", choices=("ce", "tet")),
    "tet_weight": TrainKey(float, 1.0, "share of the steps' own losses in loss: tet", 0, 1),
    "model_ema": TrainKey(bool, False, "a moving average of the weights is kept, and tested too"),
    "model_ema_decay": TrainKey(float, 0.9998, "decay of that average, per step", 0, 1),
    "model_ema_force_cpu": TrainKey(bool, False, "it is kept on the CPU, and not tested"),
    "amp": Key(bool, True, "mixed precision, in training and testing"),
    "amp_dtype": Key(str, "float16", "float16 needs a GPU", choices=("float16", "bfloat16")),
    "eval_amp": Key(bool, True, "mixed precision in testing, where amp is on"),
}

RUN = {
    "device": Key(str, "auto", "auto (cuda if there is one), cpu, cuda or cuda:N", back=""),
    "timeout_minutes": Key(float, 10, "minutes to wait for another rank", 0.01, 10_000, back=""),
    "deterministic": TrainKey(bool, False, "same bits each time; slower on a GPU"),
    "seed": TrainKey(int, 42, "seed of all random numbers", 0, 2**31),
    "output": Key(Path, None, "folder of runs; none: output/", aliases=("output_dir",), back=""),
    "experiment": Key(str, None, "name of the run's folder; none: the yml's", back=""),
    "resume": TrainKey(Path, None, "last.pth to go on from; auto: this experiment's", back=""),
    "no_resume_opt": TrainKey(bool, False, "resume leaves the optimizer's state out", back=""),
    "prepare": TrainKey(bool, False, "download, check and convert the data, and end", back=""),
    "finetune": TrainKey(Path, None, "weights to start from; a head that does not fit is made new",
        aliases=("initial_checkpoint",)),
    "freeze": TrainKey(int, 0, "first stages that keep their weights", 0, 3, fixed=same),
    "checkpoint": TestKey(Path, None, "what to test; none: the newest best.pth", back=""),
    "use_ema": TestKey(bool, False, "the averaged weights of the checkpoint are tested", back=""),
    "log_interval": TrainKey(int, 50, "steps between lines", 1, 1_000_000, aliases=("print_freq",)),
    "local_rank": Key(int, 0, "set by torch.distributed.launch", -1, 65536, scripts=(), back=""),
}
GROUPS = {"model": MODEL, "data": DATA, "augmentation": AUGMENTATION,
    "optimisation": OPTIMISATION, "run": RUN}
KEYS = {**MODEL, **DATA, **AUGMENTATION, **OPTIMISATION, **RUN}

NO_EFFECT = by_name({
    "memory: small computes convolutions again": "checkpoint_stages",
    "it is a tool now: python tools/NAME.py CHECKPOINT": "attend energy predict",
    "it is a tool now: python tools/shifted.py CHECKPOINT": "severity test_path",
    "predict is a tool now": "predictions",
    "amp is PyTorch's own": "apex_amp native_amp",
    "BatchNorm keeps PyTorch's constants, as in the published run": "bn_eps bn_momentum bn_tf",
    "torch.compile leaves our kernels out, and takes longer": "compile torchscript",
    "curves go to TensorBoard": "log_wandb",
    "drop_path is the model's only dropout": "drop drop_block drop_connect",
    "finetune loads weights": "pretrained",
    "last.pth and best.pth are kept": "checkpoint_hist eval_metric recovery_interval save_images",
    "layer is the number of blocks": "depths",
    "spikes always wait for the backward pass as bytes": "byte_spikes",
    "the layers choose how images lie in memory": "channels_last",
    "the head takes the mean over space": "gp",
    "the loader prefetches, in new workers each epoch": "no_prefetcher use_multi_epochs_loader",
    "there is no sched: plateau": "patience_epochs",
    "an epoch is the whole split": "aug_splits epoch_repeats jsd resplit split_bn train_split tta",
})
# fmt: on
