"""Region gradients and the label-only loss: a plain torch twin for each fast version."""
