"""Bad input on two ranks: both say what to do, neither hangs, nothing is written, and the next run is not disturbed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pipeline.checkpoint.manifest import manifest_text
from pipeline.config.schema import Config
from tests.accelerator import accelerator_with
from tests.ranks import run_ranks
from tests.tiny_run import LAYERS, TRAIN_TOKENS, VALIDATION_TOKENS, TinyRun, save_backbone, save_store

STEPS = 4  # a checkpoint every two
NEWEST = Path("checkpoints") / f"step_{STEPS:08d}"
MODEL_STATES = NEWEST / "sidenet" / "engine" / "mp_rank_00_model_states.pt"
LANES_FILE = NEWEST / "lanes" / "rank_00001.json"


def other_format(run: Path) -> None:
    (run / NEWEST / "manifest.json").write_text(manifest_text({"format": 99}))


def flip_a_bit(run: Path) -> None:
    path = run / NEWEST / "memory" / "rank_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(run: Path) -> None:
    path = run / LANES_FILE
    path.write_bytes(path.read_bytes()[:-1])


# What is done to a copy of a good run, how its settings differ, and what must be said. A damaged checkpoint is refused
# where run.resume names it; `auto` passes over it (tests/distributed/test_damaged_checkpoints.py).
DAMAGE: Mapping[str, tuple[Callable[[Path], object], Mapping[str, Mapping[str, Any]], str]] = {
    "bit flip": (flip_a_bit, {}, r"is corrupt; got: memory/rank_00001.safetensors has another hash; do: resume from"),
    "truncated": (cut_short, {}, r"is corrupt; got: lanes/rank_00001.json has \d+ bytes instead of \d+"),
    "file gone": (lambda run: (run / LANES_FILE).unlink(), {}, r"is corrupt; got: lanes/rank_00001.json is missing"),
    "manifest gone": (
        lambda run: (run / NEWEST / "manifest.json").unlink(),
        {},
        r"is not a whole checkpoint; got: FileNotFoundError at manifest.json; .* do: give the folder",
    ),
    "manifest cut": (
        lambda run: (run / NEWEST / "manifest.json").write_text('{"format": 1, "st'),
        {},
        r"is not a whole checkpoint; got: JSONDecodeError",
    ),
    "format": (other_format, {}, r"has another format; got: format 99; expected: format 2 or 3; do:"),
    "checkpoint gone": (lambda run: shutil.rmtree(run / NEWEST), {}, r"is not a whole checkpoint"),
    "unlisted file": (
        lambda run: shutil.copy(run / MODEL_STATES, run / MODEL_STATES.with_name("mp_rank_01_model_states.pt")),
        {},
        r"is corrupt; got: sidenet/engine/mp_rank_01_model_states.pt is not in the manifest; do: resume from another",
    ),
    "other settings": (
        lambda run: None,
        {"train": {"steps": STEPS, "learning_rate": 0.5}},
        r"holds a run of another configuration; nothing was written; got: train.learning_rate 0.5; "
        r"expected: train.learning_rate 0.003 .*do: choose another run.output_dir",
    ),
    "resume none": (
        lambda run: None,
        {"run": {"resume": "none"}},
        r"already holds this run, and run.resume is 'none'; got: .*do: set run.resume to 'auto'",
    ),
}


def tree(folder: Path) -> dict[str, str]:
    """What a run has written, but for what says how its last job fared."""
    job = ("status.json", ".status.json.partial", "lock")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in job)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def refused(good: Config, damaged: dict[str, Config], others: dict[str, Config]) -> dict[str, Any]:
    """Makes a good run, and then runs that must be refused: name -> message and whether nothing was written."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    from pipeline.distributed.ranks import barrier, rank
    from pipeline.errors import LongMemError
    from pipeline.training.build import build_run
    from pipeline.training.loop import train

    def attempt(config: Config) -> tuple[str, bool]:
        output, message = Path(config.run.output_dir), "nothing was raised"
        before, existed = tree(output), output.exists()
        barrier()
        try:
            train(build_run(config))
        except LongMemError as error:
            message = str(error)
        barrier()
        return message, tree(output) == before and output.exists() == existed

    train(build_run(good))
    found: dict[str, Any] = {}
    for name, config in damaged.items():
        if rank() == 0:
            shutil.copytree(good.run.output_dir, config.run.output_dir)
            DAMAGE[name][0](Path(config.run.output_dir))
        barrier()
        found[name] = attempt(config)
    for name, config in others.items():
        with accelerator_with(fp16=False):
            found[name] = attempt(config)
    found["partitioning goes on"] = is_deepspeed_zero3_enabled()
    return found


