"""Every key of the ImageNet recipe; the defaults are the published HST-10-384 run.

A TrainKey is used by train.py alone, a TestKey by test.py alone; a yml may hold both.
"""

from pathlib import Path

import model
import ms
from harness.config import Key, MachineKey, NetworkKey, TestKey, TrainKey, by_name, same
from spiking.plain import SURROGATES

DEFAULT_CONFIG = "imagenet.yml"
DATA_SET = "ImageNet"  # as in harness/build.py
# @register_model of timm puts a model's name into its file's __all__.
MODELS = {name: getattr(file, name) for file in (model, ms) for name in file.__all__}

# fmt: off
MODEL = {
    "model": NetworkKey(str, "QKFormer_10_384", "of model.py or ms.py", choices=(*MODELS,),
        fixed=same),
    "time_step": NetworkKey(int, 4, "T, the time steps", 1, 1024, flags=("-T",), aliases=("T",)),
    "img_size": Key(int, 224, "input's side, a multiple of 16", 16, 4096, aliases=("input_size",)),
    "layer": NetworkKey(int, None, "blocks in all, of which stage 3 has all but three; none: the "
        "model's 10", 4, 100, fixed=same),
    "dim": NetworkKey(int, None, "D, the width of stage 3; none: the model's", 8, 8192, fixed=same),
    "num_heads": NetworkKey(int, None, "heads of every attention; none: the model's", 1, 1024),
    "mlp_ratio": NetworkKey(float, 4, "hidden over input channels of MLPs", 0.1, 64, fixed=same),
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
}

DATA = {
    "dataset": Key(str, "imagenet", "data set; photos: a small one, made in data_path",
        flags=("-d",), choices=("imagenet", "photos")),
    "data_path": Key(Path, "./data", "folder with train/<class>/*.JPEG and val/<class>/*.JPEG",
        aliases=("data_dir",)),
    "num_classes": Key(int, None, "number of classes; none: the data's", 1, 100_000,
        aliases=("nb_classes",), fixed=same),
    "val_split": TrainKey(float, 0.0, "share of the training set, of each class, that chooses "
        "best.pth; 0: the test set does", 0, 0.9, fixed=same),
    "train_share": TrainKey(float, 1.0, "share of the rest that trains", 1e-6, 1),
    "batch_size": TrainKey(int, 32, "images of a micro-step, per rank", 1, 65536, flags=("-b",)),
    "val_batch_size": Key(int, 32, "images of a test batch; under cross_sample_lif the result "
        "depends on it", 1, 65536, flags=("-vb",)),
    "workers": MachineKey(int, 10, "processes that load data, per rank", 0, 256, flags=("-j",),
        aliases=("num_workers",)),
    "pin_mem": MachineKey(bool, True, "the loader puts batches for a GPU into pinned memory"),
    "on_bad_image": Key(str, "error", "what a file does that is no whole image: stop the run, or "
        "be left out", choices=("error", "skip")),
}

AUGMENTATION = {
    "color_jitter": TrainKey(float, None, "colour jitter, without aa only", 0, 10),
    "aa": TrainKey(str, "rand-m9-mstd0.5-inc1", "timm's automatic augmentation, or none", null=True,
        pattern=r"rand(-n\d{1,2}|-(m|p|mstd|mmax|inc)[0-9.]{1,4}|-t(weights|3aw?))*|"
        r"augmix(-(w|d)\d{1,2}|-(m|a|b|mstd)[0-9.]{1,4})*|(original|originalr|v0|v0r|3a)(-mstd[0-9.]+)?",
        words="a policy of timm's, as in rand-m9-n1-mstd0.4-inc1"),
    "mixup": TrainKey(float, 0.0, "alpha of mixup's Beta distribution; 0: no mixup", 0, 100),
    "cutmix": TrainKey(float, 0.0, "alpha of cutmix's Beta distribution; 0: no cutmix", 0, 100),
    "cutmix_minmax": TrainKey(float, None, "bounds of the cut's side, as shares; turns cutmix on",
        0, 1, length=(2, 2), rising=True),
    "mixup_prob": TrainKey(float, 1.0, "probability of either, for a batch", 0, 1),
    "mixup_switch_prob": TrainKey(float, 0.5, "share of cutmix, where both are on", 0, 1),
    "mixup_mode": TrainKey(str, "batch", "what one draw is for", choices=("batch", "pair", "elem")),
    "smoothing": TrainKey(float, 0.1, "label smoothing", 0, 0.99),
    "reprob": TrainKey(float, 0.25, "probability of random erasing", 0, 1),
    "remode": TrainKey(str, "pixel", "what erasing leaves", choices=("const", "rand", "pixel")),
    "recount": TrainKey(int, 1, "most rectangles that are erased in an image", 1, 1000),
}

