"""Finds the precision of each matrix: measures, chooses, and checks the bundle itself.

Its parts; each imports only itself and those above it:

stored_form   a matrix, and the inputs of its product, as a storage rounds them
sensitivity   KL divergence of each group of matrices in each storage
search        the Pareto frontier of plans: size against estimated divergence
inputs        the limit and the text of a search, and their checks
judge         size and KL divergence of a bundle that was exported by a plan
choose        the plan that keeps the limit, by measuring
curve         points of the trade-off curve, and uniform bundles to compare with
picture       the curve as SVG
report        `plan.json`, `auto.json`, `auto.svg`
run           all steps of a search
__main__      the command, which `neo-export --auto` runs
"""
