"""transformers' own tests of any model, run on a LongMem by `test_transformers.py`.

Their file comes from transformers' source distribution, whose folder LONGMEM_TRANSFORMERS_TESTS names. That leaves out
two files that this one imports, tests of `generate` and of exporters: here are empty ones in their place.
"""

from __future__ import annotations

import importlib
import os
import sys
import unittest
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.face import LongMemConfig, LongMemForCausalLM
from tests.tiny_longmem import tiny_tokens
from tests.tiny_models import tiny_model
from tests.unit.face.models import DEEP, settings_of

SKIPPED = {
    "test_all_tensors_are_parameter_or_buffer": "frequencies of positions are read from the backbone, not from meta",
    "test_init_weights_can_init_buffers": "weights come with the backbone and the SideNet, never from _init_weights",
    "test_model_outputs_equivalence": "it asks for hidden states; test_model.py compares tuples",
    "test_can_capture_specific_layers_hidden_states": "hidden states are not given out",
    "test_hidden_states_output": "hidden states are not given out",
    "test_retain_grad_hidden_states_attentions": "neither hidden states nor attentions are given out",
    "test_capture_outputs_decorator": "neither hidden states nor attentions are given out",
    "test_cannot_load_with_meta_device_context_manager": "refused as a BackboneError, not as a RuntimeError",
    "test_from_pretrained_no_checkpoint": "without a folder there is no backbone",
    "test_generation_tester_mixin_inheritance": "the source distribution leaves the tests of generate out",
    "test_internal_model_config_and_subconfig_are_same": "the backbone keeps a configuration of its own",
    "test_load_save_without_tied_weights": "whether weights are tied is the backbone's affair",
    "test_tied_weights_keys": "whether weights are tied is the backbone's affair",
    "test_model_weights_reload_no_missing_tied_weights": "a folder without its weights is refused",
    "test_model_base_model_prefix": "there is no model without its head",
    "test_model_get_set_embeddings": "the embeddings are the backbone's, which is frozen",
}


def _stand_in(name: str, tester: str) -> None:
    for part in (name.split(".")[0], name):
        module = sys.modules.setdefault(f"transformers_tests.{part}", ModuleType(part))
        module.__path__ = []
    setattr(module, tester, type(tester, (), {}))


_package = ModuleType("transformers_tests")
_package.__path__ = [os.environ["LONGMEM_TRANSFORMERS_TESTS"]]
sys.modules["transformers_tests"] = _package
_stand_in("generation.test_utils", "GenerationTesterMixin")
_stand_in("exporters.test_export", "ExportTesterMixin")
_Common: Any = importlib.import_module("transformers_tests.test_modeling_common").ModelTesterMixin


class _Tester:
    batch_size, seq_length, is_training = 2, 20, True

    def get_config(self) -> LongMemConfig:
        return LongMemConfig(tiny_model("llama", layers=2).config, settings_of(DEEP))

    def prepare_config_and_inputs_for_common(self) -> tuple[LongMemConfig, dict[str, Tensor]]:
        return self.get_config(), {"input_ids": tiny_tokens((2, 20)), "attention_mask": torch.ones(2, 20).long()}


class TestLongMem(_Common, unittest.TestCase):
    all_model_classes = (LongMemForCausalLM,)
    has_attentions = False  # that it gives out
    test_resize_embeddings = False
    _is_composite = True

    def setUp(self) -> None:
        self.model_tester = _Tester()
        if self._testMethodName in SKIPPED:
            pytest.skip(SKIPPED[self._testMethodName])

    def _prepare_for_class(self, inputs: dict[str, Tensor], model_class: Any, return_labels: bool = False) -> Any:
        """By the name of a class transformers knows its own only."""
        found = dict(super()._prepare_for_class(inputs, model_class, return_labels))
        return {**found, "labels": inputs["input_ids"]} if return_labels else found
