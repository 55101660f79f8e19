"""DeepSpeed's files are read without running code from them."""

from __future__ import annotations

import copy
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from pipeline.checkpoint.manifest import DamageError
from pipeline.training.pickles import MODEL_STATES, check_engine_files, engine_files, restricted

OPTIM_STATES = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
WEIGHTS = {"a.weight": torch.Size([2, 3]), "norm": torch.Size([3])}


class Evil:
    """Leaves a mark where it is unpickled by anything that runs what a pickle asks for."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def model():
    return {
        "module": OrderedDict((name, torch.zeros(shape)) for name, shape in WEIGHTS.items()),
        "param_shapes": [OrderedDict([("a.weight", WEIGHTS["a.weight"])]), OrderedDict([("norm", WEIGHTS["norm"])])],
        "dp_world_size": 1,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
    }


def optimizer():
    def group(name, numel):
        return OrderedDict([(name, fragment_address(numel=numel, start=0))])

    state = {
        "loss_scaler": DynamicLossScaler(2**16, 1000, 1.0, 1, False),
        "other_scaler": LossScaler(1.0),
        "zero_stage": ZeroStageEnum.gradients,
        # As of a rank that holds only padding of the second group.
        "base_optimizer_state": {
            "state": {number: {"exp_avg": torch.zeros(6), "exp_avg_sq": torch.zeros(6)} for number in (0, 1)}
        },
        "single_partition_of_fp32_groups": [torch.zeros(6), torch.zeros(0)],
        "param_slice_mappings": [group("a.weight", 6), OrderedDict()],
    }
    return {"optimizer_state_dict": state}


def check(folder, name):
    check_engine_files(folder, [name], weights=WEIGHTS, num_parameter_groups=2, num_ranks=1)


def test_what_deepspeed_writes_is_read(tmp_path):
    torch.save(model(), tmp_path / MODEL_STATES)
    torch.save(optimizer(), tmp_path / OPTIM_STATES)
    assert engine_files(tmp_path, 1) == [OPTIM_STATES, MODEL_STATES]
    for name in engine_files(tmp_path, 1):
        check(tmp_path, name)
    with restricted():
        found = torch.load(tmp_path / OPTIM_STATES, weights_only=False)["optimizer_state_dict"]
    assert found["zero_stage"] is ZeroStageEnum.gradients
    assert found["loss_scaler"].cur_scale == 2**16
    assert found["param_slice_mappings"][0]["a.weight"] == fragment_address(numel=6, start=0)


class NamedStage:
    """Pickled as Python 3.11.2 pickles a member of an enum: by `getattr`."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


def test_an_enum_that_was_pickled_by_getattr_is_read(tmp_path):
    torch.save({"zero_stage": NamedStage(ZeroStageEnum, "gradients")}, tmp_path / "stage.pt")
    with restricted():
        assert torch.load(tmp_path / "stage.pt")["zero_stage"] is ZeroStageEnum.gradients


@pytest.mark.parametrize(
    "arguments", [(ZeroStageEnum, "__members__"), (torch.Tensor, "numpy"), (fragment_address, "x")]
)
def test_getattr_gives_nothing_else(tmp_path, arguments):
    torch.save(NamedStage(*arguments), tmp_path / "stage.pt")
    with restricted(), pytest.raises(pickle.UnpicklingError, match="Unsupported"):
        torch.load(tmp_path / "stage.pt")


def as_zip(content, path):
    torch.save(content, path)


def as_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_plain_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("write", [as_zip, as_legacy, as_plain_pickle])
@pytest.mark.parametrize("name", [MODEL_STATES, OPTIM_STATES, "layer_0_expert_0_model_states.pt"])
def test_a_pickle_that_runs_code_does_not_run_it(tmp_path, write, name):
    marker = tmp_path / "marker"
    content = optimizer() if name == OPTIM_STATES else model()
    write({**content, "more": Evil(marker)}, tmp_path / name)
    with pytest.raises(DamageError, match=f"{name} is not a file of DeepSpeed's that can be loaded without running"):
        check(tmp_path, name)
    # DeepSpeed, which asks for the unrestricted unpickler, does not get it either.
    with restricted(), pytest.raises((pickle.UnpicklingError, RuntimeError)):
        torch.load(tmp_path / name, map_location="cpu", weights_only=False)
    assert not marker.exists()
    if write is as_zip:  # else the test would show nothing
        torch.load(tmp_path / name, weights_only=False)
        assert marker.exists()


