"""Where heads are solved: threads, processes that can be killed, Dask."""
