"""Progress, memory use and plots of commands.

memory   peak memory of this process
stages   progress on stderr
svg      plots as SVG text
"""
