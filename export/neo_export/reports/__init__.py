"""What commands show of their work.

memory   peak memory of this process
stages   progress on stderr
svg      plots without a library
"""
