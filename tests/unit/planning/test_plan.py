"""The plan on numbers small enough to work out by hand, and its words."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from pipeline.config.schema import Config
from pipeline.errors import BackboneError, ConfigError
from pipeline.model.longmem import DTYPES
from pipeline.planning.part import ALWAYS
from pipeline.planning.plan import Plan, make_plan
from pipeline.planning.shapes import KNOWN_SHAPES, BackboneShape, known_shape, read_shape, shape_of
from pipeline.planning.sizes import bank_shape
from pipeline.planning.text import in_words, plan_text, verdict
from tests.tiny_config import tiny_config
from tests.tiny_longmem import TinyLongMem, reader_of, tiny_tokens
from tests.tiny_models import tiny_model

ACTIVATION_TOLERANCE = 0.1  # rows of statistics and the like are not counted
# 2 layers of 100 numbers, a norm of 4, an embedding of 6 x 4 (the head, too), 2 heads of 2, one key/value head.
SHAPE = BackboneShape(
    hidden_size=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    vocab_size=6,
    mlp_size=8,
    mlp_saved=4,
    has_rms_norm=True,
    keeps_attention=False,
    is_fused=False,
    positions="rotary",
    layers=(100, 100),
    largest_in_layer=50,
    norm=4,
    decoder=(24, 100, 100, 4),
    head=(24,),
    head_is_tied=True,
)


def config(
    tmp_path, *, zero3: dict[str, Any] | None = None, zero2: dict[str, Any] | None = None, **sections: Any
) -> Config:
    """4 lanes, segments of 16, memory of 64 in chunks of 4, top 2 chunks, blocks of 8; SideNet `top`, layer 2 reads."""
    small = {"stage3_param_persistence_threshold": 10, "stage3_prefetch_bucket_size": 50}
    files = {"zero3": small | (zero3 or {}), "zero2": {"reduce_bucket_size": 1000} | (zero2 or {})}
    for name, section in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"zero_optimization": section}))
    given: dict[str, dict[str, Any]] = {
        "backbone": {"path": "unused", "deepspeed": str(tmp_path / "zero3.json")},
        "data": {"lanes": 4},
        "memory": {"tokens": 64, "query_block_tokens": 8},
        "sidenet": {"layout": "top", "memory_layers": [2]},
        "train": {"deepspeed": str(tmp_path / "zero2.json"), "segments_per_step": 4, "precision": "bf16"},
    }
    for name, keys in sections.items():
        given[name] = {**given.get(name, {}), **keys}
    return tiny_config(**given)


def plan(tmp_path, world_size: int = 2, shape: BackboneShape = SHAPE, **kwargs: Any) -> Plan:
    return make_plan(config(tmp_path, **kwargs), shape, world_size=world_size)


def size(found: Plan, name: str) -> int:
    return found.part(name).num_bytes


def sent(found: Plan) -> dict[str, int]:
    return {each.purpose: each.num_bytes for each in found.traffic}


def test_backbone_in_parts(tmp_path):
    found = plan(tmp_path, world_size=3, data={"lanes": 3})
    assert found.backbone_parameters == 228
    assert size(found, "backbone partition") == 2 * (8 + 34 + 34 + 2)  # each parameter padded to three parts
    assert size(found, "backbone kept whole") == 2 * 4
    assert size(found, "backbone gathered") == 2 * (100 + 50)
    assert size(found, "LM head gathered") == 2 * 24
    assert found.part("LM head gathered").phases == ("loss", "evaluation")


def test_one_rank_gathers_nothing(tmp_path):
    found = plan(tmp_path, world_size=1)
    names = ("backbone kept whole", "backbone gathered", "LM head gathered")
    assert [size(found, name) for name in names] == [0, 0, 0]
    assert found.traffic == ()


def test_sidenet_gradients_and_optimizer(tmp_path):
    found = plan(tmp_path, world_size=4)
    assert found.sidenet_parameters == 2 * 100 + 4 + 2  # layers, norm, gates of one memory layer
    assert size(found, "SideNet") == 2 * 206
    assert size(found, "gradients") == 4 * 52
    assert size(found, "optimizer") == 12 * 52
    assert size(found, "reduce buckets") == 2 * 2 * 1000  # one buffer and one on its way
    overlapping = plan(tmp_path, world_size=4, zero2={"overlap_comm": True})
    assert size(overlapping, "reduce buckets") == 2 * 3 * 1000
    tiny_buckets = plan(tmp_path, world_size=4, zero2={"reduce_bucket_size": 20})
    assert size(tiny_buckets, "reduce buckets") == 2 * (20 + 50 + 50)  # a gradient that no bucket holds, and its copy


def test_offload_goes_to_the_host_and_to_the_disk(tmp_path):
    found = plan(
        tmp_path,
        zero3={"offload_param": {"device": "nvme"}},
        zero2={"offload_optimizer": {"device": "cpu"}},
        memory={"device": "host"},
    )
    places = {part.name: part.place for part in found.parts}
    assert places["backbone partition"] == "disk"
    assert {places[name] for name in ("optimizer", "memory bank", "one read of memory", "what reads keep")} == {"host"}
    assert found.peak("disk") == size(found, "backbone partition")
    assert not {part.name for part in found.at("backward")} & {"optimizer", "memory bank", "one read of memory"}


def test_memory_bank_by_hand(tmp_path):
    # 2 lanes a rank; 64 tokens and a segment of 16 = 20 chunks; each 4 x 2 keys, values in bf16, a chunk key in fp32.
    assert size(plan(tmp_path), "memory bank") == 2 * 20 * (2 * 4 * 2 * 2 + 2 * 4)
    # 4 lanes; of 64 tokens, two segments, and one more: 12 chunks.
    assert size(plan(tmp_path, memory={"group_size": 2}), "memory bank") == 4 * 12 * (2 * 4 * 2 * 2 + 2 * 4)
    names = {part.name for part in plan(tmp_path, memory={"enabled": False}).parts}
    assert not names & {"memory bank", "one read of memory", "backward of one read", "what reads keep"}


@pytest.mark.parametrize("group_size", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_memory_bank_is_what_longmem_makes(group_size, dtype):
    memory = {"tokens": 200, "group_size": group_size, "dtype": dtype}
    tiny = TinyLongMem(tiny_model("llama"), memory=memory)
    made = tiny.longmem.bank(3, group_size=group_size)
    shape = shape_of(tiny_model("llama").config)
    planned = bank_shape(tiny.config.model, shape, num_layers=1, num_lanes=3)
    assert planned == made.shape
    for_evaluation = bank_shape(tiny.config.model, shape, num_layers=1, num_lanes=2, num_tokens=72)
    assert for_evaluation == tiny.longmem.bank(2, num_tokens=72, group_size=group_size).shape
    held = sum(t.nbytes for store in made.layers for t in (store.keys, store.values, store.chunk_keys))
    assert planned.bytes(DTYPES[tiny.config.model.memory_dtype]) == held


def test_evaluation_by_hand(tmp_path):
    def held(**sections: Any) -> int:
        return size(plan(tmp_path, **sections), "evaluation's memory")

    chunk = 2 * 4 * 2 * 2 + 2 * 4
    assert held() == 1 * 12 * chunk  # one document of 32 tokens, and a segment of 16
    # Two groups: of eight documents two pairs each, of three one, which the last of them is read with once more.
    assert held(evaluation={"documents": 8}) == 4 * 12 * chunk
    assert held(evaluation={"documents": 3}) == 2 * 12 * chunk
    # One group of two ranks; of 32 tokens one segment, and one more.
    assert held(evaluation={"documents": 3}, memory={"group_size": 2}) == 4 * 8 * chunk
    longer = {"documents": 8, "context_tokens": 1600}
    assert held(evaluation=longer) == 4 * 20 * chunk  # not more than memory holds: 64 tokens
    assert held(evaluation=longer, memory={"group_size": 2}) == 4 * 12 * chunk


def test_reading_in_an_evaluation_by_hand(tmp_path):
    sections: dict[str, Any] = {"evaluation": {"documents": 8}, "sidenet": {"memory_layers": "all"}}
    # 4 documents x 2 heads x 8 tokens; 12 slots, of which 10 are candidates; no layer's choice outlives its read.
    block, kept = 64 * (12 * 4 + 10 * (2 * 2 * 4 + 12)) + 64 * 2 * 4, 4 * 2 * 16 * (2 * 4 + 12)
    for scope in ("lane", "document", "group"):  # each document in its lane
        found = plan(tmp_path, memory={"scope": scope}, **sections)
        assert size(found, "evaluation's read") == block + kept
    # Taps 0 and 2, keys and values of two layers, one layer's work, in bf16.
    numbers = 2 * 4 + 2 * 2 * 2 + 4 * 4 + 3 * 8
    assert size(plan(tmp_path, **sections), "evaluation's segments") == 2 * 4 * 16 * numbers


def test_what_is_there_while_evaluating(tmp_path):
    found = plan(tmp_path, memory={"group_size": 2})
    names = {part.name for part in found.at("evaluation")}
    evaluations = {"evaluation's memory", "evaluation's read", "evaluation's segments"}
    assert names >= evaluations | {"backbone partition", "SideNet", "optimizer", "memory bank", "LM head gathered"}
    assert not names & {"gradients", "reduce buckets", "activations", "backbone's taps", "one read of memory"}
    assert {part.name for phase in ALWAYS[:-1] for part in found.at(phase)}.isdisjoint(evaluations)
    without = plan(tmp_path, memory={"enabled": False})
    assert evaluations.isdisjoint(part.name for part in without.parts)
    on_host = plan(tmp_path, memory={"device": "host"})
    assert {on_host.part(f"evaluation's {what}").place for what in ("memory", "read")} == {"host"}


def test_an_evaluation_that_does_not_fit_says_what_to_change(tmp_path):
    evaluation = {"documents": 8, "context_tokens": 400_000, "backbone_window_tokens": 0}
    found = plan(tmp_path, memory={"tokens": 400_000}, evaluation=evaluation)
    assert found.fullest() == "evaluation"
    lines = verdict(found, gpu_memory_gib=0.001)
    assert "evaluation's memory" in lines[1]
    assert "a larger memory.group_size" in lines[1] and "a smaller evaluation.context_tokens" in lines[1]


@pytest.mark.parametrize(
    ("window", "most", "tokens"), [(0, None, 32), (None, None, 416), (100, None, 100), (None, 64, 64)]
)
def test_the_longest_window_of_an_evaluation_is_one_document_long(tmp_path, window, most, tokens):
    evaluation = {"documents": 2, "context_tokens": 400, "scored_tokens": 16, "backbone_window_tokens": window}
    found = plan(tmp_path, evaluation=evaluation, shape=replace(SHAPE, max_positions=most))
    of_a_segment = size(plan(tmp_path, evaluation={**evaluation, "backbone_window_tokens": 0}), "evaluation's segments")
    assert size(found, "evaluation's segments") * 32 == of_a_segment * tokens  # two documents, 16 tokens of each


def test_one_read_by_hand(tmp_path):
    # A block: 2 lanes x 2 heads x 8 tokens = 32 queries; 20 slots; top 2 and 8 more candidates; 8 tokens read of each.
    scores, candidates = 32 * 20 * 4, 32 * 10 * (2 * 2 * 4 + 12)
    attend = 32 * 8 * 2 * (4 + 4 + 2) + 32 * (2 * 2 + 3 * 8) * 4  # also the query and its result, logits and weights
    forward, backward = 32 * 2 * 4, 32 * 4 * 2 * 3
    found = plan(tmp_path)
    assert size(found, "one read of memory") == max(scores + candidates, attend) + forward
    assert size(found, "backward of one read") == attend + backward + 2 * 2 * 16 * (3 * 2 + 2) * 4
    read_again = plan(tmp_path, sidenet={"activation_checkpointing": True})
    assert size(read_again, "backward of one read") == size(found, "backward of one read")  # nothing is searched again
    assert size(found, "what reads keep") == 2 * 2 * 16 * (2 * 4 + 12)
    # Of a group of two also who holds the chunks, and the query: 4 lanes, 2 segments.
    assert size(plan(tmp_path, memory={"group_size": 2}), "what reads keep") == 2 * 4 * 2 * 16 * (2 * 4 + 20 + 2 * 4)


def test_scores_are_bounded_by_the_run_and_by_the_block(tmp_path):
    def read(**memory: Any) -> int:
        return size(plan(tmp_path, memory=memory), "one read of memory")

    assert read(tokens=8_000_000) == read(tokens=800_000)
    assert read(query_block_tokens=4) * 2 == read(query_block_tokens=8)
    assert read(scope="group") > read() < read(scope="document")


def test_a_read_on_the_host_makes_a_part_at_once(tmp_path, monkeypatch):
    # One query of each of two lanes at a time; the keys of two queries, 8 tokens each, as far as 40 numbers go.
    monkeypatch.setattr("pipeline.memory.segment.CPU_AT_ONCE", 40)
    scores, candidates, attend = 2 * 20 * 4, 2 * 10 * (2 * 2 * 4 + 12), 2 * 8 * 2 * (4 + 4 + 2 + 4)
    shape = replace(SHAPE, num_kv_heads=2)
    found = size(plan(tmp_path, memory={"device": "host"}, shape=shape), "one read of memory")
    assert found == max(scores + candidates, attend) + 32 * 2 * 4


def test_near_keys_are_kept_rotated(tmp_path):
    def kept(position: str, shape: BackboneShape = SHAPE, **memory: Any) -> int:
        return size(plan(tmp_path, memory={"position": position, **memory}, shape=shape), "what reads keep")

    near = 2 * (4 + 1) * 2 * 4  # 2 lanes, a chunk's keys and its chunk key, fp32
    assert kept("true") - kept("none") == 20 * near
    assert kept("clamp:8") - kept("none") == (2 + 1) * near
    assert kept("fixed:8") == kept("none")
    assert kept("true", replace(SHAPE, positions="learned")) == kept("none")
    everything = 2 * (2 * 12 * near)  # 4 lanes; the shard's 12 chunks for the segments of both ranks
    assert kept("true", group_size=2) - kept("none", group_size=2) == everything


def test_traffic_of_the_engines_by_hand(tmp_path):
    found = sent(plan(tmp_path, world_size=4))
    assert (
        found["backbone: its layers, gathered to encode"] == 4 * 3 * (6 + 25 + 25) * 2
    )  # 4 segments; norm stays whole
    assert found["backbone: its LM head, gathered for the loss"] == 4 * 3 * 6 * 2
    assert found["SideNet: gradients"] == 4 * 2 * 3 * 412 // 4
    assert found["SideNet: weights after the optimizer"] == 3 * 412 // 4


def test_traffic_of_memory_by_hand(tmp_path):
    found = sent(plan(tmp_path, world_size=4, memory={"group_size": 2}))
    queries = 2 * 2 * 16 * 2  # 2 lanes a group, 2 heads, 16 tokens, 2 segments a rank
    assert found["queries"] == queries * 2 * 4
    assert found["scores"] == queries * 2 * 4
    assert found["thresholds"] == queries * 5
    assert found["ties"] == queries * (2 + 1) * 4
    assert found["partials"] == found["gradients"] == queries * 4 * 4
    assert found["query_gradients"] == queries * 2 * 4
    assert "documents" not in found
    larger = sent(plan(tmp_path, world_size=4, memory={"group_size": 2, "tokens": 6400, "chunk_size": 4}))
    assert larger == found  # what is remembered does not matter


def test_activation_checkpointing_trades_bytes_for_traffic(tmp_path):
    sections: dict[str, Any] = {"memory": {"group_size": 2}, "sidenet": {"activation_checkpointing": True}}
    plain, again = plan(tmp_path, memory={"group_size": 2}), plan(tmp_path, **sections)
    # One layer of the two, their inputs, and the final norm twice in bf16, once in fp32 and once in bf16.
    tokens = 4 * 16
    assert size(again, "activations") == tokens * (2 * 4 * 2 + 4 * (4 + 2 + 2))
    assert size(again, "activations of one layer") < size(plain, "activations")
    before, after = sent(plain), sent(again)
    assert all(after[name] == 2 * before[name] for name in ("queries", "partials"))
    searched = ("scores", "thresholds", "ties")
    assert all(after[name] == before[name] for name in (*searched, "gradients", "query_gradients"))


class _Saved:
    """Bytes of what autograd keeps, parameters aside, each storage once."""

    def __init__(self, parameters: Any) -> None:
        self.known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.storages[storage.data_ptr()] = storage
        return tensor

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "bloom", "phi3"])
@pytest.mark.parametrize("fusion", ["gate", "joint"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(family, fusion, precision):
    model = tiny_model(family).to(DTYPES[precision])
    side = {"layout": "top", "num_layers": 4, "memory_layers": [2], "fusion": fusion}
    tiny = TinyLongMem(model, sidenet=side, train={"segment_tokens": 64, "precision": precision})
    tokens = tiny_tokens((2, 64))
    tiny.remember(tokens, start=0)
    longmem = tiny.longmem
    encoding = longmem.encode(tokens, torch.zeros_like(tokens))
    reader = reader_of(longmem, tiny.bank, start=64, documents=torch.zeros_like(tokens))
    saved = _Saved(longmem.sidenet.parameters())
    with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor):
        longmem.hidden(encoding, reader)
    planned = make_plan(tiny.config, shape_of(model.config), world_size=1)
    assert saved.num_bytes == pytest.approx(size(planned, "activations"), rel=ACTIVATION_TOLERANCE)


@pytest.mark.parametrize(
    ("name", "parameters", "tied"),
    [
        ("gpt2-medium", 354_823_168, True),
        ("llama-3-8b", 8_030_261_248, False),
        ("llama-3-70b", 70_553_706_496, False),
    ],
)
def test_known_shapes_have_their_known_sizes(name, parameters, tied):
    shape = known_shape(name)
    assert sum(shape.parameters) == parameters
    assert shape.head_is_tied is tied


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gpt_neox", "opt", "bloom", "qwen3", "gemma3_text", "phi3", "olmo2"]
)
def test_a_shape_counts_the_parameters_of_its_model(family):
    model = tiny_model(family)
    assert sum(shape_of(model.config).parameters) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("make", [GPT2Config, LlamaConfig])
def test_a_shape_is_read_from_a_file_or_its_folder(make, tmp_path):
    settings = make(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=96)
    settings.save_pretrained(tmp_path)
    assert read_shape(str(tmp_path)) == read_shape(str(tmp_path / "config.json")) == shape_of(settings)


@pytest.mark.parametrize(("name", "text"), [("none.json", None), ("config.json", "{"), ("config.json", "{}")])
def test_a_shape_that_cannot_be_read_is_explained(name, text, tmp_path):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(BackboneError, match=r"configuration cannot be read; got: backbone.path .*--shape gpt2-medium"):
        read_shape(str(path))


def test_a_world_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="memory.group_size does not divide the world size; got: 2 and 3 ranks"):
        plan(tmp_path, world_size=3, memory={"group_size": 2})


def test_words(tmp_path):
    found = plan(tmp_path, world_size=4, memory={"group_size": 4}, data={"lanes": 4})
    text = plan_text(found, gpus_per_node=2, gpu_memory_gib=80)
    assert "4 rank(s), 2 a node; 1 memory group(s) of 4; 4 lane(s) a rank; 1 segment(s) of each a step" in text
    assert "memory groups reach over nodes" in text
    assert "fits: " in text and "of 80 GiB" in text
    assert all(part.name in text for part in found.parts if part.num_bytes)
    assert "memory groups reach over nodes" not in plan_text(found, gpus_per_node=4, gpu_memory_gib=None)


@pytest.mark.parametrize(
    ("sections", "name", "words"),
    [
        ({"memory": {"tokens": 400_000}}, "memory bank", "memory.device host, a larger memory.group_size"),
        ({"train": {"segment_tokens": 40_000}}, "activations", "sidenet.activation_checkpointing true"),
        ({"train": {"loss_piece_tokens": 10**6, "segment_tokens": 40_000}}, "logits", "train.loss_piece_tokens"),
    ],
)
def test_what_does_not_fit_says_what_to_change(sections, name, words, tmp_path):
    shape = replace(SHAPE, vocab_size=4000) if name == "logits" else SHAPE
    found = plan(tmp_path, shape=shape, **sections)
    lines = verdict(found, gpu_memory_gib=0.001)
    assert lines[0].startswith("does not fit: ")
    assert name in lines[1] and words in lines[1]


def test_a_large_sidenet_is_named(tmp_path):
    shape = replace(SHAPE, layers=(10**6, 10**6))
    lines = verdict(plan(tmp_path, shape=shape), gpu_memory_gib=0.001)
    assert "sidenet_zero2_cpu_offload.json" in lines[1] and "sidenet.num_layers" in lines[1]


def test_numbers_in_words():
    found = [in_words(number) for number in (12, 2048, 15 * 2**20, 300 * 2**20, 3 * 2**29, 2**40)]
    assert found == ["12 B", "2.00 KiB", "15.0 MiB", "300 MiB", "1.50 GiB", "1,024 GiB"]


def test_the_page_shows_what_the_plan_says():
    from tools.write_plan_docs import PAGE, page

    written = PAGE.read_text(encoding="utf-8")
    assert page(written) == written, "stale; do: python -m tools.write_plan_docs"


def test_the_launcher_knows_the_same_shapes():
    from launch.plan import SHAPES

    assert set(SHAPES) == set(KNOWN_SHAPES)


def test_the_launcher_prints_a_plan(capsys):
    from launch.plan import main

    main(
        [
            "--config",
            "configs/paper.yaml",
            "--shape",
            "gpt2-medium",
            "--nodes",
            "2",
            "--gpus-per-node",
            "8",
            "--gpu-memory-gib",
            "80",
            "--memory.group_size",
            "4",
        ]
    )
    said = capsys.readouterr().out
    assert "16 rank(s), 8 a node; 4 memory group(s) of 4; 16 lane(s) a rank" in said
    assert "backbone 354,823,168 parameters" in said and "fits: " in said


@pytest.mark.parametrize(
    ("words", "match"),
    [(["--nodes", "0"], "is not a whole number from 1 up"), (["--gpu-memory-gib", "x"], "is not a number above 0")],
)
def test_the_launcher_refuses_nonsense(words, match, capsys):
    from launch.plan import main

    with pytest.raises(SystemExit):
        main(["--config", "configs/paper.yaml", *words])
    assert match in capsys.readouterr().err