OPTIMISATION = {
    "epochs": TrainKey(int, 200, "epochs in all", 1, 100_000),
    "start_epoch": TrainKey(int, None, "first epoch; none: the next one", 0, 100_000, back=""),
    "accum_iter": TrainKey(int, 2, "micro-steps behind one step of the optimizer", 1, 65536),
    "lr": TrainKey(float, None, "peak learning rate; none: it follows from blr", 1e-10, 100),
    "blr": TrainKey(float, 6e-4, "peak learning rate for 256 images a step; lr is blr x images a "
        "step / 256", 1e-10, 100),
    "min_lr": TrainKey(float, 1e-6, "learning rate at the end of the schedule", 0, 100),
    "warmup_epochs": TrainKey(float, 5, "epochs of the warm-up, from 0 to the peak", 0, 100_000),
    "layer_decay": TrainKey(float, 1.0, "factor of the learning rate before stage 3, to the power "
        "of that stage's blocks + 1", 0, 1),
    "weight_decay": TrainKey(float, 0.05, "weight decay; 1-D parameters have none", 0, 100),
    "clip_grad": TrainKey(float, None, "gradient's largest norm; none: unbounded", 1e-10, 1e10),
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
    "seed": TrainKey(int, 0, "seed of all random numbers", 0, 2**31),
    "output": Key(Path, None, "folder of runs; none: output/", aliases=("output_dir",), back=""),
    "experiment": Key(str, None, "name of the run's folder; none: the yml's", back=""),
    "prepare": TrainKey(bool, False, "download, check and convert the data, and end", back=""),
    "finetune": TrainKey(Path, None, "checkpoint with weights to start from; a head that fits is "
        "kept", aliases=("initial_checkpoint",)),
    "freeze": TrainKey(int, 0, "first stages that keep their weights", 0, 3, fixed=same),
    "resume": TrainKey(Path, None, "last.pth to go on from; auto: this experiment's", back=""),
    "eval": TrainKey(bool, False, "test what resume or finetune names, as test.py does",
        aliases=("test_only",), back=""),
    "save_minutes": TrainKey(float, 30, "minutes between two times that last.pth is written "
        "within an epoch; 0: only at its end", 0, 10_080),
    "log_interval": TrainKey(int, 50, "steps between lines", 1, 1_000_000, aliases=("print_freq",)),
    "checkpoint": TestKey(Path, None, "what to test; none: the newest best.pth", back=""),
    "use_ema": TestKey(bool, False, "the averaged weights of the checkpoint are tested", back=""),
    "local_rank": Key(int, 0, "set by torch.distributed.launch", -1, 65536, scripts=(), back=""),
}
GROUPS = {"model": MODEL, "data": DATA, "augmentation": AUGMENTATION,
    "optimisation": OPTIMISATION, "run": RUN}
KEYS = {**MODEL, **DATA, **AUGMENTATION, **OPTIMISATION, **RUN}

NO_EFFECT = by_name({
    "torch.compile leaves our kernels out, and takes longer": "compile",
    "memory: small computes convolutions again": "checkpoint_stages",
    "it is a tool now: python tools/NAME.py CHECKPOINT": "attend energy predict",
    "it is a tool now: python tools/shifted.py CHECKPOINT": "test_path",
    "predict is a tool now": "labels predictions",
    "batches are not split": "resplit",
    "curves are in the run's folder": "log_dir",
    "pin_mem: false means that": "no_pin_mem",
    "spikes always wait for the backward pass as bytes": "byte_spikes",
    "the layers choose how images lie in memory": "channels_last",
    "testing is always shared by the ranks": "dist_eval",
    "the head takes the mean over space": "cls_token global_pool",
    "the launcher says how many ranks there are, and where": "dist_on_itp dist_url world_size",
})
# fmt: on
