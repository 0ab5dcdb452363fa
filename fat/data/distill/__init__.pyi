from .synthesis import DistilledBatch as DistilledBatch
from .synthesis import DistillSpec as DistillSpec
from .synthesis import distill as distill
from .synthesis import distilled_folder as distilled_folder
