"""Which matrix needs which precision: measured, chosen, and checked on the bundle itself.

Its parts; each imports only itself and those above it:

stored_form   what a storage makes of one matrix, and of the inputs of its product
sensitivity   KL divergence of each group of matrices in each storage
search        plans that no other beats in both size and estimated divergence
inputs        the limit and the text: what is asked for, and refused
judge         size and KL divergence of a bundle that was exported by a plan
choose        the plan that keeps the limit, by measuring
curve         points of the trade-off, beside bundles with all matrices alike
picture       the curve as SVG
report        `plan.json`, `auto.json`, `auto.svg`
run           the order of things
__main__      the command, which `neo-export --auto` runs
"""
