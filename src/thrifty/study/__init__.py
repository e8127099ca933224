"""Compare methods, budgets, seeds and tasks under equal conditions, and report what can be said of them."""
