"""What minds the job that a run is part of: status, lock, run folder, what is left behind."""
