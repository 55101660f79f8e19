"""Every setting of a run, typed and validated: YAML, command line, and the DeepSpeed JSON completed. No torch here."""
