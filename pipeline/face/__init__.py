"""What users of trained models see and call."""
