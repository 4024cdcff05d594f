import errno
import json
import os
import platform
import subprocess
import sys

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
    whole = {"version": 2, "kind": "weights", "fingerprint": {}, "checksum": 0}
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
        (header(version=9), "has format 9.*update sdesolve"),
        (header(version=1), "has format 1.*from before the first release"),
        (header(version=2.0), "not one that sdesolve wrote"),
        (foreign({"sdesolve": "[" * 100_000}), "not one that sdesolve wrote"),
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


@pytest.fixture
def run_folder(make_score, data, tmp_path):
    """A folder with a run of three steps."""
    train(make_score(), data, loss=DenoisingScoreMatching(), steps=3, batch_size=8, checkpoint=tmp_path, progress=False)
    return tmp_path


def resume(score, data, folder):
    return train(score, data, loss=DenoisingScoreMatching(), steps=5, batch_size=8, checkpoint=folder, progress=False)


def test_every_digit_of_a_file_is_covered_by_its_checksum(make_score, data, run_folder):
    """A changed step, position or count of updates resumed in silence, to other weights."""
    file = run_folder / checkpoints.TRAINING_FILE
    content = file.read_bytes()
    start = content.index(b"__metadata__")
    end = content.index(b"}", content.index(b'"checksum', start) if b'"checksum' in content else start)
    end = max(end, content.index(b"checksum", start) + 24)
    digits = [i for i in range(start, end) if content[i : i + 1].isdigit()]
    assert len(digits) > 40
    for i in digits[:: max(1, len(digits) // 60)]:
        changed = bytearray(content)
        changed[i] = ord("1") + (changed[i] - ord("0")) % 9
        file.write_bytes(changed)
        score = make_score(seed=3)
        with pytest.raises(ValueError, match=r"damaged|has format|not one that sdesolve wrote"):
            resume(score, data, run_folder)
        assert same(score, make_score(seed=3))
    file.write_bytes(content)
    assert resume(make_score(), data, run_folder).resumed_from == 3


HEADERS = {
    "step": [-1, 2.5, "3", None, True, 2**70, -(2**70)],
    "updates": [-1, 2, 3.0001, None],
    "position": [[], [24, 0], [24.5, 0, 0], [-8, 0, 0], {"samples": 3}, 24, [24, 0, None]],
    "metrics": [None, 3, [[1]], [[1, 2]], [[-1, {}]], [[1, {"a": "b"}]]],
    "config": [None, [], {}, {"ema": "x"}, {"ema": [2.0]}, {"ema": []}],
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_no_run_writes_are_refused(make_score, data, run_folder, name):
    """With a checksum that is right; they gave KeyErrors, endless loops and other weights."""
    file = run_folder / checkpoints.TRAINING_FILE
    tensors, header = checkpoints.read(file)
    for value in HEADERS[name]:
        checkpoints.write(file, tensors, header | {name: value})
        for call in (lambda: resume(make_score(), data, run_folder), lambda: load(make_score(), run_folder)):
            with pytest.raises(ValueError, match=f"is damaged: its {name} is .* which no run has"):
                call()
    checkpoints.write(file, tensors, {k: v for k, v in header.items() if k != name})
    with pytest.raises(ValueError, match=f"is damaged: its {name} is None"):
        load(make_score(), run_folder)


def test_tensors_of_other_shapes_are_refused_before_anything_is_written(make_score, data, run_folder):
    """AdamW read and wrote past the end of state that was too small."""
    file = run_folder / checkpoints.TRAINING_FILE
    tensors, header = checkpoints.read(file)
    moment = next(name for name in tensors if name.startswith("adamw.exp_avg."))
    weight, average = moment.replace("adamw.exp_avg.", "weights."), moment.replace("adamw.exp_avg.", "ema.")
    step = moment.replace("exp_avg", "step")
    changes = [
        {name: tensors[name].flatten()[:1].clone()}
        for name in (moment, moment.replace("avg", "avg_sq"), weight, average)
    ]
    changes += [{name: None} for name in (moment, step, weight, average, "losses")]
    changes += [{step: torch.tensor(value)} for value in (-1.0, 2.5, 9.0, torch.nan)]
    changes += [{step: torch.ones(2)}, {moment: tensors[moment].double()}, {moment: tensors[moment] * torch.nan}]
    changes += [
        {"losses": torch.zeros(4, dtype=torch.float64)},
        {"losses": torch.zeros(3)},
        {"adamw.more": torch.ones(1)},
    ]
    for change in changes:
        whole = {name: value for name, value in (tensors | change).items() if value is not None}
        checkpoints.write(file, whole, header)
        score = make_score(seed=3)
        with pytest.raises(ValueError, match=r"is damaged: .*Delete it to start afresh"):
            resume(score, data, run_folder)
        assert same(score, make_score(seed=3))
    for change in ({average: tensors[average][:1]}, {average: None}):
        checkpoints.write(file, {k: v for k, v in (tensors | change).items() if v is not None}, header)
        with pytest.raises(ValueError, match="is damaged"):
            load(make_score(), run_folder)


def test_a_changed_row_is_other_data(make_score, data, run_folder):
    other = data.clone()
    other[137 % len(data)] += 1e-3
    with pytest.raises(ValueError, match="was made with data='tensor"):
        resume(make_score(), other, run_folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks in processes with threads
def test_two_processes_in_one_folder_leave_whole_files(tmp_path):
    """They shared a temporary name: one died in its rename, and others read half a file."""
    file, writers = tmp_path / "w", []
    for value in (1.0, 2.0):
        process = os.fork()
        if not process:
            try:
                for _ in range(100):
                    checkpoints.write(file, {"a": torch.full((4000,), value)}, {"kind": "weights", "fingerprint": {}})
                os._exit(0)
            finally:
                os._exit(1)
        writers.append(process)
    seen, running = set(), set(writers)
    while running:
        running -= {
            process for process in running if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        }
        if file.exists():
            values = checkpoints.read(file)[0]["a"]
            assert bool((values == values[0]).all())
            seen.add(float(values[0]))
    assert [os.waitpid(process, 0)[1] for process in writers] == [0, 0]
    assert seen == {1.0, 2.0}
    assert os.listdir(tmp_path) == ["w"]


@pytest.mark.skipif(os.name != "posix", reason="nobody can ask there whether a process lives")
def test_what_a_killed_process_began_is_removed(tmp_path):
    start = f".w.{platform.node()}-"
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    for name in (
        f"{start}{int(dead.stdout)}-1.partial",
        f"{start}{os.getppid()}-1.partial",
        ".w.elsewhere-1-1.partial",
    ):
        (tmp_path / name).write_bytes(b"half")
    save(torch.nn.Linear(1, 1), tmp_path / "w")
    assert sorted(os.listdir(tmp_path)) == sorted([".w.elsewhere-1-1.partial", f"{start}{os.getppid()}-1.partial", "w"])
