"""Words about all settings, made from the schema: the text of `--help` and the page `docs/configuration.md`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from pipeline.config.fields import Setting, all_settings, section_models
from pipeline.config.shipped import SHIPPED

HELP_HEAD = """\
usage: longmem-train, or launch/train.py, --config FILE [--section.key value ...]

A value on the command line wins over the file, the file over the defaults. Lists are written [1, 2], nothing as null.

  --config FILE
      YAML file with the settings below. Examples:
      {examples}
  --help
      Print this text.
"""

PAGE_HEAD = """\
# Configuration

<!-- Written by `python -m tools.write_configuration_docs` from pipeline/config/. Change the fields there. -->

`launch/train.py --config FILE [--section.key value ...]`: a value on the command line wins over the file, the file over
the defaults. `--section.key=value` is the same. Lists are written `[1, 2]`, nothing as `null`. All problems of a
configuration are reported at once, before anything is loaded. The resolved settings are written into the run folder.
`configs/` holds examples.

The batch is defined without naming ranks: `data.lanes` lanes and `train.segments_per_step` consecutive segments of each
make one optimizer step, whatever the world size. Lanes are split over memory groups, the segments of a step over the
ranks of a group and gradient accumulation.

A mixture, here three tokens of books for one of code. Every lane reads all sources, whole documents in turn, so that
the shares hold over any stretch that is long against the longest documents; each source has its own epochs. Every
source needs as many documents as there are lanes. On the command line:
`--data.path null --data.sources '[{path: data/books, weight: 3}, {path: data/code}]'`.

```yaml
data:
  sources:
    - path: data/books
      weight: 3
    - path: data/code
  lanes: 64
```
"""

PAGE_TAIL = """\
## DeepSpeed JSON

`backbone.deepspeed` and `train.deepspeed` name files in `ds_configs/`. They hold only what the engine owns (buckets,
offload, loss scaling). What this page owns is filled in: batch sizes, accumulation, clipping, precision, ZeRO stage.
The files may write `"auto"` there or leave it out; another number is refused. So are the sections `optimizer` and
`scheduler`.

| file | for |
| --- | --- |
| `backbone_zero3_inference.json` | the frozen backbone, split over all ranks |
| `backbone_zero3_inference_cpu_offload.json` | the same, its parts kept in host memory |
| `backbone_zero3_inference_nvme_offload.json` | the same, its parts kept on a local disk: set `nvme_path` |
| `sidenet_zero2.json` | the SideNet: gradients and optimizer state split over all ranks |
| `sidenet_zero2_cpu_offload.json` | the same, optimizer state and update in host memory |
"""


def help_text() -> str:
    """All settings for the terminal, at most 120 columns wide."""
    parts = [HELP_HEAD.format(examples=SHIPPED / "configs")]
    for section, summary, settings in _by_section():
        parts.append(f"\n{section}: {summary}\n")
        for setting in settings:
            parts.append(f"  --{setting.name}  ({setting.kind.replace('`', '')}; {_default_words(setting)})\n")
            parts.append(
                textwrap.fill(setting.text.replace("`", ""), 118, initial_indent=" " * 6, subsequent_indent=" " * 6)
            )
            parts.append("\n")
    return "".join(parts)


def markdown_page() -> str:
    """The page `docs/configuration.md`."""
    parts = [PAGE_HEAD]
    for section, summary, settings in _by_section():
        parts.append(f"\n## {section}\n\n{summary}\n\n| key | value | default | meaning |\n| --- | --- | --- | --- |\n")
        for setting in settings:
            default = "required" if setting.required else f"`{default_text(setting.default)}`"
            parts.append(f"| `{setting.name}` | {setting.kind} | {default} | {setting.text} |\n")
    return "".join([*parts, "\n", PAGE_TAIL])


def default_text(value: object) -> str:
    """A default as it would stand in YAML."""
    if value is None:
        return "null"
    if isinstance(value, tuple):
        value = list(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _default_words(setting: Setting) -> str:
    return "required" if setting.required else f"default {default_text(setting.default)}"


def _by_section() -> Iterator[tuple[str, str, list[Setting]]]:
    for section, model in section_models().items():
        settings = [setting for name, setting in all_settings().items() if name.startswith(f"{section}.")]
        yield section, " ".join((model.__doc__ or "").split()), settings
