"""AdamW of the ImageNet recipe: images of a step, learning rate, groups of parameters."""

import math

import torch

# {(model, input size): (images a step, peak learning rate)}; those of the run at 288 are not known.
PUBLISHED = {
    ("QKFormer_10_384", 224): (512, 1.2e-3),
    ("QKFormer_10_512", 224): (512, 1.2e-3),
    ("QKFormer_10_768", 224): (576, 1.35e-3),
    ("QKFormer_10_768", 384): (512, 1.2e-3),
}


def images_per_step(cfg, world_size):
    """Images of all ranks and all micro-steps behind one step of the optimizer."""
    return cfg.batch_size * cfg.accum_iter * world_size


def peak_lr(cfg, world_size):
    """The peak learning rate: lr, or blr scaled with the images of a step."""
    return cfg.lr if cfg.lr is not None else cfg.blr * images_per_step(cfg, world_size) / 256


def learning_rate(cfg, peak, epoch, micro_step, micro_steps):
    """The learning rate at a micro-step, 0 <= micro_step < micro_steps, of an epoch.

    Linear from 0 to the peak over warmup_epochs, then half a cosine to min_lr; a function of the
    fractional epoch, which is that of the first micro-step of the accumulation.
    """
    epoch = epoch + (micro_step - micro_step % cfg.accum_iter) / micro_steps
    if epoch < cfg.warmup_epochs:
        return peak * epoch / cfg.warmup_epochs
    done = (epoch - cfg.warmup_epochs) / max(cfg.epochs - cfg.warmup_epochs, 1e-9)
    return cfg.min_lr + (peak - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(model, weight_decay, layer_decay):
    """Groups for an optimizer: 1-D parameters do not decay; those before stage 3 learn slower.

    A group's `lr_scale` multiplies its whole schedule, with warm-up and min_lr. It is 1 for stage 3
    and the head, and layer_decay ** (blocks of stage 3 + 1) for all before.
    """
    # Four, in the order in which the parameters first need them, as in the release's checkpoints.
    groups = {}
    for name, parameter in model.named_parameters():
        early, decays = not name.startswith(("stage3.", "head.")), parameter.dim() > 1
        if (early, decays) not in groups:
            scale = layer_decay ** (len(model.stage3) + 1) if early else 1.0
            decay = {"weight_decay": weight_decay * decays, "lr_scale": scale}
            groups[early, decays] = {"params": [], **decay}
        groups[early, decays]["params"].append(parameter)
    return list(groups.values())


def build_optimizer(cfg, model):
    """AdamW; its learning rate is set before every step, by set_lr."""
    groups = parameter_groups(model, cfg.weight_decay, cfg.layer_decay)
    # One kernel for all parameters. On a GPU it skips a step whose float16 has overflowed: the
    # scaler need not wait to know.
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def differences(cfg, world_size):
    """A line where images a step and learning rate are not the published run's, or None."""
    published = PUBLISHED.get((cfg.model, cfg.img_size))
    images, lr = images_per_step(cfg, world_size), peak_lr(cfg, world_size)
    if published is None or (images == published[0] and math.isclose(lr, published[1])):
        return None
    ours, theirs = (f"{i} images a step and lr {r:g}" for i, r in ((images, lr), published))
    return f"note: {ours}, but the published run had {theirs} (8 ranks)"


def mean_lr(cfg, peak, epoch, micro_steps):
    """The mean over an epoch's micro-steps, which the release's log calls train_lr."""
    rates = (learning_rate(cfg, peak, epoch, step, micro_steps) for step in range(micro_steps))
    return math.fsum(rates) / micro_steps
