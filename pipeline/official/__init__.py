"""What the paper's authors published, made into what this project reads."""
