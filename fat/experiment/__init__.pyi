from .config import EvaluateConfig as EvaluateConfig
from .config import RunConfig as RunConfig
from .evaluate import analyze_run as analyze_run
from .evaluate import evaluate_artifact as evaluate_artifact
from .evaluate import evaluate_run as evaluate_run
from .evaluate import export_run as export_run
from .runner import run as run
