"""`neo-bench`: how fast bundles are, beside what the machine could do and beside peers.

`cli` reads the command line (`cli_options`) into `cases`, `run` starts one process a bundle or peer
(`starting`, `participants`, `worker`) and lets them take turns, `bandwidth` measures the machine,
`traffic` counts bytes and operations, `report`, `csv_report` and `plot` show the result.
"""
