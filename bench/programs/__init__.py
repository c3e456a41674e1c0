"""Programs that the workloads W5 and W10 start: `python -m programs.<name>`, in this directory's parent."""
