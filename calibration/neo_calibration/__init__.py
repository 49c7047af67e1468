"""Runs real text through a checkpoint and collects the statistics that quantization needs.

Its parts; each imports only itself and those above it:

arrays        writes safetensors files atomically
text          calibration text as contexts of token ids
accumulate    statistics of one place, a context at a time
layer         one layer of PyTorch's GPT-Neo, with hooks at every place inside it
likely        statistics of the head for GPTQ: its inputs, and the likely tokens there
work_folder   the folder of an unfinished calibration, for resuming
collect       all steps: a layer at a time, then the folder of statistics
cli           `neo-calibrate`
entry         entry point of the command
__main__      `python -m neo_calibration`
auto          finds the precision of each matrix: `neo-export --auto`
"""
