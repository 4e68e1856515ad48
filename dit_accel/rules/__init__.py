"""The methods' rules as pure functions, numbers or tensors in and out: no model, no state, nothing is attached."""
