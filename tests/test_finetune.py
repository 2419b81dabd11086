"""What fine-tuning needs: frozen stages, a validation set and a share of the training set."""

import copy
import re

import pytest
import torch

from conftest import Golden, load
from on_digits import cifar10
from on_runs import FEW, content, is_same, train

parts = cifar10.batches


@pytest.mark.parametrize("name", ["QKFormer", "MSQKFormer"])
def test_frozen_stages(name, monkeypatch):
    """Gradients and statistics of a network whose first two stages are computed beforehand, in
    evaluation; they run fused, and in training again after a test.
    """
    entry = cifar10.options.MODELS[name]
    model = Golden.fill(entry(T=2, embed_dims=32, num_heads=2, drop_path=0.0))
    twin = copy.deepcopy(model).train()
    frames = twin.frames(torch.rand(4, 3, 16, 16, dtype=torch.float64))
    with torch.no_grad():
        maps = twin.eval().run_stage(2, twin.run_stage(1, frames))
    want = twin.train().forward_head(twin.run_stage(3, maps))
    (want * want).sum().backward()

    model.freeze(2)
    model.train().eval()
    model.train()
    for kind in ("conv_bn_lif", "conv_bn"):
        monkeypatch.setattr(cifar10.plain, kind, None)
    logits = model(frames[0])
    (logits * logits).sum().backward()
    assert torch.allclose(logits, want, rtol=1e-9)
    learns = 0
    for (path, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if path[-1] in "12" or path.startswith(
            ("patch_embed1", "patch_embed2", "stage1", "stage2")
        ):
            assert one.grad is None and not one.requires_grad, path
        elif other.grad is not None:  # of neurons that no loss depends on there is none
            learns += 1
            assert torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-12), path
    assert learns > 20
    for (path, one), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(one, other, rtol=1e-9), path


@pytest.mark.parametrize("folder", ["imagenet", "dvs128-gesture"])
def test_frozen_stages_of_others(folder):
    modules = load(folder)
    name = "QKFormer_10_384" if folder == "imagenet" else "QKFormer"
    model = modules.options.MODELS[name](embed_dims=32, num_heads=2)
    last = len(model.feature_info)
    model.freeze(last)
    before = copy.deepcopy(model.state_dict())
    x = torch.rand(2, 3, 32, 32) if folder == "imagenet" else torch.rand(2, 4, 2, 32, 32)
    model.train()(x).sum().backward()
    assert [path for path, p in model.named_parameters() if p.grad is not None] == [
        *("head.weight", "head.bias")
    ]
    assert all(torch.equal(value, before[path]) for path, value in model.state_dict().items())


def test_parts_of_a_training_set():
    """So many of each class, drawn by the seed; validation is the same for every train_share."""

    class Images:
        samples = [(f"{n}.png", n % 3 if n < 60 else 3) for n in range(64)]

        def __len__(self):
            return len(self.samples)

    class Data:
        as_tested = staticmethod(lambda cfg, dataset: copy.copy(dataset))

    def divide(val_split, train_share, seed=1, dataset=None):
        cfg = cifar10.config.Config()
        vars(cfg).update(val_split=val_split, train_share=train_share)
        return parts.divide(cfg, Data, dataset or Images(), seed)

    assert divide(0.0, 1.0)[0].samples is Images.samples and divide(0.0, 1.0)[1] is None
    found = {}
    for share in (1.0, 0.5):
        trains, validates = found[share] = divide(0.25, share)
        labels = [label for _, label in validates.samples]
        assert [labels.count(k) for k in range(4)] == [5, 5, 5, 1]
        assert not {*trains.samples} & {*validates.samples}
        assert trains.samples == sorted(trains.samples, key=Images.samples.index)
    whole, half = (found[share][0].samples for share in (1.0, 0.5))
    assert len(whole) == 48 and 22 <= len(half) <= 26 and {*half} < {*whole}
    assert found[1.0][1].samples == found[0.5][1].samples != divide(0.25, 1.0, 2)[1].samples
    trains, _ = divide(0.0, 0.1, dataset=Plain(range(50)))
    assert len(trains) == 5 and trains.classes == ["x"]
    with pytest.raises(cifar10.config.UserError, match=r"val_split is 0\.01, which is no sample"):
        divide(0.01, 1.0)


