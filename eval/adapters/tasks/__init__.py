"""Tasks of lm-evaluation-harness over a user's own files, which `--metadata` names: `--include_path` this folder."""
