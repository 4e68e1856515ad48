"""What a run would cost and what methods would save, by arithmetic alone; and what could be attached to a model."""
