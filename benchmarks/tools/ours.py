"""FAT, with the calls of ``python train.py data=folder data.root=DIR export=onnx``.

The job's ``overrides`` are those of the command. Of the 500 training images, 50 are the validation
images, which choose the best student; the other 450 calibrate and train. They are read from JPEG
files as by the command, so decoding and random crops are part of the time, and so is the check on
the 50 images that the file has the student's integers in ONNX Runtime.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path

from common import Job, run


def main(job: Job) -> None:
    """Quantize, export and evaluate."""
    import torch
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    import fat
    from fat.experiment.build import InputSpec, make_data
    from fat.experiment.config import parse_run
    from fat.experiment.run_directory import set_up
    from fat.models.float_model import load_float_network
    from fat.models.logits_cache import TeacherLogitsCache

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    conf = Path(fat.__file__).parents[1] / "conf"
    with initialize_config_dir(str(conf), version_base="1.3"):
        composed = compose("train", overrides=["trainer=cpu", *job.fields["overrides"]])
    config = parse_run(OmegaConf.to_container(composed))
    set_up(replace(config.trainer, threads=job.threads), config.seed)
    source = load_float_network(**asdict(config.model))
    data = make_data(config.data, InputSpec.of(source), config.seed)
    spec, recipe = config.quant, config.optim
    path = job.out / "student.onnx"
    with job.timed():
        with job.stage("prepare"):
            examples = data.calibration_dataloader() if spec.equalize.method != "none" else None
            student = fat.prepare(source.network, examples or data.example_batch()[0], spec)
            student.teacher_cache = TeacherLogitsCache(student.teacher)
        with job.stage("calibrate"):
            fat.calibrate(student, data.calibration_dataloader())
        if recipe.trains:
            with job.stage("train"):
                result = fat.fit(
                    student,
                    data.train_dataloader(),
                    validation=data.val_dataloader(),
                    spec=recipe,
                    progress=False,
                    seed=config.seed,
                )
            job.note(training=asdict(result))
        with job.stage("export"):
            fat.export_onnx(student, path, data.val_dataloader())
    images = torch.from_numpy(job.array("val"))
    with torch.no_grad():
        job.logits(torch.cat([student(batch) for batch in torch.split(images, 20)]))
    job.note(images=len(data.train) + len(data.validation), runtime="onnxruntime", file=path.name)
    job.finish("fat-quant", "torch", "timm", "onnx", "onnxruntime")


run(main)
