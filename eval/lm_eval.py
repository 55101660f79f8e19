"""lm-evaluation-harness with LongMem: `python -m eval.lm_eval --model longmem --model_args pretrained=RUN --tasks ...`.

Everything else is the harness's own command line, such as `ls tasks` and `--include_path eval/adapters/tasks`.
"""

from __future__ import annotations

import sys

from pipeline.errors import EXIT_FAILED, LongMemError


def main() -> None:
    """The harness's command line, once `longmem` is registered with it."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        do = "pip install -r requirements-lm-eval.txt -c constraints.txt; without a checkout: pip install lm-eval"
        sys.exit(f"error: {error}; do: {do}")
    from lm_eval.__main__ import cli_evaluate

    import eval.adapters.lm_eval  # noqa: F401

    try:
        cli_evaluate()
    except LongMemError as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
