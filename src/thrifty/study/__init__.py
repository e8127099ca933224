"""Studies: methods x budgets x seeds x tasks under equal conditions, and the evidence that they leave."""
