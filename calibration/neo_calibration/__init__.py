"""Run real text through a checkpoint and keep what quantization needs to know about it.

Its parts; each imports only itself and those above it:

arrays        safetensors files that appear whole
text          calibration text as contexts of token ids
accumulate    statistics of one place, a context at a time
layer         one layer of PyTorch's GPT-Neo, with every place inside it looked at
likely        what GPTQ wants of the head: its inputs, and the tokens that are likely there
work_folder   unfinished work, so that the next call can go on with it
collect       the order of things: a layer at a time, then the folder of statistics
cli           `neo-calibrate`
entry         where the command begins
__main__      the same as a module
auto          which matrix needs which precision: `neo-export --auto`
"""