def test_the_message_names_what_was_refused(tmp_path):
    torch.save({**model(), "more": Evil(tmp_path / "marker")}, tmp_path / MODEL_STATES)
    with pytest.raises(
        DamageError, match=r"got: UnpicklingError: Trying to load unsupported GLOBAL posix.mkdir .*blocked.$"
    ):
        check(tmp_path, MODEL_STATES)


@pytest.mark.parametrize("name", ["TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_what_the_environment_said_before_it_says_again(name, monkeypatch, tmp_path):
    monkeypatch.setenv(name, "1")
    torch.save(model(), tmp_path / MODEL_STATES)
    check(tmp_path, MODEL_STATES)
    assert os.environ[name] == "1" and ZeroStageEnum not in torch.serialization.get_safe_globals()
    monkeypatch.delenv(name)
    check(tmp_path, MODEL_STATES)
    assert name not in os.environ


def code_in_a_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/constants.pkl", b"")
        archive.writestr("model/data.pkl", b"(dp0\n.")
        archive.writestr("model/version", b"3")


@pytest.mark.parametrize("write", [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(os.urandom(999)),
    lambda path: path.write_bytes(b"PK\3\4" + bytes(99)),
    lambda path: torch.save([1], path),
    lambda path: torch.save(torch.zeros(3), path),
    code_in_a_zip,
    Path.mkdir,
])  # fmt: skip
@pytest.mark.parametrize("name", [MODEL_STATES, OPTIM_STATES])
def test_what_is_no_such_file_is_damage(tmp_path, name, write):
    write(tmp_path / name)
    with pytest.raises(DamageError, match=f"{name} is not a file of DeepSpeed's that can be loaded"):
        check(tmp_path, name)


ESCAPE = "../../../../escape"  # DeepSpeed makes a file of this name when it converts a checkpoint
MODELS = [
    (
        lambda c: c["module"].update({ESCAPE: torch.zeros(1)}),
        "the weights of another SideNet: ../../../../escape and 0",
    ),
    (lambda c: c["module"].pop("norm"), "the weights of another SideNet: norm and 0 others"),
    (lambda c: c["module"].update(norm=torch.zeros(4)), "the weights of another SideNet: norm and"),
    (lambda c: c["module"].update(norm=7), "AttributeError"),
    (lambda c: c["param_shapes"][0].update({ESCAPE: torch.Size([1])}), "does not have: '../../../../escape'"),
    (lambda c: c.update(dp_world_size="1"), "files of '1' ranks, in a checkpoint of 1"),
    (lambda c: c["universal_checkpoint_info"].update(vocabulary_parameter_patterns=["(a+)+$"]), "not for it to say"),
]
OPTIMIZERS = [
    (lambda c: c.pop("optimizer_state_dict"), "KeyError"),
    (lambda c: c["param_slice_mappings"][0].update({ESCAPE: fragment_address(1, 0)}), "does not have: '../"),
    (lambda c: c["param_slice_mappings"][0].update({"norm": 1}), "a parameter without a place"),
    (lambda c: c["single_partition_of_fp32_groups"].pop(), "has 1 groups of parameters; expected: 2"),
]


@pytest.mark.parametrize(("change", "words"), MODELS)
def test_weights_that_are_not_the_sidenets_are_refused(tmp_path, change, words):
    content = copy.deepcopy(model())
    change(content)
    torch.save(content, tmp_path / MODEL_STATES)
    with pytest.raises(DamageError, match=words):
        check(tmp_path, MODEL_STATES)


@pytest.mark.parametrize(("change", "words"), OPTIMIZERS)
def test_states_that_are_not_the_optimizers_are_refused(tmp_path, change, words):
    content = optimizer()
    change(content if words == "KeyError" else content["optimizer_state_dict"])
    torch.save(content, tmp_path / OPTIM_STATES)
    with pytest.raises(DamageError, match=words):
        check(tmp_path, OPTIM_STATES)


def test_a_missing_file_of_a_rank_is_damage(tmp_path):
    for name in (MODEL_STATES, OPTIM_STATES):
        (tmp_path / name).touch()
    engine_files(tmp_path, 1)
    with pytest.raises(DamageError, match="zero_pp_rank_1_mp_rank_00_optim_states.pt is missing; got: 1 of 3 files"):
        engine_files(tmp_path, 2)
