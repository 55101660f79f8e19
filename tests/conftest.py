"""What holds for every test: no hub, one thread, no noise from tokenizers."""

from __future__ import annotations

import os

# Before anything imports torch or transformers, and inherited by every process that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
