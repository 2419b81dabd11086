"""Parts of a training set: what trains (train_share), and what validates (val_split)."""

import copy
import hashlib
import os

import torch
from torch.utils.data import Subset

from .log import UserError


def divide(cfg, data, dataset, seed):
    """(what trains, what validates or None) of a training set, drawn by the seed within each class.
    The validation samples are those of the smallest places, the same for every train_share; they
    come as in testing.
    """
    if not cfg.val_split and cfg.train_share == 1:
        return dataset, None
    place, low = places(dataset, seed), cfg.val_split
    trains = (place >= low) & (place <= low + (1 - low) * cfg.train_share)
    held_out = None
    if low:
        held_out = part(data.as_tested(cfg, dataset), (place < low).nonzero()[:, 0].tolist())
        if not len(held_out):
            raise UserError(f"val_split is {low}, which is no sample of any class; make it more")
    return part(dataset, trains.nonzero()[:, 0].tolist()), held_out


def places(dataset, seed):
    """[samples]: the places of a class's samples, evenly between 0 and 1, in an order of
    the seed alone. Labels are those in `samples` or `targets`, as torchvision's data sets have
    them; where there are none, all samples are one class.
    """
    labels = [label for _, label in getattr(dataset, "samples", ())]
    labels = torch.tensor(labels or getattr(dataset, "targets", [0] * len(dataset)))
    generator, found = torch.Generator().manual_seed(seed), torch.empty(len(labels))
    for label in labels.unique():
        of_class = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(of_class), generator=generator)
        found[of_class] = (order + 0.5) / len(of_class)
    return found


def part(dataset, indices):
    """The samples `indices` of a data set, as a data set."""
    if hasattr(dataset, "samples"):  # files, one of which may take the place of a damaged one
        dataset = copy.copy(dataset)
        dataset.samples = [dataset.samples[index] for index in indices]
        return dataset
    subset = Subset(dataset, indices)
    subset.classes = dataset.classes
    return subset


def digest_of_files(dataset):
    """Of the names and labels of a data set's files, in their order; None for one without files.
    The data may have moved: folders do not count.
    """
    found = hashlib.sha256()
    for path, label in getattr(dataset, "samples", ()):
        found.update(os.fsencode(f"{os.path.basename(path)}/{label}/"))
    return found.hexdigest() if hasattr(dataset, "samples") else None
