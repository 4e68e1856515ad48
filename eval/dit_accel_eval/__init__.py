"""Quality and speed evaluation: fidelity to dense attention, the rule checker's verdict, paired statistics."""
