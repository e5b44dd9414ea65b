"""What other libraries make of a model's parameters, brought back to the parameters."""
