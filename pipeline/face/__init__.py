"""Hugging Face: LongMem as a model that generates, memory as a thing, and a page that shows what was read.

Importing this registers `LongMemConfig` and `LongMemForCausalLM` with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.face.cache import LongMemCache
from pipeline.face.configuration import LongMemConfig
from pipeline.face.memory import Memory
from pipeline.face.model import LongMemForCausalLM

__all__ = ["LongMemCache", "LongMemConfig", "LongMemForCausalLM", "Memory"]

AutoConfig.register("longmem", LongMemConfig, exist_ok=True)
AutoModelForCausalLM.register(LongMemConfig, LongMemForCausalLM, exist_ok=True)
