from .config import EvaluateConfig as EvaluateConfig
from .config import RunConfig as RunConfig
from .evaluate import analyse_run as analyse_run
from .evaluate import evaluate_run as evaluate_run
from .evaluate import export_run as export_run
from .evaluate import judge_artefact as judge_artefact
from .runner import run as run