class Plain(list):
    """A data set that does not tell its labels."""

    classes = ["x"]


def test_a_run_that_validates(tmp_path, stop_when, monkeypatch):
    """No test sample is read; a run that is stopped goes on with the same samples, to the bit,
    whatever seed it is given then; its checkpoint is fine-tuned with frozen stages.
    """
    build = cifar10.data.build_dataset

    def build_dataset(cfg, train, ranks):
        assert train or cfg.val_split == 0
        return build(cfg, train, ranks)

    monkeypatch.setattr(cifar10.data, "build_dataset", build_dataset)
    args = [*FEW, "--val-split", 0.25, "--train-share", 0.8, "--batch-size", 200]
    code, text = train(*args, "--output", tmp_path / "whole")
    found = re.search(r"data: digits, (\d+) training and (\d+) validation images of 10", text)
    trains, validates = map(int, found.groups())
    assert code == 0 and abs(validates - 0.25 * 1437) < 5 and abs(trains - 0.6 * 1437) < 10
    assert "(of 1,437 to train with)" in text and ", validation loss " in text
    assert "% in validation: " in text and "test" not in re.sub(r"\S*pytest\S*", "", text)
    for step in (1, 3, None):
        stop_when(lambda run, step=step: run.epoch == 0 and run.meter.steps == step)
        code, text = train(*args, "--output", tmp_path / "cut", "--resume", "auto")
        assert code == (143 if step else 0)
    is_same(tmp_path / "cut" / "quickstart", tmp_path / "whole" / "quickstart")

    last = tmp_path / "whole" / "quickstart" / "last.pth"
    taken = []
    monkeypatch.setattr(cifar10.run, "divide", lambda *a: taken.append(a[-1]) or parts.divide(*a))
    flags = ["--resume", last, "--output", tmp_path, "--epochs", 3, "--seed", 7]
    assert train(*flags)[0] == 0 and taken == [42]
    code, text = train(*flags, "--val-split", 0.1)
    assert code == 1 and "val_split is 0.1, but" in text and "is of val_split 0.25" in text

    before = content(last)["model"]
    flags = ["--finetune", last, "--freeze", 2, "--output", tmp_path / "tuned"]
    code, text = train(*FEW, *flags, "--epochs", 1, "--model-ema")
    assert code == 0 and "stages 1 to 2 and their BatchNorm stay as they are" in text
    after = content(tmp_path / "tuned" / "quickstart" / "last.pth")
    for weights in (after["model"], after["model_ema"]):
        changed = {path for path in before if not torch.equal(before[path], weights[path])}
        assert changed and all(p.startswith(("patch_embed3", "stage3", "head")) for p in changed)


def test_validation_is_not_augmented(tmp_path):
    """Its images are the training set's, through the transform of a test."""
    for folder, dataset in (("cifar10", "digits"), ("imagenet", "photos")):
        modules = load(folder)
        flags = ["-d", dataset, "--data_path", str(tmp_path), "--val_split", "0.1"]
        cfg = modules.config.read_settings(modules.options, flags).resolve()
        whole = modules.data.build_dataset(cfg, True, modules.process.Ranks("cpu"))
        _, held_out = modules.batches.divide(cfg, modules.data, whole, 0)
        first, again = (torch.as_tensor(held_out[0][0]) for _ in range(2))
        assert torch.equal(first, again) and len(whole) / 12 < len(held_out) < len(whole) / 8
        if dataset == "photos":
            path, _ = held_out.samples[0]
            want = modules.data.build_transform(cfg, False)(modules.images.read_image(path))
            assert torch.equal(first, want)
