"""Write docs/configuration.md from the settings. Run from the repository's root after changing a field."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.reference import markdown_page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

if __name__ == "__main__":
    PAGE.write_text(markdown_page(), encoding="utf-8")
