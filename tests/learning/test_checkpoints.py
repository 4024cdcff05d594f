import errno
import json
import os

import pytest
import safetensors.torch
import torch

from sdesolve.diffusions import OU, VP, CosineBeta, LinearDiffusion
from sdesolve.nn import Normalizer
from sdesolve.scores.network import NetworkScore
from sdesolve.training import checkpoints
from sdesolve.training.checkpoints import load, save
from sdesolve.training.losses import DenoisingScoreMatching
from sdesolve.training.train import train


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_weights_come_back_to_the_bit(make_score, tmp_path):
    score, other = make_score(), make_score(seed=1)
    save(score, tmp_path / "new" / "weights.safetensors")
    load(other, tmp_path / "new" / "weights.safetensors")
    assert same(score, other)


def test_a_training_checkpoint_gives_its_averaged_weights(make_score, data, tmp_path):
    score, by_folder, by_file = make_score(), make_score(seed=1), make_score(seed=2)
    train(score, data, loss=DenoisingScoreMatching(), steps=5, checkpoint=tmp_path, progress=False)
    load(by_folder, tmp_path)
    load(by_file, tmp_path / checkpoints.TRAINING_FILE)
    assert same(score, by_folder)
    assert same(score, by_file)


def test_shared_weights_and_odd_layouts_are_saved(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.randn(3, 2).T)
            self.b = self.a
            self.register_buffer("count", torch.tensor(3, dtype=torch.int64))
            self.register_buffer("narrow", torch.randn(2, dtype=torch.bfloat16))
            self.register_buffer("none", torch.empty(0, 4))

    first, second = Tied(), Tied()
    save(first, tmp_path / "w")
    load(second, tmp_path / "w")
    assert same(first, second)


def test_a_process_is_known_by_what_it_does(make_score, tmp_path):
    def straight():
        return LinearDiffusion(alpha=lambda t: 1 - t, sigma=lambda t: t, t_max=0.99)

    save(make_score(process=straight()), tmp_path / "w")
    load(make_score(process=straight()), tmp_path / "w")
    with pytest.raises(ValueError, match=r"\(process\): LinearDiffusion with alpha and sigma .* in the file"):
        load(
            make_score(process=LinearDiffusion(alpha=lambda t: 1 - t**2, sigma=lambda t: t, t_max=0.99)), tmp_path / "w"
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"process": OU()}, r"\(process\): VP with .* in the file, OU with"),
        ({"process": VP(CosineBeta())}, r"\(process\): VP with .* in the file, VP with"),
        ({"predicts": "noise"}, r"\(predicts\): edm, sigma_data=1 in the file, noise, sigma_data=1 here"),
        ({"width": 8}, r"net.inlet.bias: torch.float32 \[16\] in the file, torch.float32 \[8\] here.*and \d+ more"),
        ({"depth": 2}, r"net.blocks.1.first.0.weight: absent in the file, torch.float32 \[16\] here"),
    ],
)  # fmt: skip
def test_another_score_is_refused_and_left_as_it_was(make_score, tmp_path, change, message):
    save(make_score(), tmp_path / "w")
    other = make_score(**change, seed=1)
    with pytest.raises(ValueError, match=message):
        load(other, tmp_path / "w")
    assert same(other, make_score(**change, seed=1))


def test_a_normalizer_that_was_told_another_range_is_refused(make_score, tmp_path):
    # shift and scale would come from the file, the range that data are held to would not
    def ranged(high):
        net = make_score().net
        return NetworkScore(net, VP(), normalizer=Normalizer.range(0.0, high))

    save(ranged(255.0), tmp_path / "w")
    load(ranged(255.0), tmp_path / "w")
    with pytest.raises(ValueError, match=r"\(range of data\): 0 to 255 in the file, 0 to 1 here"):
        load(ranged(1.0), tmp_path / "w")


def test_what_is_not_there_is_not_found(make_score, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*nothing"):
        load(make_score(), tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=checkpoints.TRAINING_FILE):
        load(make_score(), tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 1000, -1])
def test_a_file_cut_short_is_refused(make_score, tmp_path, kept):
    save(make_score(), tmp_path / "w")
    (tmp_path / "w").write_bytes((tmp_path / "w").read_bytes()[:kept])
    with pytest.raises(
        ValueError, match=r"is not a whole safetensors file .*: it is damaged, cut short, or of another kind"
    ):
        load(make_score(), tmp_path / "w")


def test_a_flipped_bit_is_refused(make_score, tmp_path):
    save(make_score(), tmp_path / "w")
    content = bytearray((tmp_path / "w").read_bytes())
    content[-7] ^= 1
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its contents do not match their checksum"):
        load(make_score(), tmp_path / "w")


def foreign(metadata):
    return safetensors.torch.save({"a": torch.zeros(2)}, metadata=metadata)


def header(**changes):
    whole = {"version": 1, "kind": "weights", "fingerprint": {}, "checksum": 0}
    return foreign({"sdesolve": json.dumps(whole | changes)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 a pickle in a zip, as torch.save writes", "not a whole safetensors file"),
        (foreign(None), "is a safetensors file, but not one that sdesolve wrote"),
        (foreign({"format": "pt"}), "not one that sdesolve wrote"),
        (foreign({"sdesolve": "not json"}), "not one that sdesolve wrote"),
        (foreign({"sdesolve": "[]"}), "not one that sdesolve wrote"),
        (header(kind="odd"), "not one that"),
        (header(version=9), "has format 9"),
    ],
)  # fmt: skip
def test_a_foreign_file_is_refused(make_score, tmp_path, content, message):
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(make_score(), tmp_path / "w")


def test_state_that_would_need_pickling_is_refused(tmp_path):
    class Odd(torch.nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(
        TypeError, match="holds a dict under '_extra_state'; only tensors can be saved without pickling"
    ):
        save(Odd(2, 2), tmp_path / "w")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file(make_score, tmp_path, monkeypatch, call):
    old, new = make_score(), make_score(seed=1)
    save(old, tmp_path / "w")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, call, fail)
        with pytest.raises(
            OSError, match=r"could not write .* \(No space left on device\); the previous checkpoint is"
        ):
            save(new, tmp_path / "w")
        with pytest.raises(OSError, match=r"could not write .*first \(No space left on device\)'?$"):
            save(new, tmp_path / "first")
    assert os.listdir(tmp_path) == ["w"]
    load(new, tmp_path / "w")
    assert same(old, new)


def test_any_module_can_be_saved(tmp_path):
    first, second = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    save(first, tmp_path / "w")
    load(second, tmp_path / "w")
    assert same(first, second)
    with pytest.raises(ValueError, match="belongs to another score than this NetworkScore"):
        load(NetworkScore(torch.nn.Linear(2, 3), VP()), tmp_path / "w")


def test_arguments_in_the_wrong_order_and_files_of_torch_save(make_score, tmp_path):
    score = make_score()
    with pytest.raises(TypeError, match="got PosixPath; the score comes first, then the path"):
        save(tmp_path / "x", score)
    with pytest.raises(TypeError, match="got str; the score comes first, then the path"):
        load(str(tmp_path), score)
    with pytest.raises(TypeError, match=r"got the class NetworkScore; did you mean NetworkScore\(...\)"):
        load(NetworkScore, tmp_path)
    torch.save(score.state_dict(), tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match=r"such as one of torch.save, whose weights go into a network by load_state_dict"
    ):
        load(score, tmp_path / "x.pt")