def changed_settings(backbone: Path, **settings: Any) -> None:
    path = backbone / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def alter_in_place(store: Path) -> None:
    """One byte of the tokens is another one."""
    (arrow,) = (store / "train").glob("*.arrow")
    content = bytearray(arrow.read_bytes())
    content[len(content) // 2] ^= 1
    arrow.write_bytes(content)


def forget_hashes(store: Path) -> None:
    """As stores were made before they had any."""
    path = store / "store.json"
    whole = json.loads(path.read_text())
    for counts in whole["splits"].values():
        del counts["files"], counts["tokens_sha256"]
    path.write_text(json.dumps(whole))


def other_runs(tiny_run: TinyRun, folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Settings that differ, and what must be said."""
    foreign_family = save_backbone(folder / "mamba")
    (foreign_family / "config.json").write_text('{"model_type": "mamba", "vocab_size": 300}')
    damaged = save_backbone(folder / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    lacking = save_backbone(folder / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    truncated = save_backbone(folder / "truncated")
    changed_settings(truncated, num_hidden_layers=LAYERS - 1)
    wider = save_backbone(folder / "wider")
    changed_settings(wider, hidden_size=64)
    ill = save_backbone(folder / "ill")
    tensors = load_file(ill / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, ill / "model.safetensors", metadata={"format": "pt"})
    other_seed = save_backbone(folder / "other_seed", seed=1)
    other_tokenizer = save_backbone(folder / "other_tokenizer", tokenizer_size=299)

    def store(name: str, **splits: tuple[int, ...]) -> str:
        return str(save_store(folder / name, splits, tokenizer_from=tiny_run.backbone))

    broken_store = store("broken", train=TRAIN_TOKENS, validation=VALIDATION_TOKENS)
    (Path(broken_store) / "validation" / "state.json").unlink()
    altered = store("altered", train=TRAIN_TOKENS, validation=VALIDATION_TOKENS)
    alter_in_place(Path(altered))
    unhashed = store("unhashed", train=TRAIN_TOKENS[::-1])
    forget_hashes(Path(unhashed))
    empty = folder / "empty_data"
    empty.mkdir()
    checkpoint = str(folder / "good" / NEWEST)
    return {
        "group": (
            {"memory": {"group_size": 3}, "train": {"segments_per_step": 3}},
            r"memory.group_size does not divide the world size; got: 3 and 2 ranks; do:",
        ),
        "no data": (
            {"data": {"path": "/nowhere"}},
            r"token store does not exist; got: /nowhere; do: make one",
        ),
        "empty data": ({"data": {"path": str(empty)}}, r"not a token store: it has no store.json"),
        "damaged validation": ({"data": {"path": broken_store}}, r"damaged: a split cannot be read; got: .*validation"),
        "short documents": (
            {"data": {"path": store("short", train=(*TRAIN_TOKENS, 3))}},
            r"1 of 8 documents are shorter than a chunk .*do: prepare the data again with --min-tokens 4",
        ),
        "short held-out documents": (
            {"data": {"path": store("held_out", train=TRAIN_TOKENS, validation=(40, 63))}},
            r"no document of the split 'validation' is long enough .* 2 has 63 tokens; expected: 64 tokens; do: lower",
        ),
        "other tokenizer": (
            {"backbone": {"path": str(other_tokenizer)}},
            r"was made with another tokenizer; got: .*299 ids.*expected: .*300 ids.*do: prepare the data again",
        ),
        "no backbone": (
            {"backbone": {"path": "/nowhere"}},
            r"backbone cannot be loaded; got: backbone.path '/nowhere'",
        ),
        "unknown family": ({"backbone": {"path": str(foreign_family)}}, r"mamba.*expected: one of bloom, gemma3_text"),
        "damaged weights": ({"backbone": {"path": str(damaged)}}, r"backbone's weights cannot be loaded; .*do: check"),
        "lacking weights": (
            {"backbone": {"path": str(lacking)}},
            r"files lack weights; got: .* without model.layers.2.mlp.up_proj.weight \(1 in all\); do: check",
        ),
        "truncated backbone": (
            {"backbone": {"path": str(truncated)}},
            r"weights of layers that its config.json does not ask for.* with model.layers.3.* do: put back the config",
        ),
        "wider backbone": (
            {"backbone": {"path": str(wider)}},
            r"other weights than .* model.embed_tokens.weight has the shape \[300, 32\]; expected: \[300, 64\]; do",
        ),
        "not a number": (
            {"backbone": {"path": str(ill)}},
            r"not finite; got: 1 of 1536 in model.layers.2.mlp.up_proj.weight; .*do: check the files",
        ),
        "lanes": (
            {"data": {"lanes": 5}},
            r"data.lanes is not a multiple .*; got: 5 lanes and 2 groups .*do: set data.lanes to 6",
        ),
        "layer": (
            {"sidenet": {"memory_layers": [2, 5]}},
            r"sidenet.memory_layers is \[2, 5\]; expected different SideNet layers from 1 to 4",
        ),
        "layers": ({"sidenet": {"num_layers": 9}}, r"sidenet.num_layers is 9; the backbone allows 1 to 4"),
        "fp16": ({"train": {"precision": "fp16"}}, r"fp16, which this accelerator \(\w+\) does not support; .*do: set"),
        "foreign folder": (
            {"run": {"output_dir": str(tiny_run.data)}},
            r"holds something that is not a run; nothing was written; got: .* without config.yaml; do: choose an empty",
        ),
        "a file": ({"run": {"output_dir": str(tiny_run.data / "store.json")}}, r"run.output_dir is not a folder"),
        "no checkpoint": ({"run": {"resume": "/nowhere"}}, r"/nowhere is not a whole checkpoint"),
        "other backbone": (
            {"run": {"resume": checkpoint}, "backbone": {"path": str(other_seed)}},
            r"belongs to another run; got: backbone '\w{64}'; expected: backbone '\w{64}'; do: start with",
        ),
        "other SideNet": (
            {"run": {"resume": checkpoint}, "sidenet": {"memory_layers": [2]}},
            r"belongs to another run; got: sidenet \[.*\[1, 2, 3, 4\].*expected: sidenet \[.*\[2\]",
        ),
        "no memory": (
            {"run": {"resume": checkpoint}, "memory": {"enabled": False}},
            r"belongs to another run; got: memory True; expected: memory False",
        ),
        "more memory": (
            {"run": {"resume": checkpoint}, "memory": {"tokens": 128}},
            r"belongs to another run; got: memory tokens 64; expected: memory tokens 128; do: start with",
        ),
        "less memory": (
            {"run": {"resume": checkpoint}, "memory": {"tokens": 32}},
            r"belongs to another run; got: memory tokens 64; expected: memory tokens 32; do: start with",
        ),
        "other chunks": (
            {"run": {"resume": checkpoint}, "memory": {"chunk_size": 2}},
            r"the stored memory does not fit .*do: resume with the memory.\* settings",
        ),
        "other data": (
            {"run": {"resume": checkpoint}, "data": {"path": store("others", train=TRAIN_TOKENS[::-1])}},
            r"belongs to another run; got: token store '\w{64}'; expected: token store '\w{64}'; do: start with",
        ),
        "other data of a store without hashes": (
            {"run": {"resume": checkpoint}, "data": {"path": unhashed}},
            r"belongs to another run; got: token store '\w{64}'; expected: token store '\w{64}'; do: start with",
        ),
        "altered data": (
            {"data": {"path": altered}},
            r"damaged, or was altered; got: .*train: data-\S+ has another content than .*; do: put the store back",
        ),
        "data altered after a checkpoint": (
            {"run": {"resume": checkpoint}, "data": {"path": altered}},
            r"damaged, or was altered; got: .*train: data-\S+ has another content than .*; do: put the store back",
        ),
    }


@pytest.fixture(scope="module")
def attempts(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bad_input")
    training = {"train": {"steps": STEPS}, "checkpoint": {"every_steps": 2}}

    def config(output: str, overrides: Mapping[str, Mapping[str, Any]]) -> Config:
        sections: dict[str, Any] = {name: dict(keys) for name, keys in overrides.items()}
        sections = {**training, **sections, "train": {**training["train"], **sections.get("train", {})}}
        return tiny_run.config(folder / output, **sections)

    def named(name: str, overrides: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
        return {"run": {"resume": str(folder / f"copy, {name}" / NEWEST)}, **overrides}

    others = other_runs(tiny_run, folder)
    found = run_ranks(
        refused,
        2,
        config("good", {}),
        {name: config(f"copy, {name}", named(name, overrides)) for name, (_, overrides, _) in DAMAGE.items()},
        {name: config(f"new, {name}", overrides) for name, (overrides, _) in others.items()},
        init_process_group=False,
    )
    expected = {name: words for name, (_, _, words) in DAMAGE.items()}
    return found, expected | {name: words for name, (_, words) in others.items()}


def test_every_case_is_refused_on_both_ranks_in_words(attempts, subtests):
    found, expected = attempts
    assert len(expected) == 41
    for name, words in expected.items():
        with subtests.test(name):
            for number in (0, 1):
                message, untouched = found[number][name]
                with pytest.raises(AssertionError, match=f"(?s){words}"):
                    raise AssertionError(message)
                assert untouched, "something was written"


def test_a_refused_run_leaves_no_partitioning_behind(attempts):
    found, _ = attempts
    assert [of_rank["partitioning goes on"] for of_rank in found] == [False, False]
