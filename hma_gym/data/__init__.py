"""Datasets on disk and in memory: robomimic HDF5, episodes, windows, caches."""
