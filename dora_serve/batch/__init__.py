"""Many runs converted by one command: planned, run on an engine, and told in `batch.json`."""

from .cluster import ClusterError
from .job import Engine, Job, Record
from .manifest import ManifestError
from .plan import Batch, plan_batch
from .run import Summary, run_batch
from .status import FILE

__all__ = [
    "FILE",
    "Batch",
    "ClusterError",
    "Engine",
    "Job",
    "ManifestError",
    "Record",
    "Summary",
    "plan_batch",
    "run_batch",
]
