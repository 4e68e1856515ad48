"""One accelerated arm beside dense runs, in a minute: `python -m dit_accel_eval.demo`."""
