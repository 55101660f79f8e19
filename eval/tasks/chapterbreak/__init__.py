"""The task `chapterbreak`."""

from eval.tasks.chapterbreak.task import ChapterBreak

__all__ = ["ChapterBreak"]
