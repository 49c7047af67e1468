"""`neo-eval`: how well bundles do the field's tasks, measured by lm-evaluation-harness.

The harness has the tasks, the prompts and the metrics. Its parts; each imports only itself and
those above it:

paired   scores, and how two models differ that answered the same questions
lm       a bundle as a model of the harness
run      the harness on one bundle
gate     what `--max-drop` says of the scores
report   the scores as a table, or as JSON
cli      the command
"""
