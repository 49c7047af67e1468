"""What is asked of an export, and what it decides from that before anything is built.

Its parts; each imports only itself and those above it:

options         what is asked for
options_check   what is refused, by the options and the model's shape alone
half_range      what float16 cannot hold, by the statistics
calibrated      what statistics decide: outliers that move, GPTQ, what stays float32
prepared        all decisions of one export
"""
