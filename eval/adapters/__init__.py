"""Other programs' ways to evaluate, over our `Scorer`."""
