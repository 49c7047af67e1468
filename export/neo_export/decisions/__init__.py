"""The options of an export, and the decisions from them before anything is built.

Its parts; each imports only itself and those above it:

options         the options of an export
options_check   refuses options, judging only by them and the model's shape
half_range      what float16 cannot hold, found from statistics
calibrated      decisions from statistics: outlier migration, GPTQ, what stays float32
prepared        all decisions of one export
"""
