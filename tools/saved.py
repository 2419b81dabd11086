"""Bytes that autograd keeps from the forward for the backward pass."""

import torch


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Within it, `total` grows by the bytes that autograd saves, each memory once, the model's
    parameters left out.
    """

    def __init__(self, model):
        self.known = {parameter.data_ptr() for parameter in model.parameters()}
        self.total = 0
        self.kept = []  # so that no memory is used again, and then taken for known

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.known.add(storage.data_ptr())
                self.kept.append(storage)
                self.total += storage.nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    def __enter__(self):
        super().__enter__()
        return self

    def __exit__(self, *args):
        super().__exit__(*args)
        self.kept.clear()
