"""Every key of the event recipe; the defaults are the published run (dvs128-gesture.yml). Names are the release's."""

from config import Key

DEFAULT_CONFIG = "dvs128-gesture.yml"

KEYS = {
    # model
    "model": Key(str, "QKFormer", "model of model.py"),
    "T": Key(int, 16, "frames of a sample, which are the time steps", flags=("-T",), low=1),
    "layer": Key(int, 2, "blocks in all; stage 2 has layer - 1", low=2),
    "dim": Key(int, 256, "D, width of stage 2", low=16),
    "num_heads": Key(int, 16, "heads of every attention", low=1),
    "mlp_ratio": Key(float, 4, "hidden channels of an MLP over its input's", low=0.1),
    "attention": Key([str], ["token", "ssa"], "token, channel or ssa for each stage", length=2),
    "drop_path": Key(float, 0.0, "stochastic depth at the last block", low=0, high=0.99),
    "cross_sample_lif": Key(
        str, "auto", "the release's semantics of SSA's last neuron", choices=("auto", "true", "false")
    ),
    "backend": Key(str, "auto", "neuron backend", choices=("auto", "torch", "cupy", "spikingjelly")),
    "fused": Key(bool, True, "BatchNorm and neuron in one kernel; false: module by module"),
    "compile": Key(bool, False, "torch.compile the model"),
    "checkpoint_stages": Key([int], [], "stages computed again in the backward pass, to save memory"),
    "sync_bn": Key(bool, False, "BatchNorm statistics over all ranks (GPU only)"),
    "dist_bn": Key(str, "broadcast", "BatchNorm statistics for evaluation", choices=("", "broadcast", "reduce")),
    # data
    "data_path": Key(str, "./data", "its folder download/ has the recordings; frames are made beside it"),
    "num_classes": Key(int, 11, "classes", low=1),
    "batch_size": Key(int, 16, "training batch per rank", flags=("-b",), low=1),
    "val_batch_size": Key(int, None, "evaluation batch; default: batch_size", flags=("-vb",), null=True, low=1),
    "workers": Key(int, 4, "loader processes per rank", flags=("-j",), low=0),
    # augmentation
    "no_aug": Key(bool, False, "no augmentation but mixup and T_train"),
    "T_train": Key(int, None, "frames drawn of the T for a training batch; default: all", null=True, low=1),
    "mixup": Key(float, 0.5, "alpha, 0: off", low=0),
    "cutmix": Key(float, 0.0, "alpha, 0: off", low=0),
    "cutmix_minmax": Key([float], None, "range of the cut, over cutmix", null=True, length=2, low=0, high=1),
    "mixup_prob": Key(float, 0.5, "probability of mixup or cutmix", low=0, high=1),
    "mixup_switch_prob": Key(float, 0.5, "probability of cutmix where both are on", low=0, high=1),
    "mixup_mode": Key(str, "batch", "one draw per", choices=("batch", "pair", "elem")),
    "mixup_off_epoch": Key(int, 75, "first epoch without mixup, 0: never off", low=0),
    "smoothing": Key(float, 0.1, "label smoothing", low=0, high=0.99),
    # optimisation
    "epochs": Key(int, 192, "epochs before the cooldown", low=1),
    "start_epoch": Key(int, None, "first epoch, over the checkpoint's", null=True, low=0),
    "opt": Key(str, "adamw", "timm's optimizer"),
    "opt_eps": Key(float, 1e-8, "epsilon", null=True, low=0),
    "opt_betas": Key([float], [0.9, 0.999], "betas", null=True, length=2, low=0, high=1),
    "momentum": Key(float, 0.9, "of opt: sgd", low=0, high=1),
    "weight_decay": Key(float, 0.06, "not on biases and 1-D parameters", low=0),
    "sched": Key(str, "cosine", "timm's scheduler", choices=("cosine", "tanh", "step", "poly")),
    "lr": Key(float, 1e-3, "peak learning rate, not scaled with the ranks", low=0),
    "min_lr": Key(float, 2e-5, "at the end", low=0),
    "warmup_lr": Key(float, 1e-5, "at the start", low=0),
    "warmup_epochs": Key(int, 10, "from warmup_lr to lr", low=0),
    "cooldown_epochs": Key(int, 10, "at min_lr after the schedule", low=0),
    "decay_epochs": Key(float, 20, "interval of sched: step", low=1),
    "decay_rate": Key(float, 0.1, "factor of sched: step", low=0),
    "lr_noise": Key([float], None, "where the learning rate is noisy, as shares of epochs", null=True),
    "lr_noise_pct": Key(float, 0.67, "limit of that noise", low=0),
    "lr_noise_std": Key(float, 1.0, "its standard deviation", low=0),
    "lr_cycle_mul": Key(float, 1.0, "growth of a cosine cycle", low=1),
    "lr_cycle_limit": Key(int, 1, "number of cycles", low=1),
    "amp": Key(bool, True, "mixed precision"),
    "amp_dtype": Key(str, "float16", "of amp; float16 needs a GPU", choices=("float16", "bfloat16")),
    "eval_amp": Key(bool, False, "amp in evaluation too"),
    # run
    "device": Key(str, "auto", "auto (cuda if there is one), cpu, cuda or cuda:N"),
    "seed": Key(int, 2021, "the same on every rank", low=0, high=2**31),
    "output_dir": Key(str, None, "folder of all runs; default: output/ beside the script", null=True),
    "experiment": Key(str, None, "name of the run's folder there; default: the yml's name", null=True),
    "resume": Key(str, None, "checkpoint to go on from; auto: this experiment's last.pth", null=True),
    "no_resume_opt": Key(bool, False, "resume without the optimizer's state"),
    "initial_checkpoint": Key(str, None, "weights to start from", null=True),
    "checkpoint": Key(str, None, "weights to test; default: the newest best.pth", null=True),
    "test_only": Key(bool, False, "train.py only tests what resume names, as test.py does"),
    "print_freq": Key(int, 256, "steps between lines where there is no terminal", low=1),
    "local_rank": Key(int, 0, "set by torch.distributed.launch"),
}

NO_EFFECT = {
    "patience_epochs": "there is no sched: plateau",
    "connect_f": "spikes are added, as in the published run",
    "dataset": "this folder is the data set",
    "dist_url": "torchrun and torch.distributed.launch say where rank 0 is",
    "epoch_repeats": "an epoch is one pass over the data",
    "tb": "TensorBoard's events are always written",
    "world_size": "torchrun and torch.distributed.launch set the number of ranks",
}
