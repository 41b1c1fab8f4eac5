"""Recording of datasets: the collector, the importer of robomimic files, the viewer."""
