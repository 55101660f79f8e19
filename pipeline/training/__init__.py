"""The training pipeline: engines, step, loop. The only room below `launch` that knows DeepSpeed."""
