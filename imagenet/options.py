"""Every key of the ImageNet recipe; the defaults are the published HST-10-384 run. Names are the release's."""

from config import Key

DEFAULT_CONFIG = "imagenet.yml"

KEYS = {
    # model
    "model": Key(str, "QKFormer_10_384", "QKFormer_10_384, QKFormer_10_512 or QKFormer_10_768"),
    "time_step": Key(int, 4, "T, steps for which an image is shown", flags=("-T",), low=1),
    "input_size": Key(int, 224, "height and width of the network's input, a multiple of 16", low=16),
    "layer": Key(int, None, "blocks in all, over the model's 10; stage 3 has layer - 3", null=True, low=4),
    "dim": Key(int, None, "D, width of stage 3, over the model's", null=True, low=8),
    "num_heads": Key(int, None, "heads of every attention, over the model's", null=True, low=1),
    "mlp_ratio": Key(float, 4, "hidden channels of an MLP over its input's", low=0.1),
    "attention": Key([str], ["token", "token", "ssa"], "token, channel or ssa for each stage", length=3),
    "drop_path": Key(float, 0.0, "stochastic depth at the last block", null=True, low=0, high=0.99),
    "cross_sample_lif": Key(
        str, "auto", "the release's semantics of SSA's last neuron", choices=("auto", "true", "false")
    ),
    "backend": Key(str, "auto", "neuron backend", choices=("auto", "torch", "cupy", "spikingjelly")),
    "fused": Key(bool, True, "BatchNorm and neuron in one kernel; false: module by module"),
    "compile": Key(bool, False, "torch.compile the model"),
    "checkpoint_stages": Key([int], [], "stages computed again in the backward pass, to save memory"),
    "channels_last": Key(bool, False, "channels_last memory format in the plain path too"),
    # data
    "data_path": Key(str, "./data", "folder with train/<class>/*.JPEG and val/<class>/*.JPEG"),
    "nb_classes": Key(int, 1000, "classes", low=1),
    "batch_size": Key(int, 32, "training batch of a micro-step, per rank", low=1),
    "val_batch_size": Key(int, 32, "evaluation batch; under cross_sample_lif the result depends on it", low=1),
    "num_workers": Key(int, 10, "loader processes per rank", low=0),
    "pin_mem": Key(bool, True, "pinned memory in the loader"),
    "on_bad_image": Key(str, "error", "stop at a file that can't be read, or leave it out", choices=("error", "skip")),
    # augmentation
    "color_jitter": Key(float, None, "strength, where aa is null", null=True, low=0),
    "aa": Key(str, "rand-m9-mstd0.5-inc1", "timm's auto-augment policy", null=True),
    "mixup": Key(float, 0.0, "alpha, 0: off", low=0),
    "cutmix": Key(float, 0.0, "alpha, 0: off", low=0),
    "cutmix_minmax": Key([float], None, "range of the cut, over cutmix", null=True, length=2, low=0, high=1),
    "mixup_prob": Key(float, 1.0, "probability of mixup or cutmix", low=0, high=1),
    "mixup_switch_prob": Key(float, 0.5, "probability of cutmix where both are on", low=0, high=1),
    "mixup_mode": Key(str, "batch", "one draw per", choices=("batch", "pair", "elem")),
    "smoothing": Key(float, 0.1, "label smoothing", low=0, high=0.99),
    "reprob": Key(float, 0.25, "probability of random erasing", low=0, high=1),
    "remode": Key(str, "pixel", "what is put there", choices=("const", "rand", "pixel")),
    "recount": Key(int, 1, "rectangles at most", low=1),
    # optimisation
    "epochs": Key(int, 200, "epochs in all", low=1),
    "start_epoch": Key(int, 0, "first epoch of a run that resumes nothing", low=0),
    "accum_iter": Key(int, 2, "micro-steps whose gradients make one step", low=1),
    "lr": Key(float, None, "peak learning rate, over blr", null=True, low=0),
    "blr": Key(float, 6e-4, "peak learning rate for 256 images a step: lr = blr x images a step / 256", low=0),
    "min_lr": Key(float, 1e-6, "at the end", low=0),
    "warmup_epochs": Key(float, 5, "from 0 to the peak", low=0),
    "layer_decay": Key(float, 1.0, "before stage 3, lr x layer_decay ** (blocks of stage 3 + 1)", low=0),
    "weight_decay": Key(float, 0.05, "not on biases and 1-D parameters", low=0),
    "clip_grad": Key(float, None, "largest norm of the gradient", null=True, low=0),
    "amp": Key(bool, True, "mixed precision"),
    "amp_dtype": Key(str, "float16", "of amp; float16 needs a GPU", choices=("float16", "bfloat16")),
    "eval_amp": Key(bool, True, "amp in evaluation too"),
    # run
    "device": Key(str, "auto", "auto (cuda if there is one), cpu, cuda or cuda:N"),
    "seed": Key(int, 0, "a rank's is seed + rank", low=0, high=2**31),
    "output_dir": Key(str, None, "folder of all runs; default: output/ beside the script", null=True),
    "experiment": Key(str, None, "name of the run's folder there; default: the yml's name", null=True),
    "finetune": Key(str, None, "weights to start from; a head that fits is kept", null=True),
    "resume": Key(str, None, "checkpoint to go on from; auto: this experiment's last.pth", null=True),
    "eval": Key(bool, False, "train.py: only evaluate what resume or finetune names"),
    "save_minutes": Key(float, 30, "last.pth is written so often within an epoch, 0: only at its end", low=0),
    "log_interval": Key(int, 50, "steps between lines where there is no terminal", low=1),
    "checkpoint": Key(str, None, "test.py: weights to test; default: the newest best.pth", null=True),
    "predict": Key(str, None, "test.py: folder of images without labels, to be classified", null=True),
    "predictions": Key(str, "predict.csv", "test.py: file for what predict finds; it must not be there yet"),
    "labels": Key(str, None, "test.py: text file, one class a line, its first word goes to predictions", null=True),
    "local_rank": Key(int, 0, "set by torch.distributed.launch"),
}

NO_EFFECT = {
    "cls_token": "the head takes the mean over space",
    "dist_eval": "evaluation is always shared by the ranks, each image counted once",
    "dist_on_itp": "ranks come from torchrun, torch.distributed.launch or SLURM",
    "dist_url": "ranks meet at MASTER_ADDR and MASTER_PORT",
    "global_pool": "the head takes the mean over space",
    "log_dir": "TensorBoard's files are in the run's folder",
    "no_pin_mem": "write pin_mem: false",
    "resplit": "batches are not split",
    "world_size": "the launcher says how many ranks there are",
}
