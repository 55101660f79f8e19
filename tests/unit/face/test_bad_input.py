"""What a LongMem cannot do is refused before anything is worked out, with what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache

from pipeline.errors import DataError, LongMemError, LongMemMemoryError
from pipeline.face import LongMemForCausalLM, Memory
from tests.tiny_longmem import tiny_tokens
from tests.tiny_models import tiny_model
from tests.unit.face.models import DEEP, PAPER, QUIET, tiny_face

IDS = tiny_tokens((2, 20))
ONES = torch.ones(2, 20, dtype=torch.int64)


@pytest.fixture(scope="module")
def model() -> LongMemForCausalLM:
    return tiny_face()


def without(row: int, first: int, last: int) -> Tensor:
    mask = ONES.clone()
    mask[row, first:last] = 0
    return mask


PROMPTS: dict[str, tuple[Any, Any, str]] = {
    "no tokens": (
        IDS[:, :0],
        None,
        r"the prompt is empty; got: \[2, 0\]; expected: at least one token a row; do: begin",
    ),
    "no rows": (IDS[:0], None, r"the prompt is empty; got: \[0, 20\]"),
    "a row of padding": (IDS, without(1, 0, 20), "a prompt is empty; got: row 1 is all padding; do: leave it out, or"),
    "padded on the right": (
        IDS,
        without(1, 18, 20),
        "prompts are padded on the right: .*; got: the last token of row 1 is padding; expected: padding on the left; "
        'do: set tokenizer.padding_side = "left"',
    ),
    "too long": (
        tiny_tokens((1, 49)),
        None,
        "the prompt is longer than memory and window: .*; got: 49 tokens; expected: at most 48; do: memorize.. the tex",
    ),
    "beyond the vocabulary": (
        IDS + 96,
        None,
        "outside the vocabulary; got: .*; expected: 0 to 95; do: use the backbone",
    ),
    "negative": (IDS - 96, None, "a token id is outside the vocabulary; got: -[0-9]+; expected: 0 to 95"),
    "numbers": (IDS.float(), None, r"these are no token ids; got: \(2, 20\), torch.float32; expected: whole numbers"),
    "booleans": (IDS.bool(), None, r"these are no token ids; got: \(2, 20\), torch.bool"),
    "one row": (IDS[0], None, r"these are no token ids; got: \(20,\), torch.int64; expected: .*; do: use a tokenizer"),
    "a text": ("hello", None, "these are no token ids; got: str"),
    "a batch": ({"input_ids": IDS}, None, "these are no token ids; got: dict"),
    **{
        f"a mask of {shape}": (
            IDS,
            torch.ones(shape),
            r"the attention mask does not fit the tokens; got: \[.*; expected: \[2, 20\]; do: give the mask that",
        )
        for shape in ((2, 19), (2, 21), (1, 20), (3, 20), (20,), (2, 1, 20, 20))
    },
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_that_cannot_be_answered(model, name):
    ids, mask, words = PROMPTS[name]
    with pytest.raises(DataError, match=words):
        model.generate(ids, attention_mask=mask, max_new_tokens=2, **QUIET)


def test_a_prompt_longer_than_the_window_is_not_answered_without_memory(model):
    words = (
        "the prompt is longer than the window, and no memory is read: its begin would be forgotten before it is "
        "answered; got: 17 tokens; expected: at most 16; do: give its end alone, or read memory: leave memory=False ou"
    )
    ways = {"memory": False}, {"past_key_values": model(IDS[:, :3], memory=False, use_cache=True).past_key_values}
    for given in ways:
        with pytest.raises(DataError, match=words):
            model.generate(IDS[:, :17], max_new_tokens=2, **given, **QUIET)
    without = tiny_face(settings={**DEEP, "memory": {**DEEP["memory"], "enabled": False}})
    with pytest.raises(DataError, match=words):
        without.generate(IDS[:, :17], max_new_tokens=2, **QUIET)
    assert model.generate(IDS[:, :16], memory=False, max_new_tokens=2, **QUIET).shape == (2, 18)


def test_forward_takes_a_mask_of_these_tokens_or_of_all(model):
    cache = model(IDS, use_cache=True).past_key_values
    for width in (4, 23, 25):
        words = (
            r"does not fit the tokens; got: \[2, .*; expected: \[2, 5\], or \[2, 25\] of all that was read; do: give"
        )
        if width == 25:
            model(IDS[:, :5], attention_mask=torch.ones(2, width), past_key_values=cache)
        else:
            with pytest.raises(DataError, match=words):
                model(IDS[:, :5], attention_mask=torch.ones(2, width), past_key_values=cache)
    with pytest.raises(DataError, match="got: list"):
        model(IDS, attention_mask=[[1] * 20] * 2)


WAYS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "assistant_model": (lambda: {"assistant_model": tiny_model("llama")}, "tries tokens out .*; got: assistant_model"),
    "prompt lookup": (
        lambda: {"prompt_lookup_num_tokens": 3},
        "got: prompt_lookup_num_tokens; expected: greedy decoding, sampling or beams; do: leave prompt_lookup_num_tok",
    ),
    "early exit": (lambda: {"assistant_early_exit": 2}, "got: assistant_early_exit"),
    "lookup by configuration": (
        lambda: {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)},
        "got: prompt_lookup_num_tokens",
    ),
    "static": (
        lambda: {"cache_implementation": "static"},
        "a LongMem brings its own cache; got: cache_implementation 'static'; do: leave it out: the cache is bounded",
    ),
    "quantized": (lambda: {"cache_implementation": "quantized"}, "got: cache_implementation 'quantized'"),
    "DynamicCache": (
        lambda: {"past_key_values": DynamicCache()},
        "its own cache; got: DynamicCache; expected: LongMem",
    ),
    "StaticCache": (
        lambda: {"past_key_values": StaticCache(tiny_model("llama").config, max_cache_len=50)},
        "got: StaticCache; expected: LongMemCache; do: leave past_key_values out",
    ),
    "tuples": (lambda: {"past_key_values": ((IDS, IDS),)}, "its own cache; got: tuple"),
    "another model's cache": (
        lambda: {"past_key_values": tiny_face()(IDS[:, :5], use_cache=True).past_key_values},
        "the cache is of another model, .*; got: past_key_values that it did not return; do: leave past_key_values out",
    ),
    "embeddings": (lambda: {"inputs_embeds": torch.zeros(2, 3, 32)}, "got: inputs_embeds; .*do: "),
    "attentions": (
        lambda: {"output_attentions": True, "return_dict_in_generate": True},
        "a LongMem does not have this; got: output_attentions; do: leave it out",
    ),
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_that_need_what_there_is_not(model, name):
    given, words = WAYS[name]
    with pytest.raises(DataError, match=words):
        model.generate(IDS, max_new_tokens=2, **{**QUIET, **given()})
    if "past_key_values" in given():
        with pytest.raises(DataError, match=words):
            model(IDS[:, :2], **given())


def test_ways_that_the_model_s_own_configuration_asks_for():
    model = tiny_face()
    model.generation_config.cache_implementation = "static"
    with pytest.raises(DataError, match="got: cache_implementation 'static'"):
        model.generate(IDS, max_new_tokens=2, **QUIET)


def test_forward_leaves_nothing_undone_in_silence(model):
    for name, value in {"inputs_embeds": ONES, "position_ids": ONES, "output_hidden_states": True, "w": 1}.items():
        with pytest.raises(DataError, match=f"a LongMem does not have this; got: {name}; do: leave it out"):
            model(IDS, **{name: value})
    with pytest.raises(DataError, match="these are no token ids; got: NoneType"):
        model()
    assert model(IDS, output_attentions=False, return_dict=True).logits.shape == (2, 20, 96)


def test_a_cache_goes_on_as_it_has_begun(model):
    memory = model.memorize(IDS[0], progress=False)
    cache = model(IDS, memory=memory, use_cache=True).past_key_values
    words = "a memory is given where rows begin, and these have begun; got: another memory .*; do: give it with the fir"
    for other in (False, model.memorize(IDS[0], progress=False), [memory]):
        with pytest.raises(DataError, match=words):
            model(IDS[:, :1], past_key_values=cache, memory=other)
    model(IDS[:, :1], past_key_values=cache, memory=memory)
    model(IDS[:, :1], past_key_values=cache)
    with pytest.raises(
        DataError, match="the cache is of other rows; got: tokens of 1 rows; expected: 2; do: give the r"
    ):
        model(IDS[:1, :1], past_key_values=cache)
    moved = tiny_face()
    cache = moved(IDS, use_cache=True).past_key_values
    moved.to("cpu")(IDS, past_key_values=cache)  # where it was
    with pytest.raises(DataError, match="or this one was put elsewhere or into another dtype since"):
        moved.to(torch.bfloat16)(IDS, past_key_values=cache)


LABELS: dict[str, tuple[Tensor, str]] = {
    "fewer": (
        IDS[:, :5],
        r"the labels do not fit the tokens; got: \[2, 5\], torch.int64; expected: \[2, 20\], torch.in",
    ),
    "another row": (IDS[:1], r"got: \[1, 20\]"),
    "numbers": (IDS.float(), r"got: \[2, 20\], torch.float32; .*do: give the token ids themselves, -100 where nothing"),
    "outside": (
        IDS + 96,
        "a label is outside the vocabulary; got: .*; expected: 0 to 95, or -100; do: use the backbone",
    ),
    "negative": (IDS - 99, "a label is outside the vocabulary; got: -"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_do_not_fit(model, name):
    labels, words = LABELS[name]
    with pytest.raises(DataError, match=words):
        model(IDS, labels=labels)


def test_a_loss_that_cannot_be_learnt_from_is_refused_where_gradients_are_on(model):
    memory = model.memorize(IDS[0], progress=False)
    cache = model(IDS, use_cache=True).past_key_values
    words = (
        "a loss with a memory that was given, or with a cache, has no gradients; got: labels beside memory, .*; do: "
        r"for the loss alone call the model under torch.no_grad\(\); to learn, give tokens and labels only"
    )
    for given in ({"memory": memory}, {"memory": [[memory], []]}, {"past_key_values": cache}, {"use_cache": True}):
        with pytest.raises(DataError, match=words):
            model(IDS, labels=IDS, **given)
        assert model(IDS, **given).logits.shape == (2, 20, 96)  # no loss, nothing to be wrong about
    with torch.no_grad():
        assert not model(IDS, labels=IDS, memory=memory).loss.requires_grad
    assert model(IDS, labels=IDS, memory=False).loss.requires_grad


def memory_of(settings: Any, family: str = "llama") -> Memory:
    return tiny_face(family, settings).memorize(IDS[0], progress=False)


FOREIGN: dict[str, tuple[Callable[[], Any], str]] = {
    "another backbone": (
        lambda: memory_of(DEEP, "qwen2"),
        "the memory has another backbone; got: .*; do: load the model that it was made with, or memorize the texts aga",
    ),
    "other layers": (
        lambda: memory_of(PAPER),
        r"the memory has other memory layers; got: .*; expected: \[1, 2, 3, 4\]; do: memorize",
    ),
    "other chunks": (
        lambda: memory_of({**DEEP, "memory": {**DEEP["memory"], "chunk_size": 2}}),
        "the memory has another chunk size; got: 2; expected: 4; do: memorize the texts again, or set memory.chunk_siz",
    ),
    "a file's name": (
        lambda: "my.safetensors",
        "these are no memories of the rows; got: str; .*; do: load them with Mem",
    ),
    "three lists": (
        lambda: [[], [], []],
        "got: 3 lists for 2 rows; expected: a Memory, a list of them for all rows, or",
    ),
    "some in lists": (lambda: [memory_of(DEEP), []], "these are no memories of the rows; got: Memory"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_memories_that_cannot_be_read(model, name):
    made, words = FOREIGN[name]
    memory = made()
    for call in (
        lambda: model.generate(IDS, memory=memory, max_new_tokens=2, **QUIET),
        lambda: model(IDS, memory=memory),
    ):
        with pytest.raises(LongMemMemoryError, match=words):
            call()


TEXTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nothing": ([], {}, "there is nothing to remember; got: no text; do: give at least one"),
    "no token": (
        [IDS[0], IDS[0, :0]],
        {},
        r"there is nothing to remember; got: text 1 of 2: \[0\].*; do: leave empty on",
    ),
    "None": (None, {}, "this is no text; got: NoneType; expected: a text, or token ids"),
    "a number": (3, {}, "this is no text; got: int"),
    "several rows": (IDS, {}, r"this is no text; got: text 0 of 1: \[2, 20\]"),
    "numbers": (IDS[0].float(), {}, "this is no text; got: .*torch.float32; .*; do: give one list of whole numbers"),
    "outside": (IDS[0] + 96, {}, "a token id is outside the vocabulary"),
    "alike": (
        [IDS[0], IDS[1]],
        {"names": ["a", "a"]},
        "called alike; got: 1 name.s. twice, such as a; .*; do: memorize",
    ),
    "names": ([IDS[0], IDS[1]], {"names": "a"}, "texts and names are not as many; got: 1 names; expected: 2"),
    "dtype": (IDS[0], {"dtype": "int4"}, "a memory is not stored so; got: 'int4'"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_cannot_be_memorized(model, name):
    texts, given, words = TEXTS[name]
    with pytest.raises(LongMemError, match=words):
        model.memorize(texts, progress=False, **given)


def test_a_model_without_a_tokenizer_says_so(model):
    with pytest.raises(DataError, match="tokenizer"):
        model.memorize("a text", progress=False)


def test_embeddings_stay_the_backbone_s(model):
    words = "a LongMem's embeddings are its backbone's, which is frozen; got: .*; do: change the backbone, and train a"
    with pytest.raises(DataError, match=words):
        model.resize_token_embeddings(200)
