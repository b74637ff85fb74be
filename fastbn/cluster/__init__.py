"""Work that is shared by several processes, on this machine or on many, by dask."""
